"""A run that is started again goes on by itself, says so, and restores everything."""

from __future__ import annotations

import logging
import os
import shutil
import signal

import lightning as L
import pytest
import torch
from _foreign import forget_manifest
from _releases import needs_lightning
from _runs import (
    At,
    Steps,
    by_epoch,
    damage,
    die_at,
    fit,
    go,
    kill,
    loader,
    make,
    newest,
    raise_at,
    saved,
    steps_saved,
)
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning_utilities.core import rank_zero
from torch import nn

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import DamagedCheckpointError
from lightning_sbckpt.plugin.state import exact

ALL = {"num_to_keep": 99}


@pytest.fixture
def lines(caplog):
    """A function that returns what we have told through Lightning's logger."""
    caplog.set_level(logging.INFO)

    def told() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [text for text in messages if text.startswith("SBCheckpoint")]

    return told


def die_in_second_epoch(dirpath, hook, count):
    """Fit in a process of its own, and die."""
    fit(dirpath, callbacks=[die_at(hook, count)], every_n_train_steps=2, **ALL)


class TestByItself:
    """Without ckpt_path: the same command again."""

    def test_a_killed_run_goes_on_from_its_newest_checkpoint(self, tmp_path, lines):
        """One line says from which, saved when, at which step; no step is taken twice."""
        kill(die_in_second_epoch, tmp_path, "on_train_batch_end", 8)
        assert steps_saved(tmp_path) == [2, 4, 6]
        path = newest(tmp_path).path
        taken = At("on_train_batch_end", 0, lambda: None)
        run = fit(tmp_path, callbacks=[taken], **ALL)
        first, *_ = lines()
        assert first.startswith(f"SBCheckpoint: resuming from {path}, saved 20")
        assert first.endswith(" within epoch 1, at global step 6")
        assert (run.module.steps, taken.calls) == (12, 6)

    def test_a_kill_within_a_save_leaves_the_one_before(self, tmp_path):
        """What was being written is not seen, and is swept at the next start."""
        kill(die_while_saving, tmp_path)
        assert any(path.name.startswith(".staging") for path in tmp_path.iterdir())
        assert steps_saved(tmp_path) == [4]
        run = fit(tmp_path, recoverables={"number": Number()}, **ALL)
        assert run.module.steps == 12
        left = {path.name for path in tmp_path.iterdir()} - {"HISTORY.jsonl"}
        assert all(name.startswith("CKPT+") for name in left)

    def test_a_run_killed_three_times_is_one_run(self, tmp_path):
        """Each goes on from the one before, and the best of all is restored."""
        fit(tmp_path, trainer={"max_epochs": 1}, module=Steps(by_epoch(0.1)), min_key="val_loss")
        for count in (2, 6):
            with pytest.raises(RuntimeError):
                fit(
                    tmp_path,
                    callbacks=[raise_at("on_train_batch_end", count, RuntimeError())],
                    every_n_train_steps=1,
                    min_key="val_loss",
                )
        run = fit(tmp_path, min_key="val_loss", module=Steps(by_epoch(0.1, 0.5, 0.6)))
        assert run.module.steps == 4
        assert run.callback.best_model_score == pytest.approx(0.1)

    def test_the_first_start_says_that_it_begins_anew(self, tmp_path, lines):
        """And there is no report."""
        run = fit(tmp_path)
        assert lines()[0] == f"SBCheckpoint: no checkpoint in {tmp_path}, the run begins anew"
        assert run.callback.resume_report is None

    def test_a_finished_run_trains_nothing_more(self, tmp_path, tree_bytes):
        """Started again, it restores the best and leaves the folder as it is."""
        losses = by_epoch(0.5, 0.25, 0.75)
        fit(tmp_path, module=Steps(losses), min_key="val_loss")
        before = tree_bytes(tmp_path)
        taken = At("on_train_batch_start", 0, lambda: None)
        run = fit(tmp_path, module=Steps(losses), min_key="val_loss", callbacks=[taken])
        assert (taken.calls, run.module.steps) == (0, 8)
        assert tree_bytes(tmp_path) == before

    @pytest.mark.parametrize("val", [True, False])
    @pytest.mark.parametrize(
        ("first", "second"),
        [({"max_epochs": 2}, {"max_epochs": 3}), ({"max_steps": 6}, {"max_steps": 12})],
    )
    def test_a_finished_run_with_a_higher_limit_goes_on(self, tmp_path, val, first, second):
        """Also from within the epoch that max_steps cut short."""
        fit(tmp_path, val=val, trainer=first, **ALL)
        run = fit(tmp_path, val=val, trainer=second, **ALL)
        assert (run.module.steps, run.trainer.global_step) == (12, 12)
        assert steps_saved(tmp_path) == ([4, 8, 12] if "max_epochs" in first else [4, 6, 8, 12])

    def test_nothing_is_saved_twice_over_a_restart(self, tmp_path):
        """Killed after the save at the end of an epoch: that epoch is not saved again."""
        with pytest.raises(RuntimeError):
            fit(tmp_path, callbacks=[raise_at("on_train_epoch_start", 2, RuntimeError())], **ALL)
        assert steps_saved(tmp_path) == [4]
        fit(tmp_path, **ALL)
        assert steps_saved(tmp_path) == [4, 8, 12]

    def test_steps_between_saves_count_on_over_a_restart(self, tmp_path):
        """Every fifth step of the run, not of the process."""
        options = {"every_n_epochs": None, "every_n_train_steps": 5, **ALL}
        with pytest.raises(RuntimeError):
            fit(tmp_path, callbacks=[raise_at("on_train_batch_end", 7, RuntimeError())], **options)
        fit(tmp_path, **options)
        assert steps_saved(tmp_path) == [5, 10, 12]


