"""What README.md tells its reader to write passes the type checkers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the reader has already, wherever a snippet uses a name that it doesn't make.
HAS = """
import lightning as L
import torch
from lightning_sbckpt import SBCheckpoint as SBCheckpoint

model: L.LightningModule
other_model: torch.nn.Module
datamodule: L.LightningDataModule
optimizer: torch.optim.Optimizer
def train_and_validate(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float: ...
"""


@pytest.fixture(scope="module")
def snippets(tmp_path_factory):
    """A folder with each snippet as a module, and what the reader has in another one."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "reader.pyi").write_text(HAS)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) > 6
    for number, block in enumerate(blocks):
        (folder / f"snippet_{number}.py").write_text(f"from reader import *\n{block}")
    return folder


@pytest.mark.long
def test_mypy_takes_every_snippet_strictly(snippets):
    """And would refuse an option that there isn't."""
    (snippets / "wrong.py").write_text(
        "from lightning_sbckpt import SBCheckpoint\nSBCheckpoint('run', save_mode='fast')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "."],
        cwd=snippets,
        env={**os.environ, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.partition(":")[0] for line in found] == ["wrong.py"], "\n".join(found)
    assert "incompatible type \"Literal['fast']\"" in done.stdout


@pytest.mark.long
def test_pyright_takes_every_snippet(snippets):
    """As an editor would show it."""
    pytest.importorskip("pyright")
    (snippets / "wrong.py").write_text(
        "from lightning_sbckpt import SBCheckpoint\nSBCheckpoint('run', save_mode='fast')\n"
    )
    (snippets / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"})
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=snippets,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = [each for each in found if each["severity"] == "error"]
    assert [Path(each["file"]).name for each in wrong] == ["wrong.py"], wrong
    assert "Literal['fast']" in wrong[0]["message"]
