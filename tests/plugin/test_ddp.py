"""Two gloo ranks: killed and resumed to the same bits, in another number, and never left waiting."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import _ranks
import pytest
import torch
from _ranks import checkpoints, differences, make, run, traced_fit
from lightning.pytorch.callbacks import EarlyStopping

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.plugin import callback as callback_module
from lightning_sbckpt.plugin.state.parts import LOADERS, RNG
from lightning_sbckpt.plugin.state.per_rank import number_of_ranks, state_of_rank

EVERY_STEP = {"every_n_train_steps": 1, "num_to_keep": 99}
SECONDS = 60
"""A job that fails has to end within so many seconds, on a busy machine, too."""


def report(folder, rank):
    """Return the report of a resumed rank."""
    return (folder / f"report{rank}.txt").read_text()


# ---------------------------------------------------------------------- exact


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """The folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("through")
    assert run(traced_fit, folder, None, {}).codes == [0, 0]
    return folder


@pytest.mark.sample(1)
@pytest.mark.parametrize("save_mode", ["sync", "async", "overlap"])
@pytest.mark.parametrize(
    "kill",
    [
        "on_train_batch_start:7",
        pytest.param("on_validation_batch_start:3", marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end:2", marks=pytest.mark.slow),
        pytest.param("on_train_batch_end:5", marks=pytest.mark.slow),
    ],
)
def test_two_killed_ranks_go_on_to_the_same_bits(tmp_path, through, save_mode, kill):
    """Weights, optimizer, random states, data and logged values of each rank, batch by batch."""
    options = {**EVERY_STEP, "save_mode": save_mode}
    assert -signal.SIGKILL in run(traced_fit, tmp_path, kill, options).codes
    assert checkpoints(tmp_path)
    assert run(traced_fit, tmp_path, None, options).codes == [0, 0]
    for rank in range(2):
        assert differences(through, tmp_path, rank) == []
        assert "restored: " in report(tmp_path, rank)
        assert "skipped:  nothing" in report(tmp_path, rank)


def test_each_rank_has_numbers_and_data_of_its_own(tmp_path, through):
    """Else the test above would not see one rank's state in the place of the other's."""
    first, second = (_ranks.outcome(through, rank).trace for rank in range(2))
    batches = [(a, b) for a, b in zip(first, second, strict=True) if "batch" in a]
    assert len(batches) == 12
    for a, b in batches:
        assert a["data"] != b["data"] and a["random states"] != b["random states"]
    run(traced_fit, tmp_path, None, {"trainer": {"max_epochs": 1}})
    (checkpoint,) = checkpoints(tmp_path)
    for name in (RNG, LOADERS):
        part = torch.load(checkpoint.paramfiles[name], weights_only=True)
        assert number_of_ranks(part) == 2
        assert repr(state_of_rank(part, 0)) != repr(state_of_rank(part, 1))


LATE = {1: "on_train_batch_start:15", 2: "on_train_batch_start:8", 3: "on_train_batch_start:6"}
"""Before the last batches of the second epoch, by the number of ranks."""


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("before", "after", "kill"),
    [
        (1, 2, LATE[1]),
        (2, 1, "on_train_epoch_end:2"),
        pytest.param(2, 1, LATE[2], marks=pytest.mark.slow),
        pytest.param(1, 2, "on_train_epoch_end:2", marks=pytest.mark.slow),
        pytest.param(1, 2, "on_train_epoch_start:2", marks=pytest.mark.slow),
        pytest.param(1, 3, LATE[1], marks=pytest.mark.slow),
        pytest.param(3, 2, LATE[3], marks=pytest.mark.slow),
        pytest.param(2, 4, LATE[2], marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on_and_says_what_it_cannot_keep(
    tmp_path, before, after, kill
):
    """The epoch goes on after as many samples, and ends with its validation, which others wait for."""
    options = {**EVERY_STEP, "callbacks": [EarlyStopping("val_loss", patience=9)]}
    run(traced_fit, tmp_path, kill, {**options, "size": before}, size=before)
    last = checkpoints(tmp_path)[-1]
    ended = run(traced_fit, tmp_path, None, {**options, "size": after}, size=after)
    assert ended.codes == [0] * after, ended.outputs
    within = not last.meta["end-of-epoch"]
    for rank in range(after):
        told = report(tmp_path, rank)
        assert f"resuming from {last.path}" in told
        for name in (RNG, LOADERS, "metrics"):
            saved_by = "1 rank" if before == 1 else f"{before} ranks"
            assert f"{name} (saved by {saved_by}, this run has {after}: every rank has" in told
        assert "restored: callbacks; loops; lr_scheduler; model; optimizer" in told
        assert ("Its data comes from the beginning" in told) == ("epoch_start" not in kill)
    trace = _ranks.outcome(tmp_path, 0).trace
    first = next(line for line in trace if "batch" in line)
    assert first["batch"] == last.meta["global_step"]  # Counted before the batch is done.
    per_rank = [math.ceil(_ranks.SAMPLES / (_ranks.BATCH * size)) for size in (before, after)]
    done = last.meta["global_step"] % per_rank[0]
    assert first["batch_idx"] == done * before // after if within else first["batch_idx"] == 0
    validated = [line["logged"]["epoch"] for line in trace if "val_loss" in line.get("logged", {})]
    assert [float.fromhex(epoch) for epoch in validated] == ([1.0, 2.0] if within else [2.0])
    newest = checkpoints(tmp_path)[-1]
    assert newest.meta["epoch"] == 2 and newest.meta["end-of-epoch"]


# ---------------------------------------------------------------------- spawned workers


class BestInTheMiddle(_ranks.Model):
    """The second of its three epochs is the best, whatever numbers torch draws."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", abs(self.current_epoch - 1.0))


def spawned(folder: Path, rank: int, strategy: str) -> None:
    """Fit in workers that Lightning makes, and write down what the parent holds then."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name)
    trainer, module, callback, loaders = make(
        folder / "checkpoints",
        module=BestInTheMiddle,
        trainer={"strategy": strategy},
        num_to_keep=9,
    )
    for loader in loaders.values():
        # Its rank is not known here: both train on the same.
        loader.sampler.rank = 0
    trainer.fit(module, **loaders)
    torch.save(module.state_dict(), folder / "parent.pt")
    (folder / "parent.json").write_text(json.dumps(callback.best_model_path))


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)]
)
def test_the_parent_of_spawned_ranks_gets_the_best_weights(tmp_path, strategy):
    """And the path of the best checkpoint, for trainer.test(ckpt_path="best")."""
    ended = run(spawned, tmp_path, strategy, size=1, timeout=120)
    assert ended.codes == [0], ended.outputs
    losses = {ckpt.path: ckpt.meta["val_loss"] for ckpt in checkpoints(tmp_path)}
    best = min(losses, key=losses.get)
    # The last weights must not be the best: the test could not fail.
    assert best != checkpoints(tmp_path)[-1].path
    assert json.loads((tmp_path / "parent.json").read_text()) == str(best)
    weights = torch.load(best / "model.ckpt", weights_only=True)
    parent = torch.load(tmp_path / "parent.pt", weights_only=True)
    assert all(torch.equal(parent[name], weights[name]) for name in weights)


