"""What a save is asked for, and what comes of it; and the keys that the meta of every checkpoint has."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_sbckpt.errors import MetaError, SBCheckpointError
from lightning_sbckpt.meta import END_OF_TIME, Checkpoint, plain_meta

# The smallest step that a double still tells apart at today's count of seconds, generously.
_TICK = 1e-5


@dataclass(frozen=True)
class SaveRequest:
    """One checkpoint to save. With several ranks, each asks for the same one.

    Attributes:
        items: What to save, by name: recoverables, or states that were taken already (`TakenState`).
        meta: Keys to find the checkpoint by later, metrics above all.
        end_of_epoch: Whether an epoch has just ended; load hooks are told.
        name: The checkpoint's own name, or None to name it by time.
        lineage: Where these weights come from, for the manifest.
        extra_files: Small files of text for people, by name.
        verbosity: The level of the log line.
        hide_copy: Whether `save_mode="overlap"` may copy while training goes on. Not where no
            optimizer step follows that could wait for it.
        may_skip: Whether `when_busy="skip"` may skip it.
        on_durable: Called on rank zero when the checkpoint is durable; in the background if the save
            goes on there.
        on_discarded: Called on every rank when a copy that was hidden behind training came out
            wrong. If there is none, the checkpoint is saved anew at once.
        on_failed: Called on every rank when the checkpoint could not be written in the background,
            which `on_save_error="warn"` lets pass.
        stem: With no name of its own: what it is named by in place of the time, with a number if another
            one is named so.
    """

    items: Mapping[str, object]
    meta: Mapping[str, object] = field(default_factory=dict)
    end_of_epoch: bool = True
    name: str | None = None
    lineage: Mapping[str, object] = field(default_factory=dict)
    extra_files: Mapping[str, str] = field(default_factory=dict)
    verbosity: int = logging.INFO
    hide_copy: bool = True
    may_skip: bool = True
    on_durable: Callable[[], object] | None = None
    on_discarded: Callable[[], object] | None = None
    on_failed: Callable[[], object] | None = None
    stem: str | None = None


@dataclass(frozen=True)
class SaveResult:
    """What came of a request.

    Attributes:
        checkpoint: The checkpoint, on rank zero, if it is durable by now.
        skipped: Whether it was skipped since another save was in flight.
        error: Why it was not saved, where `on_save_error="warn"` lets that pass.
    """

    checkpoint: Checkpoint | None = None
    skipped: bool = False
    error: SBCheckpointError | None = None


def time_after(newest: float) -> float:
    """Return the time, but later than that of the newest checkpoint by any means.

    A clock that stands still or jumps back must not change the order of checkpoints.
    """
    # Of a time far in the future the tick is too small a part.
    return max(time.time(), newest + _TICK, math.nextafter(newest, math.inf))


def meta_of_new(
    given: Mapping[str, object], *, unixtime: float, end_of_epoch: bool
) -> dict[str, object]:
    """Return plain meta for a new checkpoint: the keys of every checkpoint, then those given.

    Raises:
        MetaError: YAML can't hold what is given, or it sets a key of every checkpoint to what is
            of no use there.
    """
    plain = plain_meta(given)
    own = plain.get("unixtime", 0.0)
    usable = isinstance(own, (int, float)) and abs(own) < END_OF_TIME
    if not usable or not isinstance(plain.get("end-of-epoch", True), bool):
        raise MetaError(
            "meta sets a key that every checkpoint has: 'unixtime' must be a number of seconds before "
            "the year 10000, so that later ones can follow, and 'end-of-epoch' true or false, got "
            f"{own!r} and {plain.get('end-of-epoch', True)!r}. Choose other keys, or leave these out"
        )
    return {"unixtime": unixtime, "end-of-epoch": end_of_epoch, **plain}
