"""The figures as drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import Table, median
from benchmarks.peer import OURS

_SCALE = {"s": (1e3, "milliseconds"), "bytes": (1e-6, "megabytes"), "us": (1.0, "microseconds")}
# Ours are blue, the reference is black, the peers are told apart by marker and shade.
_BLUES = ("#1f5fbf", "#4a90e2", "#8cc0f5")
_MARKERS = "sD^vPX*"
# One more than there are markers: no two peers of a drawing have both in common.
_SHADES = (
    "#b5533c",
    "#c98b2b",
    "#5d8a4a",
    "#7a5c99",
    "#777777",
    "#3f8f8f",
    "#a0527a",
    "#2f7d32",
)


def draw(name: str, table: Table, folder: Path) -> Path | None:
    """Draw a table; None if there is nothing in it that a drawing would show."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("svg")
    # Text stays text, and two runs give files that differ only in their numbers.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9})
    import matplotlib.pyplot as plt

    if not table.cells or table.columns_are == "":
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    if table.columns_are == "loop":
        _bars(axes, table)
    else:
        _lines(axes, table)
    _, unit = _SCALE[table.unit]
    axes.set_title(table.title.replace("`", ""), loc="left", fontsize=10)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


def _style(table: Table) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    blues = iter(_BLUES * 2)
    greys = 0
    for row in table.rows():
        if row.startswith(OURS):
            styles[row] = {"color": next(blues), "marker": "o", "linewidth": 2.2, "zorder": 3}
        elif row == table.reference:
            styles[row] = {"color": "black", "marker": "", "linestyle": "--", "linewidth": 1.4}
        else:
            marker = _MARKERS[greys % len(_MARKERS)]
            color = _SHADES[greys % len(_SHADES)]
            styles[row] = {"color": color, "marker": marker, "linewidth": 1.1, "markersize": 4}
            greys += 1
    return styles


def _lines(axes: Any, table: Table) -> None:
    scale, _ = _SCALE[table.unit]
    for row, style in _style(table).items():
        points = [
            (_number(column), median(table.cells[row, column]) * scale)
            for column in table.columns()
            if (row, column) in table.cells
        ]
        # What takes no memory at all has no place on a logarithmic axis.
        points = [(x, max(y, 0.05)) for x, y in points]
        axes.plot(*zip(*points, strict=True), label=row, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    columns = table.columns()
    axes.set_xticks([_number(column) for column in columns], columns)
    axes.minorticks_off()
    axes.set_xlabel("size of the state" if table.columns_are == "size" else "checkpoints")


def _bars(axes: Any, table: Table) -> None:
    scale, _ = _SCALE[table.unit]
    rows = table.rows()
    columns = table.columns()
    width = 0.85 / len(rows)
    for number, (row, style) in enumerate(_style(table).items()):
        found = [column for column in columns if (row, column) in table.cells]
        places = [columns.index(column) + (number - len(rows) / 2) * width for column in found]
        heights = [median(table.cells[row, column]) * scale for column in found]
        axes.bar(places, heights, width * 0.9, label=row, color=style["color"])
    axes.set_xticks(range(len(columns)), columns)


def _number(column: str) -> float:
    return float(column.split(maxsplit=1)[0].replace(",", ""))
