"""Hyperparameters from a folder: what of them Lightning may import and call."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from pathlib import Path

import lightning as L
import pytest
import torch
from _runs import Steps
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core import saving

from lightning_sbckpt import Checkpointer, trusting_pickle
from lightning_sbckpt.errors import MismatchError, UntrustedPickleError
from lightning_sbckpt.plugin.export import to_lightning

LIGHTNINGS_OWN = "lightning.pytorch.cli.instantiate_module"
KEYS = ["hyper_parameters", "hparams", "module_arguments"]

called: list[object] = []


def called_by_a_checkpoint(cls: type, arguments: object) -> object:
    """What a hostile checkpoint has called, if it can."""
    called.append(arguments)
    return cls()


class Wide(Steps):
    """A module with hyperparameters."""

    def __init__(self, lr: float = 0.1, **more: object) -> None:
        super().__init__()
        self.save_hyperparameters()


class Data(LightningDataModule):
    """A datamodule with a hyperparameter."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


class Holds:
    """A recoverable with a given state."""

    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


def folder_with(root: Path, extras: object) -> Path:
    """Return a checkpoint folder with a model and more of Lightning's dictionary."""
    parts = {"model": Holds(Wide().state_dict()), "extras": Holds(extras)}
    with Checkpointer(root, parts) as checkpointer:
        return checkpointer.save_checkpoint().path


@pytest.fixture(autouse=True)
def lightning_that_obeys(monkeypatch):
    """Have Lightning call whatever a checkpoint names, as it did before 2.6.6."""

    class Everything:
        def __contains__(self, name: object) -> bool:
            return True

    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", Everything(), raising=False)
    monkeypatch.setattr(saving, "_is_imported_subclass", lambda *_: True, raising=False)
    called.clear()
    yield
    assert not called


def hostile(**more: object) -> dict[str, object]:
    return {"_instantiator": f"{__name__}.called_by_a_checkpoint", **more}


def test_the_hole_is_there_without_the_check(tmp_path):
    """What the tests below show can fail: a file of Lightning's own has its instantiator called."""
    file = tmp_path / "hostile.ckpt"
    nowhere = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
    state = Steps().state_dict()
    torch.save({**nowhere, "state_dict": state, "hyper_parameters": hostile(lr=0.3)}, file)
    Wide.load_from_checkpoint(file)
    assert called == [{"lr": 0.3}]
    called.clear()


@pytest.mark.parametrize("key", KEYS)
def test_an_instantiator_in_a_folder_is_not_called(tmp_path, key):
    """Under each of the keys that Lightning reads hyperparameters from."""
    folder = folder_with(tmp_path, {key: hostile(lr=0.3)})
    with pytest.raises(UntrustedPickleError, match=r"instantiator '.*called_by_a_checkpoint'"):
        Wide.load_from_checkpoint(folder)


def test_an_instantiator_is_not_called_for_a_datamodule(tmp_path):
    """Datamodules are loaded the same way, from a key of their own."""
    folder = folder_with(tmp_path, {"datamodule_hyper_parameters": hostile()})
    with pytest.raises(UntrustedPickleError, match="instantiator"):
        Data.load_from_checkpoint(folder)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "given",
    [
        [("_instantiator", f"{__name__}.called_by_a_checkpoint")],
        (("_instantiator", f"{__name__}.called_by_a_checkpoint"),),
        "text",
    ],
    ids=["a list of pairs", "a tuple of pairs", "a text"],
)
def test_hyperparameters_that_are_no_mapping_are_refused(tmp_path, key, given):
    """Lightning takes pairs for a dictionary, so an instantiator could hide in them."""
    with pytest.raises((MismatchError, AttributeError)):
        Wide.load_from_checkpoint(folder_with(tmp_path, {key: given}))


@pytest.mark.parametrize("kind", [OrderedDict, Counter])
def test_an_instantiator_in_another_mapping_is_not_called(tmp_path, kind):
    """Those that torch's tensors-only unpickler makes."""
    folder = folder_with(tmp_path, {"hparams": kind(hostile())})
    with pytest.raises(UntrustedPickleError, match="instantiator"):
        Wide.load_from_checkpoint(folder)


@pytest.mark.parametrize("value", [3, ["os.system"], {"a": 1}, f"{LIGHTNINGS_OWN} ", ""])
def test_an_instantiator_that_is_no_name_is_refused(tmp_path, value):
    """Whatever it is."""
    folder = folder_with(tmp_path, {"hyper_parameters": {"_instantiator": value}})
    with pytest.raises(UntrustedPickleError, match="instantiator"):
        Wide.load_from_checkpoint(folder)


def test_another_instantiator_is_not_called_even_if_pickle_is_trusted(tmp_path):
    """As Lightning does since 2.6.6."""
    folder = folder_with(tmp_path, {"hyper_parameters": hostile()})
    with trusting_pickle(), pytest.raises(UntrustedPickleError, match="instantiator"):
        Wide.load_from_checkpoint(folder)


