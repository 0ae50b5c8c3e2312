"""PyTorch's own ways to save, and safetensors."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk import flush
from benchmarks.measure import UnavailableError
from benchmarks.peer import Peer, require, take_dump
from benchmarks.states import State


class TorchSave(Peer):
    """`torch.save` of one dictionary."""

    name = "torch.save + fsync"
    mmap = False

    def _write(self, path: Path) -> None:
        torch.save(self.state.as_dict(), path)
        flush(path)

    def load(self, state: State) -> None:
        """`torch.load`, then `load_state_dict`."""
        take_dump(state, torch.load(self.path, weights_only=True, mmap=self.mmap))


class TorchSaveMapped(TorchSave):
    """The same file, mapped into memory when it is loaded."""

    name = "torch.load, mmap=True"
    mmap = True


class Safetensors(Peer):
    """`safetensors.torch.save_file`, with what is no tensor as JSON in its header."""

    name = "safetensors + fsync"

    def open(self, state: State, folder: Path) -> None:
        """Find the library."""
        require("safetensors")
        super().open(state, folder)

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = dict(self.state.model.state_dict(prefix="model."))
        optimizer = self.state.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        save_file(tensors, path, {"groups": json.dumps(optimizer["param_groups"])})
        flush(path)

    def load(self, state: State) -> None:
        """`safe_open`, then `load_state_dict`."""
        from safetensors import safe_open

        dump: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}}
        with safe_open(self.path, "pt") as stream:
            dump["optimizer"]["param_groups"] = json.loads(stream.metadata()["groups"])
            for name in stream.keys():  # noqa: SIM118 - it is no mapping
                part, _, rest = name.partition(".")
                if part == "model":
                    dump["model"][rest] = stream.get_tensor(name)
                    continue
                index, _, key = rest.partition(".")
                dump["optimizer"]["state"].setdefault(int(index), {})[key] = stream.get_tensor(name)
        take_dump(state, dump)


class Dcp(Peer):
    """`torch.distributed.checkpoint` in one process; it flushes its files itself."""

    name = "DCP"
    loads_into_fresh = False

    def _write(self, path: Path) -> None:
        from torch.distributed import checkpoint as dcp

        dcp.save(self.state.as_dict(), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
        flush(path)

    def load(self, state: State) -> None:
        """Load in place."""
        from torch.distributed import checkpoint as dcp

        dump = state.as_dict()
        dcp.load(dump, checkpoint_id=self.path, no_dist=True)
        take_dump(state, dump)


class DcpAsync(Dcp):
    """DCP's `async_save`."""

    name = "DCP async"
    is_async = True

    def open(self, state: State, folder: Path) -> None:
        """Make the stager."""
        super().open(state, folder)
        self.future: Any = None
        self.stager = self._make_stager()

    def _make_stager(self) -> Any:
        return None

    def _write(self, path: Path) -> None:
        from torch.distributed import checkpoint as dcp

        self.wait()
        self.future = dcp.async_save(
            self.state.as_dict(),
            storage_writer=dcp.FileSystemWriter(path),
            async_stager=self.stager,
            no_dist=True,
        )

    def wait(self) -> None:
        """Wait for the future, and flush the folder."""
        if self.future is not None:
            self.future.result()
            flush(self.path)
            self.future = None

    def close(self) -> None:
        """Close the stager."""
        self.wait()
        if self.stager is not None:
            self.stager.close()


class DcpAsyncReused(DcpAsync):
    """DCP's `async_save` with a stager that keeps its memory from save to save."""

    name = "DCP async, staging reused"

    def _make_stager(self) -> Any:
        try:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        except ImportError as error:
            raise UnavailableError("this torch has no DefaultStager") from error
        # Pinned memory, shared memory, staging in a thread and non-blocking copies need CUDA.
        on_cpu = (False, False, False, False)
        return DefaultStager(StagingOptions(*on_cpu))


class TorchCheckpointing(Peer):
    """`torch_checkpointing`, PyTorch's newest; its save is synchronous or by a process."""

    loads_into_fresh = False

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async
        self.name = f"torch_checkpointing{' async' if is_async else ''} + fsync"

    def open(self, state: State, folder: Path) -> None:
        """Make the manager."""
        require("torch_checkpointing")
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().open(state, folder)
        made = CheckpointManager.Config
        config = made.with_async_save() if self.is_async else made.with_sync_save()
        # Its default, unbuffered writes, fails on ext4 unless every size happens to be aligned.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(config)
        self.future: Any = None

    def save(self) -> None:
        """Save; asynchronously, the copy may still be going on."""
        self.wait()
        self.number += 1
        self.future = self.manager.save(str(self.path), self.state.as_dict())
        if not self.is_async:
            flush(self.path)

    def wait(self) -> None:
        """Wait for the process, and flush what it wrote."""
        if self.future is not None:
            self.future.result()
            flush(self.path)
            self.future = None

    def guard(self) -> AbstractContextManager[object]:
        """Let no optimizer step begin while the state is being copied."""
        lock: AbstractContextManager[object] = self.manager.lock()
        return lock

    def load(self, state: State) -> None:
        """Load in place."""
        take_dump(state, self.manager.load(str(self.path), into=state.as_dict()))

    def close(self) -> None:
        """End the process."""
        self.wait()
        self.manager.close()
