"""Going on from a checkpoint: which one, then what of it in Lightning's own order, and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn

from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.plugin import _private, stopping
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin._private.loading import FolderDump
from lightning_sbckpt.plugin.data.epoch_position import EpochPosition
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.options import Options
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.preemption import requeued_if_newer
from lightning_sbckpt.plugin.run import ENDED, Run
from lightning_sbckpt.plugin.run_folders import checkpoint_at
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.capture import Gatherer
from lightning_sbckpt.plugin.state.parts import (
    CALLBACKS,
    COMM_HOOKS,
    GRADIENTS,
    LOADERS,
    LOOPS,
    METRICS,
    MODEL,
    NONPERSISTENT,
    RANK_BUFFERS,
    RNG,
    FolderReader,
    is_folder,
    is_reserved,
    is_resumable,
    position_in,
    read_as_ours,
    submodules_in,
)
from lightning_sbckpt.plugin.state.per_rank import number_of_ranks, state_of_rank
from lightning_sbckpt.plugin.state.training_state import Description

_PER_RANK = (RNG, LOADERS, METRICS, GRADIENTS, RANK_BUFFERS, COMM_HOOKS)
_OF_RANKS = (*_PER_RANK, NONPERSISTENT)


@dataclass
class ResumeReport:
    """What a resumed run has from its checkpoint, and what it has not.

    Attributes:
        checkpoint: The folder or file.
        meta: Its meta; empty for a file.
        restored: The names of what was restored.
        skipped: What the checkpoint has and was not restored, each with the reason.
        missing: What this run has and the checkpoint lacks.
        data: How each loader came to its place.
        notes: What is not as it was, and what can't be exact.
        changes: How the experiment differs from the checkpoint's, and what is in force.
    """

    checkpoint: str
    meta: Mapping[str, object] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def headline(self) -> str:
        """Return one line: which checkpoint, from when, at which step."""
        if not self.meta:
            return f"resuming from {self.checkpoint}"
        saved = time.localtime(float(cast("float", self.meta.get("unixtime", 0.0))))
        place = "at the end of" if self.meta.get("end-of-epoch") else "within"
        return (
            f"resuming from {self.checkpoint}, saved {time.strftime('%Y-%m-%d %H:%M:%S', saved)} "
            f"{place} epoch {self.meta.get('epoch', '?')}, at global step "
            f"{self.meta.get('global_step', '?')}"
        )

    def lacking(self) -> str:
        """Return in one line what was skipped, what is missing and what can't be exact, if anything.

        Example:
            >>> ResumeReport("run/CKPT+a", skipped=["optimizer: told to"]).lacking()
            'skipped: optimizer: told to'
        """
        parts = {"skipped: ": self.skipped, "missing: ": self.missing, "": self.notes}
        return "; ".join(f"{what}{'; '.join(found)}" for what, found in parts.items() if found)

    def details(self) -> str:
        """Return what was restored, skipped and missing, a line each."""
        lines = []
        for name in ("restored", "skipped", "missing"):
            found = cast("list[str]", getattr(self, name))
            lines.append(f"  {name + ':':<10}{'; '.join(found) or 'nothing'}")
        lines += [f"  {'changed:':<10}{change}" for change in self.changes]
        lines += [f"  {'data:':<10}{place}" for place in self.data]
        lines += [f"  {'note:':<10}{note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the whole report."""
        return f"{self.headline()}\n{self.details()}"


