"""A run that goes on from a folder that somebody else made: nothing outside of it is removed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from _foreign import describe
from _runs import Steps, fit, newest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import MismatchError, SBCheckpointError


@pytest.fixture
def precious(tmp_path):
    """A folder of the user's that no checkpoint has anything to do with."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


WAYS = {
    # Lightning takes any other protocol than that of files for the user's wish to have it removed.
    "a protocol": lambda precious, _: f"local://{precious}",
    "a chain of protocols": lambda precious, _: f"simplecache::local://{precious}",
    "the folder above": lambda precious, inside: f"{inside}/../precious",
    "a link": lambda _, inside: f"{inside}/link/thesis.txt",
    "another path": lambda precious, _: f"{precious}/thesis.txt",
    "no text": lambda *_: 5,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folders of runs of one epoch beside a ModelCheckpoint, by what that ranks by."""
    root = tmp_path_factory.mktemp("begun")
    for monitor in (None, "val_loss"):
        beside = ModelCheckpoint(root / f"beside-{monitor}", monitor=monitor)
        fit(root / str(monitor), callbacks=[beside], trainer={"max_epochs": 1})
    return root


@pytest.mark.parametrize(
    ("way", "monitor"), [*((way, None) for way in WAYS), ("a protocol", "val_loss")]
)
def test_model_checkpoint_takes_over_no_path_that_leads_elsewhere(
    tmp_path, begun, precious, way, monitor
):
    """It would remove what it takes for its last best file, or load it for `ckpt_path="best"`."""
    shutil.copytree(begun / str(monitor), tmp_path / "run")
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "link").symlink_to(precious)
    saved = newest(tmp_path / "run")
    states = torch.load(saved.paramfiles["callbacks"], weights_only=True)
    (state,) = (value for value in states.values() if "best_model_path" in value)
    path = WAYS[way](precious, beside)
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = path
    state["best_k_models"] = {path: torch.tensor(9.0)}
    state["kth_value"] = state["best_model_score"] = torch.tensor(9.0)
    del state["dirpath"]  # Without it Lightning takes over everything.
    torch.save(states, saved.paramfiles["callbacks"])
    describe(saved.path)
    checkpoint = ModelCheckpoint(beside, monitor=monitor)
    run = fit(tmp_path / "run", callbacks=[checkpoint], trainer={"max_epochs": 2})
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert Path(checkpoint.best_model_path).parent == beside
    (note,) = (note for note in run.callback.resume_report.notes if "ModelCheckpoint" in note)
    assert f"outside of its folder {beside}" in note


def test_model_checkpoint_takes_over_its_own_files(tmp_path):
    """With which it goes on as it would have."""

    def start(epochs):
        beside = ModelCheckpoint(
            tmp_path / "beside", save_last=True, save_top_k=2, monitor="val_loss"
        )
        run = fit(tmp_path / "run", callbacks=[beside], trainer={"max_epochs": epochs})
        return beside, run

    start(2)
    beside, run = start(3)
    assert not [note for note in run.callback.resume_report.notes if "outside" in note]
    assert len(beside.best_k_models) == 2
    assert sorted(os.listdir(tmp_path / "beside")) == [
        "epoch=1-step=8.ckpt",
        "epoch=2-step=12.ckpt",
        "last.ckpt",
    ]


@pytest.mark.parametrize("part", ["rng", "loaders", "metrics", "loops"])
@pytest.mark.parametrize(
    "content", [{}, {"ranks": 5}, {"ranks": [None]}, {"ranks": [{"x": 1}]}, {"loops": {}}], ids=repr
)
def test_state_of_another_form_is_an_error_of_ours(tmp_path, begun, part, content):
    """Not one of Python's, whatever a key holds or lacks; or the run goes on without it."""
    shutil.copytree(begun / "None", tmp_path / "run")
    saved = newest(tmp_path / "run")
    torch.save(content, saved.path / f"{part}.ckpt")
    describe(saved.path)
    with contextlib.suppress(SBCheckpointError):
        fit(tmp_path / "run", trainer={"max_epochs": 2})


@pytest.mark.parametrize("part", ["model", "loops", "callbacks", "hparams"])
@pytest.mark.parametrize("content", [None, [1], "text"], ids=repr)
def test_file_that_holds_no_state_is_refused_by_its_name(tmp_path, begun, part, content):
    """By a fit and by `load_from_checkpoint`."""
    shutil.copytree(begun / "None", tmp_path / "run")
    saved = newest(tmp_path / "run")
    torch.save(content, saved.path / f"{part}.ckpt")
    describe(saved.path)
    with pytest.raises(MismatchError, match=rf"{part}\.ckpt holds a"):
        Steps.load_from_checkpoint(saved.path)
    with pytest.raises(MismatchError, match=rf"{part}\.ckpt holds a"):
        fit(tmp_path / "run", trainer={"max_epochs": 2})


class Endless:
    """Gives four batches an epoch, and never the same."""

    def __init__(self):
        self.numbers = itertools.count()

    def __iter__(self):
        return (torch.full((2, 1), float(next(self.numbers))) for _ in range(4))


class FromEndless(L.LightningModule):
    """One weight, trained on `Endless`."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum() * 1e-3

    def train_dataloader(self):
        return Endless()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.timeout(100)
def test_number_of_batches_to_replay_ends_with_the_batches(tmp_path):
    """However many a folder says that an earlier epoch had."""

    def train(epochs):
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SBCheckpoint(tmp_path / "run")],
        )
        trainer.fit(FromEndless())
        return trainer

    train(2)
    saved = newest(tmp_path / "run")
    state = torch.load(saved.paramfiles["loaders"], weights_only=True)
    (earlier,) = state["ranks"][0]["train"][0]["iteration"]["rounds"]
    assert earlier["yielded"] == 4
    earlier["yielded"] = 2**60
    torch.save(state, saved.paramfiles["loaders"])
    describe(saved.path)
    assert train(3).global_step == 12
