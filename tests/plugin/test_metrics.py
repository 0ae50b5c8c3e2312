"""The metrics of a checkpoint: those of its weights, by every name that Lightning gives them.

And what the user asks for that nothing logs: it is told while it can be mended.
"""

from __future__ import annotations

import os
import re
import signal
import warnings

import lightning as L
import pytest
import torch
from _runs import At, Steps, fit, go, loader, make, newest, raise_at, saved
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.plugin.wanted import WantedKeys
from lightning_sbckpt.retention import Best, Pareto, Where


class TwoLoaders(Steps):
    """Logs for each of its loaders; the second is better the shorter the training was."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", float(-self.steps if dataloader_idx else self.steps) ** 3)
        if dataloader_idx:
            self.log("second", float(self.steps), add_dataloader_idx=False)

    def on_validation_epoch_end(self):
        self.log("mean", 0.5)


class TestTwoValidationLoaders:
    """Each has its own metrics, by the name that Lightning gives them."""

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """A run beside one of Lightning's own checkpoint callback."""
        folder = tmp_path_factory.mktemp("run")
        key = "val_loss/dataloader_idx_1"
        theirs = ModelCheckpoint(folder / "theirs", monitor=key)
        run = make(folder / "ours", module=TwoLoaders(), callbacks=[theirs], max_key=key)
        run.trainer.fit(run.module, loader(), [loader(1), loader(1)])
        return run, theirs

    def test_they_are_in_the_meta(self, run):
        """Beside those that are logged once for all of them."""
        meta = newest(run[0].callback.dirpath).meta
        assert meta["val_loss/dataloader_idx_0"] == 12**3
        assert meta["val_loss/dataloader_idx_1"] == -(12**3)
        assert meta["mean"] == 0.5
        assert meta["second"] == 12

    def test_the_best_is_by_one_of_them(self, run):
        """The first epoch has the highest value of the second loader."""
        ours = run[0].callback
        assert ours.best_model_score == -(4**3)
        assert run[0].module.steps == 4
        assert run[1].best_model_score == -(12**3)  # By the lowest: it sees the same name.


