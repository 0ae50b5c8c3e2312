"""When to save: pure answers about a moment in training."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.triggers import (
    AnyOf,
    EveryInterval,
    EveryNEpochs,
    EveryNSteps,
    Moment,
    Trigger,
)


def moment(kind, **changes):
    base = Moment(kind, epoch=0, global_step=0, batch=0, seconds=0.0)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("n", "when", "reason"),
    [
        (1, moment("validation_end"), "every epoch"),
        (1, moment("validation_end", validated_this_epoch=True), "every epoch"),
        (1, moment("epoch_end"), "every epoch"),
        (1, moment("epoch_end", validated_this_epoch=True), None),
        (1, moment("batch", global_step=10), None),
        (2, moment("validation_end", epoch=0), None),
        (2, moment("validation_end", epoch=1), "every 2 epochs"),
        (2, moment("epoch_end", epoch=2), None),
        (2, moment("epoch_end", epoch=3), "every 2 epochs"),
        (3, moment("epoch_end", epoch=2), "every 3 epochs"),
    ],
)
def test_epochs_are_saved_once_after_validation_or_at_their_end(n, when, reason):
    """After validation, or at the end of an epoch without one; counted from the first epoch."""
    assert EveryNEpochs(n).due(when) == reason


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (moment("batch", global_step=0, previous_step=0), None),
        (moment("batch", global_step=4, previous_step=3), None),
        (moment("batch", global_step=5, previous_step=4), "every 5 steps"),
        (moment("batch", global_step=5, previous_step=5), None),
        (moment("batch", global_step=6, previous_step=5), None),
        (moment("batch", global_step=10, previous_step=9), "every 5 steps"),
        (moment("batch", global_step=6, previous_step=4), "every 5 steps"),
        (moment("batch", global_step=16, previous_step=4), "every 5 steps"),
        (moment("validation_end", global_step=5, previous_step=4), None),
        (moment("epoch_end", global_step=5, previous_step=4), None),
    ],
)
def test_steps_are_saved_where_a_batch_reaches_or_passes_a_multiple(when, reason):
    """Due after the batch whose steps reach or pass a multiple of n, and after no other."""
    assert EveryNSteps(5).due(when) == reason


@pytest.mark.parametrize(
    ("steps", "due_after"),
    [
        # Gradients accumulate over four batches: the batches before a step stand still.
        ([batch // 4 for batch in range(1, 25)], [8, 16, 24]),
        # Three optimizers step in every batch.
        ([3 * batch for batch in range(1, 9)], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_each_multiple_is_saved_once_however_batches_take_steps(steps, due_after):
    """Several batches to a step, or several steps to a batch: no multiple is lost or repeated."""
    due, previous = [], 0
    for batch, step in enumerate(steps, start=1):
        if EveryNSteps(2).due(moment("batch", global_step=step, previous_step=previous)):
            due.append(batch)
        previous = step
    assert due == due_after


@pytest.mark.parametrize("interval", [60, 60.0, timedelta(minutes=1)])
@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (moment("batch", seconds=59.9), None),
        (moment("batch", seconds=60.0), "60 s since the last save, every 60 s"),
        (moment("batch", seconds=100.0, last_save_seconds=50.0), None),
        (
            moment("batch", seconds=130.5, last_save_seconds=50.0),
            "80.5 s since the last save, every 60 s",
        ),
        (moment("validation_end", seconds=1000.0), None),
        (moment("epoch_end", seconds=1000.0), None),
    ],
)
def test_an_interval_runs_from_the_last_save_whatever_caused_it(interval, when, reason):
    """Due after a batch once the time has passed, given in seconds or as a timedelta."""
    assert EveryInterval(interval).due(when) == reason


def test_any_of_joins_the_reasons_of_those_that_are_due():
    """One save for several triggers says all of them."""
    either = AnyOf([EveryNSteps(5), EveryNEpochs(1), EveryInterval(60)])
    assert either.due(moment("batch", global_step=4, seconds=3.0)) is None
    assert either.due(moment("epoch_end")) == "every epoch"
    assert either.due(moment("batch", global_step=5, seconds=60.0)) == (
        "every 5 steps, 60 s since the last save, every 60 s"
    )


def test_any_of_nothing_is_never_due():
    """No trigger, no save."""
    assert AnyOf([]).due(moment("epoch_end")) is None


def test_any_of_may_be_nested_and_takes_what_has_the_method():
    """A trigger is whatever answers `due`: the user's own included."""

    class Always:
        def due(self, moment):
            return f"always, here {moment.kind}"

    assert isinstance(Always(), Trigger)
    assert AnyOf([AnyOf(iter([Always()]))]).due(moment("batch")) == "always, here batch"


def test_asking_changes_nothing():
    """Triggers hold no state: the same moment has the same answer every time."""
    trigger = AnyOf([EveryNSteps(5), EveryInterval(60)])
    now = moment("batch", global_step=5, seconds=99.0)
    assert len({trigger.due(now) for _ in range(3)}) == 1


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, None])
@pytest.mark.parametrize("cls", [EveryNEpochs, EveryNSteps])
def test_a_period_that_is_none_is_refused_with_its_value(cls, n):
    """Refused at construction, not at the first batch."""
    with pytest.raises(ConfigurationError, match="expected a whole number") as caught:
        cls(n)
    assert f"{cls.__name__} has n={n!r}" in str(caught.value)


@pytest.mark.parametrize(
    "interval", [0, -1.0, timedelta(0), timedelta(days=-1), float("inf"), float("nan")]
)
def test_an_interval_that_never_or_always_passes_is_refused(interval):
    """An interval is a positive, finite time."""
    with pytest.raises(ConfigurationError, match="expected more than 0 s"):
        EveryInterval(interval)


@pytest.mark.parametrize("interval", ["00:10:00", None, True])
def test_an_interval_that_is_no_time_is_refused(interval):
    """The message says which kinds are taken."""
    with pytest.raises(ConfigurationError, match=r"expected a datetime\.timedelta or a number"):
        EveryInterval(interval)


def test_any_of_refuses_what_is_no_trigger():
    """The message names what was given and shows what is expected."""
    with pytest.raises(ConfigurationError, match=r"AnyOf was given 5, None, expected .* due"):
        AnyOf([EveryNSteps(5), 5, None])
