"""Rules that rank: the newest, the best by a key or by a function, the best by several keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from operator import ge
from typing import Literal

from lightning_sbckpt._format.omega import opaque
from lightning_sbckpt.errors import SelectionError, brief
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import (
    Criterion,
    function_name,
    importance,
    newest_first,
    rank_checkpoints,
)
from lightning_sbckpt.typing import ImportanceKey


@opaque
@dataclass(frozen=True)
class Newest:
    """Keep the newest `n` checkpoints; considers every one.

    Args:
        n: How many.
        ephemeral: Consider those saved for recovery only, too; if not, they take no place.

    Raises:
        SelectionError: `n` is not a whole number of 0 or more.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(str(time)), {"unixtime": time}, {}) for time in (1, 2)]
        >>> {ckpt.path.name: reason for ckpt, reason in Newest(1).keeps(ckpts).items()}
        {'2': 'among the newest 1'}
    """

    n: int
    ephemeral: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a count."""
        check_count("Newest", "n", self.n)

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return True: every checkpoint has an age."""
        del checkpoint
        return True

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the newest of the checkpoints, each with the reason."""
        ranked = newest_first(checkpoints)[: self.n]
        return dict.fromkeys(ranked, f"among the newest {self.n}")

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"older than the newest {self.n}" if self.n else "none are kept for being new"


@opaque
@dataclass(frozen=True)
class Best:
    """Keep the `n` checkpoints with the best value of a key; considers those that have it.

    NaN ranks worst; of equally good checkpoints the newer stays.

    Args:
        key: The key in the meta.
        n: How many.
        mode: Whether the lowest or the highest value is best.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `n` is not a whole number of 0 or more, or `mode` is unknown.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(str(acc)), {"acc": acc}, {}) for acc in (0.9, 0.8)]
        >>> {c.path.name: reason for c, reason in Best("acc", mode="max").keeps(ckpts).items()}
        {'0.9': 'among the 1 best acc (max): 0.9'}
    """

    key: str
    n: int = 1
    mode: Literal["min", "max"] = field(default="min", kw_only=True)
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a count or mode that cannot be meant."""
        check_count("Best", "n", self.n)
        if self.mode not in ("min", "max"):
            raise SelectionError(
                f"Best({self.key!r}) has mode={self.mode!r}, expected 'min' or 'max'."
            )
        if not isinstance(self.key, str):
            raise SelectionError(
                f"Best has key={self.key!r}, expected the name of a key in the meta. To keep by "
                "a function of the checkpoint, use Important."
            )

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a value for the key."""
        return self._criterion().applies(checkpoint)

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the best of the checkpoints, each with its value as the reason."""
        criterion = self._criterion()
        ranked = rank_checkpoints(checkpoints, criterion, limit=self.n)
        sign = -1.0 if criterion.lowest else 1.0
        return {
            ckpt: f"among the {self.n} best {self.key} ({self.mode}): "
            f"{sign * criterion.score(ckpt):g}"
            for ckpt in ranked
        }

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        if self.n:
            return f"not among the {self.n} best {self.key}"
        return f"none are kept for their {self.key}"

    def _criterion(self) -> Criterion:
        return Criterion(key=self.key, lowest=self.mode == "min")


@opaque
@dataclass(frozen=True)
class Important:
    """Keep the `n` checkpoints for which a function is highest; considers every one.

    Args:
        key_function: A function of a checkpoint, which returns a number.
        n: How many.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: `n` is not a whole number of 0 or more, or `key_function` is no function.

    Example:
        >>> from pathlib import Path
        >>> def size(ckpt):
        ...     return len(ckpt.paramfiles)
        >>> ckpts = [Checkpoint(Path("a"), {}, {}), Checkpoint(Path("b"), {}, {"model": Path("m")})]
        >>> {ckpt.path.name: reason for ckpt, reason in Important(size, 1).keeps(ckpts).items()}
        {'b': 'among the 1 most important by size'}
    """

    key_function: ImportanceKey
    n: int
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be a count or called."""
        check_count("Important", "n", self.n)
        importance(importance_key=self.key_function)

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return True: the function is asked about every checkpoint."""
        del checkpoint
        return True

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return the most important of the checkpoints, each with the reason."""
        criterion = importance(importance_key=self.key_function)
        ranked = rank_checkpoints(checkpoints, criterion, limit=self.n)
        return dict.fromkeys(ranked, f"among the {self._what()}")

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        if self.n:
            return f"not among the {self._what()}"
        return f"none are kept for being important by {function_name(self.key_function)}"

    def _what(self) -> str:
        return f"{self.n} most important by {function_name(self.key_function)}"


