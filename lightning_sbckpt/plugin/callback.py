"""`SBCheckpoint`: the Lightning callback. It decides when; others write, read and delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin import options as _options
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin._private.loading import ForNewModule
from lightning_sbckpt.plugin._private.loggers import Artifacts
from lightning_sbckpt.plugin.best import restore_weights, save_with_its_state
from lightning_sbckpt.plugin.continuing import Beginning
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.doors import Doors
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.io import read_folders
from lightning_sbckpt.plugin.metrics import Metrics
from lightning_sbckpt.plugin.opening import open_checkpointer, refuse_what_cannot_work
from lightning_sbckpt.plugin.pieces import attach
from lightning_sbckpt.plugin.preemption import Preemption, Watch, as_preemption
from lightning_sbckpt.plugin.resume import ResumeReport, Resumption
from lightning_sbckpt.plugin.run import Run
from lightning_sbckpt.plugin.run_folders import (
    checkpoint_at,
    is_readable,
    open_for_every_trainer,
)
from lightning_sbckpt.plugin.saving import Saving
from lightning_sbckpt.plugin.schedule import Schedule, why_ended
from lightning_sbckpt.plugin.spawned import hand_back_attributes
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.adapt import Adaptation
from lightning_sbckpt.plugin.state.capture import Gatherer, Meta, Recoverables
from lightning_sbckpt.plugin.state.hyperparameters import LoadedFolder, check_loaded
from lightning_sbckpt.plugin.state.names import names_of_module
from lightning_sbckpt.plugin.state.parts import MODEL, FolderReader, read_to_load
from lightning_sbckpt.plugin.wanted import WantedKeys
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.triggers import Trigger
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey, RetentionRule

__all__ = ["SBCheckpoint"]

_OF_A_FIT = (
    "_run",
    "_watch",
    "_saving",
    "_reader",
    "_tracker",
    "_reductions",
    "_undo",
    "_beginning",
    "_schedule",
    "_metrics",
    "_wanted",
    "_unpair",
    "_artifacts",
    # Lightning's own: methods of the module, which would take all of it with them.
    "log",
    "log_dict",
)
"""The attributes that belong to one fit in one process: no copy of a callback has them."""


class SBCheckpoint(LightningCheckpoint):
    """Saves a run into checkpoint folders, resumes it by itself and exactly, and keeps the best.

    Run the same command again after any interruption and it goes on from its newest sound
    checkpoint, between the same two batches, with the same data and random numbers before it.

    Args:
        dirpath: The folder of the run's checkpoints, or a URL as `s3://bucket/run`; the same from
            start to start.
        min_key: The metric whose lowest value is best.
        max_key: The metric whose highest value is best.
        importance_key: A function of a checkpoint whose highest result is best. At most one of the
            three; with none, the newest checkpoint is the best.
        ckpt_predicate: Only checkpoints for which it is true may be deleted: a function, or an
            expression over the meta such as `"epoch > 3"`.
        num_to_keep: How many of the best, and how many of the newest, to keep.
        keep_recent: Keep the newest `num_to_keep`, not only the best.
        keep: More rules of `lightning_sbckpt.retention`, or their texts, such as
            `"EveryNEpochs(10)"`; what any rule keeps stays.
        every_n_epochs: Save when validation ends in every n-th epoch, or when the epoch ends if
            nothing was validated in it. A validation at the end of an epoch is saved when the
            epoch's last hook has run. None for not at all.
        every_n_train_steps: Save after every n optimizer steps, too.
        train_time_interval: Save when so much time has passed since the last save, too.
        triggers: More triggers of `lightning_sbckpt.triggers`; a checkpoint is saved when any is due.
        resume: Go on from the newest sound checkpoint in `dirpath`, if there is one and `fit` was
            given no `ckpt_path`.
        restore_best: Hold the best weights when the fit has ended.
        save_mode: `"sync"`: a checkpoint is on the disk when training goes on. `"async"`: its
            state is copied, and written while training goes on. `"overlap"`: large tensors are
            copied under the next forward and backward, too.
        on_save_error: `"raise"`, or `"warn"`: training goes on without a checkpoint that could not
            be written.
        when_busy: While a checkpoint is still being written, the next save is to `"wait"` for it
            or to `"skip"`.
        preemption: `True`, or a `Preemption(...)`: when SIGTERM, SIGUSR1 or Ctrl+C comes, save at the
            next place between two batches and end by an exit code that says "start me again".
        when_in_use: If another process writes to `dirpath`: `"raise"`, or `"read"`: resume from
            there, but save nothing.
        link_unchanged: Files that have not changed since the checkpoint before share its bytes
            where the filesystem can.
        recoverables: More objects to save and load, by name, or a function of Trainer and module
            that returns them. Modules and datamodules may offer theirs in a method
            `configure_recoverables()`.
        optional: Names of recoverables that a checkpoint to resume from may lack.
        skip: Names of files that are not restored: `"optimizer"`, `"lr_scheduler"`, `"model"`,
            `"callbacks"`, `"rng"`, a recoverable's, ...
        key_map: From prefixes of parameter names in a checkpoint to those of the module, for
            parameters that were renamed.
        partial: Restore the parameters that fit, and leave the others as they are.
        keep_lr: Go on with this run's learning rates and their schedule, as far as it would be by
            now, not with the checkpoint's.
        on_change: What a resume does when the experiment is not the checkpoint's: `"warn"` of every
            difference, with what is in force; `"raise"`; or `"restart"`, begin anew in the same folder,
            whose checkpoints stay. By default it warns, but refuses another class, and a second
            fit in one process with another module.
        meta: More keys for the meta, or a function of Trainer and module that returns them.
        split_model: Names of submodules that get a file of their own, with their own state_dict.
        trust_pickle: Read back state that only pickle can hold, whoever wrote it. What this user's own
            runs wrote is read back anyway.
        local_dir: Of a URL: the folder on this machine that checkpoints go through.
        storage_options: Of a URL: what fsspec is to know beyond its own configuration.

    Attributes:
        best_model_path: The folder of the best checkpoint, for `trainer.test(ckpt_path="best")`.
        best_model_score: The value of the key of the best checkpoint.
        last_model_path: The folder of the newest checkpoint.
        resume_report: What was restored, skipped and missing; None if the run began anew.
        checkpointer: The `Checkpointer` that saves; there is none before the first fit.

    Raises:
        ConfigurationError: Two arguments contradict each other.
        SelectionError: More than one of the three keys was given.

    Example:
        >>> callback = SBCheckpoint("runs/digits", max_key="val_acc", num_to_keep=2)
        >>> callback.monitor, callback.mode
        ('val_acc', 'max')
        >>> SBCheckpoint("runs/digits", max_key="val_acc", min_key="val_loss")
        Traceback (most recent call last):
        lightning_sbckpt.errors.SelectionError: Cannot choose a checkpoint by ...
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        min_key: str | None = None,
        max_key: str | None = None,
        importance_key: ImportanceKey | None = None,
        ckpt_predicate: CheckpointPredicate | str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        keep: Sequence[RetentionRule | str] = (),
        every_n_epochs: int | None = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | float | None = None,
        triggers: Sequence[Trigger] = (),
        resume: bool = True,
        restore_best: bool = True,
        save_mode: str = "sync",
        on_save_error: str = "raise",
        when_busy: str = "wait",
        preemption: Preemption | bool = False,
        when_in_use: str = "raise",
        link_unchanged: bool = True,
        recoverables: Recoverables | None = None,
        optional: Sequence[str] = (),
        skip: Sequence[str] = (),
        key_map: Mapping[str, str] | None = None,
        partial: bool = False,
        keep_lr: bool = False,
        on_change: str | None = None,
        meta: Meta | None = None,
        split_model: Sequence[str] = (),
        trust_pickle: bool = False,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        # Hydra's containers become plain ones.
        keep, triggers, optional, skip, split_model = map(
            _options.plain, (keep, triggers, optional, skip, split_model)
        )
        recoverables, meta, key_map, storage_options = map(
            _options.plain, (recoverables, meta, key_map, storage_options)
        )
        _options.check_kinds(
            {
                "min_key": min_key,
                "max_key": max_key,
                "importance_key": importance_key,
                "ckpt_predicate": ckpt_predicate,
                "num_to_keep": num_to_keep,
                "keep_recent": keep_recent,
                "keep": keep,
                "every_n_epochs": every_n_epochs,
                "every_n_train_steps": every_n_train_steps,
                "train_time_interval": train_time_interval,
                "triggers": triggers,
                "resume": resume,
                "restore_best": restore_best,
                "link_unchanged": link_unchanged,
                "recoverables": recoverables,
                "optional": optional,
                "skip": skip,
                "key_map": key_map,
                "partial": partial,
                "keep_lr": keep_lr,
                "meta": meta,
                "split_model": split_model,
                "trust_pickle": trust_pickle,
                "local_dir": local_dir,
                "storage_options": storage_options,
            }
        )
        self.dirpath = _options.folder(dirpath)
        self._best_by = _options.best_by(importance_key, max_key, min_key)
        self._rules = _options.retention_rules(self._best_by, num_to_keep, keep_recent, keep)
        self._ckpt_predicate = as_predicate(ckpt_predicate)
        self._triggers = _options.triggers(
            every_n_epochs, every_n_train_steps, train_time_interval, triggers
        )
        self._resume = resume
        self._restore_best = restore_best
        self._policy = SavePolicy(save_mode, on_save_error, when_busy)
        self._preemption = as_preemption(preemption)
        self._when_in_use = _options.check_when_in_use(when_in_use)
        self._link_unchanged = link_unchanged
        self._local_dir = None if local_dir is None else _options.absolute(local_dir)
        self._storage_options = storage_options
        _options.check_lists({"split_model": split_model, "optional": optional, "skip": skip})
        self._adaptation = Adaptation(tuple(skip), dict(key_map or {}), partial, keep_lr)
        self._gatherer = Gatherer(recoverables, meta, tuple(split_model))
        self._optional = tuple(optional)
        self._on_change = _options.check_on_change(on_change)
        self._trust_pickle = trust_pickle

        # What Lightning and its loggers read of a checkpoint callback.
        self.monitor = min_key or max_key
        self.mode = "max" if max_key else "min"
        self.save_top_k = int(num_to_keep)

        self.resume_report: ResumeReport | None = None
        self._take_no_part()
        self._reset_progress()

    def _take_no_part(self) -> None:
        """Begin to be in no fit; what is set here is no part of a copy, see `_OF_A_FIT`."""
        self._run: Run | None = None
        self._watch: Watch | None = None
        self._saving: Saving | None = None
        self._reader = FolderReader(trust_pickle=self._trust_pickle)
        self._tracker: LoaderTracker | None = None
        self._reductions: Reductions | None = None
        self._undo: list[_private.trainer.Undo] = []
        self._beginning: Beginning | None = None
        self._unpair: _private.trainer.Undo | None = None
        self._artifacts: Artifacts | None = None
        self._schedule = Schedule(*self._triggers)
        self._wanted = WantedKeys(self._best_by, self._rules, self._ckpt_predicate)
        self._metrics = Metrics(self._wanted.named)

    def __getstate__(self) -> dict[str, object]:
        """Return the configuration and what is known of the run, as it is copied and pickled."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_FIT}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Be a callback with that configuration, which takes part in no fit."""
        vars(self).update(state)
        self._take_no_part()

    def __repr__(self) -> str:
        """Return the class, the folder, and what is best."""
        key = f", {self.mode}_key={self.monitor!r}" if self.monitor else ""
        return f"{type(self).__name__}({str(self.dirpath)!r}{key})"

    def _reset_progress(self) -> None:
        self.best_model_path = ""
        self.best_model_score: torch.Tensor | None = None
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.current_score: torch.Tensor | None = None
        self.last_model_path = ""
        self._schedule = Schedule(*self._triggers)
        self._wanted = WantedKeys(self._best_by, self._rules, self._ckpt_predicate)
        self._metrics = Metrics(self._wanted.named)

    @property
    def checkpointer(self) -> Checkpointer | None:
        """The `Checkpointer` that saves; None before the first fit."""
        return self._run.checkpointer if self._run is not None else None

    # ------------------------------------------------------------------ the life of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to read folders and, for a fit, to save and to resume."""
        self._leave(trainer)
        strategy = trainer.strategy
        self._undo.append(read_folders(strategy, self._reader))
        self._undo += attach(trainer, self._reader, self._adaptation.key_map)
        self._undo += Doors(trainer, self._reader, self._adaptation, self._resumption).open()
        if stage != "fit" or _private.finders.is_no_run(trainer):
            return
        if self._unpair is not None:
            self._unpair()
            self._unpair = None
        others = [
            each
            for each in _private.trainer.callbacks_of(trainer)
            if isinstance(each, SBCheckpoint)
        ]
        refuse_what_cannot_work(trainer, [each.dirpath for each in others])
        checkpointer = open_checkpointer(
            self.dirpath,
            TrainerWorld(trainer),
            self._policy,
            trust_pickle=self._trust_pickle,
            link_unchanged=self._link_unchanged,
            when_in_use=self._when_in_use,
            local_dir=self._local_dir,
            storage_options=self._storage_options,
        )
        self._run = Run(checkpointer, self._best_by, self._rules, self._ckpt_predicate)
        self._reset_progress()
        if self._preemption is not None:
            self._watch = Watch(self._preemption, trainer)
            self._watch.start()
            self._undo.append(self._watch.stop)
        checkpointer.saver.retake = self._schedule.take_anew
        self._reader.skip = self._adaptation.skip
        making = _private.loops.LoaderStage(trainer)
        self._undo += making.undo
        self._tracker = LoaderTracker(making)
        making.begins = self._tracker.complete
        self._tracker.attach(strategy)
        self._reductions = Reductions(strategy)
        self._undo.append(self._reductions.undo)
        experiment = Experiment(
            trainer,
            self,
            str(checkpointer.url or checkpointer.checkpoints_dir),
            on_change=self._on_change,
            edited=self._adaptation.partial
            or bool(self._adaptation.key_map)
            or self._adaptation.skips(MODEL),
            keep_lr=self._adaptation.keep_lr,
        )
        self._undo.append(experiment.leave)
        self._saving = saving = Saving(
            self._run,
            self._gatherer,
            self._metrics,
            self._wanted,
            self._schedule,
            self._tracker,
            self._reductions,
            self._watch,
            experiment,
            lambda: self._announce(trainer),
        )
        self._beginning = beginning = Beginning(
            trainer,
            self._run,
            self._reader,
            self._tracker,
            self._reductions,
            self._adaptation,
            experiment,
            own=lambda: self._gatherer.of_user(trainer),
            optional=self._optional,
            searches=self._resume,
            went_on=partial(self._went_on, trainer),
        )
        outside = partial(_private.finders.outside_trials, self, trainer)
        self._undo += [
            self._tracker.detach,
            _private.trainer.provide_resume_path(trainer, self._resume_path, beginning.adapt),
            _private.trainer.after_restore(trainer, beginning.settle),
            _private.trainer.between_batches(trainer, outside(saving.after_batch)),
            _private.trainer.between_epochs(trainer, outside(saving.after_epoch)),
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the user's own recoverables, which all exist by now; refuse names at once."""
        if self._run is None or _private.finders.is_no_run(trainer):
            return
        self._gatherer.check(trainer)
        self._gatherer.take_first_rates(trainer)
        cast("Beginning", self._beginning).load_own()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell at the first fit, not after the crash, what will not resume exactly."""
        self._artifacts = artifacts = Artifacts(trainer)
        if self._beginning is not None:
            self._beginning.compare_data()
        began_anew = self._run is not None and self._run.resumed_from is None
        if self._tracker is not None and self._reductions is not None and began_anew:
            for sentence in [
                *self._tracker.news(),
                *exact.weak_points(trainer),
                *self._reductions.weak_points(),
                *_private.callbacks.neighbours(trainer, self.dirpath),
                *artifacts.warnings(),
            ]:
                rank_zero_warn(f"SBCheckpoint: {sentence}")
        if self._saving is not None:
            self._saving.begin(pl_module)
        if self._watch is not None and self._watch.ask(TrainerWorld(trainer), now=True):
            # Nothing has been trained that is not in a checkpoint.
            raise self._watch.ending()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let a copy that hides behind forward and backward come to its end."""
        if self._policy.mode == "overlap" and self._run is not None:
            self._run.checkpointer.before_update()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch for a validation."""
        self._schedule.epoch_begins()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics of this validation; the save follows when Lightning is done with it."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._metrics.validated(trainer)
        self._schedule.validated()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics of this epoch."""
        self._metrics.trained(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See every checkpoint on the disk, and restore the best weights."""
        if _private.finders.is_no_run(trainer) or self._run is None:
            return
        try:
            cast("Saving", self._saving).finish()
            self._run.note_end(trainer.global_step, why_ended(trainer))
            # Last, as it is rank zero's alone: whatever fails there, the ranks stay in step.
            self._upload(trainer, ends=True)
        finally:
            self._restore_best_weights(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the last save come to its end; restore the best weights if the user stopped."""
        fitting = trainer.state.fn == "fit" and not _private.finders.is_no_run(trainer)
        if fitting and self._run is not None:
            # Without the other ranks, which may be anywhere; and the run's own exception is what
            # the user must see.
            self._run.checkpointer.saver.finish_here()
        alone = self._run is None or self._run.checkpointer.world.size == 1
        if fitting and alone and isinstance(exception, KeyboardInterrupt):
            self._restore_best_weights(trainer, pl_module)
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
            self._beginning = None
        while self._undo:
            self._undo.pop()()
        self._reader.skip = ()
        self._tracker = self._reductions = self._watch = None
        if self._run is not None:
            self._run.checkpointer.release()

    def _resumption(self) -> Resumption | None:
        return None if self._beginning is None else self._beginning.resumption

    def _went_on(self, trainer: Trainer, resumption: Resumption) -> None:
        self._metrics.resumed(trainer)
        self._schedule.resumed(
            trainer,
            within_epoch=resumption.within_epoch,
            validated_this_epoch=resumption.validated_this_epoch,
        )

    def _resume_path(self, given: object) -> object:
        if _private.finders.is_of_a_finder(given):
            return given
        beginning, run = cast("Beginning", self._beginning), cast("Run", self._run)
        path = beginning.path(given)
        self.resume_report = beginning.report
        if run.resumed_from is not None:
            self._schedule.resumes_at(int(cast("int", run.resumed_from.meta.get("global_step", 0))))
            self._set_paths(run)
        return path

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note which callbacks find their state in the checkpoint, and which don't."""
        if self._beginning is not None:
            self._beginning.note_callbacks(checkpoint.get("callbacks", {}))

    # ------------------------------------------------------------------ keeping and choosing

    def _announce(self, trainer: Trainer) -> None:
        self._set_paths(cast("Run", self._run))
        for logger in trainer.loggers:
            logger.after_save_checkpoint(proxy(self))
        self._upload(trainer, ends=False)

    def _upload(self, trainer: Trainer, *, ends: bool) -> None:
        if self._artifacts is None or not trainer.is_global_zero:
            return
        self._artifacts.upload(
            [*self.best_k_models, self.last_model_path], self.best_model_path, ends=ends
        )

    def _set_paths(self, run: Run) -> None:
        standing = run.standing(max(1, self.save_top_k))
        self.last_model_path = standing.newest
        self.best_k_models = {
            path: torch.tensor(value, device="cpu") for path, value in standing.best
        }
        self.best_model_path, self.best_model_score = "", None
        if standing.best:
            self.best_model_path, value = standing.best[0]
            self.best_model_score = (
                torch.tensor(value, device="cpu") if self._best_by.is_given else None
            )
        value_now = standing.newest_value
        self.current_score = None if value_now is None else torch.tensor(value_now, device="cpu")

    def _restore_best_weights(self, trainer: Trainer, module: LightningModule) -> None:
        if not (self._restore_best and self._best_by.is_given and self._run is not None):
            return
        best = self._run.best_sound()
        restored = restore_weights(
            best,
            self._best_by,
            self._reader,
            module,
            self.dirpath,
            self._adaptation,
            self._run.checkpointer.world,
        )
        if best is not None and restored and best.meta.get("global_step") != trainer.global_step:
            self._unpair = save_with_its_state(trainer, best, self._reader)


_private.trainer.let_load_from_checkpoint_read(
    is_readable,
    lambda path, **options: read_to_load(cast("str", checkpoint_at(path)), **options),
    check_loaded,
    lambda dump: ForNewModule(dump, names_of_module) if isinstance(dump, LoadedFolder) else dump,
)
open_for_every_trainer(SBCheckpoint)
hand_back_attributes(SBCheckpoint)
