"""A plan of retention: which checkpoints go, which stay, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

from lightning_sbckpt._display.wording import short_name
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention.ranked import Best, Important, Newest, check_count
from lightning_sbckpt.selection import newest_first
from lightning_sbckpt.typing import (
    BytesOf,
    CheckpointPredicate,
    ImportanceKey,
    RetentionLimit,
    RetentionRule,
)

__all__ = ["Decision", "plan_retention", "rules_from_keys"]


@dataclass(frozen=True)
class Decision:
    """What happens to one checkpoint, and why.

    Attributes:
        checkpoint: The checkpoint.
        keep: Whether it stays.
        reason: Why, in words.

    Example:
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


class Decisions(list[Decision]):
    """What happens to each checkpoint; a notebook shows it as a table."""

    def _repr_html_(self) -> str:
        from lightning_sbckpt._display import cards

        rows = [
            ("stays" if each.keep else "goes", short_name(each.checkpoint.path.name), each.reason)
            for each in self
        ]
        going = sum(not each.keep for each in self)
        where = self[0].checkpoint.path.parent if self else ""
        title = f"{len(self) - going} of {len(self)} checkpoints stay"
        table = ("", ("", "checkpoint", "why"), rows)
        return cards.shown(title, where, lambda: cards.tables_card(title, where, [table]))


