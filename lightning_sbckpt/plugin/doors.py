"""Every door at which Lightning loads a checkpoint folder: what comes in there goes the same way.

These are a resume, `trainer.test(ckpt_path=...)` and its like, and the best weights at the end of a fit.
(`load_from_checkpoint` has no Trainer, and so none of our options.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt._load.module_state import as_it_was_if_refused
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.errors import MismatchError, SBCheckpointError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.loading import FolderDump, load_by
from lightning_sbckpt.plugin._private.trainer import Undo
from lightning_sbckpt.plugin.options import Options
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.resume import Restore, ResumePlan
from lightning_sbckpt.plugin.state.adapt import REFUSALS, Adaptation, mismatches
from lightning_sbckpt.plugin.state.names import renamed_state
from lightning_sbckpt.plugin.state.parts import FolderReader
from lightning_sbckpt.plugin.state.training_state import Description, restore
from lightning_sbckpt.typing import World

_OF_A_MOMENT = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")


class Doors:
    """Loads what was read from a folder, by the options of a callback.

    Args:
        trainer: The Trainer.
        reader: Reads folders.
        adaptation: The options.
        plan: Of the fit; None if the Trainer is about to do something else.
    """

    def __init__(
        self,
        trainer: Trainer,
        reader: FolderReader,
        adaptation: Adaptation,
        plan: ResumePlan | None = None,
    ) -> None:
        self._trainer = trainer
        self._reader = reader
        self._adaptation = adaptation
        self._plan = plan
        self._not_loaded: frozenset[str] = frozenset()

    def open(self) -> list[Undo]:
        """Join in; return what undoes it."""
        return load_by(self._trainer, self._load_model, self._load_training)

    @property
    def _restore(self) -> Restore | None:
        return None if self._plan is None else self._plan.restore

    def _load_model(
        self, dump: FolderDump, load: Callable[[Mapping[str, Any]], object], strict: bool
    ) -> None:
        pieces = self._reader.pieces
        if pieces is not None:
            load = lambda state: pieces.load_model(state, strict, dump.folder)  # noqa: E731 - as the other one
        module = self._trainer.lightning_module
        left_out, self._not_loaded = load_adapted(
            dump, module, self._reader, self._adaptation, load, strict=strict
        )
        if self._restore is not None:
            self._restore.report.skipped += left_out
        elif left_out:
            rank_zero_warn(f"SBCheckpoint: not loaded from {dump.folder}: {'; '.join(left_out)}")

    def _load_training(self, dump: FolderDump) -> None:
        underway = self._restore
        remarks = restore(
            dump,
            self._trainer,
            Description() if underway is None else underway.description,
            self._adaptation,
            dump.folder,
            not_loaded=self._not_loaded,
        )
        if underway is not None:
            underway.report.skipped += remarks


def load_adapted(
    dump: FolderDump,
    module: LightningModule,
    reader: FolderReader,
    adaptation: Adaptation,
    load: Callable[[Mapping[str, Any]], object],
    *,
    strict: bool,
) -> tuple[list[str], frozenset[str]]:
    """Load weights; return what stays out, in words, and the parameters that it concerns, by name.

    Raises:
        MismatchError: The module refuses them.
    """
    left_out = adaptation.load_model(
        dump["state_dict"],
        module,
        lambda: reader.own_state(module),
        load,
        dump.folder,
        strict=strict,
    )
    if not (left_out and adaptation.partial):
        return left_out, frozenset()
    concerned = {line.partition(":")[0] for line in left_out}
    return left_out, frozenset(map(plain_name, concerned))


def load_weights(
    dump: FolderDump, module: LightningModule, reader: FolderReader, adaptation: Adaptation
) -> list[str]:
    """Put weights in a module that no Trainer loads into; return what stays out, in words.

    Args:
        dump: What `reader` read.
        module: The module, whose `on_load_checkpoint` is asked first, as Lightning does.
        reader: Read it.
        adaptation: The options.

    Raises:
        MismatchError: The module refuses them, and is what it was.
    """
    pieces = reader.pieces
    strict = module.strict_loading

    def load(state: Mapping[str, Any]) -> None:
        if pieces is None:
            module.load_state_dict(state, strict=strict)
        else:
            pieces.load_model(state, strict, dump.folder)

    own = reader.own_state(module)
    saved = renamed_state(dump["state_dict"], own, adaptation.key_map, module)
    # Already now: a hook may change the module before it turns out that the weights don't fit.
    with as_it_was_if_refused(module, may_fail=bool(mismatches(saved, own, strict=True))):
        module.on_load_checkpoint(dump)
        left_out, _ = load_adapted(dump, module, reader, adaptation, load, strict=strict)
    return left_out


def restore_weights(
    best: Checkpoint | None,
    options: Options,
    reader: FolderReader,
    module: LightningModule,
    world: World,
) -> bool:
    """Put the weights of the best checkpoint into a module; if they don't fit, the last ones stay.

    Args:
        best: The checkpoint; None if there is none, which is said.
        options: By what it is the best, and what of it is not taken as it is.
        reader: Reads it.
        module: Gets the weights.
        world: The ranks, which all call this.

    Returns:
        Whether they are in place, all of them.

    Raises:
        MismatchError: The weights fit on some ranks only.
    """
    best_by, criterion = options.best_by, options.best_by.criterion.describe()
    if best is None:
        rank_zero_warn(
            f"SBCheckpoint: no checkpoint in {options.dirpath} has a value for the {criterion}, "
            "so the last weights stay. Log that metric in validation, or pass "
            "restore_best=False"
        )
        return False
    dump = reader.read(best.path, optimizers=False)
    # Ranks that load pieces together would wait for one that has given up for a reason of its own.
    refusals = REFUSALS if reader.pieces is None else (MismatchError,)
    left_out: list[str] = []
    error: Exception | None = None
    try:
        left_out = load_weights(dump, module, reader, options.adaptation)
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


def save_with_its_state(trainer: Trainer, best: Checkpoint, *, trust_pickle: bool) -> Undo:
    """Have `trainer.save_checkpoint` save the best weights with the state that they were saved with.

    After a fit the Trainer has the step, the epoch and the optimizers of its end: a file of the best
    weights with those would be a checkpoint of no moment there was.

    Args:
        trainer: Has ended its fit, with the best weights in its module.
        best: Where they come from.
        trust_pickle: Read what only pickle can hold, when something is saved.
    """
    step = trainer.global_step

    def complete(dump: dict[str, Any]) -> None:
        if trainer.global_step != step:
            return  # Training has gone on.
        try:
            if _private.strategies.shards_the_model(trainer.strategy):
                raise MismatchError("each rank has pieces of it")
            saved = FolderReader(trust_pickle=trust_pickle).read(best.path)
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
