"""What a checkpoint is made of: `MANIFEST.yaml`, by which damage is found.

It lists every other file of the folder with size and XXH3 128-bit checksum, the versions of the
libraries that wrote it, and the lineage (which run, resumed from which checkpoint). Its last line
is the checksum of the lines before it.
"""

from __future__ import annotations

import os
import platform
import reprlib
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import yaml

from lightning_sbckpt._format.yaml import MAX_META_BYTES, parse_yaml
from lightning_sbckpt._io.digests import read_digest
from lightning_sbckpt._io.open_regular import NotRegularError, open_below, read_regular
from lightning_sbckpt._io.records import discard, fetch, stored_files
from lightning_sbckpt._io.storage import FileDigest, digest_bytes
from lightning_sbckpt._io.threads import run_all
from lightning_sbckpt._layout.history import HISTORY_NAME, read_history
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import META_NAME, Checkpoint

MANIFEST_NAME = "MANIFEST.yaml"
FORMAT_VERSION = 1
MARK = b"# MANIFEST.yaml lists the files of this checkpoint.\n"
"""Stands in the `CKPT.yaml` of a checkpoint that has a manifest: without one it is damaged then."""
_HEAD_BYTES = 200
_MAX_BYTES = 16 * 2**20
# Fewer bytes are read in less time than a thread takes to start.
_WORTH_A_THREAD = 4 * 2**20
_ZIP_START = b"PK\x03\x04"
_CHECKSUM_KEY = "manifest-checksum"

