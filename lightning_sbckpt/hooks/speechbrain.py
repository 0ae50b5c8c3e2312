"""What a loaded SpeechBrain knows: the hooks of its classes, and the old names in its models.

SpeechBrain is never imported here. A program that uses it has loaded it, and then its registries in
`speechbrain.utils.checkpoints` are asked at every lookup, so that its classes are saved and loaded by
the hooks that it registered for them. It is told of the classes that are registered here.

The marks of methods are SpeechBrain's own attributes, so that either decorator reads either mark.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

MARKS = {
    "save": "_speechbrain_saver",
    "load": "_speechbrain_loader",
    "transfer": "_speechbrain_transfer",
}
"""From kinds of hooks to the attribute that marks a method as one."""

_TABLES = {
    "save": "DEFAULT_SAVE_HOOKS",
    "load": "DEFAULT_LOAD_HOOKS",
    "transfer": "DEFAULT_TRANSFER_HOOKS",
}
# Its hooks of torch's classes; those here write and read the same files.
_STOCK = ("speechbrain.utils.checkpoints", "speechbrain.utils._workarounds")

Hook = Callable[..., object]

# A program may put other tables in the place of those that SpeechBrain's classes are in.
_seen: tuple[ModuleType | None, dict[str, list[dict[type, Hook]]]] = (None, {})


def loaded(name: str = "checkpoints") -> ModuleType | None:
    """Return a module of `speechbrain.utils` if the program has loaded it.

    Args:
        name: Its last part.
    """
    return sys.modules.get(f"speechbrain.utils.{name}")


def tables(kind: str) -> list[dict[type, Hook]]:
    """Return SpeechBrain's dictionaries from classes to hooks, none if it isn't loaded.

    Args:
        kind: `"save"`, `"load"` or `"transfer"`.
    """
    global _seen  # noqa: PLW0603 - it goes with the module that was seen
    module = loaded()
    if module is None:
        return []
    if _seen[0] is not module:
        _seen = (module, {kind: [] for kind in _TABLES})
    for each, name in _TABLES.items():
        table = getattr(module, name, None)
        # A table of ours in its place is a dict of another type.
        if type(table) is dict and not any(table is known for known in _seen[1][each]):
            _seen[1][each].append(table)
    return _seen[1][kind]


def registered(cls: type, kind: str) -> Hook | None:
    """Return the hook that SpeechBrain or its user registered for this very class, or None."""
    for table in tables(kind):
        hook = table.get(cls)
        if hook is not None and getattr(hook, "__module__", None) not in _STOCK:
            return hook
    return None


def on_main_alone(hook: Hook) -> Hook | None:
    """Return what a hook does on rank zero if it does nothing on others, else None.

    SpeechBrain wraps such hooks in a function that then broadcasts. Where ranks wait for each other
    already, that is a second place to hang in when one of them fails.
    """
    distributed = loaded("distributed")
    wrapper = getattr(distributed, "main_process_only", None)
    inner = getattr(hook, "__wrapped__", None)
    if wrapper is None or inner is None or _code(hook) is not _code(wrapper(lambda: None)):
        return None
    # Inside, SpeechBrain's barriers know that the other ranks are not there.
    alone: Callable[[], Any] = getattr(distributed, "MainProcessContext", nullcontext)

    @wraps(inner)
    def run(*args: object) -> object:
        with alone():
            return inner(*args)

    return run


def _code(function: object) -> object:
    return getattr(function, "__code__", None)


def tell(cls: type, kind: str, hook: Hook, *, on_every_rank: bool = False) -> None:
    """Register a hook with SpeechBrain, too, unless the class has one there."""
    module = loaded()
    for table in tables(kind)[-1:]:
        if cls not in table:
            alone = kind == "save" and not on_every_rank
            table[cls] = getattr(module, "main_process_only", _as_it_is)(hook) if alone else hook


def _as_it_is(hook: Hook) -> Hook:
    return hook


def renamed(state: dict[str, Any], own: Callable[[], Mapping[str, object]]) -> dict[str, Any]:
    """Return a state with the names that SpeechBrain has given to parameters since it was saved.

    Args:
        state: What a file holds; it is changed.
        own: Returns the state of the object that it is for: what that has under the old name keeps it.
    """
    mapping: Mapping[str, str] = getattr(loaded(), "KEYS_MAPPING", {})
    old = {key: new for key, new in _new_names(state, mapping) if new not in state}
    if not old:
        return state
    kept = own()
    for key, new in old.items():
        if key not in kept:
            # In place: a module's state_dict carries its metadata as an attribute.
            state[new] = state.pop(key)
    return state


def _new_names(
    state: Mapping[str, object], mapping: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    if not mapping:
        return
    for key in state:
        new = key
        if isinstance(key, str):
            for before, after in mapping.items():
                new = new.replace(before, after)
        if new != key:
            yield key, new
