"""Why a run that has ended was told to stop, and whether it would be told so again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import EarlyStopping, Timer, Trainer


def keep_patience(trainer: Trainer, patience: Mapping[str, int]) -> list[str]:
    """Let each EarlyStopping have the patience that this run asked for, not the checkpoint's.

    Args:
        trainer: Its callbacks have their state.
        patience: What `patience_of` returned before they had.

    Returns:
        A sentence for each that differed.
    """
    changed = []
    for callback in _private.trainer.callbacks_of(trainer):
        asked = patience.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and asked not in (None, callback.patience):
            changed.append(
                f"EarlyStopping({callback.monitor!r}): patience={callback.patience} in the "
                f"checkpoint, {asked} asked for; training goes on with {asked}"
            )
            callback.patience = asked
    return changed


def patience_of(trainer: Trainer) -> dict[str, int]:
    """Return the patience of each EarlyStopping, by the key of its state."""
    return {
        callback.state_key: callback.patience
        for callback in _private.trainer.callbacks_of(trainer)
        if isinstance(callback, EarlyStopping)
    }


def standing_reasons(trainer: Trainer, metrics: Mapping[str, object]) -> list[str]:
    """Return why the callbacks of a Trainer would stop it at once, in words; nothing if none would.

    Args:
        trainer: Its callbacks have the state they had when the run was stopped.
        metrics: What was logged then.
    """
    reasons = []
    for callback in _private.trainer.callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            why = _why_early(callback, metrics.get(callback.monitor))
            if why:
                reasons.append(f"by EarlyStopping({callback.monitor!r}): {why}")
        elif isinstance(callback, Timer):
            remaining = callback.time_remaining()
            if remaining is not None and remaining <= 0:
                reasons.append(f"by max_time: {callback.time_elapsed():.0f} s are used up")
    return reasons


def _why_early(callback: EarlyStopping, value: object) -> str:
    if callback.wait_count >= callback.patience:
        return f"no better in {callback.wait_count} checks, patience={callback.patience}"
    if not isinstance(value, (int, float)):
        return ""
    if callback.check_finite and not math.isfinite(value):
        return f"{value} is not finite"
    now = torch.tensor(float(value), device="cpu")
    better = callback.monitor_op
    threshold, limit = callback.stopping_threshold, callback.divergence_threshold
    if threshold is not None and better(now, threshold):
        return f"{value:g} has reached stopping_threshold={threshold:g}"
    if limit is not None and better(-now, -limit):
        return f"{value:g} is beyond divergence_threshold={limit:g}"
    return ""
