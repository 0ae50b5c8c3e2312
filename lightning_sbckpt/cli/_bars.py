"""Bars on the terminal for what takes longer than a second, and nothing for what does not.

A command has one `Bars`, with a row for each thing under way: its own work, and what comes from a store
or goes to one. They are on stderr, go away when all is done, and are not there with `--json` or where
stderr is no terminal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._io.progress import Progress, Told, listening

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bars", "bars_of_command", "hush", "progress_bar"]

PATIENCE = 1.0

# The columns that a bar and its figures need, and those that a name has at least.
_FIGURES = 45
_SHORTEST = 8


class _Row:
    """One thing under way."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.task: TaskID | None = None


class Bars:
    """The bars of one command.

    Args:
        patience: How many seconds the things under way take together before there is a bar.

    Attributes:
        quiet: Whether there is none, however long it takes.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.quiet = False
        self._left = patience
        self._since = 0.0
        self._rows: list[_Row] = []
        self._shown: RichProgress | None = None
        self._timer: threading.Timer | None = None
        # Rows are told of by several threads, and a timer shows them.
        self._lock = threading.RLock()

    @contextmanager
    def work(self, what: str) -> Iterator[Progress]:
        """Give what to tell the bytes done and all bytes to; inside the block it is under way."""
        with self._row(what, None) as row:

            def tell(done: int, total: int) -> None:
                with self._lock:
                    row.done, row.total = done, total
                    self._draw(row)

            yield tell

    @contextmanager
    def transfer(self, what: str, total: int | None) -> Iterator[Told]:
        """Give what to tell bytes more to; a listener for `listening`."""
        with self._row(what, total) as row:

            def told(more: int) -> None:
                with self._lock:
                    row.done += more
                    if row.total is not None:
                        row.total = max(row.total, row.done)
                    self._draw(row)

            yield told

    @contextmanager
    def _row(self, what: str, total: int | None) -> Iterator[_Row]:
        row = _Row(printable(what), total)
        with self._lock:
            if not self._rows:
                self._begin()
            self._rows.append(row)
            self._draw(row)
        try:
            yield row
        finally:
            with self._lock:
                self._rows.remove(row)
                if not self._rows:
                    self._end()
                elif self._shown is not None and row.task is not None:
                    self._shown.remove_task(row.task)

    def _begin(self) -> None:
        self._since = time.monotonic()
        if self._left > 0 and not self.quiet:
            # A store that does not answer tells no bytes, and that is when one wants to know.
            self._timer = threading.Timer(self._left, self._look)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self._left -= time.monotonic() - self._since
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._shown is not None:
            # What the command prints comes to where the bars were.
            self._shown.stop()
            self._shown = None

    def _look(self) -> None:
        """Show what is under way if it has taken long enough."""
        with self._lock:
            for row in self._rows:
                self._draw(row)

    def _draw(self, row: _Row) -> None:
        if self.quiet or time.monotonic() - self._since < self._left:
            return
        if self._shown is None:
            self._shown = _new_bars()
            if self._shown is None:
                self.quiet = True
                return
            for each in self._rows:
                each.task = self._shown.add_task(each.what, total=each.total, completed=each.done)
            self._shown.start()
        elif row.task is None:
            row.task = self._shown.add_task(row.what, total=row.total, completed=row.done)
        else:
            self._shown.update(row.task, completed=row.done, total=row.total)


def _new_bars() -> RichProgress | None:
    """Return what draws rows on the terminal, or None if there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    console = Console(stderr=True)
    if not console.is_terminal:
        return None

    # Each thing has one line, and its figures come before its name.
    longest = max(_SHORTEST, console.width - _FIGURES)
    name = Column(no_wrap=True, overflow="ellipsis", max_width=longest)
    return RichProgress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
        # A script that takes what the command prints must get all of it.
        redirect_stdout=False,
    )


@contextmanager
def bars_of_command() -> Iterator[Bars]:
    """Give the bars of a command, which show what it brings from stores and puts there."""
    bars = Bars()
    with listening(bars.transfer):
        yield bars


def progress_bar(stack: ExitStack, what: str, patience: float = PATIENCE) -> Progress:
    """Return what shows a bar on the terminal as soon as it has taken too long.

    Args:
        stack: The work has ended when this is closed.
        what: The work in a word, as in "verifying".
        patience: See `Bars`; of a command, its bars have their own.
    """
    return stack.enter_context((_current() or Bars(patience)).work(what))


def hush() -> None:
    """Let the command that is running have no bars from now on."""
    bars = _current()
    if bars is not None:
        bars.quiet = True


def _current() -> Bars | None:
    context = click.get_current_context(silent=True)
    return None if context is None else context.find_object(Bars)
