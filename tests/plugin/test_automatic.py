"""An administrator turns auto-resume on by a variable; scripts know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from itertools import count
from pathlib import Path

import lightning as L
import pytest
from _runs import Steps, loader, saved

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.plugin import automatic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    """Have Lightning find the entry point, whether the package is installed or not; count anew."""
    entry = EntryPoint(
        "sbckpt", "lightning_sbckpt_auto:callbacks", "lightning.pytorch.callbacks_factory"
    )
    monkeypatch.setattr("lightning.fabric.utilities.registry.entry_points", lambda group: [entry])
    monkeypatch.setattr(automatic, "_trainers", count(1))
    monkeypatch.delenv("LIGHTNING_SBCKPT_DIR", raising=False)


def train(root, epochs=1, module=None, **settings):
    """Do what a script does, and return its Trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=root, **{**quiet, **settings}
    )
    trainer.fit(Steps() if module is None else module, loader())
    return trainer


def ours(trainer):
    return [each for each in trainer.callbacks if isinstance(each, SBCheckpoint)]


def test_both_packages_find_it():
    """Each asks a group of its own."""
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("lightning.pytorch", "pytorch_lightning"):
        group = f'[project.entry-points."{package}.callbacks_factory"]'
        assert f'{group}\nsbckpt = "lightning_sbckpt_auto:callbacks"' in text


def test_nothing_is_added_or_imported_unless_the_variable_is_set(tmp_path):
    """Not even this package."""
    assert not ours(train(tmp_path))
    code = "import sys, lightning_sbckpt_auto as a; print(a.callbacks(), sorted(sys.modules))"
    environment = {key: value for key, value in os.environ.items() if key != "LIGHTNING_SBCKPT_DIR"}
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert printed.startswith("[] ")
    assert not any(name in printed for name in ("'torch'", "'lightning'", "'lightning_sbckpt'"))


def test_a_script_that_says_nothing_of_it_goes_on(tmp_path, monkeypatch):
    """Started again; its second Trainer has a folder of its own."""
    monkeypatch.setenv("LIGHTNING_SBCKPT_DIR", str(tmp_path / "auto"))
    for epochs in (1, 2):
        monkeypatch.setattr(automatic, "_trainers", count(1))
        for number in (1, 2):
            trainer = train(tmp_path, epochs + number)
            (callback,) = ours(trainer)
            assert callback.dirpath == tmp_path / "auto" / f"trainer-{number}"
            assert (callback.resume_report is not None) == (epochs == 2)
            assert trainer.global_step == 4 * (epochs + number)


def test_the_users_own_callback_is_the_only_one_that_saves(tmp_path, monkeypatch):
    """From the Trainer's arguments or from the module, whichever comes first."""
    monkeypatch.setenv("LIGHTNING_SBCKPT_DIR", str(tmp_path / "auto"))

    class Own(Steps):
        def configure_callbacks(self):
            return SBCheckpoint(tmp_path / "module")

    train(tmp_path, callbacks=SBCheckpoint(tmp_path / "own"))
    train(tmp_path, module=Own())
    assert saved(tmp_path / "own")
    assert saved(tmp_path / "module")
    assert not (tmp_path / "auto").exists()


@pytest.mark.parametrize("settings", [{"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_where_checkpointing_is_off_nothing_is_saved(tmp_path, monkeypatch, settings):
    """A Trainer that was told to write none."""
    monkeypatch.setenv("LIGHTNING_SBCKPT_DIR", str(tmp_path / "auto"))
    train(tmp_path, **settings)
    assert not (tmp_path / "auto").exists()


@pytest.mark.parametrize("wrong", ["{lr}", "{", "{}"])
def test_a_folder_that_not_every_script_has_is_told(tmp_path, monkeypatch, wrong):
    """The script did not ask for it, and runs."""
    monkeypatch.setenv("LIGHTNING_SBCKPT_DIR", str(tmp_path / wrong))
    with pytest.warns(UserWarning, match="can't be a folder, so nothing is saved"):
        assert train(tmp_path).global_step == 4


def test_a_run_that_can_not_be_saved_goes_on_and_it_is_said(tmp_path, monkeypatch):
    """By a strategy with a format of its own, say."""
    monkeypatch.setenv("LIGHTNING_SBCKPT_DIR", str(tmp_path / "auto"))
    monkeypatch.setattr(
        "lightning_sbckpt.plugin._private.trainer.has_own_checkpoint_format", lambda strategy: True
    )
    with pytest.warns(UserWarning, match="LIGHTNING_SBCKPT_DIR is set, but this run is not saved"):
        assert train(tmp_path).global_step == 4
