"""When a run is to be saved: what has happened in it since the last batch, asked of the triggers."""

from __future__ import annotations

import time
from typing import Any

from lightning_sbckpt._save.request import SaveResult
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.triggers import AnyOf, Due, Moment, ask, together
from lightning_sbckpt.typing import World

Place = tuple[int, int]
"""Where a run is: the optimizer steps taken and the batches seen."""


class Schedule:
    """Says after every batch and epoch whether a checkpoint is due, and why.

    Args:
        batch_triggers: Those that a batch may set off.
        end_triggers: Those that the end of a validation or of an epoch may set off.

    Attributes:
        validated_this_epoch: Whether a validation has run in this epoch.
    """

    def __init__(self, batch_triggers: AnyOf, end_triggers: AnyOf) -> None:
        self.validated_this_epoch = False
        self._batch_triggers = batch_triggers
        self._end_triggers = end_triggers
        self._started = time.monotonic()
        self._last_save_seconds = 0.0
        self._last_save: Place | None = None
        self._last_within_epoch = False
        self._previous_step = 0
        self._validated = False
        self._retake = False
        self._last_failed = False
        self._deferred: list[Due | None] = []

    # ------------------------------------------------------------------ what happens

    def resumes_at(self, global_step: int) -> None:
        """Go on after so many steps."""
        self._previous_step = global_step

    def resumed(self, trainer: Trainer, *, within_epoch: bool, validated_this_epoch: bool) -> None:
        """Be where a checkpoint was saved."""
        self._last_save, self._last_within_epoch = place_of(trainer), within_epoch
        self.validated_this_epoch = validated_this_epoch

    def epoch_begins(self) -> None:
        """Begin to watch for a validation."""
        self.validated_this_epoch = False

    def validated(self) -> None:
        """Note the end of a validation."""
        self._validated = self.validated_this_epoch = True

    def take_anew(self) -> None:
        """Note that the last checkpoint was dropped."""
        # At the next place between two batches: here, in the middle of one, nothing fits together.
        self._retake = True

    def last_failed(self) -> None:
        """Note that the last checkpoint could not be written."""
        self._last_failed = True

    def saved(self, trainer: Trainer, result: SaveResult, *, within_epoch: bool) -> None:
        """Note a save, and what came of it."""
        if not result.skipped:
            self._last_save, self._last_within_epoch = place_of(trainer), within_epoch
            self._last_failed = result.error is not None
        self._last_save_seconds = time.monotonic() - self._started

    # ------------------------------------------------------------------ what is due

    def after_batch(self, trainer: Trainer, world: World) -> Due | None:
        """Return why a checkpoint is due between two batches, or None; the same on every rank.

        Rank zero asks the triggers: clocks differ from rank to rank, and a rank that saves alone would
        wait for the others for ever.
        """
        step = trainer.global_step
        previous, self._previous_step = self._previous_step, step
        validated, self._validated = self._validated, False
        # As `at_max_steps`; to ask for the step once more takes as long as all the rest here.
        at_limit = 0 <= trainer.max_steps <= step
        stops = trainer.should_stop and _private.loops.may_stop(trainer)
        retake, self._retake = self._retake, False
        if not (validated or at_limit or stops or retake) and self._batch_triggers.quiet(
            step, previous
        ):
            return None
        moment = self._moment(trainer, "batch", previous)

        def ask_triggers() -> list[Due | None]:
            found = [ask(self._batch_triggers, moment)]
            if validated:
                found.append(ask(self._end_triggers, moment._replace(kind="validation_end")))
            return found

        reasons = decided_by_main(world, ask_triggers)
        if retake:
            reasons.append(Due("the last one was dropped"))
        if at_limit:
            reasons.append(Due("max_steps is reached"))
        if _private.trainer.epoch_is_over(trainer):
            # What is saved when the epoch's last hook has run repeats none of them when it resumes.
            self._deferred = reasons
            return None
        if stops:
            # Between two batches, so that the epoch can go on from here when the reason is gone.
            reasons.append(Due("training was told to stop"))
        return together(reasons)

    def after_epoch(self, trainer: Trainer, world: World) -> Due | None:
        """Return why a checkpoint is due between two epochs, or None; the same on every rank.

        Args:
            trainer: The Trainer.
            world: Its ranks.
        """
        deferred, self._deferred = self._deferred, []
        retake, self._retake = self._retake, False
        # No state is saved twice, unless it could not be written, or the epoch had its own end still
        # before it: loaders without a length don't tell in advance. What was trained since the last
        # save is kept when training ends.
        cut = trainer.should_stop or at_max_steps(trainer)
        is_saved = self._last_save == place_of(trainer) and (cut or not self._last_within_epoch)
        if is_saved and not (retake or self._last_failed):
            return None
        moment = self._moment(trainer, "epoch_end", self._previous_step)
        due = decided_by_main(world, lambda: ask(self._end_triggers, moment))
        ends = Due("training ends") if training_ends(trainer) else None
        return together([*deferred, due, ends])

    def _moment(self, trainer: Trainer, kind: Any, previous_step: int) -> Moment:
        done = kind == "epoch_end"
        return Moment(
            kind,
            epoch=_private.trainer.epochs_done(trainer) - 1 if done else trainer.current_epoch,
            global_step=trainer.global_step,
            batch=_private.trainer.batches_seen(trainer),
            seconds=time.monotonic() - self._started,
            previous_step=previous_step,
            last_save_seconds=self._last_save_seconds,
            validated_this_epoch=self.validated_this_epoch,
        )


def place_of(trainer: Trainer) -> Place:
    """Return where a run is."""
    return trainer.global_step, _private.trainer.batches_seen(trainer)


def training_ends(trainer: Trainer) -> bool:
    """Return whether the epoch that is over is the last."""
    return bool(trainer.should_stop) or _private.trainer.epochs_done(trainer) == trainer.max_epochs


def at_max_steps(trainer: Trainer) -> bool:
    """Return whether all the steps that were asked for have been taken."""
    return 0 <= trainer.max_steps <= trainer.global_step


def why_ended(trainer: Trainer) -> str:
    """Return what ended a fit that might be continued from within an epoch, or nothing."""
    if at_max_steps(trainer):
        return f"max_steps={trainer.max_steps} was reached"
    return "training was told to stop" if trainer.should_stop else ""


def step_follows(trainer: Trainer, *, within_epoch: bool) -> bool:
    """Return whether an optimizer step is to come, until which a copy may take its time."""
    ending = within_epoch and _private.trainer.epoch_is_over(trainer)
    last = _private.trainer.epochs_done(trainer) + ending == trainer.max_epochs
    return not (trainer.should_stop or at_max_steps(trainer) or last)
