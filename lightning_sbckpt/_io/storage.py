"""Bytes on the local disk: the operations that change it, each flushed by name.

Every change that this package makes to a checkpoint folder goes through a `LocalStorage`, so that
one place decides how to flush, and a test can count the operations and let any single one fail or
be the last. (Save hooks of users write their own file; it is flushed here right after.)

What is in a checkpoint, or in another folder of ours, is reached relative to that folder, which is
open and no link: see `_io/inside.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import xxhash

from lightning_sbckpt._io.direct_write import Source, write_source
from lightning_sbckpt._io.exchange import exchange
from lightning_sbckpt._io.inside import (
    MOST_FOLDERS,
    NotRegularError,
    OpenFolder,
    enter,
    open_parent,
    too_deep,
)
from lightning_sbckpt._io.progress import moved

_CHUNK = 2**18
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL

Operation = Literal[
    "make_dir",
    "create",
    "write",
    "flush_file",
    "flush_dir",
    "rename",
    "exchange",
    "link",
    "remove_file",
    "remove_dir",
]


@dataclass(frozen=True)
class FileDigest:
    """The size of a file in bytes and its XXH3 128-bit hash in hexadecimal."""

    size: int
    xxh3_128: str


class LocalStorage:
    """The local filesystem."""

    def before(self, operation: Operation, path: Path, target: Path | None = None) -> None:
        """Be told of one system call that is about to change the disk; nothing to do here.

        Args:
            operation: What is about to be done.
            path: To which file or folder.
            target: The new name, of a rename and a link; the other one of an exchange.
        """

    def make_dir(self, path: Path, mode: int = 0o777) -> None:
        """Create a folder that must not exist yet; its parents may."""
        self.make_dirs(path.parent)
        self.before("make_dir", path)
        path.mkdir(mode)

    def make_dirs(self, path: Path, mode: int = 0o777) -> None:
        """Create a folder and its parents, those that are missing, durably."""
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            self.before("make_dir", folder)
            folder.mkdir(mode, exist_ok=True)
            # A folder that may be entered but not listed can't be flushed by us.
            with suppress(PermissionError):
                self.flush_dir(folder.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and flush it."""
        self.before("create", path)
        with open_parent(path) as folder:
            self._write(folder, path, data)

    def _write(self, folder: OpenFolder, path: Path, data: bytes) -> None:
        descriptor = folder.open(path.name, _NEW)
        try:
            self.before("write", path)
            # Where the disk is nearly full, a write takes what there is room for and says so only
            # in its result; the next one fails.
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            self.before("flush_file", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_source(self, path: Path, source: Source) -> FileDigest:
        """Write a new file of any size and flush it; return what was written."""
        self.before("create", path)
        with open_parent(path) as folder:
            descriptor = folder.open(path.name, _NEW)
        try:
            self.before("write", path)
            checksum = write_source(descriptor, source)
            self.before("flush_file", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return FileDigest(source.size, checksum)

    def write_stream(self, path: Path, writer: Callable[[IO[bytes]], object]) -> FileDigest:
        """Let somebody write to a new file, and flush it; return what was written."""
        self.before("create", path)
        with open_parent(path) as folder:
            descriptor = folder.open(path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with open(descriptor, "wb") as stream:  # noqa: PTH123 - it is open
            self.before("write", path)
            writer(stream)
            stream.flush()
            self.before("flush_file", path)
            os.fsync(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
            return _digest(descriptor)

    def write_by(self, path: Path, writer: Callable[[Path], object]) -> FileDigest:
        """Let somebody write a new file in a folder of the user's, by its path, and flush it."""
        self.before("create", path)
        self.before("write", path)
        writer(path)
        return self.seal(path)

    def seal(self, path: Path) -> FileDigest:
        """Flush a file that somebody else has written; return what is in it.

        Raises:
            NotRegularError: It is a link, a pipe, a device: what is no file can't be kept in one.
        """
        self.before("flush_file", path)
        with open_parent(path) as folder:
            return self._seal(folder, path.name)

    def seal_tree(self, path: Path, known: Collection[str]) -> dict[str, FileDigest]:
        """Flush what somebody else has written into a folder, and the folders in it.

        Args:
            path: The folder, which is one of ours.
            known: The files that have been flushed, by relative name.

        Returns:
            What is in the others, by relative name.

        Raises:
            NotRegularError: There is something that is neither file nor folder.
        """
        found: dict[str, FileDigest] = {}
        with OpenFolder(path) as folder:
            self._seal_below(folder, "", known, found)
        return found

    def _seal_below(
        self, folder: OpenFolder, above: str, known: Collection[str], found: dict[str, FileDigest]
    ) -> None:
        # Each is open while what is in it is looked at.
        if above.count("/") > MOST_FOLDERS:
            raise too_deep(folder.path)
        for entry, is_folder in folder.entries():
            name = above + entry
            if is_folder:
                with folder.below(entry) as inner:
                    self._seal_below(inner, f"{name}/", known, found)
                    self.before("flush_dir", folder.path / entry)
                    inner.flush()
            elif name not in known:
                self.before("flush_file", folder.path / entry)
                try:
                    found[name] = self._seal(folder, entry)
                except NotRegularError as error:
                    error.filename = name
                    raise

    def _seal(self, folder: OpenFolder, name: str) -> FileDigest:
        descriptor = folder.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            return _digest(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, path: Path) -> int:
        """Return how much may still be written to the filesystem of a folder."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def replace(self, path: Path, data: bytes) -> None:
        """Give a file new content in one step, durably: readers see the old or the new."""
        beside = path.with_name(f".{path.name}.new")
        with open_parent(path) as folder:
            self.before("remove_file", beside)
            folder.remove(beside.name)
            self.before("create", beside)
            self._write(folder, beside, data)
            self.before("rename", beside, path)
            folder.rename(beside.name, path.name)
            self.before("flush_dir", path.parent)
            folder.flush()

    def link(self, existing: Path, path: Path) -> None:
        """Make a file that shares its bytes with an existing one."""
        self.before("link", existing, path)
        with open_parent(existing) as there, open_parent(path) as here:
            os.link(
                existing.name,
                path.name,
                src_dir_fd=there.descriptor,
                dst_dir_fd=here.descriptor,
                follow_symlinks=False,
            )

    def flush_dir(self, path: Path) -> None:
        """Flush the entries of a folder: a new name is durable only then."""
        self.before("flush_dir", path)
        with OpenFolder(path, follow=True) as folder:
            folder.flush()

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder its new name in one step; the name must be free."""
        # rename(2) would replace an empty folder silently.
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists already")
        self.before("rename", source, target)
        try:
            source.rename(target)
        except OSError as error:
            # Another process took the name just now; Linux says "not empty".
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(f"{target} exists already") from error
            raise

    def exchange(self, one: Path, other: Path) -> bool:
        """Let two folders swap their names in one step; return False where the system can't."""
        self.before("exchange", one, other)
        return exchange(one, other)

    def remove_file(self, path: Path) -> None:
        """Remove a file, a link (not what it points to), or nothing if another was faster."""
        self.before("remove_file", path)
        with suppress(FileNotFoundError), open_parent(path) as folder:
            folder.remove(path.name)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it, following no link, whatever comes in between.

        Raises:
            OSError: Something can't be removed; it and the folders above it stay.
        """
        with suppress(FileNotFoundError), OpenFolder(path.parent, follow=True) as above:
            self._remove_tree(path, above.descriptor, 0)

    def _remove_tree(self, path: Path, above: int, depth: int) -> None:
        if depth > MOST_FOLDERS:
            raise too_deep(path)
        try:
            folder = enter(path.name, dir_fd=above)
        except FileNotFoundError:
            return
        except NotRegularError:
            # Also what came in place of a folder since it was listed.
            self._remove_file(path, above)
            return
        try:
            with os.scandir(folder) as found:
                entries = [(path / each.name, each.is_dir(follow_symlinks=False)) for each in found]
            for entry, is_folder in entries:
                if is_folder:
                    self._remove_tree(entry, folder, depth + 1)
                else:
                    self._remove_file(entry, folder)
        finally:
            os.close(folder)
        self.before("remove_dir", path)
        with suppress(FileNotFoundError):
            os.rmdir(path.name, dir_fd=above)

    def _remove_file(self, path: Path, above: int) -> None:
        self.before("remove_file", path)
        with suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=above)


def digest(path: Path) -> FileDigest:
    """Return size and hash of a file.

    XXH3 finds damage at the speed of memory; it doesn't protect against a forger.

    Raises:
        NotRegularError: It is a link, a pipe, a device.
        OSError: It can't be read.
    """
    with open_parent(path) as folder:
        descriptor = folder.open(path.name, os.O_RDONLY)
    try:
        return _digest(descriptor)
    finally:
        os.close(descriptor)


def _digest(descriptor: int) -> FileDigest:
    hasher = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    while count := os.readv(descriptor, [buffer]):
        hasher.update(buffer[:count])
        size += count
        moved(count)
    return FileDigest(size, hasher.hexdigest())


def digest_bytes(data: bytes) -> FileDigest:
    """Return size and hash of bytes, as `digest` does of a file that holds them."""
    return FileDigest(len(data), xxhash.xxh3_128_hexdigest(data))
