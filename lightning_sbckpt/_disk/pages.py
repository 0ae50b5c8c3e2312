"""Memory in huge pages, to write from.

A request to a disk names a few hundred pieces of memory at most, so that one from ordinary pages of
4 kB is a megabyte or less, and one from huge pages (2 MiB) as large as the disk takes. On a virtual
disk that halves the time of a save.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

HUGE_PAGE = 2 * 2**20


def huge_pages(size: int, *advice: int) -> memoryview:
    """Return zeros in huge pages, where the system has them, and at the address of one.

    Args:
        size: How many bytes.
        advice: More that `mmap.madvise` is to be told; what the system doesn't know is left out.
    """
    # Python's own choice would be shared memory, which has a switch of its own for huge pages that is
    # off nearly everywhere, and which a forked child can't be kept away from.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for each in (getattr(mmap, "MADV_HUGEPAGE", None), *advice):
        if each is not None:
            with suppress(OSError, AttributeError):  # Not on this system: only slower.
                memory.madvise(each)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + size]
