"""Fits that save beside the training: the same bits, and every promise of a save that doesn't."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from _in_flight import contents
from _processes import context
from _releases import needs_torch, since
from _runs import (
    At,
    Steps,
    by_epoch,
    fit,
    go,
    kill,
    make,
    newest,
    raise_at,
    saved,
    steps_saved,
)
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._layout.publish import is_checkpoint
from lightning_sbckpt._save import items, late_copy
from lightning_sbckpt.errors import FolderInUseError, SaveError

ALL = {"num_to_keep": 99}
MODES = ("async", "overlap")
WIDTH = 300
"""A weight of so many rows and columns is large enough to be copied under forward and backward."""


class Big(L.LightningModule):
    """A module with large tensors, statistics that forward changes, and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        loss = self.head(self.body(torch.randn(4, WIDTH))).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.head(self.body(torch.ones(1, WIDTH))).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def weights(run):
    """Return a copy of the weights of a run."""
    return {name: value.clone() for name, value in run.module.state_dict().items()}


def equal(one, other):
    """Return whether two states are the same, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def big_fit(dirpath, **options):
    """Fit a `Big` from a seed."""
    L.seed_everything(5, verbose=False)
    return fit(dirpath, module=Big(), **options)


@pytest.fixture
def copies(monkeypatch):
    """The copies that were hidden behind training."""
    made = []

    class Recorded(items.LateCopy):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(items, "LateCopy", Recorded)
    return made


@pytest.fixture
def background(monkeypatch):
    """Have something done before each change of the disk by a save in the background."""

    def install(act):
        def before(storage, operation, path, target=None):
            if threading.current_thread().name == "sbckpt-writer":
                act(operation)

        monkeypatch.setattr(LocalStorage, "before", before)

    return install


@pytest.fixture
def slow_disk(background):
    """A disk on which a save takes longer than some batches."""
    background(lambda operation: time.sleep(0.2) if operation == "rename" else None)


class FailingDisk:
    """A disk that is full while it is told to be, for saves in the background."""

    full = False
    failures = 0

    def __call__(self, operation):
        if self.full and not operation.startswith("remove"):
            self.failures += operation == "create"
            raise OSError(28, "No space left on device")

    def fill(self, run):
        """Be full, after what is on its way in a fit."""
        run.callback.checkpointer.wait()
        self.full = True


@pytest.fixture
def failing(background):
    """Such a disk."""
    disk = FailingDisk()
    background(disk)
    return disk


TRAININGS = {
    "plain": {},
    "clipping and accumulation": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
}


class TestSameBits:
    """What a fit ends with, and what it saved, doesn't depend on the mode."""

    @pytest.mark.parametrize("training", TRAININGS)
    def test_fits_in_every_mode_end_with_the_same_bits(self, tmp_path, training, copies, caplog):
        """Weights, metas and every file; and in "overlap" the copies were hidden indeed."""
        options = {
            "trainer": {**TRAININGS[training], "max_epochs": 2},
            "train_time_interval": 1e-6,  # After every batch, also inside an accumulation window.
            "min_key": "val_loss",
            **ALL,
        }
        expected = big_fit(tmp_path / "sync", **options)
        assert not copies
        for mode in MODES:
            run = big_fit(tmp_path / mode, save_mode=mode, **options)
            assert equal(weights(run), weights(expected))
            assert steps_saved(tmp_path / mode) == steps_saved(tmp_path / "sync")
            for one, other in zip(saved(tmp_path / "sync"), saved(tmp_path / mode), strict=True):
                assert find_damage(other.path) == []
                assert {**one.meta, "unixtime": 0} == {**other.meta, "unixtime": 0}
                assert one.paramfiles.keys() == other.paramfiles.keys()
                found, wanted = contents(other.path), contents(one.path)
                for name in ("model", "optimizer", "lr_scheduler", "rng", "loaders", "metrics"):
                    assert found[f"{name}.ckpt"] == wanted[f"{name}.ckpt"], name
            # The last save of a fit has no step that would wait for it; older releases of torch
            # have no skip_data, without which a state is copied at once.
            hides = mode == "overlap" and since(torch.__version__, "2.6")
            hidden = len(saved(tmp_path / mode)) - 1 if hides else 0
            assert len(copies) == hidden
            assert run.callback.checkpointer._saver._mode == mode
        assert "dropped" not in caplog.text

    def test_manual_optimization_copies_at_once_and_says_so(self, tmp_path, copies, caplog):
        """Nobody tells there when parameters are about to change."""

        class Manual(Big):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                with torch.no_grad():
                    self.body[0].weight.mul_(0.9)
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        caplog.set_level(logging.INFO)
        for mode in ("sync", "overlap"):
            L.seed_everything(5, verbose=False)
            fit(tmp_path / mode, module=Manual(), every_n_train_steps=1, save_mode=mode, **ALL)
            said = "this module optimizes manually" in caplog.text
            assert said == (mode == "overlap")
        assert not copies
        assert "dropped" not in caplog.text
        for one, other in zip(saved(tmp_path / "sync"), saved(tmp_path / "overlap"), strict=True):
            assert contents(one.path)["model.ckpt"] == contents(other.path)["model.ckpt"]

    @needs_torch("2.6", "torch.serialization.skip_data")
    def test_a_tensor_written_to_between_batches_is_noticed(self, tmp_path, copies, caplog):
        """The checkpoint is taken anew after the batch, and copies are made at once from then on."""

        class Averaging(L.Callback):
            def on_fit_start(self, trainer, pl_module):
                self.average = pl_module.body[0].weight.detach().clone()

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.average.mul_(0.9).add_(pl_module.body[0].weight.detach(), alpha=0.1)

            def state_dict(self):
                return {"average": self.average}

            def load_state_dict(self, state_dict):
                self.average = state_dict["average"]

        expected = big_fit(tmp_path / "sync", callbacks=[Averaging()], every_n_train_steps=1, **ALL)
        assert "dropped" not in caplog.text
        run = big_fit(
            tmp_path / "overlap",
            callbacks=[Averaging()],
            every_n_train_steps=2,
            save_mode="overlap",
            **ALL,
        )
        assert caplog.text.count("dropped and saved anew") == 1
        assert run.callback.checkpointer._saver._mode == "async"
        assert len(copies) == 1
        assert steps_saved(tmp_path / "overlap") == [3, 4, 6, 8, 10, 12]
        assert equal(weights(run), weights(expected))
        by_step = {ckpt.meta["global_step"]: ckpt for ckpt in saved(tmp_path / "sync")}
        for ckpt in saved(tmp_path / "overlap"):
            assert find_damage(ckpt.path) == []
            same = contents(by_step[ckpt.meta["global_step"]].path)
            found = contents(ckpt.path)
            assert found["model.ckpt"] == same["model.ckpt"]
            assert found["callbacks.ckpt"] == same["callbacks.ckpt"]

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("stop", ["max_epochs", "should_stop"])
    def test_the_last_checkpoint_is_not_lost_to_what_changes_the_weights_at_the_end(
        self, tmp_path, stop, monkeypatch, caplog
    ):
        """Callbacks that put averaged weights in place do so when no step waits any more."""
        memcpy = late_copy._copy_if_there
        monkeypatch.setattr(
            late_copy, "_copy_if_there", lambda *args: (time.sleep(0.1), memcpy(*args))[1]
        )

        class PutsInPlace(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if stop == "should_stop" and trainer.current_epoch == 1:
                    trainer.should_stop = True

            def on_train_end(self, trainer, pl_module):
                self.before = pl_module.body[0].weight.detach().clone()
                with torch.no_grad():
                    pl_module.body[0].weight.zero_()

        averaging = PutsInPlace()
        epochs = 1 if stop == "max_epochs" else 3
        big_fit(
            tmp_path,
            callbacks=[averaging],
            trainer={"max_epochs": epochs},
            save_mode="overlap",
            every_n_train_steps=1,
            restore_best=False,
            **ALL,
        )
        steps = 4 if stop == "max_epochs" else 8
        assert steps_saved(tmp_path) == list(range(1, steps + 1))
        state = torch.load(newest(tmp_path).paramfiles["model"], weights_only=True)
        assert torch.equal(state["body.0.weight"], averaging.before)
        assert "dropped" not in caplog.text


def die_while_writing(dirpath, mode, operations):
    """Fit, and die at so many changes of the disk by the background."""
    count = 0

    def before(storage, operation, path, target=None):
        nonlocal count
        if threading.current_thread().name == "sbckpt-writer":
            count += 1
            if count == operations:
                os.kill(os.getpid(), signal.SIGKILL)

    LocalStorage.before = before
    big_fit(Path(dirpath), every_n_train_steps=1, save_mode=mode, **ALL)


class TestFailures:
    """Of the process, of the disk, of the user's code."""

    @pytest.mark.parametrize(
        ("mode", "operations"),
        [pytest.param("async", 150, marks=pytest.mark.slow), ("overlap", 171)],
    )
    def test_a_run_killed_while_it_writes_resumes_exactly(self, tmp_path, mode, operations):
        """From the checkpoint before, which is whole."""
        expected = big_fit(tmp_path / "whole", every_n_train_steps=1, **ALL)
        kill(die_while_writing, tmp_path / "killed", mode, operations)
        left = steps_saved(tmp_path / "killed")
        before = newest(tmp_path / "killed")
        assert 0 < len(left) < 12
        assert all(find_damage(ckpt.path) == [] for ckpt in saved(tmp_path / "killed"))
        run = big_fit(tmp_path / "killed", every_n_train_steps=1, save_mode=mode, **ALL)
        assert run.callback.resume_report.checkpoint == str(before.path)
        assert equal(weights(run), weights(expected))
        assert steps_saved(tmp_path / "killed") == list(range(1, 13))

    @pytest.mark.parametrize("mode", MODES)
    def test_what_failed_in_the_background_ends_the_fit_at_the_next_save(
        self, tmp_path, failing, mode
    ):
        """With the disk's words; the checkpoints before it are whole, and a new start goes on."""
        run = make(tmp_path, save_mode=mode, **ALL)
        run.trainer.callbacks.insert(0, At("on_train_batch_start", 6, lambda: failing.fill(run)))
        with pytest.raises(SaveError, match="No space left on device"):
            go(run)
        # That of epoch 2 failed, that of epoch 3 was not tried.
        assert (failing.failures, run.module.steps) == (1, 12)
        assert steps_saved(tmp_path) == [4]
        failing.full = False
        assert fit(tmp_path, save_mode=mode, **ALL).module.steps == 12
        assert steps_saved(tmp_path) == [4, 8, 12]

    def test_what_failed_in_the_last_save_ends_the_fit_at_its_end(self, tmp_path, failing):
        """Nobody may believe that all was saved."""
        run = make(tmp_path, save_mode="async", **ALL)
        run.trainer.callbacks.insert(0, At("on_train_batch_start", 10, lambda: failing.fill(run)))
        with pytest.raises(SaveError, match="No space left on device"):
            go(run)
        assert steps_saved(tmp_path) == [4, 8]

    def test_the_users_own_exception_is_not_replaced(self, tmp_path, failing, caplog):
        """What the disk said is in the log."""
        failing.full = True
        own = raise_at("on_train_batch_start", 7, ZeroDivisionError("the run's own"))
        with pytest.raises(ZeroDivisionError, match="the run's own"):
            fit(tmp_path, callbacks=[own], save_mode="async", **ALL)
        assert failing.failures == 1
        assert "No space left on device" in caplog.text
        assert steps_saved(tmp_path) == []

    def test_a_run_that_fails_waits_for_what_it_was_saving(self, tmp_path, slow_disk):
        """Else its last checkpoint would be lost to whoever starts it again at once."""
        own = raise_at("on_train_batch_start", 5, ZeroDivisionError("the run's own"))
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, callbacks=[own], save_mode="async", **ALL)
        assert steps_saved(tmp_path) == [4]

    @pytest.mark.parametrize("mode", ["sync", *MODES])
    def test_by_choice_the_fit_goes_on_without_what_could_not_be_saved(
        self, tmp_path, monkeypatch, caplog, mode
    ):
        """It is said; what comes later is saved, and the last state is among it."""
        full = False

        def before(storage, operation, path, target=None):
            if full and operation in ("create", "write"):
                raise OSError(28, "No space left on device")

        def turn(value):
            nonlocal full
            full = value

        monkeypatch.setattr(LocalStorage, "before", before)
        run = fit(
            tmp_path,
            callbacks=[
                At("on_train_batch_start", 3, lambda: turn(True)),
                At("on_train_batch_start", 11, lambda: turn(False)),
            ],
            save_mode=mode,
            on_save_error="warn",
            every_n_train_steps=2,
            **ALL,
        )
        assert run.module.steps == 12
        found = steps_saved(tmp_path)
        # Whether one that was on its way when the disk filled up was done, time decides.
        assert found[-1] == 12 and not {4, 6, 8} & set(found)
        assert "Training goes on, since on_save_error is 'warn'" in caplog.text


