"""In a notebook a folder is a table and a checkpoint a card, and neither ever raises."""

from __future__ import annotations

import math
import shutil
import time
from html.parser import HTMLParser

import pytest
import torch
from _foreign import forget_manifest
from _lives import small_run

from lightning_sbckpt import Checkpoint, Checkpointer, SBCheckpoint
from lightning_sbckpt.difference import diff
from lightning_sbckpt.folder import CheckpointFolder


class Reader(HTMLParser):
    """Keeps what a browser would make of a page: the tags, and the cells of each row."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.text, self._in_cell = set(), [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data + "\n"
        if self._in_cell:
            self.rows[-1][-1] += data

    def pairs(self):
        return {row[0]: row[1] for row in self.rows if len(row) == 2}


OURS = {"div", "span", "style", "table", "thead", "tbody", "tr", "td", "th"}


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(2, 2)})


def test_a_folder_is_a_table_newest_first(tmp_path):
    """With name, step, epoch, age, size, metrics and marks; the best is that of the run's rules."""
    shown = Reader(small_run(tmp_path / "run")._repr_html_())
    assert shown.rows[0] == ["name", "step", "epoch", "age", "size", "loss", "acc", ""]
    names = [row[0] for row in shown.rows[1:]]
    assert names == ["halt800", *(f"step{step}" for step in (800, 700, 600, 200))]
    step600 = shown.rows[4]
    assert (step600[1], step600[2], step600[5], step600[6]) == ("600", "3", "0.3", "0.7")
    assert step600[4].endswith("KB")
    assert [row[-1] for row in shown.rows[1:]] == [
        "newest, for recovery only",
        "",
        "",
        "best",
        "pinned",
    ]
    assert "5 checkpoints" in shown.text


def test_of_many_the_newest_fifty_are_shown_and_the_others_counted(checkpointer):
    """And the sizes of the others are not even asked for."""
    for number in range(60):
        checkpointer.save_checkpoint({"loss": 1 / (number + 1)}, name=str(number))
    shown = Reader(checkpointer._repr_html_())
    assert [row[0] for row in shown.rows[1:]] == [f"{n}" for n in range(59, 9, -1)]
    assert "60 checkpoints" in shown.text
    assert "and 10 more, older than these" in shown.text


def test_of_many_metrics_the_first_are_shown_and_the_others_named(checkpointer):
    """A table that no screen holds helps nobody."""
    checkpointer.save_checkpoint({f"m{n}": n for n in range(30)})
    shown = Reader(checkpointer._repr_html_())
    assert shown.rows[0][3:-1] == [f"m{n}" for n in range(8)]
    assert f"not shown: {', '.join(f'm{n}' for n in range(8, 20))}, …" in shown.text


def test_an_empty_and_a_missing_folder_say_so(checkpointer, tmp_path):
    """In place of a table."""
    for finder in (checkpointer, CheckpointFolder(tmp_path / "missing", access="read")):
        shown = Reader(finder._repr_html_())
        assert "no checkpoints yet" in shown.text
        assert shown.rows == []
    assert not (tmp_path / "missing").exists()


def test_unreadable_checkpoints_are_named_under_the_table(checkpointer):
    """With the reason, the first five."""
    checkpointer.save_checkpoint(name="good")
    for number in range(7):
        folder = checkpointer.checkpoints_dir / f"CKPT+bad{number}"
        folder.mkdir()
        (folder / "CKPT.yaml").write_text("[" * 5)
    shown = Reader(checkpointer._repr_html_())
    assert [row[0] for row in shown.rows[1:]] == ["good"]
    assert shown.text.count("can't be read: ") == 5
    assert "and 2 more can't be read" in shown.text


