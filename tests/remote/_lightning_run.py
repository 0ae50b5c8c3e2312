"""A fit on a URL, in a process of its own: `python _lightning_run.py URL OUT [MODE [KILL_AT]]`.

It has what is hard to resume: shuffled data, dropout, an optimizer with state, a metric over an
epoch. With KILL_AT the process is killed when it has trained so many batches.
"""

from __future__ import annotations

import os
import signal
import sys

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_sbckpt import SBCheckpoint


class Net(L.LightningModule):
    """A small net whose every step depends on all that were before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).pow(2).mean()
        self.mean(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Kill(L.Callback):
    """Kills the process after so many batches."""

    def __init__(self, count: int) -> None:
        self.left = count

    def on_train_batch_end(self, *args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(
        torch.randn(40, 6, generator=generator), torch.randn(40, 1, generator=generator)
    )


def main(url: str, out: str, mode: str = "sync", kill_at: str = "0") -> None:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    callback = SBCheckpoint(
        url, min_key="val_loss", every_n_train_steps=3, save_mode=mode, restore_best=False
    )
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback, Kill(int(kill_at))],
    )
    module = Net()
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    trainer.fit(module, loader, DataLoader(data(), batch_size=8))
    resumed = callback.resume_report.meta if callback.resume_report else {}
    torch.save(
        {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "draw": torch.rand(3),
            "resumed_at": resumed.get("global_step"),
            "best": callback.best_model_path,
        },
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
