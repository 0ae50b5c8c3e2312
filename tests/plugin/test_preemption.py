"""A run whose machine is taken away saves, ends by its exit code, and goes on to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings

import _ranks
import pytest
import torch
from _ranks import (
    Job,
    checkpoints,
    differences,
    make,
    reason,
    run,
    to_myself,
    traced_fit,
)
from _runs import At

from lightning_sbckpt import Preempted, Preemption
from lightning_sbckpt._layout.manifest import find_damage

EACH_BATCH = Preemption(every_n_batches=1)
SECONDS = 60
"""A job that ends early has to end within so many seconds, on a busy machine, too."""


class SignalInSave(_ranks.Model):
    """Gets a signal while it is saved."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_save_checkpoint(self, checkpoint):
        to_myself(self.name)


def fit_signalled(folder, rank, ranks, name, where, options):
    """Fit; some ranks get a signal at the n-th call of a hook."""
    options = dict(options)
    hook, _, count = where.partition(":")
    if rank in ranks:
        if hook == "save":
            options["module"] = lambda: SignalInSave(name)
        else:
            options["callbacks"] = [At(hook, int(count), lambda: to_myself(name))]
    options.setdefault("preemption", EACH_BATCH)
    trainer, module, _, loaders = make(folder / "checkpoints", rank, **options)
    try:
        trainer.fit(module, **loaders)
    except Preempted as end:
        print(f"preempted by {end.by}")
        raise


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """A function of the number of ranks that returns the folder of a run that was left in peace."""
    folders = {}

    def folder_of(size):
        if size not in folders:
            folders[size] = tmp_path_factory.mktemp(f"through{size}")
            ended = run(traced_fit, folders[size], None, {"size": size}, size=size)
            assert ended.codes == [0] * size
        return folders[size]

    return folder_of


def assert_goes_on(folder, through, size=2, **options):
    """Fail unless a resumed run ends with the bits of one that went through."""
    options = {"size": size, "preemption": EACH_BATCH, **options}
    ended = run(traced_fit, folder, None, options, size=size)
    assert ended.codes == [0] * size, ended.outputs
    for rank in range(size):
        assert differences(through(size), folder, rank) == []


# ---------------------------------------------------------------------- to the bits


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("ranks", "where", "step"),
    [
        ((0,), "on_train_batch_start:6", 6),
        ((1,), "on_train_batch_start:6", 6),
        pytest.param((0, 1), "on_train_batch_end:2", 2, marks=pytest.mark.slow),
        ((1,), "on_validation_batch_start:2", 4),
        pytest.param((0,), "save:1", 5, marks=pytest.mark.slow),
        ((1,), "save:1", 5),
    ],
)
def test_any_rank_that_is_signalled_ends_both_at_one_place(tmp_path, through, ranks, where, step):
    """In training, validation and mid-save: one checkpoint, exit code 75, and the same bits after."""
    ended = run(fit_signalled, tmp_path, ranks, "SIGTERM", where, {}, alone=True, timeout=SECONDS)
    # Of what Lightning's launcher has started, rank zero alone may tell the world.
    assert ended.codes == [75, 0], ended.outputs
    assert all("preempted by SIGTERM" in output for output in ended.outputs)
    newest = checkpoints(tmp_path)[-1]
    assert "preempted by SIGTERM" in reason(newest)
    # A signal in the validation at the end of an epoch ends the run when that epoch has ended.
    assert newest.meta["global_step"] == step
    assert newest.meta["end-of-epoch"] == (step == 4)
    loops = torch.load(newest.paramfiles["loops"], weights_only=True)
    assert loops["lightning_sbckpt"]["position"]["within_epoch"] == (step != 4)
    assert find_damage(newest.path) == []
    assert_goes_on(tmp_path, through)


@pytest.mark.sample(1)
@pytest.mark.parametrize("save_mode", ["sync", "async", "overlap"])
def test_a_single_process_saves_at_once_in_every_save_mode(tmp_path, through, save_mode):
    """SIGUSR1 is as good; and what is published is whole when the process ends."""
    options = {"size": 1, "save_mode": save_mode, "every_n_train_steps": 2, "num_to_keep": 99}
    ended = run(fit_signalled, tmp_path, (0,), "SIGUSR1", "on_train_batch_start:5", options, size=1)
    assert ended.codes == [75], ended.outputs
    newest = checkpoints(tmp_path)[-1]
    assert (newest.meta["global_step"], reason(newest)) == (5, "preempted by SIGUSR1")
    assert_goes_on(tmp_path, through, **options)


