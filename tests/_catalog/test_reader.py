"""A reader beside a run that saves and prunes as fast as it can: an evaluator, the command line."""

from __future__ import annotations

import time

import pytest
import torch
from _counts import count
from _processes import context

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._catalog import catalog
from lightning_sbckpt._layout.publish import folder_names
from lightning_sbckpt.verify import verify

SECONDS = 4
# How long a busy machine may take for what is to be seen in those seconds at least.
PATIENCE = 120


class Numbers:
    """Two tensors that always hold the same number."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"a": torch.full((20_000,), float(self.number)), "b": torch.tensor(self.number)}

    def load_state_dict(self, state):
        assert (state["a"] == float(state["b"])).all()
        self.number = int(state["b"])


def save_and_prune(root, mode, stop):
    """In a child: save and keep the newest only, until told to stop."""
    numbers = {"one": Numbers(), "two": Numbers()}
    with Checkpointer(root, numbers, save_mode=mode) as checkpointer:
        while not stop.is_set():
            for each in numbers.values():
                each.number += 1
            checkpointer.save_and_keep_only({"number": numbers["one"].number}, verbosity=10)


@pytest.fixture(params=["sync", "async"])
def run(request, tmp_path):
    """The folder of a run that is going on."""
    stop = context.Event()
    child = context.Process(target=save_and_prune, args=(tmp_path / "run", request.param, stop))
    child.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/CKPT*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield tmp_path / "run"
    stop.set()
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.sample(1)
def test_a_reader_sees_whole_checkpoints_and_never_trips_over_one_that_vanishes(run):
    """Listed, ranked, verified and loaded while they come and go; the numbers only grow."""
    numbers = {"one": Numbers(), "two": Numbers()}
    reader = Checkpointer(run, numbers, access="read")
    seen = set()
    begun = time.monotonic()
    while (took := time.monotonic() - begun) < SECONDS or (len(seen) <= 10 and took < PATIENCE):
        for ckpt in reader.list_checkpoints():
            assert set(ckpt.paramfiles) == {"one", "two"}
        best = reader.find_checkpoint(max_key="number")
        assert best is not None
        before = numbers["one"].number
        loaded = reader.recover_if_possible()
        assert loaded is not None
        assert numbers["one"].number == numbers["two"].number == loaded.meta["number"] >= before
        seen.add(loaded.meta["number"])
        assert not any(one.problems for one in verify(run))
    assert len(seen) > 10
    count("checkpoints loaded while a run was pruning them", len(seen))


def test_what_is_published_and_pruned_between_list_and_look_is_found(tmp_path, monkeypatch):
    """A run must not begin anew since its only checkpoint was replaced just then."""
    writer = Checkpointer(tmp_path, {"one": Numbers()})
    writer.save_checkpoint(name="a")
    listed = []

    def names(root):
        listed.extend(folder_names(root))
        monkeypatch.undo()
        writer.save_and_keep_only(name="b")
        return listed

    monkeypatch.setattr(catalog, "folder_names", names)
    found = Checkpointer(tmp_path, {"one": Numbers()}, access="read").recover_if_possible()
    assert listed == ["CKPT+a"]
    assert found.path.name == "CKPT+b"


def test_one_that_is_being_replaced_is_waited_for(tmp_path, monkeypatch):
    """Under the same name: for a moment neither the old folder nor the new one has it."""
    Checkpointer(tmp_path, {"one": Numbers()}).save_checkpoint(name="a")
    aside = (tmp_path / "CKPT+a").rename(tmp_path / ".replaced+0+CKPT+a")
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            aside.rename(tmp_path / "CKPT+a")

    monkeypatch.setattr(catalog.time, "sleep", sleep)
    reader = Checkpointer(tmp_path, {"one": Numbers()}, access="read")
    assert reader.find_checkpoint().path.name == "CKPT+a"
    assert len(pauses) == 3


def test_a_replacement_that_was_interrupted_is_not_waited_for_long(tmp_path, monkeypatch):
    """Who writes there next brings the old one back; a reader changes nothing."""
    Checkpointer(tmp_path, {"one": Numbers()}).save_checkpoint(name="a")
    (tmp_path / "CKPT+a").rename(tmp_path / ".replaced+0+CKPT+a")
    pauses = []
    monkeypatch.setattr(catalog.time, "sleep", pauses.append)
    assert Checkpointer(tmp_path, access="read").find_checkpoint() is None
    assert 0 < sum(pauses) < 1
    assert Checkpointer(tmp_path).find_checkpoint().path.name == "CKPT+a"


def test_a_folder_without_meta_is_no_reason_to_look_again(tmp_path, monkeypatch):
    """It is there all the time, and somebody's own."""
    (tmp_path / "CKPT+notes").mkdir()
    listed = []
    monkeypatch.setattr(catalog, "folder_names", lambda root: listed.append(root) or ["CKPT+notes"])
    assert Checkpointer(tmp_path, access="read").find_checkpoint() is None
    assert len(listed) == 1
