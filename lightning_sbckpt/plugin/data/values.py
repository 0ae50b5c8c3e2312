"""Values of attributes: what tells a changed one, which can be kept in a file, how it is put back.

Numbers, words, containers of them, arrays and tensors are kept. Whatever else is replaced by another
object is only known to have changed.
"""

from __future__ import annotations

import array
import copy
import ctypes
import marshal
import sys
from collections import deque
from typing import Any, NamedTuple, cast

import torch
import xxhash
from torch.utils.data import get_worker_info

from lightning_sbckpt._save.late_copy import version_of
from lightning_sbckpt.rng.walk import slots

__all__ = [
    "ABSENT",
    "UNKEEPABLE",
    "Mark",
    "attribute",
    "is_cache",
    "is_number",
    "kept",
    "put",
    "spread",
]

_NUMBERS = (bool, int, float, str)
_PLAIN = (*_NUMBERS, complex, bytes, type(None))
_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
_TABLES = frozenset({"numpy", "pandas", "polars", "pyarrow"})
# Of containers: how many items, and of arrays: how many bytes, are kept at most.
MOST_ITEMS = 200_000
_MOST_BYTES = 16 * 2**20
# Beyond these numbers of items and bytes a value is told apart by some of them only; in a worker, which
# looks more often, beyond those that are kept.
_MOST_COMPARED = 4_000_000
_MOST_HASHED = 2**30
_SOME = 64


class _Absent:
    """Stands for an attribute that is not there, or a value that can't be kept."""


ABSENT, UNKEEPABLE = _Absent(), _Absent()


class Mark(NamedTuple):
    """What tells a value of an attribute from a later one.

    Attributes:
        kind: Its class, and what else is looked at first.
        some: A digest of some of its parts.
        whole: A digest of all of them; None where that would take too long.
        size: How many bytes were compared for it.

    Example:
        >>> numbers = list(range(1000))
        >>> mark = Mark.of(numbers)
        >>> numbers[500] += 1
        >>> mark.differs(numbers, whole=False), mark.differs(numbers)
        (False, True)
    """

    kind: object
    some: object = None
    whole: object = None
    size: int = 0

    @classmethod
    def of(cls, value: Any, *, whole: bool = True) -> Mark:
        """Return the mark of a value."""
        kind = type(value)
        if kind in _PLAIN:
            return cls((kind, value))
        if isinstance(value, torch.Tensor):
            return _mark_of_tensor(cls, value, whole)
        if _is_array(value):
            described = (value.dtype.str, value.shape)
            return cls(described, *_digests(value.reshape(-1).view("u1"), whole))
        if container_of(value) is not None or _is_array_of_objects(value):
            return _mark_of_container(cls, value, whole)
        if _is_shared_number(value):
            return cls((kind, bytes(memoryview(value.get_obj()))))
        if isinstance(value, (bytearray, array.array)):
            return cls((kind, len(value)), xxhash.xxh3_64_hexdigest(bytes(value)))
        return cls((kind, id(value) if _is_replaceable(value) else None))

    def differs(self, value: Any, *, whole: bool = True) -> bool:
        """Return whether a value is another one."""
        now = Mark.of(value, whole=whole)
        if self.whole is None or now.whole is None:
            return self[:2] != now[:2]
        return self[:3] != now[:3]


def is_number(value: object) -> bool:
    """Return whether a value is a number, a word or None, which take no time to compare."""
    return isinstance(value, (*_NUMBERS, type(None))) or _is_scalar(value)


def container_of(value: object) -> type | None:
    """Return which of Python's containers a value is, or is derived from."""
    return next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)


def _items(value: Any) -> Any:
    """Return what is in a container, or an array of objects, without asking a class of the user's."""
    kind = container_of(value)
    if kind is None:
        return value.reshape(-1).tolist()
    if kind is dict:
        return list(dict.items(value))
    return value if type(value) is list else list(kind.__iter__(value))  # type: ignore[attr-defined]


