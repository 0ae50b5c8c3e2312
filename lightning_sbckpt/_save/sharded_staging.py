"""Copies of this rank's pieces, so that training may go on while they are written.

The plan of what this rank would write is made at once, from the live state, and each piece in it is
copied by DCP's own stager, tensor by tensor into memory that is kept from save to save: one copy of
the pieces beside the live ones, never two. Nothing of the live state is needed or held afterwards.

What ranks have to say to each other in the background goes through a group of its own, so that it
can't get between the collectives of training.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.constants import default_pg_timeout

from lightning_sbckpt._io.devices import copy_by_themselves
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._save.arena import allocate
from lightning_sbckpt._sharded.states import State
from lightning_sbckpt._sharded.writing import Digests, Planner, write_planned
from lightning_sbckpt.errors import SaveError

# What processors and torch's own allocator are used to.
_ALIGNMENT = 64

# All ranks come from one collective to make a group: who takes longer is gone.
_MEETING = timedelta(minutes=2)


class Frozen(Planner):
    """A plan that is made already, and the copies of what it is to write.

    Args:
        name: Of the recoverable.
        state: Its state on this rank.
        is_coordinator: Whether this is rank zero.

    Attributes:
        data: The tensors and bytes that this rank writes; whoever makes one puts copies of tensors
            here. What a lower rank of its mesh has too, and so writes, isn't among them.
    """

    def __init__(self, name: str, state: State, *, is_coordinator: bool) -> None:
        super().__init__(name)
        super().set_up_planner(dict(state), is_coordinator=is_coordinator)
        self._local = super().create_local_plan()
        self.data: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {
            item.index: super(Frozen, self).resolve_data(item)
            for item in self._local.items
            if not _a_lower_rank_has(self.state_dict[item.index.fqn])
        }
        # It would keep the live tensors from being given back.
        self.state_dict = {}

    def set_up_planner(
        self,
        state_dict: Any,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keep the state of the moment when this was made."""

    def create_local_plan(self) -> SavePlan:
        """Return the plan of that moment."""
        return self._local

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the copy of a piece, or the bytes of a value.

        Raises:
            SaveError: A lower rank was to write it, and does not have it.
        """
        if write_item.index not in self.data:
            raise SaveError(
                f"the sharded state {self._name!r} was not written: {write_item.index.fqn} is "
                "replicated, and a rank that has no such key is the lowest in its mesh, expected "
                "the same keys on all ranks of a mesh. Give it on each of them, or use "
                "save_mode='sync'. Nothing of this checkpoint is kept; earlier ones are whole"
            )
        return self.data[write_item.index]


class Stager:
    """Copies the pieces of one save at a time, and writes them with the other ranks.

    Attributes:
        capacity: Bytes of memory that there are; they grow to the largest state seen.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._memory = memoryview(b"")
        self._owner: object = None
        self._pinned = False
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self._group: dist.ProcessGroup | None = None
        self._within: object = None

    @property
    def has_group(self) -> bool:
        """Whether this rank can talk to the others in the background."""
        if not dist.is_initialized():
            return True  # There are no others.
        return self._group is not None and self._within is dist.group.WORLD

    def make_group(self) -> None:
        """Make the group of all ranks; every rank calls this, in the thread that trains.

        Raises:
            SaveError: A rank did not come.
        """
        # A rank may write for longer than ranks may take to meet. Before torch 2.9 a group of gloo
        # keeps the time limit that it was made with, so it has to be the one for writing.
        may_change = hasattr(dist.ProcessGroup, "set_timeout")
        limit = _MEETING if may_change else default_pg_timeout
        try:
            group = dist.new_group(backend="gloo", timeout=limit)
        except RuntimeError as error:
            raise SaveError(
                "no group of all ranks to save in the background was made: at least one did not "
                f"come within {limit.total_seconds():.0f} seconds, or was gone meanwhile "
                f"({type(error).__name__}: {error}). Nothing of this checkpoint is kept; earlier "
                "ones are whole. Start all ranks again"
            ) from error
        if may_change:
            group.set_timeout(default_pg_timeout)
        self._group, self._within = group, dist.group.WORLD

    def stage(self, states: Mapping[str, State], *, is_coordinator: bool) -> dict[str, Frozen]:
        """Copy this rank's pieces of states; those of the save before are overwritten.

        Args:
            states: By the name of the recoverable.
            is_coordinator: Whether this is rank zero.

        Raises:
            SaveError: There is no memory, or a state can't be saved in this way.
        """
        plans = {
            name: Frozen(name, states[name], is_coordinator=is_coordinator)
            for name in sorted(states)
        }
        # What goes by several names is copied once.
        live: dict[str, torch.Tensor] = {}
        keys = {}
        for name, plan in plans.items():
            for index, found in plan.data.items():
                if isinstance(found, torch.Tensor):
                    keys[name, index] = key = _key(found)
                    live.setdefault(key, found)
        copies = self._copied(live)
        for (name, index), key in keys.items():
            plans[name].data[index] = copies[key]
        return plans

    def write(
        self, plans: Mapping[str, Frozen], staged: Path, rank: int, storage: LocalStorage
    ) -> Digests:
        """Write what was staged, with all other ranks; in the background.

        Raises:
            SaveError: A rank could not write, or can't be reached any more.
        """
        try:
            return write_planned(plans, staged, rank, storage, self._group)
        except SaveError as error:
            if not isinstance(error.__cause__, CheckpointException):
                # The ranks are no longer in step there.
                self._group = None
            raise

    def _copied(self, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Of a class of its own, a quantized one say, only itself knows how it is copied.
        plain = {key: tensor for key, tensor in live.items() if _is_plain(tensor)}
        copies = {
            key: tensor.detach().to("cpu", copy=True)
            for key, tensor in live.items()
            if key not in plain
        }
        with torch.no_grad():
            self._stager.state_dict_cache = self._places(plain)
            copies.update(self._stager.stage(plain))
        self._stager.state_dict_cache = None
        return copies

    def _places(self, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ends = []
        needed = 0
        for tensor in live.values():
            ends.append(needed + tensor.numel() * tensor.element_size())
            needed = -(-ends[-1] // _ALIGNMENT) * _ALIGNMENT
        devices = {tensor.device for tensor in live.values()}
        if needed > self.capacity or copy_by_themselves(devices) != self._pinned:
            self._allocate(needed, devices)
        places = {}
        for (key, tensor), end in zip(live.items(), ends, strict=True):
            size = tensor.numel() * tensor.element_size()
            if size:
                # A storage of its own, which DCP need not copy once more to write it alone.
                flat = torch.frombuffer(self._memory[end - size : end], dtype=torch.uint8)
                places[key] = flat.view(tensor.dtype).view(tensor.shape)
            else:
                places[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return places

    def _allocate(self, size: int, devices: Collection[torch.device]) -> None:
        # First let go of the old: there must never be two.
        self._memory, self._owner, self.capacity = memoryview(b""), None, 0
        try:
            self._memory, self._owner = allocate(size, devices)
        except (OSError, MemoryError, RuntimeError) as error:
            raise SaveError(
                f"the pieces of this rank were not copied: there is no memory for {size:,} bytes "
                f"beside them ({error}). Nothing of this checkpoint is kept; earlier ones are "
                "whole. Use save_mode='sync', which needs no copy"
            ) from error
        self.capacity, self._pinned = size, copy_by_themselves(devices)


def _a_lower_rank_has(found: Any) -> bool:
    # Of DTensors alone it can be known without asking, from their mesh; `Planner` has the lowest of
    # those that have a piece write it.
    placements = getattr(found, "placements", ())
    if not any(each.is_replicate() for each in placements):
        return False
    own = found.device_mesh.get_coordinate()
    with_the_same = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(placements, own, strict=True)
    )
    return int(found.device_mesh.mesh[with_the_same].min()) < dist.get_rank()


def _is_plain(tensor: torch.Tensor) -> bool:
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return known and tensor.layout == torch.strided and not tensor.is_quantized


def _key(tensor: torch.Tensor) -> str:
    if not _is_plain(tensor) or not tensor.numel():
        return str(id(tensor))
    shape = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    return f"{tensor.device} {tensor.data_ptr()} {shape}"
