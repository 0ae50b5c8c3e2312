"""Pieces are copied, and written in the background by all ranks while training goes on."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch
import torch.distributed as dist
from _in_flight import HeldUp
from _releases import needs_torch
from _sharded_background import states_of, visible
from _sharded_ranks import SECONDS, make, plain_model, run, same, train, whole

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._save.late_copy import LateCopy
from lightning_sbckpt._sharded.reading import SavedShards
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt.errors import SaveError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")

MODES = ["async", pytest.param("overlap", marks=pytest.mark.slow)]


def save_and_train_on(folder, rank, mode):
    disk = HeldUp()
    checkpointer, model, optimizer = make(folder, storage=disk, save_mode=mode)
    train(model, optimizer, 2)
    beside = {
        "plain": torch.arange(5.0),
        "list": [1, 2],
        "nested": {"tensor": torch.ones(3), "text": "before"},
        "of the model": next(iter(model.parameters())).detach(),
    }
    checkpointer.add_recoverable("beside", ShardedState(beside))
    expected = {**states_of(model, optimizer), "beside": whole(beside)}
    checkpointer.save_checkpoint(name="a")
    seen = {"busy": checkpointer.is_saving, "written": [*folder.rglob("*.distcp")]}
    train(model, optimizer, 2, first=2)
    beside["plain"] += 1
    beside["nested"]["tensor"].zero_()
    beside["nested"]["text"] = "after"
    beside["list"].append(3)
    disk.go_on.set()
    checkpointer.wait()
    if rank == 0:
        torch.save(expected, folder.parent / "expected.pt")
    seen["changed"] = not same(expected["model"], states_of(model, optimizer)["model"])
    return seen


def load(folder, rank):
    checkpointer, model, optimizer = make(folder, seed=9)
    checkpointer.recover_if_possible()
    return states_of(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_is_the_state_of_the_save_whatever_is_changed_meanwhile(tmp_path, mode):
    """Sharded and plain tensors, lists and texts, all changed in place before a byte is written."""
    for seen in run(save_and_train_on, tmp_path, mode):
        assert seen == {"busy": True, "written": [], "changed": True}
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    beside = expected.pop("beside")
    for answer in run(load, tmp_path):
        assert same(answer, expected)
    folder = tmp_path / "run" / "CKPT+a"
    assert same(SavedShards(folder / "beside.dcp").state(), beside)
    assert find_damage(folder) == []


def save_fsdp1(folder, rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = FullyShardedDataParallel(
        plain_model(0), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    disk = HeldUp()
    recoverables = {"model": model, "optimizer": optimizer}
    checkpointer = Checkpointer(folder, recoverables, storage=disk, save_mode="async")
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        expected = whole(dict(model.state_dict()))
    for name in ("a", "b"):
        checkpointer.save_checkpoint(name=name)
        train(model, optimizer, 2)
        disk.go_on.set()
        checkpointer.wait()
        disk.go_on.clear()
    return expected


def test_the_first_version_of_fsdp_has_pieces_that_are_copied_too(tmp_path):
    """Its sharded tensors are views into one that training changes."""
    expected = run(save_fsdp1, tmp_path)[0]
    assert expected
    for name, is_same in (("a", True), ("b", False)):
        found = SavedShards(tmp_path / "run" / f"CKPT+{name}" / "model.dcp").state()
        assert same(found, expected) == is_same
        assert SavedShards(tmp_path / "run" / f"CKPT+{name}" / "optimizer.dcp").state()["state"]


def save_thrice(folder, rank):
    checkpointer, model, optimizer = make(folder, save_mode="async")
    train(model, optimizer, 1)
    memory = []
    for name in ("a", "b", "c"):
        checkpointer.save_checkpoint(name=name)
        train(model, optimizer, 1)
        stager = checkpointer._saver._state.stager
        memory.append((id(stager._memory), stager.capacity, id(stager._group)))
    checkpointer.wait()
    tensors = [*model.state_dict().values()]
    tensors += [value for each in optimizer.state.values() for value in each.values()]
    local = [getattr(each, "to_local", lambda each=each: each)() for each in tensors]
    return len(set(memory)), memory[0][1], sum(-(-each.nbytes // 64) * 64 for each in local)


def test_the_copy_is_kept_and_is_as_large_as_the_pieces_of_a_rank(tmp_path):
    """One memory and one group for all saves; no rank copies what another one has."""
    for different, capacity, size in run(save_thrice, tmp_path):
        assert different == 1
        assert size - 64 <= capacity <= size


def save_replicated(folder, rank, sizes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain_model()
    fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("of", "in")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    recoverables = {"model": model, "optimizer": optimizer}
    expected = states_of(model, optimizer)
    Checkpointer(folder.parent / "sync", recoverables).save_checkpoint(name="a")
    with Checkpointer(folder, recoverables, save_mode="async") as checkpointer:
        checkpointer.save_checkpoint(name="a")
        train(model, optimizer, 1)
        checkpointer.wait()
        copied = checkpointer._saver._state.stager.capacity
    if rank == 0:
        torch.save(expected, folder.parent / "expected.pt")
    pieces = [each.to_local().nbytes for each in model.parameters()]
    # AdamW has two of each beside it, and a number.
    largest = sum(3 * -(-size // 64) * 64 + 64 for size in pieces)
    buffers = sum(-(-each.nbytes // 64) * 64 for each in model.buffers())
    return copied, largest, buffers


@pytest.mark.parametrize("sizes", [(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_what_is_replicated_is_copied_by_the_rank_alone_that_writes_it(tmp_path, sizes):
    """The other replica's ranks stage their buffers and steps; the files are those of a sync save."""
    answers = run(save_replicated, tmp_path, sizes, size=math.prod(sizes))
    for rank, (copied, largest, buffers) in enumerate(answers):
        if rank < sizes[1]:
            assert largest - 64 <= copied <= largest + buffers
        else:
            assert copied <= buffers + 64 * 6
    there, here = (tmp_path / name / "CKPT+a" for name in ("sync", "run"))
    names = sorted(path.relative_to(here) for path in here.rglob("*.distcp"))
    assert names == sorted(path.relative_to(there) for path in there.rglob("*.distcp"))
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert same(SavedShards(here / "model.dcp").state(), expected["model"])
    assert find_damage(here) == []


