"""The registry of hooks, and the decorators that fill it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, overload

from lightning_sbckpt.errors import HookSignatureError
from lightning_sbckpt.hooks import speechbrain
from lightning_sbckpt.typing import LoadHook, SaveHook, TransferHook

__all__ = [
    "DEFAULT_LOAD_HOOKS",
    "DEFAULT_SAVE_HOOKS",
    "DEFAULT_TRANSFER_HOOKS",
    "HookRegistry",
    "check_signature",
    "default_registry",
    "get_default_hook",
    "mark_as_loader",
    "mark_as_saver",
    "mark_as_transfer",
    "register_checkpoint_hooks",
]

F = TypeVar("F", bound=Callable[..., object])
C = TypeVar("C", bound=type)

_SIGNATURES: dict[str, tuple[str, tuple[object, ...]]] = {
    "save": ("(obj, path)", (object(), Path("file"))),
    "load": ("(obj, path, end_of_epoch)", (object(), Path("file"), True)),
    "transfer": ("(obj, path)", (object(), Path("file"))),
}
# The hooks that need no registration.
_BUILTIN = "lightning_sbckpt.hooks.builtin"


def check_signature(kind: str, hook: Callable[..., object], owner: str = "") -> None:
    """Refuse a hook that can't be called the way it will be.

    Args:
        kind: `"save"`, `"load"` or `"transfer"`.
        hook: The callable.
        owner: What the hook is for, for the message.

    Raises:
        HookSignatureError: The hook isn't callable with positional arguments of its kind.

    Example:
        >>> check_signature("save", lambda obj, path: None)
        >>> check_signature("load", lambda obj, path: None, "'tokenizer'")
        Traceback (most recent call last):
        lightning_sbckpt.errors.HookSignatureError: the load hook <lambda> for 'tokenizer' ...
    """
    expected, arguments = _SIGNATURES[kind]
    named = getattr(hook, "__qualname__", repr(hook)).rpartition("<locals>.")[2]
    subject = f"the {kind} hook {named}" + (f" for {owner}" if owner else "")
    if not callable(hook):
        raise HookSignatureError(f"{subject} is a {type(hook).__name__}, expected a callable")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return  # A builtin tells no signature; the call will show.
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise HookSignatureError(
            f"{subject} has the signature {signature}, expected one that can be called as "
            f"{expected} with positional arguments: {error}"
        ) from error


class _Hooks(dict[type, Callable[..., object]]):
    """From classes to hooks of one kind; what is put in is checked.

    Attributes:
        kind: `"save"`, `"load"` or `"transfer"`.
        asks_speechbrain: Whether its registry is asked as well, where it is loaded.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.asks_speechbrain = False

    def find(self, obj: object) -> tuple[type, Callable[..., object]] | None:
        """Return the first class along the object's MRO that has a hook, and its hook."""
        for cls in type(obj).__mro__:
            own = self.get(cls)
            if own is not None and own.__module__ != _BUILTIN:
                return cls, own
            theirs = speechbrain.registered(cls, self.kind) if self.asks_speechbrain else None
            found = own if theirs is None else theirs
            if found is not None:
                return cls, found
        return None

    def __setitem__(self, cls: type, hook: Callable[..., object]) -> None:
        check_signature(self.kind, hook, getattr(cls, "__qualname__", repr(cls)))
        super().__setitem__(cls, hook)


