"""What is in a folder of a sharded state: DCP's `.metadata`, read without executing any of it.

`.metadata` is a pickle, and DCP itself reads it by `pickle.load`, which runs what its author chose.
Here every class that it may name is replaced by an empty one made for this one reading, so that
nothing of the process is within its reach; what comes out is looked through before it is used: no
path leads out of the folder, the pieces of a tensor cover it, each element once, and no piece is
larger than what the folder holds for it. What would kill Python's unpickler or keep it busy is
refused before it begins.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from lightning_sbckpt._format.screening import screen
from lightning_sbckpt._io.open_regular import open_regular
from lightning_sbckpt.errors import DamagedCheckpointError, UntrustedPickleError, brief

METADATA_NAME = ".metadata"

# torch's own code crashes where it makes such a tensor from bytes alone.
_QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
# A mesh of 100 x 100 ranks needs a million.
_MOST_COMPARISONS = 20_000_000

Offsets: TypeAlias = "tuple[int, ...]"
Place: TypeAlias = "tuple[str | int, ...]"

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    # Where DCP itself has written: the folder's name, of which nothing is wanted.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "WindowsPath"),
}


@dataclass(frozen=True)
class Chunk:
    """One saved piece of a tensor: where in the tensor it begins, how large it is."""

    offsets: Offsets
    sizes: Offsets


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a piece or a value are: the file's name, and from where to where in it."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor: its whole size, and its pieces with the place of each."""

    dtype: torch.dtype
    size: Offsets
    chunks: tuple[Chunk, ...]
    stored: Mapping[Offsets, Stored] = field(repr=False)


@dataclass(frozen=True)
class Contents:
    """What a sharded state has, by DCP's flat names.

    Attributes:
        tensors: The tensors.
        values: Where the other values are.
        places: From the flat names to the keys and indices that lead there in the state.
    """

    tensors: Mapping[str, SavedTensor]
    values: Mapping[str, Stored]
    places: Mapping[str, Place]

    def place(self, name: str) -> Place:
        """Return where in the state something is."""
        return self.places.get(name, (name,))


class _StandIn:
    """Takes the place of one of DCP's objects; keeps what the pickle would have made it of."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return a field."""
        # `state` is an attribute of the instance only if the pickle has set it.
        state = self.__dict__.get("state")
        return state.get(name) if isinstance(state, dict) else None


