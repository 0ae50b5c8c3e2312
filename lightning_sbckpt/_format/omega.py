"""Configurations of OmegaConf as plain things, for those that are nothing but plain things.

What has a schema (a dataclass, typed values) or calls a resolver of the program (`${eval:...}`) when it
is looked at is not described here. OmegaConf is used only where it is in use already.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from lightning_sbckpt.errors import ConfigurationError, MissingDependencyError, UntrustedPickleError

_NAMES = {
    "omegaconf.dictconfig.DictConfig": "DictConfig",
    "omegaconf.listconfig.ListConfig": "ListConfig",
}
_LEAVES = (bool, int, float, str, bytes, type(None))


T = TypeVar("T")


def opaque(kind: type[T]) -> type[T]:
    """Have OmegaConf, and so Hydra, take objects of a dataclass for objects.

    A dataclass in a list or a dictionary becomes a configuration, field by field, and functions,
    times and other rules can't be fields of one. What has no list of its fields is left as it is.
    """
    delattr(kind, "__dataclass_fields__")
    return kind


def plain(given: Any) -> Any:
    """Return plain lists, dictionaries and rules in place of OmegaConf's containers.

    Hydra hands over lists and dictionaries as its own, and dataclasses in them as dictionaries.

    Raises:
        ConfigurationError: A value in one is missing, or refers to what is not there.

    Example:
        >>> plain({"exp": ["a", 1]})
        {'exp': ['a', 1]}
    """
    if type(given).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            return OmegaConf.to_object(given)
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{error}".partition("\n")[0]) from error
    if isinstance(given, dict):
        return {key: plain(value) for key, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(plain(value) for value in given)
    return given


def name_of(kind: type) -> str | None:
    """Return the name of a class of OmegaConf's configurations, or None for other classes."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if name in _NAMES else None


def type_named(name: object) -> type:
    """Return a class of OmegaConf's configurations.

    Raises:
        KeyError: It is another name.
    """
    return getattr(_omegaconf(), _NAMES[str(name)])  # type: ignore[no-any-return]


def describe(config: Any) -> dict[str, object] | None:
    """Return what a configuration is made of, or None if it is more than plain things.

    A part of a configuration is described with the whole, to which its interpolations refer.
    """
    if type(config).__name__ not in _NAMES.values():
        return None
    root, path = config, []
    while (parent := root._get_parent()) is not None:  # noqa: SLF001 - all nodes have it
        path.append(root._key())  # noqa: SLF001
        root = parent
    path.reverse()
    try:
        node = _described(root)
    except _MoreThanPlainError:
        return None
    described: dict[str, object] = {"root": node, "path": path}
    made = make(described, trusted=False)
    # A public check of every property of every node there is not; two that pickle alike are alike.
    return described if _form(made) == _form(config) else None


def make(fields: dict[str, Any], *, trusted: bool) -> object:
    """Return the configuration that `describe` described.

    Args:
        fields: What `describe` returned.
        trusted: Whether it may call resolvers of the program when it is looked at.

    Raises:
        UntrustedPickleError: It would call one, and is not trusted.
        MissingDependencyError: OmegaConf is not installed.
    """
    config = _made(fields["root"], trusted=trusted)
    for key in fields["path"]:
        config = config._get_node(key)  # noqa: SLF001 - without resolving anything
    return config


class _MoreThanPlainError(Exception):
    """Something that only OmegaConf's own pickling keeps."""


def _described(node: Any) -> list[object]:
    """Return `[kind, flags, content]`; of a value `["value", flags, value]`."""
    kind = type(node).__name__
    found = node._metadata  # noqa: SLF001 - it has no other accessor
    flags = dict(found.flags or {}) or None
    if kind in _NAMES.values():
        content = node._content  # noqa: SLF001 - `items()` would resolve
        if isinstance(content, dict):
            pairs = [[key, _described(child)] for key, child in content.items()]
            if not all(type(key) in _LEAVES for key, _ in pairs):
                raise _MoreThanPlainError
            return [kind, flags, pairs]
        if isinstance(content, list):
            return [kind, flags, [_described(child) for child in content]]
        # None, missing, or one interpolation for all of it.
        return [kind, flags, _checked(content)]
    if kind != "AnyNode":
        raise _MoreThanPlainError
    return ["value", flags, _checked(node._val)]  # noqa: SLF001 - `_value()` of an AnyNode


def _checked(value: object) -> object:
    if type(value) not in _LEAVES or _calls(value):
        raise _MoreThanPlainError
    return value


def _calls(value: object) -> bool:
    """Return whether a text could call a resolver: `${name:arguments}`, however nested."""
    return isinstance(value, str) and "${" in value and ":" in value


def _made(node: Any, *, trusted: bool) -> Any:
    kind, flags, content = node
    if _calls(content) and not trusted:
        raise UntrustedPickleError(
            f"a configuration in the file calls a resolver of OmegaConf, {content[:100]!r}. If you trust "
            "whoever wrote the checkpoint, pass trust_pickle=True, or load it inside `with "
            "lightning_sbckpt.trusting_pickle():`"
        )
    omegaconf = _omegaconf()
    if kind == "value":
        return omegaconf.AnyNode(content, flags=flags)
    if kind == "DictConfig":
        if isinstance(content, list):
            children = {key: _made(child, trusted=trusted) for key, child in content}
            config = omegaconf.DictConfig(children)
        else:
            config = omegaconf.DictConfig(content)
    elif isinstance(content, list):
        config = omegaconf.ListConfig([_made(child, trusted=trusted) for child in content])
    else:
        config = omegaconf.ListConfig(content)
    for flag, value in (flags or {}).items():
        config._set_flag(str(flag), value)  # noqa: SLF001 - what `OmegaConf.set_struct` calls
    return config


def _form(node: Any) -> object:
    """Return all that a node is, for comparison."""
    found = node._metadata  # noqa: SLF001
    own = (
        type(node),
        found.ref_type,
        found.object_type,
        found.optional,
        found.key,
        dict(found.flags or {}),
        found.flags_root,
        getattr(found, "key_type", None),
        getattr(found, "element_type", None),
    )
    if hasattr(node, "_content"):
        content = node._content  # noqa: SLF001
        if isinstance(content, dict):
            return own, [(key, _form(child)) for key, child in content.items()]
        if isinstance(content, list):
            return own, [_form(child) for child in content]
        return own, content
    return own, type(node._val), node._val  # noqa: SLF001


def _omegaconf() -> Any:
    try:
        import omegaconf
    except ImportError as error:
        raise MissingDependencyError(
            "the file holds a configuration of OmegaConf, which is not installed: "
            "pip install omegaconf"
        ) from error
    return sys.modules[omegaconf.__name__]
