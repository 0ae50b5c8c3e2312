"""A filesystem that tells what is done to it, and may be told to fail."""

from __future__ import annotations

import functools
from collections.abc import Callable

CHANGING = ("pipe_file", "rm_file", "cp_file", "open", "call_s3")


class Recorder:
    """Stands before one of fsspec's filesystems.

    Attributes:
        events: What was done, in the order in which it ended: the operation and the file's name.
        fail: Is asked before each operation, with its number, and may raise.
    """

    def __init__(self, real) -> None:
        self._real = real
        self.events: list[tuple[str, str]] = []
        self.fail: Callable[[int, str, str], None] = lambda number, operation, file: None
        self._count = 0

    def __getattr__(self, name: str):
        found = getattr(self._real, name)
        if name not in (*CHANGING, "cat_file", "find"):
            return found

        @functools.wraps(found)
        def told(*args, **kwargs):
            operation = args[0] if name == "call_s3" else name
            file = (kwargs.get("Key") or str(args[0])).rpartition("/")[2]
            if name in CHANGING:
                self._count += 1
            self.fail(self._count, operation, file)
            result = found(*args, **kwargs)
            if name in CHANGING:
                self.events.append((operation, file))
            return result

        return told


def record(folder) -> Recorder:
    """Put a recorder before the filesystem of a `RemoteFolder`."""
    recorder = Recorder(folder._store.filesystem)
    folder._store._filesystem = recorder
    # It stays, whatever it is told to raise.
    folder._store._forget = lambda: None
    return recorder
