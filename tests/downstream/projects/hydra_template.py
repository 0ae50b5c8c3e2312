"""The way of the Lightning-Hydra template: data, model, callbacks and Trainer from a configuration."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader, TensorDataset

PINS = ("hydra-core==1.3.8",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
NOTES = (
    "a run folder named by the time, Hydra's default, is another at each start: the callback's has to stay",
)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(36, 8, generator=generator)
        labels = torch.randint(3, (36,), generator=generator)
        self.training = TensorDataset(inputs[:28], labels[:28])
        self.evaluated = TensorDataset(inputs[28:], labels[28:])

    def train_dataloader(self):
        return DataLoader(self.training, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.evaluated, batch_size=self.hparams.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Classifier(L.LightningModule):
    """Keeps a network and two functions among its hyperparameters, as the template's module does."""

    def __init__(self, net, optimizer, scheduler):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def loss(self, batch, name):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
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

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.parameters())
        scheduler = {
            "scheduler": self.hparams.scheduler(optimizer=optimizer),
            "monitor": "val_loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def train(trainer, folder):
    watch, _ = trainer.pop("callbacks")
    with initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):
        config = compose("hydra_template")
    L.seed_everything(config.seed, workers=True)
    data, module = instantiate(config.data), instantiate(config.model)
    callbacks = [instantiate(each) for each in config.callbacks.values()]
    trainer = instantiate(config.trainer, callbacks=[watch, *callbacks], **trainer)
    trainer.fit(model=module, datamodule=data)
    best = trainer.checkpoint_callback.best_model_path
    return {
        "test": lambda _: trainer.test(model=module, datamodule=data, ckpt_path=best),
        "predict": lambda _: torch.cat(trainer.predict(module, data, ckpt_path=best)),
        "load": Classifier.load_from_checkpoint,
    }
