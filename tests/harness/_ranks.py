"""Fits of several gloo ranks, each a process of its own, that can't outlive a test.

The processes are forked from a server that has imported everything, so that a fit of two ranks
takes about a second. Each believes that Lightning's launcher has started it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from _processes import context
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_sbckpt import Checkpoint, Checkpointer, SBCheckpoint, ckpt_recency
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt.plugin import comparison, selftest

SAMPLES, FEATURES, CLASSES, BATCH = 32, 6, 3, 4
SEED = 11


class Ended(NamedTuple):
    """How the ranks of a job ended."""

    codes: list[int | None]
    outputs: list[str]
    seconds: float


class Job:
    """Ranks that run `target(folder, rank, *args)`; the others are killed when one is killed.

    Args:
        target: A function of a module.
        folder: Where their output goes, too.
        args: More arguments of the target.
        size: How many ranks.
        alone: Leave a rank alone when another one was killed.
        environment: More environment variables.
    """

    def __init__(
        self,
        target: Callable[..., object],
        folder: Path,
        *args: object,
        size: int = 2,
        alone: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        _warm_up()
        self.folder, self.alone, self.began = folder, alone, time.monotonic()
        port = free_port()
        self.processes = [
            context.Process(
                target=_child, args=(target, folder, rank, size, port, args, environment or {})
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """End those that are still there."""
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout: float = 60.0) -> Ended:
        """Return when all have ended; fail if they don't in time."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in self.processes):
                if not self.alone and -signal.SIGKILL in self.codes():
                    for process in self.processes:
                        process.kill()
                assert time.monotonic() < deadline, f"still going: {self.outputs()}"
                time.sleep(0.02)
        finally:
            self.kill()
        return Ended(self.codes(), self.outputs(), time.monotonic() - self.began)

    def codes(self) -> list[int | None]:
        """Return the exit codes so far."""
        return [process.exitcode for process in self.processes]

    def outputs(self) -> list[str]:
        """Return what each rank has printed so far."""
        files = [self.folder / f"output{rank}.txt" for rank in range(len(self.processes))]
        return [file.read_text() if file.exists() else "" for file in files]

    def until(self, name: str, timeout: float = 60.0) -> None:
        """Return when there is a file of that name in the folder."""
        deadline = time.monotonic() + timeout
        while not (self.folder / name).exists():
            ended = [code for code in self.codes() if code is not None]
            assert not ended and time.monotonic() < deadline, f"no {name}: {self.outputs()}"
            time.sleep(0.01)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some of the ranks."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)


def run(
    target: Callable[..., object],
    folder: Path,
    *args: object,
    size: int = 2,
    alone: bool = False,
    timeout: float = 60.0,
) -> Ended:
    """Run a job to its end."""
    return Job(target, folder, *args, size=size, alone=alone).wait(timeout)


@functools.cache
def _warm_up() -> None:
    """Wait until the server has imported everything, which is no part of any job's time."""
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _child(target, folder, rank, size, port, args, environment) -> None:
    # Workers of loaders are forked, as they are in a script of a user.
    multiprocessing.set_start_method("fork", force=True)
    output = os.open(folder / f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(size),
            # Loopback, whatever the host is called.
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        }
    )
    torch.set_num_threads(1)
    target(folder, rank, *args)


# ---------------------------------------------------------------------- what they train


class Numbers(Dataset):
    """Random but fixed samples, with noise from every global random stream."""

    def __init__(self, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(length, FEATURES, generator=generator)
        self.y = torch.randint(CLASSES, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        noise = torch.randn(FEATURES) + random.random() + np.random.rand()  # noqa: NPY002 - the global stream is meant
        return (self.x[index] + 0.1 * noise).float(), self.y[index]


class Model(L.LightningModule):
    """A classifier with all that differs from rank to rank: noise, statistics, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            # So wide that its copy is hidden behind training where that is asked for.
            nn.Linear(FEATURES, 6000),
            nn.Linear(6000, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(8, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.mean = MeanMetric()

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach() * torch.rand(()))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_synced", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("train_mean", self.mean.compute())
        self.mean.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


Made = tuple[L.Trainer, L.LightningModule, SBCheckpoint, dict[str, DataLoader]]


def make(
    dirpath: Path,
    rank: int = 0,
    *,
    size: int = 2,
    module: Callable[[], L.LightningModule] | None = None,
    callbacks: Sequence[L.Callback] = (),
    trainer: Mapping[str, object] | None = None,
    **checkpoint: object,
) -> Made:
    """Return what a rank fits; every rank draws numbers of its own."""
    L.seed_everything(SEED + rank, verbose=False)
    callback = SBCheckpoint(dirpath, **{"min_key": "val_loss", **checkpoint})
    made = L.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": size,
            "strategy": "ddp" if size > 1 else "auto",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            **(trainer or {}),
        },
        callbacks=[*callbacks, callback],
    )
    data = Numbers()
    sampler = DistributedSampler(data, size, rank, shuffle=True, seed=3)
    loaders = {
        "train_dataloaders": DataLoader(data, BATCH, sampler=sampler),
        "val_dataloaders": DataLoader(Numbers(2 * BATCH), BATCH),
    }
    return made, (module or Model)(), callback, loaders


def traced_fit(folder: Path, rank: int, kill: str | None, options: Mapping[str, object]) -> None:
    """Make what a rank fits, and fit it as `trace` does."""
    made = make(folder / "checkpoints", rank, **options)
    trace(folder, rank, kill, made, lambda module: dict(module.state_dict()))


def trace(
    folder: Path,
    rank: int,
    kill: str | None,
    made: Made,
    weights: Callable[[L.LightningModule], object],
) -> None:
    """Fit, writing down all that can be compared, and kill itself where told to."""
    trainer, module, callback, loaders = made
    lines = folder / f"trace{rank}.jsonl"
    lines.unlink(missing_ok=True)
    point = None if kill is None else selftest.KillPoint.parse(kill)
    recorder = selftest.record(
        trainer, lines, folder / "checkpoints", point, folder / f"killed{rank}"
    )
    trainer.fit(module, **loaders)
    after = {"at the end of training": recorder.state, "after the fit": weights(module)}
    torch.save(after, folder / f"final{rank}.pt")
    (folder / f"best{rank}.txt").write_text(callback.best_model_path)
    if callback.resume_report is not None:
        (folder / f"report{rank}.txt").write_text(str(callback.resume_report))


def outcome(folder: Path, rank: int) -> comparison.Outcome:
    """Return what a rank has written down by `trace`."""
    import json

    lines = (folder / f"trace{rank}.jsonl").read_text().splitlines()
    final = torch.load(folder / f"final{rank}.pt", weights_only=True)
    return comparison.Outcome([json.loads(line) for line in lines], final)


def differences(reference: Path, resumed: Path, rank: int) -> list[str]:
    """Return what differs between a rank of two runs, in words."""
    return comparison.differences(outcome(reference, rank), outcome(resumed, rank))


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints of a job, oldest first."""
    return sorted(Checkpointer(folder / "checkpoints").list_checkpoints(), key=ckpt_recency)


def reason(checkpoint: Checkpoint) -> str:
    """Return why a checkpoint was saved."""
    return read_manifest(checkpoint.path).lineage["reason"]


def to_myself(name: str) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), signal.Signals[name])
