"""When `SBCheckpoint` saves, what the meta has, and what is kept."""

from __future__ import annotations

import math
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from _runs import (
    At,
    Steps,
    by_epoch,
    fit,
    go,
    loader,
    make,
    newest,
    raise_at,
    saved,
    steps_saved,
)
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt.errors import (
    CheckpointNameError,
    ConfigurationError,
    SaveError,
    SelectionError,
)
from lightning_sbckpt.retention import Newest

ALL = {"num_to_keep": 99}


def reasons(dirpath):
    """Return why each checkpoint was saved, oldest first."""
    return [read_manifest(ckpt.path).lineage["reason"] for ckpt in saved(dirpath)]


class TestWhenItSaves:
    """Validation end, epoch end, steps, wall clock, the end of training; never twice."""

    def test_it_saves_whenever_validation_ends(self, tmp_path):
        """Once per epoch, and not in the sanity check before the first."""
        fit(tmp_path, trainer={"num_sanity_val_steps": 1}, **ALL)
        assert steps_saved(tmp_path) == [4, 8, 12]

    def test_several_validations_in_an_epoch_are_as_many_saves(self, tmp_path):
        """With val_check_interval each is saved, and only the last is the end of the epoch."""
        fit(tmp_path, trainer={"val_check_interval": 0.5, "max_epochs": 2}, **ALL)
        assert steps_saved(tmp_path) == [2, 4, 6, 8]
        assert [c.meta["end-of-epoch"] for c in saved(tmp_path)] == [False, True, False, True]

    @pytest.mark.parametrize("why", ["no loader", "limit_val_batches=0", "another epoch's turn"])
    def test_an_epoch_without_validation_is_saved_when_it_ends(self, tmp_path, why):
        """Whatever the reason that nothing was validated in it."""
        trainer = {
            "no loader": {},
            "limit_val_batches=0": {"limit_val_batches": 0},
            "another epoch's turn": {"check_val_every_n_epoch": 2},
        }[why]
        fit(tmp_path, val=why != "no loader", trainer=trainer, **ALL)
        assert steps_saved(tmp_path) == [4, 8, 12]
        assert all(ckpt.meta["end-of-epoch"] for ckpt in saved(tmp_path))

    def test_every_n_epochs(self, tmp_path):
        """Every second epoch, by its number; the end of training is saved besides."""
        fit(tmp_path, every_n_epochs=2, trainer={"max_epochs": 5}, **ALL)
        assert steps_saved(tmp_path) == [8, 16, 20]
        assert reasons(tmp_path) == ["every 2 epochs", "every 2 epochs", "training ends"]

    def test_without_any_trigger_only_the_end_is_saved(self, tmp_path):
        """every_n_epochs=None turns the epochs off."""
        fit(tmp_path, every_n_epochs=None, **ALL)
        assert steps_saved(tmp_path) == [12]

    def test_every_n_train_steps(self, tmp_path):
        """By optimizer step, and at the end what came after the last of them."""
        fit(tmp_path, every_n_epochs=None, every_n_train_steps=5, **ALL)
        assert steps_saved(tmp_path) == [5, 10, 12]

    def test_steps_are_optimizer_steps(self, tmp_path):
        """Batches that only accumulate gradients are no steps."""
        fit(
            tmp_path,
            every_n_epochs=None,
            every_n_train_steps=1,
            trainer={"accumulate_grad_batches": 2, "max_epochs": 1},
            **ALL,
        )
        assert steps_saved(tmp_path) == [1, 2]

    def test_a_time_interval_is_a_wall_clock(self, tmp_path, monkeypatch):
        """Due after the first batch that ends so long after the last save."""
        seconds = 0.0
        monkeypatch.setattr("lightning_sbckpt.plugin.saving.time.monotonic", lambda: seconds)

        class Slow(Steps):
            def training_step(self, batch, batch_idx):
                nonlocal seconds
                seconds += 10.0
                return super().training_step(batch, batch_idx)

        fit(
            tmp_path,
            module=Slow(),
            every_n_epochs=None,
            train_time_interval=timedelta(seconds=45),
            **ALL,
        )
        assert steps_saved(tmp_path) == [5, 10, 12]

    def test_triggers_add_up_and_any_save_restarts_the_clock(self, tmp_path, monkeypatch):
        """Each is due for itself, except that the interval counts from the last save of all."""
        seconds = 0.0
        monkeypatch.setattr("lightning_sbckpt.plugin.saving.time.monotonic", lambda: seconds)

        class Slow(Steps):
            def training_step(self, batch, batch_idx):
                nonlocal seconds
                seconds += 10.0
                return super().training_step(batch, batch_idx)

        fit(tmp_path, module=Slow(), every_n_train_steps=7, train_time_interval=25.0, **ALL)
        assert steps_saved(tmp_path) == [3, 4, 7, 8, 11, 12]

    @pytest.mark.parametrize("val", [True, False])
    def test_two_reasons_at_once_are_one_save(self, tmp_path, val):
        """A step and the end of its epoch, with and without validation; both reasons are told."""
        fit(tmp_path, val=val, every_n_train_steps=2, **ALL)
        assert steps_saved(tmp_path) == [2, 4, 6, 8, 10, 12]
        assert reasons(tmp_path)[:2] == ["every 2 steps", "every 2 steps, every epoch"]

    @pytest.mark.parametrize("val", [True, False])
    def test_a_dev_run_saves_nothing_and_resumes_nothing(self, tmp_path, val):
        """fast_dev_run tries the code; what is in the folder is not its business."""
        fit(tmp_path, **ALL)
        before = sorted(tmp_path.rglob("*"))
        run = fit(tmp_path, val=val, trainer={"fast_dev_run": 2}, **ALL)
        assert run.module.steps == 2
        assert sorted(tmp_path.rglob("*")) == before

    def test_validate_saves_nothing(self, tmp_path):
        """Only a fit does, also on a Trainer that has fitted before."""
        run = make(tmp_path)
        run.trainer.validate(run.module, loader(1), verbose=False)
        assert not saved(tmp_path)
        go(run)
        before = steps_saved(tmp_path)
        run.trainer.validate(run.module, loader(1), verbose=False)
        assert steps_saved(tmp_path) == before

    @pytest.mark.parametrize("val", [True, False])
    @pytest.mark.parametrize("max_steps", [6, 8])
    def test_max_steps_are_saved_once(self, tmp_path, val, max_steps):
        """Within an epoch or at its end."""
        fit(tmp_path, val=val, trainer={"max_steps": max_steps, "max_epochs": -1}, **ALL)
        assert steps_saved(tmp_path) == [4, max_steps]

    def test_max_steps_within_an_epoch_are_saved_where_nothing_else_is_due(self, tmp_path):
        """And as what they are: in the middle of an epoch, to go on from there."""
        often = {"every_n_epochs": None, "every_n_train_steps": 4}
        fit(tmp_path, trainer={"max_steps": 6, "max_epochs": -1}, **often, **ALL)
        assert steps_saved(tmp_path) == [4, 6]
        assert reasons(tmp_path) == ["every 4 steps", "max_steps is reached"]
        assert saved(tmp_path)[-1].meta["end-of-epoch"] is False

    def test_a_run_told_to_stop_is_saved(self, tmp_path):
        """should_stop within an epoch: the last steps are not lost."""
        run = make(tmp_path, every_n_epochs=None, every_n_train_steps=4, **ALL)
        run.trainer.callbacks.insert(
            0, At("on_train_batch_end", 6, lambda: setattr(run.trainer, "should_stop", True))
        )
        go(run)
        assert steps_saved(tmp_path) == [4, 6]

    def test_a_trainer_fits_twice(self, tmp_path):
        """The second fit goes on where the first ended."""
        run = fit(tmp_path, **ALL)
        run.trainer.fit_loop.max_epochs = 5
        go(run)
        assert run.module.steps == 20
        assert steps_saved(tmp_path) == [4, 8, 12, 16, 20]


