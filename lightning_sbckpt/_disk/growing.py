"""Bytes of files that somebody writes who does not tell: counted as the files grow."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

from lightning_sbckpt._disk.progress import moved

_SECONDS = 0.1


@contextmanager
def growth_counted(folder: Path) -> Iterator[None]:
    """Count what comes to be in the files of a folder inside the block, whatever their names.

    Args:
        folder: Nobody else writes there.
    """
    done = threading.Event()
    counted = 0

    def look() -> None:
        nonlocal counted
        with os.scandir(folder) as entries:
            found = sum(map(_written, entries))
        if found > counted:
            moved(found - counted)
            counted = found

    def watch() -> None:
        while not done.wait(_SECONDS):
            look()

    # Who counts the bytes is known to the caller's context.
    thread = threading.Thread(target=copy_context().run, args=(watch,), name="sbckpt-growth")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()


def _written(entry: os.DirEntry[str]) -> int:
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return 0  # It has another name by now.
    # A file may have its whole size from the start, and its blocks as they are written.
    return min(found.st_size, found.st_blocks * 512)
