"""Ranks over NCCL: sharded models, and what ranks tell each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from _gpu import DEVICE, IS_GPU, MODES, on_a_gpu, peak_over, reset_peak
from _processes import context
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._world.collectives import objects_group
from lightning_sbckpt._world.world import TorchDistributed, gather_tensors

pytestmark = on_a_gpu


def alone(target, folder, *args):
    """Run a function in a process with a group of one rank; return what it returned."""
    answers = context.Queue()
    process = context.Process(target=_in_group, args=(target, folder, answers, args))
    process.start()
    try:
        answer = answers.get(timeout=120)
    finally:
        process.join(30)
        process.kill()
    assert not isinstance(answer, str), answer
    return answer


def _in_group(target, folder, answers, args):
    try:
        if IS_GPU:
            torch.cuda.set_device(0)
        backend = "nccl" if IS_GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        answers.put(target(folder, *args))
        dist.destroy_process_group()
    except BaseException as error:
        answers.put(repr(error))
        raise


def save_and_load_pieces(folder, mode):
    """Save what FSDP2 shards, change it, load it; return whether it is as it was."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 3)).to(DEVICE)
    fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.ones(2, 300, device=DEVICE)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = [each.to_local().clone() for each in model.parameters()]
    with Checkpointer(folder / mode, {"m": model, "o": optimizer}, save_mode=mode) as checkpointer:
        checkpointer.save_checkpoint()
        checkpointer.wait()
        step()
        checkpointer.recover_if_possible()
    return all(
        torch.equal(a, b.to_local()) for a, b in zip(expected, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_fsdp2_shards_is_saved_and_loaded(tmp_path, mode):
    """By one rank, whose pieces lie on the GPU."""
    assert alone(save_and_load_pieces, tmp_path, mode)


def tell(folder):
    """Hand large objects and tensors about; return how much of the GPU that took, and the group."""
    world = TorchDistributed()
    world.broadcast(1)
    own = {"weight": torch.ones(2**20, device=DEVICE)}
    before = reset_peak()
    sent = b"x" * 2**25
    assert world.broadcast(sent) == sent
    assert world.gather(sent) == [sent]
    assert gather_tensors(own, world)[0]["weight"] is own["weight"]
    return peak_over(before), objects_group() is not None


def test_what_ranks_tell_each_other_takes_nothing_of_the_gpu(tmp_path):
    """Objects go through a group of gloo."""
    peak, has_group = alone(tell, tmp_path)
    assert peak < 2**20
    assert has_group == IS_GPU
