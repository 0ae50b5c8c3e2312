"""Memory for tensors that are about to be read: new memory costs more than reading into it.

Its pages are given one by one, each cleared first, at about 1 GB/s; in pages of 2 MiB (transparent
huge pages, which have to be asked for on most systems) it is two to three times as fast. Only what
spans such a page can have one, so tensors smaller than that are put together where whoever owns
them keeps or drops them together, as an optimizer does its moments.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import cast

from lightning_sbckpt._io.lazy import torch

_PAGE = 2 * 2**20
_GROUP = 64 * 2**20
# A storage of this size has enough such pages by itself.
_LARGE = 4 * _PAGE
_ALIGNMENT = 64
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Memory:
    """Gives storages that are to be filled at once.

    Args:
        grouped: Storages may lie together, and then the memory of several is given back when the
            last of them is dropped. Such a storage can't be resized.
    """

    def __init__(self, *, grouped: bool = False) -> None:
        self._grouped = grouped and _has_huge_pages()
        self._group = _new(0)
        self._used = 0
        self._blocks: dict[int, int] = {}

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """Return a storage of so many bytes, whose values are anything."""
        if nbytes >= _LARGE or not self._grouped or not nbytes:
            storage = _new(nbytes)
            if nbytes >= _LARGE:
                self._blocks[storage.data_ptr()] = nbytes
            return storage
        if self._used + nbytes > self._group.nbytes():
            self._group = _new(_GROUP)
            self._used = 0
        begin = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._blocks[self._group.data_ptr()] = self._used
        return cast("torch.UntypedStorage", self._group[begin : begin + nbytes])

    def ask_for_huge_pages(self) -> None:
        """Ask the system for large pages, before anything is written there; it may refuse."""
        if not _has_huge_pages():
            return
        for address, nbytes in self._blocks.items():
            begin = -(-address // _PAGE) * _PAGE
            # Only whole pages: nothing is taken that isn't used.
            end = (address + nbytes) // _PAGE * _PAGE
            if end > begin:
                _libc().madvise(
                    ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE
                )


def _new(nbytes: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(nbytes)  # type: ignore[no-untyped-call]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _has_huge_pages() -> bool:
    with suppress(OSError):
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SWITCH.read_text()
    return False


HUGE_PAGE = 2 * 2**20

# Linux's number of it: a forked child, a loader's worker say, gets empty memory there. Without it
# the next copy would first have to part from the child's view of every page, in small ones.
_MADV_WIPEONFORK = 18


class Buffers:
    """A few aligned buffers that are kept, since fresh memory is what makes copying slow.

    Args:
        count: How many.
        size: Bytes of each, a multiple of the alignment.
    """

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._free: list[tuple[memoryview, object]] = []
        self._lock = Lock()

    @contextmanager
    def borrowed(self, devices: Collection[torch.device] = ()) -> Iterator[list[memoryview]]:
        """Give buffers for the time of one file.

        Args:
            devices: What copies to them or from them; where that helps they are pinned, and stay so.
        """
        with self._lock:
            kept = self._free.pop() if self._free else None
        memory, pinned = kept or (huge_pages(self._count * self._size), None)
        if pinned is None and devices:
            # Not above: whoever writes a page or a table needs no torch.
            from lightning_sbckpt._io.devices import copy_by_themselves, pin

            if copy_by_themselves(devices):
                # What can't be pinned isn't tried again.
                pinned = pin(memory, devices) or memory
        try:
            yield [memory[n * self._size : (n + 1) * self._size] for n in range(self._count)]
        finally:
            with self._lock:
                self._free[:] = [(memory, pinned)]


def huge_pages(size: int) -> memoryview:
    """Return zeros in huge pages, where the system has them, and at the address of one.

    A forked child finds zeros there, too.
    """
    # Python's own choice would be shared memory, which has a switch of its own for huge pages that is
    # off nearly everywhere, and which a forked child can't be kept away from.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _MADV_WIPEONFORK):
        if advice is not None:
            with suppress(OSError, AttributeError):  # Not on this system: only slower.
                memory.madvise(advice)
    start = -address_of(memoryview(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + size]


def address_of(memory: memoryview) -> int:
    """Return where memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
