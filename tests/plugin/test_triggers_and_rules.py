"""Triggers, rules and expressions of the user's, in a real fit."""

from __future__ import annotations

import pytest
from _runs import fit, saved, steps_saved

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.retention import Budget, EveryNSteps, Newest
from lightning_sbckpt.triggers import AtSteps, Ephemeral, FirstStep
from lightning_sbckpt.triggers import EveryNSteps as OnEveryNSteps


def test_triggers_of_the_user_are_asked_beside_the_usual_ones(tmp_path):
    """Explicit steps and the first one, besides validation and the end of training."""
    fit(
        tmp_path, trainer={"max_epochs": 2}, num_to_keep=20, triggers=[FirstStep(), AtSteps([3, 6])]
    )
    assert steps_saved(tmp_path) == [1, 3, 4, 6, 8]


def test_only_its_own_triggers_save_a_run_that_asks_for_no_others(tmp_path):
    """`every_n_epochs=None`; the end of training is always kept."""
    fit(
        tmp_path,
        trainer={"max_epochs": 2},
        num_to_keep=20,
        every_n_epochs=None,
        triggers=[AtSteps([3])],
    )
    assert steps_saved(tmp_path) == [3, 8]


def test_an_ephemeral_checkpoint_is_marked_and_goes_first(tmp_path):
    """Rules of long memory don't see it; a lasting reason at the same moment makes it last."""
    fit(
        tmp_path,
        trainer={"max_epochs": 2},
        num_to_keep=1,
        keep=[EveryNSteps(2)],
        triggers=[Ephemeral(OnEveryNSteps(1)), OnEveryNSteps(2)],
    )
    by_step = {ckpt.meta["global_step"]: ckpt.meta for ckpt in saved(tmp_path)}
    assert sorted(by_step) == [2, 4, 6, 8]
    assert not any("ephemeral" in meta for meta in by_step.values())
    fit(
        tmp_path / "b",
        trainer={"max_epochs": 1},
        num_to_keep=20,
        triggers=[Ephemeral(OnEveryNSteps(1))],
    )
    marks = {ckpt.meta["global_step"]: ckpt.meta.get("ephemeral") for ckpt in saved(tmp_path / "b")}
    assert marks == {1: True, 2: True, 3: True, 4: None}


def test_a_trigger_that_is_none_is_refused_at_construction(tmp_path):
    """Before any training."""
    with pytest.raises(
        ConfigurationError, match=r"triggers is \[500\], expected objects with a method due"
    ):
        SBCheckpoint(tmp_path, triggers=[500])


def test_a_predicate_may_be_an_expression(tmp_path):
    """A metric that no checkpoint has yet makes it false, and raises nothing."""
    fit(
        tmp_path,
        trainer={"max_epochs": 3},
        keep_recent=True,
        every_n_train_steps=2,
        ckpt_predicate="global_step > 4 and val_loss < 100",
    )
    # Steps 2 and 4 are not for retention; 6 has no metric; of 8 and 12 the newest is the best.
    assert steps_saved(tmp_path) == [2, 4, 6, 10, 12]


def test_a_budget_drops_what_is_least_wanted(tmp_path):
    """Its bytes are those on the disk; the newest stays whatever it costs."""
    fit(tmp_path, trainer={"max_epochs": 4}, num_to_keep=1, keep=[Newest(10), Budget("1 B")])
    assert steps_saved(tmp_path) == [16]