# Libyaml's, where there is one: a sharded model of many ranks has thousands of files.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, by name, and the checkpoint's lineage."""

    files: Mapping[str, FileDigest]
    lineage: Mapping[str, object]


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a `MANIFEST.yaml`."""
    body = yaml.dump(
        {
            "format": FORMAT_VERSION,
            "files": {
                name: {"size": found.size, "xxh3-128": found.xxh3_128}
                for name, found in sorted(manifest.files.items())
            },
            "versions": _library_versions(),
            "lineage": dict(manifest.lineage),
        },
        Dumper=_Dumper,
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
        data = read_regular(path, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except NotRegularError as error:
        raise MetaError(f"{path} is damaged: {error.strerror}") from error
    start = data.rfind(b"\n", 0, -1) + 1
    body = data[:start]
    if data[start:] != _checksum_line(body) + b"\n":
        raise MetaError(f"{path} is damaged: its last line is not the checksum of the others")
    fields = parse_yaml(body, path)
    if fields.get("format") != FORMAT_VERSION:
        raise MetaError(
            f"{path} has format {reprlib.repr(fields.get('format'))}, this release reads {FORMAT_VERSION}: "
            "use the release of lightning-sbckpt that wrote it, or a newer one"
        )
    files, lineage = fields.get("files"), fields.get("lineage")
    if not isinstance(files, dict) or not isinstance(lineage, (dict, type(None))):
        raise MetaError(f"{path} is damaged: it does not describe files and a lineage")
    return Manifest({name: _described(name, files[name], path) for name in files}, lineage or {})


def lost_manifest(folder: Path) -> str | None:
    """Return by what is known that a checkpoint without a manifest had one; None if nothing says so.

    One that SpeechBrain has written has none. `CKPT.yaml` says so since there is a mark in it, and
    what is noted in the history of the run folder says it of older ones.
    """
    told = "the other files can't be checked"
    try:
        path = folder / META_NAME
        data = read_regular(path, MAX_META_BYTES)
        if MARK in data[:_HEAD_BYTES]:
            return f"{MANIFEST_NAME} is missing, which {META_NAME} says was written: {told}"
        unixtime = repr(parse_yaml(data, path).get("unixtime"))
        for event in read_history(folder.parent):
            if (
                event["event"] == "saved"
                and event["name"] == folder.name
                and repr(event["meta"].get("unixtime")) == unixtime
            ):
                return (
                    f"{MANIFEST_NAME} is missing, which was written as {HISTORY_NAME} says: {told}"
                )
    except (MetaError, OSError):
        return None
    return None


def lineage_of(checkpoint: Checkpoint) -> Mapping[str, object]:
    """Return where the weights of a checkpoint come from, as far as its manifest tells."""
    try:
        manifest = read_manifest(checkpoint.path)
    except (MetaError, OSError):
        return {}
    return manifest.lineage if manifest is not None else {}


def _described(name: object, found: object, path: Path) -> FileDigest:
    """Return what the manifest says of a file, if it is one inside the checkpoint."""
    if (
        not isinstance(name, str)
        or "\0" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise MetaError(f"{path} is damaged: {name!r} is no name of a file of this checkpoint")
    fields = found if isinstance(found, dict) else {}
    size, checksum = fields.get("size"), fields.get("xxh3-128")
    if type(size) is not int or not isinstance(checksum, str):
        raise MetaError(f"{path} is damaged: it gives no size and checksum of {name}")
    return FileDigest(size, checksum)


def find_damage(
    folder: Path,
    names: Collection[str] | None = None,
    *,
    read: Callable[[BinaryIO], FileDigest] = read_digest,
) -> list[str]:
    """Return what is wrong with a checkpoint folder, a sentence each; empty if it is sound.

    Args:
        folder: The checkpoint. One without a manifest has nothing to compare with: no damage found.
        names: Only these files, and what is in folders of these names, are read in full; the others
            are looked at for presence and size.
        read: How an open file is read in full, see `Verified`.

    Raises:
        RemoteError: A file is in a store, and can't be brought.
    """
    try:
        manifest = read_manifest(folder)
    except (MetaError, OSError) as error:
        return [str(error)]
    fetch(folder, names)
    if manifest is None:
        lost = lost_manifest(folder)
        return [*([] if lost is None else [lost]), *_find_cut_off_files(folder, names)]
    found: dict[str, str | None] = dict.fromkeys(manifest.files)

    def look(name: str) -> None:
        wanted = read if _is_named(name, names) else None
        found[name] = file_damage(folder, name, manifest.files[name], wanted)
        # What lies here may be a damaged copy of a sound file.
        if found[name] is not None and wanted is not None and discard(folder, name):
            fetch(folder, [name])
            found[name] = file_damage(folder, name, manifest.files[name], wanted)

    sizes = {name: described.size for name, described in manifest.files.items()}
    # The largest first, so that the threads end together.
    by_size = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    run_all(look, by_size, most=sum(sizes.values()) // _WORTH_A_THREAD)
    return [problem for problem in found.values() if problem is not None]


def file_damage(
    folder: Path, name: str, expected: FileDigest, read: Callable[[BinaryIO], FileDigest] | None
) -> str | None:
    """Return what is wrong with one file of a checkpoint folder, or None.

    Args:
        folder: The checkpoint.
        name: The file.
        expected: What the manifest says of it.
        read: How to read the open file in full; None to look at presence and size only.
    """
    try:
        # What is written is a file in folders: a link could lead anywhere, and a pipe be endless.
        with open_below(folder, name) as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size
            if size != expected.size:
                return f"{name} has {size:,} bytes, {expected.size:,} were written"
            if read is not None and _is_hollow(stream, status):
                return f"{name} has {size:,} bytes, more than the disk that it lies on: they are a hole"
            if read is not None and read(stream) != expected:
                return f"{name} has other bytes than were written (checksum differs)"
    except FileNotFoundError:
        stored = stored_files(folder).get(name) if read is None else None
        if stored is None:
            return f"{name} is missing"
        if stored.size != expected.size:
            return f"{name} has {stored.size:,} bytes, {expected.size:,} were written"
    except OSError as error:
        return f"{name} can't be read: {error.strerror or error}"
    return None


def _is_hollow(stream: BinaryIO, status: os.stat_result) -> bool:
    """Return whether a file says that it has more bytes than fit on its disk; to read them takes for ever."""
    if status.st_size // 2 < status.st_blocks * 512:
        return False
    disk = os.fstatvfs(stream.fileno())
    return 0 < disk.f_blocks * disk.f_frsize < status.st_size


def _is_named(name: str, names: Collection[str] | None) -> bool:
    return names is None or name.partition("/")[0] in names


def _find_cut_off_files(folder: Path, names: Collection[str] | None) -> list[str]:
    """Return what can be said of files that nobody described: a torch file ends with its index."""
    problems = []
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        return [f"{folder} can't be read: {error.strerror or error}"]
    for name in sorted(present if names is None else present.intersection(names)):
        # A hook may have made its file a folder; a link to one leads out of here.
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            continue
        try:
            with open_below(folder, name) as stream:
                if stream.read(len(_ZIP_START)) == _ZIP_START and not zipfile.is_zipfile(stream):
                    problems.append(f"{name} is cut off: it begins as a torch file and has no end")
        except NotRegularError as error:
            problems.append(f"{name} can't be read: {error.strerror}")
        except OSError:
            continue
    return problems


def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("lightning-sbckpt", "torch", "lightning", "torchmetrics", "numpy"):
        # Only what is in use: what is merely installed did not write this checkpoint.
        if name.replace("-", "_") in sys.modules:
            versions[name] = _installed_version(name)
    return versions


# Asked at every save, where reading what was installed would take longer than all else but the disk.
@cache
def _installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
