"""One fit of a callback: all that belongs to it, from its setup to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin._private.loggers import Artifacts
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.dirpath import next_start
from lightning_sbckpt.plugin.doors import Doors, restore_weights, save_with_its_state
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.io import read_folders, reader_for
from lightning_sbckpt.plugin.logs import Logs, unknown_loggers
from lightning_sbckpt.plugin.metrics import Metrics
from lightning_sbckpt.plugin.options import Options
from lightning_sbckpt.plugin.packages import Callback, LightningModule, Trainer
from lightning_sbckpt.plugin.preemption import Watch
from lightning_sbckpt.plugin.resume import Restore, ResumePlan
from lightning_sbckpt.plugin.run import Run, open_checkpointer
from lightning_sbckpt.plugin.saving import Saving, Schedule, why_ended
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.capture import Gatherer
from lightning_sbckpt.plugin.state.parts import MODEL
from lightning_sbckpt.plugin.wanted import WantedKeys
from lightning_sbckpt.plugin.world import TrainerWorld


def open_folders(trainer: Trainer, options: Options, closing: ExitStack) -> None:
    """Have a Trainer that does not fit take folders wherever it takes files, by a callback's options.

    Args:
        trainer: About to validate, test or predict.
        options: Of the callback.
        closing: Undoes it.
    """
    reader = reader_for(trainer, options)
    closing.callback(read_folders(trainer.strategy, reader))
    for undo in Doors(trainer, reader, options.adaptation).open():
        closing.callback(undo)


class FitSession:
    """One fit, in one process.

    Args:
        options: Of the callback.
        trainer: About to fit.
        callback: Whose fit it is.
        begin_at: Returns where Lightning is to restore from, given what `fit` was given; asks
            `plan.path`.
        announce: Tells loggers, and whoever looks at the callback, which checkpoints there are.

    Attributes:
        run: The checkpoints of the run, and their `Checkpointer`.
        plan: Where the fit begins.

    Raises:
        FolderInUseError: Another process writes to the folder.
    """

    def __init__(
        self,
        options: Options,
        trainer: Trainer,
        callback: Callback,
        *,
        begin_at: Callable[[object], object],
        announce: Callable[[], object],
    ) -> None:
        self._options = options
        self._trainer = trainer
        self._artifacts: Artifacts | None = None
        self._unpair: _private.trainer.Undo | None = None
        self._closing = ExitStack()
        with ExitStack() as closing:
            checkpointer = open_checkpointer(options, TrainerWorld(trainer))
            closing.callback(checkpointer.release)
            self._reader = reader_for(
                trainer, options, skip=options.adaptation.skip, verified=checkpointer.verified
            )
            closing.callback(read_folders(trainer.strategy, self._reader))
            self.run = Run(checkpointer, options)
            self._schedule = Schedule(*options.triggers)
            wanted = WantedKeys(options.best_by, options.rules, options.predicate)
            self._metrics = Metrics(wanted.named)
            self._gatherer = Gatherer(options.recoverables, options.meta, options.split_model)
            self._watch = self._watched(closing)
            self._tracker = self._tracked(closing)
            self._reductions = Reductions(trainer.strategy)
            closing.callback(self._reductions.undo)
            experiment = Experiment(
                trainer,
                callback,
                str(checkpointer.url or checkpointer.checkpoints_dir),
                on_change=options.on_change,
                edited=options.adaptation.partial
                or bool(options.adaptation.key_map)
                or options.adaptation.skips(MODEL),
                keep_lr=options.adaptation.keep_lr,
            )
            closing.callback(experiment.leave)
            self._logs = Logs(trainer, log_saves=options.save_policy.log_saves)
            closing.callback(self._logs.end)
            self._saving = Saving(
                self.run,
                self._gatherer,
                self._metrics,
                wanted,
                self._schedule,
                self._tracker,
                self._reductions,
                self._watch,
                experiment,
                self._logs,
                options.save_policy,
                announce,
            )
            self.plan = ResumePlan(
                trainer,
                options,
                self.run,
                self._reader,
                self._gatherer,
                self._tracker,
                self._reductions,
                experiment,
                self._went_on,
            )
            for undo in Doors(trainer, self._reader, options.adaptation, self.plan).open():
                closing.callback(undo)
            outside = partial(_private.finders.outside_trials, callback, trainer)
            for undo in (
                self._tracker.detach,
                _private.trainer.provide_resume_path(trainer, begin_at, self.plan.adapt),
                _private.trainer.after_restore(trainer, self.plan.settle),
                _private.trainer.between_batches(trainer, outside(self._saving.after_batch)),
                _private.trainer.between_epochs(trainer, outside(self._saving.after_epoch)),
                self.plan.cancel,
            ):
                closing.callback(undo)
            self._closing = closing.pop_all()

    def _watched(self, closing: ExitStack) -> Watch | None:
        if self._options.preemption is None:
            return None
        watch = Watch(self._options.preemption, self._trainer)
        watch.start()
        closing.callback(watch.stop)
        return watch

    def _tracked(self, closing: ExitStack) -> LoaderTracker:
        making = _private.loops.LoaderStage(self._trainer)
        for undo in making.undo:
            closing.callback(undo)
        tracker = LoaderTracker(making)
        making.begins = tracker.complete
        tracker.attach(self._trainer.strategy)
        return tracker

    def _went_on(self, restore: Restore) -> None:
        self._metrics.resumed(self._trainer)
        self._schedule.resumed(
            self._trainer,
            within_epoch=restore.within_epoch,
            validated_this_epoch=restore.validated_this_epoch,
        )

    def path(self, given: object) -> object:
        """Return where Lightning is to restore from, given what `fit` was given."""
        path = self.plan.path(given)
        lines = self._logs.begin(
            self.run.resumed_from, self.run.checkpointer, explicit=given is not None
        )
        if self.plan.report is not None:
            self.plan.report.notes += lines
        if self.run.resumed_from is not None:
            self._schedule.resumes_at(self.run.resumed_from)
        return path

    def load_own(self) -> None:
        """Load the user's own recoverables, which all exist by now; refuse names at once."""
        self._gatherer.check(self._trainer)
        self._gatherer.take_first_rates(self._trainer)
        self.plan.load_own()

    def train(self, module: LightningModule) -> None:
        """Tell what will not resume exactly at the first fit, not after the crash; begin to save.

        Raises:
            Preempted: The run is to end before it has begun.
        """
        self._artifacts = artifacts = Artifacts(self._trainer)
        self.plan.compare_data()
        if self.run.resumed_from is None:
            for sentence in [
                *self._tracker.news(),
                *exact.nondeterminism_warnings(self._trainer),
                *self._gatherer.unsaved(self._trainer),
                *self._reductions.nondeterminism_warnings(),
                *_private.callbacks.neighbours(self._trainer, self._options.dirpath),
                *next_start(self._trainer, self._options.dirpath),
                *artifacts.warnings(),
                *unknown_loggers(self._trainer),
            ]:
                rank_zero_warn(f"SBCheckpoint: {sentence}")
        self._saving.begin(module)
        if self._watch is not None and self._watch.ask(TrainerWorld(self._trainer), now=True):
            # Nothing has been trained that is not in a checkpoint.
            raise self._watch.ending()

    def begin_epoch(self) -> None:
        """Begin to watch for a validation."""
        self._schedule.epoch_begins()

    def before_step(self) -> None:
        """Let a copy that hides behind forward and backward come to its end."""
        if self._options.save_policy.mode == "overlap":
            self.run.checkpointer.before_update()

    def validated(self) -> None:
        """Take the metrics of a validation; the save follows when Lightning is done with it."""
        self._metrics.validated(self._trainer)
        self._schedule.validated()

    def trained(self) -> None:
        """Take the metrics of an epoch."""
        self._metrics.trained(self._trainer)

    def finish(self) -> None:
        """See every checkpoint on the disk, and note why the fit has ended."""
        self._saving.finish()
        self.run.note_end(self._trainer.global_step, why_ended(self._trainer))

    def upload(
        self, scores: Mapping[str, float | None], best: str, last: str, *, ends: bool
    ) -> None:
        """Hand checkpoints to the loggers that want them.

        Args:
            scores: The folders, with the values that they are judged by.
            best: The best one of them.
            last: The newest one.
            ends: Whether the fit is over.
        """
        if self._artifacts is not None and self._trainer.is_global_zero:
            self._artifacts.upload(scores, best, last, self.run.busy, ends=ends)

    def restore_best(self, module: LightningModule) -> None:
        """Put the best weights in the module, if that is wanted."""
        options = self._options
        if not (options.restore_best and options.best_by.is_given):
            return
        best = self.run.best_sound()
        world = self.run.checkpointer.world
        restored = restore_weights(best, options, self._reader, module, world)
        step = self._trainer.global_step
        if best is not None and restored and best.meta.get("global_step") != step:
            self._unpair = save_with_its_state(
                self._trainer, best, trust_pickle=options.trust_pickle
            )

    def close(self) -> None:
        """Leave the Trainer as it was, and let other processes write to the folder."""
        self._closing.close()

    def forget(self) -> None:
        """Have `trainer.save_checkpoint` save what it finds again: another fit begins."""
        if self._unpair is not None:
            self._unpair()
            self._unpair = None
