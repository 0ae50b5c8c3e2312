"""A plain PyTorch loop of two ranks that torchrun starts, without Lightning."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from _python import python

from lightning_sbckpt import Checkpointer

UNDER_TORCHRUN = """
import os
import sys

import torch
import torch.distributed as dist

from lightning_sbckpt import Checkpointer, EpochCounter

def say(text):
    # At once, since both ranks write to one pipe.
    os.write(1, (text + chr(10)).encode())


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
epochs = EpochCounter(4)
# No world is given: it is that of torch.distributed.
checkpointer = Checkpointer(
    sys.argv[1], {"model": model, "optimizer": optimizer, "epochs": epochs}, save_mode=sys.argv[2]
)
found = checkpointer.recover_if_possible()
say(f"rank {rank} goes on from {found and found.meta['epoch']}")
for epoch in epochs:
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * epoch + rank))
    model(data).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    checkpointer.save_and_keep_only({"epoch": epoch}, num_to_keep=2)
    if epoch == int(sys.argv[3]) and rank == 1:
        sys.exit("this machine is gone")
checkpointer.wait()
say(f"rank {rank} ends with {model.weight.tolist()}")
dist.destroy_process_group()
"""


def torchrun(folder, *arguments):
    """Run the script above on two ranks by torchrun; return the exit code and what it printed."""
    script = folder / "train.py"
    script.write_text(UNDER_TORCHRUN)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), script]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = python(*command, *map(str, arguments), env=environment, together=True)
    return done.returncode, done.stdout


def lines_with(printed, text):
    """Return the lines with a text, in the order of ranks, whoever was first."""
    return sorted(line for line in printed.splitlines() if text in line)


def in_peace():
    """Return the weights that both ranks end with, worked out in this process alone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for epoch in range(1, 5):
        for rank in range(2):
            data = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * epoch + rank))
            # Gradients of both add up, as all_reduce adds them.
            model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.tolist()


@pytest.mark.parametrize("save_mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_a_plain_loop_under_torchrun_goes_on_after_a_rank_has_died(tmp_path, save_mode):
    """Both ranks go on from one epoch, and end as two do that were left in peace."""
    code, printed = torchrun(tmp_path, tmp_path / "run", save_mode, 2)
    assert code != 0 and "this machine is gone" in printed
    left = {ckpt.meta["epoch"] for ckpt in Checkpointer(tmp_path / "run").list_checkpoints()}
    code, printed = torchrun(tmp_path, tmp_path / "run", save_mode, 0)
    assert code == 0, printed
    assert lines_with(printed, "goes on from") == [
        f"rank {rank} goes on from {max(left)}" for rank in range(2)
    ]
    assert lines_with(printed, "ends with") == [
        f"rank {rank} ends with {in_peace()}" for rank in range(2)
    ]
