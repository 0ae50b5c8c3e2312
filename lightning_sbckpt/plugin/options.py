"""What the arguments of `SBCheckpoint` mean, and which of them can't be meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

from lightning_sbckpt._display.quantities import as_seconds
from lightning_sbckpt._format.omega import plain
from lightning_sbckpt._save.saver import SavePolicy
from lightning_sbckpt.errors import ConfigurationError, SelectionError
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin.dirpath import absolute, folder
from lightning_sbckpt.plugin.policies import with_shorthands
from lightning_sbckpt.plugin.preemption import Preemption, as_preemption
from lightning_sbckpt.plugin.state.adapt import Adaptation
from lightning_sbckpt.plugin.state.capture import Meta, Recoverables
from lightning_sbckpt.plugin.state.parts import check_disjoint, check_names
from lightning_sbckpt.retention import Best, Important, Newest, parse_rule
from lightning_sbckpt.selection import function_name, importance
from lightning_sbckpt.triggers import (
    AnyOf,
    EveryInterval,
    EveryNEpochs,
    EveryNSteps,
    Trigger,
    may_be_due,
    parse_trigger,
)
from lightning_sbckpt.typing import (
    CheckpointPredicate,
    ImportanceKey,
    OnChange,
    RetentionLimit,
    RetentionRule,
    WhenInUse,
)

_SHOWN = 80


@dataclass(frozen=True)
class BestBy:
    """Which checkpoint is best: by one of three keys, or by none, and then it is the newest."""

    importance_key: ImportanceKey | None = None
    max_key: str | None = None
    min_key: str | None = None

    def __post_init__(self) -> None:
        """Refuse more than one key."""
        self.criterion  # noqa: B018 - making it is the check

    @property
    def criterion(self) -> Any:
        """The criterion of the core."""
        return importance(**self.keys)

    @property
    def keys(self) -> dict[str, Any]:
        """The three keys, as the core's methods take them."""
        return {
            "importance_key": self.importance_key,
            "max_key": self.max_key,
            "min_key": self.min_key,
        }

    @property
    def is_given(self) -> bool:
        """Whether there is a key."""
        return any(key is not None for key in self.keys.values())

    def value(self, checkpoint: Checkpoint) -> float:
        """Return the value of the key, as it was logged."""
        score = float(self.criterion.score(checkpoint))
        return -score if self.criterion.lowest else score


@dataclass(frozen=True)
class Options:
    """What a callback was told, checked.

    Attributes:
        dirpath: The folder of the run's checkpoints, absolute, or its URL.
        best_by: Which checkpoint is best.
        rules: Which stay.
        predicate: Which may be deleted at all.
        triggers: Those that a batch may set off, and those of the end of a validation or an epoch.
        resume: Whether a checkpoint to go on from is looked for.
        restore_best: Whether the module has the best weights when the fit has ended.
        save_policy: How saves go on.
        preemption: How the run ends when it is asked to; None if nobody may ask.
        when_in_use: If another process writes to the folder: `"raise"`, or `"read"`.
        link_unchanged: See `Checkpointer`.
        adaptation: What of a checkpoint is not taken as it is.
        optional: Names of recoverables that a checkpoint may lack.
        on_change: What a resume does when the experiment has changed.
        recoverables: More objects to save and load.
        meta: More keys for the meta.
        split_model: Submodules that get files of their own.
        trust_pickle: See `Checkpointer`.
        local_dir: See `Checkpointer`.
        storage_options: See `Checkpointer`.
    """

    dirpath: Path | str
    best_by: BestBy
    rules: Sequence[RetentionRule]
    predicate: CheckpointPredicate | None
    triggers: tuple[AnyOf, AnyOf]
    resume: bool
    restore_best: bool
    save_policy: SavePolicy
    preemption: Preemption | None
    when_in_use: str
    link_unchanged: bool
    adaptation: Adaptation
    optional: tuple[str, ...]
    on_change: str | None
    recoverables: Recoverables | None
    meta: Meta | None
    split_model: tuple[str, ...]
    trust_pickle: bool
    local_dir: Path | None
    storage_options: Mapping[str, object] | None

    def __post_init__(self) -> None:
        """Refuse names that can't name a file, or that name two.

        Raises:
            ConfigurationError: A name is taken, or given twice.
        """
        check_names([*self.split_model], "split_model")
        check_disjoint(self.split_model)
        if isinstance(self.recoverables, Mapping):
            check_names([*self.split_model, *self.recoverables], "recoverables")


