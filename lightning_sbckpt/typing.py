"""The protocols at the edges of this package: what a hook, a rule and a world look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from lightning_sbckpt.meta import Checkpoint

__all__ = [
    "CheckpointPredicate",
    "ImportanceKey",
    "LoadHook",
    "RetentionRule",
    "SaveHook",
    "Stateful",
    "TransferHook",
    "World",
]

T = TypeVar("T")

SaveHook = Callable[..., object]
"""`hook(obj, path)` writes the state of `obj` to the file `path`."""

LoadHook = Callable[..., object]
"""`hook(obj, path, end_of_epoch)` reads the file `path` into `obj`."""

TransferHook = Callable[..., object]
"""`hook(obj, path)` takes from the file `path` what fits `obj`."""

ImportanceKey = Callable[["Checkpoint"], float]
"""Gives a checkpoint its importance; the highest is the most important."""

CheckpointPredicate = Callable[["Checkpoint"], bool]
"""Says whether a checkpoint takes part."""


@runtime_checkable
class Stateful(Protocol):
    """An object that gives its state as a dictionary and takes it back."""

    def state_dict(self) -> Mapping[str, object]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object:
        """Take the state back."""
        ...


class RetentionRule(Protocol):
    """One reason to keep checkpoints: a pure function of the checkpoints there are."""

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the rule has an opinion about this checkpoint."""
        ...

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the checkpoints to keep among those given, each with the reason."""
        ...

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a considered checkpoint was not kept, for the log."""
        ...


class World(Protocol):
    """The processes that save and load together."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...

    def broadcast(self, obj: T) -> T:
        """Return rank zero's `obj` on every rank."""
        ...

    def gather(self, obj: T) -> list[T] | None:
        """Return every rank's `obj`, in order, on rank zero, and None elsewhere."""
        ...
