"""Having Lightning read checkpoint folders where it reads files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt.plugin._private.strategies import shards_the_model
from lightning_sbckpt.plugin._private.trainer import Undo, wrap
from lightning_sbckpt.plugin.options import Options
from lightning_sbckpt.plugin.packages import Strategy, Trainer
from lightning_sbckpt.plugin.state.parts import FolderReader, is_folder
from lightning_sbckpt.plugin.state.sharded import ShardReader


def reader_for(
    trainer: Trainer,
    options: Options,
    *,
    skip: Collection[str] = (),
    verified: Verified | None = None,
) -> FolderReader:
    """Return what reads folders by the options of a callback, each rank what is its own.

    Args:
        trainer: About to set up its strategy.
        options: Of the callback.
        skip: Names of files to leave out.
        verified: See `FolderReader`.
    """
    in_pieces = shards_the_model(trainer.strategy)
    return FolderReader(
        trust_pickle=options.trust_pickle,
        skip=skip,
        verified=verified,
        pieces=ShardReader(trainer, options.adaptation.key_map) if in_pieces else None,
    )


def read_folders(strategy: Strategy, reader: FolderReader) -> Undo:
    """Have a strategy read checkpoint folders; return what undoes it.

    Files go to its `CheckpointIO` as before, which nobody replaces: plugins of the user stay where
    they look for them, and get every argument that Lightning has for them. Strategies that shard the
    model have a format of their own, which they load past the `CheckpointIO`.

    Args:
        strategy: About to load a checkpoint.
        reader: Reads folders.
    """

    def load_checkpoint(original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        if is_folder(path):
            return reader.read(path, weights_only=kwargs.get("weights_only"))
        return original(path, *args, **kwargs)

    return wrap(strategy, "load_checkpoint", load_checkpoint)
