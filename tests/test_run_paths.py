"""A run, `run/best` and `run/newest` wherever a checkpoint is taken."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer, Pretrainer, average_checkpoints
from lightning_sbckpt.cli import main
from lightning_sbckpt.consolidation import consolidate
from lightning_sbckpt.errors import CheckpointNotFoundError
from lightning_sbckpt.export import to_safetensors
from lightning_sbckpt.run_paths import checkpoint_of_run, means_run, resolved

VALUES = {"a": 1.0, "b": 2.0, "c": 3.0}


@pytest.fixture
def run(tmp_path, scale):
    """Three checkpoints, of which the second is noted as the best, and whose names are their order."""
    folder = tmp_path / "run"
    checkpointer = Checkpointer(folder, {"model": (model := scale())})
    for (name, value), loss in zip(VALUES.items(), (0.5, 0.25, 0.75), strict=True):
        model.value = value
        checkpointer.save_and_keep_only({"loss": loss}, name=name, min_keys=["loss"], num_to_keep=3)
    return folder


PLACES = {"": "b", "/best": "b", "/newest": "c", "/CKPT+a": "a"}
IN_A_RUN = pytest.mark.parametrize("place", PLACES)


@IN_A_RUN
def test_a_checkpointer_loads_it(run, place, scale, caplog):
    """And says which it is, if the path doesn't."""
    caplog.set_level(logging.INFO, logger="lightning_sbckpt")
    loaded = scale(0.0)
    Checkpointer(run, {"model": loaded}, access="read").load_checkpoint(f"{run}{place}")
    assert loaded.value == VALUES[PLACES[place]]
    assert (f"means CKPT+{PLACES[place]}, the" in caplog.text) == (place != "/CKPT+a")


@IN_A_RUN
def test_it_is_averaged(run, place):
    """With any other."""
    mean = average_checkpoints([f"{run}{place}", run / "CKPT+a"], "model")
    assert mean["param"].item() == (VALUES[PLACES[place]] + 1) / 2


@IN_A_RUN
def test_it_is_exported(run, place, tmp_path):
    """Its weights, that is."""
    safetensors = pytest.importorskip("safetensors.torch")
    to_safetensors(f"{run}{place}", tmp_path / "model.safetensors")
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert state["param"].item() == VALUES[PLACES[place]]


@IN_A_RUN
def test_a_pretrainer_takes_a_file_of_it(run, place, tmp_path, scale):
    """By its name."""
    loaded = scale(0.0)
    pretrainer = Pretrainer(
        loadables={"model": loaded}, paths={"model": f"{run}{place}/model.ckpt"}
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert loaded.value == VALUES[PLACES[place]]


@pytest.mark.parametrize(("place", "names"), [("", "abc"), ("/best", "b"), ("/newest", "c")])
def test_the_command_verifies_it(run, place, names):
    """The folder stands for all that is in it there."""
    told = CliRunner().invoke(main, ["verify", f"{run}{place}"])
    assert told.exit_code == 0
    assert re.findall(r"CKPT\+(\w)", told.output) == [*names]


def test_consolidate_takes_it(run):
    """It refuses what has nothing to consolidate, and names what it has found."""
    with pytest.raises(ValueError, match=r"CKPT\+b has nothing to consolidate"):
        consolidate(run / "best")


def test_a_damaged_one_is_stepped_over(run):
    """Where the run says which; a checkpoint that is named is that one."""
    torch.save({}, run / "CKPT+b" / "model.ckpt")
    assert resolved(run / "best").name == "CKPT+a"
    assert resolved(run / "CKPT+b") == run / "CKPT+b"


def test_what_has_not_got_the_part_is_none(run, scale):
    """An average or a checkpoint of something else."""
    other = Checkpointer(run, {"other": scale()})
    other.save_checkpoint({"loss": 0.0}, name="d")
    assert resolved(run / "newest").name == "CKPT+d"
    assert resolved(run / "newest", "model").name == "CKPT+c"
    with pytest.raises(
        CheckpointNotFoundError, match=r"no sound checkpoint in .* that has 'nothing'"
    ):
        resolved(run / "newest", "nothing")


def test_the_best_must_be_known(tmp_path, scale):
    """A folder alone is then its newest."""
    Checkpointer(tmp_path, {"model": scale()}).save_checkpoint(name="a")
    assert resolved(tmp_path).name == "CKPT+a"
    with pytest.raises(CheckpointNotFoundError, match=r"no rule Best\(\.\.\.\) was noted there"):
        resolved(tmp_path / "best")


def test_any_other_path_is_left_alone(tmp_path):
    """Also one that is not there, and a URL of Lightning's, about which no store is asked."""
    (tmp_path / "best").mkdir()
    for path in (tmp_path, tmp_path / "best", str(tmp_path / "gone"), "s3://bucket/last.ckpt"):
        assert not means_run(path)
        assert resolved(path) is path
    with pytest.raises(CheckpointNotFoundError, match="no folder of checkpoints"):
        checkpoint_of_run(tmp_path)
