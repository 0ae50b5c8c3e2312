"""keep_lr=True goes on with this run's schedule, whatever computes it, from the first step on."""

from __future__ import annotations

import inspect

import pytest
import torch
from _stopped import Net, fit, seeded
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from lightning_sbckpt.errors import MismatchError

STEPS = 8
"""In two epochs."""


class Halving(LRScheduler):
    """A user's own, which multiplies what it finds."""

    def get_lr(self):
        return [
            group["lr"] * (0.5 if self.last_epoch else 1) for group in self.optimizer.param_groups
        ]


def sequential(optimizer, lr):
    """A warm-up, then a cosine."""
    parts = [
        schedulers.LinearLR(optimizer, 0.1, total_iters=3),
        schedulers.CosineAnnealingLR(optimizer, 5),
    ]
    return schedulers.SequentialLR(optimizer, parts, [3])


def chained(optimizer, lr):
    """Two at once."""
    parts = [
        schedulers.ConstantLR(optimizer, 0.1, total_iters=4),
        schedulers.ExponentialLR(optimizer, 0.9),
    ]
    return schedulers.ChainedScheduler(parts)


TABLE = {
    "LambdaLR": lambda o, lr: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o, lr: schedulers.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o, lr: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o, lr: schedulers.MultiStepLR(o, [2, 5], 0.1),
    "ConstantLR": lambda o, lr: schedulers.ConstantLR(o, 0.25, total_iters=6),
    "LinearLR": lambda o, lr: schedulers.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o, lr: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o, lr: schedulers.PolynomialLR(o, 7, power=2),
    "CosineAnnealingLR": lambda o, lr: schedulers.CosineAnnealingLR(o, 6, lr / 10),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o, lr: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o, lr: schedulers.CyclicLR(o, lr / 10, lr, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o, lr: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o, lr: schedulers.OneCycleLR(o, lr, total_steps=STEPS + 1),
    "SWALR": lambda o, lr: SWALR(o, swa_lr=lr / 2, anneal_epochs=4),
    "a user's own": lambda o, lr: Halving(o),
}


class Rates(Net):
    """Notes the rate, and the momentum, of each step."""

    def __init__(self, make_scheduler, lr, adam=False):
        super().__init__()
        self.make_scheduler, self.lr, self.adam, self.rates = make_scheduler, lr, adam, []

    def on_train_batch_start(self, *args):
        group = self.optimizers().param_groups[0]
        self.rates.append((group["lr"], group.get("momentum"), group.get("betas")))

    def training_step(self, batch, index):
        # A plateau from the first step on.
        self.log("level", 1.0)
        return super().training_step(batch, index)

    def configure_optimizers(self):
        if self.adam:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        else:
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        scheduler = self.make_scheduler(optimizer, self.lr)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "level"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def rates(dirpath, module, **options):
    """Fit a module and return its rates."""
    fit(dirpath, module, every_n_train_steps=1, **options)
    return module.rates


def test_every_scheduler_of_torch_is_in_the_table():
    """A new one must be tried, too."""
    known = {
        name
        for name, cls in vars(schedulers).items()
        if inspect.isclass(cls) and issubclass(cls, (LRScheduler, schedulers.ReduceLROnPlateau))
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= set(TABLE)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", TABLE)
def test_the_rates_are_those_of_this_runs_schedule(tmp_path, name):
    """As if this run had made the steps of before; no rate, and no momentum, of the other schedule."""
    make_scheduler = TABLE[name]
    whole = rates(tmp_path / "new", seeded(lambda: Rates(make_scheduler, 0.01)))
    rates(tmp_path / "run", seeded(lambda: Rates(make_scheduler, 0.1)), stop=5)
    kept = rates(tmp_path / "run", seeded(lambda: Rates(make_scheduler, 0.01)), keep_lr=True)
    assert len(kept) == STEPS - 4
    assert kept == whole[-len(kept) :]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_the_first_beta_follows_this_runs_schedule_too(tmp_path, name):
    """Both schedulers move it against the rate."""

    def module(lr):
        return seeded(lambda: Rates(TABLE[name], lr, adam=True))

    whole = rates(tmp_path / "new", module(0.01))
    rates(tmp_path / "run", module(0.1), stop=5)
    kept = rates(tmp_path / "run", module(0.01), keep_lr=True)
    assert kept == whole[-len(kept) :]


def test_another_scheduler_goes_on_from_where_the_saved_one_was(tmp_path):
    """Of the one before nothing but the number of its steps counts."""
    whole = rates(tmp_path / "new", seeded(lambda: Rates(TABLE["PolynomialLR"], 0.01)))
    rates(tmp_path / "run", seeded(lambda: Rates(TABLE["OneCycleLR"], 0.1)), stop=5)
    kept = rates(tmp_path / "run", seeded(lambda: Rates(TABLE["PolynomialLR"], 0.01)), keep_lr=True)
    assert kept == whole[-len(kept) :]


def test_a_schedule_that_is_shorter_than_what_was_trained_is_refused(tmp_path):
    """At once, with both numbers: it would refuse its next step, an epoch later perhaps."""

    def short(optimizer, lr):
        return schedulers.OneCycleLR(optimizer, lr, total_steps=3)

    rates(tmp_path, seeded(lambda: Rates(TABLE["OneCycleLR"], 0.1)), stop=6)
    with pytest.raises(MismatchError, match="this run's schedule has 3 steps, and 5 were made"):
        rates(tmp_path, seeded(lambda: Rates(short, 0.01)), keep_lr=True)


class Foreign:
    """A scheduler that is not torch's, and counts for itself."""

    def __init__(self, optimizer, base):
        self.optimizer, self.base, self.num_updates = optimizer, base, 0

    def step(self):
        self.num_updates += 1
        self.optimizer.param_groups[0]["lr"] = self.base / (1 + self.num_updates)

    def state_dict(self):
        return {"base": self.base, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict):
        self.__dict__.update(state_dict)


class WithForeign(Rates):
    """Steps one."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def test_a_scheduler_that_is_not_torchs_keeps_its_count_and_this_runs_rates(tmp_path):
    """Its first rate is that of its beginning, which is said; no rate of the checkpoint comes back."""
    whole = rates(tmp_path / "new", seeded(lambda: WithForeign(Foreign, 0.01)))
    rates(tmp_path / "run", seeded(lambda: WithForeign(Foreign, 0.1)), stop=5)
    module = seeded(lambda: WithForeign(Foreign, 0.01))
    run = fit(tmp_path / "run", module, every_n_train_steps=1, keep_lr=True)
    assert module.rates[0][0] == 0.01
    assert module.rates[1:] == whole[5:]
    assert any("only its counts go on" in line for line in run.callback.resume_report.skipped)


def test_a_plateau_beside_another_schedule_keeps_this_runs_first_rate(tmp_path):
    """How much of the rate is the plateau's own work can't be told then."""

    class Both(Rates):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), self.lr)
            both = [TABLE["ExponentialLR"](optimizer, 0), TABLE["ReduceLROnPlateau"](optimizer, 0)]
            return [optimizer], [
                {"scheduler": each, "interval": "step", "monitor": "level"} for each in both
            ]

    rates(tmp_path, Both(None, 0.1), stop=5)
    kept = rates(tmp_path, Both(None, 0.01), keep_lr=True)
    assert kept[0][0] == pytest.approx(0.01 * 0.9**4)


def test_a_rate_that_is_a_tensor_is_kept(tmp_path):
    """As capturable optimizers have it."""

    class TensorRate(Net):
        def __init__(self, lr):
            super().__init__()
            self.lr = lr

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), torch.tensor(self.lr))

    fit(tmp_path, TensorRate(0.1), epochs=1)
    run = fit(tmp_path, TensorRate(0.01), epochs=2, keep_lr=True)
    assert float(run.trainer.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.01)
