"""The saves of one fit: between two batches or two epochs, when Lightning is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt._world.world import decided_together
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.logs import Logs
from lightning_sbckpt.plugin.metrics import Metrics
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.preemption import Watch
from lightning_sbckpt.plugin.run import Run
from lightning_sbckpt.plugin.schedule import (
    Schedule,
    at_max_steps,
    step_follows,
    training_ends,
)
from lightning_sbckpt.plugin.state.capture import Gatherer
from lightning_sbckpt.plugin.wanted import WantedKeys
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.rng import isolated_rng
from lightning_sbckpt.triggers import Due, together


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
        mode: `"sync"`, `"async"` or `"overlap"`.
        warns: Whether training goes on without a checkpoint that could not be written.
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
    mode: str
    warns: bool
    announce: Callable[[], object]
    _unannounced: bool = False
    _may_hide: bool = True

    def begin(self, module: LightningModule) -> None:
        """Note what training will change.

        Hide no copy behind training where nobody tells when parameters are about to change.
        """
        self.gatherer.begin(module)
        self._may_hide = module.automatic_optimization
        if self.mode == "overlap" and not self._may_hide:
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
        self._save_if(due, trainer, within_epoch=True, and_end=ends)

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
        self._save_if(due, trainer, within_epoch=False, and_end=ends)

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
        self, due: Due | None, trainer: Trainer, *, within_epoch: bool, and_end: bool
    ) -> None:
        if not and_end:
            if due is not None:
                meta = self._save(trainer, due, within_epoch=within_epoch)
                self._check_keys(trainer, meta, within_epoch=within_epoch)
            return
        watch = cast("Watch", self.watch)
        due = cast("Due", together([due, Due(f"preempted by {watch.agreed}")]))
        self._save(trainer, due, within_epoch=within_epoch, last=True)
        self.finish()
        raise watch.ending()

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
        is_sync = self.mode == "sync"
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
        world = self.run.checkpointer.world
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
            request = SaveRequest(
                rest,
                meta=self.gatherer.meta(trainer, metrics, due, within_epoch=within_epoch),
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
            if self.warns and not isinstance(error, SBCheckpointError):
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
