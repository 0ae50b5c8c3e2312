"""What is told of the packages that Lightning comes in, with stand-ins for them."""

from __future__ import annotations

import importlib
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
from _runs import Steps

from lightning_sbckpt.plugin import packages

NAMES = ("first_package", "second_package")


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Return what has been told so far, and a list of what is raised next; the stand-ins can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "PACKAGES", dict.fromkeys(NAMES, "fabric"))
    monkeypatch.setattr(packages, "_watches", [])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import sys\nTrainer = object\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield Told()
    for name in (*NAMES, "in_between"):
        sys.modules.pop(name, None)


class Told(list):
    """The packages that were told, each once it was whole."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    def __call__(self, name: str) -> None:
        assert hasattr(sys.modules[name], "Trainer")
        if self.error is not None:
            raise self.error
        self.append(name)


def test_a_package_is_told_when_it_is_imported_later(told):
    """Each once, in their order, and what asks a module for its loader finds the one of its source."""
    packages.when_loaded(told)
    assert told == []
    second = importlib.import_module("second_package")
    assert told == ["second_package"]
    assert second.__spec__.loader is second.__loader__
    assert "Trainer" in second.__loader__.get_source("second_package")
    importlib.import_module("first_package")
    importlib.reload(second)
    packages.catch_up()
    assert told == ["second_package", "first_package"]


def test_a_package_is_told_that_was_there_before(told):
    """At once."""
    importlib.import_module("first_package")
    packages.when_loaded(told)
    assert told == ["first_package"]


def test_a_package_that_imports_this_one_is_told_later(told, tmp_path):
    """When a callback is made: its import was under way."""
    (tmp_path / "in_between.py").touch()
    source = "import in_between\nin_between.begin()\nTrainer = object\n"
    (tmp_path / "first_package" / "__init__.py").write_text(source)
    in_between = importlib.import_module("in_between")
    in_between.begin = lambda: packages.when_loaded(told)
    importlib.import_module("first_package")
    assert told == []
    packages.catch_up()
    assert told == ["first_package"]


def test_an_import_of_lightning_does_not_fail_of_us(told):
    """What was wrong is raised when a callback is made, and tried again."""
    packages.when_loaded(told)
    told.error = AttributeError("no such private name in this release")
    importlib.import_module("first_package")
    with pytest.raises(AttributeError, match="no such private name"):
        packages.catch_up()
    told.error = None
    packages.catch_up()
    assert told == ["first_package"]


def test_a_package_that_fails_to_be_imported_raises_its_own_error(told, tmp_path):
    """And is told when it was imported after all."""
    packages.when_loaded(told)
    source = (tmp_path / "first_package" / "__init__.py").read_text()
    (tmp_path / "first_package" / "__init__.py").write_text("raise ImportError('no torch')")
    with pytest.raises(ImportError, match="no torch"):
        importlib.import_module("first_package")
    (tmp_path / "first_package" / "__init__.py").write_text(source)
    importlib.invalidate_caches()
    importlib.import_module("first_package")
    assert told == ["first_package"]


def test_a_class_stands_for_that_of_either_package():
    """Of instances and of classes; one that a release has not got is nobody's."""
    for package in (lightning.pytorch, pytorch_lightning):
        timer = package.callbacks.Timer()
        assert isinstance(timer, packages.Timer)
        assert not isinstance(timer, packages.EarlyStopping)
        assert issubclass(package.LightningModule, packages.LightningModule)
        assert packages.package_of(timer) is package
        fabric = packages.fabric_of(timer, "utilities.data")
        assert fabric._set_sampler_epoch is package.loops.fit_loop._set_sampler_epoch
    assert packages.package_of(Steps()) is lightning.pytorch
    missing = type(packages.Timer)("Gone", (), {"roots": packages.PACKAGES, "place": "callbacks"})
    assert not isinstance(timer, missing)
