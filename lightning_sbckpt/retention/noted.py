"""The rules of retention that a run notes in its history, read back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sbckpt._layout.history import HISTORY_NAME, read_history
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.retention.ranked import Best
from lightning_sbckpt.retention.text import parse_rule
from lightning_sbckpt.selection import Criterion
from lightning_sbckpt.typing import CheckpointPredicate, RetentionRule

logger = logging.getLogger("lightning_sbckpt")


@dataclass(frozen=True)
class RunRules:
    """What a run keeps by.

    Attributes:
        rules: Those that can be read back.
        unknown: Those that can't be, as they are written.
        texts: All of them, as they are written.
        only: Which checkpoints may go at all, as an expression, or None for all.
    """

    rules: tuple[RetentionRule, ...] = ()
    unknown: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    only: str | None = None

    @property
    def predicate(self) -> CheckpointPredicate | None:
        """Which checkpoints may go at all."""
        return as_predicate(self.only)


def events_of(root: Path) -> list[dict[str, Any]]:
    """Return the history of a folder; one that can't be read is said, and is no reason to fail."""
    try:
        return read_history(root)
    except OSError as error:
        logger.warning(
            "%s can't be read, so what happened before is not known: %s",
            root / HISTORY_NAME,
            error.strerror or error,
        )
        return []


def run_rules(root: Path) -> RunRules:
    """Return the rules that were followed last in a folder; none where none were noted."""
    noted = [event for event in events_of(root) if event["event"] == "rules"]
    if not noted:
        return RunRules()
    texts, only = tuple(map(str, noted[-1]["rules"])), noted[-1].get("predicate")
    rules, unknown = [], []
    for text in texts:
        try:
            rules.append(parse_rule(text))
        except SelectionError:
            # One that a function is part of.
            unknown.append(text)
    try:
        as_predicate(only)
    except (SelectionError, TypeError):
        unknown.append(f"ckpt_predicate={only}")
        only = None
    return RunRules(tuple(rules), tuple(unknown), texts, only)


def best_by(rules: tuple[RetentionRule, ...]) -> Criterion | None:
    """Return what the first rule for the best ranks by."""
    for rule in rules:
        if isinstance(rule, Best):
            return Criterion(key=rule.key, lowest=rule.mode == "min")
    return None
