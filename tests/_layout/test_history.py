"""What has happened in a folder can be read afterwards, and nothing ever fails because of it."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.history import HISTORY_NAME, read_history
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.retention import (
    Best,
    Budget,
    EveryNEpochs,
    EveryNSteps,
    Important,
    Milestones,
    Newest,
    Pareto,
    TimeSpaced,
    Where,
    parse_rule,
)

RULES = [
    Newest(3),
    Best("val_loss", 2, mode="max"),
    EveryNSteps(100, key="step"),
    EveryNEpochs(2, first_epoch=1),
    Milestones([1, 20]),
    TimeSpaced("10 min", n=3),
    Where("val_acc > 0.9 and stage == 'full'"),
    Pareto("val_loss", "latency", modes=["min", "max"]),
    Budget("50 GB"),
]


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(2, 2)})


def events(checkpointer):
    return read_history(checkpointer.checkpoints_dir)


def test_every_save_is_noted_with_its_metrics(checkpointer):
    """Name, metrics, bytes and seconds; what is long or nested stays in the checkpoint alone."""
    saved = checkpointer.save_checkpoint(
        {"loss": 0.5, "epoch": 3, "stage": "full", "table": [1, 2], "long": "x" * 1000}, name="a"
    )
    (event,) = events(checkpointer)
    assert event["event"] == "saved"
    assert event["name"] == saved.path.name
    assert event["meta"] == {
        "unixtime": saved.meta["unixtime"],
        "end-of-epoch": True,
        "loss": 0.5,
        "epoch": 3,
        "stage": "full",
    }
    assert event["bytes"] == saved.paramfiles["model"].stat().st_size
    assert 0 < event["seconds"] < 60


@pytest.mark.parametrize("mode", ["async", "overlap"])
def test_a_save_in_the_background_is_noted_when_it_is_there(tmp_path, mode):
    """Not when it is handed over."""
    with Checkpointer(tmp_path, {"model": torch.nn.Linear(2, 2)}, save_mode=mode) as checkpointer:
        checkpointer.save_checkpoint(name="a")
        checkpointer.wait()
        assert [event["name"] for event in events(checkpointer)] == ["CKPT+a"]


def test_every_removal_is_noted_with_its_reason(checkpointer):
    """And the rules that were followed, once as long as they stay the same."""
    for loss in (0.5, 0.25, 0.75):
        checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
    found = events(checkpointer)
    names = [event["name"] for event in found if event["event"] == "saved"]
    assert [event["event"] for event in found] == ["saved", "rules", "saved", "removed", "saved"]
    assert found[3]["name"] == names[0]
    assert found[3]["reason"] == "not among the 1 best loss, older than the newest 1"
    assert [parse_rule(text) for text in found[1]["rules"]] == [Best("loss"), Newest(1)]


@pytest.mark.parametrize(
    ("predicate", "noted"),
    [(None, None), ("loss > 0.3", "loss > 0.3"), (lambda ckpt: True, "a function")],
)
def test_which_checkpoints_may_go_at_all_is_noted(checkpointer, predicate, noted):
    """An expression as its text; a function has none."""
    checkpointer.save_checkpoint({"loss": 0.5})
    checkpointer.delete_checkpoints(ckpt_predicate=predicate)
    assert events(checkpointer)[-1]["predicate"] == noted


def test_a_list_of_names_is_noted(checkpointer):
    """Such as those that an average is of; other lists are not."""
    checkpointer.lineage["averaged-from"] = ["CKPT+a", "CKPT+b"]
    checkpointer.lineage["table"] = [[1]]
    checkpointer.save_checkpoint()
    assert events(checkpointer)[0]["lineage"] == {"averaged-from": ["CKPT+a", "CKPT+b"]}


def test_what_the_run_went_on_from_is_noted(checkpointer):
    """The first save after a checkpoint was loaded says which, here and in its manifest."""
    first = checkpointer.save_checkpoint(name="first")
    checkpointer.recover_if_possible()
    checkpointer.save_checkpoint(name="second")
    assert [event["lineage"] for event in events(checkpointer)] == [
        {},
        {"resumed-from": first.path.name},
    ]


def test_a_dry_run_and_a_reader_note_nothing(checkpointer):
    """Since nothing happened."""
    checkpointer.save_checkpoint()
    checkpointer.delete_checkpoints(num_to_keep=0, dry_run=True)
    reader = Checkpointer(checkpointer.checkpoints_dir, access="read")
    reader.delete_checkpoints(num_to_keep=1)
    assert len(events(checkpointer)) == 1


def test_values_that_json_has_no_word_for_can_be_read_by_any_tool(checkpointer):
    """NaN and infinity become text."""
    checkpointer.save_checkpoint({"loss": math.nan, "best": -math.inf})
    text = (checkpointer.checkpoints_dir / HISTORY_NAME).read_text()

    def refuse(word):
        raise AssertionError(word)

    meta = json.loads(text, parse_constant=refuse)["meta"]
    assert (meta["loss"], meta["best"]) == ("nan", "-inf")


def test_a_line_cut_off_by_a_crash_costs_that_line_only(checkpointer):
    """What comes after it begins on a new line."""
    checkpointer.save_checkpoint(name="a")
    path = checkpointer.checkpoints_dir / HISTORY_NAME
    path.write_bytes(path.read_bytes()[:-20])
    again = Checkpointer(checkpointer.checkpoints_dir, {"model": torch.nn.Linear(2, 2)})
    again.save_checkpoint(name="b")
    again.save_checkpoint(name="c")
    assert [event["name"] for event in events(again)] == ["CKPT+b", "CKPT+c"]


def test_lines_that_mean_nothing_are_passed_over(checkpointer):
    """Other people's words, other shapes, bytes that are no text, nesting without end."""
    checkpointer.save_checkpoint(name="a")
    with (checkpointer.checkpoints_dir / HISTORY_NAME).open("ab") as stream:
        stream.write(b"hello\n[1]\n\xff\xfe\n\n" + b"[" * 100_000 + b"\n")
        stream.write(b'{"event": "saved", "time": "now", "name": "x", "meta": {}, "lineage": {}}\n')
        stream.write(b'{"event": "saved", "time": 1, "name": 3, "meta": {}, "lineage": {}}\n')
        stream.write(b'{"event": "removed", "time": 1, "name": "x"}\n')
        stream.write(b'{"event": "exploded", "time": 1}\n')
        stream.write(b'{"event": "removed", "time": 1, "name": "x", "reason": "y"}\n')
    assert [event["name"] for event in events(checkpointer)] == ["CKPT+a", "x"]


