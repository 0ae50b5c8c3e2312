"""Uploading what was saved to a mirror, and what is left to be uploaded from before.

A checkpoint is uploaded when it is durable here. One that can't be stays here and goes up with the
next one, or at the next start, the oldest first. At most the two newest of such wait: the disk here
may be small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightning_sbckpt._format.yaml import MAX_META_BYTES
from lightning_sbckpt._io.inside import OpenFolder
from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.progress import announced
from lightning_sbckpt._io.records import RECORDS_NAME, discard, stored_files
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.annotations import ANNOTATIONS_NAME
from lightning_sbckpt._layout.history import HISTORY_NAME, MAX_BYTES
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt._layout.publish import (
    CKPT_PREFIX,
    folder_names,
    is_checkpoint,
    list_folders,
    read_folder,
    unpublish,
)
from lightning_sbckpt._remote.folder import RemoteFile
from lightning_sbckpt._remote.mirror import Mirror, is_small, local_files
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError, SaveError
from lightning_sbckpt.meta import usable_time

logger = logging.getLogger("lightning_sbckpt")

_MOST_WAITING = 2
# Smaller files are uploaded as fast as they are copied over there.
_WORTH_COPYING = 2**16


class Uploads:
    """What a process that saves does with the store.

    Args:
        mirror: Where it saves to.
        alone: Whether no other process saves there: what waits is then ours to upload.
    """

    def __init__(self, mirror: Mirror, *, alone: bool = True) -> None:
        self._mirror = mirror
        self._alone = alone
        self._storage = LocalStorage()
        self._newest: Path | None = None
        self._left: list[Path] = []
        self._begun = False

    def begin(self) -> None:
        """Clear what uploads that died left in the store, and upload what waits.

        What can't be done now is said, and left for the next save.
        """
        if self._begun:
            return
        self._begun = True
        self._mirror.make()
        if not self._alone:
            return
        there = sorted(list_folders(self._mirror.root), key=_time_of)
        self._left = [folder for folder in there if not stored_files(folder)]
        try:
            self._mirror.remote.sweep()
            self._upload_left()
        except OSError as error:
            logger.warning("what waits to be uploaded goes up with the next save: %s", error)
        for folder in there[:-1]:
            self._remove_copies(folder)
        self._newest = there[-1] if there else None
        forget_gone(self._mirror.root)

    def ship(self, folder: Path) -> None:
        """Upload a checkpoint, and before it those that wait.

        Raises:
            SaveError: It could not be uploaded; it is here, and waits.
        """
        older = {*self._left, self._newest} - {folder, None}
        # One that was saved again under its name, or was pruned, does not wait any more.
        self._left = [each for each in self._left if each != folder and is_checkpoint(each)]
        self._left.append(folder)
        try:
            self._upload_left()
        except OSError as error:  # A RemoteError is one.
            self._give_up_old()
            raise SaveError(
                f"{folder.name} could not be uploaded to {self._mirror.url}, and nothing of it is "
                f"visible there; earlier checkpoints are whole. {error}. It stays in {folder} and is "
                "uploaded with the next save, or at the next start"
            ) from error
        for each in older:
            if each is not None:
                self._remove_copies(each)
        self.push_history()

    def push_history(self) -> None:
        """Upload what has happened; nothing rests on it."""
        try:
            data = read_regular(self._mirror.root / HISTORY_NAME, MAX_BYTES)
            self._mirror.remote.write("", HISTORY_NAME, data)
        except OSError as error:
            logger.debug("the history of %s was not uploaded: %s", self._mirror.url, error)

    def _upload_left(self) -> None:
        while self._left:
            self._upload(self._left[0])
            del self._left[0]

    def _upload(self, folder: Path) -> None:
        started = time.perf_counter()
        # What is said of it while it goes up is not part of what went.
        said, sizes = said_of(folder), local_files(folder)
        copies = self._unchanged(folder)
        sent = sum(size for name, size in sizes.items() if name not in copies)
        with announced(f"uploading {folder.name}", sent) as told:
            self._mirror.remote.publish(folder, folder.name, progress=told, copies=copies)
        self._mirror.note(folder, {name: RemoteFile(size, "") for name, size in sizes.items()})
        if said_of(folder) != said:
            self._mirror.push_annotations(folder)
        seconds = time.perf_counter() - started
        where = f"{self._mirror.url}/{folder.name}"
        megabytes = sum(sizes.values()) / 1e6
        logger.info("uploaded %s: %.1f MB in %.2f s", where, megabytes, seconds)

    def _unchanged(self, folder: Path) -> Mapping[str, str]:
        """Return which files the store has already, in the checkpoint uploaded last, and its name."""
        last = self._newest
        self._newest = folder
        if last is None or last == folder or not stored_files(last):
            return {}
        try:
            mine, before = read_manifest(folder), read_manifest(last)
        except (MetaError, OSError):
            return {}
        if mine is None or before is None:
            return {}
        return {
            name: last.name
            for name, digest in mine.files.items()
            if digest.size >= _WORTH_COPYING and before.files.get(name) == digest
        }

    def _give_up_old(self) -> None:
        for folder in self._left[:-_MOST_WAITING]:
            with suppress(CheckpointNotFoundError, OSError):
                self._storage.remove_tree(unpublish(folder, self._storage))
                logger.warning(
                    "dropped %s, which could not be uploaded: newer ones wait for %s, and at most "
                    "%d are kept here meanwhile",
                    folder,
                    self._mirror.url,
                    _MOST_WAITING,
                )
        self._left = self._left[-_MOST_WAITING:]

    def _remove_copies(self, folder: Path) -> None:
        """Remove files that are only copies; who has one mapped keeps it."""
        with suppress(OSError):
            stored = stored_files(folder)
            for name in local_files(folder):
                if name in stored and not is_small(name, stored[name].size):
                    discard(folder, name)


def said_of(folder: Path) -> bytes:
    """Return what is said of a checkpoint, as it stands in its folder."""
    try:
        return read_regular(folder / ANNOTATIONS_NAME, MAX_META_BYTES)
    except FileNotFoundError:
        return b""


def forget_gone(root: Path) -> None:
    """Remove what is noted of checkpoints that are gone."""
    names = set(folder_names(root))
    with suppress(FileNotFoundError), OpenFolder(root / RECORDS_NAME) as records:
        for name, _ in records.entries():
            if name.startswith(CKPT_PREFIX) and Path(name).stem not in names:
                records.remove(name)


def _time_of(folder: Path) -> float:
    try:
        return usable_time(read_folder(folder)[0].get("unixtime"))
    except (CheckpointNotFoundError, MetaError):
        return float("-inf")
