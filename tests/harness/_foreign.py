"""Checkpoints as others write them."""

from __future__ import annotations

from pathlib import Path

from lightning_sbckpt._io.storage import digest
from lightning_sbckpt._layout.manifest import MARK, Manifest, dump_manifest


def forget_manifest(folder: Path) -> None:
    """Leave no trace of a checkpoint's manifest, as SpeechBrain, which knows none."""
    (folder / "MANIFEST.yaml").unlink()
    meta = folder / "CKPT.yaml"
    meta.write_bytes(meta.read_bytes().replace(MARK, b""))
    (folder.parent / "HISTORY.jsonl").unlink(missing_ok=True)


def describe(folder):
    """Write the manifest anew, as an enemy can: it is no signature."""
    (folder / "MANIFEST.yaml").unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): digest(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ANNOTATIONS.yaml"
    }
    (folder / "MANIFEST.yaml").write_bytes(dump_manifest(Manifest(files, {})))
