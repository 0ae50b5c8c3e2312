"""The places in which Lightning takes a checkpoint, for every Trainer and module of this process.

A path may be that of a checkpoint, or of a run: `run/best` and `run/newest`, or the folder `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.io import read_folders
from lightning_sbckpt.plugin.packages import Callback, Trainer
from lightning_sbckpt.plugin.state.hyperparameters import LoadedFolder
from lightning_sbckpt.plugin.state.parts import MODEL, FolderReader, is_folder, read_to_load
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.run_paths import checkpoint_of_run, means_run, place_in_run

_Path = TypeVar("_Path")


def is_readable(path: object) -> bool:
    """Return whether a path is a checkpoint folder, or means one of a run."""
    return is_folder(path) or means_run(path)


def checkpoint_at(
    path: _Path, *, newest: bool = False, verified: Verified | None = None
) -> _Path | str:
    """Return the checkpoint that a path means, see `checkpoint_of_run`; another path as it is."""
    if is_folder(path) or not means_run(path):
        return path
    found, why = checkpoint_of_run(path, newest=newest, part=MODEL, verified=verified)
    rank_zero_info(f"SBCheckpoint: {why}")
    return str(place_in_run(path, found))


def read_for_new_module(path: str | Path, *, weights_only: bool | None = None) -> LoadedFolder:
    """Return Lightning's dictionary for `load_from_checkpoint`, from what a path means."""
    verified = Verified()
    folder = checkpoint_at(path, verified=verified)
    return read_to_load(folder, weights_only=weights_only, verified=verified)


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
        verified = Verified()
        path = decided_by_main(
            TrainerWorld(trainer),
            lambda: checkpoint_at(given, newest=fits, verified=verified),
        )
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
        undo = read_folders(trainer.strategy, FolderReader(verified=verified))
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