class TestWhichCheckpoint:
    """The newest sound one of a fit, unless the user says otherwise."""

    def test_a_damaged_newest_is_stepped_over(self, tmp_path, caplog):
        """With a line that names it and what is wrong with it."""
        fit(tmp_path, trainer={"max_epochs": 2}, **ALL)
        broken = newest(tmp_path)
        damage(broken)
        run = fit(tmp_path, **ALL)
        said = [r.getMessage() for r in caplog.records if "skipped a damaged" in r.getMessage()]
        assert len(said) == 1
        assert broken.path.name in said[0] and "model.ckpt" in said[0]
        assert run.callback.resume_report.meta["global_step"] == 4
        assert run.module.steps == 12

    def test_if_all_are_damaged_nothing_is_trained(self, tmp_path):
        """To begin anew without a word would be worse; the message says how to."""
        fit(tmp_path, trainer={"max_epochs": 2}, **ALL)
        for ckpt in saved(tmp_path):
            damage(ckpt)
        run = make(tmp_path)
        with pytest.raises(DamagedCheckpointError, match="another folder"):
            go(run)
        assert run.module.steps == 0

    def test_a_folder_that_no_fit_has_written_is_no_place_to_go_on(self, tmp_path, lines):
        """Not one of the core in the same place, though it is the newest and has a model."""
        fit(tmp_path, trainer={"max_epochs": 1})
        core = Checkpointer(tmp_path, {"model": Steps()})
        core.save_checkpoint(meta={"global_step": 100}, name="speechbrain")
        run = fit(tmp_path)
        assert run.callback.resume_report.meta["global_step"] == 4
        assert run.module.steps == 12

    def test_only_such_folders_mean_a_new_run(self, tmp_path, lines):
        """And they stay."""
        core = Checkpointer(tmp_path, {"model": Steps()})
        core.save_checkpoint(name="speechbrain")
        run = fit(tmp_path)
        assert "begins anew" in lines()[0]
        assert run.module.steps == 12
        assert (tmp_path / "CKPT+speechbrain").is_dir()

    def test_resume_false_begins_anew(self, tmp_path, lines, tree_bytes):
        """The checkpoints of the other run stay, and the newer run is the one to resume."""
        fit(tmp_path, **ALL)
        before = tree_bytes(tmp_path)
        # It only grows.
        assert before.pop("HISTORY.jsonl")
        run = fit(tmp_path, resume=False, trainer={"max_epochs": 1})
        assert run.module.steps == 4
        assert run.callback.resume_report is None
        after = tree_bytes(tmp_path)
        assert {name: after.get(name) for name in before} == before
        assert fit(tmp_path).callback.resume_report.meta["global_step"] == 4

    def test_a_folder_given_as_ckpt_path_wins(self, tmp_path, lines):
        """And says so."""
        fit(tmp_path, trainer={"max_epochs": 2}, **ALL)
        oldest = saved(tmp_path)[0].path
        run = fit(tmp_path, ckpt_path=oldest, **ALL)
        told = lines()
        assert any(
            text.startswith("SBCheckpoint: ckpt_path=") and "is not searched" in text
            for text in told
        )
        assert any(f"resuming from {oldest}," in text for text in told)
        assert run.callback.resume_report.meta["global_step"] == 4
        assert run.module.steps == 12

    def test_a_folder_of_another_place_can_be_given(self, tmp_path):
        """A run that was moved or copied goes on where it now is."""
        fit(tmp_path / "a", trainer={"max_epochs": 2})
        shutil.move(tmp_path / "a", tmp_path / "b")
        given = newest(tmp_path / "b").path
        run = fit(tmp_path / "c", ckpt_path=str(given))
        assert run.module.steps == 12
        assert steps_saved(tmp_path / "b") == [8]
        assert steps_saved(tmp_path / "c") == [12]

    def test_a_file_of_lightning_given_as_ckpt_path_wins(self, tmp_path, lines):
        """The report says that it holds less than a folder."""
        fit(tmp_path / "folders", trainer={"max_epochs": 1})
        run = fit(tmp_path / "other", trainer={"max_epochs": 2})
        run.trainer.save_checkpoint(tmp_path / "lightning.ckpt")
        again = fit(tmp_path / "folders", ckpt_path=tmp_path / "lightning.ckpt")
        assert any("is not searched" in text for text in lines())
        assert again.module.steps == 12
        (note,) = again.callback.resume_report.notes
        assert note.startswith("lightning.ckpt is a file of Lightning's own")

    def test_a_ckpt_path_that_does_not_exist_raises(self, tmp_path):
        """As without us; nothing else is resumed in its stead."""
        fit(tmp_path, trainer={"max_epochs": 1})
        run = make(tmp_path)
        with pytest.raises(FileNotFoundError):
            go(run, ckpt_path=tmp_path / "CKPT+none")
        assert run.module.steps == 0


