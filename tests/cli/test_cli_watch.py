"""`watch` without a terminal: what it prints, and when it ends."""

from __future__ import annotations

import json
import shutil

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.cli import watching
from lightning_sbckpt.retention import Newest


@pytest.fixture
def steps(monkeypatch):
    """Have things done between two looks, one after the other; then Ctrl+C."""

    def arrange(*actions):
        left = list(actions)

        def sleep(seconds):
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(watching.time, "sleep", sleep)

    return arrange


def save(run, name, **meta):
    with Checkpointer(run) as checkpointer:
        checkpointer.save_checkpoint(meta, name=name)


def test_once_prints_the_table_and_ends(run, call):
    """As `ls` does."""
    text = call("watch", run, "--once").stdout
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["e4", "e3", "e1"]
    assert "stays: newest 1" in text


def test_what_happens_is_a_line_each(run, call, steps):
    """Saved, removed with and without a reason, replaced under the same name."""

    def prune():
        with Checkpointer(run) as checkpointer:
            checkpointer.apply_retention([Newest(3)])

    steps(
        lambda: save(run, "a", val_loss=0.1, global_step=5),
        prune,
        lambda: None,
        lambda: shutil.rmtree(run / "CKPT+e3"),
        lambda: save(run, "a", val_loss=0.2),
    )
    assert call("watch", run).stdout.splitlines() == [
        f"3 checkpoints in {run}",
        "saved   CKPT+a: step 5, val_loss 0.1",
        "removed CKPT+e1: older than the newest 3",
        "removed CKPT+e3: nobody noted why",
        "saved   CKPT+a: val_loss 0.2",
    ]


def test_as_json_every_event_is_a_line(run, call, steps):
    """Beginning with those that are there, oldest first; NaN is a text."""
    steps(lambda: save(run, "a", val_loss=float("nan")))
    found = [json.loads(line) for line in call("watch", run, "--json").stdout.splitlines()]
    assert [each["name"] for each in found] == ["CKPT+e1", "CKPT+e3", "CKPT+e4", "CKPT+a"]
    assert {each["event"] for each in found} == {"saved"}
    assert found[-1]["meta"]["val_loss"] == "nan"


def test_a_folder_that_is_taken_away_ends_it(run, call, steps):
    """There is nothing to watch any more."""
    steps(lambda: shutil.rmtree(run))
    assert f"{run} is gone" in call("watch", run, code=2).stderr


def test_an_unreadable_one_stops_nothing(run, call, steps):
    """It is told of those that can be read."""
    steps(
        lambda: (run / "CKPT+e1" / "CKPT.yaml").write_text("a: ["),
        lambda: save(run, "b"),
    )
    assert call("watch", run).stdout.splitlines()[-1] == "saved   CKPT+b"
