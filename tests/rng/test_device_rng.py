"""Random states of devices, without one: a stand-in has a generator per device and notes what is set."""

from __future__ import annotations

import pytest
import torch

from lightning_sbckpt.rng import capture_rng, isolated_rng, restore_rng


def state(seed, offset=0):
    """Return what CUDA has as a state: its seed, and how much was drawn since."""
    numbers = torch.tensor([seed, offset], dtype=torch.int64)
    return numbers.view(torch.uint8).clone()


class Device:
    """Devices of one type, of which one is the current one."""

    def __init__(self, count, current=0):
        self.states = [state(7) for _ in range(count)]
        self.current = current
        self.set = []

    def draw(self, device):
        self.states[device] = self.states[device].clone()
        self.states[device].view(torch.int64)[1] += 4

    def put(self, new, device):
        self.set.append(device)
        self.states[device] = new.clone()

    def drawn(self):
        return [int(each.view(torch.int64)[1]) for each in self.states]


@pytest.fixture(params=["cuda", "xpu"])
def use(request, monkeypatch):
    """A function that has torch see devices of a type, which is given with it."""
    module = getattr(torch, request.param)

    def use(devices):
        monkeypatch.setattr(module, "is_available", lambda: devices is not None)
        monkeypatch.setattr(module, "is_initialized", lambda: devices is not None)
        if devices is not None:
            monkeypatch.setattr(module, "device_count", lambda: len(devices.states))
            monkeypatch.setattr(module, "current_device", lambda: devices.current)
            monkeypatch.setattr(module, "get_rng_state_all", lambda: list(devices.states))
            monkeypatch.setattr(module, "set_rng_state", devices.put)
        return devices

    use.name = request.param.upper()
    return use


def saved(use, count, current, *drawn):
    """Return what a run has captured that trained on the current one of so many devices."""
    devices = use(Device(count, current))
    for device in drawn:
        devices.draw(device)
    return capture_rng()


def test_the_device_that_trains_gets_the_state_of_the_one_that_trained(use):
    """Whatever their numbers are: another one may be free now, or visible under another number."""
    captured = saved(use, 4, 0, 0)
    devices = use(Device(4, current=2))
    assert restore_rng(captured) == []
    assert devices.drawn() == [0, 0, 4, 0]


@pytest.mark.parametrize(("before", "now"), [((4, 3), (1, 0)), ((1, 0), (8, 5)), ((2, 1), (4, 1))])
def test_another_number_of_devices_makes_no_difference_to_it(use, before, now):
    """A rank sees all devices of a machine and draws on one."""
    captured = saved(use, *before, before[1])
    devices = use(Device(*now))
    assert restore_rng(captured) == []
    assert devices.drawn()[now[1]] == 4


def test_the_same_devices_all_get_their_states(use):
    """A model may be spread over several."""
    captured = saved(use, 3, 1, 0, 1, 1)
    devices = use(Device(3, current=1))
    assert restore_rng(captured) == []
    assert devices.drawn() == [4, 8, 0]


def test_states_of_other_devices_that_find_no_place_are_told(use):
    """Which of them are whose now can't be known."""
    captured = saved(use, 3, 0, 0, 2)
    devices = use(Device(3, current=1))
    (problem,) = restore_rng(captured)
    assert devices.drawn() == [0, 4, 0]
    assert f"{use.name} device 2" in problem
    assert "not restored" in problem


def test_a_machine_without_such_devices_is_told(use):
    """There is nothing that could take the state."""
    captured = saved(use, 2, 1, 1)
    use(None)
    (problem,) = restore_rng(captured)
    assert use.name in problem
    assert "none is here" in problem


def test_states_of_an_earlier_release_are_restored_by_number(use):
    """They don't say on which device the run trained."""
    captured = saved(use, 2, 1, 1)
    if use.name == "XPU":
        pytest.skip("earlier releases captured none of these")
    del captured["cuda_current"]
    devices = use(Device(2, current=0))
    assert restore_rng(captured) == []
    assert devices.drawn() == [0, 4]


@pytest.mark.parametrize("change", [5, -1 - 2, "one", None, torch.zeros(2)])
def test_states_that_no_run_has_saved_are_told(use, change):
    """A file may hold anything; the other generators are restored all the same."""
    captured = saved(use, 2, 1, 1)
    captured[use.name.lower() + "_current"] = change
    before = torch.get_rng_state()
    torch.rand(1)
    use(Device(3))
    (problem,) = restore_rng(captured)
    assert f"{use.name} devices could not be restored" in problem
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_is_set_only_if_it_was_drawn_from(use):
    """Setting one has cuDNN begin its dropout anew: a run with saves would differ from one without."""
    devices = use(Device(3))
    devices.draw(0)
    with isolated_rng():
        torch.rand(1)
    assert devices.set == []
    with isolated_rng():
        devices.draw(1)
    assert devices.set == [1]
    assert devices.drawn() == [4, 0, 0]


def test_the_generator_of_mps_is_set_only_if_it_was_drawn_from(monkeypatch):
    """As those of other devices."""
    current, sets = [torch.zeros(4, dtype=torch.uint8)], []

    def put(new):
        sets.append(new)
        current[0] = new

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: current[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", put)
    with isolated_rng():
        pass
    assert sets == []
    with isolated_rng():
        current[0] = current[0] + 1
    assert len(sets) == 1
    assert not current[0].any()
