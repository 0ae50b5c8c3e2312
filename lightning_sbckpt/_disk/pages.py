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

# Linux's number of it: a forked child, a loader's worker say, gets empty memory there. Without it
# the next copy would first have to part from the child's view of every page, in small ones.
_MADV_WIPEONFORK = 18


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
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + size]
