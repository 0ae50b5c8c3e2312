"""Fits whose model is in pieces, by Lightning's ModelParallelStrategy on gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _ranks
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_sbckpt.plugin import _comparison, selftest


class InPieces(_ranks.Model):
    """The model of the other fits without what each rank has of its own, sharded by FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(_ranks.FEATURES, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 8)
        )
        self.prepared = False

    def configure_model(self) -> None:
        if self.prepared:
            return
        from torch.distributed.fsdp import fully_shard

        self.prepared = True
        # The same weights on every rank, which draw numbers of their own.
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data.uniform_(-0.3, 0.3, generator=generator)
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.body, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Renamed(InPieces):
    """The same model with another name for a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.top = self.head
        del self.head

    def forward(self, x):
        return self.top(self.body(x))


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
):
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
    prepare: Callable[..., tuple[Any, ...]] = prepare,
    weights: Callable[[nn.Module], object] = weights,
) -> None:
    """Fit, writing down all that can be compared, and kill itself where told to."""
    selftest.weights = weights
    clone = selftest.clone
    selftest.clone = lambda state: clone(local(state))
    trainer, module, callback, loaders = prepare(folder, rank, **options)
    trace = folder / f"trace{rank}.jsonl"
    trace.unlink(missing_ok=True)
    recorder = selftest._Recorder(trace)
    trainer.callbacks.insert(0, recorder)
    if kill is not None:
        trainer.callbacks.insert(0, selftest._killer(selftest.KillPoint.parse(kill)))
    trainer.loggers = [selftest._TraceLogger(recorder)]
    trainer.fit(module, **loaders)
    after = {"at the end of training": recorder.state, "after the fit": clone(weights(module))}
    torch.save(after, folder / f"final{rank}.pt")
    (folder / f"best{rank}.txt").write_text(callback.best_model_path)
    if callback.resume_report is not None:
        (folder / f"report{rank}.txt").write_text(str(callback.resume_report))


def differences(reference: Path, resumed: Path, rank: int) -> list[str]:
    """Return what differs between a rank of two runs, in words."""
    return _comparison.differences(_ranks.outcome(reference, rank), _ranks.outcome(resumed, rank))
