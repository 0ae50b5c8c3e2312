"""The rules of retention beyond the newest and the best: each alone, combined, and in general."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sbckpt._display.quantities import say_bytes, say_seconds
from lightning_sbckpt._layout.sizes import checkpoint_bytes, real_bytes
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention import (
    Best,
    Budget,
    EveryNEpochs,
    EveryNSteps,
    Important,
    Milestones,
    Newest,
    Pareto,
    TimeSpaced,
    Where,
    plan_retention,
)
from lightning_sbckpt.selection import newest_first

NAN = float("nan")


def ckpt(name, unixtime=0, **meta):
    """Return the record of a checkpoint that is nowhere."""
    return Checkpoint(Path("run") / name, {"unixtime": unixtime, **meta}, {})


def at_steps(*steps, **meta):
    """Return checkpoints called by their steps, one second apart."""
    return [ckpt(str(step), i, global_step=step, **meta) for i, step in enumerate(steps)]


def kept(plan):
    """Return the names of what stays, in the order of their times."""
    ordered = sorted((d for d in plan if d.keep), key=lambda d: d.checkpoint.meta["unixtime"])
    return " ".join(d.checkpoint.path.name for d in ordered)


def reasons(plan):
    return {d.checkpoint.path.name: d.reason for d in plan}


def by_time(checkpoint):
    return checkpoint.meta["unixtime"]


# ------------------------------------------------------------------ steps and epochs


@pytest.mark.parametrize(
    ("steps", "n", "stay"),
    [
        ([100, 200, 300], 100, "100 200 300"),
        ([50, 100, 150, 199, 200, 250], 100, "100 200"),
        ([50, 99], 100, ""),
        ([0, 1, 2, 3], 2, "2"),
        ([90, 130, 140, 310, 320], 100, "130 310"),
        ([7, 8, 9], 1, "7 8 9"),
        ([1e2, 150, 2.5e2], 100, "100.0 250.0"),
        ([10**400, 5], 100, str(10**400)),
    ],
)
def test_the_first_at_or_after_every_multiple_of_steps_stays(steps, n, stay):
    """A multiple that was passed over is stood for by the first checkpoint after it."""
    assert kept(plan_retention(at_steps(*steps), [EveryNSteps(n)])) == stay


def test_of_several_at_one_step_the_newest_counts():
    """A resumed run that comes by the same step again replaces what it had saved there."""
    twice = [ckpt("old", 1, global_step=100), ckpt("new", 2, global_step=100)]
    assert kept(plan_retention(twice, [EveryNSteps(100)])) == "new"
    assert kept(plan_retention(twice, [Milestones([100])])) == "new"


@pytest.mark.parametrize("value", [None, "100", True, NAN, float("inf"), [100]])
@pytest.mark.parametrize("rule", [EveryNSteps(10), Milestones([10])])
def test_what_has_no_number_of_steps_is_not_considered(rule, value):
    """A checkpoint from elsewhere never makes retention raise, and stays."""
    odd = ckpt("odd", 9, global_step=value)
    plan = plan_retention([*at_steps(5, 10), odd], [rule])
    assert kept(plan) == "10 odd"
    assert reasons(plan)["odd"] == "no rule considers it"


def test_the_step_may_be_in_another_key():
    """Meta of plain loops has whatever keys its writer chose."""
    ckpts = [ckpt(str(step), step, updates=step) for step in (5, 10, 15)]
    assert kept(plan_retention(ckpts, [EveryNSteps(10, key="updates")])) == "10"
    assert kept(plan_retention(ckpts, [Milestones([11], key="updates")])) == "15"
    assert kept(plan_retention(ckpts, [EveryNSteps(10)])) == "5 10 15"


def epochs():
    """Return an epoch's end, two within the next, ...: in Lightning's count from 0."""
    rows = [
        ("end1", 0, True, 10),
        ("in2", 1, False, 13),
        ("end2", 1, True, 20),
        ("in3", 2, False, 23),
        ("in3b", 2, False, 26),
        ("end3", 2, True, 30),
        ("in5", 4, False, 43),
    ]
    return [
        ckpt(name, time, **{"epoch": epoch, "end-of-epoch": end, "global_step": step})
        for time, (name, epoch, end, step) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        (EveryNEpochs(1), "end1 end2 end3 in5"),
        (EveryNEpochs(2), "end2 in5"),
        (EveryNEpochs(3), "end3"),
        (EveryNEpochs(5), ""),
        (EveryNEpochs(2, first_epoch=1), "end3"),
        (Milestones([1], unit="epochs"), "end1"),
        (Milestones([2, 3], unit="epochs"), "end2 end3"),
        (Milestones([4], unit="epochs"), "in5"),
        (Milestones([9], unit="epochs"), ""),
        (Milestones([0], unit="epochs"), "end1"),
    ],
)
def test_epochs_are_counted_by_their_ends(rule, stay):
    """After n epochs means at the end of the n-th; within the next comes later than that."""
    assert kept(plan_retention(epochs(), [rule])) == stay


def test_speechbrains_counter_begins_at_one():
    """`EpochCounter` calls the first epoch 1; `first_epoch` says so."""
    ckpts = [ckpt(str(e), e, **{"epoch": e, "end-of-epoch": True}) for e in range(1, 7)]
    assert kept(plan_retention(ckpts, [EveryNEpochs(3, first_epoch=1)])) == "3 6"
    assert kept(plan_retention(ckpts, [Milestones([4], unit="epochs", first_epoch=1)])) == "4"


@pytest.mark.parametrize(
    ("at", "stay"),
    [
        ([100], "100"),
        ([101], "130"),
        ([50, 120], "90 130"),
        ([120, 50], "90 130"),
        ([95, 100], "100"),
        ([311], ""),
        ([0, 310], "90 310"),
    ],
)
def test_the_first_at_or_after_each_milestone_stays(at, stay):
    """A milestone not yet reached keeps nothing."""
    assert kept(plan_retention(at_steps(90, 100, 130, 310), [Milestones(at)])) == stay


@pytest.mark.parametrize(
    ("rule", "stays", "goes"),
    [
        (EveryNSteps(100), "the first of every 100 steps", "not the first of every 100 steps"),
        (EveryNSteps(1), "the first of every step", None),
        (
            Milestones([95, 100]),
            "the first at or after step 95, 100",
            "not the first at or after one of the steps 95, 100",
        ),
        (
            Where("global_step == 100"),
            "where global_step == 100",
            "not where global_step == 100",
        ),
        (
            TimeSpaced("1 min"),
            "the newest",
            None,
        ),
        (
            Pareto("global_step", "unixtime", modes="max"),
            "no other is better in all of global_step (max), unixtime (max)",
            "another is as good or better in all of global_step (max), unixtime (max)",
        ),
    ],
)
def test_each_rule_says_why_it_keeps_and_why_not(rule, stays, goes):
    """The reason names the rule with its numbers; a person needs no manual to read a plan."""
    said = reasons(plan_retention(at_steps(90, 100), [rule]))
    assert said["100"] == stays
    if goes:
        assert said["90"] == goes


# ------------------------------------------------------------------ spaced in time


def minutes(*numbers):
    return [ckpt(str(m), 60 * m) for m in numbers]


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        (TimeSpaced("1 min", n=3), "0 8 12 14 15 16"),
        (TimeSpaced(60, n=4, factor=4), "0 4 8 12 13 14 15 16"),
        (TimeSpaced(timedelta(minutes=1), n=1), "0 16"),
        (TimeSpaced("1 min", n=17), " ".join(map(str, range(17)))),
        (TimeSpaced("4 min", n=2), "0 8 12 16"),
        (TimeSpaced("1 hour"), "0 16"),
    ],
)
def test_the_longer_ago_the_sparser(rule, stay):
    """One checkpoint a minute for 17 minutes: dense at the new end, sparse at the old."""
    assert kept(plan_retention(minutes(*range(17)), [rule])) == stay


def test_the_first_of_a_stretch_stays_and_says_how_long_the_stretch_is():
    """The reason tells how dense it is kept at its age."""
    said = reasons(plan_retention(minutes(*range(17)), [TimeSpaced("1 min", n=3)]))
    assert said["12"] == "the first of its 2 min"
    assert said["0"] == "the first of its 8 min"
    assert said["13"] == "not the first of its stretch of time"


def test_what_has_no_time_is_not_considered():
    """A checkpoint with a time that is none stays."""
    odd = [ckpt("odd", "yesterday"), ckpt("nan", NAN)]
    plan = plan_retention([*minutes(0, 1), *odd], [TimeSpaced("1 hour")])
    assert {d.checkpoint.path.name for d in plan if d.keep} == {"0", "1", "odd", "nan"}
    assert reasons(plan)["odd"] == "no rule considers it"


def test_extreme_times_end():
    """Times from before the epoch, or from the end of days, neither hang nor raise."""
    ckpts = [ckpt("past", -1e300), ckpt("now", 1.7e9), ckpt("future", 1e300)]
    assert kept(plan_retention(ckpts, [TimeSpaced(1.0)])) == "past now future"


def stream(ckpts, rules):
    """Save one after the other and prune after each, as a run does."""
    there = []
    for one in ckpts:
        there.append(one)
        there = [d.checkpoint for d in plan_retention(there, rules) if d.keep]
    return {one.path for one in there}


GAPS = st.lists(st.sampled_from([1, 7, 20, 61, 300, 4000]), min_size=1, max_size=40)


@given(
    gaps=GAPS,
    every=st.sampled_from([1, 60, 90]),
    n=st.integers(1, 5),
    factor=st.integers(2, 5),
)
def test_pruned_after_every_save_a_run_keeps_what_one_plan_at_its_end_would(gaps, every, n, factor):
    """Nothing goes before its turn, so nothing that the spacing needs later is missing."""
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    ckpts = [ckpt(str(time), time, global_step=time) for time in times]
    for rule in (
        TimeSpaced(every, n=n, factor=factor),
        EveryNSteps(every),
        Milestones([every, n * every, 500]),
    ):
        at_once = {d.checkpoint.path for d in plan_retention(ckpts, [rule]) if d.keep}
        assert stream(ckpts, [rule]) == at_once


def test_the_number_that_stays_grows_with_the_logarithm_of_time():
    """A year of hourly checkpoints comes down to n for every doubling of the age."""
    year = [ckpt(str(h), 3600 * h) for h in range(24 * 365)]
    stay = [d for d in plan_retention(year, [TimeSpaced("1 hour", n=4)]) if d.keep]
    assert 20 <= len(stay) <= 4 * 14


# ------------------------------------------------------------------ where, and the front


def test_what_a_condition_holds_for_stays():
    """By an expression or by a function."""
    ckpts = [ckpt("a", 1, acc=0.95), ckpt("b", 2, acc=0.5), ckpt("c", 3)]
    assert kept(plan_retention(ckpts, [Where("acc > 0.9")])) == "a c"
    assert kept(plan_retention(ckpts, [Where(lambda c: "acc" in c.meta)])) == "a b"
    assert kept(plan_retention(ckpts, [Where("acc > 0.9"), Newest(1)])) == "a c"
    assert kept(plan_retention([*ckpts, ckpt("d", 4)], [Where("acc > 0.9"), Newest(1)])) == "a d"


def test_a_misspelt_key_in_a_condition_removes_nothing_by_itself():
    """None can tell whether it holds, so the rule has no opinion."""
    ckpts = [ckpt("a", 1, acc=0.95), ckpt("b", 2, acc=0.5)]
    plan = plan_retention(ckpts, [Where("ac > 0.9")])
    assert kept(plan) == "a b"
    assert reasons(plan)["b"] == "no rule considers it"


def test_a_function_as_a_condition_is_named_in_the_reason():
    """So that the log shows which."""

    def finished(checkpoint):
        return checkpoint.path.name == "a"

    said = reasons(plan_retention([ckpt("a"), ckpt("b")], [Where(finished)]))
    assert said == {"a": "where finished is true", "b": "not where finished is true"}


@pytest.mark.parametrize("wrong", [None, 5, ["acc > 1"]])
def test_a_condition_that_is_none_is_refused(wrong):
    """At construction, with what was given."""
    with pytest.raises(SelectionError, match="expected a function of a checkpoint"):
        Where(wrong)


def test_a_condition_that_cannot_be_read_is_refused_at_construction():
    """Not when checkpoints are about to go."""
    with pytest.raises(SelectionError, match="can't be read at character 5"):
        Where("acc = 1")


def plane():
    """Return points in a plane of loss and latency."""
    points = {"a": (1, 9), "b": (2, 5), "c": (3, 5), "d": (5, 1), "e": (6, 6), "f": (2, 5)}
    return [ckpt(n, i, loss=x, ms=y) for i, (n, (x, y)) in enumerate(points.items())]


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        (Pareto("loss", "ms"), "a d f"),
        (Pareto("loss", "ms", modes="max"), "a e"),
        (Pareto("loss", "ms", modes=["min", "max"]), "a"),
        (Pareto("ms", "loss", modes=["min", "max"]), "d e"),
        (Pareto("loss"), "a"),
        (Pareto("loss", "ms", "unixtime", modes=["min", "min", "max"]), "a d f"),
        (Pareto("loss", "nowhere"), "a b c d e f"),
    ],
)
def test_what_nothing_else_beats_in_every_key_stays(rule, stay):
    """The front; of equal points (b and f) the newer."""
    assert kept(plan_retention(plane(), [rule])) == stay


def test_nan_is_never_on_the_front():
    """A model that diverged is not kept for being fast."""
    ckpts = [ckpt("a", 1, loss=1.0, ms=9), ckpt("b", 2, loss=NAN, ms=1)]
    assert kept(plan_retention(ckpts, [Pareto("loss", "ms")])) == "a"
    assert kept(plan_retention(ckpts, [Pareto("loss", "ms", modes="max")])) == "a"


@given(
    points=st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12),
    modes=st.tuples(*[st.sampled_from(["min", "max"])] * 3),
)
def test_the_front_is_what_its_definition_says(points, modes):
    """Against a comparison of every pair."""
    ckpts = [ckpt(str(i), i, x=x, y=y, z=z) for i, (x, y, z) in enumerate(points)]
    signed = [
        tuple(v if mode == "max" else -v for v, mode in zip(point, modes, strict=True))
        for point in points
    ]

    def beats(i, j):
        if signed[i] == signed[j]:
            return i > j
        return all(a >= b for a, b in zip(signed[i], signed[j], strict=True))

    front = {str(j) for j in range(len(points)) if not any(beats(i, j) for i in range(len(points)))}
    found = Pareto("x", "y", "z", modes=modes).keeps(ckpts)
    assert {one.path.name for one in found} == front


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Pareto, "expected names of keys"),
        (lambda: Pareto("x", by_time), "expected names of keys"),
        (lambda: Pareto("x", "y", modes="lowest"), "expected 'min' or 'max' for each"),
        (lambda: Pareto("x", "y", modes=["min"]), "2 in all"),
        (lambda: EveryNSteps(0), "EveryNSteps has n=0, expected a whole number of at least 1"),
        (lambda: EveryNEpochs(True), "EveryNEpochs has n=True"),
        (lambda: EveryNEpochs(1.5), "EveryNEpochs has n=1.5"),
        (lambda: Milestones([]), r"Milestones has at=\[\], expected a list of whole numbers"),
        (lambda: Milestones(100), "Milestones has at=100"),
        (lambda: Milestones("100"), "Milestones has at='100'"),
        (lambda: Milestones([1, -1]), r"at=\[1, -1\]"),
        (lambda: Milestones([1.5]), r"at=\[1.5\]"),
        (lambda: Milestones([1], unit="hours"), "unit='hours', expected 'steps' or 'epochs'"),
        (lambda: TimeSpaced("soon"), "time 'soon', expected at least 1 second"),
        (lambda: TimeSpaced(0), "expected at least 1 second"),
        (lambda: TimeSpaced(NAN), "expected at least 1 second"),
        (lambda: TimeSpaced(True), "expected at least 1 second"),
        (lambda: TimeSpaced(timedelta(0)), "expected at least 1 second"),
        (lambda: TimeSpaced("1 GB"), "'1 GB'"),
        (lambda: TimeSpaced(60, n=0), "n=0, expected a whole number of at least 1"),
        (lambda: TimeSpaced(60, factor=1), "factor=1, expected a whole number of at least 2"),
        (lambda: Budget("much"), "size 'much', expected a number of bytes"),
        (lambda: Budget(0), "size 0"),
        (lambda: Budget("-5 GB"), "size '-5 GB'"),
        (lambda: Budget("5 minutes"), "size '5 minutes'"),
        (lambda: Budget(None), "size None"),
        (lambda: Budget(float("inf")), "size inf"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_construction(make, message):
    """With the value, and with what is expected."""
    with pytest.raises(SelectionError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "number"),
    [("50 GB", 50e9), ("1.5GiB", 1.5 * 2**30), ("500 mb", 5e8), ("7 B", 7), (7, 7), (7.9, 7)],
)
def test_a_size_is_read_as_people_write_it(text, number):
    """Powers of 1000, or with an i of 1024."""
    assert Budget(text).limit == number


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90 s", 90), ("10 min", 600), ("2 hours", 7200), ("1 day", 86400), ("1 week", 604800)],
)
def test_a_time_is_read_as_people_write_it(given, seconds):
    """Rules of equal times are equal."""
    assert TimeSpaced(given) == TimeSpaced(timedelta(seconds=seconds)) == TimeSpaced(seconds)


def test_numbers_are_said_as_people_say_them():
    """Bytes in powers of 1000, times in their largest whole unit."""
    assert [say_bytes(n) for n in (999, 1000, 1.5e9, 2e15)] == ["999 B", "1 KB", "1.5 GB", "2 PB"]
    assert [say_seconds(n) for n in (90, 120, 7200, 86400, 2 * 604800)] == [
        "90 s",
        "2 min",
        "2 h",
        "1 day",
        "2 weeks",
    ]


# ------------------------------------------------------------------ pins and the ephemeral


@pytest.mark.parametrize(
    ("pinned", "reason"),
    [("the paper's", "pinned: the paper's"), (True, "pinned"), ("pinned", "pinned"), (1, "pinned")],
)
def test_a_pinned_checkpoint_stays_whatever_the_rules_say(pinned, reason):
    """With the reason of the pin as the reason of the plan."""
    ckpts = [ckpt("a", 1, pinned=pinned), ckpt("b", 2, pinned=False), ckpt("c", 3, pinned=None)]
    plan = plan_retention(ckpts, [Newest(0)])
    assert kept(plan) == "a"
    assert reasons(plan)["a"] == reason


def test_a_pinned_checkpoint_keeps_its_place_in_the_rankings():
    """It is still the best, and says so; the second best is not kept in its place."""
    ckpts = [ckpt("a", 1, x=1, pinned="mine"), ckpt("b", 2, x=2), ckpt("c", 3, x=3)]
    plan = plan_retention(ckpts, [Best("x")])
    assert kept(plan) == "a"
    assert reasons(plan)["a"] == "pinned: mine, among the 1 best x (min): 1"


def with_ephemeral():
    """Return lasting checkpoints a, c and ephemeral b, D, E: the best is one of these."""
    rows = [("a", 5, False), ("b", 1, True), ("c", 6, False), ("D", 2, True), ("E", 9, True)]
    return [
        ckpt(n, i, x=x, global_step=10 * i + 10, **({"ephemeral": True} if brief else {}))
        for i, (n, x, brief) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ([], "a b c D E"),
        ([Best("x")], "a E"),
        ([Best("x", ephemeral=True)], "b"),
        ([Best("x", 2, ephemeral=True)], "b D"),
        ([Best("x"), Newest(1)], "a E"),
        ([Best("x"), Newest(3)], "a c D E"),
        ([Newest(1)], "E"),
        ([Newest(0)], ""),
        ([Newest(1, ephemeral=False)], "c E"),
        ([EveryNSteps(20)], "c E"),
        ([EveryNSteps(20, ephemeral=True)], "b D"),
        ([EveryNSteps(10)], "a c E"),
        ([Milestones([20])], "c E"),
        ([Important(by_time, 1)], "c E"),
        ([Where("x < 6")], "a E"),
        ([Where("x < 6", ephemeral=True)], "a b D"),
        ([Pareto("x", "unixtime", modes=["min", "max"])], "a c E"),
        ([TimeSpaced("1 hour")], "a c E"),
        ([Best("nowhere")], "a c E"),
        ([Budget(10, bytes_of=lambda c: 1)], "a b c D E"),
    ],
)
def test_ephemeral_checkpoints_are_kept_by_rules_of_their_own(rules, stay):
    """Newest considers them, other rules if told to; if none does, the newest of all stays."""
    assert kept(plan_retention(with_ephemeral(), rules)) == stay


def test_an_ephemeral_checkpoint_says_that_it_is_one():
    """A person who misses it reads why it went."""
    said = reasons(plan_retention(with_ephemeral(), [Best("x")]))
    assert said["E"] == "ephemeral, and the newest to recover from"
    assert said["b"] == "ephemeral, and there is a newer one to recover from"
    said = reasons(plan_retention(with_ephemeral(), [Best("x"), Newest(1)]))
    assert said["b"] == "ephemeral, older than the newest 1"


def test_a_word_under_the_key_ephemeral_means_nothing():
    """Only `true` does: a key of the user's own with this name must not cost checkpoints."""
    ckpts = [ckpt("a", 1, x=1, ephemeral="no"), ckpt("b", 2, x=2)]
    assert kept(plan_retention(ckpts, [Best("x")])) == "a"


