"""The callback in Fabric, whose loop no callback can know."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError


def test_fabric_that_is_given_the_callback_says_what_to_do_instead(tmp_path):
    """Before anything is trained that would not be saved."""
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[SBCheckpoint(tmp_path)])
    with pytest.raises(ConfigurationError, match=r"given to Fabric.*make a Checkpointer\(dirpath"):
        fabric.setup(torch.nn.Linear(1, 1))
