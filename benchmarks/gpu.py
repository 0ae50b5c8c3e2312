"""`python -m benchmarks --device cuda`: what saves and loads cost beside the limits of one GPU.

`--device cpu` runs all of it on the processor, to find plain mistakes: its figures mean nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from lightning_sbckpt import Checkpointer

MODES = ("sync", "async", "overlap")
_BLOCK = {"cuda": 2**28, "cpu": 2**22}
# Steps after a save in which what it slows down is looked for.
_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    measured: str
    target: str = ""
    is_met: bool | None = None


@dataclass(frozen=True)
class Cost:
    """What one save costs, in seconds: the call, training time lost, and until it is durable."""

    call: float
    lost: float
    durable: float


class Job:
    """A model that trains on a device."""

    def __init__(self, device: str, megabytes: int) -> None:
        self.device = device
        width = 4096 if device == "cuda" else 256
        layers = max(1, int(megabytes * 1e6 / (3 * 4 * width * width)))
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=device == "cuda")
        self.batch = torch.ones(2048 if device == "cuda" else 4, width, device=device)
        self.step()
        tensors = [*self.model.parameters()]
        tensors += [v for each in self.optimizer.state.values() for v in each.values()]
        self.bytes = sum(each.nbytes for each in tensors)
        self.tensors = len(tensors)
        self.step_seconds = statistics.median(self.timed(self.step) for _ in range(20))

    def step(self) -> None:
        """Train one step; what waits for it is not waited for here."""
        self.model(self.batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return what is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state(self) -> dict[str, object]:
        """Return the state as torch's own users save it."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def wait(self) -> None:
        """Return when the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, act: Callable[[], object]) -> float:
        """Return how long something takes until the device has done it."""
        self.wait()
        began = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - began

    def cost(self, save: Callable[[], Callable[[], object]]) -> Cost:
        """Return what a save costs.

        Args:
            save: Begins it, and returns what waits until it is durable.
        """
        self.wait()
        began = time.perf_counter()
        wait = save()
        called = time.perf_counter() - began
        for _ in range(_STEPS):
            self.step()
        self.wait()
        lost = time.perf_counter() - began - _STEPS * self.step_seconds
        wait()
        return Cost(called, lost, time.perf_counter() - began)

    @contextmanager
    def peak(self, into: list[int]) -> Iterator[None]:
        """Note how many bytes of the device are taken at most beyond those taken now."""
        if self.device != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        into.append(torch.cuda.max_memory_allocated() - before)


def run(folder: Path, megabytes: int, device: str, *, rounds: int = 5) -> list[Row]:
    """Measure everything.

    Args:
        folder: Where to write; on a real disk.
        megabytes: Of the state.
        device: `"cuda"`, or `"cpu"` for a dry run.
        rounds: How often each is measured.
    """
    down, up = _bandwidths(device)
    job = Job(device, megabytes)
    copy = job.bytes / down
    rows = [
        Row("state", f"{job.bytes / 1e9:.2f} GB in {job.tensors} tensors"),
        Row("pinned bandwidth, from and to the GPU", f"{down / 1e9:.1f}, {up / 1e9:.1f} GB/s"),
        Row("one step; one copy at that bandwidth", f"{job.step_seconds:.3f} s; {copy:.3f} s"),
    ]
    lost: dict[str, float] = {}
    peaks: list[int] = []
    for mode in MODES:
        with Checkpointer(folder / mode, job.parts(), save_mode=mode) as saver, job.peak(peaks):

            def save(saver: Checkpointer = saver) -> Callable[[], object]:
                saver.save_checkpoint(name="a")
                return saver.wait

            first, *later = [job.cost(save) for _ in range(1 + rounds)]
        lost[mode] = statistics.median(each.lost for each in later)
        rows += _described(f"save_mode {mode}", first, later)
    first, *later = _dcp(job, folder, rounds)
    lost["DCP"] = statistics.median(each.lost for each in later)
    rows += _described("DCP async_save, staging cached", first, later)
    seconds = statistics.median(job.timed(lambda: _torch_save(job, folder)) for _ in range(rounds))
    rows.append(Row("torch.save + fsync", f"{seconds:.3f} s"))
    rows += [
        _at_most("lost to an async save, in copies", lost["async"] / copy, 1.2),
        _at_most("lost to an async save, in those lost to DCP", lost["async"] / lost["DCP"], 1.0),
        _at_most("lost to an overlapping save, in copies", lost["overlap"] / copy, 0.1),
        _at_most("GPU memory of a save, in MB", max(peaks, default=0) / 1e6, 64),
    ]
    return rows + _loads(job, folder, up, rounds)


def write(rows: list[Row], name: str, path: Path) -> None:
    """Print the rows, and write them as a section that goes into `RESULTS.md`."""
    marks = {True: "met", False: "**not met**", None: ""}
    lines = [f"## {name}", "", "| what | measured | target | |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.measured} | {r.target} | {marks[r.is_met]} |" for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {path}")


def name_of(device: str) -> str:
    """Return what the figures are of."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return "a dry run on the processor: these figures mean nothing"


