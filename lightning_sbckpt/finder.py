"""Finding checkpoints in a folder: which there are, which is best, which is whole."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

from lightning_sbckpt._finding.catalog import Catalog
from lightning_sbckpt._finding.loading import first_sound
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.places import here, place_of
from lightning_sbckpt._remote.urls import is_url, normal_url
from lightning_sbckpt._world import current_world, decided_by_main
from lightning_sbckpt.errors import CheckpointNotFoundError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import importance
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey, World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_sbckpt._pictures.timeline import Timeline

__all__ = ["Finder"]

logger = logging.getLogger("lightning_sbckpt")

_LOOKS = 8

_all: weakref.WeakSet[Finder] = weakref.WeakSet()


class Finder:
    """Finds the checkpoints of a folder, and changes nothing there.

    Args:
        checkpoints_dir: The folder of all checkpoints, or the URL of one in a store.
        world: The ranks that look together; by default those of `torch.distributed`.
        keep_index: Whether an index may be written to the folder, to find faster next time.
        local_dir: Where a copy of what is read from a URL, and saved to it, is kept.
        storage_options: For the store of a URL, see fsspec.

    Attributes:
        checkpoints_dir: The folder; of a URL the local one.
        url: The URL, or None.

    Example:
        >>> Finder("runs/nowhere").list_checkpoints()
        []
    """

    def __init__(
        self,
        checkpoints_dir: str | Path,
        *,
        world: World | None = None,
        keep_index: bool = False,
        local_dir: str | Path | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.recoverables: dict[str, object] = {}
        self._world = world
        self._keep_index = keep_index
        # What was found damaged when it was to be recovered from.
        self._damage_found: dict[Path, tuple[int | None, str]] = {}
        # Retention may look in the background while the caller does.
        self._looking = RLock()
        self._look_in(place_of(checkpoints_dir, local_dir, storage_options))
        _all.add(self)

    def _look_in(self, place: tuple[Path, Mirror | None]) -> None:
        with self._looking:
            self._checkpoints_dir, self._mirror = place
            self.url = None if self._mirror is None else self._mirror.url
            self._catalog = Catalog(self._checkpoints_dir, keep_index=self._keep_index)

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

    def _move_to(self, place: tuple[Path, Mirror | None]) -> None:
        self._look_in(place)

    @property
    def world(self) -> World:
        """The ranks that save and load together, as they are now.

        Example:
            >>> Finder("runs/nowhere").world.size
            1
        """
        # Asked for anew each time: a process group may be set up after the checkpointer.
        return self._world or current_world()

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint of the folder, in the order of their names.

        Unreadable ones are left out, with one warning each.

        Example:
            >>> import tempfile
            >>> Finder(tempfile.mkdtemp()).list_checkpoints()
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
            >>> Finder("runs/nowhere").folder_of("runs/nowhere/CKPT+a").name
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
        return here(checkpoint)

    def _ask_store(self) -> None:
        if self._mirror is not None:
            self._mirror.refresh()

    def as_known(self) -> AbstractContextManager[object]:
        """Don't ask a store inside the block: what was found there last counts.

        Example:
            >>> finder = Finder("runs/nowhere")
            >>> with finder.as_known():
            ...     finder.list_checkpoints()
            []
        """
        return nullcontext() if self._mirror is None else self._mirror.one_look(known=True)

    def one_look(self) -> AbstractContextManager[object]:
        """Ask a store at most once inside the block, however often it is looked at.

        Example:
            >>> finder = Finder("runs/nowhere")
            >>> with finder.one_look():
            ...     finder.list_checkpoints()
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
            >>> Finder(tempfile.mkdtemp()).find_sound_checkpoint() is None
            True
        """
        # A key that no checkpoint has is no error here: a run that is started again before its
        # first validation begins anew.
        predicate = as_predicate(ckpt_predicate)

        def look() -> Checkpoint | None:
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
        from lightning_sbckpt._pictures.folder_view import read_timeline

        self._ask_store()
        return read_timeline(self.checkpoints_dir, self._look, with_lineage=with_lineage)

    def _look(self) -> tuple[list[Checkpoint], dict[Path, str]]:
        with self._looking:
            return self._catalog.checkpoints(), self._catalog.unreadable

    def _repr_html_(self) -> str:
        from lightning_sbckpt._pictures.cards import failed_card
        from lightning_sbckpt._pictures.folder_view import folder_card

        title = type(self).__name__
        try:
            return folder_card(title, self.checkpoints_dir, self.timeline(with_lineage=False))
        except Exception as error:  # A notebook would show a traceback in place of the value.
            return failed_card(title, self.checkpoints_dir, error)


def _after_fork() -> None:
    for finder in list(_all):
        # Held by a thread that the child doesn't have, it would never open.
        finder._looking = RLock()  # noqa: SLF001 - of the module's own class


os.register_at_fork(after_in_child=_after_fork)
