"""Taking turns at the mirror of a store: among the threads of a process, and among processes.

Between processes it is a POSIX record lock, which the kernel gives up when its owner dies, and which
forked workers of a DataLoader don't have. Threads of one process share such a lock, so they take
turns at another one first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_sbckpt._io.inside import PRIVATE_FILE, PRIVATE_FOLDER, OpenFolder
from lightning_sbckpt.errors import RemoteError

_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)
_PAUSE = 0.02

_threads: dict[str, threading.Lock] = {}
_threads_lock = threading.Lock()


@contextmanager
def interprocess_lock(path: Path, patience: float) -> Iterator[None]:
    """Keep others away inside the block; it must not be entered again inside itself.

    Args:
        path: A file to lock, in the folder of records of a mirror; both are made if missing.
        patience: Seconds to wait for others.

    Raises:
        RemoteError: Others did not end in that time.
    """
    with _threads_lock:
        of_threads = _threads.setdefault(str(path.absolute()), threading.Lock())
    deadline = time.monotonic() + patience
    if not of_threads.acquire(timeout=patience):
        raise _too_long(path, patience)
    try:
        descriptor = _open(path)
        try:
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise _too_long(path, patience)
                time.sleep(_PAUSE)
            yield
        finally:
            # The lock goes with it.
            os.close(descriptor)
    finally:
        of_threads.release()


def _open(path: Path) -> int:
    # The folder of records is ours, and lies in the mirror, which is the user's.
    with (
        OpenFolder(path.parent.parent, follow=True) as mirror,
        mirror.below(path.parent.name, make=True, mode=PRIVATE_FOLDER) as records,
    ):
        return records.open(path.name, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other reason: a filesystem without locks, where everyone goes ahead.
        return error.errno not in _HELD_BY_OTHERS
    return True


def _too_long(path: Path, patience: float) -> RemoteError:
    return RemoteError(
        f"another process has been bringing files to {path.parent.parent} for {patience:g} seconds "
        "and did not end. Look what holds it up, or use another local_dir"
    )


def _after_fork() -> None:
    global _threads, _threads_lock
    # They may be held by a thread that the child doesn't have.
    _threads, _threads_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
