"""LightningCLI: Trainer, callbacks, module, data, optimizer and scheduler from a configuration."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

PINS = ("jsonargparse[signatures]==4.53.0",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
NOTES = (
    "`SaveConfigCallback` refuses a second start, as its file is there: `save_config_kwargs={'overwrite': True}`",
)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(1)
        self.numbers = torch.randn(36, 8, generator=generator)

    def train_dataloader(self):
        return DataLoader(
            TensorDataset(self.numbers[:28]), batch_size=self.batch_size, shuffle=True
        )

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.numbers[28:]), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Autoencoder(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, 3), torch.nn.Dropout(0.2), torch.nn.Linear(3, width)
        )

    def loss(self, batch, name):
        loss = (self.net(batch[0]) - batch[0]).square().mean()
        self.log(name, loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch, "train_loss")

    def validation_step(self, batch, batch_idx):
        self.loss(batch, "val_loss")

    def test_step(self, batch, batch_idx):
        self.loss(batch, "test_loss")

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def train(trainer, folder):
    watch, _ = trainer["callbacks"]
    cli = LightningCLI(
        Autoencoder,
        Data,
        args=["fit", "--config", str(Path(__file__).with_suffix(".yaml"))],
        trainer_defaults={"callbacks": watch},
        # Else a second start is refused, since the file of the first is there.
        save_config_kwargs={"overwrite": True},
    )
    fitted = {"model": cli.model, "datamodule": cli.datamodule, "ckpt_path": "best"}
    return {
        "test": lambda best: cli.trainer.test(**fitted),
        "predict": lambda best: torch.cat(cli.trainer.predict(**fitted)),
        "load": Autoencoder.load_from_checkpoint,
    }
