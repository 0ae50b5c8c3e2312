"""Opening a file of a checkpoint folder that anybody may have put there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from lightning_sbckpt._disk.inside import NotRegularError, refusal

__all__ = ["NotRegularError", "open_regular", "read_regular"]


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, unbuffered; refuse a link, a pipe, a device, a folder.

    A named pipe would be waited on for ever, a device read without end, and a link may lead out of
    the folder.

    Raises:
        NotRegularError: It is no regular file; the message says what it is.
        OSError: It can't be opened.
    """
    descriptor, _ = _open(path)
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123


def read_regular(path: str | Path, limit: int) -> bytes:
    """Return the bytes of a file, of a larger one the first `limit` and one more.

    Raises:
        NotRegularError: It is no regular file.
        OSError: It can't be read.
    """
    descriptor, size = _open(path)
    # Without a stream: thousands of small files are read, and to make one takes as long as reading.
    try:
        left = min(size, limit + 1)
        parts = []
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def _open(path: str | Path) -> tuple[int, int]:
    """Return the descriptor of a regular file and how many bytes it has."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise refusal(os.lstat(path).st_mode, "a regular file") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise refusal(found.st_mode, "a regular file")
    return descriptor, found.st_size