def test_a_card_shows_meta_files_sizes_and_lineage(checkpointer):
    """And what it was written with."""
    checkpointer.lineage = {"run": "1234", "resumed-from": "CKPT+x", "reason": None}
    meta = {"loss": 0.123456, "t": torch.ones(2, 2), "l": list(range(1000)), "end": math.nan}
    saved = checkpointer.save_checkpoint(meta, name="a")
    shown = Reader(saved._repr_html_())
    found = shown.pairs()
    assert "CKPT+a" in shown.text
    assert (found["loss"], found["end"], found["end-of-epoch"]) == ("0.1235", "nan", "yes")
    assert found["saved"].endswith("s ago)")
    assert found["t"] == "tensor([[1., 1.],         [1., 1.]])"
    assert found["l"] == "[0, 1, 2, 3, 4, 5, ...]"
    assert {"CKPT.yaml", "MANIFEST.yaml", "model.ckpt", "together"} <= set(found)
    assert (found["run"], found["resumed-from"]) == ("1234", "CKPT+x")
    assert "reason" not in found
    assert "written with python 3." in shown.text


def test_a_card_says_which_files_are_not_those_that_were_written(checkpointer):
    """By their presence and size; nothing is read in full."""
    checkpointer.add_recoverable("head", torch.nn.Linear(1, 1))
    saved = checkpointer.save_checkpoint()
    size = saved.paramfiles["model"].stat().st_size
    saved.paramfiles["model"].write_bytes(b"short")
    saved.paramfiles["head"].unlink()
    found = Reader(saved._repr_html_()).pairs()
    assert found["model.ckpt"] == f"5 B, but {size:,} bytes were written"
    assert found["head.ckpt"] == "missing"


def test_a_card_of_what_is_gone_or_broken_says_so(checkpointer, tmp_path):
    """Its meta is still known."""
    saved = checkpointer.save_checkpoint({"loss": 0.5})
    (saved.path / "MANIFEST.yaml").write_text("[")
    shown = Reader(saved._repr_html_())
    assert "can't be read: " in shown.text
    assert shown.pairs()["loss"] == "0.5"
    shutil.rmtree(saved.path)
    shown = Reader(saved._repr_html_())
    assert "is not there (any more): only its meta is known" in shown.text
    assert shown.pairs()["loss"] == "0.5"


def test_a_card_of_a_folder_of_speechbrain_needs_no_manifest(checkpointer):
    """They have none."""
    saved = checkpointer.save_checkpoint()
    forget_manifest(saved.path)
    found = Reader(saved._repr_html_()).pairs()
    assert "model.ckpt" in found
    assert "MANIFEST.yaml" not in found


MARKUP = "<img src=x onerror=alert(1)>\"'&<b>"


def test_names_and_meta_never_become_markup(checkpointer):
    """Wherever they stand."""
    folder = f"a{MARKUP}"
    checkpointer.lineage = {"run": MARKUP, MARKUP: "x"}
    checkpointer.add_recoverable(f"r{MARKUP}", torch.nn.Linear(1, 1))
    saved = checkpointer.save_checkpoint(
        {MARKUP: 1.0, "note": MARKUP, "esc": "\x1b[2J"}, name=folder
    )
    bad = checkpointer.checkpoints_dir / f"CKPT+{MARKUP}"
    bad.mkdir()
    (bad / "CKPT.yaml").write_text("[")
    checkpointer.recoverables["model"].bias.data += 1
    values = (
        *(saved, checkpointer, checkpointer.timeline(), SBCheckpoint(checkpointer.checkpoints_dir)),
        diff(saved, checkpointer.save_checkpoint({MARKUP: 2.0}, name=f"b{MARKUP}")),
        checkpointer.delete_checkpoints(dry_run=True),
    )
    for html in (value._repr_html_() for value in values):
        shown = Reader(html)
        assert shown.tags <= OURS
        assert MARKUP in shown.text
        assert "\x1b" not in html


def test_a_timeline_is_a_table_of_all_that_was_made(tmp_path):
    """Newest first, with what became of each, the rules, and where the run went on."""
    shown = Reader(small_run(tmp_path / "run").timeline()._repr_html_())
    assert shown.rows[0] == ["checkpoint", "state", "loss", "made", "removed", "why"]
    assert [row[0] for row in shown.rows[1:4]] == ["halt800", "step800", "step700"]
    gone = next(row for row in shown.rows if row[0] == "step500")
    assert gone[1] == "removed"
    assert gone[-1] == "not among the 2 best loss, older than the newest 1"
    assert "10 checkpoints were made, 5 are there" in shown.text
    assert "kept by Best(key='loss', n=2" in shown.text
    assert "resumed from halt400" in shown.text


