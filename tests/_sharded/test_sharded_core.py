"""Models in pieces, each rank with its own: saved by all, loaded by any number of ranks."""

from __future__ import annotations

import os

import pytest
import torch
from _releases import needs_torch
from _sharded_ranks import make, plain_model, run, same, sharded_model, train, whole
from _sharded_run import save_after_training, whole_of_rank_zero
from torch.distributed.checkpoint import FileSystemReader

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._sharded.states import ShardedState, optimizer_state
from lightning_sbckpt._world.world import SingleProcess
from lightning_sbckpt.errors import DamagedCheckpointError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


def entries(folder):
    """Return what is in a folder, but for the lock of who writes there and the history."""
    return sorted(name for name in os.listdir(folder) if name not in {".lock", "HISTORY.jsonl"})


def load_and_train(folder, rank):
    checkpointer, model, optimizer = make(folder, seed=9)
    checkpointer.recover_if_possible()
    at_once = whole_of_rank_zero(model, optimizer)
    pieces = sum(p.to_local().numel() for p in model.parameters())
    train(model, optimizer, 2, first=3)
    return {"at_once": at_once, "later": whole_of_rank_zero(model, optimizer), "pieces": pieces}


def expected(folder, name="expected.pt"):
    return torch.load(folder / name, weights_only=True)


def test_each_rank_writes_its_pieces_and_a_checkpoint_is_one_folder(tmp_path):
    """A file from each rank in a folder for each state, all of them in the manifest."""
    run(save_after_training, tmp_path)
    checkpoint = read_checkpoint(tmp_path / "run" / "CKPT+a")
    assert sorted(checkpoint.paramfiles) == ["model", "optimizer"]
    assert checkpoint.paramfiles["model"] == checkpoint.path / "model.dcp"
    files = read_manifest(checkpoint.path).files
    for name in ("model", "optimizer"):
        for file in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            assert f"{name}.dcp/{file}" in files
    assert find_damage(checkpoint.path) == []
    size = sum(p.numel() * 4 for p in plain_model().parameters())
    # No rank has written the whole: the two files of the model share its bytes.
    of_ranks = [files[f"model.dcp/__{rank}_0.distcp"].size for rank in (0, 1)]
    assert all(each < 0.9 * sum(of_ranks) for each in of_ranks) and sum(of_ranks) > size


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_two_ranks_saved_any_number_loads_to_the_bit_and_goes_on(tmp_path, size):
    """1, 2 and 3 ranks have the saved weights and optimizer, and go on as the two would have."""
    run(save_after_training, tmp_path)
    for answer in run(load_and_train, tmp_path, size=size):
        assert same(answer["at_once"], expected(tmp_path))
        if size == 2:
            assert same(answer["later"], expected(tmp_path, "later0.pt"))


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_other_numbers_of_ranks_saved_two_load(tmp_path, size):
    """From 1 to 2 and from 4 to 2."""
    run(save_after_training, tmp_path, size=size)
    for answer in run(load_and_train, tmp_path, size=2):
        assert same(answer["at_once"], expected(tmp_path))


def test_a_plain_process_loads_it_into_a_plain_model(tmp_path):
    """Without torch.distributed, and the optimizer goes on as it would have."""
    run(save_after_training, tmp_path)
    model = plain_model(9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "run", {"model": model, "optimizer": optimizer}) as checkpointer:
        checkpointer.recover_if_possible()
    loaded = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    assert same(loaded, expected(tmp_path))


def save_before_any_step(folder, rank):
    checkpointer, model, optimizer = make(folder)
    checkpointer.save_checkpoint()
    untouched = not optimizer.state
    train(model, optimizer, 2)
    _, other, its = make(folder.parent / "other")
    train(other, its, 2)
    return untouched, same(whole(model.state_dict()), whole(other.state_dict()))


def test_a_save_before_the_first_step_changes_nothing(tmp_path):
    """The optimizer has no state before it, none after it, and trains as one that wasn't saved."""
    assert run(save_before_any_step, tmp_path) == [(True, True)] * 2


