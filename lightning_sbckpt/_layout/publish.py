"""Folders: their names, how one is published, listed, removed, and leftovers swept.

A checkpoint is written into a staging folder beside its place and becomes visible by one rename,
or by one exchange with the older one of its name.
Removal is the mirror: one rename makes it no checkpoint, then its files go. So every folder whose
name starts with `CKPT` is whole, at every instant; what a dying process leaves behind starts with a
dot.

The owner of a staging folder holds an `flock` on it, which the kernel releases when the process
dies: who gets the lock knows that nobody is writing there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from lightning_sbckpt._format.names import MARKED_SUFFIX, PICKLED_SUFFIX
from lightning_sbckpt._io.inside import PRIVATE_FOLDER, open_folder
from lightning_sbckpt._io.records import RECORDS_NAME, stored_files
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.annotations import ANNOTATIONS_NAME, annotated
from lightning_sbckpt.errors import CheckpointNameError, CheckpointNotFoundError, MetaError
from lightning_sbckpt.meta import META_NAME, Checkpoint, ckpt_recency, read_meta

logger = logging.getLogger("lightning_sbckpt")

CKPT_PREFIX = "CKPT"
PARAMFILE_EXT = ".ckpt"
SHARDED_EXT = ".dcp"
"""Ends the name of the folder that stands for a file where every rank has written its own part."""

_STAGING = ".staging+"
_REMOVED = ".removed+"
_REPLACED = ".replaced+"
_ABANDONED_SECONDS = 24 * 3600
_FORBIDDEN = re.compile(r"[\x00-\x1f/\\]")


def check_name(name: object, what: str) -> str:
    """Return `name` if a file or folder of that name stays where it is put.

    Raises:
        CheckpointNameError: It is empty, holds a path separator or a control character, or is one
            of the names with a meaning.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or _FORBIDDEN.search(name):
        raise CheckpointNameError(
            f"{name!r} can't be the name of a {what}: it names a file, so it must be a non-empty "
            "string without path separators and control characters"
        )
    if what == "recoverable" and name.endswith((PICKLED_SUFFIX, MARKED_SUFFIX)):
        raise CheckpointNameError(
            f"{name!r} can't be the name of a recoverable: names that end in {PICKLED_SUFFIX} and "
            f"{MARKED_SUFFIX} are those of the second files of recoverables"
        )
    if what == "recoverable" and name.endswith(SHARDED_EXT):
        raise CheckpointNameError(
            f"{name!r} can't be the name of a recoverable: names that end in {SHARDED_EXT} are "
            "those of folders of sharded states"
        )
    if len(name.encode()) > 200:
        raise CheckpointNameError(
            f"the name of a {what} has {len(name.encode())} bytes, 200 are possible: {name[:40]!r}..."
        )
    return name


def folder_for(
    root: Path,
    name: str | None,
    unixtime: float,
    last: Path | None = None,
    *,
    stem: str | None = None,
    used: Collection[str] = (),
) -> Path:
    """Return where a checkpoint goes: by its own name, by what it is about, or by the time and a number.

    Args:
        root: The folder of all checkpoints.
        name: Its own name, or None.
        unixtime: Its time.
        last: Where the one before it went. It may be gone by now, and its name is not used again:
            who is just reading it must not find another one there.
        stem: What it is about, which others may be, too: a number follows then.
        used: Names that are there, or were when an earlier one was saved.
    """
    if name is not None:
        return root / f"{CKPT_PREFIX}+{check_name(name, 'checkpoint')}"
    if stem is not None:
        folder = root / f"{CKPT_PREFIX}+{check_name(stem, 'checkpoint')}"
        numbers = count(1)
        while folder.name in used:
            folder = root / f"{CKPT_PREFIX}+{stem}+{next(numbers):02d}"
        return folder
    stamp = time.strftime("%Y-%m-%d+%H-%M-%S", time.localtime(unixtime))
    stem, _, used = last.name.rpartition("+") if last is not None else ("", "", "")
    again = stem == f"{CKPT_PREFIX}+{stamp}" and used.isdecimal()
    number = int(used) + 1 if again else 0
    while (folder := root / f"{CKPT_PREFIX}+{stamp}+{number:02d}").exists():
        number += 1
    return folder


