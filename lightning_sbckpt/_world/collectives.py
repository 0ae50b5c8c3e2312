"""Objects that go from rank to rank, so that the end of the process group can't hang.

Until torch gave up the lock of the interpreter there (pytorch/pytorch#154976, of June 2025),
`destroy_process_group` holds that lock while it waits for gloo's threads. A thread that is the last
to let go of a tensor that Python once had needs the same lock, so both wait for ever. Torch's own
`broadcast_object_list` and `gather_object` leave such tensors behind: a script that saves and then
destroys its group may never end, on a busy machine after a few tries (seen with torch 2.4.1).
With those releases and gloo the tensors are made here instead, and kept. The others have torch's.

Where the default group takes only tensors on a GPU, as NCCL's does, torch's own would put the objects of
all ranks into the memory of rank zero's. They go through a group of gloo, made when the first object does.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.torch_version import TorchVersion

T = TypeVar("T")

logger = logging.getLogger("lightning_sbckpt")

_MAY_HANG = TorchVersion(torch.__version__) < TorchVersion("2.9")
# Far more than gloo's threads can still hold: they let go of a tensor when its collective is done.
_KEPT: deque[torch.Tensor] = deque(maxlen=64)
# The group for objects, and the default group that it was made beside.
_made: dict[str, dist.ProcessGroup | None] = {}


def objects_group() -> dist.ProcessGroup | None:
    """Return the group that objects go through, None for the default one; every rank calls this."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if _made.get("within") is not world:
        kinds = [each.partition(":")[0] for each in dist.get_backend_config().split(",")]
        _made["group"] = None if "cpu" in kinds else _new_group(kinds[0])
        _made["within"] = world
    return _made["group"]


def _new_group(kind: str) -> dist.ProcessGroup | None:
    """Make a group for objects; None, on all ranks, if one of them can't be in it.

    Args:
        kind: Of the devices whose tensors the default group takes.
    """
    group: dist.ProcessGroup | None = None
    timeout = default_pg_timeout
    with suppress(Exception):
        # No public way to the limit that the user has set for the default group.
        backend = cast("Any", dist.group.WORLD)._get_backend(torch.device(kind))  # noqa: SLF001
        timeout = max(timeout, backend.options._timeout)  # noqa: SLF001
    reason: object = "on another rank"
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    except Exception as error:
        reason = error
    if _all_have_one(group is not None, kind):
        return group
    logger.warning(
        "no group of gloo could be made (%s), so what ranks tell each other at saves goes through the "
        "memory of their GPUs; have gloo find the network (GLOO_SOCKET_IFNAME) if that is too much",
        reason,
    )
    return None


def _all_have_one(has_one: bool, kind: str) -> bool:
    # By the group that there is; else some ranks would wait in one and some in the other.
    agreed = torch.tensor(int(has_one), device=kind)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def broadcast_object(obj: T) -> T:
    """Return rank zero's `obj`, pickled on the way between the ranks of this one job."""
    group = objects_group()
    if not _hangs(group):
        box = [obj]
        dist.broadcast_object_list(box, src=0, group=group)
        return box[0]
    if dist.get_rank() == 0:
        sent = _pickled(obj)
        dist.broadcast(_kept(torch.tensor([len(sent)], device="cpu")), src=0, group=group)
        dist.broadcast(_kept(sent), src=0, group=group)
        _empty(sent)
        return obj
    length = _kept(torch.zeros(1, dtype=torch.int64, device="cpu"))
    dist.broadcast(length, src=0, group=group)
    received = _kept(torch.empty(int(length), dtype=torch.uint8, device="cpu"))
    dist.broadcast(received, src=0, group=group)
    found = _unpickled(received)
    _empty(received)
    return cast("T", found)


def gather_objects(obj: T) -> list[T] | None:
    """Return every rank's `obj`, in order, on rank zero, and None elsewhere; pickled on the way."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), objects_group()
    if not _hangs(group):
        # Not all_gather_object: it would hand all objects to all ranks, which is as many times more
        # bytes and unpickling as there are ranks.
        boxes: list[T] | None = [obj] * size if rank == 0 else None
        dist.gather_object(obj, boxes, dst=0, group=group)
        return boxes
    sent = _pickled(obj)
    lengths = [_kept(torch.zeros(1, dtype=torch.int64, device="cpu")) for _ in range(size)]
    dist.all_gather(lengths, _kept(torch.tensor([len(sent)], device="cpu")), group=group)
    # All pieces of a gather have one length.
    longest = max(int(length) for length in lengths)
    sent = _kept(
        torch.cat([sent, torch.zeros(longest - len(sent), dtype=torch.uint8, device="cpu")])
    )
    pieces: list[torch.Tensor] | None = None
    if rank == 0:
        pieces = [_kept(torch.empty(longest, dtype=torch.uint8, device="cpu")) for _ in range(size)]
    dist.gather(sent, pieces, dst=0, group=group)
    _empty(sent)
    if pieces is None:
        return None
    found = [
        _unpickled(piece[: int(length)]) for piece, length in zip(pieces, lengths, strict=True)
    ]
    for piece in pieces:
        _empty(piece)
    return cast("list[T]", found)


def send_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Send tensors to rank zero, which receives them by `receive_tensors`, one after the other."""
    group = objects_group()
    for tensor in tensors.values():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        data = _kept(plain.reshape(-1).view(torch.uint8))
        if len(data):
            dist.send(data, dst=0, group=group)
        _empty(data)


def receive_tensors(places: Mapping[str, torch.Tensor], rank: int) -> None:
    """Receive what a rank sends.

    Args:
        places: Where the tensors go: contiguous ones, of their shapes and types.
        rank: Whose.
    """
    group = objects_group()
    for place in places.values():
        data = _kept(place.view(-1).view(torch.uint8))
        if len(data):
            dist.recv(data, src=rank, group=group)
        _empty(data)


def _hangs(group: dist.ProcessGroup | None) -> bool:
    return _MAY_HANG and (group is not None or dist.get_backend() == "gloo")


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
