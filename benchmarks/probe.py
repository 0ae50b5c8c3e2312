"""`python -m benchmarks.probe FIGURE`: takes one figure of this package alone, as JSON.

`benchmarks.compare` runs it with one commit's package and then with another's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning_sbckpt
from benchmarks import finding, stalls, stepping
from benchmarks.disk import scratch, warm
from benchmarks.measure import UnavailableError, timed
from benchmarks.peer import quiet, saver
from benchmarks.peers import Ours
from benchmarks.states import State


def _saves(mode: str) -> Callable[[int, Path, int], list[float]]:
    def measure(size: int, folder: Path, rounds: int) -> list[float]:
        state = State(size)
        with _ours(mode, state, folder) as peer:
            save = saver(peer, state)
            return [save() for _ in range(rounds + 1)][1:]

    return measure


def _small(_: int, folder: Path, rounds: int) -> list[float]:
    state = State(1.0, layers=12)
    with _ours("sync", state, folder) as peer:
        save = saver(peer, state)
        return [save() for _ in range(5 * rounds + 1)][1:]


def _load(size: int, folder: Path, rounds: int) -> list[float]:
    state = State(size)
    with _ours("sync", state, folder) as peer:
        peer.save()
        warm(peer.folder)
        return [timed(lambda: (peer.load(state), state.touch())) for _ in range(rounds + 1)][1:]


def _lost(size: int, folder: Path, rounds: int) -> list[float]:
    state = State(size)
    with _ours("async", state, folder) as peer:
        saver(peer, state)()
        lost = []
        for _ in range(rounds):
            state.change()
            lost.append(stalls.lost_to(peer, state.train_step, rate_seconds=0.4))
            peer.clear()
        return lost


def _find(_: int, folder: Path, rounds: int) -> list[float]:
    from lightning_sbckpt import Checkpointer

    finding.make_checkpoints(folder, 1000)
    times = []
    for _ in range(rounds):
        finding.forget_index(folder)
        times.append(timed(lambda: Checkpointer(folder).find_checkpoint(min_key="loss")))
    return times


def _idle(_: int, folder: Path, rounds: int) -> list[float]:
    return [stepping.hooks_microseconds("sync", folder) for _ in range(rounds)]


def _import(_: int, __: Path, rounds: int) -> list[float]:
    # Where this process found the package, the other one has to find it.
    source = Path(lightning_sbckpt.__file__).parents[1]
    return [stepping.process_seconds(stepping.PACKAGE, source) for _ in range(rounds)]


# From names to functions of the size in MB, an empty folder and a count; lower is better in all.
FIGURES: dict[str, Callable[[int, Path, int], list[float]]] = {
    "save": _saves("sync"),
    "stall": _saves("async"),
    "overlap": _saves("overlap"),
    "lost": _lost,
    "load": _load,
    "small": _small,
    "find": _find,
    "idle": _idle,
    "import": _import,
}


@contextmanager
def _ours(mode: str, state: State, folder: Path) -> Iterator[Ours]:
    peer = Ours(mode)
    peer.open(state, folder)
    try:
        yield peer
    finally:
        peer.close()


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", choices=sorted(FIGURES))
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    given = parser.parse_args()
    quiet()
    answer: dict[str, object] = {"package": lightning_sbckpt.__file__}
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-", dir=given.dir) as made,
        scratch(Path(made) / "probe") as folder,
    ):
        try:
            answer["values"] = FIGURES[given.figure](given.size, folder, given.rounds)
        except UnavailableError as error:
            answer["unavailable"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
