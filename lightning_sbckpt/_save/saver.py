"""When a checkpoint is written: before `save` returns, or in the background while training goes on.

One save is in flight at most, since there is one copy of the state at most. Rank zero has a
background, and where states are in pieces every rank has one; what went wrong there every rank
learns at the next save or `wait`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import get_args

from lightning_sbckpt._io.background import Background
from lightning_sbckpt._save.commit import ChangedMeanwhileError, commit
from lightning_sbckpt._save.remover import Remover
from lightning_sbckpt._save.request import SaveRequest, SaveResult
from lightning_sbckpt._save.stage import SaverState, Staged, stage
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import (
    ConfigurationError,
    HookError,
    MetaError,
    RemoteError,
    RemovalError,
    SaveError,
    SBCheckpointError,
)
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import OnSaveError, SaveMode, WhenBusy, World

logger = logging.getLogger("lightning_sbckpt")

SAVE_MODES = get_args(SaveMode)
ON_SAVE_ERROR = get_args(OnSaveError)
WHEN_BUSY = get_args(WhenBusy)

# What may go wrong with a save whose arguments are right.
_OF_A_SAVE = (SaveError, RemovalError, RemoteError, MetaError, HookError)


@dataclass(frozen=True)
class SavePolicy:
    """How saves go on: given to `SBCheckpoint` as `save_mode=SavePolicy(...)`.

    Attributes:
        mode: `"sync"`, `"async"` or `"overlap"`.
        on_error: `"raise"`, or `"warn"`: a save that fails is said, and nothing else happens.
        when_busy: `"wait"` for the save in flight, or `"skip"` the new one.
        name: How checkpoints are named, by keys of their meta, such as `"{epoch:03d}-{val_loss:.3f}"`,
            which stands after `CKPT+`; by default by the time. A key that one hasn't got is `none`, and a
            number follows where another one has the name.
        log_saves: Log the seconds, the bytes and the name of each checkpoint with the Trainer's loggers.

    Raises:
        ConfigurationError: One is none of these, or the name is no template.

    Example:
        >>> SavePolicy("async", on_error="warn").when_busy
        'wait'
    """

    mode: SaveMode = "sync"
    on_error: OnSaveError = "raise"
    when_busy: WhenBusy = "wait"
    log_saves: bool = False
    name: str | None = None

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
        try:
            keys = [key for _, key, _, _ in Formatter().parse(self.name or "{epoch}")]
        except (ValueError, TypeError):
            keys = []
        if not any(keys) or "" in keys:
            raise ConfigurationError(
                f"name is {self.name!r}, expected a text with keys of the meta between braces, such as "
                "'{epoch:03d}-{val_loss:.3f}'"
            )


class Saver:
    """Saves, one after the other.

    Args:
        state: What is kept from save to save.
        policy: How saves go on.
        remover: What takes away a checkpoint whose name a new one takes.
    """

    def __init__(self, state: SaverState, policy: SavePolicy, remover: Remover) -> None:
        self.policy = policy
        self._state = state
        self._remover = remover
        self._writer = Background("sbckpt-writer")
        self._mode = policy.mode
        self._skipped = 0
        self._hidden: Staged | None = None
        self._on_failed: Callable[[], object] | None = None

    def move_to(self, state: SaverState) -> None:
        """Save in another folder from now on; nothing may be in flight."""
        self._state = state

    @property
    def busy(self) -> bool:
        """Whether a save is in flight in this process."""
        return self._writer.busy

    def save(
        self,
        request: SaveRequest,
        world: World,
        *,
        prepare: Callable[[], SaveRequest],
        claim: Callable[[], object],
    ) -> SaveResult:
        """Save; every rank of a world calls this.

        Args:
            request: What is asked for.
            world: The ranks that save together.
            prepare: See `stage`.
            claim: See `stage`.

        Raises:
            SaveError: This save, or the one in flight before it, failed; not if the policy says to
                warn.
        """
        if self._mode != "sync":
            may_skip = request.may_skip and self.policy.when_busy == "skip"
            if may_skip and decided_by_main(world, lambda: self.busy):
                self._skipped += 1
                if world.rank == 0:
                    logger.warning(
                        "skipped a save to %s: the one before it is still being written (%d "
                        "skipped so far)",
                        self._state.root,
                        self._skipped,
                    )
                return SaveResult(skipped=True)
            # One that came out wrong is not taken anew: its meta may no longer fit the state.
            self._end_hiding(world, instead="the one being saved now takes its place")
            self._wait_for_writer(world)
        try:
            if self._mode == "sync":
                return self._save_now(prepare, claim, world)
            hide = request.hide_copy and self._mode == "overlap"
            self._save_in_background(prepare, claim, world, hide=hide)
        except SBCheckpointError as error:
            return self.failed(error, world)
        self._on_failed = request.on_failed
        return SaveResult()

    def _save_now(
        self, prepare: Callable[[], SaveRequest], claim: Callable[[], object], world: World
    ) -> SaveResult:
        staged = stage(self._state, prepare, claim, world, copy="no")
        checkpoint = decided_by_main(world, lambda: self._commit(staged))
        return SaveResult(checkpoint if world.rank == 0 else None)

    def _save_in_background(
        self,
        prepare: Callable[[], SaveRequest],
        claim: Callable[[], object],
        world: World,
        *,
        hide: bool,
    ) -> None:
        staged = stage(self._state, prepare, claim, world, copy="later" if hide else "now")
        if hide:
            self._hidden = staged
        if world.rank == 0:
            self._writer.submit(partial(self._commit_in_background, staged))
        elif staged.shards.are_left:
            self._writer.submit(staged.shards.write)

    def _commit_in_background(self, staged: Staged) -> None:
        try:
            self._commit(staged)
        except ChangedMeanwhileError:
            return  # Seen to by `before_update`.
        except Exception:
            # Now, while it is news, for all ranks; whoever waits gets it as an exception.
            logger.exception("saving in the background failed")
            raise

    def _commit(self, staged: Staged) -> Checkpoint:
        checkpoint = commit(staged, self._state, self._remover.remove_unpublished)
        if self._state.upload is not None:
            self._state.upload(checkpoint.path)
        if staged.request.on_durable is not None:
            staged.request.on_durable()
        return checkpoint

    def before_update(self, world: World) -> None:
        """Return when what is being saved may change; every rank calls this.

        An overlapping save copies while training goes on, until this is called. If somebody wrote
        to what was copied, the save is made anew at once, and from now on copies don't hide any
        more.
        """
        # Asked before every step of the optimizer, when hardly ever anything is in flight.
        if self._hidden is None:
            return
        request = self._hidden.request
        if self._end_hiding(world, instead="saved anew"):
            return
        self._wait_for_writer(world)
        if request.on_discarded is not None:
            request.on_discarded()
            return
        try:
            self._save_in_background(lambda: request, lambda: None, world, hide=False)
        except SBCheckpointError as error:
            self._failed_in_background(error, world)

    def _end_hiding(self, world: World, instead: str) -> bool:
        """Let a hidden copy come to its end; return whether it came out right, if there was one."""
        staged, self._hidden = self._hidden, None
        if staged is None:
            return True
        late = staged.late_copy
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
                self._state.root,
                instead,
            )
        return False

    def wait(self, world: World) -> None:
        """Return when all that was handed over is durable; every rank calls this.

        Raises:
            SaveError: What went wrong in the background; not if the policy says to warn.
        """
        self.before_update(world)
        self._wait_for_writer(world)

    def _wait_for_writer(self, world: World) -> None:
        if self.policy.mode == "sync":
            return
        try:
            self._wait_on_all(world)
        except SBCheckpointError as error:
            self._failed_in_background(error, world)

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

    def wait_here(self) -> None:
        """Wait in this process alone and raise nothing: for when the run itself has failed.

        What went wrong in the background was logged when it did.
        """
        with suppress(Exception):
            self._writer.wait()

    def _failed_in_background(self, error: SBCheckpointError, world: World) -> None:
        self.failed(error, world)
        if self._on_failed is not None:
            self._on_failed()

    def failed(self, error: SBCheckpointError, world: World) -> SaveResult:
        """Raise what went wrong; or log it, if that is the policy and no argument was wrong.

        Every rank of a world calls this, with an error of the same type.
        """
        if self.policy.on_error == "raise" or not isinstance(error, _OF_A_SAVE):
            raise error
        if world.rank == 0:
            logger.warning("%s. Training goes on, since on_save_error is 'warn'", error)
        return SaveResult(error=error)


def _raise_if_any(error: Exception | None) -> None:
    if error is not None:
        raise error
