"""SpeechBrain's checkpointer and Lightning's Trainer."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from benchmarks.disk import flush
from benchmarks.peer import Peer, quiet, require, take_dump
from benchmarks.states import State


class SpeechBrain(Peer):
    """SpeechBrain's `Checkpointer`."""

    name = "SpeechBrain + fsync"

    def open(self, state: State, folder: Path) -> None:
        """Make the checkpointer."""
        super().open(state, folder)
        self.checkpointer = self._make(state)

    def _make(self, state: State) -> Any:
        recoverables = {"model": state.model, "optimizer": state.optimizer}
        return speechbrain_checkpoints().Checkpointer(self.folder, recoverables)

    def save(self) -> None:
        """Save a checkpoint and flush it."""
        flush(self.checkpointer.save_checkpoint({"loss": 0.5}, verbosity=logging.DEBUG).path)

    def load(self, state: State) -> None:
        """Recover the newest."""
        loader = self.checkpointer if state is self.state else self._make(state)
        loader.recover_if_possible()


class LightningSave(Peer):
    """`Trainer.save_checkpoint` after a fit of one step."""

    name = "Lightning + fsync"

    def open(self, state: State, folder: Path) -> None:
        """Fit one step, so that the Trainer knows model and optimizer."""
        require("lightning")
        super().open(state, folder)
        self.trainer = _fitted_trainer(state, folder, self._plugins())

    def _plugins(self) -> list[Any]:
        return []

    def _write(self, path: Path) -> None:
        self.trainer.save_checkpoint(path)
        flush(path)

    def load(self, state: State) -> None:
        """Read by Lightning's `CheckpointIO`, then `load_state_dict`."""
        dump = self.trainer.strategy.checkpoint_io.load_checkpoint(self.path)
        model = {name.removeprefix("net."): value for name, value in dump["state_dict"].items()}
        take_dump(state, {"model": model, "optimizer": dump["optimizer_states"][0]})


class LightningAsync(LightningSave):
    """The same through `AsyncCheckpointIO`."""

    name = "Lightning AsyncCheckpointIO + fsync"
    is_async = True

    def _plugins(self) -> list[Any]:
        from lightning.pytorch.plugins import AsyncCheckpointIO

        return [AsyncCheckpointIO()]

    def _write(self, path: Path) -> None:
        self.trainer.save_checkpoint(path)

    def wait(self) -> None:
        """Have its thread end, which is how it is waited for, and flush."""
        self.trainer.strategy.checkpoint_io.teardown()
        if self.path.exists():
            flush(self.path)


def speechbrain_checkpoints() -> Any:
    """Import SpeechBrain's checkpoints.

    It imports torchaudio, which need not exist for the torch in use, and calls nothing of it when
    it saves and loads: an empty module stands in for it meanwhile.
    """
    require("speechbrain")
    known = sys.modules.get("speechbrain.utils.checkpoints")
    if known is not None:
        return known
    stand_in = ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    before = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = stand_in
    logging.disable(logging.WARNING)
    try:
        import speechbrain.utils.checkpoints as found
    finally:
        logging.disable(logging.NOTSET)
        if before is None:
            del sys.modules["torchaudio"]
        else:
            sys.modules["torchaudio"] = before
    quiet()
    return found


def _fitted_trainer(state: State, folder: Path, plugins: list[Any]) -> Any:
    import lightning as L

    quiet()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = state.model

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return cast("torch.Tensor", self.net(batch).mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return state.optimizer

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=plugins,
    )
    trainer.fit(Module(), DataLoader([torch.ones(2, state.width)], batch_size=None))
    state.optimizer.zero_grad()
    return trainer
