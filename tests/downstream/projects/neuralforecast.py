"""NeuralForecast: models that are their own Lightning modules, in a class that trains them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

from lightning_sbckpt.plugin.export import to_lightning

PINS = ("neuralforecast==3.3.0",)
LIGHTNING = "pytorch_lightning"
CHECKPOINT = {"min_key": "ptl/val_loss"}
PREVENTS = {"test": "its models have no `test_step`"}
NOTES = (
    "it turns checkpointing off unless it is given `enable_checkpointing=True`",
    "`MLP.load` opens the file itself, so it takes one made by `lightning-sbckpt export`; since the hyperparameters hold the callbacks, it wants `allow_pickle=True`",
)


def train(trainer, folder):
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(list("abcd"), 60),
            "ds": np.tile(pd.date_range("2026-01-01", periods=60), 4),
            "y": np.sin(np.arange(240) / 5) + np.tile(np.arange(60), 4) / 30,
        }
    )
    del trainer["max_epochs"]  # It counts steps.
    trainer["enable_checkpointing"] = True
    model = MLP(
        h=5,
        input_size=15,
        max_steps=28,
        hidden_size=8,
        val_check_steps=7,
        batch_size=2,
        windows_batch_size=16,
        **trainer,
    )
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(frame, val_size=5)

    def predict(best):
        return torch.from_numpy(forecast.predict()["MLP"].to_numpy())

    def load(best):
        file = to_lightning(best, folder / "exported.ckpt", overwrite=True).path
        return MLP.load(str(file), allow_pickle=True)

    return {"predict": predict, "load": load}
