"""When to save: pure answers to "is a checkpoint due at this moment?".

A trigger holds no state and reads no clock. Whoever saves describes the moment, including when
the last save was, and asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import isfinite
from typing import Literal, Protocol, runtime_checkable

from lightning_sbckpt.errors import ConfigurationError

__all__ = ["AnyOf", "EveryInterval", "EveryNEpochs", "EveryNSteps", "Moment", "Trigger"]


@dataclass(frozen=True)
class Moment:
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

    kind: Literal["batch", "validation_end", "epoch_end"]
    epoch: int
    global_step: int
    batch: int
    seconds: float
    previous_step: int = 0
    last_save_seconds: float = 0.0
    validated_this_epoch: bool = False


@runtime_checkable
class Trigger(Protocol):
    """Anything that can say whether a checkpoint is due."""

    def due(self, moment: Moment) -> str | None:
        """Return why a checkpoint is due at this moment, or None."""
        ...


@dataclass(frozen=True)
class EveryNEpochs:
    """Due after every `n` epochs: when validation ends, or the epoch if nothing was validated.

    After validation the metrics of these very weights are known. An epoch that validates several
    times is due each time.

    Raises:
        ConfigurationError: `n` is not a whole number of at least 1.

    Example:
        >>> end = Moment("validation_end", epoch=1, global_step=20, batch=20, seconds=5.0)
        >>> EveryNEpochs(2).due(end)
        'every 2 epochs'
        >>> EveryNEpochs(3).due(end) is None
        True
    """

    n: int = 1

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        _check_period("EveryNEpochs", self.n)

    def due(self, moment: Moment) -> str | None:
        """Return the reason at the end of every n-th epoch."""
        at_end = moment.kind == "validation_end" or (
            moment.kind == "epoch_end" and not moment.validated_this_epoch
        )
        if at_end and (moment.epoch + 1) % self.n == 0:
            return _every(self.n, "epoch")
        return None


@dataclass(frozen=True)
class EveryNSteps:
    """Due after the batch in which the global step reached or passed a multiple of `n`.

    The batches that accumulate gradients share one global step, and only the one that took the
    step is due.

    Raises:
        ConfigurationError: `n` is not a whole number of at least 1.

    Example:
        >>> EveryNSteps(5).due(Moment("batch", epoch=0, global_step=10, batch=10, seconds=1.0))
        'every 5 steps'
    """

    n: int

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        _check_period("EveryNSteps", self.n)

    def due(self, moment: Moment) -> str | None:
        """Return the reason after a batch that completed a multiple of n steps."""
        if moment.kind != "batch":
            return None
        if moment.global_step // self.n > moment.previous_step // self.n:
            return _every(self.n, "step")
        return None


@dataclass(frozen=True)
class EveryInterval:
    """Due after the first batch that ends so long after the last save, whatever caused it.

    Args:
        interval: A `timedelta`, or a number of seconds.

    Raises:
        ConfigurationError: The interval is not a positive, finite time.

    Example:
        >>> ten_minutes = EveryInterval(timedelta(minutes=10))
        >>> ten_minutes.due(Moment("batch", epoch=0, global_step=9, batch=9, seconds=601.0))
        '601 s since the last save, every 600 s'
    """

    interval: timedelta | float

    def __post_init__(self) -> None:
        """Refuse an interval that never or always passes."""
        interval: object = self.interval
        number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
        if not (number or isinstance(interval, timedelta)):
            raise ConfigurationError(
                f"EveryInterval has interval={interval!r}, expected a datetime.timedelta or a "
                "number of seconds."
            )
        if not (isfinite(self.seconds) and self.seconds > 0):
            raise ConfigurationError(
                f"EveryInterval has interval={interval!r}, which is {self.seconds:g} s: expected "
                "more than 0 s. To save after every step, use EveryNSteps(1)."
            )

    @property
    def seconds(self) -> float:
        """The interval in seconds."""
        if isinstance(self.interval, timedelta):
            return self.interval.total_seconds()
        return float(self.interval)

    def due(self, moment: Moment) -> str | None:
        """Return the reason after a batch when the interval has passed."""
        passed = moment.seconds - moment.last_save_seconds
        if moment.kind == "batch" and passed >= self.seconds:
            return f"{passed:g} s since the last save, every {self.seconds:g} s"
        return None


@dataclass(frozen=True)
class AnyOf:
    """Due when any of the triggers is; says which. With no trigger it is never due.

    Raises:
        ConfigurationError: Something given is no trigger.

    Example:
        >>> either = AnyOf([EveryNSteps(5), EveryInterval(60)])
        >>> either.due(Moment("batch", epoch=0, global_step=10, batch=10, seconds=61.0))
        'every 5 steps, 61 s since the last save, every 60 s'
    """

    triggers: tuple[Trigger, ...]

    def __init__(self, triggers: Iterable[Trigger]) -> None:
        """Take the triggers, in the order in which their reasons are told."""
        given: tuple[object, ...] = tuple(triggers)
        wrong = [repr(trigger) for trigger in given if not isinstance(trigger, Trigger)]
        if wrong:
            raise ConfigurationError(
                f"AnyOf was given {', '.join(wrong)}, expected objects with a method due(moment), "
                "such as EveryNEpochs(1) or EveryNSteps(1000)."
            )
        object.__setattr__(self, "triggers", given)

    def due(self, moment: Moment) -> str | None:
        """Return the reasons of all triggers that are due, or None."""
        reasons = [trigger.due(moment) for trigger in self.triggers]
        return ", ".join(reason for reason in reasons if reason is not None) or None


def _every(n: int, unit: str) -> str:
    return f"every {unit}" if n == 1 else f"every {n} {unit}s"


def _check_period(owner: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigurationError(f"{owner} has n={n!r}, expected a whole number of at least 1.")
