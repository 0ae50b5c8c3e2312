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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

# Read by the owner alone: what comes from a store, which asked for credentials.
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

# With these the names of what is ours begin: a folder of such a name lies in a run folder, and is no link.
# The rest of a path above it is the user's.
_OURS = ("CKPT", ".staging+", ".removed+", ".replaced+", ".remote")
_FILES = (".ckpt", ".dcp", ".yaml")

# More folders in each other than anybody makes, and fewer than a process may have open.
MOST_FOLDERS = 200

# A folder of the user's that may be entered and not listed can be passed through, where there is O_PATH.
_PASS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def too_deep(path: Path) -> OSError:
    """Return the error that says that more folders are in each other than can be open at once."""
    return OSError(errno.ELOOP, f"more than {MOST_FOLDERS} folders are in each other", str(path))


class NotRegularError(OSError):
    """Something other than a file, or a folder, stands where one is expected."""


def _refusal(mode: int, expected: str, name: str) -> NotRegularError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return NotRegularError(errno.EINVAL, f"it is {kind}, expected {expected}", name)


def parent_of(path: str | Path) -> tuple[str, bool]:
    """Return the folder that a path is in, and whether it is the user's: not in a folder of ours."""
    path = os.fspath(path)
    folder, _, _ = path.rpartition("/")
    above, _, last = folder.rpartition("/")
    # What a hook made a folder, or the pieces of a state, lies in a checkpoint.
    ours = is_ours(folder) or (last.endswith(_FILES) and is_ours(above))
    return folder or ("/" if path[:1] == "/" else os.curdir), not ours


def is_ours(folder: str | Path) -> bool:
    """Return whether a folder, by its name, is a checkpoint, or another one that we have made.

    Example:
        >>> is_ours("runs/a/CKPT+best"), is_ours("runs/a"), is_ours("runs/a/CKPT.dcp")
        (True, False, False)
    """
    name = os.fspath(folder).rpartition("/")[2]
    return name.startswith(_OURS) and not name.endswith(_FILES)


def open_parent(path: str | Path) -> OpenFolder:
    """Return the folder that a path is in, open: no link, if it is a checkpoint or in one.

    Raises:
        NotRegularError: A link, or anything else, is in place of it.
        OSError: It can't be opened.
    """
    folder, is_users = parent_of(path)
    if is_users or is_ours(folder):
        return OpenFolder(folder, follow=is_users)
    return open_folder_at(Path(folder))


def open_folder_at(path: Path) -> OpenFolder:
    """Return a folder, open: no link, if it is in a checkpoint, or is one.

    Raises:
        NotRegularError: It is a link there, or no folder.
        OSError: It can't be opened.
    """
    if is_ours(path.parent) and not is_ours(path):
        with OpenFolder(path.parent) as checkpoint:
            return checkpoint.below(path.name)
    # A run folder may have any name, also one of those that are ours.
    return OpenFolder(path, follow=not is_ours(path))


def open_file(path: str | Path, folder: int | None = None) -> tuple[int, os.stat_result]:
    """Return a descriptor to read a file, through no link in a folder of ours, and what it is.

    Args:
        path: The file.
        folder: A descriptor of the folder in which `path` is a single name.

    Raises:
        NotRegularError: It is a link, or anything else but a file, or it is behind a link.
        OSError: It can't be opened.
    """
    path = os.fspath(path)
    if folder is not None:
        return _open(path, os.O_RDONLY, dir_fd=folder)
    above, _, name = path.rpartition("/")
    # Thousands of small files are read: no objects are made for them.
    if is_ours(above):
        descriptor = enter(above)
        try:
            return _open(name, os.O_RDONLY, dir_fd=descriptor)
        finally:
            os.close(descriptor)
    if above.endswith(_FILES):
        with open_parent(path) as inner:
            return _open(name, os.O_RDONLY, dir_fd=inner.descriptor)
    return _open(path, os.O_RDONLY)


