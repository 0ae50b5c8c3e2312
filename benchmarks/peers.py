"""The libraries that are measured, each behind the same few methods.

A peer saves the whole state the way its documentation shows first. What does not flush to the disk
by itself is flushed afterwards, as part of the save, since a checkpoint that a power cut takes away
is not saved yet; the name then ends in "+ fsync".
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.disk import flush_folder
from benchmarks.measure import UnavailableError, described
from benchmarks.peer import OURS, Peer
from benchmarks.peers_torch import (
    Dcp,
    DcpAsync,
    DcpAsyncReused,
    Safetensors,
    TorchCheckpointing,
    TorchSave,
    TorchSaveMapped,
)
from benchmarks.peers_trainers import LightningAsync, LightningSave, SpeechBrain
from benchmarks.states import State

FOUND = f"{OURS}, verified before"


class Ours(Peer):
    """This package, without Lightning."""

    def __init__(self, mode: str) -> None:
        self.name = f"{OURS}, {mode}"
        self.mode = mode
        self.is_async = mode != "sync"

    def open(self, state: State, folder: Path) -> None:
        """Make the checkpointer."""
        from lightning_sbckpt import Checkpointer
        from lightning_sbckpt.errors import ConfigurationError

        super().open(state, folder)
        try:
            self.checkpointer = Checkpointer(
                folder,
                {"model": state.model, "optimizer": state.optimizer},
                save_mode=self.mode,
            )
        except ConfigurationError as error:
            raise UnavailableError("not in this release") from error

    def save(self) -> None:
        """Save a checkpoint."""
        self.number += 1
        self.checkpointer.save_checkpoint({"loss": 1.0 / self.number})

    def wait(self) -> None:
        """Wait for the background."""
        self.checkpointer.wait()

    def watch(self) -> None:
        """Wait for the thread that writes; `wait` is for the thread that trains."""
        self.checkpointer.wait_here()
        if not any(self.folder.glob("CKPT*/CKPT.yaml")):
            raise FileNotFoundError(
                f"the save in the background left no checkpoint in {self.folder}"
            )

    def load(self, state: State) -> None:
        """Load by a checkpointer of the other state, as a new process would."""
        from lightning_sbckpt import Checkpointer

        loader = self.checkpointer
        if state is not self.state:
            recoverables = {"model": state.model, "optimizer": state.optimizer}
            loader = Checkpointer(self.folder, recoverables)
        if loader.recover_if_possible() is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")

    def clear(self) -> None:
        """Remove the checkpoints; what else is in the folder is the checkpointer's own."""
        for path in self.folder.glob("CKPT*"):
            shutil.rmtree(path, ignore_errors=True)
        flush_folder(self.folder)

    def close(self) -> None:
        """Let the checkpointer go, with its memory."""
        checkpointer: Any = self.__dict__.pop("checkpointer", None)
        if checkpointer is not None:
            checkpointer.wait()
            getattr(checkpointer, "close", bool)()


class OursFound(Ours):
    """This package, loading a checkpoint that was found, and found whole, before."""

    def __init__(self) -> None:
        super().__init__("sync")
        self.name = FOUND
        self._ready: Any = None

    def before_load(self, state: State) -> None:
        """Find the newest checkpoint, and verify it."""
        from lightning_sbckpt import Checkpointer

        recoverables = {"model": state.model, "optimizer": state.optimizer}
        loader = Checkpointer(self.folder, recoverables, access="read")
        self._ready = loader, loader.find_sound_checkpoint()

    def load(self, state: State) -> None:
        """Load it, and let go of the state: its memory is not to be free just when the next loads."""
        if self._ready is None:
            self.before_load(state)
        (loader, found), self._ready = self._ready, None
        loader.load_checkpoint(found)


SYNC: dict[str, Callable[[], Peer]] = {
    f"{OURS}, sync": lambda: Ours("sync"),
    TorchSave.name: TorchSave,
    Safetensors.name: Safetensors,
    Dcp.name: Dcp,
    "torch_checkpointing + fsync": lambda: TorchCheckpointing(is_async=False),
    SpeechBrain.name: SpeechBrain,
    LightningSave.name: LightningSave,
}
ASYNC: dict[str, Callable[[], Peer]] = {
    f"{OURS}, async": lambda: Ours("async"),
    f"{OURS}, overlap": lambda: Ours("overlap"),
    DcpAsync.name: DcpAsync,
    DcpAsyncReused.name: DcpAsyncReused,
    "torch_checkpointing async + fsync": lambda: TorchCheckpointing(is_async=True),
    LightningAsync.name: LightningAsync,
}
LOADING: dict[str, Callable[[], Peer]] = {
    FOUND: OursFound,
    **{name: make for name, make in SYNC.items() if name != TorchSave.name},
    TorchSave.name: TorchSave,
    TorchSaveMapped.name: TorchSaveMapped,
}


@contextmanager
def opened(
    makers: Mapping[str, Callable[[], Peer]],
    state: State,
    folder: Path,
    failures: dict[str, str],
) -> Iterator[dict[str, Peer]]:
    """Give the peers that are here, ready to save a state; note why the others are not."""
    peers: dict[str, Peer] = {}
    for number, (name, make) in enumerate(makers.items()):
        peer = make()
        try:
            peer.open(state, folder / f"peer-{number}")
        except Exception as error:
            failures[name] = described(error)
        else:
            peers[name] = peer
    try:
        yield peers
    finally:
        for peer in peers.values():
            peer.close()
            shutil.rmtree(peer.folder, ignore_errors=True)
