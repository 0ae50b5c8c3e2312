"""When to save: pure answers about a moment in training."""

from __future__ import annotations

import pickle
from datetime import timedelta

import pytest

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.triggers import (
    AfterStep,
    AllOf,
    AnyOf,
    AtSteps,
    Due,
    Ephemeral,
    EveryInterval,
    EveryNEpochs,
    EveryNSteps,
    FirstStep,
    Moment,
    OnValidationEnd,
    Trigger,
    WhenTrue,
    ask,
    may_be_due,
    together,
)


def moment(kind, **changes):
    base = Moment(kind, epoch=0, global_step=0, batch=0, seconds=0.0)
    return base._replace(**changes)


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
    with pytest.raises(ConfigurationError, match=r"a datetime\.timedelta, a number of seconds"):
        EveryInterval(interval)


def test_any_of_refuses_what_is_no_trigger():
    """The message names what was given and shows what is expected."""
    with pytest.raises(ConfigurationError, match=r"AnyOf was given 5, None, expected .* due"):
        AnyOf([EveryNSteps(5), 5, None])


@pytest.mark.parametrize(
    ("steps", "when", "reason"),
    [
        ([5, 9], moment("batch", global_step=4, previous_step=3), None),
        ([5, 9], moment("batch", global_step=5, previous_step=4), "step 5"),
        ([9, 5], moment("batch", global_step=5, previous_step=4), "step 5"),
        ([5, 9], moment("batch", global_step=5, previous_step=5), None),
        ([5, 9], moment("batch", global_step=6, previous_step=5), None),
        ([5, 9], moment("batch", global_step=12, previous_step=3), "step 5, step 9"),
        ([5, 9], moment("batch", global_step=12, previous_step=9), None),
        ([1], moment("batch", global_step=1, previous_step=0), "step 1"),
        ([5, 9], moment("validation_end", global_step=5, previous_step=4), None),
        ([5, 9], moment("epoch_end", global_step=5, previous_step=4), None),
    ],
)
def test_given_steps_are_saved_where_a_batch_reaches_or_passes_them(steps, when, reason):
    """Each of them once, in whatever order they were given."""
    assert AtSteps(steps).due(when) == reason


@pytest.mark.parametrize("steps", [[], 5, "5", [0], [-1], [1.5], [True], None])
def test_steps_that_are_none_are_refused(steps):
    """At construction, with what was given."""
    with pytest.raises(ConfigurationError, match=r"AtSteps has steps=.*expected a list") as caught:
        AtSteps(steps)
    assert repr(steps) in str(caught.value)


@pytest.mark.parametrize(
    ("when", "due"),
    [
        (moment("batch", global_step=0, previous_step=0), False),
        (moment("batch", global_step=1, previous_step=0), True),
        (moment("batch", global_step=3, previous_step=0), True),
        (moment("batch", global_step=1, previous_step=1), False),
        (moment("batch", global_step=2, previous_step=1), False),
        (moment("validation_end", global_step=1, previous_step=0), False),
        (moment("epoch_end", global_step=1, previous_step=0), False),
    ],
)
def test_the_first_step_of_a_run_is_a_rehearsal_and_ephemeral(when, due):
    """Once, after the first batch that took a step; what resumes at a later step is past it."""
    answer = Due("the first step, to see that saving works", ephemeral=True)
    assert ask(FirstStep(), when) == (answer if due else None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("batch", None), ("validation_end", "validation has ended"), ("epoch_end", None)],
)
def test_every_validation_is_saved(kind, reason):
    """However many there are in an epoch."""
    assert OnValidationEnd().due(moment(kind)) == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (True, "decide is true"),
        (False, None),
        (None, None),
        ("the disk is quiet", "the disk is quiet"),
        ("", None),
    ],
)
def test_a_function_may_decide_and_say_why(answer, reason):
    """It is given the moment, and its text is the reason."""
    asked = []

    def decide(when):
        asked.append(when)
        return answer

    now = moment("epoch_end", epoch=3)
    assert WhenTrue(decide).due(now) == reason
    assert asked == [now]


def test_a_function_that_is_none_is_refused():
    """At construction."""
    with pytest.raises(ConfigurationError, match="WhenTrue has function=5, expected a function"):
        WhenTrue(5)


@pytest.mark.parametrize("kind", ["batch", "validation_end", "epoch_end"])
def test_nothing_is_saved_before_a_step(kind):
    """`& AfterStep(n)` restricts a trigger to the time from step n on, and adds no reason."""

    def always(when):
        return "always"

    late = WhenTrue(always) & AfterStep(100)
    assert late.due(moment(kind, global_step=99)) is None
    assert late.due(moment(kind, global_step=100)) == "always"
    assert (AfterStep(100) & WhenTrue(always)).due(moment(kind, global_step=101)) == "always"