class HookRegistry:
    """The hooks of classes: three dictionaries and what is to be saved on every rank.

    A registry can be copied, so that hooks can be tried or replaced without touching those of the
    rest of the program.

    Attributes:
        save: From classes to hooks `(obj, path)`.
        load: From classes to hooks `(obj, path, end_of_epoch)`.
        transfer: From classes to hooks `(obj, path)`.
        save_on_every_rank: Classes whose save hook runs on every rank, not on rank zero alone.

    Example:
        >>> registry = default_registry.copy()
        >>> registry.save[set] = lambda obj, path: path.write_text(" ".join(sorted(obj)))
        >>> set in registry.save, set in default_registry.save
        (True, False)
    """

    def __init__(self) -> None:
        self.save = _Hooks("save")
        self.load = _Hooks("load")
        self.transfer = _Hooks("transfer")
        self.save_on_every_rank: set[type] = set()
        self._lazy: dict[str, Callable[[HookRegistry, type], None]] = {}

    def __reduce__(self) -> str | tuple[object, ...]:
        """Pickle the default one by its name: it is the same for every copy and in every process."""
        return "default_registry" if self is default_registry else object.__reduce_ex__(self, 2)

    @property
    def _tables(self) -> tuple[_Hooks, _Hooks, _Hooks]:
        return self.save, self.load, self.transfer

    def copy(self) -> HookRegistry:
        """Return a registry with the same hooks that can be changed on its own.

        Example:
            >>> default_registry.copy().save == default_registry.save
            True
        """
        other = HookRegistry()
        for table, mine in zip(other._tables, self._tables, strict=True):
            table.update(mine)
            table.asks_speechbrain = mine.asks_speechbrain
        other.save_on_every_rank.update(self.save_on_every_rank)
        other._lazy.update(self._lazy)
        return other

    def register_lazily(self, name: str, register: Callable[[HookRegistry, type], None]) -> None:
        """Have `register(registry, cls)` called when a class of that name is first met.

        A library that the program may never import gets its hooks so without being imported here.

        Args:
            name: Module and qualified name of the class, `"torchmetrics.metric.Metric"`.
            register: Puts the hooks of the class into the registry.

        Example:
            >>> registry = HookRegistry()
            >>> registry.register_lazily("decimal.Decimal", lambda registry, cls: None)
        """
        self._lazy[name] = register

    def ask_speechbrain(self) -> None:
        """Ask SpeechBrain's registry as well, and tell it what is registered here, where it is loaded.

        The default registry does so.

        Example:
            >>> HookRegistry().ask_speechbrain()
        """
        for table in self._tables:
            table.asks_speechbrain = True
        self.tell_speechbrain()

    def tell_speechbrain(self) -> None:
        """Let SpeechBrain, where it is loaded, save and load objects of the classes registered here.

        Example:
            >>> default_registry.tell_speechbrain()
        """
        if not self.save.asks_speechbrain or speechbrain.loaded() is None:
            return
        for table in self._tables:
            for cls, hook in table.items():
                if hook.__module__ != _BUILTIN:
                    everywhere = cls in self.save_on_every_rank
                    speechbrain.tell(cls, table.kind, hook, on_every_rank=everywhere)

    def saver(self, obj: object) -> SaveHook | None:
        """Return the save hook of the object's class, or None.

        Example:
            >>> default_registry.saver(object()) is None
            True
        """
        hook = self._find(obj, self.save)
        return hook if hook is None else speechbrain.on_main_alone(hook) or hook

    def loader(self, obj: object) -> LoadHook | None:
        """Return the load hook of the object's class, or None.

        Example:
            >>> default_registry.loader(object()) is None
            True
        """
        return self._find(obj, self.load)

    def transferrer(self, obj: object) -> TransferHook | None:
        """Return the transfer hook of the object's class, or None.

        Example:
            >>> default_registry.transferrer(object()) is None
            True
        """
        return self._find(obj, self.transfer)

    def saves_on_every_rank(self, obj: object) -> bool:
        """Return whether the object's save hook runs on every rank.

        Example:
            >>> default_registry.saves_on_every_rank(object())
            False
        """
        found = self.save.find(obj)
        if found is None or found[0] in self.save:
            return found is not None and found[0] in self.save_on_every_rank
        # SpeechBrain calls its hooks on every rank.
        return speechbrain.on_main_alone(found[1]) is None

    def was_given_saver(self, obj: object) -> bool:
        """Return whether somebody registered a save hook for the object's class, or a base of it.

        Example:
            >>> default_registry.was_given_saver(object())
            False
        """
        found = self.save.find(obj)
        return found is not None and found[1].__module__ != _BUILTIN

    def beside(self, obj: object, kind: str) -> Callable[..., object] | None:
        """Return the marked method that the object's hook leaves out, or None.

        It is that of a class that nobody decorated, while the hook is that of one of its bases.

        Args:
            obj: The object.
            kind: `"save"` or `"load"`.

        Example:
            >>> class Unnoticed(set):
            ...     @mark_as_saver
            ...     def save(self, path): ...
            >>> registry = HookRegistry()
            >>> registry.save[set] = lambda obj, path: None
            >>> registry.beside(Unnoticed(), "save") is Unnoticed.save
            True
        """
        found = (self.save if kind == "save" else self.load).find(obj)
        if found is None:
            return None
        bases = type(obj).__mro__
        for cls in bases[: bases.index(found[0])]:
            for method in vars(cls).values():
                if _is_marked(method, kind):
                    return method  # type: ignore[no-any-return]
        return None

    def _find(self, obj: object, hooks: _Hooks) -> Callable[..., object] | None:
        self.tell_speechbrain()
        if self._lazy:
            for cls in type(obj).__mro__:
                register = self._lazy.pop(f"{cls.__module__}.{cls.__qualname__}", None)
                if register is not None:
                    register(self, cls)
        return get_default_hook(obj, hooks)


