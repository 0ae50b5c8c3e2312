"""Where the figures were taken: what a reader needs to compare, and nothing that names a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from benchmarks.calm import MACHINE

_LIBRARIES = (
    "lightning-sbckpt",
    "torch",
    "lightning",
    "speechbrain",
    "safetensors",
    "torch_checkpointing",
    "numpy",
    "xxhash",
)


def describe(folder: Path) -> dict[str, str]:
    """Return the environment as pairs of a name and a value."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processors": f"{len(os.sched_getaffinity(0))} ({_processor()})",
        "memory": f"{memory:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": _filesystem(folder),
        "Python": platform.python_version(),
        **{library: _version(library) for library in _LIBRARIES},
        "torch threads": str(torch.get_num_threads()),
        **MACHINE.describe(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _filesystem(folder: Path) -> str:
    """Return the type of the filesystem that a folder is on, by the longest mount point above."""
    mounted = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    real = folder.resolve()
    above = [(m[1], m[2]) for m in mounted if real == Path(m[1]) or Path(m[1]) in real.parents]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]
