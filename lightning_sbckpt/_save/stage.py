"""Writing one checkpoint, by all ranks together: captured, staged, flushed, described, published.

A save has two halves. `begin` is done by every rank, while training stands still: it makes the
staging folder, runs the hooks, takes the states. `complete` is done by rank zero alone, at once or
in the background: it writes the states, describes and publishes. So there is no collective in the
background, but for states of which every rank has pieces: these every rank writes, rank zero in
`complete`, and there the ranks talk in a group that nobody else uses.

In `begin` every rank reaches every collective whatever fails on it: failures are carried to the
others as results, and raised on every rank after the last collective, so that none is left waiting.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_sbckpt._format.encode import warn_of_trust
from lightning_sbckpt._format.templates import Templates
from lightning_sbckpt._io.open_regular import NotRegularError
from lightning_sbckpt._io.storage import FileDigest, LocalStorage, digest_bytes
from lightning_sbckpt._layout.history import History
from lightning_sbckpt._layout.links import Links
from lightning_sbckpt._layout.manifest import MANIFEST_NAME, MARK, Manifest, dump_manifest
from lightning_sbckpt._layout.publish import (
    PARAMFILE_EXT,
    folder_for,
    publish,
    read_checkpoint,
    staging,
)
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt._save.items import Contents, SaveJob, may_replay
from lightning_sbckpt._save.late_copy import LateCopy
from lightning_sbckpt._save.request import Description
from lightning_sbckpt._save.sharded import Pieces, new_stager
from lightning_sbckpt._sharded.states import differing_names, refuse_pieces, require_all_pieces
from lightning_sbckpt._world.world import portable_error
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.meta import META_NAME, Checkpoint, dump_meta
from lightning_sbckpt.typing import World

if TYPE_CHECKING:
    from lightning_sbckpt._save.sharded_staging import Stager

logger = logging.getLogger("lightning_sbckpt")


Copying = Literal["no", "now", "later"]


class ChangedMeanwhileError(SaveError):
    """What was to be saved changed before it was copied."""


@contextmanager
def _kept_in(failures: list[Exception]) -> Iterator[None]:
    """Go on after an exception, and keep it."""
    try:
        yield
    except Exception as error:
        failures.append(error)


@dataclass
class Workshop:
    """What is kept from save to save.

    Attributes:
        root: The folder of all checkpoints.
        storage: The disk.
        templates: The forms of the files.
        links: The files of the newest checkpoint.
        arena: The memory for copies of the state.
        last: Where the last checkpoint went.
        right: What must not be let go of while anything is written or removed.
        stager: What copies the pieces of this rank, from the first save on that has some.
        history: Where it is noted that a checkpoint was saved.
    """

    root: Path
    storage: LocalStorage
    links: Links
    templates: Templates = field(default_factory=Templates)
    arena: Arena = field(default_factory=Arena)
    last: Path | None = None
    right: object = None
    stager: Stager | None = None
    history: History = field(init=False)

    def __post_init__(self) -> None:
        """Begin to note what happens."""
        self.history = History(self.root)


class Save:
    """One checkpoint on its way to the disk.

    Args:
        workshop: What is kept from save to save.
        description: What the checkpoint says about itself.
        remove: Takes away a folder that is no checkpoint any more; an error in it is no error of the
            save.

    Attributes:
        pieces: What this rank has of sharded states; on ranks other than zero somebody has to write
            them, in the background or not, after `begin`.
        late_copy: A copy that goes on while training does, if there is one.
    """

    def __init__(
        self,
        workshop: Workshop,
        description: Description,
        remove: Callable[[Path], object],
    ) -> None:
        self._workshop = workshop
        self._description = description
        self._remove = remove
        self._started = time.perf_counter()
        self._staging = ExitStack()
        self._staged: Path | None = None
        self._contents: dict[str, Contents] = {}
        self.pieces = Pieces()
        self._written: dict[str, FileDigest] = {}
        self._needed = 0
        self.late_copy: LateCopy | None = None

    def begin(self, jobs: Mapping[str, SaveJob], world: World, *, copy: Copying) -> None:
        """Take the state of this moment; every rank of a world calls this.

        Args:
            jobs: What to save, by name.
            world: The ranks that save together.
            copy: Whether the states may change as soon as this returns (`"now"`), or as soon as
                `late_copy` is done (`"later"`), or not before `complete` returns (`"no"`).

        Raises:
            SaveError: Something could not be taken or written; nothing is left of the checkpoint.
        """
        try:
            self._begin(jobs, world, copy=copy)
        except BaseException as error:
            self.abandon(error)
            raise

    def _begin(self, jobs: Mapping[str, SaveJob], world: World, *, copy: Copying) -> None:
        main = world.rank == 0
        # 1. Rank zero makes the folder; every rank learns where, or that there is none.
        staged: Path | Exception | None = None
        if main:
            try:
                staged = self._make_folder()
            except Exception as error:
                staged = self._failure("can't create a folder for the checkpoint", error)
        staged = world.broadcast(staged)
        if not isinstance(staged, Path):
            raise staged or SaveError("rank zero did not say where to save")

        # 2. Every rank does what is its to do; rank zero learns of every failure.
        failure: Exception | None = None
        try:
            self._take(jobs, staged, main=main, copy=copy)
        except SBCheckpointError as error:
            failure = error
        except Exception as error:
            failure = self._failure("can't take the state for the checkpoint", error)
        if failure is not None and world.size > 1:
            # Before this rank waits: the others may still be in a collective of a hook that failed here.
            logger.warning("rank %d fails the save: %s", world.rank, failure)
        try:
            taken = world.gather(
                (
                    portable_error(failure, world.rank) if world.size > 1 and not main else failure,
                    self.pieces.names,
                    self.pieces.lack_a_group,
                )
            )

            # 3. Every rank learns the end of it.
            first = next((error for error, *_ in taken or () if error is not None), None)
            if first is None and taken is not None:
                first = differing_names([names for _, names, _ in taken])
            shared, make_group = world.broadcast(
                (
                    portable_error(first) if world.size > 1 else first,
                    any(lacking for *_, lacking in taken or ()),
                )
            )
        except Exception as error:
            raise failure or error from error
        # A rank that failed itself raises its own exception, with its traceback.
        outcome = failure or (first if main else shared)
        if outcome is not None:
            raise outcome

        # 4. Every rank writes its pieces of what no rank has as a whole, now or in the background.
        pieces = self.pieces
        if pieces.names:
            pieces.get_ready(staged, world, self._workshop.storage, make_group=make_group)
            if copy == "no":
                self._written = pieces.write()

    def _make_folder(self) -> Path:
        workshop = self._workshop
        self._staged = self._staging.enter_context(staging(workshop.root, workshop.storage))
        return self._staged

    def _take(
        self, jobs: Mapping[str, SaveJob], staged: Path, *, main: bool, copy: Copying
    ) -> None:
        workshop = self._workshop
        failures: list[Exception] = []
        # First what may hold a collective, whatever fails on this rank, since the others would wait
        # in it: the states of which every rank has a piece, and then the hooks that every rank runs.
        self.pieces.take(jobs, failures)
        if self.pieces.names and copy != "no" and not failures:
            workshop.stager = workshop.stager or new_stager()
            with _kept_in(failures):
                self.pieces.freeze(workshop.stager, is_coordinator=main)
        jobs = {name: job for name, job in jobs.items() if not job.sharded}
        states: dict[str, object] = {}
        for name, job in sorted(jobs.items()):
            if job.on_every_rank:
                with _kept_in(failures):
                    if job.state is None:
                        job.run(staged / f"{name}{PARAMFILE_EXT}", must_write=main)
                    else:
                        states[name] = job.take()
        if failures:
            raise failures[0]
        # Then the states of this rank alone: a hook of the user may take its time, and there must be
        # room for them.
        for name, job in jobs.items():
            if job.state is not None and (main or job.on_every_rank):
                state = states.pop(name) if name in states else job.take()
                refuse_pieces(name, state)
                if copy == "later" and may_replay(state):
                    copy = "now"
                    if main:
                        _warn_of_graphs(workshop.root, name)
                if main:
                    contents = Contents.of(job, state, workshop.templates, workshop.root)
                    self._contents.update(contents)
        if main:
            holds = [each for contents in self._contents.values() for each in contents.holds]
            warn_of_trust(holds, workshop.root)
            self._require_space()
            if copy != "no":
                self._contents, self.late_copy = Contents.copied(
                    self._contents, workshop.arena, later=copy == "later"
                )
        for name, job in jobs.items():
            if job.state is None and main and not job.on_every_rank:
                job.run(staged / f"{name}{PARAMFILE_EXT}", must_write=True)

    def _require_space(self) -> None:
        self._needed = needed = sum(contents.size for contents in self._contents.values())
        free = self._workshop.storage.free_bytes(self._workshop.root)
        if needed > free:
            links = self._workshop.links
            needed -= sum(
                contents.size
                for name, contents in self._contents.items()
                if contents.source is not None and links.may_link(name, contents.source)
            )
        if needed > free:
            raise SaveError(
                f"the checkpoint was not written to {self._workshop.root}: it needs {needed:,} "
                f"bytes, and {free:,} are free. Earlier checkpoints are whole; make room there, or "
                "keep fewer checkpoints"
            )

    def complete(self) -> Checkpoint:
        """Write the states, describe and publish; only rank zero does.

        Raises:
            SaveError: Something could not be written; nothing of the checkpoint is visible.
        """
        try:
            checkpoint, size = self._complete()
        except SBCheckpointError as error:
            self.abandon(error)
            raise
        except Exception as error:
            self.abandon(error)
            raise self._failure("can't finish the checkpoint", error) from error
        except BaseException as error:
            self.abandon(error)
            raise
        self._staging.close()
        seconds = time.perf_counter() - self._started
        self._workshop.history.saved(checkpoint, self._description.lineage, size, seconds)
        logger.log(
            self._description.verbosity,
            "saved %s (%s): %d files, %.1f MB in %.2f s",
            checkpoint.path,
            "end of epoch" if checkpoint.meta["end-of-epoch"] else "within an epoch",
            len(checkpoint.paramfiles),
            size / 1e6,
            seconds,
        )
        return checkpoint

    def _complete(self) -> tuple[Checkpoint, int]:
        staged, storage = self._staged, self._workshop.storage
        assert staged is not None
        # First, whatever becomes of the rest: the others can't do it without this rank.
        self._written.update(self.pieces.write())
        if self.late_copy is not None:
            self.late_copy.wait()
            if self.late_copy.known_changed:
                raise _changed_meanwhile()
        links = self._workshop.links
        files = dict(self._written)
        require_all_pieces(staged, files)
        for name, contents in self._contents.items():
            files[name] = contents.write(staged / name, storage, links)
        self._contents = {}
        # Now, since whatever wrote to a tensor while it was copied has ended while all was written.
        if self.late_copy is not None and self.late_copy.changed():
            raise _changed_meanwhile()
        files.update(_flush_written_by_hooks(staged, files, storage))
        for name, text in self._description.documents.items():
            # For people, who can't read what is not Unicode anyway.
            data = text.encode(errors="backslashreplace")
            storage.write(staged / name, data)
            files[name] = digest_bytes(data)
        # The meta comes last: its presence is what makes a folder a checkpoint for every reader.
        meta_bytes = MARK + dump_meta(self._description.meta)
        size = sum(found.size for found in files.values())
        written = dict(files)
        files[META_NAME] = digest_bytes(meta_bytes)
        manifest = dump_manifest(Manifest(files, self._description.lineage))
        storage.write(staged / MANIFEST_NAME, manifest)
        storage.write(staged / META_NAME, meta_bytes)
        target = self._publish(staged)
        links.published(target, written)
        checkpoint = read_checkpoint(target)
        return checkpoint._replace(meta=dict(self._description.meta)), size

    def _publish(self, staged: Path) -> Path:
        workshop, name = self._workshop, self._description.name
        unixtime = float(str(self._description.meta["unixtime"]))
        while True:
            target = folder_for(workshop.root, name, unixtime, workshop.last)
            try:
                replaced = publish(staged, target, workshop.storage, replace=name is not None)
            except FileExistsError:
                # Another process published under the name of this second first; it keeps it.
                if name is not None:
                    raise
            else:
                workshop.last = target
                if replaced is not None:
                    self._remove(replaced)
                return target

    def abandon(self, error: BaseException) -> None:
        """Leave nothing behind."""
        if self.late_copy is not None:
            self.late_copy.wait()
        self._contents = {}
        self.pieces.let_go()
        self._staging.__exit__(type(error), error, error.__traceback__)

    def _failure(self, what: str, error: Exception) -> SaveError:
        root = self._workshop.root
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            free = self._workshop.storage.free_bytes(root)
            reason += f" (it needs {self._needed:,} bytes, and {free:,} are free)"
        failure = SaveError(
            f"{what} in {root}: {reason}. Nothing of it is visible; earlier checkpoints are whole"
        )
        failure.__cause__ = error
        return failure


@cache
def _warn_of_graphs(root: Path, name: str) -> None:
    logger.warning(
        "%s: the optimizer %r is capturable, and a step that is replayed as a CUDA graph waits for no "
        "copy: copies are made before training goes on (save_mode 'async')",
        root,
        name,
    )


def _changed_meanwhile() -> ChangedMeanwhileError:
    return ChangedMeanwhileError(
        "tensors were written to while they were copied, before the optimizer's step"
    )


def _flush_written_by_hooks(
    staged: Path, known: Mapping[str, FileDigest], storage: LocalStorage
) -> dict[str, FileDigest]:
    try:
        return storage.seal_tree(staged, known)
    except NotRegularError as error:
        raise SaveError(
            f"a save hook left {error.filename} in the checkpoint: {error.strerror}, and nothing else "
            "can be part of it. Nothing of this checkpoint is kept; write a copy in the hook"
        ) from error