def test_a_rule_of_the_users_own_sees_every_checkpoint():
    """A rule that says nothing about ephemeral ones is shown them."""

    class OddNames:
        def considers(self, checkpoint):
            return True

        def keeps(self, checkpoints):
            return {c: "a name" for c in checkpoints if c.path.name in "bD"}

        def rejects(self, checkpoint):
            return "no name"

    assert kept(plan_retention(with_ephemeral(), [OddNames()])) == "b D"


# ------------------------------------------------------------------ the budget


def ten():
    return [ckpt(str(i), i, x=(i * 7) % 10) for i in range(10)]


def hundred(checkpoint):
    return 100


@pytest.mark.parametrize(
    ("rules", "limit", "stay"),
    [
        # Alone: the oldest go first, the newest never.
        ([], 1000, "0 1 2 3 4 5 6 7 8 9"),
        ([], 999, "1 2 3 4 5 6 7 8 9"),
        ([], 300, "7 8 9"),
        ([], 1, "9"),
        ([Newest(5)], 300, "7 8 9"),
        # The best (0) never goes; the others by their places in the rules, the higher the later.
        ([Best("x", 3), Newest(3)], 600, "0 3 6 7 8 9"),
        ([Best("x", 3), Newest(3)], 400, "0 3 8 9"),
        ([Best("x", 3), Newest(3)], 300, "0 3 9"),
        ([Best("x", 3), Newest(3)], 200, "0 9"),
        ([Best("x", 3), Newest(3)], 100, "0 9"),
        ([Newest(3), Best("x", 3)], 300, "0 8 9"),
        ([Best("x", 2, mode="max"), Best("x", 2)], 350, "0 4 7"),
        ([Important(by_time, 4)], 200, "8 9"),
        ([Newest(0)], 500, ""),
    ],
)
def test_the_least_wanted_go_first_until_the_rest_fits(rules, limit, stay):
    """What stands highest in any rule goes last; the best of each and the newest never."""
    plan = plan_retention(ten(), [*rules, Budget(limit, bytes_of=hundred)])
    assert kept(plan) == stay


