"""Train on one task, find the best checkpoint, and fine-tune another model from it.

    python examples/finetune.py

The first model learns the ten digits. The second tells odd from even and gets to see few images; it
takes over the features of the first and has a head of its own.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from lightning_sbckpt import Checkpointer, torch_parameter_transfer

Data = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Data, Data]:
    """Return scikit-learn's images of digits, for training and validation."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def make_model(head: str, classes: int) -> torch.nn.Module:
    """Return features and a head under a name of its own: only equal names are transferred."""
    model = torch.nn.Sequential()
    model.add_module("features", torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh()))
    model.add_module(head, torch.nn.Linear(128, classes))
    return model


def accuracy(model: torch.nn.Module, data: Data) -> float:
    """Return the share of images that the model gets right."""
    images, labels = data
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> None:
    """Take one step on all of the data."""
    optimizer.zero_grad()
    functional.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


def pretrain(directory: Path, steps: int) -> None:
    """Train on the ten digits, saving as it goes."""
    model = make_model("head", classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    checkpointer = Checkpointer(directory, {"model": model, "optimizer": optimizer})
    train, valid = digits()
    for step in range(1, steps + 1):
        train_step(model, optimizer, train)
        if step % 5 == 0:
            meta = {"step": step, "accuracy": accuracy(model, valid)}
            checkpointer.save_and_keep_only(meta=meta, max_keys=["accuracy"], num_to_keep=2)


def finetune(model: torch.nn.Module, shots: int, steps: int) -> float:
    """Train on a few images, odd or even, and return the accuracy on the validation images."""
    (images, labels), valid = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(steps):
        train_step(model, optimizer, (images[:shots], labels[:shots] % 2))
    return accuracy(model, (valid[0], valid[1] % 2))


def main() -> None:
    """Tell the whole story."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="default: a new temporary folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shots", type=int, default=30)
    args = parser.parse_args()
    # What a transfer leaves out is logged as a warning.
    logging.basicConfig(format="  %(message)s", stream=sys.stdout)
    directory = args.dir or Path(tempfile.mkdtemp(prefix="finetune-"))
    torch.manual_seed(0)

    print("training on the ten digits")
    pretrain(directory, args.steps)

    # An empty checkpointer finds checkpoints; it needs no model for that.
    best = Checkpointer(directory).find_checkpoint(max_key="accuracy")
    if best is None:
        raise SystemExit("nothing was saved: --steps must be at least 5")
    print(f"best: step {best.meta['step']}, accuracy {best.meta['accuracy']:.4f}")

    print("transfer into a model for odd and even; what has no counterpart is named:")
    model = make_model("parity", classes=2)
    torch_parameter_transfer(model, best.paramfiles["model"])

    print(f"fine-tuned on {args.shots} images: {finetune(model, args.shots, 50):.4f}")
    scratch = make_model("parity", classes=2)
    print(f"from scratch on the same: {finetune(scratch, args.shots, 50):.4f}")


if __name__ == "__main__":
    main()
