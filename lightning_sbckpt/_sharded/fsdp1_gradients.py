"""The gradients of modules that FSDP's first version wraps, in the middle of an accumulation.

After each backward FSDP divides them among the ranks, as it does the parameters; but within
`no_sync()`, which Lightning accumulates in, each rank has its own of the whole module until the last
backward before the step.
"""
# ruff: noqa: SLF001 - there is no public way to undivided gradients, see `_handles`

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from lightning_sbckpt._sharded.fsdp1 import (
    by_name,
    is_flat,
    local_optimizer_state,
    names_in_groups,
    units,
)
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.errors import SaveError

State: TypeAlias = "Mapping[str, Any]"

BY_RANK = "by rank"
"""The key, no parameter's name, of gradients of which each rank has its own."""


def gradients(module: nn.Module) -> dict[str, Any]:
    """Return the gradients of a module: this rank's pieces of them, by plain names.

    Within `no_sync()`, and with `NO_SHARD`, FSDP does not divide them, and each rank has its own of
    the whole module. These are under its number, under `BY_RANK`.

    Raises:
        SaveError: Some are divided, and some are not.
    """
    named = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    undivided = dict(_undivided_gradients(module, named))
    if not undivided:
        return _pieces_of_gradients(module, list(named.values()))
    # What FSDP does not manage is whole on each rank; and a flat tensor is none of the parameters.
    others = {name: p.grad for name, p in named.items() if name not in undivided}
    others = {n: g for n, g in others.items() if g is not None and not is_flat(named[n])}
    if any(grad is None for grad in undivided.values()):
        raise SaveError(
            "the gradients were not saved: FSDP has divided those of some units among the ranks and "
            "not those of others, as when no_sync() does not span all batches of a window. Save "
            "after an optimizer step, or keep to no_sync() until the last batch before it. Nothing "
            "of this checkpoint is kept; earlier ones are whole"
        )
    return {BY_RANK: {str(dist.get_rank()): {**undivided, **others}}}


def put_gradients(module: nn.Module, state: State, *, undivided: bool) -> list[str]:
    """Have the parameters of a module have gradients; return those that fit none, by name.

    Args:
        module: The live module.
        state: All gradients in pieces like those of `gradients`, or this rank's own.
        undivided: Whether they are this rank's own, of the whole module.
    """
    if undivided:
        return _put_undivided(module, state)
    parameters = list(module.parameters())
    carrier = _carrier(parameters)
    (own,) = names_in_groups(module, carrier)
    group = carrier.state_dict()["param_groups"][0]
    saved = {
        "state": {name: {"grad": state[name]} for name in own if name in state},
        "param_groups": [{**group, "params": own}],
    }
    for number, found in local_optimizer_state(module, carrier, saved)["state"].items():
        parameters[number].grad = found["grad"].to(parameters[number].device, copy=True)
    return [name for name in state if name not in own]


def _pieces_of_gradients(module: nn.Module, parameters: list[nn.Parameter]) -> dict[str, Any]:
    carrier = _carrier(parameters)
    state = {
        number: {"grad": parameter.grad}
        for number, parameter in enumerate(parameters)
        if parameter.grad is not None
    }
    groups = carrier.state_dict()["param_groups"]
    found = by_name(module, carrier, {"state": state, "param_groups": groups})
    return {name: each["grad"] for name, each in found["state"].items()}


def _undivided_gradients(
    module: nn.Module, named: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the gradients that FSDP has not divided; if there are any, None for all that it has."""
    found: dict[str, torch.Tensor | None] = {}
    for names, handle in _handles(module):
        grad = handle.flat_param.grad
        if grad is not None and handle.is_sharded(grad):
            found.update(dict.fromkeys(names))
        elif grad is not None:
            views = zip(names, handle._get_unflat_views(grad), strict=True)
            # With parameters of their own, these say whether there are gradients any more.
            gone = {name for name in names if name in named and named[name].grad is None}
            found.update({name: view for name, view in views if name not in gone})
    if any(grad is not None for grad in found.values()):
        yield from found.items()


def _put_undivided(module: nn.Module, state: State) -> list[str]:
    left = dict(state)
    for names, handle in _handles(module):
        flat = handle.flat_param
        if not any(name in left for name in names):
            continue
        like = next(left[name] for name in names if name in left)
        whole = torch.zeros(flat._unpadded_unsharded_size, dtype=like.dtype, device=flat.device)
        for name, view in zip(names, handle._get_unflat_views(whole), strict=True):
            if name in left and left[name].shape == view.shape:
                view.copy_(left.pop(name))
        # As in a backward within `no_sync()`: it has another size than the divided parameter.
        flat.grad = torch.empty_like(flat)
        flat.grad.data = whole
        if handle._use_orig_params:
            handle._use_unsharded_grad_views()
    for name, parameter in module.named_parameters():
        own = left.get(plain_name(name))
        if own is not None and own.shape == parameter.shape:
            parameter.grad = left.pop(plain_name(name)).to(parameter.device, copy=True)
    return list(left)


def _handles(module: nn.Module) -> Iterator[tuple[list[str], Any]]:
    """Yield what FSDP has of each flat tensor, with the plain names of its parameters in their order.

    There is no public way to undivided gradients. `_handle` and its `_get_unflat_views` and
    `_use_unsharded_grad_views`, and of a flat tensor `_fqns` and `_unpadded_unsharded_size`, were
    seen in torch 2.4.1 and 2.13.
    """
    # By id: metrics are modules, too, and are equal to everything.
    wrapped = {id(unit): unit for unit in units(module)}
    for name, child in module.named_modules():
        handle = wrapped[id(child)]._handle if id(child) in wrapped else None
        if handle is not None:
            prefix = f"{name}." if name else ""
            yield [plain_name(f"{prefix}{own}") for own in handle.flat_param._fqns], handle


def _carrier(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer that is used for its numbers of the parameters alone."""
    return torch.optim.SGD(parameters, lr=0.0)