class ResumePlan:
    """Finds the checkpoint that a fit goes on from, and sees to it until the first batch.

    Args:
        trainer: About to fit.
        options: Of the callback.
        run: Its checkpoints.
        reader: Reads folders.
        gatherer: Knows the user's recoverables.
        tracker: Positions the loaders.
        reductions: How DDP adds up gradients.
        experiment: What is about to be trained.
        went_on: Called when training is about to go on.

    Attributes:
        trainer: As given.
        options: As given.
        reader: As given.
        tracker: As given.
        reductions: As given.
        world: The ranks.
        report: What is known of the resume so far; None if the run begins anew.
        restore: The resume that is under way; None before it has begun and when it is done.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: Options,
        run: Run,
        reader: FolderReader,
        gatherer: Gatherer,
        tracker: LoaderTracker,
        reductions: Reductions,
        experiment: Experiment,
        went_on: Callable[[Restore], object],
    ) -> None:
        self.trainer, self.options, self.reader = trainer, options, reader
        self.tracker, self.reductions = tracker, reductions
        self.world = run.checkpointer.world
        self.report: ResumeReport | None = None
        self.restore: Restore | None = None
        self._run, self._gatherer, self._experiment = run, gatherer, experiment
        self._went_on = went_on

    def path(self, given: object) -> object:
        """Return where Lightning is to restore from.

        Args:
            given: What `fit` was given as `ckpt_path`, or the checkpoint of a requeued SLURM job.
        """
        self.report = None
        checkpointer, world, searches = self._run.checkpointer, self.world, self.options.resume
        explicit = False
        decided_by_main(world, self._experiment.begin)
        if (
            searches
            and given is not None
            and given == _private.trainer.hpc_checkpoint(self.trainer)
        ):
            ours = checkpointer.find_sound_checkpoint(ckpt_predicate=is_resumable)
            given = requeued_if_newer(str(given), ours, world)
        if searches and str(given) in _private.callbacks.exception_files(self.trainer):
            given = self._ours_rather_than(str(given))
        if given is not None and given != "":
            if searches:
                rank_zero_info(
                    f"SBCheckpoint: ckpt_path={str(given)!r} was given, so {self._where} is not "
                    "searched for a checkpoint to resume from"
                )
            # What the others see of a shared disk may be older.
            given = decided_by_main(
                world, lambda: checkpoint_at(given, newest=True, verified=checkpointer.verified)
            )
            if not decided_by_main(world, lambda: is_folder(given)):
                self.report = explicit_report(given)
                return given
            chosen: Checkpoint | None = read_checkpoint(checkpointer.folder_of(str(given)))
            explicit = True
        elif searches:
            chosen = checkpointer.find_sound_checkpoint(ckpt_predicate=is_resumable)
        else:
            self._say_what_is_there()
            return given
        if chosen is None:
            rank_zero_info(f"SBCheckpoint: no checkpoint in {self._where}, the run begins anew")
            return given
        folder = chosen.path
        anew = decided_by_main(world, lambda: self._experiment.judge(folder, explicit=explicit))
        if anew:
            rank_zero_info(f"SBCheckpoint: {anew}")
            return given
        self._go_on_from(chosen)
        return str(folder)

    def _ours_rather_than(self, file: str) -> str | None:
        """Return None if there is a checkpoint to go on from exactly, or the file of an exception."""
        ours = self._run.checkpointer.find_sound_checkpoint(ckpt_predicate=is_resumable)
        if ours is None:
            return file
        rank_zero_warn(
            f"SBCheckpoint: OnExceptionCheckpoint has left {file}, which has no random states and no "
            f"position of the data. The run goes on from {ours.path} instead, exactly; with "
            "resume=False it would go on from the file. Beside SBCheckpoint that callback is not needed"
        )
        return None

    def _say_what_is_there(self) -> None:
        there = self._run.checkpointer.list_checkpoints()
        if there:
            newest = max(there, key=ckpt_recency).path.name
            rank_zero_info(
                f"SBCheckpoint: resume=False, so this run begins anew beside {len(there)} checkpoints "
                f"of others in {self._where} (newest: {newest}). They stay, and only its own count "
                "for what is best"
            )

    def _go_on_from(self, chosen: Checkpoint) -> None:
        self._run.go_on_from(chosen)
        with read_as_ours(chosen.path):
            self.restore = Restore(self, chosen)
        self.report = self.restore.report

    def load_own(self) -> None:
        """Load the user's recoverables, which all exist by now; refuse their names at once."""
        own = self._gatherer.of_user(self.trainer)
        # Strategies that shard the model restore after this, see `adapt`.
        if not _private.strategies.restores_late(self.trainer.strategy):
            self._load(own)

    def settle(self) -> None:
        """Say from where the run goes on, or that it is complete, now that all is restored."""
        restore, origin = self.restore, self._run.resumed_from
        if restore is None or origin is None:
            return
        complete = restore.settle()
        says = [restore.report.headline(), *([complete] if complete else [])]
        rank_zero_info(f"SBCheckpoint: {'; '.join(says)}")
        self._say_changes(
            origin.path, lambda: self._experiment.settle(origin.path, complete, restore.found)
        )
        if complete:
            restore.report.notes.append(complete)
            _private.callbacks.hold_averages(self.trainer)

    def compare_data(self) -> None:
        """Say how the data differs, now that the loaders are made."""
        origin = self._run.resumed_from
        folder = None if origin is None else origin.path
        self._say_changes(folder, lambda: self._experiment.compare_data(folder))

    def _say_changes(self, folder: Path | None, compare: Callable[[], list[str]]) -> None:
        lines = decided_by_main(self.world, compare)
        if not lines:
            return
        if self.report is not None:
            self.report.changes += lines
        text = "\n  ".join(lines)
        rank_zero_warn(
            f"SBCheckpoint: what is started is not quite what is in {folder}:\n  {text}\nUse a new "
            "folder for a new experiment; pass on_change='raise' to have this end the fit"
        )

    def adapt(self, dump: dict[str, Any]) -> None:
        """Change what is about to be restored to what is wanted of it."""
        if isinstance(dump, FolderDump):
            dump["callbacks"], notes = _private.callbacks.without_paths_elsewhere(
                self.trainer, dump["callbacks"]
            )
            for note in notes:
                rank_zero_warn(f"SBCheckpoint: {note}")
            if self.report is not None:
                self.report.notes += notes
        if self.restore is not None:
            limit = self.trainer.max_epochs
            if limit is not None and limit >= 0:
                with read_as_ours(self.restore.report.checkpoint):
                    _private.loops.lower_epoch_count(dump, limit)
            if self.options.adaptation.skips(MODEL):
                # Lightning wants to load one, and hooks may look at it.
                dump["state_dict"] = dict(self.reader.own_state(self.trainer.lightning_module))
        if _private.strategies.restores_late(self.trainer.strategy):
            self._load(self._gatherer.of_user(self.trainer))

    def _load(self, own: Mapping[str, object]) -> None:
        if self._run.resumed_from is None:
            return
        if self.restore is not None:
            self.restore.note_recoverables(own)
        wanted = {
            name: obj for name, obj in own.items() if name not in self.options.adaptation.skip
        }
        if wanted:
            optional = dict.fromkeys(self.options.optional, True)
            self._run.checkpointer.load_into(wanted, self._run.resumed_from, optional)

    def note_callbacks(self, saved: Mapping[str, object]) -> None:
        """Note which callbacks find their state in the checkpoint, and which don't."""
        if self.restore is not None:
            self.restore.note_callbacks(saved)

    def cancel(self) -> None:
        """Give up: the fit ends, perhaps before its first batch."""
        if self.restore is not None:
            self.restore.cancel()
            self.restore = None

    def restored(self, restore: Restore) -> None:
        """Say what a resume lacks: training is about to go on."""
        self.restore = None
        self._went_on(restore)
        report = restore.report
        # On a resume that lacks nothing there is one line, the headline.
        if lacking := report.lacking():
            rank_zero_info(f"SBCheckpoint: resumed; {lacking}")
        rank_zero_debug(f"SBCheckpoint: resumed\n{report.details()}")

    @property
    def _where(self) -> object:
        return self._run.checkpointer.url or self._run.checkpointer.checkpoints_dir