class Number:
    """A recoverable with a number."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Deadly(Number):
    """A recoverable in whose second save the process dies."""

    def state_dict(self):
        self.number += 1
        if self.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict()


def die_while_saving(dirpath):
    """Fit in a process of its own, and die when a checkpoint is half written."""
    fit(dirpath, recoverables={"number": Deadly()}, **ALL)


class Scheduled(Steps):
    """Two optimizers with momentum, stepped by hand, and two schedulers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.ones(2))

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.weight.sum() + self.other.pow(2).sum())
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self):
        first = torch.optim.SGD([self.weight], lr=1.0, momentum=0.5)
        second = torch.optim.Adam([self.other], lr=0.1)
        schedule = torch.optim.lr_scheduler
        return [first, second], [
            schedule.StepLR(first, 3),
            schedule.CyclicLR(second, 0.01, 0.1, 3, cycle_momentum=False),
        ]


class Data(L.LightningDataModule):
    """A datamodule with a state."""

    def __init__(self):
        super().__init__()
        self.served = 0

    def train_dataloader(self):
        self.served += 1
        return loader()

    def val_dataloader(self):
        return loader(1)

    def state_dict(self):
        return {"served": self.served}

    def load_state_dict(self, state):
        self.served = state["served"]


class TestWhatComesBack:
    """Whatever has a state, when Lightning itself would restore it."""

    def test_two_optimizers_and_schedulers(self, tmp_path):
        """The states with which the second process goes on are those the first ended with."""
        trainer = {"max_epochs": 1}
        first = fit(tmp_path, module=Scheduled(), trainer=trainer)
        expected = states(first.trainer)
        second = make(tmp_path, module=Scheduled(), trainer={"max_epochs": 2})
        found = []
        second.trainer.callbacks.insert(
            0, At("on_train_batch_start", 1, lambda: found.append(states(second.trainer)))
        )
        go(second)
        assert found == [expected]
        assert second.trainer.global_step == 16

    def test_early_stopping(self, tmp_path):
        """Its patience goes on: two bad epochs before the restart and one after make three."""
        losses = by_epoch(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

        def run(max_epochs):
            return fit(
                tmp_path,
                module=Steps(losses),
                callbacks=[EarlyStopping("val_loss", patience=3)],
                trainer={"max_epochs": max_epochs},
                restore_best=False,
            )

        run(3)
        assert run(6).module.steps == 16

    def test_finetuning(self, tmp_path):
        """Parameter groups that BaseFinetuning added are there before the optimizer's state."""
        kwargs = {"module": Frozen(), "callbacks": [Unfreeze()]}
        fit(tmp_path, trainer={"max_epochs": 2}, **kwargs)
        run = fit(tmp_path, module=Frozen(), callbacks=[Unfreeze()])
        groups = run.trainer.optimizers[0].param_groups
        assert [group["lr"] for group in groups] == [1.0, 0.25]
        assert run.module.steps == 12
        assert run.module.part.weight.item() == pytest.approx(-0.25 * 8)

    @needs_lightning("2.6", "WeightAveraging")
    def test_weight_averaging(self, tmp_path):
        """The average goes on, and so do the weights that are averaged."""
        from lightning.pytorch.callbacks import WeightAveraging

        def run(dirpath, max_epochs):
            averaging = WeightAveraging(avg_fn=lambda avg, new, n: avg + (new - avg) / (n + 1))
            return fit(
                dirpath,
                module=Steps(),
                callbacks=[averaging],
                trainer={"max_epochs": max_epochs},
                restore_best=False,
            )

        through = run(tmp_path / "a", 3).module.weight.item()
        run(tmp_path / "b", 2)
        assert run(tmp_path / "b", 3).module.weight.item() == pytest.approx(through)
        assert through != -12.0

    def test_a_datamodule(self, tmp_path):
        """Its state_dict, before its loaders are made."""
        fit(tmp_path, data=Data(), trainer={"max_epochs": 1})
        data = Data()
        fit(tmp_path, data=data)
        assert data.served == 2

    def test_a_module_made_in_configure_model(self, tmp_path):
        """Its parameters exist only after setup."""

        class Late(Steps):
            def configure_model(self):
                if not hasattr(self, "late"):
                    self.late = nn.Linear(2, 2)

        first = fit(tmp_path, module=Late(), trainer={"max_epochs": 1}).module
        second = fit(tmp_path, module=Late(), trainer={"max_epochs": 2}).module
        assert torch.equal(first.late.weight, second.late.weight)
        assert second.steps == 8


def states(trainer):
    """Return the states of optimizers and schedulers as something to compare."""
    owners = [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
    return [str(owner.state_dict()) for owner in owners]


class Frozen(Steps):
    """Has a part that is trained later, at a rate of its own."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.part.weight)

    def training_step(self, batch, batch_idx):
        return self.weight.sum() + self.part.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


class Unfreeze(BaseFinetuning):
    """Trains the part from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.part)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.part, optimizer, lr=0.25)


