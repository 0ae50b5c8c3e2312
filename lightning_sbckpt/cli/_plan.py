"""What rules of retention say of a folder, with what they must not touch left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import click

from lightning_sbckpt._layout.manifest import lineage_of
from lightning_sbckpt._layout.sizes import checkpoint_bytes
from lightning_sbckpt._views.timeline import build_timeline
from lightning_sbckpt.cli._folders import Folder, first_sound, of_newest_run, require_key
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import Expression
from lightning_sbckpt.inspect import marks_of
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention import (
    Best,
    Decision,
    Pareto,
    Where,
    parse_rule,
    plan_retention,
    rules_from_keys,
)
from lightning_sbckpt.retention.noted import RunRules, best_by, events_of, run_rules
from lightning_sbckpt.retention.protected import Protected, protected_checkpoints
from lightning_sbckpt.selection import Criterion, rank_checkpoints
from lightning_sbckpt.typing import RetentionRule

F = TypeVar("F", bound=Callable[..., object])


def rule_options(command: F) -> F:
    """Give a command the options that say which rules are meant."""
    for option in (
        click.option(
            "--num-to-keep",
            type=click.IntRange(min=0),
            help="How many are kept by each of the keys, and how many of the newest with them; "
            "without a key, of the newest alone.  [default: 1]",
        ),
        click.option("--max-key", "max_keys", multiple=True, help="Keep the highest of a key."),
        click.option("--min-key", "min_keys", multiple=True, help="Keep the lowest of a key."),
        click.option(
            "--keep",
            multiple=True,
            metavar="RULE",
            help="""A rule, such as 'Best("val_loss", 2)' or 'Newest(3)'. May be given again. """
            "By default the rules that the run follows.",
        ),
    ):
        command = option(command)
    return command


def chosen_rules(
    folder: Folder,
    keep: Sequence[str],
    min_keys: Sequence[str],
    max_keys: Sequence[str],
    num_to_keep: int | None,
) -> RunRules:
    """Return the rules that the options ask for; without any, those of the run.

    Raises:
        SelectionError: An option is no rule.
    """
    rules = [parse_rule(text) for text in keep]
    if min_keys or max_keys or num_to_keep is not None:
        rules += rules_from_keys(
            num_to_keep=1 if num_to_keep is None else num_to_keep,
            min_keys=min_keys,
            max_keys=max_keys,
            importance_keys=[ckpt_recency],
        )
    for rule in rules:
        _check_keys(rule, folder.checkpoints)
    return RunRules(tuple(rules)) if rules else run_rules(folder.path)


def _check_keys(rule: RetentionRule, checkpoints: Sequence[Checkpoint]) -> None:
    keys = [rule.key] if isinstance(rule, Best) else rule.keys if isinstance(rule, Pareto) else []
    for key in keys:
        require_key(key, checkpoints)
    if isinstance(rule, Where) and isinstance(rule.predicate, Expression):
        rule.predicate.check_keys(checkpoints)


def plan(folder: Folder, rules: RunRules) -> list[Decision]:
    """Return what happens to each checkpoint by the rules, newest first; reads no manifest."""
    return _planned(folder, rules, _protected(folder, rules, None))


def careful_plan(
    folder: Folder,
    rules: RunRules,
    *,
    all_runs: bool = False,
    also_newest: bool = False,
) -> tuple[list[Decision], Protected]:
    """Return a plan that can be carried out, and what is protected in it.

    Args:
        folder: The folder.
        rules: At least one.
        all_runs: Let go also what another run wrote, and what was made by hand.
        also_newest: Let go also the newest that is whole.
    """
    wanted = rules.predicate
    protected = Protected([], wanted) if all_runs else _protected(folder, rules, lineage_of)
    found = _planned(folder, rules, protected)
    if not also_newest and not all(each.keep for each in found):
        sound = first_sound(each.checkpoint for each in found)
        going = {each.checkpoint.path for each in found if not each.keep}
        if sound is not None and sound.path in going:
            protected.reasons.append((sound, "the newest that is whole, to resume from"))
            found = _planned(folder, rules, protected)
    return found, protected


def _planned(folder: Folder, rules: RunRules, protected: Protected) -> list[Decision]:
    return plan_retention(
        folder.checkpoints,
        rules.rules,
        predicate=protected,
        protected=protected.reasons,
        bytes_of=checkpoint_bytes,
    )


def _protected(
    folder: Folder,
    rules: RunRules,
    lineage_of: Callable[[Checkpoint], Mapping[str, object]] | None,
) -> Protected:
    """Return what the run that saved last must not touch, as far as is noted or asked for."""
    timeline = build_timeline(folder.checkpoints, events_of(folder.path), lineage_of=lineage_of)
    there = [
        life
        for life in timeline.lives
        if life.checkpoint is not None and (lineage_of is not None or life.size is not None)
    ]
    last = next((life for life in reversed(there) if not life.averaged_from), None)
    lineages = {life.checkpoint.path: life.lineage for life in there if life.checkpoint}
    return protected_checkpoints(
        [ckpt for ckpt in folder.checkpoints if ckpt.path in lineages],
        None if last is None else last.lineage.get("run"),
        lambda ckpt: lineages[ckpt.path],
        wanted=rules.predicate,
    )


@dataclass(frozen=True)
class Standing:
    """How the checkpoints of a folder stand by some rules.

    Attributes:
        criterion: Which is best.
        marks: Words beside checkpoints.
        decisions: What the rules say of each; empty if nobody can tell.
        remark: Why nobody can, or an empty text.
    """

    criterion: Criterion
    marks: Mapping[Path, Sequence[str]]
    decisions: Mapping[Path, Decision]
    remark: str = ""


def standing(folder: Folder, rules: RunRules) -> Standing:
    """Return how the checkpoints stand; one that can't be ranked is said, and is no reason to fail."""
    criterion = best_by(rules.rules) or Criterion()
    try:
        marks = _marks(folder, criterion)
        if rules.unknown:
            remark = (
                f"what stays is not known: the rule {rules.unknown[0]} can't be read back. Give "
                "rules with --keep"
            )
            return Standing(criterion, marks, {}, remark)
        found = plan(folder, rules) if rules.rules else []
        return Standing(criterion, marks, {each.checkpoint.path: each for each in found})
    except SelectionError as error:
        nothing = Criterion()
        return Standing(nothing, marks_of(folder.checkpoints, nothing), {}, str(error))


def _marks(folder: Folder, criterion: Criterion) -> dict[Path, list[str]]:
    """Return the words beside checkpoints; the best is that of the run that saved last."""
    marks = marks_of(folder.checkpoints, Criterion())
    if criterion.key is not None:
        ranked = of_newest_run(folder, rank_checkpoints(folder.checkpoints, criterion))
        for best in islice(ranked, 1):
            marks[best.path] = ["best", *marks.get(best.path, [])]
    return marks


def in_short(decision: Decision) -> str:
    """Return what a plan says of one checkpoint, in few words.

    Example:
        >>> ckpt = Checkpoint(Path("CKPT+a"), {}, {})
        >>> in_short(Decision(ckpt, True, "among the newest 1, among the 2 best loss (min): 0.1"))
        'stays: newest 1, 2 best loss'
        >>> in_short(Decision(ckpt, False, "older than the newest 1"))
        'goes: older than the newest 1'
    """
    if not decision.keep:
        return f"goes: {decision.reason}"
    reason = re.sub(
        r"(?<!not )\bamong the (\d+ best .*?) \((?:min|max)\): [^,]+", r"\1", decision.reason
    )
    return f"stays: {re.sub(r'(?<!not )among the newest', 'newest', reason)}"
