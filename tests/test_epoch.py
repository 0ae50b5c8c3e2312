"""Epoch counters: what they count, what they write, and when they stop."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml

from lightning_sbckpt.epoch import EpochCounter, EpochCounterWithStopper
from lightning_sbckpt.errors import ConfigurationError, DamagedCheckpointError
from lightning_sbckpt.hooks import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    get_default_hook,
)


def save(counter, path):
    get_default_hook(counter, DEFAULT_SAVE_HOOKS)(counter, path)


def load(counter, path, end_of_epoch):
    get_default_hook(counter, DEFAULT_LOAD_HOOKS)(counter, path, end_of_epoch)


def run(counter, metrics):
    """Iterate with these metrics and return the epochs that ran."""
    epochs = []
    # Metrics first: zip would take an epoch too many from a counter that came first.
    for metric, epoch in zip(metrics, counter):  # noqa: B905 - the counter may stop first
        counter.update_metric(metric)
        epochs.append(epoch)
    return epochs


def test_epochs_count_from_one_to_the_limit_once():
    """A second loop over the same counter has nothing left to count."""
    counter = EpochCounter(3)
    assert list(counter) == [1, 2, 3]
    assert list(counter) == []
    assert counter.current == counter.limit == 3


@pytest.mark.parametrize(("end_of_epoch", "rest"), [(True, [3, 4]), (False, [2, 3, 4])])
def test_recovery_goes_on_after_the_epoch_or_repeats_it(end_of_epoch, rest, tmp_path):
    """Saved at its end an epoch is done; saved within it, it runs again."""
    counter = EpochCounter(4)
    next(counter), next(counter)
    save(counter, tmp_path / "epoch.ckpt")
    resumed = EpochCounter(4)
    load(resumed, tmp_path / "epoch.ckpt", end_of_epoch)
    assert list(resumed) == rest


def test_transfer_counts_as_the_end_of_an_epoch(tmp_path):
    """The transfer hook has no `end_of_epoch`; the next epoch comes."""
    (tmp_path / "epoch.ckpt").write_text("2")
    counter = EpochCounter(3)
    get_default_hook(counter, DEFAULT_TRANSFER_HOOKS)(counter, tmp_path / "epoch.ckpt")
    assert list(counter) == [3]


def test_each_epoch_is_told_once(caplog):
    """One log line as an epoch begins."""
    with caplog.at_level(logging.INFO, "lightning_sbckpt"):
        list(EpochCounter(2))
    assert caplog.messages == ["epoch 1 of 2 begins", "epoch 2 of 2 begins"]


def test_a_real_speechbrain_reads_our_epoch_and_we_read_its_own(speechbrain, tmp_path):
    """The file of a counter is the number as text, in both directions."""
    theirs, ours = speechbrain.utils.epoch_loop.EpochCounter(9), EpochCounter(9)
    for _ in range(3):
        next(ours)
    save(ours, tmp_path / "ours.ckpt")
    theirs._recover(tmp_path / "ours.ckpt", end_of_epoch=True)
    assert theirs.current == 3
    next(theirs)
    theirs._save(tmp_path / "theirs.ckpt")
    load(ours, tmp_path / "theirs.ckpt", True)
    assert ours.current == 4


def test_a_real_speechbrain_stopper_reads_our_state_and_we_read_its_own(speechbrain, tmp_path):
    """The file of a counter with a stopper is the same YAML mapping, in both directions."""
    theirs = speechbrain.utils.epoch_loop.EpochCounterWithStopper(9, 5, 0, "min")
    ours = EpochCounterWithStopper(9, 5, 0, "min")
    run(ours, [0.9, 0.5, 0.7])
    save(ours, tmp_path / "ours.ckpt")
    theirs._recover(tmp_path / "ours.ckpt", end_of_epoch=True)
    state = {"current": 3, "best_limit": 2, "best_score": 0.5, "should_stop": False}
    assert {name: getattr(theirs, name) for name in state} == state
    theirs._save(tmp_path / "theirs.ckpt")
    fresh = EpochCounterWithStopper(9, 5, 0, "min")
    load(fresh, tmp_path / "theirs.ckpt", True)
    assert {name: getattr(fresh, name) for name in state} == state


@pytest.mark.parametrize(
    ("direction", "metrics", "ran", "best"),
    [
        ("min", [0.9, 0.5, 0.6, 0.7, 0.4], [1, 2, 3, 4], (2, 0.5)),
        ("max", [0.1, 0.5, 0.4, 0.3, 0.9], [1, 2, 3, 4], (2, 0.5)),
        ("min", [0.9, 0.8, 0.7, 0.6, 0.5], [1, 2, 3, 4, 5], (5, 0.5)),
        ("min", [-1.0, -2.0, -1.5, -1.0, -9.0], [1, 2, 3, 4], (2, -2.0)),
        ("min", [0.5, float("nan"), float("nan"), 0.1], [1, 2, 3], (1, 0.5)),
    ],
)
def test_training_stops_when_the_metric_has_not_improved(direction, metrics, ran, best):
    """After two epochs without improvement no further epoch begins."""
    counter = EpochCounterWithStopper(5, 2, 0, direction)
    assert run(counter, metrics) == ran
    assert (counter.best_limit, counter.best_score) == best


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("value", [0.9, 0.0, -0.9])
def test_a_metric_that_stands_still_does_not_improve(direction, value):
    """A value equal to the best one is no improvement, whatever its sign."""
    counter = EpochCounterWithStopper(10, 2, 0, direction)
    assert run(counter, [value] * 10) == [1, 2, 3]


def test_the_warmup_is_disregarded():
    """Metrics of the first epochs neither count as best nor as missing improvement."""
    counter = EpochCounterWithStopper(10, 2, 2, "min")
    assert run(counter, [0.1, 0.1, 0.5, 0.6, 0.7, 0.8]) == [1, 2, 3, 4, 5]
    assert counter.best_limit == 3


def test_a_tensor_as_metric_is_saved_as_a_plain_number(tmp_path):
    """A one-element tensor does not end up as a Python tag in the YAML file."""
    counter = EpochCounterWithStopper(10, 2, 0, "max")
    run(counter, [torch.tensor(0.5)])
    save(counter, tmp_path / "epoch.ckpt")
    state = yaml.safe_load((tmp_path / "epoch.ckpt").read_text())
    assert state == {"current_epoch": 1, "best_epoch": 1, "best_score": 0.5, "should_stop": False}


@pytest.mark.parametrize("direction", ["min", "max"])
def test_a_counter_that_saw_no_metric_yet_is_saved_and_recovered(direction, tmp_path):
    """The best score is infinite then, which YAML holds."""
    counter = EpochCounterWithStopper(10, 2, 0, direction)
    next(counter)
    save(counter, tmp_path / "epoch.ckpt")
    resumed = EpochCounterWithStopper(10, 2, 0, direction)
    resumed.best_score = 0.0
    load(resumed, tmp_path / "epoch.ckpt", True)
    assert resumed.best_score == counter.best_score
    assert resumed.current == 1


def test_a_stopped_run_stays_stopped_when_resumed(tmp_path):
    """What was decided before an interruption holds after it."""
    counter = EpochCounterWithStopper(10, 1, 0, "min")
    assert run(counter, [0.1, 0.2]) == [1, 2]
    save(counter, tmp_path / "epoch.ckpt")
    resumed = EpochCounterWithStopper(10, 1, 0, "min")
    load(resumed, tmp_path / "epoch.ckpt", True)
    assert list(resumed) == []


def test_a_stopper_takes_a_plain_epoch_and_says_that_the_rest_is_missing(tmp_path, caplog):
    """SpeechBrain's Checkpointer saves the epoch alone; patience then starts at that epoch."""
    (tmp_path / "epoch.ckpt").write_text("5")
    counter = EpochCounterWithStopper(10, 2, 0, "min")
    load(counter, tmp_path / "epoch.ckpt", True)
    assert "holds the epoch alone" in caplog.text
    assert str(tmp_path / "epoch.ckpt") in caplog.text
    assert run(counter, [float("nan")] * 5) == [6, 7]


