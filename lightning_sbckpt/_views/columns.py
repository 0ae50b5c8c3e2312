"""The columns of a table of checkpoints, as text; nothing here knows how it is drawn."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from lightning_sbckpt._display.wording import (
    printable,
    say_duration,
    say_number,
    say_size,
    say_when,
    short_name,
)
from lightning_sbckpt._io.records import remote_files
from lightning_sbckpt.meta import Checkpoint, ckpt_recency

_NO_METRICS = {"unixtime", "end-of-epoch", "epoch", "step", "global_step"}
_BLOCK = 512  # What st_blocks counts in.
_LONGEST_CELL = 40
_NO_BLOCKS = {"st_blocks": 0}

# Where there is too little room the lowest get it first.
_MARKS, _FIRST_METRIC, _STEP, _SECOND_METRIC, _EPOCH = 1, 2, 3, 4, 5
_OTHER_METRICS = 10
_AGE, _SIZE, _END = 1_000_000, 1_000_001, 1_000_002


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: Stands above it.
        cells: A text for each checkpoint.
        rank: 0 is never left out; of the others the lowest has its place first.
        right: Whether the texts stand on the right.
    """

    title: str
    cells: list[str]
    rank: int
    right: bool = True


class Size(NamedTuple):
    """What a checkpoint takes on the disk, and how much of it would be free without it."""

    total: int
    own: int

    def __str__(self) -> str:
        """Return it in words; what is shared with other checkpoints stays when this one goes."""
        if self.own == self.total:
            return say_size(self.total)
        return f"{say_size(self.total)}, {say_size(self.own)} own"


def columns_of(
    checkpoints: Sequence[Checkpoint],
    *,
    metrics: Sequence[str],
    marks: Mapping[Path, Sequence[str]],
    now: float | None = None,
    end_of_epoch: bool = True,
) -> list[Column]:
    """Return the columns for some checkpoints; their files are looked at, for the sizes.

    Args:
        checkpoints: One for each row.
        metrics: Keys in the meta, the most important first.
        marks: Words to set beside a checkpoint.
        now: Say how long ago they were saved, and not when.
        end_of_epoch: Say whether an epoch had ended.
    """
    rows = list(checkpoints)
    columns = [
        Column("name", [short_name(ckpt.path.name) for ckpt in rows], 0, right=False),
        Column("saved", [_when(ckpt) for ckpt in rows], _AGE, right=False)
        if now is None
        else Column("age", [age_of(ckpt, now).removesuffix(" ago") for ckpt in rows], _AGE),
        *place_cells(rows),
    ]
    if end_of_epoch:
        ends = [_cell(ckpt.meta.get("end-of-epoch")) for ckpt in rows]
        columns.append(Column("end of epoch", ends, _END))
    sizes = [size_of(ckpt) for ckpt in rows]
    columns.append(Column("size", ["gone" if size is None else str(size) for size in sizes], _SIZE))
    columns += metric_cells(rows, metrics)
    # A column of nothing is no loss anywhere, but what was asked for by name is answered.
    asked = {printable(key) for key in metrics}
    if now is not None:
        columns = [each for each in columns if any(each.cells) or each.title in asked]
    said = [", ".join(marks.get(ckpt.path, ())) for ckpt in rows]
    return [*columns, Column("", said, _MARKS, right=False)]


def metric_cells(checkpoints: Sequence[Checkpoint], metrics: Sequence[str]) -> list[Column]:
    """Return a column for each key, the first the most important."""
    ranks = [_FIRST_METRIC, _SECOND_METRIC, *range(_OTHER_METRICS, _OTHER_METRICS + len(metrics))]
    return [
        Column(printable(key), [_cell(ckpt.meta.get(key)) for ckpt in checkpoints], rank)
        for key, rank in zip(metrics, ranks, strict=False)
    ]


def place_cells(checkpoints: Sequence[Checkpoint]) -> list[Column]:
    """Return the columns of where in the run checkpoints were saved."""
    return [
        Column("epoch", [_cell(ckpt.meta.get("epoch")) for ckpt in checkpoints], _EPOCH),
        Column("step", [_cell(step_of(ckpt)) for ckpt in checkpoints], _STEP),
    ]


def metric_keys(checkpoints: Sequence[Checkpoint], first: str | None = None) -> list[str]:
    """Return the keys that hold numbers and are no counts of steps; one that ranks comes first."""
    found = {} if first is None else {first: None}
    found |= {
        key: None
        for ckpt in checkpoints
        for key, value in ckpt.meta.items()
        if key not in _NO_METRICS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }
    return list(found)


def step_of(checkpoint: Checkpoint) -> object:
    """Return the step that a checkpoint was saved at, or None."""
    return checkpoint.meta.get("global_step", checkpoint.meta.get("step"))


def age_of(checkpoint: Checkpoint, now: float) -> str:
    """Return how long ago a checkpoint was saved, in one unit."""
    return ago(now - ckpt_recency(checkpoint))


def ago(seconds: float) -> str:
    """Return how long ago something was, in one unit.

    Example:
        >>> ago(3 * 3600 + 100), ago(0.2), ago(-7200), ago(float("inf"))
        ('3 h ago', 'now', 'in 2 h', 'unknown')
    """
    if not abs(seconds) < float("inf"):
        return "unknown"
    number, unit = say_duration(int(abs(seconds))).split()[:2]
    if abs(seconds) < 1:
        return "now"
    return f"{number} {unit} ago" if seconds > 0 else f"in {number} {unit}"


def size_of(checkpoint: Checkpoint) -> Size | None:
    """Return what a checkpoint takes on the disk; None if it is gone."""
    files = files_of(checkpoint.path)
    if files is None:
        return None
    return _size_of_all(list(files.values()))


def files_of(folder: Path) -> dict[str, os.stat_result] | None:
    """Return the regular files below a folder by their names in it; None if it is gone."""
    found = {}
    try:
        if not folder.is_dir():
            return None
    except OSError:
        return None
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 - a Path costs more than the call
            try:
                stat = os.lstat(path)
            except OSError:
                continue  # Removed meanwhile.
            if S_ISREG(stat.st_mode):
                found[os.path.relpath(path, folder)] = stat
    for name, size in remote_files(folder).items():
        # In a store: of its own, and with no block here.
        found[name] = os.stat_result(
            (0, hash((folder, name)), -1, 1, 0, 0, size, 0, 0, 0), _NO_BLOCKS
        )
    return found


def freed_by(folders: Sequence[Path]) -> int:
    """Return how many bytes would be free if these checkpoints were removed together."""
    stats = [stat for folder in folders for stat in (files_of(folder) or {}).values()]
    return _size_of_all(stats).own


def _size_of_all(stats: Sequence[os.stat_result]) -> Size:
    names = Counter((stat.st_dev, stat.st_ino) for stat in stats)
    distinct = {(stat.st_dev, stat.st_ino): stat for stat in stats}
    # A file goes with the last of its names.
    own = sum(_taken(stat) for key, stat in distinct.items() if stat.st_nlink <= names[key])
    return Size(sum(map(_taken, distinct.values())), own)


def _taken(stat: os.stat_result) -> int:
    # Not yet allocated by a file system that allocates late: the length is the promise.
    return stat.st_blocks * _BLOCK or stat.st_size


def _when(checkpoint: Checkpoint) -> str:
    return say_when(ckpt_recency(checkpoint))


def _cell(value: object) -> str:
    text = printable(say_number(value))
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"
