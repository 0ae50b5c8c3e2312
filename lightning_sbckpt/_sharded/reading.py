"""Reading sharded states: into live tensors, each rank its own pieces, or as a whole.

No collective is needed: each rank sees from the description which saved pieces overlap its own, and
reads those. So it does not matter how many ranks wrote them, nor how they were placed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_sbckpt._format.load import decoded, load_stream
from lightning_sbckpt._io.open_regular import open_regular
from lightning_sbckpt._io.progress import moved
from lightning_sbckpt._sharded.contents import (
    Chunk,
    Contents,
    Offsets,
    SavedTensor,
    Stored,
    read_contents,
)
from lightning_sbckpt.errors import DamagedCheckpointError, UntrustedPickleError

Allocate = Callable[[str, SavedTensor], torch.Tensor]


def whole_tensor(name: str, saved: SavedTensor) -> torch.Tensor:
    """Return memory on the CPU for all of a tensor."""
    del name
    return torch.empty(saved.size, dtype=saved.dtype, device="cpu")


class SavedShards:
    """A sharded state on the disk.

    Args:
        folder: Its folder.

    Attributes:
        contents: What is in it.

    Raises:
        UntrustedPickleError: Its description names what no description needs.
        DamagedCheckpointError: Its description can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: Contents = read_contents(folder)

    def fill(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Read tensors into live ones of the same size, by DCP's flat names.

        Raises:
            DamagedCheckpointError: A piece can't be read, or is none of that tensor.
        """
        for name, target in targets.items():
            # One at a time: no more than one piece is in memory beside the live tensors.
            self._fill(name, target)

    def values(self) -> dict[str, object]:
        """Return what is no tensor, by DCP's flat names.

        Raises:
            UntrustedPickleError: Only pickle can read a value.
            DamagedCheckpointError: A value can't be read.
        """
        return {name: decoded(self._load(stored)) for name, stored in self.contents.values.items()}

    def state(self, allocate: Allocate = whole_tensor) -> dict[str, Any]:
        """Return the whole state, in tensors made by `allocate`.

        Args:
            allocate: Makes the memory of a tensor from its flat name and what was saved. What it
                makes on the device "meta" is not read.
        """
        tensors = {name: allocate(name, saved) for name, saved in self.contents.tensors.items()}
        # One of torch's sharded tensors of which this rank has no piece can't be asked.
        wanted = {n: t for n, t in tensors.items() if type(t) is not torch.Tensor or not t.is_meta}
        self.fill(wanted)
        return self.nested({**tensors, **self.values()})

    def nested(self, flat: Mapping[str, object]) -> dict[str, Any]:
        """Return a state as it was saved from what is in it by DCP's flat names."""
        root: dict[str, Any] = {}
        for name, value in flat.items():
            _put(root, self.contents.place(name), value, most=len(flat))
        return root

    def _fill(self, name: str, target: torch.Tensor) -> None:
        saved = self.contents.tensors[name]

        def piece_at(offsets: Offsets) -> torch.Tensor:
            stored = saved.stored[offsets]
            piece = self._load(stored)
            sizes = next(chunk.sizes for chunk in saved.chunks if chunk.offsets == offsets)
            if not isinstance(piece, torch.Tensor) or tuple(piece.shape) != sizes:
                raise self._damaged(stored, f"it is no piece of size {sizes}")
            return piece

        _copy_pieces(saved.size, saved.chunks, piece_at, target)

    def _load(self, stored: Stored) -> object:
        try:
            # Not a link or a pipe, whoever has put it there.
            with open_regular(self.folder / stored.file) as stream:
                piece = load_stream(io.BufferedReader(_Slice(stream, stored)))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), repr(error))
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise UntrustedPickleError(
                    f"{self.folder / stored.file} holds, at byte {stored.offset:,}, an object that "
                    "only pickle can hold. Reading it could run code that its author chose, so it "
                    f"was not read. torch says: {reason}"
                ) from error
            raise self._damaged(stored, reason) from error
        moved(stored.length)
        return piece

    def _damaged(self, stored: Stored, reason: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self.folder / stored.file} can't be read at byte {stored.offset:,}: {reason}. The "
            "file is damaged; recover from another checkpoint"
        )


def copy_whole(whole: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor into a live one of which this rank may have but a piece."""
    start = (0,) * whole.dim()
    only = Chunk(start, tuple(whole.shape))
    _copy_pieces(only.sizes, [only], lambda _: whole, target)


def _copy_pieces(
    size: Offsets,
    chunks: Sequence[Chunk],
    piece_at: Callable[[Offsets], torch.Tensor],
    target: torch.Tensor,
) -> None:
    # DCP knows where in a tensor this rank's piece of it is, and what overlaps it.
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    described = TensorStorageMetadata(
        TensorProperties(dtype=target.dtype),
        torch.Size(size),
        [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks],
    )
    planner.set_up_planner({"": target}, Metadata({"": described}), is_coordinator=True)
    for item in planner.finish_plan(planner.create_local_plan()).items:
        piece = piece_at(tuple(item.storage_index.offset or ()))
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            piece = piece.narrow(dim, start, length)
        local = planner.resolve_tensor(item).detach()
        local.copy_(piece)
        planner.commit_tensor(item, local)


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: BinaryIO, stored: Stored) -> None:
        self._descriptor = stream.fileno()
        self._start, self._length = stored.offset, stored.length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if view else 0
        self._at += count
        return count


def _put(root: dict[str, Any], place: tuple[str | int, ...], value: object, most: int) -> None:
    holder: Any = root
    for step, following in zip(place, (*place[1:], None), strict=True):
        if isinstance(holder, list):
            # A number from a file may be any; a list can't be longer than all that there is.
            if not isinstance(step, int) or not 0 <= step < most:
                raise DamagedCheckpointError(f"a sharded state says that {place!r} is in it")
            holder.extend([None] * (step + 1 - len(holder)))
        elif not isinstance(holder, dict) or isinstance(step, int):
            raise DamagedCheckpointError(f"a sharded state says that {place!r} is in it")
        if following is None:
            holder[step] = value
            continue
        there = holder.get(step) if isinstance(holder, dict) else holder[cast("int", step)]
        if there is None:
            there = holder[step] = [] if isinstance(following, int) else {}
        holder = there
