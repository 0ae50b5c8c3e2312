"""This run's learning rates instead of the checkpoint's: `keep_lr`.

The rates are those that this run's schedule would have by now. A scheduler of torch's is brought
there by as many steps as the saved one had made, whatever it computes its rates from; what it needs
of the metrics of then is taken from the checkpoint.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

# What schedulers compute the rates from lies in the groups of the optimizer, too.
_CYCLED = "max_momentum"
_MOMENTUM = ("momentum", "betas")
_OF_THE_SCHEDULE = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", _CYCLED)


# How far a scheduler of somebody else's has come; whatever else it has is this run's.
_COUNT = re.compile(
    r"_?(last|current|cur|global|num)?_?(step|epoch|iteration|iter|update|batch)(e?s)?_?(count|num)?"
)


def rates_of(optimizers: Sequence[Optimizer]) -> list[list[float]]:
    """Return the present learning rates of each group of each optimizer."""
    return [[as_number(group.get("lr")) for group in each.param_groups] for each in optimizers]


def as_number(rate: object) -> float:
    """Return a learning rate as a number, or NaN where an optimizer has none, as Adafactor may."""
    try:
        return float(cast("float", rate))
    except (TypeError, ValueError):
        return math.nan


def schedule_in(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what of each group belongs to this run's schedule, to be put back by `put_schedule`."""
    return [
        {key: copy.deepcopy(group[key]) for key in (*_OF_THE_SCHEDULE, *_MOMENTUM) if key in group}
        for group in optimizer.param_groups
    ]


def put_schedule(optimizer: Optimizer, own: Sequence[Mapping[str, Any]]) -> None:
    """Put back what `schedule_in` returned, when the optimizer has loaded another state."""
    for group, values in zip(optimizer.param_groups, own, strict=False):
        # A schedule that moves the momentum against the rate owns that, too.
        cycled = _CYCLED in group or _CYCLED in values
        for key in _OF_THE_SCHEDULE:
            group.pop(key, None)
        group.update({k: v for k, v in values.items() if cycled or k not in _MOMENTUM})


def advance(scheduler: Any, state: Mapping[str, Any], reductions: Sequence[int]) -> str | None:
    """Bring a scheduler of this run to where the saved one was; return what is not right, in words.

    Args:
        scheduler: As this run made it.
        state: The state of the saved one.
        reductions: How often a plateau had lowered the rate of each group by then.

    Raises:
        ValueError: This run's schedule has not as many steps.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        _advance_plateau(scheduler, state, reductions)
        return None
    steps = _steps_made(state)
    if isinstance(scheduler, LRScheduler) and steps is not None:
        _step(scheduler, steps - (_steps_made(scheduler.state_dict()) or 0))
        return None
    own = copy.deepcopy(scheduler.state_dict())
    counts = {key: state[key] for key in own if key in state and _COUNT.fullmatch(key)}
    scheduler.load_state_dict({**own, **counts})
    return (
        "only its counts go on, and its rates begin as this run made them: schedulers that are not "
        "torch's can't be stepped here"
    )


def _step(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        # The optimizer has made its steps in another process.
        warnings.simplefilter("ignore")
        for made in range(steps):
            try:
                scheduler.step()
            except ValueError as error:
                raise ValueError(
                    f"this run's schedule has {made} steps, and {steps} were made already ({error})"
                ) from error


def _steps_made(state: Mapping[str, Any]) -> int | None:
    # A chain does not count itself; its members all step with it.
    while "last_epoch" not in state and state.get("_schedulers"):
        state = state["_schedulers"][0]
    made = state.get("last_epoch")
    return None if made is None else int(made)


def reductions_made(now: Sequence[float], first: Sequence[float], factor: float) -> list[int]:
    """Return how often a plateau has lowered each rate by a factor.

    Example:
        >>> reductions_made([0.025, 0.1], [0.1, 0.1], 0.5)
        [2, 0]
    """
    return [
        round(math.log(rate / before) / math.log(factor))
        if 0 < rate < before and 0 < factor < 1
        else 0
        for rate, before in zip(now, first, strict=False)
    ]


def _advance_plateau(
    scheduler: ReduceLROnPlateau, state: Mapping[str, Any], reductions: Sequence[int]
) -> None:
    counts = ["last_epoch", "num_bad_epochs", "cooldown_counter"]
    if state.get("mode") == scheduler.mode:
        counts.append("best")
    scheduler.load_state_dict({key: state[key] for key in counts if key in state})
    for index, group in enumerate(scheduler.optimizer.param_groups):
        rate = float(group["lr"])
        for _ in range(reductions[index] if index < len(reductions) else 0):
            lower = max(rate * scheduler.factor, scheduler.min_lrs[index])
            rate = lower if rate - lower > scheduler.eps else rate
        _set_rate(group, rate)
    now = [copy.deepcopy(group["lr"]) for group in scheduler.optimizer.param_groups]
    scheduler.load_state_dict({"_last_lr": now})


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
