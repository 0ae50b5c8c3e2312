"""Which process this is, and how it talks to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from lightning_sbckpt._world.collectives import (
    broadcast_object,
    gather_objects,
    receive_tensors,
    send_tensors,
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


def gather_tensors(own: Mapping[str, torch.Tensor], world: World) -> list[dict[str, torch.Tensor]]:
    """Return every rank's tensors, in order, on rank zero, and nothing elsewhere.

    They come one at a time, into the memory of the processor: rank zero has the tensors of all ranks
    once, and no other memory is needed than for one of them.

    Args:
        own: This rank's tensors, by name; each rank may have others.
        world: The ranks of the default process group.

    Raises:
        Exception: Rank zero has no memory for them; on the others as `portable_error`.
    """
    if world.size == 1:
        return [dict(own)]
    # What is not strided is rare, and goes with the names.
    plain = {name: each for name, each in own.items() if each.layout is torch.strided}
    forms: list[dict[str, _Form | torch.Tensor]]
    forms = (
        world.gather(
            {
                name: _Form(each.dtype, tuple(each.shape)) if name in plain else each.detach().cpu()
                for name, each in own.items()
            }
        )
        or []
    )
    places: list[dict[str, torch.Tensor]] = []
    # All memory before anybody sends: a rank whose tensors nobody receives would wait for ever.
    decided_by_main(world, lambda: places.extend(map(_places, forms[1:])))
    if world.rank:
        send_tensors(plain)
        return []
    for rank, (form, place) in enumerate(zip(forms[1:], places, strict=True), 1):
        receive_tensors({n: place[n] for n in form if isinstance(form[n], _Form)}, rank)
    return [dict(own), *places]


class _Form(NamedTuple):
    """What a tensor needs to have a place."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _places(forms: Mapping[str, _Form | torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(form.shape, dtype=form.dtype, device="cpu")
        if isinstance(form, _Form)
        else form
        for name, form in forms.items()
    }


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
