"""Triggers made of triggers: any of them, all of them, from a step on, for recovery only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from lightning_sbckpt._format.omega import opaque, plain
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.triggers.moment import (
    KINDS,
    Due,
    Kind,
    Moment,
    Trigger,
    may_be_due,
    together,
)


def ask(trigger: Trigger, moment: Moment) -> Due | None:
    """Return why a trigger is due, and whether for recovery only, or None.

    Args:
        trigger: One trigger, or several combined.
        moment: What has just ended, and when.

    Example:
        >>> from lightning_sbckpt.triggers import EveryNSteps
        >>> moment = Moment("batch", epoch=0, global_step=10, batch=10, seconds=2.5)
        >>> ask(EveryNSteps(10) | Ephemeral(EveryNSteps(5)), moment)
        Due(reason='every 10 steps, every 5 steps', ephemeral=False)
        >>> ask(EveryNSteps(50) | Ephemeral(EveryNSteps(5)), moment)
        Due(reason='every 5 steps', ephemeral=True)
    """
    if isinstance(trigger, AnyOf):
        return together(ask(part, moment) for part in trigger.triggers)
    if isinstance(trigger, AllOf):
        answers: list[Due] = []
        for part in trigger.triggers:
            due = ask(part, moment)
            if due is None:
                return None
            answers += [] if is_condition(part) else [due]
        reason = " and ".join(due.reason for due in answers)
        return Due(reason, any(due.ephemeral for due in answers))
    why = trigger.due(moment)
    return None if why is None else Due(why, bool(getattr(trigger, "ephemeral", False)))


class Composable:
    """What gives a trigger its `|` and `&`."""

    def __or__(self: Trigger, other: Trigger) -> AnyOf:
        return AnyOf([*_parts(self, AnyOf), *_parts(other, AnyOf)])

    def __and__(self: Trigger, other: Trigger) -> AllOf:
        return AllOf([*_parts(self, AllOf), *_parts(other, AllOf)])


def _parts(trigger: Trigger, of: type[AnyOf | AllOf]) -> Sequence[Trigger]:
    return trigger.triggers if isinstance(trigger, of) else (trigger,)


@opaque
@dataclass(frozen=True)
class AnyOf(Composable):
    """Due when any of the triggers is; says which. With no trigger it is never due.

    Raises:
        ConfigurationError: Something given is no trigger, or always due (`AfterStep`).

    Example:
        >>> from lightning_sbckpt.triggers import EveryInterval, EveryNSteps
        >>> either = AnyOf([EveryNSteps(5), EveryInterval(60)])
        >>> either.due(Moment("batch", epoch=0, global_step=10, batch=10, seconds=61.0))
        'every 5 steps, 61 s since the last save, every 60 s'
    """

    triggers: tuple[Trigger, ...]

    def __init__(self, triggers: Iterable[Trigger]) -> None:
        """Take the triggers, in the order in which their reasons are told."""
        given = _checked("AnyOf", triggers)
        always = [repr(trigger) for trigger in given if is_condition(trigger)]
        if always:
            raise ConfigurationError(
                f"{', '.join(always)} alone would be due at every batch: it restricts another "
                f"trigger. Write EveryNSteps(100) & {always[0]}."
            )
        object.__setattr__(self, "triggers", given)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of moments at which one of them may be due."""
        return tuple(
            kind for kind in KINDS if any(may_be_due(part, kind) for part in self.triggers)
        )

    def quiet(self, global_step: int, previous_step: int) -> bool:
        """Return whether none can be due after a batch between these steps.

        Only triggers that look at nothing but the step can tell; asking costs no `Moment`.
        """
        for trigger in self.triggers:
            ask_it = getattr(trigger, "quiet", None)
            if ask_it is None or not ask_it(global_step, previous_step):
                return False
        return True

    def due(self, moment: Moment) -> str | None:
        """Return the reasons of all triggers that are due, or None."""
        reasons = [trigger.due(moment) for trigger in self.triggers]
        return ", ".join(reason for reason in reasons if reason is not None) or None