@contextmanager
def staging(root: Path, storage: LocalStorage) -> Iterator[Path]:
    """Give a folder to write a checkpoint into; it is removed unless it is published meanwhile."""
    folder = root / f"{_STAGING}{uuid.uuid4().hex}"
    # A mirror holds what asks for credentials elsewhere.
    mode = (PRIVATE_FOLDER,) if os.path.lexists(root / RECORDS_NAME) else ()
    storage.make_dir(folder, *mode)
    descriptor = open_folder(folder)
    try:
        with suppress(OSError):  # A filesystem without locks: the age decides, see `sweep`.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BaseException:
        # What made the save fail is what the caller must see; the rest is swept at the next start.
        with suppress(OSError):
            storage.remove_tree(folder)
        raise
    finally:
        os.close(descriptor)


def publish(staged: Path, target: Path, storage: LocalStorage, *, replace: bool) -> Path | None:
    """Make a staged folder visible under its name, durably.

    Args:
        staged: The folder, complete and with its files flushed.
        target: Where it goes.
        storage: The disk.
        replace: An older checkpoint of that name goes; otherwise the name must be free.

    Returns:
        Where the files of the older checkpoint are now, which may be removed; None if there is none
        or it has to wait for the next start.

    Raises:
        FileExistsError: The name is taken.
        OSError: It could not be done; what was visible before is visible again.
    """
    storage.flush_dir(staged)
    if replace and target.exists():
        return _publish_in_place_of(target, staged, storage)
    try:
        storage.rename(staged, target)
        storage.flush_dir(target.parent)
    except BaseException:
        with suppress(OSError):
            if not staged.exists():
                storage.rename(target, staged)
        raise
    return None


def _publish_in_place_of(target: Path, staged: Path, storage: LocalStorage) -> Path | None:
    new = staged.stat()
    # Where two names can't be swapped, the older one is set aside and not removed: should we die
    # before the next line, `sweep` brings it back.
    aside = target.with_name(f"{_REPLACED}{uuid.uuid4().hex}+{target.name}")
    try:
        if not storage.exchange(staged, target):
            storage.rename(target, aside)
            storage.rename(staged, target)
        storage.flush_dir(target.parent)
    except BaseException:
        with suppress(OSError):
            if target.exists() and os.path.samestat(target.stat(), new):
                if staged.exists():
                    storage.exchange(staged, target)
                else:
                    storage.rename(target, staged)
            if aside.exists():
                storage.rename(aside, target)
        raise
    # The new one is durable, so the save did not fail; the rest is swept at the next start.
    with suppress(OSError):
        # Renamed before the first file goes: half of it must never look like what to bring back.
        return _give_up(aside if aside.exists() else staged, name=target.name, storage=storage)
    return None


def unpublish(folder: Path, storage: LocalStorage) -> Path:
    """Make a checkpoint none, durably, and return where its files are now: they may be removed.

    Raises:
        CheckpointNotFoundError: The folder is not a checkpoint; nothing is removed.
    """
    if not is_checkpoint(folder):
        raise CheckpointNotFoundError(
            f"{folder} is not removed: it is no checkpoint (a folder named {CKPT_PREFIX}... with a "
            f"{META_NAME} in it)"
        )
    return _give_up(folder, name=folder.name, storage=storage)


def _give_up(folder: Path, *, name: str, storage: LocalStorage) -> Path:
    removed = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}+{name[:50]}")
    storage.rename(folder, removed)
    # Durable before the files go: else a power cut could bring back the name without its files.
    storage.flush_dir(folder.parent)
    return removed


def sweep(root: Path, storage: LocalStorage) -> None:
    """Clear what processes that died left behind, and bring back what one was replacing."""
    try:
        leftovers = [Path(entry.path) for entry in os.scandir(root) if _is_leftover(entry)]
        if leftovers:
            # Who died may not have come to it: no file goes before the names that say it may.
            storage.flush_dir(root)
    except OSError:
        return
    # Of two that were set aside under one name the newer is brought back.
    leftovers.sort(key=_time_of, reverse=True)
    for folder in leftovers:
        try:
            if folder.name.startswith(_REPLACED):
                target = root / folder.name.removeprefix(_REPLACED).partition("+")[2]
                if not target.exists():
                    storage.rename(folder, target)
                    storage.flush_dir(root)
                    logger.info("brought back %s, whose replacement was interrupted", target)
                    continue
            if folder.name.startswith(_STAGING) and not _is_abandoned(folder):
                continue
            storage.remove_tree(folder)
            logger.info("cleared %s, left by an interrupted process", folder)
        except OSError as error:
            logger.debug("left %s where it is: %s", folder, error)


