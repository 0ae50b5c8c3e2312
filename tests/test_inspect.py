"""Checkpoints as a table that a person can read."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import pytest

from lightning_sbckpt._display.wording import say_size
from lightning_sbckpt._views.columns import Column, ago, freed_by
from lightning_sbckpt._views.grid import as_text
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.inspect import table
from lightning_sbckpt.meta import Checkpoint

NOON = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))


def write(folder, size, **meta):
    """Write a checkpoint folder with a file of this size."""
    folder.mkdir(parents=True)
    with (folder / "model.ckpt").open("wb") as stream:
        stream.write(bytes(size))
        stream.flush()
        # Else some file systems have not yet said what it takes.
        os.fsync(stream.fileno())
    return Checkpoint(folder, meta, {"model": folder / "model.ckpt"})


def taken(size):
    """Return what a file of this size takes on this disk, in the words of the table."""
    with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir()) as stream:
        stream.write(bytes(size))
        stream.flush()
        os.fsync(stream.fileno())
        return say_size(os.fstat(stream.fileno()).st_blocks * 512)


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
        [
            "new",
            "2026-03-04",
            "12:01:30",
            "2",
            "200",
            "no",
            *taken(3).split(),
            "0.25",
            "newest",
        ],
        [
            "old",
            "2026-03-04",
            "12:00:00",
            "1",
            "100",
            "yes",
            *taken(2500).split(),
            "0.1235",
            "0.5",
            "best",
        ],
    ]


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        ({"min_key": "loss"}, "old"),
        ({"max_key": "loss"}, "new"),
        ({"max_key": "acc"}, "old"),
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
    assert "[red]x[bold]:smile:" in text
    assert "unknown" in text
    assert " [red]\n" in text
    assert "gone" in text
    assert "1e-09" in text


def test_long_names_are_not_cut(tmp_path):
    """A name is there to be copied."""
    name = "x" * 180
    assert name in table([Checkpoint(tmp_path / f"CKPT+{name}", {"unixtime": NOON}, {})])


def test_a_size_is_what_is_taken_on_the_disk(tmp_path):
    """Not the length: a file of zeros that were never written takes nothing but its end."""
    ckpt = write(tmp_path / "CKPT+a", 100, unixtime=NOON)
    with (ckpt.path / "sparse.bin").open("wb") as stream:
        stream.truncate(5_000_000_000)
        stream.seek(5_000_000_000)
        stream.write(b"x")
        stream.flush()
        os.fsync(stream.fileno())
    size = table([ckpt]).splitlines()[-1].split()[3:5]
    assert size[1] == "KB"
    assert float(size[0]) < 100


def test_two_keys_for_the_best_are_refused(two):
    """As everywhere: at most one."""
    with pytest.raises(SelectionError, match="min_key='loss'"):
        table(two, min_key="loss", max_key="acc")


def test_paths_may_be_relative(monkeypatch, tmp_path):
    """A relative folder is looked at from where the user is."""
    write(tmp_path / "run/CKPT+a", 5, unixtime=NOON)
    monkeypatch.chdir(tmp_path)
    text = table([Checkpoint(Path("run/CKPT+a"), {"unixtime": NOON}, {})])
    assert f" {taken(5)} " in text


def test_bytes_shared_with_another_checkpoint_are_told_from_its_own(tmp_path):
    """A hard-linked file stays on the disk when this checkpoint goes."""
    first = write(tmp_path / "CKPT+a", 500_000, unixtime=NOON)
    second = write(tmp_path / "CKPT+b", 3_000_000, unixtime=NOON + 1)
    assert taken(500_000) in table([first, second])
    assert "own" not in table([first, second])
    (second.path / "frozen.ckpt").hardlink_to(first.path / "model.ckpt")
    newer, older = table([first, second]).splitlines()[-2:]
    assert f", {taken(3_000_000)} own" in newer
    assert f"{taken(500_000)}, 0 B own" in older


def test_pinned_checkpoints_are_marked(tmp_path):
    """Beside the best and the newest."""
    ckpt = write(tmp_path / "CKPT+a", 10, unixtime=NOON, pinned="in the paper")
    assert table([ckpt]).splitlines()[-1].endswith("newest, pinned")


def test_ephemeral_checkpoints_are_marked(tmp_path):
    """They are for recovery only."""
    ckpt = write(tmp_path / "CKPT+a", 10, unixtime=NOON, ephemeral=True)
    assert table([ckpt]).splitlines()[-1].endswith("newest, ephemeral")


def test_with_a_moment_it_says_how_long_ago(two):
    """And what no checkpoint has gets no column."""
    text = table(two, now=NOON + 3 * 3600 + 90)
    assert text.splitlines()[2].split()[:3] == ["new", "3", "h"]
    assert text.splitlines()[0].split() == ["name", "age", "epoch", "step", "size", "loss", "acc"]
    del two[0].meta["epoch"], two[1].meta["epoch"]
    assert "epoch" not in table(two, now=NOON)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "now"),
        (-0.4, "now"),
        (1, "1 s ago"),
        (59.9, "59 s ago"),
        (61, "1 min ago"),
        (3 * 3600 + 1799, "3 h ago"),
        (86_400 * 400, "400 d ago"),
        (-120, "in 2 min"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_an_age_has_one_unit(seconds, text):
    """Clocks may differ, so something may be yet to come."""
    assert ago(seconds) == text


class TestWidth:
    """A table in a width."""

    @pytest.mark.parametrize("width", range(10, 110, 7))
    def test_no_line_is_wider_unless_a_name_alone_is(self, width, two):
        """Names are there to be copied, so they are never cut."""
        remarks = {ckpt.path: "stays: for many words that say why it does" for ckpt in two}
        lines = table(two, min_key="loss", width=width, remarks=remarks).splitlines()
        assert max(map(len, lines)) <= max(width, len("name"))
        assert sum(line.startswith("old") for line in lines) == 1

    def test_the_least_important_go_first_and_are_named(self, two):
        """The name, the marks and the first metric are what stays."""
        left = []
        for width in range(100, 20, -1):
            text = table(two, min_key="loss", width=width)
            named = text.partition("no room for: ")[2].replace("\n", " ")
            gone = re.findall(r"end of epoch|\w+", named)
            left.append(gone)
        order = list(dict.fromkeys(name for gone in left for name in sorted(gone, key=len)))
        assert order == ["end of epoch", "size", "saved", "epoch", "acc", "step"]

    def test_a_remark_stands_beside_if_there_is_room_and_else_below(self, two):
        """Indented, and broken where the width ends."""
        remarks = {two[1].path: "stays: because it is new"}
        wide = table(two, width=130, remarks=remarks).splitlines()
        assert wide[2].endswith("newest  stays: because it is new")
        long = {two[1].path: "stays: " + "because it is new " * 10}
        lines = table(two, width=130, remarks=long).splitlines()
        assert max(map(len, lines)) <= 130
        assert sum(line.startswith(" " * 80) for line in lines) >= 2
        narrow = table(two, width=90, remarks=remarks).splitlines()
        assert narrow[3] == "    stays: because it is new"

    def test_a_name_of_wide_characters_is_measured_as_it_is_shown(self):
        """A character may take two places."""
        columns = [
            Column("name", ["火火火火", "abc"], 0, right=False),
            Column("n", ["1", "22"], 1),
        ]
        assert as_text(columns).splitlines()[2:] == ["火火火火   1", "abc       22"]


def test_what_is_freed_counts_a_file_with_the_last_of_its_names(tmp_path):
    """Not before, and once."""
    first = write(tmp_path / "CKPT+a", 500_000, unixtime=NOON).path
    second = write(tmp_path / "CKPT+b", 300_000, unixtime=NOON).path
    (second / "same.ckpt").hardlink_to(first / "model.ckpt")
    (second / "again.ckpt").hardlink_to(first / "model.ckpt")
    assert freed_by([first]) == 0
    assert 300_000 <= freed_by([second]) < 320_000
    assert 800_000 <= freed_by([first, second]) < 820_000
    assert freed_by([tmp_path / "gone"]) == 0
