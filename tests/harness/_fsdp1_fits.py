"""Fits whose model is in pieces, by Lightning's FSDPStrategy on gloo ranks without a GPU.

Lightning's Trainer refuses that class on a CPU, and no subclass of it; and FSDP has to be told that
there is no GPU. All else is the strategy as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import _ranks
import _sharded_fits
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn


class OnCPU(FSDPStrategy):
    """The strategy, with FSDP told that the CPU is the device."""

    def setup_environment(self) -> None:
        sizes = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if sizes is not None:
            from torch.distributed.device_mesh import init_device_mesh

            self.kwargs["device_mesh"] = init_device_mesh("cpu", sizes)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        with on_cpu():
            return super()._setup_model(model)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with on_cpu(), super().model_sharded_context():
            yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """Have what FSDP wraps be on the CPU."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrap = FullyShardedDataParallel.__init__

    @functools.wraps(wrap)
    def on_cpu(unit: nn.Module, *args: object, **options: object) -> None:
        wrap(unit, *args, **{**options, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = on_cpu
    try:
        yield
    finally:
        FullyShardedDataParallel.__init__ = wrap


class Wrapped(_sharded_fits.Alike):
    """Wrapped by FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.draw_weights()

    def configure_optimizers(self):
        # With `use_orig_params=False` there are other parameters than those of the module.
        model = self.trainer.model if self.trainer.strategy.model is not self else self
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Frozen(Wrapped):
    """A model of which one part is trained, and the other stays."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0].requires_grad_(False)


class WrapsItself(Wrapped):
    """A model that says itself what is wrapped; nothing wraps all of it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp.wrap import wrap

        if isinstance(self.body, nn.Sequential):
            self.body, self.head = wrap(self.body), wrap(self.head)


class Tied(Wrapped):
    """A model with one parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, _ranks.CLASSES, bias=False)
        self.again.weight = self.head.weight

    def forward(self, x):
        inner = self.body(x)
        return self.head(inner) + self.again(inner.square())


class Normalized(Wrapped):
    """A model whose ranks have statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(9))


class Renamed(_sharded_fits.HeadRenamed, Wrapped):
    """With another name for its head."""


class LooksAtTheGraph(Wrapped):
    """A model whose validation has autograd record a forward that no backward follows."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            super().validation_step(batch, batch_idx)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's stretches of what is trained."""
    model = module.trainer.strategy.model
    found = {name: each.detach().clone() for name, each in model.named_parameters()}
    return {**found, **{name: each.clone() for name, each in model.named_buffers()}}


def prepare(
    folder: Path,
    rank: int,
    *,
    module: Callable[[], nn.Module] = Wrapped,
    trainer: Mapping[str, object] | None = None,
    strategy_options: Mapping[str, object] | None = None,
    **options: object,
) -> _ranks.Made:
    """Return what a rank fits."""
    strategy = OnCPU(**{"auto_wrap_policy": {nn.Sequential}, **(strategy_options or {})})
    trainer = {"strategy": strategy, **(trainer or {})}
    return _ranks.make(folder / "checkpoints", rank, module=module, trainer=trainer, **options)


def fit(folder: Path, rank: int, kill: str | None, options: Mapping[str, object]) -> None:
    """Fit, writing down all that can be compared, and kill itself where told to."""
    _sharded_fits.fit(folder, rank, kill, options, prepare, weights)
