"""Filesystems that lack what local ones have: locks, links, exchanges, direct writes, flushed folders."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from _counts import count
from _fuse import mounted
from _processes import context

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import FolderInUseError, SaveError

MODES = ("sync", "async", "overlap")
SIZE = 1000


@contextmanager
def overlaid(folder: Path):
    """Give a folder on an overlay, as the inside of a container is."""
    lower, upper, work, place = (folder / name for name in ("lower", "upper", "work", "place"))
    for each in (lower, upper, work, place):
        each.mkdir()
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    with attached(["-t", "overlay", "overlay", "-o", layers], place):
        yield place


@contextmanager
def in_memory(folder: Path):
    """Give a folder on a filesystem in memory."""
    with attached(["-t", "tmpfs", "tmpfs"], folder):
        yield folder


@contextmanager
def attached(arguments: list[str], place: Path):
    """Mount, or skip the test where only root may."""
    done = subprocess.run(["mount", *arguments, place], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


FILESYSTEMS = {
    "overlay": overlaid,
    "tmpfs": in_memory,
    "fuse": mounted,
    "fuse without locks": lambda folder: mounted(folder, "locks"),
    "fuse without links and exchange": lambda folder: mounted(folder, "links", "exchange"),
    "fuse without direct writes": lambda folder: mounted(folder, "direct"),
    "fuse without flushed folders": lambda folder: mounted(folder, "fsyncdir"),
    "fuse without any of these": lambda folder: mounted(
        folder, "locks", "links", "exchange", "direct", "fsyncdir"
    ),
}


@pytest.fixture(params=FILESYSTEMS)
def filesystem(request, tmp_path):
    """A folder on a filesystem of some kind."""
    with FILESYSTEMS[request.param](tmp_path) as place:
        yield place / "run"


def checkpointer_of(root, mode="sync", **options):
    """Return a checkpointer of a model whose files are written directly where that can be done."""
    model = torch.nn.Linear(SIZE, SIZE)
    return Checkpointer(
        root, {"model": model, "few": torch.nn.Linear(1, 1)}, save_mode=mode, **options
    )


def claim(root, answers):
    """In another process: try to write there."""
    try:
        checkpointer_of(root).claim()
    except FolderInUseError as error:
        answers.put(str(error))
    else:
        answers.put("")


def save_for_ever(root, pipe):
    """In another process, until it is killed: save and report."""
    checkpointer = checkpointer_of(root)
    for number in range(1000):
        checkpointer.save_and_keep_only({"n": number}, name="same" if number % 2 else None)
        pipe.send(number)


@pytest.mark.sample(1)
def test_everything_works_on_filesystems_that_lack_something(filesystem):
    """Saves of each mode, replacement, links, retention, recovery, one writer at a time, a kill."""
    root = filesystem
    for mode in MODES:
        checkpointer = checkpointer_of(root, mode)
        for number in range(3):
            with torch.no_grad():
                checkpointer.recoverables["few"].weight.fill_(number)
            checkpointer.save_checkpoint({"n": number}, name=f"{number % 2}")
            checkpointer.before_update()
        checkpointer.wait()
        checkpointer.delete_checkpoints(num_to_keep=1)
        assert [ckpt.meta["n"] for ckpt in checkpointer.list_checkpoints()] == [2]
        checkpointer.recover_if_possible()
        assert checkpointer.recoverables["few"].weight.item() == 2
        answers = context.Queue()
        other = context.Process(target=claim, args=(root, answers))
        other.start()
        assert "is in use by process" in answers.get(timeout=120)
        other.join()
        checkpointer.close()
        assert not (root / ".lock").exists()
    reader, writer = context.Pipe(duplex=False)
    other = context.Process(target=save_for_ever, args=(root, writer))
    other.start()
    for _ in range(5):
        assert reader.poll(120)
        reader.recv()
    other.kill()
    other.join()
    with checkpointer_of(root) as checkpointer:
        newest = checkpointer.recover_if_possible()
        assert newest.meta["n"] >= 4
        assert all(not find_damage(ckpt.path) for ckpt in checkpointer.list_checkpoints())
        checkpointer.save_checkpoint(name="after")
    count("filesystems on which everything worked")


def test_file_that_a_reader_holds_open_is_removed_later(tmp_path):
    """As on NFS its name stays until it is closed, under another name, and its folder with it."""
    with mounted(tmp_path) as place:
        root = place / "run"
        checkpointer = checkpointer_of(root)
        first = checkpointer.save_checkpoint(name="first")
        with first.paramfiles["model"].open("rb"):
            checkpointer.save_and_keep_only(name="second")
            assert [ckpt.path.name for ckpt in checkpointer.list_checkpoints()] == ["CKPT+second"]
        checkpointer.close()
        with checkpointer_of(root) as checkpointer:
            checkpointer.recover_if_possible()
            checkpointer.save_checkpoint(name="third")
        assert not [path for path in root.iterdir() if path.name.startswith(".removed")]


def test_filesystem_that_is_mounted_anew_is_saved_to_again(tmp_path):
    """What was open on the one that went away, the lock above all, is opened again."""
    with mounted(tmp_path) as place:
        checkpointer = checkpointer_of(place / "run")
        checkpointer.save_checkpoint(name="before")
    with mounted(tmp_path) as place:
        checkpointer.save_checkpoint(name="after")
        names = [ckpt.path.name for ckpt in checkpointer.list_checkpoints()]
        assert sorted(names) == ["CKPT+after", "CKPT+before"]
        checkpointer.close()
        assert not (place / "run" / ".lock").exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", MODES)
def test_error_that_comes_when_a_file_is_closed_fails_the_save(tmp_path, mode):
    """As on NFS, when the server has no more room: the bytes were not taken."""
    with mounted(tmp_path, "close") as place:
        checkpointer = checkpointer_of(place / "run", mode)
        with pytest.raises(SaveError, match="Input/output error"):
            checkpointer.save_checkpoint()
            checkpointer.wait()
        assert checkpointer.list_checkpoints() == []
        warning = checkpointer_of(place / "run", mode, on_save_error="warn")
        assert warning.save_checkpoint() is None
        warning.close()
