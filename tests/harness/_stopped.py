"""Runs that end in the middle and go on in a new Trainer, to be compared with one that went through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
import torch
from _runs import make
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


class StoppedError(Exception):
    """Ends a fit as a crash would."""


class StopAt(L.Callback):
    """Raises after a number of training batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, *args):
        self.batches -= 1
        if not self.batches:
            raise StoppedError


class Net(L.LightningModule):
    """A small net with its optimizer."""

    def __init__(self, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.05))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def fit(dirpath, module, *, stop=None, epochs=2, val=False, trainer=None, **options):
    """Fit a module, whose first weights are always the same; return what took part."""
    run = make(
        dirpath,
        module=module,
        callbacks=[] if stop is None else [StopAt(stop)],
        trainer={"max_epochs": epochs, **(trainer or {})},
        **options,
    )
    data = DataLoader(DATA, 4, shuffle=True)
    with suppress(StoppedError):
        run.trainer.fit(module, data, DataLoader(DATA, 16) if val else None)
    return run


def seeded(make_module: Callable[[], L.LightningModule]) -> L.LightningModule:
    """Return a module as a script that seeds would make it."""
    L.seed_everything(7, verbose=False)
    return make_module()


def assert_resumes_exactly(dirpath, make_module, *, stop=6, **options) -> Any:
    """Stop a run after a batch of its second epoch, go on, and compare with one that went through."""
    options = {"every_n_train_steps": 1, **options}
    whole = fit(dirpath / "whole", seeded(make_module), **options)
    fit(dirpath / "stopped", seeded(make_module), stop=stop, **options)
    resumed = fit(dirpath / "stopped", seeded(make_module), **options)
    assert resumed.callback.resume_report is not None
    assert resumed.trainer.global_step == whole.trainer.global_step
    # What a module calls its state is its own affair; what it holds is compared.
    expected, found = (nn.Module.state_dict(run.module) for run in (whole, resumed))
    assert list(expected) == list(found)
    for key, value in expected.items():
        same = torch.equal(value, found[key]) if torch.is_tensor(value) else value == found[key]
        assert same, f"{key} differs"
    return resumed
