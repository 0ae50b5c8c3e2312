"""Opening a file of a checkpoint folder that anybody may have put there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """Something other than a file stands where a file is expected."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; refuse a link, a pipe, a device, a folder.

    A named pipe would be waited on for ever, a device read without end, and a link may lead out of
    the folder.

    Raises:
        NotRegularError: It is no regular file; the message says what it is.
        OSError: It can't be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _refusal(path.lstat().st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _refusal(mode)
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a file, of a larger one the first `limit` and one more.

    Raises:
        NotRegularError: It is no regular file.
        OSError: It can't be read.
    """
    with open_regular(path) as stream:
        left = min(os.fstat(stream.fileno()).st_size, limit + 1)
        parts = []
        while left > 0 and (part := stream.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def _refusal(mode: int) -> NotRegularError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return NotRegularError(errno.EINVAL, f"it is {kind}, expected a regular file")
