"""Checkpoints become Lightning's own files and back, and training goes on from either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from _releases import needs_lightning
from plain_run import BATCHES, Net, data, result, trainer

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedCheckpointError,
    MismatchError,
    UntrustedPickleError,
)
from lightning_sbckpt.plugin.export import from_lightning, to_lightning


def fit(folder, epochs, **options):
    """Train with SBCheckpoint for so many epochs."""
    callback = SBCheckpoint(folder, restore_best=False, num_to_keep=9, **options)
    made, net = trainer(epochs, enable_checkpointing=True, callbacks=[callback]), Net(3)
    made.fit(net, data(), data())
    return made, net


def assert_same(one, other):
    assert one["place"] == other["place"]
    assert one["hparams"] == other["hparams"]
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])


def newest(folder):
    return Checkpointer(folder, access="read").find_checkpoint()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two epochs; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(folder, 2)
    return folder


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """What Lightning alone made: all of it in one process, which can't import this package."""
    folder = tmp_path_factory.mktemp("alone")
    fit(folder / "run", 2, split_model=["layer"])
    whole = to_lightning(newest(run), folder / "whole.ckpt").path
    split = to_lightning(newest(folder / "run"), folder / "split.ckpt").path
    words = [
        *("fit", 4, folder / "straight", "then", "save", 2, folder / "saved", folder / "two.ckpt"),
        *("then", "fit", 4, folder / "on from whole", whole),
        *("then", "fit", 4, folder / "on from split", split),
        *("then", "load", whole, folder / "loaded"),
    ]
    script = Path(__file__).with_name("plain_run.py")
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def straight(alone):
    """What four epochs of Lightning alone lead to, without any interruption."""
    found = torch.load(alone / "straight")
    assert found["place"] == (4 * BATCHES, 4)
    return found


# 2.4 does so with a file of its own as well, if it was saved when a validation ended.
@pytest.mark.sample(1)
@needs_lightning("2.5", "a resume that doesn't step an epoch's scheduler twice")
@pytest.mark.parametrize("kind", ["whole", "split"])
def test_lightning_alone_goes_on_from_an_exported_checkpoint(alone, straight, kind):
    """Without this package, and to the very weights, step and epoch of an unbroken run."""
    assert_same(torch.load(alone / f"on from {kind}"), straight)


def test_load_from_checkpoint_takes_an_exported_file_without_this_package(run, alone):
    """With its hyperparameters, which the file brings along."""
    loaded = torch.load(alone / "loaded")
    weights = newest(run).open("model")
    assert loaded["hparams"] == {"width": 3, "lr": 0.1}
    assert all(torch.equal(loaded["weights"][key], weights[key]) for key in weights)


def test_what_lightning_has_no_place_for_is_named(tmp_path):
    """Random states and the user's own recoverables, by name."""
    fit(tmp_path / "run", 1, recoverables={"ema": torch.nn.Linear(1, 1)})
    exported = to_lightning(newest(tmp_path / "run"), tmp_path / "one.ckpt")
    mine, inexact = exported.remarks
    assert mine == "not in it is the recoverable 'ema': Lightning has no place for it"
    assert inexact.startswith(
        "a resume from it is not exact, since not in it are the random states (rng)"
    )


