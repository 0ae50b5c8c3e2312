"""The index of a folder of many checkpoints: what their meta said, for the next process.

The file `.index.json` in the root is only a cache. What it says of a checkpoint counts while the
folder and its `CKPT.yaml` are the very ones that were read (inode, times, size); otherwise, and
whenever the file is torn, foreign or of another format, the folders are read. So it may be
removed at any time, and losing it costs one slow listing. That is why it is written here directly
and not through a `LocalStorage`: nothing rests on it, it is not flushed, and a folder that can't be
written to has none.

It is plain JSON, for machines: a line with format and checksum, and a line with all the rest.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import struct
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.records import file_mode
from lightning_sbckpt._io.storage import digest_bytes

logger = logging.getLogger("lightning_sbckpt")

INDEX_NAME = ".index.json"
FORMAT_VERSION = 1
_MAX_BYTES = 64 * 2**20

# Numbers of a fixed width in hexadecimal are read many times faster than in JSON's own way.
_IDENTITY = struct.Struct("<7q")

# What one checkpoint may add. A few lines of meta can name one large text a thousand times.
_MAX_ENTRY_WEIGHT = 16_384

Identity = tuple[int, int, int, int, int, int, int]
"""Inode, mtime and ctime of a checkpoint folder; the same and the size of its `CKPT.yaml`."""


class Entry(NamedTuple):
    """What is known of one checkpoint folder."""

    identity: Identity
    meta: dict[str, object]
    names: list[str]  # of the recoverables


class Kind:
    """What the index says of checkpoints that have recoverables and keys in common.

    Args:
        names: The names of the recoverables.
        columns: From the keys of the meta to the values, one for each checkpoint.
    """

    def __init__(self, names: list[str], columns: Mapping[str, list[object]]) -> None:
        self.names = names
        self.columns = columns

    def meta(self, place: int) -> dict[str, object]:
        """Return the meta of one checkpoint."""
        return {key: column[place] for key, column in self.columns.items()}


Row = tuple[tuple[object, ...], Kind, int]
"""The identity of one checkpoint when it was read, its kind and its place there."""


def read_index(root: Path) -> dict[str, Row]:
    """Return what the index says by names of folders; nothing where there is none to trust.

    A row counts only if its identity is that of the folder now.
    """
    try:
        data = read_regular(Path(os.path.realpath(root), INDEX_NAME), _MAX_BYTES)
        first, _, body = data.partition(b"\n")
        if json.loads(first[:1000]) == _header(body):
            rows: dict[str, Row] = {}
            for kind in json.loads(body):
                rows.update(_rows_of(*kind))
            return rows
        logger.debug("left out the index of %s: it is not as it was written", root)
    except FileNotFoundError:
        pass
    # Whoever can write to the root can write anything here; it is ignored, whatever it leads to.
    except (OSError, ValueError, TypeError, struct.error, RecursionError, MemoryError) as error:
        logger.debug("left out the index of %s: %s", root, error)
    return {}


def _rows_of(
    names: object, keys: object, folders: object, identities: str, columns: object
) -> dict[str, Row]:
    of = _words(folders)
    lists = _lists(columns, len(of))
    kind = Kind(_names(names), dict(zip(_words(keys), lists, strict=True)))
    tuples = _IDENTITY.iter_unpack(bytes.fromhex(identities))
    rows = zip(tuples, repeat(kind, len(of)), range(len(of)), strict=True)
    return dict(zip(of, rows, strict=True))


def write_index(root: Path, entries: Mapping[str, Entry]) -> bool:
    """Write the index whole beside the old one and put it in its place; return whether it is done.

    It isn't where the folder can't be written to, or another process is at it.
    """
    try:
        # Most checkpoints have the same recoverables and keys, which are therefore said once.
        kinds: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, Entry]] = {}
        for folder, entry in entries.items():
            if _is_plain(entry):
                kind = tuple(entry.names), tuple(entry.meta)
                kinds.setdefault(kind, {})[folder] = entry
        parts = [
            [
                names,
                keys,
                list(members),
                b"".join(_IDENTITY.pack(*entry.identity) for entry in members.values()).hex(),
                [[entry.meta[key] for entry in members.values()] for key in keys],
            ]
            for (names, keys), members in kinds.items()
        ]
        body = json.dumps(parts, separators=(",", ":")).encode()
        data = json.dumps(_header(body)).encode() + b"\n" + body
        return len(data) <= _MAX_BYTES and _replace(root / INDEX_NAME, data)
    except (OSError, ValueError, struct.error) as error:
        logger.debug("wrote no index of %s: %s", root, error)
        return False


def _header(body: bytes) -> dict[str, object]:
    return {
        "what": "a cache of lightning-sbckpt; it may be removed",
        "format": FORMAT_VERSION,
        "xxh3-128": digest_bytes(body).xxh3_128,
    }


def _replace(path: Path, data: bytes) -> bool:
    beside = path.with_name(f"{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(beside, flags, file_mode(path.parent))
    try:
        # Who has the lock is the only one that writes; a file left by a process that died is taken.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        # Renamed by its writer between our open and our lock: it is the index now.
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_nlink != 1
            or not os.path.samestat(found, os.lstat(beside))
        ):
            return False
        os.ftruncate(descriptor, 0)
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(data)
        beside.replace(path)
    finally:
        os.close(descriptor)
    return True


def _names(given: object) -> list[str]:
    names = _words(given)
    # They become paths: none may lead out of its folder.
    if any("/" in name or "\0" in name for name in names):
        raise ValueError("it holds a name that is no name of a file")
    return names


def _lists(given: object, length: int) -> list[list[object]]:
    if not isinstance(given, list) or not all(
        isinstance(part, list) and len(part) == length for part in given
    ):
        raise TypeError("it is not made of lists of one length")
    return given


def _words(given: object) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise TypeError("it is not made of words")
    return given


def _is_plain(entry: Entry) -> bool:
    """Return whether JSON gives back what is in the meta, and not too much of it."""
    weight = 0
    for key, value in entry.meta.items():
        if type(key) is not str:
            return False
        parts = value if type(value) is list else (value,)
        weight += len(key) + len(parts)
        for part in parts:
            if type(part) is str:
                weight += len(part)
            elif type(part) is int:
                weight += part.bit_length()
            elif type(part) not in (float, bool, type(None)):
                return False
        if weight > _MAX_ENTRY_WEIGHT:
            return False
    return True
