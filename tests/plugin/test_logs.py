"""One unbroken log: after any kills loggers hold what one run would have written."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from _logged import KINDS, Module, fit, held, lives, logger_of, schedule
from _processes import context
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger

from lightning_sbckpt import Checkpointer, SavePolicy, SBCheckpoint
from lightning_sbckpt.errors import SBCheckpointError

NEEDS = {"csv": "csv", "tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return what a logger holds of a run that nothing has stopped."""
    known = {}

    def of(kind):
        pytest.importorskip(NEEDS[kind])
        if kind not in known:
            folder = tmp_path_factory.mktemp("unbroken") / kind
            assert lives(folder, [kind], []) == 0
            known[kind] = held(kind, folder)
            assert known[kind]
        return known[kind]

    return of


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_logs_what_an_unbroken_run_logs(tmp_path, unbroken, kind):
    """Killed within an epoch, within the next after a save, and where an epoch ends."""
    expected = unbroken(kind)
    assert lives(tmp_path / kind, [kind], [(23, 0), (40, 0), (33, 0)]) == 3
    assert held(kind, tmp_path / kind) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(50))
def test_random_kills_leave_an_unbroken_log(tmp_path, unbroken, kind, seed):
    """Up to four kills, in hooks and at any time after them."""
    expected = unbroken(kind)
    lives(tmp_path / kind, [kind], schedule(seed))
    assert held(kind, tmp_path / kind) == expected


class Stop(pl.Callback):
    """Ends a start at a step by an exception, as a kill would."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise StoppedError


class StoppedError(Exception):
    """What ends a start."""


def stopped(folder, kinds, at, **options):
    """Run the script until a step."""
    with pytest.raises(StoppedError):
        fit(folder, kinds, [Stop(at)], **options)


LOCAL = ["csv", "tensorboard"]


class Late(Module):
    """Logs something from the middle of the run on."""

    def training_step(self, batch, index):
        if self.global_step > 25:
            self.log("late", float(index))
        return super().training_step(batch, index)


class OwnAxis(Module):
    """Logs over epochs."""

    def training_step(self, batch, index):
        self.log("step", float(self.current_epoch))
        return super().training_step(batch, index)


class Evaluated(Module):
    """Can be tested."""

    def test_step(self, batch, index):
        self.log("tested", self.layer(batch).mean())


class Wide(Module):
    """Another experiment."""

    def __init__(self):
        super().__init__(width=8)
        self.more = torch.nn.Linear(3, 3)


class Own(Logger):
    """A logger of a user's own."""

    name = version = "own"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *_, **__):
        pass


def made(folder, kind):
    """Return a Trainer of the same script that has not fitted yet, and how it fits."""
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=logger_of(kind, folder),
        callbacks=[LearningRateMonitor(), SBCheckpoint(folder / "run", every_n_train_steps=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    pl.seed_everything(1, verbose=False)
    data = torch.randn(40, 8)
    loaders = [torch.utils.data.DataLoader(data, batch_size=4, shuffle=s) for s in (True, False)]
    return trainer, lambda: trainer.fit(Module(), *loaders)


@contextmanager
def held_by_another(folder):
    """Have another process write to a folder."""
    ready, over = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder, ready, over))
    process.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        over.set()
        process.join(60)


def _hold(folder, ready, over):
    checkpointer = Checkpointer(folder)
    checkpointer.claim()
    ready.set()
    over.wait(120)
    checkpointer.close()


def two_ranks(folder, kind, at):
    """Run the script on two ranks, until a step."""
    process = context.Process(target=_two_ranks, args=(folder, kind, at))
    process.start()
    process.join(180)
    assert process.exitcode == (0 if at < 0 else 1)


def _two_ranks(folder, kind, at):
    fit(folder, [kind], [Stop(at)], devices=2, strategy="ddp_spawn")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what the two local loggers hold of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder / "csv", ["csv"])
    fit(folder / "tensorboard", ["tensorboard"])
    return {kind: held(kind, folder / kind) for kind in LOCAL}