class TestReport:
    """What was restored, skipped and missing, by name."""

    def test_one_line_says_that_it_resumes_and_one_that_it_ended(self, tmp_path, lines, caplog):
        """In the middle of an epoch, too; what was restored is told where somebody debugs."""
        options = {"min_key": "val_loss", "every_n_train_steps": 2, **ALL}
        with pytest.raises(RuntimeError):
            fit(tmp_path, callbacks=[raise_at("on_train_batch_end", 7, RuntimeError())], **options)
        (begun,) = lines()
        assert begun == f"SBCheckpoint: no checkpoint in {tmp_path}, the run begins anew"
        caplog.set_level(logging.DEBUG, rank_zero.log.name)  # Of the package imported last.
        run = fit(tmp_path, **options)
        assert run.callback.resume_report.data
        resumed, details, ended = lines()
        assert resumed == f"SBCheckpoint: {run.callback.resume_report.headline()}"
        assert details.startswith("SBCheckpoint: resumed\n  restored: ")
        assert ended.startswith("SBCheckpoint: restored the best weights, lowest val_loss (")

    def test_it_names_what_was_restored(self, tmp_path, lines):
        """In the callback's attribute; what is lacking in the log, too."""
        fit(tmp_path, data=Data(), trainer={"max_epochs": 1})
        run = fit(tmp_path, data=Data())
        report = run.callback.resume_report
        assert {"model", "optimizer", "loops", "rng", "loaders", "datamodule"} <= {*report.restored}
        assert (report.skipped, report.missing) == ([], [])
        told = report.details()
        assert "restored: " in told and "skipped:  nothing" in told and "missing:  nothing" in told
        assert not [text for text in lines() if text.startswith("SBCheckpoint: resumed")]
        assert str(report).startswith(f"resuming from {report.checkpoint}, saved ")

    def test_it_names_callbacks_that_are_gone_or_new(self, tmp_path, lines):
        """One whose state finds no owner is skipped, one that finds no state is missing."""
        fit(tmp_path, callbacks=[EarlyStopping("val_loss")], trainer={"max_epochs": 1})
        run = fit(tmp_path, callbacks=[EarlyStopping("train_loss")])
        report = run.callback.resume_report
        (skipped,) = report.skipped
        (missing,) = report.missing
        assert skipped.startswith("callbacks: EarlyStopping{'monitor': 'val_loss'")
        assert skipped.endswith("(not among this Trainer's callbacks)")
        assert missing.startswith("callbacks: EarlyStopping{'monitor': 'train_loss'")
        (said,) = [text for text in lines() if text.startswith("SBCheckpoint: resumed")]
        assert said == f"SBCheckpoint: resumed; skipped: {skipped}; missing: {missing}"

    def test_it_names_an_optional_recoverable_that_is_missing(self, tmp_path):
        """It stays as it is."""
        fit(tmp_path, trainer={"max_epochs": 1})
        extra = nn.Linear(1, 1)
        with pytest.warns(UserWarning, match="no file for 'extra', which stays as it is"):
            run = fit(tmp_path, recoverables={"extra": extra}, optional=["extra"])
        assert run.callback.resume_report.missing == ["extra"]
        assert run.module.steps == 12

    def test_it_names_a_recoverable_that_this_run_has_no_more(self, tmp_path):
        """It is not among the restored."""
        fit(tmp_path, recoverables={"extra": nn.Linear(1, 1)}, trainer={"max_epochs": 1})
        report = fit(tmp_path).callback.resume_report
        assert "extra" not in report.restored
        assert [text.partition(" ")[0] for text in report.skipped] == ["extra"]

    def test_what_will_not_resume_exactly_is_told_at_the_first_fit_and_again_at_the_resume(
        self, tmp_path, monkeypatch
    ):
        """Not after the crash: here, a device with kernels that may be nondeterministic."""
        of_device = exact.warnings_of_device
        monkeypatch.setattr(
            exact, "warnings_of_device", lambda device: of_device(torch.device("cuda"))
        )
        once, twice = {"trainer": {"max_epochs": 1}}, {"trainer": {"max_epochs": 2}}
        with pytest.warns(UserWarning, match=r"kernels on cuda may be nondeterministic"):
            fit(tmp_path, **once)
        notes = fit(tmp_path, **twice).callback.resume_report.notes
        assert any("kernels on cuda may be nondeterministic" in note for note in notes)

    def test_another_number_of_ranks_is_named_and_the_run_goes_on(self, tmp_path):
        """Every rank has random states and a position of its own, which others can't take."""
        fit(tmp_path, trainer={"max_epochs": 1})
        path = newest(tmp_path).path / "rng.ckpt"
        state = torch.load(path, weights_only=True)
        torch.save({"ranks": state["ranks"] * 2}, path)
        forget_manifest(path.parent)
        report = fit(tmp_path, trainer={"max_epochs": 2}).callback.resume_report
        (told,) = [line for line in report.skipped if line.startswith("rng")]
        assert "saved by 2 ranks, this run has 1" in told and "not bit for bit" in told
