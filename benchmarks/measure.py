"""How a figure is taken: subjects in turn, round after round, and what is kept of the rounds.

Machines drift: a time taken now and one taken a minute later can't be compared. So all subjects of
a figure are measured in every round, in an order that changes from round to round, and two
subjects are compared within each round before the median is taken.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.calm import MACHINE


class UnavailableError(Exception):
    """A subject can't be measured here; the text says why."""


@dataclass(frozen=True)
class Settings:
    """One run of the benchmarks.

    Args:
        folder: Where to write; on a real disk.
        sizes: Sizes of the state in millions of bytes, from small to large.
        seconds: About how long the figure group may take.
        quick: Few rounds, to see that all works.
    """

    folder: Path
    sizes: tuple[int, ...]
    seconds: float
    quick: bool = False

    @property
    def main_size(self) -> int:
        """The size at which the targets are stated: 500 MB, or the nearest below it."""
        return max((size for size in self.sizes if size <= 500), default=self.sizes[0])

    def seconds_for(self, size: int) -> float:
        """Return the share of one size in the time: the main size gets the most rounds."""
        weights = {each: 1 + min(each, 500) / 100 for each in self.sizes}
        return self.seconds * weights[size] / sum(weights.values())

    def rounds(self, full: int) -> int:
        """Return how many rounds to take at most."""
        return min(full, 2) if self.quick else full

    def interleave(
        self,
        subjects: Mapping[str, Callable[[], float]],
        rounds: int,
        *,
        seconds: float | None = None,
        at_least: int = 3,
        warmup: int = 1,
        failures: dict[str, str] | None = None,
    ) -> dict[str, list[float]]:
        """Call `interleave` with as many rounds, and as much patience, as this run has."""
        return interleave(
            subjects,
            rounds=self.rounds(rounds),
            at_least=1 if self.quick else at_least,
            seconds=self.seconds if seconds is None else seconds,
            warmup=warmup,
            patience=0.0 if self.quick else 0.3,
            failures=failures,
        )


@dataclass
class Table:
    """The values of several subjects (rows) under several conditions (columns).

    Args:
        title: What was measured.
        unit: Of the values: `"s"`, `"bytes"` or `"us"`.
        reference: The row that the others are divided by, if there is one.
        cells: From row and column to the value of each round, in the order of the rounds.
        notes: What the reader has to know to read the numbers.
        columns_are: What the columns are, for plots.
    """

    title: str
    unit: str
    reference: str | None = None
    cells: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns_are: str = "size"

    def rows(self) -> list[str]:
        """Return the subjects in the order in which they came."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    def columns(self) -> list[str]:
        """Return the conditions in the order in which they came."""
        return list(dict.fromkeys(column for _, column in self.cells))

    def ratio(self, row: str, column: str, reference: str | None = None) -> list[float]:
        """Return the ratio of two subjects in every round; empty if one was not measured.

        A subject that was measured in fewer rounds than the reference was so in the first ones.
        """
        above = self.cells.get((row, column), [])
        below = self.cells.get((reference or self.reference or "", column), [])
        if len(above) > len(below):
            # Not taken in the same rounds: all there is to compare are the medians.
            return [median(above) / median(below)] if above and below else []
        return [a / b for a, b in zip(above, below, strict=False) if b > 0]

    def add(self, column: str, rounds: Mapping[str, Sequence[float]]) -> None:
        """Add what one interleaved measurement gave."""
        for row, values in rounds.items():
            if values:
                self.cells[row, column] = list(values)


@dataclass
class Section:
    """One figure group of the report.

    Args:
        name: As given to `--only`.
        title: The heading.
        intro: What was measured and how.
        tables: The figures, by a name that the table of targets knows.
        failures: What went wrong or was left out, by subject.
    """

    name: str
    title: str
    intro: str
    tables: dict[str, Table] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def timed(act: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def interleave(
    subjects: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    seconds: float = 60.0,
    at_least: int = 2,
    warmup: int = 1,
    seed: int = 0,
    patience: float = 0.0,
    failures: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Measure all subjects in turn, and return the values of each.

    Args:
        subjects: From names to functions that take one measurement and return it.
        rounds: How often to measure each, at most.
        seconds: No round is begun that would end later, beyond `at_least`.
        at_least: How many rounds to take even so.
        warmup: Rounds at the start that don't count.
        seed: Of the order within the rounds.
        patience: How long to wait for a quieter machine at most, in all, as a share of `seconds`.
        failures: A subject that raises is left out from then on and noted here; without a
            dictionary to note it in, the error is raised.

    Example:
        >>> interleave({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2)
        {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    order = random.Random(seed)  # noqa: S311 - an order, not a secret
    values: dict[str, list[float]] = {name: [] for name in subjects}
    start = time.perf_counter()
    waited = 0.0
    for number in range(-warmup, rounds):
        spent = time.perf_counter() - start - waited
        if number >= at_least and spent + spent / (number + warmup) > seconds:
            break
        for name in order.sample(list(values), len(values)):
            if patience:
                # No more for one than for the others: the last ones should find some left.
                left = patience * seconds - waited
                waited += MACHINE.wait(min(left, patience * seconds / 10))
            try:
                value = subjects[name]()
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = described(error)
                del values[name]
                continue
            if number >= 0:
                values[name].append(value)
    return values


def described(error: BaseException) -> str:
    """Return one line about an error; where it came from is printed for who is watching."""
    if isinstance(error, UnavailableError):
        return str(error)
    traceback.print_exception(error)
    text = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {text[:200]}"


def size_label(megabytes: int) -> str:
    """Return how a size is written in the tables."""
    return f"{megabytes:,} MB"


def end_in_order() -> None:
    """Have SIGTERM end this process like an exception, so that what was made is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
