"""Opening a file of a checkpoint folder that anybody may have put there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lightning_sbckpt._io.inside import (
    NotRegularError,
    OpenFolder,
    is_ours,
    open_file,
    parent_of,
)

__all__ = [
    "NotRegularError",
    "open_below",
    "open_regular",
    "open_to_read",
    "read_regular",
]


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, unbuffered; refuse a link, a pipe, a device, a folder.

    A named pipe would be waited on for ever, a device read without end, and a link may lead out of
    the folder.

    Raises:
        NotRegularError: It is no regular file; the message says what it is.
        OSError: It can't be opened.
    """
    descriptor, _ = open_file(path)
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123


def open_below(folder: str | Path, name: str) -> BinaryIO:
    """Open a file of a checkpoint, by the relative name that it has there, as `open_regular` does.

    No folder on the way is a link.

    Raises:
        NotRegularError: It is no regular file, or is behind a link.
        OSError: It can't be opened.
    """
    inner, _, last = name.rpartition("/")
    with OpenFolder(folder, follow=not is_ours(folder)) as outer, outer.below(inner) as place:
        return place.stream(last)


def open_to_read(path: str | Path) -> BinaryIO:
    """Open a file that a user may have named: a link is followed, but for one in a checkpoint.

    Raises:
        NotRegularError: It is no regular file.
        OSError: It can't be opened.
    """
    _, is_users = parent_of(path)
    return open_regular(os.path.realpath(path) if is_users else path)


def read_regular(path: str | Path, limit: int, folder: int | None = None) -> bytes:
    """Return the bytes of a file, of a larger one the first `limit` and one more.

    Args:
        path: The file.
        limit: How many bytes are expected at most.
        folder: A descriptor of the folder in which `path` is a single name.

    Raises:
        NotRegularError: It is no regular file.
        OSError: It can't be read.
    """
    descriptor, found = open_file(path, folder)
    # Without a stream: thousands of small files are read, and to make one takes as long as reading.
    try:
        left = min(found.st_size, limit + 1)
        parts = []
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)
