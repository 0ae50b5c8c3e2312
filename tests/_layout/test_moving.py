"""`checkpoints_dir` is given another folder: everything goes there, and nothing is done in the old one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.history import read_history
from lightning_sbckpt.errors import ConfigurationError, SaveError


@pytest.fixture
def real(tmp_path, tree_bytes):
    """A folder with two checkpoints, and what it holds."""
    with Checkpointer(tmp_path / "real", {"model": torch.nn.Linear(1, 1)}) as checkpointer:
        for name, loss in (("a", 0.5), ("b", 0.25)):
            checkpointer.save_checkpoint({"loss": loss}, name=name)
    return tmp_path / "real", tree_bytes(tmp_path / "real")


@pytest.mark.parametrize("save_mode", ["sync", "async", "overlap"])
@pytest.mark.parametrize("as_text", [True, False])
def test_the_real_folder_is_left_alone(real, tmp_path, tree_bytes, names_in, save_mode, as_text):
    """Saving, retention, the history, the index and the lock are in the new one."""
    folder, before = real
    debug = tmp_path / "new" / "debug"
    model = torch.nn.Linear(1, 1)
    checkpointer = Checkpointer(folder, {"model": model}, save_mode=save_mode)
    assert len(checkpointer.list_checkpoints()) == 2
    checkpointer.checkpoints_dir = str(debug) if as_text else debug
    assert checkpointer.checkpoints_dir == debug
    assert debug.is_dir()
    assert checkpointer.list_checkpoints() == []
    assert checkpointer.recover_if_possible() is None
    for loss in (1.0, 0.9, 0.8):
        checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
    checkpointer.delete_checkpoints(num_to_keep=1)
    checkpointer.pin(checkpointer.find_checkpoint())
    assert [ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints()] == [0.8]
    assert (debug / ".lock").exists()
    checkpointer.close()
    assert tree_bytes(folder) == before
    events = [entry["event"] for entry in read_history(debug)]
    assert (events.count("saved"), events.count("removed")) == (3, 2)


@pytest.mark.long
def test_the_old_folder_may_be_written_to_by_others_at_once(real, tmp_path):
    """Its lock is given up, and that of the new one is taken at the next save."""
    folder, _ = real
    checkpointer = Checkpointer(folder)
    checkpointer.save_checkpoint(name="c")
    assert (folder / ".lock").exists()
    checkpointer.checkpoints_dir = tmp_path / "new"
    assert not (folder / ".lock").exists()
    script = "import sys; from lightning_sbckpt import Checkpointer as C; C(sys.argv[1]).claim()"
    subprocess.run([sys.executable, "-c", script, folder], check=True)
    checkpointer.claim()
    assert (tmp_path / "new" / ".lock").exists()


def test_a_save_in_flight_ends_in_its_own_folder(tmp_path, names_in):
    """With the retention that belongs to it, before anything moves."""
    model = torch.nn.Linear(400, 400)
    checkpointer = Checkpointer(tmp_path / "a", {"model": model}, save_mode="async")
    done = []
    for name in ("first", "second"):
        checkpointer.save_checkpoint(
            name=name,
            on_durable=lambda: (time.sleep(0.05), done.append(checkpointer.checkpoints_dir)),
        )
    checkpointer.checkpoints_dir = tmp_path / "b"
    assert done == [tmp_path / "a"] * 2
    assert names_in(Checkpointer(tmp_path / "a", access="read")) == {"CKPT+first", "CKPT+second"}
    assert names_in(checkpointer) == set()


def test_a_save_that_failed_in_the_background_is_told_and_nothing_moves(tmp_path):
    """The error of the save comes up where the folder is set."""

    def fail():
        raise SaveError("no room")

    checkpointer = Checkpointer(tmp_path / "a", save_mode="async")
    checkpointer.save_checkpoint(name="x", on_durable=fail)
    with pytest.raises(SaveError, match="no room"):
        checkpointer.checkpoints_dir = tmp_path / "b"
    assert checkpointer.checkpoints_dir == tmp_path / "a"
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_a_folder_is_refused(real, tmp_path, tree_bytes):
    """Nothing has moved, and nothing is changed."""
    folder, before = real
    (tmp_path / "file").touch()
    checkpointer = Checkpointer(folder)
    with pytest.raises(ConfigurationError, match="can't be made a folder"):
        checkpointer.checkpoints_dir = tmp_path / "file"
    assert checkpointer.checkpoints_dir == folder
    assert tree_bytes(folder) == before


def test_the_same_folder_stays_claimed(tmp_path):
    """Nothing is given up on the way."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save_checkpoint(name="a")
    checkpointer.checkpoints_dir = str(tmp_path)
    assert (tmp_path / ".lock").exists()
    assert len(checkpointer.list_checkpoints()) == 1


def test_a_reader_moves_without_making_anything(real, tmp_path):
    """With `access="read"`."""
    folder, _ = real
    reader = Checkpointer(tmp_path / "nowhere", access="read")
    reader.checkpoints_dir = folder
    assert len(reader.list_checkpoints()) == 2
    reader.checkpoints_dir = tmp_path / "nowhere"
    assert not (tmp_path / "nowhere").exists()


def test_it_moves_into_a_store_and_out_of_it(tmp_path, names_in, monkeypatch):
    """A URL is a place as any other: what is saved there goes up, and nothing else does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpointer = Checkpointer(tmp_path / "a")
    checkpointer.save_checkpoint(name="a")
    checkpointer.checkpoints_dir = "memory://moving/run"
    checkpointer.save_checkpoint(name="up")
    assert checkpointer.url == "memory://moving/run"
    checkpointer.checkpoints_dir = tmp_path / "b"
    assert checkpointer.url is None
    checkpointer.save_checkpoint(name="b")
    checkpointer.close()
    assert names_in(Checkpointer("memory://moving/run", access="read")) == {"CKPT+up"}
    assert names_in(checkpointer) == {"CKPT+b"}
    assert names_in(Checkpointer(tmp_path / "a", access="read")) == {"CKPT+a"}
