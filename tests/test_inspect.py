"""Checkpoints as a table that a person can read."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from lightning_sbckpt.errors import MissingDependencyError, SelectionError
from lightning_sbckpt.inspect import table
from lightning_sbckpt.meta import Checkpoint

NOON = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))


def write(folder, size, **meta):
    """Write a checkpoint folder with a file of this size."""
    folder.mkdir(parents=True)
    (folder / "model.ckpt").write_bytes(bytes(size))
    return Checkpoint(folder, meta, {"model": folder / "model.ckpt"})


@pytest.fixture
def two(tmp_path):
    """An older, better checkpoint and a newer one."""
    common = {"end-of-epoch": True, "note": "text", "flag": True}
    return [
        write(
            tmp_path / "CKPT+old",
            2500,
            unixtime=NOON,
            epoch=1,
            global_step=100,
            loss=0.123456789,
            acc=0.5,
            **common,
        ),
        write(
            tmp_path / "CKPT+new",
            3,
            unixtime=NOON + 90,
            epoch=2,
            global_step=200,
            loss=0.25,
            **{**common, "end-of-epoch": False},
        ),
    ]


def rows(text):
    """Return the header and the rows as lists of words."""
    header, _rule, *lines = text.rstrip("\n").splitlines()
    return header.split(), [line.split() for line in lines]


def test_the_newest_is_first_and_everything_of_note_is_there(two):
    """Name, time, epoch, step, end of epoch, size, numbers from the meta, and marks."""
    header, lines = rows(table(two, min_key="loss"))
    assert header == ["name", "saved", "epoch", "step", "end", "of", "epoch", "size", "loss", "acc"]
    assert lines == [
        ["CKPT+new", "2026-03-04", "12:01:30", "2", "200", "no", "3", "B", "0.25", "newest"],
        [
            "CKPT+old",
            "2026-03-04",
            "12:00:00",
            "1",
            "100",
            "yes",
            "2.5",
            "KB",
            "0.1235",
            "0.5",
            "best",
        ],
    ]


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        ({"min_key": "loss"}, "CKPT+old"),
        ({"max_key": "loss"}, "CKPT+new"),
        ({"max_key": "acc"}, "CKPT+old"),
        ({}, None),
        ({"min_key": "nowhere"}, None),
    ],
)
def test_the_best_is_marked_only_when_asked_for_and_found(wanted, best, two):
    """The mark follows the key that was given."""
    _, lines = rows(table(two, **wanted))
    marked = [line[0] for line in lines if any(word.startswith("best") for word in line)]
    assert marked == ([best] if best else [])


def test_a_checkpoint_may_be_both_best_and_newest(two):
    """Both marks stand in one cell."""
    assert "best, newest" in table(two, max_key="loss")


def test_only_the_keys_asked_for_are_shown(two):
    """Texts too, and keys that no checkpoint has."""
    header, lines = rows(table(two, keys=["note", "nowhere"]))
    assert header[-3:] == ["size", "note", "nowhere"]
    assert lines[0][-2:] == ["text", "newest"]
    assert "0.25" not in table(two, keys=["note"])


def test_an_empty_folder_makes_no_table():
    """No checkpoints are no error."""
    assert table([]) == "no checkpoints"


def test_brackets_and_odd_meta_are_shown_as_they_are(tmp_path):
    """A name that looks like markup, a time that is none, a folder that is gone."""
    odd = Checkpoint(
        tmp_path / "CKPT+[red]x[bold]:smile:", {"unixtime": "never", "[red]": 1e-9}, {}
    )
    text = table([odd])
    assert "CKPT+[red]x[bold]:smile:" in text
    assert "unknown" in text
    assert " [red]\n" in text
    assert "gone" in text
    assert "1e-09" in text


def test_long_names_are_not_cut(tmp_path):
    """A name is there to be copied."""
    name = "CKPT+" + "x" * 180
    assert name in table([Checkpoint(tmp_path / name, {"unixtime": NOON}, {})])


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (999_499, "999 KB"), (999_600, "1 MB")],
)
def test_sizes_are_short(size, text, tmp_path):
    """Three digits and a unit."""
    assert f" {text} " in table([write(tmp_path / "CKPT+a", size, unixtime=NOON)])


def test_two_keys_for_the_best_are_refused(two):
    """As everywhere: at most one."""
    with pytest.raises(SelectionError, match="min_key='loss'"):
        table(two, min_key="loss", max_key="acc")


def test_without_rich_the_message_says_how_to_install_it(two, monkeypatch):
    """The library is optional."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(MissingDependencyError, match="pip install 'lightning-sbckpt") as caught:
        table(two)
    assert isinstance(caught.value, ImportError)


def test_paths_may_be_relative(monkeypatch, tmp_path):
    """A relative folder is looked at from where the user is."""
    write(tmp_path / "run/CKPT+a", 5, unixtime=NOON)
    monkeypatch.chdir(tmp_path)
    assert "5 B" in table([Checkpoint(Path("run/CKPT+a"), {"unixtime": NOON}, {})])


def test_bytes_shared_with_another_checkpoint_are_told_from_its_own(tmp_path):
    """A hard-linked file stays on the disk when this checkpoint goes."""
    first = write(tmp_path / "CKPT+a", 5000, unixtime=NOON)
    second = write(tmp_path / "CKPT+b", 3000, unixtime=NOON + 1)
    assert "5 KB" in table([first, second]) and "own" not in table([first, second])
    (second.path / "frozen.ckpt").hardlink_to(first.path / "model.ckpt")
    assert "8 KB, 3 KB own" in table([first, second])
    assert "5 KB, 0 B own" in table([first, second])


def test_pinned_checkpoints_are_marked(tmp_path):
    """Beside the best and the newest."""
    ckpt = write(tmp_path / "CKPT+a", 10, unixtime=NOON, pinned="in the paper")
    assert table([ckpt]).splitlines()[-1].endswith("newest, pinned")
