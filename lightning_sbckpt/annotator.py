"""What is said of a checkpoint after it was saved: pins, notes, metrics that became known later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_sbckpt._disk.storage import LocalStorage
from lightning_sbckpt._folder import annotations as folder_annotations
from lightning_sbckpt._remote.places import mirror_at
from lightning_sbckpt._world import decided_by_main
from lightning_sbckpt.errors import ConfigurationError, SaveError
from lightning_sbckpt.finder import Finder
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import World

__all__ = ["Annotator"]

_ACCESS = ("exclusive", "shared", "read")


class Annotator(Finder):
    """Pins and annotates the checkpoints of a folder.

    Args:
        checkpoints_dir: The folder of all checkpoints, or the URL of one in a store.
        world: The ranks that act together; by default those of `torch.distributed`.
        access: See `Checkpointer`.
        storage: How the disk is changed.
        local_dir: See `Checkpointer`.
        storage_options: See `Checkpointer`.

    Attributes:
        access: Whether others may write, or this one may.

    Raises:
        ConfigurationError: `access` is none of those known.

    Example:
        >>> Annotator("runs/nowhere", access="read").list_checkpoints()
        []
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        *,
        world: World | None = None,
        access: str = "exclusive",
        storage: LocalStorage | None = None,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        if access not in _ACCESS:
            raise ConfigurationError(
                f"access is {access!r}, expected one of {', '.join(map(repr, _ACCESS))}"
            )
        super().__init__(
            checkpoints_dir,
            world=world,
            keep_index=access != "read",
            local_dir=local_dir,
            storage_options=storage_options,
        )
        self.access = access
        self._storage = storage or LocalStorage()

    def pin(self, checkpoint: Checkpoint | str | Path, reason: str = "") -> None:
        """Keep a checkpoint whatever the rules of retention say.

        Args:
            checkpoint: The checkpoint, or its folder.
            reason: Why, for whoever looks at it later.

        Raises:
            CheckpointNotFoundError: There is none.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> checkpointer.pin(checkpointer.save_checkpoint(name="a"), "in the paper")
            >>> checkpointer.delete_checkpoints(num_to_keep=0)[0].reason
            'pinned: in the paper'
        """
        self._annotate(
            checkpoint, lambda folder: folder_annotations.pin(folder, reason, storage=self._storage)
        )

    def unpin(self, checkpoint: Checkpoint | str | Path) -> None:
        """Undo `pin`.

        Args:
            checkpoint: The checkpoint, or its folder.

        Raises:
            CheckpointNotFoundError: There is none.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> saved = checkpointer.save_checkpoint(name="a")
            >>> checkpointer.pin(saved)
            >>> checkpointer.unpin(saved)
            >>> "pinned" in checkpointer.find_checkpoint().meta
            False
        """
        self._annotate(
            checkpoint, lambda folder: folder_annotations.unpin(folder, storage=self._storage)
        )

    def annotate(
        self,
        checkpoint: Checkpoint | str | Path,
        meta: Mapping[str, object] | None = None,
        *,
        note: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Add to a checkpoint what became known later: metrics, a note, tags.

        Args:
            checkpoint: The checkpoint, or its folder.
            meta: Keys for its meta; ranking and rules see them as if they had been saved with it.
            note: A remark.
            tags: Words to find it by.

        Raises:
            CheckpointNotFoundError: There is none.
            MetaError: YAML can't hold the meta.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> checkpointer.annotate(checkpointer.save_checkpoint(), {"bleu": 31.5})
            >>> checkpointer.find_checkpoint(max_key="bleu").meta["bleu"]
            31.5
        """
        self._annotate(
            checkpoint,
            lambda folder: folder_annotations.annotate(
                folder, meta or {}, storage=self._storage, note=note, tags=tags
            ),
        )

    def _annotate(
        self, checkpoint: Checkpoint | str | Path, change: Callable[[Path], object]
    ) -> None:
        self._require_writable()

        def annotate() -> None:
            folder = self.folder_of(checkpoint)
            mirror = mirror_at(folder.parent)
            if mirror is None:
                change(folder)
            else:
                mirror.annotate(folder, lambda: change(folder))

        decided_by_main(self.world, annotate)

    def _require_writable(self) -> None:
        if self.access == "read":
            raise SaveError(
                f"{self.checkpoints_dir} is open for reading only (access='read'): nothing was "
                "changed. Use a Checkpointer with access='exclusive' to save and delete"
            )