def test_a_file_that_is_there_is_not_replaced_unless_told(run, tmp_path):
    """And it is as it was."""
    target = tmp_path / "a.ckpt"
    target.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"a\.ckpt is there already and was left as it is"):
        to_lightning(newest(run), target)
    assert target.read_text() == "mine"
    to_lightning(newest(run), target, overwrite=True)
    assert torch.load(target)["global_step"] == 2 * BATCHES
    assert list(tmp_path.iterdir()) == [target]


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    """Rather than passed on; nothing is left at the target."""
    fit(tmp_path / "run", 1)
    found = newest(tmp_path / "run")
    content = bytearray(found.paramfiles["optimizer"].read_bytes())
    content[len(content) // 2] ^= 0xFF
    found.paramfiles["optimizer"].write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.ckpt has other bytes"):
        to_lightning(found, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    """It has no model."""
    saved = Checkpointer(tmp_path, {"net": torch.nn.Linear(1, 1)}).save_checkpoint()
    with pytest.raises(CheckpointNotFoundError, match=r"has no model\.ckpt"):
        to_lightning(saved, tmp_path / "a.ckpt")


@pytest.fixture
def theirs(alone):
    """A file that Lightning alone wrote after two epochs."""
    return alone / "two.ckpt"


def test_sbcheckpoint_goes_on_from_an_imported_file(theirs, tmp_path, straight):
    """By itself, as it is the newest in the folder; to the weights of an unbroken run."""
    imported = from_lightning(theirs, tmp_path / "run")
    made, net = fit(tmp_path / "run", 4)
    assert made.checkpoint_callback.resume_report.checkpoint == str(imported.path)
    assert_same(result(net, made), straight)


def test_an_imported_folder_is_taken_as_ckpt_path_and_by_load_from_checkpoint(
    theirs, tmp_path, straight
):
    """As any other checkpoint."""
    imported = from_lightning(theirs, tmp_path / "theirs")
    callback = SBCheckpoint(tmp_path / "run", restore_best=False)
    made, net = trainer(4, enable_checkpointing=True, callbacks=[callback]), Net(3)
    made.fit(net, data(), data(), ckpt_path=imported.path)
    assert_same(result(net, made), straight)
    loaded = Net.load_from_checkpoint(imported.path)
    weights = torch.load(theirs)["state_dict"]
    assert loaded.hparams == {"width": 3, "lr": 0.1}
    assert torch.equal(loaded.layer.weight, weights["layer.weight"])


def test_there_and_back_is_the_same_file(theirs, tmp_path):
    """Every key and value of Lightning's dictionary comes back."""
    imported = from_lightning(theirs, tmp_path / "run")
    back = torch.load(to_lightning(imported, tmp_path / "back.ckpt").path)
    original = torch.load(theirs)
    assert back.keys() == original.keys()
    assert repr(sorted(back.items())) == repr(sorted(original.items()))


def test_an_imported_checkpoint_says_where_it_comes_from(theirs, tmp_path):
    """Epoch and step from the file, metrics from whoever knows them, the file's name as lineage."""
    imported = from_lightning(theirs, tmp_path, name="theirs", meta={"val_loss": 0.5})
    assert imported.path.name == "CKPT+theirs"
    assert imported.meta["global_step"] == 2 * BATCHES
    assert imported.meta["val_loss"] == 0.5
    assert imported.meta["end-of-epoch"] is True
    assert "imported-from: two.ckpt" in (imported.path / "MANIFEST.yaml").read_text()
    with pytest.raises(ConfigurationError, match=r"CKPT\+theirs exists already"):
        from_lightning(theirs, tmp_path, name="theirs")


def test_a_file_saved_within_an_epoch_says_so(tmp_path):
    """By Lightning's own count of batches."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    trainer(1, callbacks=[Saves()]).fit(Net(3), data())
    imported = from_lightning(tmp_path / "within.ckpt", tmp_path / "run")
    assert imported.meta["end-of-epoch"] is False
    assert imported.meta["global_step"] == 2


@pytest.mark.parametrize(
    ("content", "found"),
    [({"weight": torch.ones(1)}, "the keys weight"), ([1], "no keys")],
)
def test_what_is_not_lightnings_is_refused(tmp_path, content, found):
    """And nothing is made."""
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError, match=f"is not a checkpoint of Lightning: it has {found}"):
        from_lightning(tmp_path / "a.ckpt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_lightnings_file_is_executed_only_when_trusted(tmp_path):
    """The error says how to say so."""
    torch.save({"state_dict": {}, "x": Trap(tmp_path / "sprung")}, tmp_path / "a.ckpt")
    with pytest.raises(UntrustedPickleError, match="pass trust_pickle=True"):
        from_lightning(tmp_path / "a.ckpt", tmp_path / "run")
    assert not (tmp_path / "sprung").exists()
    from_lightning(tmp_path / "a.ckpt", tmp_path / "run", trust_pickle=True)
    assert (tmp_path / "sprung").exists()
