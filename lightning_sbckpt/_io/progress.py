"""How far reading and writing are, told to whoever waits for it.

Work that takes an `on_progress` knows how many bytes it has before it, in parts of a known size. Where
they are read, hashed, written or copied, `moved` counts them for the part that is being done, so that
nothing in between has to hand anything down. What goes to a store or comes from one is announced to
whoever listens.

Both are known to the context (`contextvars`) of the caller alone: two threads that work at once don't
count each other's bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path

Progress = Callable[[int, int], object]
"""Is called with the bytes that are done and all bytes there are; one thread at a time."""

Told = Callable[[int], object]
"""Is called with how many bytes more are done, by several threads."""

Listener = Callable[[str, "int | None"], AbstractContextManager[Told]]
"""Is called with what begins and how many bytes it has, if that is known; its block is that work."""

_counter: ContextVar[Told | None] = ContextVar("counter", default=None)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Tally:
    """The bytes of one piece of work, done part by part.

    Args:
        tell: Who wants to know; None if nobody does.
        total: The bytes of all parts together.
    """

    def __init__(self, tell: Progress | None, total: int) -> None:
        self._tell = tell
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    @contextmanager
    def part(self, size: int) -> Iterator[None]:
        """Do a part inside the block; it counts in full when it has ended, and never more."""
        end = self._done + size

        def count(more: int) -> None:
            with self._lock:
                self._reach(min(self._done + more, end))

        token = _counter.set(count)
        try:
            yield
        finally:
            _counter.reset(token)
        with self._lock:
            self._reach(end)

    def _reach(self, done: int) -> None:
        if done > self._done:
            self._done = done
            if self._tell is not None:
                self._tell(done, max(done, self._total))


def moved(count: int) -> None:
    """Count bytes for the part that is being done, if there is one."""
    counter = _counter.get()
    if counter is not None:
        counter(count)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let somebody hear what is announced inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def announced(what: str, total: int | None = None) -> Iterator[Told]:
    """Say what is under way inside the block, and give what to tell the bytes to.

    Args:
        what: In words, as in "downloading CKPT+a".
        total: How many bytes it has, if that is known.
    """
    listener = _listener.get()
    if listener is None:
        yield _to_nobody
        return
    with listener(what, total) as told:
        yield told


def _to_nobody(_count: int) -> None:
    pass


_SECONDS = 0.1


@contextmanager
def growth_counted(folder: Path) -> Iterator[None]:
    """Count what comes to be in the files of a folder inside the block, whatever their names.

    Args:
        folder: Nobody else writes there.
    """
    done = threading.Event()
    counted = 0

    def look() -> None:
        nonlocal counted
        with os.scandir(folder) as entries:
            found = sum(map(_written, entries))
        if found > counted:
            moved(found - counted)
            counted = found

    def watch() -> None:
        while not done.wait(_SECONDS):
            look()

    # Who counts the bytes is known to the caller's context.
    thread = threading.Thread(target=copy_context().run, args=(watch,), name="sbckpt-growth")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()


def _written(entry: os.DirEntry[str]) -> int:
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return 0  # It has another name by now.
    # A file may have its whole size from the start, and its blocks as they are written.
    return min(found.st_size, found.st_blocks * 512)
