"""Lightning's own callbacks beside ours: what they set up, and what can't be resumed exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from _runs import BATCHES, Steps, fit, go, make, raise_at, steps_saved
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


class TestStochasticWeightAveraging:
    """It has a scheduler of its own from some epoch on, which a new run does not have yet."""

    @pytest.mark.parametrize("at", [BATCHES + 1, BATCHES + 3])
    def test_a_run_goes_on_with_the_same_rates(self, tmp_path, at):
        """Interrupted as an epoch begins, and within one; the callback is left as it was."""
        whole = fit(tmp_path / "whole", callbacks=[averaging()])
        options = {"every_n_train_steps": 1, "num_to_keep": 99}
        interrupted = make(
            tmp_path / "run",
            callbacks=[averaging(), raise_at("on_train_batch_start", at, RuntimeError("gone"))],
            **options,
        )
        with pytest.raises(RuntimeError, match="gone"):
            go(interrupted)
        callback = averaging()
        run = fit(tmp_path / "run", callbacks=[callback], **options)
        assert "on_train_epoch_start" not in vars(callback)
        assert steps_saved(tmp_path / "run")[-1] == 3 * BATCHES
        groups = [copy.copy(each.trainer.optimizers[0].param_groups[0]) for each in (whole, run)]
        for group in groups:
            del group["params"]
        assert groups[0] == groups[1]
        assert torch.equal(run.module.weight, whole.module.weight)

    def test_a_run_that_is_over_leaves_the_callback_alone(self, tmp_path):
        """Started again there is nothing to do, and no epoch starts."""
        fit(tmp_path, callbacks=[averaging()])
        callback = averaging()
        fit(tmp_path, callbacks=[callback])
        assert "on_train_epoch_start" not in vars(callback)


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
