"""Runs so small and so regular that what they must have saved can be said in advance.

The module's one weight is minus the number of steps that trained it, so that weights tell where
they are from; its validation loss is whatever the test wants. An epoch has four batches.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from _processes import context
from torch import nn
from torch.utils.data import DataLoader

from lightning_sbckpt import Checkpoint, Checkpointer, SBCheckpoint, ckpt_recency

BATCHES = 4
"""How many batches, and steps, an epoch has."""


def falling(steps: int) -> float:
    """Return a loss that is lower the longer the training was."""
    return 1 / (1 + steps)


def by_epoch(*losses: float) -> Callable[[int], float]:
    """Return a loss that is as told after each epoch."""
    return lambda steps: losses[max(0, steps - 1) // BATCHES]


class Steps(L.LightningModule):
    """A module whose weights say how many steps have trained them."""

    def __init__(self, loss: Callable[[int], float] = falling) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.loss = loss

    @property
    def steps(self) -> int:
        """How many steps these weights have taken."""
        return round(-self.weight.item())

    def training_step(self, batch, batch_idx):
        loss = self.weight.sum()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.steps))

    def test_step(self, batch, batch_idx):
        self.log("test_steps", float(self.steps))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class At(L.Callback):
    """Does something at the `count`-th call of a hook."""

    def __init__(self, hook: str, count: int, act: Callable[[], object]) -> None:
        self.hook, self.count, self.act, self.calls = hook, count, act, 0
        setattr(self, hook, self._called)

    def _called(self, *args: object, **kwargs: object) -> None:
        self.calls += 1
        if self.calls == self.count:
            self.act()


def raise_at(hook: str, count: int, exception: BaseException) -> At:
    """Return a callback that raises."""

    def act() -> None:
        raise exception

    return At(hook, count, act)


def die_at(hook: str, count: int) -> At:
    """Return a callback that kills the process, as `kill -9` would."""
    return At(hook, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


class Run(NamedTuple):
    """What took part in a fit."""

    trainer: L.Trainer
    module: Any
    callback: SBCheckpoint


def loader(batches: int = BATCHES) -> DataLoader:
    """Return a loader of so many batches of one number."""
    return DataLoader(torch.zeros(batches, 1))


def make(
    dirpath: Path,
    *,
    module: L.LightningModule | None = None,
    callbacks: Sequence[L.Callback] = (),
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Return a run that is ready to fit; `options` are those of `SBCheckpoint`."""
    torch.set_num_threads(1)
    callback = SBCheckpoint(dirpath, **options)
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **(trainer or {}),
    }
    made = L.Trainer(**settings, callbacks=[*callbacks, callback])
    return Run(made, Steps() if module is None else module, callback)


def go(run: Run, *, val: bool = True, data: object = None, ckpt_path: object = None) -> Run:
    """Fit a run, with its usual loaders or with a datamodule."""
    if data is not None:
        run.trainer.fit(run.module, datamodule=data, ckpt_path=ckpt_path)
    else:
        run.trainer.fit(run.module, loader(), loader(1) if val else None, ckpt_path=ckpt_path)
    return run


def fit(
    dirpath: Path,
    *,
    val: bool = True,
    data: object = None,
    ckpt_path: object = None,
    **options: Any,
) -> Run:
    """Make a run and fit it."""
    return go(make(dirpath, **options), val=val, data=data, ckpt_path=ckpt_path)


def saved(dirpath: Path) -> list[Checkpoint]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(Checkpointer(dirpath).list_checkpoints(), key=ckpt_recency)


def steps_saved(dirpath: Path) -> list[int]:
    """Return the global steps of the checkpoints in a folder, oldest first."""
    return [int(ckpt.meta["global_step"]) for ckpt in saved(dirpath)]


def newest(dirpath: Path) -> Checkpoint:
    """Return the newest checkpoint in a folder."""
    return saved(dirpath)[-1]


def damage(checkpoint: Checkpoint) -> None:
    """Change one byte of the model of a checkpoint."""
    path = checkpoint.paramfiles["model"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def kill(target: Callable[..., object], *args: object) -> None:
    """Run a function in a process of its own that has to kill itself."""
    process = context.Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
