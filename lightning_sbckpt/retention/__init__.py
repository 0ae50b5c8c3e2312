"""What retention keeps: rules in, a plan with a reason for every checkpoint out.

A rule is one reason to keep checkpoints, and several rules add up: a checkpoint goes only if at
least one rule considers it and no rule keeps it. A limit (`Budget`) then takes from what they keep.
Nothing here touches a disk; a plan can be printed before anything is removed.

Two keys in the meta have a meaning of their own. A checkpoint that is `pinned` stays whatever the
rules say. One that is `ephemeral: true` was saved for recovery only: rules don't consider it,
other than `Newest` and those that are told to (`ephemeral=True`), and if none does it stays only
as long as it is the newest.
"""

from __future__ import annotations

from lightning_sbckpt.retention.budget import Budget
from lightning_sbckpt.retention.plan import Decision, plan_retention, rules_from_keys
from lightning_sbckpt.retention.ranked import Best, Important, Newest, Pareto
from lightning_sbckpt.retention.spaced import EveryNEpochs, EveryNSteps, Milestones, TimeSpaced
from lightning_sbckpt.retention.text import parse_rule
from lightning_sbckpt.retention.where import Where

__all__ = [
    "Best",
    "Budget",
    "Decision",
    "EveryNEpochs",
    "EveryNSteps",
    "Important",
    "Milestones",
    "Newest",
    "Pareto",
    "TimeSpaced",
    "Where",
    "parse_rule",
    "plan_retention",
    "rules_from_keys",
]
