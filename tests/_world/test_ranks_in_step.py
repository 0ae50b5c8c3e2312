"""An error on one rank reaches all ranks as the same error, and the ranks stay in step."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _sharded_ranks import run

from lightning_sbckpt import Checkpointer, register_checkpoint_hooks
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt.hooks import mark_as_loader, mark_as_saver


@register_checkpoint_hooks(save_on_main_only=False)
class Summed:
    """An object whose save hook holds a collective."""

    @mark_as_saver
    def save(self, path):
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            Path(path).write_text(str(total.item()))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        pass


class Unsavable:
    """An object that has neither a state nor a hook."""


def outcome(act):
    """Return the type of the error that a call raises and what it says, or "ok"."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "ok", ""


def go_wrong(folder, rank, how, wrong, mode, policy):
    """Do one thing with an argument that is wrong on one rank; then save, as it should be."""
    recoverables = {"model": torch.nn.Linear(2, 2), "sum": Summed()}
    checkpointer = Checkpointer(folder, recoverables, save_mode=mode, on_save_error=policy)
    checkpointer.save_checkpoint({"loss": 1.0}, name="earlier")
    checkpointer.wait()
    bad = rank == wrong
    if how == "recoverable":
        if bad:
            checkpointer.recoverables["a"] = Unsavable()
        answer = outcome(checkpointer.save_checkpoint)
        checkpointer.recoverables.pop("a", None)
    elif how == "name":
        answer = outcome(lambda: checkpointer.save_checkpoint(name="../a" if bad else "a"))
    elif how == "meta":
        answer = outcome(lambda: checkpointer.save_checkpoint({"a": object() if bad else 1}))
    elif how == "document":
        extra_files = {"../a" if bad else "a": "text"}
        request = SaveRequest(checkpointer.recoverables, extra_files=extra_files)
        answer = outcome(lambda: checkpointer.save(request))
    elif how == "rules":
        answer = outcome(lambda: checkpointer.save_and_keep_only(num_to_keep=-1 if bad else 1))
    elif how == "delete":
        answer = outcome(lambda: checkpointer.delete_checkpoints(num_to_keep=-1 if bad else 9))
    elif how == "predicate":
        text = "loss <" if bad else "loss < 9"
        answer = outcome(lambda: checkpointer.recover_if_possible(ckpt_predicate=text))
    elif how == "keys":
        key = {"min_key": "loss", **({"max_key": "loss"} if bad else {})}
        answer = outcome(lambda: checkpointer.recover_if_possible(**key))
    elif how == "annotation":
        answer = outcome(lambda: checkpointer.annotate("earlier", {"a": object() if bad else 1}))
    checkpointer.wait()
    checkpointer.save_checkpoint({"loss": 2.0}, name="later")
    checkpointer.wait()
    dist.barrier()
    return answer, sorted(name for name in os.listdir(folder) if name.startswith("CKPT+"))


SAVES = {"recoverable": "HookError", "name": "CheckpointNameError", "meta": "MetaError"}
OTHERS = ("document", "rules", "delete", "predicate", "keys", "annotation")


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("how", [*SAVES, *OTHERS])
def test_argument_that_is_wrong_on_one_rank_leaves_the_ranks_in_step(tmp_path, how, wrong, size):
    """All ranks raise the same error, or rank zero's arguments count; the next save works."""
    answers = run(go_wrong, tmp_path, how, wrong, "sync", "raise", size=size)
    kinds = {kind for (kind, _), _ in answers}
    assert len(kinds) == 1, answers
    if how in SAVES:
        assert kinds == {SAVES[how]}
    for _, names in answers:
        assert {"CKPT+earlier", "CKPT+later"} <= set(names)
    # A save that failed on one rank is a save that failed.
    if how in {*SAVES, "document"}:
        assert answers[0][1] == ["CKPT+earlier", "CKPT+later"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", ["async", pytest.param("overlap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("how", ["recoverable", "meta"])
def test_save_that_fails_on_one_rank_is_a_warning_on_all_with_warn(tmp_path, how, wrong, mode):
    """Training goes on, on every rank."""
    answers = run(go_wrong, tmp_path, how, wrong, mode, "warn")
    assert answers == [(("ok", ""), ["CKPT+earlier", "CKPT+later"])] * 2


def fail_before_the_collective(folder, rank, wrong):
    """Save an object whose hook fails on one rank, while the others are in its collective."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))

    def hook(obj, path):
        if rank == wrong:
            raise RuntimeError("no room on this rank")
        Summed.save(obj, path)

    checkpointer = Checkpointer(folder)
    checkpointer.registry = checkpointer.registry.copy()
    checkpointer.registry.save[Summed] = hook
    checkpointer.add_recoverable("sum", Summed())
    return outcome(checkpointer.save_checkpoint), os.listdir(folder)


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [0, 1])
def test_hook_that_fails_before_its_own_collective_ends_every_rank(tmp_path, wrong, size):
    """By the time limit of the group; the rank that failed says why, and nothing is visible."""
    answers = run(fail_before_the_collective, tmp_path, wrong, size=size)
    for rank, ((kind, text), names) in enumerate(answers):
        assert kind != "ok"
        assert ("no room on this rank" in text) == (rank == wrong), text
        assert not [name for name in names if name.startswith("CKPT")]
