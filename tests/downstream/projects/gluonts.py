"""GluonTS: an estimator that makes module, loaders and Trainer, and reads its own best file back."""

from __future__ import annotations

import numpy as np
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator

PINS = ("gluonts[torch]==0.17.0",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
PREVENTS = {"test": "its modules have no `test_step`"}
NOTES = (
    "its modules save no hyperparameters, so `load_from_checkpoint` can build none, from Lightning's own files neither: the weights go into a module that the estimator makes",
    "it adds a `ModelCheckpoint` of its own, whose best weights it takes after the fit",
)


def train(trainer, folder):
    numbers = np.sin(np.arange(60) / 4)
    series = [{"start": "2026-01-01", "target": numbers + shift} for shift in range(4)]
    data = ListDataset(series, freq="D")
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=4,
        context_length=8,
        hidden_size=4,
        batch_size=4,
        num_batches_per_epoch=7,
        trainer_kwargs=trainer,
    )
    predictor = estimator.train(data, data)

    def predict(best):
        torch.manual_seed(7)
        return [torch.from_numpy(each.samples) for each in predictor.predict(data)]

    def load(best):
        module = estimator.create_lightning_module()
        module.load_state_dict(torch.load(best / "model.ckpt", weights_only=True))
        return module

    return {"predict": predict, "load": load}