def test_a_save_that_is_due_anyway_is_the_same_one(tmp_path):
    """Two reasons, one checkpoint."""
    options = {"size": 1, "every_n_train_steps": 2, "num_to_keep": 99}
    run(fit_signalled, tmp_path, (0,), "SIGTERM", "on_train_batch_start:2", options, size=1)
    assert [reason(ckpt) for ckpt in checkpoints(tmp_path)] == [
        "every 2 steps, preempted by SIGTERM"
    ]


def test_what_the_run_goes_on_from_stays_whatever_the_rules_say(tmp_path):
    """Its metric is worse than that of the best, and nothing asks to keep the newest."""
    options = {
        "size": 1,
        "keep_recent": False,
        "min_key": None,
        "importance_key": lambda_of_minus_step,
    }
    run(fit_signalled, tmp_path, (0,), "SIGTERM", "on_train_batch_start:11", options, size=1)
    assert [ckpt.meta["global_step"] for ckpt in checkpoints(tmp_path)] == [8, 11]


def lambda_of_minus_step(checkpoint):
    """Return an importance that falls with the step."""
    return -checkpoint.meta["global_step"]


def test_a_signal_before_the_first_batch_ends_the_run_without_a_checkpoint(tmp_path):
    """Nothing has been trained that could be lost."""
    ended = run(fit_signalled, tmp_path, (1,), "SIGTERM", "on_fit_start:1", {}, timeout=SECONDS)
    assert ended.codes == [75, 0], ended.outputs
    assert checkpoints(tmp_path) == []


@pytest.mark.sample(1)
@pytest.mark.parametrize("trainer", [{"max_epochs": 1}, {"max_steps": 2, "max_epochs": -1}])
def test_a_signal_in_the_last_batch_lets_the_run_end_as_usual(tmp_path, trainer):
    """It is done: whoever starts it again by the exit code must not."""
    count = trainer.get("max_steps", 4)
    ended = run(
        fit_signalled,
        tmp_path,
        (0,),
        "SIGTERM",
        f"on_train_batch_start:{count}",
        {"trainer": trainer},
        timeout=SECONDS,
    )
    assert ended.codes == [0, 0], ended.outputs
    assert "preempted" not in reason(checkpoints(tmp_path)[-1])


def test_without_the_argument_nothing_is_caught(tmp_path):
    """The signal does what it did before."""
    options = {"size": 1, "preemption": False}
    ended = run(fit_signalled, tmp_path, (0,), "SIGUSR1", "on_train_batch_start:2", options, size=1)
    assert ended.codes == [-signal.SIGUSR1]
    assert checkpoints(tmp_path) == []


# ---------------------------------------------------------------------- Ctrl+C


@pytest.mark.sample(1)
@pytest.mark.parametrize("ranks", [(0,), pytest.param((1,), marks=pytest.mark.slow), (0, 1)])
def test_ctrl_c_saves_and_ends_as_lightning_ends_it(tmp_path, through, ranks):
    """By exit code 1: nothing is to start it again but its user."""
    where = "on_train_batch_start:6"
    ended = run(fit_signalled, tmp_path, ranks, "SIGINT", where, {}, alone=True, timeout=SECONDS)
    assert ended.codes == [1, 0], ended.outputs
    assert "Detected KeyboardInterrupt" in ended.outputs[0]
    assert reason(checkpoints(tmp_path)[-1]) == "preempted by SIGINT"
    assert_goes_on(tmp_path, through)


def fit_stuck(folder, rank):
    """Fit; the second batch takes very long."""

    def stuck():
        (folder / "stuck").touch()
        deadline = time.monotonic() + 2 * SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if callback._session._watch._received:
                (folder / "came").touch()

    late = At("on_train_batch_start", 2, stuck)
    trainer, module, callback, loaders = make(
        folder / "checkpoints", size=1, preemption=True, callbacks=[late]
    )
    trainer.fit(module, **loaders)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    """The first one waits for the batch to end; the second one is Lightning's."""
    job = Job(fit_stuck, tmp_path, size=1)
    job.until("stuck")
    job.signal(signal.SIGINT, 0)
    # Two that come before the first is noticed are one.
    job.until("came")
    assert job.codes() == [None]
    job.signal(signal.SIGINT, 0)
    assert job.wait(SECONDS).codes == [1]
    assert checkpoints(tmp_path) == []


def fit_interrupted(folder, rank):
    """Fit without preemption; rank one alone is interrupted, after there is a best checkpoint."""
    callbacks = [At("on_train_batch_start", 6, lambda: to_myself("SIGINT"))] if rank == 1 else []
    trainer, module, _, loaders = make(folder / "checkpoints", rank, callbacks=callbacks)
    trainer.fit(module, **loaders)