def _time_of(folder: Path) -> float:
    try:
        return ckpt_recency(Checkpoint(folder, read_meta(folder / META_NAME), {}))
    except (MetaError, OSError):
        return float("-inf")


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    ours = entry.name.startswith((_STAGING, _REMOVED, _REPLACED))
    return ours and entry.is_dir(follow_symlinks=False)


def _is_abandoned(folder: Path) -> bool:
    descriptor = open_folder(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # No locks here, so nobody can tell: leave it until no save can still be running.
        return time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS
    finally:
        os.close(descriptor)
    return True


def is_checkpoint(folder: Path) -> bool:
    """Return whether a path is a checkpoint folder (not a link to one)."""
    return (
        folder.name.startswith(CKPT_PREFIX)
        and not folder.is_symlink()
        and folder.is_dir()
        and _has_meta(folder)
    )


def _has_meta(folder: str | Path) -> bool:
    try:
        # A link is none of ours: it may lead out of the folder.
        return stat.S_ISREG(os.lstat(f"{folder}/{META_NAME}").st_mode)
    except OSError:
        return False


def folder_names(root: Path) -> list[str]:
    """Return the names of the folders in `root` that may be checkpoints, sorted.

    Whether there is meta in them is not looked at.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith(CKPT_PREFIX) and entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return []


def is_replacing(root: Path) -> bool:
    """Return whether a checkpoint was set aside to make room for one of the same name.

    So it is for a moment, or until the next start if the process that did it has died.
    """
    try:
        return any(name.startswith(_REPLACED) for name in os.listdir(root))
    except OSError:
        return False


def list_folders(root: Path) -> list[Path]:
    """Return the checkpoint folders in `root`, by name; a missing `root` has none."""
    return [root / name for name in folder_names(root) if _has_meta(root / name)]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the record of a checkpoint folder.

    Raises:
        CheckpointNotFoundError: There is no checkpoint there.
        MetaError: Its meta can't be read.
    """
    meta, names = read_folder(folder)
    return Checkpoint(folder, meta, paramfiles(folder, names))


def paramfiles(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the paths of recoverables by their names, as `read_folder` gives them."""
    return {
        name.removesuffix(SHARDED_EXT): folder
        / (name if name.endswith(SHARDED_EXT) else f"{name}{PARAMFILE_EXT}")
        for name in names
    }


def read_folder(
    folder: str | Path, *, is_all_here: bool = False
) -> tuple[dict[str, object], list[str]]:
    """Return the meta of a checkpoint folder, annotations over it, and its recoverables' names.

    A name that ends in `SHARDED_EXT` is that of a folder of a sharded state.

    Args:
        folder: The checkpoint.
        is_all_here: Nothing of it is in a store alone, as is known of every folder without records
            of what is; else its record is looked for.

    Raises:
        CheckpointNotFoundError: There is no checkpoint there.
        MetaError: Its meta can't be read.
    """
    try:
        # Opened once, and no Path made: there are thousands of checkpoints.
        descriptor = open_folder(folder)
        try:
            meta = read_meta(f"{folder}{os.sep}{META_NAME}", descriptor)
            present = set(os.listdir(descriptor))
        finally:
            os.close(descriptor)
        elsewhere = () if is_all_here else stored_files(folder)
        present |= {name.partition("/")[0] for name in elsewhere}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(
            f"{folder} is not a checkpoint: it has no readable {META_NAME}"
        ) from error
    except OSError as error:
        problem = error.strerror or error
        raise MetaError(f"{folder}{os.sep}{META_NAME} can't be read: {problem}") from error
    if ANNOTATIONS_NAME in present:
        meta = annotated(Path(folder), meta)
    # The second file of a recoverable lies beside the first, and is none itself.
    second = (PICKLED_SUFFIX + PARAMFILE_EXT, MARKED_SUFFIX + PARAMFILE_EXT)
    return meta, [
        name.removesuffix(PARAMFILE_EXT)
        for name in sorted(present)
        if name.endswith((PARAMFILE_EXT, SHARDED_EXT)) and not name.endswith(second)
    ]
