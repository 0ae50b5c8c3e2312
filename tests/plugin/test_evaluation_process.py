"""Folders where Lightning takes a checkpoint, in a process whose Trainer has no SBCheckpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys

import lightning as L
import pytest
from _runs import Steps, by_epoch, damage, fit, go, loader, make, newest, saved
from lightning.pytorch.strategies import FSDPStrategy

from lightning_sbckpt.errors import CheckpointNotFoundError, ConfigurationError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose best checkpoint is that of the second of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(folder, module=Steps(by_epoch(0.5, 0.25, 0.75)), min_key="val_loss")
    return folder


@pytest.fixture
def alone(tmp_path):
    """Return a Trainer that knows nothing of this package."""
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=4,
    )


PLACES = {"": 8, "/": 8, "/best": 8, "/newest": 12}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["test", "validate", "predict"])
def test_a_trainer_evaluates_a_folder(run, alone, method, place):
    """A checkpoint, or the run: its best by default."""
    module = Steps()
    options = {} if method == "predict" else {"verbose": False}
    if method == "predict":
        module.predict_step = lambda batch, batch_idx: 0
    getattr(alone, method)(module, loader(1), ckpt_path=f"{run}{place}", **options)
    assert module.steps == PLACES[place]
    assert "load_checkpoint" not in vars(alone.strategy)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_checkpoint_is_taken_as_text_and_as_path(run, alone, kind):
    """As Lightning takes files."""
    module = Steps()
    alone.test(module, loader(1), ckpt_path=kind(newest(run).path), verbose=False)
    assert module.steps == 12


@pytest.mark.parametrize("place", PLACES)
def test_load_from_checkpoint_takes_a_run(run, place):
    """As the Trainer does."""
    assert Steps.load_from_checkpoint(f"{run}{place}").steps == PLACES[place]


@pytest.mark.parametrize("place", ["", "/best", "/newest"])
def test_a_fit_goes_on_from_a_run_and_says_that_it_is_not_exact(run, alone, place):
    """From its newest by default."""
    module = Steps()
    with pytest.warns(UserWarning, match="no SBCheckpoint is among the Trainer's callbacks"):
        alone.fit(module, loader(), ckpt_path=f"{run}{place}")
    assert module.steps == 16
    assert alone.fit_loop.epoch_loop.batch_progress.total.completed == 16


@pytest.mark.parametrize(("place", "step"), [("", 12), ("/best", 8), ("/newest", 12)])
def test_a_fit_with_the_callback_goes_on_exactly(run, tmp_path, place, step):
    """It is that very checkpoint which is restored, with all that it has."""
    other = make(tmp_path, trainer={"max_epochs": 4})
    go(other, ckpt_path=f"{run}{place}")
    report = other.callback.resume_report
    assert report.meta["global_step"] == step
    assert {"rng", "loaders"} <= set(report.restored)


@pytest.mark.parametrize("method", ["test", "validate", "predict"])
@pytest.mark.parametrize(("word", "step"), [("best", 8), ("last", 12)])
def test_best_and_last_of_an_earlier_process_are_found(run, method, word, step):
    """By a new callback on the folder of the run."""
    new = make(run, min_key="val_loss")
    new.module.predict_step = lambda batch, batch_idx: 0
    getattr(new.trainer, method)(new.module, loader(1), ckpt_path=word)
    assert new.module.steps == step


def test_best_is_the_newest_if_no_key_was_ever_given(tmp_path):
    """As at the end of a fit."""
    fit(tmp_path)
    new = make(tmp_path)
    new.trainer.test(new.module, loader(1), ckpt_path="best", verbose=False)
    assert new.module.steps == 12


def test_a_fit_goes_on_from_the_best_of_an_earlier_process(run, tmp_path):
    """Exactly, with all that it has."""
    shutil.copytree(run, tmp_path / "run")
    new = go(make(tmp_path / "run", min_key="val_loss"), ckpt_path="best")
    assert new.callback.resume_report.meta["global_step"] == 8
    assert {"rng", "loaders"} <= set(new.callback.resume_report.restored)


def test_a_new_callback_whose_folder_is_empty_has_no_best(tmp_path):
    """Lightning says so, as ever."""
    new = make(tmp_path, min_key="val_loss")
    with pytest.raises(ValueError, match="not configured to save the best model"):
        new.trainer.test(new.module, loader(1), ckpt_path="best")


def test_a_damaged_newest_is_stepped_over(tmp_path, alone, caplog):
    """The one before is taken."""
    fit(tmp_path / "run", num_to_keep=3)
    damage(newest(tmp_path / "run"))
    module = Steps()
    alone.test(module, loader(1), ckpt_path=tmp_path / "run", verbose=False)
    assert module.steps == 8


def test_what_is_best_must_be_known(tmp_path, alone):
    """A run that has no key has no best."""
    fit(tmp_path / "run")
    with pytest.raises(CheckpointNotFoundError, match=r"no rule Best\(\.\.\.\) was noted"):
        alone.test(Steps(), loader(1), ckpt_path=tmp_path / "run" / "best", verbose=False)
    alone.test(module := Steps(), loader(1), ckpt_path=tmp_path / "run", verbose=False)
    assert module.steps == 12


def test_a_folder_without_checkpoints_is_lightnings(tmp_path, alone):
    """Nothing of ours is in the way of its own message."""
    with pytest.raises(OSError, match="directory"):
        alone.test(Steps(), loader(1), ckpt_path=tmp_path, verbose=False)


def test_a_strategy_with_a_format_of_its_own_says_what_to_do(run, alone, monkeypatch):
    """Its pieces are read by the callback alone."""
    monkeypatch.setattr(type(alone.strategy), "save_checkpoint", FSDPStrategy.save_checkpoint)
    with pytest.raises(ConfigurationError, match=r"Add SBCheckpoint\(\.\.\.\)"):
        alone.test(Steps(), loader(1), ckpt_path=run, verbose=False)


def test_only_checkpoints_of_that_run_are_there(run):
    """What the tests above count on."""
    assert [ckpt.meta["global_step"] for ckpt in saved(run)] == [8, 12]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "imports", ["import lightning_sbckpt, lightning", "import lightning, lightning_sbckpt"]
)
def test_an_import_is_enough(imports):
    """Of this package, before Lightning or after it."""
    code = f"""{imports}
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector as it
assert it.resume_start.__globals__['__name__'].startswith('lightning_sbckpt')"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
