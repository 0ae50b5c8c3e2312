"""Checksums of files, and which of them were read in full just now, handed from a search to a load.

A recovery looks for a sound checkpoint, and then reads it; the second step must not load a file
that nobody checked, and need not check again what was checked a moment ago. So the search keeps a
checksum by the file's device, inode, size and times, of which every change of the file alters
one. Two changes would go unseen: one within the tick of the clock that gave the file its times, so
the checksum of a file that is seconds old is not kept at all; and bytes that rot on the disk,
where times don't change. Hence the end of the window: who comes back to a checkpoint later reads
all of it again.
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


class _Known(NamedTuple):
    digest: FileDigest
    at: float


class Verified:
    """The files that a search or a load has read in full, for what reads them next."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], _Known] = {}

    def read(self, stream: BinaryIO) -> FileDigest:
        """Return size and checksum of an open file, read in full; know them from now on.

        Raises:
            OSError: It can't be read.
        """
        before = _identity(stream)
        digest = read_digest(stream)
        *_, modified, changed = after = _identity(stream)
        if before == after and time.time() - max(modified, changed) / 1e9 > _TICK_SECONDS:
            self._known[after] = _Known(digest, time.monotonic())
        return digest

    def read_unless_known(self, stream: BinaryIO) -> FileDigest:
        """Return size and checksum of an open file, read in full unless it was and is unchanged.

        Raises:
            OSError: It can't be read.
        """
        known = self._known.get(_identity(stream))
        if known is None or time.monotonic() - known.at >= _WINDOW_SECONDS:
            return self.read(stream)
        moved(known.digest.size)
        return known.digest

    def forget(self) -> None:
        """Begin another search, which reads everything anew."""
        self._known = {}

    def take(self, other: Verified) -> None:
        """Know what another knows."""
        self._known.update(other._known)


def read_digest(stream: BinaryIO) -> FileDigest:
    """Return size and checksum of an open file, read in full.

    Raises:
        OSError: It can't be read.
    """
    hasher = xxhash.xxh3_128()
    size = 0
    block = memoryview(bytearray(_BLOCK))
    while count := stream.readinto(block):  # type: ignore[attr-defined]
        hasher.update(block[:count])
        size += count
        moved(count)
    return FileDigest(size, hasher.hexdigest())


def _identity(stream: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
