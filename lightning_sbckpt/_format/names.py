"""The names of the files that stand beside the file of a state."""

from __future__ import annotations

from pathlib import Path

PICKLED_SUFFIX = "+pickled"
MARKED_SUFFIX = "+marked"


def pickled_path(path: Path) -> Path:
    """Return the file beside `path` that holds what only pickle can hold."""
    return path.with_name(f"{path.stem}{PICKLED_SUFFIX}{path.suffix}")


def marked_path(path: Path) -> Path:
    """Return the file beside `path` that a marked method wrote whose class nobody decorated."""
    return path.with_name(f"{path.stem}{MARKED_SUFFIX}{path.suffix}")
