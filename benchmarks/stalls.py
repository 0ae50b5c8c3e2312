"""What an asynchronous save costs the training: the stall, and all the time that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.disk import RawWrite, scratch
from benchmarks.measure import (
    Section,
    Settings,
    Table,
    described,
    median,
    size_label,
    timed,
)
from benchmarks.peer import OURS, Peer, saver
from benchmarks.peers import ASYNC, SYNC, opened
from benchmarks.states import ReadyCopy, State

COPY = "one copy into ready memory"
FLOOR = "one copy, then the raw write in a thread"
_BIG = 1000
_FOR_BIG = (f"{OURS}, async", f"{OURS}, overlap", "Lightning AsyncCheckpointIO + fsync")
_CLOSE = (COPY, FLOOR, f"{OURS}, async", f"{OURS}, overlap")
_SYNC_TOO = (f"{OURS}, sync", "torch.save + fsync")


def run_stall(settings: Settings) -> Section:
    """Measure how long `save` takes to return."""
    table = Table("Time until `save` returns", "s", COPY)
    section = Section(
        "stall",
        "Stall of an asynchronous save",
        "The caller waits so long. One save is made before, so that memory which is kept from save "
        f"to save exists. The reference is *{COPY}*: of every tensor, by `copy_`. A save that "
        "copies in the background, under the next forward and backward, shows less than a copy "
        "here; the next group of figures shows what it costs in all.",
        {"stall": table},
    )
    for size in settings.sizes:
        chosen = {name: make for name, make in ASYNC.items() if size < _BIG or name in _FOR_BIG}
        state = State(size)
        with (
            scratch(settings.folder / "stall") as folder,
            opened(chosen, state, folder, section.failures) as peers,
        ):
            copy = ReadyCopy(state)
            subjects: dict[str, Callable[[], float]] = {COPY: lambda copy=copy: timed(copy)}  # type: ignore[misc]
            subjects |= {name: saver(peer, state) for name, peer in peers.items()}
            table.add(
                size_label(size),
                settings.interleave(
                    subjects,
                    9,
                    seconds=settings.seconds_for(size),
                    failures=section.failures,
                ),
            )
            del copy, subjects
        print(f"  stall: {size_label(size)} done", flush=True)
    return section


def run_lost(settings: Settings) -> Section:
    """Measure how much training time a save costs until it is durable."""
    size = settings.main_size
    table = Table(
        f"Training time lost per save of {size_label(size)}", "s", COPY, columns_are="loop"
    )
    section = Section(
        "lost",
        "Training time lost to a save",
        "A loop runs before, while and after a checkpoint is saved, until it is durable. Lost is "
        "the time from the call of `save` to then, less the steps that were done meanwhile times "
        "what a step takes without a save: the stall, and the slowdown by the work in the "
        "background. *Python-bound*: a loop that holds the GIL. *compute-bound*: matrix products "
        "on all cores. *training*: forward, backward and the Adam step of the very state that is "
        "saved, under the lock that the library asks for, if it does. Synchronous saves stand beside "
        f"them, and what no save can do without: *{FLOOR}*, of as many bytes from memory that is "
        "ready, neither described nor hashed.",
        {"lost": table},
    )
    chosen = {**{name: SYNC[name] for name in _SYNC_TOO}, **ASYNC}
    state = State(size)
    with (
        scratch(settings.folder / "lost") as folder,
        opened(chosen, state, folder, section.failures) as peers,
    ):
        copy = ReadyCopy(state)
        floor = CopyThenWrite(copy)
        floor.open(state, folder / "floor")
        peers[FLOOR] = floor
        rate_seconds = 0.15 if settings.quick else 0.3
        for name, peer in list(peers.items()):
            try:
                # What is kept from save to save exists from here on.
                saver(peer, state)()
            except Exception as error:
                section.failures[name] = described(error)
                del peers[name]
        for label, step in _loops(state).items():
            subjects: dict[str, Callable[[], float]] = {COPY: lambda: timed(copy)}
            subjects |= {
                name: _loser(peer, state, step, rate_seconds) for name, peer in peers.items()
            }
            measured = settings.interleave(
                subjects,
                5,
                seconds=settings.seconds / 4,
                warmup=0,
                failures=section.failures,
            )
            # What lies closer together than two rounds of one subject needs more of them, since both
            # processors are busy here.
            close = {name: subjects[name] for name in _CLOSE if name in measured}
            more = settings.interleave(
                close,
                9,
                at_least=6,
                seconds=settings.seconds / 12,
                warmup=0,
                failures=section.failures,
            )
            table.add(label, {name: each + more.get(name, []) for name, each in measured.items()})
            print(f"  lost: {label} loop done", flush=True)
    return section


class CopyThenWrite(Peer):
    """The least that an asynchronous save can be: a copy, and then as many bytes written.

    Args:
        copy: Into memory that is ready.
    """

    name = FLOOR
    is_async = True

    def __init__(self, copy: ReadyCopy) -> None:
        self._copy = copy

    def open(self, state: State, folder: Path) -> None:
        """Prepare to write."""
        super().open(state, folder)
        self._write = RawWrite(folder, state.bytes())

    def save(self) -> None:
        """Copy, and write in a thread."""
        self._copy()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def wait(self) -> None:
        """Return when it is written."""
        self._thread.join()

    def clear(self) -> None:
        """Remove what was written."""
        self._write.clear()


def _loops(state: State) -> dict[str, Callable[[Peer], object]]:
    matrix = torch.randn(384, 384)

    def python_bound(_: Peer) -> int:
        value = 1
        for number in range(3000):
            value = (value * 31 + number) & 0xFFFF
        return value

    def compute_bound(_: Peer) -> torch.Tensor:
        return matrix @ matrix

    return {
        "Python-bound": python_bound,
        "compute-bound": compute_bound,
        "training": lambda peer: state.train_step(peer.guard()),
    }


def _loser(
    peer: Peer, state: State, step: Callable[[Peer], object], rate_seconds: float
) -> Callable[[], float]:
    def measure() -> float:
        state.change()
        lost = lost_to(peer, lambda: step(peer), rate_seconds=rate_seconds)
        peer.clear()
        return lost

    return measure


def lost_to(peer: Peer, step: Callable[[], object], *, rate_seconds: float) -> float:
    """Return how many seconds of a loop one save costs.

    Args:
        peer: Ready to save.
        step: One step of the loop.
        rate_seconds: So long is the speed of the loop taken, before and after.
    """
    before = _step_times(step, rate_seconds)
    durable = threading.Event()
    problems: list[BaseException] = []

    def watch() -> None:
        try:
            peer.watch()
        except BaseException as error:
            problems.append(error)
        finally:
            durable.set()

    start = time.perf_counter()
    peer.save()
    watcher = threading.Thread(target=watch)
    steps = 0
    if peer.is_async:
        watcher.start()
        while not durable.is_set():
            step()
            steps += 1
    elapsed = time.perf_counter() - start
    if peer.is_async:
        watcher.join()
        peer.wait()
    if problems:
        raise problems[0]
    return elapsed - steps * median([*before, *_step_times(step, rate_seconds)])


def _step_times(step: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(step))
    return times
