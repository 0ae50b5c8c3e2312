"""Runs that have come to their end and are started again: complete, or with another limit."""

from __future__ import annotations

import logging

import lightning as L
import pytest
from _runs import At, Steps, by_epoch, fit, go, loader, make, raise_at, steps_saved
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers.logger import DummyLogger

SAVING = ("on_save_checkpoint", "on_load_checkpoint")


@pytest.fixture
def lines(caplog):
    """A function that returns what was said."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


class Hooks(L.Callback):
    """Notes every hook that Lightning calls, in order."""

    def __init__(self):
        self.called = []


def _noting(name):
    def hook(self, *args, **kwargs):
        self.called.append(name)

    return hook


for _name in [name for name in dir(L.Callback) if name.startswith("on_")]:
    if _name not in SAVING:
        setattr(Hooks, _name, _noting(_name))


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((sorted(metrics), step))


def lightnings(tmp_path, settings, hooks, rows, val):
    """Fit as Lightning alone does it, from its own last checkpoint."""
    last = tmp_path / "last.ckpt"
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **settings},
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=rows,
        callbacks=[hooks, ModelCheckpoint(tmp_path, save_last=True)],
    )
    path = last if last.exists() else None
    trainer.fit(Steps(), loader(), loader(1) if val else None, ckpt_path=path)
    return trainer


@pytest.mark.sample(3)
@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        ({"max_epochs": 2}, {"max_epochs": 2}, {"max_epochs": 3}),
        # With more steps Lightning would end the last epoch once more.
        ({"max_steps": 8}, {"max_steps": 8}),
        ({"max_steps": 6}, {"max_steps": 6}),
    ],
    ids=["epochs", "steps", "steps within an epoch"],
)
def test_hooks_and_logged_rows_are_those_of_lightning(tmp_path, limits, val):
    """Equal and raised limits: each hook is called as with Lightning's own last checkpoint."""
    for settings in limits:
        ours, theirs = Hooks(), Hooks()
        our_rows, their_rows = Rows(), Rows()
        trainer = {**settings, "logger": our_rows}
        run = fit(tmp_path / "ours", callbacks=[ours], trainer=trainer, val=val)
        oracle = lightnings(tmp_path / "theirs", settings, theirs, their_rows, val)
        assert ours.called == theirs.called
        assert our_rows.rows == their_rows.rows
        if "max_epochs" in settings:
            assert run.trainer.current_epoch == oracle.current_epoch
        assert run.trainer.global_step == oracle.global_step


@pytest.mark.parametrize(
    ("first", "second"),
    [({"max_epochs": 2}, {"max_epochs": 3}), ({"max_steps": 8}, {"max_steps": 12})],
)
def test_a_raised_limit_repeats_no_hook(tmp_path, first, second):
    """All lives together call the hooks of training that one unbroken run calls."""

    def called(path, settings):
        hooks = Hooks()
        fit(path, callbacks=[hooks], trainer=settings)
        frame = ("on_fit_start", "on_fit_end", "on_train_start", "on_train_end")
        return [name for name in hooks.called if name not in frame]

    lives = called(tmp_path / "a", first) + called(tmp_path / "a", second)
    assert lives == called(tmp_path / "b", second)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_epochs": 3}, "3 of 3 epochs, nothing trained; raise max_epochs or use"),
        ({"max_epochs": 2}, "3 epochs, more than max_epochs=2, nothing trained; raise max_epochs"),
        ({"max_epochs": 1}, "3 epochs, more than max_epochs=1, nothing trained; raise max_epochs"),
        ({"max_steps": 12}, "12 of 12 steps, nothing trained; raise max_steps or use"),
        ({"max_steps": 5}, "12 steps, more than max_steps=5, nothing trained; raise max_steps"),
    ],
)
def test_a_complete_run_says_so_and_restores_the_best(tmp_path, lines, settings, line):
    """In one line, with the limit, whether it is the same or lower."""
    losses = by_epoch(0.5, 0.25, 0.75)
    fit(tmp_path, module=Steps(losses), min_key="val_loss")
    hooks = Hooks()
    run = fit(
        tmp_path,
        module=Steps(losses),
        min_key="val_loss",
        trainer=settings,
        callbacks=[hooks],
    )
    (said,) = [text for text in lines() if "already complete" in text]
    assert said.startswith("SBCheckpoint: resuming from ")
    assert f"; already complete: {line}" in said
    assert "another folder" in said
    assert run.module.steps == 8
    assert not [name for name in hooks.called if "train" in name or "validation" in name]
    assert any("already complete" in note for note in run.callback.resume_report.notes)