def test_the_budget_says_how_much_too_much_and_what_was_dropped_why_wanted():
    """The log line tells the reader what the rules alone would have kept."""
    said = reasons(plan_retention(ten(), [Newest(3), Budget("200 B", bytes_of=hundred)]))
    assert said["7"] == "100 B over the budget of 200 B, the least wanted (among the newest 3)"
    assert said["8"] == "among the newest 3"
    assert said["6"] == "older than the newest 3"


def test_a_budget_too_small_for_what_never_goes_says_so():
    """Nothing is dropped silently, and nothing is kept silently, either."""
    plan = plan_retention(ten(), [Best("x"), Newest(2), Budget("150 B", bytes_of=hundred)])
    assert kept(plan) == "0 9"
    assert reasons(plan)["0"] == (
        "among the 1 best x (min): 0, "
        "stays although the checkpoints are 50 B over the budget of 150 B"
    )


def test_protected_pinned_and_excluded_checkpoints_count_and_never_go():
    """The budget is that of the folder, whoever filled it."""
    ckpts = ten()
    ckpts[1] = ckpt("1", 1, pinned="mine")
    plan = plan_retention(
        ckpts,
        [Newest(5), Budget(500, bytes_of=hundred)],
        predicate=lambda c: c.path.name != "2",
        protected=[(ckpts[3], "another run wrote it")],
    )
    assert kept(plan) == "1 2 3 8 9"