class TestMeta:
    """The metric belongs to the weights."""

    def test_meta_has_the_metrics_the_epoch_and_the_step(self, tmp_path):
        """In the order in which a person looks for them, as plain numbers."""
        fit(tmp_path, module=Steps(by_epoch(0.5, 0.25, 0.75)), **ALL)
        text = (saved(tmp_path)[1].path / "CKPT.yaml").read_text()
        meta = yaml.safe_load(text)
        keys = ["unixtime", "end-of-epoch", "val_loss", "train_loss", "epoch", "global_step"]
        assert list(meta) == keys
        assert {**meta, "unixtime": 0} == {
            "unixtime": 0,
            "end-of-epoch": True,
            "val_loss": 0.25,
            "train_loss": -5.5,
            "epoch": 1,
            "global_step": 8,
        }

    def test_a_save_between_validations_has_no_metric_of_an_older_one(self, tmp_path):
        """Though Lightning's callback_metrics still have it."""
        fit(tmp_path, every_n_train_steps=3, **ALL)
        with_loss = [
            ckpt.meta["global_step"] for ckpt in saved(tmp_path) if "val_loss" in ckpt.meta
        ]
        assert steps_saved(tmp_path) == [3, 4, 6, 8, 9, 12]
        assert with_loss == [4, 8, 12]

    def test_without_validation_the_metrics_are_those_of_the_epoch(self, tmp_path):
        """The mean over the epoch, as logged."""
        fit(tmp_path, val=False, every_n_train_steps=3, **ALL)
        losses = {ckpt.meta["global_step"]: ckpt.meta.get("train_loss") for ckpt in saved(tmp_path)}
        assert losses == {3: None, 4: -1.5, 6: None, 8: -5.5, 9: None, 12: -9.5}

    def test_an_epoch_without_validation_has_no_validation_metric(self, tmp_path):
        """With check_val_every_n_epoch=2, that of the epoch before would be at hand."""
        fit(tmp_path, trainer={"check_val_every_n_epoch": 2}, **ALL)
        assert ["val_loss" in ckpt.meta for ckpt in saved(tmp_path)] == [False, True, False]

    def test_the_last_save_has_the_metrics_of_its_own_validation(self, tmp_path):
        """Also when that validation was not due to be saved, and the end of training was."""
        fit(tmp_path, every_n_epochs=2, module=Steps(by_epoch(0.5, 0.25, 0.125)), **ALL)
        assert [ckpt.meta["val_loss"] for ckpt in saved(tmp_path)] == [0.25, 0.125]

    def test_a_metric_of_a_metric_object_is_a_number(self, tmp_path):
        """Torchmetrics objects, tensors and numbers are logged alike."""
        from torchmetrics import MeanMetric

        class Logs(Steps):
            def __init__(self):
                super().__init__()
                self.mean = MeanMetric()

            def validation_step(self, batch, batch_idx):
                self.mean.update(self.steps)
                self.log("mean", self.mean)
                self.log("tensor", torch.tensor(2.5, dtype=torch.float64))
                self.log("number", 3)

        fit(tmp_path, module=Logs(), trainer={"max_epochs": 1})
        meta = yaml.safe_load((newest(tmp_path).path / "CKPT.yaml").read_text())
        assert (meta["mean"], meta["tensor"], meta["number"]) == (4.0, 2.5, 3.0)

    def test_meta_of_the_user_is_a_mapping_or_a_function(self, tmp_path):
        """The function is asked at every save."""
        fit(tmp_path / "a", meta={"fold": 3}, **ALL)
        assert [ckpt.meta["fold"] for ckpt in saved(tmp_path / "a")] == [3, 3, 3]

        def lr(trainer, module):
            return {"lr": trainer.optimizers[0].param_groups[0]["lr"], "steps": module.steps}

        fit(tmp_path / "b", meta=lr, **ALL)
        assert [ckpt.meta["steps"] for ckpt in saved(tmp_path / "b")] == [4, 8, 12]
        assert newest(tmp_path / "b").meta["lr"] == 1.0

    def test_what_yaml_cannot_hold_is_refused_by_name(self, tmp_path):
        """The message has the key."""
        with pytest.raises(ValueError, match=r"'thing' is a object"):
            fit(tmp_path, meta={"thing": object()})
        assert not saved(tmp_path)

    @pytest.mark.parametrize("key", ["min_key", "max_key"])
    def test_nan_is_the_worst_value(self, tmp_path, key):
        """For the lowest and for the highest alike: it is the first to go, and never best."""
        run = fit(tmp_path, module=Steps(by_epoch(math.nan, 0.5, math.nan)), **{key: "val_loss"})
        assert steps_saved(tmp_path) == [8, 12]
        assert run.callback.best_model_score == 0.5
        assert run.module.steps == 8

    def test_an_importance_key_that_misses_a_metric_does_not_stop_training(self, tmp_path):
        """A checkpoint without the metric is no candidate, as with min_key."""
        run = fit(
            tmp_path,
            module=Steps(by_epoch(0.5, 0.25, 0.75)),
            importance_key=lambda ckpt: -ckpt.meta["val_loss"],
            every_n_train_steps=3,
        )
        assert run.module.steps == 8
        assert 8 in steps_saved(tmp_path)


