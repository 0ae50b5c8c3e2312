"""Loading sharded states into live modules and optimizers, whatever ranks there are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from lightning_sbckpt._format.load import open_state
from lightning_sbckpt._sharded import fsdp1
from lightning_sbckpt._sharded.contents import SavedTensor
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt._sharded.reading import SavedShards, copy_whole, whole_tensor
from lightning_sbckpt._sharded.states import (
    empty_like,
    is_fsdp1,
    is_sharded,
    is_sharded_tensor,
    module_state,
    names_of,
    numbered,
    owner_of,
)
from lightning_sbckpt.errors import MismatchError, SBCheckpointError


def load_sharded(obj: object, path: Path, objects: Mapping[str, object]) -> None:
    """Load the state in a folder into a live object, whose tensors may be sharded or not.

    Args:
        obj: The object.
        path: The folder.
        objects: All recoverables, among which the module of an optimizer is looked for.

    Raises:
        MismatchError: The state doesn't fit the object.
        DamagedCheckpointError: The state can't be read.
    """
    shards = SavedShards(path)
    try:
        if isinstance(obj, torch.nn.Module):
            _load_module(obj, shards)
        elif isinstance(obj, torch.optim.Optimizer):
            _load_optimizer(obj, owner_of(obj, objects), shards)
        else:
            cast("Any", obj).load_state_dict(shards.state())
    except SBCheckpointError:
        raise
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise MismatchError(
            f"the state in {path} does not fit the {type(obj).__name__} it is loaded into: {error}"
        ) from error


def load_whole(obj: object, path: Path) -> bool:
    """Load a file of whole tensors into a sharded object; return whether the object is one.

    Raises:
        MismatchError: It doesn't fit.
    """
    if not is_sharded(obj):
        return False
    # Mapped, so that a rank reads of the file what its own pieces need.
    state = dict(cast("Mapping[str, Any]", open_state(path)))
    if isinstance(obj, torch.optim.Optimizer):
        obj.load_state_dict(optimizer_pieces(state, obj, path))
        return True
    module = cast("torch.nn.Module", obj)
    own = module_state(module)
    require_fit(path, module, sizes_of(own), sizes_of(state))
    pieces = {plain_name(name): value for name, value in model_pieces(state, own).items()}
    _hand_over(module, {name: pieces.get(plain_name(name), own[name]) for name in own})
    return True


def model_pieces(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with whole tensors in pieces like those of a live one, where names are equal."""
    live = {plain_name(name): value for name, value in own.items()}
    pieces = dict(state)
    for name, value in state.items():
        like: Any = live.get(plain_name(name))
        if not is_sharded_tensor(like) or is_sharded_tensor(value):
            continue
        if tuple(like.shape) == tuple(value.shape):
            pieces[name] = _piece_of(value, like)
    return pieces