def plan_retention(
    checkpoints: Iterable[Checkpoint],
    rules: Sequence[RetentionRule],
    *,
    predicate: str | CheckpointPredicate | None = None,
    protected: Iterable[tuple[Checkpoint, str]] = (),
    damaged: Mapping[Path, str] | None = None,
    bytes_of: BytesOf | None = None,
) -> list[Decision]:
    """Decide for every checkpoint whether it stays, and say why.

    Args:
        checkpoints: The checkpoints there are, in any order.
        rules: The reasons to keep, and limits; without any, everything stays.
        predicate: Says which checkpoints may be removed; the others stay and the rules do not
            see them. A function, or an expression. None lets all be removed.
        protected: Checkpoints that stay whatever the rules say, each with the reason. They still
            take their place in the rules' rankings, as do those pinned in their meta.
        damaged: Checkpoints that can't be recovered from, by path, each with the reason. The rules
            don't see them, so that none stands for the best or the newest, and they stay: what can
            still be read of them may be worth something to their owner.
        bytes_of: How large checkpoints are, for a limit that doesn't know itself; asked only if
            there is one.

    Returns:
        One decision per checkpoint, newest first.

    Raises:
        SelectionError: A rule can't rank a checkpoint, or an expression can't be read.

    Example:
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
    everything = newest_first({ckpt.path: ckpt for ckpt in checkpoints}.values())
    wanted = as_predicate(predicate)
    damaged = damaged or {}
    removable = [
        ckpt for ckpt in everything if ckpt.path not in damaged and (wanted is None or wanted(ckpt))
    ]
    votes = {ckpt.path: _Votes() for ckpt in everything}
    for ckpt, reason in protected:
        votes.setdefault(ckpt.path, _Votes()).protections.append(reason)
    for ckpt in everything:
        if ckpt.meta.get("pinned"):
            votes[ckpt.path].protections.append(_pin(ckpt))
    reasons_to_keep = [rule for rule in rules if not isinstance(rule, RetentionLimit)]
    for place, rule in enumerate(reasons_to_keep):
        _ask(rule, place, removable, votes)
    if reasons_to_keep:
        _judge_ephemeral(removable, votes)
    in_play = {ckpt.path for ckpt in removable}

    def decide(ckpt: Checkpoint) -> Decision:
        mine = votes[ckpt.path]
        reasons = mine.protections + mine.keeps
        if reasons:
            return Decision(ckpt, True, ", ".join(reasons))
        if not rules:
            return Decision(ckpt, True, "no retention rule")
        if ckpt.path in damaged:
            return Decision(ckpt, True, f"damaged, and left to you: {damaged[ckpt.path]}")
        if ckpt.path not in in_play:
            return Decision(ckpt, True, "not for this retention: ckpt_predicate is false")
        if not mine.rejects:
            return Decision(ckpt, True, "no rule considers it")
        return Decision(ckpt, False, ", ".join(mine.rejects))

    plan = [decide(ckpt) for ckpt in everything]
    for limit in rules:
        if isinstance(limit, RetentionLimit):
            plan = _limited(plan, limit, votes, in_play, bytes_of)
    return Decisions(plan)


@dataclass
class _Votes:
    """What was said about one checkpoint."""

    protections: list[str] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    # The first place it has in any rule that keeps it, and that rule's.
    standing: tuple[float, float] = (inf, inf)
    is_best: bool = False


def _pin(checkpoint: Checkpoint) -> str:
    reason = checkpoint.meta["pinned"]
    return f"pinned: {reason}" if isinstance(reason, str) and reason != "pinned" else "pinned"


def _is_ephemeral(checkpoint: Checkpoint) -> bool:
    return checkpoint.meta.get("ephemeral") is True


def _ask(
    rule: RetentionRule, place: int, removable: Sequence[Checkpoint], votes: dict[Path, _Votes]
) -> None:
    sees_all = getattr(rule, "ephemeral", True)
    seen = [ckpt for ckpt in removable if sees_all or not _is_ephemeral(ckpt)]
    considered = [ckpt for ckpt in seen if rule.considers(ckpt)]
    kept = {ckpt.path: reason for ckpt, reason in rule.keeps(considered).items()}
    for rank, (path, reason) in enumerate(kept.items()):
        votes[path].keeps.append(reason)
        votes[path].standing = min(votes[path].standing, (rank, place))
        votes[path].is_best |= rank == 0 and isinstance(rule, (Best, Important))
    for ckpt in considered:
        if ckpt.path not in kept:
            votes[ckpt.path].rejects.append(rule.rejects(ckpt))


def _judge_ephemeral(removable: Sequence[Checkpoint], votes: dict[Path, _Votes]) -> None:
    # One that no rule has an opinion about would stay for ever, and nobody wants it to.
    for ckpt in removable:
        mine = votes[ckpt.path]
        if not _is_ephemeral(ckpt) or mine.keeps:
            continue
        if mine.rejects:
            mine.rejects.insert(0, "ephemeral")
        elif ckpt is removable[0]:
            mine.keeps.append("ephemeral, and the newest to recover from")
        else:
            mine.rejects.append("ephemeral, and there is a newer one to recover from")


def _limited(
    plan: Sequence[Decision],
    limit: RetentionLimit,
    votes: dict[Path, _Votes],
    in_play: set[Path],
    bytes_of: BytesOf | None,
) -> list[Decision]:
    staying = [decision.checkpoint for decision in plan if decision.keep]
    newest = next((ckpt.path for ckpt in staying if ckpt.path in in_play), None)
    fixed: list[Checkpoint] = []
    optional: list[Checkpoint] = []
    for ckpt in staying:
        mine = votes[ckpt.path]
        stays = mine.protections or mine.is_best or ckpt.path == newest or ckpt.path not in in_play
        (fixed if stays else optional).append(ckpt)
    # The plan is newest first and the sort stable: of equally wanted ones the newer is wanted more.
    optional.sort(key=lambda ckpt: (*votes[ckpt.path].standing, -len(votes[ckpt.path].keeps)))
    dropped, complaint = limit.exceeding(optional, fixed, bytes_of)
    gone = {ckpt.path: reason for ckpt, reason in dropped.items()}
    kept_in_spite = {ckpt.path for ckpt in fixed if ckpt.path in in_play} if complaint else set()

    def decide(decision: Decision) -> Decision:
        path = decision.checkpoint.path
        if path in gone:
            reason = f"{gone[path]} ({decision.reason})"
            return replace(decision, keep=False, reason=reason)
        if path in kept_in_spite:
            return replace(decision, reason=f"{decision.reason}, {complaint}")
        return decision

    return [decide(decision) for decision in plan]


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
        [Best(key='loss', n=2, mode='min', ephemeral=False), Newest(n=2, ephemeral=True)]
    """
    check_count("Retention", "num_to_keep", num_to_keep)
    rules: list[RetentionRule] = []
    rules += [Best(key, num_to_keep, mode="min") for key in _keys("min_keys", min_keys)]
    rules += [Best(key, num_to_keep, mode="max") for key in _keys("max_keys", max_keys)]
    rules += [
        Newest(num_to_keep) if function is ckpt_recency else Important(function, num_to_keep)
        for function in importance_keys or ()
    ]
    return rules


def _keys(name: str, keys: Sequence[str] | None) -> list[str]:
    if isinstance(keys, str):
        raise SelectionError(
            f"{name} is the string {keys!r}, which would be read letter by letter: expected a "
            f"list of keys. Write {name}=[{keys!r}]."
        )
    return list(keys or ())
