"""Tables on the terminal: as wide as it is, in colour where it has any and they are wanted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from lightning_sbckpt._display.wording import printable, short_name
from lightning_sbckpt._views.columns import (
    Column,
    ago,
    columns_of,
    metric_cells,
    metric_keys,
    place_cells,
)
from lightning_sbckpt._views.grid import ENDLESS, as_text, draw
from lightning_sbckpt._views.timeline import CheckpointHistory
from lightning_sbckpt.cli._common import echo
from lightning_sbckpt.cli._plan import in_short
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention import Decision

_MOST_METRICS = 6


@dataclass(frozen=True)
class Listing:
    """A table to show: columns, and a sentence and a style for each row.

    Attributes:
        columns: The columns.
        title: Stands above the sentences.
        remarks: The sentences.
        styles: Of rich.
        note: Stands below the table.
    """

    columns: Sequence[Column]
    title: str = ""
    remarks: Sequence[str] | None = None
    styles: Sequence[str] | None = None
    note: str = ""

    def drawn(self, width: int) -> RenderableType:
        """Return what rich prints."""
        return draw(
            self.columns,
            width,
            remarks=self.remarks,
            styles=self.styles,
            title=self.title,
            note=self.note,
        )

    def show(self) -> None:
        """Print it: on a terminal in its width and colours, and whole to a file or a pipe."""
        console = make_console()
        width = console.width if console.is_terminal else ENDLESS
        if console.is_terminal and not console.no_color and console.encoding.startswith("utf"):
            console.width = ENDLESS
            console.print(self.drawn(width))
        else:
            text = as_text(
                self.columns, width, remarks=self.remarks, title=self.title, note=self.note
            )
            echo(text.rstrip("\n"))


def make_console() -> Console:
    """Return a console for stdout; rich looks at NO_COLOR and at whether it is a terminal."""
    return Console(markup=False, emoji=False, highlight=False)


def listing_of(
    checkpoints: Sequence[Checkpoint],
    *,
    metrics: Sequence[str],
    marks: Mapping[Path, Sequence[str]],
    decisions: Mapping[Path, Decision],
    note: str = "",
) -> Listing:
    """Return checkpoints as a table, with what the rules say of them if there are any."""
    styles = []
    for ckpt in checkpoints:
        decision = decisions.get(ckpt.path)
        goes = decision is not None and not decision.keep
        best = "best" in marks.get(ckpt.path, ())
        styles.append("dim" if goes else "bold green" if best else "")
    columns = columns_of(
        checkpoints, metrics=metrics, marks=marks, now=time.time(), end_of_epoch=False
    )
    if not decisions:
        return Listing(columns, styles=styles, note=note)
    said = [
        printable(in_short(decisions[ckpt.path])) if ckpt.path in decisions else ""
        for ckpt in checkpoints
    ]
    return Listing(columns, "next time", said, styles, note)


def listing_of_gone(lives: Sequence[CheckpointHistory], *, now: float) -> Listing:
    """Return checkpoints that are gone as a table."""
    records = [Checkpoint(Path(life.name), dict(life.meta), {}) for life in lives]
    gone = [ago(now - life.removed) if life.removed else "unknown" for life in lives]
    columns = [
        Column("name", [short_name(life.name) for life in lives], 0, right=False),
        Column("removed", gone, 1),
        *place_cells(records),
        *metric_cells(records, metric_keys(records)[:_MOST_METRICS]),
    ]
    reasons = [printable(life.reason or "gone, and nobody noted why") for life in lives]
    return Listing([each for each in columns if any(each.cells)], "why", reasons)