def save_on_the_second_alone(folder, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = init_device_mesh("cpu", (2,))
    both = DTensor.from_local(torch.ones(3), mesh, [Replicate()])
    state = {"both": both, **({"second": both} if rank == 1 else {})}
    Checkpointer(folder.parent / "sync", {"x": ShardedState(state)}).save_checkpoint(name="a")
    checkpointer = Checkpointer(folder, {"x": ShardedState(state)}, save_mode="async")
    checkpointer.save_checkpoint(name="a")
    try:
        checkpointer.wait()
    except SaveError as error:
        return str(error), visible(folder)
    return "saved", visible(folder)


def test_what_is_replicated_with_a_rank_that_does_not_give_it_is_refused(tmp_path):
    """It would be copied by nobody; the sentence names the key and what to do."""
    for message, names in run(save_on_the_second_alone, tmp_path):
        assert "second is replicated" in message
        assert "expected the same keys on all ranks of a mesh" in message
        assert "save_mode='sync'" in message
        assert names == []
    saved = SavedShards(tmp_path / "sync" / "CKPT+a" / "x.dcp").state()
    assert saved["second"].tolist() == [1, 1, 1]


def talk_while_it_is_written(folder, rank):
    disk = HeldUp()
    checkpointer, _, _ = make(folder, storage=disk, save_mode="async")
    if rank == 0:
        disk.go_on.set()
    checkpointer.save_checkpoint(name="a")
    # In the background rank zero waits for rank one by now, or soon.
    sums = []
    for number in range(50):
        found = torch.tensor(float(rank + number))
        dist.all_reduce(found)
        sums.append(found.item())
    disk.go_on.set()
    checkpointer.wait()
    return sums, visible(folder)


def test_what_ranks_say_in_training_does_not_mix_with_what_they_say_in_the_background(tmp_path):
    """There they have a group of their own."""
    sums = [1.0 + 2 * number for number in range(50)]
    assert run(talk_while_it_is_written, tmp_path) == [(sums, ["CKPT+a"])] * 2


def save_whole(folder, rank):
    model = torch.nn.Linear(3, 3)
    groups = len(dist.distributed_c10d._world.pg_map)
    disk = HeldUp()
    checkpointer = Checkpointer(folder, {"model": model}, storage=disk, save_mode="async")
    checkpointer.save_checkpoint()
    threads = [each.name for each in threading.enumerate() if each.name == "sbckpt-writer"]
    disk.go_on.set()
    checkpointer.wait()
    made = len(dist.distributed_c10d._world.pg_map) - groups
    return len(threads), made, checkpointer._saver._state.stager


def test_a_save_without_pieces_costs_nothing_new(tmp_path):
    """No group is made, nothing is kept for copies, and only rank zero has a thread."""
    assert run(save_whole, tmp_path) == [(1, 0, None), (0, 0, None)]


def skip_while_busy(folder, rank):
    disk = HeldUp()
    checkpointer, model, optimizer = make(folder, storage=disk, save_mode="async", when_busy="skip")
    checkpointer.save_checkpoint(name="a")
    checkpointer.save_checkpoint(name="skipped")
    disk.go_on.set()
    checkpointer.wait()
    may_end = threading.Event()
    if rank == 1:
        # This rank's own thread ends long after rank zero's.
        stager = checkpointer._saver._state.stager
        usual = stager.write
        stager.write = lambda *args: (usual(*args), may_end.wait(SECONDS))[0]
    checkpointer.save_checkpoint(name="b")
    while rank == 0 and checkpointer.is_saving:
        time.sleep(0.01)
    dist.barrier()
    still = checkpointer.is_saving
    # Later than the next save comes, unless the machine is busy.
    threading.Timer(0.5, may_end.set).start()
    train(model, optimizer, 1)
    checkpointer.save_checkpoint(name="c")
    checkpointer.wait()
    return checkpointer._saver._skipped, still, checkpointer.is_saving, visible(folder)


def test_rank_zero_says_whether_a_save_is_skipped_and_a_slower_rank_is_waited_for(tmp_path):
    """All skip the same ones; after a wait no rank has anything left to do."""
    names = ["CKPT+a", "CKPT+b", "CKPT+c"]
    assert run(skip_while_busy, tmp_path) == [(1, False, False, names), (1, True, False, names)]
    assert find_damage(tmp_path / "run" / "CKPT+b") == []


def overlap_with_a_change(folder, rank):
    changed = threading.Event()
    copy = LateCopy._copy
    # So late that it is known to be wrong as soon as it is made.
    LateCopy._copy = lambda late: (changed.wait(SECONDS), copy(late))
    checkpointer, model, optimizer = make(folder, save_mode="overlap")
    average = torch.nn.Linear(600, 600)
    torch.nn.init.ones_(average.weight)
    checkpointer.add_recoverable("average", average)
    train(model, optimizer, 1)
    checkpointer.save_checkpoint(name="a")
    with torch.no_grad():
        average.weight.add_(1)
    changed.set()
    expected = whole(dict(model.named_parameters()))
    train(model, optimizer, 1)
    checkpointer.wait()
    return expected, visible(folder), checkpointer._saver._mode


def test_a_hidden_copy_that_came_out_wrong_leaves_no_rank_alone_with_its_pieces(tmp_path):
    """They are written to the end, dropped with the rest, and saved anew."""
    (expected, *_), _ = answers = run(overlap_with_a_change, tmp_path)
    assert [(names, mode) for _, names, mode in answers] == [(["CKPT+a"], "async")] * 2
    folder = tmp_path / "run" / "CKPT+a"
    assert find_damage(folder) == []
    saved = SavedShards(folder / "model.dcp").state()
    assert same({name: saved[name] for name in expected}, expected)
    assert torch.load(folder / "average.ckpt")["weight"].eq(2).all()


def leave_and_meet_again(folder, rank):
    checkpointer, _, _ = make(folder, save_mode="async")
    checkpointer.save_checkpoint(name="a")
    checkpointer.wait()
    dist.barrier()
    dist.destroy_process_group()
    meeting = folder.parent / "rendezvous-again"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{meeting}")
    again, model, optimizer = make(folder)
    checkpointer.recoverables = again.recoverables
    train(model, optimizer, 1)
    checkpointer.save_checkpoint(name="b")
    checkpointer.wait()
    dist.barrier()
    return visible(folder)


def test_a_group_of_ranks_that_no_longer_is_is_made_anew(tmp_path):
    """A checkpointer may outlive the process group that it began in."""
    assert run(leave_and_meet_again, tmp_path) == [["CKPT+a", "CKPT+b"]] * 2


def test_one_process_without_a_group_saves_pieces_in_the_background_too(tmp_path):
    """All pieces are its own."""
    state = {"x": torch.arange(4.0), "words": ["one"]}
    with Checkpointer(tmp_path, {"x": ShardedState(state)}, save_mode="async") as checkpointer:
        checkpointer.save_checkpoint(name="a")
        state["x"] += 1
        state["words"].append("two")
    found = SavedShards(tmp_path / "CKPT+a" / "x.dcp").state()
    assert found["x"].tolist() == [0, 1, 2, 3]
    assert found["words"] == ["one"]
