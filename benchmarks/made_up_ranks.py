"""What rank zero has to do for many ranks: their states are made up, and all it does is done.

The way through the network is left out: no machine here has so many processes. What arrives is what
would arrive, byte for byte.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torchmetrics.classification import MulticlassAccuracy

from benchmarks import ranks
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.load import load_state
from lightning_sbckpt._layout.manifest import FileDigest, Manifest, dump_manifest
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.per_rank import pack, state_of_rank
from lightning_sbckpt.rng import isolated_rng

T = TypeVar("T")

# So many different places in the data; each rank has random states of its own.
_PLACES = 64


@dataclass(frozen=True)
class Cost:
    """What one save and one resume cost.

    Attributes:
        arriving: Bytes that arrive at rank zero.
        unpacking: Seconds to make objects of them.
        stacking: Seconds to make the parts of the checkpoint of these.
        writing: Seconds to write, flush and publish the checkpoint.
        written: Its bytes.
        reading: Seconds for a rank to read the files back and to find its own state.
    """

    arriving: int
    unpacking: float
    stacking: float
    writing: float
    written: int
    reading: float


class Arrived:
    """A world whose other ranks have all sent what they have."""

    rank = 0

    def __init__(self, objects: list[Any]) -> None:
        self.size = len(objects)
        self._objects = objects

    def barrier(self) -> None:
        """Return at once."""

    def broadcast(self, obj: T) -> T:
        """Return `obj`."""
        return obj

    def gather(self, obj: T) -> list[T] | None:
        """Return what has arrived."""
        return self._objects


def states(size: int) -> list[dict[str, object]]:
    """Return the states of so many ranks."""
    metric = MulticlassAccuracy(3)
    with isolated_rng():
        loadings = []
        for rank in range(min(size, _PLACES)):
            ranks.seed(rank)
            loadings.append(ranks.Loading(rank, size))
        found = []
        for rank, loading in zip(range(size), itertools.cycle(loadings), strict=False):
            ranks.seed(rank)
            metric.reset()
            metric.update(torch.randint(3, (8,)), torch.randint(3, (8,)))
            found.append(ranks.state_of(loading, metric))
    return found


def packed(state: dict[str, object]) -> object:
    """Return what a rank sends: the stacked form."""
    return {name: pack(one) for name, one in state.items()}


def stacked(arrived: list[Any]) -> dict[str, TakenState]:
    """Return the parts of the stacked form."""
    return exact.parts_of_ranks({}, Arrived(arrived))


def listed(arrived: list[Any]) -> dict[str, TakenState]:
    """Return the parts as lists of what has arrived."""
    return {name: TakenState({"ranks": [one[name] for one in arrived]}) for name in arrived[0]}


def cost(size: int, form: str, folder: Path) -> Cost:
    """Save and read back the states of so many ranks.

    Args:
        size: How many ranks.
        form: `"stacked"` or `"lists"`.
        folder: Where to save, on a real disk.
    """
    of_ranks = states(size)
    send: Callable[[dict[str, object]], object] = packed if form == "stacked" else lambda one: one
    sent = [pickle.dumps(send(one)) for one in of_ranks]
    del of_ranks
    began = time.monotonic()
    arrived = [pickle.loads(data) for data in sent]  # noqa: S301 - pickled above
    unpacked = time.monotonic()
    made = (stacked if form == "stacked" else listed)(arrived)
    stacking = time.monotonic()
    checkpointer = Checkpointer(folder / f"{form}{size}")
    checkpointer.add_recoverables(dict(made))
    checkpoint = cast("Any", checkpointer.save_checkpoint())
    wrote = time.monotonic()
    for path in checkpoint.paramfiles.values():
        state_of_rank(cast("Any", load_state(path)), size - 1)
    read = time.monotonic()
    return Cost(
        arriving=sum(map(len, sent[1:])),
        unpacking=unpacked - began,
        stacking=stacking - unpacked,
        writing=wrote - stacking,
        written=sum(path.stat().st_size for path in checkpoint.paramfiles.values()),
        reading=read - wrote,
    )


def manifest_of(files: int) -> tuple[int, float]:
    """Return the bytes of a manifest of so many files, and the seconds to make it."""
    digests = {f"model.dcp/__{n}_0.distcp": FileDigest(n, f"{n:032x}") for n in range(files)}
    began = time.monotonic()
    data = dump_manifest(Manifest(digests, {"run": "0" * 32, "reason": "validation"}))
    return len(data), time.monotonic() - began


def adds(size: int) -> dict[str, int]:
    """Return the bytes that each further rank adds to each file, after so many ranks."""
    more, fewer = _stored(size), _stored(size // 2)
    return {name: round((more[name] - fewer[name]) / (size - size // 2)) for name in more}


def _stored(size: int) -> dict[str, int]:
    """Return the bytes of the tensors in each file."""
    made = stacked([packed(state) for state in states(size)])
    return {name: sum(_storages(part.take()).values()) for name, part in made.items()}


def _storages(value: object) -> dict[int, int]:
    """Return the bytes of all storages, each once, as a file has them."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    members: Any = value.values() if isinstance(value, dict) else value
    found: dict[int, int] = {}
    if isinstance(value, (dict, list, tuple)):
        for member in members:
            found.update(_storages(member))
    return found