def optimizer_pieces(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, path: Path
) -> dict[str, Any]:
    """Return an ordinary state of an optimizer, of whole tensors, in pieces like the live ones.

    Raises:
        MismatchError: It has groups of other sizes.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _require_groups(path, optimizer, _groups_in(state), _groups_in(optimizer))
    pieces = {}
    for number, parameter in zip(numbers, live, strict=True):
        if number in state["state"]:
            pieces[number] = {
                key: _piece_of(value, parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state["state"][number].items()
            }
    return {**state, "state": pieces}


def _piece_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    target = empty_like(like, whole.dtype, tuple(whole.shape))
    copy_whole(whole, target)
    return target


def _require_groups(
    path: Path,
    optimizer: torch.optim.Optimizer,
    saved: Sequence[Sequence[object]],
    live: Sequence[Sequence[object]],
) -> None:
    sizes, own = ([len(group) for group in groups] for groups in (saved, live))
    if sizes != own:
        raise MismatchError(
            f"{path} has groups of {sizes} parameters, the {type(optimizer).__name__} of {own}: "
            "make it with the same parameters in the same groups as when it was saved"
        )


def _groups_in(owner: torch.optim.Optimizer | Mapping[str, Any]) -> list[list[Any]]:
    groups = owner.get("param_groups", []) if isinstance(owner, Mapping) else owner.param_groups
    return [list(group["params"]) for group in groups]


def optimizer_like(
    shards: SavedShards, optimizer: torch.optim.Optimizer, names: Mapping[int, str] | None
) -> dict[str, Any]:
    """Return the saved state of an optimizer in its ordinary form, its tensors in pieces like live.

    Args:
        shards: What was saved.
        optimizer: The live one.
        names: The names of its parameters by id; None to take them in the order in which they are.

    Raises:
        MismatchError: It trains other parameters.
    """
    saved = _groups_in(shards.nested(shards.values()))
    live = _groups_in(optimizer)
    _require_groups(shards.folder, optimizer, saved, live)
    if names is not None:
        own = [[names[id(parameter)] for parameter in group] for group in live]
        _require_names(shards.folder, optimizer, saved, own)
    by_name = {
        name: parameter
        for group, parameters in zip(saved, live, strict=True)
        for name, parameter in _paired(group, parameters, names)
    }

    def allocate(name: str, tensor: SavedTensor) -> torch.Tensor:
        place = shards.contents.place(name)
        parameter = by_name.get(str(place[1])) if place[0] == "state" and len(place) > 2 else None
        if parameter is None:
            return whole_tensor(name, tensor)
        return empty_like(parameter, tensor.dtype, tensor.size)

    state = shards.state(allocate)
    if names is not None:
        # In the order of the live ones: numbers go by it.
        for group, parameters in zip(state["param_groups"], live, strict=True):
            back = {id(by_name[name]): name for name in group["params"]}
            group["params"] = [back[id(parameter)] for parameter in parameters]
    return numbered(state)


def _require_names(
    path: Path, optimizer: torch.optim.Optimizer, saved: list[list[str]], live: list[list[str]]
) -> None:
    own = [sorted(group) for group in live]
    wanted = [sorted(map(plain_name, group)) for group in saved]
    if own != wanted:
        lacking = sorted(set(chain(*own)) - set(chain(*wanted)))
        raise MismatchError(
            f"{path} does not have the parameters that the {type(optimizer).__name__} trains: "
            f"{', '.join(lacking[:5]) or 'they are in other groups'}. Make it with the same "
            "parameters in the same groups as when it was saved"
        )


def _paired(
    group: list[str], parameters: list[torch.Tensor], names: Mapping[int, str] | None
) -> list[tuple[str, torch.Tensor]]:
    if names is None:
        return list(zip(group, parameters, strict=True))
    live = {names[id(parameter)]: parameter for parameter in parameters}
    return [(name, live[plain_name(name)]) for name in group]


def flat_optimizer_like(
    saved: SavedShards | Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    module: torch.nn.Module,
    path: Path,
    *,
    by_order: bool,
) -> dict[str, Any]:
    """Return the saved state of an optimizer as it takes it where FSDP's first version wraps a module.

    Args:
        saved: The state in pieces, or one of whole tensors with parameters by number.
        optimizer: The live one.
        module: Whose parameters it trains.
        path: Of the state, for the message.
        by_order: Take parameters of other names in the order in which they are.

    Raises:
        MismatchError: It trains other parameters.
    """
    state: Mapping[str, Any] = (
        saved.nested(saved.values()) if isinstance(saved, SavedShards) else saved
    )
    groups, live = _groups_in(state), fsdp1.names_in_groups(module, optimizer)
    _require_groups(path, optimizer, groups, live)
    if not by_order:
        _require_names(path, optimizer, groups, live)
    own: dict[object, str] = {}
    for group, names in zip(groups, live, strict=True):
        plain = {name: plain_name(str(name)) for name in group}
        same = set(plain.values()) == set(names)
        own.update(plain if same else zip(group, names, strict=True))
    like = module_state(module)
    misfits: list[str] = []

    def fits(name: object, key: object, size: tuple[int, ...]) -> bool:
        wanted = tuple(like[own[name]].shape)
        if size != wanted:
            misfits.append(
                f"{key} of {own[name]}: {size} in the checkpoint, {wanted} in the module"
            )
        return size == wanted

    def allocate(flat: str, tensor: SavedTensor) -> torch.Tensor:
        place = cast("SavedShards", saved).contents.place(flat)
        if place[0] != "state" or place[1] not in own or not tensor.size:
            return whole_tensor(flat, tensor)
        if not fits(place[1], place[-1], tensor.size):
            return torch.empty(tensor.size, dtype=tensor.dtype, device="meta")
        return empty_like(like[own[place[1]]], tensor.dtype, tensor.size)

    def piece(name: object, key: object, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        fit = fits(name, key, tuple(value.shape))
        return _piece_of(value, like[own[name]]) if fit else value

    if isinstance(saved, SavedShards):
        state = saved.state(allocate)
        states = state.get("state", {})
    else:
        states = {
            name: {key: piece(name, key, value) for key, value in each.items()}
            for name, each in saved["state"].items()
        }
    if misfits:
        raise MismatchError(
            f"the state in {path} does not fit the {type(optimizer).__name__}:\n  "
            + "\n  ".join(misfits)
        )
    named = {
        "state": {own[name]: each for name, each in states.items()},
        "param_groups": [
            {**group, "params": [own[name] for name in group["params"]]}
            for group in state.get("param_groups", [])
        ],
    }
    return fsdp1.local_optimizer_state(module, optimizer, named)


def _load_module(module: torch.nn.Module, shards: SavedShards) -> None:
    state = dict(module_state(module)) if is_fsdp1(module) else module.state_dict()
    own = {plain_name(name): name for name in state}
    saved = {plain_name(str(shards.contents.place(n)[-1])): n for n in shards.contents.tensors}
    sizes = {name: shards.contents.tensors[flat].size for name, flat in saved.items()}
    require_fit(shards.folder, module, sizes_of(state), sizes)
    shards.fill({saved[name]: state[own[name]].detach() for name in sizes})
    for flat, value in shards.values().items():
        name = plain_name(str(shards.contents.place(flat)[-1]))
        if name in own:
            state[own[name]] = value
    # It has been read into the live tensors; hooks of the module and what is no tensor want this.
    _hand_over(module, state)


def _hand_over(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    if is_fsdp1(module):
        fsdp1.load_model_state(module, state)
        return
    module.load_state_dict(state)


def _load_optimizer(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module | None, shards: SavedShards
) -> None:
    if module is not None and is_fsdp1(module):
        optimizer.load_state_dict(
            flat_optimizer_like(shards, optimizer, module, shards.folder, by_order=False)
        )
        return
    names = None if module is None else names_of(module)
    optimizer.load_state_dict(optimizer_like(shards, optimizer, names))


def sizes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the tensors in a state, by plain names."""
    return {
        plain_name(name): tuple(value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def require_fit(
    path: Path,
    module: torch.nn.Module,
    own: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a state of other names or sizes than those of a module.

    Raises:
        MismatchError: It is one; every mismatch is listed.
    """
    problems = [f"{name}: only in the module" for name in own if name not in saved]
    problems += [f"{name}: only in the checkpoint" for name in saved if name not in own]
    problems += [
        f"{name}: {saved[name]} in the checkpoint, {size} in the module"
        for name, size in own.items()
        if name in saved and saved[name] != size
    ]
    if problems:
        raise MismatchError(
            f"the state in {path} does not fit the {type(module).__name__} it is loaded into:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded"
        )
