"""Loggers are told of every save, and find what they read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from _runs import Steps, by_epoch, fit, saved
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints


class Recording(DummyLogger):
    """Writes down what it sees of the callback at each save."""

    def __init__(self):
        super().__init__()
        self.told = []

    def after_save_checkpoint(self, checkpoint_callback):
        names = (
            "monitor",
            "mode",
            "save_top_k",
            "best_model_path",
            "best_model_score",
            "best_k_models",
            "last_model_path",
            "current_score",
        )
        seen = {name: getattr(checkpoint_callback, name) for name in names}
        self.told.append(SimpleNamespace(callback=checkpoint_callback, **seen))


@pytest.fixture
def told(tmp_path):
    """What a logger was told in a fit of three epochs, of which the second is best."""
    logger = Recording()
    fit(
        tmp_path,
        module=Steps(by_epoch(0.5, 0.25, 0.75)),
        min_key="val_loss",
        num_to_keep=2,
        trainer={"logger": logger},
    )
    return logger.told


def test_a_logger_is_told_once_per_save(told):
    """After the save and its retention."""
    assert [float(seen.current_score) for seen in told] == [0.5, 0.25, 0.75]


def test_a_logger_sees_the_best_and_the_newest(told, tmp_path):
    """As of that save."""
    assert [float(seen.best_model_score) for seen in told] == [0.5, 0.25, 0.25]
    assert [len(seen.best_k_models) for seen in told] == [1, 2, 2]
    assert told[-1].last_model_path == str(saved(tmp_path)[-1].path)
    assert told[-1].best_model_path == told[1].last_model_path
    assert (told[0].monitor, told[0].mode, told[0].save_top_k) == ("val_loss", "min", 2)


def test_the_newest_has_its_score_though_it_is_not_among_the_best(tmp_path):
    """The current score is that of the checkpoint just saved."""
    logger = Recording()
    fit(
        tmp_path,
        module=Steps(by_epoch(0.125, 0.25, 0.75)),
        min_key="val_loss",
        trainer={"logger": logger},
    )
    assert [float(seen.current_score) for seen in logger.told] == [0.125, 0.25, 0.75]


def test_the_folder_is_there_when_a_logger_is_told(tmp_path):
    """Whole, so that it may be uploaded."""

    class Uploads(Recording):
        def after_save_checkpoint(self, checkpoint_callback):
            super().after_save_checkpoint(checkpoint_callback)
            self.files = sorted(p.name for p in saved(tmp_path)[-1].path.iterdir())

    logger = Uploads()
    fit(tmp_path, trainer={"logger": logger, "max_epochs": 1})
    assert {"CKPT.yaml", "MANIFEST.yaml", "model.ckpt"} <= {*logger.files}


def test_every_logger_is_told(tmp_path):
    """Of several."""
    loggers = [Recording(), Recording()]
    fit(tmp_path, trainer={"logger": loggers, "max_epochs": 2})
    assert [len(logger.told) for logger in loggers] == [2, 2]


def test_what_loggers_of_lightning_do_with_a_callback_works(tmp_path):
    """W&B, MLflow and Comet look for files to upload in this way: they find none, and go on."""

    class Scans(Recording):
        def after_save_checkpoint(self, checkpoint_callback):
            self.told.append(_scan_checkpoints(checkpoint_callback, {}))

    logger = Scans()
    fit(tmp_path, min_key="val_loss", trainer={"logger": logger})
    assert logger.told == [[], [], []]


def test_a_logger_keeps_the_file_checkpoints_that_it_is_to_upload(tmp_path):
    """MLflow's and LitLogger's keep one callback until training ends: a ModelCheckpoint stays that one."""

    class Keeps(Recording):
        def __init__(self):
            super().__init__()
            self._checkpoint_callback = None

        def after_save_checkpoint(self, checkpoint_callback):
            super().after_save_checkpoint(checkpoint_callback)
            self._checkpoint_callback = checkpoint_callback

        def finalize(self, status):
            self.uploaded = _scan_checkpoints(self._checkpoint_callback, {})

    logger = Keeps()
    files = ModelCheckpoint(tmp_path / "files")
    fit(tmp_path / "run", callbacks=[files], trainer={"logger": logger})
    assert [Path(path) for _, path, _, _ in logger.uploaded] == [Path(files.best_model_path)]
    assert len(logger.told) == 6


def test_the_csv_logger_goes_on_over_a_restart(tmp_path):
    """Two starts write one log."""
    for max_epochs in (1, 2):
        fit(
            tmp_path / "run",
            trainer={"logger": CSVLogger(tmp_path, name="csv"), "max_epochs": max_epochs},
        )
    (log,) = (tmp_path / "csv").rglob("metrics.csv")
    assert "0.2" in log.read_text()
    assert "0.1111" in log.read_text()
