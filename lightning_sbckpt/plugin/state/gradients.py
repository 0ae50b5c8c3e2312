"""Gradients that wait for the next optimizer step: taken, read, and put back.

Their file has one of three forms: a list of what each rank has of its own (`ranks`); pieces, by the
names of parameters, of what all ranks have together; or, by FSDP's first version, what each
rank has of its own of the whole module, written by each (`BY_RANK`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from lightning_sbckpt._format.load import load_state
from lightning_sbckpt._layout.publish import SHARDED_EXT
from lightning_sbckpt._sharded import fsdp1_gradients
from lightning_sbckpt._sharded.fsdp1_gradients import BY_RANK
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt._sharded.states import is_fsdp1, is_sharded_tensor
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.state.sharded import ShardReader


def take_gradients(trainer: Trainer) -> dict[str, Any] | None:
    """Return the gradients that wait for the next optimizer step, by the names of parameters.

    Where ranks have pieces of the module, so they have of its gradients. None, on all ranks, if
    none wait on any of them.
    """
    # Without automatic optimization only the module knows when its gradients have served.
    if (
        not _private.trainer.is_accumulating(trainer)
        and trainer.lightning_module.automatic_optimization
    ):
        return None
    module = _private.strategies.module_in_pieces(trainer.strategy)
    if is_fsdp1(module):
        return fsdp1_gradients.gradients(module)
    return {
        plain_name(name): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def read_gradients(path: Path, pieces: ShardReader | None) -> dict[str, Any]:
    """Return the gradients in a file, or of this rank in a folder, as a list by rank.

    Args:
        path: Of the state.
        pieces: Reads what is in pieces; None where each rank has the whole model.
    """
    ranks, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        ranks, rank = dist.get_world_size(), dist.get_rank()
    if path.suffix != SHARDED_EXT:
        state = cast("dict[str, Any]", load_state(path))
        if "ranks" in state:
            return state
    else:
        state = _read_sharded(path, rank)
    if BY_RANK in state:
        own: Mapping[str, Any] = state[BY_RANK]
        return {"ranks": [own[str(number)] for number in range(len(own))]}
    # Of all ranks together, and every rank takes what is its own.
    return {"ranks": [state if pieces is None else pieces.model(path)] * ranks}


def _read_sharded(path: Path, rank: int) -> dict[str, Any]:
    from lightning_sbckpt._sharded.reading import SavedShards, whole_tensor

    shards = SavedShards(path)

    def allocate(name: str, saved: Any) -> torch.Tensor:
        place = shards.contents.place(name)
        if place[0] == BY_RANK and place[1] != str(rank):
            # Of another rank; it is to be counted, not read.
            return torch.empty(saved.size, dtype=saved.dtype, device="meta")
        return whole_tensor(name, saved)

    return shards.state(allocate)


def put_gradients(trainer: Trainer, gradients: Mapping[str, Any]) -> list[str]:
    """Have the parameters have gradients again; return what could not be put back, in words."""
    module = _private.strategies.module_in_pieces(trainer.strategy)
    if is_fsdp1(module):
        undivided = not any(map(is_sharded_tensor, gradients.values()))
        unfit = fsdp1_gradients.put_gradients(module, gradients, undivided=undivided)
    else:
        unfit = []
        parameters = {plain_name(name): each for name, each in module.named_parameters()}
        for name, gradient in gradients.items():
            parameter = parameters.get(plain_name(name))
            if parameter is None or not _fits(gradient, parameter):
                unfit.append(name)
            else:
                parameter.grad = gradient.to(parameter.device, copy=True)
    return [f"the gradient of {n!r}: the module has no such parameter any more" for n in unfit]


def _fits(gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
    same = is_sharded_tensor(gradient) == is_sharded_tensor(parameter)
    return same and gradient.shape == parameter.shape
