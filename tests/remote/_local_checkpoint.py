"""A folder with files as a checkpoint has them."""

from __future__ import annotations

import os
from pathlib import Path


def local_checkpoint(path: Path, *, large: int = 100, mark: bytes = b"1") -> Path:
    """Write files as a checkpoint has them: small, empty, large, and in a folder."""
    (path / "model.dcp").mkdir(parents=True)
    (path / "CKPT.yaml").write_bytes(b"unixtime: " + mark + b"\n")
    (path / "AAA.ckpt").write_bytes(b"comes before CKPT.yaml by name")
    (path / "MANIFEST.yaml").write_bytes(b"manifest " + mark)
    (path / "empty.ckpt").touch()
    (path / "model.ckpt").write_bytes(os.urandom(large))
    (path / "model.dcp" / "__0_0.distcp").write_bytes(mark * 50)
    return path


FILES = [
    "AAA.ckpt",
    "CKPT.yaml",
    "MANIFEST.yaml",
    "empty.ckpt",
    "model.ckpt",
    "model.dcp/__0_0.distcp",
]