class TestRetention:
    """What is kept, and what is nobody's to delete."""

    def test_the_best_and_the_newest_are_kept(self, tmp_path):
        """num_to_keep of each; what is both is kept once."""
        losses = by_epoch(0.1, 0.9, 0.2, 0.8, 0.7, 0.6)
        fit(
            tmp_path,
            module=Steps(losses),
            min_key="val_loss",
            num_to_keep=2,
            trainer={"max_epochs": 6},
        )
        assert steps_saved(tmp_path) == [4, 12, 20, 24]

    def test_without_a_key_the_newest_are_kept(self, tmp_path):
        """One, unless told otherwise."""
        fit(tmp_path)
        assert steps_saved(tmp_path) == [12]

    def test_keep_recent_false_keeps_only_the_best(self, tmp_path):
        """As in SpeechBrain."""
        fit(
            tmp_path,
            module=Steps(by_epoch(0.5, 0.25, 0.75)),
            min_key="val_loss",
            keep_recent=False,
        )
        assert steps_saved(tmp_path) == [8]

    def test_rules_add_to_what_is_kept(self, tmp_path):
        """keep= takes any rule of lightning_sbckpt.retention."""

        class EveryFourthEpoch:
            def considers(self, checkpoint):
                return True

            def keeps(self, checkpoints):
                return {c: "a fourth epoch" for c in checkpoints if c.meta["epoch"] % 4 == 0}

            def rejects(self, checkpoint):
                return "no fourth epoch"

        fit(tmp_path, keep=[EveryFourthEpoch()], trainer={"max_epochs": 6})
        assert steps_saved(tmp_path) == [4, 20, 24]
        fit(tmp_path / "b", keep=[Newest(3)], trainer={"max_epochs": 6})
        assert steps_saved(tmp_path / "b") == [16, 20, 24]

    def test_a_predicate_says_what_may_be_deleted(self, tmp_path):
        """Where it is false, the checkpoint stays."""
        fit(tmp_path, ckpt_predicate=lambda ckpt: ckpt.meta["epoch"] != 0)
        assert steps_saved(tmp_path) == [4, 12]

    def test_only_checkpoints_of_this_run_are_deleted(self, tmp_path, tree_bytes):
        """Not those of another run, of the core, of nobody, nor other files and folders."""
        elsewhere = tmp_path / "elsewhere"
        fit(elsewhere)
        root = tmp_path / "run"
        copied = root / "CKPT+copied"
        shutil.copytree(newest(elsewhere).path, copied)
        Checkpointer(root, {"model": torch.nn.Linear(1, 1)}).save_checkpoint(name="mine")
        (root / "CKPT+foreign").mkdir()
        (root / "CKPT+foreign" / "CKPT.yaml").write_text("unixtime: 1.0\n")
        (root / "notes").mkdir()
        (root / "notes" / "a.txt").write_text("a")
        (root / "epoch=3.ckpt").write_text("b")
        before = tree_bytes(root)
        # It only grows.
        assert before.pop("HISTORY.jsonl")

        run = fit(root, resume=False)
        after = tree_bytes(root)
        assert {name: after.get(name) for name in before} == before
        # And of its own three only the newest is left.
        assert {name.partition("/")[0] for name in after.keys() - before} == {
            "HISTORY.jsonl",
            Path(run.callback.last_model_path).name,
        }

    def test_another_fit_of_the_same_callback_is_another_run(self, tmp_path):
        """With resume=False it begins anew, and leaves the checkpoints of the first alone."""
        first = fit(tmp_path, resume=False, min_key="val_loss")
        second = make(tmp_path, module=Steps(by_epoch(2.0)), trainer={"max_epochs": 1})
        second.trainer.callbacks[-1] = first.callback
        go(second)
        assert steps_saved(tmp_path) == [12, 4]
        assert second.module.steps == 4
        assert first.callback.best_model_score == 2.0

    def test_zero_to_keep_is_refused(self, tmp_path):
        """Every checkpoint would go as soon as it was written."""
        with pytest.raises(ConfigurationError, match="num_to_keep"):
            SBCheckpoint(tmp_path, num_to_keep=0)


