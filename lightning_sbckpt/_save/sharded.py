"""The states of one save of which every rank has pieces: taken, and written by all ranks together.

Before training goes on, or in the background from copies; then the ranks talk in a group that
nobody else uses. What needs `torch.distributed` is imported when there are such states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._save.items import SaveItem
from lightning_sbckpt.typing import World

if TYPE_CHECKING:
    from lightning_sbckpt._save.sharded_staging import Frozen, Stager


def new_stager() -> Stager:
    """Return what copies the pieces of a rank, and keeps the memory for the next time."""
    from lightning_sbckpt._save.sharded_staging import Stager

    return Stager()


class ShardedSave:
    """What this rank has of the sharded states of one save.

    Attributes:
        names: Of the states, sorted.
    """

    def __init__(self) -> None:
        self.names: Sequence[str] = ()
        self._states: dict[str, Mapping[str, object]] = {}
        self._frozen: dict[str, Frozen] = {}
        self._stager: Stager | None = None
        self._write: Callable[[], Mapping[str, FileDigest]] | None = None

    def take(self, items: Mapping[str, SaveItem], failures: list[Exception]) -> None:
        """Take the states; to take some of them is a collective.

        Args:
            items: What to save, by name.
            failures: Gets the exception of each object that could not give its state.
        """
        for name, item in sorted(items.items()):
            if item.sharded:
                try:
                    self._states[name] = cast("Mapping[str, object]", item.take())
                except Exception as error:
                    failures.append(error)
        self.names = sorted(self._states)

    def freeze(self, stager: Stager, *, is_coordinator: bool) -> None:
        """Copy them, so that what is live may change.

        Raises:
            SaveError: There is no memory, or a state can't be saved in this way.
        """
        self._stager = stager
        self._frozen = stager.stage(self._states, is_coordinator=is_coordinator)
        self._states = {}

    @property
    def lack_a_group(self) -> bool:
        """Whether this rank can't talk to the others in the background yet."""
        return self._stager is not None and not self._stager.has_group

    def get_ready(
        self, staged: Path, world: World, storage: LocalStorage, *, make_group: bool
    ) -> None:
        """See to it that `write` can write them; every rank calls this, if there are any.

        Args:
            staged: The folder of the checkpoint.
            world: The ranks.
            storage: The disk.
            make_group: Whether there is a rank that lacks a group.

        Raises:
            SaveError: The world is only a part of the ranks.
        """
        from lightning_sbckpt._sharded.writing import require_all_ranks, write_sharded

        require_all_ranks(self.names, world)
        stager, states, frozen = self._stager, self._states, self._frozen
        if stager is None:
            self._write = partial(write_sharded, states, staged, world, storage)
            return
        if make_group:
            stager.make_group()
        self._write = partial(stager.write, frozen, staged, world.rank, storage)

    @property
    def are_left(self) -> bool:
        """Whether they are ready, and still to be written."""
        return self._write is not None

    def write(self) -> dict[str, FileDigest]:
        """Write them while every other rank does, once.

        Returns:
            What was written, by name within the checkpoint: on rank zero by all ranks, elsewhere by
            this one.

        Raises:
            SaveError: A rank could not write; it is raised on every rank.
        """
        write = self._write
        self.let_go()
        return {} if write is None else dict(write())

    def let_go(self) -> None:
        """Hold nothing any more."""
        self._states, self._frozen, self._write = {}, {}, None
