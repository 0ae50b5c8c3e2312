"""What else is done while a save is in flight: loading, failing, forking."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._save import late_copy

WIDTH = 300  # A weight of so many rows and columns is large: it is copied late.


def filled(number):
    """Return a module whose weights are all one number."""
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    torch.nn.init.constant_(module.weight, number)
    return module


def test_what_is_loaded_is_never_part_of_a_checkpoint_saved_before(tmp_path, monkeypatch):
    """Loading waits until the copy that hides behind training is made."""
    model = filled(1.0)
    checkpointer = Checkpointer(tmp_path, {"model": model}, save_mode="overlap")
    checkpointer.save_checkpoint(name="one")
    checkpointer.wait()
    copy = late_copy._copy_if_there

    def slow(*arguments):
        time.sleep(0.3)
        return copy(*arguments)

    monkeypatch.setattr(late_copy, "_copy_if_there", slow)
    torch.nn.init.constant_(model.weight, 2.0)
    checkpointer.save_checkpoint(name="two")
    checkpointer.load_checkpoint(tmp_path / "CKPT+one")
    assert model.weight[0, 0] == 1.0
    checkpointer.wait()
    state = torch.load(tmp_path / "CKPT+two" / "model.ckpt", weights_only=True)
    assert (state["weight"] == 2.0).all()


class OwnError(Exception):
    """What the user's code raises."""


def raise_value_error(checkpoint):
    """A predicate that fails."""
    raise ValueError("in the background")


def test_a_function_of_the_user_that_fails_in_the_background_does_not_hide_the_runs_own_error(
    tmp_path,
):
    """It comes out at the end of the block only if nothing else did."""

    def save():
        with Checkpointer(tmp_path, {"model": filled(1.0)}, save_mode="async") as checkpointer:
            checkpointer.save_and_keep_only(ckpt_predicate=raise_value_error)
            yield
            raise OwnError

    with pytest.raises(OwnError):
        list(save())
    with (
        pytest.raises(ValueError, match="in the background"),
        Checkpointer(tmp_path, {"model": filled(1.0)}, save_mode="async") as checkpointer,
    ):
        checkpointer.save_and_keep_only(ckpt_predicate=raise_value_error)


def test_a_child_forked_while_another_thread_looks_can_look_itself(tmp_path):
    """A lock that was held at the fork by a thread that the child doesn't have is made anew."""
    checkpointer = Checkpointer(tmp_path, {"model": filled(1.0)})
    checkpointer.save_checkpoint(name="a")
    holds, may_end = threading.Event(), threading.Event()

    def hold():
        with checkpointer._looking:
            holds.set()
            may_end.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(20)
    child = os.fork()
    if child == 0:
        os._exit(len(checkpointer.list_checkpoints()))
    deadline = time.monotonic() + 20
    status = 0
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    may_end.set()
    thread.join()
    assert ended == child, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 1