@pytest.mark.parametrize("kind", LOCAL)
class TestSameRun:
    """A restart by the same command, with new objects, whatever the script does beside it."""

    def test_columns_that_came_after_the_checkpoint_come_again(self, tmp_path, kind):
        """A metric that is first logged after the checkpoint is not known to the log cut there."""
        for folder, stops in ((tmp_path / "a", []), (tmp_path / "b", [27])):
            for at in stops:
                stopped(folder, [kind], at, module=Late)
            fit(folder, [kind], module=Late)
        assert held(kind, tmp_path / "a") == held(kind, tmp_path / "b")

    @pytest.mark.sample(1)
    def test_steps_of_another_axis_are_cut_where_they_were(self, tmp_path, kind):
        """`self.log("step", ...)` sets an axis of the user's own."""
        fit(tmp_path / "a", [kind], module=OwnAxis)
        stopped(tmp_path / "b", [kind], 17, module=OwnAxis)
        fit(tmp_path / "b", [kind], module=OwnAxis)
        assert held(kind, tmp_path / "a") == held(kind, tmp_path / "b")

    @pytest.mark.sample(1)
    def test_saves_in_the_background_note_their_own_moment(self, tmp_path, whole, kind):
        """What was logged while a checkpoint was written is not part of it."""
        stopped(tmp_path, [kind], 18, save_mode="async")
        fit(tmp_path, [kind], save_mode="async")
        assert held(kind, tmp_path) == whole[kind]

    @pytest.mark.sample(1)
    def test_hyperparameters_logged_between_trainer_and_fit(self, tmp_path, whole, kind):
        """Templates do so; the logger is open by then, in the run's own folder."""
        stopped(tmp_path, [kind], 18)
        trainer, fits = made(tmp_path, kind)
        trainer.logger.log_hyperparams({"width": 8})
        fits()
        assert [*held(kind, tmp_path)] == ["version_0"]
        if kind == "csv":
            assert held(kind, tmp_path) == whole[kind]

    @pytest.mark.sample(1)
    def test_folder_is_known_before_the_fit(self, tmp_path, kind):
        """A script that prints where its logs are prints where they will be."""
        stopped(tmp_path, [kind], 18)
        trainer, _ = made(tmp_path, kind)
        assert trainer.log_dir.endswith("version_0")

    def test_complete_run_that_is_started_again_logs_nothing(self, tmp_path, whole, kind):
        """Nor does it begin another folder."""
        fit(tmp_path, [kind])
        fit(tmp_path, [kind])
        assert held(kind, tmp_path) == whole[kind]

    def test_second_fit_of_one_process_keeps_what_came_between(self, tmp_path, kind):
        """The rows of a test between two fits stay: nothing was trained that is trained again."""
        trainer = fit(tmp_path, [kind], epochs=1, module=Evaluated)
        trainer.test(
            trainer.lightning_module, torch.utils.data.DataLoader(torch.ones(4, 8)), verbose=False
        )
        before = held(kind, tmp_path)["version_0"][0]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(
            trainer.lightning_module, torch.utils.data.DataLoader(torch.randn(40, 8), batch_size=4)
        )
        after = held(kind, tmp_path)["version_0"][0]
        assert "tested" in (after[0] if kind == "csv" else after)
        assert len(after) >= len(before)

    @pytest.mark.sample(1)
    def test_saves_are_logged_if_that_is_wanted(self, tmp_path, kind):
        """Their seconds and bytes, at their steps."""
        fit(tmp_path, [kind], epochs=1, save_mode=SavePolicy(log_saves=True))
        log = held(kind, tmp_path)["version_0"][0]
        if kind == "csv":
            header, *lines = log
            named = [dict(zip(header, line, strict=True)) for line in lines]
            saved = [row for row in named if row["checkpoint/bytes"]]
            assert [row["step"] for row in saved] == ["4", "8", "10"]
            assert all(row["checkpoint/name"].startswith("CKPT+") for row in saved)
            assert all(float(row["checkpoint/seconds"]) > 0 for row in saved)
        else:
            assert [step for step, _ in log["checkpoint/bytes"]] == [4, 8, 10]

    def test_run_that_is_killed_before_its_first_checkpoint(self, tmp_path, whole, kind):
        """It begins anew, and so does its log, in the same place."""
        stopped(tmp_path, [kind], 3)
        stopped(tmp_path, [kind], 2)
        fit(tmp_path, [kind])
        assert held(kind, tmp_path) == whole[kind]

    @pytest.mark.sample(1)
    def test_deleted_checkpoints_take_no_log_with_them(self, tmp_path, whole, kind):
        """A run without any begins anew, beside the log of the one that had some."""
        fit(tmp_path, [kind])
        shutil.rmtree(tmp_path / "run")
        fit(tmp_path, [kind])
        assert held(kind, tmp_path)["version_0"] == whole[kind]["version_0"]
        assert len(held(kind, tmp_path)) == 2

    @pytest.mark.long
    def test_two_ranks(self, tmp_path, kind):
        """Rank zero logs; the others know the same folder."""
        folders = tmp_path / "a", tmp_path / "b"
        for folder, stops in zip(folders, ([], [7]), strict=True):
            for at in [*stops, -1]:
                two_ranks(folder, kind, at)
        assert held(kind, folders[0]) == held(kind, folders[1])