@pytest.mark.parametrize("val", [True, False])
def test_steps_that_ended_within_an_epoch_are_complete(tmp_path, val):
    """The end of that epoch is not run again; with more steps the epoch goes on."""
    ends = At("on_train_epoch_end", 0, lambda: None)
    first = fit(tmp_path, trainer={"max_steps": 6}, val=val)
    again = fit(tmp_path, trainer={"max_steps": 6}, callbacks=[ends], val=val)
    assert (ends.calls, again.module.steps) == (0, 6)
    assert again.trainer.current_epoch == first.trainer.current_epoch
    more = fit(tmp_path, trainer={"max_steps": 12}, val=val)
    assert (more.module.steps, more.trainer.current_epoch) == (12, 3)


def test_a_run_killed_before_the_end_of_its_last_epoch_has_that_end(tmp_path):
    """It was saved at max_steps within the epoch, whose end had not run yet."""
    with pytest.raises(RuntimeError):
        fit(
            tmp_path,
            trainer={"max_steps": 6},
            callbacks=[raise_at("on_train_epoch_end", 2, RuntimeError())],
        )
    ends = At("on_train_epoch_end", 0, lambda: None)
    fit(tmp_path, trainer={"max_steps": 6}, callbacks=[ends])
    assert ends.calls == 1
    fit(tmp_path, trainer={"max_steps": 6}, callbacks=[ends])
    assert ends.calls == 1


