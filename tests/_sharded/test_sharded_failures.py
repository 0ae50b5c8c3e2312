"""A rank that can't write its pieces fails the save on every rank, and none is left waiting."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from _releases import needs_torch
from _sharded_ranks import SECONDS, make, run, train

from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import SaveError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


class FullFor(LocalStorage):
    """A disk that is full, or dies with its process, at one operation on one kind of file."""

    def __init__(self, operation, ending, act):
        self.failing = operation, ending
        self.act = act

    def before(self, operation, path, target=None):
        if operation == self.failing[0] and path.name.endswith(self.failing[1]):
            self.act()


def full():
    raise OSError(28, "No space left on device")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def entries(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("CKPT"))


def staged(folder):
    return [name for name in os.listdir(folder) if name.startswith(".staging")]


def save_to_full(folder, rank, failing, operation, ending):
    checkpointer, model, optimizer = make(folder)
    train(model, optimizer, 1)
    checkpointer.save_checkpoint(name="earlier")
    workshop = checkpointer._saver._state
    usual = workshop.storage
    if rank == failing:
        workshop.storage = FullFor(operation, ending, full)
    began = time.monotonic()
    try:
        checkpointer.save_checkpoint(name="failed")
    except SaveError as error:
        answer = str(error)
    seconds = time.monotonic() - began
    workshop.storage = usual
    # The group is still in step: the next save works.
    checkpointer.save_checkpoint(name="later")
    dist.barrier()
    return answer, seconds, entries(folder), staged(folder)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("failing", "operation", "ending"),
    [
        (1, "write", "__1_0.distcp"),
        (1, "flush_file", "__1_0.distcp"),
        pytest.param(0, "write", "__0_0.distcp", marks=pytest.mark.slow),
        pytest.param(0, "flush_file", ".metadata", marks=pytest.mark.slow),
        pytest.param(0, "make_dir", "optimizer.dcp", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_both(
    tmp_path, failing, operation, ending
):
    """Each says where and why, nothing is left of it, and the next save works."""
    answers = run(save_to_full, tmp_path, failing, operation, ending)
    for rank, (message, seconds, names, left) in enumerate(answers):
        assert seconds < SECONDS
        assert "No space left on device" in message
        assert "Nothing of this checkpoint is kept; earlier ones are whole" in message
        assert (f"failed on rank {failing}" in message) == (rank != failing)
        assert names == ["CKPT+earlier", "CKPT+later"]
        assert left == []
    for name in ("earlier", "later"):
        assert find_damage(tmp_path / "run" / f"CKPT+{name}") == []


def save_apart(folder, rank):
    from lightning_sbckpt._sharded import writing

    checkpointer, _, _ = make(folder)
    checkpointer.save_checkpoint(name="earlier")
    usual = writing._Writer
    if rank == 1:
        # As if this rank were on another machine, whose disk has a folder of the same name.
        apart = folder.parent / "apart"
        writing._Writer = lambda path, storage: usual(apart / path.name, storage)
    try:
        checkpointer.save_checkpoint(name="failed")
    except SaveError as error:
        answer = str(error)
    writing._Writer = usual
    checkpointer.save_checkpoint(name="later")
    dist.barrier()
    return answer, entries(folder), staged(folder)


def test_ranks_that_do_not_share_the_folder_are_told_so(tmp_path):
    """Else the checkpoint would lack the pieces of the other machine."""
    for message, names, left in run(save_apart, tmp_path):
        assert "rank zero finds no such file" in message
        assert "one that all ranks share" in message
        assert names == ["CKPT+earlier", "CKPT+later"]
        assert left == []


def die_in_save(folder, rank, operation, ending):
    checkpointer, _, _ = make(folder)
    checkpointer.save_checkpoint(name="earlier")
    if rank == 1:
        checkpointer._saver._state.storage = FullFor(operation, ending, die)
    began = time.monotonic()
    try:
        checkpointer.save_checkpoint(name="failed")
    except SaveError as error:
        return str(error), time.monotonic() - began, entries(folder)
    return "saved", 0.0, entries(folder)


@pytest.mark.parametrize(
    ("operation", "ending"),
    [("write", "__1_0.distcp"), pytest.param("make_dir", ".dcp", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_killed_in_the_save_leaves_nothing_visible_and_the_other_ends(
    tmp_path, operation, ending
):
    """The other one learns it from the broken connection, and not by a timeout."""
    ((message, seconds, names),) = run(die_in_save, tmp_path, operation, ending, dying=1)
    assert "the other ranks can't be reached" in message
    assert seconds < SECONDS
    assert names == ["CKPT+earlier"]
    assert find_damage(tmp_path / "run" / "CKPT+earlier") == []


def fail_in_hook(folder, rank):
    checkpointer, _, _ = make(folder)

    def fail(obj, path):
        raise RuntimeError("a hook that fails")

    if rank == 0:
        checkpointer.add_recoverable("counter", object(), custom_save_hook=fail)
    else:
        checkpointer.add_recoverable("counter", object(), custom_save_hook=lambda obj, path: None)
    checkpointer.save_checkpoint()


def test_what_fails_on_rank_zero_alone_is_told_before_anybody_writes_pieces(tmp_path):
    """The others don't begin a collective that rank zero never comes to."""
    for kind, message in run(fail_in_hook, tmp_path):
        assert kind == "SaveError"
        assert "a hook that fails" in message
    assert entries(tmp_path / "run") == []