@pytest.mark.parametrize("kind", LOCAL)
class TestOtherRun:
    """What is no restart of the run leaves its log as it is."""

    def test_evaluation_process_logs_elsewhere(self, tmp_path, whole, kind):
        """A script that tests the best checkpoint adds nothing to the run."""
        fit(tmp_path, [kind], module=Evaluated)
        before = held(kind, tmp_path)
        trainer, _ = made(tmp_path, kind)
        data = torch.utils.data.DataLoader(torch.ones(4, 8))
        trainer.test(Evaluated(), data, ckpt_path="best", verbose=False)
        after = held(kind, tmp_path)
        assert after.pop("version_1")
        assert after == before

    def test_older_checkpoint_given_begins_a_run_of_its_own(self, tmp_path, kind, caplog):
        """A branch: the newer rows stay, and it is said."""
        fit(tmp_path, [kind], num_to_keep=9)
        before = held(kind, tmp_path)
        older = min((tmp_path / "run").glob("CKPT+*"))
        with caplog.at_level("INFO"):
            fit(tmp_path, [kind], num_to_keep=9, ckpt_path=older)
        assert "a run of their own" in caplog.text
        after = held(kind, tmp_path)
        assert after.pop("version_1")
        assert after == before

    @pytest.mark.sample(1)
    def test_restarted_experiment_begins_a_run_of_its_own(self, tmp_path, kind):
        """`on_change="restart"` begins anew beside the older checkpoints, and beside their log."""
        fit(tmp_path, [kind])
        before = held(kind, tmp_path)
        fit(tmp_path, [kind], module=Wide, on_change="restart")
        after = held(kind, tmp_path)
        assert after.pop("version_1")
        assert after == before

    def test_copy_of_a_folder_begins_a_log_of_its_own(self, tmp_path, kind):
        """The run that was copied goes on, or may; one that was moved has its own log."""
        fit(tmp_path, [kind])
        before = held(kind, tmp_path)
        shutil.copytree(tmp_path / "run", tmp_path / "copied")
        fit(tmp_path, [kind], epochs=4, where=tmp_path / "copied")
        after = held(kind, tmp_path)
        assert after.pop("version_1")
        assert after == before
        (tmp_path / "run").rename(tmp_path / "moved")
        fit(tmp_path, [kind], epochs=4, where=tmp_path / "moved")
        assert [*held(kind, tmp_path)] == ["version_0", "version_1"]
        assert held(kind, tmp_path)["version_0"] != before["version_0"]

    def test_folder_in_use_keeps_its_log(self, tmp_path, kind):
        """Who only reads the checkpoints of a run that another process writes leaves its log alone."""
        fit(tmp_path, [kind])
        before = held(kind, tmp_path)
        with held_by_another(tmp_path / "run"):
            fit(tmp_path, [kind], epochs=4, when_in_use="read")
        after = held(kind, tmp_path)
        assert after.pop("version_1")
        assert after == before
        assert not (tmp_path / "run" / ".loggers.yaml").exists()

    @pytest.mark.sample(1)
    def test_version_of_the_users_own_stays(self, tmp_path, kind):
        """Whoever names another version wants another log."""
        stopped(tmp_path, [kind], 18)
        with pytest.warns(UserWarning, match="it is given version='mine'"):
            fit(tmp_path, [logger_of(kind, tmp_path, version="mine")])
        assert [*held(kind, tmp_path)] == ["mine", "version_0"]

    def test_logger_that_was_opened_before_the_trainer_is_named(self, tmp_path, kind):
        """With what to write."""
        stopped(tmp_path, [kind], 18)
        logger = logger_of(kind, tmp_path)
        logger.log_metrics({"early": 1.0}, 0)
        with pytest.warns(UserWarning, match="give it version=0"):
            fit(tmp_path, [logger])

    @pytest.mark.sample(4)
    @pytest.mark.parametrize(
        "wrong",
        [
            "version: ../../elsewhere",
            "version: [1]",
            "version: -1",
            "mark: other",
            "name: other",
            "size: 3",
        ],
    )
    def test_changed_note_changes_no_other_file(self, tmp_path, kind, wrong):
        """A folder's words choose no place, and cut only what begins with what had been logged."""
        fit(tmp_path, [kind], every_n_epochs=None)
        outside = tmp_path / "elsewhere"
        outside.mkdir()
        (outside / "metrics.csv").write_text("mine")
        key = wrong.partition(":")[0]
        for note in (tmp_path / "run").glob("CKPT+*/loggers.yaml"):
            text = note.read_text()
            assert f"{key}: " in text
            note.write_text(re.sub(rf"\b{key}: .*", wrong, text))
        logs = {
            path: path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file()
        }
        with suppress(SBCheckpointError):
            fit(tmp_path, [kind], epochs=4)
        assert (outside / "metrics.csv").read_text() == "mine"
        assert all(path.read_bytes()[: len(data)] == data for path, data in logs.items())


