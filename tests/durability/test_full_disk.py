"""A disk that is full, for real: a small filesystem in memory that the test mounts.

Only root may mount; elsewhere these tests are skipped and say so.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from _scenario import FURNITURE, SAVE_MODES

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import SaveError

MEGABYTE = 2**20
STATE = 2 * MEGABYTE

modes = pytest.mark.parametrize("mode", SAVE_MODES)


@pytest.fixture
def disk(tmp_path):
    """A filesystem of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        pytest.skip(f"a small disk can't be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Counting(LocalStorage):
    """A disk that notes which files are begun."""

    def __init__(self):
        self.begun = []

    def before(self, operation, path, target=None):
        if operation in ("create", "write", "link"):
            self.begun.append(path)


class Forgetful(LocalStorage):
    """A disk that takes itself for empty, as one with a quota may."""

    def free_bytes(self, path):
        return 2**40


def checkpointer_of(disk, number, mode, **arguments):
    """Return a checkpointer of a model of 2 MB, filled with a number."""
    model = torch.nn.Linear(STATE // 4, 1, bias=False)
    torch.nn.init.constant_(model.weight, number)
    return Checkpointer(disk / "run", {"model": model}, save_mode=mode, **arguments)


def train(checkpointer):
    """Change the model, since what is the same as before may need no room."""
    checkpointer.before_update()
    with torch.no_grad():
        checkpointer.recoverables["model"].weight.add_(1)


def save(checkpointer, name):
    """Train, and save durably."""
    train(checkpointer)
    checkpointer.save_checkpoint({"name": name}, name=name)
    checkpointer.wait()


def fill(disk, leave):
    """Fill the disk but for some bytes, and return the file that does so."""
    found = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(found.f_bavail * found.f_frsize - leave))
    return filler


def free(disk):
    """Return the bytes that are free."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def whole(disk):
    """Return the names of the checkpoints, each found whole and loaded; nothing else is there."""
    names = sorted(set(os.listdir(disk / "run")) - FURNITURE)
    checkpointer = checkpointer_of(disk, 0, "sync")
    for name in names:
        assert find_damage(disk / "run" / name) == []
        checkpointer.load_checkpoint(disk / "run" / name)
    return names


def bytes_named(message):
    """Return the bytes needed and the bytes free, as a message tells them."""
    found = re.search(r"needs ([\d,]+) bytes\b.*?\b([\d,]+) (?:bytes )?(?:are )?free", message)
    assert found, message
    return tuple(int(number.replace(",", "")) for number in found.groups())


class TestFullDisk:
    """There is less room than a checkpoint needs."""

    @modes
    def test_the_error_tells_the_path_the_bytes_needed_and_the_bytes_free(self, disk, mode):
        """Nothing is begun, since it obviously doesn't fit; the earlier checkpoint stays."""
        storage = Counting()
        checkpointer = checkpointer_of(disk, 1, mode, storage=storage)
        save(checkpointer, "a")
        assert storage.begun
        storage.begun.clear()
        fill(disk, leave=MEGABYTE)
        left = free(disk)
        with pytest.raises(SaveError) as caught:
            save(checkpointer, "b")
        message = str(caught.value)
        assert str(disk / "run") in message
        needed, told_free = bytes_named(message)
        assert STATE <= needed < STATE + 100_000
        assert abs(told_free - left) < 100_000
        assert f"{needed:,}" in message
        assert "earlier checkpoints are whole" in message.lower()
        assert storage.begun == []
        assert free(disk) == left
        checkpointer.close()
        assert whole(disk) == ["CKPT+a"]

    @modes
    def test_the_next_save_after_space_returns_works(self, disk, mode):
        """In the same process, under the name that failed."""
        checkpointer = checkpointer_of(disk, 1, mode)
        save(checkpointer, "a")
        filler = fill(disk, leave=MEGABYTE)
        with pytest.raises(SaveError):
            save(checkpointer, "b")
        filler.unlink()
        save(checkpointer, "b")
        checkpointer.close()
        assert whole(disk) == ["CKPT+a", "CKPT+b"]

    @modes
    def test_training_goes_on_where_the_user_chose_a_warning(self, disk, mode, caplog):
        """Neither the save nor `wait` raises; what failed is said with the same words."""
        checkpointer = checkpointer_of(disk, 1, mode, on_save_error="warn")
        save(checkpointer, "a")
        filler = fill(disk, leave=MEGABYTE)
        caplog.clear()
        train(checkpointer)
        assert checkpointer.save_checkpoint(name="b") is None
        checkpointer.wait()
        warnings = [
            record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
        ]
        (warning,) = [text for text in warnings if "needs" in text]
        assert str(disk / "run") in warning
        assert bytes_named(warning)[0] >= STATE
        filler.unlink()
        save(checkpointer, "c")
        checkpointer.close()
        assert whole(disk) == ["CKPT+a", "CKPT+c"]

    @pytest.mark.parametrize("choice", ["raise", "warn"])
    @modes
    def test_a_save_that_failed_prunes_nothing(self, disk, mode, choice):
        """What retention would have made room for does not go for nothing."""
        checkpointer = checkpointer_of(disk, 1, mode, on_save_error=choice)
        for name in ("a", "b"):
            save(checkpointer, name)
        fill(disk, leave=MEGABYTE)
        raised = None
        train(checkpointer)
        try:
            checkpointer.save_and_keep_only(name="c", num_to_keep=1)
            checkpointer.wait()
        except SaveError as error:
            raised = error
        assert (raised is not None) == (choice == "raise")
        checkpointer.close()
        assert whole(disk) == ["CKPT+a", "CKPT+b"]

    @modes
    def test_a_disk_that_fills_up_while_a_file_is_written_costs_only_that_checkpoint(
        self, disk, mode
    ):
        """The space was there by all that was told before, as with a quota."""
        checkpointer = checkpointer_of(disk, 1, mode, storage=Forgetful())
        save(checkpointer, "a")
        filler = fill(disk, leave=MEGABYTE)
        left = free(disk)
        with pytest.raises(SaveError) as caught:
            save(checkpointer, "b")
        message = str(caught.value)
        assert os.strerror(errno.ENOSPC) in message
        assert str(disk / "run") in message
        assert bytes_named(message)[0] >= STATE
        # What was half written is gone, so that it does not keep the next one from fitting.
        assert abs(free(disk) - left) <= 8192
        filler.unlink()
        save(checkpointer, "b")
        checkpointer.close()
        assert whole(disk) == ["CKPT+a", "CKPT+b"]

    @modes
    def test_a_hook_that_fills_the_disk_costs_only_that_checkpoint(self, disk, mode):
        """Nobody knows before how much a hook of the user's own writes."""

        def write_much(obj, path):
            Path(path).write_bytes(bytes(obj["size"]))

        size = {"size": 10}
        checkpointer = checkpointer_of(disk, 1, mode)
        checkpointer.add_recoverable("much", size, lambda *args: None, write_much)
        save(checkpointer, "a")
        left = free(disk)
        size["size"] = 10 * MEGABYTE
        with pytest.raises(SaveError, match=f"'much' failed: OSError: .*{os.strerror(28)}"):
            save(checkpointer, "b")
        assert abs(free(disk) - left) <= 8192
        size["size"] = 20
        save(checkpointer, "b")
        checkpointer.close()
        assert sorted(path.name for path in (disk / "run").glob("CKPT*")) == ["CKPT+a", "CKPT+b"]
        assert whole(disk) == ["CKPT+a", "CKPT+b"]