def test_a_condition_alone_is_refused_since_it_would_save_after_every_batch():
    """The message shows how it is meant."""
    for wrong in (
        lambda: AnyOf([EveryNSteps(5), AfterStep(100)]),
        lambda: EveryNSteps(5) | AfterStep(100),
        lambda: AfterStep(100) | EveryNSteps(5),
        lambda: AnyOf([AfterStep(100) & AfterStep(50)]),
        lambda: AnyOf([Ephemeral(AfterStep(100))]),
    ):
        with pytest.raises(ConfigurationError, match=r"AfterStep\(n=100\).*due at every batch"):
            wrong()


def test_all_of_is_due_when_every_one_is_at_the_same_moment():
    """And tells the reasons of all."""
    both = EveryNSteps(5) & EveryInterval(60)
    assert both.due(moment("batch", global_step=5, previous_step=4, seconds=59.0)) is None
    assert both.due(moment("batch", global_step=6, previous_step=5, seconds=61.0)) is None
    assert both.due(moment("batch", global_step=5, previous_step=4, seconds=61.0)) == (
        "every 5 steps and 61 s since the last save, every 60 s"
    )


def test_what_can_never_be_due_together_is_refused():
    """A step ends with a batch, a validation does not."""
    with pytest.raises(ConfigurationError, match="would never be due"):
        EveryNSteps(5) & OnValidationEnd()
    with pytest.raises(ConfigurationError, match="would never be due"):
        AllOf([])


def test_operators_make_flat_lists_with_pythons_precedence():
    """`&` binds more tightly than `|`, and long chains print short."""
    a, b, c = EveryNSteps(2), EveryInterval(60), AfterStep(9)
    assert (a & c | b) == AnyOf([AllOf([a, c]), b])
    assert (a | b | EveryNEpochs(1)) == AnyOf([a, b, EveryNEpochs(1)])
    assert (a & b & c) == AllOf([a, b, c])
    assert (AnyOf([a]) & c).due(moment("batch", global_step=10, previous_step=9)) == "every 2 steps"


@pytest.mark.parametrize("combine", [AnyOf, AllOf, lambda given: Ephemeral(given[0])])
@pytest.mark.parametrize("wrong", [5, None, EveryNEpochs, "every epoch"])
def test_what_is_no_trigger_is_refused_wherever_triggers_are_combined(combine, wrong):
    """A class of triggers isn't one, either."""
    with pytest.raises(ConfigurationError, match="expected objects with a method due"):
        combine([wrong])


@pytest.mark.parametrize(
    ("trigger", "answer"),
    [
        (EveryNSteps(10), Due("every 10 steps")),
        (EveryNSteps(7), None),
        (Ephemeral(EveryNSteps(5)), Due("every 5 steps", ephemeral=True)),
        (Ephemeral(EveryNSteps(7)), None),
        (EveryNSteps(10) | Ephemeral(EveryNSteps(5)), Due("every 10 steps, every 5 steps")),
        (EveryNSteps(7) | Ephemeral(EveryNSteps(5)), Due("every 5 steps", ephemeral=True)),
        (AnyOf([AnyOf([Ephemeral(EveryNSteps(5))])]), Due("every 5 steps", ephemeral=True)),
        (Ephemeral(EveryNSteps(5)) & AfterStep(10), Due("every 5 steps", ephemeral=True)),
        (Ephemeral(EveryNSteps(5)) & AfterStep(11), None),
        (Ephemeral(EveryNSteps(5) & AfterStep(10)), Due("every 5 steps", ephemeral=True)),
        (AtSteps([10]) & EveryNSteps(5), Due("step 10 and every 5 steps")),
    ],
)
def test_a_save_is_ephemeral_if_everything_that_is_due_is(trigger, answer):
    """One lasting trigger makes the checkpoint a lasting one."""
    assert ask(trigger, moment("batch", global_step=10, previous_step=9)) == answer


def test_reasons_from_several_places_go_together():
    """What the caller has to add, such as the end of training, makes a checkpoint a lasting one."""
    brief = Due("every 5 steps", ephemeral=True)
    assert together([]) is None
    assert together([None, None]) is None
    assert together([brief, None]) == brief
    assert together([brief, Due("training ends")]) == Due("every 5 steps, training ends")


