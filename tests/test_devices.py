"""Copies from devices other than the processor, without one: what is asked of torch, and in which order.

A storage in the memory of the processor stands for one on a device: only where it is said to lie is
changed. No test here shows that a real device does what it is asked.
"""

from __future__ import annotations

import pytest
import torch
from _in_flight import Everything, contents, files_of_sync_save
from _releases import needs_torch

from lightning_sbckpt._format import image
from lightning_sbckpt._format.image import Image
from lightning_sbckpt._save import arena
from lightning_sbckpt._save.arena import Arena

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def happened(monkeypatch):
    """What is asked of CUDA: which streams are waited for, for which device memory is pinned."""
    events = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            events.append(("waited for", self.device))

    def pin(memory, devices):
        if any(device.type == "cuda" for device in devices):
            events.append(("pinned", len(memory)))

    monkeypatch.setattr(arena, "pin", pin)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(device))
    return events


class On:
    """A file on a device."""

    def __init__(self, events, device, error=None):
        self.size = 10
        self._events, self._device, self._error = events, device, error

    def fill(self, start, out):
        self._events.append(("copied from", self._device))
        if self._error is not None:
            raise self._error
        out[:] = b"0123456789"


class TestCopiesOfSeveralDevices:
    """A copy to pinned memory is only begun when torch returns, on its own device's stream."""

    def test_every_device_is_waited_for_after_all_copies_were_begun(self, happened):
        """Whichever of them is the current one."""
        files = {"a": On(happened, ZERO), "b": On(happened, ONE)}
        Arena().take(files, devices={ONE, ZERO})
        assert happened[1:] == [
            ("copied from", ZERO),
            ("copied from", ONE),
            ("waited for", ZERO),
            ("waited for", ONE),
        ]

    def test_no_other_device_is_touched(self, happened):
        """Waiting for a device makes a context there, of hundreds of megabytes."""
        Arena().take({"b": On(happened, ONE)}, devices={ONE})
        assert [each for each in happened if each[0] == "waited for"] == [("waited for", ONE)]
        happened.clear()
        Arena().take({"a": On(happened, "the processor")})
        assert happened == [("copied from", "the processor")]

    def test_copies_that_were_begun_are_waited_for_when_a_later_one_fails(self, happened):
        """They would go on into memory that is somebody else's by then."""
        files = {"a": On(happened, ZERO), "b": On(happened, ONE, RuntimeError("lost"))}
        with pytest.raises(RuntimeError, match="lost"):
            Arena().take(files, devices={ZERO, ONE})
        assert happened[-2:] == [("waited for", ZERO), ("waited for", ONE)]


class Elsewhere:
    """A storage that is said to lie on a device."""

    def __init__(self, device, content):
        self.device, self.content = device, content

    def nbytes(self):
        return len(self.content)

    def data_ptr(self):
        return 0


def test_a_file_names_every_device_that_it_lies_on():
    """A model may be spread over several, beside what the processor has."""
    here = torch.arange(4).untyped_storage()
    parts = [(0, b"head"), (64, here), (128, Elsewhere(ONE, b"ab")), (192, Elsewhere(ZERO, b"c"))]
    assert Image(256, parts).devices == {ZERO, ONE}
    assert Image(128, parts[:2]).devices == set()


@pytest.fixture
def everything_on(monkeypatch):
    """A function that has every storage lie on the named devices, as far as it is asked."""

    def pretend(*names):
        devices = frozenset(map(torch.device, names))
        placed = image._placed

        def elsewhere(start, part):
            begin, end, address, part = placed(start, part)
            return begin, end, (address if isinstance(part, bytes) else 0), part

        monkeypatch.setattr(image, "_placed", elsewhere)
        monkeypatch.setattr(Image, "devices", property(lambda _: devices))

    return pretend


@needs_torch("2.6", "torch.serialization.skip_data")
@pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone", "cuda:1"])
def test_a_save_from_any_device_holds_the_same_bytes(
    tmp_path, happened, everything_on, device, mode
):
    """Only CUDA copies into pinned memory by itself; from the others copies end before torch returns."""
    everything = Everything()
    everything.change()
    everything_on(device)
    with everything.checkpointer(tmp_path / "there", save_mode=mode) as checkpointer:
        for name in "ab":
            checkpointer.save_checkpoint(name=name)
    assert {event for event, _ in happened} == (
        {"pinned", "waited for"} if "cuda" in device and mode != "sync" else set()
    )
    expected = files_of_sync_save(tmp_path / "sync", "change")
    for name in "ab":
        assert contents(tmp_path / "there" / f"CKPT+{name}") == expected
