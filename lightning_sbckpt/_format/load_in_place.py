"""Loading a file straight into a live module or optimizer, without a second copy in memory.

The bytes are read into the live tensors, and then torch's own `load_state_dict` is called with a
state that has those very tensors in it: it checks names and shapes, minds versions and calls its
hooks, and what it would copy is there already. Those on a device get their bytes through two small
buffers. What can't be read into directly (another type or memory layout) is read and copied in small
batches. Moments that a new optimizer does not have yet get ordinary memory of their own, each.

This is done only where nothing but torch's code sees the state. A `load_state_dict` or a hook of
somebody else's might keep what it is given, or count on the live tensors being as they were; those
get ordinary tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from lightning_sbckpt._format.index import Identity, Stored, read_outline, span
from lightning_sbckpt._format.read_tensors import (
    Sent,
    Wanted,
    read_into,
    read_tensors,
    read_to_devices,
)
from lightning_sbckpt._io.devices import bytes_of, is_here

# How much is read at a time of what is then copied to another place.
_BATCH = 32 * 2**20
_PLAIN = (bool, int, float, complex, str, type(None))

_Key = TypeVar("_Key")
_Pair = tuple[torch.Tensor, Stored]
# The number of a parameter, and what the optimizer keeps of it under which name.
_Slot = tuple[object, object]


def live_state(obj: object, path: Path) -> Mapping[str, object] | None:
    """Return a state for `obj.load_state_dict` whose values are in the object already.

    Args:
        obj: If it is a module or optimizer, its tensors get the values of the file, wherever names
            and shapes fit.
        path: The file.

    Returns:
        The state; None, and nothing was done, if the file has to be read in another way.

    Raises:
        DamagedCheckpointError: The file can't be read to its end.
    """
    if isinstance(obj, torch.nn.Module):
        return _module_state(obj, path)
    if isinstance(obj, torch.optim.Optimizer):
        return _optimizer_state(obj, path)
    return None


# ---------------------------------------------------------------------- modules


def _module_state(module: torch.nn.Module, path: Path) -> Mapping[str, object] | None:
    if not _has_own(module, torch.nn.Module, "load_state_dict"):
        return None
    if torch.__future__.get_swap_module_params_on_conversion():
        return None
    live = dict(_live_tensors(module, ""))
    outline = read_outline(path, lambda stored: stored) if live else None
    if outline is None or type(outline.state) not in (dict, OrderedDict):
        return None
    state = cast("dict[str, Any]", outline.state)
    if not all(type(value) is Stored for value in state.values()):
        return None
    pairs = {
        key: (live[key], stored)
        for key, stored in state.items()
        if key in live and live[key].shape == stored.size
    }
    if not _are_separate(pairs.values()):
        return None
    _read_pairs(path, outline.identity, pairs.values())
    others = [key for key in state if key not in pairs]
    values = read_tensors(path, outline.identity, [state[key] for key in others])
    state.update(zip(others, values, strict=True))
    state.update({key: target for key, (target, _) in pairs.items()})
    return state


def _live_tensors(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of those submodules that are loaded by torch's code and nothing else."""
    loader = type(module)._load_from_state_dict  # noqa: SLF001 - what subclasses override
    if (
        "_load_from_state_dict" in vars(module)
        or not loader.__module__.startswith("torch.nn.")
        or module._load_state_dict_pre_hooks  # noqa: SLF001 - there is no public way to ask
    ):
        return
    hidden = module._non_persistent_buffers_set  # noqa: SLF001 - as above
    buffers = ((name, value) for name, value in module._buffers.items() if name not in hidden)  # noqa: SLF001
    for name, value in chain(module._parameters.items(), buffers):  # noqa: SLF001
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            tensor = cast("torch.Tensor", value)
            if tensor.layout is torch.strided and not tensor.is_meta:
                yield prefix + name, tensor
    for name, child in module._modules.items():  # noqa: SLF001 - each time a module is met, as torch
        if child is not None:
            yield from _live_tensors(child, f"{prefix}{name}.")


# ---------------------------------------------------------------------- optimizers