@pytest.mark.parametrize(
    ("trigger", "kinds"),
    [
        (EveryNSteps(1), "batch"),
        (EveryInterval(1), "batch"),
        (AtSteps([1]), "batch"),
        (FirstStep(), "batch"),
        (EveryNEpochs(1), "validation_end epoch_end"),
        (OnValidationEnd(), "validation_end"),
        (WhenTrue(bool), "batch validation_end epoch_end"),
        (EveryNSteps(1) | OnValidationEnd(), "batch validation_end"),
        (EveryNEpochs(1) & WhenTrue(bool), "validation_end epoch_end"),
        (EveryNSteps(1) & AfterStep(5), "batch"),
        (Ephemeral(EveryNSteps(1)), "batch"),
        (AnyOf([]), ""),
    ],
)
def test_a_trigger_tells_at_which_moments_it_need_not_be_asked(trigger, kinds):
    """So that what waits for the end of an epoch costs nothing at every step; and it is true."""
    every = ("batch", "validation_end", "epoch_end")
    assert " ".join(kind for kind in every if may_be_due(trigger, kind)) == kinds
    for kind in set(every) - set(kinds.split()):
        for step in range(12):
            now = moment(kind, global_step=step, previous_step=step - 1, seconds=1e9, epoch=step)
            assert ask(trigger, now) is None


def test_a_trigger_of_the_users_own_is_asked_at_every_moment():
    """Unless it says otherwise; it composes inside `AnyOf` and `AllOf`."""

    class Full:
        def due(self, when):
            return "full moon" if when.global_step == 28 else None

    assert all(may_be_due(Full(), kind) for kind in ("batch", "validation_end", "epoch_end"))
    late = AllOf([Full(), AfterStep(20)])
    assert ask(EveryNSteps(9) | late, moment("batch", global_step=28)).reason.endswith("full moon")


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, None])
def test_a_step_that_is_none_is_refused_with_its_value(n):
    """As a period is."""
    with pytest.raises(ConfigurationError, match=r"AfterStep has n=.*expected a whole number"):
        AfterStep(n)


def test_triggers_are_values():
    """Equal ones are equal, and they travel to spawned processes."""
    trigger = EveryNSteps(5) & AfterStep(10) | Ephemeral(EveryInterval(60)) | AtSteps([3, 1])
    assert pickle.loads(pickle.dumps(trigger)) == trigger
    assert len({trigger, EveryNSteps(5) & AfterStep(10) | Ephemeral(EveryInterval(60))}) == 2
    assert AtSteps([1, 3, 3]) == AtSteps((3, 1))


def test_the_callback_asks_a_trigger_only_where_it_may_be_due():
    """What is never due after a batch must not make every training step cost more."""
    from lightning_sbckpt.plugin import options

    mine = WhenTrue(bool)
    more = [OnValidationEnd(), AtSteps([3]), mine]
    batch, ends = options.triggers(2, 10, None, more)
    assert batch == AnyOf([EveryNSteps(10), AtSteps([3]), mine])
    assert ends == AnyOf([EveryNEpochs(2), OnValidationEnd(), mine])
    assert options.triggers(None, None, None, AtSteps([3])) == (AnyOf([AtSteps([3])]), AnyOf([]))
    with pytest.raises(ConfigurationError, match="expected objects with a method due"):
        options.triggers(None, None, None, [5])
    with pytest.raises(ConfigurationError, match="due at every batch"):
        options.triggers(None, None, None, [AfterStep(5)])


def test_a_budget_alone_gives_the_callback_no_reason_to_keep_anything():
    """`num_to_keep=0` needs a rule that keeps something."""
    from lightning_sbckpt.plugin import options
    from lightning_sbckpt.plugin.options import BestBy
    from lightning_sbckpt.retention import Budget, Newest

    with pytest.raises(ConfigurationError, match="num_to_keep=0 would delete every checkpoint"):
        options.retention_rules(BestBy(), 0, True, [Budget("1 GB")])
    assert options.retention_rules(BestBy(), 0, False, [Newest(5), Budget("1 GB")])


@pytest.mark.parametrize(
    "trigger", [EveryNSteps(3), AtSteps([2, 7]), AnyOf([EveryNSteps(4), AtSteps([5])]), AnyOf([])]
)
def test_a_trigger_that_is_quiet_would_not_have_been_due(trigger):
    """What is asked before a moment is made agrees with what is asked of it, at every step."""
    for previous in range(12):
        for step in range(previous, previous + 5):
            moment = Moment("batch", 0, step, step, 1.0, previous)
            assert trigger.quiet(step, previous) == (trigger.due(moment) is None)


def test_triggers_that_look_at_more_than_the_step_are_never_quiet():
    """They have to be asked."""
    assert not AnyOf([EveryNSteps(100), EveryInterval(1000)]).quiet(1, 0)
