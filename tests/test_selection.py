"""Which checkpoint is best: ranking by a key, by a function, by age."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.selection import importance, newest_first, rank_checkpoints

NAN = float("nan")
INF = float("inf")


def ckpt(name, unixtime=0.0, **meta):
    """Return the record of a checkpoint that is nowhere."""
    return Checkpoint(Path("run") / name, {"unixtime": unixtime, **meta}, {})


def names(checkpoints):
    return "".join(checkpoint.path.name for checkpoint in checkpoints)


def one_of_each():
    return [
        ckpt("a", 1.0, loss=0.3, acc=0.7),
        ckpt("b", 2.0, loss=0.1, acc=0.9),
        ckpt("c", 3.0, loss=0.2),
    ]


@pytest.mark.parametrize(
    ("wanted", "best_first"),
    [
        ({}, "cba"),
        ({"importance_key": ckpt_recency}, "cba"),
        ({"min_key": "loss"}, "bca"),
        ({"max_key": "loss"}, "acb"),
        ({"max_key": "acc"}, "ba"),
        ({"min_key": "acc"}, "ab"),
        ({"min_key": "nowhere"}, ""),
        ({"importance_key": lambda c: c.meta["loss"] * c.meta["unixtime"]}, "cab"),
    ],
)
def test_each_argument_ranks_its_own_way(wanted, best_first):
    """A key ranks those that have it, lowest or highest first; without arguments age ranks."""
    assert names(rank_checkpoints(one_of_each(), importance(**wanted))) == best_first


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, "most recent"),
        ({"importance_key": ckpt_recency}, "most recent"),
        ({"min_key": "loss"}, "lowest loss"),
        ({"max_key": "acc"}, "highest acc"),
        ({"importance_key": names}, "most important by names"),
    ],
)
def test_a_criterion_describes_itself_in_words(wanted, words):
    """Logs and messages say what made a checkpoint the best."""
    assert importance(**wanted).describe() == words


@pytest.mark.parametrize(
    "both",
    [
        {"min_key": "loss", "max_key": "acc"},
        {"min_key": "loss", "importance_key": ckpt_recency},
        {"max_key": "acc", "importance_key": ckpt_recency},
    ],
)
def test_two_criteria_at_once_are_refused_by_name(both):
    """Two arguments that may contradict each other are refused, and the message names both."""
    with pytest.raises(SelectionError, match="Give one of") as caught:
        importance(**both)
    for name in both:
        assert f"{name}=" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"importance_key": "loss"}, "pass it as max_key or min_key"),
        ({"min_key": ckpt_recency}, "min_key is ckpt_recency.*pass it as importance_key"),
        ({"max_key": ["acc"]}, r"max_key is \['acc'\], expected the name of a key"),
    ],
)
def test_a_criterion_of_the_wrong_kind_is_refused_with_advice(wrong, advice):
    """A key given as a function, or a function given as a key, is refused with the right way."""
    with pytest.raises(SelectionError, match=advice):
        importance(**wrong)


@pytest.mark.parametrize(
    "wanted", [{"min_key": "x"}, {"max_key": "x"}, {"importance_key": lambda c: c.meta["x"]}]
)
@pytest.mark.parametrize("order", range(6))
def test_nan_is_worse_than_everything_in_every_order(wanted, order):
    """NaN ranks last, behind infinities of either sign, whatever the order of the list."""
    ckpts = [ckpt("l", x=-INF), ckpt("h", x=INF), ckpt("m", x=0.0), ckpt("n", 9.0, x=NAN)]
    random.Random(order).shuffle(ckpts)
    ranked = names(rank_checkpoints(ckpts, importance(**wanted)))
    assert ranked == ("lmhn" if "min_key" in wanted else "hmln")


@pytest.mark.parametrize("wanted", [{"min_key": "x"}, {"max_key": "x"}, {}])
@pytest.mark.parametrize("order", range(6))
def test_ties_go_to_the_newer_then_to_the_last_name(wanted, order):
    """Equal values are ranked by time, and equal times by folder name, whatever the order."""
    ckpts = [ckpt("c", 1.0, x=1), ckpt("a", 2.0, x=1), ckpt("d", 2.0, x=1.0), ckpt("b", 2.0, x=1)]
    random.Random(order).shuffle(ckpts)
    assert names(rank_checkpoints(ckpts, importance(**wanted))) == "dbac"


@pytest.mark.parametrize("order", range(3))
def test_several_nans_are_ranked_by_age_among_themselves(order):
    """NaN ties with NaN, so the newer one comes first."""
    ckpts = [ckpt("a", 1.0, x=NAN), ckpt("b", 2.0, x=NAN), ckpt("c", 0.0, x=5)]
    random.Random(order).shuffle(ckpts)
    assert names(rank_checkpoints(ckpts, importance(min_key="x"))) == "cba"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        (False, 0.0),
        (Fraction(1, 2), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array([2.5]), 2.5),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([[4]]), 4.0),
        (10**400, INF),
        (-(10**400), -INF),
    ],
)
def test_everything_that_is_one_number_ranks_as_that_number(value, number):
    """Booleans, fractions, numpy's scalars and tensors of one element count as numbers."""
    assert importance(max_key="x").score(ckpt("a", x=value)) == number
    assert importance(min_key="x").score(ckpt("a", x=value)) == -number