class Everywhere(Steps):
    """Logs in every hook that may, falling with the training."""

    def training_step(self, batch, batch_idx):
        loss = self.weight.sum()
        self.log("epoch_only", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("step_only", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def on_validation_epoch_end(self):
        self.log("val_end", float(-self.steps))
        self.trainer.callback_metrics["by_hand"] = torch.tensor(float(-self.steps))

    def on_train_epoch_end(self):
        self.log("train_end", float(-self.steps))


class LogsToo(L.Callback):
    """A callback that logs."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self.log("callback_val", float(-pl_module.steps))

    def on_train_epoch_end(self, trainer, pl_module):
        self.log("callback_train", float(-pl_module.steps))


ALL_NAMES = [
    "epoch_only",
    "both",
    "both_epoch",
    "both_step",
    "step_only",
    "val_end",
    "train_end",
    "callback_val",
    "callback_train",
    "by_hand",
]


class TestWhereItIsLogged:
    """Whatever a checkpoint callback of Lightning's may monitor decides which is best."""

    @pytest.mark.sample(13)
    @pytest.mark.parametrize("val", [True, False])
    @pytest.mark.parametrize("name", ALL_NAMES)
    def test_it_counts(self, tmp_path, name, val):
        """Where validation runs, and where it doesn't."""
        if not val and name in ("val_end", "callback_val", "by_hand"):
            pytest.skip("logged in validation")
        theirs = ModelCheckpoint(tmp_path / "theirs", monitor=name)
        run = make(
            tmp_path / "ours",
            module=Everywhere(),
            callbacks=[LogsToo(), theirs],
            trainer={"max_epochs": 2},
            min_key=name,
            num_to_keep=5,
        )
        go(run, val=val)
        assert run.callback.best_model_score == theirs.best_model_score
        assert all(name in ckpt.meta for ckpt in saved(tmp_path / "ours"))

    @pytest.mark.parametrize("name", ["step_only", "both_step"])
    def test_a_save_within_an_epoch_has_what_its_batch_logged(self, tmp_path, name):
        """If it is asked for by name."""
        fit(tmp_path, module=Everywhere(), min_key=name, every_n_train_steps=3, num_to_keep=9)
        found = {ckpt.meta["global_step"]: ckpt.meta[name] for ckpt in saved(tmp_path)}
        assert found == {step: 1.0 - step for step in (3, 4, 6, 8, 9, 12)}

    def test_what_was_set_by_hand_before_a_restart_is_no_metric_of_later_weights(self, tmp_path):
        """Only the validation that sets it gives it to its own checkpoint."""

        class Sets(Steps):
            def on_validation_epoch_end(self):
                if self.current_epoch == 0:
                    self.trainer.callback_metrics["by_hand"] = torch.tensor(1.0)

        options = {"min_key": "by_hand", "num_to_keep": 9}
        for max_epochs in (1, 3):
            fit(tmp_path, module=Sets(), trainer={"max_epochs": max_epochs}, **options)
        assert ["by_hand" in ckpt.meta for ckpt in saved(tmp_path)] == [True, False, False]


class TestAMisspelledKey:
    """It ends the run at the first save that should have had it, as Lightning's own callback does."""

    @pytest.mark.parametrize(
        ("asked", "meant"),
        [
            ({"min_key": "val_los"}, "'val_loss'"),
            ({"max_key": "loss"}, "'val_loss'"),
            ({"min_key": "val/loss"}, "'val_loss'"),
            ({"min_key": "train_los"}, "'train_loss'"),
        ],
    )
    def test_it_is_told_after_the_first_validation(self, tmp_path, asked, meant):
        """With what was logged, and what may be meant; the checkpoint is whole."""
        run = make(tmp_path, **asked)
        with pytest.raises(SelectionError, match=rf"Logged was: .*Did you mean .*{meant}") as told:
            go(run)
        assert str(next(iter(asked.values()))) in str(told.value)
        assert run.trainer.global_step == 4
        # The run goes on when the name is right.
        assert fit(tmp_path, min_key="val_loss").callback.resume_report is not None
        assert [ckpt.meta["global_step"] for ckpt in saved(tmp_path)] == [12]

    @pytest.mark.parametrize("save_mode", ["sync", "async", "overlap"])
    def test_the_checkpoint_is_written_all_the_same(self, tmp_path, save_mode):
        """However it is saved."""
        with pytest.raises(SelectionError, match="val_los"):
            fit(tmp_path, min_key="val_los", save_mode=save_mode)
        assert [ckpt.meta["global_step"] for ckpt in saved(tmp_path)] == [4]

    def test_the_first_of_several_validations_in_an_epoch_tells_it(self, tmp_path):
        """Epochs may be long."""
        run = make(tmp_path, min_key="val_los", trainer={"val_check_interval": 0.5})
        with pytest.raises(SelectionError, match="val_los"):
            go(run)
        assert run.trainer.global_step == 2

    def test_several_loaders_are_meant(self, tmp_path):
        """Each has a name of its own."""
        run = make(tmp_path, module=TwoLoaders(), min_key="val_loss")
        with pytest.raises(SelectionError, match="Did you mean 'val_loss/dataloader_idx_0' or"):
            run.trainer.fit(run.module, loader(), [loader(1), loader(1)])

    def test_never_after_the_last_epoch(self, tmp_path):
        """The training must not be lost; it is said."""
        with pytest.warns(UserWarning, match=r"min_key='val_los' asks for .* Did you mean"):
            run = fit(tmp_path, min_key="val_los", trainer={"max_epochs": 1})
        assert run.trainer.state.finished
        assert run.module.steps == 4

    def test_without_validation_it_is_said_once(self, tmp_path):
        """As Lightning's callback does: this start may be one to try something else."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = fit(tmp_path, val=False, min_key="val_loss")
        assert run.module.steps == 12
        assert sum("nothing has logged so far" in str(one.message) for one in told) == 1


def quiet(action):
    """Return what an action gives, which must say nothing of keys."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = action()
    assert not [one for one in told if "nothing has logged" in str(one.message)]
    return result


class Rarely(Steps):
    """Logs a metric in some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_validation_epoch_end(self):
        if self.trainer.current_epoch in self.epochs:
            self.log("wer", float(self.steps))


class TestNoFalseAlarm:
    """What may still come is waited for."""

    def test_a_dev_run_says_nothing(self, tmp_path):
        """It saves nothing."""
        quiet(lambda: fit(tmp_path, min_key="val_los", trainer={"fast_dev_run": True}))

    def test_the_sanity_check_is_no_validation(self, tmp_path):
        """The first save comes before the first validation."""
        options = {"num_sanity_val_steps": 1, "max_epochs": 1, "check_val_every_n_epoch": 1}
        run = quiet(lambda: fit(tmp_path, min_key="val_loss", trainer=options, **SOON))
        assert run.module.steps == 4

    def test_epochs_without_validation_are_waited_out(self, tmp_path):
        """With `check_val_every_n_epoch`."""
        options = {"check_val_every_n_epoch": 2, "max_epochs": 4}
        run = quiet(lambda: fit(tmp_path, min_key="val_loss", trainer=options))
        assert run.callback.best_model_score == pytest.approx(1 / 17)

    def test_metrics_of_the_training_epoch_are_waited_for(self, tmp_path):
        """Validations within the epoch come before they are known, by whoever they are logged."""
        options = {"val_check_interval": 0.5, "max_epochs": 2}
        for name in ("epoch_only", "train_end", "callback_train"):
            callbacks = [LogsToo()]
            quiet(
                lambda name=name, callbacks=callbacks: fit(
                    tmp_path / name,
                    module=Everywhere(),
                    callbacks=callbacks,
                    trainer=options,
                    min_key=name,
                    keep=[Where(f"{name} < 0")],
                )
            )

    def test_a_metric_of_some_epochs_is_known_once_it_was_logged(self, tmp_path):
        """Those between are no candidates."""
        options = {"min_key": "wer", "trainer": {"max_epochs": 5}}
        run = quiet(lambda: fit(tmp_path, module=Rarely({0, 3}), **options))
        assert run.callback.best_model_score == 4

    def test_a_metric_that_the_code_has_and_no_epoch_yet_is_said_and_waited_for(self, tmp_path):
        """The first epochs may be without it."""
        with pytest.warns(UserWarning, match="'wer', which nothing has logged so far"):
            run = fit(tmp_path, module=Rarely({1, 2}), min_key="wer")
        assert run.callback.best_model_score == 8

    def test_a_restart_knows_what_was_logged_before(self, tmp_path):
        """The epochs after it may be without."""
        options = {"module": Rarely({0}), "min_key": "wer"}
        fit(tmp_path, trainer={"max_epochs": 2}, **options)
        run = quiet(lambda: fit(tmp_path, trainer={"max_epochs": 4}, **options))
        assert run.callback.best_model_score == 4

    def test_a_key_of_the_users_own_meta_is_one(self, tmp_path):
        """It need not be logged."""
        meta = {"meta": lambda trainer, module: {"own": float(module.steps)}}
        run = quiet(lambda: fit(tmp_path, min_key="own", **meta))
        assert run.callback.best_model_score == 4

    def test_a_preempted_first_save_ends_as_it_would(self, tmp_path):
        """By its exit code."""
        kick = At("on_train_batch_end", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit) as ended:
            quiet(lambda: fit(tmp_path, min_key="val_los", preemption=True, callbacks=[kick]))
        assert ended.value.code == 75

    def test_the_exception_of_the_user_is_what_is_seen(self, tmp_path):
        """Not one about keys."""
        fails = raise_at("on_validation_end", 1, RuntimeError("mine"))
        with pytest.raises(RuntimeError, match="mine"):
            quiet(lambda: fit(tmp_path, min_key="val_los", callbacks=[fails]))


SOON = {"every_n_train_steps": 1}


class TestRulesAndPredicates:
    """One that asks for what nobody has is never true: that is said once."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"keep": [Where("val/los < 100")]}, r"rule Where.*asks for 'los', 'val'"),
            ({"keep": [Best("val_los")]}, r"Best.*'val_los'.*Did you mean 'val_loss'"),
            ({"keep": [Pareto("val_loss", "size")]}, r"Pareto.*asks for 'size'"),
            ({"ckpt_predicate": "val_los < 100"}, r"ckpt_predicate='val_los < 100' asks"),
            ({"importance_key": lambda ckpt: ckpt.meta["val_los"]}, r"importance_key asks"),
        ],
    )
    def test_it_is_said_at_the_first_save(self, tmp_path, options, said):
        """And the run goes on."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = fit(tmp_path, trainer={"max_epochs": 3}, **options)
        assert run.trainer.global_step == 12
        about = [str(one.message) for one in told if "nothing has logged" in str(one.message)]
        assert len(about) == 1
        assert re.search(said, about[0])

    def test_a_slash_is_read_as_a_division(self, tmp_path):
        """The message has the name that is meant."""

        class Slash(Steps):
            def validation_step(self, batch, batch_idx):
                self.log("val/loss", 1.0)

        with pytest.warns(UserWarning, match=r"'loss', 'val'.*Did you mean 'val/loss'\?"):
            fit(tmp_path, module=Slash(), keep=[Where("val/loss < 100")])

    def test_what_every_checkpoint_has_and_what_is_added_later_is_no_such_key(self, tmp_path):
        """As `epoch`, or `pinned`."""
        quiet(
            lambda: fit(
                tmp_path,
                keep=["EveryNEpochs(2)", "EveryNSteps(4)", "Milestones([4])", Where("pinned")],
                ckpt_predicate="epoch > 0",
            )
        )

    def test_a_key_is_asked_for_once(self):
        """The rule that min_key makes is no second one."""
        options = SBCheckpoint("run", min_key="val_loss", keep=[Where("a > 1")])._options
        wanted = WantedKeys(options.best_by, options.rules, options.predicate)
        assert wanted.named == {"val_loss", "a"}
        assert len(wanted._open) == 2
