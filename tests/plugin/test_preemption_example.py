"""What a preempted run is told by, how its ranks agree, and the example that is started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from _python import python

from lightning_sbckpt import Preemption, SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.preemption import Agreement

# ---------------------------------------------------------------------- asking


class FakeWorld:
    """Two ranks, of which the other one says nothing or has got a signal."""

    size, rank = 2, 0

    def __init__(self, other: float = 0.0) -> None:
        self.other, self.asked = other, 0

    def highest(self, numbers):
        self.asked += 1
        return [max(numbers[0], self.other), *numbers[1:]]


def asked_at(every, seconds_of):
    """Return the numbers of the batches after which the ranks ask each other."""
    now, world, found = 0.0, FakeWorld(), []
    agreement = Agreement(every, lambda: now)
    for batch in range(1, 201):
        now += seconds_of(batch)
        if agreement.is_due():
            agreement.ask(world, 0, 0.0)
            found.append(batch)
    return found


def test_the_ranks_ask_each_other_every_n_batches_only():
    """Between them, a batch costs a comparison of two numbers."""
    assert asked_at(50, lambda batch: 1.0) == [50, 100, 150, 200]


def test_by_default_the_ranks_ask_each_other_about_once_a_second():
    """Slow batches: after each; fast ones: seldom, and soon more often if they get slow."""
    assert asked_at(None, lambda batch: 3.0) == list(range(1, 201))
    assert asked_at(None, lambda batch: 1e-3) == [1, 3, 7, 15, 31, 63, 127]
    slowed = asked_at(None, lambda batch: 0.1 if batch < 100 else 1.0)
    assert 10 <= sum(batch < 100 for batch in slowed) <= 14
    assert slowed[-50:] == list(range(151, 201))


def test_a_signal_of_another_rank_is_heard():
    """With the time since it came."""
    assert Agreement(1).ask(FakeWorld(15.0), 0, 0.0)[0] == signal.SIGTERM
    assert Agreement(1).ask(FakeWorld(0.0), 10, 2.0) == (signal.SIGUSR1, 2.0)
    assert Agreement(1).ask(FakeWorld(0.0), 0, 0.0)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signals": "SIGTERM"}, "expected a list of names"),
        ({"signals": ()}, "expected a list of names"),
        ({"signals": ["SIGKILL"]}, "'SIGKILL', which is no signal that a process can catch"),
        ({"signals": ["TERM"]}, "Names are such as 'SIGTERM'"),
        ({"exit_code": 0}, "exit_code of Preemption is 0, expected a number from 1 to 255"),
        ({"grace_time": 0}, "expected more than 0 seconds"),
        ({"every_n_batches": 0}, "expected 1 or more"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message):
    """Before training, and not when the machine is taken away."""
    with pytest.raises(ConfigurationError, match=message):
        Preemption(**arguments)


def test_an_argument_of_another_kind_is_refused():
    """Such as the name of a signal."""
    with pytest.raises(ConfigurationError, match="preemption is 'SIGTERM', expected True, False"):
        SBCheckpoint("runs/nowhere", preemption="SIGTERM")


# ---------------------------------------------------------------------- the example

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "preemptible"


def run_example(tmp_path, *arguments, loop=True):
    """Run the example, started again until it is done; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}
    if not loop and "--devices" not in arguments:
        script = EXAMPLE / "train.py"
        done = python(script, *arguments, cwd=tmp_path, env=environment, together=True)
        return done.returncode, done.stdout
    command = [sys.executable, str(EXAMPLE / "train.py"), *arguments]
    if loop:
        command = ["bash", str(EXAMPLE / "run-until-done.sh"), *command]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


def last_line(printed):
    """Return the line that says how the weights ended."""
    return [line for line in printed.splitlines() if line.startswith("done after")]


@pytest.mark.long
def test_the_loop_starts_the_example_again_until_it_is_done(tmp_path):
    """Taken away once, it ends with the weights of one that was left in peace."""
    code, whole = run_example(tmp_path, "--dir", "whole", loop=False)
    assert code == 0, whole
    code, printed = run_example(tmp_path, "--dir", "run", "--taken-away-after", "60")
    assert code == 0, printed
    assert printed.count("taken away: starting again") == 1
    assert printed.count("SIGTERM came, the run ends at the next safe point") == 1
    assert len(last_line(printed)) == 1 and last_line(printed) == last_line(whole)


@pytest.mark.slow
def test_lightnings_launcher_hands_the_exit_code_on(tmp_path):
    """Two ranks by the real launcher, which kills everything when a child of its fails."""
    two = ("--devices", "2")
    code, whole = run_example(tmp_path, *two, "--dir", "whole", loop=False)
    assert code == 0, whole
    code, printed = run_example(tmp_path, *two, "--dir", "run", "--taken-away-after", "20")
    assert code == 0, printed
    assert printed.count("taken away: starting again") == 1
    assert last_line(printed) == last_line(whole)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (143, 143)])
def test_the_loop_hands_on_every_other_exit_code(code, expected):
    """Done, failed or interrupted: it ends."""
    loop = ["bash", str(EXAMPLE / "run-until-done.sh"), "bash", "-c", f"exit {code}"]
    assert subprocess.run(loop, timeout=20, check=False).returncode == expected


def test_the_manifests_hold_what_the_run_says(tmp_path):
    """The exit code, the signals, and a grace time within what the cluster gives."""
    import yaml

    job = yaml.safe_load((EXAMPLE / "job.yaml").read_text())["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [Preemption().exit_code]
    pod = job["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    grace = float(arguments[arguments.index("--grace-time") + 1])
    assert grace < pod["terminationGracePeriodSeconds"]
    assert rules[0]["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"

    script = (EXAMPLE / "job.slurm").read_text()
    subprocess.run(["bash", "-n", str(EXAMPLE / "job.slurm")], timeout=20, check=True)
    name, _, before = re.search(r"--signal=(\w+)(@)(\d+)", script).groups()
    assert f"SIG{name}" in Preemption().signals
    assert float(re.search(r"--grace-time (\d+)", script)[1]) < float(before)
    assert f"-eq {Preemption().exit_code} ]" in script
