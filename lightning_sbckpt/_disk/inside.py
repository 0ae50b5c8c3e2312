"""Opening what lies below a folder, following no link on the way.

Somebody else may have made a run folder, or may write to it while we do: a symbolic link in place of a
checkpoint, or of a folder in one, would have us read, write or remove files elsewhere. To look first and
use the path then is not enough, since the link may come in between. So each folder on the way is opened
itself, and what is in it is named relative to the open folder; that stays the same folder whatever happens
to its name. See `openat(2)`; Python calls it `dir_fd`.

The path of the run folder itself is the user's, and may be or contain links.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

# Read by the owner alone: what comes from a store, which asked for credentials.
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

# A folder that may be entered and not listed can be passed through, too, where the system has O_PATH.
_ENTER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """Something other than a file, or a folder, stands where one is expected."""


def refusal(mode: int, expected: str) -> NotRegularError:
    """Return the error that says what was found instead of what was expected."""
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return NotRegularError(errno.EINVAL, f"it is {kind}, expected {expected}")


class OpenFolder:
    """A folder that is open, and what is below it by relative names.

    Args:
        path: The folder.
        follow: It may be a link itself, as the user's own folders may; a checkpoint may not.

    Raises:
        NotRegularError: It is a link, or no folder.
        OSError: It can't be opened.
    """

    def __init__(self, path: str | Path, *, follow: bool = False) -> None:
        self.path = Path(path)
        self.descriptor = _enter(os.fspath(path), follow=follow)

    def __enter__(self) -> OpenFolder:  # noqa: PYI034  # `Self` is of Python 3.11.
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; nothing happens if that was done before."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def below(self, name: str, *, make: bool = False, mode: int = 0o777) -> OpenFolder:
        """Return a folder below this one, by a relative name; the empty name is this one.

        Args:
            name: Folders, separated by slashes.
            make: Make those that are missing.
            mode: Of those that are made.

        Raises:
            NotRegularError: One on the way is a link, or no folder.
            OSError: One can't be opened or made; the name leads out.
        """
        parts = name.split("/") if name else []
        if any(part in ("", ".", "..") for part in parts):
            raise NotRegularError(errno.EINVAL, f"the name {name!r} leads out of the folder")
        current = os.dup(self.descriptor)
        try:
            for part in parts:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, mode, dir_fd=current)
                inner = _enter(part, dir_fd=current)
                os.close(current)
                current = inner
        except BaseException:
            os.close(current)
            raise
        found = OpenFolder.__new__(OpenFolder)
        found.path, found.descriptor = self.path / name, current
        return found

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Return a descriptor of a file in this folder, of a single name.

        Raises:
            NotRegularError: It is a link, or anything else but a file.
            OSError: It can't be opened.
        """
        # Not waiting for the other end of a pipe.
        safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags | safe, mode, dir_fd=self.descriptor)
        except OSError as error:
            # ELOOP: a link. ENXIO: a socket, or a device without a driver.
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise refusal(self.lstat(name).st_mode, "a regular file") from error
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise refusal(found.st_mode, "a regular file")
        return descriptor

    def lstat(self, name: str) -> os.stat_result:
        """Return what a name in this folder is; of a link, the link."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Return whether there is something of that name, if only a link that leads nowhere."""
        try:
            self.lstat(name)
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file, a link (not what it points to), or nothing if there is none."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def rename(self, name: str, new: str) -> None:
        """Give something in this folder another name there, in place of the file of that name."""
        os.replace(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def flush(self) -> None:
        """Make the names in this folder durable."""
        descriptor = os.open(
            ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor
        )
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _enter(name: str, *, dir_fd: int | None = None, follow: bool = False) -> int:
    flags = _ENTER if follow else _ENTER | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP) or follow:
            raise
        found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        raise refusal(found.st_mode, "a folder") from error
