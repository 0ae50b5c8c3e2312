"""A loader's collate function may call the loader's own for the parts of a batch."""

from __future__ import annotations

import pytest
import torch
from _runs import Steps, make, raise_at
from torch.utils.data import DataLoader, default_collate


class Series(DataLoader):
    """Collates as NeuralForecast's loader does: dictionaries by its own function, one value at a time."""

    def __init__(self):
        items = [{"value": torch.tensor([float(number)])} for number in range(8)]
        super().__init__(items, 2, num_workers=1, collate_fn=self._collate)

    def _collate(self, items):
        if isinstance(items[0], dict):
            return {"value": self.collate_fn([item["value"] for item in items])}
        return default_collate(items)


class Net(Steps):
    def training_step(self, batch, batch_idx):
        self.log("seen", batch["value"][:].sum(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_collate_that_calls_its_loaders_own_gets_plain_parts_in_workers(tmp_path):
    """Every part is what it is without this package, before a stop and after it."""

    def train(*callbacks):
        run = make(tmp_path, module=Net(), callbacks=callbacks, every_n_train_steps=1)
        run.trainer.fit(run.module, Series())
        return run

    with pytest.raises(RuntimeError, match="stopped here"):
        train(raise_at("on_train_batch_end", 6, RuntimeError("stopped here")))
    run = train()
    assert run.callback.resume_report is not None
    assert run.module.steps == 12
    assert run.trainer.callback_metrics["seen"] == 7.0
