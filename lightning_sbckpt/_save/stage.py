"""The first half of a save, by all ranks together while training stands still: the state is taken.

Every rank reaches every collective whatever fails on it: failures are carried to the others as
results, and raised on every rank together, so that none is left waiting.

In the second half, see `commit`, there is no collective but for states of which every rank has
pieces: these every rank writes, and there the ranks talk in a group that nobody else uses.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lightning_sbckpt._format.encode import warn_of_trust
from lightning_sbckpt._format.templates import Templates
from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._layout.history import History
from lightning_sbckpt._layout.links import Links
from lightning_sbckpt._layout.publish import PARAMFILE_EXT, staging
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt._save.items import Contents, SaveItem, may_replay
from lightning_sbckpt._save.late_copy import LateCopy
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt._save.sharded import ShardedSave, new_stager
from lightning_sbckpt._sharded.states import differing_names, refuse_pieces
from lightning_sbckpt._world.world import decided_together
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.typing import World

if TYPE_CHECKING:
    from lightning_sbckpt._save.sharded_staging import Stager

logger = logging.getLogger("lightning_sbckpt")

Copying = Literal["no", "now", "later"]
"""Whether states may change as soon as they are staged (`"now"`), or as soon as the late copy is done
(`"later"`), or not before the checkpoint is committed (`"no"`)."""


@dataclass
class SaverState:
    """What is kept from save to save.

    Attributes:
        root: The folder of all checkpoints.
        storage: The disk.
        links: The files of the newest checkpoint.
        templates: The forms of the files.
        arena: The memory for copies of the state.
        last: Where the last checkpoint went.
        used: The names that were there at a save, where one is named by a `stem`.
        stager: What copies the pieces of this rank, from the first save on that has some.
        folder_lock: What must not be let go of while anything is written or removed.
        upload: Called with the folder of a checkpoint that is durable here, where that is only half
            of the way.
        history: Where it is noted that a checkpoint was saved.
    """

    root: Path
    storage: LocalStorage
    links: Links
    templates: Templates = field(default_factory=Templates)
    arena: Arena = field(default_factory=Arena)
    last: Path | None = None
    used: set[str] = field(default_factory=set)
    stager: Stager | None = None
    folder_lock: object = None
    upload: Callable[[Path], object] | None = None
    history: History = field(init=False)

    def __post_init__(self) -> None:
        """Begin to note what happens."""
        self.history = History(self.root)


class Staged:
    """A checkpoint that has been taken, and is not visible yet.

    Attributes:
        request: What is saved, with the whole of its meta.
        folder: Where it is written until it is published; None on ranks other than zero.
        contents: Of the files that are still to be written, by name.
        shards: What this rank has of sharded states; on ranks other than zero somebody has to write
            them, in the background or not.
        late_copy: A copy that goes on while training does, if there is one.
        written: The files of sharded states, once they are written.
        needed: The bytes of `contents`.
        started: When the save began, by `time.perf_counter`.
    """

    def __init__(self, state: SaverState) -> None:
        self.request = SaveRequest({})
        self.folder: Path | None = None
        self.contents: dict[str, Contents] = {}
        self.shards = ShardedSave()
        self.late_copy: LateCopy | None = None
        self.written: dict[str, FileDigest] = {}
        self.needed = 0
        self.started = time.perf_counter()
        self._state = state
        self._folder = ExitStack()

    def make_folder(self) -> Path:
        """Make the folder, which is removed again unless it is published."""
        self.folder = self._folder.enter_context(staging(self._state.root, self._state.storage))
        return self.folder

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Leave nothing of it behind if what is done fails."""
        try:
            yield
        except BaseException as error:
            if self.late_copy is not None:
                self.late_copy.wait()
            self.contents = {}
            self.shards.let_go()
            self._folder.__exit__(type(error), error, error.__traceback__)
            raise

    def published(self) -> None:
        """Let go of the folder, which has another name now."""
        self._folder.close()

    def failure(self, what: str, error: Exception) -> SaveError:
        """Return an exception as one that says what could not be done, and where."""
        state = self._state
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            free = state.storage.free_bytes(state.root)
            reason += f" (it needs {self.needed:,} bytes, and {free:,} are free)"
        failure = SaveError(
            f"{what} in {state.root}: {reason}. Nothing of it is visible; earlier checkpoints are "
            "whole"
        )
        failure.__cause__ = error
        return failure


