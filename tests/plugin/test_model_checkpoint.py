"""The way from Lightning's `ModelCheckpoint` to this callback."""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import timedelta

import pytest
from _runs import Steps, loader, make, saved
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.model_checkpoint import INSTEAD


def test_every_argument_of_it_is_one_here_or_has_a_word_for_what_takes_its_place():
    """Whatever release of Lightning this is."""
    theirs = set(inspect.signature(ModelCheckpoint).parameters)
    ours = set(inspect.signature(SBCheckpoint.__init__).parameters)
    assert theirs - ours == theirs & set(INSTEAD)
    assert not set(INSTEAD) & ours


@pytest.mark.parametrize("name", INSTEAD)
def test_an_argument_of_it_is_refused_with_what_takes_its_place(name):
    """Not as one that nobody knows."""
    with pytest.raises(ConfigurationError, match=f"{name} is an argument of ModelCheckpoint: here"):
        SBCheckpoint("run", **{name: 1})


def test_a_class_derived_from_ours_may_have_an_argument_of_such_a_name():
    """It is that class's own."""

    class Verbose(SBCheckpoint):
        def __init__(self, dirpath, verbose=False, **more):
            super().__init__(dirpath, **more)
            self.verbose = verbose

    assert Verbose("run", verbose=True).verbose
    with pytest.raises(ConfigurationError, match="monitor is an argument of ModelCheckpoint"):
        Verbose("run", monitor="val_loss")


def test_a_misspelled_argument_is_refused_as_python_does():
    """By its name."""
    with pytest.raises(TypeError, match="num_to_kep"):
        SBCheckpoint("run", num_to_kep=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"monitor": "val_loss"}, {"min_key": "val_loss"}),
        (
            {"monitor": "val_acc", "mode": "max", "save_top_k": 3},
            {"max_key": "val_acc", "num_to_keep": 3},
        ),
        ({"save_top_k": -1}, {"num_to_keep": 10**9}),
        ({"save_top_k": 0, "save_last": True}, {}),
        (
            {"every_n_train_steps": 5},
            {"every_n_train_steps": 5, "every_n_epochs": None},
        ),
        (
            {"train_time_interval": timedelta(minutes=1)},
            {"train_time_interval": timedelta(minutes=1), "every_n_epochs": None},
        ),
        ({"every_n_epochs": 2}, {"every_n_epochs": 2}),
    ],
)
def test_a_callback_like_it_has_its_settings(tmp_path, given, expected):
    """Folder, metric, how often and how many."""
    found = SBCheckpoint.like(ModelCheckpoint(tmp_path, **given))
    assert found._options == SBCheckpoint(tmp_path, **expected)._options
    assert copy.deepcopy(found)._options == found._options
    assert pickle.loads(pickle.dumps(found))._options == found._options


def test_arguments_beside_it_go_first(tmp_path):
    """And a callback that saves nothing has none like it."""
    found = SBCheckpoint.like(ModelCheckpoint(tmp_path), num_to_keep=4, save_mode="async")
    assert found.save_top_k == 4
    with pytest.raises(ConfigurationError, match="saves nothing: leave the callback out"):
        SBCheckpoint.like(ModelCheckpoint(tmp_path, save_top_k=0))


def test_a_fit_keeps_what_it_would_have_kept(tmp_path):
    """All of them with `save_top_k=-1`."""
    run = make(tmp_path, module=Steps(), trainer={"max_epochs": 3})
    run.trainer.callbacks[:] = [
        SBCheckpoint.like(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2))
    ]
    run.trainer.fit(run.module, loader())
    assert len(saved(tmp_path)) == run.trainer.global_step // 2
