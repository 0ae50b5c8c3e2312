"""What the ranks hand each other, and how their group ends afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from _processes import context

from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._sharded.writing import write_sharded
from lightning_sbckpt._world import collectives
from lightning_sbckpt._world.world import TorchDistributed, gather_tensors
from lightning_sbckpt.errors import SaveError

ROUNDS = 60
SECONDS = 60


def talk(rank, folder, may_hang, answers):
    """Make a group, hand objects about and end the group, many times."""
    collectives._MAY_HANG = may_hang
    torch.set_num_threads(1)
    world = TorchDistributed()
    for turn in range(ROUNDS):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group{turn}", rank=rank, world_size=2
        )
        told = world.broadcast({"turn": turn} if rank == 0 else None)
        answer = world.gather((rank, "x" * 1000 * rank * turn))
        dist.destroy_process_group()
        answers.put((rank, turn, told, answer))


def what_ranks_get(folder, may_hang):
    """Return what two ranks were told and have gathered, in the order of turns and ranks."""
    answers = context.Queue()
    ranks = [
        context.Process(target=talk, args=(rank, folder, may_hang, answers)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        found = [answers.get(timeout=SECONDS) for _ in range(2 * ROUNDS)]
        for process in ranks:
            process.join(SECONDS)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return sorted(found, key=lambda answer: (answer[1], answer[0]))


# Torch's own are taken where they do no harm.
WAYS = [True] if collectives._MAY_HANG else [True, False]


@pytest.mark.sample(1)
@pytest.mark.parametrize("may_hang", WAYS)
def test_a_group_ends_at_once_after_objects_were_handed_about(tmp_path, may_hang):
    """And all ranks have what was sent, however long; nothing is left waiting for a lock."""
    found = what_ranks_get(tmp_path, may_hang)
    for turn in range(ROUNDS):
        told = {"turn": turn}
        everything = [(0, ""), (1, "x" * 1000 * turn)]
        assert found[2 * turn] == (0, turn, told, everything)
        assert found[2 * turn + 1] == (1, turn, told, None)


def test_what_is_kept_for_that_takes_no_memory(tmp_path):
    """However large the objects were."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_MAY_HANG", True)
            assert len(TorchDistributed().broadcast(b"x" * 1_000_000)) == 1_000_000
            assert len(TorchDistributed().gather(b"x" * 1_000_000)[0]) == 1_000_000
    finally:
        dist.destroy_process_group()
    assert sum(tensor.nbytes for tensor in collectives._KEPT) < 10_000


def as_nccl(folder, rank, size):
    """Make a default group that takes tensors of GPUs alone, as NCCL's does, and no GPU is there."""
    torch.set_num_threads(1)
    collectives._all_have_one = lambda has_one, _kind: has_one
    dist.init_process_group(
        "cuda:gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )


def gradients_of(rank):
    """Return tensors of all kinds, others on each rank."""
    torch.manual_seed(rank)
    return {
        "weight": torch.rand(3, 5).t(),
        "half": torch.rand(4).bfloat16(),
        "none": torch.zeros(0, 2),
        "number": torch.tensor(float(rank)),
        "conjugate": torch.complex(torch.rand(2), torch.rand(2)).conj(),
        "sparse": torch.rand(3).to_sparse(),
        f"of rank {rank}": torch.rand(2),
    }


def talk_beside_a_gpu(rank, folder, may_hang, answers):
    """Hand objects and tensors about, and write pieces, where every tensor on the way is on the CPU."""
    collectives._MAY_HANG = may_hang
    as_nccl(folder, rank, 3)
    world = TorchDistributed()
    told = world.broadcast({"from": rank})
    everybody = world.gather(rank)
    tensors = gather_tensors(gradients_of(rank), world)
    empty = gather_tensors({}, world)
    pieces = write_sharded({"m": {"w": torch.ones(2)}}, folder, world, LocalStorage())
    answers.put((rank, told, everybody, [*map(as_lists, tensors)], empty, len(pieces)))
    dist.destroy_process_group()


def as_lists(tensors):
    """Return tensors as what can be handed about without them."""
    return {
        name: (str(each.dtype), each.shape, each.to_dense().resolve_conj().tolist())
        for name, each in tensors.items()
    }


@pytest.mark.parametrize("may_hang", WAYS)
def test_objects_never_use_a_gpu_where_the_default_group_takes_nothing_else(tmp_path, may_hang):
    """Nor do tensors that go to rank zero one after the other, or the plans of pieces."""
    answers = context.Queue()
    ranks = [
        context.Process(target=talk_beside_a_gpu, args=(rank, tmp_path, may_hang, answers))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    try:
        found = sorted(answers.get(timeout=SECONDS) for _ in ranks)
    finally:
        for process in ranks:
            process.join(SECONDS)
            process.kill()
    assert [each[1] for each in found] == [{"from": 0}] * 3
    assert [each[2] for each in found] == [[0, 1, 2], None, None]
    assert found[0][3] == [as_lists(gradients_of(rank)) for rank in range(3)]
    assert [each[3] for each in found[1:]] == [[], []]
    assert [each[4] for each in found] == [[{}, {}, {}], [], []]
    assert found[0][5] > found[1][5]


def test_a_default_group_that_takes_tensors_of_the_processor_gets_no_other_beside_it(tmp_path):
    """A group costs sockets and threads on every rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        assert collectives.objects_group() is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("where", ["here", "on another rank"])
def test_where_no_group_of_gloo_can_be_made_all_ranks_use_the_default_one(
    tmp_path, monkeypatch, caplog, where
):
    """It is said once, and asked for no more."""
    asked = []

    def refused(**_):
        asked.append(1)
        if where == "here":
            raise RuntimeError("no network")
        return "a group"

    monkeypatch.setattr(dist, "new_group", refused)
    monkeypatch.setattr(collectives, "_all_have_one", lambda _has_one, _kind: False)
    dist.init_process_group("cuda:gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        assert collectives.objects_group() is None
        assert collectives.objects_group() is None
    finally:
        dist.destroy_process_group()
    assert len(asked) == 1
    assert caplog.text.count("no group of gloo") == 1


def test_no_rank_sends_before_rank_zero_has_memory_for_it_all(monkeypatch):
    """It would wait for ever for a rank that has failed."""
    sent = []
    monkeypatch.setattr("lightning_sbckpt._world.world.send_tensors", sent.append)

    class Failed:
        rank, size = 1, 2

        def gather(self, obj):
            return None

        def broadcast(self, obj):
            return SaveError("no memory on rank 0")

    with pytest.raises(SaveError, match="no memory"):
        gather_tensors({"a": torch.ones(1)}, Failed())
    assert sent == []