default_registry = HookRegistry()
"""The registry used when none is named."""

DEFAULT_SAVE_HOOKS = default_registry.save
DEFAULT_LOAD_HOOKS = default_registry.load
DEFAULT_TRANSFER_HOOKS = default_registry.transfer


def get_default_hook(
    obj: object, default_hooks: Mapping[type, Callable[..., object]]
) -> Callable[..., object] | None:
    """Return the hook of the first class along the object's MRO that has one, or None.

    Args:
        obj: The object to save or load.
        default_hooks: From classes to hooks.

    Example:
        >>> get_default_hook(True, {int: max, object: min}) is max
        True
    """
    if isinstance(default_hooks, _Hooks):
        found = default_hooks.find(obj)
        return None if found is None else found[1]
    for cls in type(obj).__mro__:
        if cls in default_hooks:
            return default_hooks[cls]
    return None


def _mark(method: F, kind: str) -> F:
    check_signature(kind, method)
    setattr(method, speechbrain.MARKS[kind], True)
    return method


def _is_marked(method: object, kind: str) -> bool:
    return getattr(method, speechbrain.MARKS[kind], False) is True


def mark_as_saver(method: F) -> F:
    """Mark a method `(self, path)` as the one that saves; see `register_checkpoint_hooks`.

    Raises:
        HookSignatureError: The method can't be called so.

    Example:
        >>> mark_as_saver(lambda self, path: None)  # doctest: +ELLIPSIS
        <function <lambda> at ...>
    """
    return _mark(method, "save")


def mark_as_loader(method: F) -> F:
    """Mark a method `(self, path, end_of_epoch)` as the one that loads.

    Raises:
        HookSignatureError: The method can't be called so.

    Example:
        >>> mark_as_loader(lambda self, path: None)
        Traceback (most recent call last):
        lightning_sbckpt.errors.HookSignatureError: the load hook <lambda> has the signature ...
    """
    return _mark(method, "load")


def mark_as_transfer(method: F) -> F:
    """Mark a method `(self, path)` as the one that takes what fits, for `Pretrainer`.

    Raises:
        HookSignatureError: The method can't be called so.

    Example:
        >>> mark_as_transfer(lambda self, path: None)  # doctest: +ELLIPSIS
        <function <lambda> at ...>
    """
    return _mark(method, "transfer")


@overload
def register_checkpoint_hooks(cls: C, save_on_main_only: bool = True) -> C: ...
@overload
def register_checkpoint_hooks(
    cls: None = None, save_on_main_only: bool = True
) -> Callable[[C], C]: ...
def register_checkpoint_hooks(
    cls: C | None = None, save_on_main_only: bool = True
) -> C | Callable[[C], C]:
    """Register the marked methods of a class as its hooks; a class decorator.

    Args:
        cls: The class, with methods marked by `mark_as_saver`, `mark_as_loader` and
            `mark_as_transfer`. Subclasses inherit the hooks.
        save_on_main_only: Save on rank zero only. False for a saver that gathers from every rank.

    Returns:
        The class.

    Example:
        >>> @register_checkpoint_hooks
        ... class Counter:
        ...     def __init__(self):
        ...         self.count = 0
        ...
        ...     @mark_as_saver
        ...     def save(self, path):
        ...         path.write_text(str(self.count))
        ...
        ...     @mark_as_loader
        ...     def load(self, path, end_of_epoch):
        ...         self.count = int(path.read_text())
        >>> get_default_hook(Counter(), DEFAULT_SAVE_HOOKS) is Counter.save
        True
    """
    if cls is None:
        return lambda decorated: register_checkpoint_hooks(decorated, save_on_main_only)
    tables = {"save": DEFAULT_SAVE_HOOKS, "load": DEFAULT_LOAD_HOOKS}
    tables["transfer"] = DEFAULT_TRANSFER_HOOKS
    for method in vars(cls).values():
        for kind, table in tables.items():
            if not _is_marked(method, kind):
                continue
            table[cls] = method
            if kind == "save":
                default_registry.save_on_every_rank.discard(cls)
                if not save_on_main_only:
                    default_registry.save_on_every_rank.add(cls)
    default_registry.tell_speechbrain()
    return cls
