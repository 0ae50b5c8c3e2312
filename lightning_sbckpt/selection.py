"""Which checkpoint is best: a pure ranking of checkpoint records.

Three ways to rank, at most one at a time: the lowest value of a key in the meta, the highest
value of a key, or a function of the checkpoint. With none of them, the most recent is best. The
ranking never depends on the order in which the checkpoints are given.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from math import inf, isnan

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import END_OF_TIME, Checkpoint, ckpt_recency
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey

__all__ = ["Criterion", "importance", "newest_first", "rank_checkpoints"]


@dataclass(frozen=True)
class Criterion:
    """One way to rank checkpoints; made by `importance`.

    Attributes:
        key: The key in the meta that ranks, or None where a function does.
        function: The function that ranks, or None where a key does.
        lowest: Whether the lowest value of the key is the best one.

    Example:
        >>> from pathlib import Path
        >>> lowest_loss = Criterion(key="loss", lowest=True)
        >>> lowest_loss.score(Checkpoint(Path("CKPT+a"), {"loss": 0.5}, {}))
        -0.5
        >>> lowest_loss.applies(Checkpoint(Path("CKPT+b"), {"acc": 0.9}, {}))
        False
        >>> lowest_loss.describe()
        'lowest loss'
    """

    key: str | None = None
    function: ImportanceKey | None = None
    lowest: bool = False

    def applies(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is a candidate: it has a value for the key.

        An empty value (`key:` in the YAML file, None in Python) counts as no value.
        """
        return self.key is None or checkpoint.meta.get(self.key) is not None

    def score(self, checkpoint: Checkpoint) -> float:
        """Return how good a checkpoint is, higher is better; NaN is worse than everything.

        Raises:
            SelectionError: The value is not a number, or the function found no such key.
        """
        return self._scores(checkpoint)[0]

    def order(self, checkpoint: Checkpoint) -> tuple[float, ...]:
        """Return what sorts checkpoints from worst to best, without ties broken.

        A function may return several numbers, compared one after the other.
        """
        # NaN compares false with everything, which leaves a sort in an arbitrary order: a
        # number sorts as (1, number), NaN as (0, 0).
        if self.key is not None:
            value = checkpoint.meta.get(self.key)
            if type(value) is float and not isnan(value):  # by far the usual case, without detours
                return (1.0, -value if self.lowest else value)
        parts = [(0.0, 0.0) if isnan(score) else (1.0, score) for score in self._scores(checkpoint)]
        return tuple(part for pair in parts for part in pair)

    def describe(self) -> str:
        """Return the criterion in words, for logs and messages."""
        if self.key is not None:
            return f"{'lowest' if self.lowest else 'highest'} {self.key}"
        if self.function is None or self.function is ckpt_recency:
            return "most recent"
        return f"most important by {function_name(self.function)}"

    def _scores(self, checkpoint: Checkpoint) -> tuple[float, ...]:
        if self.key is not None:
            value: object = checkpoint.meta.get(self.key)
            origin = f"the meta key {self.key!r}"
        else:
            function = ckpt_recency if self.function is None else self.function
            value = _call(function, checkpoint)
            origin = f"the importance key {function_name(function)!r}"
        # Functions written for `sorted` may return a tuple; a list in the meta is no number.
        several = value if self.key is None and isinstance(value, tuple) and value else (value,)
        scores = [_as_number(part) for part in several]
        found = [score for score in scores if score is not None]
        if len(found) < len(scores):
            raise SelectionError(
                f"Cannot rank checkpoint {checkpoint.path} by {self.describe()}: {origin} gives "
                f"{reprlib.repr(value)} ({type(value).__name__}), expected a real number. Rank by another "
                "key, or leave this checkpoint out with ckpt_predicate."
            )
        return tuple(-score for score in found) if self.lowest else tuple(found)


def importance(
    *,
    importance_key: ImportanceKey | None = None,
    max_key: str | None = None,
    min_key: str | None = None,
) -> Criterion:
    """Return the one criterion that the three usual arguments ask for.

    Args:
        importance_key: A function of a checkpoint; the highest result is best.
        max_key: A key in the meta; the highest value is best.
        min_key: A key in the meta; the lowest value is best.

    Returns:
        The criterion; recency if no argument was given.

    Raises:
        SelectionError: More than one was given, or one of the wrong kind.

    Example:
        >>> importance(min_key="loss").describe()
        'lowest loss'
        >>> importance().describe()
        'most recent'
    """
    given: dict[str, object] = {
        name: value
        for name, value in (
            ("importance_key", importance_key),
            ("max_key", max_key),
            ("min_key", min_key),
        )
        if value is not None
    }
    if len(given) > 1:
        pairs = " and ".join(f"{name}={_short(value)}" for name, value in given.items())
        raise SelectionError(
            f"Cannot choose a checkpoint by {pairs}: they may contradict each other. Give one of "
            "importance_key, max_key and min_key; a function given as importance_key can weigh "
            "several keys."
        )
    if importance_key is not None and not callable(importance_key):
        raise SelectionError(
            f"importance_key is {importance_key!r}, expected a function of a checkpoint. To rank "
            "by a key in the meta, pass it as max_key or min_key."
        )
    for name, key in (("max_key", max_key), ("min_key", min_key)):
        if key is not None and not isinstance(key, str):
            raise SelectionError(
                f"{name} is {_short(key)}, expected the name of a key in the meta. To rank by a "
                "function, pass it as importance_key."
            )
    key = min_key if min_key is not None else max_key
    return Criterion(key=key, function=importance_key, lowest=min_key is not None)


