"""What happened to each checkpoint is put together from what is there and what was noted."""

from __future__ import annotations

import math

import pytest
from _lives import record, removed, rules, saved, small_run

from lightning_sbckpt._views.timeline import as_number, build_timeline

BEST_LOSS = "Best(key='loss', n=2, mode='min', ephemeral=False)"


def states(timeline):
    return [(life.name, life.state) for life in timeline.lives]


def test_what_was_noted_and_is_there_is_one_checkpoint():
    """With the meta as it is now, annotations too, and what the history alone knows."""
    timeline = build_timeline([record("a", 1, loss=0.5, bleu=30)], [saved("a", 1, loss=0.5)])
    (life,) = timeline.lives
    assert (life.state, life.made, life.size, life.seconds) == ("there", 1, 1000, 0.25)
    assert life.number("bleu") == 30


def test_a_removed_one_keeps_its_reason():
    """And when it was removed."""
    timeline = build_timeline([], [saved("a", 1), removed("a", 3, "not among the 1 best")])
    (life,) = timeline.lives
    assert (life.state, life.removed, life.reason) == ("removed", 3, "not among the 1 best")


def test_one_name_may_have_several_lives():
    """A checkpoint saved under a name that is in use replaces the other."""
    events = [saved("last", 1, loss=0.9), saved("last", 2, loss=0.8), removed("last", 3)]
    events.append(saved("last", 4, loss=0.7))
    timeline = build_timeline([record("last", 4, loss=0.7)], events)
    assert states(timeline) == [("last", "removed"), ("last", "removed"), ("last", "there")]
    assert timeline.lives[0].reason == "replaced by a newer one of the same name"
    assert [life.number("loss") for life in timeline.lives] == [0.9, 0.8, 0.7]


def test_what_vanished_without_a_note_is_gone():
    """Somebody removed the folder by hand."""
    timeline = build_timeline([], [saved("a", 1)])
    assert states(timeline) == [("a", "gone")]


def test_what_came_from_elsewhere_is_not_taken_for_what_was_noted():
    """A folder of the same name with another time was copied in."""
    timeline = build_timeline([record("a", 9, loss=0.1)], [saved("a", 1, loss=0.5)])
    assert states(timeline) == [("a", "gone"), ("a", "there")]
    assert timeline.lives[0].number("loss") == 0.5


def test_without_a_history_what_is_there_is_known():
    """In the order in which it was made, whatever the names are; lineage is asked for."""
    asked = []

    def lineage_of(ckpt):
        asked.append(ckpt.path.name)
        return {"run": "x"}

    there = [record("a", 3), record("b", 1), record("c", 2)]
    timeline = build_timeline(there, [], lineage_of=lineage_of)
    assert [life.name for life in timeline.lives] == ["b", "c", "a"]
    assert {life.run for life in timeline.lives} == {"x"}
    assert not timeline.has_history


def test_lineage_is_asked_only_of_those_that_the_history_does_not_tell_of():
    """It costs the reading of a manifest."""
    asked = []
    there = [record("a", 1), record("b", 2)]
    build_timeline(there, [saved("a", 1)], lineage_of=lambda ckpt: asked.append(ckpt) or {})
    assert [ckpt.path.name for ckpt in asked] == ["b"]


def test_an_unreadable_one_is_not_gone():
    """It is there, and what is wrong with it is its reason."""
    timeline = build_timeline(
        [], [saved("a", 1, loss=0.5)], unreadable={"a": "not YAML", "b": "cut off"}
    )
    assert sorted(states(timeline)) == [("a", "unreadable"), ("b", "unreadable")]
    assert {life.name: life.reason for life in timeline.lives} == {"a": "not YAML", "b": "cut off"}


def test_a_removal_of_what_nobody_noted_is_known_all_the_same():
    """A history may have been begun late."""
    timeline = build_timeline([], [removed("a", 5), saved("b", 6)])
    assert states(timeline) == [("a", "removed"), ("b", "gone")]
    assert timeline.lives[0].made is None


def test_a_resume_is_found_where_the_lineage_changes():
    """Once, however many checkpoints say that they come from there."""
    again = {"run": "x", "resumed-from": "b"}
    events = [saved("a", 1, {"run": "x"}), saved("b", 2, {"run": "x"}, global_step=20)]
    events += [saved("c", 3, again), saved("d", 4, again)]
    (resume,) = build_timeline([], events).resumes
    assert (resume.source, resume.first.name) == ("b", "c")
    assert resume.origin is not None and resume.origin.name == "b"
    assert resume.step() == ("global_step", 20)


def test_runs_that_share_a_folder_are_not_taken_for_resumes_of_each_other():
    """Their checkpoints may alternate."""
    first, second = {"run": "x", "resumed-from": "old"}, {"run": "y"}
    events = [saved(str(n), n, second if n % 2 else first) for n in range(6)]
    assert [resume.first.name for resume in build_timeline([], events).resumes] == ["0"]


def test_a_resume_from_an_unknown_checkpoint_has_no_step():
    """It lay in another folder, say."""
    (resume,) = build_timeline([], [saved("a", 1, {"resumed-from": "elsewhere"})]).resumes
    assert (resume.origin, resume.step()) == (None, None)


