"""Which process this is, and how it talks to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from lightning_sbckpt._world.collectives import (
    broadcast_object,
    gather_objects,
)
from lightning_sbckpt.errors import SBCheckpointError
from lightning_sbckpt.typing import World

T = TypeVar("T")
U = TypeVar("U")


class SingleProcess:
    """A world of one: nothing to wait for, nobody to tell."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Return at once."""

    def broadcast(self, obj: T) -> T:
        """Return `obj`."""
        return obj

    def gather(self, obj: T) -> list[T] | None:
        """Return `obj` alone."""
        return [obj]


class TorchDistributed:
    """The default process group of `torch.distributed`, as `torchrun` sets it up."""

    @property
    def rank(self) -> int:
        """The rank in the default group."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """The size of the default group."""
        return dist.get_world_size()

    def barrier(self) -> None:
        """Wait for the default group."""
        dist.barrier()

    def broadcast(self, obj: T) -> T:
        """Return rank zero's `obj`, pickled on the way between the ranks of this one job."""
        return broadcast_object(obj)

    def gather(self, obj: T) -> list[T] | None:
        """Return every rank's `obj` on rank zero, pickled on the way."""
        return gather_objects(obj)


def current_world() -> World:
    """Return the world as it is now: the default process group if there is one.

    Example:
        >>> current_world().size
        1
    """
    if dist.is_available() and dist.is_initialized():
        return TorchDistributed()
    return SingleProcess()


def decided_by_main(world: World, decide: Callable[[], T]) -> T:
    """Return on every rank what `decide` returns on rank zero, the only one to call it.

    Raises:
        Exception: What `decide` raised: on rank zero itself, on the others as `portable_error`.
    """
    outcome: T | Exception | None = None
    if world.rank == 0:
        try:
            outcome = decide()
        except Exception as error:
            outcome = error
    told = world.broadcast(portable_error(outcome) if world.size > 1 else outcome)
    for result in (outcome, told):
        if isinstance(result, Exception):
            raise result
    return cast("T", told)


def decided_together(
    world: World, failure: Exception | None, own: T, decide: Callable[[list[T]], U]
) -> U:
    """Return on every rank what rank zero decides from what every rank brings.

    If something has failed on a rank, nothing is decided, and every rank raises.

    Args:
        world: The ranks; all of them call this, whatever has failed on them.
        failure: What has failed on this rank.
        own: What this rank brings.
        decide: Called on rank zero with what each rank has brought.

    Raises:
        Exception: What has failed on this rank; or else, as in `decided_by_main`, what failed first
            on another one or in `decide`.
    """
    remote = world.size > 1 and world.rank != 0
    try:
        brought = world.gather((portable_error(failure, world.rank) if remote else failure, own))
        return decided_by_main(world, lambda: decide(_without_failures(brought or [])))
    except Exception:
        # A rank that failed raises its own exception, with its traceback, also if others are gone.
        if failure is not None:
            raise failure  # noqa: B904 - the other is the same one, or says less
        raise


def _without_failures(brought: list[tuple[Exception | None, T]]) -> list[T]:
    for failure, _ in brought:
        if failure is not None:
            raise failure
    return [own for _, own in brought]


def portable_error(result: T, rank: int = 0) -> T | SBCheckpointError:
    """Return what can go to the other ranks: an exception may hold what can't be pickled.

    One of this package keeps its type, so that every rank can handle it alike.
    """
    if isinstance(result, SBCheckpointError) and result.failed_on_rank is not None:
        return result  # It has come from another rank.
    if isinstance(result, Exception):
        ours = type(result).__module__ == SBCheckpointError.__module__
        kind = cast("type[SBCheckpointError]", type(result)) if ours else SBCheckpointError
        told = kind(f"failed on rank {rank}: {type(result).__name__}: {result}")
        told.failed_on_rank = rank
        return told
    return result