class TestConstruction:
    """What can't be meant is refused, before anything is trained where that can be seen."""

    @pytest.mark.parametrize(
        "keys",
        [
            {"min_key": "a", "max_key": "b"},
            {"min_key": "a", "importance_key": lambda ckpt: 0.0},
            {"max_key": "a", "importance_key": lambda ckpt: 0.0},
        ],
    )
    def test_two_ways_to_choose_the_best_are_refused(self, tmp_path, keys):
        """Whichever two."""
        with pytest.raises(SelectionError, match="they may contradict each other"):
            SBCheckpoint(tmp_path, **keys)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"save_mode": "fast"}, r"save_mode is 'fast', .*'sync', 'async', 'overlap'"),
            ({"on_save_error": "ignore"}, r"on_save_error is 'ignore', .*'raise', 'warn'"),
            ({"when_busy": "drop"}, r"when_busy is 'drop', .*'wait', 'skip'"),
            ({"when_in_use": "wait"}, r"when_in_use is 'wait', .*'raise', 'read'"),
            ({"split_model": "encoder"}, "letter by letter"),
            ({"optional": "tokenizer"}, "letter by letter"),
            ({"every_n_epochs": 0}, "EveryNEpochs has n=0"),
            ({"every_n_train_steps": -1}, "EveryNSteps has n=-1"),
            ({"train_time_interval": 0}, "EveryInterval has interval=0"),
            ({"recoverables": {"optimizer": object()}}, "recoverables has the names 'optimizer'"),
            ({"recoverables": {"optimizer_1": object()}}, "names 'optimizer_1'"),
            ({"recoverables": {"lr_scheduler_12": object()}}, "names 'lr_scheduler_12'"),
            ({"recoverables": {"a": 1}, "split_model": ["a"]}, "names 'a' twice"),
            ({"split_model": ["rng"]}, "split_model has the names 'rng'"),
            ({"split_model": ["a", "a.b"]}, "'a.b' is inside 'a'"),
        ],
    )
    def test_contradictions_are_refused(self, tmp_path, options, message):
        """The message names the argument and what was found."""
        with pytest.raises(ConfigurationError, match=message):
            SBCheckpoint(tmp_path, **options)

    def test_a_name_that_would_leave_the_folder_is_refused(self, tmp_path):
        """Since it names a file."""
        with pytest.raises(CheckpointNameError, match=r"'\.\./a'"):
            SBCheckpoint(tmp_path, recoverables={"../a": torch.nn.Linear(1, 1)})

    def test_two_of_us_are_refused(self, tmp_path):
        """One run has one place to resume from; the message says what to do instead."""
        other = SBCheckpoint(tmp_path / "other")
        with pytest.raises(ConfigurationError, match=r"2 SBCheckpoint.*keep=\[\.\.\.\]"):
            fit(tmp_path / "one", callbacks=[other])

    def test_a_strategy_with_a_format_of_its_own_is_refused(self, tmp_path):
        """Its name and a way out are in the message."""

        class Sharded(SingleDeviceStrategy):
            def save_checkpoint(self, checkpoint, filepath, storage_options=None):
                raise AssertionError

        with pytest.raises(ConfigurationError, match=r"Sharded writes .* a format of its own"):
            fit(tmp_path, trainer={"strategy": Sharded(), "accelerator": "auto"})


