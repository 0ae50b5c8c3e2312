"""MONAI: a network, transforms with random states of their own, and a cached dataset."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.networks.utils import copy_model_state
from monai.transforms import Compose, RandFlipd, RandGaussianNoised, ScaleIntensityd
from monai.utils import set_determinism

PINS = ("monai==1.6.1",)
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
NOTES = ("`copy_model_state` takes the state that `torch.load` reads",)


class Segmentation(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.loss = DiceLoss(sigmoid=True)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch["image"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net(batch["image"]), batch["label"]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(self.net(batch["image"]), batch["label"]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch["image"]).as_tensor()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def network():
    return UNet(2, 1, 1, channels=(4, 8), strides=(2,), num_res_units=1, dropout=0.1)


def train(trainer, folder):
    set_determinism(7)
    torch.use_deterministic_algorithms(mode=False)
    images = torch.rand(36, 1, 8, 8)
    items = [
        {"image": MetaTensor(image), "label": MetaTensor((image > 0.5).float())} for image in images
    ]
    augmented = Compose(
        [
            ScaleIntensityd("image"),
            RandFlipd(("image", "label"), prob=0.5),
            RandGaussianNoised("image", prob=0.5),
        ]
    )
    training = DataLoader(
        CacheDataset(items[:28], augmented, progress=False), batch_size=4, shuffle=True
    )
    evaluated = DataLoader(
        CacheDataset(items[28:], ScaleIntensityd("image"), progress=False), batch_size=4
    )
    module, trainer = Segmentation(), L.Trainer(**trainer)
    trainer.fit(module, training, evaluated)

    def load(best):
        loaded = {
            name.removeprefix("net."): value
            for name, value in torch.load(best / "model.ckpt", weights_only=True).items()
        }
        net = network()
        copy_model_state(net, loaded)
        return {f"net.{name}": value for name, value in net.state_dict().items()}

    return {
        "test": lambda best: trainer.test(module, evaluated, ckpt_path="best"),
        "predict": lambda best: torch.cat(trainer.predict(module, evaluated, ckpt_path="best")),
        "load": load,
    }
