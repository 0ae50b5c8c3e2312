"""Fits whose model is in pieces, by Lightning's ModelParallelStrategy on gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import _ranks
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_sbckpt.plugin import selftest


class Alike(_ranks.Model):
    """The model of the other fits without what each rank has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(_ranks.FEATURES, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 8)
        )

    def draw_weights(self) -> None:
        """Have the same weights on every rank, which draw numbers of their own."""
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data.uniform_(-0.3, 0.3, generator=generator)


class InPieces(Alike):
    """Sharded by FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = False

    def configure_model(self) -> None:
        if self.prepared:
            return
        from torch.distributed.fsdp import fully_shard

        self.prepared = True
        self.draw_weights()
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.body, mesh=mesh)
        fully_shard(self, mesh=mesh)


class HeadRenamed:
    """Before a model: the same one with another name for a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.top = self.head
        del self.head

    def forward(self, x):
        return self.top(self.body(x))


class Renamed(HeadRenamed, InPieces):
    """With another name for its head."""


class HeadFirst(InPieces):
    """With its layers made in another order, and so numbered in it by the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        body = self.body
        del self.body
        self.body = body


def local(state: object) -> object:
    """Return a state with this rank's pieces as plain tensors."""
    if isinstance(state, torch.Tensor):
        return state.to_local() if hasattr(state, "to_local") else state
    if isinstance(state, Mapping):
        return {key: local(value) for key, value in state.items()}
    return [local(value) for value in state] if isinstance(state, (list, tuple)) else state


def strategy(size: int, **options: object) -> ModelParallelStrategy:
    """Return the strategy for so many ranks."""
    return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, **options)


def prepare(
    folder: Path,
    rank: int,
    *,
    size: int = 2,
    module: Callable[[], nn.Module] = InPieces,
    trainer: Mapping[str, object] | None = None,
    strategy_options: Mapping[str, object] | None = None,
    **options: object,
) -> _ranks.Made:
    """Return what a rank fits."""
    chosen = {"strategy": strategy(size, **(strategy_options or {}))}
    return _ranks.make(
        folder / "checkpoints",
        rank,
        size=size,
        module=module,
        trainer={**chosen, **(trainer or {})},
        **options,
    )


def weights(module: nn.Module) -> object:
    """Return this rank's pieces of a module."""
    return local(dict(module.state_dict()))


def fit(
    folder: Path,
    rank: int,
    kill: str | None,
    options: Mapping[str, object],
    prepare: Callable[..., _ranks.Made] = prepare,
    weights: Callable[[nn.Module], object] = weights,
) -> None:
    """Fit, writing down all that can be compared, and kill itself where told to."""
    selftest.weights = weights
    clone = selftest.clone
    selftest.clone = lambda state: clone(local(state))
    made = prepare(folder, rank, **options)
    _ranks.trace(folder, rank, kill, made, lambda module: clone(weights(module)))


def fit_or_tell(
    folder: Path, rank: int, prepare: Callable[..., _ranks.Made], options: Mapping[str, object]
) -> None:
    """Fit; what is raised is written down, too."""
    trainer, module, _, loaders = prepare(folder, rank, **options)
    try:
        trainer.fit(module, **loaders)
    except Exception as error:
        (folder / f"error{rank}.txt").write_text(str(error))
        raise
