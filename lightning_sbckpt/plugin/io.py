"""A `CheckpointIO` that reads checkpoint folders, and leaves files to the one that was there."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from lightning_sbckpt.plugin.collect import FolderReader, is_folder


class FolderCheckpointIO(CheckpointIO):
    """Reads our folders for Lightning; everything else goes to `inner`.

    It does not derive from Lightning's wrapping base, whose `checkpoint_io` the strategy overwrites.

    Args:
        inner: What reads and writes files.
        reader: What reads folders.
    """

    def __init__(self, inner: CheckpointIO, reader: FolderReader) -> None:
        self.inner = inner
        self.reader = reader

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a file, as `Trainer.save_checkpoint` does without this package."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return Lightning's dictionary from a folder or a file."""
        if is_folder(path):
            return self.reader.read(path, weights_only=weights_only)
        options = {} if map_location is None else {"map_location": map_location}
        # `weights_only` came with Lightning 2.6, and plugins of users may not know it yet.
        if "weights_only" in inspect.signature(self.inner.load_checkpoint).parameters:
            options["weights_only"] = weights_only
        loaded: dict[str, Any] = self.inner.load_checkpoint(path, **options)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Tear the inner one down."""
        self.inner.teardown()
