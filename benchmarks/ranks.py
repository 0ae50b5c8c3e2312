"""How the time of a save grows with the number of ranks: many light processes on one machine.

    python -m benchmarks.ranks                     1 to 64 ranks, both forms; about two minutes
    python -m benchmarks.ranks --ranks 1,2,4,8     fewer

Every process is a rank of a gloo group with random states, a place in its data and metrics of its
own, and all save together, as the ranks of a fit do. `stacked` is how this package keeps the states
of all ranks; `lists` is a list of them, gathered on every rank by `all_gather_object`.

So many processes share the few cores of one machine, which a real job's ranks don't: the times for
many ranks are longer than they would be there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._save import saver
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._world.world import TorchDistributed
from lightning_sbckpt.hooks.builtin import metric_state
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.parts import LOADERS, METRICS, RNG
from lightning_sbckpt.rng import capture_rng
from lightning_sbckpt.typing import World

T = TypeVar("T")

FORMS = ("stacked", "lists")
RANKS = (1, 2, 4, 8, 16, 32, 64)
PHASES = ("collecting", "writing", "agreeing", "total", "waiting")
_LIMIT = 240.0

PRELOAD = ["lightning_sbckpt.plugin.callback", "torchmetrics.classification"]
"""What takes seconds to import, and is imported once for all processes."""


# ---------------------------------------------------------------------- what a rank has


class Loading:
    """A rank's shuffled loader, some batches into an epoch."""

    def __init__(self, rank: int, size: int) -> None:
        data = range(64 * size)
        sampler: DistributedSampler[int] = DistributedSampler(data, size, rank, seed=3)  # type: ignore[arg-type]
        self.tracker = LoaderTracker(lambda: "train")
        self._batches = iter(self.tracker.track(DataLoader(data, 4, sampler=sampler)))  # type: ignore[arg-type]
        for _ in range(3):
            next(self._batches)


def seed(number: int) -> None:
    """Give every global generator a state of its own."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - the global generator is what a run saves
    torch.manual_seed(number)


def state_of(loading: Loading, metric: MulticlassAccuracy) -> dict[str, object]:
    """Return what a rank adds to a checkpoint."""
    return {
        RNG: capture_rng(),
        LOADERS: loading.tracker.state(),
        METRICS: {"logged": {"loss": torch.rand(())}, "torchmetrics": {"m": metric_state(metric)}},
    }


def as_lists(state: dict[str, object], world: World) -> dict[str, TakenState]:
    """Return the parts of all ranks as lists, gathered on every rank: what is compared with."""
    gathered = [state] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, state)
    return {
        name: TakenState({"ranks": [one[name] for one in gathered]}, volatile=True)
        for name in state
    }


# ---------------------------------------------------------------------- one rank


def save_rounds(
    rank: int, size: int, port: int, folder: Path, rounds: int, forms: Sequence[str]
) -> None:
    """Save again and again as one rank of a group, and write down how long it took."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    loading, metric = Loading(rank, size), MulticlassAccuracy(3)
    metric.update(torch.randint(3, (8,)), torch.randint(3, (8,)))
    took: dict[str, list[dict[str, float]]] = defaultdict(list)
    completing: list[float] = []
    commit = saver.commit

    def timed_commit(*args: Any) -> Any:
        began = time.monotonic()
        try:
            return commit(*args)
        finally:
            completing.append(time.monotonic() - began)

    saver.commit = timed_commit
    checkpointers = {form: Checkpointer(folder / form) for form in forms}
    seed(rank)
    for number in range(rounds):
        for form in forms[:: 1 if number % 2 else -1]:
            checkpointer = checkpointers[form]
            state = state_of(loading, metric)
            checkpointer.world.barrier()
            began = time.monotonic()
            made = (exact.parts_of_ranks if form == "stacked" else as_lists)(
                state, checkpointer.world
            )
            collected = time.monotonic()
            checkpointer.recoverables = dict(made)
            checkpointer.save_checkpoint(name=f"{number}")
            ended = time.monotonic()
            took[form].append(
                {
                    "began": began,
                    "ended": ended,
                    "collecting": collected - began,
                    "writing": completing.pop() if rank == 0 else 0.0,
                }
            )
    (folder / f"took{rank}.json").write_text(json.dumps(took))
    if size > 1:
        TorchDistributed().barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------- all ranks


