"""What the objects behind a loader know about where they are: datasets, transforms, collate functions.

An object that offers `state_dict` and `load_state_dict` is asked. Of any other, the attributes that
have changed since it was first seen are kept if they are plain: a count of epochs, an order that
was shuffled in place, a table of weights. What has changed and can't be kept is named.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import xxhash

from lightning_sbckpt.rng.generators import Generator, generator_kinds, with_state
from lightning_sbckpt.rng.walk import Findings, Walk
from lightning_sbckpt.typing import Stateful

__all__ = ["Baseline", "DataState", "asks", "is_stateful"]

Key = tuple[str, str]

_NUMBERS = (bool, int, float, str)
# Of containers: how many items, and of arrays: how many bytes, are kept at most.
_MOST_ITEMS = 200_000
_MOST_BYTES = 16 * 2**20
# Arrays beyond this size are told apart by some of their bytes.
_WHOLE = 2**20
_SOME = 64
# Generators and counters are made with the first samples, if not before.
_LOOKS = 4
# They say how an object is used at the moment, and are not the data's.
_NOT_DATA = frozenset({"training"})


class Baseline:
    """What objects were like when they were first seen, whichever loader they belong to.

    Loaders may be made again every few epochs, and their dataset stays.
    """

    def __init__(self) -> None:
        # The objects are kept, so that no other gets the id of one.
        self._seen: dict[int, tuple[object, dict[str, object]]] = {}

    def of(self, obj: object) -> dict[str, object]:
        """Return the marks of an object's attributes as of when it was first asked for."""
        known = self._seen.get(id(obj))
        if known is None:
            marks = {name: _mark(value) for name, value in _attributes(obj)}
            known = (obj, marks)
            self._seen[id(obj)] = known
        return known[1]


