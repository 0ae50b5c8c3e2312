"""An outside judge, ckpt-chaos, ends trainings at file events: a share of `python tests/durability/_ckpt_chaos.py`."""

from __future__ import annotations

import shutil
import sys
from collections import Counter

import pytest

pytest.importorskip("ckpt_chaos")
if not sys.platform.startswith("linux"):
    pytest.skip("the names of open files are read from /proc", allow_module_level=True)

from _ckpt_chaos import ROWS, count, judge, server
from _counts import count as counted


@pytest.fixture(scope="module")
def at():
    """The server of processes in which the trainings run."""
    with server() as found:
        yield found


def judged(name, at, folder, points):
    """Return what ckpt-chaos says of a training that it ends at some events."""
    row = ROWS[name]
    how = {**row.how, "points": points, "jobs": 2}
    found = judge(row.job, folder / "work", at, **how)
    counted("ends that ckpt-chaos chose", found.counts.total())
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "points"), [("loop-prune", 5), ("example", 2)])
def test_what_ckpt_chaos_ends_goes_on_exactly_from_the_newest_checkpoint(
    tmp_path, at, name, points
):
    """At whichever file event, in the middle of a write, too; the shipped example as well."""
    found = judged(name, at, tmp_path, points)
    assert (found.code, found.missed) == (0, 0), found.printed
    assert found.counts == {"PASS": points}


def test_ckpt_chaos_notices_that_nothing_is_flushed(tmp_path, at):
    """Else it would not notice either what goes wrong with everything in its place."""
    found = judged("no-flush", at, tmp_path, 2)
    assert found.code == 1
    assert set(found.counts) - {"PASS"}, found.printed


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace counts what the kernel is asked for"
)
@pytest.mark.parametrize("job", ["loop-prune", "fit-async", "example"])
def test_ckpt_chaos_sees_every_operation_on_the_folder(tmp_path, job):
    """What the kernel is asked to change, by strace, against what ckpt-chaos was told."""
    done, missed = count(job, tmp_path / "work")
    assert missed == Counter()
    assert done.total() > 50
