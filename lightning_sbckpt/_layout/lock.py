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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from lightning_sbckpt._layout.owner import (
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
# The file, or the filesystem that it was opened on: it may be mounted anew.
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_Identity = tuple[int, int]


class FolderLock:
    """The right of this process to write checkpoints into a folder.

    Several locks of one process on one folder share that right, and the last that is released
    or collected gives it up.

    Args:
        root: The folder of all checkpoints.
        shared: Let in others who are shared as well, and nobody who wants it alone.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        self._root = root
        self._shared = shared
        self._claim: _Claim | None = None
        # Stands for this lock among the holders of a claim.
        self._key = object()

    def acquire(self) -> None:
        """Take the right, or make sure that it is still ours: call this before every write.

        Whatever opens and closes `.lock` in this process (a copy of the whole folder, say) makes
        the kernel drop the lock, and somebody may have moved the folder away.

        Raises:
            FolderInUseError: Another process has it; nothing was changed.
            SaveError: The folder can't be written to.
        """
        try:
            with _guard:
                identity = _identity(self._root)
                if self._claim is not None and self._claim.identity != identity:
                    _give_up(self._claim, self._key)
                claim = _claims.get(identity) or _Claim(self._root, identity)
                # Noted before it is taken: an exception of a signal handler may come between any
                # two steps, and whoever releases this finds what has been done by then.
                claim.holders.add(self._key)
                self._claim = _claims[identity] = claim
                claim.root = self._root  # The folder may have been moved, and be known by both.
                try:
                    claim.take(shared=self._shared)
                finally:
                    if not claim.is_held:
                        _give_up(claim, self._key)
                    _give_up_orphans()
        except OSError as error:
            raise SaveError(
                f"{self._root} can't be locked for saving: {error.strerror or error} "
                f"({self._root / LOCK_NAME}). Nothing was written. Make the folder and that "
                "file writable, use another dirpath, or open it for reading: access='read'"
            ) from error
        for level, message in claim.news():
            logger.log(level, message)

    def release(self) -> None:
        """Give the right up; nothing happens if it isn't held, or was held before a fork."""
        with _guard:
            if self._claim is not None:
                _give_up(self._claim, self._key)
                self._claim = None
            _give_up_orphans()

    def __del__(self) -> None:
        """Give the right up, now or as soon as this thread has changed what it is changing."""
        if self._claim is not None:
            _orphans.append((self._claim, self._key))
            # This may run in the middle of anything, of what changes claims as well. What holds
            # the guard elsewhere never waits for this thread, not even for the log.
            if not _guard._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as Condition
                with _guard:
                    _give_up_orphans()


@dataclass(eq=False)
class _Claim:
    """What this process holds on one folder; it opens the lock file once only."""

    root: Path
    identity: _Identity
    holders: set[object] = field(default_factory=set)
    # An object, which closes itself wherever an exception comes between two steps.
    _file: FileIO | None = None
    _alone: bool = False
    _by_record: bool = False
    _me: dict[str, object] = field(default_factory=dict)
    _news: list[tuple[int, str]] = field(default_factory=list)

    @property
    def is_held(self) -> bool:
        """Whether the lock is ours."""
        return self._file is not None or self._by_record

    def news(self) -> list[tuple[int, str]]:
        """Return what is to be logged, when no lock of ours is held, and forget it."""
        news, self._news = self._news, []
        return news

    def take(self, *, shared: bool) -> None:
        """Take the lock, take it again, or turn a shared one into one that is not."""
        self._me = self._me or describe_me()
        if self._by_record:
            self._check_record()
            return
        if self._file is not None and not self._is_in_place():
            self.drop()
        alone = self._alone or not shared
        while True:
            new = self._file is None
            file = self._open() if self._file is None else self._file
            try:
                # Closed at once if it is not kept: whatever closes the file later, of this process
                # anything, gives up a lock that it may have got by then.
                fcntl.lockf(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except OSError as error:
                owner, empty = read_record(file.fileno()), os.fstat(file.fileno()).st_size == 0
                if new:
                    file.close()
                if error.errno in _HELD_BY_OTHERS:
                    if is_same_process(owner, self._me):
                        owner = {}  # We share it, and wrote last.
                    raise FolderInUseError(_in_use(self.root, owner)) from error
                if error.errno not in _NO_LOCKS_HERE:
                    raise
                if empty:  # We have just made it ourselves.
                    (self.root / LOCK_NAME).unlink(missing_ok=True)
                if not shared:
                    self._take_by_record()
                return
            self._file = file
            # The owner before us removed the file after we had opened it: ours is no longer there.
            if self._is_in_place():
                if not (new and alone and _has_other_names(file)):
                    break
                self._remove_name()
            self.drop()
        self._alone = alone
        if new and not _has_other_names(file):
            if alone and os.fstat(file.fileno()).st_size:
                # Who ends in good order leaves no file.
                owner = read_record(file.fileno())
                self._say(f"took over {self.root} from {spell(owner)}, which has ended")
            write_record(file.fileno(), self._me)

    def _remove_name(self) -> None:
        """Remove the name of a file that nobody else holds and that has other names, or give up."""
        try:
            (self.root / LOCK_NAME).unlink(missing_ok=True)
        except BaseException:
            self.drop()
            raise

    def _say(self, message: str, level: int = logging.INFO) -> None:
        self._news.append((level, message))

    def drop(self) -> None:
        """Give up, leaving no file, unless others share it."""
        path = self.root / LOCK_NAME
        if self._by_record:
            with suppress(OSError):
                if is_same_process(read_record_at(path), self._me):
                    path.unlink()
        elif self._file is not None:
            with suppress(OSError):
                # Removed while we hold it alone: whoever opened it before will see that it is gone.
                if self._is_in_place():
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            with suppress(OSError):
                self._file.close()
        self._file = None
        self._alone = self._by_record = False

    def _open(self) -> FileIO:
        # Not through a link, and not waiting for somebody at the other end of a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        path = self.root / LOCK_NAME
        file = FileIO(path, "r+", opener=lambda name, _: os.open(name, flags, 0o666))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file

    def _is_in_place(self) -> bool:
        # Closed: an exception of a signal handler may come right after that, in `drop`.
        if self._file is None or self._file.closed:
            return False
        try:
            held = os.fstat(self._file.fileno())
            found = (self.root / LOCK_NAME).lstat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
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
                    self._say(
                        f"{self.root}: {spell(owner)} wrote checkpoints there, and on this "
                        "filesystem, which has no locks, nobody can tell whether it still does. "
                        "Going on: make sure that it has ended, or use another dirpath",
                        logging.WARNING,
                    )
                elif verdict == "dead":
                    self._say(f"took over {self.root} from {spell(owner)}, which has ended")
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


# Only ever taken by `with`: a signal handler may raise at any bytecode, and nothing comes between
# taking a lock so and the block that gives it back.
_guard = threading.RLock()
_claims: dict[_Identity, _Claim] = {}
# One entry for each lock that was collected without having been released.
_orphans: deque[tuple[_Claim, object]] = deque()


def _has_other_names(file: FileIO) -> bool:
    # `cp -al` makes such a copy of a folder. What stands under the other names is not ours to write.
    return os.fstat(file.fileno()).st_nlink > 1


def _give_up_orphans() -> None:
    while _orphans:
        _give_up(*_orphans.popleft())


def _give_up(claim: _Claim, key: object) -> None:
    # In a forked child the table is empty: what the parent holds is the parent's.
    if _claims.get(claim.identity) is not claim:
        return
    claim.holders.discard(key)
    if not claim.holders:
        claim.drop()
        del _claims[claim.identity]


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603 - as it was at the fork it may never open
    _guard = threading.RLock()
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
