"""What all commands have in common: exit codes, text that is safe to print, JSON.

Exit codes, for scripts:

    0  all right
    1  the answer is no: damage was found, nothing matches, two checkpoints differ
    2  wrong usage, or a path that is not what it should be
    3  the disk or the store refused, or another process is using the folder

An error is one line on stderr.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import click

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt.cli._bars import hush
from lightning_sbckpt.errors import (
    DamagedCheckpointError,
    RemoteError,
    RemovalError,
    SaveError,
    SBCheckpointError,
    brief,
)

_LONGEST_NUMBER = 10_000  # In bits.

__all__ = [
    "EXIT_CODES",
    "NO",
    "REFUSED",
    "WRONG",
    "Failure",
    "code_of",
    "collected_warnings",
    "counted",
    "echo",
    "json_option",
    "log_to_terminal",
    "message_of",
    "print_json",
    "printable",
]

NO = 1
WRONG = 2
REFUSED = 3

EXIT_CODES = (
    "Exit codes: 0 all right; 1 the answer is no (damage, nothing matches, a difference); 2 wrong "
    "usage or a wrong path; 3 the disk, the store or another process refused."
)

logger = logging.getLogger("lightning_sbckpt")

F = TypeVar("F", bound=Callable[..., object])


class Failure(click.ClickException):
    """What ends a command: one line on stderr, and an exit code."""

    def __init__(self, message: str, code: int = WRONG) -> None:
        super().__init__(message)
        # Of the class in click, and read from the instance.
        self.exit_code = code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        echo(f"Error: {printable(self.format_message())}", err=True)


def code_of(error: Exception) -> int:
    """Return the exit code for an exception of this package or of the system."""
    if isinstance(error, DamagedCheckpointError):
        return NO
    if isinstance(error, (SaveError, RemovalError, RemoteError)):
        return REFUSED
    wrong_path = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return WRONG if isinstance(error, (SBCheckpointError, *wrong_path)) else REFUSED


def echo(text: str = "", *, err: bool = False) -> None:
    """Print lines; what the terminal's encoding lacks and what would steer it is spelled out."""
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = "\n".join(map(printable, text.split("\n")))
    if not encoding.lower().startswith("utf"):
        safe = safe.replace("─", "-").replace("…", "...")
    # To the stream as it is now: a bar that is shown puts a line above itself.
    click.echo(safe.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def message_of(error: Exception) -> str:
    """Return what an exception says; one of the system without its number."""
    if isinstance(error, OSError) and not isinstance(error, SBCheckpointError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def counted(number: int, of: int | None = None) -> str:
    """Return how many checkpoints there are, in words.

    Example:
        >>> counted(1), counted(2), counted(1, of=3)
        ('1 checkpoint', '2 checkpoints', '1 of 3 checkpoints')
    """
    noun = "checkpoint" if (number if of is None else of) == 1 else "checkpoints"
    return f"{number} {noun}" if of is None else f"{number} of {of} {noun}"


class _ToTerminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        echo(f"{record.levelname.capitalize()}: {printable(record.getMessage())}", err=True)


class _Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(printable(record.getMessage()))


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Print the warnings of the library on stderr, inside the block."""
    handler = _ToTerminal(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings of the library instead of printing them, inside the block."""
    handler, before, propagated = _Collecting(), logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield handler.messages
    finally:
        logger.handlers, logger.propagate = before, propagated


def json_option(command: F) -> F:
    """Give a command the option `--json`, as the argument `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, callback=_hushed, help="Print JSON, for scripts."
    )(command)


def _hushed(_context: click.Context, _option: click.Parameter, value: bool) -> bool:
    if value:
        hush()
    return value


def print_json(value: object) -> None:
    """Print a value as JSON; NaN and infinity, for which it has no word, as texts."""
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        # Python refuses to write out numbers of thousands of digits.
        return value if value.bit_length() < _LONGEST_NUMBER else brief(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else brief(key): _plain(item) for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (dt.date, dt.datetime)):
        return value.isoformat()
    if hasattr(value, "tolist"):  # A tensor in the meta.
        return _plain(value.tolist())
    return str(value)
