"""Bytes on the local disk: the operations that change it, each flushed by name.

Every change that this package makes to a checkpoint folder goes through a `LocalStorage`, so that
one place decides how to flush, and a test can count the operations and let any single one fail or
be the last. (Save hooks of users write their own file; it is flushed here right after.)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from lightning_sbckpt._disk.blocks import Source, write_source
from lightning_sbckpt._disk.exchange import exchange
from lightning_sbckpt._disk.progress import moved

_CHUNK = 2**18

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

    def make_dir(self, path: Path) -> None:
        """Create a folder that must not exist yet; its parents may."""
        self.make_dirs(path.parent)
        self.before("make_dir", path)
        path.mkdir()

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
        with path.open("xb", buffering=0) as stream:
            self.before("write", path)
            # Where the disk is nearly full, a write takes what there is room for and says so only
            # in its result; the next one fails.
            left = memoryview(data)
            while left:
                left = left[stream.write(left) :]
            self.before("flush_file", path)
            os.fsync(stream.fileno())

    def write_source(self, path: Path, source: Source) -> FileDigest:
        """Write a new file of any size and flush it; return what was written."""
        self.before("create", path)
        path.touch(exist_ok=False)
        self.before("write", path)
        checksum = write_source(path, source)
        self.before("flush_file", path)
        _fsync(path)
        return FileDigest(source.size, checksum)

    def write_by(self, path: Path, writer: Callable[[Path], object]) -> FileDigest:
        """Let somebody write a new file, and flush it; return what was written."""
        self.before("create", path)
        self.before("write", path)
        writer(path)
        self.before("flush_file", path)
        _fsync(path)
        return digest(path)

    def free_bytes(self, path: Path) -> int:
        """Return how much may still be written to the filesystem of a folder."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def replace(self, path: Path, data: bytes) -> None:
        """Give a file new content in one step, durably: readers see the old or the new."""
        beside = path.with_name(f".{path.name}.new")
        self.remove_file(beside)
        self.write(beside, data)
        self.before("rename", beside, path)
        beside.replace(path)
        self.flush_dir(path.parent)

    def link(self, existing: Path, path: Path) -> None:
        """Make a file that shares its bytes with an existing one."""
        self.before("link", existing, path)
        os.link(existing, path, follow_symlinks=False)

    def flush_file(self, path: Path) -> None:
        """Flush a file that a hook has written."""
        self.before("flush_file", path)
        _fsync(path)

    def flush_dir(self, path: Path) -> None:
        """Flush the entries of a folder: a new name is durable only then."""
        self.before("flush_dir", path)
        _fsync(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder its new name in one step; the name must be free."""
        # rename(2) would replace an empty folder silently.
        if target.exists():
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
        path.unlink(missing_ok=True)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty folder, or nothing if another was faster."""
        self.before("remove_dir", path)
        with suppress(FileNotFoundError):
            path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it, following no link."""
        if path.is_symlink():
            self.remove_file(path)
            return
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                self.remove_tree(path / entry.name)
            else:
                self.remove_file(path / entry.name)
        self.remove_dir(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> FileDigest:
    """Return size and hash of a file.

    XXH3 finds damage at the speed of memory; it doesn't protect against a forger.
    """
    hasher = xxhash.xxh3_128()
    size = 0
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(_CHUNK))
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
            moved(count)
    return FileDigest(size, hasher.hexdigest())


def digest_bytes(data: bytes) -> FileDigest:
    """Return size and hash of bytes, as `digest` does of a file that holds them."""
    return FileDigest(len(data), xxhash.xxh3_128_hexdigest(data))
