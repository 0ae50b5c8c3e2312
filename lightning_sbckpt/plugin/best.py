"""The best checkpoint of a run: which one that is, and its weights back in the module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt.errors import MismatchError, SBCheckpointError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.trainer import Undo
from lightning_sbckpt.plugin.doors import load_weights
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.state.adapt import REFUSALS, Adaptation
from lightning_sbckpt.plugin.state.parts import FolderReader
from lightning_sbckpt.selection import importance
from lightning_sbckpt.typing import ImportanceKey, World

_OF_A_MOMENT = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")


@dataclass(frozen=True)
class BestBy:
    """Which checkpoint is best: by one of three keys, or by none, and then it is the newest."""

    importance_key: ImportanceKey | None = None
    max_key: str | None = None
    min_key: str | None = None

    def __post_init__(self) -> None:
        """Refuse more than one key."""
        self.criterion  # noqa: B018 - making it is the check

    @property
    def criterion(self) -> Any:
        """The criterion of the core."""
        return importance(**self.keys)

    @property
    def keys(self) -> dict[str, Any]:
        """The three keys, as the core's methods take them."""
        return {
            "importance_key": self.importance_key,
            "max_key": self.max_key,
            "min_key": self.min_key,
        }

    @property
    def is_given(self) -> bool:
        """Whether there is a key."""
        return any(key is not None for key in self.keys.values())

    def value(self, checkpoint: Checkpoint) -> float:
        """Return the value of the key, as it was logged."""
        score = float(self.criterion.score(checkpoint))
        return -score if self.criterion.lowest else score


def restore_weights(
    best: Checkpoint | None,
    best_by: BestBy,
    reader: FolderReader,
    module: LightningModule,
    dirpath: Path | str,
    adaptation: Adaptation,
    world: World,
) -> bool:
    """Put the weights of the best checkpoint into a module; if they don't fit, the last ones stay.

    Args:
        best: The checkpoint; None if there is none, which is said.
        best_by: By what it is the best.
        reader: Reads it.
        module: Gets the weights.
        dirpath: Where it was looked for.
        adaptation: What of a checkpoint is not taken as it is.
        world: The ranks, which all call this.

    Returns:
        Whether they are in place, all of them.

    Raises:
        MismatchError: The weights fit on some ranks only.
    """
    criterion = best_by.criterion.describe()
    if best is None:
        rank_zero_warn(
            f"SBCheckpoint: no checkpoint in {dirpath} has a value for the {criterion}, "
            "so the last weights stay. Log that metric in validation, or pass "
            "restore_best=False"
        )
        return False
    dump = reader.read(best.path)
    # Ranks that load pieces together would wait for one that has given up for a reason of its own.
    refusals = REFUSALS if reader.pieces is None else (MismatchError,)
    left_out: list[str] = []
    error: Exception | None = None
    try:
        left_out = load_weights(dump, module, reader, adaptation)
    except refusals as refused:
        error = refused
    if _failed(error, world):
        # The training is done, and its weights are worth more than a traceback.
        rank_zero_warn(
            f"SBCheckpoint: the best weights, {criterion} ({best_by.value(best):g}), in {best.path} "
            "don't fit this module, so the last weights stay: "
            f"{error if isinstance(error, MismatchError) else repr(error)}"
        )
        return False
    if left_out:
        rank_zero_warn(
            f"SBCheckpoint: the best weights, {criterion} ({best_by.value(best):g}), in {best.path} "
            f"were restored in part. The last ones stay for {'; '.join(left_out)}"
        )
        return False
    rank_zero_info(
        f"SBCheckpoint: restored the best weights, {criterion} "
        f"({best_by.value(best):g}), from {best.path}"
    )
    return True


def save_with_its_state(trainer: Trainer, best: Checkpoint, reader: FolderReader) -> Undo:
    """Have `trainer.save_checkpoint` save the best weights with the state that they were saved with.

    After a fit the Trainer has the step, the epoch and the optimizers of its end: a file of the best
    weights with those would be a checkpoint of no moment there was.

    Args:
        trainer: Has ended its fit, with the best weights in its module.
        best: Where they come from.
        reader: Reads it, when something is saved.
    """
    step = trainer.global_step

    def complete(dump: dict[str, Any]) -> None:
        if trainer.global_step != step:
            return  # Training has gone on.
        try:
            if _private.strategies.shards_the_model(trainer.strategy):
                raise MismatchError("each rank has pieces of it")
            saved = reader.read(best.path)
        except (SBCheckpointError, OSError) as error:
            rank_zero_warn(
                f"SBCheckpoint: this file has the best weights, of {best.path.name}, with the step and "
                f"the optimizers of the end of the fit, since those of the checkpoint can't be read: "
                f"{error}. To go on from it, resume from the checkpoint folder"
            )
            return
        dump.update({key: saved[key] for key in _OF_A_MOMENT if key in dump and key in saved})

    return _private.trainer.complete_dumps(trainer, complete)


def _failed(error: Exception | None, world: World) -> bool:
    """Return whether a load has failed on every rank.

    Raises:
        MismatchError: It has failed on some only, whose weights would differ from the others'.
    """
    if world.size == 1:
        return error is not None
    failed = world.broadcast(world.gather(error is not None)) or []
    if any(failed) and not all(failed):
        ranks = ", ".join(str(rank) for rank, each in enumerate(failed) if each)
        raise MismatchError(
            f"the best weights fit on some ranks and not on others ({ranks}), which must have the same "
            f"weights: {error or 'see what these say'}. Pass restore_best=False to keep the last ones"
        ) from error
    return all(failed)
