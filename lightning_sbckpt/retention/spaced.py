"""Rules that space: every n steps or epochs, at given ones, ever more sparsely with age.

Each keeps the first checkpoint of some stretch. What is first stays first while others come and
go, so a checkpoint that such a rule has let go is never missed later.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import floor, inf, isfinite
from typing import Literal, cast

from lightning_sbckpt._display.quantities import parse_seconds, say_seconds
from lightning_sbckpt._format.omega import opaque
from lightning_sbckpt.errors import SelectionError, brief
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.selection import newest_first

_Place = tuple[float, ...]
# Beyond it numbers can't be compared with those of floats.
_TOO_MANY = 2**63


@opaque
@dataclass(frozen=True)
class EveryNSteps:
    """Keep the first checkpoint at or after every multiple of `n` steps.

    Considers those that have a number of steps. Of several at the same step the newest counts.
    The trigger of the same name decides when to save; this rule, what of that stays.

    Args:
        n: How many steps.
        key: The key in the meta that has the number of steps.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `n` is not a whole number of at least 1.

    Example:
        >>> from pathlib import Path
        >>> steps = (90, 100, 130, 310)
        >>> ckpts = [Checkpoint(Path(str(step)), {"global_step": step}, {}) for step in steps]
        >>> [ckpt.path.name for ckpt in EveryNSteps(100).keeps(ckpts)]
        ['310', '100']
    """

    n: int
    key: str = field(default="global_step", kw_only=True)
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        _check_period("EveryNSteps", self.n)
        _check_place("EveryNSteps", self.key)

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a number of steps."""
        return self._place(checkpoint) is not None

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the first of every n steps, the last of them first."""
        placed = _in_order(checkpoints, self._place)
        return dict.fromkeys(_firsts(placed, self.n), f"the first of {_every(self.n, 'step')}")

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"not the first of {_every(self.n, 'step')}"

    def _place(self, checkpoint: Checkpoint) -> _Place | None:
        return _steps(checkpoint, self.key)


@opaque
@dataclass(frozen=True)
class EveryNEpochs:
    """Keep the first checkpoint at or after the end of every `n` epochs.

    Considers those that have a number of the epoch. One at the end of an epoch comes before those
    within the next. The trigger of the same name decides when to save; this rule, what stays.

    Args:
        n: How many epochs.
        key: The key in the meta that has the number of the epoch.
        first_epoch: The number of the first epoch: 0 for Lightning, 1 for `EpochCounter`.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `n` is not a whole number of at least 1.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(f"after {e + 1}"), {"epoch": e}, {}) for e in range(5)]
        >>> [ckpt.path.name for ckpt in EveryNEpochs(2).keeps(ckpts)]
        ['after 4', 'after 2']
    """

    n: int
    key: str = field(default="epoch", kw_only=True)
    first_epoch: int = field(default=0, kw_only=True)
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a period."""
        _check_period("EveryNEpochs", self.n)
        _check_place("EveryNEpochs", self.key, self.first_epoch)

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a number of the epoch."""
        return self._place(checkpoint) is not None

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the first of every n epochs, the last of them first."""
        placed = _in_order(checkpoints, self._place)
        return dict.fromkeys(_firsts(placed, self.n), f"the first of {_every(self.n, 'epoch')}")

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"not the first of {_every(self.n, 'epoch')}"

    def _place(self, checkpoint: Checkpoint) -> _Place | None:
        return _epochs(checkpoint, self.key, self.first_epoch)


