"""What differs from rank to rank, or fails on one alone, leaves no rank waiting for the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from _ranks import checkpoints, make, run

EVERY_STEP = {"every_n_train_steps": 1, "num_to_keep": 50, "trainer": {"max_epochs": 1}}
SECONDS = 240


def fit(folder: Path, rank: int, options: dict, prepare) -> None:
    """Fit, and write down how it ended."""
    trainer, module, _, loaders = make(folder / "checkpoints", rank, **options)
    prepare(rank, module)
    try:
        trainer.fit(module, **loaders)
        ending = "ended"
    except Exception as error:
        ending = f"{type(error).__name__}: {error}"
    (folder / f"ending{rank}.txt").write_text(ending)


def endings(folder: Path, size: int = 2) -> list[str]:
    """Return how each rank ended."""
    return [(folder / f"ending{rank}.txt").read_text() for rank in range(size)]


def put_clock_ahead(rank, module):
    """Let the seconds of one rank pass faster."""
    if rank == 1:
        usual = time.monotonic
        from lightning_sbckpt.plugin import saving

        saving.time = type("Clock", (), {"monotonic": staticmethod(lambda: 1000 * usual())})


def test_train_time_interval_is_that_of_rank_zero(tmp_path):
    """A rank whose clock is ahead by a moment does not save alone."""
    options = {
        "train_time_interval": 2.0,
        "every_n_epochs": None,
        "trainer": {"max_epochs": 2},
        "min_key": None,
    }
    assert run(fit, tmp_path, options, put_clock_ahead, timeout=SECONDS).codes == [0, 0]
    assert endings(tmp_path) == ["ended", "ended"]


class FailsOn:
    """Lets a hook of the module fail in the third save, on one rank."""

    def __init__(self, rank: int, hook: str) -> None:
        self.rank, self.hook = rank, hook

    def __call__(self, rank, module):
        saves = 0

        def hook(*_):
            nonlocal saves
            saves += 1
            if saves == 3 and rank == self.rank:
                raise RuntimeError(f"rank {rank} has no state today")
            return {}

        setattr(module, self.hook, hook)


HOOKS = ("on_save_checkpoint", "configure_recoverables")


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_hook_that_fails_on_one_rank_fails_the_save_on_all(tmp_path, hook, rank, mode):
    """Before any of them waits for another; and the checkpoints before are whole."""
    # `configure_recoverables` is called once before training.
    options = {**EVERY_STEP, "save_mode": mode}
    run(fit, tmp_path, options, FailsOn(rank, hook), timeout=SECONDS)
    told = endings(tmp_path)
    assert told[rank] == f"RuntimeError: rank {rank} has no state today"
    assert told[1 - rank].startswith("SBCheckpointError: failed on rank ")
    assert "has no state today" in told[1 - rank]
    steps = [ckpt.meta["global_step"] for ckpt in checkpoints(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and steps


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_hook_that_fails_on_one_rank_is_a_warning_with_warn(tmp_path, hook, rank):
    """Training goes on without that checkpoint, and with the next one."""
    options = {**EVERY_STEP, "on_save_error": "warn"}
    ended = run(fit, tmp_path, options, FailsOn(rank, hook), timeout=SECONDS)
    assert endings(tmp_path) == ["ended", "ended"]
    assert "Training goes on, since on_save_error is 'warn'" in ended.outputs[0]
    steps = [ckpt.meta["global_step"] for ckpt in checkpoints(tmp_path)]
    assert len(steps) == 3 and steps[-1] == 4
