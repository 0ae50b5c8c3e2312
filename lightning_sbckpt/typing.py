"""The protocols at the edges of this package: what a hook, a rule and a world look like."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from lightning_sbckpt.meta import Checkpoint

__all__ = [
    "Access",
    "BytesOf",
    "CheckpointPredicate",
    "ImportanceKey",
    "LoadHook",
    "OnChange",
    "OnSaveError",
    "RetentionLimit",
    "RetentionRule",
    "SaveHook",
    "SaveMode",
    "Stateful",
    "TransferHook",
    "WhenBusy",
    "WhenInUse",
    "World",
]

T = TypeVar("T")

SaveMode = Literal["sync", "async", "overlap"]
"""When a checkpoint is on the disk, and what is copied beside training."""

OnSaveError = Literal["raise", "warn"]
"""What becomes of a checkpoint that could not be written."""

WhenBusy = Literal["wait", "skip"]
"""What a save does while another is still being written."""

WhenInUse = Literal["raise", "read"]
"""What a run does in a folder that another process writes to."""

OnChange = Literal["warn", "raise", "restart"]
"""What a resume does when the experiment is not the checkpoint's."""

Access = Literal["exclusive", "shared", "read"]
"""Whether other processes may write to a folder, or this one may."""

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

BytesOf = Callable[["Checkpoint"], Mapping[Hashable, int] | int]
"""Gives the bytes of a checkpoint: a number, or from what identifies each file to its bytes.

Files that several checkpoints share have the same identity in each.
"""


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
    """One reason to keep checkpoints: a pure function of the checkpoints there are.

    A rule with an attribute `ephemeral` that is false is not shown the ephemeral checkpoints,
    those saved for recovery only.
    """

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the rule has an opinion about this checkpoint."""
        ...

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the checkpoints to keep among those given, the most wanted first, with reasons."""
        ...

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a considered checkpoint was not kept, for the log."""
        ...


@runtime_checkable
class RetentionLimit(Protocol):
    """One bound on what the rules keep; stands among the rules, and considers no checkpoint."""

    def exceeding(
        self,
        wanted: Sequence[Checkpoint],
        fixed: Sequence[Checkpoint],
        bytes_of: BytesOf | None,
    ) -> tuple[dict[Checkpoint, str], str | None]:
        """Return what has to go, and why each; and what is left to complain about, or None.

        Args:
            wanted: The checkpoints that may go, the most wanted first.
            fixed: Those that stay in any case.
            bytes_of: How large checkpoints are, if the caller knows.
        """
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
