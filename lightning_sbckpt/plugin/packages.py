"""The two packages that Lightning comes in, `lightning.pytorch` and `pytorch_lightning`.

They are two copies of the same code, so a class of one is not the class of that name in the other,
and a process may use either, or both. Nothing here imports one of them before somebody else has. The
classes below stand for both: `isinstance` and `issubclass` ask those of each package that is loaded.
What has to be made, called or patched is taken from the package that a Trainer belongs to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

__all__ = [
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "FSDPStrategy",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "LightningDataModule",
    "LightningEnvironment",
    "LightningModule",
    "LightningOptimizer",
    "Logger",
    "MLFlowLogger",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "ModelPruning",
    "OnExceptionCheckpoint",
    "SLURMEnvironment",
    "SaveConfigCallback",
    "StochasticWeightAveraging",
    "Strategy",
    "TensorBoardLogger",
    "Timer",
    "Trainer",
    "WandbLogger",
    "catch_up",
    "fabric_of",
    "loaded",
    "package_of",
    "some_package",
    "when_loaded",
]

PACKAGES = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
"""Each package, and the Fabric that it is made with."""

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        Checkpoint,
        EarlyStopping,
        GradientAccumulationScheduler,
        LearningRateFinder,
        ModelCheckpoint,
        ModelPruning,
        OnExceptionCheckpoint,
        StochasticWeightAveraging,
        Timer,
    )
    from lightning.pytorch.cli import SaveConfigCallback
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loggers import (
        CSVLogger,
        Logger,
        MLFlowLogger,
        TensorBoardLogger,
        WandbLogger,
    )
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
else:

    class _OfEither(type):
        """A class of either package."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, cls.found())

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, cls.found())

        def found(cls) -> tuple[type, ...]:
            """Return the classes of that name in the packages that are loaded."""
            modules = [sys.modules.get(f"{root}.{cls.place}") for root in cls.roots]
            name = cls.__name__
            return tuple(getattr(module, name) for module in modules if hasattr(module, name))

    for _roots, _place, _names in (
        (PACKAGES.keys(), "callbacks.callback", "Callback"),
        (PACKAGES.keys(), "cli", "SaveConfigCallback"),
        (PACKAGES.keys(), "core", "LightningDataModule LightningModule LightningOptimizer"),
        (PACKAGES.keys(), "trainer", "Trainer"),
        (PACKAGES.keys(), "callbacks", "BatchSizeFinder Checkpoint EarlyStopping"),
        (PACKAGES.keys(), "callbacks", "GradientAccumulationScheduler LearningRateFinder"),
        (PACKAGES.keys(), "callbacks", "ModelCheckpoint ModelPruning OnExceptionCheckpoint"),
        (PACKAGES.keys(), "callbacks", "StochasticWeightAveraging Timer"),
        (PACKAGES.keys(), "loggers", "CSVLogger Logger MLFlowLogger TensorBoardLogger WandbLogger"),
        (PACKAGES.keys(), "strategies", "FSDPStrategy ModelParallelStrategy Strategy"),
        (PACKAGES.values(), "plugins.environments", "LightningEnvironment SLURMEnvironment"),
    ):
        for _name in _names.split():
            globals()[_name] = _OfEither(_name, (), {"roots": _roots, "place": _place})


def loaded() -> list[ModuleType]:
    """Return the packages that have been imported so far, to their end."""
    modules = [sys.modules.get(name) for name in PACKAGES]
    # Their `__init__` imports everything else before it.
    return [module for module in modules if module is not None and hasattr(module, "Trainer")]


def some_package() -> Any:
    """Return a package that is loaded; if none is, import the first that is installed."""
    if found := loaded():
        return found[0]
    return import_module(
        next((name for name in PACKAGES if _is_installed(name)), "pytorch_lightning")
    )


def _is_installed(name: str) -> bool:
    return find_spec(name.partition(".")[0]) is not None


def package_of(obj: object, part: str = "") -> Any:
    """Return the package that an object's class is from, or a module of it.

    Args:
        obj: A Trainer, say, or another object of a class that is derived from one of Lightning's.
        part: The name of the module, below that of the package.
    """
    return import_module(".".join(filter(None, (_name_of(obj), part))))


def fabric_of(obj: object, part: str) -> Any:
    """Return a module of the Fabric that goes with the package that an object's class is from."""
    return import_module(f"{PACKAGES[_name_of(obj)]}.{part}")


def _name_of(obj: object) -> str:
    return next(
        name
        for kind in type(obj).__mro__
        for name in PACKAGES
        if f"{kind.__module__}.".startswith(f"{name}.")
    )


class _Watch:
    """Tells when a package has been imported, whoever imports it, and however late."""

    def __init__(self, act: Callable[[str], object]) -> None:
        self._act = act
        self._told: set[str] = set()
        self._sought: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # It asks all finders in turn, this one too, and others of its kind may do so as well.
        if name not in PACKAGES or name in self._sought:
            return None
        self._sought.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._sought.remove(name)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Any", _Loader(spec.loader, self))
        return spec

    def catch_up(self) -> None:
        for module in loaded():
            if module.__name__ not in self._told:
                self._act(module.__name__)
                self._told.add(module.__name__)


class _Loader:
    """Loads as another one does, and tells that it has."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return cast("ModuleType | None", self._loader.create_module(spec))

    def exec_module(self, module: ModuleType) -> None:
        # What asks the module for its loader is to find the one that knows its source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # Nobody's import of Lightning fails of us; `catch_up` tells why when a callback is made.
        with suppress(Exception):
            self._watch.catch_up()


_watches: list[_Watch] = []


def when_loaded(act: Callable[[str], object]) -> None:
    """Have `act` called with the name of each package, as soon as that is imported."""
    watch = _Watch(act)
    _watches.append(watch)
    sys.meta_path.insert(0, watch)
    with suppress(Exception):
        watch.catch_up()


def catch_up() -> None:
    """Act on packages that were in the middle of their import; raise what went wrong with others."""
    for watch in _watches:
        watch.catch_up()
