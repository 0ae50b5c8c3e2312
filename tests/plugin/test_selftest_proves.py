"""The self-test says yes only of what it ran, and leaves nothing behind when it is ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import exact_cells
import pytest
from _processes import start_server
from _python import python

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.selftest import SelftestReport, run_selftest

POINT = ["on_train_batch_start:5"]
FEW = {"trainer": {"max_epochs": 2}, "checkpoint": {"every_n_train_steps": 3}}


@pytest.fixture(autouse=True)
def server():
    """The processes of the self-test are forked from the server of all tests."""
    start_server()


def run_command(folder, what):
    """Run the command beside a script."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "lightning_sbckpt.cli", "selftest", what]
    return python(*command, cwd=folder, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("script", "what", "said"),
    [
        ("import sys; sys.exit(0)", "script:make", "can't be imported (SystemExit: 0)"),
        ("import os; os._exit(0)", "script:make", "ended by exit code 0 before the fit was over"),
        ("import nothing_like_it", "script:make", "No module named 'nothing_like_it'"),
        ("def make(folder): raise SystemExit(0)", "script:make", "SystemExit: 0"),
        ("def make(folder):\n import os; os._exit(0)", "script:make", "before the fit was over"),
        ("make = 1", ".script:make", "is not the name of a module and of a function"),
        ("make = 1", "script", "is not the name of a module and of a function"),
        ("make = 1", "script:", "is not the name of a module and of a function"),
    ],
)
def test_a_script_that_is_not_run_is_no_proof(tmp_path, script, what, said):
    """It exits by 2, whatever the script exits by."""
    (tmp_path / "script.py").write_text(script + "\n")
    done = run_command(tmp_path, what)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def no_batch(dirpath):
    return exact_cells.make(dirpath, trainer={"max_epochs": 2, "limit_train_batches": 0})


def never_saved(dirpath):
    return exact_cells.make(dirpath, trainer={"max_epochs": 2}, checkpoint={"every_n_epochs": 2})


def elsewhere(dirpath):
    return exact_cells.make(dirpath.parent.parent / "elsewhere", **FEW)


class KilledByTheKernel(exact_cells.Model):
    """Dies of memory before the kill point, once there is something to kill."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def training_step(self, batch, batch_idx):
        if self.folder.parent.name != "through" and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def killed_by_the_kernel(dirpath):
    return exact_cells.make(dirpath, model=lambda: KilledByTheKernel(dirpath), **FEW)


def exact(dirpath):
    return exact_cells.make(dirpath, **FEW)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("make", "points", "said"),
    [
        (no_batch, ["on_fit_start:1"], "trains no batch"),
        (never_saved, None, "no checkpoint before its last batch"),
        (never_saved, POINT, "no killed run had a checkpoint to go on from"),
        (elsewhere, POINT, "not to the folder that the factory was given"),
        (killed_by_the_kernel, POINT, "ended by exit code -9 before the fit was over"),
        (exact, ["on_fit_end:1"], "was complete when it was killed at on_fit_end:1"),
    ],
)
def test_a_run_in_which_nothing_was_resumed_is_no_proof(make, points, said):
    """Nothing trained, nothing saved, another folder, another death, or a death after the end."""
    with pytest.raises(RuntimeError, match=said):
        run_selftest(make, points)


def test_no_kill_point_is_no_proof():
    """Neither none at all nor an empty row; and an empty report is not exact."""
    for points in ([], [[]]):
        with pytest.raises(ConfigurationError, match="no kill point"):
            run_selftest(exact, points)
    assert not SelftestReport().exact


SLEEPER = """
import os, pathlib, subprocess, sys, time
def make(folder):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note = pathlib.Path(__file__).with_name("note")
    note.with_suffix(".part").write_text(f"{os.getpid()} {other.pid}")
    note.with_suffix(".part").rename(note)
    time.sleep(600)
"""


def wait_until(condition, seconds=60):
    """Wait for what another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    """Return whether a process is there and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc which processes run")
@pytest.mark.parametrize(
    "name",
    [
        "SIGTERM",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("SIGINT", "SIGHUP", "timeout")),
        "SIGKILL",
    ],
)
def test_what_the_selftest_started_ends_with_it(tmp_path, name):
    """The runs, what these have started, and the temporary folder, but after SIGKILL."""
    (tmp_path / "script.py").write_text(SLEEPER)
    # Short: the path of a socket in it may have no more than about a hundred characters.
    temporary = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    seconds = "20" if name == "timeout" else "600"
    command = [sys.executable, "-m", "lightning_sbckpt.cli", "selftest", "script:make"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    selftest = subprocess.Popen(
        [*command, "--timeout", seconds],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if name != "timeout":
            note = tmp_path / "note"
            wait_until(lambda: note.exists() or selftest.poll() is not None)
            assert selftest.poll() is None, selftest.communicate()
            selftest.send_signal(signal.Signals[name])
        _, error = selftest.communicate(timeout=120)
        if name == "timeout":
            assert selftest.returncode == 2 and "still going after 20 s" in error
        else:
            number = signal.Signals[name]
            assert selftest.returncode == (-number if name == "SIGKILL" else 128 + number), error
        for pid in (tmp_path / "note").read_text().split():
            wait_until(lambda pid=pid: not is_running(pid))
        assert name == "SIGKILL" or not list(temporary.glob("sbckpt-selftest-*"))
    finally:
        selftest.kill()
        selftest.wait()
        shutil.rmtree(temporary)
