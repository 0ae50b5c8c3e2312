"""The best weights: held after the fit, and found by whoever asks Lightning for them."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from _releases import needs_lightning
from _runs import (
    At,
    Steps,
    by_epoch,
    damage,
    fit,
    go,
    loader,
    make,
    raise_at,
    saved,
    steps_saved,
)
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import nn

UP_AND_DOWN = by_epoch(0.5, 0.25, 0.75)
"""The second epoch is the best."""

ALL = {"num_to_keep": 99}


class TestAfterTheFit:
    """Whatever ended it."""

    @pytest.mark.parametrize(
        ("loss", "trainer"),
        [
            (UP_AND_DOWN, {"max_epochs": 3}),
            (UP_AND_DOWN, {"max_steps": 10}),
            (by_epoch(0.5, 0.25, *[0.75] * 9), {"max_epochs": 9}),
        ],
        ids=["max_epochs", "max_steps", "EarlyStopping"],
    )
    def test_the_best_weights_are_restored(self, tmp_path, loss, trainer):
        """By max_epochs, max_steps or EarlyStopping."""
        stopper = EarlyStopping("val_loss", patience=1)
        run = fit(
            tmp_path,
            module=Steps(loss),
            callbacks=[stopper] if trainer == {"max_epochs": 9} else [],
            trainer=trainer,
            min_key="val_loss",
        )
        assert run.trainer.global_step == (trainer.get("max_steps") or 12)
        assert run.module.steps == 8

    def test_the_best_weights_are_restored_after_max_time(self, tmp_path, monkeypatch):
        """Which stops within an epoch."""
        timer = Timer(duration=timedelta(hours=1))
        run = make(tmp_path, module=Steps(UP_AND_DOWN), callbacks=[timer], min_key="val_loss")
        late = At("on_train_batch_end", 10, lambda: monkeypatch.setattr(timer, "_offset", 3700))
        run.trainer.callbacks.insert(0, late)
        go(run)
        assert run.trainer.global_step == 10
        assert run.module.steps == 8
        assert max(steps_saved(tmp_path)) == 10

    @pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start"])
    def test_the_best_weights_are_restored_after_ctrl_c(self, tmp_path, hook):
        """The user stopped, and has what was best until then."""
        run = make(
            tmp_path,
            module=Steps(UP_AND_DOWN),
            callbacks=[raise_at(hook, 10, KeyboardInterrupt())],
            min_key="val_loss",
        )
        # Older releases of Lightning return, newer ones let it out or end the process.
        with suppress(KeyboardInterrupt, SystemExit):
            go(run)
        assert run.trainer.global_step in (9, 10)
        assert run.module.steps == 8

    def test_an_exception_leaves_the_weights_alone(self, tmp_path):
        """They are what a debugger wants to see."""
        run = make(
            tmp_path,
            module=Steps(UP_AND_DOWN),
            callbacks=[raise_at("on_train_batch_end", 10, RuntimeError("mine"))],
            min_key="val_loss",
        )
        with pytest.raises(RuntimeError, match="mine"):
            go(run)
        assert run.module.steps == 10

    def test_ctrl_c_in_a_test_leaves_the_weights_alone(self, tmp_path):
        """Only a fit ends with the best."""
        run = fit(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss")
        with torch.no_grad():
            run.module.weight.fill_(-100.0)
        run.trainer.callbacks.insert(0, raise_at("on_test_start", 1, KeyboardInterrupt()))
        with suppress(KeyboardInterrupt, SystemExit):
            run.trainer.test(run.module, loader(1), verbose=False)
        assert run.module.steps == 100

    def test_restore_best_false_leaves_the_last_weights(self, tmp_path):
        """The best is known all the same."""
        run = fit(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss", restore_best=False)
        assert run.module.steps == 12
        assert run.callback.best_model_score == 0.25

    def test_without_a_key_the_last_weights_stay(self, tmp_path):
        """The newest is then the best."""
        run = fit(tmp_path, module=Steps(UP_AND_DOWN))
        assert run.module.steps == 12
        assert run.callback.best_model_path == run.callback.last_model_path
        assert run.callback.best_model_score is None

    def test_a_function_says_what_is_best(self, tmp_path):
        """importance_key: the highest is best, and its value is the score."""
        run = fit(
            tmp_path,
            module=Steps(UP_AND_DOWN),
            importance_key=lambda ckpt: -abs(ckpt.meta["val_loss"] - 0.5),
        )
        assert run.module.steps == 4
        assert run.callback.best_model_score == 0.0

    def test_of_equally_good_ones_the_newer_is_best(self, tmp_path):
        """It was trained longer."""
        run = fit(tmp_path, module=Steps(by_epoch(0.5, 0.5, 0.75)), min_key="val_loss")
        assert run.module.steps == 8

    def test_if_the_best_is_damaged_the_next_is_restored(self, tmp_path, caplog):
        """With a line about the damage."""
        run = make(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss", num_to_keep=3)
        hit = At("on_train_end", 1, lambda: damage(saved(tmp_path)[1]))
        run.trainer.callbacks.insert(0, hit)
        go(run)
        assert run.module.steps == 4
        assert "skipped a damaged checkpoint" in caplog.text

    def test_another_runs_better_checkpoint_is_not_ours(self, tmp_path):
        """With resume=False, what other runs left in the folder takes no part."""
        fit(tmp_path, module=Steps(by_epoch(0.01)), trainer={"max_epochs": 1}, min_key="val_loss")
        run = fit(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss", resume=False)
        assert run.module.steps == 8
        assert run.callback.best_model_score == 0.25

    @needs_lightning("2.6", "WeightAveraging")
    def test_the_averaged_weights_are_what_is_best(self, tmp_path):
        """With WeightAveraging the average was validated, so the average is what comes back."""
        from lightning.pytorch.callbacks import WeightAveraging

        seen = []

        class Watched(Steps):
            def validation_step(self, batch, batch_idx):
                seen.append(self.weight.item())
                self.log("val_loss", (self.weight + 4.4).abs().squeeze())

        averaging = WeightAveraging(avg_fn=lambda avg, new, n: avg + (new - avg) / (n + 1))
        run = fit(
            tmp_path,
            module=Watched(),
            callbacks=[averaging],
            min_key="val_loss",
        )
        assert not {-4.0, -8.0, -12.0} & {*seen}
        assert run.module.weight.item() == min(seen, key=lambda weight: abs(weight + 4.4))

    def test_the_modules_own_hook_takes_part(self, tmp_path):
        """on_load_checkpoint sees the checkpoint before its weights are loaded."""

        class Renames(Steps):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"]["old"] = checkpoint["state_dict"].pop("weight")
                checkpoint["note"] = self.steps

            def on_load_checkpoint(self, checkpoint):
                checkpoint["state_dict"]["weight"] = checkpoint["state_dict"].pop("old")
                self.note = checkpoint["note"]

        run = fit(tmp_path, module=Renames(UP_AND_DOWN), min_key="val_loss")
        assert (run.module.steps, run.module.note) == (8, 8)


class TestAttributes:
    """What Lightning and its loggers read."""

    def test_they_say_which_are_best_and_newest(self, tmp_path):
        """Paths of folders that exist, and scores as tensors, best first."""
        run = fit(
            tmp_path,
            module=Steps(UP_AND_DOWN),
            min_key="val_loss",
            num_to_keep=2,
            keep_recent=False,
        )
        callback = run.callback
        first, second = saved(tmp_path)
        assert callback.best_model_path == str(second.path)
        assert callback.best_model_score == torch.tensor(0.25)
        assert list(callback.best_k_models.items()) == [
            (str(second.path), torch.tensor(0.25)),
            (str(first.path), torch.tensor(0.5)),
        ]
        assert (callback.monitor, callback.mode) == ("val_loss", "min")

    def test_the_last_is_the_newest(self, tmp_path):
        """Whether or not it has the metric."""
        run = fit(
            tmp_path,
            module=Steps(UP_AND_DOWN),
            min_key="val_loss",
            every_n_train_steps=5,
            trainer={"max_steps": 10},
        )
        assert run.callback.last_model_path == str(saved(tmp_path)[-1].path)
        assert run.callback.current_score is None
        assert run.callback.best_model_score == 0.25

    def test_the_highest_is_best_with_max_key(self, tmp_path):
        """And its score is its value, not its negative."""
        run = fit(tmp_path, module=Steps(UP_AND_DOWN), max_key="val_loss")
        assert run.module.steps == 12
        assert (run.callback.best_model_score, run.callback.mode) == (0.75, "max")

    def test_they_are_known_again_after_a_restart(self, tmp_path):
        """From the moment at which the run goes on."""
        fit(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss", trainer={"max_epochs": 2})
        run = make(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss")
        known = []
        run.trainer.callbacks.insert(
            0, At("on_train_start", 1, lambda: known.append(run.callback.best_model_score))
        )
        go(run)
        assert known == [torch.tensor(0.25)]


class TestByPath:
    """Folders go wherever Lightning takes a path."""

    def test_trainer_test_takes_best(self, tmp_path):
        """The weights under test are those of the best checkpoint."""
        run = fit(tmp_path, module=Steps(UP_AND_DOWN), min_key="val_loss", restore_best=False)
        (result,) = run.trainer.test(run.module, loader(1), ckpt_path="best", verbose=False)
        assert result["test_steps"] == 8.0

    def test_a_new_trainer_takes_a_folder(self, tmp_path):
        """In validate, test and fit; str or Path."""
        folder = fit(
            tmp_path / "a", module=Steps(UP_AND_DOWN), min_key="val_loss"
        ).callback.best_model_path
        for method in ("validate", "test"):
            run = make(tmp_path / "b")
            getattr(run.trainer, method)(run.module, loader(1), ckpt_path=folder, verbose=False)
            assert run.module.steps == 8
        assert not saved(tmp_path / "b")
        run = fit(tmp_path / "b", ckpt_path=folder)
        assert run.callback.resume_report.meta["global_step"] == 8
        assert run.module.steps == 12

    def test_predict_takes_a_folder(self, tmp_path):
        """As validate and test."""
        folder = fit(
            tmp_path / "a", module=Steps(UP_AND_DOWN), min_key="val_loss"
        ).callback.best_model_path

        class Predicts(Steps):
            def predict_step(self, batch, batch_idx):
                return self.steps

        run = make(tmp_path / "b", module=Predicts())
        assert run.trainer.predict(run.module, loader(1), ckpt_path=folder) == [8]

    def test_load_from_checkpoint_takes_a_folder(self, tmp_path):
        """With the hyperparameters that the module saved, and with new ones."""
        module = Sized(width=3)
        folder = fit(tmp_path, module=module, min_key="val_loss").callback.best_model_path
        loaded = Sized.load_from_checkpoint(folder)
        assert (loaded.hparams.width, loaded.part.weight.shape) == (3, (3, 1))
        assert torch.equal(loaded.part.weight, module.part.weight)
        assert Sized.load_from_checkpoint(folder, factor=5.0).hparams.factor == 5.0

    def test_load_from_checkpoint_still_takes_files(self, tmp_path):
        """Lightning's own are read as ever."""
        run = fit(tmp_path, module=Sized(width=2))
        run.trainer.save_checkpoint(tmp_path / "lightning.ckpt")
        assert Sized.load_from_checkpoint(tmp_path / "lightning.ckpt").hparams.width == 2

    def test_a_damaged_folder_is_not_loaded(self, tmp_path):
        """Asked for by path, there is nothing to step back to."""
        run = fit(tmp_path, module=Sized(width=2))
        damage(saved(tmp_path)[0])
        with pytest.raises(RuntimeError, match="is damaged and nothing was loaded"):
            Sized.load_from_checkpoint(run.callback.last_model_path)

    def test_a_folder_of_the_core_is_refused_by_name(self, tmp_path):
        """It has no Lightning module; the message says what reads it."""
        from lightning_sbckpt import Checkpointer

        folder = Checkpointer(tmp_path, {"tokenizer": nn.Linear(1, 1)}).save_checkpoint().path
        with pytest.raises(FileNotFoundError, match=r"no model.ckpt.*tokenizer.*Checkpointer"):
            Sized.load_from_checkpoint(folder)


class Sized(Steps):
    """Made by hyperparameters."""

    def __init__(self, width, factor=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.part = nn.Linear(1, width)
