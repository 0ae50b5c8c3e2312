"""Recovering: named objects with their hooks, and bringing them back from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sbckpt._builtin_hooks import note_numbers
from lightning_sbckpt._finding.loading import LoadOptions, load_into, require_sound
from lightning_sbckpt._folder.layout import check_name, is_checkpoint, read_checkpoint
from lightning_sbckpt.curator import Curator, FolderOptions
from lightning_sbckpt.errors import SBCheckpointError
from lightning_sbckpt.hooks import HookRegistry, check_signature, default_registry
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import (
    CheckpointPredicate,
    ImportanceKey,
    LoadHook,
    SaveHook,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Recoverer"]

logger = logging.getLogger("lightning_sbckpt")


class Recoverer(Curator):
    """Holds named objects with their hooks, and loads checkpoints into them.

    Args:
        checkpoints_dir: The folder of all checkpoints, or the URL of one in a store.
        recoverables: From names to the objects.
        custom_load_hooks: See `Checkpointer`.
        custom_save_hooks: See `Checkpointer`.
        allow_partial_load: See `Checkpointer`.
        registry: See `Checkpointer`.
        trust_pickle: See `Checkpointer`.
        **options: Those of `Curator`.

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
        CheckpointNameError: A name would not stay inside a checkpoint folder.
        HookSignatureError: A custom hook can't be called.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> Recoverer("runs/nowhere", {"model": model}, access="read").recover_if_possible()
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        recoverables: Mapping[str, object] | None = None,
        *,
        custom_load_hooks: Mapping[str, LoadHook] | None = None,
        custom_save_hooks: Mapping[str, SaveHook] | None = None,
        allow_partial_load: bool = False,
        registry: HookRegistry = default_registry,
        trust_pickle: bool = False,
        **options: Unpack[FolderOptions],
    ) -> None:
        super().__init__(checkpoints_dir, **options)
        self.optional_recoverables: dict[str, bool] = {}
        self.custom_load_hooks: dict[str, LoadHook] = {}
        self.custom_save_hooks: dict[str, SaveHook] = {}
        self.allow_partial_load = allow_partial_load
        self.registry = registry
        self.trust_pickle = trust_pickle
        self.lineage: dict[str, object] = {}
        for name, load_hook in (custom_load_hooks or {}).items():
            self._set_hook("load", name, load_hook)
        for name, save_hook in (custom_save_hooks or {}).items():
            self._set_hook("save", name, save_hook)
        if recoverables is not None:
            self.add_recoverables(recoverables)

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
            >>> from lightning_sbckpt import Checkpointer
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
