"""One writer per folder: a second process that would save there is told who the first one is.

Two runs in one folder would prune each other's checkpoints. So whoever writes holds a POSIX record
lock on `.lock` in that folder: the kernel gives it up when its process dies, in whatever way, and
processes forked from the owner (the workers of a DataLoader) don't have it. On NFS it holds between
machines. What stands in the file says only who it is. On filesystems without locks that record has
to decide.

The file is no part of any checkpoint: nothing is lost with it, so it is not flushed and not written
through a `LocalStorage`.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sbckpt._folder.owner import (
    describe_me,
    is_same_process,
    judge,
    read_record,
    read_record_at,
    spell,
    write_record,
)
from lightning_sbckpt.errors import FolderInUseError, SaveError

logger = logging.getLogger("lightning_sbckpt")

LOCK_NAME = ".lock"
_ATTEMPTS = 20
_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_Identity = tuple[int, int]


class FolderLock:
    """The right of this process to write checkpoints into a folder.

    Several locks of one process on one folder share that right, and the last that is released, or
    that nobody has any more, gives it up.

    Args:
        root: The folder of all checkpoints.
        shared: Let in others who are shared as well, and nobody who wants it alone.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        self._root = root
        self._shared = shared
        self._claim: _Claim | None = None

    def acquire(self) -> None:
        """Take the right, or make sure that it is still ours: call this before every write.

        Whatever opens and closes `.lock` in this process (a copy of the whole folder, say) makes
        the kernel drop the lock, and somebody may have moved the folder away.

        Raises:
            FolderInUseError: Another process has it; nothing was changed.
            SaveError: The folder can't be written to.
        """
        with _undisturbed():
            try:
                identity = _identity(self._root)
                claim = _claims.get(identity) or _Claim(self._root, identity)
                if self._claim is not None and self._claim is not claim:
                    _give_up(self._claim)
                    self._claim = None
                claim.root = self._root  # The folder may have been moved, and be known by both.
                claim.take(shared=self._shared)
            except OSError as error:
                raise SaveError(
                    f"{self._root} can't be locked for saving: {error.strerror or error} "
                    f"({self._root / LOCK_NAME}). Nothing was written. Make the folder and that "
                    "file writable, use another dirpath, or open it for reading: access='read'"
                ) from error
            if self._claim is None:
                claim.holders += 1
                self._claim = _claims[identity] = claim

    def release(self) -> None:
        """Give the right up; nothing happens if it isn't held, or was held before a fork."""
        with _undisturbed():
            claim, self._claim = self._claim, None
            if claim is not None:
                _give_up(claim)

    def __del__(self) -> None:
        """Give the right up, now or as soon as nobody is at it."""
        if self._claim is not None:
            _orphans.append(self._claim)
            # This may run in the middle of anything, also of what changes claims.
            if _guard.acquire(blocking=False):
                try:
                    _give_up_orphans()
                finally:
                    _guard.release()


