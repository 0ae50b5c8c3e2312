"""Ending a run that is about to be taken away: a signal asks, the ranks agree, the last state is saved.

A signal only sets a flag. The ranks compare their flags after some batches, since a checkpoint is
one of all ranks, and a rank that stopped alone would leave the others waiting.
"""

from __future__ import annotations

import atexit
import inspect
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sbckpt._display.quantities import as_seconds
from lightning_sbckpt._format.omega import opaque, plain
from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.world import TrainerWorld
from lightning_sbckpt.typing import World

__all__ = ["Preempted", "Preemption"]

_SECONDS_BETWEEN = 1.0
_WATCH_EVERY = 0.1


@opaque
@dataclass(frozen=True)
class Preemption:
    """What to do when the machine is about to be taken away.

    Args:
        signals: Names of the signals that announce it. After SIGINT (Ctrl+C) the run ends as
            Lightning ends it, by exit code 1, so that nothing starts it again; a second one does not
            wait for the checkpoint.
        grace_time: Seconds, a `timedelta` or a text such as `"2 min"`, from the signal until the
            process has to be gone. If the checkpoint is not written by then, the process ends all
            the same, at once and by the same exit code, and the checkpoint before stands. None: as
            long as it takes.
        exit_code: How the process ends after the other signals, so that whoever started it starts
            it again.
        every_n_batches: How often several ranks ask each other. None: about once a second.

    Raises:
        ConfigurationError: An argument can't be meant.

    Example:
        >>> Preemption(grace_time=30).exit_code
        75
        >>> Preemption(["SIGKILL"])
        Traceback (most recent call last):
        lightning_sbckpt.errors.ConfigurationError: ...
    """

    signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT")
    grace_time: float | timedelta | str | None = None
    # EX_TEMPFAIL of sysexits.h: try again later.
    exit_code: int = 75
    every_n_batches: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        given = plain(self.signals)
        object.__setattr__(self, "signals", given)
        if isinstance(given, str) or not given:
            raise ConfigurationError(
                f"signals of Preemption is {given!r}, expected a list of names such as ['SIGTERM']"
            )
        for name in given:
            if name in ("SIGKILL", "SIGSTOP") or name not in signal.Signals.__members__:
                raise ConfigurationError(
                    f"signals of Preemption has {name!r}, which is no signal that a process can "
                    "catch here. Names are such as 'SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGINT'"
                )
        if not 1 <= self.exit_code <= 255:
            raise ConfigurationError(
                f"exit_code of Preemption is {self.exit_code}, expected a number from 1 to 255: by "
                "it a run that has to go on is told from one that is done"
            )
        if self.grace_time is not None and not (self.seconds or 0) > 0:
            raise ConfigurationError(
                f"grace_time of Preemption is {self.grace_time!r}, expected more than 0 seconds, as a "
                "number, a timedelta or a text such as '2 min', or None to take as long as it takes"
            )
        if self.every_n_batches is not None and self.every_n_batches < 1:
            raise ConfigurationError(
                f"every_n_batches of Preemption is {self.every_n_batches}, expected 1 or more, or "
                "None for about once a second"
            )

    @property
    def seconds(self) -> float | None:
        """The grace time in seconds.

        Example:
            >>> Preemption(grace_time=timedelta(minutes=1)).seconds
            60.0
        """
        return as_seconds(self.grace_time)


class Preempted(SystemExit):
    """The run was asked to end, and has saved what it had; `code` is the exit code.

    Args:
        code: The exit code.
        by: The name of the signal.

    Example:
        >>> try:
        ...     raise Preempted(75, "SIGTERM")
        ... except SystemExit as end:
        ...     end.code, end.by
        (75, 'SIGTERM')
    """

    def __init__(self, code: int, by: str) -> None:
        super().__init__(code)
        self.by = by


