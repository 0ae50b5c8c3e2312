"""Checkpoints as others write them."""

from __future__ import annotations

from pathlib import Path

from lightning_sbckpt._folder.manifest import MARK


def forget_manifest(folder: Path) -> None:
    """Leave no trace of a checkpoint's manifest, as SpeechBrain, which knows none."""
    (folder / "MANIFEST.yaml").unlink()
    meta = folder / "CKPT.yaml"
    meta.write_bytes(meta.read_bytes().replace(MARK, b""))
    (folder.parent / "HISTORY.jsonl").unlink(missing_ok=True)
