"""The tool that proves an exact resume finds what is not exact, and says what and where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import exact_cells
import pytest
import torch
from _processes import start_server
from _python import python

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.selftest import KillPoint, assert_resume_exact, run_selftest

HERE = Path(__file__).parent
FEW = {"trainer": {"max_epochs": 2}, "checkpoint": {"every_n_train_steps": 3}}


@pytest.fixture(autouse=True)
def server():
    """The processes of the self-test are forked from the server of all tests."""
    start_server()


def exact(dirpath):
    return exact_cells.make(dirpath, **FEW)


class Forgetful(exact_cells.Model):
    """Keeps in a plain attribute what decides about its training."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx) * (1 + self.seen % 5)


def forgetful(dirpath):
    return exact_cells.make(dirpath, model=Forgetful, **FEW)


class Remembering(Forgetful):
    """Gives that attribute to its checkpoint, as Lightning's own hook allows."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["seen"]


def remembering(dirpath):
    return exact_cells.make(dirpath, model=Remembering, **FEW)


def failing(dirpath):
    raise ValueError("the factory is broken")


def without_callback(dirpath):
    trainer, module, data = exact_cells.make(dirpath, **FEW)
    trainer.callbacks = []
    return trainer, module, data


def test_a_run_that_resumes_exactly_passes(tmp_path):
    """The report has a line for each death, with where it went on."""
    report = assert_resume_exact(exact, ["on_train_batch_start:5"])
    assert report.exact
    line = str(report).splitlines()[1]
    assert line.startswith("on_train_batch_start:5") and "every bit agrees" in line
    assert "within epoch 0, at global step 3" in line


@pytest.mark.long
def test_by_default_every_death_has_a_checkpoint_to_go_on_from():
    """Within an epoch, in a validation and at the end of an epoch, all after the first save."""
    report = assert_resume_exact(exact)
    batch, validation, epoch = [row.kills.partition(":") for row in report.rows]
    assert (batch[0], validation[0], epoch[0]) == (
        "on_train_batch_end",
        "on_validation_batch_start",
        "on_train_epoch_end",
    )
    assert int(batch[2]) > 3
    assert all(row.resumed for row in report.rows)


@pytest.mark.long
def test_what_differs_first_is_named_with_how_far(tmp_path):
    """State in a plain attribute is lost: the first batch with other weights is in the table."""
    with pytest.raises(AssertionError, match="does not resume exactly") as caught:
        assert_resume_exact(forgetful, ["on_train_batch_start:5"])
    message = str(caught.value)
    assert "DIFFERS" in message and "weights differ after batch 3 of epoch 0" in message
    assert (
        "ends with ['at the end of training']['weights']['body.0.weight'] differing by" in message
    )
    report = run_selftest(forgetful, ["on_train_batch_start:5"])
    told = report.rows[0].differences
    assert any("logged at step" in line and "instead of" in line for line in told)
    assert any("differing by up to" in line for line in told)


def test_what_its_hooks_save_comes_back(tmp_path):
    """The same run is exact once its state is in the checkpoint."""
    assert assert_resume_exact(remembering, ["on_train_batch_start:5"]).exact


def test_a_run_that_fails_by_itself_is_an_error_with_its_traceback(tmp_path):
    """It is no verdict on the resume."""
    with pytest.raises(RuntimeError, match="the factory is broken"):
        run_selftest(failing, ["on_train_batch_start:5"])


def test_a_kill_point_that_never_comes_is_an_error(tmp_path):
    """A run that was never killed proves nothing."""
    with pytest.raises(RuntimeError, match=r"ended before on_train_batch_start:500 came"):
        run_selftest(exact, ["on_train_batch_start:500"])


def test_a_trainer_without_the_callback_is_refused(tmp_path):
    """Nothing would be saved, and so nothing tested."""
    with pytest.raises(RuntimeError, match="no SBCheckpoint"):
        run_selftest(without_callback, ["on_train_batch_start:5"])


@pytest.mark.parametrize("text", ["on_train_batch:3", "on_train_batch_end:0", "on_train_end:x"])
def test_no_kill_point_is_refused_with_what_one_looks_like(text):
    """A misspelt hook would never be called."""
    with pytest.raises(ConfigurationError, match=r"such as 'on_train_batch_end:4'"):
        KillPoint.parse(text)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("exact", 0, "every bit agrees"), ("forgetful", 1, "DIFFERS"), ("nothing", 2, "expected")],
)
def test_the_command_says_by_its_exit_code_whether_a_run_is_exact(name, code, said):
    """0, 1, and 2 for what can't be run."""
    command = ["-m", "lightning_sbckpt.cli", "selftest", f"test_selftest:{name}", "--kill"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if name == "exact":
        # As a shell starts it, and its processes from a server of its own.
        done = subprocess.run(
            [sys.executable, *command, "on_train_batch_start:5"],
            cwd=HERE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    else:
        kills = "on_train_batch_start:5,on_train_batch_start:2"
        done = python(*command, kills, cwd=HERE, env=environment, timeout=300)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_saving_moves_no_random_state(tmp_path):
    """A run with a save after every batch ends with the weights of one that saves nothing."""
    weights = []
    for number, checkpoint in enumerate(({"every_n_train_steps": 1}, {"every_n_epochs": None})):
        trainer, module, data = exact_cells.make(
            tmp_path / str(number),
            model=exact_cells.Model,
            trainer={"max_epochs": 2},
            checkpoint={"restore_best": False, **checkpoint},
            loader=lambda: exact_cells.train_loader(noise=True),
        )
        trainer.fit(module, **data)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def three(dirpath):
    return exact_cells.on_ranks(dirpath, **FEW)


@pytest.mark.long
def test_three_ranks_are_started_killed_and_compared_each(tmp_path):
    """The first to come there dies, and the others with it."""
    report = assert_resume_exact(three, ["on_train_batch_start:5"], ranks=3)
    assert report.exact and "within epoch 0, at global step 3" in str(report)


def forgetful_on_two(dirpath):
    return exact_cells.on_ranks(dirpath, size=2, model=Forgetful, **FEW)


@pytest.mark.long
def test_what_differs_on_several_ranks_is_named_by_rank(tmp_path):
    """Each has its own state."""
    report = run_selftest(forgetful_on_two, ["on_train_batch_start:5"], ranks=2)
    for rank in range(2):
        assert any(
            line.startswith(f"rank {rank}: ") and "weights differ" in line
            for line in report.rows[0].differences
        )


@pytest.mark.parametrize(
    ("make", "ranks", "said"),
    [
        (three, 1, r"wants 3 processes .* there is 1: pass ranks=3, or --ranks 3"),
        (exact, 2, r"wants 1 processes .* there are 2: pass ranks=1, or --ranks 1"),
    ],
)
def test_another_number_of_ranks_than_the_trainer_has_is_refused(make, ranks, said):
    """Its launcher would start processes of its own."""
    with pytest.raises(RuntimeError, match=said):
        run_selftest(make, ["on_train_batch_start:5"], ranks=ranks)
