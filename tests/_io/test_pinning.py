"""Memory that a GPU copies into by itself: of exactly the size, given back, and not needed for a save.

The CUDA runtime is a stand-in that notes what is asked of it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format import image
from lightning_sbckpt._format.image import Image
from lightning_sbckpt._io import devices
from lightning_sbckpt._io.direct_write import ALIGNMENT, round_up
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt._save.sharded_staging import Stager

ONE = torch.device("cuda", 1)


class Runtime:
    """The CUDA runtime: pins, unless it is told to fail."""

    def __init__(self):
        self.answer = 0
        self.pinned = {}
        self.cleared = []
        self.devices = []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - as CUDA names it
        assert flags == 1  # For every device.
        if isinstance(self.answer, Exception):
            raise self.answer
        if not self.answer:
            self.pinned[address] = size
        return self.answer

    def cudaHostUnregister(self, address):  # noqa: N802 - as CUDA names it
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    """A runtime, on a machine where devices can be waited for."""
    made = Runtime()

    @contextlib.contextmanager
    def device(which):
        made.devices.append(which)
        yield

    class Stream:
        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(devices, "_clear_error", made.cleared.append)
    devices._warn.cache_clear()
    return made


class Bytes:
    """A file of so many bytes."""

    def __init__(self, size):
        self.size = size

    def fill(self, start, out):
        out[:] = b"x" * len(out)


def test_exactly_what_is_needed_is_pinned(runtime):
    """Torch's own allocator rounds 9 GB up to 17."""
    for size in (5 * 2**20 + 1, 9 * 2**20):
        arena = Arena()
        arena.take({"a": Bytes(size)}, devices={ONE})
        assert [*runtime.pinned.values()] == [round_up(size)]
        del arena


def test_it_is_given_back_before_more_is_taken_and_at_the_end(runtime):
    """There are never two, and none is kept by an allocator."""
    arena = Arena()
    for size in (10, 10 * ALIGNMENT, 5):
        arena.take({"a": Bytes(size)}, devices={ONE})
        assert len(runtime.pinned) == 1
    arena.take({"a": Bytes(5)})
    assert runtime.pinned == {}
    arena.take({"a": Bytes(5)}, devices={ONE})
    del arena
    gc.collect()
    assert runtime.pinned == {}


def test_no_other_device_gets_a_context(runtime):
    """Pinning makes one on the current device, which may hold nothing of the state."""
    Arena().take({"a": Bytes(5)}, devices={ONE, torch.device("xpu", 0)})
    assert set(runtime.devices) == {ONE}


def test_a_forked_process_gives_nothing_back(runtime):
    """It must not ask CUDA for anything, and what is pinned is its parent's."""
    arena = Arena()
    arena.take({"a": Bytes(5)}, devices={ONE})
    read, write = os.pipe()
    if not os.fork():
        asked = []
        runtime.cudaHostUnregister = asked.append
        del arena
        gc.collect()
        os.write(write, b"asked" if asked else b"quiet")
        os._exit(0)
    os.wait()
    assert os.read(read, 5) == b"quiet"
    assert len(runtime.pinned) == 1


FAILURES = [1, 801, RuntimeError("CUDA error: out of memory"), AssertionError("no libcudart")]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_where_nothing_can_be_pinned_saves_go_on_with_ordinary_memory(
    runtime, tmp_path, monkeypatch, caplog, failure
):
    """Whatever the reason: one warning, and no error is left for the next kernel of the training."""
    runtime.answer = failure
    placed = image._placed

    def elsewhere(start, part):
        begin, end, address, part = placed(start, part)
        return begin, end, (address if isinstance(part, bytes) else 0), part

    monkeypatch.setattr(image, "_placed", elsewhere)
    monkeypatch.setattr(Image, "devices", property(lambda _: {ONE}))
    model = torch.nn.Linear(300, 300)
    with (
        caplog.at_level(logging.WARNING),
        Checkpointer(tmp_path, {"m": model}, save_mode="async") as checkpointer,
    ):
        for name in "abc":
            checkpointer.save_checkpoint(name=name)
    assert len([*tmp_path.glob("CKPT+*")]) == 3
    assert not any(map(find_damage, tmp_path.glob("CKPT+*")))
    assert caplog.text.count("could not be pinned") == 1
    assert runtime.cleared == [ONE]


def test_an_error_that_pinning_left_behind_is_taken_away(monkeypatch):
    """Torch would raise it from the next kernel, in the midst of training."""
    asked = []

    class Full:
        def fill_(self, value):
            asked.append("kernel")
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", lambda *size, device: (asked.append(device), Full())[1])
    devices._clear_error(ONE)
    assert asked == [ONE, "kernel"]


def test_pieces_are_copied_into_such_memory_too(runtime):
    """And without, where nothing can be pinned."""
    for answer, pinned in ((0, 1), (2, 0)):
        runtime.answer = answer
        stager = Stager()
        stager._allocate(1000, {ONE})
        assert len(runtime.pinned) == pinned
        assert stager.capacity == 1000
        del stager
        gc.collect()
