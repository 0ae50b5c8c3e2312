"""Keeping the checkpoints of a folder: which go, and which process may let them go."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TypedDict, TypeVar

from lightning_sbckpt._disk.storage import LocalStorage
from lightning_sbckpt._finding.loading import identity_of_folder
from lightning_sbckpt._folder.annotations import annotations_held
from lightning_sbckpt._folder.links import Links
from lightning_sbckpt._folder.lock import FolderLock
from lightning_sbckpt._folder.manifest import MANIFEST_NAME, find_damage
from lightning_sbckpt._folder.sizes import checkpoint_bytes
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.uploading import Uploads
from lightning_sbckpt._saving.saver import SavePolicy, Saver
from lightning_sbckpt._saving.workshop import Workshop
from lightning_sbckpt._world import decided_by_main
from lightning_sbckpt.annotator import Annotator
from lightning_sbckpt.errors import CheckpointNotFoundError, ConfigurationError, RemovalError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention import Decision, plan_retention, rules_from_keys
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey, RetentionRule, World

__all__ = ["Curator"]

C = TypeVar("C", bound="Curator")

logger = logging.getLogger("lightning_sbckpt")


class FolderOptions(TypedDict, total=False):
    """The keyword arguments of `Curator`, for a class that hands them down as it gets them."""

    world: World | None
    policy: SavePolicy | None
    link_unchanged: bool
    access: str
    storage: LocalStorage | None
    local_dir: str | Path | None
    storage_options: Mapping[str, object] | None


class Curator(Annotator):
    """Deletes, pins and annotates the checkpoints of a folder.

    Args:
        checkpoints_dir: The folder of all checkpoints, or the URL of one in a store.
        world: The ranks that act together; by default those of `torch.distributed`.
        policy: How saves go on, for the `Checkpointer`.
        link_unchanged: See `Checkpointer`.
        access: See `Checkpointer`.
        storage: How the disk is changed.
        local_dir: See `Checkpointer`.
        storage_options: See `Checkpointer`.

    Attributes:
        access: Whether others may write, or this one may.
        saver: What writes and removes.

    Raises:
        ConfigurationError: `access` is none of those known.

    Example:
        >>> import tempfile
        >>> Curator(tempfile.mkdtemp()).delete_checkpoints()
        []
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        *,
        world: World | None = None,
        policy: SavePolicy | None = None,
        link_unchanged: bool = True,
        access: str = "exclusive",
        storage: LocalStorage | None = None,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(
            checkpoints_dir,
            world=world,
            access=access,
            storage=storage,
            local_dir=local_dir,
            storage_options=storage_options,
        )
        self._link_unchanged = link_unchanged
        self.saver = Saver(self._workshop(), policy or SavePolicy())
        self._set_up_uploads()

    def _workshop(self) -> Workshop:
        root = self.checkpoints_dir
        workshop = Workshop(root, self._storage, Links(enabled=self._link_unchanged))
        self._history = workshop.history
        self._lock = workshop.right = FolderLock(root, shared=self.access == "shared")
        return workshop

    def _set_up_uploads(self) -> None:
        self._looked_at: dict[Path, dict[str, tuple[int, int, int] | None]] = {}
        self._uploads: Uploads | None = None
        self.saver.then_upload = None
        if self._mirror is not None:
            self._uploads = Uploads(self._mirror, alone=self.access == "exclusive")
            self.saver.then_upload = self._uploads.ship

    def _move_to(self, place: tuple[Path, Mirror | None]) -> None:
        # What was begun belongs to the folder before, and so does the retention that follows it.
        self.wait()
        self._lock.release()
        super()._move_to(place)
        self.saver.move_to(self._workshop())
        self._set_up_uploads()

    def claim(self) -> None:
        """Make sure that nobody else writes to the folder; every save does so by itself.

        Raises:
            FolderInUseError: Another process writes to it.
            SaveError: The folder is open for reading only.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> Checkpointer(tempfile.mkdtemp()).claim()
        """
        self._require_writable()
        decided_by_main(self.world, self._claim_here)

    def _claim_here(self) -> None:
        self._make_folder(self.checkpoints_dir)
        self._lock.acquire()
        if self._uploads is not None:
            self._uploads.begin()

    def _make_folder(self, folder: Path) -> None:
        try:
            self._storage.make_dirs(folder)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints_dir {folder} can't be made a folder: {error.strerror or error}"
            ) from error

    def wait(self) -> None:
        """Return when everything handed to the background is done: saved durably, and removed.

        Raises:
            SaveError: What went wrong there, with its traceback; not with `on_save_error="warn"`.

        Example:
            >>> import tempfile, torch
            >>> from lightning_sbckpt import Checkpointer
            >>> model = torch.nn.Linear(1, 1)
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"m": model}, save_mode="async")
            >>> checkpointer.save_checkpoint(name="a")
            >>> checkpointer.wait()
            >>> [ckpt.path.name for ckpt in checkpointer.list_checkpoints()]
            ['CKPT+a']
        """
        self.saver.wait(self.world)
        self.saver.wait_for_removals()

    def close(self) -> None:
        """Wait, and let other processes write to the folder; the next save takes it back.

        Raises:
            SaveError: See `wait`.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:  # closes it at the end
            ...     _ = checkpointer.save_checkpoint()
        """
        try:
            self.wait()
        finally:
            self.release()

    def release(self) -> None:
        """Let other processes write to the folder; the next save takes it back.

        A `Checkpointer` that nobody has any more lets them, too, and so does the end of the process.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> Checkpointer(tempfile.mkdtemp()).release()
        """
        self._lock.release()

    def __enter__(self: C) -> C:  # noqa: PYI019 - Self is not in Python 3.10's typing
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # What ended the block is what the caller must see; this was logged when it happened.
            if error is None:
                raise

    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Sequence[str] | None = None,
        max_keys: Sequence[str] | None = None,
        importance_keys: Sequence[ImportanceKey] = (ckpt_recency,),
        ckpt_predicate: CheckpointPredicate | str | None = None,
        verbosity: int = logging.INFO,
        dry_run: bool = False,
    ) -> list[Decision]:
        """Delete the checkpoints that no key asks to keep.

        Args:
            num_to_keep: How many to keep by each key; 0 deletes all that a key considers.
            min_keys: Keys in the meta whose lowest values are kept.
            max_keys: Keys in the meta whose highest values are kept.
            importance_keys: Functions of a checkpoint whose highest results are kept; by default
                the newest are.
            ckpt_predicate: Only checkpoints for which it is true may be deleted.
            verbosity: The level of the log lines.
            dry_run: Delete nothing; return what would be done.

        Returns:
            What was done with each checkpoint, and why.

        Raises:
            SelectionError: `num_to_keep` is negative.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for name in "ab":
            ...     _ = checkpointer.save_checkpoint(name=name)
            >>> for decision in checkpointer.delete_checkpoints(dry_run=True):
            ...     print(decision)
            keep   CKPT+b: among the newest 1
            remove CKPT+a: older than the newest 1
        """
        rules = rules_from_keys(
            num_to_keep=num_to_keep,
            min_keys=min_keys or (),
            max_keys=max_keys or (),
            importance_keys=importance_keys,
        )
        return self.apply_retention(
            rules, ckpt_predicate=ckpt_predicate, verbosity=verbosity, dry_run=dry_run
        )

    def apply_retention(
        self,
        rules: Sequence[RetentionRule],
        *,
        ckpt_predicate: CheckpointPredicate | str | None = None,
        protected: Iterable[tuple[Checkpoint, str]] = (),
        verbosity: int = logging.INFO,
        dry_run: bool = False,
    ) -> list[Decision]:
        """Delete the checkpoints that some rule considers and none keeps.

        Args:
            rules: The reasons to keep checkpoints, see `lightning_sbckpt.retention`.
            ckpt_predicate: Only checkpoints for which it is true may be deleted.
            protected: Checkpoints that stay whatever the rules say, each with the reason.
            verbosity: The level of the log lines.
            dry_run: Delete nothing; return what would be done.

        Returns:
            What was done with each checkpoint, and why.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> from lightning_sbckpt.retention import Newest
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for _ in range(3):
            ...     _ = checkpointer.save_checkpoint()
            >>> [decision.keep for decision in checkpointer.apply_retention([Newest(2)])]
            [True, True, False]
        """
        self.wait()
        # The others wait: until the folder is as it will be, no rank may save or look.
        return decided_by_main(
            self.world,
            lambda: self.prune_here(
                rules,
                ckpt_predicate=ckpt_predicate,
                protected=protected,
                verbosity=verbosity,
                dry_run=dry_run,
            ),
        )

    def prune_here(
        self,
        rules: Sequence[RetentionRule],
        *,
        ckpt_predicate: CheckpointPredicate | str | None = None,
        protected: Iterable[tuple[Checkpoint, str]] = (),
        verbosity: int = logging.INFO,
        dry_run: bool = False,
    ) -> list[Decision]:
        """Do what `apply_retention` does, without the other ranks and without waiting for saves.

        For the `then` of `save_checkpoint`, which runs on rank zero alone.

        Args:
            rules: See `apply_retention`.
            ckpt_predicate: See `apply_retention`.
            protected: See `apply_retention`.
            verbosity: See `apply_retention`.
            dry_run: See `apply_retention`.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> Checkpointer(tempfile.mkdtemp()).prune_here([])
            []
        """
        predicate = as_predicate(ckpt_predicate)
        may_remove = not dry_run and self.access != "read"
        if may_remove:
            self._history.kept_by(rules, predicate)
        plan = self._sound_plan(rules, predicate, list(protected))
        if dry_run or all(decision.keep for decision in plan):
            return plan
        self._require_writable()
        self._lock.acquire()
        plan = [each if each.keep else self._remove(each, verbosity) for each in plan]
        if self._uploads is not None:
            self._uploads.push_history()
        return plan

    def _sound_plan(
        self,
        rules: Sequence[RetentionRule],
        predicate: CheckpointPredicate | None,
        protected: Sequence[tuple[Checkpoint, str]],
    ) -> list[Decision]:
        """Plan so that only what can be recovered from counts as kept."""
        try:
            there = self.list_checkpoints()
        except OSError as error:
            raise RemovalError(
                f"{self.checkpoints_dir} can't be listed, so nothing was removed: "
                f"{error.strerror or error}"
            ) from error
        damaged: dict[Path, str] = {}
        while True:
            plan = plan_retention(
                there,
                rules,
                predicate=predicate,
                protected=protected,
                damaged=damaged,
                bytes_of=checkpoint_bytes,
            )
            if all(decision.keep for decision in plan):
                return plan
            kept = (each.checkpoint.path for each in plan if each.keep)
            found = {path: self._visible_damage(path) for path in kept if path not in damaged}
            new = {path: problem for path, problem in found.items() if problem}
            if not new:
                return plan
            damaged |= new

    def _visible_damage(self, folder: Path) -> str:
        """Return what is wrong with a checkpoint as far as it is known, or seen without reading it."""
        if folder in self._damage_found:
            identity, problem = self._damage_found[folder]
            if identity == identity_of_folder(folder):
                return problem
        # What is kept is looked at before each removal: its manifest is read once.
        known = self._looked_at.get(folder)
        if known is None or known != {name: _seen(folder / name) for name in known}:
            if problems := find_damage(folder, ()):
                return "; ".join(problems)
            names = [MANIFEST_NAME, *(path.name for path in folder.iterdir())]
            self._looked_at[folder] = {name: _seen(folder / name) for name in names}
        return ""

    def _remove(self, decision: Decision, verbosity: int) -> Decision:
        """Remove a checkpoint, unless it was pinned since this was decided; return what was done."""
        path = decision.checkpoint.path
        try:
            with annotations_held(path) as found:
                pinned = found is not None and found.pinned
                if pinned and not decision.checkpoint.meta.get("pinned"):
                    return Decision(decision.checkpoint, True, f"pinned meanwhile: {pinned}")
                # First in the store: what is there is the checkpoint, and what is here a copy.
                with nullcontext() if self._mirror is None else self._mirror.removing(path.name):
                    self.saver.remove(path)
        except CheckpointNotFoundError:
            return decision  # Another process was faster.
        self._looked_at.pop(path, None)
        self._history.removed(path.name, decision.reason)
        logger.log(verbosity, "removed %s: %s", path, decision.reason)
        return decision


def _seen(path: Path) -> tuple[int, int, int] | None:
    """Return by what a file is known to be the one that was looked at."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
