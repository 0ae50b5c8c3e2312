"""What can't be saved or loaded in pieces is refused on every rank, before anything is half done."""

from __future__ import annotations

import os

import pytest
import torch
from _releases import needs_torch
from _sharded_ranks import make, plain_model, run, same, sharded_model, whole
from _sharded_run import save_after_training

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._world.world import SingleProcess
from lightning_sbckpt.errors import CheckpointNameError, MismatchError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


def entries(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("CKPT"))


def save_unowned(folder, rank):
    checkpointer, _, _ = make(folder)
    del checkpointer.recoverables["model"]
    checkpointer.save_checkpoint()


def test_an_optimizer_without_its_module_is_refused(tmp_path):
    """Its state goes by the names of parameters, which only the module knows."""
    for kind, message in run(save_unowned, tmp_path):
        assert kind == "HookError"
        assert "the optimizer 'optimizer' can't be saved: its parameters are sharded" in message
        assert "Add the module as a recoverable, too" in message
    assert entries(tmp_path / "run") == []


class Holder:
    """An object whose state has a piece of a tensor in it."""

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return {"weights": dict(self.model.state_dict())}

    def load_state_dict(self, state):
        raise AssertionError("never saved")


def save_hidden_pieces(folder, rank):
    checkpointer, model, _ = make(folder)
    checkpointer.add_recoverable("holder", Holder(model))
    checkpointer.save_checkpoint()


def test_pieces_in_the_state_of_another_object_are_refused_and_not_half_saved(tmp_path):
    """Rank zero alone would have written its own piece."""
    for kind, message in run(save_hidden_pieces, tmp_path):
        assert kind == "SaveError"
        assert (
            "the state of 'holder' was not saved: ['weights']['0.weight'] is a sharded" in message
        )
    assert entries(tmp_path / "run") == []


def save_different_names(folder, rank):
    checkpointer, model, _ = make(folder)
    if rank == 1:
        checkpointer.recoverables = {"network": model}
    checkpointer.save_checkpoint()


def test_ranks_with_different_names_are_refused_before_anything_is_written(tmp_path):
    """Their pieces would not meet; nobody waits for anybody."""
    for kind, message in run(save_different_names, tmp_path):
        assert kind == "SaveError"
        assert "(rank 0: model, optimizer; rank 1: network)" in message


def load_other_shape(folder, rank):
    checkpointer, _, _ = make(folder)
    before = sharded_model(1)
    checkpointer.recoverables = {"model": torch.nn.Sequential(before[0], torch.nn.Linear(2, 2))}
    weight = whole(before[0].state_dict())
    try:
        checkpointer.recover_if_possible()
    except MismatchError as error:
        return str(error), same(weight, whole(before[0].state_dict()))
    return "loaded", False


def test_a_model_that_does_not_fit_is_refused_whole_and_each_mismatch_is_named(tmp_path):
    """Nothing has been loaded."""
    run(save_after_training, tmp_path)
    for message, untouched in run(load_other_shape, tmp_path):
        assert untouched
        assert "1.weight: (7,) in the checkpoint, (2, 2) in the module" in message
        assert "3.bias: only in the checkpoint" in message


def save_alone(folder, rank):
    own = folder.parent / f"run{rank}"
    checkpointer = Checkpointer(own, {"model": sharded_model()}, world=SingleProcess())
    checkpointer.save_checkpoint()


def test_a_rank_that_saves_alone_is_refused(tmp_path):
    """It has but its pieces."""
    for kind, message in run(save_alone, tmp_path):
        assert kind == "SaveError"
        assert "1 ranks save together, and torch.distributed has 2, each with its own" in message


def test_a_recoverable_is_not_called_as_a_folder_of_pieces(tmp_path):
    """The ending says what it is."""
    with pytest.raises(CheckpointNameError, match=r"names that end in \.dcp"):
        Checkpointer(tmp_path, {"model.dcp": plain_model()})