def load_before_any_step(folder, rank):
    checkpointer, _, optimizer = make(folder, seed=3)
    checkpointer.recover_if_possible()
    return dict(optimizer.state), optimizer.param_groups[0]["lr"]


def test_an_optimizer_without_a_state_is_loaded_without_one(tmp_path):
    """Its groups are there."""
    run(save_before_any_step, tmp_path)
    assert run(load_before_any_step, tmp_path) == [({}, 0.1)] * 2


def load_damaged(folder, rank):
    checkpointer, _, _ = make(folder)
    return checkpointer.recover_if_possible().path.name


def test_a_damaged_piece_is_found_by_the_manifest_and_stepped_over(tmp_path):
    """Any rank's file counts; the checkpoint before it is taken."""
    run(save_twice, tmp_path)
    piece = tmp_path / "run" / "CKPT+b" / "model.dcp" / "__1_0.distcp"
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    assert find_damage(piece.parents[1]) == [
        "model.dcp/__1_0.distcp has other bytes than were written (checksum differs)"
    ]
    assert run(load_damaged, tmp_path) == ["CKPT+a"] * 2


def save_twice(folder, rank):
    checkpointer, model, optimizer = make(folder)
    checkpointer.save_checkpoint(name="a")
    train(model, optimizer, 1)
    checkpointer.save_checkpoint(name="b")


def keep_one(folder, rank):
    checkpointer, model, optimizer = make(folder)
    for _ in range(3):
        train(model, optimizer, 1)
        checkpointer.save_and_keep_only(num_to_keep=1)


def test_retention_takes_the_folders_of_pieces_with_it(tmp_path):
    """One checkpoint is left, whole."""
    run(keep_one, tmp_path)
    (name,) = entries(tmp_path / "run")
    assert find_damage(tmp_path / "run" / name) == []


def test_a_moved_checkpoint_holds_no_path_of_where_it_was(tmp_path):
    """Neither in the description that DCP writes."""
    run(save_twice, tmp_path)
    for name in ("model", "optimizer"):
        described = FileSystemReader(tmp_path / "run" / "CKPT+b" / f"{name}.dcp").read_metadata()
        assert described.storage_meta.checkpoint_id is None
    for file in (tmp_path / "run" / "CKPT+b").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def save_after_validation(folder, rank):
    checkpointer, model, optimizer = make(folder)
    train(model, optimizer, 2)
    with torch.no_grad():
        model.eval()(torch.ones(4, 5))
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    checkpointer.save_checkpoint()
    state = whole_of_rank_zero(model, optimizer)
    checkpointer.recover_if_possible()
    return len(kinds), same(state, whole_of_rank_zero(model, optimizer))


def test_a_save_right_after_a_validation_is_one_of_pieces(tmp_path):
    """After a forward without a backward, some parameters of the module are whole for a while."""
    assert run(save_after_validation, tmp_path) == [(2, True)] * 2


def test_dcp_alone_reads_what_is_written(tmp_path):
    """Nothing of this package is needed for it."""
    from torch.distributed.checkpoint import load

    run(save_after_training, tmp_path)
    state = dict(plain_model(5).state_dict())
    load(state, checkpoint_id=tmp_path / "run" / "CKPT+a" / "model.dcp", no_dist=True)
    assert same(state, expected(tmp_path)["model"])


def save_plain_then_load_in_pieces(folder, rank):
    model = plain_model(4)
    if rank == 0:
        with Checkpointer(folder, {"model": model}, world=SingleProcess()) as alone:
            alone.save_checkpoint(name="plain")
    torch.distributed.barrier()
    in_pieces = sharded_model(8)
    checkpointer = Checkpointer(folder, {"model": in_pieces})
    checkpointer.recover_if_possible()
    return same(whole(dict(in_pieces.state_dict())), dict(model.state_dict()))


