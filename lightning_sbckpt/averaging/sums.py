"""The running sum of state dictionaries, and whether they fit each other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import TypeAlias, TypeGuard

import torch

from lightning_sbckpt._io.progress import moved
from lightning_sbckpt.errors import ConfigurationError, MismatchError

StateDict: TypeAlias = "Mapping[str, object]"

# Sums of floats of so few bytes lose digits fast, so they are taken in single precision.
_NARROW = 2
# What `get_extra_state` of a module returned; torch gives it this name.
_EXTRA_STATE = "_extra_state"


def numbered(states: Iterable[StateDict]) -> Iterator[tuple[str, StateDict]]:
    """Yield states, each with what to call it in messages."""
    numbers = count(1)
    for state in states:
        yield f"state dict {next(numbers)}", state
        # Else it would stay in memory while the next one is made; so it would with `enumerate`.
        del state


@torch.no_grad()
def average(named_states: Iterable[tuple[str, StateDict]]) -> dict[str, object]:
    """Return the average of states, one at a time; see `average_state_dicts`."""
    iterator = iter(named_states)
    try:
        first_name, first = next(iterator)
    except StopIteration:
        raise ConfigurationError(
            "Nothing to average: no checkpoints or state dictionaries were given. Check the filter "
            "that chose them."
        ) from None
    problems = _not_averageable(first_name, first)
    types = {key: value.dtype for key, value in first.items() if isinstance(value, torch.Tensor)}
    total = _same_kind(first, {key: _start(value) for key, value in first.items()})
    # Neither this state nor the loop's may be alive while the iterator loads the next one.
    del first
    number = 1
    for name, state in iterator:
        problems += _differences(first_name, total, types, name, state)
        if not problems:
            _add(total, state)
        number += 1
        del state
    if problems:
        raise MismatchError(
            "Cannot average states that do not fit each other:\n  "
            + "\n  ".join(problems)
            + "\nAverage checkpoints of one and the same model only, or give an averager that "
            "knows what to do."
        )
    for key, value in total.items():
        if _is_averaged(value, key):
            total[key] = value.div_(number).to(types[key])
    return total


def _same_kind(state: StateDict, values: dict[str, object]) -> dict[str, object]:
    if not isinstance(state, OrderedDict):
        return values
    ordered = OrderedDict(values)
    # A module's state carries the versions of its layers in an attribute, for `load_state_dict`.
    ordered.__dict__.update(state.__dict__)
    return ordered


def _add(total: StateDict, state: StateDict) -> None:
    for key, value in total.items():
        term = state[key]
        if _is_averaged(value, key) and isinstance(term, torch.Tensor):
            value.add_(term.to(device=value.device, dtype=value.dtype))
            moved(term.nbytes)


def _is_averaged(value: object, key: str) -> TypeGuard[torch.Tensor]:
    if str(key).endswith(_EXTRA_STATE) or not isinstance(value, torch.Tensor):
        return False
    return value.is_floating_point() or value.is_complex()


def _start(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    moved(value.nbytes)
    narrow = value.is_floating_point() and value.element_size() <= _NARROW
    return value.detach().to(torch.float32) if narrow else value.detach().clone()


def _not_averageable(name: str, state: StateDict) -> list[str]:
    return [
        f"{name}: {key!r} is of type {type(value).__name__}, expected a tensor"
        for key, value in state.items()
        if not isinstance(value, torch.Tensor) and not str(key).endswith(_EXTRA_STATE)
    ]


def _differences(
    first_name: str, first: StateDict, types: Mapping[str, torch.dtype], name: str, state: StateDict
) -> list[str]:
    problems = [f"{name}: {key!r} is missing" for key in first if key not in state]
    problems += [f"{name}: {key!r} is not in {first_name}" for key in state if key not in first]
    problems += _not_averageable(name, state)
    for key, mine in first.items():
        value = state.get(key)
        if str(key).endswith(_EXTRA_STATE) or not isinstance(mine, torch.Tensor):
            continue
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape != mine.shape:
            problems.append(
                f"{name}: {key!r} has the shape {tuple(value.shape)}, "
                f"{tuple(mine.shape)} in {first_name}"
            )
        elif _is_averaged(value, key) != _is_averaged(mine, key) or (
            value.is_complex() != mine.is_complex()
        ):
            problems.append(
                f"{name}: {key!r} is of type {value.dtype}, {types[key]} in {first_name}"
            )
    return problems
