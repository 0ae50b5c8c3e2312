"""The checkpoints of a folder: found, pinned, annotated, pruned."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from lightning_sbckpt._catalog.catalog import Catalog
from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout import annotations as folder_annotations
from lightning_sbckpt._layout.annotations import annotations_held
from lightning_sbckpt._layout.links import Links
from lightning_sbckpt._layout.lock import FolderLock
from lightning_sbckpt._layout.manifest import MANIFEST_NAME, find_damage
from lightning_sbckpt._layout.sizes import checkpoint_bytes
from lightning_sbckpt._load.load import first_sound, identity_of_folder
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.places import mirror_at, place_of, resolve_local
from lightning_sbckpt._remote.uploading import Uploads
from lightning_sbckpt._remote.urls import is_url, normal_url
from lightning_sbckpt._save.remover import Remover
from lightning_sbckpt._save.saver import SavePolicy, Saver
from lightning_sbckpt._save.stage import SaverState
from lightning_sbckpt._world.world import current_world, decided_by_main
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    RemovalError,
    SaveError,
)
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention import Decision, plan_retention, rules_from_keys
from lightning_sbckpt.retention.plan import Decisions
from lightning_sbckpt.selection import importance
from lightning_sbckpt.typing import Access, CheckpointPredicate, ImportanceKey, RetentionRule, World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_sbckpt._views.timeline import Timeline

__all__ = ["CheckpointFolder"]

logger = logging.getLogger("lightning_sbckpt")

# What an object of its own in another process, or a copy in this one, makes anew.
_OF_A_PROCESS = {
    *("_catalog", "_damage_found", "_history", "_lock", "_looked_at", "_looking", "_mirror"),
    *("_remover", "_saver", "_uploads", "_watched", "verified"),
}
_ACCESS = get_args(Access)
_LOOKS = 8

C = TypeVar("C", bound="CheckpointFolder")

_all: weakref.WeakSet[CheckpointFolder] = weakref.WeakSet()


class CheckpointFolder:
    """The checkpoints of a folder: lists, finds, pins, annotates and deletes them.

    Args:
        checkpoints_dir: The folder of all checkpoints, or the URL of one in a store.
        world: The ranks that act together; by default those of `torch.distributed`.
        policy: How saves go on, for the `Checkpointer`.
        link_unchanged: See `Checkpointer`.
        access: See `Checkpointer`.
        storage: How the disk is changed.
        local_dir: Where a copy of what is read from a URL, and saved to it, is kept.
        storage_options: For the store of a URL, see fsspec.

    Attributes:
        checkpoints_dir: The folder; of a URL the local one.
        url: The URL, or None.
        access: Whether other processes may write, or this one may.
        recoverables: By name, what would be loaded: their files decide whether a checkpoint is sound.
        verified: The files that the last search has read in full, which a load need not read again.

    Raises:
        ConfigurationError: `access` is not one of those known.

    Example:
        >>> CheckpointFolder("runs/nowhere", access="read").list_checkpoints()
        []
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        *,
        world: World | None = None,
        policy: SavePolicy | None = None,
        link_unchanged: bool = True,
        access: Access = "exclusive",
        storage: LocalStorage | None = None,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        if access not in _ACCESS:
            raise ConfigurationError(
                f"access is {access!r}, expected one of {', '.join(map(repr, _ACCESS))}"
            )
        self.recoverables: dict[str, object] = {}
        self.access = access
        self._world = world
        self._storage = storage or LocalStorage()
        self._link_unchanged = link_unchanged
        self._set_up(place_of(checkpoints_dir, local_dir, storage_options), policy or SavePolicy())

    def _set_up(self, place: tuple[Path, Mirror | None], policy: SavePolicy) -> None:
        # What was found damaged when it was to be recovered from.
        self._damage_found: dict[Path, tuple[int | None, str]] = {}
        self.verified = Verified()
        # Retention may look in the background while the caller does.
        self._looking = RLock()
        self._look_in(place)
        self._remover = Remover(self._storage)
        self._saver = Saver(self._saver_state(), policy, self._remover)
        _all.add(self)

    def __getstate__(self) -> dict[str, object]:
        """Return the settings and the recoverables, as it is copied and pickled."""
        state = {name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS}
        return {**state, "policy": self._saver.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be one of the same folder that has saved nothing and holds no lock."""
        policy = state.pop("policy")
        vars(self).update(state)
        folder = self._checkpoints_dir
        self._set_up(place_of(self.url, folder) if self.url else place_of(folder), policy)

    def _look_in(self, place: tuple[Path, Mirror | None]) -> None:
        with self._looking:
            self._checkpoints_dir, self._mirror = place
            self.url = None if self._mirror is None else self._mirror.url
            self._catalog = Catalog(self._checkpoints_dir, keep_index=self.access != "read")

    @property
    def checkpoints_dir(self) -> Path:
        """The folder; of a URL the local one. Given another, everything moves there.

        SpeechBrain's `Brain` does so in debug mode, to leave the checkpoints of the run alone: nothing
        in the folder before is changed from then on. Every rank must set it.

        Raises:
            SaveError: What was being saved in the background failed; nothing has moved.
            ConfigurationError: It can't be made a folder; nothing has moved.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> checkpointer.checkpoints_dir = tempfile.mkdtemp(prefix="debug-")
            >>> checkpointer.save_checkpoint(name="a").path.parent.name.startswith("debug-")
            True
        """
        return self._checkpoints_dir

    @checkpoints_dir.setter
    def checkpoints_dir(self, path: str | Path) -> None:
        place = place_of(path)
        if place[0].absolute() != self._checkpoints_dir.absolute():
            self._move_to(place)

    @property
    def world(self) -> World:
        """The ranks that save and load together, as they are now.

        Example:
            >>> CheckpointFolder("runs/nowhere").world.size
            1
        """
        # Asked for anew each time: a process group may be set up after the checkpointer.
        return self._world or current_world()

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint of the folder, in the order of their names.

        Unreadable ones are left out, with one warning each.

        Example:
            >>> import tempfile
            >>> CheckpointFolder(tempfile.mkdtemp()).list_checkpoints()
            []
        """
        self._ask_store()
        with self._looking:
            return self._catalog.checkpoints()

    def folder_of(self, checkpoint: Checkpoint | str | Path) -> Path:
        """Return the local folder of a checkpoint, which may be given by its URL.

        Args:
            checkpoint: The checkpoint, its folder, or its URL.

        Raises:
            RemoteError: The store of a URL can't be reached, or refuses.

        Example:
            >>> CheckpointFolder("runs/nowhere").folder_of("runs/nowhere/CKPT+a").name
            'CKPT+a'
        """
        if isinstance(checkpoint, tuple):
            return checkpoint.path
        if self._mirror is not None and is_url(checkpoint):
            above, _, name = normal_url(checkpoint).rpartition("/")
            if above == self.url:
                # In the folder of this one, and not in the default one for the URL.
                self._mirror.refresh()
                return self.checkpoints_dir / name
        return resolve_local(checkpoint)

    def _ask_store(self) -> None:
        if self._mirror is not None:
            self._mirror.refresh()

    def as_known(self) -> AbstractContextManager[object]:
        """Don't ask a store inside the block: what was found there last counts.

        Example:
            >>> folder = CheckpointFolder("runs/nowhere")
            >>> with folder.as_known():
            ...     folder.list_checkpoints()
            []
        """
        return nullcontext() if self._mirror is None else self._mirror.one_look(known=True)

    def one_look(self) -> AbstractContextManager[object]:
        """Ask a store at most once inside the block, however often it is looked at.

        Example:
            >>> folder = CheckpointFolder("runs/nowhere")
            >>> with folder.one_look():
            ...     folder.list_checkpoints()
            []
        """
        return nullcontext() if self._mirror is None else self._mirror.one_look()

    def find_checkpoint(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | str | None = None,
    ) -> Checkpoint | None:
        """Return the best checkpoint, by default the newest, or None if there is none.

        Args:
            importance_key: A function of a checkpoint; the highest result is best.
            max_key: A key in the meta; the highest value is best.
            min_key: A key in the meta; the lowest value is best.
            ckpt_predicate: Only checkpoints for which it is true take part: a function, or an
                expression over the meta such as `"val_acc > 0.9"`.

        Raises:
            SelectionError: More than one of the three keys was given, or the expression can't be
                meant.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
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
        ckpt_predicate: CheckpointPredicate | str | None = None,
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
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for loss in (0.5, 0.25, 0.75):
            ...     _ = checkpointer.save_checkpoint({"loss": loss})
            >>> found = checkpointer.find_checkpoints(max_key="loss", max_num_checkpoints=2)
            >>> [ckpt.meta["loss"] for ckpt in found]
            [0.75, 0.5]
        """
        criterion = importance(importance_key=importance_key, max_key=max_key, min_key=min_key)
        self._ask_store()
        with self._looking:
            return self._catalog.find(criterion, ckpt_predicate, max_num_checkpoints)

    def find_sound_checkpoint(
        self,
        importance_key: ImportanceKey | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: CheckpointPredicate | str | None = None,
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
            >>> CheckpointFolder(tempfile.mkdtemp()).find_sound_checkpoint() is None
            True
        """

        def look() -> Checkpoint | None:
            # A key that no checkpoint has is no error here: a run that is started again before its
            # first validation begins anew. And the arguments of rank zero count.
            predicate = as_predicate(ckpt_predicate)
            root = self.url or self.checkpoints_dir
            attempt = 0
            while True:
                attempt += 1
                found = self.find_checkpoints(importance_key, max_key, min_key, predicate)
                unreadable = self._catalog.unreadable
                try:
                    # Where checkpoints go faster than they can be read, the best that stays is taken.
                    again = attempt <= _LOOKS
                    return first_sound(
                        found,
                        self.recoverables,
                        unreadable,
                        root,
                        verified=self.verified,
                        look_again=again,
                        found=self._damage_found,
                    )
                except CheckpointNotFoundError as error:
                    logger.info("looking again: %s", error)

        found = decided_by_main(self.world, look)
        if found is not None and self._mirror is not None:
            # Another machine has a copy of its own, in a place of its own.
            path = self._mirror.require(found.path.name)
            files = {name: path / file.name for name, file in found.paramfiles.items()}
            found = found._replace(path=path, paramfiles=files)
        return found

    # ------------------------------------------------------------------ showing

    def plot(
        self,
        key: str | Sequence[str] | None = None,
        *,
        min_key: str | None = None,
        max_key: str | None = None,
        path: str | Path | None = None,
    ) -> Figure:
        r"""Draw a metric over steps, with every checkpoint made, kept, best, pinned and removed.

        What was removed is known from the history of the folder; without one, what is there is drawn.

        Args:
            key: The metric, or several, each in a panel of its own; by default the one that the
                rules of the run rank by first, else the first there is.
            min_key: A metric whose lowest value is to be marked as the best; the rules say it if
                they rank by the metric.
            max_key: A metric whose highest value is to be marked as the best.
            path: Where to write the picture as well: a name that ends in `.png` or `.svg`.

        Returns:
            A figure of matplotlib's; a notebook shows it.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            SelectionError: No checkpoint has a number under such a key.
            ConfigurationError: `path` ends in something else.
            SaveError: The picture can't be written.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for loss in (0.5, 0.25, 0.75):
            ...     _ = checkpointer.save_checkpoint({"loss": loss})
            >>> checkpointer.plot(min_key="loss").axes[0].get_ylabel()
            'loss\n(lowest is best)'
        """
        from lightning_sbckpt.plotting import draw_timeline, picture_kind, save_figure

        if path is not None:
            picture_kind(path)  # Before the work.
        name = (self.url or str(self.checkpoints_dir.absolute())).rpartition("/")[2]
        figure = draw_timeline(self.timeline(), name, key, min_key=min_key, max_key=max_key)
        if path is not None:
            save_figure(figure, path)
        return figure

    def timeline(self, *, with_lineage: bool = True) -> Timeline:
        """Return what happened to each checkpoint: from what is there, and the folder's history.

        Args:
            with_lineage: Ask the manifests of those that the history doesn't tell of where their
                weights come from.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp())
            >>> for name in "ab":
            ...     _ = checkpointer.save_checkpoint(name=name)
            >>> _ = checkpointer.delete_checkpoints()
            >>> [(life.name, life.state) for life in checkpointer.timeline().lives]
            [('CKPT+a', 'removed'), ('CKPT+b', 'there')]
        """
        from lightning_sbckpt._views.folder_view import read_timeline

        self._ask_store()
        return read_timeline(self.checkpoints_dir, self._look, with_lineage=with_lineage)

    def _look(self) -> tuple[list[Checkpoint], dict[Path, str]]:
        with self._looking:
            return self._catalog.checkpoints(), self._catalog.unreadable

    def _repr_html_(self) -> str:
        from lightning_sbckpt._display import cards
        from lightning_sbckpt._views.folder_view import folder_card

        title, folder = type(self).__name__, self.checkpoints_dir
        return cards.shown(
            title, folder, lambda: folder_card(title, folder, self.timeline(with_lineage=False))
        )

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

    def _saver_state(self) -> SaverState:
        root = self.checkpoints_dir
        self._looked_at: dict[Path, dict[str, tuple[int, int, int] | None]] = {}
        self._lock = FolderLock(root, shared=self.access == "shared")
        self._uploads: Uploads | None = None
        if self._mirror is not None:
            self._uploads = Uploads(self._mirror, alone=self.access == "exclusive")
        state = SaverState(
            root,
            self._storage,
            Links(enabled=self._link_unchanged),
            folder_lock=self._lock,
            upload=None if self._uploads is None else self._uploads.ship,
        )
        self._history = state.history
        return state

    def _move_to(self, place: tuple[Path, Mirror | None]) -> None:
        # What was begun belongs to the folder before, and so does the retention that follows it.
        self.wait()
        self._lock.release()
        self._look_in(place)
        self._saver.move_to(self._saver_state())

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
        self._saver.wait(self.world)
        self._remover.wait()

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is still being written in the background of this process."""
        return self._saver.busy

    def wait_here(self) -> None:
        """Wait in this process alone and raise nothing: for when the run itself has failed.

        Other ranks may be anywhere by then. What went wrong in the background was logged.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> Checkpointer(tempfile.mkdtemp()).wait_here()
        """
        self._saver.wait_here()

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

        It is also released when the object is collected, and when the process ends.

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
        return self._retain(
            lambda: rules_from_keys(
                num_to_keep=num_to_keep,
                min_keys=min_keys or (),
                max_keys=max_keys or (),
                importance_keys=importance_keys,
            ),
            ckpt_predicate=ckpt_predicate,
            verbosity=verbosity,
            dry_run=dry_run,
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
        return self._retain(
            lambda: rules,
            ckpt_predicate=ckpt_predicate,
            protected=protected,
            verbosity=verbosity,
            dry_run=dry_run,
        )

    def _retain(
        self, rules: Callable[[], Sequence[RetentionRule]], **options: Any
    ) -> list[Decision]:
        self.wait()
        # The others wait: until the folder is as it will be, no rank may save or look. And the arguments
        # of rank zero count.
        return decided_by_main(self.world, lambda: self.prune_here(rules(), **options))

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

        For the `on_durable` of a `SaveRequest`, which is called on rank zero alone.

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
        if may_remove and self._history.kept_by(rules, predicate) and self._uploads is not None:
            self._uploads.push_history()
        plan = self._sound_plan(rules, predicate, list(protected))
        if dry_run or all(decision.keep for decision in plan):
            return plan
        self._require_writable()
        self._lock.acquire()
        plan = Decisions(each if each.keep else self._remove(each, verbosity) for each in plan)
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
                    self._remover.remove(path)
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


def _after_fork() -> None:
    for folder in list(_all):
        # Held by a thread that the child doesn't have, it would never open.
        folder._looking = RLock()  # noqa: SLF001 - of the module's own class


os.register_at_fork(after_in_child=_after_fork)
