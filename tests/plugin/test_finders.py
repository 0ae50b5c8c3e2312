"""Lightning's finders of a learning rate and of a batch size train for a while; that is no run."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch
from _ranks import Model, differences, run, traced_fit
from _releases import needs_lightning
from _runs import BATCHES, Steps, fit, go, make, raise_at, steps_saved
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

TRIAL = 24
"""How many steps a trial of learning rates has: several epochs, and enough to find something."""

LONG = {"max_epochs": 7}
"""A run that is longer than a trial, which its end would cut off."""


class Tuned(Steps):
    """Has what finders set, and notes from which weights each batch was trained."""

    def __init__(self):
        super().__init__()
        self.lr = 1.0
        self.trained_from = []

    def training_step(self, batch, batch_idx):
        self.trained_from.append(self.weight.item())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    """An epoch of the usual length, if the batch size is one."""

    def __init__(self):
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self):
        return DataLoader(torch.zeros(BATCHES, 1), self.batch_size)

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


def find(kind, run, data):
    """Let `Tuner` find something for a run."""
    tuner = Tuner(run.trainer)
    if kind == "learning rate":
        tuner.lr_find(run.module, datamodule=data, num_training=TRIAL, early_stop_threshold=None)
    else:
        tuner.scale_batch_size(run.module, datamodule=data, max_trials=1, steps_per_trial=9)
        data.batch_size = 1


kinds = pytest.mark.parametrize("kind", ["learning rate", "batch size"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Finders put a file of their own where the process is."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


class TestTuner:
    """It fits for itself, before the run."""

    @pytest.mark.sample(1)
    @kinds
    def test_what_it_tries_is_not_saved(self, tmp_path, kind):
        """Not even the folder is made; the run after it begins anew."""
        run, data = make(tmp_path / "run", module=Tuned(), num_to_keep=99), Data()
        find(kind, run, data)
        assert run.module.trained_from
        assert not (tmp_path / "run").exists()
        go(run, data=data)
        assert steps_saved(tmp_path / "run") == [BATCHES, 2 * BATCHES, 3 * BATCHES]
        assert run.callback.resume_report is None

    @pytest.mark.sample(1)
    @kinds
    def test_what_it_tries_does_not_begin_where_a_run_was_interrupted(self, tmp_path, kind):
        """It finds what it found when the run began, and the run goes on as if it had not been."""
        fit(tmp_path / "run", module=Tuned(), data=Data(), trainer={"max_epochs": 1})
        before = sorted(os.listdir(tmp_path / "run"))
        run, data = make(tmp_path / "run", module=Tuned(), num_to_keep=99), Data()
        find(kind, run, data)
        assert run.module.trained_from[0] == 0.0
        assert sorted(os.listdir(tmp_path / "run")) == before
        run.module.trained_from.clear()
        go(run, data=data)
        assert run.module.trained_from[0] == -BATCHES
        assert len(run.module.trained_from) == 2 * BATCHES
        assert steps_saved(tmp_path / "run") == [BATCHES, 2 * BATCHES, 3 * BATCHES]

    def test_a_run_before_it_is_not_continued_by_it(self, tmp_path):
        """The same callback, in the same process: it looks at what the run has left, and no more."""
        run, data = fit(tmp_path / "run", module=Tuned(), data=Data()), Data()
        saved, best = steps_saved(tmp_path / "run"), run.callback.best_model_path
        find("learning rate", run, data)
        assert steps_saved(tmp_path / "run") == saved
        assert run.callback.best_model_path == best


def lr_finder():
    return LearningRateFinder(num_training_steps=TRIAL, early_stop_threshold=None)


def batch_size_finder():
    return BatchSizeFinder(init_val=1, max_trials=2, steps_per_trial=9)


finders = pytest.mark.parametrize("finder", [lr_finder, batch_size_finder])
whole_epochs = needs_lightning("2.6", "an epoch, the first after a search, that is not left out,")


class TestAmongTheCallbacks:
    """It searches within the fit of the run, before the first step."""

    @pytest.mark.sample(1)
    @whole_epochs
    @finders
    def test_only_the_run_is_saved(self, tmp_path, finder):
        """With everything that makes a checkpoint due; the report is not the finder's."""
        run = fit(
            tmp_path,
            module=Tuned(),
            data=Data(),
            callbacks=[finder()],
            trainer=LONG,
            every_n_train_steps=1,
            num_to_keep=99,
        )
        assert len(run.module.trained_from) > run.trainer.global_step
        assert steps_saved(tmp_path) == [*range(1, run.trainer.global_step + 1)]
        assert run.callback.resume_report is None

    @pytest.mark.sample(1)
    @whole_epochs
    @finders
    def test_a_run_that_goes_on_does_not_search_again(self, tmp_path, finder):
        """It has what was found when it began, and trains the steps that are left."""
        options = {"every_n_train_steps": 1, "num_to_keep": 99, "trainer": LONG}
        first = make(
            tmp_path,
            module=Tuned(),
            callbacks=[finder(), raise_at("on_train_batch_start", 7, RuntimeError("gone"))],
            **options,
        )
        data = Data()
        with pytest.raises(RuntimeError, match="gone"):
            go(first, data=data)
        assert steps_saved(tmp_path) == [*range(1, 7)]
        found = first.module.lr, data.batch_size
        assert found != (1.0, 1)
        # As in a new process, where neither is what was found.
        second, fresh = make(tmp_path, module=Tuned(), callbacks=[finder()], **options), Data()
        go(second, data=fresh)
        assert (second.module.lr, fresh.batch_size) == found
        assert len(second.module.trained_from) == second.trainer.global_step - 6
        assert second.module.trained_from[0] == first.module.weight.item()
        assert steps_saved(tmp_path) == [*range(1, second.trainer.global_step + 1)]
        (note,) = [n for n in second.callback.resume_report.notes if "search" in n]
        name = "lr" if finder is lr_finder else "batch_size"
        assert type(second.trainer.callbacks[0]).__name__ in note
        assert f"{name} is {found[0] if name == 'lr' else found[1]:g}" in note

    def test_one_that_is_new_to_the_run_finds_nothing(self, tmp_path):
        """The checkpoint has the learning rates that the run goes on with."""
        fit(tmp_path, module=Tuned(), data=Data(), trainer={"max_epochs": 1})
        run = fit(tmp_path, module=Tuned(), data=Data(), callbacks=[lr_finder()])
        assert len(run.module.trained_from) == 2 * BATCHES
        (note,) = [n for n in run.callback.resume_report.notes if "search" in n]
        assert note == "LearningRateFinder does not search again as a run goes on"

    def test_it_searches_again_in_a_run_that_begins_anew(self, tmp_path):
        """The callback is as it was when its run had gone on from a checkpoint."""
        fit(tmp_path / "a", module=Tuned(), data=Data(), trainer={"max_epochs": 1})
        finder = lr_finder()
        fit(tmp_path / "a", module=Tuned(), data=Data(), callbacks=[finder])
        assert getattr(finder, "optimal_lr", None) is None
        fit(tmp_path / "b", module=Tuned(), data=Data(), callbacks=[finder], trainer=LONG)
        assert finder.optimal_lr is not None


class TunedOnRanks(Model):
    """Has a learning rate that can be found."""

    def __init__(self):
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@whole_epochs
@pytest.mark.slow
def test_two_killed_ranks_go_on_with_what_they_had_found(tmp_path):
    """To the bit; every rank has searched, and none searches again."""
    options = {
        "module": TunedOnRanks,
        "callbacks": [LearningRateFinder(num_training_steps=8, early_stop_threshold=None)],
        "trainer": {"max_epochs": 4, "default_root_dir": tmp_path},
        "every_n_train_steps": 1,
        "num_to_keep": 2,
    }
    assert run(traced_fit, tmp_path / "through", None, options).codes == [0, 0]
    killed = run(traced_fit, tmp_path / "killed", "on_train_batch_end:14", options)
    assert killed.codes == [-signal.SIGKILL] * 2
    assert run(traced_fit, tmp_path / "killed", None, options).codes == [0, 0]
    for rank in range(2):
        assert "does not search again" in (tmp_path / "killed" / f"report{rank}.txt").read_text()
        assert differences(tmp_path / "through", tmp_path / "killed", rank) == []
