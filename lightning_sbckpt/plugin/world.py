"""The ranks of a Trainer, as the core sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from lightning_sbckpt._world.world import TorchDistributed
from lightning_sbckpt.plugin.packages import Trainer

T = TypeVar("T")


class TrainerWorld:
    """The ranks of a Trainer's strategy.

    Args:
        trainer: Its strategy's environment has to be set up when the ranks are first asked for.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return self._trainer.global_rank

    @property
    def size(self) -> int:
        """The world size."""
        return self._trainer.world_size

    def barrier(self) -> None:
        """Wait for every rank."""
        self._trainer.strategy.barrier("lightning_sbckpt")

    def broadcast(self, obj: T) -> T:
        """Return rank zero's `obj` on every rank."""
        if self.size == 1:
            return obj
        # Lightning's own would put it into the memory of a GPU.
        if dist.is_available() and dist.is_initialized():
            return TorchDistributed().broadcast(obj)
        return self._trainer.strategy.broadcast(obj, src=0)

    def gather(self, obj: T) -> list[T] | None:
        """Return every rank's `obj`, in order, on rank zero, and None elsewhere."""
        if self.size == 1:
            return [obj]
        return TorchDistributed().gather(obj)

    def highest(self, numbers: Sequence[float]) -> list[float]:
        """Return the highest of each number over the ranks; it costs one small collective."""
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor(
            list(numbers), dtype=torch.float64, device=self._trainer.strategy.root_device
        )
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [float(number) for number in shared.tolist()]