def test_a_folder_without_history_has_none(tmp_path):
    """As those that SpeechBrain wrote."""
    assert read_history(tmp_path) == []
    assert read_history(tmp_path / "missing") == []


def test_saving_goes_on_where_nothing_can_be_noted(checkpointer, caplog):
    """A folder stands in its place: one warning, and every checkpoint is there."""
    (checkpointer.checkpoints_dir / HISTORY_NAME).mkdir()
    for name in "ab":
        checkpointer.save_checkpoint(name=name)
    assert len(checkpointer.list_checkpoints()) == 2
    warnings = [record.message for record in caplog.records if HISTORY_NAME in record.message]
    assert len(warnings) == 1
    assert "is not written, so what happened is not known later: Is a directory" in warnings[0]


def test_it_never_writes_through_a_link(checkpointer, tmp_path):
    """It could lead to any file."""
    (tmp_path / "other").touch()
    (checkpointer.checkpoints_dir / HISTORY_NAME).symlink_to(tmp_path / "other")
    checkpointer.save_checkpoint()
    assert (tmp_path / "other").read_bytes() == b""


def test_it_is_not_written_through_a_hard_link(checkpointer, tmp_path, caplog):
    """The file elsewhere would grow with every save: `cp -al` makes such copies of a folder."""
    (tmp_path / "thesis.txt").write_text("years of work\n")
    (checkpointer.checkpoints_dir / HISTORY_NAME).hardlink_to(tmp_path / "thesis.txt")
    checkpointer.save_checkpoint()
    assert (tmp_path / "thesis.txt").read_text() == "years of work\n"
    assert "has a second name elsewhere" in caplog.text


def test_a_pipe_in_its_place_is_not_waited_for(checkpointer):
    """Neither when it is written nor when it is read."""
    path = checkpointer.checkpoints_dir / HISTORY_NAME
    os.mkfifo(path)
    checkpointer.save_checkpoint()
    assert stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(OSError, match="it is a named pipe, expected a regular file"):
        events(checkpointer)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_can_be_read_from_what_it_prints(rule):
    """So that the rules of a run can be asked later, by somebody else."""
    assert parse_rule(repr(rule)) == rule
    assert parse_rule(f"  {rule!r}\n") == rule


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected plain values"),
        ("Newest", "expected the name of a rule and its values in parentheses"),
        ("Worst(3)", "there is no rule Worst"),
        ("Newest(*[3])", "expected plain values"),
        ("Newest(**{'n': 3})", r"\*\* has no meaning here"),
        ("Best(__import__('os').system('x'))", "expected plain values"),
        ("os.system('x')", "expected the name of a rule"),
        ("Newest(number=3)", "unexpected keyword argument 'number'"),
        (repr(Important(len, 2)), "expected plain values"),
        ("(" * 5000 + ")" * 5000, "expected plain values"),
    ],
)
def test_a_text_that_is_no_rule_is_refused(text, reason):
    """With the rules that there are; nothing of it is executed."""
    with pytest.raises(SelectionError, match=reason) as caught:
        parse_rule(text)
    assert "there are Best, Budget, EveryNEpochs" in str(caught.value)


def test_values_that_a_rule_refuses_are_refused_in_its_own_words():
    """As in Python."""
    with pytest.raises(SelectionError, match="mode='least', expected 'min' or 'max'"):
        parse_rule("Best('loss', mode='least')")
