"""When a checkpoint is written: before `save` returns, or in the background while training goes on.

One save is in flight at most, since there is one copy of the state at most. Rank zero has a
background, and where states are in pieces every rank has one; what went wrong there every rank
learns at the next save or `wait`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from lightning_sbckpt._io.background import Background
from lightning_sbckpt._io.progress import moved
from lightning_sbckpt._layout.publish import unpublish
from lightning_sbckpt._save.items import SaveJob
from lightning_sbckpt._save.request import Description
from lightning_sbckpt._save.stage import ChangedMeanwhileError, Save, Workshop
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    HookError,
    MetaError,
    RemoteError,
    RemovalError,
    SaveError,
    SBCheckpointError,
)
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import World

logger = logging.getLogger("lightning_sbckpt")

SaveMode = Literal["sync", "async", "overlap"]
SAVE_MODES = ("sync", "async", "overlap")
ON_SAVE_ERROR = ("raise", "warn")
WHEN_BUSY = ("wait", "skip")

# What may go wrong with a save whose arguments are right.
_OF_A_SAVE = (SaveError, RemovalError, RemoteError, MetaError, HookError)

# Bytes from which on removing is worth a thread: it takes about a millisecond a megabyte.
_WORTH_A_THREAD = 8 * 2**20


@dataclass(frozen=True)
class SavePolicy:
    """How saves go on.

    Attributes:
        mode: `"sync"`, `"async"` or `"overlap"`.
        on_error: `"raise"`, or `"warn"`: a save that fails is said, and nothing else happens.
        when_busy: `"wait"` for the save in flight, or `"skip"` the new one.

    Raises:
        ConfigurationError: One is none of these.
    """

    mode: str = "sync"
    on_error: str = "raise"
    when_busy: str = "wait"

    def __post_init__(self) -> None:
        """Refuse what is not known."""
        known = {
            "save_mode": (self.mode, SAVE_MODES),
            "on_save_error": (self.on_error, ON_SAVE_ERROR),
            "when_busy": (self.when_busy, WHEN_BUSY),
        }
        for name, (given, choices) in known.items():
            if given not in choices:
                raise ConfigurationError(
                    f"{name} is {given!r}, expected one of {', '.join(map(repr, choices))}"
                )


class Saver:
    """Saves, one after the other.

    Args:
        workshop: What is kept from save to save.
        policy: How they go on.

    Attributes:
        failed: How many saves have failed.
        skipped: How many saves were skipped since another was in flight.
        retake: Called when a copy that was hidden behind training came out wrong, if it should not
            simply be taken anew.
        then_upload: Called with the folder of a checkpoint that is durable here, where that is only
            half of the way.
    """

    def __init__(self, workshop: Workshop, policy: SavePolicy) -> None:
        self.policy = policy
        self.failed = 0
        self.skipped = 0
        self.retake: Callable[[], object] | None = None
        self.then_upload: Callable[[Path], object] | None = None
        self._workshop = workshop
        self._writer = Background("sbckpt-writer")
        self._remover = Background("sbckpt-remover")
        self._mode = policy.mode
        self._hide_next = True
        self._in_flight: Save | None = None
        self._again: Callable[[], object] | None = None

    def move_to(self, workshop: Workshop) -> None:
        """Save in another folder from now on; nothing may be in flight."""
        self._workshop = workshop

    @property
    def busy(self) -> bool:
        """Whether a save is in flight in this process."""
        return self._writer.busy

    def save(
        self,
        jobs: Mapping[str, SaveJob],
        description: Description,
        world: World,
        then: Callable[[], object] | None = None,
    ) -> Checkpoint | None:
        """Save; every rank of a world calls this.

        Args:
            jobs: What to save, by name.
            description: What the checkpoint says about itself.
            world: The ranks that save together.
            then: What to do on rank zero when the checkpoint is durable.

        Returns:
            The checkpoint on rank zero if it is durable by now, else None.

        Raises:
            SaveError: This save, or the one in flight before it, failed; not if the policy says to
                warn.
        """
        if self._mode != "sync":
            if self.policy.when_busy == "skip" and decided_by_main(world, lambda: self.busy):
                self.skipped += 1
                if world.rank == 0:
                    logger.warning(
                        "skipped a save to %s: the one before it is still being written (%d "
                        "skipped so far)",
                        self._workshop.root,
                        self.skipped,
                    )
                return None
            # One that came out wrong is not taken anew: its meta may no longer fit the state.
            self._end_hiding(world, instead="the one being saved now takes its place")
            self._wait_for_writer(world)
        try:
            return self._save(jobs, description, world, then)
        except SBCheckpointError as error:
            self.fail(error, world)
            return None

    def _save(
        self,
        jobs: Mapping[str, SaveJob],
        description: Description,
        world: World,
        then: Callable[[], object] | None,
    ) -> Checkpoint | None:
        save = Save(self._workshop, description, self._take_away)
        if self._mode == "sync":
            save.begin(jobs, world, copy="no")
            checkpoint = decided_by_main(world, lambda: self._completed(save, then))
            return checkpoint if world.rank == 0 else None
        hide, self._hide_next = self._hide_next and self._mode == "overlap", True
        save.begin(jobs, world, copy="later" if hide else "now")
        if hide:
            self._in_flight = save
            self._again = lambda: self._save(jobs, description, world, then)
        if world.rank == 0:
            self._writer.submit(lambda: self._complete(save, then))
        elif save.pieces.are_left:
            self._writer.submit(save.pieces.write)
        return None

    def _complete(self, save: Save, then: Callable[[], object] | None) -> None:
        try:
            self._completed(save, then)
        except ChangedMeanwhileError:
            return  # Seen to by `before_update`.
        except Exception:
            # Now, while it is news, for all ranks; whoever waits gets it as an exception.
            logger.exception("saving in the background failed")
            raise

    def _completed(self, save: Save, then: Callable[[], object] | None) -> Checkpoint:
        checkpoint = save.complete()
        if self.then_upload is not None:
            self.then_upload(checkpoint.path)
        if then is not None:
            then()
        return checkpoint

    def before_update(self, world: World) -> None:
        """Return when what is being saved may change; every rank calls this.

        An overlapping save copies while training goes on, until this is called. If somebody wrote
        to what was copied, the save is made anew at once, and from now on copies don't hide any
        more.
        """
        again = self._again
        # Asked before every step of the optimizer, when hardly ever anything is in flight.
        if self._in_flight is None or self._end_hiding(world, instead="saved anew"):
            return
        self._wait_for_writer(world)
        if self.retake is not None:
            self.retake()
        elif again is not None:
            try:
                again()
            except SBCheckpointError as error:
                self.fail(error, world)

    def _end_hiding(self, world: World, instead: str) -> bool:
        """Let a hidden copy come to its end; return whether it came out right, if there was one."""
        save, self._in_flight, self._again = self._in_flight, None, None
        if save is None:
            return True
        late = save.late_copy
        if late is not None:
            late.hold()
        if not decided_by_main(world, lambda: late is not None and late.changed()):
            return True
        self._mode = "async"
        if world.rank == 0:
            logger.warning(
                "%s: tensors were written to between the save and the optimizer's step, so that "
                "checkpoint is dropped and %s, and copies are made before training goes on from "
                "now on (save_mode 'async')",
                self._workshop.root,
                instead,
            )
        return False

    def fall_back(self) -> None:
        """Make copies before training goes on, from the next save on."""
        if self._mode == "overlap":
            self._mode = "async"

    def copy_at_once(self) -> None:
        """Don't hide the copy of the next save: no optimizer step follows that could wait for it."""
        self._hide_next = False

    def wait(self, world: World) -> None:
        """Return when all that was handed over is durable; every rank calls this.

        Raises:
            SaveError: What went wrong in the background; not if the policy says to warn.
        """
        self.before_update(world)
        self._wait_for_writer(world)

    def _wait_for_writer(self, world: World) -> None:
        try:
            if self.policy.mode != "sync":
                self._wait_on_all(world)
        except SBCheckpointError as error:
            self.fail(error, world)

    def _wait_on_all(self, world: World) -> None:
        own: Exception | None = None
        try:
            self._writer.wait()
        except Exception as error:
            own = error  # Not yet: the others are waiting for this rank.
        try:
            decided_by_main(world, partial(_raise_if_any, own))
        except Exception:
            # What this rank has seen says more, and stands even if the others are gone.
            _raise_if_any(own)
            raise
        _raise_if_any(own)

    def finish_here(self) -> None:
        """Wait in this process alone and raise nothing: for when the run itself has failed.

        What went wrong in the background was logged when it did.
        """
        with suppress(Exception):
            self._writer.wait()

    def fail(self, error: SBCheckpointError, world: World) -> None:
        """Raise what went wrong; or say it, if that is the policy and no argument was wrong.

        Every rank of a world calls this, with an error of the same type.
        """
        self.failed += 1
        if self.policy.on_error == "raise" or not isinstance(error, _OF_A_SAVE):
            raise error
        if world.rank == 0:
            logger.warning("%s. Training goes on, since on_save_error is 'warn'", error)

    def remove(self, folder: Path) -> None:
        """Remove a checkpoint: it is none when this returns, and its files go when they go.

        Raises:
            CheckpointNotFoundError: There is none.
            RemovalError: The disk refused.
        """
        try:
            removed = unpublish(folder, self._workshop.storage)
        except CheckpointNotFoundError:
            raise
        except OSError as error:
            raise RemovalError(
                f"{folder} could not be removed: {error.strerror or error}. Every other checkpoint "
                "is whole. Make its folder writable"
            ) from error
        self._take_away(removed)

    def _take_away(self, removed: Path) -> None:
        # It is no checkpoint any more, so what can't be removed is no error: a file that somebody has
        # open keeps its folder on a network filesystem.
        size = _size(removed)
        if size < _WORTH_A_THREAD:
            self._remove_files(removed, size)
        else:
            # Whoever counts the bytes here counts them there, too.
            self._remover.submit(partial(copy_context().run, self._remove_files, removed, size))

    def _remove_files(self, removed: Path, size: int) -> None:
        try:
            self._workshop.storage.remove_tree(removed)
        except OSError as error:
            logger.warning(
                "%s could not be removed and is cleared at the next start: %s", removed, error
            )
        else:
            moved(size)

    def wait_for_removals(self) -> None:
        """Return when the files of every removed checkpoint are gone."""
        self._remover.wait()


def _raise_if_any(error: Exception | None) -> None:
    if error is not None:
        raise error


def _size(folder: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in folder.rglob("*"))
    except OSError:
        return 0
