"""A save imports nothing: an exception of a signal handler within an import leaves Python's import lock held."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, tempfile
import torch
from lightning_sbckpt import Checkpointer

class Tell:
    @staticmethod
    def find_spec(name, path=None, target=None):
        print(name)

model = torch.nn.Linear(400, 400)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.weight.grad = torch.ones_like(model.weight)
optimizer.step()  # Torch imports its profiler.
sys.meta_path.insert(0, Tell)
for mode in ("sync", "async", "overlap"):
    checkpointer = Checkpointer(tempfile.mkdtemp(), {"m": model, "o": optimizer}, save_mode=mode)
    checkpointer.save_and_keep_only({"n": 1}, min_keys=["n"])
    checkpointer.save_and_keep_only({"n": 2}, min_keys=["n"])
    checkpointer.wait()
    checkpointer.recover_if_possible()
    checkpointer.close()
sys.meta_path.remove(Tell)
"""


@pytest.mark.long
def test_first_save_of_a_process_imports_nothing():
    """In any mode, nor does what is loaded after it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == []
