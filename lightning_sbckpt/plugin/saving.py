"""The saves of one fit: when one is due, and what it is, between two batches or two epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_sbckpt._save.request import SaveRequest, SaveResult
from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt._world.world import decided_by_main, decided_together
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.meta import Checkpoint, plain_meta
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin._private.trainer import Place, place_of
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.dirpath import named
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.logs import Logs
from lightning_sbckpt.plugin.metrics import Metrics
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.preemption import Watch
from lightning_sbckpt.plugin.run import Run
from lightning_sbckpt.plugin.state.capture import Gatherer
from lightning_sbckpt.plugin.wanted import WantedKeys
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.rng import isolated_rng
from lightning_sbckpt.triggers import AnyOf, Due, Moment, ask, together
from lightning_sbckpt.typing import World


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

    def resumes_at(self, checkpoint: Checkpoint) -> None:
        """Go on after the steps of a checkpoint."""
        step = checkpoint.meta.get("global_step")
        self._previous_step = step if isinstance(step, int) else 0

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


@dataclass
class Saving:
    """Saves a run when it is due.

    Attributes:
        run: Whose checkpoints they are.
        gatherer: What goes into them.
        metrics: What was computed for which weights.
        wanted: What the user asks of the metrics.
        schedule: When one is due.
        tracker: Where the loaders are.
        reductions: How DDP adds up gradients.
        watch: Whether the run is to end; None if nobody may ask it to.
        experiment: What is trained.
        logs: What its loggers write.
        policy: How saves go on.
        announce: Tells loggers, and whoever looks at the callback, which checkpoints there are.
    """

    run: Run
    gatherer: Gatherer
    metrics: Metrics
    wanted: WantedKeys
    schedule: Schedule
    tracker: LoaderTracker
    reductions: Reductions
    watch: Watch | None
    experiment: Experiment
    logs: Logs
    policy: SavePolicy
    announce: Callable[[], object]
    _unannounced: bool = False
    _may_hide: bool = True

    def begin(self, module: LightningModule) -> None:
        """Note what training will change.

        Hide no copy behind training where nobody tells when parameters are about to change.
        """
        self.gatherer.begin(module)
        self._may_hide = module.automatic_optimization
        if self.policy.mode == "overlap" and not self._may_hide:
            rank_zero_info(
                "SBCheckpoint: this module optimizes manually, so nobody tells when parameters "
                "are about to change: copies are made before training goes on (save_mode "
                "'async')"
            )

    def after_batch(self, trainer: Trainer) -> None:
        """Save if it is due; end the run after it if it was asked to end.

        Raises:
            Preempted: The run was asked to end; KeyboardInterrupt if by Ctrl+C.
            SaveError: See `Checkpointer.save_checkpoint`.
        """
        checkpointer = self.run.checkpointer
        # With several ranks it has to wait for a place where all of them are.
        if self._unannounced and checkpointer.world.size == 1 and not checkpointer.is_saving:
            self._announce()
        due = self.schedule.after_batch(trainer, checkpointer.world)
        asked = self.watch is not None and bool(self.watch.ask(TrainerWorld(trainer)))
        # The end of the epoch comes at once, and then its metrics are known.
        ends = asked and not (_private.trainer.epoch_is_over(trainer) or at_max_steps(trainer))
        self._save_if(due, trainer, within_epoch=True, ending=self.watch if ends else None)

    def after_epoch(self, trainer: Trainer) -> None:
        """Save if it is due; end the run after it if it was asked to end.

        Raises:
            Preempted: See `after_batch`.
            SaveError: See `after_batch`.
        """
        checkpointer = self.run.checkpointer
        if training_ends(trainer):
            # No step comes any more, but callbacks that put averaged weights in place may.
            checkpointer.before_update()
        due = self.schedule.after_epoch(trainer, checkpointer.world)
        asked = self.watch is not None and bool(self.watch.agreed)
        ends = asked and not (training_ends(trainer) or at_max_steps(trainer))
        self._save_if(due, trainer, within_epoch=False, ending=self.watch if ends else None)

    def finish(self) -> None:
        """See every checkpoint on the disk.

        Raises:
            SaveError: What went wrong in the background.
        """
        try:
            self.run.checkpointer.wait()
        finally:
            if self._unannounced:
                self._announce()

    def _save_if(
        self, due: Due | None, trainer: Trainer, *, within_epoch: bool, ending: Watch | None
    ) -> None:
        if ending is None:
            if due is not None:
                meta = self._save(trainer, due, within_epoch=within_epoch)
                self._check_keys(trainer, meta, within_epoch=within_epoch)
            return
        preempted = Due(f"preempted by {ending.agreed}")
        due = together([due, preempted]) or preempted
        self._save(trainer, due, within_epoch=within_epoch, last=True)
        self.finish()
        raise ending.ending()

    def _check_keys(
        self, trainer: Trainer, meta: Mapping[str, object], *, within_epoch: bool
    ) -> None:
        resumed_from = self.run.resumed_from
        self.wanted.check(
            trainer,
            {**(resumed_from.meta if resumed_from else {}), **meta},
            self.run.checkpointer.world,
            has_validated=self.metrics.has_validated,
            within_epoch=within_epoch,
            ends=not step_follows(trainer, within_epoch=within_epoch),
        )

    def _save(
        self, trainer: Trainer, due: Due, *, within_epoch: bool, last: bool = False
    ) -> Mapping[str, object]:
        checkpointer = self.run.checkpointer
        if checkpointer.access == "read":
            return {}
        # A copy can't hide where no optimizer step follows, and the last save is not skipped: nothing
        # comes after it that would hold the same.
        goes_on = not last and step_follows(trainer, within_epoch=within_epoch)
        meta: Mapping[str, object] = {}
        # Hooks of the user may draw random numbers: a run with saves must equal one without.
        with isolated_rng():
            try:
                request = self._request(trainer, due, within_epoch=within_epoch)
            except SBCheckpointError as error:
                result = checkpointer.save_failed(error)
            else:
                meta = request.meta
                request = replace(
                    request,
                    hide_copy=self._may_hide and goes_on,
                    may_skip=goes_on,
                    # What a run is to be started again from stays, whatever the rules say of it.
                    on_durable=None if last else self.run.prune,
                )
                result = checkpointer.save(request)
        self.schedule.saved(trainer, result, within_epoch=within_epoch)
        if result.skipped:
            return meta
        is_sync = self.policy.mode == "sync"
        if is_sync or self._unannounced:
            # In the background it is the one before that is durable by now.
            self._announce()
        self._unannounced = not is_sync
        return meta

    def _request(self, trainer: Trainer, due: Due, *, within_epoch: bool) -> SaveRequest:
        """Return what is to be saved at this moment; every rank calls this.

        Raises:
            SBCheckpointError: A hook of the user, or what is to be in the meta, failed on some rank.
        """
        world, policy = self.run.checkpointer.world, self.policy
        failure: Exception | None = None
        own: dict[str, Any] = {}
        request = SaveRequest({})
        try:
            own, rest = self.gatherer.take(
                trainer,
                self.tracker,
                self.reductions,
                within_epoch=within_epoch,
                validated_this_epoch=self.schedule.validated_this_epoch,
            )
            metrics = self.metrics.at(trainer)
            meta = self.gatherer.meta(trainer, metrics, due, within_epoch=within_epoch)
            request = SaveRequest(
                rest,
                meta=meta,
                stem=None if policy.name is None else named(policy.name, plain_meta(meta)),
                end_of_epoch=not within_epoch or _private.trainer.epoch_is_over(trainer),
                lineage=self.run.lineage(due.reason),
                extra_files={
                    **self.gatherer.extra_files(trainer, self.experiment.in_force),
                    **self.experiment.extra_files(),
                    **self.logs.extra_files(),
                },
                on_discarded=self.schedule.take_anew,
                on_failed=self.schedule.last_failed,
            )
        except Exception as error:
            failure = error
            if policy.on_error == "warn" and not isinstance(error, SBCheckpointError):
                failure = SaveError(
                    f"the state for a checkpoint can't be taken: {type(error).__name__}: {error}. "
                    "Nothing was written; earlier checkpoints are whole"
                )
        # Before the collectives of `of_ranks`, in which the others would wait for this rank.
        decided_together(world, failure, None, lambda _: None)
        of_ranks = self.gatherer.of_ranks(trainer, own, self.reductions, world)
        return replace(request, items={**request.items, **of_ranks})

    def _announce(self) -> None:
        self._unannounced = False
        self.logs.saved()
        self.announce()
