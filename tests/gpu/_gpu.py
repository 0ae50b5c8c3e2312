"""What the tests on a GPU share: `pytest tests/gpu`, in less than ten minutes, a few of them on two.

They are skipped where there is no GPU. `SBCKPT_GPU_TESTS=cpu pytest tests/gpu` runs on the processor
what has a meaning there: it finds plain mistakes in these tests, and proves nothing about a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

DEVICE = os.environ.get("SBCKPT_GPU_TESTS", "cuda")
IS_GPU = DEVICE == "cuda" and torch.cuda.is_available()
MODES = ("sync", "async", "overlap")

on_a_gpu = pytest.mark.skipif(
    not IS_GPU and DEVICE != "cpu", reason="no GPU here: torch.cuda.is_available() is False"
)
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="has no meaning on a processor")
two_gpus = pytest.mark.skipif(
    not IS_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs of one machine"
)


def busy(device: str) -> None:
    """Keep the current stream of a device busy for about half a second."""
    if IS_GPU:
        with torch.cuda.device(device):
            torch.cuda._sleep(1_000_000_000)


def allocated() -> int:
    """Return how many bytes of the GPU tensors take."""
    return torch.cuda.memory_allocated() if IS_GPU else 0


def peak_over(before: int) -> int:
    """Return how many bytes more than before tensors took at most since the last reset."""
    return torch.cuda.max_memory_allocated() - before if IS_GPU else 0


def reset_peak() -> int:
    """Begin to look for the most memory anew; return what is taken now."""
    if IS_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return allocated()


class Holder(nn.Module):
    """Large tensors, and many small ones, that hold one number."""

    def __init__(self, device: str, *, megabytes: int = 64, small: int = 1000) -> None:
        super().__init__()
        for number in range(max(1, megabytes // 16)):
            self.register_buffer(f"large{number}", torch.zeros(4 << 20, device=device))
        for number in range(small):
            self.register_buffer(f"small{number}", torch.zeros(1 + number % 300, device=device))

    def fill(self, value: int) -> None:
        """Have every tensor hold a number."""
        for each in self.buffers():
            each.fill_(value)


def saved(folder: Path, file: str = "m.ckpt") -> dict[str, torch.Tensor]:
    """Return the state in a file of the checkpoint `a`."""
    return torch.load(folder / "CKPT+a" / file, map_location="cpu", weights_only=True)