def test_one_interrupted_rank_does_not_wait_for_the_other(tmp_path):
    """The best weights are looked for by all ranks together, so not when only one has stopped."""
    ended = run(fit_interrupted, tmp_path, alone=True, timeout=SECONDS)
    assert ended.codes[1] == 1 and ended.codes[0] != 0
    assert "restored the best weights" not in "".join(ended.outputs)


# ---------------------------------------------------------------------- handlers


def fit_with_handlers(folder, rank, signalled):
    """Fit with handlers of the user's own, and look at them afterwards."""
    caught = []

    def mine(number, frame):
        caught.append(number)

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before[number] = mine
        signal.signal(number, mine)
    callbacks = [At("on_train_batch_start", 2, lambda: to_myself("SIGTERM"))] if signalled else []
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        size=1,
        preemption=True,
        callbacks=callbacks,
        trainer={"max_epochs": 1},
    )
    try:
        trainer.fit(module, **loaders)
    except Preempted:
        print("preempted")
    print(f"caught {caught}")
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    print("changed", [number for number in before if before[number] != after[number]])


@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_that_were_there_are_called_and_come_back(tmp_path, signalled):
    """After a fit that ends as usual and after one that is preempted, though Lightning has its own."""
    ended = run(fit_with_handlers, tmp_path, signalled, size=1)
    assert ended.codes == [0], ended.outputs
    assert ("preempted\n" in ended.outputs[0]) == signalled
    expected = "[<Signals.SIGTERM: 15>]" if signalled else "[]"
    assert f"caught {expected}" in ended.outputs[0] or "caught [15]" in ended.outputs[0]
    assert "changed []" in ended.outputs[0]


def test_in_another_thread_it_says_that_it_has_no_effect(tmp_path):
    """Python lets the main thread alone catch signals."""
    trainer, module, _, loaders = make(tmp_path, size=1, preemption=True, trainer={"max_epochs": 1})
    thread = threading.Thread(target=lambda: trainer.fit(module, **loaders))
    before = signal.getsignal(signal.SIGUSR1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread.start()
        thread.join(60)
    assert any("preemption has no effect" in str(warning.message) for warning in caught)
    assert signal.getsignal(signal.SIGUSR1) == before


def fit_with_workers(folder, rank, name):
    """Fit with two workers; the signal goes to them, too, as it does from a terminal."""
    trainer, module, _, loaders = make(folder / "checkpoints", size=1, preemption=True)
    data = loaders["train_dataloaders"].dataset
    loaders["train_dataloaders"] = torch.utils.data.DataLoader(data, 4, num_workers=2)

    def to_all():
        os.killpg(0, signal.Signals[name])
        time.sleep(1)  # A worker that dies has to be noticed.

    trainer.callbacks.insert(0, At("on_train_batch_start", 3, to_all))
    os.setpgid(0, 0)
    trainer.fit(module, **loaders)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGINT", 1)])
def test_a_signal_to_the_whole_group_leaves_the_workers_of_loaders_alone(tmp_path, name, code):
    """They are needed until the save; else an error of the loader would end the run before it."""
    ended = run(fit_with_workers, tmp_path, name, size=1)
    assert ended.codes == [code], ended.outputs
    assert checkpoints(tmp_path)[-1].meta["global_step"] == 3
    assert "DataLoader worker" not in ended.outputs[0]


def fit_with_process(folder, rank):
    """Fit; a process that is forked meanwhile is told to end."""

    def be_there(there):
        there.set()
        time.sleep(60)

    def fork_and_end():
        context = multiprocessing.get_context("fork")
        there = context.Event()
        process = context.Process(target=be_there, args=(there,))
        process.start()
        # Python forgets a signal that comes before a forked process has run its first line.
        assert there.wait(SECONDS / 2)
        process.terminate()
        process.join(SECONDS / 2)
        print(f"ended by {process.exitcode}")
        process.kill()

    at = At("on_train_batch_start", 2, fork_and_end)
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        size=1,
        preemption=True,
        callbacks=[at],
        trainer={"max_epochs": 1},
    )
    trainer.fit(module, **loaders)


def test_a_process_that_is_forked_in_a_fit_ends_when_it_is_told_to(tmp_path):
    """It has inherited the handlers, which are none of its business."""
    ended = run(fit_with_process, tmp_path, size=1)
    assert ended.codes == [0], ended.outputs
    assert f"ended by {-signal.SIGTERM}" in ended.outputs[0]
