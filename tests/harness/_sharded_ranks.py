"""Gloo ranks with a model in pieces, each a process of its own that can't outlive a test."""

from __future__ import annotations

import io
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from _processes import context
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage

# A failure must reach the other rank as a message; waiting for a timeout would take longer.
SECONDS = 60


def plain_model(seed: int = 0) -> nn.Module:
    """Return the model as it is before anything is done to it: uneven sizes, and buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def sharded_model(seed: int = 0) -> nn.Module:
    """Return the model in as many pieces as there are ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain_model(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Make some steps, the same on every rank whatever their number."""
    for step in range(first, first + steps):
        data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(
    folder: Path, seed: int = 0, *, storage: LocalStorage | None = None, **options: object
) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    """Return a checkpointer with a model in pieces and its optimizer."""
    model = sharded_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recoverables = {"model": model, "optimizer": optimizer}
    return Checkpointer(folder, recoverables, storage=storage, **options), model, optimizer


def whole(value: object) -> object:
    """Return a state with every tensor as a whole; every rank calls this."""
    if isinstance(value, torch.Tensor):
        found = value.full_tensor() if hasattr(value, "full_tensor") else value
        return found.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def same(a: object, b: object) -> bool:
    """Return whether two whole states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def child(task, rank, size, folder, answers, args) -> None:
    """Run `task(folder, rank, *args)` in a group and send back what came of it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = folder / f"rendezvous{size}"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{meeting}")
    try:
        answer = task(folder / "run", rank, *args)
    except BaseException as error:
        traceback.print_exc()
        answer = (type(error).__name__, str(error))
    # As bytes: a tensor in a queue needs the process that sent it.
    data = io.BytesIO()
    torch.save(answer, data)
    answers.put((rank, data.getvalue()))
    # Not before the others: what they wait for must not be our end.
    (folder / f"done{size}.{rank}").touch()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if all((folder / f"done{size}.{other}").exists() for other in range(size)):
            return
        time.sleep(0.01)


def run(
    task: Callable[..., object],
    folder: Path,
    *args: object,
    size: int = 2,
    dying: int | None = None,
) -> list[object]:
    """Run a task on as many ranks; return their answers, without that of a rank that is to die."""
    for leftover in (*folder.glob("done*"), *folder.glob("rendezvous*")):
        leftover.unlink()
    answers = context.Queue()
    children = [
        context.Process(target=child, args=(task, rank, size, folder, answers, args))
        for rank in range(size)
    ]
    for each in children:
        each.start()
    got: dict[int, object] = {}
    deadline = time.monotonic() + 2 * SECONDS
    try:
        while len(got) < size - (dying is not None):
            try:
                rank, answer = answers.get(timeout=0.5)
            except queue.Empty:
                assert time.monotonic() < deadline, f"only {got} have answered"
                continue
            got[rank] = torch.load(io.BytesIO(answer), weights_only=False)
            deadline = min(deadline, time.monotonic() + SECONDS)
            if dying is not None:
                (folder / f"done{size}.{dying}").touch()
    finally:
        for each in children:
            each.kill()
            each.join()
    return [got[rank] for rank in sorted(got)]
