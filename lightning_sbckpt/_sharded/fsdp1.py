"""Modules that FSDP's first version wraps: their states in pieces, taken and put back.

What a rank trains of such a module is a stretch of a flat tensor, which has neither the shapes of
the parameters nor, with `use_orig_params=False`, their names. FSDP itself makes pieces of each
parameter of it, one wrapped unit after the other, and a stretch of pieces; all of this is
collective. Where it divides nothing (one rank, or `NO_SHARD`), the pieces are whole tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.errors import ConfigurationError

State: TypeAlias = "Mapping[str, Any]"

_orders: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def model_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module, this rank's pieces of it, by plain names."""
    with _in_pieces(module):
        return {plain_name(name): value for name, value in module.state_dict().items()}


def load_model_state(module: nn.Module, state: State) -> None:
    """Put a state in place, its tensors in pieces like those of `model_state`; what it lacks stays."""
    with _in_pieces(module):
        own = module.state_dict()
        module.load_state_dict({name: state.get(plain_name(name), own[name]) for name in own})


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer, this rank's pieces of it, by the names in the module."""
    return by_name(module, optimizer, optimizer.state_dict())


def names_in_groups(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the plain names of the parameters in each group of an optimizer, in their order."""
    groups = optimizer.state_dict()["param_groups"]
    found = by_name(module, optimizer, {"state": {}, "param_groups": groups})
    return [group["params"] for group in found["param_groups"]]


def local_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> dict[str, Any]:
    """Return what the optimizer of this rank takes, from a state like that of `optimizer_state`."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with _in_pieces(module):
        groups = optimizer.state_dict()["param_groups"]
        live = FullyShardedDataParallel.optim_state_dict(
            module, optimizer, {"state": {}, "param_groups": groups}
        )
        own = {plain_name(n): n for group in live["param_groups"] for n in group["params"]}
        named = {
            "state": {own[name]: dict(value) for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [own[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
        return FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, named)


def refuse_what_is_mixed(module: nn.Module) -> None:
    """Refuse a module of which FSDP divides some units and not others.

    Raises:
        ConfigurationError: It is one: FSDP has no state of such a module in pieces.
    """
    found = [each for each in units(module) if any(True for _ in each.parameters())]
    if len({divides(each) for each in found}) > 1:
        kinds = ", ".join(sorted({each.sharding_strategy.name for each in found}))
        raise ConfigurationError(
            f"the modules that FSDP wraps have different sharding strategies ({kinds}), and FSDP "
            "gives the state of a module in pieces only if it divides all of it. Use one sharding "
            "strategy for all of them, or ModelParallelStrategy"
        )


@contextmanager
def _in_pieces(module: nn.Module) -> Iterator[None]:
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    kind: tuple[Any, Any, Any] = (
        (
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )
        if any(map(divides, units(module)))
        else (
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
        )
    )
    with warnings.catch_warnings():
        # What is to be used instead makes a step of an optimizer that has no state yet.
        warnings.filterwarnings("ignore", category=FutureWarning)
        with FullyShardedDataParallel.state_dict_type(module, *kind):
            yield


def by_name(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return a state of this rank's optimizer, by number, in pieces and by plain names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with _in_pieces(module):
        found = FullyShardedDataParallel.optim_state_dict(module, optimizer, state)
    groups = [
        {**group, "params": [plain_name(name) for name in group["params"]]}
        for group in found["param_groups"]
    ]
    if any(is_flat(each) for group in optimizer.param_groups for each in group["params"]):
        # In the order of the plain module, by which parameters are numbered where they have no
        # names: that of the flat tensors is another one.
        order = _order_in(module)
        for group in groups:
            group["params"] = sorted(group["params"], key=order.__getitem__)
    states = {plain_name(name): value for name, value in found["state"].items()}
    return {"state": states, "param_groups": groups}


def _order_in(module: nn.Module) -> dict[str, int]:
    if module not in _orders:
        _orders[module] = {name: number for number, name in enumerate(model_state(module))}
    return _orders[module]


def units(module: nn.Module) -> list[Any]:
    """Return the modules inside a module that FSDP wraps."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return list(FullyShardedDataParallel.fsdp_modules(module))


def divides(unit: Any) -> bool:
    """Return whether FSDP divides a unit among the ranks."""
    return bool(unit.sharding_strategy.name != "NO_SHARD")


def is_flat(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is the flat tensor of a unit."""
    from torch.distributed.fsdp import FlatParameter

    return isinstance(parameter, FlatParameter)