@pytest.mark.parametrize(
    "value", ["0.5", [0.5], {"mean": 0.5}, torch.tensor([1.0, 2.0]), torch.tensor(1j), 1j]
)
@pytest.mark.parametrize("kind", ["min_key", "max_key"])
def test_a_value_that_is_no_number_is_refused_by_name(value, kind):
    """The message names the checkpoint, the key, and what was found there."""
    with pytest.raises(SelectionError, match="expected a real number") as caught:
        rank_checkpoints([ckpt("CKPT+bad", x=value)], importance(**{kind: "x"}))
    message = str(caught.value)
    assert str(Path("run/CKPT+bad")) in message
    assert "'x'" in message
    assert repr(value) in message
    assert "ckpt_predicate" in message


def test_an_empty_value_makes_no_candidate():
    """`loss:` without a value in the YAML file is as if the key were missing."""
    ckpts = [ckpt("a", loss=None), ckpt("b", loss=1.0)]
    assert names(rank_checkpoints(ckpts, importance(min_key="loss"))) == "b"


def test_the_predicate_is_asked_about_candidates_only():
    """A predicate may read the key that ranks without checking that it is there."""
    ckpts = [*one_of_each(), ckpt("d", 4.0)]
    ranked = rank_checkpoints(ckpts, importance(min_key="loss"), lambda c: c.meta["loss"] > 0.1)
    assert names(ranked) == "ca"


@pytest.mark.parametrize(("limit", "best_first"), [(0, ""), (1, "b"), (2, "bc"), (9, "bca")])
def test_a_limit_cuts_the_ranking_after_the_best(limit, best_first):
    """At most `limit` checkpoints come back, and they are the best ones."""
    assert names(rank_checkpoints(one_of_each(), importance(min_key="loss"), limit=limit)) == (
        best_first
    )


def test_a_negative_limit_is_refused():
    """A negative limit would silently cut from the wrong end."""
    with pytest.raises(SelectionError, match="Cannot return -1 checkpoints"):
        rank_checkpoints(one_of_each(), importance(), limit=-1)


def test_a_function_that_misses_a_key_is_explained():
    """The message names the checkpoint and its keys and suggests a predicate; the cause is kept."""

    def accuracy(checkpoint):
        return checkpoint.meta["acc"]

    with pytest.raises(SelectionError, match="'accuracy' failed on checkpoint") as caught:
        rank_checkpoints(one_of_each(), importance(importance_key=accuracy))
    message = str(caught.value)
    assert "loss, unixtime" in message
    assert "ckpt_predicate=lambda ckpt: 'acc' in ckpt.meta" in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_other_errors_of_a_function_reach_the_caller_unchanged():
    """Only a missing key has a known remedy; any other error is the caller's own."""
    with pytest.raises(ZeroDivisionError):
        rank_checkpoints(one_of_each(), importance(importance_key=lambda c: 1 / 0))


def test_a_function_may_return_several_numbers():
    """As with `sorted`, later numbers decide between equal earlier ones; NaN is still worst."""
    ckpts = [ckpt("a", x=1, y=1), ckpt("b", x=1, y=2), ckpt("c", x=0, y=9), ckpt("d", x=NAN, y=9)]
    by_both = importance(importance_key=lambda c: (c.meta["x"], c.meta["y"]))
    assert names(rank_checkpoints(ckpts, by_both)) == "bacd"


@pytest.mark.parametrize("unixtime", ["yesterday", None, NAN])
def test_a_checkpoint_without_a_usable_time_is_the_oldest(unixtime):
    """A time that is no number never breaks a sort and never makes a checkpoint the newest."""
    ckpts = [ckpt("a", 1.0), ckpt("z", unixtime), ckpt("b", 2.0)]
    assert names(newest_first(ckpts)) == "baz"
    assert names(rank_checkpoints(ckpts, importance())) == "baz"