@opaque
@dataclass(frozen=True)
class Milestones:
    """Keep the first checkpoint at or after each of the given steps, or ends of epochs.

    Considers those that have a number of steps, or of the epoch.

    Args:
        at: The steps; or, with `unit="epochs"`, after how many epochs.
        unit: What `at` counts.
        key: The key in the meta that has the number; by default `global_step` or `epoch`.
        first_epoch: See `EveryNEpochs`.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `at` is not a list of whole numbers of at least 0, or the unit is unknown.

    Example:
        >>> from pathlib import Path
        >>> steps = (90, 100, 130, 310)
        >>> ckpts = [Checkpoint(Path(str(step)), {"global_step": step}, {}) for step in steps]
        >>> for ckpt, reason in Milestones([50, 120]).keeps(ckpts).items():
        ...     print(ckpt.path.name, reason)
        130 the first at or after step 120
        90 the first at or after step 50
    """

    at: Sequence[int]
    unit: Literal["steps", "epochs"] = field(default="steps", kw_only=True)
    key: str | None = field(default=None, kw_only=True)
    first_epoch: int = field(default=0, kw_only=True)
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse milestones that are none; put them in order."""
        given: object = self.at
        listed = isinstance(given, Iterable) and not isinstance(given, str)
        at: list[int] = list(self.at) if listed else []
        if not at or not all(_is_count(milestone, 0) for milestone in at):
            raise SelectionError(
                f"Milestones has at={given!r}, expected a list of whole numbers of at least 0, "
                "such as Milestones([1000, 5000])."
            )
        if self.unit not in ("steps", "epochs"):
            raise SelectionError(
                f"Milestones has unit={self.unit!r}, expected 'steps' or 'epochs'."
            )
        _check_place("Milestones", "" if self.key is None else self.key, self.first_epoch)
        object.__setattr__(self, "at", tuple(sorted(set(at))))

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a number of steps, or of the epoch."""
        return self._place(checkpoint) is not None

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the first at or after each milestone, the last of them first."""
        placed = _in_order(checkpoints, self._place)
        places = [place for place, _ in placed]
        reached: dict[Checkpoint, list[str]] = {}
        for milestone in reversed(self.at):
            first = bisect_left(places, (milestone,))
            if first < len(placed):
                reached.setdefault(placed[first][1], []).append(str(milestone))
        unit = self.unit.removesuffix("s")
        return {
            ckpt: f"the first at or after {unit} {', '.join(reversed(milestones))}"
            for ckpt, milestones in reached.items()
        }

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"not the first at or after one of the {self.unit} {', '.join(map(str, self.at))}"

    def _place(self, checkpoint: Checkpoint) -> _Place | None:
        if self.unit == "steps":
            return _steps(checkpoint, self.key or "global_step")
        return _epochs(checkpoint, self.key or "epoch", self.first_epoch)


@opaque
@dataclass(frozen=True)
class TimeSpaced:
    """Keep checkpoints densely from lately and ever more sparsely from long ago.

    Of the last `n` stretches of time of length `every` the first checkpoint each stays; so it does
    of the last `n` stretches that are `factor` times as long, and so on. About `n` checkpoints stay
    for every `factor`-fold of the age. The newest always stays. Time is that of the checkpoints,
    counted back from the newest; considers those that have one.

    A stretch holds whole stretches of the next shorter length, so what stays of a long one has
    stayed of the short ones before: a checkpoint goes when its turn has come, and none is missed.

    Args:
        every: The shortest stretch: seconds, a `timedelta`, or a text such as `"10 min"`.
        n: How many stretches of each length.
        factor: How many times longer the next length is.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `every` is less than a second, or `n` or `factor` too small.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(str(m)), {"unixtime": 60.0 * m}, {}) for m in range(17)]
        >>> [ckpt.path.name for ckpt in TimeSpaced("1 min", n=3).keeps(ckpts)]
        ['16', '15', '14', '12', '8', '0']
    """

    every: timedelta | float | str
    n: int = field(default=4, kw_only=True)
    factor: int = field(default=2, kw_only=True)
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what spaces nothing."""
        object.__setattr__(self, "every", parse_seconds(self.every, "TimeSpaced"))
        for name, value, least in (("n", self.n, 1), ("factor", self.factor, 2)):
            if not _is_count(value, least):
                raise SelectionError(
                    f"TimeSpaced has {name}={value!r}, expected a whole number of at least {least}."
                )

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a time."""
        return ckpt_recency(checkpoint) > -inf

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the newest, and the first of each stretch, newest first."""
        ranked = newest_first(checkpoints)
        if not ranked:
            return {}
        now = self._stretch(ranked[0])
        kept = {ranked[0]: "the newest"}
        firsts: dict[tuple[int, int], Checkpoint] = {}
        lengths: dict[Checkpoint, int] = {}
        for ckpt in ranked:
            length = 1
            while now // length - self._stretch(ckpt) // length >= self.n:
                length *= self.factor
            lengths[ckpt] = length
        for length in set(lengths.values()):
            # From new to old: what stands there in the end is the oldest.
            firsts.update(((length, self._stretch(ckpt) // length), ckpt) for ckpt in ranked)
        for ckpt in ranked[1:]:
            length = lengths[ckpt]
            if firsts[length, self._stretch(ckpt) // length] is ckpt:
                kept[ckpt] = f"the first of its {say_seconds(length * self._seconds)}"
        return kept

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return "not the first of its stretch of time"

    @property
    def _seconds(self) -> float:
        return cast("float", self.every)  # Since __post_init__ it is.

    def _stretch(self, checkpoint: Checkpoint) -> int:
        return floor(ckpt_recency(checkpoint) / self._seconds)


def _number(checkpoint: Checkpoint, key: str) -> float | None:
    value = checkpoint.meta.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, int) or isfinite(value) else None


def _steps(checkpoint: Checkpoint, key: str) -> _Place | None:
    steps = _number(checkpoint, key)
    return None if steps is None else (steps,)


def _epochs(checkpoint: Checkpoint, key: str, first_epoch: int) -> _Place | None:
    epoch = _number(checkpoint, key)
    if epoch is None:
        return None
    within = checkpoint.meta.get("end-of-epoch") is False
    done = epoch - first_epoch + (not within)
    return done, within, _number(checkpoint, "global_step") or 0


def _in_order(
    checkpoints: Iterable[Checkpoint], place_of: Callable[[Checkpoint], _Place | None]
) -> list[tuple[_Place, Checkpoint]]:
    # Python's sort is stable: at the same place the newest comes first.
    placed = [(place_of(ckpt), ckpt) for ckpt in newest_first(checkpoints)]
    known = [(place, ckpt) for place, ckpt in placed if place is not None]
    return sorted(known, key=lambda pair: pair[0])


def _firsts(placed: Sequence[tuple[_Place, Checkpoint]], n: int) -> list[Checkpoint]:
    firsts: dict[float, Checkpoint] = {}
    for place, ckpt in placed:
        multiple = place[0] // n
        if multiple >= 1:
            firsts.setdefault(multiple, ckpt)
    return list(reversed(firsts.values()))


def _every(n: int, unit: str) -> str:
    return f"every {unit}" if n == 1 else f"every {n} {unit}s"


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _TOO_MANY


def _check_place(owner: str, key: object, first_epoch: object = 0) -> None:
    if not isinstance(key, str):
        raise SelectionError(
            f"{owner} has key={brief(key)}, expected the name of a key in the meta, such as "
            f"{owner}(..., key='global_step')."
        )
    if not _is_count(first_epoch, 0):
        raise SelectionError(
            f"{owner} has first_epoch={brief(first_epoch)}, expected the number of the first epoch, "
            "0 or 1."
        )


def _check_period(owner: str, n: object) -> None:
    if not _is_count(n, 1):
        raise SelectionError(f"{owner} has n={n!r}, expected a whole number of at least 1.")
