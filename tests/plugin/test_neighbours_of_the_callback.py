"""What lives beside the callback: other checkpoint callbacks, loggers that upload, and what comes after a fit."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from _runs import Steps, by_epoch, fit, go, loader, make, raise_at, steps_saved
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from lightning_sbckpt import SBCheckpoint


def told(action):
    """Return what an action warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in said if str(one.message).startswith("SBCheckpoint")]


class TestOtherCheckpointCallbacks:
    """A run goes on from the newest checkpoint of SBCheckpoint's, whatever files lie about."""

    def start(self, tmp_path, *callbacks, **trainer):
        """Return a start of the run beside an OnExceptionCheckpoint."""
        beside = OnExceptionCheckpoint(tmp_path / "file")
        return make(tmp_path / "run", callbacks=[*callbacks, beside], trainer=trainer)

    def test_a_file_of_an_exception_is_passed_over(self, tmp_path):
        """Also one that an earlier start has left behind."""
        run = self.start(tmp_path, raise_at("on_train_batch_end", 6, RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            go(run)
        left = (tmp_path / "file" / "on_exception.ckpt").read_bytes()
        run = self.start(tmp_path)
        said = told(lambda: go(run))
        assert [one for one in said if "OnExceptionCheckpoint has left" in one]
        assert run.callback.resume_report.meta["global_step"] == 4
        (tmp_path / "file" / "on_exception.ckpt").write_bytes(left)
        run = self.start(tmp_path, max_epochs=4)
        go(run)
        assert run.callback.resume_report.meta["global_step"] == 12
        assert run.module.steps == 16

    def test_without_a_checkpoint_the_file_is_taken(self, tmp_path):
        """The exception came before the first save."""
        with pytest.raises(RuntimeError, match="boom"):
            go(self.start(tmp_path, raise_at("on_train_batch_end", 2, RuntimeError("boom"))))
        run = self.start(tmp_path)
        go(run)
        assert run.callback.resume_report.checkpoint.endswith("on_exception.ckpt")
        assert run.trainer.state.finished

    @pytest.mark.parametrize(
        ("beside", "named"),
        [
            (lambda path: OnExceptionCheckpoint(path / "file"), "OnExceptionCheckpoint writes"),
            (lambda path: ModelCheckpoint(path / "file", save_last=True), "ModelCheckpoint writes"),
            (lambda path: ModelCheckpoint(path / "run"), "ModelCheckpoint writes"),
            (lambda path: ModelCheckpoint(path / "file"), None),
        ],
    )
    def test_they_are_told_by_name_at_the_first_fit(self, tmp_path, beside, named):
        """With where the run goes on from."""
        said = told(lambda: fit(tmp_path / "run", callbacks=[beside(tmp_path)]))
        about = [one for one in said if "goes on from" in one]
        assert len(about) == (named is not None)
        assert not about or (named in about[0] and str(tmp_path / "run") in about[0])


class TestAfterAFit:
    """`trainer.save_checkpoint` saves the best weights with the state that they had."""

    @pytest.fixture
    def run(self, tmp_path):
        """A run whose best weights are those of its first epoch."""
        return fit(
            tmp_path / "run",
            module=Momentum(by_epoch(0.25, 0.5, 0.75)),
            min_key="val_loss",
            num_to_keep=3,
        )

    @pytest.mark.parametrize("weights_only", [False, True])
    def test_step_epoch_and_optimizer_are_those_of_the_weights(self, run, tmp_path, weights_only):
        """As if it had been saved then."""
        run.trainer.save_checkpoint(tmp_path / "final.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "final.ckpt", weights_only=False)
        assert saved["global_step"] == 4
        assert saved["epoch"] == 1
        if weights_only:
            assert "optimizer_states" not in saved
            return
        buffer = saved["optimizer_states"][0]["state"][0]["momentum_buffer"]
        assert buffer == sum(0.5**n for n in range(4))
        assert saved["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 1

    def test_lightning_alone_goes_on_from_it(self, run, tmp_path):
        """To the very weights of a run that was never interrupted."""
        run.trainer.save_checkpoint(tmp_path / "final.ckpt")
        alone = L.Trainer(
            max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        alone.fit(module := Momentum(), loader(), ckpt_path=tmp_path / "final.ckpt")
        straight = fit(tmp_path / "straight", module=Momentum()).module
        assert torch.equal(module.weight, straight.weight)

    def test_a_changed_module_is_saved_as_it_is(self, run, tmp_path):
        """The user may have gone on with it."""
        with torch.no_grad():
            run.module.weight.fill_(42)
        run.trainer.save_checkpoint(tmp_path / "final.ckpt")
        assert torch.load(tmp_path / "final.ckpt", weights_only=False)["state_dict"]["weight"] == 42

    def test_it_is_said_when_the_checkpoint_is_gone(self, run, tmp_path):
        """The file is written all the same."""
        Path(run.callback.best_model_path).rename(tmp_path / "moved")
        said = told(lambda: run.trainer.save_checkpoint(tmp_path / "final.ckpt"))
        assert "this file has the best weights" in said[0]
        assert torch.load(tmp_path / "final.ckpt", weights_only=False)["global_step"] == 12

    def test_another_fit_saves_its_own(self, run, tmp_path):
        """What was best before is no part of it."""
        run.trainer.fit_loop.max_epochs = 4
        run.module.loss = lambda steps: 1.0
        go(run)
        assert steps_saved(tmp_path / "run")[-1] == 16
        assert run.callback.best_model_score == 0.25


class Momentum(Steps):
    """A module whose optimizer has a state that tells how many steps it has taken."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.5)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.trainer.global_step))


class Uploads:
    """Stands in for the client of a service."""

    def __init__(self):
        self.id, self.uploaded, self.told = "x", [], []

    def log_artifact(self, *args, aliases=()):
        self.uploaded.append((*args, *aliases))

    def log_dict(self, run, dictionary, file):
        self.told.append((file, dictionary))


class Silent:
    """What a logger does that talks to no service."""

    name = version = run_id = "x"
    save_dir = None
    _checkpoint_name = None

    def __init__(self, log_model):
        self._log_model = log_model
        self.client = Uploads()

    @property
    def experiment(self):
        return self.client

    def _nothing(self, *args, **kwargs):
        pass

    log_metrics = log_hyperparams = log_graph = save = finalize = after_save_checkpoint = _nothing


class MLFlow(Silent, MLFlowLogger):
    """Lightning's logger for MLflow, without its service."""


class Wandb(Silent, WandbLogger):
    """Lightning's logger for W&B, without its service."""


class Artifact:
    """Stands in for an artifact of W&B's."""

    def __init__(self, **options):
        self.options, self.folders = options, []

    def add_dir(self, folder):
        self.folders.append(folder)


class TestLoggersThatUpload:
    """They look for files, and checkpoints are folders: these are handed over."""

    def fit(self, tmp_path, logger):
        """Return a run whose second epoch is the best, and what was uploaded."""
        losses = Steps(by_epoch(0.5, 0.25, 0.75))
        run = fit(tmp_path / "run", module=losses, min_key="val_loss", trainer={"logger": logger})
        return run.callback, getattr(logger, "client", Uploads()).uploaded

    @pytest.mark.parametrize(("log_model", "expected"), [("all", 3), (True, 2), (False, 0)])
    def test_mlflow(self, tmp_path, log_model, expected):
        """Each, or what stays when the fit has ended."""
        callback, uploaded = self.fit(tmp_path, MLFlow(log_model))
        assert len(uploaded) == expected
        if log_model is True:
            paths = {callback.best_model_path, callback.last_model_path}
            assert {one[1] for one in uploaded} == paths

    def test_training_goes_on_while_a_checkpoint_is_uploaded(self, tmp_path):
        """And what is being uploaded stays, whatever the rules say, until it is."""

        class Slow(Uploads):
            def log_artifact(self, _, folder):
                # The last save of the fit is announced while the first is still on its way.
                assert trained.wait(60)
                assert Path(folder, "model.ckpt").exists()
                super().log_artifact(folder)

        class Last(L.Callback):
            def on_train_end(self, *_):
                trained.set()

        trained = threading.Event()
        logger = MLFlow("all")
        logger.client = Slow()
        run = fit(tmp_path / "run", callbacks=[Last()], trainer={"logger": logger})
        names = [Path(folder).name for (folder,) in logger.client.uploaded]
        assert len(names) == 3
        assert [file for file, _ in logger.client.told] == [
            f"{name}/metadata.yaml" for name in names
        ]
        assert [told["aliases"] for _, told in logger.client.told][-1] == ["latest", "best"]
        assert run.callback.best_model_path.endswith(names[-1])

    def test_failed_upload_ends_no_fit(self, tmp_path):
        """It is said, with where the checkpoint is."""

        class Refuses(Uploads):
            def log_artifact(self, *_):
                raise ConnectionError("gone")

        logger = MLFlow(True)
        logger.client = Refuses()
        said = told(lambda: fit(tmp_path / "run", trainer={"logger": logger}))
        assert any("was not uploaded (ConnectionError: gone)" in one for one in said)

    def test_wandb(self, tmp_path, monkeypatch):
        """As one artifact each, the best by its alias."""
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Artifact=Artifact))
        callback, uploaded = self.fit(tmp_path, Wandb(True))
        best = [one for one in uploaded if "best" in one]
        assert [one[0].folders for one in best] == [[callback.best_model_path]]
        assert [one[0].options["name"] for one in uploaded] == ["model-x", "model-x"]

    def test_another_logger_that_uploads_is_named(self, tmp_path):
        """It would do nothing, and say nothing."""

        class Uploading(CSVLogger):
            _log_model = True

        said = told(lambda: self.fit(tmp_path, Uploading(tmp_path)))
        assert any("Uploading(log_model=...) uploads files" in one for one in said)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_trainer_without_checkpoints_names_the_callback_and_what_to_write(tmp_path, package):
    """Lightning names a ModelCheckpoint, which isn't there."""
    trainer = pytest.importorskip(package).Trainer
    with pytest.raises(Exception, match=r"found is SBCheckpoint.* or enable_checkpointing=False"):
        trainer(enable_checkpointing=False, callbacks=[SBCheckpoint(tmp_path)], logger=False)
