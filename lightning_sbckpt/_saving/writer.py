"""The thread in the background: one job after the other, errors kept until they are asked for.

The thread ends when there is nothing to do and is no daemon, so an interpreter that exits waits for
what was handed over. A forked child has no such thread and starts with nothing to do.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger("lightning_sbckpt")

_all: weakref.WeakSet[Background] = weakref.WeakSet()
# Jobs of the process that we were forked from. They are kept since letting go of one, here, would
# clean up what the other process is still writing.
_not_ours: list[object] = []


class Background:
    """Does jobs in a thread of its own, in the order in which they come.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._running = False
        self._worker: int | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still to be done."""
        return self._running

    def submit(self, job: Callable[[], object]) -> None:
        """Do a job when those before it are done."""
        thread = threading.Thread(target=self._work, name=self._name)
        with self._changed:
            self._jobs.append(job)
            if self._running:
                return
            self._running = True
            # In here, so that its first line waits for us. Once it works it keeps the interpreter's
            # lock for 5 ms, and `start` returns only when it has begun.
            with suppress(RuntimeError):
                thread.start()
                return
        # The interpreter is exiting and starts no thread any more.
        self._work()

    def wait(self) -> None:
        """Return when everything is done; at once in a job, which can't wait for itself.

        Raises:
            BaseException: What went wrong first since the last call.
        """
        if self._worker == threading.get_ident():
            return
        with self._changed:
            while self._running:
                self._changed.wait()
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        self._worker = threading.get_ident()
        while True:
            with self._changed:
                if not self._jobs:
                    self._running, self._worker = False, None
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            del job  # It may hold the memory of a whole state.


def _after_fork() -> None:
    for background in list(_all):
        _not_ours.append(background._jobs)  # noqa: SLF001
        background._reset()  # noqa: SLF001 - the locks as they were at the fork may never open


os.register_at_fork(after_in_child=_after_fork)
