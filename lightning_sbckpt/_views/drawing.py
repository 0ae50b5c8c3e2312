"""Draws a timeline with matplotlib; imported only when something is drawn.

Nothing of `matplotlib.pyplot` is used, so no window opens and no figure of a user is touched.
Texts come from folders and meta: none is read as a formula.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_sbckpt._display.wording import say_text
from lightning_sbckpt._views.timeline import CheckpointHistory, Resume, Timeline

# Told apart by people who see colours differently, after Okabe and Ito.
KEPT, _BEST, _PINNED, _RESUME, _TROUBLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
_QUIET = "#8a8f98"
_INK = "#24292f"

_PLACE_NAMES = {"global_step": "global step", "step": "step", "epoch": "epoch", "": "save"}
_NOTED_RESUMES = 6
_WIDTH, _PANEL, _LINE = 9.0, 2.9, 0.2


class Picture(Figure):
    """A figure that a notebook shows by itself, also one in which matplotlib was never set up."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")


def draw(
    timeline: Timeline,
    title: str,
    keys: Sequence[str],
    modes: Mapping[str, Literal["min", "max"]],
    *,
    ink: str = _INK,
    background: str = "white",
) -> Figure:
    """Return a figure with one panel for each key, or one without values if there is none.

    Args:
        timeline: What happened.
        title: Of the whole.
        keys: The numbers to draw.
        modes: For a key whether the lowest or the highest is best; others have no best.
        ink: The colour of text and axes.
        background: The colour behind all.
    """
    axis, places = timeline.places()
    resumes = _placed_resumes(timeline, axis, places)
    notes = _notes(resumes)
    panels = max(1, len(keys))
    height = _PANEL * panels + 0.75 + _LINE * len(notes)
    figure = Picture(figsize=(_WIDTH, height), layout="constrained", facecolor=background, dpi=120)
    ratios = [_PANEL] * panels + [_LINE * len(notes) + 0.02]
    grid = figure.add_gridspec(panels + 1, 1, height_ratios=ratios)
    first: Axes | None = None
    for number in range(panels):
        axes = figure.add_subplot(grid[number], sharex=first)
        first = first or axes
        key = keys[number] if keys else None
        best = timeline.best(key, modes[key]) if key is not None and key in modes else None
        _panel(axes, timeline, places, key, best)
        _mark_resumes(axes, resumes)
        _dress(axes, key, modes.get(key or ""), ink)
        if number < panels - 1:
            axes.tick_params(labelbottom=False)
        else:
            label = _PLACE_NAMES[axis] if axis else "number of the save"
            axes.set_xlabel(label, color=ink, fontsize=9)
    figure.suptitle(
        say_text(title, 90), x=0.01, ha="left", fontsize=11, color=ink, parse_math=False
    )
    _write_notes(figure.add_subplot(grid[panels]), notes, ink)
    handles = _legend(timeline, keys, modes)
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=min(len(handles), 7),
            frameon=False,
            fontsize=8,
            labelcolor=ink,
            handletextpad=0.4,
            columnspacing=1.4,
        )
    return figure


def rendered(figure: Figure, kind: str) -> bytes:
    """Return a figure as the bytes of a PNG or SVG file, the same for the same figure."""
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with _settings(), warnings.catch_warnings():
        # A letter that the font lacks is a box in the picture, and no news to anybody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    # Text in an SVG stays text: it can be searched, and the file is small.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-sbckpt"}):
        yield


# ---------------------------------------------------------------------- the points


