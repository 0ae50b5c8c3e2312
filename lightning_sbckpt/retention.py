"""What retention keeps: rules in, a plan with a reason for every checkpoint out.

A rule is one reason to keep checkpoints, and several rules add up: a checkpoint goes only if at
least one rule considers it and no rule keeps it. Nothing here touches a disk; a plan can be
printed before anything is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.selection import (
    Criterion,
    function_name,
    importance,
    newest_first,
    rank_checkpoints,
)
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey, RetentionRule

__all__ = [
    "Best",
    "Decision",
    "Important",
    "Newest",
    "plan_retention",
    "rules_from_keys",
]


@dataclass(frozen=True)
class Decision:
    """What happens to one checkpoint, and why.

    Attributes:
        checkpoint: The checkpoint.
        keep: Whether it stays.
        reason: Why, in words.

    Example:
        >>> from pathlib import Path
        >>> print(Decision(Checkpoint(Path("CKPT+a"), {}, {}), True, "among the newest 1"))
        keep   CKPT+a: among the newest 1
    """

    checkpoint: Checkpoint
    keep: bool
    reason: str

    def __str__(self) -> str:
        """Return one line for a log or a dry run."""
        verb = "keep" if self.keep else "remove"
        return f"{verb:<6} {self.checkpoint.path.name}: {self.reason}"


@dataclass(frozen=True)
class Newest:
    """Keep the newest `n` checkpoints; considers every one.

    Raises:
        SelectionError: `n` is not a whole number of 0 or more.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(str(time)), {"unixtime": time}, {}) for time in (1, 2)]
        >>> {ckpt.path.name: reason for ckpt, reason in Newest(1).keeps(ckpts).items()}
        {'2': 'among the newest 1'}
    """

    n: int

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a count."""
        _check_count("Newest", "n", self.n)

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


@dataclass(frozen=True)
class Best:
    """Keep the `n` checkpoints with the best value of a key; considers those that have it.

    NaN ranks worst; of equally good checkpoints the newer stays.

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

    def __post_init__(self) -> None:
        """Refuse a count or mode that cannot be meant."""
        _check_count("Best", "n", self.n)
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


@dataclass(frozen=True)
class Important:
    """Keep the `n` checkpoints for which a function is highest; considers every one.

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

    def __post_init__(self) -> None:
        """Refuse what cannot be a count or called."""
        _check_count("Important", "n", self.n)
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


def plan_retention(
    checkpoints: Iterable[Checkpoint],
    rules: Sequence[RetentionRule],
    *,
    predicate: CheckpointPredicate | None = None,
    protected: Iterable[tuple[Checkpoint, str]] = (),
) -> list[Decision]:
    """Decide for every checkpoint whether it stays, and say why.

    Args:
        checkpoints: The checkpoints there are, in any order.
        rules: The reasons to keep; without any, everything stays.
        predicate: Says which checkpoints may be removed; the others stay and the rules do not
            see them. None lets all be removed.
        protected: Checkpoints that stay whatever the rules say, each with the reason. They still
            take their place in the rules' rankings.

    Returns:
        One decision per checkpoint, newest first.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [
        ...     Checkpoint(Path(name), {"unixtime": time, "loss": loss}, {})
        ...     for name, time, loss in [("a", 1, 0.1), ("b", 2, 0.9), ("c", 3, 0.5)]
        ... ]
        >>> for decision in plan_retention(ckpts, [Best("loss"), Newest(1)]):
        ...     print(decision)
        keep   c: among the newest 1
        remove b: not among the 1 best loss, older than the newest 1
        keep   a: among the 1 best loss (min): 0.1
    """
    # By path, since two records of one checkpoint need not compare equal: NaN differs from NaN.
    everything = {ckpt.path: ckpt for ckpt in checkpoints}
    protection: dict[object, list[str]] = {}
    for ckpt, reason in protected:
        protection.setdefault(ckpt.path, []).append(reason)
    removable = [ckpt for ckpt in everything.values() if predicate is None or predicate(ckpt)]
    in_play = {ckpt.path for ckpt in removable}
    keeps: dict[object, list[str]] = {}
    rejects: dict[object, list[str]] = {}
    for rule in rules:
        considered = [ckpt for ckpt in removable if rule.considers(ckpt)]
        kept = {ckpt.path: reason for ckpt, reason in rule.keeps(considered).items()}
        for ckpt in considered:
            if ckpt.path in kept:
                keeps.setdefault(ckpt.path, []).append(kept[ckpt.path])
            else:
                rejects.setdefault(ckpt.path, []).append(rule.rejects(ckpt))

    def decide(ckpt: Checkpoint) -> Decision:
        reasons = protection.get(ckpt.path, []) + keeps.get(ckpt.path, [])
        if reasons:
            return Decision(ckpt, True, ", ".join(reasons))
        if not rules:
            return Decision(ckpt, True, "no retention rule")
        if ckpt.path not in in_play:
            return Decision(ckpt, True, "not for this retention: ckpt_predicate is false")
        if ckpt.path not in rejects:
            return Decision(ckpt, True, "no rule considers it")
        return Decision(ckpt, False, ", ".join(rejects[ckpt.path]))

    return [decide(ckpt) for ckpt in newest_first(everything.values())]


def rules_from_keys(
    *,
    num_to_keep: int,
    min_keys: Sequence[str] | None = (),
    max_keys: Sequence[str] | None = (),
    importance_keys: Iterable[ImportanceKey] | None = (),
) -> list[RetentionRule]:
    """Return the rules that SpeechBrain's arguments of retention stand for.

    Args:
        num_to_keep: How many checkpoints each of the keys keeps; 0 keeps none.
        min_keys: Keys in the meta of which the lowest values stay.
        max_keys: Keys in the meta of which the highest values stay.
        importance_keys: Functions of a checkpoint of which the highest results stay.

    Returns:
        One rule per key, in the order of the arguments.

    Raises:
        SelectionError: `num_to_keep` is negative, or keys came as one string.

    Example:
        >>> rules_from_keys(num_to_keep=2, min_keys=["loss"], importance_keys=[ckpt_recency])
        [Best(key='loss', n=2, mode='min'), Newest(n=2)]
    """
    _check_count("Retention", "num_to_keep", num_to_keep)
    rules: list[RetentionRule] = []
    rules += [Best(key, num_to_keep, mode="min") for key in _keys("min_keys", min_keys)]
    rules += [Best(key, num_to_keep, mode="max") for key in _keys("max_keys", max_keys)]
    rules += [
        Newest(num_to_keep) if function is ckpt_recency else Important(function, num_to_keep)
        for function in importance_keys or ()
    ]
    return rules


def _check_count(owner: str, name: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise SelectionError(
            f"{owner} has {name}={n!r}, expected a whole number of checkpoints to keep, 0 or "
            "more; 0 removes every checkpoint that is considered."
        )


def _keys(name: str, keys: Sequence[str] | None) -> list[str]:
    if isinstance(keys, str):
        raise SelectionError(
            f"{name} is the string {keys!r}, which would be read letter by letter: expected a "
            f"list of keys. Write {name}=[{keys!r}]."
        )
    return list(keys or ())