def test_an_instantiator_in_a_file_of_hyperparameters_is_not_called(tmp_path):
    """`hparams_file` may be the one in the folder."""
    folder = folder_with(tmp_path / "run", {})
    file = tmp_path / "hparams.yaml"
    file.write_text(f"_instantiator: {__name__}.called_by_a_checkpoint\n")
    with pytest.raises(UntrustedPickleError, match="instantiator"):
        Wide.load_from_checkpoint(folder, hparams_file=file)


def test_an_instantiator_is_not_exported(tmp_path):
    """An older Lightning that loads the file would call it."""
    folder = folder_with(tmp_path / "run", {"hyper_parameters": hostile()})
    with pytest.raises(UntrustedPickleError, match="instantiator"):
        to_lightning(folder, tmp_path / "exported.ckpt")
    assert not (tmp_path / "exported.ckpt").exists()


@pytest.mark.parametrize("key", ["hparams_type", "datamodule_hparams_type"])
def test_a_type_of_hyperparameters_is_not_called(tmp_path, key):
    """Lightning calls it with the hyperparameters; only OmegaConf's classes are taken."""
    folder = folder_with(tmp_path, {key: torch.nn.Parameter, "hyper_parameters": {"lr": 0.2}})
    with pytest.raises(UntrustedPickleError, match="would be called"):
        Wide.load_from_checkpoint(folder)


class TestLightningCLI:
    """Lightning's own instantiator imports and calls what the hyperparameters name."""

    @pytest.fixture(autouse=True)
    def instantiated(self, monkeypatch):
        """Replace the instantiator, which wants a library that is not always there."""
        from lightning.pytorch import cli

        made = []

        def instantiate_module(cls, arguments):
            made.append(arguments)
            return Wide() if cls is LightningModule else cls()

        monkeypatch.setattr(cli, "instantiate_module", instantiate_module, raising=False)
        return made

    def test_plain_hyperparameters_are_handed_to_it(self, tmp_path, instantiated):
        """As those of `LightningCLI` mostly are."""
        plain = {"lr": 0.3, "path": "data/set.csv", "sizes": [1, 2], "name": "a.b.c"}
        folder = folder_with(
            tmp_path, {"hyper_parameters": {"_instantiator": LIGHTNINGS_OWN, **plain}}
        )
        Wide.load_from_checkpoint(folder)
        assert instantiated == [plain]

    def test_an_imported_class_is_handed_to_it(self, tmp_path, instantiated):
        """`_class_path` is the class of the module itself, if the command could choose it."""
        own = {"_class_path": f"{__name__}.Wide"}
        folder = folder_with(
            tmp_path, {"hyper_parameters": {"_instantiator": LIGHTNINGS_OWN, **own}}
        )
        assert isinstance(LightningModule.load_from_checkpoint(folder), LightningModule)
        assert instantiated == [own]

    @pytest.mark.parametrize(
        "class_path", ["this.Zen", "subprocess.Popen", "torch.nn.Linear", "Popen", 3]
    )
    def test_another_class_is_refused(self, tmp_path, instantiated, class_path):
        """One that is not imported, and one that is no module of Lightning's."""
        assert "this" not in sys.modules
        hyperparameters = {"_instantiator": LIGHTNINGS_OWN, "_class_path": class_path}
        folder = folder_with(tmp_path, {"hyper_parameters": hyperparameters})
        with pytest.raises(UntrustedPickleError, match=r"class .*, which is not imported or"):
            Wide.load_from_checkpoint(folder)
        assert not instantiated
        assert "this" not in sys.modules

    @pytest.mark.parametrize(
        "value",
        [
            {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}},
            {"deep": [1, ({"class_path": "Popen"},)]},
            "os.system",
            ["this.Zen"],
            {"os.path.join": 1},
        ],
        ids=["class_path", "nested", "text", "in a list", "a key"],
    )
    def test_names_of_what_to_call_are_refused_unless_trusted(self, tmp_path, instantiated, value):
        """They would be imported, and classes called."""
        hyperparameters = {"_instantiator": LIGHTNINGS_OWN, "lr": 0.3, "thing": value}
        folder = folder_with(tmp_path, {"hyper_parameters": hyperparameters})
        with pytest.raises(UntrustedPickleError, match="trusting_pickle"):
            Wide.load_from_checkpoint(folder)
        assert not instantiated
        assert "this" not in sys.modules
        with trusting_pickle():
            Wide.load_from_checkpoint(folder)
        assert instantiated == [{"lr": 0.3, "thing": value}]

    def test_what_the_caller_passes_may_name_anything(self, tmp_path, instantiated):
        """It is not the folder's."""
        folder = folder_with(
            tmp_path, {"hyper_parameters": {"_instantiator": LIGHTNINGS_OWN, "thing": "os.system"}}
        )
        thing = {"class_path": "torch.nn.Linear"}
        Wide.load_from_checkpoint(folder, thing=thing)
        assert instantiated == [{"thing": thing}]


def test_hyperparameters_without_an_instantiator_may_name_anything(tmp_path):
    """They are only values then."""
    folder = folder_with(
        tmp_path, {"hyper_parameters": {"lr": 0.3, "thing": {"class_path": "os.system"}}}
    )
    loaded = Wide.load_from_checkpoint(folder)
    assert dict(loaded.hparams)["lr"] == 0.3
