"""Fixtures that several test files share.

`pytest --original tests/speechbrain/test_speechbrain_behaviour*.py` runs the tests that take the `api` fixture
against the real SpeechBrain instead of this package: every behaviour claimed there is one of
SpeechBrain's. `pytest --original tests/speechbrain/test_speechbrain_faults.py` shows the other side: there,
what fails is a fault of the original that this package must not have.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import logging
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from _counts import COUNTS
from hypothesis import settings

# Deadlines say how busy the machine is, not what the code does.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

# What tests and commands import has no examples to run; what projects need is not installed.
collect_ignore_glob = [
    "harness/*",
    "downstream/projects/*",
    "downstream/killed_runs.py",
    *(f"{folder}/_*.py" for folder in ("durability", "security")),
]

# Every public name that needs no Lightning.
CORE_NAMES = (
    "Checkpointer",
    "Checkpoint",
    "ckpt_recency",
    "register_checkpoint_hooks",
    "mark_as_saver",
    "mark_as_loader",
    "mark_as_transfer",
    "get_default_hook",
    "DEFAULT_SAVE_HOOKS",
    "DEFAULT_LOAD_HOOKS",
    "DEFAULT_TRANSFER_HOOKS",
    "torch_save",
    "torch_recovery",
    "torch_parameter_transfer",
    "average_state_dicts",
    "average_checkpoints",
    "Pretrainer",
    "EpochCounter",
    "EpochCounterWithStopper",
)


def pytest_configure() -> None:
    """Have Ctrl+C do what it does in a terminal: a shell's job in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # Before pytest selects by marker.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `long` what a `sample` of the cases of a test leaves out; the sample is spread evenly."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        size = cases[0].get_closest_marker("sample").args[0]
        taken = {number * len(cases) // size for number in range(size)}
        for number, case in enumerate(cases):
            if number not in taken:
                case.add_marker("long")


@pytest.fixture(scope="session", autouse=True)
def _secrets_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own secrets out of the tests, and theirs out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        for name in ("LIGHTNING_SBCKPT_SECRET", "LIGHTNING_SBCKPT_SECRET_FILE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def another_user(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Call it to be a user from then on who knows none of the secrets so far."""

    def change() -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))

    return change


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer `--original`."""
    parser.addoption(
        "--original",
        action="store_true",
        default=False,
        help="run the tests that take the `api` fixture against the real SpeechBrain",
    )


@contextlib.contextmanager
def _importable(modules: dict[str, ModuleType]) -> Iterator[None]:
    # Afterwards neither the stand-in nor SpeechBrain's lazy modules may stay importable, since other
    # libraries look at what sys.modules holds.
    before = {name: module for name, module in sys.modules.items() if _is_foreign(name)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        # What was imported meanwhile as well.
        modules.update({name: found for name, found in sys.modules.items() if _is_foreign(name)})
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _is_foreign(name: str) -> bool:
    return name.partition(".")[0] in ("torchaudio", "speechbrain")


@pytest.fixture(scope="session")
def speechbrain_modules() -> dict[str, ModuleType]:
    """The modules of the real SpeechBrain, by name; it can't be loaded twice, since it patches torch."""
    # SpeechBrain imports torchaudio, which need not exist for the torch in use, and nothing of it
    # is called by checkpointing.
    standin = ModuleType("torchaudio")
    standin.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    modules = {"torchaudio": standin}
    with _importable(modules):
        for name in (
            "core",
            "utils.checkpoints",
            "utils.epoch_loop",
            "utils.parameter_transfer",
            "utils.repro",
            "nnet.adapters",
            "nnet.schedulers",
            "processing.features",
        ):
            importlib.import_module(f"speechbrain.{name}")
    return modules


@pytest.fixture(scope="module")
def loaded_speechbrain(speechbrain_modules: dict[str, ModuleType]) -> Iterator[ModuleType]:
    """The whole of the real SpeechBrain, loaded while the tests of a module run."""
    with _importable(speechbrain_modules):
        yield speechbrain_modules["speechbrain"]


@pytest.fixture(scope="session")
def speechbrain(speechbrain_modules: dict[str, ModuleType]) -> SimpleNamespace:
    """The real SpeechBrain's three modules, under the paths `sb.utils.<module>`."""
    modules = {
        name: speechbrain_modules[f"speechbrain.utils.{name}"]
        for name in ("checkpoints", "epoch_loop", "parameter_transfer")
    }
    return SimpleNamespace(utils=SimpleNamespace(**modules))


@pytest.fixture(scope="session")
def original_api(speechbrain: SimpleNamespace) -> SimpleNamespace:
    """The public names of the real SpeechBrain in one namespace."""
    names: dict[str, object] = {}
    for module in vars(speechbrain.utils).values():
        names.update({name: getattr(module, name) for name in CORE_NAMES if hasattr(module, name)})
    return SimpleNamespace(**names)


@pytest.fixture(scope="session")
def our_api() -> ModuleType:
    """This package."""
    return importlib.import_module("lightning_sbckpt")


@pytest.fixture
def api(request: pytest.FixtureRequest) -> types.ModuleType | SimpleNamespace:
    """This package, or with `--original` the real SpeechBrain."""
    name = "original_api" if request.config.getoption("--original") else "our_api"
    return request.getfixturevalue(name)  # type: ignore[no-any-return]


class Scale(torch.nn.Module):
    """A module of one parameter, `param`."""

    def __init__(self, param: float = 1.0) -> None:
        super().__init__()
        self.param = torch.nn.Parameter(torch.tensor([float(param)]))

    @property
    def value(self) -> float:
        """The parameter as a number."""
        return self.param.item()

    @value.setter
    def value(self, value: float) -> None:
        with torch.no_grad():
            self.param.fill_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` times the parameter."""
        return x * self.param


@pytest.fixture
def scale() -> type[Scale]:
    """The class of a module of one parameter, whose number is its `value`."""
    return Scale


@pytest.fixture
def names_in() -> Callable[[object], set[str]]:
    """A function from a checkpointer to the folder names of the checkpoints it lists."""

    def names(checkpointer: object) -> set[str]:
        return {ckpt.path.name for ckpt in checkpointer.list_checkpoints()}  # type: ignore[attr-defined]

    return names


@pytest.fixture
def tree_bytes() -> Callable[[Path], dict[str, bytes]]:
    """A function from a folder to the bytes of every file in it, but for `.lock`.

    It goes when the garbage collector comes, and reading it here would give the lock up.
    """

    def read(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read


@pytest.fixture
def all_levels(caplog: pytest.LogCaptureFixture) -> Callable[[], None]:
    """A function that lets debug lines through, also of loggers that have a level of their own."""

    def enable() -> None:
        for name in (None, "lightning_sbckpt", "speechbrain.utils.checkpoints"):
            caplog.set_level(logging.DEBUG, logger=name)

    return enable


@pytest.fixture(autouse=True)
def counted(record_property):
    """What a test has counted becomes its properties, in the report that `--junitxml` writes."""
    COUNTS.clear()
    yield
    for what, times in COUNTS.items():
        record_property(what, times)