def rank_checkpoints(
    checkpoints: Iterable[Checkpoint],
    criterion: Criterion,
    predicate: str | CheckpointPredicate | None = None,
    limit: int | None = None,
) -> list[Checkpoint]:
    """Return the candidates among the checkpoints, best first.

    Checkpoints without the key are no candidates. NaN ranks worst, whether the lowest or the
    highest is best. Of equally good ones the newer comes first, and of equally old ones the
    one whose folder name sorts last.

    Args:
        checkpoints: The checkpoints there are, in any order.
        criterion: What makes a checkpoint good.
        predicate: Leaves out the checkpoints for which it is false; asked about candidates only.
            May be an expression, see `lightning_sbckpt.expressions`.
        limit: Return at most so many; None returns all.

    Returns:
        The ranked checkpoints.

    Raises:
        SelectionError: A candidate's value is not a number, `limit` is negative, or an expression
            can't be read or asks for a key which none of the checkpoints has.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [
        ...     Checkpoint(Path(name), {"unixtime": time, "loss": loss}, {})
        ...     for name, time, loss in [("a", 1, 0.5), ("b", 2, float("nan")), ("c", 3, 0.5)]
        ... ]
        >>> [ckpt.path.name for ckpt in rank_checkpoints(ckpts, importance(min_key="loss"))]
        ['c', 'a', 'b']
    """
    if limit is not None and limit < 0:
        raise SelectionError(
            f"Cannot return {limit} checkpoints: expected 0 or more, or None for all of them."
        )
    if isinstance(predicate, str):
        checkpoints = list(checkpoints)
        predicate = as_predicate(predicate, among=checkpoints)
    candidates = [
        ckpt
        for ckpt in checkpoints
        if criterion.applies(ckpt) and (predicate is None or predicate(ckpt))
    ]
    # nlargest with one number is a single pass, with all of them a sort.
    return nlargest(
        len(candidates) if limit is None else limit,
        candidates,
        key=lambda ckpt: (criterion.order(ckpt), ckpt_recency(ckpt), _Name(ckpt)),
    )


def shortlist(values: Sequence[object], limit: int, *, lowest: bool) -> Sequence[int]:
    """Return which of many checkpoints may be among the best, so that only those are ranked.

    It never leaves out one that `rank_checkpoints` with this `limit` would return, and is short
    where the values are ordinary numbers, one for each checkpoint.

    Args:
        values: What the checkpoints have for the key that ranks, None for nothing.
        limit: How many are asked for.
        lowest: Whether the lowest value is the best one.

    Returns:
        Indices into `values`.

    Example:
        >>> shortlist([0.5, 0.25, 0.75, 0.25], 1, lowest=True)
        [1, 3]
    """
    # What is beyond any date counts as the oldest, should it be a time.
    usual = [v for v in values if type(v) is float and -END_OF_TIME < v < END_OF_TIME]
    if not 0 < limit < len(values) or len(usual) < len(values):
        return range(len(values))
    if lowest:
        last = nsmallest(limit, usual)[-1]
        return [index for index, value in enumerate(usual) if value <= last]
    last = nlargest(limit, usual)[-1]
    return [index for index, value in enumerate(usual) if value >= last]


def newest_first(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints from newest to oldest, equally old ones by name, last name first.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(name), {"unixtime": 1.0}, {}) for name in "acb"]
        >>> [ckpt.path.name for ckpt in newest_first(ckpts)]
        ['c', 'b', 'a']
    """
    return sorted(checkpoints, key=lambda ckpt: (ckpt_recency(ckpt), _Name(ckpt)), reverse=True)


class _Name:
    """The name of a checkpoint as the last part of a sort key, read only when all else ties."""

    __slots__ = ("_path",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Name) and self._path == other._path

    def __hash__(self) -> int:
        return hash(self._path)

    def __lt__(self, other: _Name) -> bool:
        mine, theirs = self._path, other._path
        return (mine.name, str(mine)) < (theirs.name, str(theirs))


def function_name(function: Callable[..., object]) -> str:
    """Return how a function is called in messages.

    Example:
        >>> function_name(ckpt_recency)
        'ckpt_recency'
    """
    name: object = getattr(function, "__name__", None)
    return name if isinstance(name, str) else _short(function)


def _call(function: ImportanceKey, checkpoint: Checkpoint) -> object:
    try:
        return function(checkpoint)
    except KeyError as error:
        keys = ", ".join(sorted(map(str, checkpoint.meta))) or "none"
        raise SelectionError(
            f"The importance key {function_name(function)!r} failed on checkpoint "
            f"{checkpoint.path}: it asked for the key {error}, the keys in its meta are: {keys}. "
            "Pass a ckpt_predicate that leaves out checkpoints without the key, for example "
            f"ckpt_predicate=lambda ckpt: {error} in ckpt.meta."
        ) from error


def _as_number(value: object) -> float | None:
    # Tensors, arrays and numpy's scalars all have item(), which refuses more than one element.
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (RuntimeError, TypeError, ValueError):
            return None
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer too large for a float still has its place in the order
        return -inf if value <= 0 else inf


def _short(value: object) -> str:
    if callable(value) and isinstance(getattr(value, "__name__", None), str):
        return function_name(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
