"""The states of all ranks as one: what they have in common is kept once, what differs is stacked.

Each rank has about as many tensors and numbers as a small model. With thousands of ranks, one entry
of a file for each of them costs rank zero more than all the rest of a save; so the ranks whose
states have one form are kept together, with one tensor for all their values at one place.

    {"ranks": 3, "groups": [{"ranks": tensor([0, 1, 2]),
                             "state": {"seed": 5, "words": tensor([1, 2])},
                             "own": {("words",): tensor([[1, 2], [1, 3], [0, 7]])}}]}

`state` is that of the first rank of the group, and `own` has, by place, what differs.
"""

from __future__ import annotations

import math
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.rng.streams import bytes_of

__all__ = ["Packed", "number_of_ranks", "pack", "stack_ranks", "state_of_rank"]

Place = tuple[object, ...]

_COMPARABLE = (str, bytes, bool, int, type(None))
_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64}
_INT64 = range(-(2**63), 2**63)


class _Again:
    """The kind of a tensor that has been met before; its shape is the number of that one."""


class _Hole(NamedTuple):
    """Stands in a form for a tensor, a number, or anything else."""

    kind: type | torch.dtype
    shape: tuple[int, ...] = ()


class Packed(NamedTuple):
    """A rank's state, made to travel.

    Attributes:
        form: Its containers and keys, and the kind of what is in them; equal on most ranks.
        data: The bytes of tensors and numbers, one after the other.
        others: What is neither, one after the other.
    """

    form: bytes
    data: bytes
    others: list[object]


def pack(state: object) -> Packed:
    """Return a state made to travel: copied, and without a tensor, which pickle is slow with.

    Args:
        state: Nested dictionaries, lists and tuples of tensors, numbers and what can be pickled.

    Example:
        >>> packed = pack({"words": torch.tensor([1, 2], dtype=torch.uint8), "name": "torch"})
        >>> list(packed.data), packed.others
        ([1, 2], ['torch'])
    """
    data: list[bytes] = []
    others: list[object] = []
    seen: dict[int, int] = {}

    def hollow(value: object, _place: Place) -> _Hole:
        kind = type(value)
        if kind is int and value in _INT64:
            data.append(cast("int", value).to_bytes(8, sys.byteorder, signed=True))
            return _Hole(int)
        if kind is float:
            data.append(struct.pack("=d", value))
            return _Hole(float)
        if kind is torch.Tensor and _is_usual(cast("torch.Tensor", value)):
            # A loader's state has the same tensor in several places.
            if id(value) in seen:
                return _Hole(_Again, (seen[id(value)],))
            seen[id(value)] = len(seen)
            tensor = cast("torch.Tensor", value).detach().cpu()
            data.append(bytes_of(tensor.reshape(-1).contiguous().view(torch.uint8)))
            return _Hole(tensor.dtype, tuple(tensor.shape))
        others.append(value)
        return _Hole(object)

    form = pickle.dumps(_rebuilt(state, hollow), protocol=5)
    return Packed(form, b"".join(data), others)


def stack_ranks(packed: Sequence[Packed]) -> dict[str, object]:
    """Return the states of all ranks as one, see the top of this file.

    Args:
        packed: The states, by rank.

    Example:
        >>> both = stack_ranks([pack({"seed": 1, "name": "a"}), pack({"seed": 2, "name": "a"})])
        >>> both["groups"][0]["own"]
        {('seed',): tensor([1, 2])}
        >>> state_of_rank(both, 1)
        {'seed': 2, 'name': 'a'}
    """
    members: dict[bytes, list[int]] = {}
    for rank, each in enumerate(packed):
        members.setdefault(each.form, []).append(rank)
    groups = [
        _group(form, ranks, [packed[rank] for rank in ranks]) for form, ranks in members.items()
    ]
    return {"ranks": len(packed), "groups": groups}


def number_of_ranks(part: Mapping[str, Any]) -> int:
    """Return how many ranks have saved what `stack_ranks` returned, or a list of states.

    Example:
        >>> number_of_ranks({"ranks": [{"seed": 1}, {"seed": 2}]})
        2
    """
    ranks = part["ranks"]
    return len(ranks) if isinstance(ranks, list) else int(ranks)


