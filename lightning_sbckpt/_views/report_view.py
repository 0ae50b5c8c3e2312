"""What a report says: a timeline and sizes in, texts and numbers to sort by out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sbckpt._display.wording import (
    say_duration,
    say_number,
    say_size,
    say_text,
    say_when,
    short_name,
)
from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt._views.bars import Chart, chart
from lightning_sbckpt._views.timeline import CheckpointHistory, State, Timeline
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention import parse_rule, plan_retention

_STATES = {"there": "kept", "removed": "removed", "gone": "gone", "unreadable": "unreadable"}
# More columns than anybody reads.
_METRICS = 12
_LONGEST_REASON = 300
_HIGHLIGHTS = 3
_HYPERPARAMETERS = 40

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
    more: Sequence[Cell]


@dataclass(frozen=True)
class Highlight:
    """A checkpoint that the page opens with, in words.

    Attributes:
        title: What it is, as in "lowest val_loss".
        value: The value of the metric.
        saved: Where in the run, and when.
        path: To copy.
        hyperparameters: What it was trained with.
    """

    title: str
    value: str
    saved: str
    path: str
    hyperparameters: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """All that the template is given."""

    title: str
    where: str
    highlights: Sequence[Highlight]
    facts: Sequence[tuple[str, str]]
    problems: Sequence[tuple[str, str]]
    columns: Sequence[str]
    more_columns: Sequence[str]
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
    hyperparameters_of: Callable[[Checkpoint], Mapping[str, object]],
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
        hyperparameters_of: Returns what a checkpoint was trained with.
    """
    axis, _ = timeline.places()
    shared = Counter(file for files in sizes.values() for file in files)
    own = {name: _own(files, shared) for name, files in sizes.items()}
    has_shared = any(count > 1 for count in shared.values())
    reasons = _reasons_to_stay(timeline, sizes)
    best = {
        key: found
        for key in dict.fromkeys([*keys, *modes])
        if key in modes and (found := timeline.best(key, modes[key])) is not None
    }
    has_epochs = any(life.number("epoch") is not None for life in timeline.lives)
    places = list(dict.fromkeys([axis or "epoch", "epoch"])) if has_epochs else [axis] * bool(axis)
    wanted = dict.fromkeys([*keys, *timeline.metrics()])
    metrics = [key for key in wanted if key not in places][:_METRICS]
    there = [life for life in timeline.lives if life.checkpoint is not None]
    newest = there[-1] if there else None
    lines = []
    for number, life in enumerate(timeline.lives, start=1):
        marks = [f"best {key}" for key, found in best.items() if found is life]
        marks += ["newest"] if life is newest else []
        marks += ["pinned"] if life.pinned else []
        marks += ["for recovery only"] if life.ephemeral else []
        named = life.name if life.checkpoint is not None else ""
        cells = [*(_number_cell(life, key) for key in (*metrics, *places))]
        more = [
            Cell(say_when(life.made), life.made),
            _size_cell(sum(sizes[named].values()) if named in sizes else None),
            *([_size_cell(own.get(named))] if has_shared else []),
            _size_cell(life.size),
            Cell("" if life.seconds is None else say_duration(life.seconds), life.seconds),
            Cell(str(number), number),
        ]
        state = "damaged" if named in damage else _STATES[life.state]
        why = life.reason or "; ".join(damage.get(named, ())) or reasons.get(named, "")
        if life.removed is not None:
            why = f"{say_when(life.removed)}: {why}"
        elif life.state == "gone":
            why = "it is not there, and nothing was noted of its removal"
        name, reason = say_text(short_name(life.name)), say_text(why, _LONGEST_REASON)
        lines.append(Line(name, state, marks, cells, reason, more))
    highlights = [
        _highlight(
            life,
            f"{'lowest' if modes[key] == 'min' else 'highest'} {key}",
            say_number(life.number(key)),
            places,
            hyperparameters_of,
        )
        for key, life in best.items()
    ] or [_highlight(life, "newest", "", places, hyperparameters_of) for life in there[-1:]]
    return Page(
        title=say_text(title),
        where=say_text(where, 1000),
        highlights=highlights[:_HIGHLIGHTS],
        facts=_facts(timeline, sizes, own, damage),
        problems=_problems(timeline, damage),
        columns=[say_text(column, 60) for column in (*metrics, *places)],
        more_columns=["saved", "on disk", *["own"] * has_shared, "written", "took", "save"],
        lines=lines[::-1],
        chart=chart(timeline),
        runs=_runs(timeline),
        resumes=_resumes(timeline),
        averages=[
            (
                say_text(short_name(life.name)),
                say_text(", ".join(map(short_name, life.averaged_from)), 1000),
            )
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


def _highlight(
    life: CheckpointHistory,
    title: str,
    value: str,
    places: Sequence[str],
    hyperparameters_of: Callable[[Checkpoint], Mapping[str, object]],
) -> Highlight:
    assert life.checkpoint is not None
    where = [f"{key.replace('_', ' ')} {_number_cell(life, key).text}" for key in places]
    given = hyperparameters_of(life.checkpoint)
    told = [(say_text(key, 60), say_text(say_number(each), 100)) for key, each in given.items()]
    return Highlight(
        title=say_text(title, 100),
        value=value,
        saved=", ".join([*where, f"saved {say_when(life.made)}"]),
        path=say_text(display_path(life.checkpoint.path.absolute()), 1000),
        hyperparameters=told[:_HYPERPARAMETERS],
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
        source, first = (say_text(short_name(each)) for each in (resume.source, resume.first.name))
        found.append((source, where, first))
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