def test_a_plain_counter_takes_the_epoch_of_a_stopper(tmp_path):
    """A run may go on without early stopping."""
    stopper = EpochCounterWithStopper(10, 2, 0, "min")
    run(stopper, [0.5, 0.4])
    save(stopper, tmp_path / "epoch.ckpt")
    counter = EpochCounter(3)
    load(counter, tmp_path / "epoch.ckpt", True)
    assert list(counter) == [3]


@pytest.mark.parametrize(
    "text", ["", "three", "1.5", "true", "[1, 2]", "current_epoch: 1", "a: b: c", "\x00\xff"]
)
@pytest.mark.parametrize(
    "make", [lambda: EpochCounter(9), lambda: EpochCounterWithStopper(9, 2, 0, "min")]
)
def test_a_file_that_holds_no_epoch_is_refused_and_changes_nothing(make, text, tmp_path):
    """The message names the file, what was found, and what was expected."""
    path = tmp_path / "epoch.ckpt"
    path.write_text(text, encoding="latin-1")
    counter = make()
    before = dict(vars(counter))
    with pytest.raises(DamagedCheckpointError, match="Cannot read the epoch from") as caught:
        load(counter, path, True)
    assert str(path) in str(caught.value)
    assert "expected a number, or a YAML mapping" in str(caught.value)
    assert vars(counter) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpochCounter(-1), "EpochCounter has limit=-1"),
        (lambda: EpochCounter(2.5), "EpochCounter has limit=2.5"),
        (lambda: EpochCounter("ten"), "EpochCounter has limit='ten'"),
        (lambda: EpochCounterWithStopper(9, -1, 0, "min"), "limit_to_stop=-1"),
        (lambda: EpochCounterWithStopper(9, 1, -2, "min"), "limit_warmup=-2"),
        (lambda: EpochCounterWithStopper(9, 1, 0, "lower"), "direction='lower', expected 'min'"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(make, message):
    """Refused at construction, with an error that is also a ValueError."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_a_whole_number_may_be_spelled_as_a_float():
    """Configuration files write 1e1 for 10."""
    assert EpochCounter(1e1).limit == 10