def _panel(
    axes: Axes,
    timeline: Timeline,
    places: Sequence[float],
    key: str | None,
    best: CheckpointHistory | None,
) -> None:
    values = [_finite(life, key) for life in timeline.lives]
    scale = _scale(len(values))
    _draw_courses(axes, timeline, places, values)
    groups: dict[tuple[str, bool], tuple[list[float], list[float]]] = {}
    for life, place, value in zip(timeline.lives, places, values, strict=True):
        if value is not None:
            kind = {"there": "kept", "unreadable": "unreadable"}.get(life.state, "removed")
            xs, ys = groups.setdefault((kind, life.ephemeral), ([], []))
            xs.append(place)
            ys.append(value)
    for (kind, ephemeral), (xs, ys) in sorted(groups.items(), reverse=True):
        size = scale * (0.6 if ephemeral else 1.0)
        axes.plot(xs, ys, **_style(kind, size, many=len(values) > 500))  # type: ignore[arg-type]
    for life, place, value in zip(timeline.lives, places, values, strict=True):
        if value is not None and life.state == "there" and life.pinned:
            _ring(axes, place, value, scale)
        if value is not None and life is best:
            style = {"marker": "*", "markersize": max(13.0, scale * 2.2), "color": _BEST}
            axes.plot([place], [value], markeredgecolor="black", zorder=6, **style)  # type: ignore[arg-type]
    axes.margins(x=0.03, y=0.16)
    _draw_without_value(axes, timeline, places, key, scale)


def _draw_courses(
    axes: Axes, timeline: Timeline, places: Sequence[float], values: Sequence[float | None]
) -> None:
    # Each stretch of training is a line of its own: what was repeated after a kill is not joined.
    breaks = {id(resume.first) for resume in timeline.resumes}
    runs: dict[str, tuple[list[float], list[float]]] = {}
    courses = []
    for life, place, value in zip(timeline.lives, places, values, strict=True):
        if life.averaged_from:
            continue
        if life.run not in runs or id(life) in breaks:
            runs[life.run] = ([], [])
            courses.append(runs[life.run])
        if value is not None:
            runs[life.run][0].append(place)
            runs[life.run][1].append(value)
    for xs, ys in courses:
        axes.plot(xs, ys, color=_QUIET, linewidth=0.8, alpha=0.55, zorder=1)


def _draw_without_value(
    axes: Axes, timeline: Timeline, places: Sequence[float], key: str | None, scale: float
) -> None:
    """Show along the bottom what has no place on the axis."""
    bottom = axes.get_xaxis_transform()  # x as the data, y as parts of the height
    for marker, colour, is_nan in (("|", _QUIET, False), ("x", _TROUBLE, True)):
        for there in (False, True):
            xs = [
                place
                for life, place in zip(timeline.lives, places, strict=True)
                if _finite(life, key) is None
                and (key is not None and life.number(key) is not None) is is_nan
                and (life.state == "there") is there
            ]
            axes.plot(
                xs,
                [0.035] * len(xs),
                linestyle="none",
                marker=marker,
                color=KEPT if there and not is_nan else colour,
                markersize=max(3.5, min(6.0, scale)),
                markeredgewidth=1.6 if there else 0.8,
                transform=bottom,
                zorder=4,
            )


def _style(kind: str, size: float, *, many: bool) -> dict[str, object]:
    style: dict[str, object] = {"linestyle": "none", "markersize": size, "marker": "o"}
    if kind == "kept":
        return {**style, "color": KEPT, "zorder": 5}
    if kind == "unreadable":
        return {**style, "marker": "X", "color": _TROUBLE, "zorder": 5}
    edge = {"markeredgewidth": 0.5 if many else 0.9, "markeredgecolor": KEPT}
    return {**style, **edge, "markerfacecolor": "none", "alpha": 0.5 if many else 0.75, "zorder": 2}


