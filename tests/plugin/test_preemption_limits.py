"""What a preempted run does when the disk is slow or full, or when Lightning has its own ways."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
from _ranks import Job, checkpoints, make, run, to_myself, traced_fit
from _runs import At

from lightning_sbckpt import Preemption
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage

SECONDS = 60
"""A job that ends early has to end within so many seconds, on a busy machine, too."""


# ---------------------------------------------------------------------- the deadline


def fit_on_slow_disk(folder, rank, options):
    """Fit; publishing takes very long for the second checkpoint, that of a signal."""
    published = 0

    def before(storage, operation, path, target=None):
        nonlocal published
        published += operation == "rename" and target.name.startswith("CKPT+")
        if published == 2:
            time.sleep(3 * SECONDS)

    def end():
        # The first one has its time, however slow the disk is: the grace time is for the second.
        callback.checkpointer.wait()
        to_myself("SIGTERM")

    LocalStorage.before = before
    at = At("on_train_batch_start", 10 // options["size"], end)
    options = {"callbacks": [at], **options}
    trainer, module, callback, loaders = make(folder / "checkpoints", rank, **options)
    trainer.fit(module, **loaders)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("size", "save_mode"),
    [
        (1, "async"),
        (2, "sync"),
        pytest.param(1, "sync", marks=pytest.mark.slow),
        pytest.param(2, "async", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_takes_too_long_leaves_the_checkpoint_before(tmp_path, size, save_mode):
    """The process ends in time, by the same exit code, and says why; the next start goes on."""
    grace = Preemption(grace_time=1.0, every_n_batches=1)
    options = {"size": size, "preemption": grace, "save_mode": save_mode}
    ended = run(fit_on_slow_disk, tmp_path, options, size=size, alone=True, timeout=SECONDS)
    assert ended.codes[0] == 75, ended.outputs
    assert "the grace time of 1 s after SIGTERM is over" in ended.outputs[0]
    (before,) = checkpoints(tmp_path)
    assert before.meta["end-of-epoch"] and find_damage(before.path) == []
    ended = run(traced_fit, tmp_path, None, {**options, "preemption": True}, size=size)
    assert ended.codes == [0] * size, ended.outputs
    assert f"resuming from {before.path}" in (tmp_path / "report0.txt").read_text()


def test_a_save_in_time_is_not_disturbed(tmp_path):
    """A grace time that is long enough changes nothing."""
    grace = Preemption(grace_time=timedelta(minutes=1))
    ended = run(fit_at_leisure, tmp_path, {"size": 1, "preemption": grace}, size=1)
    assert ended.codes == [75] and "grace" not in ended.outputs[0]
    assert checkpoints(tmp_path)[-1].meta["global_step"] == 6


def fit_at_leisure(folder, rank, options):
    """Fit on a good disk; a signal comes in the sixth batch."""
    at = At("on_train_batch_start", 6, lambda: to_myself("SIGTERM"))
    trainer, module, _, loaders = make(folder / "checkpoints", rank, callbacks=[at], **options)
    trainer.fit(module, **loaders)


def fit_on_full_disk(folder, rank, options):
    """Fit; the disk is full for the second checkpoint, that of a signal."""
    published = 0

    def before(storage, operation, path, target=None):
        nonlocal published
        published += operation == "rename" and target.name.startswith("CKPT+")
        if published == 2:
            raise OSError(28, "No space left on device")

    LocalStorage.before = before
    at = At("on_train_batch_start", 10, lambda: to_myself("SIGTERM"))
    trainer, module, _, loaders = make(
        folder / "checkpoints", size=1, preemption=True, callbacks=[at], **options
    )
    trainer.fit(module, **loaders)


@pytest.mark.parametrize("save_mode", ["sync", "async"])
@pytest.mark.parametrize(("on_save_error", "code"), [("raise", 1), ("warn", 75)])
def test_a_save_that_fails_is_an_error_unless_errors_are_warnings(
    tmp_path, on_save_error, code, save_mode
):
    """With "warn" the run is started again and goes on from the checkpoint before."""
    options = {"on_save_error": on_save_error, "save_mode": save_mode}
    ended = run(fit_on_full_disk, tmp_path, options, size=1)
    assert ended.codes == [code], ended.outputs
    assert "No space left on device" in ended.outputs[0]
    assert len(checkpoints(tmp_path)) == 1


# ---------------------------------------------------------------------- SLURM

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}


def fit_on_slurm(folder, rank, preemption, where):
    """Fit as a SLURM job whose machine is taken away at some batch; print where it went on from."""
    callbacks = [At("on_train_batch_start", where, lambda: to_myself("SIGUSR1"))] if where else []
    settings = {"default_root_dir": folder}
    if where:
        settings["max_epochs"] = 2
    trainer, module, callback, loaders = make(
        folder / "checkpoints", size=1, preemption=preemption, callbacks=callbacks, trainer=settings
    )
    trainer.fit(module, **loaders)
    print(f"went on from {callback.resume_report and callback.resume_report.checkpoint}")


def slurm(folder, *args):
    """Run a SLURM job to its end."""
    return Job(fit_on_slurm, folder, *args, size=1, environment=SLURM).wait()


def test_on_slurm_the_checkpoint_takes_the_place_of_requeueing(tmp_path):
    """It says so, since the batch script has to requeue then."""
    ended = slurm(tmp_path, True, 6)
    assert ended.codes == [75], ended.outputs
    assert "in place of Lightning's requeueing" in ended.outputs[0]
    assert list(tmp_path.glob("hpc_ckpt_*")) == []
    assert (
        "went on from" + f" {checkpoints(tmp_path)[-1].path}" in slurm(tmp_path, True, 0).outputs[0]
    )


@pytest.mark.parametrize("newer", [True, False])
def test_of_lightnings_file_and_ours_the_newer_is_taken(tmp_path, newer):
    """A job that Lightning itself has requeued goes on from its file, unless ours is newer."""
    # Lightning goes on training after it has written its file.
    ended = slurm(tmp_path, False, 6)
    (requeued,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    ours = checkpoints(tmp_path)[-1]
    shift = 100 if newer else -100
    os.utime(requeued, (ours.meta["unixtime"] + shift,) * 2)
    ended = slurm(tmp_path, False, 0)
    assert ended.codes == [0], ended.outputs
    word = "newer" if newer else "older"
    assert (
        f"Lightning saved {requeued} when the job was requeued, which is {word} than"
        in (ended.outputs[0])
    )
    assert f"went on from {requeued if newer else ours.path}" in ended.outputs[0]
