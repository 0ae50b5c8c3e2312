"""Small checkpoints, the removal of large ones, and what unchanged files cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk import RawWrite, bytes_on_disk, flush, flush_folder, scratch
from benchmarks.measure import Section, Settings, Table, size_label, timed
from benchmarks.peer import OURS, saver
from benchmarks.peers import ASYNC, SYNC, Ours, opened
from benchmarks.saving import RAW
from benchmarks.states import State

REMOVE = "shutil.rmtree"
TEN_WHOLE = "torch.save, ten files"
ONE_STATE = "one whole state"


def run_small(settings: Settings) -> Section:
    """Measure saves of 1 MB."""
    table = Table("Time until `save` returns", "s", "torch.save + fsync", columns_are="")
    section = Section(
        "small",
        "Small checkpoints",
        "1 MB in 12 layers; as above, but every save counts for little and the flush for much.",
        {"small": table},
    )
    state = State(1.0, layers=12)
    chosen = {**SYNC, **{name: make for name, make in ASYNC.items() if name.startswith(OURS)}}
    with (
        scratch(settings.folder / "small") as folder,
        opened(chosen, state, folder, section.failures) as peers,
    ):
        raw = RawWrite(folder / "raw", state.bytes())
        subjects: dict[str, Callable[[], float]] = {RAW: raw.seconds}
        subjects |= {name: saver(peer, state) for name, peer in peers.items()}
        rounds = settings.interleave(subjects, 30, failures=section.failures)
        table.add("1 MB", rounds)
    print("  small: done", flush=True)
    return section


def run_removal(settings: Settings) -> Section:
    """Measure how long the caller waits for a removal."""
    size = settings.main_size
    table = Table(
        f"Time the caller waits for the removal of {size_label(size)}", "s", REMOVE, columns_are=""
    )
    section = Section(
        "remove",
        "Removing old checkpoints",
        "`delete_checkpoints(num_to_keep=1)` with two checkpoints there, against "
        f"`{REMOVE}` of a folder of the same size.",
        {"remove": table},
    )
    state = State(size)
    with scratch(settings.folder / "remove") as folder:
        peer = Ours("sync")
        peer.open(state, folder / "ours")

        def ours() -> float:
            while len(list(peer.folder.glob("CKPT*"))) < 2:
                state.change()
                peer.save()
            seconds = timed(lambda: peer.checkpointer.delete_checkpoints(num_to_keep=1))
            peer.wait()
            _until_gone(peer.folder, keep=1)
            return seconds

        def plain() -> float:
            target = folder / "plain"
            target.mkdir()
            torch.save(state.as_dict(), target / "state")
            flush(target)
            seconds = timed(lambda: shutil.rmtree(target))
            flush_folder(folder)
            return seconds

        rounds = settings.interleave({REMOVE: plain, f"{OURS}, sync": ours}, 5)
        peer.close()
    table.add(size_label(size), rounds)
    print("  remove: done", flush=True)
    return section


def _until_gone(folder: Path, *, keep: int) -> None:
    """Wait until the removal that goes on in the background, if one does, has ended."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        entries = [path for path in folder.iterdir() if path.is_dir()]
        if len(entries) <= keep:
            return
        time.sleep(0.02)


def run_dedup(settings: Settings) -> Section:
    """Count the bytes of ten checkpoints of a model of which most is frozen."""
    table = Table("Bytes on disk of ten checkpoints", "bytes", ONE_STATE, columns_are="")
    section = Section(
        "dedup",
        "Ten checkpoints of a model that is 95 % frozen",
        "A backbone that is not trained has 95 % of the weights; a head, trained by plain SGD, "
        "changes between two saves. Each is a recoverable of its own.",
        {"dedup": table},
    )
    with scratch(settings.folder / "dedup") as folder:
        backbone, head, optimizer = frozen_model()
        recoverables = {"backbone": backbone, "head": head, "optimizer": optimizer}
        weights = [*backbone.parameters(), *head.parameters()]

        from lightning_sbckpt import Checkpointer

        checkpointer = Checkpointer(folder / "ours", recoverables)
        plain = folder / "plain"
        plain.mkdir()
        for number in range(10):
            head(torch.ones(1, head.in_features)).sum().backward()
            optimizer.step()
            checkpointer.save_checkpoint({"number": number})
            states: dict[str, Any] = {n: r.state_dict() for n, r in recoverables.items()}
            torch.save(states, plain / str(number))
        checkpointer.wait()
        table.cells = {
            (ONE_STATE, "bytes"): [float(sum(weight.nbytes for weight in weights))],
            (TEN_WHOLE, "bytes"): [float(bytes_on_disk(plain))],
            (f"{OURS}, sync", "bytes"): [float(bytes_on_disk(folder / "ours"))],
        }
    print("  dedup: done", flush=True)
    return section


def frozen_model() -> tuple[torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer]:
    """Return a backbone of 19 equal layers, a head as large as one, and the head's optimizer."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*(torch.nn.Linear(400, 400) for _ in range(19)))
    backbone.requires_grad_(False)
    head = torch.nn.Linear(400, 400)
    return backbone, head, torch.optim.SGD(head.parameters(), lr=0.1)
