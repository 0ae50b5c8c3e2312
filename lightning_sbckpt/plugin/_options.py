"""What the arguments of `SBCheckpoint` mean, and which of them can't be meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import wraps

from lightning_sbckpt._folder.layout import check_name
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin.best import BestBy
from lightning_sbckpt.plugin.collect import RESERVED, is_reserved
from lightning_sbckpt.retention import Best, Important, Newest
from lightning_sbckpt.triggers import (
    AnyOf,
    EveryInterval,
    EveryNEpochs,
    EveryNSteps,
    Trigger,
    may_be_due,
)
from lightning_sbckpt.typing import ImportanceKey, RetentionLimit, RetentionRule


def best_by(
    importance_key: ImportanceKey | None, max_key: str | None, min_key: str | None
) -> BestBy:
    """Return which checkpoint is best.

    Raises:
        SelectionError: More than one key was given.
    """
    if callable(importance_key):
        importance_key = _worst_without_metric(importance_key)
    return BestBy(importance_key, max_key, min_key)


def retention_rules(
    best: BestBy, num_to_keep: int, keep_recent: bool, keep: Sequence[RetentionRule]
) -> list[RetentionRule]:
    """Return which checkpoints stay.

    Raises:
        ConfigurationError: None would.
    """
    # A limit gives no reason to keep anything.
    if num_to_keep < 1 and all(isinstance(rule, RetentionLimit) for rule in keep):
        raise ConfigurationError(
            f"num_to_keep={num_to_keep} would delete every checkpoint as soon as it is written: "
            "keep at least 1, or say what to keep by rules in keep=[...]"
        )
    rules: list[RetentionRule] = []
    if best.min_key is not None:
        rules.append(Best(best.min_key, num_to_keep, mode="min"))
    if best.max_key is not None:
        rules.append(Best(best.max_key, num_to_keep, mode="max"))
    if best.importance_key is not None:
        rules.append(Important(best.importance_key, num_to_keep))
    if keep_recent:
        rules.append(Newest(num_to_keep))
    return [*rules, *keep]


def triggers(
    every_n_epochs: int | None,
    every_n_train_steps: int | None,
    train_time_interval: timedelta | float | None,
    more: Sequence[Trigger] = (),
) -> tuple[AnyOf, AnyOf]:
    """Return the triggers that every batch may set off, and those of validation and epoch end.

    Raises:
        ConfigurationError: A period is none, or one of `more` is no trigger.
    """
    batch: list[Trigger] = []
    if every_n_train_steps is not None:
        batch.append(EveryNSteps(every_n_train_steps))
    if train_time_interval is not None:
        batch.append(EveryInterval(train_time_interval))
    ends: list[Trigger] = [] if every_n_epochs is None else [EveryNEpochs(every_n_epochs)]
    if isinstance(more, Trigger):
        more = [more]
    for trigger in AnyOf(more).triggers:
        # What is never due after a batch must not cost anything there.
        if may_be_due(trigger, "batch"):
            batch.append(trigger)
        if may_be_due(trigger, "validation_end") or may_be_due(trigger, "epoch_end"):
            ends.append(trigger)
    return AnyOf(batch), AnyOf(ends)


def check_when_in_use(given: str) -> str:
    """Return what to do when another process writes to the folder.

    Raises:
        ConfigurationError: It is neither `"raise"` nor `"read"`.
    """
    if given not in ("raise", "read"):
        raise ConfigurationError(f"when_in_use is {given!r}, expected one of 'raise', 'read'")
    return given


def check_lists(lists: Mapping[str, Sequence[str]]) -> None:
    """Refuse one string where a list of names is expected.

    Raises:
        ConfigurationError: An argument is a string.
    """
    for name, given in lists.items():
        if isinstance(given, str):
            raise ConfigurationError(
                f"{name} is the string {given!r}, which would be read letter by letter: expected "
                f"a list of names. Write {name}=[{given!r}]"
            )


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names of recoverables that would be files of ours, or the same file twice.

    Raises:
        ConfigurationError: A name is taken, or given twice.
        CheckpointNameError: A name can't be that of a file.
    """
    taken = sorted({name for name in names if is_reserved(name)})
    if taken:
        raise ConfigurationError(
            f"{where} has the names {', '.join(map(repr, taken))}, which SBCheckpoint uses for its "
            f"own files. Those are: {', '.join(sorted(RESERVED))}, and optimizers and schedulers "
            "with a number"
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{where} has the names {', '.join(map(repr, twice))} twice; every recoverable needs "
            "one of its own"
        )
    for name in names:
        check_name(name, "recoverable")


def check_disjoint(submodules: Sequence[str]) -> None:
    """Refuse submodules inside one another.

    Raises:
        ConfigurationError: One is.
    """
    inside = [
        f"{inner!r} is inside {outer!r}"
        for outer in submodules
        for inner in submodules
        if inner.startswith(f"{outer}.")
    ]
    if inside:
        raise ConfigurationError(
            f"split_model names submodules of which {', '.join(inside)}: each has a file with its "
            "whole state_dict, so name one of them"
        )


def _worst_without_metric(key: ImportanceKey) -> ImportanceKey:
    """Return a key for which a checkpoint without the metric it asks for is the worst, like NaN."""

    @wraps(key)
    def tolerant(checkpoint: Checkpoint) -> float:
        try:
            return key(checkpoint)
        except KeyError:
            return float("nan")

    return tolerant
