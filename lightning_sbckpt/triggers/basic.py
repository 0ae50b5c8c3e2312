"""Triggers that count steps, epochs and seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from lightning_sbckpt._display.quantities import as_seconds
from lightning_sbckpt._format.omega import opaque
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.selection import function_name
from lightning_sbckpt.triggers.combined import (
    Composable,
    check_period,
)
from lightning_sbckpt.triggers.moment import Kind, Moment

__all__ = [
    "AtSteps",
    "EveryInterval",
    "EveryNEpochs",
    "EveryNSteps",
    "FirstStep",
    "OnValidationEnd",
    "WhenTrue",
]


@opaque
@dataclass(frozen=True)
class EveryNEpochs(Composable):
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
    kinds: ClassVar[tuple[Kind, ...]] = ("validation_end", "epoch_end")

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        check_period("EveryNEpochs", self.n)

    def due(self, moment: Moment) -> str | None:
        """Return the reason at the end of every n-th epoch."""
        at_end = moment.kind == "validation_end" or (
            moment.kind == "epoch_end" and not moment.validated_this_epoch
        )
        if at_end and (moment.epoch + 1) % self.n == 0:
            return _every(self.n, "epoch")
        return None


@opaque
@dataclass(frozen=True)
class EveryNSteps(Composable):
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
    kinds: ClassVar[tuple[Kind, ...]] = ("batch",)

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        check_period("EveryNSteps", self.n)

    def quiet(self, global_step: int, previous_step: int) -> bool:
        """Return whether it can't be due after a batch between these steps."""
        return global_step // self.n <= previous_step // self.n

    def due(self, moment: Moment) -> str | None:
        """Return the reason after a batch that completed a multiple of n steps."""
        if moment.kind != "batch":
            return None
        if moment.global_step // self.n > moment.previous_step // self.n:
            return _every(self.n, "step")
        return None


@opaque
@dataclass(frozen=True)
class EveryInterval(Composable):
    """Due after the first batch that ends so long after the last save, whatever caused it.

    Args:
        interval: A `timedelta`, a number of seconds, or a text such as `"10 min"`.

    Raises:
        ConfigurationError: The interval is not a positive, finite time.

    Example:
        >>> ten_minutes = EveryInterval(timedelta(minutes=10))
        >>> ten_minutes.due(Moment("batch", epoch=0, global_step=9, batch=9, seconds=601.0))
        '601 s since the last save, every 600 s'
    """

    interval: timedelta | float | str
    kinds: ClassVar[tuple[Kind, ...]] = ("batch",)

    def __post_init__(self) -> None:
        """Refuse an interval that never or always passes."""
        seconds = as_seconds(self.interval)
        if seconds is None or not seconds > 0:
            raise ConfigurationError(
                f"EveryInterval has interval={self.interval!r}, expected more than 0 s: a "
                "datetime.timedelta, a number of seconds, or a text such as '10 min'. To save after "
                "every step, use EveryNSteps(1)."
            )
        if isinstance(self.interval, str):
            object.__setattr__(self, "interval", seconds)

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


@opaque
@dataclass(frozen=True)
class AtSteps(Composable):
    """Due after the batch in which the global step reached or passed one of the given steps.

    Raises:
        ConfigurationError: The steps are not a list of whole numbers of at least 1.

    Example:
        >>> AtSteps([10, 50]).due(Moment("batch", epoch=0, global_step=10, batch=10, seconds=1.0,
        ...     previous_step=9))
        'step 10'
    """

    steps: Sequence[int]
    kinds: ClassVar[tuple[Kind, ...]] = ("batch",)

    def __post_init__(self) -> None:
        """Refuse steps that are none; put them in order."""
        given: object = self.steps
        listed = isinstance(given, Iterable) and not isinstance(given, str)
        steps: list[object] = list(self.steps) if listed else []
        if not steps or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in steps):
            raise ConfigurationError(
                f"AtSteps has steps={given!r}, expected a list of whole numbers of at least 1, such "
                "as AtSteps([100, 1000])."
            )
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    def quiet(self, global_step: int, previous_step: int) -> bool:
        """Return whether it can't be due after a batch between these steps."""
        return bisect_right(self.steps, previous_step) == bisect_right(self.steps, global_step)

    def due(self, moment: Moment) -> str | None:
        """Return the reason after a batch that reached one of the steps."""
        if moment.kind != "batch":
            return None
        first = bisect_right(self.steps, moment.previous_step)
        reached = self.steps[first : bisect_right(self.steps, moment.global_step)]
        return ", ".join(f"step {step}" for step in reached) or None


@opaque
@dataclass(frozen=True)
class FirstStep(Composable):
    """Due after the very first optimizer step of a run, for recovery only.

    A rehearsal: within the first minute it shows that saving works, and the line in the log says
    how long it took and how large a checkpoint is. Retention lets it go when the next one is there.

    Example:
        >>> first = Moment("batch", epoch=0, global_step=1, batch=1, seconds=0.5)
        >>> FirstStep().due(first)
        'the first step, to see that saving works'
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("batch",)
    ephemeral: ClassVar[bool] = True

    def due(self, moment: Moment) -> str | None:
        """Return the reason after the batch that took the first step."""
        if moment.kind == "batch" and moment.previous_step == 0 < moment.global_step:
            return "the first step, to see that saving works"
        return None


@opaque
@dataclass(frozen=True)
class OnValidationEnd(Composable):
    """Due whenever a validation has ended, how many there may be in an epoch.

    Example:
        >>> OnValidationEnd().due(
        ...     Moment("validation_end", epoch=0, global_step=10, batch=10, seconds=1.0))
        'validation has ended'
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("validation_end",)

    def due(self, moment: Moment) -> str | None:
        """Return the reason at the end of a validation."""
        return "validation has ended" if moment.kind == "validation_end" else None


@opaque
@dataclass(frozen=True)
class WhenTrue(Composable):
    """Due when a function of the moment says so.

    The function may be asked several times about one moment, and on every rank: it has to give
    the same answer each time.

    Args:
        function: Takes a `Moment`; returns whether a checkpoint is due, or the reason as text.

    Raises:
        ConfigurationError: The function can't be called.

    Example:
        >>> def late(moment):
        ...     return moment.seconds > 3600
        >>> WhenTrue(late).due(Moment("batch", epoch=0, global_step=9, batch=9, seconds=4000.0))
        'late is true'
    """

    function: Callable[[Moment], bool | str | None]

    def __post_init__(self) -> None:
        """Refuse what can't be called."""
        if not callable(self.function):
            raise ConfigurationError(
                f"WhenTrue has function={self.function!r}, expected a function of a Moment that "
                "returns whether a checkpoint is due."
            )

    def due(self, moment: Moment) -> str | None:
        """Return the text that the function gave, or that it is true."""
        answer = self.function(moment)
        if isinstance(answer, str):
            return answer or None
        return f"{function_name(self.function)} is true" if answer else None


def _every(n: int, unit: str) -> str:
    return f"every {unit}" if n == 1 else f"every {n} {unit}s"