class StopAt(L.Callback):
    """Tells the Trainer to stop after a batch, as a stop file would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.should_stop = True


@pytest.mark.parametrize("val", [True, False])
def test_a_run_that_was_told_to_stop_goes_on_in_the_same_epoch(tmp_path, val):
    """The reason is gone, and it ends where it would have ended without it."""
    assert fit(tmp_path, callbacks=[StopAt(6)], val=val).module.steps == 6
    run = fit(tmp_path, val=val)
    assert (run.module.steps, run.trainer.current_epoch) == (12, 3)
    assert any("told to stop" in note for note in run.callback.resume_report.notes)


def test_a_run_told_to_stop_at_the_end_of_an_epoch_goes_on(tmp_path):
    """With the next epoch."""
    stop = L.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, module: setattr(trainer, "should_stop", True)
    )
    assert fit(tmp_path, callbacks=[stop]).module.steps == 4
    assert fit(tmp_path).module.steps == 12


def test_a_run_killed_after_it_was_told_to_stop_stops(tmp_path):
    """As it would have done: the epoch has its end, and nothing more is trained."""
    killed = raise_at("on_train_epoch_end", 2, RuntimeError())
    with pytest.raises(RuntimeError):
        fit(tmp_path, callbacks=[StopAt(6), killed])
    ends = At("on_train_epoch_end", 0, lambda: None)
    run = fit(tmp_path, callbacks=[ends])
    assert (run.module.steps, ends.calls, run.trainer.current_epoch) == (6, 1, 2)


def early(patience, **options):
    """Return an EarlyStopping."""
    return EarlyStopping("val_loss", patience=patience, **options)


class TestEarlyStopping:
    """A reason that is still there stops the run again, one that is gone does not."""

    losses = staticmethod(by_epoch(0.5, 0.6, 0.7, 0.8, 0.9, 1.0))

    def run(self, tmp_path, *callbacks, epochs=6):
        """Fit with losses that only rise."""
        return fit(
            tmp_path,
            module=Steps(self.losses),
            callbacks=callbacks,
            trainer={"max_epochs": epochs},
            restore_best=False,
        )

    def test_the_same_patience_is_complete(self, tmp_path, lines):
        """Nothing is trained, no hook repeated."""
        assert self.run(tmp_path, early(2)).module.steps == 12
        hooks = Hooks()
        run = self.run(tmp_path, early(2), hooks)
        assert run.module.steps == 12
        assert "on_train_epoch_end" not in hooks.called
        (said,) = [text for text in lines() if "already complete" in text]
        assert "stopped by EarlyStopping('val_loss'): no better in 2 checks, patience=2" in said

    def test_more_patience_is_what_is_asked_for(self, tmp_path):
        """Lightning alone would go back to the patience that was saved."""
        self.run(tmp_path, early(2))
        run = self.run(tmp_path, early(4))
        assert run.module.steps == 20
        (note,) = [n for n in run.callback.resume_report.notes if "patience" in n]
        assert "patience=2 in the checkpoint, 4 asked for; training goes on with 4" in note

    def test_without_the_callback_it_goes_on(self, tmp_path):
        """To the last epoch."""
        self.run(tmp_path, early(2))
        assert self.run(tmp_path).module.steps == 24

    def test_a_threshold_that_was_reached_is_complete_until_it_is_moved(self, tmp_path):
        """It is compared with the value that was logged."""
        assert self.run(tmp_path, early(9, divergence_threshold=0.65)).module.steps == 12
        assert self.run(tmp_path, early(9, divergence_threshold=0.65)).module.steps == 12
        assert self.run(tmp_path, early(9, divergence_threshold=0.85)).module.steps == 20


def test_a_time_limit_that_is_used_up_is_complete_until_it_is_raised(tmp_path, monkeypatch, lines):
    """The time of earlier starts counts, as with Lightning."""
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: now[0])

    def run(seconds):
        tick = L.pytorch.callbacks.LambdaCallback(
            on_train_batch_start=lambda *_: now.__setitem__(0, now[0] + 1.0)
        )
        return fit(tmp_path, callbacks=[tick, Timer({"seconds": seconds})])

    assert run(6).module.steps == 6
    assert run(6).module.steps == 6
    (said,) = [text for text in lines() if "already complete" in text]
    assert "stopped by max_time: 6 s are used up" in said
    assert run(600).module.steps == 12


def test_the_last_batch_of_a_loader_without_length_is_not_ended_twice(tmp_path):
    """`on_train_batch_start` may end an epoch by -1: then the last save has its end before it."""

    class Short(Steps):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    options = {"every_n_train_steps": 1, "num_to_keep": 100, "val": False}
    fit(tmp_path, module=Short(), **options)
    ends = At("on_train_epoch_end", 0, lambda: None)
    again = fit(tmp_path, module=Short(), callbacks=[ends], **options)
    assert (again.module.steps, ends.calls) == (6, 0)


def test_the_same_module_is_fitted_again_in_one_process(tmp_path):
    """With a higher limit, as Lightning allows."""
    run = fit(tmp_path, trainer={"max_epochs": 1})
    run.trainer.fit_loop.max_epochs = 3
    assert go(run).module.steps == 12
    assert steps_saved(tmp_path) == [12]


def test_a_run_stopped_by_ctrl_c_is_fitted_again_in_one_process(tmp_path):
    """It goes on from its newest checkpoint."""
    stop = raise_at("on_train_batch_start", 6, KeyboardInterrupt())
    run = make(tmp_path, callbacks=[stop])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        go(run)
    assert go(run).module.steps == 12
