"""The files below a URL on a remote store: one at a time read, written, brought here, hashed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import xxhash

from lightning_sbckpt._io.inside import PRIVATE_FILE, OpenFolder
from lightning_sbckpt._io.progress import Told
from lightning_sbckpt._io.storage import FileDigest
from lightning_sbckpt._remote.listing import RemoteFile
from lightning_sbckpt._remote.retries import Retries, clean, patiently, said
from lightning_sbckpt._remote.stores import Store
from lightning_sbckpt._remote.streams import put_whole, read_blocks
from lightning_sbckpt._remote.urls import normal_url
from lightning_sbckpt.errors import CheckpointNotFoundError, RemoteError

T = TypeVar("T")

_SMALL = 16 * 2**20


class RemoteFiles:
    """The files below one URL, each named by the folder that it is in and its path there.

    They may be used from several threads, and after a fork. Every operation tries again what failed
    for a reason that passes, and raises `RemoteError` when that did not help.

    Args:
        url: As `s3://bucket/run`.
        retries: How often and how long.
        storage_options: For fsspec's filesystem, beyond what its configuration says.

    Raises:
        ConfigurationError: It is no URL, or one with a password in it.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        retries: Retries | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.url = normal_url(url)
        self.retries = retries or Retries()
        self.options = dict(storage_options or {})
        self._store = Store(self.url, self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def read(self, name: str, file: str, most: int = _SMALL) -> bytes:
        """Return the bytes of a small file of a checkpoint, or with no name, of the run's folder.

        Raises:
            CheckpointNotFoundError: It isn't there.
            RemoteError: It can't be read, or has more than `most` bytes.
        """
        doing = f"read {self._shown(name, file)}"

        def get() -> bytes:
            with self._store.use() as filesystem:
                path = self._store.path(name, file)
                # No range of an empty file can be asked for.
                size: int = filesystem.info(path)["size"]
                if size > most:
                    raise RemoteError(f"can't {doing}: it has {size:,} bytes, more than {most:,}")
                data: bytes = filesystem.cat_file(path)
            return data

        return self._try(get, doing)

    def write(self, name: str, file: str, data: bytes) -> None:
        """Put one small file in one step: a reader sees the old or the new; names as in `read`.

        Raises:
            RemoteError: It can't be put.
        """
        path = self._store.path(name, file)
        self._try(lambda: put_whole(self._store, path, data), f"write {self._shown(name, file)}")

    def fetch(self, name: str, file: str, target: Path, told: Told | None = None) -> None:
        """Bring one file to a place that the user chose, see `fetch_into`."""
        with OpenFolder(target.parent, follow=True) as place:
            self.fetch_into(place, target.name, name, file, told)

    def fetch_into(
        self, place: OpenFolder, into: str, name: str, file: str, told: Told | None = None
    ) -> None:
        """Bring one file here, durably and for this user alone; it is there when it is whole.

        Args:
            place: The folder where it is to be.
            into: Its name there; a link of that name is replaced, and not followed.
            name: The checkpoint's.
            file: The file's in it.
            told: Is told how many bytes more have come.

        Raises:
            CheckpointNotFoundError: It isn't there, or was removed meanwhile.
            RemoteError: It can't be read, or was replaced meanwhile.
            OSError: It can't be written here.
        """
        beside = f"{into}.part"
        place.remove(beside)  # Of a process that was killed.
        try:
            descriptor = place.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
            with os.fdopen(descriptor, "wb", buffering=0) as stream:
                for block in self._blocks(name, file, "fetch"):
                    left = memoryview(block)
                    while left:
                        left = left[stream.write(left) :]
                    if told is not None:
                        told(len(block))
                os.fsync(stream.fileno())
            place.rename(beside, into)
        except BaseException:
            place.remove(beside)
            raise
        place.flush()

    def digest(self, name: str, file: str, told: Told | None = None) -> FileDigest:
        """Return size and checksum of a file, read in full and kept nowhere; arguments as in `fetch_into`.

        Raises:
            CheckpointNotFoundError: It isn't there, or was removed meanwhile.
            RemoteError: It can't be read, or was replaced meanwhile.
        """
        hasher = xxhash.xxh3_128()
        size = 0
        for block in self._blocks(name, file, "read"):
            hasher.update(block)
            size += len(block)
            if told is not None:
                told(len(block))
        return FileDigest(size, hasher.hexdigest())

    def _blocks(self, name: str, file: str, verb: str) -> Iterator[bytes]:
        """Give the bytes of a file, all of one version of it."""
        doing = f"{verb} {self._shown(name, file)}"
        try:
            before = self._info(name, file, doing)
            path = self._store.path(name, file)
            yield from read_blocks(self._store, path, before.size, self.retries, doing)
            after = self._info(name, file, doing)
        except FileNotFoundError as error:
            raise self._not_there(doing, error) from clean(error)
        if after.tag != before.tag:
            raise RemoteError(
                f"can't {doing}: it was replaced by another while it was read. Read it again"
            )

    def _info(self, name: str, file: str, doing: str) -> RemoteFile:
        def look() -> RemoteFile:
            with self._store.use() as filesystem:
                return RemoteFile.of(filesystem.info(self._store.path(name, file)))

        return patiently(look, self.retries, doing)

    def _shown(self, *parts: str) -> str:
        return "/".join([self.url, *filter(None, parts)])

    def _try(self, work: Callable[[], T], doing: str) -> T:
        try:
            return patiently(work, self.retries, doing)
        except FileNotFoundError as error:
            raise self._not_there(doing, error) from clean(error)

    def _not_there(self, doing: str, error: FileNotFoundError) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(
            f"can't {doing}: it is not there, or was removed meanwhile ({said(error)})"
        )
