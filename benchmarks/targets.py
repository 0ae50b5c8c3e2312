"""The table of targets: what was promised, what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.finding import AGAIN, NEW_PROCESS, NO_INDEX, SPEECHBRAIN
from benchmarks.finding import FLOOR as LOOKING
from benchmarks.loading import HASHED, READ
from benchmarks.measure import Settings, Table, median, size_label
from benchmarks.peer import OURS
from benchmarks.peers import FOUND
from benchmarks.saving import RAW
from benchmarks.small import ONE_STATE, REMOVE
from benchmarks.stalls import COPY
from benchmarks.stalls import FLOOR as COPY_AND_WRITE
from benchmarks.stepping import PACKAGE, TORCH

_SYNC = f"{OURS}, sync"
_ASYNC = f"{OURS}, async"
_OVERLAP = f"{OURS}, overlap"
_TORCH_LOAD = "torch.load + load_state_dict"


@dataclass(frozen=True)
class Verdict:
    """One row of the table of targets."""

    what: str
    target: str
    measured: str
    is_met: bool | None

    @property
    def mark(self) -> str:
        """Return the word in the last column."""
        return {True: "met", False: "**not met**", None: "not measured"}[self.is_met]


def verdicts(tables: Mapping[str, Table], settings: Settings) -> list[Verdict]:
    """Compare what was measured with what was promised."""
    main = size_label(settings.main_size)
    state_bytes = settings.main_size * 1e6

    def ratio(name: str, row: str, column: str, reference: str | None = None) -> list[float]:
        return tables[name].ratio(row, column, reference) if name in tables else []

    def values(name: str, row: str, column: str | None = None) -> list[float]:
        if name not in tables:
            return []
        cells = tables[name].cells
        return [
            value
            for (r, c), rounds in cells.items()
            if r == row and column in (None, c)
            for value in rounds
        ]

    def faster(name: str, row: str, than: str, column: str) -> list[float]:
        return [1 / each for each in ratio(name, row, column, than) if each > 0]

    removed = ratio("remove", _SYNC, main, REMOVE)
    return [
        _at_most("durable sync save, against the raw write", 1.5, ratio("save", _SYNC, main)),
        _at_least(
            "durable sync save, against torch.save + fsync",
            3,
            faster("save", _SYNC, "torch.save + fsync", main),
            ("the raw write of these bytes", faster("save", RAW, "torch.save + fsync", main)),
        ),
        _at_least(
            "durable sync save, against Lightning + fsync",
            5,
            faster("save", _SYNC, "Lightning + fsync", main),
            ("the raw write of these bytes", faster("save", RAW, "Lightning + fsync", main)),
        ),
        _verdict(
            "extra memory of a sync save, the most of all sizes",
            "under 64 MB",
            [max(found) / 1e6] if (found := values("memory save", _SYNC)) else [],
            lambda value: value < 64,
            "{:.0f} MB",
        ),
        _at_most("stall of an async save, in ready copies", 1.3, ratio("stall", _ASYNC, main)),
        _verdict(
            "stall when the copy hides behind forward and backward (`overlap`), in ready copies",
            "none (below 0.2x)",
            ratio("stall", _OVERLAP, main),
            lambda value: value < 0.2,
        ),
        *(
            _at_least(
                f"load into {into}, {how}, against torch.load + load_state_dict",
                2.5,
                faster(f"load {table}", row, _TORCH_LOAD, main),
                (bound, faster(f"load {table}", bound, _TORCH_LOAD, main)),
            )
            for table, into in (
                ("live", "a live model and optimizer"),
                ("fresh", "a new optimizer, whose moments have to be made"),
            )
            for row, how, bound in (
                (FOUND, "verified before", READ),
                (OURS, "found and verified within the time", HASHED),
            )
        ),
        _verdict(
            "extra memory of that load into a live state",
            "no second copy (below 0.2 states)",
            [value / state_bytes for value in values("memory load", _SYNC, main)],
            lambda value: value < 0.2,
            "{:.2f} states",
        ),
        *(
            _at_least(
                f"best of 3,000 checkpoints, {label}, against SpeechBrain",
                limit,
                faster("find", row, SPEECHBRAIN, "3,000"),
                (LOOKING, faster("find", LOOKING, SPEECHBRAIN, "3,000"))
                if row == NEW_PROCESS
                else None,
            )
            for label, row, limit in (
                ("no index", NO_INDEX, 5),
                ("in a new process", NEW_PROCESS, 100),
                ("asked again and again", AGAIN, 500),
            )
        ),
        *(
            _at_most(
                f"training time lost to an async save, {loop} loop, in ready copies",
                1.5,
                ratio("lost", _ASYNC, loop, COPY),
                (COPY_AND_WRITE, ratio("lost", COPY_AND_WRITE, loop, COPY)),
                rounds=_NOISY,
            )
            for loop in ("Python-bound", "compute-bound", "training")
        ),
        _at_most(
            "the same with `overlap`, training loop",
            1.5,
            ratio("lost", _OVERLAP, "training", COPY),
            (COPY_AND_WRITE, ratio("lost", COPY_AND_WRITE, "training", COPY)),
            rounds=_NOISY,
        ),
        _verdict(
            "removing old checkpoints: the caller waits",
            "off the training thread (below 0.1x of the removal)",
            removed,
            lambda value: value < 0.1,
            "{:.3f}x",
        ),
        *(
            _verdict(
                f"idle cost per training step ({mode})",
                "under 5 microseconds",
                values("idle", f"{OURS}, {mode}", "called directly"),
                lambda value: value < 5,
                "{:.1f} µs",
            )
            for mode in ("sync", "async", "overlap")
        ),
        _at_most(
            "import lightning_sbckpt, against import torch",
            1.15,
            ratio("import", PACKAGE, "process", TORCH),
        ),
        _at_most(
            "ten checkpoints of a model that is 95 % frozen, in whole states on disk",
            1.6,
            ratio("dedup", _SYNC, "bytes", ONE_STATE),
        ),
    ]


# Where two processors are busy a round can even come out negative: one or two say nothing. And as no
# loop is faster for a save, one that comes out far below zero says how much the others may be wrong.
_NOISY = 3

# What cannot be gone below here, and how it compares in the same rounds.
_Bound = tuple[str, list[float]]


def _at_most(
    what: str,
    limit: float,
    found: list[float],
    bound: _Bound | None = None,
    *,
    rounds: int = 1,
) -> Verdict:
    verdict = _verdict(what, f"within {limit:g}x", found, lambda value: value <= limit)
    if 0 < len(found) < rounds:
        text = f"{verdict.measured} in {len(found)} of the {rounds} rounds that a verdict takes"
        return replace(verdict, measured=text, is_met=None)
    if rounds > 1 and min(found, default=0) < -limit:
        return replace(verdict, measured=f"{verdict.measured}: noise", is_met=None)
    return _bounded(verdict, bound, "{:.2f}x")


def _at_least(what: str, limit: float, found: list[float], bound: _Bound | None = None) -> Verdict:
    verdict = _verdict(
        what, f"{limit:g}x faster", found, lambda value: value >= limit, "{:.1f}x faster"
    )
    return _bounded(verdict, bound, "{:.1f}x")


def _bounded(verdict: Verdict, bound: _Bound | None, form: str) -> Verdict:
    if verdict.is_met is not False or bound is None or not bound[1]:
        return verdict
    what, found = bound
    text = f"{verdict.measured}; {what} alone: {form.format(median(found))}"
    return replace(verdict, measured=text)


def _verdict(
    what: str,
    target: str,
    found: list[float],
    is_met: Callable[[float], bool],
    form: str = "{:.2f}x",
) -> Verdict:
    if not found:
        return Verdict(what, target, "-", None)
    value = median(found)
    text = form.format(value)
    if len(found) > 1:
        number = form.split("}", maxsplit=1)[0] + "}"
        text += f" ({number.format(min(found))} to {number.format(max(found))})"
    return Verdict(what, target, text, is_met(value))