def _described(what: str, first: Cost, later: list[Cost]) -> list[Row]:
    middle = [statistics.median(getattr(c, n) for c in later) for n in ("call", "lost", "durable")]
    return [
        Row(f"{what}: call, lost, durable", ", ".join(f"{value:.3f}" for value in middle) + " s"),
        Row(f"{what}: the first call", f"{first.call:.3f} s"),
    ]


def _at_most(what: str, value: float, limit: float) -> Row:
    return Row(what, f"{value:.2f}", f"at most {limit:g}", value <= limit)


def _bandwidths(device: str) -> tuple[float, float]:
    there = torch.empty(_BLOCK[device], dtype=torch.uint8, device=device)
    here = torch.empty(_BLOCK[device], dtype=torch.uint8, pin_memory=device == "cuda")

    def best(act: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            act()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return _BLOCK[device] / min(seconds)

    return best(lambda: here.copy_(there)), best(lambda: there.copy_(here))


def _dcp(job: Job, folder: Path, rounds: int) -> list[Cost]:
    # Without a GPU it can pin no memory, and keeps none.
    stager = BlockingAsyncStager(cache_staged_state_dict=job.device == "cuda")
    numbers = iter(range(1 + rounds))

    def save() -> Callable[[], object]:
        target = folder / f"dcp-{next(numbers)}"
        begun = dcp.async_save(job.state(), checkpoint_id=target, async_stager=stager)
        return getattr(begun, "upload_completion", begun).result

    rendezvous = f"file://{folder.resolve()}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        return [job.cost(save) for _ in range(1 + rounds)]
    finally:
        dist.destroy_process_group()


def _torch_save(job: Job, folder: Path) -> None:
    with (folder / "torch.pt").open("wb") as stream:
        torch.save(job.state(), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _loads(job: Job, folder: Path, up: float, rounds: int) -> list[Row]:
    def ours() -> None:
        with Checkpointer(folder / "sync", job.parts()) as saver:
            assert saver.recover_if_possible() is not None

    def mapped() -> None:
        path = folder / "torch.pt"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, part in job.parts().items():
            part.load_state_dict(state[name])

    def read() -> None:
        buffer = bytearray(2**24)
        with (folder / "torch.pt").open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    peaks: list[int] = []
    with job.peak(peaks):
        seconds = statistics.median(job.timed(ours) for _ in range(rounds))
    disk = job.bytes / statistics.median(job.timed(read) for _ in range(rounds))
    theirs = statistics.median(job.timed(mapped) for _ in range(rounds))
    share = job.bytes / seconds / min(disk, up)
    return [
        Row("one thread that reads the file", f"{disk / 1e9:.2f} GB/s"),
        Row("load", f"{job.bytes / seconds / 1e9:.2f} GB/s"),
        Row("torch.load(mmap=True) + load_state_dict", f"{job.bytes / theirs / 1e9:.2f} GB/s"),
        Row(
            "load, in the lower of disk and bandwidth", f"{share:.2f}", "at least 0.7", share >= 0.7
        ),
        _at_most("GPU memory of a load, in MB", max(peaks, default=0) / 1e6, 64),
    ]
