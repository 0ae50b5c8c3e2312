"""From Lightning's `ModelCheckpoint`: what takes the place of each of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import ModelCheckpoint

P = ParamSpec("P")

INSTEAD = {
    "monitor": "min_key='...' or max_key='...' is the metric",
    "mode": "min_key='...' or max_key='...' says which is best",
    "save_top_k": "num_to_keep=n keeps the n best, and the n newest",
    "save_last": "the newest is kept anyway, unless keep_recent=False",
    "save_weights_only": "a checkpoint always holds the whole run, and "
    "`lightning-sbckpt export` writes its weights alone",
    "save_on_train_epoch_end": "an epoch is saved when its last hook has run",
    "save_on_exception": "every_n_train_steps or train_time_interval saves before there is one, and "
    "preemption=True when the job is asked to end",
    "filename": "save_mode=SavePolicy(name='{epoch:03d}-{val_loss:.3f}') names checkpoints, otherwise by time; "
    "`run/best` and `run/newest` find them, whatever their names",
    "auto_insert_metric_name": "the template in SavePolicy(name='epoch={epoch}') has what you write",
    "enable_version_counter": "no name is used twice",
    "verbose": "each save is logged",
}
"""From an argument that `SBCheckpoint` hasn't got to what does the same here."""


def refusing_its_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Have `__init__` refuse arguments of `ModelCheckpoint`, each with what takes its place.

    Example:
        >>> @refusing_its_arguments
        ... def init(num_to_keep): ...
        >>> init(num_to_keep=3)
        >>> init(save_last=True)
        Traceback (most recent call last):
        lightning_sbckpt.errors.ConfigurationError: save_last is an argument of ModelCheckpoint: ...
    """

    @wraps(init)
    def refusing(*args: P.args, **given: P.kwargs) -> None:
        told = [
            f"{name} is an argument of ModelCheckpoint: here {INSTEAD[name]}"
            for name in given
            if name in INSTEAD
        ]
        if told:
            raise ConfigurationError(". ".join(told))
        init(*args, **given)

    return refusing


def arguments_like(callback: ModelCheckpoint) -> dict[str, Any]:
    """Return the arguments of an `SBCheckpoint` that saves and keeps what a `ModelCheckpoint` would.

    Raises:
        ConfigurationError: It saves nothing.
    """
    every = _private.callbacks.periods_of(callback)
    if callback.save_top_k == 0 and not callback.save_last:
        raise ConfigurationError(
            "ModelCheckpoint(save_top_k=0) saves nothing: leave the callback out"
        )
    arguments: dict[str, Any] = {**every, "dirpath": callback.dirpath}
    if callback.monitor is not None:
        arguments[f"{callback.mode}_key"] = callback.monitor
    if callback.save_top_k < 0:
        # More than there will ever be.
        arguments["num_to_keep"] = 10**9
    elif callback.save_top_k:
        arguments["num_to_keep"] = callback.save_top_k
    return arguments
