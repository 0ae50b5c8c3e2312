"""What an object holds, and what is held by that: attributes, items, closures, partial functions.

A dataset may hold half of the program. So the walk doesn't leave the objects of the data (it enters
no module, class, tensor, array or file, and nothing of Lightning's); lists of a million samples are
looked at type by type, without a name for each sample; and where the walk stops all the same, it says
so.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")
K = TypeVar("K")

__all__ = ["Findings", "Walk", "is_opaque", "members"]

# What a walk enters at most, about 20 ms.
MOST_OBJECTS = 10_000
# More items than these are looked at by their types first.
_MANY = 64
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
        is_whole: Whether nothing was left out.
    """

    wanted: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    iterators: dict[str, Any] = field(default_factory=dict)
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
        self._large: dict[int, tuple[int, object, bool | None]] = {}

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
                for name, value in members(holder, self._wanted):
                    if isinstance(value, _LEAVES) or id(value) in seen:
                        continue
                    if not path and name in skip:
                        continue
                    where = f"{path}{name}"
                    if isinstance(value, self._wanted):
                        seen.add(id(value))
                        found.wanted[where] = value
                    elif self._may_enter(value, found):
                        if len(seen) > MOST_OBJECTS:
                            found.is_whole = False
                            return found
                        seen.add(id(value))
                        if _has_attributes(value):
                            found.objects[where] = value
                        below.append((f"{where}.", value))
                    elif is_opaque(value):
                        seen.add(id(value))
                        found.iterators[where] = value
            level = below
        return found

    def _may_enter(self, value: object, found: Findings) -> bool:
        if isinstance(value, _CONTAINERS):
            if len(value) <= _MANY:
                return bool(value)
            hides = self._hides(value)
            if hides is None:
                found.is_whole = False
            return bool(hides)
        if isinstance(value, (partial, MethodType)):
            return True
        if isinstance(value, BuiltinMethodType):
            return isinstance(value.__self__, self._wanted)
        if isinstance(value, FunctionType):
            return _root(value) not in _NOT_USERS
        return (hasattr(value, "__dict__") or _slots(type(value)) != ()) and _is_open(type(value))

    def _hides(self, value: Any) -> bool | None:
        """Return whether something wanted lies below a large container; None if that is unknown."""
        # It is kept, so that no other gets its id.
        known = self._large.get(id(value))
        if known is None or known[0] != len(value):
            known = (len(value), value, _looked_into(value, self._wanted))
            self._large[id(value)] = known
        return known[2]


def members(holder: object, wanted: tuple[type, ...] = ()) -> list[tuple[str, object]]:
    """Return what an object holds, by name.

    Args:
        holder: An object with attributes, a container, a function, a partial function...
        wanted: Kinds of objects that are looked for among class attributes and globals, too.

    Example:
        >>> members([3, 4])
        [('0', 3), ('1', 4)]
    """
    if isinstance(holder, dict):
        found = [(str(key), value) for key, value in list(holder.items())]
        return found if type(holder) is dict else found + list(vars(holder).items())
    if isinstance(holder, (list, tuple, deque)):
        return [(str(index), value) for index, value in enumerate(list(holder))]
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
    for name in _slots(cls):
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
def _slots(cls: type) -> tuple[str, ...]:
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


def _has_attributes(value: object) -> bool:
    """Return whether a value has attributes of its own, and is no part of the framework."""
    if isinstance(value, (*_CONTAINERS, MethodType)) or not hasattr(value, "__dict__"):
        return False
    return not _is_of_framework(type(value))


def _looked_into(value: Any, wanted: tuple[type, ...]) -> bool | None:
    level: list[Any] = list(value.values() if isinstance(value, dict) else value)
    total = 0
    for _ in range(_DEEPEST):
        total += len(level)
        if total > _MOST_ITEMS:
            return None
        kinds = set(map(type, level))
        if any(issubclass(kind, wanted) or _holds_back(kind) for kind in kinds):
            return True
        below: list[Any] = []
        for kind in kinds:
            if issubclass(kind, _LEAVES) or (
                not issubclass(kind, _CONTAINERS) and not _is_open(kind)
            ):
                continue
            some = level if len(kinds) == 1 else [item for item in level if type(item) is kind]
            below += chain.from_iterable(_values_of(kind, some))
        if not below:
            return False
        level = below
    return None


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
    slots = _slots(kind)
    return (
        [
            *getattr(item, "__dict__", {}).values(),
            *(getattr(item, name, None) for name in slots),
        ]
        for item in some
    )
