"""Callbacks of Lightning's that prepare an epoch when it starts, which a run resumed within it misses.

An epoch that has begun is gone on with, so `on_train_epoch_start` does not run again. These two
set something up there that they find nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)

from lightning_sbckpt.plugin._compat import callbacks_of, wrap


def brings_its_scheduler(trainer: Trainer) -> bool:
    """Return whether the one scheduler there was has made room for that of an averaging.

    `StochasticWeightAveraging` keeps `_scheduler_state` of a checkpoint until it makes its own
    scheduler, and takes the other one away in `on_fit_start`.
    """
    return any(
        isinstance(callback, StochasticWeightAveraging) and callback._scheduler_state is not None
        for callback in callbacks_of(trainer)
    )


def enter_epoch(trainer: Trainer) -> None:
    """Have done what callbacks did when the epoch started that is gone on with."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(
                trainer.current_epoch
            )
        elif isinstance(callback, StochasticWeightAveraging) and _has_begun(callback, trainer):
            with _kept(trainer, weights=True):
                callback.on_train_epoch_start(trainer, trainer.lightning_module)


def before_next_epoch(trainer: Trainer) -> None:
    """Have learning rates kept where a callback makes its scheduler anew as the next epoch starts."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging) and _has_begun(callback, trainer):
            _keep_rates_once(callback)


def _keep_rates_once(callback: Callback) -> None:
    def keeping(original: Callable[..., Any], trainer: Trainer, module: LightningModule) -> None:
        undo()
        with _kept(trainer, weights=False):
            original(trainer, module)

    undo = wrap(callback, "on_train_epoch_start", keeping)


def _has_begun(callback: StochasticWeightAveraging, trainer: Trainer) -> bool:
    return callback._scheduler_state is not None or trainer.current_epoch > callback.swa_end


@contextmanager
def _kept(trainer: Trainer, *, weights: bool) -> Iterator[None]:
    """Put back what was restored and is set inside: learning rates, and the weights if asked for.

    A scheduler sets the rates of its beginning when it is made, and the weights are averaged, and
    normalization begins to count, when the last epoch starts.
    """
    module = trainer.lightning_module
    groups = [
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in each.param_groups
        ]
        for each in trainer.optimizers
    ]
    state = {name: value.clone() for name, value in _tensors(module)} if weights else {}
    yield
    for optimizer, saved in zip(trainer.optimizers, groups, strict=True):
        for group, values in zip(optimizer.param_groups, saved, strict=True):
            group.update(values)
    with torch.no_grad():
        for name, value in _tensors(module):
            if name in state:
                value.copy_(state[name])


def _tensors(module: LightningModule) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def weak_points(trainer: Trainer) -> list[str]:
    """Return what callbacks keep a resumed run from being exact, a sentence each."""
    return [
        f"{type(callback).__name__} makes what it has pruned permanent in what is saved, so a "
        "resumed run doesn't know which weights those were and prunes others, too"
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelPruning)
    ]
