"""Removing checkpoints: each is none at once, and its files go when they go."""

from __future__ import annotations

import logging
from contextvars import copy_context
from functools import partial
from pathlib import Path

from lightning_sbckpt._io.background import Background
from lightning_sbckpt._io.progress import moved
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.publish import unpublish
from lightning_sbckpt.errors import CheckpointNotFoundError, RemovalError

logger = logging.getLogger("lightning_sbckpt")

# Bytes from which on removing is worth a thread: it takes about a millisecond a megabyte.
_WORTH_A_THREAD = 8 * 2**20


class Remover:
    """Removes checkpoints, large ones in a thread of its own.

    Args:
        storage: The disk.
    """

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self._background = Background("sbckpt-remover")

    def remove(self, folder: Path) -> None:
        """Remove a checkpoint: it is none when this returns.

        Raises:
            CheckpointNotFoundError: There is none.
            RemovalError: The disk refused.
        """
        try:
            removed = unpublish(folder, self._storage)
        except CheckpointNotFoundError:
            raise
        except OSError as error:
            raise RemovalError(
                f"{folder} could not be removed: {error.strerror or error}. Every other checkpoint "
                "is whole. Make its folder writable"
            ) from error
        self.remove_unpublished(removed)

    def remove_unpublished(self, folder: Path) -> None:
        """Remove the files of a folder that is no checkpoint any more.

        What can't be removed is no error, and is logged: a file that somebody has open keeps its folder
        on a network filesystem.
        """
        size = _size(folder)
        if size < _WORTH_A_THREAD:
            self._remove_files(folder, size)
        else:
            # Whoever counts the bytes here counts them there, too.
            self._background.submit(partial(copy_context().run, self._remove_files, folder, size))

    def wait(self) -> None:
        """Return when the files of every removed checkpoint are gone."""
        self._background.wait()

    def _remove_files(self, removed: Path, size: int) -> None:
        try:
            self._storage.remove_tree(removed)
        except OSError as error:
            logger.warning(
                "%s could not be removed and is cleared at the next start: %s", removed, error
            )
        else:
            moved(size)


def _size(folder: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in folder.rglob("*"))
    except OSError:
        return 0
