"""Callbacks of Lightning's that prepare an epoch when it starts, which a run resumed within it misses.

An epoch that has begun is gone on with, so `on_train_epoch_start` does not run again. These two
set something up there that they find nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from lightning_sbckpt.plugin._compat import callbacks_of


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
            with _weights_kept(trainer.lightning_module):
                callback.on_train_epoch_start(trainer, trainer.lightning_module)


def hold_averages(trainer: Trainer) -> None:
    """Put in place the averaged weights that a complete run ended with.

    `StochasticWeightAveraging` does so in `on_train_end`, after the last save. With batch norm it does
    so before, in the epoch that takes its statistics.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging) and (
            callback._average_model is not None
            and not callback._model_contains_batch_norm
            and _has_begun(callback, trainer)
        ):
            callback.transfer_weights(callback._average_model, trainer.lightning_module)


def _has_begun(callback: StochasticWeightAveraging, trainer: Trainer) -> bool:
    return callback._scheduler_state is not None or trainer.current_epoch > callback.swa_end


@contextmanager
def _weights_kept(module: LightningModule) -> Iterator[None]:
    """Put back the weights that were restored, and what normalization has counted.

    When the last epoch starts, the weights are averaged, and normalization begins to count. Learning
    rates stay as they were restored: an averaging's scheduler begins with those that it finds.
    """
    state = {name: value.clone() for name, value in _tensors(module)}
    yield
    with torch.no_grad():
        for name, value in _tensors(module):
            value.copy_(state[name])


def _tensors(module: LightningModule) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def exception_files(trainer: Trainer) -> list[str]:
    """Return the files that callbacks write when an exception is raised.

    A fit that is given no path goes on from such a file if it is there, whatever else there is.
    """
    return [
        str(callback.ckpt_path)
        for callback in callbacks_of(trainer)
        if isinstance(callback, OnExceptionCheckpoint)
    ]


def neighbours(trainer: Trainer, dirpath: Path | str) -> list[str]:
    """Return which callbacks write checkpoints that a run won't go on from, a sentence each.

    Args:
        trainer: Has the callbacks.
        dirpath: Where the run goes on from.
    """
    found = []
    for callback in callbacks_of(trainer):
        where = getattr(callback, "dirpath", None)
        if isinstance(callback, OnExceptionCheckpoint):
            found.append(
                f"OnExceptionCheckpoint writes {callback.ckpt_path} when an exception is raised. The run "
                f"goes on from the checkpoints in {dirpath}, exactly, and from that file only if there "
                "are none"
            )
        elif isinstance(callback, ModelCheckpoint) and (
            callback.save_last or (where is not None and Path(where).absolute() == dirpath)
        ):
            found.append(
                f"ModelCheckpoint writes files of its own to {where}. The run goes on from the checkpoints "
                f'in {dirpath}; ckpt_path="last" would go on from such a file, which is not exact'
            )
    return found


def weak_points(trainer: Trainer) -> list[str]:
    """Return what callbacks keep a resumed run from being exact, a sentence each."""
    return [
        f"{type(callback).__name__} makes what it has pruned permanent in what is saved, so a "
        "resumed run doesn't know which weights those were and prunes others, too"
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelPruning)
    ]
