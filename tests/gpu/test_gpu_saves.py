"""What is saved from a GPU: the bytes of the call's moment, whatever is queued before and after it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from _gpu import DEVICE, MODES, Holder, busy, needs_gpu, on_a_gpu, saved, two_gpus
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io import devices
from lightning_sbckpt.rng import isolated_rng

pytestmark = on_a_gpu

KINDS = ("float32", "bfloat16", "float16", "float64", "int64", "bool", "complex64", "float8_e4m3fn")


def save_while_busy(folder, device, mode):
    """Save with half a second of kernels queued, and write to everything afterwards."""
    model = Holder(device)
    with Checkpointer(folder, {"m": model}, save_mode=mode) as checkpointer:
        # Memory is there from now on, and no allocation hides a race.
        checkpointer.save_checkpoint(name="warm")
        checkpointer.wait()
        busy(device)
        model.fill(7)
        began = time.perf_counter()
        checkpointer.save_checkpoint(name="a")
        checkpointer.before_update()
        seconds = time.perf_counter() - began
        model.fill(9)
    assert all(bool((value == 7).all()) for value in saved(folder).values())
    return seconds


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_are_those_of_the_moment(tmp_path, mode):
    """What was queued before the call is in, and what came after it is not."""
    save_while_busy(tmp_path, DEVICE, mode)


@needs_gpu
def test_overlap_never_waits_for_the_gpu(tmp_path):
    """The call and the step's begin take less than what is queued; the GPU waits by itself."""
    assert save_while_busy(tmp_path, DEVICE, "overlap") < 0.25


@two_gpus
@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_are_those_of_the_moment_on_another_gpu_than_the_current(tmp_path, mode):
    """Every device that holds something is waited for, whichever is the current one."""
    assert torch.cuda.current_device() == 0
    save_while_busy(tmp_path, "cuda:1", mode)


@two_gpus
def test_a_gpu_that_holds_nothing_gets_no_context(tmp_path):
    """It takes hundreds of megabytes."""
    code = (
        "import sys, torch; from lightning_sbckpt import Checkpointer\n"
        "m = torch.nn.Linear(999, 999).to('cuda:1')\n"
        "for mode in ('sync', 'async', 'overlap'):\n"
        "    with Checkpointer(f'{sys.argv[1]}/{mode}', {'m': m}, save_mode=mode) as c:\n"
        "        c.save_checkpoint(); c.recover_if_possible()\n"
        "print(torch._C._cuda_hasPrimaryContext(0))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "False", ran.stderr


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_tensor_is_saved_as_torch_saves_it(tmp_path, mode):
    """Types, strides, views, ties, scalars and none at all."""
    module = nn.Module()
    for kind in KINDS:
        values = torch.randint(0, 2, (300, 70), device=DEVICE).to(getattr(torch, kind))
        module.register_buffer(f"of {kind}", values)
    rows = torch.rand(64, 64, device=DEVICE)
    channels = torch.rand(4, 8, 16, 16, device=DEVICE).to(memory_format=torch.channels_last)
    for name, value in {
        "channels last": channels,
        "view": rows.t()[3:],
        "scalar": torch.tensor(3.0, device=DEVICE),
        "none": torch.empty(0, device=DEVICE),
        "tied": module.get_buffer("of float32"),
    }.items():
        module.register_buffer(name, value)
    torch.save(module.state_dict(), tmp_path / "expected")
    with Checkpointer(tmp_path, {"m": module}, save_mode=mode) as checkpointer:
        checkpointer.save_checkpoint(name="a")
    expected = torch.load(tmp_path / "expected", map_location="cpu", weights_only=True)
    found = saved(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].stride()) == (value.dtype, value.stride())
        small = value.dtype.itemsize == 1  # Torch compares no numbers of eight bits.
        one, other = (each.view(torch.uint8) if small else each for each in (found[name], value))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("mode", MODES)
def test_the_default_device_may_be_the_gpu(tmp_path, mode):
    """Everything of ours names the processor."""
    model = nn.Linear(300, 300).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 300, device=DEVICE)).sum().backward()
    optimizer.step()
    torch.set_default_device(DEVICE)
    try:
        with Checkpointer(tmp_path, {"m": model, "o": optimizer}, save_mode=mode) as checkpointer:
            checkpointer.save_checkpoint(name="a")
            checkpointer.wait()
            optimizer.state.clear()
            assert checkpointer.recover_if_possible() is not None
    finally:
        torch.set_default_device(None)
    assert len(optimizer.state) == 2


@needs_gpu
def test_a_pin_that_fails_hurts_nobody(tmp_path, monkeypatch):
    """Ordinary memory serves, and no error is left for the next kernel."""
    monkeypatch.setattr(devices, "_PORTABLE", 255)  # No such flags: the runtime refuses.
    with Checkpointer(tmp_path, {"m": Holder(DEVICE)}, save_mode="async") as checkpointer:
        checkpointer.save_checkpoint(name="a")
    torch.ones(9, device=DEVICE).mul_(2)
    torch.cuda.synchronize()
    assert len(saved(tmp_path)) == 1004


@needs_gpu
def test_a_save_leaves_the_dropout_of_cudnn_alone():
    """Setting a generator has cuDNN begin anew."""

    def outputs(*, isolated):
        torch.manual_seed(0)
        net = nn.LSTM(64, 64, 2, dropout=0.5).to(DEVICE)
        found = []
        for number in range(4):
            found.append(net(torch.ones(5, 3, 64, device=DEVICE))[0].detach())
            if isolated and number == 1:
                with isolated_rng():
                    pass
        return found

    assert all(map(torch.equal, outputs(isolated=False), outputs(isolated=True)))
