"""Lightly: contrastive training with random views and a memory bank that grows from nothing."""

from __future__ import annotations

import pytorch_lightning as L
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

PINS = ("lightly==1.6.0",)
TORCH = "torch==2.14.1"  # torchvision's wheels take the build for CUDA alone.
LIGHTNING = "pytorch_lightning"
CHECKPOINT = {"min_key": "val_loss"}


class Images(Dataset):
    def __init__(self, count):
        self.images = [to_pil_image(image) for image in torch.rand(count, 3, 24, 24)]
        self.transform = None  # Which Lightly sets.

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), index


class Contrast(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 5, 3), torch.nn.ReLU(), torch.nn.Flatten()
        )
        self.head = SimCLRProjectionHead(4 * 7 * 7, 16, 8)
        self.loss = NTXentLoss(memory_bank_size=(16, 8))

    def forward(self, image):
        return self.head(self.backbone(image))

    def training_step(self, batch, batch_idx):
        (one, other), _, _ = batch
        loss = self.loss(self(one), self(other))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).square().mean())

    def predict_step(self, batch, batch_idx):
        return self.backbone(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(trainer, folder):
    views = LightlyDataset.from_torch_dataset(
        Images(28), transform=SimCLRTransform(input_size=24, gaussian_blur=0.0)
    )
    still = LightlyDataset.from_torch_dataset(Images(8), transform=to_tensor)
    evaluated = DataLoader(still, batch_size=4)
    module, trainer = Contrast(), L.Trainer(**trainer)
    trainer.fit(module, DataLoader(views, batch_size=4, shuffle=True), evaluated)
    return {
        "test": lambda best: trainer.test(module, evaluated, ckpt_path="best"),
        "predict": lambda best: torch.cat(trainer.predict(module, evaluated, ckpt_path="best")),
        "load": Contrast.load_from_checkpoint,
    }
