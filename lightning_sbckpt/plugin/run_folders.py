"""The places in which Lightning takes a checkpoint, for every Trainer and module of this process.

A path may be that of a checkpoint, or of a run: `run/best` and `run/newest`, or the folder `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt._layout.publish import folder_names
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import CheckpointNotFoundError, ConfigurationError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.io import read_folders
from lightning_sbckpt.plugin.packages import Callback, Trainer
from lightning_sbckpt.plugin.state.parts import MODEL, FolderReader, is_folder
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.retention.noted import best_by, run_rules
from lightning_sbckpt.selection import Criterion


def is_readable(path: object) -> bool:
    """Return whether a path is a checkpoint folder, or means one of a run."""
    return is_folder(path) or _run_of(path) is not None


def checkpoint_at(path: object, *, newest: bool = False) -> object:
    """Return the checkpoint that a path means; a path that means none, as it is.

    Args:
        path: Of the folder of a run it is the best, if the run noted what is best.
        newest: Of the folder of a run it is the newest.

    Raises:
        CheckpointNotFoundError: No checkpoint there is whole, or it isn't known which is best.
    """
    run = None if is_folder(path) else _run_of(path)
    if run is None:
        return path
    root, word = run
    criterion = None if word == "newest" or (newest and not word) else _best_by(root)
    if word == "best" and criterion is None:
        raise CheckpointNotFoundError(
            f"{path}: which checkpoint of {root} is best is not known, since no rule Best(...) was "
            f"noted there. Give the checkpoint itself, or {root / 'newest'}"
        )
    key = None if criterion is None else criterion.key
    lowest = criterion is not None and criterion.lowest
    found = Checkpointer(root, access="read").find_sound_checkpoint(
        ckpt_predicate=_has_weights,
        min_key=key if lowest else None,
        max_key=None if lowest else key,
    )
    if found is None:
        what = "has weights" if criterion is None else f"has the {criterion.describe()}"
        raise CheckpointNotFoundError(f"{path}: no whole checkpoint in {root} {what}")
    why = "the newest" if criterion is None else f"the best: {criterion.describe()}"
    rank_zero_info(f"SBCheckpoint: {path} means {found.path.name}, {why}")
    return str(found.path)


def open_for_every_trainer(
    package: str, kind: type[Callback], place_of: Callable[[Any, Trainer], Path | str]
) -> None:
    """Have every Trainer take folders, also one that has no callback of this kind.

    Args:
        package: Whose Trainers.
        kind: `SBCheckpoint`.
        place_of: Returns where a callback of that kind has its checkpoints.
    """

    @contextmanager
    def reading(trainer: Trainer, given: object) -> Iterator[object]:
        fits = trainer.state.fn == "fit"
        path = decided_by_main(TrainerWorld(trainer), lambda: checkpoint_at(given, newest=fits))
        if any(isinstance(each, kind) for each in _private.trainer.callbacks_of(trainer)):
            yield path
            return
        _refuse_other_formats(trainer, path)
        if fits:
            rank_zero_warn(
                f"SBCheckpoint: this fit goes on from {path} as Lightning alone would, without random "
                "states and positions of the data: no SBCheckpoint is among the Trainer's callbacks. "
                "Add one to go on exactly, and to save"
            )
        undo = read_folders(trainer.strategy, FolderReader())
        try:
            yield path
        finally:
            undo()

    def path_of(trainer: Trainer, word: object, method: str) -> object:
        """Return what this process knows, or else where an earlier one has left its checkpoints."""
        callback: Any = trainer.checkpoint_callback
        # A fit goes on from the last anyway.
        words = ("best",) if method == "fit" else ("best", "last")
        if word not in words or not issubclass(type(callback), kind):
            return word
        known = callback.best_model_path if word == "best" else callback.last_model_path
        if known or callback.checkpointer is not None:
            return known or word
        root = place_of(callback, trainer)
        if word == "best" and method != "fit":
            # Without a key it is the newest, as at the end of a fit.
            path = str(root)
        else:
            path = f"{root}/{'best' if word == 'best' else 'newest'}"
        return path if is_readable(path) else word

    _private.trainer.let_every_trainer_read(package, is_readable, reading)
    _private.trainer.let_words_be_paths(package, path_of)


def _refuse_other_formats(trainer: Trainer, path: object) -> None:
    strategy = trainer.strategy
    if _private.strategies.shards_the_model(strategy) or _private.trainer.has_own_checkpoint_format(
        strategy
    ):
        raise ConfigurationError(
            f"{path} is a checkpoint folder, and {type(strategy).__name__} reads a format of its own. "
            "Add SBCheckpoint(...) to the Trainer's callbacks: it reads the folder for every strategy "
            "that it can save with"
        )


def _run_of(path: object) -> tuple[Path, str] | None:
    """Return the folder of a run and the word after it, if a path is of that form."""
    if not isinstance(path, (str, Path)) or is_url(path):
        return None
    place = Path(path)
    if place.is_dir():
        return (place, "") if folder_names(place) else None
    if place.name in ("best", "newest") and place.parent.is_dir() and folder_names(place.parent):
        return place.parent, place.name
    return None


def _best_by(root: Path) -> Criterion | None:
    return best_by(run_rules(root).rules)


def _has_weights(checkpoint: Checkpoint) -> bool:
    return MODEL in checkpoint.paramfiles
