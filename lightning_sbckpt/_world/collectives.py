"""Objects that go from rank to rank, so that the end of the process group can't hang.

Until torch gave up the lock of the interpreter there (pytorch/pytorch#154976, of June 2025),
`destroy_process_group` holds that lock while it waits for gloo's threads. A thread that is the last
to let go of a tensor that Python once had needs the same lock, so both wait for ever. Torch's own
`broadcast_object_list` and `gather_object` leave such tensors behind: a script that saves and then
destroys its group may never end, on a busy machine after a few tries (seen with torch 2.4.1).
With those releases and gloo the tensors are made here instead, and kept. The others have torch's.
"""

from __future__ import annotations

import pickle
from collections import deque
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

T = TypeVar("T")

_MAY_HANG = TorchVersion(torch.__version__) < TorchVersion("2.9")
# Far more than gloo's threads can still hold: they let go of a tensor when its collective is done.
_KEPT: deque[torch.Tensor] = deque(maxlen=64)


def broadcast_object(obj: T) -> T:
    """Return rank zero's `obj`, pickled on the way between the ranks of this one job."""
    if not _hangs():
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    if dist.get_rank() == 0:
        sent = _pickled(obj)
        dist.broadcast(_kept(torch.tensor([len(sent)], device="cpu")), src=0)
        dist.broadcast(_kept(sent), src=0)
        _empty(sent)
        return obj
    length = _kept(torch.zeros(1, dtype=torch.int64, device="cpu"))
    dist.broadcast(length, src=0)
    received = _kept(torch.empty(int(length), dtype=torch.uint8, device="cpu"))
    dist.broadcast(received, src=0)
    found = _unpickled(received)
    _empty(received)
    return cast("T", found)


def gather_objects(obj: T) -> list[T] | None:
    """Return every rank's `obj`, in order, on rank zero, and None elsewhere; pickled on the way."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if not _hangs():
        # Not all_gather_object: it would hand all objects to all ranks, which is as many times more
        # bytes and unpickling as there are ranks.
        boxes: list[T] | None = [obj] * size if rank == 0 else None
        dist.gather_object(obj, boxes, dst=0)
        return boxes
    sent = _pickled(obj)
    lengths = [_kept(torch.zeros(1, dtype=torch.int64, device="cpu")) for _ in range(size)]
    dist.all_gather(lengths, _kept(torch.tensor([len(sent)], device="cpu")))
    # All pieces of a gather have one length.
    longest = max(int(length) for length in lengths)
    sent = _kept(
        torch.cat([sent, torch.zeros(longest - len(sent), dtype=torch.uint8, device="cpu")])
    )
    pieces: list[torch.Tensor] | None = None
    if rank == 0:
        pieces = [_kept(torch.empty(longest, dtype=torch.uint8, device="cpu")) for _ in range(size)]
    dist.gather(sent, pieces, dst=0)
    _empty(sent)
    if pieces is None:
        return None
    found = [
        _unpickled(piece[: int(length)]) for piece, length in zip(pieces, lengths, strict=True)
    ]
    for piece in pieces:
        _empty(piece)
    return cast("list[T]", found)


def _hangs() -> bool:
    return _MAY_HANG and dist.get_backend() == "gloo"


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    _KEPT.append(tensor)
    return tensor


def _empty(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that is kept."""
    tensor.data = torch.empty(0, dtype=torch.uint8, device="cpu")


def _pickled(obj: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> object:
    # From a rank of this same job, as torch's own collectives do.
    return pickle.loads(data.numpy().tobytes())  # noqa: S301
