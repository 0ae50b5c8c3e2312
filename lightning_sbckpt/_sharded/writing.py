"""Writing sharded states: every rank its own pieces, into one folder for each state.

The collectives are DCP's, which carry what goes wrong on one rank to all others. What several
ranks have in common is written by the lowest of them, so that it is of one moment and of one rank.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning_sbckpt._format.encode import encode
from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._layout.publish import SHARDED_EXT
from lightning_sbckpt._sharded.contents import METADATA_NAME
from lightning_sbckpt._sharded.states import State, sharded_leaves
from lightning_sbckpt._world.collectives import objects_group
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.typing import World

Digests: TypeAlias = "dict[str, FileDigest]"


def write_sharded(
    states: Mapping[str, State], staged: Path, world: World, storage: LocalStorage
) -> Digests:
    """Write states into a staged checkpoint, each rank its own pieces; every rank calls this.

    Args:
        states: The states of this rank, by the name of the recoverable; the same names everywhere.
        staged: The folder of the checkpoint.
        world: The ranks.
        storage: The disk.

    Returns:
        What was written, by name within the checkpoint: on rank zero by all ranks, elsewhere by
        this one.

    Raises:
        SaveError: A rank could not write; it is raised on every rank.
    """
    written: Digests = {}
    for name in sorted(states):
        writer = _Writer(staged / f"{name}{SHARDED_EXT}", storage)
        _save(name, states[name], writer, Planner(name), world.rank, objects_group())
        written.update(_all_digests(writer, world.gather(writer.digests)))
    return written


def write_planned(
    plans: Mapping[str, Planner],
    staged: Path,
    rank: int,
    storage: LocalStorage,
    group: dist.ProcessGroup | None,
) -> Digests:
    """Write what was planned and copied before, as `write_sharded` does.

    Args:
        plans: By the name of the recoverable; each needs no state any more.
        staged: The folder of the checkpoint.
        rank: Of this process.
        storage: The disk.
        group: All ranks, by whom nothing else is said there now; None without `torch.distributed`.

    Raises:
        SaveError: A rank could not write; it is raised on every rank.
    """
    written: Digests = {}
    for name in sorted(plans):
        # Copies lie in the memory of the processor. To bring others there ahead of writing them, DCP asks
        # for a stream of the current device, which in this thread is the first one, whoever uses it.
        writer = _Writer(staged / f"{name}{SHARDED_EXT}", storage, copy_ahead=0)
        _save(name, {}, writer, plans[name], rank, group)
        boxes: list[Digests] | None = [writer.digests]
        if group is not None:
            boxes = [{}] * dist.get_world_size(group) if rank == 0 else None
            try:
                dist.gather_object(writer.digests, boxes, dst=0, group=group)
            except Exception as error:
                raise _unreachable(name, error) from error
        written.update(_all_digests(writer, boxes))
    return written


def require_all_ranks(names: Iterable[str], world: World) -> None:
    """Refuse a world that is only a part of the ranks, of which each has pieces.

    Raises:
        SaveError: It is.
    """
    if dist.is_initialized() and dist.get_world_size() != world.size:
        raise SaveError(
            f"the sharded states {', '.join(sorted(names))} were not written: {world.size} ranks "
            f"save together, and torch.distributed has {dist.get_world_size()}, each with its own "
            "pieces. Let all ranks save together. Nothing of this checkpoint is kept; earlier ones "
            "are whole"
        )


def _save(
    name: str,
    state: State,
    writer: _Writer,
    planner: Planner,
    rank: int,
    group: dist.ProcessGroup | None,
) -> None:
    try:
        with nullcontext() if dist.is_initialized() else _quiet():
            save(dict(state), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _failure(name, error, rank) from error
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> SaveError:
    # A collective that broke: another rank is gone, and nothing can be agreed on any more.
    return SaveError(
        f"the sharded state {name!r} was not written: the other ranks can't be reached "
        f"({type(error).__name__}: {error}). Nothing of this checkpoint is kept; earlier ones are "
        "whole"
    )


def _all_digests(writer: _Writer, of_ranks: list[Digests] | None) -> Digests:
    folder = Path(writer.path).name
    found = {}
    for digests in of_ranks or [writer.digests]:
        found.update({f"{folder}/{file}": each for file, each in digests.items()})
    return found


def _failure(name: str, error: CheckpointException, rank: int) -> SaveError:
    first = min(error.failures)
    cause = error.failures[rank if rank in error.failures else first][0]
    if rank in error.failures and isinstance(cause, SBCheckpointError):
        text = str(cause)
    else:
        reason = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
        told = "" if rank in error.failures else f"failed on rank {first}: "
        text = (
            f"the sharded state {name!r} was not written: {told}{reason}. Nothing of this "
            "checkpoint is kept; earlier ones are whole"
        )
    return SaveError(text)


class _Writer(FileSystemWriter):
    """Writes through a `LocalStorage`, flushed; and tells nobody where on this machine.

    Args:
        folder: Of the state.
        storage: The disk.
        copy_ahead: How many bytes of tensors on a device are copied before they are written.
    """

    def __init__(self, folder: Path, storage: LocalStorage, copy_ahead: int = 10_000_000) -> None:
        # It is flushed below, through the storage.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=copy_ahead)
        self.fs = _Files(storage)
        self.digests: Digests = {}
        self._storage = storage

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces, and flush them before the others hear of it."""
        future = super().write_data(plan, planner)
        results = future.wait()
        self._seal({result.storage_data.relative_path for result in results})
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what all ranks' pieces are; rank zero alone."""
        super().finish(metadata, results)
        self._seal({METADATA_NAME})

    def storage_meta(self) -> StorageMeta:
        """Return nothing of where it is: a checkpoint may be moved."""
        return StorageMeta()

    def _seal(self, names: set[str]) -> None:
        for name in sorted(names):
            path = Path(self.path) / name
            self.digests[name] = self._storage.seal(path)


