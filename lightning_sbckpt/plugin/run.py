"""The checkpoints of one run: which are its own, which is best, which go.

Several runs may have used one folder. A run knows its checkpoints by the id in their manifests,
which a resumed run takes over from the checkpoint that it goes on from.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._format.keys import share_with_ranks
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError, FolderInUseError, MetaError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.options import Options
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.state.parts import is_resumable
from lightning_sbckpt.retention.protected import protected_checkpoints
from lightning_sbckpt.typing import Access, World

ENDED = "ended"
"""The key under which a checkpoint says why the fit that ended with it did."""


@dataclass(frozen=True)
class RunSummary:
    """How a run stands: its newest checkpoint, and its best with their values, best first."""

    newest: str
    newest_value: float | None
    best: tuple[tuple[str, float], ...]


class Run:
    """The checkpoints of one run.

    Args:
        checkpointer: Of the folder that the run shares with whoever used it before.
        options: Which is best, which stay, and which retention may delete at all.

    Attributes:
        checkpointer: As given.
        resumed_from: The checkpoint that the run went on from.
        busy: Checkpoints that somebody is reading at the moment.
    """

    def __init__(self, checkpointer: Checkpointer, options: Options) -> None:
        self.checkpointer = checkpointer
        self.resumed_from: Checkpoint | None = None
        self.busy: set[Path] = set()
        self._best_by = options.best_by
        self._rules = options.rules
        self._predicate = options.predicate
        self._id = checkpointer.world.broadcast(uuid.uuid4().hex)
        self._lineages: dict[Path, Mapping[str, object]] = {}

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take over the run that wrote a checkpoint."""
        self.resumed_from = checkpoint
        world = self.checkpointer.world
        self._id = decided_by_main(world, lambda: str(self._id_in(checkpoint) or self._id))

    def lineage(self, reason: str) -> dict[str, object]:
        """Return what a checkpoint of this run says about where it comes from."""
        resumed_from = printable(self.resumed_from.path.name) if self.resumed_from else None
        return {"run": self._id, "resumed-from": resumed_from, "reason": reason}

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Return whether this run wrote a checkpoint."""
        return is_resumable(checkpoint) and self._id_in(checkpoint) == self._id

    def best_sound(self) -> Checkpoint | None:
        """Return the best checkpoint of this run that is whole."""
        return self.checkpointer.find_sound_checkpoint(
            **self._best_by.keys, ckpt_predicate=self.is_own
        )

    def standing(self, how_many: int) -> RunSummary:
        """Return how the run stands, the same on every rank."""
        return decided_by_main(self.checkpointer.world, lambda: self._standing(how_many))

    def _standing(self, how_many: int) -> RunSummary:
        # Of one's own run it is known, and training must not wait for a store to say it again.
        with self.checkpointer.as_known():
            return self._standing_as_known(how_many)

    def _standing_as_known(self, how_many: int) -> RunSummary:
        newest = self.checkpointer.find_checkpoint(ckpt_predicate=self.is_own)
        best = self.checkpointer.find_checkpoints(
            **self._best_by.keys, ckpt_predicate=self.is_own, max_num_checkpoints=how_many
        )
        value = None
        if newest and self._best_by.is_given and self._best_by.criterion.applies(newest):
            value = self._best_by.value(newest)
        return RunSummary(
            newest=str(newest.path) if newest else "",
            newest_value=value,
            best=tuple((str(ckpt.path), self._best_by.value(ckpt)) for ckpt in best),
        )

    def note_end(self, global_step: int, reason: str) -> None:
        """Write to this run's last checkpoint that its fit came to its end, and why; all ranks call it.

        Args:
            global_step: Where the fit ended; a checkpoint of another step is left as it is.
            reason: In words; nothing if it need not be known.
        """
        if not reason or self.checkpointer.access == "read":
            return

        def unmarked() -> Checkpoint | None:
            with self.checkpointer.as_known():
                last = self.checkpointer.find_checkpoint(ckpt_predicate=self.is_own)
            if last is None or last.meta.get("global_step") != global_step or ENDED in last.meta:
                return None
            return last

        last = decided_by_main(self.checkpointer.world, unmarked)
        if last is not None:
            self.checkpointer.annotate(last, {ENDED: reason})

    def prune(self) -> None:
        """Delete what no rule keeps, of this run's own checkpoints only; rank zero alone does."""
        with self.checkpointer.one_look():
            self._prune()

    def _prune(self) -> None:
        protected = protected_checkpoints(
            self.checkpointer.list_checkpoints(),
            self._id,
            self._lineage_of,
            busy=self.busy,
            wanted=self._predicate,
        )
        origin = self.resumed_from
        if origin is not None and self.is_own(origin):
            plan = self.checkpointer.prune_here(
                self._rules, ckpt_predicate=protected, protected=protected.reasons, dry_run=True
            )
            newer = ckpt_recency(origin)
            if not any(
                decision.keep and ckpt_recency(decision.checkpoint) > newer for decision in plan
            ):
                reason = "the run was resumed from it, and nothing newer stays"
                protected.reasons.append((origin, reason))
        self.checkpointer.prune_here(
            self._rules, ckpt_predicate=protected, protected=protected.reasons
        )

    def _id_in(self, checkpoint: Checkpoint) -> object:
        return self._lineage_of(checkpoint).get("run")

    def _lineage_of(self, checkpoint: Checkpoint) -> Mapping[str, object]:
        if checkpoint.path not in self._lineages:
            try:
                manifest = read_manifest(checkpoint.path)
            except (MetaError, OSError):
                return {}
            self._lineages[checkpoint.path] = manifest.lineage if manifest else {}
        return self._lineages[checkpoint.path]