def test_decisions_are_a_table_with_the_reasons(checkpointer):
    """Those of a dry run, and those that were carried out."""
    for name in "ab":
        checkpointer.save_checkpoint(name=name)
    for decisions in (
        checkpointer.delete_checkpoints(dry_run=True),
        checkpointer.delete_checkpoints(),
    ):
        shown = Reader(decisions._repr_html_())
        assert shown.rows[1:] == [
            ["stays", "b", "among the newest 1"],
            ["goes", "a", "older than the newest 1"],
        ]
        assert "1 of 2 checkpoints stay" in shown.text


def test_a_difference_is_tables_with_the_model_first(checkpointer):
    """Files, meta, and of the tensors those of the model before the others."""
    for name in ("aaa", "loops"):
        checkpointer.add_recoverable(name, torch.nn.Linear(1, 1))
    first = checkpointer.save_checkpoint({"loss": 0.5})
    for module in checkpointer.recoverables.values():
        module.bias.data += 1
    found = diff(first, checkpointer.save_checkpoint({"loss": 0.25}))
    shown = Reader(found._repr_html_())
    assert [row[0] for row in shown.rows[1:4]] == ["model", "aaa", "loops"]
    assert ["loss", "0.5", "0.25"] in shown.rows
    assert [row[:2] for row in shown.rows if len(row) == 5][1:] == [
        ["model", "bias"],
        ["aaa", "bias"],
    ]
    assert "different" in shown.text


def test_the_callback_is_the_table_of_its_folder(tmp_path):
    """Before a fit, too; and of a folder that nothing is known of yet."""
    small_run(tmp_path / "run")
    shown = Reader(SBCheckpoint(tmp_path / "run", min_key="loss")._repr_html_())
    assert [row[0] for row in shown.rows[1:3]] == ["halt800", "step800"]
    assert "SBCheckpoint, min_key='loss'" in shown.text
    assert "no checkpoints yet" in SBCheckpoint(tmp_path / "new")._repr_html_()


def test_nothing_raises_whatever_goes_wrong(checkpointer, monkeypatch):
    """What is wrong is said, and escaped."""

    def fail(*_, **__):
        raise RuntimeError("<b>no</b>")

    saved = checkpointer.save_checkpoint()
    monkeypatch.setattr("lightning_sbckpt._display.cards.folder_table", fail)
    monkeypatch.setattr("lightning_sbckpt._display.cards.checkpoint_card", fail)
    for value in (checkpointer, saved):
        html = value._repr_html_()
        assert "can&#x27;t be shown: RuntimeError: &lt;b&gt;no&lt;/b&gt;" in html


@pytest.mark.parametrize("unixtime", [None, "soon", math.nan, math.inf, -1e300, 10**400, True])
def test_a_checkpoint_with_a_time_that_cannot_be_is_shown(tmp_path, unixtime):
    """With what its meta says."""
    ckpt = Checkpoint(tmp_path, {"unixtime": unixtime, "loss": 0.5}, {})
    assert Reader(ckpt._repr_html_()).pairs()["loss"] == "0.5"


def test_three_thousand_are_shown_at_once(tmp_path):
    """Of those that are not shown no more is asked than their meta."""
    for number in range(3000):
        folder = tmp_path / f"CKPT+{number:04}"
        folder.mkdir()
        (folder / "CKPT.yaml").write_text(
            f"unixtime: {1.7e9 + number}\nend-of-epoch: true\nloss: 1.0\n"
        )
    finder = CheckpointFolder(tmp_path, access="read")
    finder.list_checkpoints()
    begin = time.process_time()
    assert "3,000 checkpoints" in finder._repr_html_()
    assert time.process_time() - begin < 1
