"""What the ranks hand each other, and how their group ends afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from _processes import context

from lightning_sbckpt._world import collectives
from lightning_sbckpt._world.world import TorchDistributed

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