class _Files(FileSystem):
    """Tells a `LocalStorage` of what is about to change."""

    def __init__(self, storage: LocalStorage) -> None:
        super().__init__()
        self._storage = storage

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """Open a file."""
        if "w" in mode:
            self._storage.before("create", Path(path))
            self._storage.before("write", Path(path))
        with super().create_stream(path, mode) as stream:
            yield stream

    def mkdir(self, path: Any) -> None:
        """Make the folder; whichever rank comes first does."""
        self._storage.before("make_dir", Path(path))
        super().mkdir(path)

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file."""
        self._storage.before("rename", Path(path), Path(new_path))
        super().rename(path, new_path)


class Planner(DefaultSavePlanner):
    """Has what is no tensor written as what tensors-only loading takes."""

    def __init__(self, name: str) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._name = name

    def set_up_planner(
        self,
        state_dict: Any,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state; refuse keys that would come back as others."""
        _require_text_keys(self._name, state_dict, "")
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        """Return the bytes of a value, or the tensor."""
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        encoded, pickled = encode(object)
        if pickled or any(sharded_leaves(object)):
            raise SaveError(
                f"the sharded state {self._name!r} was not written: {write_item.index.fqn} is a "
                f"{type(object).__qualname__}, which only pickle can hold, expected tensors and "
                "plain values. Keep it out of the state, or save it as a recoverable of its own. "
                "Nothing of this checkpoint is kept; earlier ones are whole"
            )
        buffer = io.BytesIO()
        torch.save(encoded, buffer)
        return buffer


def _require_text_keys(name: str, value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise SaveError(
                    f"the sharded state {name!r} was not written: its key {key!r}{where} is a "
                    f"{type(key).__name__}, and torch.distributed.checkpoint would make text of "
                    "it. Use keys of type str. Nothing of this checkpoint is kept; earlier ones "
                    "are whole"
                )
            _require_text_keys(name, item, f" in {key!r}{where}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_text_keys(name, item, where)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # One process is a world, too.
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavail)")
        yield
