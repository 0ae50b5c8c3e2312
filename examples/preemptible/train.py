"""A training that may be taken off its machine at any time; `run-until-done.sh` starts it again.

    examples/preemptible/run-until-done.sh python examples/preemptible/train.py

After SIGTERM, SIGUSR1 or Ctrl+C it saves a checkpoint within the epoch and ends: by exit code 75
after the first two, "start me again", and by 1 after Ctrl+C. `--taken-away-after 20` has it send
itself SIGTERM after so many batches of each start, to see that without a cluster.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import lightning as L
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sbckpt import Preemption, SBCheckpoint


class Regression(L.LightningModule):
    """Learns the sign of a sum, with dropout, so that every random number counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 2)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the loss that the best checkpoint is chosen by."""
        x, y = batch
        self.log("val_loss", functional.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TakenAway(L.Callback):
    """Plays the cluster: SIGTERM after so many batches of this start."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, *args: object) -> None:
        """Count."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/preemptible"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--grace-time", type=float, help="seconds between the signal and the end")
    parser.add_argument("--taken-away-after", type=int, default=0, metavar="BATCHES")
    args = parser.parse_args()

    L.seed_everything(0, verbose=False)
    x = torch.randn(320, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    train, valid = torch.utils.data.random_split(data, [256, 64])
    checkpoint = SBCheckpoint(
        args.dir, min_key="val_loss", preemption=Preemption(grace_time=args.grace_time)
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=args.devices,
        callbacks=[checkpoint, TakenAway(args.taken_away_after)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Regression()
    trainer.fit(model, DataLoader(train, 8, shuffle=True), DataLoader(valid, 32))
    if trainer.is_global_zero:
        total = sum(p.double().abs().sum() for p in model.parameters()).item()
        print(f"done after {trainer.global_step} steps: the weights add up to {total:.12f}")


if __name__ == "__main__":
    main()
