"""What a report says: a timeline and sizes in, texts and numbers to sort by out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sbckpt._display.wording import (
    say_duration,
    say_number,
    say_size,
    say_text,
    say_when,
)
from lightning_sbckpt._views.bars import Chart, chart
from lightning_sbckpt._views.timeline import CheckpointHistory, State, Timeline
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention import parse_rule, plan_retention

_STATES = {"there": "kept", "removed": "removed", "gone": "gone", "unreadable": "unreadable"}
# More columns than anybody reads.
_METRICS = 12
_LONGEST_REASON = 300

Sizes = Mapping[str, Mapping[Hashable, int]]  # of each checkpoint that is there, by its name


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by, if it is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    state: str
    marks: Sequence[str]
    cells: Sequence[Cell]
    why: str


@dataclass(frozen=True)
class Page:
    """All that the template is given."""

    title: str
    where: str
    facts: Sequence[tuple[str, str]]
    problems: Sequence[tuple[str, str]]
    columns: Sequence[str]
    lines: Sequence[Line]
    chart: Chart | None
    runs: Sequence[Sequence[str]]
    resumes: Sequence[tuple[str, str, str]]
    averages: Sequence[tuple[str, str]]
    rules: Sequence[tuple[str, str]]
    plotted: Sequence[str]
    has_history: bool


def make_page(
    timeline: Timeline,
    *,
    title: str,
    where: str,
    keys: Sequence[str],
    modes: Mapping[str, Literal["min", "max"]],
    sizes: Sizes,
    damage: Mapping[str, Sequence[str]],
) -> Page:
    """Return what the page of a folder says.

    Args:
        timeline: What happened.
        title: The name of the folder.
        where: The folder.
        keys: The metrics that are drawn.
        modes: For a metric whether the lowest or the highest is best.
        sizes: What each checkpoint that is there takes on the disk, see `checkpoint_bytes`.
        damage: What is wrong with some of them.
    """
    axis, _ = timeline.places()
    shared = Counter(file for files in sizes.values() for file in files)
    own = {name: _own(files, shared) for name, files in sizes.items()}
    has_shared = any(count > 1 for count in shared.values())
    reasons = _reasons_to_stay(timeline, sizes)
    best: dict[int, list[str]] = {}
    for key, mode in modes.items():
        if (found := timeline.best(key, mode)) is not None:
            best.setdefault(id(found), []).append(f"best {key}")
    has_epochs = any(life.number("epoch") is not None for life in timeline.lives)
    places = list(dict.fromkeys([axis or "epoch", "epoch"])) if has_epochs else [axis] * bool(axis)
    wanted = dict.fromkeys([*keys, *timeline.metrics()])
    metrics = [key for key in wanted if key not in places][:_METRICS]
    there = [life for life in timeline.lives if life.checkpoint is not None]
    newest = there[-1] if there else None
    lines = []
    for number, life in enumerate(timeline.lives, start=1):
        marks = list(best.get(id(life), []))
        marks += ["newest"] if life is newest else []
        marks += ["pinned"] if life.pinned else []
        marks += ["for recovery only"] if life.ephemeral else []
        named = life.name if life.checkpoint is not None else ""
        cells = [
            Cell(str(number), number),
            *(_number_cell(life, key) for key in places),
            *(_number_cell(life, key) for key in metrics),
            Cell(say_when(life.made), life.made),
            _size_cell(life.size),
            _size_cell(sum(sizes[named].values()) if named in sizes else None),
            *([_size_cell(own.get(named))] if has_shared else []),
            Cell("" if life.seconds is None else say_duration(life.seconds), life.seconds),
        ]
        state = "damaged" if named in damage else _STATES[life.state]
        why = life.reason or "; ".join(damage.get(named, ())) or reasons.get(named, "")
        if life.removed is not None:
            why = f"{say_when(life.removed)}: {why}"
        elif life.state == "gone":
            why = "it is not there, and nothing was noted of its removal"
        lines.append(Line(say_text(life.name), state, marks, cells, say_text(why, _LONGEST_REASON)))
    columns = [
        "save",
        *places,
        *metrics,
        "saved",
        "written",
        "on disk",
        *["own"] * has_shared,
        "took",
    ]
    return Page(
        title=say_text(title),
        where=say_text(where, 1000),
        facts=_facts(timeline, sizes, own, damage),
        problems=_problems(timeline, damage),
        columns=[say_text(column, 60) for column in columns],
        lines=lines,
        chart=chart(timeline),
        runs=_runs(timeline),
        resumes=_resumes(timeline),
        averages=[
            (say_text(life.name), say_text(", ".join(life.averaged_from), 1000))
            for life in timeline.lives
            if life.averaged_from
        ],
        rules=[
            ("always" if not math.isfinite(moment) else say_when(moment), say_text(text, 500))
            for moment, texts in timeline.rule_changes[-20:]
            for text in texts or ["none: everything stays"]
        ],
        plotted=[say_text(key, 60) for key in keys],
        has_history=timeline.has_history,
    )


def _facts(
    timeline: Timeline,
    sizes: Sizes,
    own: Mapping[str, int],
    damage: Mapping[str, Sequence[str]],
) -> list[tuple[str, str]]:
    lives = timeline.lives
    states = Counter(life.state for life in lives)
    facts = [
        ("made", f"{len(lives):,}"),
        ("kept", f"{states['there']:,}"),
        ("removed", f"{states['removed']:,}"),
    ]
    others: tuple[State, ...] = ("gone", "unreadable")
    facts += [(state, f"{states[state]:,}") for state in others if states[state]]
    if damage:
        facts.append(("damaged", f"{len(damage):,}"))
    times = len(timeline.resumes)
    facts.append(("resumed", {0: "never", 1: "once"}.get(times, f"{times:,} times")))
    total = sum({file: size for files in sizes.values() for file, size in files.items()}.values())
    facts.append(("on the disk", say_size(total)))
    if total > sum(own.values()):
        facts.append(("of it shared", say_size(total - sum(own.values()))))
    moments = [moment for life in lives for moment in (life.made, life.removed) if moment]
    if moments:
        facts.append(("first saved", say_when(min(moments))))
        facts.append(("last change", say_when(max(moments))))
    return facts


def _problems(timeline: Timeline, damage: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    unreadable = [
        (say_text(life.name), say_text(life.reason, 500))
        for life in timeline.lives
        if life.state == "unreadable"
    ]
    damaged = [(say_text(name), say_text("; ".join(found), 500)) for name, found in damage.items()]
    return unreadable + damaged


def _runs(timeline: Timeline) -> list[tuple[str, str, str, str, str]]:
    by_run: dict[str, list[CheckpointHistory]] = {}
    for life in timeline.lives:
        by_run.setdefault(life.run, []).append(life)
    return [
        (
            say_text(run) or "without an id",
            f"{len(lives):,}",
            f"{sum(life.state == 'there' for life in lives):,}",
            say_when(lives[0].made),
            say_when(lives[-1].made),
        )
        for run, lives in by_run.items()
    ]


def _resumes(timeline: Timeline) -> list[tuple[str, str, str]]:
    found = []
    for resume in timeline.resumes:
        step = resume.step()
        where = "" if step is None else f"{step[0].replace('_', ' ')} {step[1]:,.10g}"
        found.append((say_text(resume.source), where, say_text(resume.first.name)))
    return found


def _reasons_to_stay(timeline: Timeline, sizes: Sizes) -> dict[str, str]:
    """Return what the rules that were followed last say of what is there."""
    rules = []
    for text in timeline.rules:
        try:
            rules.append(parse_rule(text))
        except SelectionError:
            return {}  # What one of them says is not known, and so not what all of them say.
    there = [life.checkpoint for life in timeline.lives if life.checkpoint is not None]

    def bytes_of(checkpoint: Checkpoint) -> Mapping[Hashable, int]:
        return sizes.get(checkpoint.path.name, {})

    try:
        plan = plan_retention(there, rules, bytes_of=bytes_of)
    except SelectionError:
        return {}
    return {
        decision.checkpoint.path.name: ("" if decision.keep else "goes next: ") + decision.reason
        for decision in plan
    }


def _own(files: Mapping[Hashable, int], shared: Counter[Hashable]) -> int:
    return sum(size for file, size in files.items() if shared[file] == 1)


def _number_cell(life: CheckpointHistory, key: str) -> Cell:
    value = life.number(key)
    if value is None:
        return Cell("")
    whole = value.is_integer() and abs(value) < 1e15
    return Cell(f"{value:,.0f}" if whole else say_number(value), value)


def _size_cell(size: int | None) -> Cell:
    return Cell("") if size is None else Cell(say_size(size), size)