@dataclass(eq=False)
class _Claim:
    """What this process holds on one folder; it opens the lock file once only."""

    root: Path
    identity: _Identity
    holders: int = 0
    _descriptor: int | None = None
    _alone: bool = False
    _by_record: bool = False
    _me: dict[str, object] = field(default_factory=dict)

    def take(self, *, shared: bool) -> None:
        """Take the lock, take it again, or turn a shared one into one that is not."""
        self._me = self._me or describe_me()
        if self._by_record:
            self._check_record()
            return
        alone = self._alone or not shared
        while True:
            new = self._descriptor is None
            descriptor = self._open() if self._descriptor is None else self._descriptor
            try:
                fcntl.lockf(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD_BY_OTHERS:
                    owner = read_record(descriptor)
                    if new:
                        os.close(descriptor)
                    if is_same_process(owner, self._me):
                        owner = {}  # We share it, and wrote last.
                    raise FolderInUseError(_in_use(self.root, owner)) from error
                empty = os.fstat(descriptor).st_size == 0
                if new:
                    os.close(descriptor)
                if error.errno not in _NO_LOCKS_HERE:
                    raise
                if empty:  # We have just made it ourselves.
                    (self.root / LOCK_NAME).unlink(missing_ok=True)
                if not shared:
                    self._take_by_record()
                return
            self._descriptor = descriptor
            # The owner before us removed the file after we had opened it: ours is no longer there.
            if self._is_in_place():
                break
            self.drop()
        self._alone = alone
        if new:
            if alone and os.fstat(descriptor).st_size:
                # Who ends in good order leaves no file.
                owner = read_record(descriptor)
                logger.info("took over %s from %s, which has ended", self.root, spell(owner))
            write_record(descriptor, self._me)

    def drop(self) -> None:
        """Give up, leaving no file, unless others share it."""
        path = self.root / LOCK_NAME
        if self._by_record:
            with suppress(OSError):
                if is_same_process(read_record_at(path), self._me):
                    path.unlink()
        elif self._descriptor is not None:
            with suppress(OSError):
                # Removed while we hold it alone: whoever opened it before will see that it is gone.
                if self._is_in_place():
                    fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
        self._close()
        self._alone = self._by_record = False

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open(self) -> int:
        # Not through a link, and not waiting for somebody at the other end of a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.root / LOCK_NAME, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor

    def _is_in_place(self) -> bool:
        if self._descriptor is None:
            return False
        held = os.fstat(self._descriptor)
        try:
            found = (self.root / LOCK_NAME).lstat()
        except FileNotFoundError:
            return False
        return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)

    # ------------------------------------------------------------------ where there are no locks

    def _take_by_record(self) -> None:
        path = self.root / LOCK_NAME
        for _ in range(_ATTEMPTS):
            owner = read_record_at(path)
            if owner is not None:
                verdict = judge(owner, self._me)
                if verdict == "in use":
                    raise FolderInUseError(_in_use(self.root, owner))
                if verdict == "unknown":
                    logger.warning(
                        "%s: %s wrote checkpoints there, and on this filesystem, which has no "
                        "locks, nobody can tell whether it still does. Going on: make sure that it "
                        "has ended, or use another dirpath",
                        self.root,
                        spell(owner),
                    )
                elif verdict == "dead":
                    logger.info("took over %s from %s, which has ended", self.root, spell(owner))
                with suppress(FileNotFoundError):
                    path.unlink()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                descriptor = os.open(path, flags, 0o666)
            except FileExistsError:
                continue  # Somebody was faster: look at who.
            try:
                write_record(descriptor, self._me)
            finally:
                os.close(descriptor)
            self._by_record, self._alone = True, True
            return
        raise OSError(errno.EAGAIN, "other processes take it again and again")

    def _check_record(self) -> None:
        owner = read_record_at(self.root / LOCK_NAME)
        if owner is None or not is_same_process(owner, self._me):
            self._by_record = False
            self._take_by_record()


_guard = threading.RLock()
_claims: dict[_Identity, _Claim] = {}
# One entry for each lock that was never released, and that nobody has any more.
_orphans: deque[_Claim] = deque()
_busy = False


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Change claims inside the block; no other thread does, nor does the garbage collector."""
    global _busy  # noqa: PLW0603 - it goes with the guard
    with _guard:
        outer, _busy = _busy, True
        try:
            yield
        finally:
            _busy = outer
            _give_up_orphans()


def _give_up_orphans() -> None:
    global _busy  # noqa: PLW0603 - it goes with the guard
    if _busy:
        return
    _busy = True
    try:
        while _orphans:
            _give_up(_orphans.popleft())
    finally:
        _busy = False


def _give_up(claim: _Claim) -> None:
    # In a forked child the table is empty: what the parent holds is the parent's.
    if _claims.get(claim.identity) is not claim:
        return
    claim.holders -= 1
    if claim.holders == 0:
        del _claims[claim.identity]
        claim.drop()


def _after_fork_in_child() -> None:
    global _guard, _busy
    _guard, _busy = threading.RLock(), False
    # What the parent holds is the parent's. The descriptors stay open: closing one would not harm it.
    _claims.clear()
    _orphans.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _leave() -> None:
    with _guard:
        for claim in _claims.values():
            claim.drop()
        _claims.clear()


def _identity(root: Path) -> _Identity:
    """Return what stays the same when a folder is reached by another path, or moved."""
    try:
        found = root.stat()
    except FileNotFoundError:
        root.mkdir(parents=True, exist_ok=True)
        found = root.stat()
    return found.st_dev, found.st_ino


def _in_use(root: Path, owner: Mapping[str, object]) -> str:
    return (
        f"{root} is in use by {spell(owner)}. Nothing was written: two runs in one folder would "
        "delete each other's checkpoints. Use another dirpath, stop the other job, or open the "
        "folder for reading: access='read'"
    )
