"""Lightning's own callbacks: what some of them miss in a run that is resumed, and what must not reach them.

An epoch that has begun is gone on with, so `on_train_epoch_start` does not run again. Two callbacks
set something up there that they find nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_sbckpt.plugin._private.trainer import callbacks_of
from lightning_sbckpt.plugin.packages import (
    GradientAccumulationScheduler,
    LightningModule,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Trainer,
)


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


def without_paths_elsewhere(
    trainer: Trainer, states: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the states of callbacks without paths of files that are not the callback's own.

    `ModelCheckpoint` takes over from its state which file is its best, and removes it when there is a
    better one: of a URL whatever stands there, a folder with all that is in it, and also what is in its
    folder only by a `..` or a link. It loads it for `ckpt_path="best"`. So a folder from somebody else
    would decide what is removed and loaded outside of it. (Seen in 2.4.0 to 2.6.6.)

    Args:
        trainer: Has the callbacks.
        states: Their states by `state_key`.

    Returns:
        The states, and what was left out, a sentence each.
    """
    kept, notes = dict(states), []
    for callback in callbacks_of(trainer):
        state = states.get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not isinstance(state, Mapping):
            continue
        paths = [state.get(key) for key in _PATHS] + [*state.get("best_k_models", ())]
        elsewhere = [path for path in paths if path and not _is_own(path, callback.dirpath)]
        if elsewhere:
            # One without the others would leave it a ranking that doesn't hold together.
            kept[callback.state_key] = {**state, **dict.fromkeys(_PATHS, ""), "best_k_models": {}}
            notes.append(
                f"ModelCheckpoint begins its ranking anew: its state names {str(elsewhere[0])[:200]!r}, "
                f"outside of its folder {callback.dirpath}, which it might remove or load"
            )
    return kept, notes


_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def _is_own(path: object, dirpath: Path | str | None) -> bool:
    """Return whether a path is below the folder of a callback, or of an earlier start of the same run."""
    if not isinstance(path, str) or dirpath is None:
        return False
    root = str(dirpath).rstrip("/")
    if root.endswith("/checkpoints"):
        # A logger gives each start a folder: lightning_logs/version_3/checkpoints.
        root = root.rsplit("/", 2)[0]
    if "://" in root or "::" in root:
        return path.startswith(f"{root}/") and ".." not in path.split("/")
    local = Path(path)
    return local.is_absolute() and local.resolve().is_relative_to(Path(root).resolve())


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


def nondeterminism_warnings(trainer: Trainer) -> list[str]:
    """Return what callbacks keep a resumed run from being exact, a sentence each."""
    return [
        f"{type(callback).__name__} makes what it has pruned permanent in what is saved, so a "
        "resumed run doesn't know which weights those were and prunes others, too"
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelPruning)
    ]


def periods_of(callback: ModelCheckpoint) -> dict[str, Any]:
    """Return how often a `ModelCheckpoint` saves, by the names of the arguments."""
    return {
        "every_n_epochs": callback._every_n_epochs or None,
        "every_n_train_steps": callback._every_n_train_steps or None,
        "train_time_interval": callback._train_time_interval,
    }