def test_shared_files_count_once_and_go_with_their_last_holder():
    """Three checkpoints share a file of 100: dropping one of them frees what is its own."""
    own = {"a": 10, "b": 10, "c": 10, "d": 50}

    def files(checkpoint):
        name = checkpoint.path.name
        shared = {} if name == "d" else {"frozen": 100}
        return {name: own[name], **shared}

    ckpts = [ckpt(name, i) for i, name in enumerate("abcd")]
    for limit, stay in [(180, "a b c d"), (170, "b c d"), (160, "c d"), (159, "d"), (50, "d")]:
        plan = plan_retention(ckpts, [Newest(4), Budget(limit, bytes_of=files)])
        assert kept(plan) == stay, limit


def test_what_holds_nothing_of_its_own_stays_since_dropping_it_frees_nothing():
    """`a` and `b` are links to the files of `c`."""
    ckpts = [ckpt(name, i) for i, name in enumerate("abcde")]

    def files(checkpoint):
        name = checkpoint.path.name
        return {"shared": 100} if name in "abe" else {name: 100}

    assert kept(plan_retention(ckpts, [Budget(100, bytes_of=files)])) == "a b e"


def test_sizes_may_be_a_mapping_and_come_with_the_plan():
    """A budget that doesn't know the sizes takes those that the plan is given."""
    sizes = {one.path: 100 for one in ten()}
    assert kept(plan_retention(ten(), [Budget(200, bytes_of=sizes)])) == "8 9"
    assert kept(plan_retention(ten(), [Budget(200)], bytes_of=hundred)) == "8 9"
    assert kept(plan_retention(ten(), [Budget(300, bytes_of=sizes)], bytes_of=len)) == "7 8 9"