class _Reader(pickle.Unpickler):
    """Gives a stand-in for each of DCP's classes, and refuses every other name."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        # Of this reading alone: what a pickle does to a class, it does to nobody else's.
        self._made = {key: type(key[1], (_StandIn,), {}) for key in _CLASSES}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle."""
        if (module, name) in self._made:
            return self._made[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise UntrustedPickleError(
            f"{self._path} names {module}.{name}, which is none of the classes that describe a "
            "sharded state: reading it could run code that its author chose, so it was not read. "
            "Use another checkpoint"
        )


def read_contents(folder: Path) -> Contents:
    """Return what is in the folder of a sharded state; no tensor is read, and no code is run.

    Raises:
        UntrustedPickleError: `.metadata` names what no description of a state needs.
        DamagedCheckpointError: It can't be read, or does not describe pieces of tensors in files of
            this folder.
    """
    path = folder / METADATA_NAME
    try:
        with open_regular(path) as stream:
            data = stream.read()
        screen(data, longest=len(data))
        contents = _checked(_Reader(io.BytesIO(data), path).load())
        _require_bytes(folder, contents)
    except UntrustedPickleError:
        raise
    except Exception as error:
        raise DamagedCheckpointError(
            f"{path} can't be read as the description of a sharded state: {type(error).__name__}: "
            f"{str(error)[:300]}. It is damaged, or not from torch.distributed.checkpoint; recover from "
            "another checkpoint"
        ) from error
    return contents


def _checked(found: object) -> Contents:
    described = _dict(_of(found, "Metadata").get("state_dict_metadata"))
    stored: dict[str, dict[Offsets | None, Stored]] = {}
    for key, info in _dict(_of(found, "Metadata").get("storage_data")).items():
        index = _of(key, "MetadataIndex")
        where = None if index.get("offset") is None else _sizes(index.get("offset"))
        stored.setdefault(_text(index.get("fqn")), {})[where] = _stored(info)
    tensors: dict[str, SavedTensor] = {}
    values: dict[str, Stored] = {}
    for name, kind in described.items():
        if type(kind).__name__ == "BytesStorageMetadata":
            values[_text(name)] = stored[name][None]
        else:
            tensors[_text(name)] = _tensor(_of(kind, "TensorStorageMetadata"), stored[name])
    places = {
        _text(name): _place(place)
        for name, place in _dict(found.get("planner_data") or {}).items()  # type: ignore[attr-defined]
        if name in described
    }
    return Contents(tensors, values, places)


def _tensor(kind: _StandIn, stored: Mapping[Offsets | None, Stored]) -> SavedTensor:
    size = _sizes(kind.get("size"))
    properties = _of(kind.get("properties"), "TensorProperties").state
    dtype = cast("tuple[object, ...]", properties)[0]
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTIZED:
        raise TypeError(f"{brief(dtype)} as the type of a tensor")
    chunks: list[Chunk] = []
    at: dict[Offsets, Stored] = {}
    for found in kind.get("chunks"):
        piece = _of(found, "ChunkStorageMetadata")
        chunk = Chunk(_sizes(piece.get("offsets")), _sizes(piece.get("sizes")))
        ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(size) != len(ends) or any(e > s for e, s in zip(ends, size, strict=True)):
            raise ValueError(f"a piece {brief(chunk)} of a tensor of size {brief(size)}")
        chunks.append(chunk)
        # Ranks without a part of the tensor save empty pieces, any number of them at one place.
        if 0 in chunk.sizes and chunk.offsets in at:
            continue
        at[chunk.offsets] = stored[chunk.offsets]
        if math.prod(chunk.sizes) * dtype.itemsize > at[chunk.offsets].length:
            raise ValueError(f"a piece {brief(chunk)} in {at[chunk.offsets].length:,} bytes")
    _require_exact_cover(size, chunks)
    return SavedTensor(dtype, size, tuple(chunks), at)


def _require_bytes(folder: Path, contents: Contents) -> None:
    """Refuse pieces that are larger than their file: memory is asked for by what they claim."""
    pieces = [*contents.values.values()]
    for tensor in contents.tensors.values():
        pieces += tensor.stored.values()
    sizes: dict[str, float] = {}
    for piece in pieces:
        if piece.file not in sizes:
            try:
                found = os.lstat(folder / piece.file)
                # What is no file is refused by whoever opens it.
                sizes[piece.file] = found.st_size if stat.S_ISREG(found.st_mode) else math.inf
            except (
                FileNotFoundError
            ):  # Not fetched yet, or missing, which is told where it is read.
                sizes[piece.file] = math.inf
        if piece.offset + piece.length > sizes[piece.file]:
            raise ValueError(
                f"{brief(piece.file)} has {sizes[piece.file]:,} bytes, expected a piece that ends "
                f"at {piece.offset + piece.length:,}"
            )


def _require_exact_cover(size: Offsets, chunks: Sequence[Chunk]) -> None:
    """Refuse pieces that leave an element of a tensor out, or have one twice.

    All lie inside the tensor. So if their sizes add up to its size and no two overlap, they are all
    of it. Overlaps are looked for by a sweep along the dimension in which most pieces begin
    at places of their own.
    """
    filled = [chunk for chunk in chunks if 0 not in chunk.sizes]
    if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(size):
        raise ValueError(f"pieces that don't make up a tensor of size {brief(size)}")
    if len(filled) < 2:
        return
    dims = range(len(size))
    along = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in filled}))
    filled.sort(key=lambda chunk: chunk.offsets[along])
    compared = 0
    under_way: list[Chunk] = []
    for chunk in filled:
        start = chunk.offsets[along]
        under_way = [each for each in under_way if each.offsets[along] + each.sizes[along] > start]
        compared += len(under_way)
        if compared > _MOST_COMPARISONS:
            raise ValueError("pieces that are too many to be compared")
        if any(_overlap(each, chunk) for each in under_way):
            raise ValueError(f"a piece {brief(chunk)} that overlaps another")
        under_way.append(chunk)


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        begin < other_begin + other_length and other_begin < begin + length
        for begin, length, other_begin, other_length in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )


def _stored(info: object) -> Stored:
    found = _of(info, "_StorageInfo")
    name, span = _text(found.get("relative_path")), (found.get("offset"), found.get("length"))
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError(f"{brief(name)} as the name of a file of this folder")
    if found.get("transform_descriptors"):
        raise ValueError("bytes that were transformed by an extension")
    return Stored(name, *_sizes(span))


def _place(found: object) -> Place:
    if not isinstance(found, tuple) or not found:
        raise TypeError(f"{brief(found)} as a place in a state")
    if not all(type(step) in (str, int) for step in found):
        raise TypeError(f"{brief(found)} as a place in a state")
    return found


def _sizes(found: object) -> Any:
    if not isinstance(found, (tuple, list)) or any(type(n) is not int or n < 0 for n in found):
        raise TypeError(f"{brief(found)} as sizes or offsets")
    return tuple(found)


def _text(found: object) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{brief(found)} as a name")
    return found


def _dict(found: object) -> dict[Any, Any]:
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} where a dictionary is expected")
    return found


def _of(found: object, name: str) -> _StandIn:
    if not isinstance(found, _StandIn) or type(found).__name__ != name:
        raise TypeError(f"{type(found).__name__} where {name} is expected")
    return found