class TestAtTheEnd:
    """A fit that has ended has saved."""

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("mode", MODES)
    def test_the_best_is_restored_from_a_checkpoint_that_is_durable(
        self, tmp_path, slow_disk, mode
    ):
        """Also when the last one is the best; and the paths are those of what is there."""
        for name, losses, best in (("last", (3, 2, 1), 12), ("middle", (3, 1, 2), 8)):
            run = fit(
                tmp_path / name,
                module=Steps(by_epoch(*losses)),
                min_key="val_loss",
                save_mode=mode,
            )
            assert run.module.steps == best
            assert not run.callback.checkpointer.is_saving
            assert steps_saved(tmp_path / name) == sorted({best, 12})
            paths = {ckpt.meta["global_step"]: str(ckpt.path) for ckpt in saved(tmp_path / name)}
            assert run.callback.best_model_path == paths[best]
            assert run.callback.last_model_path == paths[12]
            assert run.callback.best_model_score == 1
            assert all(find_damage(ckpt.path) == [] for ckpt in saved(tmp_path / name))

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("mode", MODES)
    def test_loggers_are_told_of_what_is_durable_only(self, tmp_path, slow_disk, mode):
        """And, by the end, of everything."""

        class Recording(DummyLogger):
            def __init__(self):
                super().__init__()
                self.told = []

            def after_save_checkpoint(self, checkpoint_callback):
                path = checkpoint_callback.last_model_path
                self.told.append((path, is_checkpoint(Path(path))))

        logger = Recording()
        fit(tmp_path, trainer={"logger": logger}, save_mode=mode, every_n_train_steps=1, **ALL)
        assert all(there for _, there in logger.told)
        assert len(logger.told) == 12
        assert logger.told[-1][0] == str(newest(tmp_path).path)

    def test_one_that_takes_long_is_told_of_when_it_is_there(self, tmp_path, background):
        """Not only at the next save."""
        done = threading.Event()
        background(lambda operation: done.wait(20) if operation == "rename" else None)
        told = []

        class Recording(DummyLogger):
            def after_save_checkpoint(self, checkpoint_callback):
                told.append((run.module.steps, checkpoint_callback.last_model_path))

        def let_it_end():
            done.set()
            run.callback.checkpointer.wait()

        run = make(
            tmp_path,
            callbacks=[At("on_train_batch_start", 7, let_it_end)],
            trainer={"logger": Recording(), "max_epochs": 2},
            save_mode="async",
            **ALL,
        )
        go(run)
        first, second = (str(ckpt.path) for ckpt in saved(tmp_path))
        # Saved at step 4, told of after the batch in which it came to be.
        assert told == [(7, first), (8, second)]

    def test_by_choice_saves_are_skipped_but_never_the_last(self, tmp_path, background, caplog):
        """While one is being written; what was trained last is kept in any case."""
        go_on = threading.Event()

        def slow(operation):
            if operation == "rename":
                assert go_on.wait(60)
                time.sleep(0.2)

        background(slow)
        fit(
            tmp_path,
            callbacks=[At("on_train_batch_start", 9, go_on.set)],
            save_mode="async",
            when_busy="skip",
            every_n_train_steps=1,
            **ALL,
        )
        skipped = caplog.text.count("skipped a save")
        assert skipped >= 7
        found = steps_saved(tmp_path)
        assert len(found) == 12 - skipped
        assert found[-1] == 12

    @pytest.mark.parametrize("mode", ["sync", *MODES])
    def test_one_process_fits_twice_in_one_folder(self, tmp_path, mode):
        """With a callback of its own each, and with the same one."""
        run = fit(tmp_path, save_mode=mode, **ALL)
        again = fit(tmp_path, save_mode=mode, trainer={"max_epochs": 4}, **ALL)
        assert (run.module.steps, again.module.steps) == (12, 16)
        again.trainer.fit_loop.max_epochs = 5
        assert go(again).module.steps == 20
        assert steps_saved(tmp_path) == [4, 8, 12, 16, 20]