def test_logger_of_an_unknown_kind_is_named_once(tmp_path):
    """It is left alone."""
    with pytest.warns(UserWarning, match="Own is a logger whose log can't be joined") as said:
        fit(tmp_path, [Own()], epochs=1)
    assert sum("can't be joined" in str(each.message) for each in said) == 1


def test_two_loggers_and_none(tmp_path, whole):
    """Each goes on in its own; without any there is nothing to note."""
    stopped(tmp_path / "a", LOCAL, 18)
    fit(tmp_path / "a", LOCAL)
    versions = sorted(path.name for path in (tmp_path / "a" / "logs" / "lightning_logs").iterdir())
    assert versions == ["version_0", "version_1"]
    fit(tmp_path / "b", [], monitor=False)
    assert not [*(tmp_path / "b" / "run").glob("CKPT+*/loggers.yaml")]


@pytest.mark.long
@pytest.mark.parametrize("log_model", [True, "all", False])
def test_checkpoints_reach_mlflow(tmp_path, log_model):
    """As artifacts with what is known of them, or by their paths."""
    pytest.importorskip("mlflow")
    logger = logger_of(
        "mlflow", tmp_path, log_model=log_model, artifact_location=str(tmp_path / "a")
    )
    trainer = fit(tmp_path, [logger], epochs=2)
    callback = trainer.checkpoint_callback
    client, run = logger.experiment, logger.run_id
    names = {each.path for each in client.list_artifacts(run)}
    if not log_model:
        assert names == set()
        assert client.get_run(run).data.tags["checkpoint/last"] == callback.last_model_path
        return
    last = Path(callback.last_model_path).name
    assert last in names
    assert len(names) == 1 if log_model is True else len(names) > 3
    files = {each.path for each in client.list_artifacts(run, last)}
    assert {f"{last}/CKPT.yaml", f"{last}/model.ckpt", f"{last}/metadata.yaml"} <= files
