"""What goes wrong in the background on one rank is told to all, and none is left waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from _in_flight import HeldUp
from _releases import needs_torch
from _sharded_background import BusyOn, full, staged, visible
from _sharded_ranks import SECONDS, make, run, train

from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import SaveError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


def save_to_full(folder, rank, failing, operation, ending, learn):
    checkpointer, model, optimizer = make(folder, save_mode="async")
    checkpointer.save_checkpoint(name="earlier")
    checkpointer.wait()
    workshop = checkpointer._saver._state
    usual = workshop.storage
    if rank == failing:
        workshop.storage = BusyOn(operation, ending, full)
    checkpointer.save_checkpoint(name="failed")
    train(model, optimizer, 1)
    workshop.storage = usual
    began = time.monotonic()
    answer = "nothing"
    try:
        if learn == "wait":
            checkpointer.wait()
        else:
            checkpointer.save_checkpoint(name="instead")
    except SaveError as error:
        answer = str(error)
    seconds = time.monotonic() - began
    left = visible(folder), staged(folder)
    dist.barrier()
    checkpointer.save_checkpoint(name="later")
    checkpointer.wait()
    dist.barrier()
    return answer, seconds, left, visible(folder)


@pytest.mark.parametrize(
    ("failing", "operation", "ending", "learn"),
    [
        (1, "write", "__1_0.distcp", "wait"),
        pytest.param(1, "flush_file", "__1_0.distcp", "save", marks=pytest.mark.slow),
        (0, "flush_file", ".metadata", "save"),
        pytest.param(0, "write", "MANIFEST.yaml", "wait", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_on_one_rank_is_told_to_all_by_wait_or_the_next_save(
    tmp_path, failing, operation, ending, learn
):
    """With the reason; nothing is left of the checkpoint, and the save after it works."""
    answers = run(save_to_full, tmp_path, failing, operation, ending, learn)
    for message, seconds, left, names in answers:
        assert "No space left on device" in message
        assert "earlier" in message and "whole" in message
        assert seconds < SECONDS
        assert left == (["CKPT+earlier"], [])
        assert names == ["CKPT+earlier", "CKPT+later"]
    for name in ("earlier", "later"):
        assert find_damage(tmp_path / "run" / f"CKPT+{name}") == []


def save_apart(folder, rank):
    from lightning_sbckpt._sharded import writing

    checkpointer, _, _ = make(folder, save_mode="async")
    usual = writing._Writer
    if rank == 1:
        # As if this rank were on another machine, whose disk has a folder of the same name.
        apart = folder.parent / "apart"
        writing._Writer = lambda path, *options, **named: usual(
            apart / path.name, *options, **named
        )
    checkpointer.save_checkpoint(name="failed")
    try:
        checkpointer.wait()
    except SaveError as error:
        return str(error), visible(folder)
    return "saved", visible(folder)


def test_ranks_that_do_not_share_the_folder_are_told_so_in_the_background_too(tmp_path):
    """Rank zero hears from each rank what it has written, and looks for it."""
    for message, names in run(save_apart, tmp_path):
        assert "rank zero finds no such file" in message
        assert names == []


def die_in_background(folder, rank, dying, operation, ending):
    checkpointer, _, _ = make(folder, save_mode="async")
    checkpointer.save_checkpoint(name="earlier")
    checkpointer.wait()
    if rank == dying:
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        checkpointer._saver._state.storage = BusyOn(operation, ending, die)
    checkpointer.save_checkpoint(name="failed")
    began = time.monotonic()
    try:
        checkpointer.wait()
    except SaveError as error:
        return str(error), time.monotonic() - began, visible(folder)
    return "saved", 0.0, visible(folder)


@pytest.mark.parametrize(
    ("dying", "operation", "ending"),
    [
        (1, "write", "__1_0.distcp"),
        pytest.param(1, "flush_file", "__1_0.distcp", marks=pytest.mark.slow),
        (0, "flush_file", "__0_0.distcp"),
    ],
)
def test_a_rank_that_is_killed_in_the_background_leaves_nothing_visible_and_the_other_ends(
    tmp_path, dying, operation, ending
):
    """The other learns it from the broken connection."""
    ((message, seconds, names),) = run(
        die_in_background, tmp_path, dying, operation, ending, dying=dying
    )
    assert "the other ranks can't be reached" in message
    assert seconds < SECONDS
    assert names == ["CKPT+earlier"]
    assert find_damage(tmp_path / "run" / "CKPT+earlier") == []


def die_before_meeting(folder, rank, dying):
    from lightning_sbckpt._save import sharded_staging as staging

    staging._MEETING = timedelta(seconds=3)
    checkpointer, _, _ = make(folder, save_mode="async")
    if rank == dying:
        dist.new_group = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        checkpointer.save_checkpoint(name="a")
    except SaveError as error:
        return str(error), time.monotonic() - began, os.listdir(folder)
    return "saved", 0.0, os.listdir(folder)


@pytest.mark.sample(1)
@needs_torch("2.9", "the time limit of a group that can be changed")
@pytest.mark.parametrize(
    ("dying", "size"), [(1, 2), (0, 2), pytest.param(1, 3, marks=pytest.mark.slow)]
)
def test_a_rank_that_is_killed_as_the_group_for_the_background_is_made_ends_the_others(
    tmp_path, dying, size
):
    """Nothing is broken that they could learn it from, so there is a time limit of its own."""
    answers = run(die_before_meeting, tmp_path, dying, dying=dying, size=size)
    assert len(answers) == size - 1
    for message, seconds, left in answers:
        assert "at least one did not come within 3 seconds" in message
        assert "Nothing of this checkpoint is kept" in message and "Start all ranks" in message
        assert seconds < SECONDS
        assert not [name for name in left if name.startswith("CKPT")]
        # What rank zero began and could not clear away is swept at the next start.
        assert dying == 0 or not [name for name in left if name.startswith(".staging")]


def write_for_long(folder, rank):
    from lightning_sbckpt._save import sharded_staging as staging

    staging._MEETING = timedelta(seconds=2)
    checkpointer, _, _ = make(folder, save_mode="async")
    if rank == 1:
        slow = BusyOn("write", "__1_0.distcp", lambda: time.sleep(5))
        checkpointer._saver._state.storage = slow
    began = time.monotonic()
    checkpointer.save_checkpoint(name="a")
    checkpointer.wait()
    return time.monotonic() - began


@pytest.mark.long
def test_a_rank_may_write_for_longer_than_ranks_may_take_to_meet(tmp_path):
    """The time limit of the group is that of torch as soon as it is there."""
    seconds = run(write_for_long, tmp_path)
    assert seconds[1] > 5
    assert visible(tmp_path / "run") == ["CKPT+a"]


def save_without_memory(folder, rank):
    from lightning_sbckpt._save import sharded_staging as staging

    checkpointer, _, _ = make(folder, save_mode="async")
    usual = staging.allocate

    def refuse(size, devices):
        raise OSError(12, "Cannot allocate memory")

    if rank == 1:
        staging.allocate = refuse
    answer = "nothing"
    try:
        checkpointer.save_checkpoint(name="failed")
    except SaveError as error:
        answer = str(error)
    staging.allocate = usual
    checkpointer.save_checkpoint(name="later")
    checkpointer.wait()
    return answer, visible(folder)


def test_a_rank_without_memory_for_a_copy_fails_the_save_on_all_before_training_goes_on(tmp_path):
    """It names the bytes and what to do; the next save works."""
    (other, names), (own, _) = run(save_without_memory, tmp_path)
    assert "there is no memory for" in own and "Cannot allocate memory" in own
    assert "Use save_mode='sync', which needs no copy" in own
    assert other.startswith("failed on rank 1: SaveError: the pieces of this rank were not copied")
    assert names == ["CKPT+later"]


def fail_alone(folder, rank):
    checkpointer, _, _ = make(folder, save_mode="async")
    checkpointer.save_checkpoint(name="a")
    checkpointer.wait()
    stager = checkpointer._saver._state.stager
    if rank == 1:

        def fail(*args):
            raise SaveError("seen by this rank alone")

        usual, stager.write = stager.write, lambda *args: (usual(*args), fail())
    checkpointer.save_checkpoint(name="b")
    answer = "nothing"
    try:
        checkpointer.wait()
    except SaveError as error:
        answer = str(error)
    return answer, visible(folder)


def test_what_one_rank_alone_has_seen_go_wrong_is_raised_there(tmp_path):
    """The checkpoint is what rank zero says that it is."""
    names = ["CKPT+a", "CKPT+b"]
    expected = [("nothing", names), ("seen by this rank alone", names)]
    assert run(fail_alone, tmp_path) == expected


def break_the_group(folder, rank):
    checkpointer, _, _ = make(folder, save_mode="async")
    gather = dist.gather_object

    def refuse(*args, **kwargs):
        if threading.current_thread().name == "sbckpt-writer":
            raise RuntimeError("a message that nobody gets")
        return gather(*args, **kwargs)

    dist.gather_object = refuse
    checkpointer.save_checkpoint(name="broken")
    stager = checkpointer._saver._state.stager
    first, answer = stager._group, "nothing"
    try:
        checkpointer.wait()
    except SaveError as error:
        answer = str(error)
    dist.gather_object = gather
    checkpointer.save_checkpoint(name="later")
    checkpointer.wait()
    return answer, first is stager._group, visible(folder)


def test_a_group_in_which_a_message_was_lost_is_not_used_again(tmp_path):
    """Ranks that are out of step there would take one message for another."""
    for message, again, names in run(break_the_group, tmp_path):
        assert "the other ranks can't be reached (RuntimeError: a message that" in message
        assert not again
        assert names == ["CKPT+later"]


def destroy_in_flight(folder, rank):
    disk = HeldUp()
    checkpointer, _, _ = make(folder, storage=disk, save_mode="async")
    checkpointer.save_checkpoint(name="a")
    dist.destroy_process_group()
    disk.go_on.set()
    began = time.monotonic()
    checkpointer.wait_here()
    return time.monotonic() - began, visible(folder)


def test_ranks_that_leave_the_group_with_a_save_in_flight_end_all_the_same(tmp_path):
    """The checkpoint is whole or not there."""
    for seconds, names in run(destroy_in_flight, tmp_path):
        assert seconds < SECONDS
        assert names in ([], ["CKPT+a"])
    if names:
        assert find_damage(tmp_path / "run" / "CKPT+a") == []


END = """
import sys
from pathlib import Path
import torch.distributed as dist
from _sharded_ranks import make
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
meeting = f"file://{folder / 'meeting'}"
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=meeting)
checkpointer, _, _ = make(folder / "run", save_mode="async")
checkpointer.save_checkpoint(name="a")
"""


@pytest.mark.slow
def test_scripts_that_end_right_after_a_save_see_it_to_its_end(tmp_path):
    """No rank exits while the others need it, whether it was waited for or not."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", END, tmp_path, str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert visible(tmp_path / "run") == ["CKPT+a"]
    assert find_damage(tmp_path / "run" / "CKPT+a") == []