def as_preemption(given: Preemption | bool) -> Preemption | None:
    """Return what the argument `preemption` means.

    Raises:
        ConfigurationError: It means nothing.
    """
    if isinstance(given, bool):
        return Preemption() if given else None
    if not isinstance(given, Preemption):
        raise ConfigurationError(
            f"preemption is {given!r}, expected True, False or a Preemption(...)"
        )
    return given


class Agreement:
    """Has several ranks ask each other now and then whether a signal came.

    Args:
        every: After how many batches; None for about once a second.
        clock: Returns seconds.
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._asked = clock()
        self._batches = 0
        self._next = every or 1

    def is_due(self) -> bool:
        """Count a batch; return whether the ranks ask each other after it, the same on all."""
        self._batches += 1
        return self._batches >= self._next

    def ask(self, world: TrainerWorld, received: int, age: float) -> tuple[int, float]:
        """Return the signal that some rank has received, or 0, and how many seconds ago.

        Args:
            world: The ranks, all of which call this.
            received: The signal that this one has received, or 0.
            age: How many seconds ago.
        """
        now = self._clock()
        found, oldest, took = world.highest([float(received), age, now - self._asked])
        if self._every is None:
            # Every rank counts from the same number, so all of them come to the same next time.
            # It grows slowly: after some fast batches there may be slow ones.
            wanted = int(self._batches * _SECONDS_BETWEEN / max(took, 1e-9))
            self._next = max(1, min(wanted, 2 * self._batches))
        self._asked, self._batches = now, 0
        return int(found), oldest


class Watch:
    """Watches for signals during one fit.

    Args:
        preemption: What to do.
        trainer: Fits.

    Attributes:
        agreed: The name of the signal that every rank knows of, or an empty string.
    """

    def __init__(self, preemption: Preemption, trainer: Trainer) -> None:
        self.agreed = ""
        self._preemption = preemption
        self._trainer = trainer
        self._agreement = Agreement(preemption.every_n_batches)
        self._received = 0
        self._since = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._undo: _private.trainer.Undo | None = None
        self._over = threading.Event()
        self._preempted: weakref.ref[Preempted] | None = None

    # ------------------------------------------------------------------ receiving

    def start(self) -> None:
        """Catch the signals from now on, until `stop`."""
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn(
                "SBCheckpoint: preemption has no effect, since signals can be caught in the main "
                "thread alone and this fit runs in another"
            )
            return
        for name in self._preemption.signals:
            number = signal.Signals[name]
            watch = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(watch, Watch) and watch._over.is_set():  # noqa: SLF001
                # An earlier run ended by `Preempted`, and the process went on.
                watch._put_back()  # noqa: SLF001
            self._previous[number] = signal.getsignal(number)
        self._catch()
        # Lightning puts its own in place of those when a fit begins; they speak to the other ranks
        # at once, wherever these are.
        self._undo = _private.trainer.after_signal_handlers(self._trainer, self._catch)
        taken = _private.trainer.requeue_signal(self._trainer)
        if taken in self._previous:
            rank_zero_info(
                f"SBCheckpoint: {signal.Signals(taken).name} saves a checkpoint and ends the run by "
                f"exit code {self._preemption.exit_code}, in place of Lightning's requeueing: have "
                "the batch script requeue the job then"
            )
        if self._preemption.seconds is not None and not self._is_child():
            threading.Thread(
                target=self._keep_deadline, name="sbckpt-deadline", daemon=True
            ).start()

    def stop(self) -> None:
        """Put the previous handlers back; if the run ends by `Preempted`, only once that is caught.

        A scheduler may send its signal many times. By the previous handler, which is mostly none,
        the next one would kill the process on its way out, and its exit code would be another.
        """
        self._over.set()
        if self._undo is not None:
            self._undo()
            self._undo = None
        # Nobody starts an interactive session again by its exit code, and it keeps its last exception.
        if self._preempted is None or self._preempted() is None or hasattr(sys, "ps1"):
            self._put_back()
        else:
            # Ctrl+C always means at once.
            self._put_back(signal.SIGINT)
            atexit.register(self._ignore)
        if self._received and not self.agreed:
            name = signal.Signals(self._received).name
            rank_zero_info(f"SBCheckpoint: {name} came when the fit was ending anyway")

    def _put_back(self, *only: int) -> None:
        for number in only or tuple(self._previous):
            if number not in self._previous:
                continue
            handler = self._previous.pop(number)
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
            _private.trainer.replace_remembered_handler(
                self._trainer, number, self._handle, handler
            )
        if not self._previous:
            atexit.unregister(self._ignore)

    def _released(self, _: object) -> None:
        """Put the handlers back, as nobody holds the `Preempted` any more: the process goes on."""
        if not self._over.is_set() or threading.current_thread() is not threading.main_thread():
            return
        if not _private.trainer.is_ending_process(inspect.currentframe()):
            self._put_back()

    def _ignore(self) -> None:
        # The interpreter replaces Python's handlers by the default ones at its very end, but not this.
        for number in self._previous:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_IGN)

    def _catch(self) -> None:
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process that was forked from this one: it must end when it is told to, and what was
            # sent to the whole group must not take a loader's worker away before the save.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if not self._received:
            self._received, self._since = number, time.monotonic()
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _keep_deadline(self) -> None:
        grace = self._preemption.seconds
        assert grace is not None
        while not self._over.wait(_WATCH_EVERY):
            if self._received and time.monotonic() - self._since >= grace:
                # Nothing may be waited for here, the output's lock included.
                os.write(
                    2,
                    f"SBCheckpoint: the grace time of {grace:g} s after "
                    f"{signal.Signals(self._received).name} is over: the process ends now, and the "
                    "newest checkpoint is the one before\n".encode(),
                )
                _private.trainer.end_at_once(self._trainer, self._exit_code(self._received))

    # ------------------------------------------------------------------ acting

    def ask(self, world: TrainerWorld, *, now: bool = False) -> str:
        """Return the name of the signal that ends the run, or an empty string; the same on all ranks.

        Args:
            world: The ranks, all of which call this after each batch.
            now: Ask whenever the last time was.
        """
        if world.size == 1:
            found = self._received
        elif not self.agreed and (self._agreement.is_due() or now):
            age = time.monotonic() - self._since if self._received else 0.0
            found, age = self._agreement.ask(world, self._received, age)
            if found and not self._received:
                self._since = time.monotonic() - age
            self._received = found or self._received
        else:
            return self.agreed
        if found and not self.agreed:
            self.agreed = signal.Signals(found).name
            rank_zero_info(f"SBCheckpoint: {self.agreed} came, the run ends at the next safe point")
        return self.agreed

    def ending(self) -> BaseException:
        """Return what ends this rank."""
        number = signal.Signals[self.agreed]
        if number == signal.SIGINT and not self._is_child():
            return KeyboardInterrupt()
        preempted = Preempted(self._exit_code(number), self.agreed)
        self._preempted = weakref.ref(preempted, self._released)
        return preempted

    def _exit_code(self, number: int) -> int:
        # Lightning's launcher kills rank zero, whose exit code counts, when a child of its ends
        # otherwise than by 0.
        if self._is_child():
            return 0
        return 1 if number == signal.SIGINT else self._preemption.exit_code

    def _is_child(self) -> bool:
        return _private.trainer.is_child_of_launcher(self._trainer)


def requeued_if_newer(requeued: str, ours: Checkpoint | None, world: World) -> str | None:
    """Return the file that Lightning saved when it requeued a SLURM job, or None if ours is newer.

    Args:
        requeued: The file.
        ours: Our newest checkpoint.
        world: The ranks, all of which call this.
    """
    written = decided_by_main(world, lambda: Path(requeued).stat().st_mtime)
    newer = ours is None or written > ckpt_recency(ours)
    against = f"{'newer' if newer else 'older'} than {ours.path}" if ours else "all there is"
    rank_zero_info(
        f"SBCheckpoint: Lightning saved {requeued} when the job was requeued, which is {against} "
        f"and {'is taken' if newer else 'is not taken'}"
    )
    return requeued if newer else None
