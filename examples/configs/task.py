"""The module and the data that all examples here train: the sign of a sum, with dropout."""

from __future__ import annotations

import lightning as L
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Signs(L.LightningModule):
    """Tells whether numbers add up to more than zero."""

    def __init__(self, lr: float = 1e-2, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.Dropout(0.2), torch.nn.Linear(width, 2)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the loss that the best checkpoint is chosen by."""
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    def on_fit_end(self) -> None:
        """Show the weights in one number, by which two runs can be compared."""
        total = sum(p.double().abs().sum() for p in self.parameters()).item()
        print(f"after {self.trainer.global_step} steps the weights add up to {total:.12f}")


class Numbers(L.LightningDataModule):
    """Random numbers, and whether they add up to more than zero; one fold of them is for validation."""

    def __init__(self, batch_size: int = 16, fold: int = 0, folds: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        x = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
        held_out = torch.arange(320) % folds == fold
        labels = (x.sum(1) > 0).long()
        self.train = TensorDataset(x[~held_out], labels[~held_out])
        self.valid = TensorDataset(x[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return the training data, shuffled."""
        return DataLoader(self.train, self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return the validation data."""
        return DataLoader(self.valid, 64)
