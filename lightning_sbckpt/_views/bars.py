"""Where the bars of a timeline stand: each checkpoint from when it was made to when it was removed.

Numbers only; the page of a report draws them.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from statistics import median

from lightning_sbckpt._views.timeline import CheckpointHistory, Timeline

WIDTH = 1000.0
# A pause of a day between two minutes of training would leave no room for these: whatever is
# longer than so many usual distances is drawn as long as those.
_LONGEST = 25
_LABELLED = 60
_TALLEST, _MOST = 14.0, 900.0
_TICKS = 7
_END = 24.0  # What is there goes on to the edge, past the last event.


@dataclass(frozen=True)
class Bar:
    """One checkpoint: its place, and the one before which it stands in the list of lives."""

    life: CheckpointHistory
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Chart:
    """All bars, and what stands around them, in units of which the width has a thousand."""

    bars: Sequence[Bar]
    thickness: float
    height: float
    ticks: Sequence[tuple[float, str]]
    pauses: Sequence[float]
    resumes: Sequence[tuple[float, str]]
    labelled: bool


def chart(timeline: Timeline) -> Chart | None:
    """Return the bars of those checkpoints of which the time is known; None if there are none."""
    lives = [life for life in timeline.lives if life.made is not None]
    moments = sorted({moment for life in lives for moment in (life.made, _end(life)) if moment})
    if not moments:
        return None
    places, pauses = _squeezed(moments)
    labelled = len(lives) <= _LABELLED
    lanes = list(range(len(lives))) if labelled else _lanes(lives)
    thickness = min(_TALLEST, _MOST / (max(lanes) + 1))
    bars = []
    for life, lane in zip(lives, lanes, strict=True):
        begin = _at(life.made, moments, places)
        end = _end(life)
        until = WIDTH if end is None else _at(end, moments, places)
        bars.append(Bar(life, begin, lane * thickness, max(until - begin, 1.5)))
    resumes = [
        (_at(resume.first.made, moments, places), resume.source)
        for resume in timeline.resumes
        if resume.first.made is not None
    ]
    height = (max(lanes) + 1) * thickness
    return Chart(bars, thickness, height, _ticks(moments, places), pauses, resumes, labelled)


def _end(life: CheckpointHistory) -> float | None:
    # When one vanished that nobody noted is not known: it is drawn as short as can be.
    if life.state == "gone":
        return life.made
    return None if life.state in ("there", "unreadable") else life.removed or life.made


def _squeezed(moments: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return a place for each moment, and the places at which a pause was shortened."""
    steps = [after - before for before, after in pairwise(moments)]
    longest = _LONGEST * median(steps) if steps else 0.0
    reached, cut = [0.0], []
    for step in steps:
        if step > longest:
            cut.append(reached[-1] + longest / 2)
        reached.append(reached[-1] + min(step, longest))
    scale = (WIDTH - _END) / reached[-1] if reached[-1] else 0.0
    return [place * scale for place in reached], [place * scale for place in cut]


def _at(moment: float | None, moments: Sequence[float], places: Sequence[float]) -> float:
    assert moment is not None
    return places[max(bisect_right(moments, moment) - 1, 0)]


def _lanes(lives: Sequence[CheckpointHistory]) -> list[int]:
    """Return for each the lowest lane that is free while it lives."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    lanes = []
    for life in lives:
        while busy and life.made is not None and busy[0][0] < life.made:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy)
        end = _end(life)
        heappush(busy, (float("inf") if end is None else end, lane))
        lanes.append(lane)
    return lanes


def _ticks(moments: Sequence[float], places: Sequence[float]) -> list[tuple[float, str]]:
    """Return moments about evenly apart, in the fewest words that tell them apart."""
    long = moments[-1] - moments[0] > 20 * 3600
    found: dict[str, float] = {}
    last = -WIDTH
    for moment, place in zip(moments, places, strict=True):
        if place - last >= WIDTH / _TICKS:
            try:
                local = time.localtime(moment)
            except (OverflowError, ValueError, OSError):  # No time there can be.
                continue
            found[time.strftime("%m-%d %H:%M" if long else "%H:%M:%S", local)] = place
            last = place
    return [(place, text) for text, place in found.items()]