def test_a_file_of_whole_tensors_is_loaded_into_a_model_in_pieces(tmp_path):
    """As a pretrained model is, or a consolidated one."""
    assert run(save_plain_then_load_in_pieces, tmp_path) == [True, True]


def test_a_shard_that_is_missing_is_damage(tmp_path):
    """The message names the file."""
    run(save_after_training, tmp_path)
    folder = tmp_path / "run" / "CKPT+a"
    (folder / "optimizer.dcp" / "__1_0.distcp").unlink()
    checkpointer = Checkpointer(tmp_path / "run", {"model": plain_model()}, access="read")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.dcp/__1_0\.distcp is missing"):
        checkpointer.recover_if_possible()


def save_by_tensor_parallelism(folder, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = plain_model(6)
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    Checkpointer(folder, {"model": model}).save_checkpoint()


def load_by_fully_shard(folder, rank):
    model = sharded_model(1)
    Checkpointer(folder, {"model": model}).recover_if_possible()
    return same(whole(dict(model.state_dict())), dict(plain_model(6).state_dict()))


def test_what_was_divided_in_one_way_is_loaded_into_another(tmp_path):
    """By columns and rows of some layers, then by the first dimension of all."""
    run(save_by_tensor_parallelism, tmp_path)
    assert run(load_by_fully_shard, tmp_path) == [True, True]


def make_fsdp1(folder, seed=0):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        plain_model(seed), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Checkpointer(folder, {"model": model, "optimizer": optimizer}), model, optimizer


def whole_of_fsdp1(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True)
    return whole(dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True)))


def save_fsdp1(folder, rank):
    checkpointer, model, optimizer = make_fsdp1(folder)
    checkpointer.save_checkpoint(name="before-any-step")
    untouched = not optimizer.state
    train(model, optimizer, 3)
    checkpointer.save_checkpoint(name="a")
    return untouched, whole_of_fsdp1(model, optimizer)


def load_fsdp1(folder, rank):
    checkpointer, model, optimizer = make_fsdp1(folder, seed=4)
    checkpointer.recover_if_possible()
    return whole_of_fsdp1(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_first_version_of_fsdp_is_saved_and_loaded_too(tmp_path, size):
    """Its own sharded tensors, by the names of the plain module."""
    (untouched, expected), _ = run(save_fsdp1, tmp_path)
    assert untouched
    for answer in run(load_fsdp1, tmp_path, size=size):
        assert same(answer, expected)
    model = plain_model(3)
    with Checkpointer(tmp_path / "run", {"model": model}) as checkpointer:
        checkpointer.load_checkpoint(tmp_path / "run" / "CKPT+a")
    assert same(dict(model.state_dict()), dict(expected["m"]))


def save_what_differs(folder, rank):
    model = sharded_model()
    model[1].running_mean.fill_(rank)
    Checkpointer(folder, {"model": model}).save_checkpoint()


def test_what_ranks_have_in_common_is_that_of_rank_zero(tmp_path):
    """All of it, and not here one rank's and there another's."""
    run(save_what_differs, tmp_path)
    model = plain_model()
    with Checkpointer(tmp_path / "run", {"model": model}) as checkpointer:
        checkpointer.recover_if_possible()
    assert model[1].running_mean.tolist() == [0.0] * 7


def test_the_state_of_an_optimizer_goes_by_names_and_not_by_order(tmp_path):
    """A group with the same parameters in another order gets what belongs to each."""
    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    pieces = {"optimizer": ShardedState(optimizer_state(optimizer, model))}
    with Checkpointer(tmp_path, pieces) as checkpointer:
        saved = checkpointer.save_checkpoint()
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.5)
    with Checkpointer(tmp_path, {"model": model, "optimizer": other}) as checkpointer:
        checkpointer.allow_partial_load = True
        checkpointer.load_checkpoint(saved)
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        assert same(dict(other.state[parameter]), dict(optimizer.state[parameter]))
