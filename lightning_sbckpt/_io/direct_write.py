"""Writing a large file at the pace of the disk: aligned blocks, past the page cache, hashed on the way.

Buffered writing costs processor time and cache that training would miss, about fifteen times as
much as writing with `O_DIRECT`. That flag wants blocks whose address, length and place in the file
are multiples of the disk's block size; here they are multiples of 4096. While one thread writes a
block, the caller fills and hashes the next. Filesystems without the flag (tmpfs, NFS, some overlays)
get the same bytes through the page cache.

The digest is taken of the very bytes that are handed to the kernel: here, or when they were copied
to where they are written from.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Protocol

import xxhash

from lightning_sbckpt._io.memory import Buffers
from lightning_sbckpt._io.progress import moved

if TYPE_CHECKING:
    import torch

ALIGNMENT = 4096
BLOCK = 4 * 2**20
# Of bytes that only have to be written. In a thread beside a loop that holds the interpreter's lock,
# every call costs the loop up to a millisecond, since it must hand over the lock and get it back.
_LONG_BLOCK = 32 * 2**20
_BUFFERS = 4
# Below this size one buffered write is faster than starting a thread.
_SMALL = 2**20
# The last of memory that the system can't hand to a disk, as some drivers' is.
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EFAULT)


class Source(Protocol):
    """The content of a file to be written: bytes that can be asked for block by block."""

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def fill(self, start: int, out: memoryview) -> None:
        """Put the bytes from `start` on into `out`, as many as it holds."""
        ...

    def view(self) -> memoryview | None:
        """Return all bytes where they lie, or None if they don't lie together.

        The address is aligned, and zeros fill up to a multiple of the alignment.
        """
        ...

    @property
    def checksum(self) -> str | None:
        """The XXH3 128-bit hash of all bytes, or None if it is not known yet."""
        ...

    def sample(self) -> object:
        """Return a few of the bytes, from all over: where they differ, so does the whole."""
        ...

    @property
    def devices(self) -> Collection[torch.device]:
        """Where bytes lie that are not in the processor's memory."""
        ...


_buffers = Buffers(_BUFFERS, BLOCK)


def round_up(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_source(descriptor: int, source: Source) -> str:
    """Write the content of a new file, without flushing it, and return its XXH3 128-bit hash.

    Args:
        descriptor: Of an empty file.
        source: Its content.

    Raises:
        OSError: The disk refused.
    """
    if source.size <= _SMALL:
        return _write_small(descriptor, source)
    # Not a second time by its name, which may be another file's by now.
    with suppress(OSError, AttributeError):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    return _Writing(descriptor).write(source)


def _write_small(descriptor: int, source: Source) -> str:
    data = bytearray(source.size)
    source.fill(0, memoryview(data))
    _write_all(descriptor, memoryview(data), 0)
    moved(source.size)
    return source.checksum or xxhash.xxh3_128_hexdigest(data)


class _Writing:
    """One file being written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, source: Source) -> str:
        """Write everything and cut off what the alignment added."""
        whole = source.view()
        if whole is not None:
            checksum = self._from_memory(whole, source)
        else:
            checksum = self._through_buffers(source)
        os.ftruncate(self._descriptor, source.size)
        return checksum

    def _from_memory(self, whole: memoryview, source: Source) -> str:
        checksum = source.checksum or xxhash.xxh3_128_hexdigest(whole[: source.size])
        for start in range(0, source.size, _LONG_BLOCK):
            end = min(start + _LONG_BLOCK, len(whole))
            self._put(whole[start:end], start)
            moved(end - start)
        return checksum

    def _through_buffers(self, source: Source) -> str:
        hasher = xxhash.xxh3_128()
        with _buffers.borrowed(source.devices) as buffers:
            free: SimpleQueue[memoryview] = SimpleQueue()
            for buffer in buffers:
                free.put(buffer)
            filled: SimpleQueue[tuple[memoryview, memoryview, int] | None] = SimpleQueue()
            failed: list[BaseException] = []
            thread = Thread(target=self._drain, args=(filled, free, failed), name="sbckpt-blocks")
            try:
                thread.start()
                for start in range(0, source.size, BLOCK):
                    buffer = free.get()
                    if failed:
                        break
                    length = min(BLOCK, source.size - start)
                    block = buffer[: round_up(length)]
                    block[length:] = bytes(len(block) - length)
                    source.fill(start, block[:length])
                    hasher.update(block[:length])
                    filled.put((buffer, block, start))
                    moved(length)
            except BaseException as error:
                # An interrupt, say: what is filled need not be written any more.
                failed.append(error)
                raise
            finally:
                filled.put(None)
                # The buffers go to the next file only when nobody reads them any more.
                with suppress(RuntimeError):  # It could not be started.
                    thread.join()
            if failed:
                raise failed[0]
        return hasher.hexdigest()

    def _drain(
        self,
        filled: SimpleQueue[tuple[memoryview, memoryview, int] | None],
        free: SimpleQueue[memoryview],
        failed: list[BaseException],
    ) -> None:
        while (item := filled.get()) is not None:
            buffer, block, start = item
            try:
                if not failed:
                    self._put(block, start)
            except BaseException as error:
                # Whatever it is: the caller waits for the buffer.
                failed.append(error)
            free.put(buffer)

    def _put(self, block: memoryview, start: int) -> None:
        try:
            _write_all(self._descriptor, block, start)
        except OSError as error:
            if error.errno not in _REFUSED or not self._is_direct():
                raise
            # Taken at open and refused at the write: some filesystems do.
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            _write_all(self._descriptor, block, start)

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _write_all(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], start + done)
        if written <= 0:
            raise OSError(errno.EIO, "the disk took no bytes and gave no error")
        done += written
