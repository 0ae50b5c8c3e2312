"""What the objects behind a loader know about where they are: datasets, transforms, collate functions.

An object that offers `state_dict` and `load_state_dict` is asked. Of any other, the attributes that
have changed since it was first seen are kept if they are plain: a count of epochs, an order that
was shuffled in place, a table of weights. What has changed and can't be kept is named.

What takes long to compare is compared at a few places each time, and wholly the more rarely the longer
the fit lasts, until it is seen to change.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch.utils.data import IterableDataset

from lightning_sbckpt.plugin.data.values import (
    ABSENT,
    UNKEEPABLE,
    Mark,
    attribute,
    is_cache,
    is_number,
    is_shared,
    kept,
    put,
)
from lightning_sbckpt.rng.generators import Generator, generator_kinds, with_state
from lightning_sbckpt.rng.walk import Findings, Walk, has_attributes, slots
from lightning_sbckpt.typing import Stateful

__all__ = ["Baseline", "DataState", "asks", "is_stateful"]

Key = tuple[str, str]

# What is looked at only now and then: more objects, or more bytes, than this.
_MANY_OBJECTS = 100
_MANY_BYTES = 2**20
_MANY_BYTES_OF_WORKERS = 2**14
# They say how an object is used at the moment, and are not the data's.
_NOT_DATA = frozenset({"training"})


class Baseline:
    """What objects were like when they were first seen, whichever loader they belong to.

    Loaders may be made again every few epochs, and their dataset stays.
    """

    def __init__(self) -> None:
        # The objects are kept, so that no other gets the id of one.
        self._seen: dict[int, tuple[object, dict[str, Mark]]] = {}

    def of(self, obj: object) -> dict[str, Mark]:
        """Return the marks of an object's attributes as of when it was first asked for."""
        known = self._seen.get(id(obj))
        if known is None:
            marks = {name: Mark.of(value) for name, value in _attributes(obj)}
            known = (obj, marks)
            self._seen[id(obj)] = known
        return known[1]


