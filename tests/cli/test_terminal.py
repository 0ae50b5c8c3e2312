"""The real command in a real terminal: what a person sees, and what keys do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.cli import main
from lightning_sbckpt.retention import Newest

COMMAND = Path(sys.executable).with_name("lightning-sbckpt")
ROWS, COLUMNS = 30, 100
# A loaded machine imports torch in ten seconds and more.
PATIENCE = 120.0

SETTINGS = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in SETTINGS},
    "TERM": "xterm-256color",
    "PYTHONUTF8": "1",
}
CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

# So that Ctrl+C reaches the command as it would from a keyboard.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A process that believes it has a terminal of 100 x 30."""

    def __init__(self, *args, columns=COLUMNS, **environment):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", TAKE_TERMINAL, str(COMMAND), *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, **environment},
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""

    def press(self, keys):
        os.write(self._master, keys.encode())

    def read_until(self, done):
        """Read until something is true of what came; what it waits for in vain fails the test."""
        end = time.monotonic() + PATIENCE
        while not done(self.text):
            assert time.monotonic() < end, f"still waiting; so far: {self.text!r}"
            if not self._read(0.1) and self.process.poll() is not None:
                assert done(self.text), f"it ended before; it said: {self.text!r}"
                return

    def finish(self):
        """Read to the end and return the exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None or self._read(0.1):
            assert time.monotonic() < end, f"it does not end; so far: {self.text!r}"
            self._read(0.1)
        return self.process.returncode

    def _read(self, seconds):
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # The other end is closed.
            data = os.read(self._master, 65536)
            self.raw += data.decode("utf-8", "replace")
            return bool(data)
        return False

    @property
    def text(self):
        """What was written, without codes."""
        return CODE.sub("", self.raw).replace("\r\n", "\n")

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal():
    """Start the command in a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*args, **settings):
            return stack.enter_context(contextlib.closing(Terminal(*args, **settings)))

        yield start


def piped(*args, **environment):
    return subprocess.run(
        [str(COMMAND), *map(str, args)],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


class TestTable:
    """`ls` on a screen."""

    def test_it_fits_and_is_in_colour(self, run, terminal):
        """No line is wider than the screen, and no name is cut."""
        screen = terminal("ls", run)
        assert screen.finish() == 0
        lines = screen.text.splitlines()
        assert max(map(len, lines)) <= COLUMNS
        assert [line.split()[0] for line in lines if line.startswith("CKPT")] == [
            "CKPT+e4",
            "CKPT+e3",
            "CKPT+e1",
        ]
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
        name = "CKPT+a-rather-long-name-5"
        assert max(map(len, screen.text.splitlines())) <= max(columns, len(name))
        assert "CKPT+a-rather-long-name-5" in screen.text
        assert "no room for: " in screen.text
        assert "another_metric_4" in screen.text.partition("no room for: ")[2].replace("\n", "")
        assert "goes: not among the 2 best val_loss" in " ".join(screen.text.split())
        if columns == 80:
            assert "val_loss" in screen.text.splitlines()[0]

    def test_no_color_and_a_pipe_are_without_codes(self, run, terminal):
        """As https://no-color.org asks; and a pipe gets every column."""
        screen = terminal("ls", run, NO_COLOR="1")
        assert screen.finish() == 0
        assert "CKPT+e4" in screen.text
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
        screen.read_until(
            lambda text: "3 checkpoints" in " ".join(text.split()) and "CKPT+e4" in text
        )
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
