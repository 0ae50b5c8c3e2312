"""Lightning's own callbacks beside ours: what they set up, and what can't be resumed exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from _runs import BATCHES, Steps, fit, go, make, raise_at, steps_saved
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn


class Pruned(Steps):
    """Has weights that can be pruned."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def pruning():
    return ModelPruning("l1_unstructured", amount=0.5)


def test_what_pruning_loses_is_said_at_the_first_fit_and_in_the_report(tmp_path):
    """Before the crash, not after it."""
    said = r"ModelPruning makes what it has pruned permanent in what is saved"
    with pytest.warns(UserWarning, match=f"SBCheckpoint: {said}"):
        fit(tmp_path, module=Pruned(), callbacks=[pruning()], trainer={"max_epochs": 1})
    run = fit(tmp_path, module=Pruned(), callbacks=[pruning()], trainer={"max_epochs": 2})
    assert [note for note in run.callback.resume_report.notes if "ModelPruning" in note]


def averaging():
    return StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1, annealing_epochs=2)


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.of_step = {}

    def on_train_batch_start(self, trainer, *args):
        self.of_step[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


class TestStochasticWeightAveraging:
    """It has a scheduler of its own from some epoch on, which a new run does not have yet."""

    @pytest.mark.parametrize("at", [BATCHES + 1, BATCHES + 3, 2 * BATCHES + 1, 2 * BATCHES + 3])
    def test_a_run_goes_on_with_the_same_rates(self, tmp_path, at):
        """Interrupted as an epoch begins, and within one, before and while rates change."""
        rates = Rates()
        whole = fit(tmp_path / "whole", callbacks=[averaging(), rates])
        assert [*dict.fromkeys(rates.of_step.values())] == [1.0, 0.75, 0.5]
        options = {"every_n_train_steps": 1, "num_to_keep": 99}
        interrupted = make(
            tmp_path / "run",
            callbacks=[averaging(), raise_at("on_train_batch_start", at, RuntimeError("gone"))],
            **options,
        )
        with pytest.raises(RuntimeError, match="gone"):
            go(interrupted)
        rates_after = Rates()
        run = fit(tmp_path / "run", callbacks=[averaging(), rates_after], **options)
        assert rates_after.of_step
        assert rates_after.of_step.items() <= rates.of_step.items()
        assert steps_saved(tmp_path / "run")[-1] == 3 * BATCHES
        groups = [copy.copy(each.trainer.optimizers[0].param_groups[0]) for each in (whole, run)]
        for group in groups:
            del group["params"]
        assert groups[0] == groups[1]
        assert torch.equal(run.module.weight, whole.module.weight)

    def test_a_run_that_is_over_is_over(self, tmp_path):
        """Started again there is nothing to do."""
        whole = fit(tmp_path, callbacks=[averaging()])
        again = fit(tmp_path, callbacks=[averaging()])
        assert again.trainer.global_step == 3 * BATCHES
        assert torch.equal(again.module.weight, whole.module.weight)


def test_accumulation_is_that_of_the_epoch_that_is_gone_on_with(tmp_path):
    """Not that of the first."""
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    options = {"every_n_train_steps": 1, "num_to_keep": 99}
    run = make(
        tmp_path,
        callbacks=[scheduler, raise_at("on_train_batch_start", BATCHES + 3, RuntimeError("gone"))],
        **options,
    )
    with pytest.raises(RuntimeError, match="gone"):
        go(run)
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 5]
    run = fit(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})], **options)
    # Two steps in each of the last two epochs.
    assert steps_saved(tmp_path) == [*range(1, 9)]