def test_sizes_are_asked_for_only_if_there_is_a_budget_and_only_of_what_would_stay():
    """Looking at every file of thousands of checkpoints takes its time."""
    asked = []

    def counting(checkpoint):
        asked.append(checkpoint.path.name)
        return 1

    plan_retention(ten(), [Newest(2)], bytes_of=counting)
    assert asked == []
    plan_retention(ten(), [Newest(2), Budget(10)], bytes_of=counting)
    assert sorted(asked) == ["8", "9"]


def test_a_budget_without_sizes_says_what_to_pass():
    """Rather than count nothing and keep everything."""
    with pytest.raises(
        SelectionError, match=r"Budget of 1 GB can't tell how large .*pass bytes_of"
    ):
        plan_retention(ten(), [Budget("1 GB")])
    with pytest.raises(SelectionError, match="a mapping which lacks run/0"):
        plan_retention(ten(), [Budget(1, bytes_of={one.path: 1 for one in ten()[1:]})])


def test_the_bytes_of_a_folder_are_those_of_its_files_each_counted_once(tmp_path):
    """Hard links share one entry, also between checkpoints; links to elsewhere are not followed."""
    outside = tmp_path / "outside"
    outside.write_bytes(os.urandom(1_000_000))
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "sub").mkdir(parents=True)
    b.mkdir()
    (a / "model.ckpt").write_bytes(os.urandom(50_000))
    (a / "sub" / "x").write_bytes(os.urandom(20_000))
    (a / "again").hardlink_to(a / "model.ckpt")
    (a / "elsewhere").symlink_to(outside)
    (b / "model.ckpt").hardlink_to(a / "model.ckpt")
    for file in (a / "model.ckpt", a / "sub" / "x"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    of_a, of_b = real_bytes(a), checkpoint_bytes(Checkpoint(b, {}, {}))
    assert sum(of_a.values()) == pytest.approx(70_000, rel=0.2)
    assert len(of_a) == 2
    assert of_b.items() <= of_a.items()
    assert real_bytes(tmp_path / "gone") == {}


def test_a_sparse_file_counts_what_it_takes(tmp_path):
    """Not what it pretends to be."""
    with (tmp_path / "sparse").open("wb") as stream:
        stream.write(os.urandom(8192))
        stream.truncate(10**9)
        stream.flush()
        os.fsync(stream.fileno())
    assert sum(real_bytes(tmp_path).values()) < 10**6


def test_a_budget_of_real_folders_drops_until_the_disk_is_below_it(tmp_path):
    """Rules, plan and sizes together, on files."""
    ckpts = []
    for i in range(4):
        folder = tmp_path / f"CKPT+{i}"
        folder.mkdir()
        with (folder / "model.ckpt").open("wb") as stream:
            stream.write(os.urandom(100_000))
            os.fsync(stream.fileno())
        ckpts.append(Checkpoint(folder, {"unixtime": i}, {}))
    plan = plan_retention(ckpts, [Newest(9), Budget("250 KB")], bytes_of=checkpoint_bytes)
    assert kept(plan) == "CKPT+2 CKPT+3"


# ------------------------------------------------------------------ all rules together


ALL_RULES = [
    Newest(2),
    Best("x", 2),
    Important(by_time, 1),
    Pareto("x", "y"),
    EveryNSteps(3),
    EveryNEpochs(2),
    Milestones([4, 9]),
    TimeSpaced(2, n=2),
    Where("y > 1"),
    Budget(7, bytes_of=hundred),
]


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_is_a_value(rule):
    """It can be compared, put into a set, pickled for spawned processes, and not be changed."""
    assert len({rule, pickle.loads(pickle.dumps(rule))}) == 1
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.ephemeral = True


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ([Newest(1), EveryNSteps(100)], "100 200 260"),
        ([Newest(1), EveryNSteps(100), Milestones([20])], "30 100 200 260"),
        ([Best("x"), EveryNSteps(100), Where("x == 4")], "60 100 200 260"),
        ([Best("x", 2, mode="max"), Milestones([200])], "30 60 200"),
        ([Pareto("x", "global_step", modes="max"), Newest(1)], "30 60 100 200 260"),
        ([TimeSpaced(2, n=1), Best("x")], "30 260"),
        ([Newest(3), EveryNSteps(100), Budget(300, bytes_of=hundred)], "100 200 260"),
        ([EveryNSteps(100), Best("x", mode="max"), Budget(200, bytes_of=hundred)], "30 200"),
    ],
)
def test_rules_add_up(rules, stay):
    """What any rule keeps stays, as far as the budget goes."""
    rows = [(30, 5), (60, 4), (100, 3), (200, 2), (260, 1)]
    ckpts = [ckpt(str(s), i, global_step=s, x=x) for i, (s, x) in enumerate(rows)]
    assert kept(plan_retention(ckpts, rules)) == stay


