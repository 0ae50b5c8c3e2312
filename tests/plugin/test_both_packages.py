"""One `SBCheckpoint` for the Trainers of `lightning.pytorch` and of `pytorch_lightning`."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import _runs
import exact_cells
import lightning.pytorch
import pytest
import pytorch_lightning
from _other_name import CORE, Cell, main, of_other_name
from _processes import start_server
from _releases import needs_lightning

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import MixedPackagesError
from lightning_sbckpt.plugin.selftest import assert_resume_exact

PACKAGES = [lightning.pytorch, pytorch_lightning]
ORDERS = [
    "no:lightning+lightning_sbckpt+pytorch_lightning",
    "made+lightning+pytorch_lightning",
    "pytorch_lightning+lightning_sbckpt+lightning",
    "no:pytorch_lightning+lightning_sbckpt+lightning",
    "lightning_sbckpt+lightning",
    "lightning_sbckpt+pytorch_lightning",
    "lightning+lightning_sbckpt",
    "pytorch_lightning+lightning_sbckpt",
    "lightning+pytorch_lightning+lightning_sbckpt",
    "lightning+lightning_sbckpt+pytorch_lightning",
    "lightning_sbckpt+lightning.pytorch+made+pytorch_lightning",
    "made+pytorch_lightning",
]


def runs_of(package):
    """Return `_runs`, whose classes are those of a package."""
    return _runs if package is lightning.pytorch else of_other_name("_runs")


@pytest.fixture(params=PACKAGES, ids=lambda package: package.__name__)
def runs(request):
    """The small runs of either package."""
    return runs_of(request.param)


# ---------------------------------------------------------------------- in whatever order


@pytest.mark.parametrize("share", [ORDERS[:2], pytest.param(ORDERS[2:], marks=pytest.mark.long)])
def test_any_order_of_imports_gives_a_callback_of_both_packages(tmp_path, share):
    """Also of a callback that was made before either was imported, and neither imports the other."""
    script = str(Path(_runs.__file__).with_name("_import_orders.py"))
    subprocess.run([sys.executable, script, str(tmp_path), *share], check=True, timeout=300)
    wrong = {order: (tmp_path / str(number)).read_text() for number, order in enumerate(share)}
    assert wrong == dict.fromkeys(share, "")


def test_one_class_is_a_callback_of_both_packages():
    """So is one that a user derives from it, and copies and pickles of it."""
    callback = Derived("run")
    for each in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        for package in PACKAGES:
            assert isinstance(each, package.callbacks.Checkpoint)
            assert isinstance(each, package.Callback)
    assert type(callback).__mro__.count(SBCheckpoint) == 1


class Derived(SBCheckpoint):
    """What a user derives."""


# ---------------------------------------------------------------------- saved, resumed, restored


def test_a_fit_resumes_and_ends_with_the_best_weights(runs, tmp_path):
    """With no checkpoint callback of Lightning's beside it."""
    losses = runs.by_epoch(0.5, 0.25, 0.75)
    stop = runs.raise_at("on_train_batch_start", 7, RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        runs.fit(tmp_path, min_key="val_loss", module=runs.Steps(losses), callbacks=[stop])
    run = runs.fit(tmp_path, min_key="val_loss", module=runs.Steps(losses))
    assert run.trainer.checkpoint_callbacks == [run.callback]
    assert run.callback.resume_report.meta["global_step"] == 4
    assert run.module.steps == 8
    assert "skipped:  nothing" in str(run.callback.resume_report)


@pytest.mark.parametrize("first", PACKAGES, ids=lambda package: package.__name__)
def test_what_one_package_has_saved_the_other_goes_on_from(first, tmp_path, recwarn):
    """With the states of its callbacks, and as the same experiment."""
    (other,) = (package for package in PACKAGES if package is not first)
    for package, epochs in ((first, 2), (other, 4)):
        runs = runs_of(package)
        callbacks = [package.callbacks.EarlyStopping("val_loss", patience=3)]
        run = runs.fit(tmp_path, callbacks=callbacks, trainer={"max_epochs": epochs})
    assert run.module.steps == 16
    assert callbacks[0].wait_count == 0 and callbacks[0].best_score.item() == pytest.approx(1 / 17)
    assert "callbacks" in run.callback.resume_report.restored
    assert [str(each.message) for each in recwarn if "SBCheckpoint" in str(each.message)] == []


def test_two_trainers_of_one_process_have_each_its_own(tmp_path):
    """A Trainer of one package fits after one of the other, and neither is in the other's way."""
    for number, package in enumerate((*PACKAGES, *PACKAGES)):
        run = runs_of(package).fit(tmp_path / str(number), max_key="val_loss")
        assert run.module.steps == 4
        assert type(run.trainer).__module__.startswith(package.__name__)


def test_folders_are_taken_without_a_callback(runs, tmp_path):
    """By a Trainer that tests, and by `load_from_checkpoint`."""
    runs.fit(tmp_path / "run", min_key="val_loss")
    assert runs.Steps.load_from_checkpoint(tmp_path / "run" / "best").steps == 12
    alone = runs.L.Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False
    )
    alone.test(module := runs.Steps(), runs.loader(1), ckpt_path=tmp_path / "run", verbose=False)
    assert module.steps == 12


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [*exact_cells.CORE, "3 ranks"])
def test_a_killed_run_of_pytorch_lightning_ends_with_the_same_bits(name):
    """As one of `lightning.pytorch` does."""
    start_server()
    points, ranks = exact_cells.points_of(name), exact_cells.ranks_of(name)
    assert_resume_exact(Cell(name), points, ranks=ranks, timeout=300)


