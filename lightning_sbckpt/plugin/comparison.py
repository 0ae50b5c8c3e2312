"""What two runs that are to be the same are compared by: every bit of their state and of their trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from inspect import isroutine
from types import ModuleType
from typing import Any

import torch
import xxhash

from lightning_sbckpt.plugin.packages import LightningModule
from lightning_sbckpt.rng.walk import slots

BY_UP_TO = " differing by up to "


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: what it did batch by batch and logged, and its state at the end."""

    trace: list[dict[str, Any]]
    final: dict[str, Any]


def weights(module: LightningModule) -> dict[str, Any]:
    """Return the weights."""
    return dict(module.state_dict())


def clone(state: Any) -> Any:
    """Return a copy that training does not change, and that a file takes."""
    if isinstance(state, torch.Tensor):
        return _own(state).cpu().clone()
    if isinstance(state, Mapping):
        return {key: clone(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [clone(value) for value in state]
    return state if isinstance(state, (int, float, str, bool, type(None))) else repr(state)


def fingerprint(state: Any) -> str:
    """Return a hash of every bit, of what an object holds too.

    Example:
        >>> from argparse import Namespace
        >>> fingerprint(Namespace(x=torch.ones(2))) == fingerprint(Namespace(x=torch.ones(2)))
        True
        >>> fingerprint(Namespace(x=torch.ones(2))) == fingerprint(Namespace(x=torch.zeros(2)))
        False
    """
    hasher = xxhash.xxh3_64()
    _feed(hasher, state, {})
    return str(hasher.hexdigest())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this rank's piece of one that is sharded."""
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()


def _feed(hasher: Any, state: Any, seen: dict[int, Any]) -> None:
    if isinstance(state, torch.Tensor):
        tensor = _own(state).cpu().contiguous()
        hasher.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    elif isinstance(state, Mapping):
        for key, value in state.items():
            hasher.update(_text(key))
            _feed(hasher, value, seen)
    elif isinstance(state, (list, tuple)):
        for value in state:
            _feed(hasher, value, seen)
    elif isinstance(state, AbstractSet):
        for text in sorted(map(_text, state)):
            hasher.update(text)
    elif hasattr(state, "tobytes") and hasattr(state, "dtype") and not state.dtype.hasobject:
        # numpy's, which shows the ends of a long array alone.
        hasher.update(f"{state.dtype} {state.shape}".encode())
        hasher.update(state.tobytes())
    elif attributes := _attributes(state):
        hasher.update(type(state).__qualname__.encode())
        if id(state) not in seen:
            seen[id(state)] = state  # Held, so that no other object gets its address.
            _feed(hasher, attributes, seen)
    else:
        hasher.update(_text(state))


def _attributes(state: object) -> dict[str, Any]:
    """Return what an object holds; of classes and functions only the name counts."""
    if isinstance(state, (type, ModuleType)) or isroutine(state):
        return {}
    names = [name for name in slots(type(state)) if hasattr(state, name)]
    return {name: getattr(state, name) for name in names} | getattr(state, "__dict__", {})


def _text(state: object) -> bytes:
    """Return how it shows itself, without its address, which every process has another of."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(state)).encode()


def differences(reference: Outcome, resumed: Outcome) -> list[str]:
    """Return what differs, in the order in which it came about."""
    found: list[str] = []
    expected_batches = {line["batch"]: line for line in reference.trace if "batch" in line}
    for line in resumed.trace:
        if "batch" in line:
            expected = expected_batches.get(line["batch"])
            place = f"batch {line['batch_idx']} of epoch {line['epoch']}"
            if expected is None:
                found.append(f"{place} does not exist in the run that went through")
                continue
            names = [name for name, value in line.items() if value != expected[name]]
            if names:
                found.append(f"{', '.join(names)} differ after {place}")
    found += _logged_differences(reference, resumed)
    last = max((line["batch"] for line in resumed.trace if "batch" in line), default=None)
    if last is not None and last != max(expected_batches):
        found.append(f"it ended after batch {last}, expected {max(expected_batches)}")
    found += _state_differences(reference.final, resumed.final, "")
    return found


def _logged_differences(reference: Outcome, resumed: Outcome) -> list[str]:
    expected = [line for line in reference.trace if "logged" in line]
    actual = [line for line in resumed.trace if "logged" in line]
    # What the resumed process logs must be the end of what the other one logged.
    tail = expected[len(expected) - len(actual) :] if len(actual) <= len(expected) else expected
    found = []
    if len(actual) > len(expected):
        found.append(f"it logged {len(actual)} times, the run that went through {len(expected)}")
    for line, other in zip(actual, tail, strict=False):
        if line != other:
            names = sorted(
                name
                for name in {*line["logged"], *other["logged"]}
                if line["logged"].get(name) != other["logged"].get(name)
            )
            details = ", ".join(
                f"{name} {_readable(line, name)} instead of {_readable(other, name)}"
                for name in names[:3]
            )
            found.append(
                f"logged at step {line['step']} (expected step {other['step']}): {details}"
            )
    return found


def _readable(line: Mapping[str, Any], name: str) -> str:
    value = line["logged"].get(name)
    return "nothing" if value is None else repr(float.fromhex(value))


def _state_differences(expected: Any, actual: Any, where: str) -> list[str]:
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return [f"{where}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"]
        if torch.equal(expected, actual) or _same_bits(expected, actual):
            return []
        distance = (expected.double() - actual.double()).abs().max().item()
        return [f"{where}{BY_UP_TO}{distance:.3g}"]
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        found = [
            f"{where}[{key!r}] is only in one of the runs"
            for key in expected.keys() ^ actual.keys()
        ]
        for key in [key for key in expected if key in actual]:
            found += _state_differences(expected[key], actual[key], f"{where}[{key!r}]")
        return found
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        found = []
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            found += _state_differences(one, other, f"{where}[{index}]")
        return found
    same = repr(expected) == repr(actual)  # NaN, too, is the same as itself here.
    return [] if same else [f"{where}: {actual!r} instead of {expected!r}"]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare with NaN equal to itself."""
    return fingerprint(one) == fingerprint(other)
