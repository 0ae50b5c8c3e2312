"""Copying a paramfile from one checkpoint to another."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_sbckpt._disk.progress import moved
from lightning_sbckpt._disk.regular import open_regular
from lightning_sbckpt._torchfile.reading import marked_path, pickled_path

_BLOCK = 8 * 2**20


def copy_paramfile(source: object, path: Path) -> None:
    """Copy a paramfile, or the folder that it is, and what belongs to it beside it.

    This is a save hook, for the path of the file as the recoverable.
    """
    file = Path(str(source))
    if file.is_dir():
        shutil.copytree(file, path, copy_function=_copy_file)
        return
    _copy_file(file, path)
    for beside in (pickled_path, marked_path):
        if beside(file).exists():
            _copy_file(beside(file), beside(path))


def _copy_file(source: str | Path, target: str | Path) -> None:
    # A link leads to what is meant; a pipe would be waited on for ever.
    with open_regular(Path(source).resolve()) as read, Path(target).open("wb", 0) as write:
        block = memoryview(bytearray(_BLOCK))
        while count := read.readinto(block):  # type: ignore[attr-defined]
            left = block[:count]
            while left:
                left = left[write.write(left) :]
            moved(count)
