"""A real terminal for the command, and what came on it."""

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

from _python import start as start_python

COMMAND = Path(sys.executable).with_name("lightning-sbckpt")
ROWS, COLUMNS = 30, 100
# The same, as arguments of a Python that has loaded it.
AS_MODULE = ("-m", "lightning_sbckpt.cli")
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
    """A process that believes it has a terminal of 100 x 30.

    Args:
        args: Of the command.
        columns: How wide the terminal is.
        out: The file that stdout is, in place of the terminal.
        program: What to call in place of the command: arguments of Python, or `COMMAND`, the real one.
        environment: Further variables.
    """

    def __init__(self, *args, columns=COLUMNS, out=None, program=AS_MODULE, **environment):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        arguments = [*map(str, (*program, *args))]
        environment = {**ENVIRONMENT, **environment}
        if program == (COMMAND,):
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", TAKE_TERMINAL, *arguments],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=environment,
                start_new_session=True,
            )
        else:
            files = (slave, slave if out is None else out.fileno(), slave)
            self.process = start_python(arguments, files, env=environment, terminal=True)
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
        # Not `select`, which can't wait for a file whose number is above 1023.
        waiting = select.poll()
        waiting.register(self._master, select.POLLIN)
        if not waiting.poll(1000 * seconds):
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


@contextlib.contextmanager
def terminals():
    """Give what starts the command in a terminal; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(*args, **settings):
            return stack.enter_context(contextlib.closing(Terminal(*args, **settings)))

        yield start
