"""Texts that a checkpoint holds beside its files, for people."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import yaml

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt.errors import CheckpointNameError, SaveError


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(1, 1)})


def save_with(checkpointer, name, text):
    request = SaveRequest(checkpointer.recoverables, name="after", extra_files={name: text})
    return checkpointer.save(request).checkpoint


def test_a_document_is_part_of_the_checkpoint(checkpointer):
    """With a checksum in the manifest; it is no recoverable."""
    before = checkpointer.save_checkpoint(name="before")
    saved = save_with(checkpointer, "notes.txt", "grün\n")
    assert (saved.path / "notes.txt").read_text(encoding="utf-8") == "grün\n"
    assert list(saved.paramfiles) == ["model"]
    assert "notes.txt" in read_manifest(saved.path).files
    assert not (before.path / "notes.txt").exists()
    assert find_damage(saved.path) == []
    (saved.path / "notes.txt").write_text("grau\n")
    assert "notes.txt" in find_damage(saved.path)[0]


@pytest.mark.parametrize("name", ["../notes.txt", "a/b", "", "."])
def test_a_name_that_leads_elsewhere_is_refused(checkpointer, name):
    """Before anything is written."""
    with pytest.raises(CheckpointNameError, match="document"):
        save_with(checkpointer, name, "x")
    assert checkpointer.list_checkpoints() == []


@pytest.mark.parametrize("name", ["model.ckpt", "MANIFEST.yaml", "CKPT.yaml"])
def test_a_document_never_takes_the_place_of_a_file(checkpointer, name):
    """The save fails, and nothing of it is visible."""
    with pytest.raises(SaveError, match="File exists"):
        save_with(checkpointer, name, "x")
    assert checkpointer.list_checkpoints() == []


class Module(L.LightningModule):
    def __init__(self, width=3, activation=torch.relu, lr=1e-3, name="näme"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, folds=2):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(2, 1)))


def fit(tmp_path, module):
    callback = SBCheckpoint(tmp_path / "run", trust_pickle=True)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, Data())
    (saved,) = Checkpointer(tmp_path / "run", access="read").list_checkpoints()
    return saved


def test_hyperparameters_can_be_read_beside_the_weights(tmp_path):
    """Of the module and the datamodule, as plain YAML; what YAML can't hold as Python prints it."""
    saved = fit(tmp_path, Module(width=7))
    read = yaml.safe_load((saved.path / "hparams.yaml").read_text(encoding="utf-8"))
    assert read.pop("activation").startswith("<built-in method relu")
    assert read == {"folds": 2, "width": 7, "lr": 0.001, "name": "näme"}
    assert find_damage(saved.path) == []
