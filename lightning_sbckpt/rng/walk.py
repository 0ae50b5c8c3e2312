"""What an object holds, and what is held by that: attributes, items, closures, partial functions.

A dataset may hold half of the program. So the walk doesn't leave the objects of the data (it enters
no module, class, tensor, array or file, and nothing of Lightning's); lists of a million samples are
looked at type by type, and entered only if some of them may change by themselves; and where the walk stops
all the same, it says so.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dis import get_instructions
from functools import cache, partial
from itertools import chain
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")
K = TypeVar("K")

__all__ = ["Findings", "Walk", "has_attributes", "is_opaque", "members", "slots"]

# What a walk enters at most, about 20 ms.
MOST_OBJECTS = 10_000
# More items than these are looked at by their types first.
_MANY = _SOME = 64
# Of more items than these, only some are entered, if none has a method that could change it.
_MANY_RECORDS = 1_000
# What makes an object doesn't change it.
_MAKERS = frozenset(
    {"__init__", "__new__", "__post_init__", "__setstate__", "__setattr__", "__delattr__"}
)
_CHANGING_OPS = ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "DELETE_ATTR", "DELETE_SUBSCR")
_CHANGING_CALLS = frozenset(
    {
        *(
            "append",
            "appendleft",
            "extend",
            "insert",
            "pop",
            "popleft",
            "popitem",
            "rotate",
            "next",
        ),
        *(
            "add",
            "update",
            "clear",
            "remove",
            "discard",
            "setdefault",
            "reverse",
            "sort",
            "shuffle",
        ),
        *("setattr", "__setattr__", "copy_", "fill_", "add_", "mul_", "zero_"),
    }
)
# Of a large container: how deep its items are looked into, and how many of them.
_DEEPEST = 8
_MOST_ITEMS = 4_000_000

_FUNCTIONS = (FunctionType, MethodType, BuiltinMethodType, partial)
_CONTAINERS = (list, tuple, dict, deque)
_LEAVES = (
    *(str, bytes, bytearray, int, float, complex, type(None), range, slice, CodeType),
    *(type, ModuleType, torch.Tensor, torch.dtype, torch.device, torch.Size),
)
_FRAMEWORKS = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
# Of these roots no object is entered, but for some that hold what users give them.
_CLOSED = (
    sys.stdlib_module_names - {"argparse", "builtins", "collections", "functools", "types"}
) | {"numpy", "pandas", "pyarrow", "h5py", "lightning_sbckpt", "jax", "tensorflow"}
# Whose classes have no generator or function of users' among their attributes.
_NOT_USERS = _CLOSED | _FRAMEWORKS | {"builtins", "collections", "functools", "torch", "types"}


def _cached(function: Callable[[K], T]) -> Callable[[K], T]:
    """Cache by one argument; a type checker doesn't believe that classes can be hashed."""
    return cast("Callable[[K], T]", cache(cast("Any", function)))


@dataclass
class Findings:
    """What a walk has found, each by its dotted path; what is reached in two ways is there once.

    Attributes:
        wanted: The objects of the wanted kinds.
        objects: What has attributes of its own.
        iterators: Iterators whose place nothing can tell: generators, and those of `itertools`.
        sampled: Large containers of which only some objects were entered, and how many they hold.
        is_whole: Whether nothing else was left out.
    """

    wanted: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    iterators: dict[str, Any] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    is_whole: bool = True


class Walk:
    """Walks through what objects hold, time and again.

    Args:
        wanted: The kinds of objects to look for.

    Example:
        >>> import random
        >>> from types import SimpleNamespace
        >>> noise = partial(max, SimpleNamespace(rng=random.Random(0)))
        >>> dataset = SimpleNamespace(transforms=[noise])
        >>> list(Walk((random.Random,)).through(dataset).wanted)
        ['transforms.0.args.0.rng']
    """

    def __init__(self, wanted: tuple[type, ...]) -> None:
        self._wanted = wanted
        self._large: dict[int, tuple[int, object, str | None]] = {}

    def through(self, root: object, *, skip: frozenset[str] = frozenset()) -> Findings:
        """Return what is found at and below `root`.

        Args:
            root: Where to begin.
            skip: Names of attributes of the root that are left out.
        """
        found = Findings()
        seen = {id(root)}
        # Breadth first, so that the shortest name wins and a limit cuts off the remotest objects.
        level: list[tuple[str, object]] = [("", root)]
        while level:
            below: list[tuple[str, object]] = []
            for path, holder in level:
                some = _SOME if path[:-1] in found.sampled else None
                for name, value in members(holder, self._wanted, some=some):
                    if isinstance(value, _LEAVES) or id(value) in seen:
                        continue
                    if not path and name in skip:
                        continue
                    where = f"{path}{name}"
                    if isinstance(value, self._wanted):
                        seen.add(id(value))
                        found.wanted[where] = value
                    elif self._may_enter(where, value, found):
                        if len(seen) > MOST_OBJECTS:
                            found.is_whole = False
                            return found
                        seen.add(id(value))
                        if has_attributes(value):
                            found.objects[where] = value
                        below.append((f"{where}.", value))
                    elif is_opaque(value):
                        seen.add(id(value))
                        found.iterators[where] = value
            level = below
        return found

    def _may_enter(self, where: str, value: object, found: Findings) -> bool:
        if isinstance(value, _CONTAINERS):
            if len(value) <= _MANY:
                return bool(value) or type(value) not in _CONTAINERS
            holds = self._holds(value)
            if holds is None:
                found.is_whole = False
            if holds == _RECORDS and len(value) > _MANY_RECORDS:
                found.sampled[where] = len(value)
            return bool(holds)
        if isinstance(value, (partial, MethodType)):
            return True
        if isinstance(value, BuiltinMethodType):
            return isinstance(value.__self__, self._wanted)
        if isinstance(value, FunctionType):
            return _root(value) not in _NOT_USERS
        return (hasattr(value, "__dict__") or slots(type(value)) != ()) and _is_open(type(value))

    def _holds(self, value: Any) -> str | None:
        """Return what a large container holds; None if that is unknown."""
        # It is kept, so that no other gets its id.
        known = self._large.get(id(value))
        if known is None or known[0] != len(value):
            known = (len(value), value, _looked_into(value, self._wanted))
            self._large[id(value)] = known
        return known[2]


