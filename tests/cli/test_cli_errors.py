"""What the command says and exits with when it can't do what was asked."""

from __future__ import annotations

import json
import os

import pytest
from _python import python

from lightning_sbckpt import cli
from lightning_sbckpt.cli import _common, _folders, listing
from lightning_sbckpt.errors import DamagedCheckpointError, FolderInUseError, SelectionError

LOOKING = ("ls", "best", "watch", "prune")


def line_of(result):
    """Return what stands on stderr, which must be one line."""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", LOOKING)
class TestWrongPaths:
    """Every command that takes a folder says in one line what is there instead."""

    def test_a_missing_folder_names_one_that_is_spelt_alike(self, command, run, call):
        """Exit code 2."""
        line = line_of(call(command, run.parent / "runn", code=2))
        assert line.startswith(f"Error: {run.parent / 'runn'} is not there")
        assert f"did you mean {run}?" in line

    def test_a_file_is_no_folder(self, command, tmp_path, call):
        """Exit code 2."""
        (tmp_path / "file").write_text("x")
        assert "file is no folder" in line_of(call(command, tmp_path / "file", code=2))

    def test_a_folder_of_other_things_names_the_runs_in_it(self, command, run, call):
        """Who names the folder above means one of those."""
        line = line_of(call(command, run.parent, code=2))
        assert "there are no checkpoints in" in line
        assert f"did you mean {run}?" in line

    def test_one_checkpoint_is_not_the_folder_of_all(self, command, run, call):
        """The line says which folder is meant, and how to look at one."""
        line = line_of(call(command, run / "CKPT+e1", code=2))
        assert f"is one checkpoint: expected the folder of all of them, {run}" in line
        assert "lightning-sbckpt show" in line

    @pytest.mark.parametrize("url", ["nosuch://bucket/run", "memory://empty/run"])
    def test_a_url_with_no_run_is_said_as_it_was_given(
        self, command, url, call, tmp_path, monkeypatch
    ):
        """And nothing is made for it on this machine."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert url in line_of(call(command, url, code=2))
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("ls", 0, "no checkpoints in"),
        ("best", 1, "there are no checkpoints in"),
        ("prune", 2, "no rules were given"),
    ],
)
@pytest.mark.parametrize("leftover", [None, "HISTORY.jsonl", ".lock"])
def test_a_run_that_has_saved_nothing_yet_is_empty_and_no_wrong_path(
    command, code, said, leftover, tmp_path, call
):
    """So is an empty folder."""
    if leftover is not None:
        (tmp_path / leftover).touch()
    assert said in call(command, tmp_path, code=code).output


def test_a_folder_that_may_not_be_read_exits_with_3(run, call, monkeypatch):
    """The disk refuses, which is nobody's wrong usage."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_folders.os, "listdir", refuse)
    assert f"{run} can't be read: Permission denied" in line_of(call("ls", run, code=3))


def test_what_the_system_refuses_is_one_line_too(run, call, monkeypatch):
    """Without the number that it has for the system."""

    def refuse(checkpoint):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(listing, "size_of", refuse)
    assert line_of(call("ls", run, "--json", code=3)) == "Error: /some/file: Permission denied"


def test_a_history_that_cannot_be_read_is_said_and_nothing_rests_on_it(run, call):
    """Neither the list, nor what prune refuses."""
    (run / "HISTORY.jsonl").unlink()
    (run / "HISTORY.jsonl").mkdir()
    result = call("ls", run)
    assert "e4 " in result.stdout
    assert "HISTORY.jsonl can't be read, so what happened before is not known" in line_of(result)
    assert "the run noted none" in call("prune", run, code=2).stderr


@pytest.mark.parametrize(
    "args",
    [
        ["best", "--min-key", "val_los"],
        ["ls", "--sort", "val_los"],
        ["ls", "--key", "val_los"],
        ["ls", "--where", "val_los > 1"],
        ["ls", "--min-key", "val_los"],
        ["prune", "--keep", 'Best("val_los")'],
        ["prune", "--keep", 'Pareto("val_los", "acc")'],
        ["prune", "--keep", 'Where("val_los > 1")'],
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant_and_all_there_are(args, run, call):
    """Wherever a key is given."""
    line = line_of(call(args[0], run, *args[1:], code=2))
    assert "val_los" in line
    assert "id you mean val_loss?" in line
    assert all(key in line for key in ("acc", "epoch", "global_step", "unixtime"))


def test_an_unknown_checkpoint_names_one_that_is_spelt_alike(run, call):
    """By its name."""
    line = line_of(call("show", run / "CKPT+e5", code=2))
    assert "there is no checkpoint CKPT+e5" in line
    assert "did you mean CKPT+e" in line


def test_an_unreadable_checkpoint_is_one_line_and_the_answer_no(run, call):
    """For show it is all there is to say."""
    (run / "CKPT+e1" / "CKPT.yaml").write_text("!!python/object:os.system {}")
    assert "can't be read" in line_of(call("show", run / "CKPT+e1", code=1))


def test_names_never_steer_the_terminal_nor_break_the_line(tmp_path, call):
    """A path may hold any character."""
    line = line_of(call("ls", tmp_path / "\x1b[2J\nx\u202e", code=2))
    assert "\\x1b[2J\\nx\\u202e is not there" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DamagedCheckpointError("x"), 1),
        (SelectionError("x"), 2),
        (FileNotFoundError("x"), 2),
        (FolderInUseError("x"), 3),
        (PermissionError("x"), 3),
        (OSError("x"), 3),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error, code):
    """As --help says."""
    assert _common.code_of(error) == code


class TestHelp:
    """`--help`."""

    def test_it_lists_every_command_and_the_exit_codes(self, call):
        """In words that fit on a line or two."""
        text = call("--help").stdout
        assert all(f"  {name} " in text for name in cli._COMMANDS)
        assert "0 all right; 1 the answer is no" in " ".join(text.split())

    def test_every_command_that_is_listed_is_there(self, call):
        """And says what it does."""
        for name in ("ls", "show", "best", "watch", "prune", "pin", "unpin", "annotate"):
            assert call(name, "--help").stdout.startswith(f"Usage: main {name}")

    def test_an_unknown_command_is_wrong_usage(self, call):
        """As click has it."""
        assert "No such command 'sl'" in call("sl", code=2).stderr


def test_json_has_no_words_for_nan_and_still_is_json(capsys):
    """They are texts; so are dates and what else has none."""
    _common.print_json({"a": float("nan"), "b": [float("inf")], 3: {"c": object}})
    found = json.loads(capsys.readouterr().out)
    assert found["a"] == "nan"
    assert found["b"] == ["inf"]
    assert set(found) == {"a", "b", "3"}


@pytest.mark.long
def test_what_the_encoding_lacks_is_spelled_out():
    """A terminal of another age still gets a table."""
    code = "from lightning_sbckpt.cli._common import echo; echo('─ ü …')"
    done = python("-c", code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout == "- \\xfc ...\n"