def stage(
    state: SaverState,
    prepare: Callable[[], SaveRequest],
    claim: Callable[[], object],
    world: World,
    *,
    copy: Copying,
) -> Staged:
    """Take the state of this moment; every rank of a world calls this.

    Args:
        state: What is kept from save to save.
        prepare: Returns what to save: the request, with the whole of its meta, and with a
            `SaveItem` for each item. Every rank calls it.
        claim: Makes sure, on rank zero, that this process may write to the folder.
        world: The ranks that save together.
        copy: When the states may change.

    Raises:
        SBCheckpointError: Something could not be taken or written; nothing is left of the checkpoint.
    """
    staged = Staged(state)
    main = world.rank == 0
    with staged.discarded_on_error():
        # 1. Every rank knows what to save; rank zero makes a folder for it.
        failure: Exception | None = None
        try:
            staged.request = prepare()
        except Exception as error:
            failure = error

        def make_folder(_: object) -> Path:
            claim()
            try:
                return staged.make_folder()
            except Exception as error:
                raise staged.failure("can't create a folder for the checkpoint", error) from error

        folder = decided_together(world, failure, None, make_folder)

        # 2. Every rank takes its states.
        try:
            _take(staged, state, folder, main=main, copy=copy)
        except SBCheckpointError as error:
            failure = error
        except Exception as error:
            failure = staged.failure("can't take the state for the checkpoint", error)

        if failure is not None and world.size > 1:
            # Before this rank waits: the others may still be in a collective of a hook that failed here.
            logger.warning("rank %d fails the save: %s", world.rank, failure)

        def compare(shards: Sequence[tuple[Sequence[str], bool]]) -> bool:
            different = differing_names([names for names, _ in shards])
            if different is not None:
                raise different
            return any(lack_a_group for _, lack_a_group in shards)

        own = (staged.shards.names, staged.shards.lack_a_group)
        make_group = decided_together(world, failure, own, compare)

        # 3. Every rank writes its pieces of what no rank has as a whole, now or in the background.
        if staged.shards.names:
            staged.shards.get_ready(folder, world, state.storage, make_group=make_group)
            if copy == "no":
                staged.written = staged.shards.write()
    return staged


def _take(staged: Staged, state: SaverState, folder: Path, *, main: bool, copy: Copying) -> None:
    items = cast("dict[str, SaveItem]", dict(staged.request.items))
    failures: list[Exception] = []
    # First what may hold a collective, whatever fails on this rank, since the others would wait in
    # it: the states of which every rank has a piece, and then the hooks that every rank runs.
    staged.shards.take(items, failures)
    if staged.shards.names and copy != "no" and not failures:
        state.stager = state.stager or new_stager()
        with _kept_in(failures):
            staged.shards.freeze(state.stager, is_coordinator=main)
    items = {name: item for name, item in items.items() if not item.sharded}
    states: dict[str, object] = {}
    for name, item in sorted(items.items()):
        if item.on_every_rank:
            with _kept_in(failures):
                if item.state is None:
                    item.run(folder / f"{name}{PARAMFILE_EXT}", must_write=main)
                else:
                    states[name] = item.take()
    if failures:
        raise failures[0]
    if not main:
        return
    # Then the states of this rank alone: a hook of the user may take its time, and there must be
    # room for them.
    for name, item in items.items():
        if item.state is not None:
            taken = states.pop(name) if name in states else item.take()
            refuse_pieces(name, taken)
            if copy == "later" and may_replay(taken):
                copy = "now"
                _warn_of_graphs(state.root, name)
            staged.contents.update(Contents.of(item, taken, state.templates, state.root))
    warn_of_trust([each for one in staged.contents.values() for each in one.holds], state.root)
    _require_space(staged, state)
    if copy != "no":
        staged.contents, staged.late_copy = Contents.copied(
            staged.contents, state.arena, later=copy == "later"
        )
    for name, item in items.items():
        if item.state is None and not item.on_every_rank:
            item.run(folder / f"{name}{PARAMFILE_EXT}", must_write=True)


@cache
def _warn_of_graphs(root: Path, name: str) -> None:
    logger.warning(
        "%s: the optimizer %r is capturable, and a step that is replayed as a CUDA graph waits for no "
        "copy: copies are made before training goes on (save_mode 'async')",
        root,
        name,
    )


@contextmanager
def _kept_in(failures: list[Exception]) -> Iterator[None]:
    """Go on after an exception, and keep it."""
    try:
        yield
    except Exception as error:
        failures.append(error)


def _require_space(staged: Staged, state: SaverState) -> None:
    staged.needed = needed = sum(contents.size for contents in staged.contents.values())
    free = state.storage.free_bytes(state.root)
    if needed > free:
        needed -= sum(
            contents.size
            for name, contents in staged.contents.items()
            if contents.source is not None and state.links.may_link(name, contents.source)
        )
    if needed > free:
        raise SaveError(
            f"the checkpoint was not written to {state.root}: it needs {needed:,} bytes, and "
            f"{free:,} are free. Earlier checkpoints are whole; make room there, or keep fewer "
            "checkpoints"
        )
