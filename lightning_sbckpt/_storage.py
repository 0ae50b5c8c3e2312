"""Bytes on the local disk: the operations that change it, each flushed by name.

Every change that this package makes to a checkpoint folder goes through a `LocalStorage`, so that
one place decides how to flush and a test can let any single operation fail. (Save hooks write their
own file; it is flushed here right after.)
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class FileDigest:
    """The size of a file in bytes and its XXH3 128-bit hash in hexadecimal."""

    size: int
    xxh3_128: str


class LocalStorage:
    """The local filesystem."""

    def make_dir(self, path: Path) -> None:
        """Create a folder that must not exist yet; its parents may."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and flush it."""
        with path.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def flush_file(self, path: Path) -> None:
        """Flush a file that a hook has written."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def flush_dir(self, path: Path) -> None:
        """Flush the entries of a folder: a new name is durable only then."""
        self.flush_file(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder its new name in one step; the name must be free."""
        # rename(2) would replace an empty folder silently.
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        try:
            source.rename(target)
        except OSError as error:
            # Another process took the name just now; Linux says "not empty".
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(f"{target} exists already") from error
            raise

    def remove_file(self, path: Path) -> None:
        """Remove a file, a link (not what it points to), or nothing if another was faster."""
        path.unlink(missing_ok=True)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty folder, or nothing if another was faster."""
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
    return FileDigest(size, hasher.hexdigest())


def digest_bytes(data: bytes) -> FileDigest:
    """Return size and hash of bytes, as `digest` does of a file that holds them."""
    return FileDigest(len(data), xxhash.xxh3_128_hexdigest(data))
