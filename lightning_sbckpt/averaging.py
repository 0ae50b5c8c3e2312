"""Averages of checkpoints, taken one file at a time.

Averaging the parameters of the last or best checkpoints of a run often generalizes better than
any one of them (Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).
"""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TypeAlias, TypeGuard, TypeVar, overload

import torch

from lightning_sbckpt._folder.layout import PARAMFILE_EXT
from lightning_sbckpt._torchfile.reading import load_state
from lightning_sbckpt.errors import ConfigurationError, MismatchError
from lightning_sbckpt.meta import Checkpoint

__all__ = ["average_checkpoints", "average_state_dicts"]

T = TypeVar("T")
StateDict: TypeAlias = "Mapping[str, object]"
Source: TypeAlias = "Checkpoint | str | os.PathLike[str]"

# Sums of floats of so few bytes lose digits fast, so they are taken in single precision.
_NARROW = 2
# What `get_extra_state` of a module returned; torch gives it this name.
_EXTRA_STATE = "_extra_state"


def average_state_dicts(state_dicts: Iterable[StateDict]) -> dict[str, object]:
    """Return the average of state dictionaries, which are left as they are.

    Floating and complex tensors are averaged, those of less than 32 bits in single precision, and
    come back in their own type. Integer and boolean tensors (counts such as `num_batches_tracked`,
    masks, indices) and a module's extra state have no meaningful average: the first dictionary's
    are taken, so give the newest or best first.

    At most two states are in memory at a time if `state_dicts` makes them one by one.

    Args:
        state_dicts: The dictionaries, with the same names and shapes in each.

    Returns:
        A new dictionary with new tensors, on the devices of the first one's.

    Raises:
        MismatchError: Names, shapes or kinds differ; the message lists every difference.
        ConfigurationError: There are no dictionaries to average.

    Example:
        >>> first = {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(20)}
        >>> second = {"weight": torch.tensor([3.0, 4.0]), "steps": torch.tensor(10)}
        >>> average_state_dicts([first, second])
        {'weight': tensor([2., 3.]), 'steps': tensor(20)}
    """
    return _average(_numbered(state_dicts))


@overload
def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., StateDict] | None = None,
) -> dict[str, object]: ...


@overload
def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., object] | None = None,
    averager: Callable[[Iterator[object]], T] = ...,
) -> T: ...


def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., object] | None = None,
    averager: Callable[..., object] = average_state_dicts,
) -> object:
    """Return the average of one recoverable over several checkpoints.

    Args:
        checkpoint_list: Checkpoints, as `Checkpointer.find_checkpoints` returns them, or paths of
            checkpoint folders, in any mixture. Give the newest or best first, see
            `average_state_dicts`.
        recoverable_name: Which recoverable to average.
        parameter_loader: Reads a file, called as `loader(path)`, or as
            `loader(path, map_location="cpu")` if it takes that. By default only tensors and plain
            values are loaded, on the CPU.
        averager: Averages an iterator over what the loader returned.

    Returns:
        What the averager returns; by default a state dictionary for `load_state_dict`.

    Raises:
        MismatchError: A checkpoint lacks the recoverable, or states do not fit each other.
        ConfigurationError: There are no checkpoints.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> ckpts = []
        >>> for value in (1.0, 3.0):
        ...     file = folder / f"{value}.ckpt"
        ...     torch.save({"weight": torch.tensor([value])}, file)
        ...     ckpts.append(Checkpoint(folder, {}, {"model": file}))
        >>> average_checkpoints(ckpts, "model")
        {'weight': tensor([2.])}
    """
    paths = _paramfiles(checkpoint_list, recoverable_name)
    load = _loader(parameter_loader)
    if averager is average_state_dicts:
        # Not through `averager`, so that a message names the file.
        return _average((str(path), _as_state_dict(path, load(path))) for path in paths)
    return averager(load(path) for path in paths)


def _numbered(states: Iterable[StateDict]) -> Iterator[tuple[str, StateDict]]:
    numbers = count(1)
    for state in states:
        yield f"state dict {next(numbers)}", state
        # Else it would stay in memory while the next one is made; so it would with `enumerate`.
        del state


@torch.no_grad()
def _average(named_states: Iterable[tuple[str, StateDict]]) -> dict[str, object]:
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


def _is_averaged(value: object, key: str) -> TypeGuard[torch.Tensor]:
    if str(key).endswith(_EXTRA_STATE) or not isinstance(value, torch.Tensor):
        return False
    return value.is_floating_point() or value.is_complex()


def _start(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
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


def _paramfiles(checkpoints: Iterable[Source], name: str) -> list[Path]:
    paths: list[Path] = []
    problems: list[str] = []
    for checkpoint in checkpoints:
        # Any record with these fields will do, SpeechBrain's own among them.
        if isinstance(checkpoint, (str, os.PathLike)):
            folder = Path(checkpoint)
            found = folder.glob(f"*{PARAMFILE_EXT}")
            files = {file.name.removesuffix(PARAMFILE_EXT): file for file in found}
        else:
            folder, files = checkpoint.path, checkpoint.paramfiles
        if name in files:
            paths.append(Path(files[name]))
        else:
            problems.append(f"{folder} has {', '.join(sorted(files)) or 'no recoverables'}")
    if problems:
        raise MismatchError(
            f"Cannot average {name!r}: not every checkpoint has a recoverable of this name.\n  "
            + "\n  ".join(problems)
            + "\nUse one of the names that all of them have, or leave these checkpoints out with "
            "ckpt_predicate."
        )
    return paths


def _loader(loader: Callable[..., T] | None) -> Callable[[Path], T | object]:
    if loader is None:
        return load_state
    try:
        parameters = inspect.signature(loader).parameters.values()
    except ValueError:  # a builtin tells no signature
        return loader
    if any(p.name == "map_location" or p.kind is p.VAR_KEYWORD for p in parameters):
        return lambda path: loader(path, map_location="cpu")
    return loader


def _as_state_dict(path: Path, state: object) -> StateDict:
    if isinstance(state, Mapping):
        return state
    raise MismatchError(
        f"Cannot average {path}: it holds a {type(state).__name__}, expected a state dictionary. "
        "Give an averager that knows what to do with it."
    )
