"""The leaves of a saved state, and the values of its tensors a piece at a time.

A file of nothing but ordinary tensors is read by its outline, so that no more than a piece of a
tensor is ever in memory. Any other file is mapped, as `Checkpoint.open` does it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias, cast

import torch

from lightning_sbckpt._format.index import Identity, Stored, identity_of, read_outline
from lightning_sbckpt._format.load import open_state
from lightning_sbckpt._format.plain import TAG
from lightning_sbckpt._format.read_tensors import read_tensors
from lightning_sbckpt._io.open_regular import open_to_read
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError

# How many numbers are compared at a time.
_PIECE = 2**18
_MOST_DENSE = 2**22
_MOST_REPEATED = 2**28

Place: TypeAlias = "tuple[object, ...]"
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


class _NeedsTorchError(Exception):
    """A state that the outline alone does not tell."""


class SavedState:
    """The state in one file, which stays open until `close`.

    Args:
        path: The file.

    Attributes:
        leaves: What is in it that is no container, by the keys and indices that lead there.

    Raises:
        UntrustedPickleError: Nothing but pickle can read the file.
        DamagedCheckpointError: The file can't be read at all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._identity: Identity | None = None
        outline = read_outline(path, lambda stored: stored)
        if outline is not None:
            with suppress(_NeedsTorchError):
                self.leaves = dict(_leaves(outline.state, (), by_outline=True))
                self._identity = outline.identity
                self._open()
                return
        self.leaves = dict(_leaves(open_state(path, pickled=False), (), by_outline=False))

    def _open(self) -> None:
        with open_to_read(self._path) as stream:
            self._descriptor = os.dup(stream.fileno())
        if identity_of(self._descriptor) != self._identity:
            self.close()
            raise DamagedCheckpointError(
                f"{self._path} was changed while it was read; compare again"
            )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def tensor(self, leaf: Stored | torch.Tensor) -> torch.Tensor:
        """Return the whole of a tensor."""
        if isinstance(leaf, torch.Tensor):
            return leaf.detach()
        assert self._identity is not None
        return read_tensors(self._path, self._identity, [leaf])[0].detach()

    def numbers(self, leaf: Stored, first: int, count: int) -> torch.Tensor:
        """Return some of the elements of a tensor, in the order in which they are stored."""
        assert self._descriptor is not None
        data = bytearray(count * leaf.dtype.itemsize)
        left, at = memoryview(data), leaf.place + first * leaf.dtype.itemsize
        while left:
            read = os.preadv(self._descriptor, [left], at)
            if not read:
                raise DamagedCheckpointError(
                    f"{self._path} ends at byte {at:,}: it was cut off while it was read"
                )
            left, at = left[read:], at + read
        return torch.frombuffer(data, dtype=torch.uint8).view(leaf.dtype)


def is_tensor(leaf: object) -> bool:
    """Return whether a leaf is a tensor, read or not."""
    return isinstance(leaf, (Stored, torch.Tensor))


def shape_of(leaf: Stored | torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, read or not."""
    return leaf.size if isinstance(leaf, Stored) else tuple(leaf.shape)


def pieces(
    a: SavedState, before: Stored | torch.Tensor, b: SavedState, after: Stored | torch.Tensor
) -> Iterator[Pair]:
    """Yield two tensors of one shape and type in pieces, each of one dimension.

    Raises:
        MismatchError: They can't be compared; the message says why.
    """
    if isinstance(before, Stored) and isinstance(after, Stored) and before.stride == after.stride:
        total = math.prod(before.size)
        for first in range(0, total, _PIECE):
            count = min(_PIECE, total - first)
            yield a.numbers(before, first, count), b.numbers(after, first, count)
        return
    yield from _slices(_plain(a.tensor(before)), _plain(b.tensor(after)))


def _slices(a: torch.Tensor, b: torch.Tensor) -> Iterator[Pair]:
    if a.numel() <= _PIECE:
        if a.numel():
            yield _flat(a), _flat(b)
        return
    rows = _PIECE // (a.numel() // len(a))
    if not rows:
        for one, other in zip(a, b, strict=True):
            yield from _slices(one, other)
        return
    for first in range(0, len(a), rows):
        yield from _slices(a[first : first + rows], b[first : first + rows])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    # (`contiguous` leaves a single element with whatever stride it has.)
    if flat.stride() == (1,):
        return flat
    return torch.empty(len(flat), dtype=flat.dtype, device=flat.device).copy_(flat)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of ordinary numbers."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.is_meta:
        raise MismatchError("it has no values (a tensor on the device meta)")
    if tensor.is_nested:
        raise MismatchError("it is a nested tensor")
    if tensor.layout is not torch.strided:
        if tensor.numel() > _MOST_DENSE:
            raise MismatchError(
                f"it is sparse ({str(tensor.layout).removeprefix('torch.')}), and with "
                f"{tensor.numel():,} elements too large to be made dense"
            )
        return tensor.to_dense()
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > max(_MOST_REPEATED, stored):
        raise MismatchError(
            f"it has {tensor.numel():,} elements, which repeat the {stored:,} that are stored"
        )
    return tensor.resolve_conj().resolve_neg()


def _leaves(state: object, place: Place, *, by_outline: bool) -> Iterator[tuple[Place, object]]:
    if type(state) is Stored:
        if state.span != math.prod(state.size) * state.dtype.itemsize:
            raise _NeedsTorchError  # Parts of a larger storage.
        yield place, state
    elif isinstance(state, dict) and state:
        if by_outline and TAG in state:
            raise _NeedsTorchError
        for key, value in state.items():
            yield from _leaves(value, (*place, key), by_outline=by_outline)
    elif isinstance(state, (list, tuple)) and state and not isinstance(state, torch.Size):
        for index, value in enumerate(cast("list[object]", state)):
            yield from _leaves(value, (*place, index), by_outline=by_outline)
    elif by_outline and isinstance(state, torch.Tensor):
        raise _NeedsTorchError
    else:
        yield place, _as_tensor(state)


def _as_tensor(value: object) -> object:
    """Return an array of numbers as a tensor, and anything else as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        with suppress(TypeError, ValueError):
            return torch.as_tensor(value, device="cpu")
    return value
