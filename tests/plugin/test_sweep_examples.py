"""The examples that train several runs: killed within one of them, they end as if they had not been."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _python import python

ROOT = Path(__file__).resolve().parents[2]

# Added to a copy of what the examples train: each process dies at a batch of its own.
DIES = """
import os, signal
_step, _left = Signs.training_step, [int(os.environ.get("DIES_AT", 0))]

def _dies(self, batch, batch_idx):
    _left[0] -= 1
    if _left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(self, batch, batch_idx)

Signs.training_step = _dies
"""


@pytest.fixture
def example(tmp_path):
    """A function that runs an example in a folder, to its end or to a batch, and returns its output."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "examples" / "configs", configs)
    with (configs / "task.py").open("a") as stream:
        stream.write(DIES)

    def run(name, folder, *arguments, dies_at=0, inside=True):
        cwd = tmp_path / folder
        cwd.mkdir(exist_ok=True)
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIES_AT": str(dies_at)}
        environment = {**os.environ, **own}
        if inside:
            done = python(
                configs / name, *arguments, cwd=cwd, env=environment, timeout=300, together=True
            )
        else:
            done = subprocess.run(
                [sys.executable, configs / name, *arguments],
                cwd=cwd,
                env=environment,
                timeout=300,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert (done.returncode != 0) is (dies_at > 0), done.stdout
        return done.stdout

    return run


def lines(printed, start):
    return [line for line in printed.splitlines() if line.startswith(start)]


@pytest.mark.long
def test_a_killed_cross_validation_ends_as_if_it_had_not_been(example):
    """In its second fold: the first is not trained again, the second goes on."""
    few = ("--folds", "2", "--epochs", "2")
    example("kfold.py", "killed", *few, dies_at=35)
    again = example("kfold.py", "killed", *few)
    assert "resuming from" in again
    assert lines(again, ("fold", "mean")) == lines(
        example("kfold.py", "whole", *few), ("fold", "mean")
    )


@pytest.mark.long
def test_a_killed_search_goes_on_with_the_trial_that_was_killed(example):
    """In its second trial, which is tried again with the same values, and goes on."""
    pytest.importorskip("optuna")
    example("optuna_search.py", "killed", "--trials", "2", dies_at=48 + 30)
    again = example("optuna_search.py", "killed", "--trials", "2")
    assert len(re.findall(r"Trial \d finished", again)) == 1
    assert "resuming from" in again
    assert "best: " in again
    assert "Trial" not in example("optuna_search.py", "killed", "--trials", "2")


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_not_been(example):
    """Whatever of it was done."""
    example("sweep.py", "killed", dies_at=60, inside=False)
    again = example("sweep.py", "killed", inside=False)
    assert lines(again, "{") == lines(example("sweep.py", "whole", inside=False), "{")
