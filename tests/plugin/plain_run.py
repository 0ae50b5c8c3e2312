"""Runs of Lightning alone, one after the other, for a process in which this package can't be imported.

`python plain_run.py fit EPOCHS OUT [CKPT]` trains, from a file if one is given, and writes weights
and place to OUT; `save EPOCHS OUT CKPT` trains and writes Lightning's own file to CKPT as well;
`load CKPT OUT` only loads. Between two of them stands `then`.
"""

from __future__ import annotations

import itertools
import sys

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 4


class Net(L.LightningModule):
    """A module with hyperparameters and optimizer state, on which the next step depends."""

    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def data() -> DataLoader:
    """Return the same batches every time."""
    numbers = torch.arange(BATCHES * 6, dtype=torch.float32).reshape(BATCHES * 2, 3)
    return DataLoader(TensorDataset(numbers / 24), batch_size=2)


def trainer(epochs: int, **options) -> L.Trainer:
    """Return a quiet Trainer."""
    torch.set_num_threads(1)
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        **options,
    }
    return L.Trainer(**settings)


def result(net: Net, made: L.Trainer | None = None) -> dict[str, object]:
    """Return what two runs are compared by."""
    place = (made.global_step, made.current_epoch) if made is not None else ()
    return {"weights": net.state_dict(), "place": place, "hparams": dict(net.hparams)}


def main(what: str, *words: str) -> None:
    """Do what the first word says."""
    if what == "load":
        torch.save(result(Net.load_from_checkpoint(words[0])), words[1])
        return
    made, net = trainer(int(words[0])), Net(3)
    made.fit(net, data(), data(), ckpt_path=words[2] if words[2:] and what == "fit" else None)
    torch.save(result(net, made), words[1])
    if what == "save":
        made.save_checkpoint(words[2])


if __name__ == "__main__":
    # Whoever imports it, however deep, fails.
    sys.modules["lightning_sbckpt"] = None  # type: ignore[assignment]
    for _, words in itertools.groupby(sys.argv[1:], "then".__ne__):
        if (run := list(words)) != ["then"]:
            main(*run)