@opaque
@dataclass(frozen=True)
class Pareto:
    """Keep what nothing else beats in every key at once; considers those that have all the keys.

    A checkpoint goes if another is at least as good in each key and better in one. Of those that
    are equal in every key the newer stays. NaN is as good as nothing, so a checkpoint with it goes.

    Args:
        keys: Two keys in the meta, or more.
        modes: For each key whether the lowest (`"min"`) or highest (`"max"`) value is best; one
            word for all of them.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: There is no key, a mode is unknown, or there are not as many as keys.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [
        ...     Checkpoint(Path(name), {"val_loss": loss, "latency": ms}, {})
        ...     for name, loss, ms in [("small", 0.5, 10), ("large", 0.4, 30), ("bad", 0.5, 40)]
        ... ]
        >>> [ckpt.path.name for ckpt in Pareto("val_loss", "latency").keeps(ckpts)]
        ['large', 'small']
    """

    keys: tuple[str, ...]
    modes: tuple[str, ...]
    ephemeral: bool

    def __init__(
        self, *keys: str, modes: str | Sequence[str] = "min", ephemeral: bool = False
    ) -> None:
        """Refuse keys and modes that can't be meant."""
        every = (modes,) * len(keys) if isinstance(modes, str) else tuple(modes)
        if not keys or not all(isinstance(key, str) for key in keys):
            raise SelectionError(
                f"Pareto was given {keys!r}, expected names of keys in the meta, such as "
                "Pareto('val_loss', 'latency')."
            )
        if len(every) != len(keys) or not set(every) <= {"min", "max"}:
            raise SelectionError(
                f"Pareto has modes={modes!r} for the keys {', '.join(keys)}: expected 'min' or "
                f"'max' for each of them, {len(keys)} in all, or one word for all."
            )
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "modes", every)
        object.__setattr__(self, "ephemeral", ephemeral)

    def __repr__(self) -> str:
        """Return it as it is written, so that it can be read again."""
        keys = ", ".join(map(repr, self.keys))
        return f"Pareto({keys}, modes={self.modes!r}, ephemeral={self.ephemeral})"

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint has a value for each key."""
        return all(criterion.applies(checkpoint) for criterion in self._criteria())

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return those that no other beats, best in the first key first."""
        criteria = self._criteria()
        scored = [
            (tuple(criterion.score(ckpt) for criterion in criteria), ckpt)
            for ckpt in newest_first(checkpoints)
        ]
        scored = [pair for pair in scored if not any(map(isnan, pair[0]))]
        # Python's sort is stable, so of equal ones the newest comes first. Whatever beats a
        # checkpoint comes before it, and so do those equal to it that are newer.
        scored.sort(key=lambda pair: pair[0], reverse=True)
        # None before it is worse in the first key, so the others decide: what is beaten in those
        # beats nothing that another does not.
        front: list[tuple[float, ...]] = []
        kept: dict[Checkpoint, str] = {}
        for (_, *score), ckpt in scored:
            rest = tuple(score)
            if not any(_covers(other, rest) for other in front):
                front = [other for other in front if not _covers(rest, other)] + [rest]
                kept[ckpt] = f"no other is better in all of {self._what()}"
        return kept

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"another is as good or better in all of {self._what()}"

    def _criteria(self) -> list[Criterion]:
        pairs = zip(self.keys, self.modes, strict=True)
        return [Criterion(key=key, lowest=mode == "min") for key, mode in pairs]

    def _what(self) -> str:
        pairs = zip(self.keys, self.modes, strict=True)
        return ", ".join(f"{key} ({mode})" for key, mode in pairs)


def _covers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(map(ge, one, other))


def check_count(owner: str, name: str, n: object) -> None:
    """Return if `n` can be a count of checkpoints.

    Raises:
        SelectionError: It can't.

    Example:
        >>> check_count("Newest", "n", 2)
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**63:
        raise SelectionError(
            f"{owner} has {name}={brief(n)}, expected a whole number of checkpoints to keep, 0 or "
            "more; 0 removes every checkpoint that is considered."
        )
