"""A run whose model is in pieces, one on each rank: what of a checkpoint each rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_sbckpt._folder.layout import SHARDED_EXT
from lightning_sbckpt._sharded.states import empty_like, numbered, plain_name
from lightning_sbckpt._torchfile.reading import open_state
from lightning_sbckpt.errors import MismatchError


class Pieces:
    """Reads states in pieces like those of a live module and its optimizers.

    Args:
        trainer: Its module and optimizers.
        key_map: From prefixes of the names of saved parameters to those in the module.

    Attributes:
        wants_optimizers: Whether the states of optimizers are wanted now.
    """

    def __init__(self, trainer: Trainer, key_map: Mapping[str, str]) -> None:
        self._trainer = trainer
        self._key_map = key_map
        self.wants_optimizers = False

    @property
    def reads_every_byte(self) -> bool:
        """Whether this rank is the one to compare what others wrote with the manifest."""
        return self._trainer.global_rank == 0

    def _rename(self, name: str) -> str:
        old = next((old for old in self._key_map if name.startswith(old)), None)
        return name if old is None else self._key_map[old] + name[len(old) :]

    def model(self, path: Path, prefix: str = "") -> dict[str, Any]:
        """Return the saved state of a module or submodule; what the live one lacks is not read.

        Args:
            path: Of the state.
            prefix: Of the submodule's names in the module.
        """
        from lightning_sbckpt._sharded.loading import model_pieces
        from lightning_sbckpt._sharded.reading import SavedShards

        own = {plain_name(name): value for name, value in self._module.state_dict().items()}
        if path.suffix != SHARDED_EXT:
            state: Any = open_state(path)
            whole = {self._rename(f"{prefix}{name}"): value for name, value in state.items()}
            pieces = model_pieces(whole, own)
            return {name: pieces[self._rename(f"{prefix}{name}")] for name in state}

        shards = SavedShards(path)

        def allocate(flat: str, saved: Any) -> torch.Tensor:
            live = own.get(plain_name(self._rename(f"{prefix}{shards.contents.place(flat)[-1]}")))
            if isinstance(live, torch.Tensor) and tuple(live.shape) == saved.size:
                return empty_like(live, saved.dtype, saved.size)
            # Only its size is wanted, to say that it does not fit.
            return torch.empty(saved.size, dtype=saved.dtype, device="meta")

        return shards.state(allocate)

    def optimizer(self, path: Path, index: int) -> dict[str, Any]:
        """Return the saved state of an optimizer in its ordinary form."""
        from lightning_sbckpt._sharded.loading import optimizer_like, optimizer_pieces
        from lightning_sbckpt._sharded.reading import SavedShards

        optimizers = self.optimizers
        if not self.wants_optimizers:
            return {}
        if path.suffix != SHARDED_EXT:
            state: Any = open_state(path)
            if index >= len(optimizers):
                return dict(state)
            return optimizer_pieces(state, optimizers[index], path)
        shards = SavedShards(path)
        try:
            if index < len(optimizers):
                # By their order, as everywhere: parameters may have been renamed.
                return optimizer_like(shards, optimizers[index], None)
        except MismatchError:
            pass  # It is said with everything else that does not fit.
        return numbered(
            shards.state(lambda _, saved: torch.empty(saved.size, dtype=saved.dtype, device="meta"))
        )

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the run."""
        return [
            found.optimizer if isinstance(found, LightningOptimizer) else found
            for found in self._trainer.strategy.optimizers
        ]

    @property
    def _module(self) -> LightningModule:
        return self._trainer.lightning_module

    def load(self, dump: Mapping[str, Any], strict: bool) -> None:
        """Put the states of model and optimizers in place."""
        self._module.load_state_dict(dump["state_dict"], strict=strict)
        if self._trainer.state.fn != "fit":
            return
        for optimizer, state in zip(self.optimizers, dump["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
