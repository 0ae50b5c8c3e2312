"""A run whose model is in pieces, one on each rank: what of a checkpoint each rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sbckpt._format.load import open_state
from lightning_sbckpt._layout.publish import SHARDED_EXT
from lightning_sbckpt._sharded import fsdp1
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt._sharded.states import (
    empty_like,
    is_fsdp1,
    module_state,
    names_of,
    numbered,
)
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import LightningOptimizer, Trainer
from lightning_sbckpt.plugin.state.names import OwnNames

if TYPE_CHECKING:
    from lightning_sbckpt._sharded.reading import SavedShards


class ShardReader:
    """Reads states in pieces like those of a live module and its optimizers.

    Args:
        trainer: Its module and optimizers.
        key_map: From prefixes of the names of saved parameters to those in the module.
    """

    def __init__(self, trainer: Trainer, key_map: Mapping[str, str]) -> None:
        self._trainer = trainer
        self._key_map = key_map

    @property
    def reads_every_byte(self) -> bool:
        """Whether this rank is the one to compare what others wrote with the manifest."""
        return self._trainer.global_rank == 0

    def model(self, path: Path, prefix: str = "") -> dict[str, Any]:
        """Return the saved state of a module or submodule; what the live one lacks is not read.

        Args:
            path: Of the state.
            prefix: Of the submodule's names in the module.
        """
        from lightning_sbckpt._sharded.loading import model_pieces
        from lightning_sbckpt._sharded.reading import SavedShards

        own = module_state(self._module)
        find = OwnNames.of(own, self._key_map).find
        if path.suffix != SHARDED_EXT:
            state: Any = open_state(path)
            whole = {find(f"{prefix}{name}"): value for name, value in state.items()}
            pieces = model_pieces(whole, own)
            return {name: pieces[find(f"{prefix}{name}")] for name in state}

        shards = SavedShards(path)

        def allocate(flat: str, saved: Any) -> torch.Tensor:
            live = own.get(plain_name(find(f"{prefix}{shards.contents.place(flat)[-1]}")))
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
        if path.suffix != SHARDED_EXT:
            state: Any = open_state(path)
            if index >= len(optimizers):
                return dict(state)
            if is_fsdp1(self._module):
                return self._flat_optimizer(state, index, path)
            return optimizer_pieces(state, optimizers[index], path)
        shards = SavedShards(path)
        if index < len(optimizers) and is_fsdp1(self._module):
            return self._flat_optimizer(shards, index, path)
        try:
            if index < len(optimizers):
                optimizer = optimizers[index]
                return optimizer_like(shards, optimizer, self._saved_names(shards, optimizer))
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

    def _saved_names(self, shards: SavedShards, optimizer: Optimizer) -> dict[int, str] | None:
        """Return the names under which parameters were saved, by id; None if not all are found.

        They are taken in their order then: hooks of the user's may have renamed them.
        """
        live = names_of(self._module)
        trained = [id(each) for group in optimizer.param_groups for each in group["params"]]
        names = OwnNames.of(live.values(), self._key_map)
        saved = shards.nested(shards.values()).get("param_groups", [])
        before = [plain_name(str(name)) for group in saved for name in group["params"]]
        at = {names.find(name): name for name in before}
        own = {number: live.get(number, "") for number in trained}
        if len(before) != len(trained) or set(at) != set(own.values()):
            return None
        return {number: at[name] for number, name in own.items()}

    @property
    def _module(self) -> nn.Module:
        return _private.strategies.module_in_pieces(self._trainer.strategy)

    def _flat_optimizer(
        self, saved: SavedShards | Mapping[str, Any], index: int, path: Path
    ) -> dict[str, Any]:
        from lightning_sbckpt._sharded.loading import flat_optimizer_like

        optimizer = self.optimizers[index]
        try:
            return flat_optimizer_like(saved, optimizer, self._module, path, by_order=True)
        except MismatchError as error:
            # The model may not fit either, which says more; and the user may not want the state.
            return Misfit(optimizer.state_dict(), error)

    def own_state(self) -> dict[str, Any]:
        """Return the state of the live module, by the names that `load_model` wants."""
        module = self._module
        return dict(module_state(module) if is_fsdp1(module) else module.state_dict())

    def load_model(self, state: Mapping[str, Any], strict: bool, folder: Path) -> None:
        """Put a state of the model in place.

        Args:
            state: As `model` returned it.
            strict: Whether all names must be the same.
            folder: The checkpoint, for the message.

        Raises:
            MismatchError: It does not fit.
        """
        if not is_fsdp1(self._module):
            self._trainer.lightning_module.load_state_dict(state, strict=strict)
            return
        from lightning_sbckpt._sharded.loading import model_pieces, require_fit, sizes_of

        own = self.own_state()
        fitting = state if strict else {name: state[name] for name in state if name in own}
        sizes = sizes_of(own)
        require_fit(
            folder,
            self._trainer.lightning_module,
            sizes if strict else {name: sizes[name] for name in sizes if name in fitting},
            sizes_of(fitting),
        )
        fsdp1.load_model_state(self._module, model_pieces(fitting, own))


class Misfit(dict[str, Any]):
    """Stands for a saved state that does not fit an optimizer, until it is wanted.

    Attributes:
        error: Why it does not fit.
    """

    def __init__(self, own: Mapping[str, Any], error: MismatchError) -> None:
        super().__init__(own)
        self.error = error
