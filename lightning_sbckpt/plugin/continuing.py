"""Where a fit begins: at a checkpoint that was chosen or given, or anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn

from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin._private.loading import FolderDump
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.experiment import Experiment
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.preemption import requeued_if_newer
from lightning_sbckpt.plugin.resume import Restore, ResumeReport, explicit_report
from lightning_sbckpt.plugin.run import Run
from lightning_sbckpt.plugin.run_folders import checkpoint_at
from lightning_sbckpt.plugin.state.adapt import Adaptation
from lightning_sbckpt.plugin.state.parts import (
    MODEL,
    FolderReader,
    is_folder,
    is_resumable,
    read_as_ours,
)


class ResumePlan:
    """Finds the checkpoint that a fit goes on from, and sees to it until the first batch.

    Args:
        trainer: About to fit.
        run: Its checkpoints.
        reader: Reads folders.
        tracker: Positions the loaders.
        reductions: How DDP adds up gradients.
        adaptation: What of a checkpoint is not taken as it is.
        experiment: What is about to be trained.
        own: Gives the user's recoverables, by name.
        optional: Those of them that a checkpoint may lack.
        searches: Whether a checkpoint is looked for if none is given.
        went_on: Called when training is about to go on.

    Attributes:
        report: What is known of the resume so far; None if the run begins anew.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: Run,
        reader: FolderReader,
        tracker: LoaderTracker,
        reductions: Reductions,
        adaptation: Adaptation,
        experiment: Experiment,
        *,
        own: Callable[[], Mapping[str, object]],
        optional: Sequence[str],
        searches: bool,
        went_on: Callable[[Restore], object],
    ) -> None:
        self.report: ResumeReport | None = None
        self._trainer = trainer
        self._run = run
        self._reader = reader
        self._tracker = tracker
        self._reductions = reductions
        self._adaptation = adaptation
        self._experiment = experiment
        self._own = own
        self._optional = optional
        self._searches = searches
        self._went_on = went_on
        self._resumption: Restore | None = None

    def path(self, given: object) -> object:
        """Return where Lightning is to restore from.

        Args:
            given: What `fit` was given as `ckpt_path`, or the checkpoint of a requeued SLURM job.
        """
        self.report = None
        checkpointer = self._run.checkpointer
        world = checkpointer.world
        explicit = False
        decided_by_main(world, self._experiment.begin)
        if (
            self._searches
            and given is not None
            and given == _private.trainer.hpc_checkpoint(self._trainer)
        ):
            ours = checkpointer.find_sound_checkpoint(ckpt_predicate=is_resumable)
            given = requeued_if_newer(str(given), ours, world)
        if self._searches and str(given) in _private.callbacks.exception_files(self._trainer):
            given = self._ours_rather_than(str(given))
        if given is not None and given != "":
            if self._searches:
                rank_zero_info(
                    f"SBCheckpoint: ckpt_path={str(given)!r} was given, so {self._where} is not "
                    "searched for a checkpoint to resume from"
                )
            # What the others see of a shared disk may be older.
            given = decided_by_main(world, lambda: checkpoint_at(given, newest=True))
            if not decided_by_main(world, lambda: is_folder(given)):
                self.report = explicit_report(given)
                return given
            chosen: Checkpoint | None = read_checkpoint(checkpointer.folder_of(str(given)))
            explicit = True
        elif self._searches:
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
        world = self._run.checkpointer.world
        with read_as_ours(chosen.path):
            self._resumption = resumption = Restore(
                self._trainer,
                chosen,
                self._reader,
                self._tracker,
                self._reductions,
                rank=world.rank,
                size=world.size,
                skip=self._adaptation.skip,
                done=lambda report: self._ready(resumption, report),
            )
        self.report = resumption.report

    @property
    def resumption(self) -> Restore | None:
        """The resume that is under way."""
        return self._resumption

    def load_own(self) -> None:
        """Load the user's recoverables, which all exist by now; refuse their names at once."""
        own = self._own()
        # Strategies that shard the model restore after this, see `adapt`.
        if not _private.strategies.restores_late(self._trainer.strategy):
            self._load(own)

    def settle(self) -> None:
        """Say from where the run goes on, or that it is complete, now that all is restored."""
        resumption = self._resumption
        if resumption is None:
            return
        complete = resumption.settle()
        says = [resumption.report.headline(), *([complete] if complete else [])]
        rank_zero_info(f"SBCheckpoint: {'; '.join(says)}")
        folder = cast("Checkpoint", self._run.resumed_from).path
        self._say_changes(
            folder, lambda: self._experiment.settle(folder, complete, resumption.found)
        )
        if complete:
            resumption.report.notes.append(complete)
            _private.callbacks.hold_averages(self._trainer)

    def compare_data(self) -> None:
        """Say how the data differs, now that the loaders are made."""
        origin = self._run.resumed_from
        folder = None if origin is None else origin.path
        self._say_changes(folder, lambda: self._experiment.compare_data(folder))

    def _say_changes(self, folder: Path | None, compare: Callable[[], list[str]]) -> None:
        lines = decided_by_main(self._run.checkpointer.world, compare)
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
                self._trainer, dump["callbacks"]
            )
            for note in notes:
                rank_zero_warn(f"SBCheckpoint: {note}")
            if self.report is not None:
                self.report.notes += notes
        if self._resumption is not None:
            limit = self._trainer.max_epochs
            if limit is not None and limit >= 0:
                with read_as_ours(self._resumption.report.checkpoint):
                    _private.loops.lower_epoch_count(dump, limit)
            if self._adaptation.skips(MODEL):
                # Lightning wants to load one, and hooks may look at it.
                dump["state_dict"] = dict(self._reader.own_state(self._trainer.lightning_module))
        if _private.strategies.restores_late(self._trainer.strategy):
            self._load(self._own())

    def _load(self, own: Mapping[str, object]) -> None:
        if self._run.resumed_from is None:
            return
        if self._resumption is not None:
            self._resumption.note_recoverables(own)
        wanted = {name: obj for name, obj in own.items() if name not in self._adaptation.skip}
        if wanted:
            optional = dict.fromkeys(self._optional, True)
            self._run.checkpointer.load_into(wanted, self._run.resumed_from, optional)

    def note_callbacks(self, saved: Mapping[str, object]) -> None:
        """Note which callbacks find their state in the checkpoint, and which don't."""
        if self._resumption is not None:
            self._resumption.note_callbacks(saved)

    def cancel(self) -> None:
        """Give up: the fit ends, perhaps before its first batch."""
        if self._resumption is not None:
            self._resumption.cancel()
            self._resumption = None

    def _ready(self, resumption: Restore, report: ResumeReport) -> None:
        self._resumption = None
        self._went_on(resumption)
        # On a resume that lacks nothing there is one line, the headline.
        if lacking := report.lacking():
            rank_zero_info(f"SBCheckpoint: resumed; {lacking}")
        rank_zero_debug(f"SBCheckpoint: resumed\n{report.details()}")

    @property
    def _where(self) -> object:
        return self._run.checkpointer.url or self._run.checkpointer.checkpoints_dir
