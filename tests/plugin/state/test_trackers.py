"""torchmetrics' `MetricTracker` goes on within an epoch: it makes its metrics as training goes on."""

from __future__ import annotations

import torch
import torchmetrics
from _stopped import Net, assert_resumes_exactly, fit, seeded
from torchmetrics.wrappers import MetricTracker

from lightning_sbckpt import Checkpointer


class Tracking(Net):
    """Tracks a collection of metrics, a step for each epoch; logs all of it at the end."""

    def __init__(self):
        super().__init__()
        errors = [torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()]
        self.errors = MetricTracker(torchmetrics.MetricCollection(errors), maximize=[False, False])

    def on_train_epoch_start(self):
        self.errors.increment()

    def training_step(self, batch, index):
        self.errors.update(self(batch[0]).detach(), batch[1])
        return super().training_step(batch, index)


def test_a_tracker_goes_on_within_an_epoch(tmp_path):
    """With the metrics of the epochs before and what it has gathered in this one."""
    resumed = assert_resumes_exactly(tmp_path, Tracking, restore_best=False)
    whole = fit(tmp_path / "again", seeded(Tracking), every_n_train_steps=1, restore_best=False)
    found, expected = (run.module.errors.compute_all() for run in (resumed, whole))
    assert {name: len(values) for name, values in found.items()} == {
        "MeanSquaredError": 2,
        "MeanAbsoluteError": 2,
    }
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_tracker_among_the_recoverables_gets_its_metrics_back(tmp_path):
    """As many as it had, in a new one and in one that has gone on."""
    tracker = MetricTracker(torchmetrics.MeanMetric(), maximize=True)
    for value in (1.0, 2.0, 3.0):
        tracker.increment()
        tracker.update(value)
    Checkpointer(tmp_path, {"tracker": tracker}).save_checkpoint()
    used = MetricTracker(torchmetrics.MeanMetric(), maximize=True)
    for _ in range(5):
        used.increment()
        used.update(9.0)
    for other in (MetricTracker(torchmetrics.MeanMetric(), maximize=True), used):
        Checkpointer(tmp_path, {"tracker": other}, access="read").recover_if_possible()
        assert other.compute_all().tolist() == [1.0, 2.0, 3.0]
        other.update(5.0)
        assert other.compute() == 4.0
