"""`Checkpointer`: saves, finds, loads and prunes the checkpoints of a folder.

It has the methods and parameters of SpeechBrain's `speechbrain.utils.checkpoints.Checkpointer`,
whose scripts run with the import changed, and adds keyword-only ones. What it promises beyond it:
a checkpoint is visible only when it is whole and on the disk; a damaged one is stepped over; no
pickle is executed that the user did not trust.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lightning_sbckpt._disk.storage import LocalStorage
from lightning_sbckpt._finding.loading import LoadOptions, load_into, require_sound
from lightning_sbckpt._folder.layout import check_name, is_checkpoint, read_checkpoint, sweep
from lightning_sbckpt._saving.jobs import SaveJob, save_jobs
from lightning_sbckpt._saving.saver import SavePolicy
from lightning_sbckpt._saving.workshop import Description
from lightning_sbckpt._world import decided_by_main
from lightning_sbckpt.curator import Curator
from lightning_sbckpt.errors import (
    ConfigurationError,
    MetaError,
    SBCheckpointError,
)
from lightning_sbckpt.hooks import HookRegistry, check_signature, default_registry
from lightning_sbckpt.meta import Checkpoint, ckpt_recency, plain_meta
from lightning_sbckpt.retention import rules_from_keys
from lightning_sbckpt.typing import (
    CheckpointPredicate,
    ImportanceKey,
    LoadHook,
    SaveHook,
    World,
)

__all__ = ["Checkpointer"]

logger = logging.getLogger("lightning_sbckpt")

# The smallest step that a double still tells apart at today's count of seconds, generously.
_TICK = 1e-5


class Checkpointer(Curator):
    """Saves named objects together and brings them back.

    Args:
        checkpoints_dir: The folder of all checkpoints; made if it is missing. Or the URL of one in a
            store, such as `s3://bucket/run`: see `docs/remote.md`.
        recoverables: From names to the objects to save and load. More come by `add_recoverable`.
        custom_load_hooks: From names to `hook(obj, path, end_of_epoch)`, before any by type.
        custom_save_hooks: From names to `hook(obj, path)`, before any by type.
        allow_partial_load: Load what a checkpoint has, and leave the other recoverables alone.
        registry: The hooks by type.
        world: The ranks that save and load together; by default those of `torch.distributed`.
        trust_pickle: Read state that only pickle can hold. It can run any code that the author of
            the checkpoint chose.
        save_mode: `"sync"`: a checkpoint is on the disk when `save_checkpoint` returns. `"async"`:
            its state is copied then, and written in the background. `"overlap"`: large tensors are
            copied while training goes on, until an optimizer among the recoverables makes its next
            step, or `before_update` is called.
        on_save_error: `"raise"`, or `"warn"`: a checkpoint that can't be written is said in the
            log, and training goes on without it.
        when_busy: While a checkpoint is still being written in the background, the next save is to
            `"wait"` for it or to `"skip"`.
        link_unchanged: Files with the same bytes as in the checkpoint before become hard links to
            them where the filesystem can.
        access: `"exclusive"`: from the first save on, no other process may write to the folder.
            `"shared"`: several may, if all say so. `"read"`: this one never does.
        storage: How the disk is changed; another one is for tests.
        local_dir: Of a URL: the folder on this machine that checkpoints go through; by default one
            in the user's cache folder.
        storage_options: Of a URL: what fsspec is to know beyond its own configuration.

    Attributes:
        lineage: Where the weights come from, for the manifests of the next checkpoints.
        documents: Small texts that the next checkpoints hold beside their files, by file name.

    Raises:
        ConfigurationError: The folder can't be used, or an argument is none of those known.
        RemoteError: The store of a URL can't be reached, or refuses.
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
        on_save_error: str = "raise",
        when_busy: str = "wait",
        link_unchanged: bool = True,
        access: str = "exclusive",
        storage: LocalStorage | None = None,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(
            checkpoints_dir,
            world=world,
            policy=SavePolicy(save_mode, on_save_error, when_busy),
            link_unchanged=link_unchanged,
            access=access,
            storage=storage,
            local_dir=local_dir,
            storage_options=storage_options,
        )
        self.optional_recoverables: dict[str, bool] = {}
        self.custom_load_hooks: dict[str, LoadHook] = {}
        self.custom_save_hooks: dict[str, SaveHook] = {}
        self.allow_partial_load = allow_partial_load
        self.registry = registry
        self.trust_pickle = trust_pickle
        self.lineage: dict[str, object] = {}
        self.documents: dict[str, str] = {}
        self._newest_saved = 0.0
        self._watched: dict[int, object] = {}
        for name, load_hook in (custom_load_hooks or {}).items():
            self._set_hook("load", name, load_hook)
        for name, save_hook in (custom_save_hooks or {}).items():
            self._set_hook("save", name, save_hook)
        if recoverables is not None:
            self.add_recoverables(recoverables)
        if access == "read":
            return
        if self._mirror is not None:
            # Now, and not at the first save: hours may have gone by until then.
            decided_by_main(self.world, self._mirror.open)
        if self.world.rank == 0:
            try:
                self._storage.make_dirs(self.checkpoints_dir)
            except OSError as error:
                raise ConfigurationError(
                    f"checkpoints_dir {self.checkpoints_dir} can't be made a folder: "
                    f"{error.strerror or error}"
                ) from error
            sweep(self.checkpoints_dir, self._storage)

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
        *,
        then: Callable[[], object] | None = None,
    ) -> Checkpoint | None:
        """Save every recoverable into a new checkpoint, flushed to the disk when this returns.

        With `save_mode="async"` or `"overlap"` it is flushed later: see `wait`.

        Args:
            meta: Keys to find the checkpoint by later, metrics above all. `unixtime` (seconds
                since the epoch) and `end-of-epoch` are there by themselves.
            end_of_epoch: Whether an epoch has just ended; load hooks are told.
            name: The checkpoint's own name; by default it is named by time. A checkpoint saved
                before under the same name is replaced.
            verbosity: The level of the log line.
            then: Called on rank zero when the checkpoint is durable; in the background if the save
                goes on there.

        Returns:
            The checkpoint; None on ranks other than zero, and where it is not yet durable or, with
            `on_save_error="warn"`, failed.

        Raises:
            SaveError: Something could not be written, of this checkpoint or of the one before it
                in the background; nothing of it is visible.
            FolderInUseError: Another process writes to this folder.
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
        for document in self.documents:
            check_name(document, "document")
        jobs = self._save_jobs()
        unixtime = self._next_unixtime()
        described = {
            "unixtime": unixtime,
            "end-of-epoch": bool(end_of_epoch),
            **_checked(plain_meta(meta or {})),
        }
        self.claim()
        self._watch_optimizers()
        description = Description(
            described, name, dict(self.lineage), verbosity, dict(self.documents)
        )
        saved = self.saver.save(jobs, description, self.world, then)
        self._newest_saved = max(self._newest_saved, unixtime)
        return saved

    def _watch_optimizers(self) -> None:
        if self.saver.policy.mode != "overlap":
            return
        for obj in self.recoverables.values():
            if isinstance(obj, torch.optim.Optimizer) and id(obj) not in self._watched:
                obj.register_step_pre_hook(lambda *_: self.before_update())
                self._watched[id(obj)] = obj

    def before_update(self) -> None:
        """Return when what is being saved may change; only `save_mode="overlap"` ever waits here.

        Torch's optimizers among the recoverables call it themselves before each step. Like every
        method that saves or waits, it is for the thread that trains.

        Raises:
            SaveError: See `wait`.

        Example:
            >>> import tempfile
            >>> Checkpointer(tempfile.mkdtemp()).before_update()
        """
        self.saver.before_update(self.world)

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
        ckpt_predicate: CheckpointPredicate | str | None = None,
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
        self.save_checkpoint(
            meta,
            end_of_epoch,
            name,
            verbosity,
            then=lambda: self.prune_here(rules, ckpt_predicate=ckpt_predicate, verbosity=verbosity),
        )

    def _save_jobs(self) -> dict[str, SaveJob]:
        for name in self.recoverables:
            # Again, since the dictionary may be changed directly.
            check_name(name, "recoverable")
        return save_jobs(self.recoverables, self.custom_save_hooks, self.registry)

    def _next_unixtime(self) -> float:
        if self.world.rank != 0:
            return time.time()  # It writes no meta: the disk is spared a look of each rank.
        # A clock that stands still or jumps back must not change the order of checkpoints.
        with self._looking:
            newest = max(self._catalog.newest_time(), self._newest_saved)
        return max(time.time(), newest + _TICK)

    # ------------------------------------------------------------------ loading

    def recover_if_possible(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | str | None = None,
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
        self.wait()
        while True:
            chosen = self.find_sound_checkpoint(importance_key, max_key, min_key, ckpt_predicate)
            if chosen is None:
                where = self.url or self.checkpoints_dir
                logger.info("no checkpoint to recover from in %s yet", where)
                return None
            try:
                self._load(chosen)
            except SBCheckpointError:
                # Several ranks can't agree on another one in the middle of loading.
                if self.world.size > 1 or is_checkpoint(chosen.path):
                    raise
                logger.info("%s vanished while it was read, looking again", chosen.path)
            else:
                return chosen

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
        # What is still being copied must not change yet.
        self.wait()
        if not isinstance(checkpoint, tuple):
            checkpoint = read_checkpoint(self.folder_of(checkpoint))
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
        self.lineage["resumed-from"] = checkpoint.path.name


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
