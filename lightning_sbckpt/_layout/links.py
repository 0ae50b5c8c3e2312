"""Files that are the same as in the previous checkpoint share its bytes on the disk.

A frozen part of a model need not be written again and again: its new file is a hard link to the
previous one. Each checkpoint stays whole when others are removed, since the bytes go with the last
link. Only a file that this process has written itself, and that nobody has touched since, is linked
to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lightning_sbckpt._io.direct_write import BLOCK, Source
from lightning_sbckpt._io.storage import FileDigest, LocalStorage

# Smaller files are written as fast as they are compared.
_WORTHWHILE = 2**16


@dataclass(frozen=True)
class _Written:
    path: Path
    digest: FileDigest
    identity: tuple[int, int, int]
    looks: object


class Links:
    """The files of the newest checkpoint of this process, to link to.

    Args:
        enabled: Whether to link at all.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._written: dict[str, _Written] = {}
        self._looks: dict[str, object] = {}

    def may_link(self, name: str, source: Source) -> bool:
        """Return whether the file is likely to need no bytes of its own."""
        written = self._written.get(name)
        if not self.enabled or written is None or written.digest.size != source.size:
            return False
        return _looks(source) == written.looks

    def link_if_unchanged(
        self, name: str, source: Source, target: Path, storage: LocalStorage
    ) -> FileDigest | None:
        """Make the file as a link if its content is what was written last, or return None."""
        looks = _looks(source) if self.enabled and source.size >= _WORTHWHILE else None
        self._looks[name] = looks
        written = self._written.get(name)
        if looks is None or written is None or written.looks != looks:
            return None
        if written.digest.size != source.size or _identity(written.path) != written.identity:
            return None
        if _checksum(source) != written.digest.xxh3_128:
            return None
        try:
            storage.link(written.path, target)
        except FileNotFoundError:
            return None  # Removed just now.
        except OSError:
            # A filesystem without hard links, or a file with too many.
            return None
        return written.digest

    def published(self, folder: Path, digests: Mapping[str, FileDigest]) -> None:
        """Remember the files of a checkpoint that is durable now."""
        written = {}
        for name, digest in digests.items():
            identity = _identity(folder / name)
            looks = self._looks.get(name)
            if identity is not None and looks is not None:
                written[name] = _Written(folder / name, digest, identity, looks)
        self._written = written


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _looks(source: Source) -> object:
    """Return what tells most contents apart: the checksum if it is known, else what costs less."""
    return source.checksum or source.sample()


def _checksum(source: Source) -> str:
    if source.checksum is not None:
        return source.checksum
    hasher = xxhash.xxh3_128()
    whole = source.view()
    if whole is not None:
        hasher.update(whole[: source.size])
        return hasher.hexdigest()
    block = memoryview(bytearray(BLOCK))
    for start in range(0, source.size, BLOCK):
        part = block[: min(BLOCK, source.size - start)]
        source.fill(start, part)
        hasher.update(part)
    return hasher.hexdigest()
