"""The report: the table of targets, then every group of figures, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import Section, Settings, Table, median
from benchmarks.plots import draw
from benchmarks.targets import Verdict, verdicts

_HEAD = """\
# What it costs

Written by `python -m benchmarks`; do not edit. Every figure was taken in one run, all subjects in
turn, round after round: a cell is the median of the rounds, in brackets the lowest and the highest,
then how many times the reference (the first row) it is, taken within each round. Times on another
machine will differ; the ratios are what is meant to be compared. "+ fsync": flushed to the disk as
part of the save, since that library does not do it itself.
"""


def write(
    sections: Sequence[Section], settings: Settings, environment: Mapping[str, str], path: Path
) -> list[Verdict]:
    """Write the report and its drawings, and return the table of targets."""
    tables = {name: table for section in sections for name, table in _named(section).items()}
    found = verdicts(tables, settings)
    parts = [_HEAD]
    if settings.quick:
        parts.append(
            "**This was a quick run** of few rounds and small states: it shows that everything "
            "works, and little more.\n"
        )
    parts += [
        "## The targets\n",
        f"The state has {settings.main_size:,} MB where no other size is named.\n",
        _grid(
            ("what", "target", "measured", ""),
            [(v.what, v.target, v.measured, v.mark) for v in found],
        ),
        "## Where\n",
        _grid(("", ""), environment.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    for section in sections:
        parts += _section(section, path)
    path.write_text("\n".join(parts).rstrip() + "\n")
    return found


def _named(section: Section) -> dict[str, Table]:
    # `live` and `fresh` are names within their section only.
    prefix = "load " if section.name == "load" else ""
    return {prefix + name: table for name, table in section.tables.items()}


def _section(section: Section, path: Path) -> list[str]:
    parts = [f"## {section.title}\n", f"{section.intro}\n"]
    for name, table in _named(section).items():
        if not table.cells:
            continue
        rounds = sorted({len(values) for values in table.cells.values()})
        counted = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        parts += [f"**{table.title}** ({counted} round{'s' if rounds[-1] > 1 else ''})\n"]
        parts += [_values(table)]
        parts += [f"{note}\n" for note in dict.fromkeys(table.notes)]
        drawing = draw(name, table, path.parent / "plots")
        if drawing is not None:
            parts.append(f"![{table.title}]({drawing.relative_to(path.parent).as_posix()})\n")
    if section.failures:
        parts.append("Left out:\n")
        parts += [f"- {name}: {reason}" for name, reason in section.failures.items()]
        parts.append("")
    return parts


def _values(table: Table) -> str:
    rows = table.rows()
    if table.reference in rows:
        rows.remove(table.reference)
        rows.insert(0, table.reference)
    columns = table.columns()
    lines = [
        (f"*{row}*" if row == table.reference else row, *(_cell(table, row, c) for c in columns))
        for row in rows
    ]
    return _grid(("", *columns), lines)


def _cell(table: Table, row: str, column: str) -> str:
    values = table.cells.get((row, column))
    if not values:
        return "-"
    unit, factor = _unit(table.unit, median(values))
    text = f"{_number(median(values) * factor)} {unit}"
    if len(values) > 1:
        low, high = (_number(each * factor) for each in (min(values), max(values)))
        text += f" [{low}, {high}]"
    ratios = table.ratio(row, column)
    if row != table.reference and ratios:
        text += f" **{_number(median(ratios))}x**"
    return text


def _unit(unit: str, value: float) -> tuple[str, float]:
    if unit == "s":
        return ("s", 1.0) if value >= 1 else ("ms", 1e3)
    if unit == "bytes":
        return "MB", 1e-6
    return "µs", 1.0


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
