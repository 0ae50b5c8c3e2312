"""A resume reads every file once to verify it and once to load it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt._io import digests
from lightning_sbckpt._layout.manifest import read_manifest


class Wide(L.LightningModule):
    """Eight megabytes of weights and as many of momentum, so that nothing else counts."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2048, 1024)

    def training_step(self, batch, _):
        """Return a loss."""
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        """Return one that has a state."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class BytesRead(L.Callback):
    """Counts what this process reads until training begins, and what of it for checksums."""

    def __init__(self, monkeypatch):
        self.before, self.until_training, self.verified = read_so_far(), 0, 0
        real = digests.read_digest

        def count(stream):
            digest = real(stream)
            self.verified += digest.size
            return digest

        monkeypatch.setattr(digests, "read_digest", count)
        # The files of a test are younger than any checksum that is kept.
        monkeypatch.setattr(digests, "_TICK_SECONDS", -1.0)

    def on_train_start(self, trainer, pl_module):
        """Note it."""
        self.until_training = read_so_far() - self.before


def read_so_far():
    """Return how many bytes this process has read."""
    told = Path("/proc/self/io").read_text().splitlines()
    return int(told[0].removeprefix("rchar: "))


def train(folder, steps, *callbacks, path=None):
    """Fit until so many steps are taken; return the callback."""
    callback = SBCheckpoint(folder, recoverables={"more": torch.nn.Linear(1024, 1024)})
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(torch.ones(8, 2048)), batch_size=2)
    trainer.fit(Wide(), loader, ckpt_path=path)
    return callback


@pytest.mark.parametrize("named", [False, True], ids=["found", "given as run/newest"])
def test_a_resume_reads_each_file_once_to_verify_and_once_to_load(tmp_path, monkeypatch, named):
    """Whoever looks for the checkpoint, reads the fit's files and the user's own hands it on."""
    saved = Path(train(tmp_path, 2).last_model_path)
    size = sum(file.size for file in read_manifest(saved).files.values())
    count = BytesRead(monkeypatch)
    train(tmp_path, 3, count, path=f"{tmp_path}/newest" if named else None)
    assert size > 16_000_000
    assert count.verified == size
    assert abs(count.until_training - 2 * size) < 1_000_000