def state_of_rank(part: Mapping[str, Any], rank: int) -> Any:
    """Return a rank's state from what `stack_ranks` returned, or from a list of states.

    Args:
        part: A single process, and the releases before this form, have a list under `ranks`.
        rank: Whose.

    Raises:
        MismatchError: It has no such rank.

    Example:
        >>> state_of_rank({"ranks": [{"seed": 1}, {"seed": 2}]}, 1)
        {'seed': 2}
    """
    ranks = part["ranks"]
    if isinstance(ranks, list):
        return ranks[rank]
    for group in part["groups"]:
        found = (group["ranks"] == rank).nonzero()
        if len(found):
            return _row(group["state"], group["own"], int(found[0]))
    raise MismatchError(
        f"a file with the states of {ranks} ranks has none of rank {rank}: it was not written by "
        "this package, or it was changed. Recover from another checkpoint"
    )


def _group(form: bytes, ranks: list[int], packed: Sequence[Packed]) -> dict[str, object]:
    matrix = _matrix([each.data for each in packed])
    own: dict[Place, object] = {}
    tensors: list[torch.Tensor] = []
    start = number = 0

    def fill(value: object, place: Place) -> object:
        nonlocal start, number
        hole = cast("_Hole", value)
        if hole.kind is object:
            values: list[object] = [each.others[number] for each in packed]
            number += 1
            if not _all_equal(values):
                own[place] = values
            return values[0]
        if hole.kind is _Again:
            again = tensors[hole.shape[0]]
            if len(again) > 1:
                own[place] = again
            return again[0]
        dtype = hole.kind if isinstance(hole.kind, torch.dtype) else _NUMBERS[hole.kind]
        stop = start + dtype.itemsize * math.prod(hole.shape)
        columns, start = matrix[:, start:stop], stop
        if (columns == columns[0]).all():
            columns = columns[:1]
        # A copy: it begins where a number of this type may begin.
        rows = columns.clone(memory_format=torch.contiguous_format)
        tensor = rows.view(-1).view(dtype).view(len(rows), *hole.shape)
        if len(rows) > 1:
            own[place] = tensor
        if hole.kind is dtype:
            tensors.append(tensor)
        # A part of what is kept for all: a file has it once.
        return tensor[0] if hole.kind is dtype else tensor[0].item()

    state = _rebuilt(pickle.loads(form), fill)  # noqa: S301 - from the other ranks of this job
    return {"ranks": torch.tensor(ranks, device="cpu"), "state": state, "own": own}


def _matrix(rows: Sequence[bytes]) -> torch.Tensor:
    if not rows[0]:
        return torch.empty(len(rows), 0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray().join(rows), dtype=torch.uint8).view(len(rows), -1)


def _all_equal(values: Sequence[object]) -> bool:
    first = values[0]
    kind = type(first)
    if kind not in _COMPARABLE:
        return len(values) == 1
    return all(type(value) is kind and value == first for value in values)


def _row(state: object, own: Mapping[Place, Any], row: int) -> object:
    def pick(value: object, place: Place) -> object:
        if place not in own:
            return value
        mine = own[place][row]
        if isinstance(own[place], list):
            return mine
        return mine.clone() if isinstance(value, torch.Tensor) else mine.item()

    return _rebuilt(state, pick)


def _rebuilt(
    value: object, replace: Callable[[object, Place], object], place: Place = ()
) -> object:
    """Return a copy of a nested value with `replace(leaf, place)` in place of every leaf."""
    kind = type(value)
    # The attribute of a module's state_dict stays on it only if that stays whole.
    if kind is dict or (kind is OrderedDict and not vars(cast("OrderedDict[Any, Any]", value))):
        # Equal strings as one object: pickle tells them from copies, and forms are compared.
        return cast("type[dict[object, object]]", kind)(
            (_interned(key), _rebuilt(item, replace, (*place, key)))
            for key, item in cast("dict[object, object]", value).items()
        )
    if kind is list or kind is tuple:
        items = enumerate(cast("list[object]", value))
        return cast("type[list[object]]", kind)(
            _rebuilt(item, replace, (*place, index)) for index, item in items
        )
    return replace(value, place)


def _interned(key: object) -> object:
    return sys.intern(key) if type(key) is str else key


def _is_usual(tensor: torch.Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    return plain and not (tensor.is_conj() or tensor.is_neg())
