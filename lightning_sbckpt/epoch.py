"""Epoch counters that are saved and recovered, one of which stops early.

The files are those of SpeechBrain's `speechbrain.utils.epoch_loop`: the number of the epoch as
text, or, with a stopper, a YAML mapping of `current_epoch`, `best_epoch`, `best_score` and
`should_stop`. Either counter reads either file. SpeechBrain's own Checkpointer leaves the stopping
state out when it saves a counter with a stopper, so that a resumed run forgets its best score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, SupportsFloat

import yaml

from lightning_sbckpt._io.open_regular import open_to_read
from lightning_sbckpt.errors import ConfigurationError, DamagedCheckpointError
from lightning_sbckpt.hooks import (
    default_registry,
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    register_checkpoint_hooks,
)

# More than any state of a counter has.
_LONGEST = 2**20

__all__ = ["EpochCounter", "EpochCounterWithStopper"]

logger = logging.getLogger("lightning_sbckpt")


@register_checkpoint_hooks
class EpochCounter:
    """Counts epochs from 1 to a limit, and goes on where a recovered checkpoint left off.

    Iterate over it in place of `range(1, limit + 1)`. After recovering a checkpoint saved at the
    end of an epoch, the next epoch comes; after one saved within an epoch, that epoch again.

    Args:
        limit: The number of the last epoch.

    Attributes:
        current: The epoch that runs or has just run; 0 before the first.
        limit: The number of the last epoch.

    Raises:
        ConfigurationError: `limit` is not a whole number of 0 or more.

    Example:
        >>> counter = EpochCounter(3)
        >>> list(counter), list(counter)
        ([1, 2, 3], [])
    """

    def __init__(self, limit: int) -> None:
        # SpeechBrain may have come after the class.
        default_registry.tell_speechbrain()
        self.current = 0
        self.limit = _whole_number(type(self).__name__, "limit", limit)

    def __iter__(self) -> EpochCounter:
        """Return itself: a second loop goes on, it does not begin again."""
        return self

    def __next__(self) -> int:
        """Step to the next epoch and return its number."""
        if self.current >= self.limit:
            raise StopIteration
        self.current += 1
        logger.info("epoch %d of %d begins", self.current, self.limit)
        return self.current

    @mark_as_saver
    def _save(self, path: str | Path) -> None:
        Path(path).write_text(str(self.current), encoding="utf-8")

    @mark_as_loader
    @mark_as_transfer
    def _recover(self, path: str | Path, end_of_epoch: bool = True) -> None:
        self._resume_at(_read_state(Path(path)), end_of_epoch)

    def _resume_at(self, state: Mapping[str, object], end_of_epoch: bool) -> None:
        epoch = int(str(state["current_epoch"]))
        self.current = epoch if end_of_epoch else epoch - 1


@register_checkpoint_hooks
class EpochCounterWithStopper(EpochCounter):
    """Counts epochs, and stops when a metric has not improved for some of them.

    Call `update_metric` once per validation. An improvement beats the best value so far by more
    than `min_delta` of its size; a value that merely equals it is none, nor is NaN.

    Args:
        limit: The number of the last epoch.
        limit_to_stop: Stop after so many epochs without improvement.
        limit_warmup: Disregard the metric in so many first epochs.
        direction: `"min"` if lower values are better, `"max"` if higher ones are.

    Attributes:
        best_limit: The epoch of the best value.
        best_score: The best value; infinite before the first.
        should_stop: Whether iteration ends before its limit.
        min_delta: How large an improvement must be, relative to the best value.

    Raises:
        ConfigurationError: A number is negative or `direction` is unknown.

    Example:
        >>> counter = EpochCounterWithStopper(10, 2, 0, "min")
        >>> for loss, epoch in zip([0.9, 0.5, 0.6, 0.7, 0.8], counter):
        ...     counter.update_metric(loss)
        >>> epoch, counter.best_limit, counter.best_score, counter.should_stop
        (4, 2, 0.5, True)
    """

    def __init__(
        self, limit: int, limit_to_stop: int, limit_warmup: int, direction: Literal["min", "max"]
    ) -> None:
        super().__init__(limit)
        owner = type(self).__name__
        self.limit_to_stop = _whole_number(owner, "limit_to_stop", limit_to_stop)
        self.limit_warmup = _whole_number(owner, "limit_warmup", limit_warmup)
        if direction not in ("min", "max"):
            raise ConfigurationError(
                f"{owner} has direction={direction!r}, expected 'min' if lower values of the "
                "metric are better, 'max' if higher ones are."
            )
        self.direction = direction
        self.sign = 1 if direction == "min" else -1
        self.should_stop = False
        self.best_limit = 0
        self.best_score = self.sign * math.inf
        self.min_delta = 1e-6

    def __next__(self) -> int:
        """Step to the next epoch, unless the metric has stopped improving."""
        if self.should_stop:
            raise StopIteration
        return super().__next__()

    def update_metric(self, current_metric: SupportsFloat) -> None:
        """Take the value of the metric after this epoch, and decide whether to stop.

        Args:
            current_metric: A number, or a tensor of one element.

        Example:
            >>> counter = EpochCounterWithStopper(10, 1, 0, "max")
            >>> _ = next(counter)
            >>> counter.update_metric(0.9)
            >>> counter.best_score
            0.9
        """
        if self.current <= self.limit_warmup:
            return
        metric = float(current_metric)
        if self._improves(metric):
            self.best_limit = self.current
            self.best_score = metric
        without_improvement = self.current - self.best_limit
        self.should_stop = without_improvement >= self.limit_to_stop
        if self.should_stop:
            logger.info(
                "stopping after epoch %d: no improvement for %d epochs, the best value %g was "
                "reached in epoch %d",
                self.current,
                without_improvement,
                self.best_score,
                self.best_limit,
            )

    def _improves(self, metric: float) -> bool:
        best = self.best_score
        # Relative to the size of the best value: with (1 - min_delta) * best, a value equal to a
        # positive best one would improve on it in the direction "max", and the loop never end.
        needed = self.min_delta * abs(best) if math.isfinite(best) else 0.0
        return self.sign * metric < self.sign * best - needed

    @mark_as_saver
    def _save(self, path: str | Path) -> None:
        state = {
            "current_epoch": self.current,
            "best_epoch": self.best_limit,
            "best_score": self.best_score,
            "should_stop": self.should_stop,
        }
        Path(path).write_text(yaml.safe_dump(state), encoding="utf-8")

    @mark_as_loader
    @mark_as_transfer
    def _recover(self, path: str | Path, end_of_epoch: bool = True) -> None:
        state = _read_state(Path(path))
        if "best_epoch" in state:
            self.best_limit = int(str(state["best_epoch"]))
            self.best_score = float(str(state["best_score"]))
            self.should_stop = bool(state["should_stop"])
        else:
            logger.warning(
                "%s holds the epoch alone, without the state of the stopper: early stopping "
                "counts from epoch %s as if it were the best so far",
                path,
                state["current_epoch"],
            )
            self.best_limit = int(str(state["current_epoch"]))
            self.best_score = self.sign * math.inf
            self.should_stop = False
        self._resume_at(state, end_of_epoch)


def _whole_number(owner: str, name: str, value: object) -> int:
    # A configuration file may spell 10 as 1e1, or quote it.
    if (isinstance(value, float) and value.is_integer()) or (
        isinstance(value, str) and value.strip().isdecimal()
    ):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(
            f"{owner} has {name}={value!r}, expected a whole number of epochs, 0 or more."
        )
    return value


def _read_state(path: Path) -> dict[str, object]:
    with open_to_read(path) as stream:
        text = stream.read(_LONGEST).decode(errors="replace")
    try:
        state = yaml.safe_load(text)
        if isinstance(state, int) and not isinstance(state, bool):
            return {"current_epoch": state}
        fields = {"current_epoch": int, "best_epoch": int, "best_score": float, "should_stop": bool}
        return {name: kind(state[name]) for name, kind in fields.items()}
    except (yaml.YAMLError, TypeError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(
            f"Cannot read the epoch from {path}: found {text[:80]!r}, expected a number, or a "
            "YAML mapping with current_epoch, best_epoch, best_score and should_stop. Recover "
            "another checkpoint, or load this one without the epoch counter."
        ) from error