class DataState:
    """Takes and gives back what the objects at and below a root know about where they are.

    Args:
        root: A loader, or a dictionary of a dataset and a collate function.
        baseline: What the objects were like at the beginning.
        skip: Names of attributes of the root that are left out.
        apart: Objects whose numbers and states somebody else keeps: samplers.
        in_worker: Whether it is asked after every batch, and must be quick.

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
        in_worker: bool = False,
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
        self._in_worker = in_worker
        self._looks = self._takes = 0
        # What was first seen at a path: another object of its class takes its place.
        self._first: dict[str, object] = {}
        # Attributes by their class: where one object's changes, those of the others may.
        self._changing: set[tuple[type, str]] = set()
        self.look()
        for path, obj in self._own():
            self._marks(path, obj)

    def look(self) -> Findings:
        """Walk anew, since objects may have been made; return what was found."""
        if self._kinds != generator_kinds():
            self._kinds = generator_kinds()
            self._walk = Walk(self._kinds)
        self.found = self._walk.through(self._root, skip=self._skip)
        return self.found

    def look_again(self) -> Findings:
        """Walk anew, but ever more rarely through what is large."""
        self._looks += 1
        if len(self.found.objects) > _MANY_OBJECTS and not _is_due(self._looks):
            return self.found
        return self.look()

    def generators(self) -> dict[str, Generator]:
        """Return the generators that the last walk found, but for those without a state."""
        return with_state(self.found.wanted)

    def iterators(self) -> dict[str, object]:
        """Return the iterators that go on where they were and belong to nobody with a state."""
        stateful = {path for path, obj in self._objects() if is_stateful(obj)}
        return {
            path: iterator
            for path, iterator in self.found.iterators.items()
            if not _is_below(path, stateful)
        }

    def take(self, *, states: bool = True) -> dict[str, Any]:
        """Return what has changed, as plain values.

        Args:
            states: Ask the objects that offer a state, too.
        """
        self._takes += 1
        changed: dict[Key, object] = {}
        own: dict[str, object] = {}
        found = self._own()
        is_quick = self._in_worker and len(found) > _MANY_OBJECTS
        most = _MANY_BYTES_OF_WORKERS if self._in_worker else _MANY_BYTES
        for path, obj in found:
            marks = self._marks(path, obj)
            kept_apart = id(obj) in self._apart
            # What it counts is in its state, but for the epoch it was told.
            names: tuple[str, ...] | None = None
            if not kept_apart and is_stateful(obj):
                names = ("epoch", "_epoch")
                if states:
                    self._ask(own, path, obj)
            for name, value in _attributes(obj):
                if (names is not None and name not in names) or (kept_apart and is_number(value)):
                    continue
                if self._in_worker and is_shared(value):
                    # It is the main process's, too, which keeps it.
                    continue
                was, kind = marks.get(name, _NOTHING), (type(obj), name)
                takes_long = was.size > most or (is_quick and not is_number(value))
                looks = not takes_long or kind in self._changing or _is_due(self._takes)
                if (looks or not is_quick) and was.differs(value, whole=looks):
                    if takes_long and looks and not self._was_seen(kind, was, value, is_quick):
                        self._tell(path, obj, f"{name}, until now,")
                    self._keep(changed, marks, (path, name), obj, value)
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
                # An iterable makes it again as it is iterated.
                if key in changed and not self._is_iterable():
                    problems.append(
                        f"its {path!r} is not there yet, and can't be given its {name!r}"
                    )
                continue
            obj = objects[path]
            if key not in self._fresh:
                before = attribute(obj, name)
                self._fresh[key] = ABSENT if before is ABSENT else kept(before)
            try:
                put(obj, name, changed.get(key, self._fresh[key]))
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

    def _is_iterable(self) -> bool:
        dataset = self._root.get("dataset") if isinstance(self._root, dict) else None
        return dataset is None or isinstance(dataset, IterableDataset)

    def _objects(self) -> list[tuple[str, Any]]:
        root = [] if isinstance(self._root, dict) else [("", self._root)]
        return [*root, *self.found.objects.items()]

    def _own(self) -> list[tuple[str, Any]]:
        """Return the objects whose attributes belong to the data, and aren't in another's state."""
        found: list[tuple[str, Any]] = []
        stateful: set[str] = set()
        for path, obj in self._objects():
            if "@" in path or not has_attributes(obj) or _is_below(path, stateful):
                continue
            if is_stateful(obj) and id(obj) not in self._apart:
                stateful.add(path)
            found.append((path, obj))
        return found

    def _marks(self, path: str, obj: object) -> dict[str, Mark]:
        first = self._first.setdefault(path, obj)
        return self._baseline.of(first if type(first) is type(obj) else obj)

    def _was_seen(self, kind: tuple[type, str], was: Mark, value: object, is_quick: bool) -> bool:
        """Return whether a change would have been seen when the value was last looked at."""
        if kind in self._changing or self._takes <= 2:
            return True
        return not is_quick and was.differs(value, whole=False)

    def _keep(
        self,
        changed: dict[Key, object],
        marks: dict[str, Mark],
        key: Key,
        obj: object,
        value: object,
    ) -> None:
        path, name = key
        was = marks.get(name, _NOTHING)
        is_new = was in (_NOTHING, _NONE)
        copied = UNKEEPABLE if _is_below(path, self.found.sampled) else kept(value)
        if copied is not UNKEEPABLE:
            # A word where nothing was is found out at the first use: a path, a host.
            if isinstance(value, str) and is_new:
                return
            changed[key] = copied
        elif is_new:
            # Made at the first use; what changes after that is more than that.
            marks[name] = Mark.of(value)
            return
        elif not is_cache(value, was):
            self._tell(path, obj, name)
        self._changing.add((type(obj), name))

    def _tell(self, path: str, obj: object, what: str) -> None:
        for sampled, count in self.found.sampled.items():
            if path.startswith(f"{sampled}."):
                path = f"{sampled}, of whose {count:,} objects not each is followed"
        self.untold[f"{path or type(obj).__name__}: {what}"] = None


_NOTHING = Mark(None)
_NONE = Mark.of(None)


def _is_due(count: int) -> bool:
    """Return whether what takes long is due: at each doubling."""
    return count & (count - 1) == 0


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


def _is_below(path: str, others: Collection[str]) -> bool:
    parts = path.split(".") if others else []
    return any(".".join(parts[:count]) in others for count in range(len(parts)) if path)


def _attributes(obj: object) -> list[tuple[str, object]]:
    is_module = isinstance(obj, torch.nn.Module)
    found = list(getattr(obj, "__dict__", {}).items())
    found += [(name, getattr(obj, name)) for name in slots(type(obj)) if hasattr(obj, name)]
    return [
        (name, value)
        for name, value in found
        if name not in _NOT_DATA and not (is_module and name.startswith("_"))
    ]