class DataState:
    """Takes and gives back what the objects at and below a root know about where they are.

    Args:
        root: A loader, or a dictionary of a dataset and a collate function.
        baseline: What the objects were like at the beginning.
        skip: Names of attributes of the root that are left out.
        apart: Returns objects whose numbers and states somebody else keeps: samplers.

    Attributes:
        untold: What has changed and can't be kept, as "owner: attribute", until somebody reads it.
        found: What the last walk found.

    Example:
        >>> from types import SimpleNamespace
        >>> dataset = SimpleNamespace(epoch=0, order=[0, 1, 2])
        >>> data = DataState({"dataset": dataset}, Baseline())
        >>> dataset.epoch, dataset.order[:] = 1, [2, 0, 1]
        >>> state = data.take()

        In a new process:

        >>> dataset = SimpleNamespace(epoch=0, order=[0, 1, 2])
        >>> DataState({"dataset": dataset}, Baseline()).set(state)
        []
        >>> dataset
        namespace(epoch=1, order=[2, 0, 1])
    """

    def __init__(
        self,
        root: object,
        baseline: Baseline,
        *,
        skip: Iterable[str] = (),
        apart: Iterable[object] = (),
    ) -> None:
        self._root = root
        self._skip = frozenset(skip)
        self._baseline = baseline
        self._apart = {id(obj): obj for obj in apart}
        self._walk = Walk(generator_kinds())
        self._kinds = generator_kinds()
        self._fresh: dict[Key, object] = {}
        self._fresh_states: dict[str, object] = {}
        self.untold: dict[str, None] = {}
        self.found = Findings()
        self._looks = 0
        self.look()
        for _, obj in self._own():
            baseline.of(obj)

    def look(self) -> Findings:
        """Walk anew, since objects may have been made; return what was found."""
        if self._kinds != generator_kinds():
            self._kinds = generator_kinds()
            self._walk = Walk(self._kinds)
        self.found = self._walk.through(self._root, skip=self._skip)
        return self.found

    def look_again(self) -> Findings:
        """Walk anew, but not time and again through what is large."""
        self._looks += 1
        if self._looks > _LOOKS and len(self.found.objects) > _SOME:
            return self.found
        return self.look()

    def generators(self) -> dict[str, Generator]:
        """Return the generators that the last walk found, but for those without a state."""
        return with_state(self.found.wanted)

    def iterators(self) -> dict[str, object]:
        """Return the iterators that go on where they were and belong to nobody with a state."""
        stateful = [path for path, obj in self._objects() if is_stateful(obj)]
        return {
            path: iterator
            for path, iterator in self.found.iterators.items()
            if not _is_below(path, stateful)
        }

    def take(self, *, states: bool = True, numbers_only: bool = False) -> dict[str, Any]:
        """Return what has changed, as plain values.

        Args:
            states: Ask the objects that offer a state, too.
            numbers_only: Look at no array or container, which takes longer.
        """
        changed: dict[Key, object] = {}
        own: dict[str, object] = {}
        for path, obj in self._own():
            marks = self._baseline.of(obj)
            kept_apart = id(obj) in self._apart
            if not kept_apart and is_stateful(obj):
                if states:
                    self._ask(own, path, obj)
                # What it counts is in its state, but for the epoch it was told.
                names: tuple[str, ...] | None = ("epoch", "_epoch")
            else:
                names = None
            for name, value in _attributes(obj):
                if names is not None and name not in names:
                    continue
                is_number = isinstance(value, (*_NUMBERS, type(None)))
                if (kept_apart and is_number) or (numbers_only and not is_number):
                    continue
                mark = _mark(value)
                if mark is not None and marks.get(name, _ABSENT) != mark:
                    self._keep(changed, marks, path, obj, name, value)
        state: dict[str, Any] = {}
        if own:
            state["states"] = own
        if changed:
            state["changed"] = changed
        return state

    def set(self, state: Mapping[str, Any], *, states: bool = True) -> list[str]:
        """Put back what `take` returned; what it does not name becomes what it was at first.

        Args:
            state: What was taken.
            states: Give the objects that offer a state theirs, too.

        Returns:
            What could not be put back, a half sentence each.
        """
        problems = []
        changed: Mapping[Key, object] = state.get("changed", {})
        objects = dict(self._own())
        for key in [*changed, *(key for key in self._fresh if key not in changed)]:
            path, name = key
            if path not in objects:
                continue
            obj = objects[path]
            before = vars(obj).get(name, _ABSENT)
            if key not in self._fresh:
                self._fresh[key] = _ABSENT if before is _ABSENT else _kept(before)
            wanted = changed.get(key, self._fresh[key])
            try:
                _put(obj, name, before, wanted)
            except Exception as error:
                problems.append(f"its {path!r} refuses a value for {name!r} ({error})")
        if states:
            for path, own in state.get("states", {}).items():
                problems += self._load(path, objects.get(path), own)
        return problems

    def set_fresh_states(self) -> bool:
        """Give objects that were given a state the one they had before; return if there are any."""
        objects = dict(self._own())
        for path, own in self._fresh_states.items():
            self._load(path, objects.get(path), own)
        return bool(self._fresh_states)

    def _ask(self, own: dict[str, object], path: str, obj: Any) -> None:
        try:
            own[path] = copy.deepcopy(obj.state_dict())
        except Exception as error:
            kind = f"{type(error).__name__}: {error}"
            self.untold[f"{path or type(obj).__name__}: its state_dict raises {kind}"] = None

    def _load(self, path: str, obj: Any, own: object) -> list[str]:
        if obj is None or not is_stateful(obj):
            return [f"its {path!r} has a state in the checkpoint and takes none here"]
        try:
            if path not in self._fresh_states:
                self._fresh_states[path] = copy.deepcopy(obj.state_dict())
            obj.load_state_dict(copy.deepcopy(own))
        except Exception as error:
            return [f"its {path!r} refused its state ({type(error).__name__}: {error})"]
        return []

    def _objects(self) -> list[tuple[str, Any]]:
        root = [] if isinstance(self._root, dict) else [("", self._root)]
        return [*root, *self.found.objects.items()]

    def _own(self) -> list[tuple[str, Any]]:
        """Return the objects whose attributes belong to the data, and aren't in another's state."""
        found: list[tuple[str, Any]] = []
        stateful: list[str] = []
        for path, obj in self._objects():
            if "@" in path or not hasattr(obj, "__dict__") or _is_below(path, stateful):
                continue
            if is_stateful(obj) and id(obj) not in self._apart:
                stateful.append(path)
            found.append((path, obj))
        return found

    def _keep(
        self,
        changed: dict[Key, object],
        marks: Mapping[str, object],
        path: str,
        obj: object,
        name: str,
        value: object,
    ) -> None:
        was = marks.get(name, _ABSENT)
        kept = _kept(value)
        if kept is not _UNKEEPABLE:
            # A word where nothing was is found out at the first use: a path, a host.
            if not (isinstance(value, str) and was in (_ABSENT, _mark(None))):
                changed[path, name] = kept
        elif was not in (None, _ABSENT, _mark(None)) and not isinstance(value, dict):
            self.untold[f"{path or type(obj).__name__}: {name}"] = None


class _Absent:
    """Stands for an attribute that is not there, or a value that can't be kept."""


_ABSENT, _UNKEEPABLE = _Absent(), _Absent()


_asks: dict[type, bool] = {}


def is_stateful(obj: object) -> bool:
    """Return whether an object of the data keeps a state of its own.

    Modules have one, too, and it is about weights.
    """
    others = (torch.nn.Module, torch.optim.Optimizer, type)
    return isinstance(obj, Stateful) and not isinstance(obj, others) and not asks(type(obj))


def asks(cls: type) -> bool:
    """Return whether `state_dict` wants arguments, which only a loader of its library can give."""
    if cls not in _asks:
        method = getattr(cls, "state_dict", None)
        try:
            inspect.signature(cast("Any", method)).bind(None)
            _asks[cls] = False
        except (TypeError, ValueError):
            _asks[cls] = callable(method)
    return _asks[cls]


