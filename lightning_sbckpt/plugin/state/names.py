"""The names of parameters in a checkpoint, and those of the same parameters in this run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_sbckpt._load.module_state import versions_in, with_versions
from lightning_sbckpt._sharded.names import plain_module_name, plain_name


@dataclass(frozen=True)
class OwnNames:
    """The names that a run has, with which saved ones are found.

    Attributes:
        key_map: From prefixes of saved names to those of this run.
        as_here: From plain names, without what wrappers add to them, to those in the module.
        known: The names in the module.
    """

    key_map: Mapping[str, str]
    as_here: Mapping[str, str] = field(repr=False)
    known: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, names: Iterable[str], key_map: Mapping[str, str]) -> OwnNames:
        """Return what finds saved names among those of a module.

        Example:
            >>> names = OwnNames.of(["body._orig_mod.weight"], {"net.": "body."})
            >>> names.find("net.weight"), names.find("body.weight"), names.find("head.weight")
            ('body._orig_mod.weight', 'body._orig_mod.weight', 'head.weight')
        """
        known = frozenset(names)
        return cls(key_map, {plain_name(name): name for name in known}, known)

    def find(self, saved: str) -> str:
        """Return the name in this run of what was saved under a name; an unknown one stays."""
        mapped = _mapped(saved, self.key_map)
        if plain_name(mapped) not in self.as_here and plain_name(saved) in self.as_here:
            # Saved after the renaming, to which `key_map` still belongs in the user's script.
            mapped = saved
        if mapped in self.known:
            return mapped
        # Compiled or not is no difference to the parameters, only to their names.
        return self.as_here.get(plain_name(mapped), mapped)


def _mapped(name: str, key_map: Mapping[str, str]) -> str:
    for spelled in (name, plain_name(name)):
        for old, new in key_map.items():
            if spelled.startswith(old):
                return new + spelled[len(old) :]
    return name


def renamed_state(
    state: Mapping[str, Any], own: Iterable[str], key_map: Mapping[str, str], module: nn.Module
) -> Mapping[str, Any]:
    """Return the state of a module with this run's names; the very same one if no name changes.

    Args:
        state: What was saved.
        own: The names in the live state.
        key_map: From prefixes of saved names to those of this run.
        module: The live module; the versions of its parts go by name, too.
    """
    names = OwnNames.of(own, key_map)
    here = {name: names.find(name) for name in state}
    if all(name == saved for saved, name in here.items()):
        return state
    renamed: OrderedDict[str, Any] = OrderedDict((here[name], state[name]) for name in state)
    parts = {plain_module_name(name): name for name, _ in module.named_modules()}
    versions = {
        parts.get(plain_module_name(_mapped(f"{name}.", key_map)[:-1]), name): version
        for name, version in (versions_in(state) or {}).items()
    }
    return with_versions(renamed, versions or None)


def names_of_module(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Return the state of a module by the names that a live one has, compiled or not."""
    return renamed_state(state, module.state_dict(), {}, module)