def checked(given: Mapping[str, Any]) -> Options:
    """Return what the arguments of `SBCheckpoint` mean.

    Args:
        given: All of them, by name.

    Raises:
        ConfigurationError: One can't be meant, or two contradict each other.
        SelectionError: More than one of the three keys was given.
    """
    args = {name: _plain(name, value) for name, value in given.items()}
    policy = args["save_mode"]
    args = {name: plain(value) for name, value in with_shorthands(args).items()}
    check_kinds({name: args[name] for name in KINDS})
    check_lists({name: args[name] for name in ("split_model", "optional", "skip")})
    best = best_by(args["importance_key"], args["max_key"], args["min_key"])
    with _of("ckpt_predicate"):
        predicate = as_predicate(args["ckpt_predicate"])
    return Options(
        dirpath=folder(args["dirpath"]),
        best_by=best,
        rules=retention_rules(best, args["num_to_keep"], args["keep_recent"], args["keep"]),
        predicate=predicate,
        triggers=triggers(
            args["every_n_epochs"],
            args["every_n_train_steps"],
            args["train_time_interval"],
            args["triggers"],
        ),
        resume=args["resume"],
        restore_best=args["restore_best"],
        save_policy=policy
        if isinstance(policy, SavePolicy)
        else SavePolicy(policy, args["on_save_error"], args["when_busy"]),
        preemption=as_preemption(args["preemption"]),
        when_in_use=_one_of("when_in_use", args["when_in_use"], get_args(WhenInUse)),
        link_unchanged=args["link_unchanged"],
        adaptation=Adaptation(
            tuple(args["skip"]), dict(args["key_map"] or {}), args["partial"], args["keep_lr"]
        ),
        optional=tuple(args["optional"]),
        on_change=_one_of("on_change", args["on_change"], (*get_args(OnChange), None)),
        recoverables=args["recoverables"],
        meta=args["meta"],
        split_model=tuple(args["split_model"]),
        trust_pickle=args["trust_pickle"],
        local_dir=None if args["local_dir"] is None else absolute(args["local_dir"]),
        storage_options=args["storage_options"],
    )


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Have an error in a value name the argument that it was given for."""
    try:
        yield
    except (ConfigurationError, SelectionError) as error:
        raise type(error)(f"SBCheckpoint: {name}: {error}") from error


def _plain(name: str, given: Any) -> Any:
    with _of(name):
        return plain(given)


def check_kinds(given: Mapping[str, object]) -> None:
    """Refuse arguments of the wrong kind, all of them at once.

    Args:
        given: The arguments, by name.

    Raises:
        ConfigurationError: One is of another kind than expected.

    Example:
        >>> check_kinds({"num_to_keep": 3, "min_key": None})
        >>> check_kinds({"num_to_keep": "3"})
        Traceback (most recent call last):
        lightning_sbckpt.errors.ConfigurationError: num_to_keep is '3', expected a whole number ...
    """
    problems = []
    for name, value in given.items():
        fits, expected = KINDS[name]
        if not fits(value):
            problems.append(f"{name} is {_shown(value)}, expected {expected}")
    if problems:
        raise ConfigurationError(f"SBCheckpoint: {'; '.join(problems)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"a {type(value).__name__}"


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_time(value: object) -> bool:
    return as_seconds(value) is not None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_names(value: object) -> bool:
    # One text is refused with advice of its own, see `check_lists`.
    return isinstance(value, str) or (_is_list(value) and _all_text(value))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _all_text(value: object) -> bool:
    return all(isinstance(each, str) for each in value)  # type: ignore[attr-defined] # a list


def _is_rules(value: object) -> bool:
    return _is_list(value) and all(map(_is_rule, value))  # type: ignore[call-overload] # a list


def _is_rule(value: object) -> bool:
    if isinstance(value, type):
        return False
    is_reason = all(callable(getattr(value, name, None)) for name in ("considers", "keeps"))
    return is_reason or isinstance(value, (str, RetentionLimit))


def _is_triggers(value: object) -> bool:
    given = list(value) if _is_list(value) else [value]  # type: ignore[call-overload] # a list
    return all(isinstance(each, (Trigger, str)) and not isinstance(each, type) for each in given)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and _all_text(value)


def _is_mapping_of_text(value: object) -> bool:
    return isinstance(value, Mapping) and _all_text(value) and _all_text(value.values())


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


def _or_function(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or callable(value) or fits(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_WHOLE = "a whole number"
_FLAG = "True or False"
_KEY = "the name of a metric"
_NAMES = "a list of names"
_FUNCTION = "a function of Trainer and module that returns one"
KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "min_key": (_or_none(_is_text), _KEY),
    "max_key": (_or_none(_is_text), _KEY),
    "importance_key": (
        _or_function(lambda _: False),
        "a function of a checkpoint; for the name of a metric there are min_key and max_key",
    ),
    "ckpt_predicate": (_or_function(_is_text), "a function of a checkpoint, or an expression"),
    "num_to_keep": (_is_whole, _WHOLE),
    "keep": (
        _is_rules,
        "a list of rules of lightning_sbckpt.retention such as EveryNEpochs(10), or of their texts",
    ),
    "triggers": (
        _is_triggers,
        "objects with a method due(moment) such as EveryNSteps(1000), or their texts",
    ),
    "every_n_epochs": (_or_none(_is_whole), f"{_WHOLE}, or None"),
    "every_n_train_steps": (_or_none(_is_whole), f"{_WHOLE}, or None"),
    "train_time_interval": (
        _or_none(_is_time),
        "a timedelta, a number of seconds, a text such as '10 min', or None",
    ),
    "recoverables": (_or_function(_is_mapping), f"a dictionary of objects by name, or {_FUNCTION}"),
    "meta": (_or_function(_is_mapping), f"a dictionary, or {_FUNCTION}"),
    "key_map": (_or_none(_is_mapping_of_text), "a dictionary of prefixes of parameter names"),
    "storage_options": (_or_none(_is_mapping), "a dictionary"),
    "local_dir": (
        _or_none(lambda value: isinstance(value, (str, os.PathLike))),
        "a path on this machine",
    ),
    "resume": (_is_flag, f"{_FLAG}, or a ResumePolicy(...)"),
    **dict.fromkeys(("optional", "skip", "split_model"), (_is_names, _NAMES)),
    **dict.fromkeys(
        (
            "keep_recent",
            "restore_best",
            "link_unchanged",
            "partial",
            "keep_lr",
            "trust_pickle",
        ),
        (_is_flag, _FLAG),
    ),
}


def best_by(
    importance_key: ImportanceKey | None, max_key: str | None, min_key: str | None
) -> BestBy:
    """Return which checkpoint is best.

    Raises:
        SelectionError: More than one key was given.
    """
    if importance_key is not None:
        importance_key = _WorstWithoutMetric(importance_key)
    return BestBy(importance_key, max_key, min_key)


def retention_rules(
    best: BestBy, num_to_keep: int, keep_recent: bool, keep: Sequence[RetentionRule | str]
) -> list[RetentionRule]:
    """Return which checkpoints stay.

    Args:
        best: Which is best.
        num_to_keep: How many of the best, and of the newest.
        keep_recent: Whether the newest stay.
        keep: More rules, or their texts.

    Raises:
        ConfigurationError: None would.
        SelectionError: A text is no rule.
    """
    with _of("keep"):
        more = [parse_rule(rule) if isinstance(rule, str) else rule for rule in keep]
    # A limit gives no reason to keep anything.
    if num_to_keep < 1 and all(isinstance(rule, RetentionLimit) for rule in more):
        raise ConfigurationError(
            f"num_to_keep={num_to_keep} would delete every checkpoint as soon as it is written: "
            "keep at least 1, or say what to keep by rules in keep=[...]"
        )
    rules: list[RetentionRule] = []
    if best.min_key is not None:
        rules.append(Best(best.min_key, int(num_to_keep), mode="min"))
    if best.max_key is not None:
        rules.append(Best(best.max_key, int(num_to_keep), mode="max"))
    if best.importance_key is not None:
        rules.append(Important(best.importance_key, int(num_to_keep)))
    if keep_recent:
        rules.append(Newest(int(num_to_keep)))
    return [*rules, *more]


def triggers(
    every_n_epochs: int | None,
    every_n_train_steps: int | None,
    train_time_interval: timedelta | float | str | None,
    more: Trigger | str | Sequence[Trigger | str] = (),
) -> tuple[AnyOf, AnyOf]:
    """Return the triggers that every batch may set off, and those of validation and epoch end.

    Raises:
        ConfigurationError: A period is none, or one of `more` is no trigger.
    """
    batch: list[Trigger] = []
    if every_n_train_steps is not None:
        batch.append(EveryNSteps(int(every_n_train_steps)))
    if train_time_interval is not None:
        with _of("train_time_interval"):
            batch.append(EveryInterval(train_time_interval))
    ends: list[Trigger] = [] if every_n_epochs is None else [EveryNEpochs(int(every_n_epochs))]
    given = [more] if isinstance(more, (Trigger, str)) else more
    with _of("triggers"):
        parsed = [parse_trigger(each) if isinstance(each, str) else each for each in given]
        every = AnyOf(parsed).triggers
    for trigger in every:
        # What is never due after a batch must not cost anything there.
        if may_be_due(trigger, "batch"):
            batch.append(trigger)
        if may_be_due(trigger, "validation_end") or may_be_due(trigger, "epoch_end"):
            ends.append(trigger)
    return AnyOf(batch), AnyOf(ends)


def _one_of(name: str, given: Any, choices: Sequence[object]) -> Any:
    if given not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ConfigurationError(f"{name} is {given!r}, expected one of {known}")
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


@dataclass(frozen=True)
class _WorstWithoutMetric:
    """A key for which a checkpoint without the metric it asks for is the worst, like NaN.

    An object and no function inside a function, which could not be pickled.
    """

    key: ImportanceKey

    @property
    def __name__(self) -> str:
        """The name of the function."""
        return function_name(self.key)

    def __call__(self, checkpoint: Checkpoint) -> float:
        try:
            return self.key(checkpoint)
        except KeyError:
            return float("nan")
