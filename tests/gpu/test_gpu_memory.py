"""What saves and loads take of a GPU's memory, and of the memory that it copies to."""

from __future__ import annotations

import pytest
import torch
from _gpu import DEVICE, MODES, Holder, needs_gpu, peak_over, reset_peak
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io import devices

pytestmark = needs_gpu


@pytest.mark.parametrize("mode", MODES)
def test_a_save_takes_next_to_nothing_of_the_gpu(tmp_path, mode):
    """Small tensors are put together there, a few megabytes at a time."""
    model = Holder(DEVICE, megabytes=512, small=5000)
    with Checkpointer(tmp_path, {"m": model}, save_mode=mode) as checkpointer:
        before = reset_peak()
        checkpointer.save_checkpoint()
        checkpointer.wait()
        assert peak_over(before) < 64e6


def test_a_load_takes_no_second_copy(tmp_path):
    """Neither of parameters nor of moments, whose addresses stay."""
    model = nn.Linear(4096, 4096).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 4096, device=DEVICE)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    addresses = [value.data_ptr() for each in optimizer.state.values() for value in each.values()]
    with Checkpointer(tmp_path, {"m": model, "o": optimizer}) as checkpointer:
        checkpointer.save_checkpoint()
        before = reset_peak()
        checkpointer.recover_if_possible()
        # The model has 67 MB, and its moments twice as many.
        assert peak_over(before) < 16e6
    assert addresses == [v.data_ptr() for each in optimizer.state.values() for v in each.values()]


def test_pinned_memory_is_that_of_the_state_and_is_given_back(tmp_path, monkeypatch):
    """Torch's allocator rounds 9 GB up to 17, and keeps it."""
    pinned = {}
    register, unregister = devices._Pinned.__init__, devices._unpin

    def note(self, memory):
        register(self, memory)
        pinned[id(memory.obj)] = len(memory)

    monkeypatch.setattr(devices._Pinned, "__init__", note)
    monkeypatch.setattr(devices, "_unpin", lambda *a: (pinned.popitem(), unregister(*a)))
    before = torch.cuda.memory.host_memory_stats().get("allocated_bytes.current", 0)
    with Checkpointer(tmp_path, {"m": Holder(DEVICE)}, save_mode="async") as checkpointer:
        checkpointer.save_checkpoint()
        checkpointer.wait()
        checkpointer.recoverables = {"m": Holder(DEVICE, megabytes=128)}
        checkpointer.save_checkpoint()
        checkpointer.wait()
        assert sum(pinned.values()) < 1.1 * 128 * 2**20
    assert torch.cuda.memory.host_memory_stats().get("allocated_bytes.current", 0) == before
