"""Copying a paramfile from one checkpoint to another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lightning_sbckpt._format.names import marked_path, pickled_path
from lightning_sbckpt._io.inside import OpenFolder, open_folder_at, open_parent
from lightning_sbckpt._io.open_regular import open_to_read
from lightning_sbckpt._io.progress import moved

_BLOCK = 8 * 2**20


def copy_paramfile(source: object, path: Path) -> None:
    """Copy a paramfile, or the folder that it is, and what belongs to it beside it.

    This is a save hook, for the path of the file as the recoverable.
    """
    file = Path(str(source))
    with open_parent(path) as target:
        if file.is_dir():
            with open_folder_at(file) as source_folder, target.below(path.name, make=True) as made:
                _copy_folder(source_folder, made)
            return
        with open_to_read(file) as read:
            _copy_file(read, target, path.name)
        for beside in (pickled_path, marked_path):
            if os.path.lexists(beside(file)):
                with open_to_read(beside(file)) as read:
                    _copy_file(read, target, beside(path).name)


def _copy_folder(source: OpenFolder, target: OpenFolder) -> None:
    # No link in it, which would lead elsewhere, and no pipe, which would be waited on for ever.
    for name, is_folder in source.entries():
        if is_folder:
            with source.below(name) as inner, target.below(name, make=True) as copied:
                _copy_folder(inner, copied)
        else:
            with source.stream(name) as read:
                _copy_file(read, target, name)


def _copy_file(read: BinaryIO, target: OpenFolder, name: str) -> None:
    descriptor = target.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        block = memoryview(bytearray(_BLOCK))
        while count := read.readinto(block):  # type: ignore[attr-defined]
            left = block[:count]
            while left:
                left = left[os.write(descriptor, left) :]
            moved(count)
    finally:
        os.close(descriptor)
