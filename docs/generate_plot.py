"""Draw `docs/plot.svg`: a training that is killed twice and goes on, with every checkpoint it made.

    python docs/generate_plot.py

A minute or two, most of it imports. The run is the same every time, its times of day are not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt.retention import EveryNEpochs
from lightning_sbckpt.triggers import Ephemeral, EveryNSteps

PICTURE = Path(__file__).resolve().parent / "plot.svg"
EPOCHS = 40
# After so many optimizer steps the process kills itself, as nothing could prevent.
DEATHS = (277, 523)


class Noisy(L.LightningModule):
    """A network that is large for its data: the validation loss falls, then rises again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        del batch_idx
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log what the best checkpoint is chosen by, and one more."""
        del batch_idx
        logits = self.net(batch[0])
        self.log("val_loss", functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Death(L.Callback):
    """Kills the process."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Kill it when the step has come."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def data(count: int, seed: int) -> TensorDataset:
    """Return points of two classes, a few of them labelled wrong."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 12, generator=random)
    labels = (points[:, 0] * points[:, 1] + points[:, 2] > 0).long()
    wrong = torch.rand(count, generator=random) < 0.05
    return TensorDataset(points, torch.where(wrong, 1 - labels, labels))


def train(folder: Path, death: int) -> None:
    """Begin the run, or go on with it."""
    L.seed_everything(3, verbose=False)
    checkpoint = SBCheckpoint(
        folder,
        min_key="val_loss",
        num_to_keep=3,
        keep=[EveryNEpochs(10)],
        triggers=[Ephemeral(EveryNSteps(55))],
    )
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[checkpoint, Death(death)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = (
        DataLoader(data(640, seed=1), batch_size=32, shuffle=True),
        DataLoader(data(400, seed=2), batch_size=400),
    )
    trainer.fit(Noisy(), *loaders)


def main() -> None:
    """Train in processes that die, pin one checkpoint, and draw."""
    if sys.argv[1:]:
        train(Path(sys.argv[1]), int(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "my-run"
        for death in (*DEATHS, 0):
            command = [sys.executable, __file__, str(folder), str(death)]
            code = subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
            if code != (-signal.SIGKILL if death else 0):
                raise SystemExit(f"the run that was to be killed at step {death} ended by {code}")
        with Checkpointer(folder) as checkpointer:
            tenth = [ckpt for ckpt in checkpointer.list_checkpoints() if ckpt.meta["epoch"] == 9]
            checkpointer.pin(tenth[0], "in the paper")
            checkpointer.plot(["val_loss", "val_acc"], path=PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
