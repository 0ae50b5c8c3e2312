"""A table drawn by rich in a width: what there is no room for is left out, and said."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich.box
import rich.cells
import rich.console
import rich.constrain
import rich.padding
import rich.table
import rich.text

from lightning_sbckpt._views.columns import Column

if TYPE_CHECKING:
    from rich.console import RenderableType

# No terminal is so wide: nothing is left out, and no line is broken.
ENDLESS = 10_000
_GAP = 2
_INDENT = 4
# So many columns that are left out are named.
_NAMED = 40
# A remark in fewer characters a line is a tower of words: it goes below its row.
_NARROW = 30


def draw(
    columns: Sequence[Column],
    width: int,
    *,
    remarks: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
) -> RenderableType:
    """Return what rich prints.

    Args:
        columns: At least one, of the same length.
        width: In characters.
        remarks: A sentence for each row: beside it where there is room, else below.
        styles: Of rich, one for each row.
        title: Stands above the remarks.
        note: Stands below the table.
    """
    dropped: set[int] = set()
    taken = -_GAP
    for each in sorted(columns, key=lambda column: column.rank):
        if each.rank and taken + _GAP + _wide(each) > width:
            dropped.add(id(each))
        else:
            taken += _GAP + _wide(each)
    shown = [column for column in columns if id(column) not in dropped]
    parts = _rows(shown, width, remarks, styles or [""] * len(columns[0].cells), title)
    if titles := [column.title for column in columns if column.title and id(column) in dropped]:
        left_out = ", ".join(titles[:_NAMED])
        if len(titles) > _NAMED:
            left_out += f" and {len(titles) - _NAMED} more"
        parts.append(_within(width, rich.text.Text(f"no room for: {left_out}", style="dim")))
    if note:
        parts.append(_within(width, rich.text.Text(note)))
    return rich.console.Group(*parts)


def as_text(
    columns: Sequence[Column],
    width: int = ENDLESS,
    *,
    remarks: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
) -> str:
    """Return what `draw` makes as lines of text."""
    out = io.StringIO()
    console = rich.console.Console(
        file=out,
        width=ENDLESS,
        no_color=True,
        # The text is returned, in a notebook and in a terminal alike.
        force_jupyter=False,
        force_terminal=False,
    )
    console.print(draw(columns, width, remarks=remarks, title=title, note=note))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


def _rows(
    shown: Sequence[Column],
    width: int,
    remarks: Sequence[str] | None,
    styles: Sequence[str],
    title: str,
) -> list[RenderableType]:
    room = width - _width(shown) - _GAP
    longest = max(map(rich.cells.cell_len, [title, *(remarks or ())]))
    if remarks is None or longest <= room or room >= _NARROW:
        grid = _grid(shown)
        if remarks is not None:
            grid.add_column(_plain(title), width=min(longest, room), overflow="fold")
        for place, style in enumerate(styles):
            cells = [column.cells[place] for column in shown]
            cells += [] if remarks is None else [remarks[place]]
            grid.add_row(*map(_plain, cells), style=style)
        return [grid]
    parts: list[RenderableType] = [_grid(shown)]
    for place, style in enumerate(styles):
        row = _grid(shown, header=False)
        row.add_row(*(_plain(column.cells[place]) for column in shown), style=style)
        below = rich.text.Text(remarks[place], style=style or "dim")
        parts += [
            row,
            rich.padding.Padding(_within(width - _INDENT, below), (0, 0, 0, _INDENT), expand=False),
        ]
    return parts


def _within(width: int, text: rich.text.Text) -> RenderableType:
    # Whoever prints may have taken more room than there is, so that no name is cut.
    return rich.constrain.Constrain(text, width)


def _grid(shown: Sequence[Column], *, header: bool = True) -> rich.table.Table:
    grid = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_header=header,
        header_style="bold",
    )
    for column in shown:
        # With a width of its own nothing is cut, whatever the width of all.
        grid.add_column(
            _plain(column.title),
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="crop",
            min_width=_wide(column),
        )
    return grid


def _plain(text: str) -> rich.text.Text:
    # Text, and no markup: brackets and colons in names mean themselves.
    return rich.text.Text(text)


def _wide(column: Column) -> int:
    return max(map(rich.cells.cell_len, [column.title, *column.cells]))


def _width(columns: Sequence[Column]) -> int:
    return sum(map(_wide, columns)) + _GAP * (len(columns) - 1)
