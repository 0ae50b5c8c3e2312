"""What a checkpoint is made of: `MANIFEST.yaml`, by which damage is found.

It lists every other file of the folder with size and XXH3 128-bit checksum, the versions of the
libraries that wrote it, and the lineage (which run, resumed from which checkpoint). Its last line
is the checksum of the lines before it.
"""

from __future__ import annotations

import platform
import sys
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

from lightning_sbckpt._storage import FileDigest, digest, digest_bytes
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import parse_yaml

MANIFEST_NAME = "MANIFEST.yaml"
FORMAT_VERSION = 1
_ZIP_START = b"PK\x03\x04"
_CHECKSUM_KEY = "manifest-checksum"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, by name, and the checkpoint's lineage."""

    files: Mapping[str, FileDigest]
    lineage: Mapping[str, object]


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a `MANIFEST.yaml`."""
    body = yaml.safe_dump(
        {
            "format": FORMAT_VERSION,
            "files": {
                name: {"size": found.size, "xxh3-128": found.xxh3_128}
                for name, found in sorted(manifest.files.items())
            },
            "versions": _library_versions(),
            "lineage": dict(manifest.lineage),
        },
        sort_keys=False,
        default_flow_style=None,
        width=200,
    ).encode()
    return body + _checksum_line(body) + b"\n"


def _checksum_line(body: bytes) -> bytes:
    return f"{_CHECKSUM_KEY}: {digest_bytes(body).xxh3_128}".encode()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint folder, or None if it has none, as SpeechBrain's have.

    Raises:
        MetaError: The manifest is damaged, or of a format that this release does not know.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    if last != _checksum_line(body + b"\n"):
        raise MetaError(f"{path} is damaged: its last line is not the checksum of the others")
    fields = cast("dict[str, Any]", parse_yaml(body, path))
    if fields.get("format") != FORMAT_VERSION:
        raise MetaError(
            f"{path} has format {fields.get('format')!r}, this release reads {FORMAT_VERSION}: "
            "use the release of lightning-sbckpt that wrote it, or a newer one"
        )
    files = {
        name: FileDigest(found["size"], found["xxh3-128"])
        for name, found in fields["files"].items()
    }
    return Manifest(files, fields["lineage"] or {})


def find_damage(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint folder, a sentence each; empty if it is sound.

    Args:
        folder: The checkpoint. One without a manifest has nothing to compare with: no damage found.
        names: Only these files, and what is in folders of these names, are read in full; the others
            are looked at for presence and size.
    """
    try:
        manifest = read_manifest(folder)
    except (MetaError, OSError) as error:
        return [str(error)]
    if manifest is None:
        return _find_cut_off_files(folder, names)
    problems = []
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                problems.append(f"{name} has {size:,} bytes, {expected.size:,} were written")
            elif _is_named(name, names) and digest(path) != expected:
                problems.append(f"{name} has other bytes than were written (checksum differs)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} can't be read: {error.strerror or error}")
    return problems


def _is_named(name: str, names: Collection[str] | None) -> bool:
    return names is None or name.partition("/")[0] in names


def _find_cut_off_files(folder: Path, names: Collection[str] | None) -> list[str]:
    """Return what can be said of files that nobody described: a torch file ends with its index."""
    problems = []
    for name in sorted(names if names is not None else (path.name for path in folder.iterdir())):
        path = folder / name
        with suppress(OSError), path.open("rb") as stream:
            if stream.read(len(_ZIP_START)) == _ZIP_START and not zipfile.is_zipfile(path):
                problems.append(f"{name} is cut off: it begins as a torch file and has no end")
    return problems


def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("lightning-sbckpt", "torch", "lightning", "torchmetrics", "numpy"):
        # Only what is in use: what is merely installed did not write this checkpoint.
        if name.replace("-", "_") in sys.modules:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "unknown"
    return versions