def _is_below(path: str, others: list[str]) -> bool:
    return any(path.startswith(f"{other}.") if other else path != "" for other in others)


def _attributes(obj: object) -> list[tuple[str, object]]:
    is_module = isinstance(obj, torch.nn.Module)
    return [
        (name, value)
        for name, value in list(vars(obj).items())
        if name not in _NOT_DATA and not (is_module and name.startswith("_"))
    ]


def _mark(value: object) -> object:
    """Return what tells one value of an attribute from another; None for what is not looked at."""
    kind = type(value)
    if kind in _NUMBERS or value is None:
        return kind, value
    if kind is torch.Tensor:
        return _mark_of_tensor(value)  # type: ignore[arg-type]
    if _is_array(value):
        return _mark_of_array(value)
    if kind in (list, tuple, dict, deque):
        some: Any = value.values() if isinstance(value, dict) else value
        return kind, len(some), tuple(map(_mark_of_item, _spread(some)))
    return None


def _spread(items: Any) -> list[object]:
    if len(items) <= _SOME:
        return list(items)
    if isinstance(items, (list, tuple)):
        step = len(items) // _SOME
        return [*items[:: step or 1], items[-1]]
    # What is only appended to, or taken from one end.
    return [len(items)]


def _mark_of_item(item: object) -> object:
    if type(item) in _NUMBERS or item is None:
        return item
    if type(item) in (list, tuple):
        inner: Any = item
        return len(inner), tuple(x if type(x) in _NUMBERS else id(x) for x in inner[:_SOME])
    return id(item)


def _mark_of_tensor(tensor: torch.Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return None
    return tensor.dtype, tuple(tensor.shape), _digest(tensor.detach())


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()[: _SOME * 16]
    if flat.numel() * flat.element_size() > _WHOLE:
        flat = flat[:: flat.numel() // (_SOME * 16)]
    data = flat.contiguous().view(torch.uint8)
    return str(xxhash.xxh3_64_hexdigest(data.numpy().tobytes()))


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "biufc"


def _mark_of_array(array: Any) -> object:
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flatten()[: _SOME * 16]
    if flat.nbytes > _WHOLE:
        flat = flat[:: flat.size // (_SOME * 16)]
    return array.dtype.str, array.shape, xxhash.xxh3_64_hexdigest(flat.tobytes())


def _kept(value: Any) -> object:
    """Return a copy of a value as a tensors-only file holds it, or `_UNKEEPABLE`."""
    if type(value) in _NUMBERS or value is None:
        return value
    if type(value) is torch.Tensor:
        small = value.numel() * value.element_size() <= _MOST_BYTES
        return value.detach().clone() if small else _UNKEEPABLE
    if _is_array(value):
        if value.nbytes > _MOST_BYTES:
            return _UNKEEPABLE
        data = torch.frombuffer(bytearray(value.tobytes() or b"\0"), dtype=torch.uint8)
        return {"array": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if type(value) in (list, tuple, deque, dict):
        items = _kept_items(value)
        return _UNKEEPABLE if items is _UNKEEPABLE else {type(value).__name__: items}
    return _UNKEEPABLE


def _kept_items(value: Any) -> object:
    budget = _MOST_ITEMS

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

    if isinstance(value, dict):
        return copy.deepcopy(value) if plain(value) else _UNKEEPABLE
    return copy.deepcopy(list(value)) if plain(list(value)) else _UNKEEPABLE


def _put(obj: Any, name: str, before: Any, kept: Any) -> None:
    if kept is _UNKEEPABLE:
        return
    if kept is _ABSENT:
        if before is not _ABSENT:
            delattr(obj, name)
        return
    value = _unkept(kept)
    if before is not _ABSENT and _mark(before) == _mark(value):
        return
    # In place: others may hold the same list or array, or have it in shared memory.
    if type(before) is list and type(value) is list:
        before[:] = value
    elif type(before) is deque and type(value) is deque:
        before.clear()
        before.extend(value)
    elif type(before) is torch.Tensor and type(value) is torch.Tensor:
        if before.shape == value.shape:
            before.copy_(value)
        else:
            setattr(obj, name, value)
    elif _is_array(before) and before.shape == getattr(value, "shape", None):
        before[...] = value
    else:
        setattr(obj, name, value)


def _unkept(kept: Any) -> Any:
    if not isinstance(kept, dict):
        return kept.clone() if isinstance(kept, torch.Tensor) else kept
    if "array" in kept:
        import numpy as np

        shape = kept["shape"]
        data = bytes(kept["array"].numpy())
        size = np.dtype(kept["dtype"]).itemsize * int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(bytearray(data[:size]), dtype=kept["dtype"]).reshape(shape)
    ((kind, items),) = kept.items()
    make = {"list": list, "tuple": tuple, "deque": deque, "dict": dict}[kind]
    return make(copy.deepcopy(items))
