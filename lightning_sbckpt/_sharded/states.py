"""Which objects hold tensors of which every rank has its own piece, and what their states are.

Parameters in the state of an optimizer are numbered by torch; here they go by their names in the
module that has them, so that a state fits whatever the ranks are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist

from lightning_sbckpt._io.storage import FileDigest
from lightning_sbckpt._sharded import fsdp1
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.errors import HookError, MismatchError, SaveError

State: TypeAlias = "Mapping[str, Any]"

# By name: their modules have moved between releases of torch, and importing them takes time.
_TENSORS = {"DTensor", "ShardedTensor", "FlatParameter"}
_FSDP1 = "FullyShardedDataParallel"
_FSDP2 = "FSDPModule"


class ShardedState:
    """A state of which every rank has its own pieces, to be saved as it is.

    Args:
        state: The state; what ranks have in common is rank zero's.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> State:
        """Return the state."""
        return self._state

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Refuse: it is a state, and nothing that could take one."""
        raise MismatchError("a ShardedState can't take a state: load it into what it was taken of")


def is_sharded_tensor(value: object) -> bool:
    """Return whether a tensor is one of which this rank has but a piece."""
    return isinstance(value, torch.Tensor) and _is_sharded_class(type(value))


@cache
def _is_sharded_class(found: type) -> bool:
    return any(
        cls.__name__ in _TENSORS and cls.__module__.startswith("torch.distributed")
        for cls in found.__mro__
    )


def is_sharded(obj: object) -> bool:
    """Return whether an object has sharded tensors by itself; see `sharded_states`."""
    if isinstance(obj, torch.nn.Module):
        # With FSDP2 parameters may be whole for a while, between a forward and the next.
        wrapped = dist.is_available() and dist.is_initialized() and _has(obj, _FSDP1, _FSDP2)
        return wrapped or _any_sharded(_tensors_of(obj))
    if isinstance(obj, torch.optim.Optimizer):
        return _any_sharded(_parameters(obj))
    return isinstance(obj, ShardedState)


def _any_sharded(tensors: Iterable[object]) -> bool:
    # Asked at every save, of thousands that have a few classes among them.
    kinds = set(map(type, tensors))
    return any(issubclass(kind, torch.Tensor) and _is_sharded_class(kind) for kind in kinds)


def _tensors_of(module: torch.nn.Module) -> Iterator[object]:
    """Yield parameters and buffers, without the names that torch makes up for each of them."""
    for part in module.modules():
        yield from part._parameters.values()  # noqa: SLF001 - there is no public way without names
        yield from part._buffers.values()  # noqa: SLF001


def sharded_states(objects: Mapping[str, object]) -> dict[str, Callable[[], State]]:
    """Return how to get the states of those objects that are sharded, by name.

    An optimizer is, too, if it trains a module among them that is.

    Raises:
        HookError: A sharded optimizer trains a module that is not among them.
    """
    found: dict[str, Callable[[], State]] = {}
    sharded = {name: obj for name, obj in objects.items() if is_sharded(obj)}
    for name, obj in objects.items() if sharded else ():
        if isinstance(obj, torch.optim.Optimizer):
            owner = owner_of(obj, sharded)
            if owner is not None:
                found[name] = partial(optimizer_state, obj, owner)
            elif name in sharded:
                raise HookError(
                    f"the optimizer {name!r} can't be saved: its parameters are sharded, and a "
                    "sharded state goes by the names of parameters, but no module among the "
                    "recoverables has all of them. Add the module as a recoverable, too"
                )
        elif isinstance(obj, torch.nn.Module) and name in sharded:
            found[name] = partial(module_state, obj)
        elif isinstance(obj, ShardedState):
            found[name] = obj.state_dict
    return found


def owner_of(
    optimizer: torch.optim.Optimizer, objects: Mapping[str, object]
) -> torch.nn.Module | None:
    """Return the first module that has all parameters of an optimizer, or None."""
    wanted = {id(parameter) for parameter in _parameters(optimizer)}
    for obj in objects.values():
        if isinstance(obj, torch.nn.Module) and wanted <= names_of(obj).keys():
            return obj
    return None


def names_of(module: torch.nn.Module) -> dict[int, str]:
    """Return the names of a module's parameters, by their id."""
    take_back_to_pieces(module)
    return {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}


def take_back_to_pieces(module: torch.nn.Module) -> None:
    """Have a module's parameters be those that are trained, and hold the gradients.

    With FSDP2 some are whole after a forward without a backward, a validation say, as others.
    """
    if _has(module, _FSDP2):
        module.state_dict()


def is_fsdp1(obj: object) -> bool:
    """Return whether a module is wrapped by FSDP's first version, whose states need its help."""
    return isinstance(obj, torch.nn.Module) and _has(obj, _FSDP1)