# ---------------------------------------------------------------------- no hang


class Unlucky(_ranks.Model):
    """Raises in one hook of one rank."""

    def __init__(self, where: str, rank: int) -> None:
        super().__init__()
        self.where, self.unlucky = where, rank

    def strike(self, where: str) -> None:
        if where == self.where and self.global_rank == self.unlucky and self.global_step >= 2:
            raise ZeroDivisionError(f"struck in {where} on rank {self.global_rank}")

    def training_step(self, batch, batch_idx):
        self.strike("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.strike("validation_step")
        return super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        self.strike("on_save_checkpoint")

    def on_train_batch_end(self, *args):
        self.strike("on_train_batch_end")

    def configure_recoverables(self):
        return {"extra": self} if self.where == "recoverable" else {}


def fit_unlucky(folder: Path, rank: int, where: str, unlucky: int, options: dict) -> None:
    """Fit a model that raises somewhere."""
    trainer, module, _, loaders = make(
        folder / "checkpoints", rank, module=lambda: Unlucky(where, unlucky), **options
    )
    trainer.fit(module, **loaders)


def assert_none_waited(ended, rank, message):
    """Fail unless every rank ended with an error, in time, and the one that failed says why."""
    assert ended.seconds < SECONDS + 5
    assert all(ended.codes), ended.outputs
    assert message in ended.outputs[rank] and "Traceback" in ended.outputs[rank]


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where", ["training_step", "validation_step", "on_save_checkpoint", "on_train_batch_end"]
)
@pytest.mark.parametrize(
    "save_mode",
    [
        "sync",
        pytest.param("async", marks=pytest.mark.slow),
        pytest.param("overlap", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_raises_leaves_none_waiting(tmp_path, where, rank, save_mode):
    """In training, validation, and the user's part of a save; its own traceback is there to read."""
    options = {**EVERY_STEP, "save_mode": save_mode}
    ended = run(fit_unlucky, tmp_path, where, rank, options, alone=True, timeout=SECONDS)
    assert_none_waited(ended, rank, f"ZeroDivisionError: struck in {where} on rank {rank}")
    found = checkpoints(tmp_path)
    assert found and all(find_damage(ckpt.path) == [] for ckpt in found)


UNDER_LAUNCHER = """
import os
import sys
from pathlib import Path

import test_ddp

rank = int(os.environ.get("LOCAL_RANK", "0"))
test_ddp.fit_unlucky(Path(sys.argv[1]), rank, "training_step", int(sys.argv[2]), {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_lightnings_own_launcher_ends_the_job_too(tmp_path, rank):
    """The real one, which starts this very script again for rank one and watches it."""
    script = tmp_path / "train.py"
    script.write_text(UNDER_LAUNCHER)
    here = Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parent, here.parents[1] / "harness", here.parents[2])))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(rank)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,  # Most of it goes into imports.
        check=False,
    )
    assert done.returncode != 0
    assert f"ZeroDivisionError: struck in training_step on rank {rank}" in done.stdout


def fit_with_disk(folder: Path, rank: int, options: dict) -> None:
    """Fit; the disk is full from the third publishing on."""
    published = 0

    def before(storage, operation, path, target=None):
        nonlocal published
        published += operation == "rename" and target.name.startswith("CKPT+")
        if published >= 3:
            raise OSError(28, "No space left on device")

    LocalStorage.before = before
    trainer, module, _, loaders = make(folder / "checkpoints", rank, **options)
    trainer.fit(module, **loaders)


@pytest.mark.sample(1)
@pytest.mark.parametrize("save_mode", ["sync", "async"])
def test_a_disk_that_fails_ends_both_ranks(tmp_path, save_mode):
    """Both with the reason, since the failure of a save is told to every rank."""
    options = {**EVERY_STEP, "save_mode": save_mode}
    ended = run(fit_with_disk, tmp_path, options, alone=True, timeout=SECONDS)
    for rank in range(2):
        assert_none_waited(ended, rank, "No space left on device")
    assert all(find_damage(ckpt.path) == [] for ckpt in checkpoints(tmp_path))


def fit_and_die(folder: Path, rank: int, dying: int, options: dict) -> None:
    """Fit; one rank dies in the third save: before it gives its state, or just before publishing."""
    saves = published = 0

    def on_save(*args):
        nonlocal saves
        saves += 1
        if saves == 3 and rank == dying == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(storage, operation, path, target=None):
        nonlocal published
        published += operation == "rename" and target.name.startswith("CKPT+")
        if published == 3 and dying == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalStorage.before = before
    trainer, module, _, loaders = make(folder / "checkpoints", rank, **options)
    module.on_save_checkpoint = on_save
    trainer.fit(module, **loaders)


@pytest.mark.sample(1)
@pytest.mark.parametrize("save_mode", ["sync", "async"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_killed_in_a_save_leaves_nothing_visible_and_the_other_ends(
    tmp_path, dying, save_mode
):
    """Nobody kills the other rank here: it finds out by itself."""
    options = {**EVERY_STEP, "save_mode": save_mode}
    ended = run(fit_and_die, tmp_path, dying, options, alone=True, timeout=SECONDS)
    assert ended.codes[dying] == -signal.SIGKILL
    assert ended.codes[1 - dying] not in (0, None), ended.outputs
    steps = [ckpt.meta["global_step"] for ckpt in checkpoints(tmp_path)]
    assert steps == [1, 2]
    # The same command again goes on.
    assert run(traced_fit, tmp_path, None, options).codes == [0, 0]
    assert f"resuming from {checkpoints(tmp_path)[1].path}" in report(tmp_path, 0)


# ---------------------------------------------------------------------- a disk that lags behind


class Nothing(contextlib.nullcontext):
    """What `os.scandir` returns for an empty folder."""

    def __enter__(self):
        return self

    def __iter__(self):
        return iter(())


def fit_behind(folder: Path, rank: int, ckpt_path: str | None) -> None:
    """Fit; rank one sees no checkpoint in the listing, and takes no folder for one at first."""
    if rank == 1:
        scandir, listdir, root = os.scandir, os.listdir, str(folder / "checkpoints")
        os.scandir = lambda path=".": Nothing() if str(path) == root else scandir(path)
        os.listdir = lambda path=".": [] if str(path) == root else listdir(path)
        callback_module.is_folder = lambda path: False
    trainer, module, callback, loaders = make(folder / "checkpoints", rank, **EVERY_STEP)
    assert rank == 0 or Checkpointer(folder / "checkpoints").list_checkpoints() == []
    trainer.fit(module, **loaders, ckpt_path=ckpt_path)
    torch.save(dict(module.state_dict()), folder / f"ended{rank}.pt")
    (folder / f"report{rank}.txt").write_text(str(callback.resume_report))


@pytest.mark.sample(1)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_rank_that_sees_an_older_listing_is_told_what_there_is(tmp_path, through, explicit):
    """Rank zero looks and decides, whether it is to resume, to save, to prune or to take the best."""
    run(traced_fit, tmp_path, "on_train_batch_start:7", EVERY_STEP)
    newest = str(checkpoints(tmp_path)[-1].path)
    ended = run(fit_behind, tmp_path, newest if explicit else None, alone=True, timeout=SECONDS)
    assert ended.codes == [0, 0], ended.outputs
    final = torch.load(through / "final0.pt", weights_only=True)["after the fit"]
    for rank in range(2):
        assert f"resuming from {newest}" in report(tmp_path, rank)
        weights = torch.load(tmp_path / f"ended{rank}.pt", weights_only=True)
        assert all(torch.equal(weights[name], final[name]) for name in final)
