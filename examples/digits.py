"""A training that is killed hard in the middle of an epoch, started again, and ends as if nothing was.

    python examples/digits.py

What a user writes is `Digits`, `Classifier` and `train`. The rest tells the story: it runs `train` in
processes of its own, kills one with SIGKILL, starts it again, and compares the end with that of a
twin that was never killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt.inspect import table


class Shifted(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images moved by up to one pixel at random: other ones in every epoch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image, moved, and its label."""
        down, right = (torch.randint(3, (2,)) - 1).tolist()
        return self.images[index].roll((down, right), dims=(1, 2)), self.labels[index]


class Digits(L.LightningDataModule):
    """scikit-learn's 1,797 images of digits, 8 by 8 pixels, in three parts."""

    def setup(self, stage: str) -> None:
        """Split: 1,197 images to train on, 300 to validate, 300 to test."""
        del stage
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        self.train = Shifted(x[:-600], y[:-600])
        self.valid = TensorDataset(x[-600:-300], y[-600:-300])
        self.test = TensorDataset(x[-300:], y[-300:])

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Return the training images in a new order each time."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return the validation images."""
        return DataLoader(self.valid, batch_size=300)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return the test images."""
        return DataLoader(self.test, batch_size=300)


class Classifier(L.LightningModule):
    """A small convolutional network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.train_acc = MulticlassAccuracy(10)
        self.val_acc = MulticlassAccuracy(10)
        self.test_acc = MulticlassAccuracy(10)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss, and log it over the epoch."""
        del batch_idx
        images, labels = batch
        logits = self.net(images)
        loss = functional.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the accuracy that the best checkpoint is chosen by."""
        del batch_idx
        self.val_acc(self.net(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the accuracy on images never seen before."""
        del batch_idx
        self.test_acc(self.net(batch[0]), batch[1])
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> dict[str, object]:
        """Return AdamW with a learning rate that falls along a cosine, step by step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def make(directory: Path) -> tuple[L.Trainer, Classifier, Digits]:
    """Return what `lightning-sbckpt selftest digits:make` kills, starts again and compares."""
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        max_epochs=3,
        limit_train_batches=10,
        callbacks=[SBCheckpoint(directory, max_key="val_acc")],
        accelerator="cpu",
        deterministic=True,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, Classifier(), Digits()


def train(directory: Path, *, epochs: int, seed: int, die_at: tuple[int, int] | None) -> None:
    """Train in this process; the same call starts a run and goes on with it."""
    L.seed_everything(seed, verbose=False)
    checkpoint = SBCheckpoint(directory, max_key="val_acc", num_to_keep=2, every_n_train_steps=15)
    story = Storyteller(checkpoint, die_at)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[checkpoint, story],
        accelerator="cpu",
        deterministic=True,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Classifier(), Digits()
    trainer.fit(model, data)
    # fit has put the best weights back into the model.
    metrics = trainer.test(model, data, verbose=False)[0]
    story.tell("last weights", story.last_weights)
    story.tell("best weights", fingerprint(model))
    story.tell("test accuracy", round(metrics["test_acc"], 6))


# ---------------------------------------------------------------------------- the story around it


def fingerprint(model: nn.Module) -> str:
    """Return a hash of every bit of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Storyteller(L.Callback):
    """Prints the resume report and a line per epoch, and kills its own process where told to."""

    def __init__(self, checkpoint: SBCheckpoint, die_at: tuple[int, int] | None) -> None:
        self.checkpoint = checkpoint
        self.die_at = die_at
        self.reported = False
        self.last_weights = ""

    @staticmethod
    def tell(name: str, value: object) -> None:
        """Print a fact that the parent process reads."""
        print(FACT + json.dumps([name, value]), flush=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Before the first batch, print what was restored."""
        del pl_module, batch
        if not self.reported:
            self.reported = True
            print(self.checkpoint.resume_report or "nothing to resume from: a new run")
            print(f"first batch: epoch {trainer.current_epoch}, batch {batch_idx}", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Die, the hard way: no handler runs, nothing is flushed."""
        del pl_module
        batch = args[-1]
        if self.die_at == (trainer.current_epoch, batch):
            print(f"epoch {trainer.current_epoch}, batch {batch}: SIGKILL", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what was logged in this epoch."""
        del pl_module
        logged = trainer.callback_metrics
        names = ("train_loss", "train_acc", "val_acc")
        values = "  ".join(f"{name} {logged[name]:.4f}" for name in names)
        print(f"epoch {trainer.current_epoch}  {values}", flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the last weights, before the best ones are restored."""
        del trainer
        self.last_weights = fingerprint(pl_module)


FACT = "fact: "


def run(directory: Path, options: Mapping[str, object]) -> tuple[int, dict[str, object]]:
    """Run `train` in a new process and show what it prints; return its exit code and its facts."""
    command = [sys.executable, __file__, "--train", str(directory)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    facts: dict[str, object] = {}
    # Advice on speed, and what libraries say of each other's releases, is no part of the story.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(FACT):
                name, value = json.loads(line.removeprefix(FACT))
                facts[name] = value
            else:
                print(f"   {line}", end="", flush=True)
    return process.returncode, facts


def show_folder(root: Path) -> None:
    """Print the folders of a run, and the files of the newest."""
    print(f"   {root}/")
    *others, newest = sorted(root.glob("CKPT*"))
    for folder in others:
        print(f"     {folder.name}/")
    print(f"     {newest.name}/")
    for file in sorted(newest.iterdir()):
        print(f"       {file.name:<20} {file.stat().st_size:>9,} bytes")
    print("     HISTORY.jsonl           what was saved and removed, when and why")


def tell_story(root: Path, *, epochs: int, seed: int) -> bool:
    """Kill, resume, and compare with a twin; return whether both ended alike."""
    killed, twin = root / "killed", root / "twin"
    options = {"epochs": epochs, "seed": seed}
    die_at = (epochs // 2, 20)
    start = time.perf_counter()

    print(f"1. A run that is killed in epoch {die_at[0]} at batch {die_at[1]}")
    code, _ = run(killed, {**options, "die-at": "{}:{}".format(*die_at)})
    print(f"   the process died of {signal.Signals(-code).name}" if code < 0 else f"   exit {code}")

    print("\n2. The same command again")
    code, resumed = run(killed, options)

    print("\n3. Its twin, never killed, in another folder")
    twin_code, whole = run(twin, options)
    if code or twin_code:
        return False

    print("\n4. What is on disk")
    show_folder(killed)

    print("\n5. The checkpoints")
    for line in table(Checkpointer(killed).list_checkpoints(), max_key="val_acc").splitlines():
        print(f"   {line}")

    print("\n6. Killed and resumed, against never killed")
    same = resumed == whole
    for name, value in resumed.items():
        print(f"   {name:<14} {value!s:<20} {whole[name]!s:<20}", value == whole[name])
    print("   the same, bit for bit" if same else "   NOT the same")
    print(f"   {time.perf_counter() - start:.0f} s; the folders are in {root}")
    return same


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="an empty folder; default: a new temporary one")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die-at", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.train is not None:
        # Its information lines would say what the storyteller says.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        die_at = tuple(map(int, args.die_at.split(":"))) if args.die_at else None
        train(args.train, epochs=args.epochs, seed=args.seed, die_at=die_at)
        return

    root = args.dir or Path(tempfile.mkdtemp(prefix="digits-"))
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        parser.error(f"--dir {root} is not empty: the story starts in an empty folder")
    sys.exit(0 if tell_story(root, epochs=args.epochs, seed=args.seed) else 1)


if __name__ == "__main__":
    main()
