"""A moment in training, and what a trigger answers about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

Kind = Literal["batch", "validation_end", "epoch_end"]
KINDS: tuple[Kind, ...] = ("batch", "validation_end", "epoch_end")


class Moment(NamedTuple):
    """A point in training at which a checkpoint might be due.

    Attributes:
        kind: What has just ended: a training batch, a validation, or a training epoch.
        epoch: The number of the epoch, from 0.
        global_step: Optimizer steps taken since training began.
        batch: Batches seen since training began.
        seconds: Seconds since this process began to fit, from a monotonic clock.
        previous_step: The global step at the end of the batch before; a batch of a training with
            several optimizers may take several steps.
        last_save_seconds: The `seconds` of the last save, or 0 before the first.
        validated_this_epoch: Whether a validation has run in this epoch.

    Example:
        >>> Moment("batch", epoch=0, global_step=10, batch=10, seconds=2.5).previous_step
        0
    """

    kind: Kind
    epoch: int
    global_step: int
    batch: int
    seconds: float
    previous_step: int = 0
    last_save_seconds: float = 0.0
    validated_this_epoch: bool = False


@runtime_checkable
class Trigger(Protocol):
    """Anything that can say whether a checkpoint is due.

    Two attributes may be there, too: `ephemeral`, true if the checkpoint is for recovery only, and
    `kinds`, the kinds of moments at which it may be due, if it isn't at all.
    """

    def due(self, moment: Moment) -> str | None:
        """Return why a checkpoint is due at this moment, or None."""
        ...


@dataclass(frozen=True)
class Due:
    """Why a checkpoint is due, and whether it is for recovery only.

    Example:
        >>> Due("every epoch")
        Due(reason='every epoch', ephemeral=False)
    """

    reason: str
    ephemeral: bool = False


def together(several: Iterable[Due | None]) -> Due | None:
    """Return one answer for several: for recovery only if all that are due are; None if none is.

    Example:
        >>> together([None, Due("every 5 steps", ephemeral=True), Due("training ends")])
        Due(reason='every 5 steps, training ends', ephemeral=False)
    """
    due = [one for one in several if one is not None]
    if not due:
        return None
    return Due(", ".join(one.reason for one in due), all(one.ephemeral for one in due))


def may_be_due(trigger: Trigger, kind: Kind) -> bool:
    """Return whether a trigger can be due at such moments; if not, it need not be asked there.

    Example:
        >>> from lightning_sbckpt.triggers import EveryNSteps
        >>> may_be_due(EveryNSteps(5), "batch"), may_be_due(EveryNSteps(5), "epoch_end")
        (True, False)
    """
    return kind in getattr(trigger, "kinds", KINDS)
