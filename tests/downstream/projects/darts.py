"""Darts: a model that makes its Trainer, and keeps files of its own."""

from __future__ import annotations

import numpy as np
import torch
from darts import TimeSeries
from darts.models import TCNModel

PINS = ("darts==0.48.1",)
LIGHTNING = "pytorch_lightning"
CHECKPOINT = {"min_key": "val_loss"}
PREVENTS = {"test": "its models have no `test_step`"}
NOTES = (
    "`load_from_checkpoint` wants the file that `save_checkpoints=True` writes beside, and `trusted=True`, since that file holds the callbacks",
)


def train(trainer, folder):
    series = TimeSeries.from_values(np.sin(np.arange(120) / 7).astype("float32"))
    model = TCNModel(
        input_chunk_length=20,
        output_chunk_length=5,
        n_epochs=4,
        batch_size=8,
        dropout=0.2,
        random_state=1,
        model_name="tcn",
        work_dir=str(folder / "darts"),
        save_checkpoints=True,
        force_reset=True,
        pl_trainer_kwargs=trainer,
    )
    model.fit(series[:-40], val_series=series[-60:])

    def load(best):
        loaded = TCNModel.load_from_checkpoint(
            "tcn", str(folder / "darts"), str(best), trusted=True
        )
        return loaded.model

    return {
        "predict": lambda best: torch.from_numpy(model.predict(5).values()),
        "load": load,
    }
