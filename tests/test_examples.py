"""Every example runs as its first lines say, in a process of its own, and shows what it promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from _python import python

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TESTED = {"digits.py", "plain_pytorch.py", "custom_objects.py", "finetune.py", "fabric.py"}


@pytest.fixture
def example(tmp_path):
    """A function that runs an example in an empty folder and returns what it printed."""

    def run(name: str, *arguments: str, code: int = 0) -> str:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        done = python(
            EXAMPLES / name,
            *arguments,
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=300,
            together=True,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    return run


def test_every_example_is_tested_here():
    """An example that is added gets a test."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED


@pytest.mark.long
def test_a_killed_run_ends_like_its_twin(example):
    """Digits: SIGKILL in mid-epoch, the same command again, and the end is the same bit for bit."""
    printed = example("digits.py", "--dir", "story", "--epochs", "3")

    assert "the process died of SIGKILL" in printed
    # The second start goes on within the epoch in which the first one died.
    second = printed.partition("2. The same command again")[2].partition("3. Its twin")[0]
    assert re.findall(r"^ *epoch (\d)", second, re.MULTILINE) == ["1", "2"]
    last = printed.partition("6. Killed and resumed")[2]
    for fact in ("last weights", "best weights", "test accuracy"):
        assert re.search(rf"^ *{fact} +(\S+) +\1 +True$", last, re.MULTILINE), last
    assert "the same, bit for bit" in last
    assert float(re.search(r"test accuracy +(\S+)", last)[1]) > 0.8


def test_the_story_of_digits_starts_in_an_empty_folder_only(example, tmp_path):
    """Digits: a folder with anything in it is refused, and what is in it stays."""
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")

    printed = example("digits.py", "--dir", "mine", code=2)

    assert "--dir mine is not empty" in printed
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


def test_a_stopped_plain_loop_ends_like_one_that_was_not(example):
    """Plain PyTorch: two processes, one after the other, log the accuracies of a single one."""
    first = example(
        "plain_pytorch.py", "--dir", "stopped", "--epochs", "4", "--stop-after", "2", code=1
    )
    second = example("plain_pytorch.py", "--dir", "stopped", "--epochs", "4")
    whole = example("plain_pytorch.py", "--dir", "whole", "--epochs", "4")

    assert "stopped: run the same command again" in first
    assert re.search(r"^going on from CKPT\+", second)
    epochs = re.compile(r"^epoch \d: accuracy \S+$", re.MULTILINE)
    assert len(epochs.findall(whole)) == 4
    assert epochs.findall(first) + epochs.findall(second) == epochs.findall(whole)
    assert second.splitlines()[-1] == whole.splitlines()[-1]


def test_a_finished_plain_loop_only_loads_its_best(example):
    """Plain PyTorch: a third start trains nothing and ends with the best weights all the same."""
    trained = example("plain_pytorch.py", "--epochs", "2")
    again = example("plain_pytorch.py", "--epochs", "2")

    assert "epoch 2: accuracy" in trained
    assert ": accuracy" not in again
    assert again.splitlines()[-1] == trained.splitlines()[-1]


def test_a_killed_loop_of_fabric_ends_like_one_that_was_not(example):
    """Fabric: killed within the second epoch, it goes on within it, to the same weights."""
    example("fabric.py", "--dir", "killed", "--epochs", "3", "--killed-after", "55", code=-9)
    second = example("fabric.py", "--dir", "killed", "--epochs", "3")
    whole = example("fabric.py", "--dir", "whole", "--epochs", "3")

    assert second.startswith("going on from CKPT+")
    assert "epoch 0:" not in second
    assert second.splitlines()[-3:] == whole.splitlines()[-3:]
    assert "the weights add up to" in whole


def test_custom_objects_come_back_in_the_second_run(example):
    """Custom objects: words keep their numbers, and the buffer its newest transitions."""
    printed = example("custom_objects.py", "--dir", "run")
    first, second = printed.split("second run")

    assert "recovered 0 words, 0 transitions" in first
    assert "recovered 3 words, 3 transitions" in second
    assert "'the dog sat' is [0, 3, 2]" in second
    assert "rewards in the buffer: [2.0, 3.0, 4.0, 5.0]" in second
    assert "words = 4" in second


def test_fine_tuning_starts_from_the_best_checkpoint(example):
    """Fine-tuning: what is not transferred is named, and the transfer beats a start from scratch."""
    printed = example("finetune.py", "--dir", "run")

    for key in ("parity.weight", "parity.bias", "head.weight", "head.bias"):
        assert re.search(rf"\bkey {re.escape(key)}\b", printed), printed
    tuned = float(re.search(r"fine-tuned on 30 images: (\S+)", printed)[1])
    scratch = float(re.search(r"from scratch on the same: (\S+)", printed)[1])
    assert tuned > scratch