def spread(items: list[Any], most: int = _SOME) -> list[Any]:
    """Return some items of a container, from its beginning to its end.

    Example:
        >>> spread(list(range(10)), 3)
        [0, 3, 9]
    """
    if len(items) <= most:
        return list(items)
    return [*items[:: len(items) // most][: most - 1], items[-1]]


def _is_array(value: Any) -> bool:
    """Return whether a value is an array, or number, of numpy's whose bytes say all of it."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
        return False
    return not value.dtype.hasobject


def _is_array_of_objects(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.hasobject


def _is_scalar(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def _is_shared_number(value: Any) -> bool:
    """Return whether a value is a number or array of `multiprocessing.Value` and `Array`."""
    sharedctypes = sys.modules.get("multiprocessing.sharedctypes")
    if sharedctypes is None or not isinstance(value, sharedctypes.SynchronizedBase):
        return False
    return not isinstance(value.get_obj(), ctypes.Structure)


def is_shared(value: object) -> bool:
    """Return whether a value lies in memory that processes share."""
    return (isinstance(value, torch.Tensor) and value.is_shared()) or _is_shared_number(value)  # type: ignore[no-untyped-call]


def _is_replaceable(value: object) -> bool:
    """Return whether another object in its place is other data."""
    return type(value).__module__.partition(".")[0] in _TABLES


# -- marks -------------------------------------------------------------------------------------


def _mark_of_tensor(cls: type[Mark], tensor: torch.Tensor, whole: bool) -> Mark:
    described = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.device.type)
    is_here = tensor.layout is torch.strided and tensor.device.type == "cpu"
    large = tensor.numel() * tensor.element_size() > _MOST_BYTES and not tensor.is_contiguous()
    if type(tensor) is not torch.Tensor or not is_here or tensor.is_quantized or large:
        # Each operation in place counts it up; reading the values would wait for a device.
        return cls(described, (id(tensor), version_of(tensor)))
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return cls(described, *_digests(data.view(torch.uint8).numpy(), whole))


def _digests(data: Any, whole: bool) -> tuple[object, object, int]:
    """Return a digest of some of the bytes, one of all of them, and how many there are."""
    size = data.nbytes
    some = data if size <= _SOME**2 else data[:: size // _SOME**2 | 1].copy()
    complete = whole and size <= (_MOST_BYTES if get_worker_info() else _MOST_HASHED)
    all_of_it = xxhash.xxh3_64_hexdigest(data) if complete else None
    return xxhash.xxh3_64_hexdigest(some), all_of_it, size


def _mark_of_container(cls: type[Mark], value: Any, whole: bool) -> Mark:
    items = _items(value)
    described = (type(value), len(items))
    some, size = _digest(spread(items))
    if len(items) <= _SOME:
        return cls(described, some, some, size)
    if not whole or len(items) > (MOST_ITEMS if get_worker_info() else _MOST_COMPARED):
        return cls(described, some, None, size)
    return cls(described, some, *_digest(items))


def _digest(items: list[Any]) -> tuple[str, int]:
    """Return a digest of items, and what it took in bytes."""
    try:
        # This format looks at no count of references, and so touches no page of a forked process.
        data, factor = marshal.dumps(items, 2), 1
    except ValueError:
        data, factor = marshal.dumps(cast("Any", _stand_in(items, frozenset())), 2), 20
    return xxhash.xxh3_64_hexdigest(data), len(data) * factor


def _stand_in(value: Any, above: frozenset[int]) -> object:
    """Return something that marshal takes, and that changes with the value."""
    if type(value) in _PLAIN:
        return value
    if id(value) in above:
        return None
    if container_of(value) is not None:
        below = above | {id(value)}
        return [type(value).__name__, *(_stand_in(item, below) for item in _items(value))]
    if isinstance(value, torch.Tensor):
        return id(value), version_of(value)
    if _is_array(value):
        return id(value), Mark.of(value, whole=False).some
    return id(value)


# -- keeping -----------------------------------------------------------------------------------


def kept(value: Any) -> object:
    """Return a copy of a value as a tensors-only file holds it, or `UNKEEPABLE`.

    Example:
        >>> kept([1, 2]), kept([object()]) is UNKEEPABLE
        ({'list': [1, 2]}, True)
    """
    kind = type(value)
    if kind in _NUMBERS or value is None:
        return value
    if kind is torch.Tensor:
        small = value.numel() * value.element_size() <= _MOST_BYTES
        return value.detach().cpu().clone() if small else UNKEEPABLE
    if kind is bytes or isinstance(value, (bytearray, array.array)) or _is_shared_number(value):
        data = bytes(memoryview(value.get_obj() if _is_shared_number(value) else value))
        return {"bytes": _tensor(data)} if len(data) <= _MOST_BYTES else UNKEEPABLE
    if _is_array(value):
        if value.nbytes > _MOST_BYTES:
            return UNKEEPABLE
        return {
            "array": _tensor(value.tobytes()),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "scalar": _is_scalar(value),
        }
    container = container_of(value)
    if container is None or container.__len__(value) > MOST_ITEMS:  # type: ignore[attr-defined]
        return UNKEEPABLE
    items = _items(value)
    items = dict(items) if container is dict else list(items)
    if not _is_plain(items):
        return UNKEEPABLE
    found: dict[str, object] = {container.__name__: copy.deepcopy(items)}
    if container is deque:
        found["maxlen"] = value.maxlen
    if kind is not container:
        found["of"] = kind.__name__
    return found


def is_cache(value: Any, was: Mark) -> bool:
    """Return whether a value that can't be kept is taken for a cache: a dictionary that grew.

    Example:
        >>> was = Mark.of({"a": object()})
        >>> is_cache({"a": object()}, was), is_cache({"a": object(), "b": object()}, was)
        (False, True)
    """
    if not isinstance(value, dict) or Mark.of(value).kind == was.kind:
        return False
    return not _is_plain([item for _, item in spread(_items(value))])


def _is_plain(items: Any) -> bool:
    budget = MOST_ITEMS

    def plain(item: Any) -> bool:
        nonlocal budget
        if type(item) in _NUMBERS or item is None:
            budget -= 1
            return budget >= 0
        if type(item) in (list, tuple):
            return all(map(plain, item))
        if type(item) is dict:
            return all(type(key) in _NUMBERS for key in item) and all(map(plain, item.values()))
        return False

    return plain(items)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]


# -- putting back ------------------------------------------------------------------------------


def attribute(obj: object, name: str) -> Any:
    """Return an attribute of an object's own, not of its class; `ABSENT` if it has none."""
    own = getattr(obj, "__dict__", {})
    return (
        own.get(name, ABSENT)
        if name in own or name not in slots(type(obj))
        else getattr(obj, name, ABSENT)
    )


def put(obj: Any, name: str, value: object) -> None:
    """Give an attribute a value that `kept` returned; in place if it can be.

    Others may hold the same list or array, or have it in memory that processes share.

    Example:
        >>> from types import SimpleNamespace
        >>> dataset = SimpleNamespace(order=[1, 2])
        >>> put(dataset, "order", {"list": [2, 1]})
        >>> dataset.order
        [2, 1]
    """
    before = attribute(obj, name)
    if value is UNKEEPABLE:
        return
    if value is ABSENT:
        if before is not ABSENT:
            delattr(obj, name)
        return
    if not _put_in_place(before, value):
        new = _value_of(value, before)
        if before is ABSENT or Mark.of(before).differs(new):
            setattr(obj, name, new)


def _put_in_place(before: Any, value: Any) -> bool:
    """Write a value into the object that is there; return whether that could be done."""
    if isinstance(value, torch.Tensor):
        fits = type(before) is torch.Tensor and before.shape == value.shape
        if fits and Mark.of(before).differs(value):
            before.copy_(value)
        return fits
    if not isinstance(value, dict):
        return False
    if "array" in value:
        fits = _is_array(before) and not _is_scalar(before) and list(before.shape) == value["shape"]
        if fits and Mark.of(before).differs(new := _value_of(value, before)):
            before[...] = new
        return fits
    if "bytes" in value:
        data = bytes(value["bytes"].numpy())
        if _is_shared_number(before):
            memoryview(before.get_obj()).cast("B")[:] = data
        elif isinstance(before, bytearray):
            before[:] = data
        elif isinstance(before, array.array):
            before[:] = array.array(before.typecode, data)
        else:
            return False
        return True
    kind, items = next(iter(value.items()))
    container = container_of(before)
    if container is None or container.__name__ != kind:
        return False
    if value.get("of", kind) != type(before).__name__ or container in (tuple, frozenset):
        return False
    items = copy.deepcopy(items)
    if container is list:
        list.__setitem__(before, slice(None), items)
    elif container is deque:
        if value.get("maxlen", before.maxlen) != before.maxlen:
            return False
        deque.clear(before)
        deque.extend(before, items)
    else:
        container.clear(before)  # type: ignore[attr-defined]
        container.update(before, items)  # type: ignore[attr-defined]
    return True


def _value_of(value: Any, before: Any) -> Any:
    if not isinstance(value, dict):
        return value.clone() if isinstance(value, torch.Tensor) else value
    if "bytes" in value:
        return bytes(value["bytes"].numpy())
    if "array" in value:
        import numpy as np

        # Of an array with fields, only the one that is there knows them.
        has_fields = _is_array(before) and before.dtype.fields is not None
        shape, kind = value["shape"], before.dtype if has_fields else np.dtype(value["dtype"])
        data = bytes(value["array"].numpy())[: kind.itemsize * int(np.prod(shape, dtype=np.int64))]
        made = np.frombuffer(bytearray(data), dtype=kind).reshape(shape)
        return made[()] if value.get("scalar") else made
    name, items = next(iter(value.items()))
    items = copy.deepcopy(items)
    if name == "deque":
        return deque(items, value.get("maxlen"))
    made = {kind.__name__: kind for kind in _CONTAINERS}[name](items)
    if "of" not in value:
        return made
    if hasattr(type(before), "_make") and type(before).__name__ == value["of"]:
        return type(before)._make(items)
    raise TypeError(f"it was a {value['of']}, which can't be made")