@opaque
@dataclass(frozen=True)
class AllOf(Composable):
    """Due when all of the triggers are at the same moment.

    Raises:
        ConfigurationError: Something given is no trigger, or nothing was given, or the triggers
            are due at different kinds of moments, and so never together.

    Example:
        >>> from lightning_sbckpt.triggers import EveryNSteps
        >>> late = AllOf([EveryNSteps(5), AfterStep(100)])
        >>> late.due(Moment("batch", epoch=0, global_step=10, batch=10, seconds=2.5)) is None
        True
        >>> late.due(Moment("batch", epoch=0, global_step=100, batch=100, seconds=25.0))
        'every 5 steps'
    """

    triggers: tuple[Trigger, ...]

    def __init__(self, triggers: Iterable[Trigger]) -> None:
        """Take the triggers, in the order in which their reasons are told."""
        given = _checked("AllOf", triggers)
        object.__setattr__(self, "triggers", given)
        if not given or not self.kinds:
            raise ConfigurationError(
                f"AllOf({list(given)!r}) would never be due: expected triggers that can be due at "
                "the same moment, such as EveryNSteps(100) and AfterStep(1000)."
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of moments at which all of them may be due."""
        return tuple(
            kind for kind in KINDS if all(may_be_due(part, kind) for part in self.triggers)
        )

    @property
    def is_condition(self) -> bool:
        """Whether it only restricts other triggers."""
        return all(map(is_condition, self.triggers))

    def due(self, moment: Moment) -> str | None:
        """Return the reasons, or None if one of the triggers is not due."""
        answer = ask(self, moment)
        return None if answer is None else answer.reason


@opaque
@dataclass(frozen=True)
class AfterStep(Composable):
    """True from step `n` on; restricts other triggers, by `&`, to the time from there.

    Raises:
        ConfigurationError: `n` is not a whole number of at least 1.

    Example:
        >>> from lightning_sbckpt.triggers import EveryNEpochs
        >>> late = EveryNEpochs(1) & AfterStep(100)
        >>> late.due(Moment("epoch_end", epoch=0, global_step=99, batch=99, seconds=2.5)) is None
        True
        >>> late.due(Moment("epoch_end", epoch=1, global_step=198, batch=198, seconds=5.0))
        'every epoch'
    """

    n: int
    is_condition: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a number that cannot be a step."""
        check_period("AfterStep", self.n)

    def due(self, moment: Moment) -> str | None:
        """Return the reason from step n on."""
        return f"from step {self.n} on" if moment.global_step >= self.n else None


@opaque
@dataclass(frozen=True)
class Ephemeral(Composable):
    """Due when its trigger is; the checkpoint is for recovery only.

    Retention keeps such a checkpoint while it is among the newest, and not for its metrics or its
    place in time, see `lightning_sbckpt.retention`.

    Raises:
        ConfigurationError: Something else than a trigger was given.

    Example:
        >>> from lightning_sbckpt.triggers import EveryInterval
        >>> often = Ephemeral(EveryInterval(300))
        >>> ask(often, Moment("batch", epoch=0, global_step=9, batch=9, seconds=301.0))
        Due(reason='301 s since the last save, every 300 s', ephemeral=True)
    """

    trigger: Trigger
    ephemeral: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no trigger."""
        object.__setattr__(self, "trigger", _checked("Ephemeral", [self.trigger])[0])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of moments at which it may be due."""
        return tuple(kind for kind in KINDS if may_be_due(self.trigger, kind))

    @property
    def is_condition(self) -> bool:
        """Whether it only restricts other triggers."""
        return is_condition(self.trigger)

    def due(self, moment: Moment) -> str | None:
        """Return the reason of the trigger, or None."""
        return self.trigger.due(moment)


def is_condition(trigger: Trigger) -> bool:
    """Return whether a trigger only restricts others.

    Example:
        >>> is_condition(AfterStep(5))
        True
    """
    return bool(getattr(trigger, "is_condition", False))


def check_period(owner: str, n: object) -> None:
    """Return if `n` can be a period or a step.

    Raises:
        ConfigurationError: It can't.

    Example:
        >>> check_period("EveryNSteps", 5)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigurationError(f"{owner} has n={n!r}, expected a whole number of at least 1.")


def _checked(owner: str, triggers: Iterable[Trigger]) -> tuple[Trigger, ...]:
    given: tuple[object, ...] = tuple(plain(triggers))
    # A class has the method, too, but can't answer.
    wrong = [t for t in given if isinstance(t, type) or not isinstance(t, Trigger)]
    if wrong:
        raise ConfigurationError(
            f"{owner} was given {', '.join(map(repr, wrong))}, expected objects with a method "
            "due(moment), such as EveryNEpochs(1) or EveryNSteps(1000)."
        )
    return cast("tuple[Trigger, ...]", given)
