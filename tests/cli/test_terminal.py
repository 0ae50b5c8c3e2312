"""The real command in a real terminal: what a person sees, and what keys do."""

from __future__ import annotations

import re
import subprocess

import pytest
from _python import python
from click.testing import CliRunner

from cli._terminal import AS_MODULE, COLOUR, COLUMNS, COMMAND, ENVIRONMENT, terminals
from lightning_sbckpt import Checkpointer
from lightning_sbckpt.cli import main
from lightning_sbckpt.retention import Newest


@pytest.fixture
def terminal():
    """Start the command in a terminal."""
    with terminals() as start:
        yield start


def piped(*args, **environment):
    done = python(*AS_MODULE, *args, env={**ENVIRONMENT, **environment})
    done.check_returncode()
    return done


class TestTable:
    """`ls` on a screen."""

    def test_it_fits_and_is_in_colour(self, run, terminal):
        """No line is wider than the screen, and no name is cut."""
        screen = terminal("ls", run, program=(COMMAND,))
        assert screen.finish() == 0
        lines = screen.text.splitlines()
        assert max(map(len, lines)) <= COLUMNS
        assert [line.split()[0] for line in lines if re.match(r"e\d ", line)] == ["e4", "e3", "e1"]
        assert COLOUR.search(screen.raw)

    @pytest.mark.parametrize("columns", [20, 40, 80])
    def test_on_a_narrow_screen_columns_go_and_that_is_said(self, columns, run, terminal):
        """The name, the marks and the metric that ranks are what stays longest."""
        for place in range(6):
            with Checkpointer(run) as checkpointer:
                checkpointer.save_checkpoint(
                    {"val_loss": 0.7, **{f"another_metric_{i}": 0.5 for i in range(5)}},
                    name=f"a-rather-long-name-{place}",
                )
        screen = terminal("ls", run, columns=columns)
        assert screen.finish() == 0
        name = "a-rather-long-name-5"
        assert max(map(len, screen.text.splitlines())) <= max(columns, len(name))
        assert name in screen.text
        assert "no room for: " in screen.text
        assert "another_metric_4" in screen.text.partition("no room for: ")[2].replace("\n", "")
        assert "goes: not among the 2 best val_loss" in " ".join(screen.text.split())
        if columns == 80:
            header = screen.text.splitlines()[0].split()
            assert header[:6] == ["name", "age", "epoch", "step", "val_loss", "another_metric_0"]

    def test_no_color_and_a_pipe_are_without_codes(self, run, terminal):
        """As https://no-color.org asks; and a pipe gets every column."""
        screen = terminal("ls", run, NO_COLOR="1")
        assert screen.finish() == 0
        assert "e4 " in screen.text
        assert "\x1b" not in screen.raw
        text = piped("ls", run).stdout
        assert "\x1b" not in text
        assert "next time" in text
        assert not any(line.endswith(" ") for line in text.splitlines())

    def test_an_error_is_one_line(self, run, terminal):
        """And the exit code of a wrong path."""
        screen = terminal("ls", run / "x", columns=1000)
        assert screen.finish() == 2
        assert len(screen.text.strip().splitlines()) == 1
        assert screen.text.startswith("Error: ")

    @pytest.mark.long
    def test_a_reader_that_has_seen_enough_is_no_error_worth_a_traceback(self, run):
        """`lightning-sbckpt ls run | head -1`."""
        done = subprocess.run(
            ["bash", "-c", f"'{COMMAND}' ls '{run}' | head -1"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("name")
        assert "Traceback" not in done.stderr


class TestWatch:
    """`watch`."""

    def test_a_terminal_shows_a_table_that_keeps_up_until_ctrl_c(self, run, terminal):
        """Ctrl+C is how it ends: exit code 0, and no traceback."""
        screen = terminal("watch", run, "--interval", "0.1")
        # A long name of the folder breaks the line.
        screen.read_until(lambda text: "3 checkpoints" in " ".join(text.split()) and "e4 " in text)
        with Checkpointer(run) as checkpointer:
            checkpointer.save_checkpoint({"val_loss": 0.1, "global_step": 7}, name="new")
            screen.read_until(lambda text: "saved   CKPT+new: step 7, val_loss 0.1" in text)
            checkpointer.apply_retention([Newest(1)])
        screen.read_until(
            lambda text: "1 checkpoint;" in " ".join(text.split()) and "removed CKPT+e4" in text
        )
        screen.press("\x03")
        assert screen.finish() == 0
        assert "Traceback" not in screen.text
        assert "Aborted" not in screen.text
        # The cursor, which a table that moves hides, is back.
        assert screen.raw.rfind("\x1b[?25h") > screen.raw.rfind("\x1b[?25l")

    @pytest.mark.long
    def test_a_pipe_gets_a_line_for_each_event(self, run):
        """With the reason for what is removed; SIGINT ends it with 0."""
        process = subprocess.Popen(
            [str(COMMAND), "watch", str(run), "--interval", "0.05"],
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == f"3 checkpoints in {run}\n"
        with Checkpointer(run) as checkpointer:
            checkpointer.save_checkpoint({"val_loss": 0.1, "global_step": 7}, name="new")
            assert process.stdout.readline() == "saved   CKPT+new: step 7, val_loss 0.1\n"
            checkpointer.apply_retention([Newest(3)])
        assert process.stdout.readline() == "removed CKPT+e1: older than the newest 3\n"
        process.send_signal(2)
        assert process.communicate()[0] == ""
        assert process.returncode == 0


class TestCompletion:
    """Completion in a shell."""

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_it_gives_the_names_of_the_commands(self, shell):
        """As the shell asks for them."""
        asked = {
            "_LIGHTNING_SBCKPT_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": "lightning-sbckpt ",
            # Fish gives the word itself where the others give its place.
            "COMP_CWORD": "" if shell == "fish" else "1",
        }
        said = CliRunner().invoke(main, env=asked, prog_name="lightning-sbckpt").stdout
        assert {"ls", "show", "best", "prune", "watch", "diff", "report"} <= set(
            re.split(r"[\n,\t]", said)
        )

    def test_options_are_completed_too(self):
        """Of the command that is being written."""
        asked = {
            "_LIGHTNING_SBCKPT_COMPLETE": "bash_complete",
            "COMP_WORDS": "lightning-sbckpt ls --so",
            "COMP_CWORD": "2",
        }
        assert piped(**asked).stdout == "plain,--sort\n"

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_script_is_printed(self, shell, call):
        """For the shell to read."""
        script = call("completion", shell).stdout
        assert f"_LIGHTNING_SBCKPT_COMPLETE={shell}_complete" in script

    @pytest.mark.long
    def test_bash_really_completes(self):
        """The function that the script defines gives what begins so."""
        code = (
            f'export PATH="{COMMAND.parent}:$PATH"\n'
            'eval "$(lightning-sbckpt completion bash)"\n'
            "COMP_WORDS=(lightning-sbckpt ver); COMP_CWORD=1\n"
            "_lightning_sbckpt_completion lightning-sbckpt\n"
            'echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "verify\n", done.stderr