def members(
    holder: object, wanted: tuple[type, ...] = (), *, some: int | None = None
) -> list[tuple[str, object]]:
    """Return what an object holds, by name.

    Args:
        holder: An object with attributes, a container, a function, a partial function...
        wanted: Kinds of objects that are looked for among class attributes and globals, too.
        some: Of a container, return about so many only, from its beginning to its end.

    Example:
        >>> members([3, 4])
        [('0', 3), ('1', 4)]
    """
    if isinstance(holder, _CONTAINERS):
        step = 1 if some is None else max(1, len(holder) // some)
        found: list[tuple[str, object]]
        if isinstance(holder, dict):
            found = [(str(key), value) for key, value in list(holder.items())[::step]]
        else:
            found = [(str(i * step), value) for i, value in enumerate(list(holder)[::step])]
        return found + list(getattr(holder, "__dict__", {}).items())
    if isinstance(holder, partial):
        return [("func", holder.func), ("args", holder.args), ("keywords", holder.keywords)]
    if isinstance(holder, MethodType):
        return [("self", holder.__self__), ("function", holder.__func__)]
    if isinstance(holder, BuiltinMethodType):
        return [("self", holder.__self__)]
    if isinstance(holder, FunctionType):
        return _of_function(holder) + _shared([(holder.__globals__, holder.__code__)], wanted)
    cls = type(holder)
    attributes = getattr(holder, "__dict__", {})
    if isinstance(holder, torch.nn.Module):
        found = [item for item in attributes.items() if not item[0].startswith("_")]
        found += attributes.get("_modules", {}).items()
    else:
        found = list(attributes.items())
    for name in slots(cls):
        try:
            found.append((name, getattr(holder, name)))
        except AttributeError:
            continue
    if _is_of_framework(cls):
        # It holds the whole run; only what it holds itself belongs to the data.
        found = [item for item in found if isinstance(item[1], wanted)]
    return found + _of_class(cls, wanted)


def _of_function(function: FunctionType) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:
            continue
    if function.__defaults__:
        found.append(("defaults", function.__defaults__))
    if function.__kwdefaults__:
        found.append(("kwdefaults", function.__kwdefaults__))
    found += [(name, value) for name, value in vars(function).items() if name != "__wrapped__"]
    return found


def _of_class(cls: type, wanted: tuple[type, ...]) -> list[tuple[str, object]]:
    if not wanted:
        return []
    attributes, codes = _class_parts(cls)
    found = [
        (f"{name}@{owner.__name__}", vars(owner).get(name))
        for owner, name in attributes
        if isinstance(vars(owner).get(name), wanted)
    ]
    return found + _shared(list(codes), wanted)


@_cached
def _class_parts(
    cls: type,
) -> tuple[list[tuple[type, str]], list[tuple[dict[str, Any], CodeType]]]:
    attributes: list[tuple[type, str]] = []
    codes: list[tuple[dict[str, Any], CodeType]] = []
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] in _NOT_USERS:
            continue
        for name, value in vars(owner).items():
            inner = getattr(value, "__func__", value)
            if isinstance(inner, FunctionType):
                codes.append((inner.__globals__, inner.__code__))
            elif not isinstance(value, _LEAVES):
                attributes.append((owner, name))
    return attributes, codes


