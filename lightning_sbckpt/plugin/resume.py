"""Going on from a checkpoint: which one, in Lightning's own order, and a report of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin import _private, stopping
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin.data.epoch_position import EpochPosition
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.parts import (
    CALLBACKS,
    COMM_HOOKS,
    GRADIENTS,
    LOADERS,
    LOOPS,
    METRICS,
    NONPERSISTENT,
    RANK_BUFFERS,
    RNG,
    FolderReader,
    is_reserved,
    position_in,
    read_as_ours,
    submodules_in,
)
from lightning_sbckpt.plugin.state.per_rank import number_of_ranks, state_of_rank
from lightning_sbckpt.plugin.state.training_state import Description

ENDED = "ended"
"""The key under which a checkpoint says why the fit that ended with it did."""

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


class Restore:
    """One resume from one checkpoint folder, from Lightning's restore to the first batch after it.

    Args:
        trainer: About to fit.
        checkpoint: The folder's record.
        reader: Reads its parts.
        tracker: Positions the loaders.
        reductions: How DDP adds up gradients.
        rank: The rank of this process.
        size: How many ranks there are.
        skip: Names of parts that are not restored.
        done: Called with the report when training is about to go on.

    Attributes:
        report: What is known of the resume so far.
        found: What finders had set before the save.
        within_epoch: Whether the save was between two batches of an epoch.
        description: What was saved about optimizers and schedulers beside their states.
        validated_this_epoch: Whether the epoch had been validated before the save.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoint: Checkpoint,
        reader: FolderReader,
        tracker: LoaderTracker,
        reductions: Reductions,
        *,
        rank: int,
        size: int,
        skip: Sequence[str],
        done: Callable[[ResumeReport], None],
    ) -> None:
        self._skip = skip
        self._size = size
        self._trainer = trainer
        self._tracker = tracker
        self._reductions = reductions
        self._done = done
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
        loops = reader.part(checkpoint, LOOPS)
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
        self._read_rank_state(checkpoint, reader, rank, size)
        self._read_buffers(checkpoint, reader, rank)
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

    def _read_rank_state(
        self, checkpoint: Checkpoint, reader: FolderReader, rank: int, size: int
    ) -> None:
        for name in _PER_RANK:
            if name in self._skip:
                continue
            part = reader.part(checkpoint, name)
            if part is None:
                continue
            saved_by = number_of_ranks(part)
            if saved_by != size:
                self.report.skipped.append(
                    f"{name} (saved by {_ranks(saved_by)}, this run has {size}: every rank has its "
                    "own, so the run goes on, but not bit for bit)"
                )
                self._of_others[name] = state_of_rank(part, 0), saved_by
            elif (mine := state_of_rank(part, rank)) is not None:
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

    def _read_buffers(self, checkpoint: Checkpoint, reader: FolderReader, rank: int) -> None:
        if NONPERSISTENT in self._skip:
            return
        part = reader.part(checkpoint, NONPERSISTENT)
        if part is None:
            return
        own = state_of_rank(part, rank) if rank < number_of_ranks(part) else None
        # What all ranks had in common rank zero has saved; a rank that is new begins like it.
        self._state[NONPERSISTENT] = own or state_of_rank(part, 0)
        self.report.restored.append(NONPERSISTENT)

    def _finish(self, within_epoch: bool, position: Mapping[str, Any], *, same_ranks: bool) -> None:
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
            self.report.notes += self._reductions.restore(position.get("reductions"))
            self.report.notes += self._reductions.restore_hooks(self._state.get(COMM_HOOKS, ()))
        self.report.notes += self._tracker.report()
        self.report.data += self._tracker.placed
        self.report.notes += exact.changes_of_hardware(self._trainer, self._state)
        self.report.notes += exact.nondeterminism_warnings(self._trainer)
        self.report.notes += self._reductions.nondeterminism_warnings()
        self._done(self.report)


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
