"""Where the checkpoints of a run are, if its hyperparameters or the Trainer say so."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
from _runs import Steps, fit, go, loader, make, saved
from lightning.pytorch.loggers import CSVLogger

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError


class Tuned(Steps):
    """A run with hyperparameters."""

    def __init__(self, lr: float = 0.1, depth: int = 2, name: str = "a", model: object = None):
        super().__init__()
        self.save_hyperparameters()


def folder_of(run) -> str:
    """Return the name of the folder that a run has saved to, below that of the test."""
    assert saved(run.callback.dirpath)
    return run.callback.dirpath


def test_hyperparameters_name_the_folder(tmp_path, caplog):
    """It is told which that is, and the same run finds it again; another one begins in its own."""
    template = f"{tmp_path}/runs/{{lr}}-{{depth:03d}}"
    first = fit(template, module=Tuned(0.01), trainer={"max_epochs": 1})
    assert folder_of(first) == tmp_path / "runs" / "0.01-002"
    assert f"the checkpoints of this run are in {tmp_path}/runs/0.01-002" in caplog.text
    again = fit(template, module=Tuned(0.01))
    assert again.callback.resume_report.meta["global_step"] == 4
    other = fit(template, module=Tuned(0.2))
    assert other.callback.resume_report is None
    assert folder_of(other) == tmp_path / "runs" / "0.2-002"


def test_a_relative_folder_is_that_of_the_working_directory_at_construction(tmp_path, monkeypatch):
    """A brace in the name of that is none of the template."""
    (tmp_path / "{lr}").mkdir()
    monkeypatch.chdir(tmp_path / "{lr}")
    run = make("runs/{lr}", module=Tuned(), trainer={"max_epochs": 1})
    monkeypatch.chdir(tmp_path)
    assert folder_of(go(run)) == tmp_path / "{lr}" / "runs" / "0.1"


def test_one_callback_follows_the_module_that_it_is_given(tmp_path):
    """A copy for each fold, or the very same one, as long as nobody has set another folder."""
    template = f"{tmp_path}/{{depth}}"
    callback = make(template).callback
    for depth in (1, 2):
        for own in (copy.deepcopy(callback), callback):
            trainer = make(tmp_path).trainer
            trainer.callbacks[-1] = own
            trainer.fit(Tuned(depth=depth), loader())
            assert own.dirpath == tmp_path / str(depth)
    callback.dirpath = tmp_path / "elsewhere"
    trainer = make(tmp_path, trainer={"max_epochs": 1}).trainer
    trainer.callbacks[-1] = callback
    trainer.fit(Tuned(depth=3), loader())
    assert saved(tmp_path / "elsewhere")


def test_a_value_is_part_of_one_name(tmp_path):
    """None leads to another folder, whatever it holds."""
    module = Tuned(name="../../x/y: z", model={"kind": "..", "lr": 1e-3})
    run = fit(f"{tmp_path}/{{name}}/{{model[kind]}}-{{model[lr]:.0e}}", module=module)
    assert folder_of(run) == tmp_path / "x_y_z" / "_-1e-03"


def test_a_hash_stands_for_all_hyperparameters(tmp_path):
    """The same in every start, another for other values; those of a datamodule count."""

    class Data(L.LightningDataModule):
        def __init__(self, fold: int):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return loader()

    def of(module, fold=0):
        run = make(f"{tmp_path}/{{fold}}-{{hash}}", module=module, trainer={"max_epochs": 1})
        return folder_of(go(run, data=Data(fold))).name

    first = of(Tuned())
    assert re.fullmatch(r"0-[0-9a-f]{16}", first)
    assert of(Tuned()) == first
    assert len({first, of(Tuned(lr=0.3)), of(Tuned(), fold=1)}) == 3


@pytest.mark.parametrize(
    "wrong", ["{rate}", "{}", "{lr", "lr}", "{lr.x}", "{depth:%}}", "{name:d}"]
)
def test_a_name_that_is_none_is_refused_with_those_there_are(tmp_path, wrong):
    """Before anything is trained."""
    with pytest.raises(ConfigurationError, match="there are lr, depth, name, model; or hash"):
        fit(f"{tmp_path}/{wrong}", module=Tuned())
    assert not [*tmp_path.iterdir()]


def test_a_module_without_hyperparameters_says_how_to_have_some(tmp_path):
    """They are what the module saves."""
    with pytest.raises(ConfigurationError, match=r"none: call self.save_hyperparameters\(\)"):
        fit(f"{tmp_path}/{{lr}}")


def test_braces_are_written_twice(tmp_path):
    """As in any template of Python's."""
    assert folder_of(fit(f"{tmp_path}/{{{{lr}}}}", module=Tuned())) == tmp_path / "{lr}"


@pytest.mark.parametrize("given", [(), (None,)])
def test_without_a_folder_it_is_one_of_the_trainer(tmp_path, given, caplog):
    """A stable one, which is told."""
    root = {"default_root_dir": tmp_path, "max_epochs": 1}
    for epochs in (1, 2):
        run = make(tmp_path, trainer={**root, "max_epochs": epochs})
        run.trainer.callbacks[-1] = callback = SBCheckpoint(*given)
        go(run)
    assert callback.dirpath == tmp_path / "checkpoints"
    assert callback.resume_report.meta["global_step"] == 4
    assert f"the checkpoints of this run are in {tmp_path}/checkpoints" in caplog.text


def test_best_is_found_where_the_hyperparameters_say(tmp_path):
    """In a new process that only tests."""
    template = f"{tmp_path}/{{lr}}"
    fit(template, module=Tuned(), min_key="val_loss")
    new = make(template, module=Tuned(), min_key="val_loss")
    new.trainer.test(new.module, loader(1), ckpt_path="best", verbose=False)
    assert new.module.steps == 12


def test_a_folder_of_a_logger_that_changes_is_told(tmp_path):
    """At the first start: the next one has another."""
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"there will be another at the next start"):
        fit(f"{logger.log_dir}/ours", trainer={"logger": logger})


@pytest.mark.parametrize("place", ["ours", "lightning_logs/ours"])
def test_a_folder_beside_that_of_a_logger_is_no_such(tmp_path, place, recwarn):
    """Nor is one with a name of its own."""
    fit(tmp_path / place, trainer={"logger": CSVLogger(tmp_path)})
    named = CSVLogger(tmp_path, version="mine")
    fit(f"{named.log_dir}/ours", trainer={"logger": named})
    assert not [each for each in recwarn if "at the next start" in str(each.message)]