def _shared(
    codes: list[tuple[dict[str, Any], CodeType]], wanted: tuple[type, ...]
) -> list[tuple[str, object]]:
    """Return what functions use of their modules: the wanted objects, and users' objects."""
    found: dict[str, object] = {}
    for namespace, code in codes:
        module = str(namespace.get("__name__"))
        is_users = "site-packages" not in str(namespace.get("__file__"))
        for name in _names_in(code):
            value = namespace.get(name)
            if isinstance(value, wanted) or (is_users and _may_be_shared(value)):
                found[f"{name}@{module.replace('.', '/')}"] = value
    return list(found.items())


def _may_be_shared(value: object) -> bool:
    if isinstance(value, FunctionType):
        return _root(value) not in _NOT_USERS
    return not isinstance(value, (*_LEAVES, torch.nn.Module)) and not is_opaque(value)


@_cached
def _names_in(code: CodeType) -> tuple[str, ...]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return tuple(dict.fromkeys(chain(code.co_names, *inner)))


@_cached
def slots(cls: type) -> tuple[str, ...]:
    """Return the names of the attributes that a class keeps in `__slots__`."""
    found: list[str] = []
    for owner in cls.__mro__:
        named = vars(owner).get("__slots__", ())
        for name in (named,) if isinstance(named, str) else tuple(named):
            if name in ("__dict__", "__weakref__"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{owner.__name__.lstrip('_')}{name}" if private else name)
    return tuple(found)


def _root(thing: object) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


@_cached
def _is_of_framework(cls: type) -> bool:
    return any(_root(owner) in _FRAMEWORKS for owner in cls.__mro__)


@_cached
def _is_open(cls: type) -> bool:
    if _root(cls) == "torch":
        in_data = str(cls.__module__).startswith("torch.utils.data")
        return issubclass(cls, torch.nn.Module) or (in_data and not hasattr(cls, "__next__"))
    # A class of the user's that extends one of the closed libraries' is the user's.
    return _root(cls) not in _CLOSED


def is_opaque(value: object) -> bool:
    """Return whether a value is an iterator that doesn't show where it is.

    Example:
        >>> is_opaque(iter([1])), is_opaque([1])
        (True, False)
    """
    is_iterator = hasattr(value, "__next__") and hasattr(value, "__iter__")
    # Files and cursors are asked anew, most of the time.
    if not is_iterator or hasattr(value, "readline") or hasattr(value, "execute"):
        return False
    return not hasattr(value, "__dict__") or _root(type(value)) == "torch"


def has_attributes(value: object) -> bool:
    """Return whether a value has attributes of its own, and is no part of the framework.

    Example:
        >>> has_attributes([1]), has_attributes(chain)
        (False, True)
    """
    cls = type(value)
    if cls in _CONTAINERS or isinstance(value, MethodType) or _is_of_framework(cls):
        return False
    return hasattr(value, "__dict__") or slots(cls) != ()


# What a large container holds: nothing to enter, objects that others may change, or more than that.
_NOTHING, _RECORDS, _ACTIVE = "", "records", "active"


def _looked_into(value: Any, wanted: tuple[type, ...]) -> str | None:
    level: list[Any] = list(value.values() if isinstance(value, dict) else value)
    total, holds = 0, _NOTHING
    for _ in range(_DEEPEST):
        total += len(level)
        if total > _MOST_ITEMS:
            return None
        kinds = set(map(type, level))
        if any(issubclass(kind, wanted) or _holds_back(kind) for kind in kinds):
            return _ACTIVE
        below: list[Any] = []
        for kind in kinds:
            is_container = issubclass(kind, _CONTAINERS)
            if issubclass(kind, _LEAVES) or (not is_container and not _is_open(kind)):
                continue
            if not is_container:
                if _changes_itself(kind):
                    return _ACTIVE
                holds = _RECORDS
            some = level if len(kinds) == 1 else [item for item in level if type(item) is kind]
            below += chain.from_iterable(_values_of(kind, some))
        if not below:
            return holds
        level = below
    return None


@_cached
def _changes_itself(cls: type) -> bool:
    """Return whether an object has a state to offer, or a method that looks as if it changed it."""
    if hasattr(cls, "load_state_dict"):
        return True
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] in _NOT_USERS:
            continue
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType) and name not in _MAKERS:
                if _CHANGING_CALLS.intersection(value.__code__.co_names):
                    return True
                if any(each.opname in _CHANGING_OPS for each in get_instructions(value)):
                    return True
    return False


def _holds_back(kind: type) -> bool:
    # Functions and iterators among many items are rare, and looked at one by one.
    return issubclass(kind, _FUNCTIONS) or (
        hasattr(kind, "__next__") and not hasattr(kind, "readline")
    )


def _values_of(kind: type, some: list[Any]) -> Iterator[Any]:
    if issubclass(kind, dict):
        return map(kind.values, some)
    if issubclass(kind, _CONTAINERS):
        return iter(some)
    names = slots(kind)
    return (
        [
            *getattr(item, "__dict__", {}).values(),
            *(getattr(item, name, None) for name in names),
        ]
        for item in some
    )
