"""Files of a checkpoint that are in a store and not here.

The folder of a run may be the local mirror of one in an object store. Its checkpoints have their
small files here, and the large ones only when they were wanted. What a checkpoint has in the store
stands in a record beside the checkpoints, `.remote/<name>.json`: size and tag of each file, and
which `CKPT.yaml` it was written for. A checkpoint without a record that fits is all here, as every
one is in a folder that is no mirror.

Who reads a file calls `fetch` first; how it is brought is told by whoever knows stores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lightning_sbckpt._io.inside import PRIVATE_FILE, OpenFolder
from lightning_sbckpt._io.open_regular import read_regular

RECORDS_NAME = ".remote"
_META_NAME = "CKPT.yaml"
_MAX_BYTES = 64 * 2**20


class Stored(NamedTuple):
    """A file in the store: its size, and what changes when its content does, if that is known."""

    size: int
    tag: str = ""


Fetcher = Callable[[Path, Collection[str]], object]

_fetchers: list[tuple[Fetcher, Callable[[Path], bool]]] = []


def fetch_by(fetcher: Fetcher, serves: Callable[[Path], bool]) -> None:
    """Say how files are brought.

    Args:
        fetcher: Called with a checkpoint folder and the names of files.
        serves: Returns whether anything can be brought to a checkpoint folder.
    """
    _fetchers[:] = [(fetcher, serves)]


def file_mode(root: str | Path) -> int:
    """Return with what mode a file is made directly in a run folder, before the umask.

    A mirror holds what asks for credentials elsewhere; its files are for their owner alone.
    """
    return PRIVATE_FILE if os.path.lexists(os.path.join(root, RECORDS_NAME)) else 0o666  # noqa: PTH118


def record_path(folder: Path) -> Path:
    """Return where it is noted what a checkpoint has in the store."""
    return Path(_record_path(folder))


def _record_path(folder: str | Path) -> str:
    # Asked of thousands of checkpoints that have none, where to make paths takes longer than to look.
    root, name = os.path.split(folder)
    return f"{root or os.curdir}{os.sep}{RECORDS_NAME}{os.sep}{name}.json"


def identity(folder: str | Path) -> list[int] | None:
    """Return what tells the `CKPT.yaml` of a folder from that of another one of its name."""
    try:
        found = os.lstat(f"{folder}{os.sep}{_META_NAME}")
    except OSError:
        return None
    return [found.st_ino, found.st_mtime_ns]


def dump_record(of: list[int] | None, files: Mapping[str, Stored]) -> bytes:
    """Return the bytes of a record."""
    return json.dumps({"of": of, "files": files}).encode()


def stored_files(folder: str | Path) -> dict[str, Stored]:
    """Return what a checkpoint has in the store, by name; nothing for one that is not there."""
    try:
        # A record that leads elsewhere, or anything else that somebody put there, is none.
        record = json.loads(read_regular(_record_path(folder), _MAX_BYTES))
        if record["of"] != identity(folder):
            return {}
        return {
            str(name): Stored(int(size), str(tag))
            for name, (size, tag) in record["files"].items()
            if not _leads_out(name)
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _leads_out(name: str) -> bool:
    return "\0" in name or any(part in ("", ".", "..") for part in name.split("/"))


def remote_files(folder: Path) -> dict[str, int]:
    """Return the size of each file that a checkpoint has in the store and not here."""
    stored = stored_files(folder)
    return {name: file.size for name, file in stored.items() if not os.path.lexists(folder / name)}


def fetch(folder: Path, names: Collection[str] | None = None) -> None:
    """Make sure that files of a checkpoint are here; at once where they are.

    Args:
        folder: The checkpoint.
        names: Only these files, and what is in folders of these names; by default all.
    """
    wanted = [
        name
        for name in remote_files(folder)
        if names is None or name in names or name.partition("/")[0] in names
    ]
    for fetch, _ in _fetchers if wanted else ():
        fetch(folder, wanted)


def bring_file(path: Path, *beside: Path) -> None:
    """Make sure that a file of a checkpoint is here, and those beside it that it may have."""
    if not path.exists() or (beside and os.path.lexists(path.parent.parent / RECORDS_NAME)):
        fetch(path.parent, [path.name, *(other.name for other in beside)])


def discard(folder: Path, name: str) -> bool:
    """Remove a file that is only a copy of one in the store; return whether it was one."""
    # A record alone, which may have come with the folder, removes nothing.
    if name not in stored_files(folder) or not any(serves(folder) for _, serves in _fetchers):
        return False
    inner, _, last = name.rpartition("/")
    with (
        suppress(FileNotFoundError),
        OpenFolder(folder) as checkpoint,
        checkpoint.below(inner) as place,
    ):
        place.remove(last)
    return True
