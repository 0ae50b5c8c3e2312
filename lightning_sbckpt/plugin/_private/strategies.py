"""What this package touches of Lightning's strategies that shard the model, and why.

These strategies have a format of their own and load it by themselves, past the `CheckpointIO`; so
their methods are wrapped on the instance, see `_private.trainer.wrap`. The methods are public; what is not
is said. (Seen in 2.6.6 with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lightning_sbckpt._sharded.states import module_state, optimizer_state
from lightning_sbckpt.plugin._private.trainer import wrap
from lightning_sbckpt.plugin.packages import (
    FSDPStrategy,
    LightningOptimizer,
    ModelParallelStrategy,
    Strategy,
    Trainer,
)


def shards_the_model(strategy: Strategy) -> bool:
    """Return whether a strategy shards the model in a way that is known here.

    These are FSDP2 and tensor parallelism, whose pieces are DTensors, and FSDP's first version.
    """
    return isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))


def module_in_pieces(strategy: Strategy) -> nn.Module:
    """Return the module whose states are in pieces.

    With FSDP's first version it is the wrapper: only that knows what its parameters are pieces of.
    """
    wraps = isinstance(strategy, FSDPStrategy) and strategy.model is not None
    return cast("nn.Module", strategy.model if wraps else strategy.lightning_module)


def restores_late(strategy: Strategy) -> bool:
    """Return whether a checkpoint is read after `on_fit_start`, when model and optimizers exist."""
    return strategy.restore_checkpoint_after_setup


@contextmanager
def states_in_pieces(trainer: Trainer) -> Iterator[None]:
    """Have Lightning's checkpoint hold the pieces of this rank, whatever the strategy is set to.

    With `save_distributed_checkpoint=False`, or `state_dict_type="full"`, it would gather the whole
    model on rank zero.
    """
    strategy = trainer.strategy

    def of_model(*_: object) -> Mapping[str, Any]:
        return module_state(cast("nn.Module", strategy.model))

    def of_optimizer(_: object, optimizer: Optimizer) -> Mapping[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return optimizer_state(plain, cast("nn.Module", strategy.model))

    undo = [
        wrap(strategy, "lightning_module_state_dict", of_model),
        wrap(strategy, "optimizer_state", of_optimizer),
    ]
    try:
        yield
    finally:
        for each in undo:
            each()
