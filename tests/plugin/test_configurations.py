"""Everything from YAML, by LightningCLI and by Hydra, and what both do to the next start."""

from __future__ import annotations

import os
import re
import sys
import types
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import yaml
from _python import python
from _runs import Steps, fit

from lightning_sbckpt import Preemption, ResumePolicy, SBCheckpoint, Store
from lightning_sbckpt.errors import ConfigurationError, SelectionError
from lightning_sbckpt.retention import Best, Budget, EveryNEpochs, Pareto, TimeSpaced, Where
from lightning_sbckpt.triggers import (
    AfterStep,
    AllOf,
    AnyOf,
    AtSteps,
    Ephemeral,
    EveryInterval,
    EveryNSteps,
    OnValidationEnd,
    parse_trigger,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"
RULES, TRIGGERS = "lightning_sbckpt.retention.", "lightning_sbckpt.triggers."


def first(checkpoint):
    """An importance."""
    return -checkpoint.meta["epoch"]


# A value as it is written for Hydra, and the same in Python.
WRITTEN = [
    ({"keep": [{"_target_": RULES + "EveryNEpochs", "n": 2}]}, {"keep": [EveryNEpochs(2)]}),
    ({"keep": [{"_target_": RULES + "Budget", "limit": "1 GB"}]}, {"keep": [Budget("1 GB")]}),
    ({"keep": [{"_target_": RULES + "TimeSpaced", "every": "2h"}]}, {"keep": [TimeSpaced("2h")]}),
    ({"keep": [{"_target_": RULES + "Where", "predicate": "a > 1"}]}, {"keep": [Where("a > 1")]}),
    (
        {"keep": [{"_target_": RULES + "Pareto", "_args_": ["a", "b"], "modes": ["min", "max"]}]},
        {"keep": [Pareto("a", "b", modes=["min", "max"])]},
    ),
    ({"keep": ["Best('a', 2)"]}, {"keep": [Best("a", 2)]}),
    (
        {"triggers": [{"_target_": TRIGGERS + "AtSteps", "steps": [1]}]},
        {"triggers": [AtSteps([1])]},
    ),
    ({"triggers": {"_target_": TRIGGERS + "EveryNSteps", "n": 2}}, {"triggers": EveryNSteps(2)}),
    (
        {
            "triggers": [
                {
                    "_target_": TRIGGERS + "Ephemeral",
                    "trigger": {
                        "_target_": TRIGGERS + "AnyOf",
                        "triggers": [
                            {"_target_": TRIGGERS + "EveryInterval", "interval": "90s"},
                            {
                                "_target_": TRIGGERS + "AllOf",
                                "triggers": [
                                    {"_target_": TRIGGERS + "EveryNSteps", "n": 5},
                                    {"_target_": TRIGGERS + "AfterStep", "n": 9},
                                ],
                            },
                        ],
                    },
                }
            ]
        },
        {"triggers": [Ephemeral(AnyOf([EveryInterval(90.0), EveryNSteps(5) & AfterStep(9)]))]},
    ),
    (
        {"triggers": ["EveryNSteps(5) | OnValidationEnd()"]},
        {"triggers": [EveryNSteps(5) | OnValidationEnd()]},
    ),
    ({"train_time_interval": "10 min"}, {"train_time_interval": 600.0}),
    ({"ckpt_predicate": "epoch > 3"}, {"ckpt_predicate": "epoch > 3"}),
    (
        {"importance_key": {"_target_": "test_configurations.first", "_partial_": True}},
        None,
    ),
    ({"meta": {"a": {"b": [1, {"c": 2}]}}}, {"meta": {"a": {"b": [1, {"c": 2}]}}}),
    ({"meta": {"a": {"b": [1, "${dirpath}"]}}}, {"meta": {"a": {"b": [1, "run"]}}}),
    (
        {
            "resume": {
                "_target_": "lightning_sbckpt.ResumePolicy",
                "skip": ["rng"],
                "key_map": {"a.": "b."},
            }
        },
        {"resume": ResumePolicy(skip=["rng"], key_map={"a.": "b."})},
    ),
    (
        {
            "preemption": {
                "_target_": "lightning_sbckpt.Preemption",
                "signals": ["SIGTERM"],
                "grace_time": "2 min",
            }
        },
        {"preemption": Preemption(["SIGTERM"], grace_time="2 min")},
    ),
    (
        {
            "dirpath": {
                "_target_": "lightning_sbckpt.Store",
                "url": "s3://b/run",
                "storage_options": {"client": {"retries": 3}},
            }
        },
        {"dirpath": Store("s3://b/run", storage_options={"client": {"retries": 3}})},
    ),
]


def omegaconf_in(value, seen=None):
    """Return whether anything of OmegaConf is left anywhere in a value."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return False
    seen.add(id(value))
    if type(value).__module__.startswith("omegaconf"):
        return True
    parts = list(value.values()) if isinstance(value, dict) else []
    parts += list(value) if isinstance(value, (list, tuple)) else []
    parts += list(vars(value).values()) if hasattr(value, "__dict__") else []
    return any(omegaconf_in(part, seen) for part in parts)


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
@pytest.mark.parametrize(("written", "meant"), WRITTEN, ids=lambda value: None)
def test_hydra_makes_what_is_written(written, meant, convert):
    """By any of its ways to convert lists and dictionaries, the default one first."""
    omegaconf = pytest.importorskip("omegaconf")
    utils = pytest.importorskip("hydra.utils")
    config = {"_target_": "lightning_sbckpt.SBCheckpoint", "dirpath": "run", **written}
    callback = utils.instantiate(omegaconf.OmegaConf.create({**config, "_convert_": convert}))
    assert not omegaconf_in(callback._options)
    if meant is not None:
        assert callback._options == SBCheckpoint(**{"dirpath": "run", **meant})._options


def as_classes(written):
    """Return what is written for Hydra as it is written for LightningCLI."""
    if isinstance(written, list):
        return [as_classes(each) for each in written]
    if not isinstance(written, dict):
        return written
    given = {key: as_classes(value) for key, value in written.items() if key != "_target_"}
    if "_target_" not in written:
        return given
    return {"class_path": written["_target_"], "init_args": given}


@pytest.mark.parametrize(
    ("written", "meant"),
    # No `*args`, no functions in part, and no `${}` there; one trigger stands in a list.
    [
        pair
        for pair in WRITTEN
        if not re.search(
            r"_args_|_partial_|\$\{|'triggers': \{'_target_': '\S+EveryNSteps", str(pair[0])
        )
    ],
    ids=lambda value: None,
)
def test_lightning_cli_makes_what_is_written_and_writes_it_again(written, meant):
    """What `SaveConfigCallback` saves makes the same callback."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    arguments = {"dirpath": "run", **written}
    config = {"callbacks": as_classes([{"_target_": "lightning_sbckpt.SBCheckpoint", **arguments}])}
    parsed = parser.parse_string(yaml.safe_dump(config))
    for given in (parsed, parser.parse_string(parser.dump(parsed))):
        made = getattr(parser, "instantiate", parser.instantiate_classes)(given).callbacks[0]
        options = SBCheckpoint(**{"dirpath": "run", **meant})._options
        assert repr(made._options) == repr(options)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (
            {"keep": ["EveryNEpoch(2)"]},
            SelectionError,
            r"keep: 'EveryNEpoch\(2\)' is no rule .* Write",
        ),
        (
            {"triggers": ["EveryNStep(2)"]},
            ConfigurationError,
            "triggers: .*there is no trigger EveryNStep",
        ),
        (
            {"triggers": ["EveryNSteps"]},
            ConfigurationError,
            "neither a call nor a plain value. Write",
        ),
        (
            {"triggers": ["EveryNSteps(0)"]},
            ConfigurationError,
            "expected a whole number of at least 1",
        ),
        ({"triggers": ["open('x')"]}, ConfigurationError, "there is no trigger open"),
        ({"triggers": ["1 +"]}, ConfigurationError, "expected a call, such as EveryNSteps"),
        (
            {"train_time_interval": "soon"},
            ConfigurationError,
            "train_time_interval is 'soon', .*'10 min'",
        ),
        ({"train_time_interval": 0}, ConfigurationError, "train_time_interval: EveryInterval has"),
        ({"ckpt_predicate": "epoch >"}, SelectionError, "ckpt_predicate: The expression 'epoch >'"),
        (
            {"resume": {"partial": True}},
            ConfigurationError,
            r"resume is .*, or a ResumePolicy\(...\)",
        ),
        ({"dirpath": {"url": "s3://b"}}, ConfigurationError, r"dirpath is .* or a Store\(...\)"),
        (
            {"preemption": {"grace_time": 3}},
            ConfigurationError,
            r"preemption is .*Preemption\(...\)",
        ),
    ],
)
def test_a_wrong_entry_is_refused_with_its_argument_and_what_to_write(given, error, told):
    """At construction."""
    with pytest.raises(error, match=told):
        SBCheckpoint(**{"dirpath": "run", **given})


