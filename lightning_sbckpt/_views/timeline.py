"""What happened to each checkpoint of a folder, from the records that are there and the history.

Nothing here touches a disk: records and events go in, and what pictures and pages show comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_sbckpt._display.wording import say_when, short_name
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import AVERAGED_FROM, Checkpoint, ckpt_recency, usable_time
from lightning_sbckpt.retention import Best, Pareto, parse_rule
from lightning_sbckpt.selection import Criterion, rank_checkpoints

State = Literal["there", "removed", "gone", "unreadable"]

# Where a run is, the most exact first; none of them is a metric.
PLACES = ("global_step", "step", "epoch")
_NO_METRICS = {*PLACES, "unixtime", "end-of-epoch", "pinned", "ephemeral"}

# The length of an axis has to be a number, too.
_LARGEST = 1e150

# What JSON has no word for stands in the history as text.
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass
class CheckpointHistory:
    """One checkpoint from when it was made.

    Attributes:
        name: The name of its folder.
        meta: As it is now, or as it was noted when it was saved.
        made: In seconds since the epoch; None if nothing tells.
        state: `"there"`; `"removed"` by retention or replaced; `"gone"`, nothing tells how;
            `"unreadable"`.
        removed: When.
        reason: Why it was removed, or what is wrong with it.
        lineage: Where its weights come from.
        seconds: How long the save took.
        size: The bytes that were written.
        checkpoint: The record, if it is there.
    """

    name: str
    meta: Mapping[str, object] = field(default_factory=dict)
    made: float | None = None
    state: State = "gone"
    removed: float | None = None
    reason: str = ""
    lineage: Mapping[str, object] = field(default_factory=dict)
    seconds: float | None = None
    size: int | None = None
    checkpoint: Checkpoint | None = None

    @property
    def pinned(self) -> bool:
        """Whether retention must leave it."""
        return bool(self.meta.get("pinned"))

    @property
    def ephemeral(self) -> bool:
        """Whether it was saved for recovery only."""
        return self.meta.get("ephemeral") is True

    @property
    def run(self) -> str:
        """The id of the run that wrote it, or an empty text."""
        found = self.lineage.get("run")
        return found if isinstance(found, str) else ""

    @property
    def resumed_from(self) -> str:
        """The checkpoint that its run had gone on from, or an empty text."""
        found = self.lineage.get("resumed-from")
        return found if isinstance(found, str) else ""

    @property
    def averaged_from(self) -> tuple[str, ...]:
        """The checkpoints that it is an average of."""
        found = self.lineage.get(AVERAGED_FROM) or self.meta.get(AVERAGED_FROM)
        return tuple(map(str, found)) if isinstance(found, (list, tuple)) else ()

    def number(self, key: str) -> float | None:
        """Return the number that its meta has under a key, or None."""
        return as_number(self.meta.get(key))

    def drawable(self, key: str) -> float | None:
        """Return the number under a key if it has a place on an axis."""
        value = self.number(key)
        return value if value is not None and abs(value) <= _LARGEST else None


@dataclass(frozen=True)
class Resume:
    """A run that went on from a checkpoint.

    Attributes:
        source: The name of the checkpoint.
        origin: The checkpoint itself, if anything is known of it.
        first: The first checkpoint that was saved afterwards.
    """

    source: str
    origin: CheckpointHistory | None
    first: CheckpointHistory

    def step(self) -> tuple[str, float] | None:
        """Return where the run went on, as the name of a place in it and a number."""
        for key in PLACES if self.origin is not None else ():
            found = self.origin.drawable(key) if self.origin is not None else None
            if found is not None:
                return key, found
        return None


@dataclass(frozen=True)
class Timeline:
    """All that is known of the checkpoints of a folder.

    Attributes:
        lives: Every checkpoint ever, in the order in which they were made.
        resumes: Where runs went on, in that order too.
        rules: The rules of retention that were followed last, as text.
        rule_changes: When rules were set, and which.
        has_history: Whether anything was noted; without it only what is there is known.
    """

    lives: Sequence[CheckpointHistory]
    resumes: Sequence[Resume]
    rules: Sequence[str]
    rule_changes: Sequence[tuple[float, Sequence[str]]]
    has_history: bool

    def metrics(self) -> list[str]:
        """Return the keys that hold numbers and say how good a checkpoint is."""
        found: dict[str, None] = {}
        for life in self.lives:
            for key in life.meta:
                if key not in found and key not in _NO_METRICS and life.number(key) is not None:
                    found[key] = None
        return list(found)

    def modes(self) -> dict[str, Literal["min", "max"]]:
        """Return the keys that the rules rank by, and for each whether the lowest is best."""
        found: dict[str, Literal["min", "max"]] = {}
        for text in self.rules:
            try:
                rule = parse_rule(text)
            except SelectionError:
                continue  # Of a user's own class, or with a function in it.
            if isinstance(rule, Best):
                found.setdefault(rule.key, rule.mode)
            elif isinstance(rule, Pareto):
                for key, mode in zip(rule.keys, rule.modes, strict=True):
                    found.setdefault(key, "min" if mode == "min" else "max")
        return found

    def metrics_of_those_there(self) -> list[str]:
        """Return the metrics that a table of what is there has columns for, the main one first."""
        there = [life for life in self.lives if life.checkpoint is not None]
        found = [
            key for key in self.metrics() if any(life.number(key) is not None for life in there)
        ]
        main = self.main_metric()
        return sorted(found, key=lambda key: key != main)

    def marks(self) -> dict[Path, list[str]]:
        """Return words about those that are there: best, newest, pinned, for recovery only."""
        found: dict[Path, list[str]] = {}
        there = {life.checkpoint.path: life for life in self.lives if life.checkpoint is not None}
        newest = next(reversed(there), None)
        for number, (key, mode) in enumerate(self.modes().items()):
            best = self.best(key, mode)
            if best is not None and best.checkpoint is not None:
                word = "best" if number == 0 else f"best {key}"
                found.setdefault(best.checkpoint.path, []).append(word)
        for path, life in there.items():
            words = found.setdefault(path, [])
            if path == newest:
                words.append("newest")
            if life.pinned:
                words.append("pinned")
            if life.ephemeral:
                words.append("for recovery only")
        return found

    def _repr_html_(self) -> str:
        from lightning_sbckpt._display import cards

        def card() -> str:
            key = self.main_metric()
            rows = [
                (
                    short_name(life.name),
                    life.state,
                    *([life.number(key)] if key else []),
                    say_when(life.made),
                    "" if life.removed is None else say_when(life.removed),
                    life.reason,
                )
                for life in reversed(self.lives)
            ]
            head = ("checkpoint", "state", *([key] if key else []), "made", "removed", "why")
            went_on = [f"resumed from {short_name(resume.source)}" for resume in self.resumes]
            return cards.tables_card(title, where, [("", head, rows)], went_on)

        there = sum(life.checkpoint is not None for life in self.lives)
        title = f"{len(self.lives)} checkpoints were made, {there} are there"
        where = f"kept by {', '.join(self.rules)}" if self.rules else ""
        return cards.shown(title, where, card)

    def main_metric(self) -> str | None:
        """Return the key of the first rule that ranks, else the first metric there is."""
        metrics = self.metrics()
        ranked = [key for key in self.modes() if key in metrics]
        return next(iter(ranked or metrics), None)

    def best(self, key: str, mode: Literal["min", "max"]) -> CheckpointHistory | None:
        """Return the best of those that are there."""
        there = {
            life.checkpoint.path: life
            for life in self.lives
            if life.checkpoint is not None
            and not isinstance(life.meta.get(key), str)
            and (value := life.number(key)) is not None
            and not math.isnan(value)
        }
        records = [life.checkpoint for life in there.values() if life.checkpoint is not None]
        ranked = rank_checkpoints(records, Criterion(key=key, lowest=mode == "min"), limit=1)
        return there[ranked[0].path] if ranked else None

    def places(self) -> tuple[str, list[float]]:
        """Return what tells best where in training each checkpoint stands, and the numbers.

        One that lacks it, as an average may, stands where the one before it does.
        """
        for key in PLACES:
            found = [life.drawable(key) for life in self.lives]
            usable = [value for value in found if value is not None]
            if len(usable) * 2 > len(found):
                places, last = [], usable[0]
                for value in found:
                    last = value if value is not None else last
                    places.append(last)
                return key, places
        return "", [float(number) for number in range(1, len(self.lives) + 1)]


def build_timeline(
    checkpoints: Iterable[Checkpoint],
    events: Sequence[Mapping[str, Any]],
    *,
    unreadable: Mapping[str, str] | None = None,
    lineage_of: Callable[[Checkpoint], Mapping[str, object]] | None = None,
) -> Timeline:
    """Put together what is there and what was noted.

    Args:
        checkpoints: The readable checkpoints that are there.
        events: The history, oldest first.
        unreadable: The checkpoints that are there and can't be read, by name, each with the reason.
        lineage_of: Asked about those of which no event tells.
    """
    past = _Past()
    for event in events:
        past.take(event)
    for ckpt in checkpoints:
        past.meet(ckpt, lineage_of)
    for name, problem in (unreadable or {}).items():
        past.meet_unreadable(name, problem)
    # Stable: what has no time stays where it was noted.
    lives = sorted(past.lives, key=lambda life: _moment(life.made, life.removed))
    return Timeline(
        lives=lives,
        resumes=_resumes(lives),
        rules=past.rules[-1][1] if past.rules else [],
        rule_changes=past.rules,
        has_history=bool(events),
    )


class _Past:
    """The lives so far; one name may have had several, of which the last may go on."""

    def __init__(self) -> None:
        self.lives: list[CheckpointHistory] = []
        self.rules: list[tuple[float, list[str]]] = []
        self._open: dict[str, CheckpointHistory] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Follow one event."""
        moment = usable_time(event["time"])
        when = moment if math.isfinite(moment) else None
        if event["event"] == "rules":
            rules = [str(text) for text in event["rules"]]
            # Every process notes its own, mostly the same.
            if not self.rules or rules != self.rules[-1][1]:
                self.rules.append((moment, rules))
        elif event["event"] == "saved":
            name, meta = event["name"], event["meta"]
            self._end(name, when, "replaced by a newer one of the same name")
            made = usable_time(meta.get("unixtime"))
            life = CheckpointHistory(
                name,
                meta,
                made if math.isfinite(made) else when,
                lineage=event["lineage"],
                seconds=as_number(event.get("seconds")),
                size=_count(event.get("bytes")),
            )
            self._begin(life)
        else:
            if event["name"] not in self._open:
                self._begin(CheckpointHistory(event["name"]))
            self._end(event["name"], when, event["reason"])

    def meet(
        self,
        ckpt: Checkpoint,
        lineage_of: Callable[[Checkpoint], Mapping[str, object]] | None,
    ) -> None:
        """Follow a checkpoint that is there."""
        life = self._open.get(ckpt.path.name)
        made = ckpt_recency(ckpt)
        if life is None or usable_time(life.meta.get("unixtime")) != made:
            lineage = lineage_of(ckpt) if lineage_of is not None else {}
            life = CheckpointHistory(ckpt.path.name, lineage=lineage)
            life.made = made if math.isfinite(made) else None
            self._begin(life)
        life.meta, life.state, life.checkpoint = ckpt.meta, "there", ckpt

    def meet_unreadable(self, name: str, problem: str) -> None:
        """Follow one of which no more than its name is known."""
        life = self._open.get(name)
        if life is None:
            life = CheckpointHistory(name)
            self._begin(life)
        life.state, life.reason = "unreadable", problem

    def _begin(self, life: CheckpointHistory) -> None:
        self.lives.append(life)
        self._open[life.name] = life

    def _end(self, name: str, when: float | None, reason: str) -> None:
        life = self._open.pop(name, None)
        if life is not None:
            life.state, life.removed, life.reason = "removed", when, reason


def _resumes(lives: Sequence[CheckpointHistory]) -> list[Resume]:
    found = []
    last: dict[str, str] = {}
    known: dict[str, CheckpointHistory] = {}
    for life in lives:
        if life.averaged_from:
            continue  # It stands beside the runs.
        if life.resumed_from and life.resumed_from != last.get(life.run):
            found.append(Resume(life.resumed_from, known.get(life.resumed_from), life))
        last[life.run] = life.resumed_from
        known[life.name] = life
    return found


def as_number(value: object) -> float | None:
    """Return a number of the meta as one that can be drawn, or None.

    Example:
        >>> as_number(3), as_number("nan"), as_number("soon"), as_number(True)
        (3.0, nan, None, None)
    """
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # A whole number of hundreds of digits.
        return math.inf if value > 0 else -math.inf


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _moment(made: float | None, removed: float | None) -> float:
    found = made if made is not None else removed
    return found if found is not None else -math.inf
