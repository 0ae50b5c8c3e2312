"""A fit that real signals end at random moments: it ends, the folder is sound, and a restart is exact."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from _counts import count
from _ranks import Job, checkpoints, make, run

from lightning_sbckpt._layout.manifest import find_damage

MODES = ("sync", "async", "overlap")
SECONDS = 240


class EndedError(Exception):
    """What a handler of the user raises."""


def fit(folder: Path, rank: int, mode: str, options: dict, seed: int | None) -> None:
    """Fit with a save after every step; with a seed a timer's handler raises at random moments."""
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        rank,
        size=1,
        every_n_train_steps=1,
        num_to_keep=3,
        save_mode=mode,
        trainer={"max_epochs": 2},
        **options,
    )
    begun = folder / "begun"
    module.on_train_start = begun.touch
    if seed is not None:
        chance = random.Random(seed)

        def ring(number, frame):
            raise KeyboardInterrupt if chance.random() < 0.5 else EndedError

        signal.signal(signal.SIGALRM, ring)
        usual = module.on_train_start

        def start():
            usual()
            # As often as it takes to come out of all that handles what was raised before.
            signal.setitimer(
                signal.ITIMER_REAL, chance.uniform(0.001, 0.4), chance.uniform(0.01, 0.1)
            )

        module.on_train_start = start
    try:
        trainer.fit(module, **loaders)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
    torch.save(dict(module.state_dict()), folder / "weights.pt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights at the end of a fit that nothing ended."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(fit, folder, "sync", {}, None, size=1, timeout=SECONDS).codes == [0]
    return torch.load(folder / "weights.pt", weights_only=True)


def end_and_go_on(folder: Path, mode: str, unbroken: dict, end) -> None:
    """End a fit; what it left is whole, and the same command again comes to the same weights."""
    end(folder)
    there = checkpoints(folder)
    assert [problem for ckpt in there for problem in find_damage(ckpt.path)] == []
    ended = run(fit, folder, mode, {}, None, size=1, timeout=SECONDS)
    assert ended.codes == [0], ended.outputs
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


def interrupt(folder: Path, mode: str, seed: int) -> None:
    """Fit with a timer whose handler raises; it ends with or without an error, and in time."""
    ended = run(fit, folder, mode, {}, seed, size=1, timeout=SECONDS)
    assert ended.codes[0] is not None and ended.codes[0] >= 0, ended.outputs
    count("fits ended by signals at random moments")


def preempt(folder: Path, mode: str, seed: int) -> None:
    """Send a fit several signals that announce its end."""
    chance = random.Random(seed)
    job = Job(fit, folder, mode, {"preemption": True}, None, size=1)
    try:
        job.until("begun", SECONDS)
        time.sleep(chance.uniform(0, 0.5))
        for _ in range(chance.randrange(2, 6)):
            if job.codes() == [None]:
                job.signal(chance.choice((signal.SIGTERM, signal.SIGUSR1)), 0)
            time.sleep(chance.choice((0, 0.001, 0.05, 0.2)))
        ended = job.wait(SECONDS)
    finally:
        job.kill()
    # The exit code that is documented, or none if training had ended by then.
    assert ended.codes in ([75], [0]), ended.outputs
    count("fits preempted by several signals")


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", MODES)
def test_fit_that_a_signal_ends_goes_on_exactly(tmp_path, mode, unbroken):
    """Raised from a timer at a random moment, once or again and again."""
    end_and_go_on(tmp_path, mode, unbroken, lambda folder: interrupt(folder, mode, 3))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(20))
def test_fits_that_signals_end_go_on_exactly(tmp_path, mode, seed, unbroken):
    """The same at many moments."""
    end_and_go_on(tmp_path, mode, unbroken, lambda folder: interrupt(folder, mode, seed))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(10))
def test_several_preempting_signals_end_a_fit_by_the_documented_code(
    tmp_path, mode, seed, unbroken
):
    """However many come, and whenever."""
    end_and_go_on(tmp_path, mode, unbroken, lambda folder: preempt(folder, mode, seed))
