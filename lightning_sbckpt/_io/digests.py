"""Checksums of files that are about to be loaded, remembered for the short way from search to load.

A recovery looks for a sound checkpoint, and then reads it; the second step must not load a file
that nobody checked, and need not check again what was checked a moment ago. So a checksum is
remembered by the file's device, inode, size and times, of which every change of the file alters
one. Two changes would go unseen: one within the tick of the clock that gave the file its times, so
the checksum of a file that is seconds old is not remembered at all; and bytes that rot on the disk,
where times don't change. Hence the end of the window: a process that comes back to a checkpoint
later reads all of it again.
"""

from __future__ import annotations

import os
import time
from typing import BinaryIO, NamedTuple

import xxhash

from lightning_sbckpt._io.progress import moved
from lightning_sbckpt._io.storage import FileDigest

# From the search to the last file read lies what Lightning sets up in between, models included.
_WINDOW_SECONDS = 300.0
# The coarsest clocks of filesystems tick so.
_TICK_SECONDS = 2.0
# The checksum is computed from the processor's cache, not from memory, if the block fits there.
_BLOCK = 2**18
_MOST_REMEMBERED = 1000


class _Remembered(NamedTuple):
    identity: tuple[int, ...]
    digest: FileDigest
    at: float


_remembered: dict[tuple[int, int], _Remembered] = {}


def read_digest(stream: BinaryIO) -> FileDigest:
    """Return size and checksum of an open file, read in full.

    Raises:
        OSError: It can't be read.
    """
    hasher = xxhash.xxh3_128()
    size = 0
    before = os.fstat(stream.fileno())
    block = memoryview(bytearray(_BLOCK))
    while count := stream.readinto(block):  # type: ignore[attr-defined]
        hasher.update(block[:count])
        size += count
        moved(count)
    after = os.fstat(stream.fileno())
    digest = FileDigest(size, hasher.hexdigest())
    key = (after.st_dev, after.st_ino)
    _remembered.pop(key, None)
    age = time.time() - max(after.st_mtime, after.st_ctime)
    if _identity(before) == _identity(after) and age > _TICK_SECONDS:
        while len(_remembered) >= _MOST_REMEMBERED:
            _remembered.pop(next(iter(_remembered)), None)
        _remembered[key] = _Remembered(_identity(after), digest, time.monotonic())
    return digest


def recent_digest(stream: BinaryIO) -> FileDigest:
    """Return size and checksum of an open file, read in full unless it was and is unchanged.

    Raises:
        OSError: It can't be read.
    """
    found = os.fstat(stream.fileno())
    known = _remembered.get((found.st_dev, found.st_ino))
    if (
        known is not None
        and known.identity == _identity(found)
        and time.monotonic() - known.at < _WINDOW_SECONDS
    ):
        moved(found.st_size)
        return known.digest
    return read_digest(stream)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
