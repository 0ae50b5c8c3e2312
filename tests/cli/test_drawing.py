"""`plot` and `report` write one file and print its path, or say in one line why not."""

from __future__ import annotations

import json
import os
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "name", "begin"),
    [
        ("plot", "a.png", b"\x89PNG"),
        ("plot", "a.svg", b"<?xml"),
        ("report", "a.html", b"<!doctype html>"),
    ],
)
def test_the_path_of_what_was_written_is_printed(run, call, tmp_path, command, name, begin):
    """Alone, for scripts."""
    out = tmp_path / name
    result = call(command, run, "-o", out)
    assert (result.stdout, result.stderr) == (f"{out}\n", "")
    assert out.read_bytes().startswith(begin)


@pytest.mark.parametrize(("command", "name"), [("plot", "plot.png"), ("report", "report.html")])
def test_by_default_it_comes_into_the_folder(run, call, command, name, tree_bytes):
    """And nothing else there changes."""
    before = tree_bytes(run)
    result = call(command, run)
    assert result.stdout == f"{run / name}\n"
    after = tree_bytes(run)
    assert set(after) - set(before) == {name}
    assert {key: after[key] for key in before} == before


def test_the_path_can_be_had_as_json(run, call, tmp_path):
    """As everything else."""
    out = tmp_path / "a.svg"
    assert json.loads(call("plot", run, "-o", out, "--json").stdout) == {"written": str(out)}


def test_several_keys_and_the_best_can_be_asked_for(run, call, tmp_path):
    """Each key has a panel, in the order given."""
    out = tmp_path / "a.svg"
    call("plot", run, "-k", "acc", "-k", "val_loss", "--max-key", "acc", "-o", out)
    svg = out.read_text()
    assert svg.index(">acc<") < svg.index(">val_loss<")
    assert "(highest is best)" in svg and "(lowest is best)" in svg
    html = tmp_path / "a.html"
    call("report", run, "-k", "acc", "-o", html)
    assert "<h2>acc</h2>" in html.read_text()


def test_every_byte_is_read_when_asked(run, call, tmp_path):
    """One that was changed is found then, and only then."""
    file = run / "CKPT+e4" / "model.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    out = tmp_path / "a.html"
    said = "model.ckpt has other bytes than were written"
    call("report", run, "-o", out)
    assert said not in out.read_text()
    call("report", run, "-o", out, "--verify")
    assert said in out.read_text()


@pytest.mark.sample(6)
@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-k", "val_los"], 2, "'val_los' can't be drawn"),
        (["-k", "val_los"], 2, "Did you mean 'val_loss'?"),
        (["--min-key", "acc", "--max-key", "acc"], 2, "they may contradict each other"),
        (["-o", "nowhere/a.png"], 3, "can't be written: No such file or directory"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run, call, tmp_path, monkeypatch, command, arguments, code, said
):
    """With the exit code that fits, and no file."""
    monkeypatch.chdir(tmp_path)
    result = call(command, run, *arguments, code=code)
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_wrong_or_empty_folder_is_one_line(call, tmp_path, command):
    """A wrong one is wrong usage, an empty one an answer."""
    result = call(command, tmp_path / "missing", code=2)
    assert "missing is not there" in result.stderr
    (tmp_path / "empty").mkdir()
    result = call(command, tmp_path / "empty", code=1)
    assert "there are no checkpoints in" in result.stderr
    assert "yet: nothing was drawn" in result.stderr
    assert not (tmp_path / "empty" / "plot.png").exists()


def test_another_ending_is_refused(run, call, tmp_path):
    """With those that are understood."""
    result = call("plot", run, "-o", tmp_path / "a.gif", code=2)
    assert "expected '.png' or '.svg'" in result.stderr


def test_an_unreadable_checkpoint_is_a_warning(run, call, tmp_path):
    """What can be read is drawn."""
    (run / "CKPT+e4" / "CKPT.yaml").write_text("[")
    result = call("plot", run, "-o", tmp_path / "a.png")
    assert result.stderr.startswith("Warning: left out an unreadable checkpoint: ")
    assert (tmp_path / "a.png").exists()


def test_without_matplotlib_the_extra_is_named(run, call, tmp_path, monkeypatch):
    """A report does without the picture."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("plot", run, "-o", tmp_path / "a.png", code=2)
    assert "pip install 'lightning-sbckpt[plot]'" in result.stderr
    call("report", run, "-o", tmp_path / "a.html")