VALUES = st.integers(-3, 3) | st.floats(-2, 2) | st.just(NAN) | st.none()


@st.composite
def records(draw):
    rows = draw(
        st.lists(
            st.fixed_dictionaries(
                {"unixtime": st.integers(0, 40), "end-of-epoch": st.booleans()},
                optional={
                    "x": VALUES,
                    "y": VALUES,
                    "global_step": st.integers(0, 20),
                    "epoch": st.integers(0, 5),
                    "pinned": st.sampled_from(["mine", True, False]),
                    "ephemeral": st.booleans(),
                },
            ),
            max_size=12,
        )
    )
    return [Checkpoint(Path("run") / f"{i:02}", row, {}) for i, row in enumerate(rows)]


def shared_bytes(checkpoint):
    """Return files of which neighbours share some, the sizes made of the name."""
    number = int(checkpoint.path.name)
    return {("own", number): 10 * (number % 4), ("pair", number // 2): 50, ("all",): 20}


COUNTS = st.integers(0, 3)
BRIEF = st.booleans()
RULES = st.lists(
    st.builds(Newest, COUNTS, ephemeral=BRIEF)
    | st.builds(
        Best,
        st.sampled_from("xyz"),
        COUNTS,
        mode=st.sampled_from(["min", "max"]),
        ephemeral=BRIEF,
    )
    | st.builds(Important, st.just(by_time), COUNTS, ephemeral=BRIEF)
    | st.builds(Pareto, st.just("x"), st.just("y"), ephemeral=BRIEF)
    | st.builds(EveryNSteps, st.integers(1, 8), ephemeral=BRIEF)
    | st.builds(EveryNEpochs, st.integers(1, 4), ephemeral=BRIEF)
    | st.builds(Milestones, st.lists(st.integers(0, 20), min_size=1, max_size=3), ephemeral=BRIEF)
    | st.builds(TimeSpaced, st.integers(1, 10), n=st.integers(1, 3), ephemeral=BRIEF)
    | st.builds(Where, st.sampled_from(["x > 0", "not y > 0", '"x" in meta']), ephemeral=BRIEF)
    | st.builds(Budget, st.integers(1, 400)),
    max_size=5,
)


@st.composite
def situations(draw):
    """Draw checkpoints, rules, those of other runs (protected), and those not to be touched."""
    ckpts = draw(records())
    some = st.sets(st.sampled_from(ckpts)) if ckpts else st.just(set())
    return ckpts, draw(RULES), draw(some), draw(some)


def plan_of(ckpts, rules, foreign, excluded):
    return plan_retention(
        ckpts,
        rules,
        predicate=lambda c: c not in excluded,
        protected=[(c, "another run wrote it") for c in ckpts if c in foreign],
        bytes_of=shared_bytes,
    )


@given(situation=situations())
def test_a_plan_never_removes_the_best_the_newest_a_pinned_or_a_foreign_one(situation):
    """Whatever the rules and however small the budget, if there is a rule for the best or newest."""
    ckpts, rules, foreign, excluded = situation
    gone = {d.checkpoint.path for d in plan_of(ckpts, rules, foreign, excluded) if not d.keep}
    untouchable = foreign | excluded | {c for c in ckpts if c.meta.get("pinned")}
    assert not gone & {c.path for c in untouchable}
    own = [c for c in ckpts if c not in excluded]
    for rule in rules:
        seen = [c for c in own if getattr(rule, "ephemeral", False) or not c.meta.get("ephemeral")]
        if isinstance(rule, Best) and rule.n:
            sign = 1 if rule.mode == "min" else -1
            values = [
                (sign * c.meta[rule.key], -c.meta["unixtime"], c)
                for c in seen
                if c.meta.get(rule.key) is not None and c.meta[rule.key] == c.meta[rule.key]
            ]
            if values:
                best = min(value[:2] for value in values)
                equal = {c.path for *value, c in values if tuple(value) == best}
                assert equal - gone
        if isinstance(rule, Newest) and rule.n and rule.ephemeral and own:
            assert newest_first(own)[0].path not in gone


@given(situation=situations(), seed=st.integers(0, 9))
def test_a_plan_is_the_same_each_time_and_in_any_order(situation, seed):
    """Decisions, reasons and their order depend on the records alone."""
    ckpts, rules, foreign, excluded = situation
    shuffled = random.Random(seed).sample(ckpts, len(ckpts))
    first = [str(d) for d in plan_of(ckpts, rules, foreign, excluded)]
    assert [str(d) for d in plan_of(ckpts, rules, foreign, excluded)] == first
    assert [str(d) for d in plan_of(shuffled, rules, foreign, excluded)] == first


@given(situation=situations())
def test_a_plan_that_was_carried_out_removes_nothing_more(situation):
    """Pruning twice is pruning once, for every rule of this package and all together."""
    ckpts, rules, foreign, excluded = situation
    left = [d.checkpoint for d in plan_of(ckpts, rules, foreign, excluded) if d.keep]
    assert [d for d in plan_of(left, rules, foreign, excluded) if not d.keep] == []


@given(situation=situations())
def test_a_budget_is_kept_or_the_plan_says_that_it_is_not(situation):
    """And with it no more goes than without it, other than by the budget's word."""
    ckpts, rules, foreign, excluded = situation
    limits = [rule for rule in rules if isinstance(rule, Budget)]
    plan = plan_of(ckpts, rules, foreign, excluded)
    files = {}
    for decision in plan:
        if decision.keep:
            files.update(shared_bytes(decision.checkpoint))
    within = all(sum(files.values()) <= limit.limit for limit in limits)
    own = [d for d in plan if d.keep and d.checkpoint not in excluded]
    said = any("over the budget" in decision.reason for decision in own)
    assert within or said or not own
    others = [rule for rule in rules if not isinstance(rule, Budget)]
    if others:
        before = {d.checkpoint.path for d in plan_of(ckpts, others, foreign, excluded) if d.keep}
        for decision in plan:
            by_budget = not decision.keep and "over the budget" in decision.reason
            assert decision.keep or by_budget == (decision.checkpoint.path in before)
