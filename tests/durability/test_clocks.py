"""Order never rests on the clock alone: the future, time zones, file times and copies.

That a clock may stand still or jump back is in `test_checkpointer.py` and `test_speechbrain_faults.py`.
"""

from __future__ import annotations

import os
import shutil
import time

import pytest

from lightning_sbckpt import Checkpointer, ckpt_recency

NOW = 1_800_000_000.0
TEN_YEARS = 10 * 365 * 86400.0


@pytest.fixture
def clock(monkeypatch):
    """The clock, set by hand."""

    class Clock:
        now = NOW

    monkeypatch.setattr(time, "time", lambda: Clock.now)
    return Clock


@pytest.fixture
def run(tmp_path, scale):
    """A function that returns a new checkpointer of the run, as after a restart, and its model."""

    def make(**options):
        model = scale(0.0)
        return Checkpointer(tmp_path / "run", {"model": model}, **options), model

    return make


def paths(checkpointer):
    """Return the checkpoints, newest first."""
    return [ckpt.path for ckpt in checkpointer.find_checkpoints()]


@pytest.mark.parametrize("ahead", [60.0, TEN_YEARS], ids=["a minute", "ten years"])
class TestTheFuture:
    """A checkpoint was saved by a machine whose clock was ahead; then the clock was put right."""

    def test_what_is_saved_later_is_newer_after_any_number_of_restarts(self, run, clock, ahead):
        """And each recovery finds what was saved last."""
        clock.now += ahead
        saved = [run()[0].save_checkpoint().path]
        clock.now = NOW
        for number in range(1, 4):
            checkpointer, model = run()
            model.value = float(number)
            saved.append(checkpointer.save_checkpoint().path)
            clock.now += 1.0
            checkpointer, model = run()
            assert checkpointer.recover_if_possible().path == saved[-1]
            assert model.value == number
        assert paths(run()[0]) == saved[::-1]

    def test_retention_keeps_what_was_saved_last(self, run, clock, ahead):
        """Else a run would delete each checkpoint as soon as it is made."""
        clock.now += ahead
        run()[0].save_and_keep_only(name="ahead")
        clock.now = NOW
        checkpointer, _ = run()
        for name in ("b", "c"):
            checkpointer.save_and_keep_only(name=name)
            assert [path.name for path in paths(checkpointer)] == [f"CKPT+{name}"]

    def test_the_times_written_creep_and_do_not_run_away(self, run, clock, ahead):
        """Each is later than the one before by as little as a number can tell."""
        clock.now += ahead
        run()[0].save_checkpoint()
        clock.now = NOW
        times = [ckpt_recency(run()[0].save_checkpoint()) for _ in range(5)]
        assert times == sorted(set(times))
        assert times[-1] < NOW + ahead + 0.001
        clock.now = NOW + ahead + 5.0
        assert ckpt_recency(run()[0].save_checkpoint()) == clock.now


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the system has no time.tzset")
def test_another_time_zone_changes_names_and_not_the_order(run, clock, monkeypatch):
    """Names are in local time, for people: by them the second would be the older one."""
    saved = []
    for zone in ("Asia/Tokyo", "America/Los_Angeles", "UTC"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        saved.append(run()[0].save_checkpoint().path)
        clock.now += 60.0
    monkeypatch.undo()
    time.tzset()
    assert [path.name for path in saved] != sorted(path.name for path in saved)
    assert paths(run()[0]) == saved[::-1]


def test_the_times_of_files_do_not_matter(run):
    """After a download or a copy without them every file is of today."""
    saved = [run()[0].save_checkpoint().path for _ in range(3)]
    for number, path in enumerate(saved):
        for entry in (*path.iterdir(), path):
            os.utime(entry, (NOW - number * 1000, NOW - number * 1000))
    assert paths(run()[0]) == saved[::-1]


class TestCopies:
    """Folders that were copied have the time of the save, not of the copy."""

    def test_a_copy_of_an_old_one_does_not_become_the_newest(self, run):
        """Although its files are younger."""
        checkpointer, model = run()
        for number in (1.0, 2.0):
            model.value = number
            checkpointer.save_checkpoint(name=f"{number:.0f}")
        root = checkpointer.checkpoints_dir
        shutil.copytree(root / "CKPT+1", root / "CKPT+copy")
        checkpointer, model = run()
        assert checkpointer.recover_if_possible().path.name == "CKPT+2"
        assert model.value == 2.0

    def test_a_copy_of_the_newest_is_as_new_and_the_next_save_is_newer(self, run):
        """Which of the two is taken rests on the names, so it is the same each time."""
        checkpointer, model = run()
        model.value = 5.0
        checkpointer.save_checkpoint(name="b")
        root = checkpointer.checkpoints_dir
        for name in "ca":
            shutil.copytree(root / "CKPT+b", root / f"CKPT+{name}")
        found = {run()[0].find_checkpoint().path.name for _ in range(3)}
        assert len(found) == 1
        checkpointer, model = run()
        checkpointer.recover_if_possible()
        assert model.value == 5.0
        saved = checkpointer.save_checkpoint()
        assert paths(checkpointer)[0] == saved.path
        assert len(set(paths(checkpointer))) == 4

    def test_a_copied_run_goes_on_by_itself(self, run, tmp_path, scale):
        """Both have the same past, and neither knows of the other's future."""
        checkpointer, _ = run()
        for name in "ab":
            checkpointer.save_checkpoint(name=name)
        shutil.copytree(checkpointer.checkpoints_dir, tmp_path / "copy")
        copy = Checkpointer(tmp_path / "copy", {"model": scale(7.0)})
        copy.save_checkpoint(name="c")
        assert [path.name for path in paths(copy)] == ["CKPT+c", "CKPT+b", "CKPT+a"]
        assert [path.name for path in paths(run()[0])] == ["CKPT+b", "CKPT+a"]


def test_saves_in_the_background_within_one_instant_are_in_order(run, clock):
    """The time is that of the call, not of the moment when it is written."""
    checkpointer, model = run(save_mode="async")
    for number in range(4):
        model.value = float(number)
        checkpointer.save_checkpoint({"number": number})
    checkpointer.wait()
    assert [ckpt.meta["number"] for ckpt in checkpointer.find_checkpoints()] == [3, 2, 1, 0]
    checkpointer.close()