def open_checkpointer(options: Options, world: World) -> Checkpointer:
    """Return the checkpointer of a run, to which the folder belongs from now on.

    Raises:
        FolderInUseError: Another process writes there.
    """
    policy = options.save_policy

    def opened(access: Access) -> Checkpointer:
        return Checkpointer(
            options.dirpath,
            world=world,
            trust_pickle=options.trust_pickle,
            save_mode=policy.mode,
            on_save_error=policy.on_error,
            when_busy=policy.when_busy,
            link_unchanged=options.link_unchanged,
            access=access,
            local_dir=options.local_dir,
            storage_options=options.storage_options,
        )

    share_with_ranks(world)
    checkpointer = opened("exclusive")
    try:
        # Now, and not at the first save: hours may have gone by until then.
        checkpointer.claim()
    except FolderInUseError as error:
        if options.when_in_use == "raise":
            raise
        rank_zero_warn(f"SBCheckpoint: nothing of this run will be saved: {error}")
        return opened("read")
    return checkpointer


def refuse_what_cannot_work(trainer: Trainer, folders: Sequence[Path | str]) -> None:
    """Refuse a Trainer with which no checkpoint would come about.

    Args:
        trainer: Is about to fit.
        folders: Of its SBCheckpoint callbacks.

    Raises:
        ConfigurationError: There are several callbacks, or the strategy has a format of its own.
    """
    if len(folders) > 1:
        raise ConfigurationError(
            f"the Trainer has {len(folders)} SBCheckpoint callbacks, on "
            f"{', '.join(map(str, folders))}: one run has one place to resume from. Use one, with "
            "more rules in keep=[...]"
        )
    strategy = trainer.strategy
    if _private.strategies.shards_the_model(strategy):
        return
    if _private.trainer.has_own_checkpoint_format(strategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} writes checkpoints in a format of its own, which "
            "SBCheckpoint can't divide into files. Use ModelParallelStrategy or FSDPStrategy to shard "
            "the model, a strategy that holds the whole model on each rank, or Lightning's "
            "ModelCheckpoint"
        )