@pytest.mark.parametrize(
    "files",
    [pytest.param(CORE, marks=pytest.mark.long), pytest.param(["plugin"], marks=pytest.mark.slow)],
)
def test_the_tests_of_the_callback_pass_with_the_other_name(files):
    """Those of saves, loaders, metrics, ranks and of what evaluates; or all of them."""
    assert main(*files) == 0


# ---------------------------------------------------------------------- what can't be mixed


@pytest.mark.parametrize("what", ["module", "datamodule", "loaders", "test"])
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_what_is_of_the_other_package_is_refused_by_both_names(package, what, tmp_path):
    """Lightning alone says that a `LightningModule` must be a `LightningModule`."""
    (other,) = (each for each in PACKAGES if each is not package)
    run = runs_of(package).make(tmp_path)
    theirs, data = runs_of(other).Steps(), other.LightningDataModule()
    calls = {
        "module": lambda: run.trainer.fit(theirs, _runs.loader()),
        "datamodule": lambda: run.trainer.fit(run.module, datamodule=data),
        "loaders": lambda: run.trainer.fit(run.module, data),
        "test": lambda: run.trainer.test(theirs, _runs.loader()),
    }
    kind = "Module" if what in ("module", "test") else "DataModule"
    expected = (
        f"is a Lightning{kind} of {other.__name__}, and the Trainer is one of {package.__name__}"
    )
    with pytest.raises(MixedPackagesError, match=expected) as error:
        calls[what]()
    assert f"from {package.__name__} import Lightning{kind}, Trainer" in str(error.value)
    assert isinstance(error.value, TypeError)


@needs_lightning("2.6", "a Trainer that takes callbacks of the other package")
def test_callbacks_and_loggers_of_the_other_package_take_part(runs, tmp_path):
    """Lightning takes them; what the callback knows of a class holds for that of either package."""
    (other,) = (each for each in PACKAGES if not issubclass(runs.Steps, each.LightningModule))
    stopping = other.callbacks.EarlyStopping("val_loss", stopping_threshold=0.2)
    logger = other.loggers.CSVLogger(tmp_path / "logs")
    settings = {"logger": logger, "max_epochs": 5}
    run = runs.fit(tmp_path / "run", callbacks=[stopping], trainer=settings)
    assert run.trainer.checkpoint_callbacks == [run.callback]
    assert run.module.steps == 8
    stopping = other.callbacks.EarlyStopping("val_loss", stopping_threshold=0.2)
    again = runs.fit(tmp_path / "run", callbacks=[stopping], trainer={"max_epochs": 5})
    assert again.module.steps == 8
