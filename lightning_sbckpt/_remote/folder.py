"""A folder of checkpoints on a remote store: what is there, and how one comes and goes.

Object stores have no rename. A checkpoint is there for every reader when its `CKPT.yaml` is, so
that is put last, after all others were found to have arrived; and a removal takes it away first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Event

from lightning_sbckpt._io.inside import OpenFolder, is_ours
from lightning_sbckpt._io.progress import Told
from lightning_sbckpt._layout.publish import CKPT_PREFIX
from lightning_sbckpt._remote.files import RemoteFiles
from lightning_sbckpt._remote.listing import (
    RemoteFile,
    absent,
    list_files,
    unusable_files,
    unusable_folder,
)
from lightning_sbckpt._remote.retries import Retries, patiently, said
from lightning_sbckpt._remote.streams import Sender, give_up_parts, in_parallel, is_on_its_way
from lightning_sbckpt.errors import CheckpointNotFoundError, RemoteError
from lightning_sbckpt.meta import META_NAME

__all__ = ["RemoteFile", "RemoteFolder", "Retries"]

logger = logging.getLogger("lightning_sbckpt")

_LONGEST_SHOWN = 100
_DAY = 24 * 3600.0
# For tidying up after a failure: the store that just failed is not waited for again.
_ONCE = Retries(attempts=1)


class RemoteFolder(RemoteFiles):
    """The checkpoints below one URL; made from what `RemoteFiles` are made from.

    Attributes:
        answered: Whether the store has been listed with these options.
    """

    answered = False

    @cached_property
    def _left_out(self) -> set[str]:
        return set()

    def check(self) -> None:
        """Find out whether the folder can be listed; it need not exist, its bucket must.

        Raises:
            MissingDependencyError: The library for the scheme is not installed.
            ConfigurationError: The scheme is unknown.
            RemoteError: It can't be reached, may not be listed, or there is no such bucket.
        """

        def look() -> None:
            with self._store.use() as filesystem:
                filesystem.ls(self._store.path(), detail=False)

        try:
            patiently(look, self.retries, f"list {self.url}")
        except FileNotFoundError as error:
            absent(self._store, error)
        self.answered = True

    def listing(self) -> dict[str, dict[str, RemoteFile]]:
        """Return the checkpoints that are there, with their files by the name inside each.

        A folder counts if its name starts with `CKPT` and it has a `CKPT.yaml`. A folder that does
        not exist yet has none. What can't be a folder or a file here is left out, and said once.

        Raises:
            RemoteError: It can't be listed; what is there is unknown then, and not nothing.
        """
        found = {}
        for name, files in self._folders().items():
            if META_NAME not in files:
                continue
            reason = unusable_folder(name)
            if reason is not None:
                self.leave_out(name, reason)
                continue
            unusable = unusable_files(files)
            for file, why in unusable.items():
                self.leave_out(f"{name}/{file}", why)
            found[name] = {
                file: of
                for file, of in files.items()
                if file not in unusable and not is_on_its_way(file)
            }
        return found

    def leave_out(self, name: str, reason: str) -> None:
        """Say, once, that something of the store can't be here."""
        if name not in self._left_out:
            self._left_out.add(name)
            shown = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
            logger.warning(
                "left out %r in %s, which can't be on this disk: %s", shown, self.url, reason
            )

    def publish(
        self,
        local: Path,
        name: str,
        *,
        progress: Told | None = None,
        skip: Collection[str] = (),
        copies: Mapping[str, str] | None = None,
    ) -> None:
        """Put a checkpoint there from a local folder, in place of one of that name.

        Args:
            local: The folder. Its `CKPT.yaml` is put when all else is there.
            name: The checkpoint's.
            progress: Is told how many bytes more have arrived, by several threads; fewer, if they have
                to be sent again.
            skip: Files of the folder that stay here.
            copies: Files that another checkpoint there has with the same content, and its name; the
                store copies them itself if it can.

        Raises:
            RemoteError: It can't be put. Nothing of it is visible; what had arrived was removed as
                far as the store still answered, and is swept later otherwise.
            OSError: A local file can't be read, or is no regular file.
        """
        with OpenFolder(local, follow=not is_ours(local)) as folder:
            # What is neither file nor folder fails when it is read.
            there = {name: found.st_size for name, found in folder.files()}
        files = sorted(set(there) - set(skip))
        if META_NAME not in files:
            raise CheckpointNotFoundError(
                f"{local} is not uploaded to {self.url}: it is no checkpoint, since it has no "
                f"{META_NAME}"
            )
        # What is there of that name: the one that is replaced, or what a dying upload left.
        self._clear(name, self.retries)
        sender = Sender(self._store, self.retries, progress)
        sizes: dict[str, int] = {}

        def put(file: str) -> None:
            if copies and file in copies and self._copied(name, file, copies[file]):
                sizes[file] = there[file]
                return
            path = self._store.path(name, file)
            sizes[file] = sender.put(local, file, path, f"upload {self._shown(name, file)}")

        files.remove(META_NAME)
        try:
            in_parallel(put, files, sender.stop)
            self._compare(name, sizes)
        except BaseException:
            self._tidy(name)
            raise
        # If the answer to this is lost, the file may still come to be: the others must stay then,
        # since it would be a checkpoint without them.
        put(META_NAME)

    def remove(self, name: str) -> None:
        """Remove a checkpoint: it stops being one at once, then its files go.

        Raises:
            CheckpointNotFoundError: There is none.
            RemoteError: It can't be removed.
        """
        if META_NAME not in self._files(name, self.retries):
            raise CheckpointNotFoundError(
                f"{self._shown(name)} can't be removed: there is no checkpoint of that name"
            )
        self._clear(name, self.retries)

    def sweep(self, older_than_seconds: float = _DAY) -> list[str]:
        """Remove what uploads and removals that died have left; return the names.

        That is every folder without a `CKPT.yaml` whose youngest file is older than that. A younger
        one may be an upload of another process.

        Raises:
            RemoteError: The store can't be reached.
        """
        before = time.time() - older_than_seconds
        swept = []
        for name, files in self._folders().items():
            times = [found.modified for found in files.values()]
            # A store that doesn't say how old something is keeps it.
            if META_NAME in files or not all(at is not None and at < before for at in times):
                continue
            self._clear(name, self.retries)
            logger.info(f"removed {self._shown(name)}: an upload or a removal that did not end")
            swept.append(name)
        give_up_parts(self._store, before)
        return swept

    def _copied(self, name: str, file: str, other: str) -> bool:
        """Let the store copy a file from another checkpoint; return whether it did."""
        if not self._store.of_objects:
            return False
        try:
            with self._store.use() as filesystem:
                filesystem.cp_file(self._store.path(other, file), self._store.path(name, file))
        except Exception as error:
            logger.debug(f"{self._shown(other, file)} is uploaded, not copied: {said(error)}")
            return False
        return True

    def _folders(self) -> dict[str, dict[str, RemoteFile]]:
        found: dict[str, dict[str, RemoteFile]] = {}
        there = list_files(self._store, self.retries)
        self.answered = True
        for path, file in there.items():
            name, _, inner = path.partition("/")
            if inner and name.startswith(CKPT_PREFIX):
                found.setdefault(name, {})[inner] = file
        return found

    def _files(self, name: str, retries: Retries) -> dict[str, RemoteFile]:
        return list_files(self._store, retries, name)

    def _compare(self, name: str, sizes: Mapping[str, int]) -> None:
        """Find out whether all that was sent has arrived, by one listing."""
        there = {file: found.size for file, found in self._files(name, self.retries).items()}
        wrong = [
            f"{file} has {there.get(file, 'no')} bytes, expected {size}"
            for file, size in sizes.items()
            if there.get(file) != size
        ]
        if wrong:
            raise RemoteError(
                f"{self._shown(name)} did not arrive as it was sent: {'; '.join(wrong[:5])}. Another "
                "process may be writing there: give every run a URL of its own"
            )

    def _tidy(self, name: str) -> None:
        try:
            self._clear(name, _ONCE)
        except Exception as error:
            logger.info(f"left the files of an upload that failed for a later sweep: {said(error)}")

    def _clear(self, name: str, retries: Retries) -> None:
        """Remove all that is there of a checkpoint, its `CKPT.yaml` first."""
        files = sorted(self._files(name, retries))
        doing = f"remove {self._shown(name)}"

        def remove(file: str) -> None:
            def once() -> None:
                with self._store.use() as filesystem:
                    filesystem.rm_file(self._store.path(name, file))

            with suppress(FileNotFoundError):
                patiently(once, retries, doing)

        if META_NAME in files:
            remove(META_NAME)
            files.remove(META_NAME)
        in_parallel(remove, files, Event())
        self._remove_folders(name, files)

    def _remove_folders(self, name: str, files: Collection[str]) -> None:
        """Remove the folders that are empty now, on stores that have folders."""
        if self._store.of_objects:
            return
        inner = {file.rpartition("/")[0] for file in files if "/" in file}
        deepest_first = sorted(inner, key=lambda folder: -folder.count("/"))
        for folder in [*(f"{name}/{folder}" for folder in deepest_first), name]:
            with suppress(Exception), self._store.use() as filesystem:
                filesystem.rmdir(self._store.path(folder))
