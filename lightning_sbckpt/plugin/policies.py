"""Arguments of `SBCheckpoint` that belong together, each group as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec

from lightning_sbckpt._format.omega import plain
from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.typing import OnChange

__all__ = ["ResumePolicy", "SavePolicy", "Store", "said_once", "with_shorthands"]

P = ParamSpec("P")


@dataclass(frozen=True)
class ResumePolicy:
    """How a run goes on from a checkpoint: what it may lack, and what is not taken as it is.

    Given as `resume=ResumePolicy(...)`. Each attribute may also be given to `SBCheckpoint` itself, where it
    is described.

    Example:
        >>> from lightning_sbckpt import SBCheckpoint
        >>> policy = ResumePolicy(partial=True, key_map={"encoder": "backbone"})
        >>> callback = SBCheckpoint("runs/digits", resume=policy)
    """

    optional: Sequence[str] = ()
    skip: Sequence[str] = ()
    key_map: Mapping[str, str] | None = None
    partial: bool = False
    keep_lr: bool = False
    on_change: OnChange | None = None
    trust_pickle: bool = False


@dataclass(frozen=True)
class Store:
    """A folder of checkpoints on a remote store: given as `dirpath=Store("s3://bucket/run", ...)`.

    Attributes:
        url: Of the folder.
        local_dir: The folder on this machine that checkpoints go through.
        storage_options: What fsspec is to know beyond its own configuration.

    Example:
        >>> from lightning_sbckpt import SBCheckpoint
        >>> SBCheckpoint(Store("s3://bucket/run", local_dir="/scratch/run")).dirpath
        's3://bucket/run'
    """

    url: str
    local_dir: str | Path | None = None
    storage_options: Mapping[str, Any] | None = None


# From an argument to the policy it may be, and from the flat arguments to the policy's attributes.
_POLICIES: dict[str, tuple[type, dict[str, str]]] = {
    "dirpath": (
        Store,
        {"dirpath": "url", **{name: name for name in ("local_dir", "storage_options")}},
    ),
    "save_mode": (
        SavePolicy,
        {"save_mode": "mode", "on_save_error": "on_error", "when_busy": "when_busy"},
    ),
    "resume": (ResumePolicy, {field.name: field.name for field in fields(ResumePolicy)}),
}


def said_once(init: Callable[P, None]) -> Callable[P, None]:
    """Have `__init__` refuse an argument beside a policy that has it, too.

    jsonargparse, which LightningCLI reads configurations by, gives every argument there is: then
    only those that differ from their default are taken to have been written.
    """
    place = list(signature(init).parameters).index

    @wraps(init)
    def checked(*args: P.args, **given: P.kwargs) -> None:
        for argument, (policy, names) in _POLICIES.items():
            at = place(argument)
            value = args[at] if len(args) > at else plain(given.get(argument))
            others = [name for name in names if name != argument and name in given]
            if not isinstance(value, policy):
                continue
            if len(others) == len(names) - (argument in names):
                defaults: dict[str, Any] = {
                    field.name: (field.default, []) for field in fields(policy)
                }
                others = [name for name in others if given[name] not in defaults[names[name]]]
            if others:
                raise ConfigurationError(
                    f"SBCheckpoint: {', '.join(others)} beside {argument}={policy.__name__}(...), which "
                    f"has {'them' if len(others) > 1 else 'it'}, too: say it in one place"
                )
        init(*args, **given)

    return checked


def with_shorthands(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `SBCheckpoint` with each policy replaced by the flat ones it stands for.

    Example:
        >>> save = {"save_mode": SavePolicy("async"), "on_save_error": "raise", "when_busy": "wait"}
        >>> with_shorthands({"dirpath": "runs", "resume": True, **save})["save_mode"]
        'async'
    """
    flat = dict(given)
    for argument, (policy, names) in _POLICIES.items():
        if isinstance(value := given[argument], policy):
            flat[argument] = True
            flat.update({name: getattr(value, attribute) for name, attribute in names.items()})
    return flat