class TestAroundTheFit:
    """What it leaves behind in the Trainer, and how it gets on with others."""

    def patched(self, run):
        trainer = run.trainer
        owners = (
            trainer.fit_loop,
            trainer.fit_loop.epoch_loop,
            trainer._checkpoint_connector,
            trainer.strategy,
            trainer.strategy.checkpoint_io,
        )
        found = [
            f"{type(owner).__name__}.{name}"
            for owner in owners
            for name in vars(owner)
            if callable(vars(owner)[name]) and callable(getattr(type(owner), name, None))
        ]
        return found, type(trainer.strategy.checkpoint_io).__name__

    def test_the_trainer_is_as_it_was_after_a_fit(self, tmp_path):
        """No method stays replaced, and the strategy has its CheckpointIO again."""
        run = make(tmp_path)
        before = self.patched(run)
        during = []
        run.trainer.callbacks.append(
            At("on_train_batch_end", 1, lambda: during.append(self.patched(run)))
        )
        go(run)
        assert during[0] != before
        assert self.patched(run) == before

    def test_the_trainer_is_as_it_was_after_a_resumed_fit(self, tmp_path):
        """Also one that had nothing more to do."""
        fit(tmp_path)
        for max_epochs in (3, 5):
            run = make(tmp_path, trainer={"max_epochs": max_epochs})
            before = self.patched(run)
            go(run)
            assert self.patched(run) == before

    @pytest.mark.parametrize(
        "hook",
        ["on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end"],
    )
    def test_the_trainer_is_as_it_was_after_an_exception(self, tmp_path, hook):
        """And that very exception is what the user sees."""
        fit(tmp_path, trainer={"max_epochs": 1})
        run = make(tmp_path, callbacks=[raise_at(hook, 1, RuntimeError("mine"))])
        before = self.patched(run)
        with pytest.raises(RuntimeError, match="mine"):
            go(run)
        assert self.patched(run) == before

    def test_the_trainer_is_as_it_was_after_test_and_validate(self, tmp_path):
        """They read folders, too, and so replace the CheckpointIO meanwhile."""
        run = fit(tmp_path, min_key="val_loss")
        before = self.patched(run)
        run.trainer.validate(run.module, loader(1), ckpt_path="best", verbose=False)
        run.trainer.test(run.module, loader(1), ckpt_path="best", verbose=False)
        assert self.patched(run) == before

    def test_a_disk_that_is_full_ends_the_fit(self, tmp_path):
        """With a SaveError that names the file; the checkpoints before it are whole."""

        class Grows:
            def state_dict(self):
                if run.trainer.global_step == 8:
                    raise OSError(28, "No space left on device")
                return {"number": 1}

            def load_state_dict(self, state):
                pass

        run = make(tmp_path, recoverables={"grows": Grows()}, **ALL)
        with pytest.raises(SaveError, match=r"'grows' failed: OSError: .*No space left on device"):
            go(run)
        assert steps_saved(tmp_path) == [4]
        assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["CKPT+", "HISTO"]
        Grows.state_dict = lambda self: {"number": 2}
        assert fit(tmp_path, recoverables={"grows": Grows()}, **ALL).module.steps == 12
        assert steps_saved(tmp_path) == [4, 8, 12]

    def test_lightnings_checkpoint_callback_works_beside_it(self, tmp_path):
        """Each writes its own; files go through the CheckpointIO that was there."""
        theirs = ModelCheckpoint(tmp_path / "theirs", monitor="val_loss", save_last=True)
        run = fit(tmp_path / "ours", callbacks=[theirs], min_key="val_loss")
        assert steps_saved(tmp_path / "ours") == [12]
        assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == [
            "epoch=2-step=12.ckpt",
            "last.ckpt",
        ]
        assert Steps.load_from_checkpoint(theirs.best_model_path).steps == 12
        assert run.callback.best_model_path.startswith(str(tmp_path / "ours"))

    def test_no_default_checkpoint_callback_is_added(self, tmp_path):
        """Lightning's own would write into the working directory."""
        run = make(tmp_path)
        assert run.trainer.checkpoint_callbacks == [run.callback]

    def test_early_stopping_sees_the_metrics_as_without_it(self, tmp_path):
        """A save resets nothing that other callbacks read."""
        stopper = EarlyStopping("val_loss", patience=2)
        fit(
            tmp_path,
            callbacks=[stopper],
            module=Steps(by_epoch(0.5, 0.6, 0.7, 0.8, 0.9)),
            trainer={"max_epochs": 5},
            every_n_train_steps=1,
            **ALL,
        )
        assert (stopper.best_score, stopper.stopped_epoch) == (0.5, 2)
        assert steps_saved(tmp_path) == list(range(1, 13))
