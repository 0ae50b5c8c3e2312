"""Starts that are of a checkpoint's experiment, though a class looks like another one."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from _runs import Steps, fit, loader
from _stopped import Net
from _stopped import fit as fit_until
from torch import nn

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import experiment


class Data(L.LightningDataModule):
    """A datamodule."""

    def train_dataloader(self):
        return loader(4)

    def val_dataloader(self):
        return loader(1)


class RenamedData(L.LightningDataModule):
    """The same data, by another name."""

    train_dataloader = Data.train_dataloader
    val_dataloader = Data.val_dataloader


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, tensor):
        return tensor / 2


def _parametrized():
    module = Steps()
    module.extra = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(module, "extra", Halved())
    return module


def _plain():
    module = Steps()
    module.extra = nn.Parameter(torch.ones(1))
    return module


def _compiled():
    return torch._dynamo.OptimizedModule(Steps(), torch._dynamo.disable)


@pytest.fixture
def new_process(monkeypatch):
    """A function that has this process know nothing of its earlier fits, as a new one would."""
    return lambda: monkeypatch.setattr(experiment, "_fits", {})


@pytest.mark.parametrize(("before", "now"), [(Steps, _compiled), (_compiled, Steps)])
def test_a_compiled_module_is_of_the_class_that_was_compiled(tmp_path, before, now):
    """In place of the plain one, in either direction; Lightning unwraps it."""
    fit(tmp_path, module=before(), trainer={"max_epochs": 1})
    run = fit(tmp_path, module=now(), trainer={"max_epochs": 2})
    assert run.trainer.global_step == 8
    assert run.callback.resume_report.changes == []


def test_a_class_that_torch_makes_of_the_users_is_the_users(tmp_path):
    """Parametrizations and `fully_shard` give a module a class of theirs, which derives from it."""
    assert type(_parametrized()).__module__.startswith("torch.")
    fit(tmp_path, module=_parametrized(), trainer={"max_epochs": 1})
    options = {"skip": ["model", "optimizer"], "trainer": {"max_epochs": 2}}
    run = fit(tmp_path, module=_plain(), **options)
    assert not [change for change in run.callback.resume_report.changes if "module:" in change]


def test_a_renamed_datamodule_is_said_in_a_new_process(tmp_path, new_process):
    """The data of a run may change, as Lightning has it."""
    fit(tmp_path, module=Steps(), data=Data(), trainer={"max_epochs": 1})
    new_process()
    run = fit(tmp_path, module=Steps(), data=RenamedData(), trainer={"max_epochs": 2})
    assert run.trainer.global_step == 8
    (change,) = run.callback.resume_report.changes
    assert change.startswith("datamodule: ") and "RenamedData' asked for" in change


def test_a_renamed_datamodule_of_a_complete_run_is_said_in_a_new_process(tmp_path, new_process):
    """As other data is."""
    fit(tmp_path, module=Steps(), data=Data(), trainer={"max_epochs": 1})
    new_process()
    run = fit(tmp_path, module=Steps(), data=RenamedData(), trainer={"max_epochs": 1})
    assert len(run.callback.resume_report.changes) == 1


def test_another_datamodule_with_a_new_module_is_refused_in_one_process(tmp_path):
    """As other data is: it is the next experiment of a script."""
    fit(tmp_path, module=Steps(), data=Data(), trainer={"max_epochs": 1})
    with pytest.raises(ConfigurationError, match=r"datamodule: .*RenamedData' asked for"):
        fit(tmp_path, module=Steps(), data=RenamedData(), trainer={"max_epochs": 2})


class WarmUp(torch.optim.lr_scheduler.LRScheduler):
    """Hands over to schedulers that it holds, as those of other libraries do."""

    def __init__(self, optimizer, gamma):
        self.after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)
        self.others = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)]
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        super().step(epoch)
        if hasattr(self, "after") and self.last_epoch > 0:
            self.after.step()


class Warming(Net):
    def __init__(self, gamma=0.9):
        super().__init__()
        self.gamma = gamma

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [WarmUp(optimizer, self.gamma)]


@pytest.mark.parametrize(
    ("gamma", "said"), [(0.9, []), (0.5, ["after.gamma", "others.gamma"])], ids=["same", "another"]
)
def test_schedulers_within_a_scheduler_are_compared_by_their_arguments(tmp_path, gamma, said):
    """Not by what they have counted."""
    options = {"every_n_train_steps": 1, "restore_best": False}
    fit_until(tmp_path, Warming(), stop=6, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_until(tmp_path, Warming(gamma), **options)
    text = "".join(str(each.message) for each in caught)
    assert [name for name in ("after.gamma", "others.gamma") if name in text] == said
    assert ("is not quite what is in" in text) == bool(said)
