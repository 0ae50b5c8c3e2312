"""Reading the bytes of tensors from their file into the memory where they belong.

They are read by `preadv`, by a few threads, and not copied out of a mapping of the file: with the
file in the page cache a mapping takes as long or longer, since its page faults cost what a read
costs; and when a mapped file is cut off, looking at it kills the process, while a read is short and
can be told.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from lightning_sbckpt._format.index import Identity, Stored, identity_of, read_outline
from lightning_sbckpt._io.devices import Begun, begin_sending, device_of
from lightning_sbckpt._io.memory import Buffers, Memory, address_of
from lightning_sbckpt._io.open_regular import open_to_read
from lightning_sbckpt._io.progress import moved
from lightning_sbckpt._io.threads import run_all
from lightning_sbckpt.errors import DamagedCheckpointError

# Two, so that one is read into while a device copies from the other.
_halves = Buffers(2, 16 * 2**20)
# One read; large enough that its cost is that of its bytes, small enough to share among threads.
_PIECE = 4 * 2**20
_ALIGNMENT = 64

Sent = tuple[torch.Tensor, int]
"""Bytes of a tensor on a device, as a one-dimensional tensor, and where in the file they lie."""

Wanted = tuple[int, int, int]
"""An address, how many bytes go there, and where in the file they lie."""


def read_owned(path: Path, *, grouped: bool = False) -> tuple[object] | None:
    """Return the state in a file, in memory of its own, or None if only torch can read it.

    Args:
        path: The file.
        grouped: See `Memory`.

    Raises:
        DamagedCheckpointError: See `read_into`.
    """
    memory = Memory(grouped=grouped)
    storages: dict[int, torch.UntypedStorage] = {}

    def make(stored: Stored) -> torch.Tensor:
        # Tensors that shared their memory share it again.
        storage = storages.get(stored.begin)
        if storage is None or not stored.nbytes:
            storage = memory.storage(stored.nbytes)
            if stored.nbytes:
                storages[stored.begin] = storage
        if storage.nbytes() != stored.nbytes:
            raise ValueError("two records begin at one place")
        return _tensor(storage, stored, stored.offset)

    outline = read_outline(path, make)
    if outline is None:
        return None
    memory.ask_for_huge_pages()
    wanted = [(storage.data_ptr(), storage.nbytes(), at) for at, storage in storages.items()]
    read_into(path, outline.identity, wanted)
    return (outline.state,)


def read_tensors(
    path: Path, identity: Identity, wanted: Sequence[Stored], *, grouped: bool = False
) -> list[torch.Tensor]:
    """Return tensors of a file, each in a storage of its own.

    Args:
        path: The file.
        identity: What the file was when its outline was read.
        wanted: The tensors.
        grouped: See `Memory`.

    Raises:
        DamagedCheckpointError: See `read_into`.
    """
    memory = Memory(grouped=grouped)
    storages = [memory.storage(stored.span) for stored in wanted]
    memory.ask_for_huge_pages()
    places = [
        (storage.data_ptr(), storage.nbytes(), stored.place)
        for storage, stored in zip(storages, wanted, strict=True)
    ]
    read_into(path, identity, places)
    return [_tensor(storage, stored, 0) for storage, stored in zip(storages, wanted, strict=True)]


def _tensor(storage: torch.UntypedStorage, stored: Stored, offset: int) -> torch.Tensor:
    tensor = torch.empty(0, dtype=stored.dtype, device="cpu")
    tensor.set_(storage, offset, stored.size, stored.stride)
    tensor.requires_grad = stored.requires_grad
    return tensor


def read_into(path: Path, identity: Identity, wanted: Iterable[Wanted]) -> None:
    """Read bytes of a file into memory.

    Args:
        path: The file.
        identity: What the file was when its outline was read.
        wanted: What is read, and where it goes; the memory must stay until this returns.

    Raises:
        DamagedCheckpointError: The file is not what it was, or the disk can't read it.
    """
    pieces = [
        (address + done, min(_PIECE, size - done), begin + done)
        for address, size, begin in wanted
        for done in range(0, size, _PIECE)
    ]
    if not pieces:
        return
    # In the order of the file, so that what isn't in the page cache is read ahead.
    pieces.sort(key=lambda piece: piece[2])
    try:
        with open_to_read(path) as stream:
            descriptor = stream.fileno()
            if identity_of(descriptor) != identity:
                raise _changed(path, "its size, time or inode is another")
            run_all(
                lambda piece: _read_piece(path, descriptor, piece),
                pieces,
                most=sum(size for _, size, _ in pieces) // _PIECE,
            )
            if identity_of(descriptor) != identity:
                raise _changed(path, "its size or time is another")
    except OSError as error:
        raise DamagedCheckpointError(
            f"{path} can't be read: {error.strerror or error}. What was loaded before stays "
            "loaded; recover from another checkpoint"
        ) from error


def read_to_devices(path: Path, identity: Identity, wanted: Sequence[Sent]) -> None:
    """Read bytes of a file into memory of devices, through two buffers of the processor.

    Args:
        path: The file.
        identity: What the file was when its outline was read.
        wanted: What is read, and where it goes.

    Raises:
        DamagedCheckpointError: See `read_into`.
    """
    devices = {device_of(target.untyped_storage()) for target, _ in wanted}
    if not wanted:
        return
    with _halves.borrowed(devices) as halves:
        sent = [Begun() for _ in halves]
        try:
            for turn, batch in enumerate(_batches(wanted, len(halves[0]))):
                half, number = halves[turn % len(halves)], turn % len(halves)
                sent[number].wait()
                places = [half[at : at + len(target)] for target, _, at in batch]
                read_into(
                    path,
                    identity,
                    [
                        (address_of(place), len(place), begin)
                        for place, (_, begin, _) in zip(places, batch, strict=True)
                    ],
                )
                targets = [target for target, _, _ in batch]
                sent[number] = begin_sending(zip(targets, places, strict=True))
        finally:
            # The buffers are somebody else's next.
            for begun in sent:
                begun.wait()


def _batches(wanted: Sequence[Sent], size: int) -> Iterator[list[tuple[torch.Tensor, int, int]]]:
    """Yield what fits into a buffer together, each with where it lies in there."""
    batch: list[tuple[torch.Tensor, int, int]] = []
    used = 0
    for target, begin in sorted(wanted, key=lambda each: each[1]):
        done = 0
        while done < len(target):
            if used == size:
                yield batch
                batch, used = [], 0
            part = target[done : done + size - used]
            batch.append((part, begin + done, used))
            done += len(part)
            used = min(size, -(-(used + len(part)) // _ALIGNMENT) * _ALIGNMENT)
    if batch:
        yield batch


def _read_piece(path: Path, descriptor: int, piece: Wanted) -> None:
    address, size, begin = piece
    target = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    done = 0
    while done < size:
        count = os.preadv(descriptor, [target[done:]], begin + done)
        if not count:
            raise _changed(path, f"it ends at byte {begin + done:,}")
        done += count
        moved(count)


def _changed(path: Path, how: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} was changed while it was read: {how}. What was loaded of it, or before it, stays "
        "loaded; load again, this or another checkpoint"
    )