def _optimizer_state(optimizer: torch.optim.Optimizer, path: Path) -> Mapping[str, object] | None:
    own = _has_own(optimizer, torch.optim.Optimizer, "load_state_dict")
    if not own or optimizer._optimizer_load_state_dict_pre_hooks:  # noqa: SLF001 - as above
        return None
    outline = read_outline(path, lambda stored: stored)
    if outline is None or not _is_optimizer_state(outline.state):
        return None
    state = cast("dict[str, Any]", outline.state)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) != len(parameters) or not set(state["state"]) <= set(numbers):
        return None
    parameter_of = dict(zip(numbers, parameters, strict=True))
    reused: dict[_Slot, _Pair] = {}
    fresh: dict[_Slot, Stored] = {}
    for number, values in state["state"].items():
        moments = optimizer.state.get(parameter_of[number], {})
        for name, stored in values.items():
            if type(stored) is Stored:
                moment = moments.get(name)
                if type(moment) is torch.Tensor and _takes(moment, stored):
                    reused[number, name] = (moment, stored)
                else:
                    fresh[number, name] = stored
    taken = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if not _are_separate(reused.values()) or any(
        moment.untyped_storage().data_ptr() in taken for moment, _ in reused.values()
    ):
        return None
    _read_pairs(path, outline.identity, reused.values())
    for (number, name), (moment, _) in reused.items():
        # Nothing is changed, but whoever watches the version learns that the values are new.
        moment.as_strided((0,), (1,)).zero_()
        state["state"][number][name] = moment
    on_cpu = {
        slot: item for slot, item in fresh.items() if parameter_of[slot[0]].device.type == "cpu"
    }
    for (number, name), value in _read_all(path, outline.identity, on_cpu):
        state["state"][number][name] = value
    loose = [
        (group, key)
        for group in state["param_groups"]
        for key in group
        if type(group[key]) is Stored
    ]
    values = read_tensors(path, outline.identity, [group[key] for group, key in loose])
    for (group, key), value in zip(loose, values, strict=True):
        group[key] = value
    elsewhere = {slot: item for slot, item in fresh.items() if slot not in on_cpu}
    for slots in _batches(elsewhere):
        # Moved a batch at a time; torch would move them when all are there.
        batch = {slot: elsewhere[slot] for slot in slots}
        for (number, name), value in _read_all(path, outline.identity, batch):
            device = value.device if name == "step" else parameter_of[number].device
            state["state"][number][name] = value.to(device)
    return state


def _read_all(
    path: Path, identity: Identity, wanted: Mapping[_Slot, Stored]
) -> Iterator[tuple[_Slot, torch.Tensor]]:
    values = read_tensors(path, identity, list(wanted.values()), grouped=True)
    return zip(wanted, values, strict=True)


def _is_optimizer_state(state: object) -> bool:
    """Return whether it has the form of torch's own optimizers, and tensors only where they do."""
    if type(state) is not dict or set(state) != {"state", "param_groups"}:
        return False
    groups, moments = state["param_groups"], state["state"]
    return (
        type(groups) is list
        and type(moments) is dict
        and all(
            type(group) is dict
            and type(group.get("params")) is list
            and all(isinstance(number, (int, str)) for number in group["params"])
            # A learning rate that a captured step reads, say, is a tensor.
            and all(type(each) is Stored or _is_plain(each) for each in group.values())
            for group in groups
        )
        and all(
            type(values) is dict
            and all(type(value) is Stored or isinstance(value, _PLAIN) for value in values.values())
            for values in moments.values()
        )
    )


def _is_plain(value: object) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, cast("list[object]", value)))
    return isinstance(value, _PLAIN)


# ---------------------------------------------------------------------- both


def _has_own(obj: object, base: type, name: str) -> bool:
    """Return whether a method is the base class's own."""
    return name not in vars(obj) and getattr(type(obj), name) is getattr(base, name)


def _takes(target: torch.Tensor, stored: Stored) -> bool:
    """Return whether the bytes of a live tensor are those of the stored one, in the same order."""
    return (
        target.device.type != "meta"
        and target.layout is torch.strided
        and target.dtype == stored.dtype
        and target.shape == stored.size
        and target.stride() == stored.stride
        and stored.span == target.numel() * target.element_size()
        and not (target.is_conj() or target.is_neg())
    )


def _span(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return span(tensor.shape, tensor.stride(), tensor.dtype)


def _are_separate(pairs: Iterable[_Pair]) -> bool:
    """Return whether each place in memory gets its values from one place in the file."""
    ranges = {
        (target.data_ptr(), _span(target), target.stride(), stored.place, stored.stride)
        for target, stored in pairs
        if target.numel()
    }
    end = 0
    for address, size, *_ in sorted(ranges):
        if address < end:
            return False
        end = address + size
    return True


def _read_pairs(path: Path, identity: Identity, pairs: Iterable[_Pair]) -> None:
    direct: set[Wanted] = set()
    sent: dict[tuple[int, int], Sent] = {}
    copied: dict[int, _Pair] = {}
    for number, (target, stored) in enumerate(pairs):
        # Tied weights are one place, read once.
        if _takes(target, stored) and is_here(target):
            direct.add((target.data_ptr(), stored.span, stored.place))
        elif _takes(target, stored) and stored.span:
            sent[target.data_ptr(), stored.place] = (_bytes_in(target), stored.place)
        else:
            copied[number] = (target, stored)
    read_into(path, identity, direct)
    read_to_devices(path, identity, list(sent.values()))
    for numbers in _batches({number: stored for number, (_, stored) in copied.items()}):
        values = read_tensors(path, identity, [copied[number][1] for number in numbers])
        with torch.no_grad():
            for number, value in zip(numbers, values, strict=True):
                copied[number][0].copy_(value)


def _bytes_in(tensor: torch.Tensor) -> torch.Tensor:
    begin = tensor.storage_offset() * tensor.element_size()
    return bytes_of(tensor.untyped_storage())[begin : begin + _span(tensor)]


def _batches(stored: Mapping[_Key, Stored]) -> Iterator[list[_Key]]:
    """Yield the keys in groups whose tensors together have about so many bytes."""
    batch: list[_Key] = []
    size = 0
    for key, item in stored.items():
        batch.append(key)
        size += item.span
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
