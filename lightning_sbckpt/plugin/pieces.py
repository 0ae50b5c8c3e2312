"""Joining a run whose strategy shards the model: its states are taken and restored in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.trainer import Undo
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.state.parts import FolderReader, is_folder
from lightning_sbckpt.plugin.state.sharded import ShardReader


def attach(trainer: Trainer, reader: FolderReader, key_map: Mapping[str, str]) -> list[Undo]:
    """Have a strategy that shards the model read folders, each rank what is its own.

    Args:
        trainer: About to set up its strategy.
        reader: Reads folders.
        key_map: See `Pieces`.

    Returns:
        What undoes it; nothing if the strategy holds the whole model on each rank.
    """
    if not _private.strategies.shards_the_model(trainer.strategy):
        return []
    pieces = ShardReader(trainer, key_map)

    def read(path: str | Path, **options: Any) -> dict[str, Any]:
        pieces.wants_optimizers = True
        try:
            return reader.read(path, **options)
        finally:
            pieces.wants_optimizers = False

    def detach() -> None:
        reader.pieces = None

    reader.pieces = pieces
    return [detach, _private.strategies.read_folders(trainer.strategy, is_folder, read)]
