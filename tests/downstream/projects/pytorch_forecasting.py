"""PyTorch Forecasting: the temporal fusion transformer on its TimeSeriesDataSet."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pandas as pd
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

PINS = ("pytorch-forecasting==1.8.0",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}


def train(trainer, folder):
    frame = pd.DataFrame(
        {
            "time": np.tile(np.arange(60), 4),
            "series": np.repeat(list("abcd"), 60),
            "value": np.sin(np.arange(240) / 5).astype("float32"),
        }
    )
    data = TimeSeriesDataSet(
        frame[frame.time < 50],
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=10,
        max_prediction_length=3,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
    )
    later = TimeSeriesDataSet.from_dataset(data, frame, min_prediction_idx=50)
    module = TemporalFusionTransformer.from_dataset(
        data,
        hidden_size=4,
        attention_head_size=1,
        dropout=0.2,
        hidden_continuous_size=4,
        learning_rate=0.01,
        log_interval=-1,
    )
    evaluated = later.to_dataloader(train=False, batch_size=16, num_workers=0)
    trainer = L.Trainer(**trainer, gradient_clip_val=0.1, limit_train_batches=8)
    trainer.fit(module, data.to_dataloader(train=True, batch_size=16, num_workers=0), evaluated)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return {
        "test": lambda best: trainer.test(module, evaluated, ckpt_path="best"),
        "predict": lambda best: module.predict(evaluated, trainer_kwargs=quiet),
        "load": TemporalFusionTransformer.load_from_checkpoint,
    }
