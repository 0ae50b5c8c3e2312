"""The tests of `lightning.pytorch`, read as tests of `pytorch_lightning`.

The two packages differ in the names of their modules alone, so a test of one is that of the other
when these are replaced in its source.

`python tests/harness/_other_name.py [FILE...]` runs test files so, by default those of the core.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]
CORE = [
    *("plugin/test_callback.py", "plugin/test_best.py", "plugin/test_metrics.py"),
    *("plugin/test_ddp.py", "plugin/test_spawned.py", "plugin/test_evaluation_process.py"),
    *("plugin/data/test_loaders.py", "plugin/test_lightning_files.py"),
]

_NAMES = {
    r"\bimport lightning as\b": "import pytorch_lightning as",
    r"\blightning\.pytorch\b": "pytorch_lightning",
    r"\blightning\.fabric\b": "lightning_fabric",
    r"\bimport lightning$": "import pytorch_lightning",
    r"\bL\.pytorch\.": "L.",
}


def translated(source: str) -> str:
    """Return a source with the other names."""
    for name, other in _NAMES.items():
        source = re.sub(name, other, source, flags=re.MULTILINE)
    return source


@cache
def of_other_name(name: str) -> ModuleType:
    """Return a module of the tests with the other names; its classes have the names they have."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    module = ModuleType(name)
    exec(compile(translated(Path(spec.origin).read_text()), spec.origin, "exec"), vars(module))
    return module


class Cell:
    """One of `exact_cells`, by name, so that it reaches another process; read there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, dirpath):
        return of_other_name("exact_cells").CELLS[self.name](dirpath)


def main(*arguments: str) -> int:
    """Run test files with the other names; what begins with a dash is pytest's."""
    files = [each for each in arguments if not each.startswith("-")]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tests"
        shutil.copytree(TESTS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(TESTS.parent / "pyproject.toml", folder)
        shutil.copytree(TESTS.parent / "examples", Path(folder) / "examples")
        for path in copy.rglob("*.py"):
            path.write_text(translated(path.read_text()))
        run = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            "--ignore-glob=*packages.py",  # They know both.
            *(argument for argument in arguments if argument.startswith("-")),
            *(str(copy / each) for each in files or CORE),
        ]
        return subprocess.run(run, cwd=folder, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
