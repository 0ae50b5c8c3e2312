"""`SBCheckpoint`: the Lightning callback. It decides when; others write, read and delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.loading import ForNewModule
from lightning_sbckpt.plugin.dirpath import folder, place_of
from lightning_sbckpt.plugin.logs import follow_logs
from lightning_sbckpt.plugin.model_checkpoint import arguments_like, refusing_its_arguments
from lightning_sbckpt.plugin.options import checked
from lightning_sbckpt.plugin.packages import LightningModule, ModelCheckpoint, Trainer, catch_up
from lightning_sbckpt.plugin.policies import ResumePolicy, SavePolicy, Store, said_once
from lightning_sbckpt.plugin.preemption import Preemption
from lightning_sbckpt.plugin.resume import ResumeReport
from lightning_sbckpt.plugin.run import Run, refuse_what_cannot_work
from lightning_sbckpt.plugin.run_folders import (
    is_readable,
    open_for_every_trainer,
    read_for_new_module,
)
from lightning_sbckpt.plugin.session import FitSession, open_folders
from lightning_sbckpt.plugin.state.capture import Meta, Recoverables
from lightning_sbckpt.plugin.state.hyperparameters import LoadedFolder, check_loaded
from lightning_sbckpt.plugin.state.names import names_of_module
from lightning_sbckpt.triggers import Trigger
from lightning_sbckpt.typing import (
    CheckpointPredicate,
    ImportanceKey,
    OnChange,
    OnSaveError,
    RetentionRule,
    SaveMode,
    WhenBusy,
    WhenInUse,
)

__all__ = ["SBCheckpoint"]

# What `__init__` has beside its arguments.
_NO_ARGUMENTS = ("self", "__class__")
_OF_A_FIT = (
    "_session",
    "_reading",
    # Lightning's own: methods of the module, which would take all of it with them.
    "log",
    "log_dict",
)
"""The attributes that belong to one fit in one process: no copy of a callback has them."""


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Checkpoint as _Checkpoint
    from pytorch_lightning.callbacks import Checkpoint as _OtherCheckpoint

    class _Base(_Checkpoint, _OtherCheckpoint): ...  # type: ignore[misc] # one code, two names
else:
    # A Trainer asks whether a callback is a `Checkpoint` of its own package, and neither package is
    # imported for the other's sake, nor need either have been imported when a callback is made. So
    # `Checkpoint` of each becomes a base of this one class when that package has been imported, see
    # `join` below; callbacks that are there already, and classes derived from this one, follow.
    class _Base:
        pass


class SBCheckpoint(_Base):
    """Saves a run into checkpoint folders, resumes it by itself and exactly, and keeps the best.

    Run the same command again after any interruption and it goes on from its newest sound
    checkpoint, between the same two batches, with the same data and random numbers before it.

    Args:
        dirpath: The folder of the run's checkpoints, or a URL as `s3://bucket/run`, or a `Store(...)`; the same from
            start to start. A `{name}` in it is a hyperparameter, as in `"runs/{lr}-{depth}"`, and
            `{hash}` a hash of them all. Without one it is `checkpoints` below the Trainer's
            `default_root_dir`.
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
        train_time_interval: Save when so much time has passed since the last save, too: a
            `timedelta`, seconds, or a text such as `"10 min"`.
        triggers: More triggers of `lightning_sbckpt.triggers`, or their texts, such as
            `"EveryNSteps(100) & AfterStep(1000)"`; a checkpoint is saved when any is due.
        resume: Go on from the newest sound checkpoint in `dirpath`, if there is one and `fit` was
            given no `ckpt_path`. A `ResumePolicy(...)` does so and says how: it has the arguments `optional`
            to `on_change` below, and `trust_pickle`.
        restore_best: Hold the best weights when the fit has ended.
        save_mode: `"sync"`: a checkpoint is on the disk when training goes on. `"async"`: its
            state is copied, and written while training goes on. `"overlap"`: large tensors are
            copied under the next forward and backward, too. A `SavePolicy(...)` says this and the next two.
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

    @refusing_its_arguments
    @said_once
    def __init__(
        self,
        # What jsonargparse would take for a text or a path as well stands first.
        dirpath: Store | str | Path | None = None,
        *,
        min_key: str | None = None,
        max_key: str | None = None,
        importance_key: ImportanceKey | None = None,
        # The other way round, a text would be written back as the path of a function.
        ckpt_predicate: str | CheckpointPredicate | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        keep: Sequence[RetentionRule | str] = (),
        every_n_epochs: int | None = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | float | str | None = None,
        triggers: Sequence[Trigger | str] = (),
        resume: bool | ResumePolicy = True,
        restore_best: bool = True,
        save_mode: SaveMode | SavePolicy = "sync",
        on_save_error: OnSaveError = "raise",
        when_busy: WhenBusy = "wait",
        preemption: Preemption | bool = False,
        when_in_use: WhenInUse = "raise",
        link_unchanged: bool = True,
        recoverables: Recoverables | None = None,
        optional: Sequence[str] = (),
        skip: Sequence[str] = (),
        key_map: Mapping[str, str] | None = None,
        partial: bool = False,
        keep_lr: bool = False,
        on_change: OnChange | None = None,
        meta: Meta | None = None,
        split_model: Sequence[str] = (),
        trust_pickle: bool = False,
        local_dir: str | Path | None = None,
        # `Any`, since jsonargparse writes what is within an `object` as text.
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in _NO_ARGUMENTS}
        catch_up()
        super().__init__()
        self._options = checked(given)
        self.dirpath = self._placed = self._options.dirpath
        # What Lightning and its loggers read of a checkpoint callback.
        self.monitor = min_key or max_key
        self.mode = "max" if max_key else "min"
        self.save_top_k = int(num_to_keep)
        self.resume_report: ResumeReport | None = None
        self._take_no_part()
        self._reset_scores()

    @classmethod
    def like(cls, callback: ModelCheckpoint, **more: Any) -> SBCheckpoint:
        """Return a callback that saves and keeps what a `ModelCheckpoint` would.

        Args:
            callback: The callback whose place it takes.
            more: Arguments of this class, which go before those of the callback.

        Raises:
            ConfigurationError: The callback saves nothing.

        Example:
            >>> from lightning.pytorch.callbacks import ModelCheckpoint
            >>> stock = ModelCheckpoint("runs/digits", monitor="val_acc", mode="max", save_top_k=3)
            >>> callback = SBCheckpoint.like(stock)
            >>> callback.monitor, callback.mode, callback.save_top_k
            ('val_acc', 'max', 3)
        """
        return cls(**{**arguments_like(callback), **more})

    def _take_no_part(self) -> None:
        """Begin to be in no fit; what is set here is no part of a copy, see `_OF_A_FIT`."""
        self._session: FitSession | None = None
        self._reading = ExitStack()

    def _reset_scores(self) -> None:
        self.best_model_path = ""
        self.best_model_score: torch.Tensor | None = None
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.current_score: torch.Tensor | None = None
        self.last_model_path = ""

    def __getstate__(self) -> dict[str, object]:
        """Return the configuration and what is known of the run, as it is copied and pickled."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_FIT}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Be a callback with that configuration, which takes part in no fit."""
        catch_up()
        vars(self).update(state)
        self._take_no_part()

    def __repr__(self) -> str:
        """Return the class, the folder, and what is best."""
        key = f", {self.mode}_key={self.monitor!r}" if self.monitor else ""
        return f"{type(self).__name__}({str(self.dirpath)!r}{key})"

    def _repr_html_(self) -> str:
        from lightning_sbckpt._display import cards
        from lightning_sbckpt._views.folder_view import folder_card

        def card() -> str:
            found = self.checkpointer or Checkpointer(self.dirpath, access="read")
            report = [] if self.resume_report is None else str(self.resume_report).splitlines()
            timeline = found.timeline(with_lineage=False)
            return folder_card(title, found.checkpoints_dir, timeline, report)

        key = f", {self.mode}_key={self.monitor!r}" if self.monitor else ""
        title = f"{type(self).__name__}{key}"
        return cards.shown(title, self.dirpath, card)

    @property
    def checkpointer(self) -> Checkpointer | None:
        """The `Checkpointer` that saves; None before the first fit."""
        return None if self._session is None else self._session.run.checkpointer

    # ------------------------------------------------------------------ the life of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to read folders and, for a fit, to save and to resume."""
        self._leave()
        if stage != "fit" or _private.finders.is_no_run(trainer):
            open_folders(trainer, self._options, self._reading)
            return
        refuse_what_cannot_work(trainer, [each.dirpath for each in _taking_part(trainer)])
        self.dirpath = self._placed = self._place(trainer)
        if str(self.dirpath) != str(self._options.dirpath):
            rank_zero_info(f"SBCheckpoint: the checkpoints of this run are in {self.dirpath}")
        if self._session is not None:
            self._session.forget()
        self._reset_scores()
        self._session = FitSession(
            replace(self._options, dirpath=self.dirpath),
            trainer,
            self,
            begin_at=self._begin_at,
            announce=partial(self._announce, trainer),
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the user's own recoverables, which all exist by now; refuse names at once."""
        if session := self._session_of(trainer):
            session.load_own()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell at the first fit, not after the crash, what will not resume exactly."""
        if session := self._session_of(trainer):
            session.train(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let a copy that hides behind forward and backward come to its end."""
        if self._session is not None:
            self._session.before_step()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch for a validation."""
        if session := self._session_of(trainer):
            session.begin_epoch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics of this validation; the save follows when Lightning is done with it."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if session := self._session_of(trainer):
            session.validated()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics of this epoch."""
        if session := self._session_of(trainer):
            session.trained()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See every checkpoint on the disk, and restore the best weights."""
        session = self._session_of(trainer)
        if session is None:
            return
        try:
            session.finish()
            # Last, as it is rank zero's alone: whatever fails there, the ranks stay in step.
            self._upload(ends=True)
        finally:
            session.restore_best(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the last save come to its end; restore the best weights if the user stopped."""
        session = self._session_of(trainer) if trainer.state.fn == "fit" else None
        if session is not None:
            # Without the other ranks, which may be anywhere; and the run's own exception is what
            # the user must see.
            checkpointer = session.run.checkpointer
            checkpointer.wait_here()
            if checkpointer.world.size == 1 and isinstance(exception, KeyboardInterrupt):
                session.restore_best(pl_module)
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._leave()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note which callbacks find their state in the checkpoint, and which don't."""
        if session := self._session_of(trainer):
            session.plan.note_callbacks(checkpoint.get("callbacks", {}))

    def on_after_setup(self, fabric: object, module: object) -> None:
        """Say what to do in Fabric, which alone calls this.

        Raises:
            ConfigurationError: Always: its loop is the user's, so no callback knows where it is.
        """
        raise ConfigurationError(
            "SBCheckpoint is a callback of a Trainer, and it was given to Fabric, whose loop is yours: make "
            "a Checkpointer(dirpath, {'model': model, 'optimizer': optimizer, ...}), call "
            "recover_if_possible() before the loop and save_and_keep_only(meta) in it, as examples/fabric.py "
            "does"
        )

    def gives_way(self, trainer: Trainer) -> bool:
        """Return whether it takes no part in the fits of a Trainer."""
        return False

    def _place(self, trainer: Trainer) -> Path | str:
        """Return the folder of the run; the attribute may have been set since."""
        given = self._options.dirpath if self.dirpath == self._placed else folder(self.dirpath)
        return place_of(given, trainer)

    def _session_of(self, trainer: Trainer) -> FitSession | None:
        """Return the fit that is under way; what a finder tries out is none."""
        return None if _private.finders.is_no_run(trainer) else self._session

    def _leave(self) -> None:
        self._reading.close()
        if self._session is not None:
            self._session.close()

    def _begin_at(self, given: object) -> object:
        session = self._session
        if _private.finders.is_of_a_finder(given) or session is None:
            return given
        path = session.path(given)
        self.resume_report = session.plan.report
        if session.run.resumed_from is not None:
            self._set_paths(session.run)
        return path

    # ------------------------------------------------------------------ what others see of it

    def _announce(self, trainer: Trainer) -> None:
        assert self._session is not None  # Nothing else announces.
        self._set_paths(self._session.run)
        for logger in trainer.loggers:
            _private.loggers.tell(logger, proxy(self))
        self._upload(ends=False)

    def _upload(self, *, ends: bool) -> None:
        if self._session is not None:
            has_key = self._options.best_by.is_given
            scores = {
                path: float(score) if has_key else None
                for path, score in self.best_k_models.items()
            }
            scores.setdefault(self.last_model_path, None)
            self._session.upload(scores, self.best_model_path, self.last_model_path, ends=ends)

    def _set_paths(self, run: Run) -> None:
        best_by = self._options.best_by
        standing = run.standing(max(1, self.save_top_k))
        self.last_model_path = standing.newest
        self.best_k_models = {
            path: torch.tensor(value, device="cpu") for path, value in standing.best
        }
        self.best_model_path, self.best_model_score = "", None
        if standing.best:
            self.best_model_path, value = standing.best[0]
            if best_by.is_given:
                self.best_model_score = torch.tensor(value, device="cpu")
        value_now = standing.newest_value
        self.current_score = None if value_now is None else torch.tensor(value_now, device="cpu")


def _taking_part(trainer: Trainer) -> list[SBCheckpoint]:
    return [
        each
        for each in _private.trainer.callbacks_of(trainer)
        if isinstance(each, SBCheckpoint) and not each.gives_way(trainer)
    ]


def _resumes_from(trainer: Trainer) -> CheckpointFolder | None:
    """Return the folder that a fit of a Trainer would go on from, or None."""
    for callback in _taking_part(trainer):
        options = callback._options  # noqa: SLF001 - its own
        if options.resume:
            return CheckpointFolder(
                callback._place(trainer),  # noqa: SLF001
                access="read",
                local_dir=options.local_dir,
                storage_options=options.storage_options,
            )
    return None


def join(package: str) -> None:
    """Be a callback of a package's Trainers, which take checkpoint folders from now on, as its modules do.

    Args:
        package: The name of the package, which has just been imported.
    """
    _private.trainer.let_load_from_checkpoint_read(
        package,
        is_readable,
        read_for_new_module,
        check_loaded,
        lambda dump: (
            ForNewModule(dump, names_of_module) if isinstance(dump, LoadedFolder) else dump
        ),
    )
    open_for_every_trainer(package, SBCheckpoint, SBCheckpoint._place)  # noqa: SLF001 - its own
    follow_logs(package, _resumes_from)
    _private.spawn.hand_back_attributes(package, SBCheckpoint)
    _private.trainer.name_mixed_packages(package)
    _private.trainer.tell_of_checkpointing_off(package, SBCheckpoint)
    # Last: what fails above is tried again when a callback is made, and no base can be there twice.
    checkpoint = import_module(f"{package}.callbacks").Checkpoint
    SBCheckpoint.__bases__ = (checkpoint, *SBCheckpoint.__bases__)
