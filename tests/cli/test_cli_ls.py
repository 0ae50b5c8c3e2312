"""`ls`: what there is, what goes next, what is gone."""

from __future__ import annotations

import json
import shutil

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.history import History
from lightning_sbckpt._views import columns
from lightning_sbckpt.retention import Newest


def rows(result):
    """Return the names in the order of the table."""
    lines = [*result.stdout.splitlines()[2:], "best:"]
    return [line.split()[0] for line in lines[: [each[:5] for each in lines].index("best:")]]


def row(result, name):
    """Return the line of one checkpoint."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
    return line


def save(root, name, recoverables=None, **meta):
    with Checkpointer(root, recoverables or {}) as checkpointer:
        return checkpointer.save_checkpoint(meta, name=name)


class TestTable:
    """The table."""

    def test_the_newest_is_first_with_all_of_note(self, run, call):
        """Epoch, step, age, size, metrics, marks."""
        result = call("ls", run)
        assert rows(result) == ["e4", "e3", "e1"]
        header = result.stdout.splitlines()[0].split()
        assert header == ["name", "age", "epoch", "step", "size", "val_loss", "acc", "next", "time"]
        words = row(result, "e3").split()
        assert words[2:4] == ["s", "3"] or words[1:3] == ["now", "3"]
        assert {"300", "0.4", "0.6", "best", "KB"} <= set(words)
        assert "newest" in row(result, "e4")
        assert result.stdout.splitlines()[-1] == "best: e3, lowest val_loss: 0.4"

    def test_a_name_in_it_is_one_that_every_command_takes(self, run, call):
        """Without what all names begin with, or with it."""
        (name, *_) = rows(call("ls", run))
        shown = [call("show", run / each).stdout for each in (name, f"CKPT+{name}")]
        assert shown[0] == shown[1]

    def test_it_says_what_the_rules_of_the_run_make_of_each(self, run, call):
        """In few words: what keeps it, and what will not."""
        assert row(call("ls", run), "e3").endswith("stays: 2 best val_loss")
        assert row(call("ls", run), "e4").endswith("stays: newest 1")
        save(run, "e5", val_loss=0.3)
        result = call("ls", run)
        assert row(result, "e1").endswith(
            "goes: not among the 2 best val_loss, older than the newest 1"
        )
        assert "goes" in row(result, "e4")

    def test_other_rules_may_be_given(self, run, call):
        """As text, or by a key."""
        result = call("ls", run, "--keep", "Newest(2)", "--keep", 'Best("acc", 1, mode="min")')
        assert row(result, "e3").endswith("stays: newest 2")
        assert row(result, "e4").endswith("best, newest  stays: newest 2, 1 best acc")
        assert row(result, "e1").endswith("goes: older than the newest 2, not among the 1 best acc")
        result = call("ls", run, "--max-key", "val_loss")
        assert row(result, "e4").endswith("best, newest  stays: 1 best val_loss, newest 1")

    def test_without_rules_there_is_no_such_column(self, run, call):
        """Nothing is known, so nothing is said."""
        (run / "HISTORY.jsonl").unlink()
        result = call("ls", run)
        assert "next time" not in result.stdout
        assert "best" not in result.stdout

    def test_a_rule_that_cannot_be_read_back_is_said(self, run, call):
        """Without it the others would say that too much goes."""
        History(run).kept_by([Newest(1), object()])
        result = call("ls", run)
        assert "goes" not in result.stdout
        assert "what stays is not known: the rule <object object" in result.stdout

    def test_a_rule_that_is_none_is_refused(self, run, call):
        """With those there are."""
        assert "there is no rule Bets" in call("ls", run, "--keep", "Bets(1)", code=2).stderr

    def test_pinned_and_ephemeral_ones_are_marked(self, run, call):
        """Beside the best and the newest."""
        call("pin", run / "CKPT+e3")
        save(run, "e5", ephemeral=True)
        assert "best, pinned" in row(call("ls", run), "e3")
        assert "newest, ephemeral" in row(call("ls", run), "e5")

    def test_an_unreadable_one_is_a_line_below(self, run, call):
        """The others are listed as ever."""
        (run / "CKPT+e1" / "CKPT.yaml").write_text("a: [")
        result = call("ls", run)
        assert rows(result) == ["e4", "e3"]
        assert "left out an unreadable checkpoint" in result.stdout.splitlines()[-1]
        assert result.stderr == ""

    def test_odd_names_and_meta_are_shown_as_they_are(self, run, call):
        """Markup means itself; what would steer the terminal is spelled out."""
        save(run, "[red]x[bold]:smile:\u202e", **{"[link]k": 0.5, "val_loss": "\x1b[2J"})
        text = call("ls", run).stdout
        assert "[red]x[bold]:smile:\\u202e" in text
        assert "[link]k" in text
        assert "\x1b" not in text
        assert "\u202e" not in text

    def test_bytes_shared_with_another_are_told_from_its_own(self, run, call, model):
        """What is linked stays when this one goes."""
        first = save(run, "first", {"model": model})
        second = save(run, "second", {"model": model})
        linked = second.path / "big.bin"
        (first.path / "big.bin").write_bytes(b"x" * 1_000_000)
        linked.hardlink_to(first.path / "big.bin")
        assert " MB, " in row(call("ls", run), "second")
        assert " KB own" in row(call("ls", run), "second")
        assert "own" not in row(call("ls", run), "e3")


class TestChoosing:
    """Which are shown, and in which order."""

    @pytest.mark.parametrize(
        ("args", "names"),
        [
            (["--where", "val_loss < 0.55"], "e3 e1"),
            (["--where", "epoch in [1, 4] and not acc > 0.45"], "e4"),
            (["--limit", 2], "e4 e3"),
            (["--sort", "val_loss"], "e3 e1 e4"),
            (["--sort", "val_loss", "--desc"], "e4 e1 e3"),
            (["--sort", "age"], "e4 e3 e1"),
            (["--sort", "age", "--desc"], "e1 e3 e4"),
            (["--sort", "name"], "e1 e3 e4"),
            (["--sort", "size", "--desc"], "e3 e4 e1"),
            (["--sort", "val_loss", "--limit", 1], "e3"),
        ],
    )
    def test_they_are_filtered_sorted_and_counted(self, args, names, run, call):
        """The limit comes last."""
        (run / "CKPT+e3" / "more.bin").write_bytes(bytes(100_000))
        (run / "CKPT+e4" / "more.bin").write_bytes(bytes(50_000))
        result = call("ls", run, *args)
        assert rows(result) == names.split()
        shown = len(names.split())
        assert (f"{shown} of 3 checkpoints" in result.stdout) == (shown < 3)

    def test_those_without_the_key_come_last_either_way(self, run, call):
        """NaN, too; texts sort after numbers."""
        save(run, "none")
        save(run, "nan", val_loss=float("nan"))
        save(run, "text", val_loss="soon")
        last = {"none", "nan"}
        for order in ([], ["--desc"]):
            found = rows(call("ls", run, "--sort", "val_loss", *order))[:6]
            assert set(found[-2:]) == last
        assert found[0] == "text"

    def test_only_the_keys_asked_for_are_shown(self, run, call):
        """In that order."""
        header = call("ls", run, "-k", "acc").stdout.splitlines()[0]
        assert "acc" in header
        assert "val_loss" not in header

    def test_nothing_that_fits_is_no_error(self, run, call):
        """The answer is an empty list."""
        assert "none of 3 checkpoints" in call("ls", run, "--where", "epoch > 9").stdout
        found = json.loads(call("ls", run, "--where", "epoch > 9", "--json").stdout)
        assert found["checkpoints"] == []

    def test_the_working_folder_is_the_default(self, run, call, monkeypatch):
        """As with the other ls."""
        monkeypatch.chdir(run)
        assert rows(call("ls")) == ["e4", "e3", "e1"]


class TestRemoved:
    """`--removed`."""

    def test_those_that_are_gone_are_listed_with_the_reason(self, run, call):
        """The last that went comes first."""
        result = call("ls", run, "--removed")
        assert rows(result) == ["e2", "e0"]
        assert row(result, "e0").endswith("not among the 2 best val_loss, older than the newest 1")
        assert "0.9" in row(result, "e0")

    def test_one_that_somebody_took_away_is_listed_too(self, run, call):
        """Nobody noted why."""
        shutil.rmtree(run / "CKPT+e3")
        assert row(call("ls", run, "--removed"), "e3").endswith("gone, and nobody noted why")

    def test_without_a_history_nothing_is_known(self, run, call):
        """And that is said."""
        (run / "HISTORY.jsonl").unlink()
        assert "is not known: it has no HISTORY.jsonl" in call("ls", run, "--removed").stdout

    def test_as_json_they_have_their_meta(self, run, call):
        """And times as numbers."""
        e2, e0 = json.loads(call("ls", run, "--removed", "--json").stdout)
        assert (e2["name"], e0["name"]) == ("CKPT+e2", "CKPT+e0")
        assert e0["meta"]["val_loss"] == 0.9
        assert e0["removed"] > e0["saved"]
        assert "older than the newest 1" in e0["reason"]


class TestJson:
    """`--json`."""

    def test_it_has_everything_of_each_checkpoint(self, run, call):
        """With the plan, and what could not be read."""
        (run / "CKPT+e1" / "CKPT.yaml").write_text("a: [")
        found = json.loads(call("ls", run, "--json").stdout)
        assert found["folder"] == str(run)
        e4, e3 = found["checkpoints"]
        assert e3["path"] == str(run / "CKPT+e3")
        assert (e3["step"], e3["epoch"], e3["marks"]) == (300, 3, ["best"])
        assert e3["meta"]["val_loss"] == 0.4
        assert e3["stays"] is True
        assert e3["bytes"] == e3["own_bytes"] > 0
        assert e4["unixtime"] > e3["unixtime"]
        assert "CKPT+e1" in found["problems"][0]


def test_only_those_that_are_shown_are_measured(run, call, monkeypatch):
    """Of thousands the others cost no look at their files."""
    measured, real = [], columns.files_of

    def files_of(folder):
        measured.append(folder.name)
        return real(folder)

    monkeypatch.setattr(columns, "files_of", files_of)
    call("ls", run, "--limit", 1)
    assert measured == ["CKPT+e4"]


def test_looking_changes_nothing(run, call, tree_bytes):
    """No index, no lock, no folder."""
    for place in range(70):
        shutil.copytree(run / "CKPT+e1", run / f"CKPT+copy{place}")
    before = tree_bytes(run)
    for args in (["ls"], ["ls", "--removed"], ["best", "--min-key", "acc"], ["prune"], ["watch"]):
        call(args[0], run, *args[1:], *(["--once"] if args[0] == "watch" else []))
    call("show", run / "best")
    assert tree_bytes(run) == before
