"""What all peers have in common: the methods by which they are measured."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.disk import flush_folder
from benchmarks.measure import UnavailableError, timed
from benchmarks.states import State

OURS = "lightning-sbckpt"


class Peer:
    """One way to save a state and to load it again.

    Attributes:
        name: As it stands in the tables.
        is_async: Whether `save` returns before the checkpoint is durable.
        loads_into_fresh: Whether `load` works on an optimizer that has no moments yet.
    """

    name = ""
    is_async = False
    loads_into_fresh = True

    def open(self, state: State, folder: Path) -> None:
        """Prepare to save a state into a folder of this peer's own.

        Raises:
            UnavailableError: The library, or what is needed of it, is not here.
        """
        self.state = state
        self.folder = folder
        self.number = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """Where the newest save is."""
        return self.folder / f"{self.number:05d}"

    def save(self) -> None:
        """Save, and return when the caller may go on."""
        self.number += 1
        self._write(self.path)

    def wait(self) -> None:
        """Return when all saves are durable."""

    def before_load(self, state: State) -> None:
        """Do what is not part of loading."""

    def load(self, state: State) -> None:
        """Load the newest save into a live state."""
        raise NotImplementedError

    def watch(self) -> None:
        """Return when all saves are durable; called in a thread, while the training goes on."""
        self.wait()

    def guard(self) -> AbstractContextManager[object]:
        """Give what this library wants around an optimizer step while a save goes on."""
        return nullcontext()

    def clear(self) -> None:
        """Remove all saves, durably."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        flush_folder(self.folder)

    def close(self) -> None:
        """Let go of everything."""

    def _write(self, path: Path) -> None:
        raise NotImplementedError


def saver(peer: Peer, state: State, *, wait: bool = True) -> Callable[[], float]:
    """Return what saves a changed state, removes the checkpoint, and returns the seconds of `save`."""

    def save() -> float:
        state.change()
        seconds = timed(peer.save)
        if wait:
            peer.wait()
        peer.clear()
        return seconds

    return save


def take_dump(state: State, dump: Any) -> None:
    """Give model and optimizer the states in a dictionary."""
    state.model.load_state_dict(dump["model"])
    state.optimizer.load_state_dict(dump["optimizer"])


def require(library: str) -> None:
    """Raise `UnavailableError` if a library is not installed."""
    if importlib.util.find_spec(library) is None:
        raise UnavailableError("not installed")


def quiet() -> None:
    """Let the libraries say nothing: their lines and warnings are not what is measured."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "speechbrain", OURS.replace("-", "_")):
        logging.getLogger(name).setLevel(logging.ERROR)