class Restore:
    """One resume from one checkpoint folder, from Lightning's restore to the first batch after it.

    Args:
        plan: What it is for, and with what; told when training is about to go on.
        checkpoint: The folder's record.

    Attributes:
        report: What is known of the resume so far.
        found: What finders had set before the save.
        within_epoch: Whether the save was between two batches of an epoch.
        description: What was saved about optimizers and schedulers beside their states.
        validated_this_epoch: Whether the epoch had been validated before the save.
    """

    def __init__(self, plan: ResumePlan, checkpoint: Checkpoint) -> None:
        trainer, tracker = plan.trainer, plan.tracker
        skip = plan.options.adaptation.skip
        self._plan, self._trainer, self._tracker = plan, trainer, tracker
        self._checkpoint, self._skip = checkpoint, skip
        self._size = size = plan.world.size
        self.report = ResumeReport(str(checkpoint.path), checkpoint.meta)
        self.description = Description()
        self.found: Mapping[str, float] = {}
        self._loops: _private.loops.LoopResumption | None = None
        self._undo: list[_private.trainer.Undo] = []
        self._state: dict[str, Any] = {}
        # Of rank zero, where other ranks have saved than there are now, and how many these were.
        self._of_others: dict[str, tuple[Any, int]] = {}
        self.validated_this_epoch = False
        self.within_epoch = False
        self._told_to_stop = False
        self._ended = ENDED in checkpoint.meta
        self._patience = stopping.patience_of(trainer)
        loops = plan.reader.part(checkpoint, LOOPS)
        if loops is None:
            raise MismatchError(
                f"{checkpoint.path} has weights and not the state of a fit (no {LOOPS}.ckpt), so no "
                "fit can go on from it; nothing was loaded. Begin a fit with its weights, by "
                "load_from_checkpoint, or give ckpt_path a checkpoint that a run saved"
            )
        progress = loops["loops"]["fit_loop"]
        submodules = submodules_in(loops)
        ours = [name for name in checkpoint.paramfiles if is_reserved(name) or name in submodules]
        self._recoverables = set(checkpoint.paramfiles).difference(ours)
        self.report.restored += [n for n in ours if n not in _OF_RANKS and n not in skip]
        self.report.skipped += [
            f"{name} (asked for by skip)" for name in checkpoint.paramfiles if name in skip
        ]
        position = position_in(loops)
        if position is None:
            self.report.notes.append(
                "the checkpoint does not say at which batch it was saved: the run goes on as "
                "Lightning alone would, which is not exact within an epoch"
            )
            return
        self.description = Description.saved_in(position)
        self.found = position.get("found", {})
        self._read_rank_state()
        self._read_buffers()
        self.within_epoch = within_epoch = bool(position["within_epoch"])
        same_ranks = position.get("ranks", size) == size
        self._told_to_stop = bool(position["loops"]["should_stop"])
        self.validated_this_epoch = bool(position.get("validated_this_epoch"))
        if LOADERS in self._state:
            tracker.load(self._state[LOADERS])
        self._loops = _private.loops.LoopResumption(
            trainer,
            within_epoch=within_epoch,
            progress=progress,
            extra=position["loops"]
            if LOADERS in self._state
            else {**position["loops"], "combined_consumed": []},
            count=self._count,
            before_batches=lambda: tracker.release(True),
            finish=lambda: self._finish(within_epoch, position, same_ranks=same_ranks),
        )
        self._undo = _private.finders.search_no_more(trainer, self.found, self.report.notes.append)

    def settle(self) -> str:
        """Decide whether there is anything to train, now that all is restored; return why not.

        Without anything to train the loops run no hook. The text is a line for the log.
        """
        trainer, loops = self._trainer, self._loops
        if loops is None:
            return ""
        self.report.notes += stopping.keep_patience(trainer, self._patience)
        asked_now = bool(trainer.should_stop)
        reason = self._limit_reached(loops.max_steps)
        advice = "raise max_steps" if " step" in reason else "raise max_epochs"
        if not reason and self._ended and _private.loops.may_stop(trainer):
            reasons = (
                stopping.standing_reasons(trainer, self.report.meta) if self._told_to_stop else []
            )
            if asked_now and not reasons:
                reasons = ["and told so again"]
            if reasons:
                trainer.should_stop = True
                reason = f"stopped {', '.join(reasons)}"
                advice = "change what stops it"
        if reason:
            loops.stop()
            return f"already complete: {reason}, nothing trained; {advice} or use another folder"
        told = self._told_to_stop and not self._ended
        if self._told_to_stop and self._ended:
            self.report.notes.append(
                "the run had been told to stop; what told it so does not any more, so it goes on"
            )
        loops.go_on(should_stop=told or asked_now)
        return ""

    def _limit_reached(self, most: int) -> str:
        trainer = self._trainer
        steps = trainer.global_step
        # A run killed between its last step and the end of its epoch has that end before it.
        if 0 <= most < steps or (steps == most and (self._ended or not self.within_epoch)):
            return _of(steps, most, "step")
        epochs, limit = _private.loops.epochs_over(trainer), trainer.max_epochs
        if limit is not None and 0 <= limit <= epochs:
            return _of(epochs, limit, "epoch")
        return ""

    def cancel(self) -> None:
        """Give up: the fit ends before its first batch."""
        if self._loops is not None:
            self._loops.cancel()
        self._let_search()

    def _let_search(self) -> None:
        while self._undo:
            self._undo.pop()()

    def note_recoverables(self, names: Iterable[str]) -> None:
        """Compare the user's recoverables that were saved with those there are."""
        names = set(names)
        self.report.restored += sorted(self._recoverables & names)
        self.report.missing += sorted(names - self._recoverables)
        self.report.skipped += [
            f"{name} (this run has no recoverable of that name)"
            for name in sorted(self._recoverables - names)
        ]

    def note_callbacks(self, saved: Mapping[str, object]) -> None:
        """Compare the callbacks whose state was saved with those there are."""
        callbacks = _private.trainer.callbacks_of(self._trainer)
        present = {callback.state_key: callback for callback in callbacks}
        self.report.skipped += [
            f"{CALLBACKS}: {key} (not among this Trainer's callbacks)"
            for key in saved
            if key not in present
        ]
        self.report.missing += [
            f"{CALLBACKS}: {key}"
            for key, callback in present.items()
            if key not in saved and callback.state_dict()
        ]

    def _part(self, name: str) -> Any:
        skipped = name in self._skip
        return None if skipped else self._plan.reader.part(self._checkpoint, name)

    def _read_rank_state(self) -> None:
        for name in _PER_RANK:
            part = self._part(name)
            if part is None:
                continue
            saved_by = number_of_ranks(part)
            if saved_by != self._size:
                self.report.skipped.append(
                    f"{name} (saved by {_ranks(saved_by)}, this run has {self._size}: every rank has its "
                    "own, so the run goes on, but not bit for bit)"
                )
                self._of_others[name] = state_of_rank(part, 0), saved_by
            elif (mine := state_of_rank(part, self._plan.world.rank)) is not None:
                self._state[name] = mine
                self.report.restored.append(name)

    def _count(self, length_then: int | None, length: int | None, done: int) -> int:
        """Return how many batches of this run are as far in the epoch as those of the one before."""
        loaders, saved_by = self._of_others.get(LOADERS, (self._state.get(LOADERS), self._size))
        if loaders is None:
            return done
        saved = loaders["train"][0]["loader"] if loaders["train"] else {}
        then = EpochPosition(
            done,
            saved.get("batch_size"),
            saved_by,
            # Checkpoints of earlier releases don't have it.
            saved.get("length") if length_then is None else length_then,
        )
        now = then.batches_with(
            batch_size=self._tracker.batch_size(), ranks=self._size, length=length
        )
        of = "" if length is None else f" of {length}"
        if saved_by != self._size:
            self.report.notes.append(
                f"the epoch goes on after {now}{of} batches, which have no more samples than the "
                f"{done} that {_ranks(saved_by)} had trained on. Its data comes from the beginning: "
                "some samples come twice in it and some not at all. From the next epoch on it is "
                "as ever"
            )
        elif now != done:
            self.report.notes.append(
                f"the epoch goes on after {now}{of} batches, which have no more samples than the "
                f"{done} that had been trained on"
            )
        return now

    def _read_buffers(self) -> None:
        part, rank = self._part(NONPERSISTENT), self._plan.world.rank
        if part is None:
            return
        own = state_of_rank(part, rank) if rank < number_of_ranks(part) else None
        # What all ranks had in common rank zero has saved; a rank that is new begins like it.
        self._state[NONPERSISTENT] = own or state_of_rank(part, 0)
        self.report.restored.append(NONPERSISTENT)

    def _finish(self, within_epoch: bool, position: Mapping[str, Any], *, same_ranks: bool) -> None:
        reductions = self._plan.reductions
        if not within_epoch:
            self._tracker.release(False)
        self._let_search()
        if within_epoch:
            _private.callbacks.enter_epoch(self._trainer)
        with read_as_ours(self.report.checkpoint):
            exact.restore_modes(self._trainer.lightning_module, position["modes"])
            if METRICS in self._of_others:
                # What stops a run, or steps a scheduler, wants the values of the last validation.
                _private.logged.restore_values(self._trainer, self._of_others[METRICS][0]["logged"])
            self.report.skipped += exact.restore(self._trainer, self._state)
        if same_ranks:
            self.report.notes += reductions.restore(position.get("reductions"))
            self.report.notes += reductions.restore_hooks(self._state.get(COMM_HOOKS, ()))
        self.report.notes += self._tracker.report()
        self.report.data += self._tracker.placed
        self.report.notes += exact.changes_of_hardware(self._trainer, self._state)
        self.report.notes += exact.nondeterminism_warnings(self._trainer)
        self.report.notes += reductions.nondeterminism_warnings()
        self._plan.restored(self)


def _of(done: int, limit: int, what: str) -> str:
    if done <= limit:
        return f"{done} of {limit} {what}s"
    return f"{done} {what}s, more than max_{what}s={limit}"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def explicit_report(path: object) -> ResumeReport:
    """Return the report of a fit that goes on from a file of Lightning's own."""
    report = ResumeReport(str(path))
    report.notes.append(
        f"{Path(str(path)).name} is a file of Lightning's own, which has no random states and no "
        "position of the data: resuming from it is not exact"
    )
    return report
