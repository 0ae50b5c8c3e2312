"""`Checkpointer`: saves, finds, loads and prunes the checkpoints of a folder.

It has the methods and parameters of SpeechBrain's `speechbrain.utils.checkpoints.Checkpointer`,
whose scripts run with the import changed, and adds keyword-only ones. What it promises beyond it:
a checkpoint is visible only when it is whole and on the disk; a damaged one is stepped over; no
pickle is executed that the user did not trust.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lightning_sbckpt._catalog import Catalog
from lightning_sbckpt._layout import check_name, read_checkpoint, remove, sweep
from lightning_sbckpt._loading import LoadOptions, first_sound, load_into, require_sound
from lightning_sbckpt._saving import SaveJob, save_jobs, write_checkpoint
from lightning_sbckpt._storage import LocalStorage
from lightning_sbckpt._world import current_world, decided_by_main
from lightning_sbckpt.errors import CheckpointNotFoundError, ConfigurationError, MetaError
from lightning_sbckpt.hooks import HookRegistry, check_signature, default_registry
from lightning_sbckpt.meta import Checkpoint, ckpt_recency, plain_meta
from lightning_sbckpt.retention import Decision, plan_retention, rules_from_keys
from lightning_sbckpt.selection import importance, rank_checkpoints
from lightning_sbckpt.typing import (
    CheckpointPredicate,
    ImportanceKey,
    LoadHook,
    RetentionRule,
    SaveHook,
    World,
)

__all__ = ["Checkpointer"]

logger = logging.getLogger("lightning_sbckpt")

# The smallest step that a double still tells apart at today's count of seconds, generously.
_TICK = 1e-5


class Checkpointer:
    """Saves named objects together and brings them back.

    Args:
        checkpoints_dir: The folder of all checkpoints; made if it is missing.
        recoverables: From names to the objects to save and load. More come by `add_recoverable`.
        custom_load_hooks: From names to `hook(obj, path, end_of_epoch)`, before any by type.
        custom_save_hooks: From names to `hook(obj, path)`, before any by type.
        allow_partial_load: Load what a checkpoint has, and leave the other recoverables alone.
        registry: The hooks by type.
        world: The ranks that save and load together; by default those of `torch.distributed`.
        trust_pickle: Read state that only pickle can hold. It can run any code that the author of
            the checkpoint chose.
        save_mode: `"sync"`: a checkpoint is on the disk when `save_checkpoint` returns.
        storage: How the disk is changed; another one is for tests.

    Raises:
        ConfigurationError: The folder can't be used.
        CheckpointNameError: A name would not stay inside a checkpoint folder.
        HookSignatureError: A custom hook can't be called.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(1, 1)
        >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": model})
        >>> checkpointer.recover_if_possible()
        >>> for loss in (0.5, 0.25, 0.75):
        ...     checkpointer.save_and_keep_only(meta={"loss": loss}, min_keys=["loss"])
        >>> sorted(ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints())
        [0.25, 0.75]
        >>> checkpointer.recover_if_possible(min_key="loss").meta["loss"]
        0.25
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        recoverables: Mapping[str, object] | None = None,
        custom_load_hooks: Mapping[str, LoadHook] | None = None,
        custom_save_hooks: Mapping[str, SaveHook] | None = None,
        allow_partial_load: bool = False,
        *,
        registry: HookRegistry = default_registry,
        world: World | None = None,
        trust_pickle: bool = False,
        save_mode: str = "sync",
        storage: LocalStorage | None = None,
    ) -> None:
        if save_mode != "sync":
            raise ConfigurationError(
                f"save_mode is {save_mode!r}, this release knows 'sync' only: a checkpoint is on "
                "the disk when save_checkpoint returns"
            )
        # A Path has lost one of the slashes.
        if re.match(r"[A-Za-z][\w+.-]+:/", str(checkpoints_dir)):
            raise ConfigurationError(
                f"checkpoints_dir is {str(checkpoints_dir)!r}: this release saves to local folders "
                "only; save to one and copy its checkpoint folders where they should go"
            )
        self.checkpoints_dir = Path(checkpoints_dir)
        self.recoverables: dict[str, object] = {}
        self.optional_recoverables: dict[str, bool] = {}
        self.custom_load_hooks: dict[str, LoadHook] = {}
        self.custom_save_hooks: dict[str, SaveHook] = {}
        self.allow_partial_load = allow_partial_load
        self.registry = registry
        self.trust_pickle = trust_pickle
        self.lineage: dict[str, object] = {}
        self._world = world
        self._storage = storage or LocalStorage()
        self._catalog = Catalog(self.checkpoints_dir)
        self._newest_saved = 0.0
        for name, load_hook in (custom_load_hooks or {}).items():
            self._set_hook("load", name, load_hook)
        for name, save_hook in (custom_save_hooks or {}).items():
            self._set_hook("save", name, save_hook)
        if recoverables is not None:
            self.add_recoverables(recoverables)
        try:
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints_dir {self.checkpoints_dir} can't be made a folder: "
                f"{error.strerror or error}"
            ) from error
        if self.world.rank == 0:
            sweep(self.checkpoints_dir, self._storage)

    @property
    def world(self) -> World:
        """The ranks that save and load together, as they are now.

        Example:
            >>> import tempfile
            >>> Checkpointer(tempfile.mkdtemp()).world.size
            1
        """
        # Asked for anew each time: a process group may be set up after the checkpointer.
        return self._world or current_world()

    # ------------------------------------------------------------------ what is saved

    def add_recoverable(
        self,
        name: str,
        obj: object,
        custom_load_hook: LoadHook | None = None,
        custom_save_hook: SaveHook | None = None,
        optional_load: bool = False,
    ) -> None:
        """Add an object to save and load.

        Args:
            name: Unique; it names the object's file. A name used before is replaced.
            obj: The object.
            custom_load_hook: `hook(obj, path, end_of_epoch)` for this object.
            custom_save_hook: `hook(obj, path)` for this object.
            optional_load: A checkpoint without this object is loaded with a warning.

        Raises:
            CheckpointNameError: The name would not stay inside a checkpoint folder.
            HookSignatureError: A hook can't be called.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> checkpointer.add_recoverable("model", torch.nn.Linear(1, 1))
            >>> sorted(checkpointer.save_checkpoint().paramfiles)
            ['model']
        """
        check_name(name, "recoverable")
        if custom_load_hook is not None:
            self._set_hook("load", name, custom_load_hook)
        if custom_save_hook is not None:
            self._set_hook("save", name, custom_save_hook)
        self.recoverables[name] = obj
        self.optional_recoverables[name] = optional_load

    def add_recoverables(self, recoverables: Mapping[str, object]) -> None:
        """Add several objects.

        Args:
            recoverables: From names to objects.

        Raises:
            AttributeError: Not a mapping.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> checkpointer.add_recoverables({"model": torch.nn.Linear(1, 1)})
            >>> list(checkpointer.recoverables)
            ['model']
        """
        if not isinstance(recoverables, Mapping):
            raise AttributeError(
                "recoverables must be a mapping from names to objects, a dict for example; got "
                f"{recoverables!r}"
            )
        for name, obj in recoverables.items():
            self.add_recoverable(
                name, obj, optional_load=self.optional_recoverables.get(name, False)
            )

    def _set_hook(self, kind: str, name: str, hook: Callable[..., object]) -> None:
        check_signature(kind, hook, repr(name))
        (self.custom_load_hooks if kind == "load" else self.custom_save_hooks)[name] = hook

    # ------------------------------------------------------------------ saving

    def save_checkpoint(
        self,
        meta: Mapping[str, object] | None = None,
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
    ) -> Checkpoint | None:
        """Save every recoverable into a new checkpoint, flushed to the disk when this returns.

        Args:
            meta: Keys to find the checkpoint by later, metrics above all. `unixtime` (seconds
                since the epoch) and `end-of-epoch` are there by themselves.
            end_of_epoch: Whether an epoch has just ended; load hooks are told.
            name: The checkpoint's own name; by default it is named by time. A checkpoint saved
                before under the same name is replaced.
            verbosity: The level of the log line.

        Returns:
            The checkpoint; None on ranks other than zero.

        Raises:
            SaveError: Something could not be written; nothing of this checkpoint is visible.
            HookError: A recoverable has no way to be saved.
            MetaError: YAML can't hold the meta.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
            >>> checkpointer.save_checkpoint({"loss": 0.5}, name="first").path.name
            'CKPT+first'
        """
        if name is not None:
            check_name(name, "checkpoint")
        jobs = self._save_jobs()
        unixtime = self._next_unixtime()
        described = {
            "unixtime": unixtime,
            "end-of-epoch": bool(end_of_epoch),
            **_checked(plain_meta(meta or {})),
        }
        saved = write_checkpoint(
            self.checkpoints_dir,
            jobs,
            meta=described,
            name=name,
            lineage=self.lineage,
            world=self.world,
            storage=self._storage,
            verbosity=verbosity,
        )
        self._newest_saved = max(self._newest_saved, unixtime)
        return saved

    def save_and_keep_only(
        self,
        meta: Mapping[str, object] | None = None,
        end_of_epoch: bool = True,
        name: str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        importance_keys: Sequence[ImportanceKey] = (),
        max_keys: Sequence[str] = (),
        min_keys: Sequence[str] = (),
        ckpt_predicate: CheckpointPredicate | None = None,
        verbosity: int = logging.INFO,
    ) -> None:
        """Save a checkpoint, then delete those that nothing asks to keep.

        Args:
            meta: See `save_checkpoint`.
            end_of_epoch: See `save_checkpoint`.
            name: See `save_checkpoint`.
            num_to_keep: How many to keep by each of the keys.
            keep_recent: Keep the newest `num_to_keep` as well.
            importance_keys: See `delete_checkpoints`.
            max_keys: See `delete_checkpoints`.
            min_keys: See `delete_checkpoints`.
            ckpt_predicate: See `delete_checkpoints`.
            verbosity: The level of the log lines.

        Raises:
            SaveError: See `save_checkpoint`; then nothing is deleted.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
            >>> for loss in (0.1, 0.3, 0.2):
            ...     checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
            >>> sorted(ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints())
            [0.1, 0.2]
        """
        recent = [ckpt_recency] if keep_recent else []
        # Before the save: arguments that can't be meant must not cost one.
        rules = rules_from_keys(
            num_to_keep=num_to_keep,
            min_keys=min_keys,
            max_keys=max_keys,
            importance_keys=[*importance_keys, *recent],
        )
        self.save_checkpoint(meta, end_of_epoch, name, verbosity)
        self.apply_retention(rules, ckpt_predicate=ckpt_predicate, verbosity=verbosity)

    def wait(self) -> None:
        """Return when everything handed to the background is durable.

        Every save is durable when it returns (`save_mode="sync"`), so this returns at once.

        Example:
            >>> import tempfile
            >>> Checkpointer(tempfile.mkdtemp()).wait()
        """

    def _save_jobs(self) -> dict[str, SaveJob]:
        for name in self.recoverables:
            # Again, since the dictionary may be changed directly.
            check_name(name, "recoverable")
        return save_jobs(self.recoverables, self.custom_save_hooks, self.registry)

    def _next_unixtime(self) -> float:
        # A clock that stands still or jumps back must not change the order of checkpoints.
        newest = max(self._catalog.newest_time(), self._newest_saved)
        return max(time.time(), newest + _TICK)

    # ------------------------------------------------------------------ finding

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint of the folder, in the order of their names.

        Unreadable ones are left out, with one warning each.

        Example:
            >>> import tempfile
            >>> Checkpointer(tempfile.mkdtemp()).list_checkpoints()
            []
        """
        return self._catalog.checkpoints()

    def find_checkpoint(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | None = None,
    ) -> Checkpoint | None:
        """Return the best checkpoint, by default the newest, or None if there is none.

        Args:
            importance_key: A function of a checkpoint; the highest result is best.
            max_key: A key in the meta; the highest value is best.
            min_key: A key in the meta; the lowest value is best.
            ckpt_predicate: Only checkpoints for which it is true take part.

        Raises:
            SelectionError: More than one of the three keys was given.

        Example:
            >>> import tempfile
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for loss in (0.5, 0.25, 0.75):
            ...     _ = checkpointer.save_checkpoint({"loss": loss})
            >>> checkpointer.find_checkpoint(min_key="loss").meta["loss"]
            0.25
        """
        found = self.find_checkpoints(importance_key, max_key, min_key, ckpt_predicate, 1)
        return found[0] if found else None

    def find_checkpoints(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | None = None,
        max_num_checkpoints: int | None = None,
    ) -> list[Checkpoint]:
        """Return checkpoints, best first; of equally good ones the newer comes first.

        Args:
            importance_key: See `find_checkpoint`.
            max_key: See `find_checkpoint`.
            min_key: See `find_checkpoint`.
            ckpt_predicate: See `find_checkpoint`.
            max_num_checkpoints: At most so many; None for all.

        Raises:
            SelectionError: More than one of the three keys was given.

        Example:
            >>> import tempfile
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for loss in (0.5, 0.25, 0.75):
            ...     _ = checkpointer.save_checkpoint({"loss": loss})
            >>> found = checkpointer.find_checkpoints(max_key="loss", max_num_checkpoints=2)
            >>> [ckpt.meta["loss"] for ckpt in found]
            [0.75, 0.5]
        """
        criterion = importance(importance_key=importance_key, max_key=max_key, min_key=min_key)
        return rank_checkpoints(
            self.list_checkpoints(), criterion, ckpt_predicate, max_num_checkpoints
        )

    # ------------------------------------------------------------------ loading

    def recover_if_possible(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | None = None,
    ) -> Checkpoint | None:
        """Load the best sound checkpoint, by default the newest; do nothing if there is none.

        Damaged checkpoints are stepped over, with one line each.

        Args:
            importance_key: See `find_checkpoint`.
            max_key: See `find_checkpoint`.
            min_key: See `find_checkpoint`.
            ckpt_predicate: See `find_checkpoint`.

        Returns:
            The checkpoint that was loaded, or None.

        Raises:
            DamagedCheckpointError: There are checkpoints, and every one is damaged.
            MismatchError: The checkpoint lacks a recoverable, or doesn't fit one.

        Example:
            >>> import tempfile, torch
            >>> model = torch.nn.Linear(1, 1)
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": model})
            >>> checkpointer.recover_if_possible() is None
            True
            >>> saved = checkpointer.save_checkpoint()
            >>> checkpointer.recover_if_possible() == saved
            True
        """
        chosen = self.find_sound_checkpoint(importance_key, max_key, min_key, ckpt_predicate)
        if chosen is None:
            logger.info("no checkpoint to recover from in %s yet", self.checkpoints_dir)
        else:
            self._load(chosen)
        return chosen

    def find_sound_checkpoint(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | None = None,
    ) -> Checkpoint | None:
        """Return the best checkpoint whose files are those that were written, or None.

        Unlike `find_checkpoint` this reads the files that would be loaded. Rank zero looks and
        tells the others.

        Args:
            importance_key: See `find_checkpoint`.
            max_key: See `find_checkpoint`.
            min_key: See `find_checkpoint`.
            ckpt_predicate: See `find_checkpoint`.

        Raises:
            DamagedCheckpointError: There are candidates, and every one is damaged.

        Example:
            >>> import tempfile
            >>> Checkpointer(tempfile.mkdtemp()).find_sound_checkpoint() is None
            True
        """
        return decided_by_main(
            self.world,
            lambda: first_sound(
                self.find_checkpoints(importance_key, max_key, min_key, ckpt_predicate),
                self.recoverables,
                self._catalog.unreadable,
                self.checkpoints_dir,
            ),
        )

    def load_checkpoint(self, checkpoint: Checkpoint | str | Path) -> None:
        """Load a checkpoint into the recoverables.

        Args:
            checkpoint: The checkpoint, or its folder.

        Raises:
            CheckpointNotFoundError: The folder is no checkpoint.
            DamagedCheckpointError: A file is not the one that was written; nothing is loaded.
            MismatchError: The checkpoint lacks recoverables (all are named, nothing is loaded), or
                a state doesn't fit its object.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
            >>> checkpointer.load_checkpoint(checkpointer.save_checkpoint())
        """
        if not isinstance(checkpoint, tuple):
            checkpoint = read_checkpoint(Path(checkpoint))
        require_sound(checkpoint, self.recoverables)
        self._load(checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        options = LoadOptions(
            self.custom_load_hooks,
            self.registry,
            self.optional_recoverables,
            self.allow_partial_load,
            self.trust_pickle,
        )
        load_into(self.recoverables, checkpoint, options)

    # ------------------------------------------------------------------ deleting

    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Sequence[str] | None = None,
        max_keys: Sequence[str] | None = None,
        importance_keys: Sequence[ImportanceKey] = (ckpt_recency,),
        ckpt_predicate: CheckpointPredicate | None = None,
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
        ckpt_predicate: CheckpointPredicate | None = None,
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
            >>> from lightning_sbckpt.retention import Newest
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for _ in range(3):
            ...     _ = checkpointer.save_checkpoint()
            >>> [decision.keep for decision in checkpointer.apply_retention([Newest(2)])]
            [True, True, False]
        """

        def prune() -> list[Decision]:
            plan = plan_retention(
                self.list_checkpoints(), rules, predicate=ckpt_predicate, protected=protected
            )
            for decision in plan if not dry_run else ():
                if not decision.keep:
                    self._remove(decision, verbosity)
            return plan

        # The others wait: until the folder is as it will be, no rank may save or look.
        return decided_by_main(self.world, prune)

    def _remove(self, decision: Decision, verbosity: int) -> None:
        path = decision.checkpoint.path
        try:
            remove(path, self._storage)
        except CheckpointNotFoundError:
            return  # Another process was faster.
        logger.log(verbosity, "removed %s: %s", path, decision.reason)


def _checked(meta: dict[str, object]) -> dict[str, object]:
    """Return meta given by a user, whose values for the two keys of ours must be usable."""
    unixtime = meta.get("unixtime", 0.0)
    usable = isinstance(unixtime, (int, float)) and math.isfinite(unixtime)
    if not usable or not isinstance(meta.get("end-of-epoch", True), bool):
        raise MetaError(
            "meta sets a key that every checkpoint has: 'unixtime' must be a finite number of "
            f"seconds and 'end-of-epoch' true or false, got {unixtime!r} and "
            f"{meta.get('end-of-epoch', True)!r}. Choose other keys, or leave these out"
        )
    return meta
