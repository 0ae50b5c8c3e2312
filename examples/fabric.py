"""A loop of Lightning Fabric that goes on within the epoch, with the same batches and random numbers.

Kill it in any way at any time and run the same command again:

    python examples/fabric.py --killed-after 50
    python examples/fabric.py

Fabric leaves the loop to you, so no callback can know where it is: a `Checkpointer` saves what you name.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.rng import capture_rng, restore_rng


class Batches(Sampler[list[int]]):
    """Shuffles anew in each epoch, and knows which batch comes next."""

    def __init__(self, length: int, batch_size: int) -> None:
        self.length, self.batch_size = length, batch_size
        self.epoch = self.done = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Give the batches of this epoch that are not done."""
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))
        yield from list(order.split(self.batch_size))[self.done :]

    def step(self) -> bool:
        """Count a batch that has been trained on; return whether the epoch has ended."""
        self.done += 1
        if self.done * self.batch_size < self.length:
            return False
        self.epoch, self.done = self.epoch + 1, 0
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the place."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go there."""
        self.epoch, self.done = state["epoch"], state["done"]


class RandomNumbers:
    """The generators of Python, numpy and torch."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return their states."""
        return capture_rng()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        restore_rng(state)


def main() -> None:
    """Train, save after every twentieth batch and every epoch, and end with the best weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/fabric"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--killed-after", type=int, default=0, metavar="BATCHES")
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    digits = torch.tensor(labels)
    batches = Batches(1500, 50)
    # With a generator of its own: a loader draws a number whenever an epoch of it begins, and in the
    # middle of one no number must come from those that dropout draws from.
    own = torch.Generator()
    data = TensorDataset(images[:1500], digits[:1500])
    loader = fabric.setup_dataloaders(DataLoader(data, batch_sampler=batches, generator=own))
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 10)
    )
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=3e-3))

    # What Fabric has wrapped is saved as what it wraps, so the weights load without Fabric.
    checkpointer = Checkpointer(
        args.dir,
        {
            "model": net,
            "optimizer": optimizer.optimizer,
            "batches": batches,
            "rng": RandomNumbers(),
        },
    )
    found = checkpointer.recover_if_possible()
    fabric.print(f"going on from {found.path.name}" if found else "starting from scratch")

    seen = 0
    while batches.epoch < args.epochs:
        epoch = batches.epoch
        for image, digit in loader:
            optimizer.zero_grad()
            fabric.backward(functional.cross_entropy(model(image), digit))
            optimizer.step()
            ends = batches.step()
            seen += 1
            if seen == args.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if not ends and batches.done % 20 == 0:
                checkpointer.save_and_keep_only(end_of_epoch=False, max_keys=["accuracy"])
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[1500:]).argmax(1) == digits[1500:]).float().mean()
        model.train()
        fabric.print(f"epoch {epoch}: accuracy {accuracy:.4f}")
        # The newest stays, to go on from, and the best, to use in the end.
        checkpointer.save_and_keep_only({"accuracy": accuracy}, max_keys=["accuracy"])

    total = sum(parameter.double().abs().sum() for parameter in net.parameters())
    fabric.print(f"the weights add up to {total:.12f}")
    best = checkpointer.recover_if_possible(max_key="accuracy")
    if best is not None:
        fabric.print(f"best: accuracy {best.meta['accuracy']:.4f}, loaded")


if __name__ == "__main__":
    main()
