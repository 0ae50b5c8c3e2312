"""The readers of files that anybody may have written, each as a function of bytes.

A reader may return, or raise `MetaError`; whatever else it does is a fault. Where a file ends with
its own checksum, the bytes are given the right one, or nothing behind it would ever be reached.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from lightning_sbckpt._catalog.index import INDEX_NAME, _header, read_index
from lightning_sbckpt._format.flat_yaml import parse_flat
from lightning_sbckpt._io.storage import FileDigest, digest_bytes
from lightning_sbckpt._layout.annotations import ANNOTATIONS_NAME, read_annotations
from lightning_sbckpt._layout.manifest import (
    MANIFEST_NAME,
    Manifest,
    dump_manifest,
    find_damage,
    read_manifest,
)
from lightning_sbckpt._layout.owner import read_record, spell
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency, dump_meta, parse_yaml

_PLACE = tempfile.TemporaryDirectory()
_FOLDER = Path(_PLACE.name)


def meta(data: bytes) -> None:
    """A `CKPT.yaml`, and how recent the checkpoint is by it."""
    with contextlib.suppress(MetaError):
        found = parse_yaml(data, "CKPT.yaml")
        assert isinstance(found, dict)
        assert not math.isnan(ckpt_recency(Checkpoint(Path("CKPT+a"), found, {})))


def flat_meta(data: bytes) -> None:
    """The fast reader of plain lines, against PyYAML: the same, or it leaves it to PyYAML."""
    found = parse_flat(data)
    if found is not None:
        expected = yaml.safe_load(data)
        assert repr(found) == repr(expected), (found, expected)


def manifest(data: bytes) -> None:
    """A `MANIFEST.yaml` with the right checksum."""
    line = f"manifest-checksum: {digest_bytes(data).xxh3_128}\n".encode()
    for content in (data, data + line):
        (_FOLDER / MANIFEST_NAME).write_bytes(content)
        with contextlib.suppress(MetaError):
            found = read_manifest(_FOLDER)
            assert found is not None
            for name, expected in found.files.items():
                assert isinstance(expected, FileDigest)
                assert not name.startswith("/")
                assert ".." not in name.split("/")
        assert all(isinstance(problem, str) for problem in find_damage(_FOLDER))


def annotations(data: bytes) -> None:
    """An `ANNOTATIONS.yaml` with the right checksum."""
    (_FOLDER / "CKPT.yaml").write_bytes(b"unixtime: 1.0\n")
    line = f"annotations-checksum: {digest_bytes(data).xxh3_128}\n".encode()
    for content in (data, data + line):
        (_FOLDER / ANNOTATIONS_NAME).write_bytes(content)
        with contextlib.suppress(MetaError):
            read_annotations(_FOLDER)


def index(data: bytes) -> None:
    """The index of a folder, a cache, with the right first line."""
    line = json.dumps(_header(data)).encode() + b"\n"
    for content in (data, line + data):
        (_FOLDER / INDEX_NAME).write_bytes(content)
        read_index(_FOLDER)


def lock_record(data: bytes) -> None:
    """The record of who writes to a folder."""
    file = _FOLDER / ".lock"
    file.write_bytes(data or b"\n")  # An empty one is waited for.
    with file.open("rb") as stream:
        assert "\n" not in spell(read_record(stream.fileno()))


READERS: dict[str, Callable[[bytes], None]] = {
    reader.__name__: reader
    for reader in (meta, flat_meta, manifest, annotations, index, lock_record)
}

_MANIFEST = dump_manifest(
    Manifest({"model.ckpt": FileDigest(5, "0" * 32), "a/b": FileDigest(0, "1" * 32)}, {"run": "x"})
)
SEEDS: list[bytes] = [
    dump_meta({"unixtime": 1.5e9, "end-of-epoch": True, "loss": 0.25, "name": "it's a 'word'"}),
    dump_meta({"unixtime": 1.0, "m": torch.ones(2, 2), "c": torch.tensor([1j, 2]), "n": None}),
    b"a: &a [1, *a]\nb: {c: [1.5e+3, .nan, -.inf, ~, yes, 0x1f, 017, 1:30, 2026-01-01]}\n",
    b"a: !!python/object/apply:os.abort []\nb: !!binary aGk=\nc: !!set {x, y}\nd: !!omap [a: 1]\n",
    b"a: |\n  text\nb: >-\n  folded\n? [x]\n: 'y'\n<<: {z: 1}\n",
    b"%YAML 1.1\n---\nunixtime: 1\n...\n",
    _MANIFEST,
    _MANIFEST.rpartition(b"manifest-checksum")[0],
    b"format: 1\nof: 1.0\npinned: why\ntags: [a]\nnotes: [b]\nmeta: {wer: 0.5}\n",
    b'[[[["model"],["unixtime","loss"]]],["CKPT+a"],"' + b"01" * 56 + b'",[0],[[1.0,0.5]]]',
    b"pid: 5\nhost: here\nsince: now\nprogram: x\nprocess-start: 7\nmachine: m\n",
]
