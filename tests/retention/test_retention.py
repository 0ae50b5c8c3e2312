"""What retention keeps: rules in, one decision with a reason for every checkpoint out."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention import (
    Best,
    Important,
    Newest,
    plan_retention,
    rules_from_keys,
)

NAN = float("nan")


def ckpt(name, unixtime, **meta):
    """Return the record of a checkpoint that is nowhere."""
    return Checkpoint(Path("run") / name, {"unixtime": unixtime, **meta}, {})


def five():
    """Return five checkpoints, `a` the oldest; `d` has no loss and `e` no accuracy."""
    return [
        ckpt("a", 1, loss=0.1, acc=0.5),
        ckpt("b", 2, loss=0.4, acc=0.9),
        ckpt("c", 3, loss=0.3, acc=0.8),
        ckpt("d", 4, acc=0.6),
        ckpt("e", 5, loss=0.2),
    ]


def by_time(checkpoint):
    return -checkpoint.meta["unixtime"]


def kept(plan):
    return "".join(sorted(d.checkpoint.path.name for d in plan if d.keep))


def reasons(plan):
    return {d.checkpoint.path.name: d.reason for d in plan}


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ([], "abcde"),
        ([Newest(0)], ""),
        ([Newest(1)], "e"),
        ([Newest(9)], "abcde"),
        ([Best("loss")], "ad"),
        ([Best("loss", 2)], "ade"),
        ([Best("loss", 0)], "d"),
        ([Best("acc", 2, mode="max")], "bce"),
        ([Best("nowhere")], "abcde"),
        ([Best("loss"), Newest(1)], "ae"),
        ([Best("loss"), Best("acc", mode="max")], "ab"),
        ([Best("loss"), Best("acc", mode="max"), Newest(2)], "abde"),
        ([Newest(1), Newest(3)], "cde"),
        ([Newest(0), Newest(1)], "e"),
        ([Important(by_time, 2)], "ab"),
        ([Important(by_time, 0)], ""),
    ],
)
def test_what_any_rule_keeps_stays_and_what_none_considers_too(rules, stay):
    """A checkpoint goes only if at least one rule considers it and no rule keeps it."""
    assert kept(plan_retention(five(), rules)) == stay


@pytest.mark.parametrize(
    ("arguments", "stay"),
    [
        ({"num_to_keep": 1, "importance_keys": [ckpt_recency]}, "e"),
        ({"num_to_keep": 0, "importance_keys": [ckpt_recency]}, ""),
        ({"num_to_keep": 1, "min_keys": ["loss"]}, "ad"),
        ({"num_to_keep": 2, "max_keys": ["acc"], "importance_keys": [ckpt_recency]}, "bcde"),
        ({"num_to_keep": 1, "min_keys": ["loss"], "max_keys": ["acc"]}, "ab"),
        ({"num_to_keep": 0, "min_keys": ["loss"]}, "d"),
        ({"num_to_keep": 1, "min_keys": None, "max_keys": None, "importance_keys": None}, "abcde"),
    ],
)
def test_the_plan_is_what_speechbrain_deletes(arguments, stay, speechbrain, tmp_path):
    """The same arguments leave the same checkpoints as the real `delete_checkpoints`."""
    checkpoints = speechbrain.utils.checkpoints
    theirs = checkpoints.Checkpointer(tmp_path)
    for ours in five():
        folder = tmp_path / f"CKPT+{ours.path.name}"
        folder.mkdir()
        theirs._save_checkpoint_metafile(folder / "CKPT.yaml", {}, end_of_epoch=True)
        lines = "".join(f"{key}: {value}\n" for key, value in ours.meta.items())
        (folder / "CKPT.yaml").write_text(lines)
    their_arguments = {"importance_keys": [], **arguments}
    their_arguments["importance_keys"] = [
        checkpoints.ckpt_recency for _ in their_arguments["importance_keys"] or []
    ]
    theirs.delete_checkpoints(**their_arguments)
    assert "".join(sorted(folder.name[-1] for folder in tmp_path.iterdir())) == stay
    assert kept(plan_retention(five(), rules_from_keys(**arguments))) == stay


def test_every_checkpoint_gets_one_decision_newest_first():
    """A dry run can print the plan as it comes."""
    plan = plan_retention(reversed(five()), [Newest(1)])
    assert [d.checkpoint.path.name for d in plan] == list("edcba")


def test_reasons_say_which_rule_kept_or_let_go():
    """Each reason names its rule, and the value where a metric decided."""
    assert reasons(plan_retention(five(), [Best("loss", 2), Newest(1)])) == {
        "a": "among the 2 best loss (min): 0.1",
        "b": "not among the 2 best loss, older than the newest 1",
        "c": "not among the 2 best loss, older than the newest 1",
        "d": "older than the newest 1",
        "e": "among the 2 best loss (min): 0.2, among the newest 1",
    }


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([], "no retention rule"),
        ([Best("loss", 3)], "no rule considers it"),
        ([Best("acc", 0)], "none are kept for their acc"),
        ([Newest(0)], "none are kept for being new"),
        ([Important(by_time, 0)], "none are kept for being important by by_time"),
        ([Important(by_time, 1)], "not among the 1 most important by by_time"),
        ([Important(by_time, 5)], "among the 5 most important by by_time"),
        ([Best("acc", 4, mode="max")], "among the 4 best acc (max): 0.6"),
    ],
)
def test_every_outcome_has_its_own_reason(rules, reason):
    """The reason tells the outcomes of the rules apart."""
    assert reasons(plan_retention(five(), rules))["d"] == reason


def test_a_decision_prints_as_one_line():
    """Printing a plan shows a dry run."""
    lines = [str(decision) for decision in plan_retention(five()[:2], [Newest(1)])]
    assert lines == ["keep   b: among the newest 1", "remove a: older than the newest 1"]


def test_what_the_predicate_excludes_stays_and_takes_no_place_in_a_ranking():
    """The rules see only what may be removed, as in SpeechBrain: the best of those stays too."""
    plan = plan_retention(five(), [Best("loss")], predicate=lambda c: c.path.name != "a")
    assert kept(plan) == "ade"
    assert reasons(plan)["a"] == "not for this retention: ckpt_predicate is false"


def test_a_protected_checkpoint_stays_whatever_the_rules_say():
    """Protection wins over every rule and gives its own reasons."""
    a, b = five()[:2]
    protected = [(a, "this run was resumed from it"), (a, "it is the newest sound one")]
    plan = plan_retention(five(), [Newest(0)], protected=iter(protected))
    assert kept(plan) == "a"
    assert reasons(plan)["a"] == "this run was resumed from it, it is the newest sound one"
    assert b.path.name not in kept(plan)


def test_protection_is_by_path_even_when_meta_was_read_again():
    """NaN differs from NaN, so two records of one checkpoint may not compare equal."""
    plan = plan_retention(
        [ckpt("a", 1, x=float("nan"))],
        [Newest(0)],
        protected=[(ckpt("a", 1, x=float("nan")), "told to")],
    )
    assert kept(plan) == "a"


def test_nan_is_the_first_to_go():
    """A checkpoint whose metric is NaN is kept for it only if nothing better is there."""
    ckpts = [ckpt("a", 1, loss=5.0), ckpt("b", 2, loss=NAN)]
    assert kept(plan_retention(ckpts, [Best("loss")])) == "a"
    assert kept(plan_retention(ckpts, [Best("loss", mode="max")])) == "a"


def test_of_equally_good_checkpoints_the_newer_stays():
    """Ties go to the newer."""
    ckpts = [ckpt("b", 1, loss=0.5), ckpt("a", 2, loss=0.5)]
    assert kept(plan_retention(ckpts, [Best("loss")])) == "a"


@pytest.mark.parametrize("n", [-1, 1.5, "2", True, None])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Newest, "Newest has n="),
        (lambda n: Best("loss", n), "Best has n="),
        (lambda n: Important(by_time, n), "Important has n="),
        (lambda n: rules_from_keys(num_to_keep=n), "Retention has num_to_keep="),
    ],
)
def test_a_number_that_is_no_count_is_refused_with_its_value(make, name, n):
    """Contradictions show at construction, not when checkpoints are about to go."""
    with pytest.raises(SelectionError, match=name) as caught:
        make(n)
    assert repr(n) in str(caught.value)


def test_an_unknown_mode_is_refused():
    """`mode` is min or max."""
    with pytest.raises(SelectionError, match="mode='lowest', expected 'min' or 'max'"):
        Best("loss", mode="lowest")


def test_a_function_as_the_key_of_best_is_refused():
    """Best takes a meta key; functions have a rule of their own."""
    with pytest.raises(SelectionError, match="use Important"):
        Best(by_time)


def test_a_key_as_the_function_of_important_is_refused():
    """Important takes a function; the message says where keys go."""
    with pytest.raises(SelectionError, match="pass it as max_key or min_key"):
        Important("loss", 1)


@pytest.mark.parametrize("name", ["min_keys", "max_keys"])
def test_one_string_for_a_list_of_keys_is_refused(name):
    """A string is a sequence of strings, too: one per letter."""
    with pytest.raises(SelectionError, match=rf"{name}=\['loss'\]"):
        rules_from_keys(num_to_keep=1, **{name: "loss"})


def test_keys_become_rules_in_the_order_of_the_arguments():
    """Recency is the rule of age, so that its reasons speak of age."""
    rules = rules_from_keys(
        num_to_keep=2, min_keys=["a"], max_keys=["b"], importance_keys=[by_time, ckpt_recency]
    )
    expected = [Best("a", 2), Best("b", 2, mode="max"), Important(by_time, 2), Newest(2)]
    assert rules == expected


def test_rules_are_frozen_and_compare_by_value():
    """A rule is a value: it can be shared, compared and put into a set."""
    assert len({Newest(1), Newest(1), Best("x"), Best("x", mode="max")}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Newest(1).n = 2


def test_a_function_without_a_name_still_makes_a_reason():
    """A partial has no name; its repr stands in."""
    rule = Important(functools.partial(by_time), 1)
    assert "functools.partial" in rule.rejects(five()[0])


VALUES = st.floats(allow_nan=True) | st.integers(-3, 3) | st.none()
CHECKPOINTS = st.lists(st.tuples(st.integers(0, 3), VALUES, VALUES), max_size=8).map(
    lambda rows: [
        ckpt(str(i), time, **{k: v for k, v in {"x": x, "y": y}.items() if v is not None})
        for i, (time, x, y) in enumerate(rows)
    ]
)
COUNTS = st.integers(0, 4)
RULES = st.lists(
    st.builds(Newest, COUNTS)
    | st.builds(Best, st.sampled_from("xyz"), COUNTS, mode=st.sampled_from(["min", "max"]))
    | st.builds(Important, st.just(by_time), COUNTS),
    max_size=4,
)


@given(ckpts=CHECKPOINTS, rules=RULES, data=st.data())
def test_a_plan_never_removes_what_something_keeps(ckpts, rules, data):
    """Protected, excluded, unconsidered and kept checkpoints stay; all others go."""
    subset = st.sets(st.sampled_from(ckpts)) if ckpts else st.just(set())
    protected = data.draw(subset, label="protected")
    excluded = data.draw(subset, label="excluded")
    plan = plan_retention(
        ckpts,
        rules,
        predicate=lambda c: c not in excluded,
        protected=[(c, "told to") for c in protected],
    )
    assert {d.checkpoint for d in plan} == set(ckpts)
    assert len(plan) == len(ckpts)
    in_play = [c for c in ckpts if c not in excluded]
    keeps, considered = set(protected) | excluded, set()
    for rule in rules:
        mine = {c for c in in_play if rule.considers(c)}
        considered |= mine
        keeps |= set(rule.keeps([c for c in in_play if c in mine]))
    assert {d.checkpoint for d in plan if not d.keep} == considered - keeps
    assert all(d.reason for d in plan)


@given(ckpts=CHECKPOINTS, rules=RULES, data=st.data())
def test_a_plan_does_not_depend_on_the_order_of_the_checkpoints(ckpts, rules, data):
    """Shuffling the folder listing changes neither decisions nor reasons nor their order."""
    shuffled = data.draw(st.permutations(ckpts))

    def lines(given):
        return [str(decision) for decision in plan_retention(given, rules)]

    assert lines(shuffled) == lines(ckpts)