def _ring(axes: Axes, place: float, value: float, scale: float) -> None:
    size = max(9.0, scale + 5)
    ring = {"marker": "s", "markersize": size, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot([place], [value], markeredgecolor=_PINNED, markeredgewidth=1.6, zorder=6, **ring)  # type: ignore[arg-type]


def _scale(count: int) -> float:
    return max(2.2, min(7.0, 70 / math.sqrt(max(count, 1))))


def _finite(life: CheckpointHistory, key: str | None) -> float | None:
    return None if key is None else life.drawable(key)


# ---------------------------------------------------------------------- resumes


def _placed_resumes(
    timeline: Timeline, axis: str, places: Sequence[float]
) -> list[tuple[float, Resume]]:
    """Return where in the picture each run went on: at its checkpoint, if that is known."""
    at = {id(life): place for life, place in zip(timeline.lives, places, strict=True)}
    found = []
    for resume in timeline.resumes:
        # Counted by saves, a run goes on between two of them.
        between = at[id(resume.first)] - 0.5
        known = axis and resume.origin is not None
        place = at[id(resume.origin)] if known else at[id(resume.first)]
        found.append((place if axis else between, resume))
    return found


def _mark_resumes(axes: Axes, resumes: Sequence[tuple[float, Resume]]) -> None:
    for number, (place, _) in enumerate(resumes, start=1):
        axes.axvline(place, color=_RESUME, linestyle=(0, (4, 2)), linewidth=1.2, zorder=0)
        if len(resumes) <= 40:
            axes.annotate(
                str(number),
                (place, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 1),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=_RESUME,
                annotation_clip=False,
            )


def _notes(resumes: Sequence[tuple[float, Resume]]) -> list[str]:
    lines = []
    for number, (_, resume) in enumerate(resumes, start=1):
        step = resume.step()
        where = "" if step is None else f" at {_PLACE_NAMES[step[0]]} {step[1]:,.10g}"
        lines.append(f"{number}  resumed from {say_text(resume.source, 70)}{where}")
    if len(lines) > _NOTED_RESUMES:
        more = len(lines) - _NOTED_RESUMES + 1
        lines = [*lines[: _NOTED_RESUMES - 1], f"… and {more} more"]
    return lines


def _write_notes(axes: Axes, notes: Sequence[str], ink: str) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(notes), 1), 0)
    for row, note in enumerate(notes):
        axes.text(0, row + 0.5, note, fontsize=8, color=ink, va="center", parse_math=False)


# ---------------------------------------------------------------------- what stands around


def _dress(axes: Axes, key: str | None, mode: str | None, ink: str) -> None:
    if key is None:
        axes.set_yticks([])
    else:
        better = {"min": "\n(lowest is best)", "max": "\n(highest is best)"}.get(mode or "", "")
        label = say_text(key, 36) + better
        axes.set_ylabel(label, color=ink, fontsize=9, parse_math=False)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(ink)
    axes.tick_params(colors=ink, labelsize=8)
    axes.grid(visible=True, axis="y", color=_QUIET, alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _legend(
    timeline: Timeline, keys: Sequence[str], modes: Mapping[str, Literal["min", "max"]]
) -> list[Line2D]:
    """Return what the marks mean, of those that are there."""
    lives = timeline.lives
    found: list[Line2D] = []

    def add(label: str, **style: object) -> None:
        base: dict[str, object] = {"linestyle": "none", "markersize": 6.5}
        found.append(Line2D([], [], label=label, **{**base, **style}))  # type: ignore[arg-type]

    drawn = [life for life in lives if any(_finite(life, key) is not None for key in keys)]
    states = {life.state for life in drawn}
    if "there" in states:
        add("kept", **_style("kept", 6.5, many=False))
    if states & {"removed", "gone"}:
        add("removed", **_style("removed", 6.5, many=False))
    if "unreadable" in states:
        add("unreadable", **_style("unreadable", 6.5, many=False))
    if any(life.ephemeral for life in drawn):
        add("for recovery only (small)", **_style("removed", 4.0, many=False))
    if any(timeline.best(key, modes[key]) for key in keys if key in modes):
        add("best", marker="*", color=_BEST, markeredgecolor="black", markersize=11)
    if any(life.pinned and life.state == "there" for life in drawn):
        ring = {"markerfacecolor": "none", "markeredgecolor": _PINNED, "markeredgewidth": 1.6}
        add("pinned", marker="s", **ring)
    if timeline.resumes:
        add("resumed", marker="", linestyle=(0, (4, 2)), color=_RESUME)
    if any(life.number(key) is None for life in lives for key in keys) or (lives and not keys):
        add("without a value" if keys else "saved", marker="|", color=_QUIET)
    if any(
        life.number(key) is not None and _finite(life, key) is None
        for life in lives
        for key in keys
    ):
        add("NaN or infinite", marker="x", color=_TROUBLE)
    return found