def open_folder(path: str | Path) -> int:
    """Return a descriptor of a folder, to lock it or to look into it.

    Raises:
        OSError: It can't be opened, or is ours and a link.
    """
    return os.open(path, _LIST | os.O_NOFOLLOW if is_ours(path) else _LIST)


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
        # Made a Path when it is asked for: small files are written in less time.
        self._path = path
        self.descriptor = os.open(path, _PASS) if follow else enter(os.fspath(path))
        self._to_list = not follow

    def __enter__(self) -> OpenFolder:  # noqa: PYI034  # `Self` is of Python 3.11.
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The path by which it was opened."""
        return Path(self._path)

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
        current = self.descriptor if parts else os.dup(self.descriptor)
        try:
            for part in parts:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, mode, dir_fd=current)
                inner = enter(part, dir_fd=current)
                if current != self.descriptor:
                    os.close(current)
                current = inner
        except BaseException:
            if current != self.descriptor:
                os.close(current)
            raise
        found = OpenFolder.__new__(OpenFolder)
        found._path = self.path / name if name else self.path  # noqa: SLF001 - it is one of these
        found.descriptor = current
        found._to_list = self._to_list or bool(parts)  # noqa: SLF001 - it is one of these
        return found

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Return a descriptor of a file in this folder, of a single name.

        Raises:
            NotRegularError: It is a link, or anything else but a file.
            OSError: It can't be opened.
        """
        return _open(name, flags, mode, self.descriptor)[0]

    def entries(self) -> list[tuple[str, bool]]:
        """Return the names of what is in this folder, and whether each is a folder itself."""
        with self._listed() as descriptor, os.scandir(descriptor) as found:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]

    @contextmanager
    def _listed(self) -> Iterator[int]:
        """Give a descriptor that does more than lead to what is in the folder."""
        if self._to_list:
            yield self.descriptor
            return
        descriptor = os.open(".", _LIST, dir_fd=self.descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Give what is below this folder and is no folder, by relative name, with what it is.

        What vanishes meanwhile is left out.

        Raises:
            OSError: A folder can't be looked into, or there are too many in each other.
        """
        return _files_below(self, "")

    def touch(self) -> None:
        """Give this folder the time of now, so that it is looked at again."""
        with self._listed() as descriptor:
            os.utime(descriptor)

    def stream(self, name: str) -> BinaryIO:
        """Open a file in this folder for reading, unbuffered; raises as `open` does."""
        return open(self.open(name, os.O_RDONLY), "rb", buffering=0)  # noqa: PTH123

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
        """Make the names in this folder durable, as far as its filesystem can."""
        with self._listed() as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                # Some FUSE and network filesystems don't know of flushing a folder.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise


def _files_below(folder: OpenFolder, above: str) -> Iterator[tuple[str, os.stat_result]]:
    if above.count("/") > MOST_FOLDERS:
        raise too_deep(folder.path)
    for name, is_folder in folder.entries():
        with suppress(FileNotFoundError, NotRegularError):
            if not is_folder:
                yield above + name, folder.lstat(name)
                continue
            with folder.below(name) as inner:
                yield from _files_below(inner, f"{above}{name}/")


def _open(
    name: str, flags: int, mode: int = 0o666, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    try:
        # Not waiting for the other end of a pipe.
        descriptor = os.open(
            name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd
        )
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device without a driver. EISDIR: opened to be written.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            raise _refusal(found.st_mode, "a regular file", name) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise _refusal(found.st_mode, "a regular file", name)
    return descriptor, found


def enter(name: str, *, dir_fd: int | None = None) -> int:
    """Return a descriptor of a folder, to look into it and to reach what is in it.

    Raises:
        NotRegularError: It is a link, or no folder.
        OSError: It can't be opened.
    """
    try:
        return os.open(name, _LIST | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        raise _refusal(found.st_mode, "a folder", name) from error