@dataclass(frozen=True)
class Line:
    """Seconds over ranks as a line, by least squares.

    Attributes:
        start: Seconds with no rank.
        slope: Seconds for each rank.
        error: The standard error of the slope.
    """

    start: float
    slope: float
    error: float

    @staticmethod
    def through(points: Sequence[tuple[int, float]]) -> Line:
        """Return the line that is nearest to pairs of ranks and seconds."""
        xs, ys = [float(x) for x, _ in points], [y for _, y in points]
        slope, start = statistics.linear_regression(xs, ys)
        left = sum((y - start - slope * x) ** 2 for x, y in points)
        spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
        return Line(start, slope, math.sqrt(left / max(1, len(xs) - 2) / spread))

    def at(self, ranks: int) -> float:
        """Return the seconds for so many ranks."""
        return self.start + self.slope * ranks


def run_ranks(
    size: int,
    arguments: Callable[[int], tuple[object, ...]],
    target: Callable[..., None],
    seconds: float,
) -> None:
    """Run a function as every rank of a group, in processes of their own.

    Args:
        size: How many ranks.
        arguments: Of a free port; what `target` takes after its rank and the size.
        target: What each process runs.
        seconds: When to give up.

    Raises:
        RuntimeError: A process failed or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        more = arguments(int(found.getsockname()[1]))
    processes = [context.Process(target=target, args=(rank, size, *more)) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    if any(code != 0 for code in codes):
        raise RuntimeError(f"{size} ranks: a process failed or took too long, exit codes {codes}")


def simulate(
    size: int, folder: Path, rounds: int, forms: Sequence[str] = FORMS
) -> dict[str, list[dict[str, float]]]:
    """Have so many processes save together; return the seconds of each phase, by form and round.

    Args:
        size: How many ranks.
        folder: Where to save, on a real disk.
        rounds: How many saves; one more is made first and does not count.
        forms: Which forms, in turn.

    Raises:
        RuntimeError: A process failed.
    """
    run_ranks(size, lambda port: (port, folder, rounds + 1, forms), save_rounds, _LIMIT)
    by_rank = [json.loads((folder / f"took{rank}.json").read_text()) for rank in range(size)]
    return {
        form: [
            _phases([ranks[form][number] for ranks in by_rank]) for number in range(1, rounds + 1)
        ]
        for form in forms
    }


def _phases(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the phases of one save from what each rank has written down."""
    main, others = ranks[0], ranks[1:]
    total = max(each["ended"] for each in ranks) - min(each["began"] for each in ranks)
    waited = [each["ended"] - each["began"] - each["collecting"] for each in others]
    return {
        "collecting": main["collecting"],
        "writing": main["writing"],
        "agreeing": total - main["collecting"] - main["writing"],
        "total": total,
        "waiting": statistics.median(waited) if waited else 0.0,
    }


Measured = dict[str, dict[int, list[dict[str, float]]]]


def measure(sizes: Sequence[int], folder: Path, rounds: int) -> Measured:
    """Return the seconds of every phase, by form, number of ranks and round."""
    found: Measured = {form: {} for form in FORMS}
    for size in sizes:
        scratch = folder / f"{size}"
        scratch.mkdir(parents=True)
        for form, seconds in simulate(size, scratch, rounds).items():
            found[form][size] = seconds
    return found


def line_of(measured: dict[int, list[dict[str, float]]], phase: str) -> Line:
    """Return the line through all rounds of a phase."""
    return Line.through(
        [(size, each[phase]) for size, rounds in measured.items() for each in rounds]
    )


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="how many, in turn")
    parser.add_argument("--rounds", type=int, default=9, help="saves of each form")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on a real disk")
    given = parser.parse_args()
    sizes = [int(size) for size in given.ranks.split(",")]
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="benchmarks-") as scratch:
        measured = measure(sizes, Path(scratch), given.rounds)
    for form, by_size in measured.items():
        print(f"{form}: milliseconds, median of {given.rounds}")
        print("ranks  " + "".join(f"{phase:>12}" for phase in PHASES))
        for size, rounds in by_size.items():
            medians = [statistics.median(each[phase] for each in rounds) for phase in PHASES]
            print(f"{size:>5}  " + "".join(f"{1e3 * value:>12.1f}" for value in medians))
        line = line_of(by_size, "total")
        print(f"slope: {1e3 * line.slope:.2f} +- {1e3 * line.error:.2f} ms per rank\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
