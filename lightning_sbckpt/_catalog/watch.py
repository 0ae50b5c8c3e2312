"""Whether a folder of checkpoints has changed since the last question, told by the kernel.

To look at thousands of checkpoints takes two system calls for each, even if nothing has changed.
Linux can be asked to note changes instead (inotify), and then one call says that there are none.
What it notes is there as soon as the change is, so nothing is seen late and no time is compared.

It sees what happens on this machine, so it is used on local filesystems only; it doesn't see what
is written through a mapping of a file or through another hard link of it. Where it can't be had,
`watch` returns None and the folders are looked at.
"""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

# From the kernel's include/uapi/linux/magic.h: ext4 and its ancestors, XFS, Btrfs, tmpfs, F2FS, ZFS.
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xF2F52010, 0x2FC12FC1}

# From include/uapi/linux/inotify.h.
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_ONLYDIR, _DONT_FOLLOW = 0x01000000, 0x02000000
_CHANGES = (
    *(_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE),
    *(_DELETE_SELF, _MOVE_SELF, _ONLYDIR, _DONT_FOLLOW),
)

# Each takes about a kilobyte of the kernel's memory.
_MOST_FOLDERS = 20_000


class Watch:
    """A watch over a folder and folders in it; it ends with the first change.

    Args:
        root: The folder.
        descriptor: That of the inotify instance; closed when this object goes.
    """

    def __init__(self, root: Path, descriptor: int) -> None:
        self._descriptor = descriptor
        self._root = root
        self._stat = root.stat()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def is_quiet(self) -> bool:
        """Return whether nothing has changed since the watch began."""
        # What was noted is never read: it stays there for a forked process that asks, too.
        if self._poll.poll(0):
            return False
        try:
            # A folder above may have been renamed, and another one be at the path.
            return os.path.samestat(self._stat, self._root.stat())
        except OSError:
            return False

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


def watch(root: Path, names_in: Callable[[Path], Iterable[str]]) -> Watch | None:
    """Begin to watch a folder and folders in it.

    Whoever looks at them after this returns has seen all that comes before what the watch notes.

    Args:
        root: The folder.
        names_in: Gives the names of the folders in it; called when `root` is watched already.

    Returns:
        The watch, or None where there can be none.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        begin, add, statfs = libc.inotify_init1, libc.inotify_add_watch, libc.statfs
    except (OSError, AttributeError):
        return None  # Not Linux.
    found = (ctypes.c_long * 64)()  # The kind of the filesystem comes first; all is 120 bytes long.
    if statfs(os.fsencode(root), found) or found[0] not in _LOCAL:
        return None
    descriptor = begin(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        return None  # Too many, by the limits of this machine.
    mask = sum(_CHANGES)
    try:
        begun = Watch(root, descriptor)
        device = root.stat().st_dev
        if add(descriptor, os.fsencode(root), mask) < 0:
            return None
        names = list(names_in(root))
        if len(names) > _MOST_FOLDERS:
            return None
        # No paths: to make them takes longer than all that is asked of the kernel.
        for folder in (os.fsencode(f"{root}{os.sep}{name}") for name in names):
            if add(descriptor, folder, mask) < 0 or os.lstat(folder).st_dev != device:
                return None
    except OSError:
        return None  # Removed since it was listed.
    return begun