@pytest.mark.parametrize("wrong", ["???", "${nowhere}"])
def test_a_value_that_a_configuration_lacks_is_told_by_its_argument(wrong):
    """A missing one, and one that refers to what is not there."""
    omegaconf = pytest.importorskip("omegaconf")
    with pytest.raises(ConfigurationError, match=r"SBCheckpoint: meta: .*(issing|nowhere)"):
        SBCheckpoint("run", meta=omegaconf.OmegaConf.create({"a": wrong}))


@pytest.mark.parametrize(
    "trigger",
    [
        EveryNSteps(5),
        AllOf([EveryNSteps(5), AfterStep(3)]),
        Ephemeral(EveryInterval(60.0)),
        AnyOf([AtSteps([1, 2]), OnValidationEnd()]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_trigger_can_be_read_from_what_it_prints(trigger):
    """As a rule can."""
    assert parse_trigger(repr(trigger)) == trigger


def test_times_may_be_texts():
    """Wherever a time is given."""
    assert EveryInterval("10 min").seconds == 600
    assert EveryInterval("2h") == EveryInterval(7200.0)
    assert Preemption(grace_time="90s").seconds == 90
    assert Preemption(grace_time=timedelta(minutes=2)).seconds == 120
    with pytest.raises(ConfigurationError, match="grace_time of Preemption is 'soon'"):
        Preemption(grace_time="soon")


# ---------------------------------------------------------------------- the next start


@pytest.mark.parametrize(("overwrite", "told"), [(False, True), (True, False)])
def test_a_configuration_that_keeps_the_next_start_from_running_is_told(
    tmp_path, overwrite, told, recwarn
):
    """At the first start, with what to write."""
    cli = pytest.importorskip("lightning.pytorch.cli")
    jsonargparse = pytest.importorskip("jsonargparse")
    save = cli.SaveConfigCallback(
        cli.LightningArgumentParser(), jsonargparse.Namespace(), overwrite=overwrite
    )
    fit(
        tmp_path / "run",
        callbacks=[save],
        trainer={"default_root_dir": tmp_path, "max_epochs": 1},
    )
    found = [each for each in recwarn if "will find config.yaml" in str(each.message)]
    assert bool(found) is told
    assert all('save_config_kwargs={"overwrite": True}' in str(each.message) for each in found)


def running_hydra(monkeypatch, folder, written):
    """Have it look as if Hydra ran this process as one job."""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(
        {"runtime": {"output_dir": str(folder)}, "run": {"dir": written}, "sweep": {"dir": "s"}}
    )
    module = types.ModuleType("hydra.core.hydra_config")
    module.HydraConfig = types.SimpleNamespace(initialized=lambda: True, get=lambda: config)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("place", "written", "told"),
    [
        ("job/ours", "x/${now:%H-%M-%S}", True),
        ("job/ours", "job", False),
        ("ours", "x/${now:%H}", False),
    ],
)
def test_a_folder_that_hydra_names_by_the_time_is_told(
    tmp_path, monkeypatch, recwarn, place, written, told
):
    """The next start has another, and begins anew there."""
    running_hydra(monkeypatch, tmp_path / "job", written)
    fit(tmp_path / place, module=Steps(), trainer={"max_epochs": 1})
    found = [each for each in recwarn if "which Hydra names by the time" in str(each.message)]
    assert bool(found) is told


# ---------------------------------------------------------------------- the examples


@pytest.mark.parametrize("tool", ["cli", "hydra"])
def test_an_example_goes_on_when_the_same_command_is_run_again(tmp_path, tool):
    """One epoch, then all three: the weights of a run that was not stopped."""
    pytest.importorskip({"cli": "jsonargparse", "hydra": "hydra"}[tool])

    def run(epochs, folder):
        cwd = tmp_path / folder
        cwd.mkdir(exist_ok=True)
        command, option = (
            (["fit", "--config", CONFIGS / "cli.yaml"], f"--trainer.max_epochs={epochs}")
            if tool == "cli"
            else ([], f"trainer.max_epochs={epochs}")
        )
        done = python(
            CONFIGS / f"with_{tool}.py",
            *command,
            option,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=300,
            together=True,
        )
        assert done.returncode == 0, done.stdout
        assert "at the next start" not in done.stdout
        return re.search(r"after \d+ steps the weights add up to \S+", done.stdout)[0]

    run(1, "stopped")
    assert run(3, "stopped") == run(3, "whole")


@pytest.mark.parametrize(
    "given",
    [
        {"preemption": Preemption(grace_time=timedelta(minutes=1))},
        {"resume": ResumePolicy(partial=True)},
        {"keep": [Budget("1 GB"), Where("a > 1")]},
        {"triggers": [EveryInterval(timedelta(minutes=1))]},
    ],
    ids=lambda given: next(iter(given)),
)
def test_objects_may_be_given_beside_a_configuration_of_hydra(given):
    """As Hydra's `instantiate` takes them, which reads dataclasses as configurations."""
    utils = pytest.importorskip("hydra.utils")
    config = {"_target_": "lightning_sbckpt.SBCheckpoint", "dirpath": "run"}
    made = utils.instantiate(config, **given)
    assert repr(made._options) == repr(SBCheckpoint("run", **given)._options)
