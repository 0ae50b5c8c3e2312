"""The thread in the background: one job after the other, errors kept until they are asked for.

The thread ends when there is nothing to do and is no daemon, so an interpreter that exits waits for
what was handed over. A forked child has no such thread and starts with nothing to do.

A signal handler may raise at any bytecode of the main thread: Ctrl+C, SIGTERM in Lightning. Nothing
here rests on a flag that such an exception could leave behind. What is still to be done is what lies
in the queue, and who works at it holds a lock that only `with` takes, which no exception can come
into. Whoever waits does what is left, should the thread never have been started.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

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
        self._jobs: deque[Callable[[], object]] = deque()
        # Held by whoever does jobs.
        self._working = threading.Lock()
        # Held to look at whether a thread will still look at the queue.
        self._deciding = threading.Lock()
        self._thread: threading.Thread | None = None
        self._worker: int | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still to be done."""
        return bool(self._jobs) or self._working.locked()

    def submit(self, job: Callable[[], object]) -> None:
        """Do a job when those before it are done."""
        with self._deciding:
            self._jobs.append(job)
            if self._thread is not None and self._thread.is_alive():
                return  # It looks at the queue once more before it ends.
            self._thread = threading.Thread(target=self._work, name=self._name)
            try:
                # In here, so that its first line waits for us. Once it works it keeps the
                # interpreter's lock for 5 ms, and `start` returns only when it has begun.
                self._thread.start()
            except RuntimeError:
                # No thread can be started: the interpreter is exiting, or the system has no more.
                self._thread = None
            else:
                return
        if self._worker != threading.get_ident():
            self.wait_for_jobs()

    def wait(self) -> None:
        """Return when everything is done; at once in a job, which can't wait for itself.

        Raises:
            BaseException: What went wrong first since the last call.
        """
        if self._worker == threading.get_ident():
            return
        self.wait_for_jobs()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait_for_jobs(self) -> None:
        """Return when everything is done, and raise nothing of what went wrong."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()
        with self._working:
            # The thread that was to do them was never started, or is not known to be.
            self._do_jobs()

    def _work(self) -> None:
        while True:
            with self._working:
                self._do_jobs()
            with self._deciding:
                if not self._jobs:
                    self._thread = None
                    return

    def _do_jobs(self) -> None:
        self._worker = threading.get_ident()
        try:
            while self._jobs:
                job = self._jobs.popleft()
                try:
                    job()
                except BaseException as error:
                    if not isinstance(error, Exception) and self._is_main():
                        raise  # A signal's, for whoever waits here.
                    self._error = self._error or error
                del job  # It may hold the memory of a whole state.
        finally:
            self._worker = None

    @staticmethod
    def _is_main() -> bool:
        return threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    for background in list(_all):
        _not_ours.append(background._jobs)  # noqa: SLF001
        background._reset()  # noqa: SLF001 - the locks as they were at the fork may never open


os.register_at_fork(after_in_child=_after_fork)