def module_state(module: torch.nn.Module) -> State:
    """Return the state of a module, its sharded tensors as they are."""
    if is_fsdp1(module):
        return fsdp1.model_state(module)
    return {plain_name(name): value for name, value in module.state_dict().items()}


def optimizer_state(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> State:
    """Return the state of an optimizer, by the names of the parameters of its module."""
    if is_fsdp1(module):
        return fsdp1.optimizer_state(module, optimizer)
    # Torch's own function would make a step with gradients of zero where none has been made yet,
    # to have a state at all; after it the run would not be the one that it was.
    names = names_of(module)
    numbered = optimizer.state_dict()
    by_number = {
        number: names[id(parameter)]
        for live, group in zip(optimizer.param_groups, numbered["param_groups"], strict=True)
        for parameter, number in zip(live["params"], group["params"], strict=True)
    }
    return {
        "state": {by_number[number]: value for number, value in numbered["state"].items()},
        "param_groups": [
            {**group, "params": [by_number[number] for number in group["params"]]}
            for group in numbered["param_groups"]
        ],
    }


def numbered(state: State) -> dict[str, Any]:
    """Return the state of an optimizer in the ordinary form, its parameters by number."""
    groups = [dict(group) for group in state.get("param_groups", [])]
    numbers: dict[str, int] = {}
    for group in groups:
        for name in group["params"]:
            numbers[name] = len(numbers)
        group["params"] = [numbers[name] for name in group["params"]]
    saved = state.get("state", {})
    return {"state": {numbers[name]: saved[name] for name in saved}, "param_groups": groups}


def sharded_leaves(value: object, where: str = "") -> Iterator[str]:
    """Yield where in a state there are sharded tensors."""
    if is_sharded_tensor(value):
        yield where
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from sharded_leaves(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from sharded_leaves(item, f"{where}[{index}]")


def refuse_pieces(name: str, state: object) -> None:
    """Refuse a state that rank zero alone is about to save, if it has but a piece of it.

    Raises:
        SaveError: There is a sharded tensor in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    where = next(sharded_leaves(state), None)
    if where is not None:
        raise SaveError(
            f"the state of {name!r} was not saved: {where or 'it'} is a sharded tensor, of which a "
            "rank has but a piece, and the object is no module or optimizer, whose pieces are "
            "saved by each rank. Save the module itself, or give the object a save hook. Nothing "
            "of this checkpoint is kept; earlier ones are whole"
        )


def differing_names(names: Sequence[Sequence[str]]) -> SaveError | None:
    """Return what is wrong if not every rank has sharded states of the same names."""
    if all(of_rank == names[0] for of_rank in names):
        return None
    found = "; ".join(f"rank {n}: {', '.join(each) or 'none'}" for n, each in enumerate(names))
    return SaveError(
        f"the ranks have sharded states of different names ({found}), and each state needs all of "
        "its pieces. Add the same recoverables on every rank. Nothing of this checkpoint is kept; "
        "earlier ones are whole"
    )


def require_all_pieces(staged: Path, written: Mapping[str, FileDigest]) -> None:
    """Refuse a checkpoint of which other ranks wrote pieces to a place that this one can't see.

    Args:
        staged: The folder of the checkpoint.
        written: What all ranks have written there.

    Raises:
        SaveError: Files are missing, or have another size than was written.
    """
    for name, found in written.items():
        path = staged / name
        size = path.stat().st_size if path.exists() else None
        if size != found.size:
            raise SaveError(
                f"a rank wrote {name} of the checkpoint with {found.size:,} bytes, and rank zero finds "
                f"{'no such file' if size is None else f'{size:,} bytes'} in {staged.parent}: ranks on "
                "several machines have folders of their own there. A sharded model needs one that "
                "all ranks share (with a URL: local_dir on a shared filesystem). Nothing of this "
                "checkpoint is kept; earlier ones are whole"
            )


def empty_like(live: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
    """Return memory for a saved tensor that belongs to a live one: in the same pieces if it can be.

    Args:
        live: A parameter.
        dtype: Of the saved tensor.
        size: Of the saved tensor, as a whole.
    """
    with torch.no_grad():
        if not is_sharded_tensor(live) or not size:
            return torch.empty(size, dtype=dtype, device=live.device if size else "cpu")
        if tuple(live.shape) == size:
            return torch.empty_like(live, dtype=dtype, requires_grad=False)
        from torch.distributed.tensor import DTensor, Replicate

        whole = torch.empty(size, dtype=dtype, device=live.device)
        mesh = cast("Any", live).device_mesh
        return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _has(module: torch.nn.Module, *names: str) -> bool:
    return any(
        cls.__name__ in names and cls.__module__.startswith("torch.distributed")
        for child in module.modules()
        for cls in type(child).__mro__
    )
