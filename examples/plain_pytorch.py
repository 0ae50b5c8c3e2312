"""A plain PyTorch loop that goes on where it was stopped; no Lightning.

Stop it in any way at any time and run the same command again:

    python examples/plain_pytorch.py --stop-after 3
    python examples/plain_pytorch.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sbckpt import Checkpointer, EpochCounter


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1,797 images of digits, split into training and validation."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    return TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])


def main() -> None:
    """Train, and save after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/plain_pytorch"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--stop-after", type=int, help="leave the process after this epoch")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, valid = digits()
    shuffle = torch.Generator().manual_seed(0)
    loader = DataLoader(train, batch_size=50, shuffle=True, generator=shuffle)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    epochs = EpochCounter(args.epochs)

    # Everything that changes while training, each under the name of its file.
    checkpointer = Checkpointer(
        args.dir,
        recoverables={
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "epochs": epochs,
            "shuffle": shuffle,
        },
    )
    found = checkpointer.recover_if_possible()
    print(f"going on from {found.path.name}" if found else "starting from scratch")

    for epoch in epochs:
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()

        model.eval()
        with torch.no_grad():
            images, labels = valid.tensors
            accuracy = (model(images).argmax(1) == labels).float().mean()
        print(f"epoch {epoch}: accuracy {accuracy:.4f}")

        # Keeps the newest, to go on from, and the best, to use in the end.
        checkpointer.save_and_keep_only(
            meta={"epoch": epoch, "accuracy": accuracy}, max_keys=["accuracy"]
        )
        if epoch == args.stop_after:
            sys.exit("stopped: run the same command again")

    best = checkpointer.recover_if_possible(max_key="accuracy")
    if best is None:
        sys.exit("no epoch was trained: --epochs must be at least 1")
    print(f"best: epoch {best.meta['epoch']} with accuracy {best.meta['accuracy']:.4f}, loaded")


if __name__ == "__main__":
    main()
