"""Copies of pieces: of any tensor, in memory that is kept, holding nothing of what is live."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from _sharded_background import visible
from torch.distributed.checkpoint import filesystem

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._save.sharded_staging import Stager
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt.errors import SaveError


def various():
    base = torch.arange(12.0)
    return {
        "whole": base,
        "view": base[2:5],
        "transposed": base.view(3, 4).t(),
        "again": base,
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "trained": torch.ones(2, requires_grad=True),
        "sparse": torch.eye(3).to_sparse(),
        "values": {"list": [1, "two"], "float": 0.5},
    }


def stage(state, stager=None):
    stager = stager or Stager()
    frozen = stager.stage({"a": state}, is_coordinator=True)["a"]
    data = {item.index.fqn: frozen.resolve_data(item) for item in frozen.create_local_plan().items}
    return stager, {name: each for name, each in data.items() if isinstance(each, torch.Tensor)}


def test_a_copy_of_any_tensor_has_its_values_and_none_of_its_memory():
    """Views, other strides, small types, none at all; what has two names is copied once."""
    state = various()
    _, copies = stage(state)
    assert copies.keys() == state.keys() - {"values"}
    expected = {name: state[name].detach().clone() for name in copies}
    assert not any(copy.requires_grad for copy in copies.values())
    for name in copies.keys() - {"sparse"}:
        assert copies[name].dtype == state[name].dtype
        # Else DCP would copy it once more to write it.
        assert copies[name].untyped_storage().nbytes() == copies[name].nbytes
        if state[name].numel():
            state[name].detach().zero_()
    state["sparse"].values().zero_()
    for name, value in expected.items():
        assert torch.equal(copies[name].to_dense(), value.to_dense()), name
    assert copies["again"].data_ptr() == copies["whole"].data_ptr()


def test_nothing_of_the_live_state_is_held_by_its_copy():
    """It could not be given back while it is written."""
    state = {"x": torch.ones(3), "nested": {"y": torch.ones(3)}}
    live = [weakref.ref(state["x"]), weakref.ref(state["nested"]["y"])]
    kept = Stager().stage({"a": state}, is_coordinator=True)
    state.clear()
    gc.collect()
    assert kept["a"].data
    assert [each() for each in live] == [None, None]


def test_memory_grows_with_the_state_and_is_there_for_a_smaller_one():
    """A state that fits into it needs no other."""
    stager, _ = stage({"x": torch.ones(10)})
    assert stager.capacity == 64
    _, large = stage({"x": torch.ones(100), "y": torch.zeros(3)}, stager)
    assert stager.capacity == 448 + 64
    assert large["x"].sum() == 100
    before = large["x"].data_ptr()
    _, small = stage({"x": torch.full((5,), 2.0)}, stager)
    assert stager.capacity == 448 + 64
    assert small["x"].data_ptr() == before
    assert small["x"].tolist() == [2.0] * 5


def test_what_a_state_may_not_hold_is_refused_when_it_is_saved(tmp_path):
    """And not later, in the background."""
    for state, reason in (
        ({"x": object()}, "only pickle can hold"),
        ({1: 2}, "its key 1 is a int"),
    ):
        checkpointer = Checkpointer(tmp_path, {"x": ShardedState(state)}, save_mode="async")
        with pytest.raises(SaveError, match=reason):
            checkpointer.save_checkpoint()
        assert not checkpointer.is_saving
        checkpointer.close()
    assert visible(tmp_path) == []


def what_dcp_asks_of_cuda(monkeypatch, folder, mode):
    """Save 40 MB in pieces where CUDA is said to be there; return in which threads a stream was asked for."""
    threads = []

    class Stream:
        device_type = "cuda"

        def synchronize(self):
            threads.append(threading.current_thread())

        def wait_stream(self, other):
            threads.append(threading.current_thread())

    def current_stream(device=None):
        threads.append(threading.current_thread())
        return Stream()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(filesystem, "_get_device_module", lambda name: torch.cuda)
    state = {f"w{number}": torch.rand(1024, 1024) for number in range(10)}
    with Checkpointer(folder, {"m": ShardedState(state)}, save_mode=mode) as checkpointer:
        checkpointer.save_checkpoint(name="a")
        checkpointer.wait()
    assert visible(folder) == ["CKPT+a"]
    return threads


def test_writing_copies_asks_nothing_of_a_gpu(tmp_path, monkeypatch):
    """In a thread of its own that would make a context on the first one, and wait for it every 10 MB."""
    assert what_dcp_asks_of_cuda(monkeypatch, tmp_path / "async", "async") == []
    # What is written from the live tensors may ask, in the thread that trains.
    live = what_dcp_asks_of_cuda(monkeypatch, tmp_path / "sync", "sync")
    assert set(live) == {threading.main_thread()}
