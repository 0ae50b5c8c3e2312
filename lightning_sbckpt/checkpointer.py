"""`Checkpointer`: saves, finds, loads and prunes the checkpoints of a folder.

It has the methods and parameters of SpeechBrain's `speechbrain.utils.checkpoints.Checkpointer`,
whose scripts run with the import changed, and adds keyword-only ones. What it promises beyond it:
a checkpoint is visible only when it is whole and on the disk; a damaged one is stepped over; no
pickle is executed that the user did not trust.

Saving and loading are here; listing, finding, pinning, annotating and deleting are its parent's,
`CheckpointFolder`.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.publish import check_name, is_checkpoint, read_checkpoint, sweep
from lightning_sbckpt._load.load import LoadOptions, load_into, require_sound
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._save.items import SaveItem, save_items
from lightning_sbckpt._save.request import SaveRequest, SaveResult, meta_of_new, time_after
from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.hooks import HookRegistry, check_signature, default_registry
from lightning_sbckpt.hooks.builtin import note_numbers
from lightning_sbckpt.meta import Checkpoint, ckpt_recency, usable_time
from lightning_sbckpt.retention import rules_from_keys
from lightning_sbckpt.run_paths import resolved
from lightning_sbckpt.typing import (
    Access,
    CheckpointPredicate,
    ImportanceKey,
    LoadHook,
    OnSaveError,
    SaveHook,
    SaveMode,
    WhenBusy,
    World,
)

__all__ = ["Checkpointer"]


logger = logging.getLogger("lightning_sbckpt")


class Checkpointer(CheckpointFolder):
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
        trust_pickle: Read state that only pickle can hold, whoever wrote it. It can run any code
            that the author of the checkpoint chose. What this user's own runs wrote is read anyway.
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
        recoverables: The objects by name.
        optional_recoverables: By name, whether a checkpoint may lack the object.
        custom_load_hooks: By name, before any by type.
        custom_save_hooks: By name, before any by type.
        allow_partial_load: Whether a checkpoint may lack any of them.
        registry: The hooks by type.
        trust_pickle: Whether state that only pickle can hold is read.
        lineage: Where the weights come from, for the manifests of the next checkpoints.

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
        save_mode: SaveMode = "sync",
        on_save_error: OnSaveError = "raise",
        when_busy: WhenBusy = "wait",
        link_unchanged: bool = True,
        access: Access = "exclusive",
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
        for each, load_hook in (custom_load_hooks or {}).items():
            self._set_hook("load", each, load_hook)
        for each, save_hook in (custom_save_hooks or {}).items():
            self._set_hook("save", each, save_hook)
        if recoverables is not None:
            self.add_recoverables(recoverables)
        if access != "read":
            # With nothing to save it may be there to read alone, perhaps by a misspelled name: then
            # the folder is made by the first save.
            makes = bool(self.recoverables)
            self._open_for_saving(self.checkpoints_dir, self._mirror, makes=makes)

    def _set_up(self, place: tuple[Path, Mirror | None], policy: SavePolicy) -> None:
        super()._set_up(place, policy)
        self._newest_saved = 0.0
        self._watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.finalize[..., Any]]
        self._watched = weakref.WeakKeyDictionary()

    def _move_to(self, place: tuple[Path, Mirror | None]) -> None:
        self.wait()
        if self.access != "read":
            self._open_for_saving(*place, makes=True)
        super()._move_to(place)
        self._newest_saved = 0.0

    def _open_for_saving(self, folder: Path, mirror: Mirror | None, *, makes: bool) -> None:
        if mirror is not None:
            # Now, and not at the first save: hours may have gone by until then.
            decided_by_main(self.world, mirror.open)
        if self.world.rank == 0:
            above = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
            if makes or not above.is_dir():
                self._make_folder(folder)
            sweep(folder, self._storage)

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
            >>> from lightning_sbckpt import Checkpointer
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
        note_numbers(obj)
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
            >>> from lightning_sbckpt import Checkpointer
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

    def save_checkpoint(
        self,
        meta: Mapping[str, object] | None = None,
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
        *,
        on_durable: Callable[[], object] | None = None,
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
            on_durable: Called on rank zero when the checkpoint is durable; in the background if the save
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
        request = SaveRequest(
            self.recoverables,
            meta or {},
            bool(end_of_epoch),
            name,
            self.lineage,
            verbosity=verbosity,
            on_durable=on_durable,
        )
        return self.save(request).checkpoint

    def save(self, request: SaveRequest) -> SaveResult:
        """Save what a request says, and tell what came of it; see `save_checkpoint`.

        Its items take the place of the recoverables.

        Raises:
            SaveError: See `save_checkpoint`.
            FolderInUseError: See `save_checkpoint`.
            HookError: See `save_checkpoint`.
            MetaError: See `save_checkpoint`.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> request = SaveRequest({"model": torch.nn.Linear(1, 1)}, {"loss": 0.5})
            >>> checkpointer.save(request).checkpoint.meta["loss"]
            0.5
        """
        return self._save(request, lambda: request.on_durable)

    def _save(
        self, request: SaveRequest, followed_by: Callable[[], Callable[[], object] | None]
    ) -> SaveResult:
        self._require_writable()
        self._watch_optimizers(request.items)

        def prepare() -> SaveRequest:
            ready = replace(self._with_hooks_and_meta(request), on_durable=followed_by())
            unixtime = float(str(ready.meta["unixtime"]))
            self._newest_saved = max(self._newest_saved, usable_time(unixtime))
            return ready

        return self._saver.save(request, self.world, prepare=prepare, claim=self._claim_here)

    def save_failed(self, error: SBCheckpointError) -> SaveResult:
        """Raise why there is nothing to save, or log it with `on_save_error="warn"`.

        Every rank calls this, with an error of the same type.

        Example:
            >>> import tempfile
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), on_save_error="warn")
            >>> checkpointer.save_failed(SaveError("the state can't be taken")).skipped
            False
        """
        return self._saver.failed(error, self.world)

    def _with_hooks_and_meta(self, request: SaveRequest) -> SaveRequest:
        if request.name is not None:
            check_name(request.name, "checkpoint")
        for extra in request.extra_files:
            check_name(extra, "document")
        items = self._save_items(request.items)
        try:
            unixtime = self._next_unixtime()
        except OSError as error:
            raise SaveError(
                f"the checkpoints in {self.checkpoints_dir} can't be listed: "
                f"{error.strerror or error}. Nothing was written; earlier checkpoints are whole"
            ) from error
        end_of_epoch = request.end_of_epoch
        meta = meta_of_new(request.meta, unixtime=unixtime, end_of_epoch=end_of_epoch)
        return replace(request, items=items, meta=meta, lineage=dict(request.lineage))

    def _watch_optimizers(self, items: Mapping[str, object]) -> None:
        if self._saver.policy.mode != "overlap":
            return
        me = weakref.ref(self)

        def before_step(*_: object) -> None:
            if (checkpointer := me()) is not None:
                checkpointer.before_update()

        for obj in items.values():
            if isinstance(obj, torch.optim.Optimizer) and obj not in self._watched:
                self._watched[obj] = weakref.finalize(
                    self, obj.register_step_pre_hook(before_step).remove
                )

    def release(self) -> None:
        """Let other processes write to the folder; the next save takes it back.

        Optimizers don't call `before_update` any more, until then.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> Checkpointer(tempfile.mkdtemp()).release()
        """
        for stop_watching in self._watched.values():
            stop_watching()
        self._watched.clear()
        super().release()

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
        self._saver.before_update(self.world)

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

        def prune() -> Callable[[], object]:
            rules = rules_from_keys(
                num_to_keep=num_to_keep,
                min_keys=min_keys,
                max_keys=max_keys,
                importance_keys=[*importance_keys, *recent],
            )
            may_go = as_predicate(ckpt_predicate)
            return lambda: self.prune_here(rules, ckpt_predicate=may_go, verbosity=verbosity)

        # The arguments are looked at before the save: those that can't be meant must not cost one.
        request = SaveRequest(
            self.recoverables,
            meta or {},
            bool(end_of_epoch),
            name,
            self.lineage,
            verbosity=verbosity,
        )
        self._save(request, prune)

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
            >>> from lightning_sbckpt import Checkpointer
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
                self._load(self.recoverables, chosen, self.optional_recoverables)
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
            checkpoint: The checkpoint, or its folder; also a run, `run/best` and `run/newest`.

        Raises:
            CheckpointNotFoundError: The folder is no checkpoint.
            DamagedCheckpointError: A file is not the one that was written; nothing is loaded.
            MismatchError: The checkpoint lacks recoverables (all are named, nothing is loaded), or
                a state doesn't fit its object.

        Example:
            >>> import tempfile, torch
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
            >>> checkpointer.load_checkpoint(checkpointer.save_checkpoint())
        """
        self.load_into(self.recoverables, checkpoint, self.optional_recoverables)

    def load_into(
        self,
        items: Mapping[str, object],
        checkpoint: Checkpoint | str | Path,
        optional: Mapping[str, bool] | None = None,
    ) -> None:
        """Load a checkpoint into objects that need not be recoverables of this checkpointer.

        Args:
            items: The objects, by the names that they were saved under.
            checkpoint: See `load_checkpoint`.
            optional: Which of them the checkpoint may lack.

        Raises:
            CheckpointNotFoundError: See `load_checkpoint`.
            DamagedCheckpointError: See `load_checkpoint`.
            MismatchError: See `load_checkpoint`.

        Example:
            >>> import tempfile, torch
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
            >>> saved = checkpointer.save_checkpoint()
            >>> checkpointer.load_into({"model": torch.nn.Linear(1, 1)}, saved)
        """
        # What is still being copied must not change yet.
        self.wait()
        if not isinstance(checkpoint, tuple):
            given = checkpoint
            place = decided_by_main(self.world, lambda: resolved(given, verified=self.verified))
            checkpoint = read_checkpoint(self.folder_of(place))
        require_sound(checkpoint, items, self.verified)
        self._load(items, checkpoint, optional or {})

    def _load(
        self, items: Mapping[str, object], checkpoint: Checkpoint, optional: Mapping[str, bool]
    ) -> None:
        options = LoadOptions(
            self.custom_load_hooks,
            self.registry,
            optional,
            self.allow_partial_load,
            self.trust_pickle,
        )
        load_into(items, checkpoint, options)
        self.lineage["resumed-from"] = printable(checkpoint.path.name)

    def _save_items(self, items: Mapping[str, object]) -> dict[str, SaveItem]:
        for name in items:
            # Again, since the dictionary of recoverables may be changed directly.
            check_name(name, "recoverable")
        return save_items(items, self.custom_save_hooks, self.registry)

    def _next_unixtime(self) -> float:
        if self.world.rank != 0:
            return time.time()  # It writes no meta: the disk is spared a look of each rank.
        with self._looking:
            newest = max(self._catalog.newest_time(), self._newest_saved)
        return time_after(newest)