def test_an_average_is_no_resume_and_stands_beside_the_runs():
    """What was saved after it is still the same run going on."""
    of_run = {"run": "", "resumed-from": "z"}
    there = [record("m", 3, **{"averaged-from": ["a", "b"]})]
    events = [saved("a", 1, of_run), saved("b", 2, of_run), saved("m", 3), saved("c", 4, of_run)]
    timeline = build_timeline(there, events)
    assert len(timeline.resumes) == 1
    assert timeline.lives[2].averaged_from == ("a", "b")


def test_the_main_metric_is_that_of_the_first_rule_that_ranks():
    """By the rules that were followed last, with which way is best."""
    events = [rules("Best(key='acc', n=1, mode='max')"), saved("a", 1, acc=0.5, loss=2.0)]
    events.append(rules("Newest(n=2)", BEST_LOSS, "Pareto('acc', 'ms', modes=('max', 'min'))"))
    timeline = build_timeline([], events)
    assert timeline.main_metric() == "loss"
    assert timeline.modes() == {"loss": "min", "acc": "max", "ms": "min"}


@pytest.mark.parametrize("rule", ["MyRule(3)", "Best(open('x'))", "", "Best(key='absent')"])
def test_without_a_usable_rule_it_is_the_first_metric(rule):
    """Places in training and marks are no metrics."""
    events = [rules(rule), saved("a", 1, step=3, epoch=1, ephemeral=True, tag="x", acc=0.5, loss=2)]
    assert build_timeline([], events).main_metric() == "acc"


def test_the_best_is_one_of_those_that_are_there():
    """NaN, words and what was removed are none; of equally good ones it is the newer."""
    there = [record("a", 1, loss=0.3), record("b", 2, loss=0.3), record("c", 3, loss=math.nan)]
    there.append(record("d", 4, loss="-inf"))
    events = [saved("e", 5, loss=0.1), removed("e", 6)]
    timeline = build_timeline(there, events)
    assert timeline.best("loss", "min").name == "b"
    assert build_timeline(there[2:], events).best("loss", "min") is None


@pytest.mark.parametrize(
    ("metas", "expected"),
    [
        ([{"global_step": 10, "step": 1}, {"global_step": 20}], ("global_step", [10, 20])),
        ([{"step": 5, "epoch": 0}, {"step": 9, "epoch": 1}], ("step", [5, 9])),
        ([{"epoch": 0}, {"epoch": 1}], ("epoch", [0, 1])),
        ([{"loss": 1}, {"loss": 2}], ("", [1, 2])),
        ([{"step": 1}, {}, {"step": 3}], ("step", [1, 1, 3])),
        ([{}, {"step": 2}, {"step": 3}], ("step", [2, 2, 3])),
        ([{"step": 1}, {}, {}], ("", [1, 2, 3])),
        ([{"step": 10**400}, {"step": math.inf}, {"step": 1}], ("", [1, 2, 3])),
        ([{"step": True}, {"step": "5"}], ("", [1, 2])),
    ],
)
def test_the_place_in_training_is_the_most_exact_one_that_most_have(metas, expected):
    """One that lacks it stands where the one before it does."""
    there = [record(str(number), number, **meta) for number, meta in enumerate(metas)]
    assert build_timeline(there, []).places() == expected


def test_rules_that_stay_the_same_are_told_once():
    """Every process notes its own."""
    events = [rules("A", time=1), rules("A", time=2), rules("B", time=3), rules("A", time=4)]
    timeline = build_timeline([], events)
    assert [moment for moment, _ in timeline.rule_changes] == [1, 3, 4]
    assert timeline.rules == ["A"]


def test_a_history_with_strange_values_tells_what_it_can():
    """JSON holds NaN, numbers without end, and anything in place of a number."""
    strange = saved("a", 1, loss=10**400)
    strange.update(time=math.nan, bytes="many", seconds=True)
    strange["meta"]["unixtime"] = "soon"
    (life,) = build_timeline([], [strange]).lives
    assert (life.made, life.size, life.seconds, life.number("loss")) == (None, None, None, math.inf)


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), ("inf", math.inf), ("-inf", -math.inf), ("3", None), (True, None), ([1], None)],
)
def test_numbers_are_those_that_the_history_writes(value, number):
    """Infinity has a word of its own there."""
    assert as_number(value) == number


def test_a_real_run_is_told_as_it_was(tmp_path):
    """Eight checkpoints and two for recovery, one resume, one pinned."""
    timeline = small_run(tmp_path / "run").timeline()
    assert len(timeline.lives) == 10
    there = [life.name for life in timeline.lives if life.state == "there"]
    assert there == ["CKPT+step200", "CKPT+step600", "CKPT+step700", "CKPT+step800", "CKPT+halt800"]
    (resume,) = timeline.resumes
    assert (resume.source, resume.step()) == ("CKPT+halt400", ("global_step", 400))
    assert timeline.main_metric() == "loss"
    marks = {path.name: words for path, words in timeline.marks().items()}
    assert marks["CKPT+step600"] == ["best"]
    assert marks["CKPT+step200"] == ["pinned"]
    assert marks["CKPT+halt800"] == ["newest", "for recovery only"]
