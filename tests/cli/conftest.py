"""A small run to look at, and the command to look with."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.cli import main
from lightning_sbckpt.retention import Best, Newest

LOSSES = (0.9, 0.5, 0.7, 0.4, 0.6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture
def run(tmp_path, model):
    """Of five epochs three are left: e1 and e3 are the best two, e4 is the newest."""
    root = tmp_path / "run"
    with Checkpointer(root, {"model": model}) as checkpointer:
        for epoch, loss in enumerate(LOSSES):
            meta = {"epoch": epoch, "global_step": 100 * epoch, "val_loss": loss, "acc": 1 - loss}
            checkpointer.save_checkpoint(meta, name=f"e{epoch}")
            checkpointer.apply_retention([Best("val_loss", 2), Newest(1)])
    return root


@pytest.fixture
def call():
    """Run the command in this process."""

    def invoke(*args, code=0):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke
