"""Arguments that belong together may be given as one value, or flat."""

from __future__ import annotations

import inspect
import pickle
from typing import get_args

import pytest
import yaml
from _runs import fit

from lightning_sbckpt import ResumePolicy, SavePolicy, SBCheckpoint, Store, typing
from lightning_sbckpt.errors import ConfigurationError


@pytest.mark.parametrize(
    ("policies", "flat"),
    [
        (
            {"resume": ResumePolicy(partial=True, keep_lr=True, skip=["rng"], on_change="raise")},
            {"partial": True, "keep_lr": True, "skip": ["rng"], "on_change": "raise"},
        ),
        (
            {"save_mode": SavePolicy("async", on_error="warn", when_busy="skip")},
            {"save_mode": "async", "on_save_error": "warn", "when_busy": "skip"},
        ),
        (
            {"dirpath": Store("s3://bucket/run", "/scratch/run", {"anon": True})},
            {
                "dirpath": "s3://bucket/run",
                "local_dir": "/scratch/run",
                "storage_options": {"anon": True},
            },
        ),
    ],
    ids=["resume", "save", "store"],
)
def test_a_policy_means_what_its_flat_arguments_mean(policies, flat):
    """Whichever way they are given."""
    given = SBCheckpoint(**{"dirpath": "run", **policies})
    assert given._options == SBCheckpoint(**{"dirpath": "run", **flat})._options
    assert pickle.loads(pickle.dumps(given))._options == given._options


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resume": ResumePolicy(partial=True), "skip": ["rng"]}, r"skip beside resume=Res"),
        ({"resume": ResumePolicy(), "partial": True, "keep_lr": True}, "partial, keep_lr beside"),
        ({"save_mode": SavePolicy("async"), "on_save_error": "warn"}, "on_save_error beside"),
        ({"dirpath": Store("s3://bucket/run"), "local_dir": "/x"}, "local_dir beside dirpath="),
    ],
)
def test_what_is_said_twice_is_refused(arguments, named):
    """A flat value other than its default, also where both say the same."""
    with pytest.raises(ConfigurationError, match=named):
        SBCheckpoint(**{"dirpath": "run", **arguments})


def test_values_in_a_policy_are_checked_as_flat_ones_are():
    """By the same words."""
    with pytest.raises(ConfigurationError, match="partial is 'yes', expected True or False"):
        SBCheckpoint("run", resume=ResumePolicy(partial="yes"))
    with pytest.raises(ConfigurationError, match="on_change is 'ask', expected one of 'warn', "):
        SBCheckpoint("run", resume=ResumePolicy(on_change="ask"))
    with pytest.raises(ConfigurationError, match="save_mode is 'fast', expected one of 'sync', "):
        SavePolicy("fast")


def test_a_run_resumes_by_its_policy(tmp_path):
    """And `resume=False` is no policy: it begins anew."""
    fit(tmp_path, trainer={"max_epochs": 1})
    run = fit(tmp_path, trainer={"max_epochs": 2}, resume=ResumePolicy(skip=["rng"]))
    assert "rng (asked for by skip)" in run.callback.resume_report.skipped


def test_choices_are_types():
    """So that an editor offers them and a type checker refuses others."""
    assert get_args(typing.SaveMode) == ("sync", "async", "overlap")
    assert get_args(typing.OnChange) == ("warn", "raise", "restart")


def test_lightning_cli_makes_them_from_yaml(tmp_path):
    """By the names of their attributes, as it makes any dataclass."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SBCheckpoint, "callback", fail_untyped=False)
    config = {
        "callback": {
            "dirpath": str(tmp_path),
            "resume": {"partial": True},
            "save_mode": {"mode": "async", "on_error": "warn"},
        }
    }
    callback = getattr(parser, "instantiate", parser.instantiate_classes)(
        parser.parse_string(yaml.safe_dump(config))
    ).callback
    assert callback._options.adaptation.partial
    assert callback._options.save_policy == SavePolicy("async", on_error="warn")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resume": ResumePolicy(partial=True), "partial": False}, "partial beside resume="),
        ({"save_mode": SavePolicy(), "when_busy": "wait"}, "when_busy beside save_mode="),
        (
            {"dirpath": Store("s3://b/run"), "storage_options": None},
            "storage_options beside dirpath=",
        ),
    ],
)
def test_what_is_said_twice_is_refused_even_if_it_is_the_default(arguments, named):
    """It may contradict the policy, and one of the two would be silently ignored."""
    with pytest.raises(ConfigurationError, match=named):
        SBCheckpoint(**{"dirpath": "run", **arguments})


def test_a_tool_that_gives_every_argument_may_give_a_policy():
    """Which were written can't be told then: those that differ from their default."""
    every = {
        name: parameter.default
        for name, parameter in inspect.signature(SBCheckpoint).parameters.items()
    }
    given = SBCheckpoint(**{**every, "dirpath": "run", "resume": ResumePolicy(partial=True)})
    assert given._options.adaptation.partial
    with pytest.raises(ConfigurationError, match="keep_lr beside resume="):
        SBCheckpoint(**{**every, "dirpath": "run", "resume": ResumePolicy(), "keep_lr": True})