def fit_and_hold(dirpath, begun, may_end):
    """Fit, and stay in the middle of it until told to go on."""

    def hold():
        begun.set()
        may_end.wait(60)

    fit(Path(dirpath), callbacks=[At("on_train_batch_start", 6, hold)], save_mode="async", **ALL)


def fit_for(dirpath, max_epochs):
    """Fit."""
    fit(Path(dirpath), trainer={"max_epochs": max_epochs}, **ALL)


def started(target, *args):
    """Start a process."""
    process = context.Process(target=target, args=args)
    process.start()
    return process


def test_two_processes_in_one_folder(tmp_path):
    """The second is told before it trains; by choice it resumes and saves nothing; after the first
    has ended it may write, and when it has ended, another may.
    """
    begun, may_end = context.Event(), context.Event()
    first = started(fit_and_hold, tmp_path, begun, may_end)
    try:
        assert begun.wait(60)
        trained = []
        watch = At("on_train_batch_start", 1, lambda: trained.append(1))
        with pytest.raises(FolderInUseError, match=f"is in use by process {first.pid} "):
            fit(tmp_path, callbacks=[watch], **ALL)
        assert not trained
        deadline = time.monotonic() + 20
        while steps_saved(tmp_path) != [4] and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.warns(UserWarning, match="nothing of this run will be saved"):
            reading = fit(tmp_path, callbacks=[watch], when_in_use="read", **ALL)
        assert reading.callback.resume_report.checkpoint == str(newest(tmp_path).path)
        assert reading.module.steps == 12
        assert steps_saved(tmp_path) == [4]
        may_end.set()
        first.join(60)
        assert first.exitcode == 0
    finally:
        may_end.set()
        first.join(60)
    assert steps_saved(tmp_path) == [4, 8, 12]
    assert fit(tmp_path, trainer={"max_epochs": 4}, **ALL).module.steps == 16
    third = started(fit_for, tmp_path, 5)
    third.join(60)
    assert third.exitcode == 0
    assert steps_saved(tmp_path) == [4, 8, 12, 16, 20]
