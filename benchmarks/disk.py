"""The disk, and memory: flushing, removing, counting, and the raw write that no save can beat."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import timed

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 16 * 2**20


def flush(path: Path) -> None:
    """Flush a file, or a folder with all that is in it, and the folder that holds its name."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    for each in [*reversed(paths), path.parent]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove what is there, durably: what the disk does later must not disturb what follows."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flush the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_on_disk(folder: Path) -> int:
    """Return what the files under a folder occupy; a file with two names counts once."""
    blocks = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        blocks[status.st_dev, status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512


def warm(path: Path) -> int:
    """Read all files under a path, so that they are in the page cache."""
    total = 0
    buffer = bytearray(4 * 2**20)
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total += count
    return total


def renew_memory(size: int) -> None:
    """Leave this process without memory to spare, as a new one is, and the system with so much.

    A process that has freed much keeps it, and what it is given anew needs no page faults then; what is
    garbage and not yet freed would be so in the middle of what is measured. And what has been free for a
    while may have to come from the host of a virtual machine, at many times the cost.
    """
    gc.collect()
    with suppress(AttributeError):  # Not every C library has it.
        ctypes.CDLL(None).malloc_trim(0)
    _huge_pages(size)[::4096] = bytes(-(-size // 4096))


class RawWrite:
    """Writes as many bytes as a state has, past the page cache, from memory that is ready.

    It lies in huge pages where the system has them, since a request to the disk names a few hundred
    pages at most.

    Where the filesystem refuses unbuffered writes, they are buffered, and `is_direct` is false.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._path = folder / "raw"
        self._size = size
        self._buffer = _huge_pages(_BLOCK)
        self._buffer[:] = os.urandom(2**20) * (_BLOCK // 2**20)
        self.is_direct = True
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self) -> None:
        """Write, and flush."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = self._open(flags)
        try:
            view = self._buffer
            for offset in range(0, self._size, _BLOCK):
                count = min(_BLOCK, self._size - offset)
                os.pwrite(descriptor, view[: -(-count // 4096) * 4096], offset)
            os.ftruncate(descriptor, self._size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush_folder(self._path.parent)

    def _open(self, flags: int) -> int:
        if hasattr(os, "O_DIRECT") and self.is_direct:
            with suppress(OSError):
                return os.open(self._path, flags | os.O_DIRECT)
        self.is_direct = False
        return os.open(self._path, flags, 0o644)

    def clear(self) -> None:
        """Remove what was written."""
        remove(self._path)

    def seconds(self) -> float:
        """Write once, and return how long it took."""
        seconds = timed(self)
        self.clear()
        return seconds


def _huge_pages(size: int) -> memoryview:
    # Not what the package has for it: the reference must not change with what is measured.
    page = 2 * 2**20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % page
    return memoryview(memory)[start : start + size]


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give an empty folder, and remove it with all that is in it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        remove(folder)
