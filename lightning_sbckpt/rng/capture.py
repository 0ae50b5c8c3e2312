"""The global random states: captured, put back, isolated."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.rng.generators import (
    importable,
)
from lightning_sbckpt.rng.streams import (
    set_streams,
    streams,
    to_bytes,
    to_tensors,
)

__all__ = ["capture_rng", "captures_states_of", "isolated_rng", "restore_rng"]

FORMAT = 1

_MPS = "mps"
# Behind the name of a type of devices: which of them was the current one.
_CURRENT = "_current"
_NEEDED = (
    "is_available",
    "is_initialized",
    "device_count",
    "current_device",
    "get_rng_state_all",
    "set_rng_state",
)
_NUMBER = 8


def capture_rng() -> dict[str, object]:
    """Return the state of every global random generator, drawing from none.

    Numpy is captured only if it was imported, CUDA only if it was initialised: a generator that
    nothing has drawn from needs no state. Of CUDA and its like every device's is captured, and which
    of them is the current one: on it the run trains, and it may have another number when it goes on.

    Returns:
        A dictionary that `restore_rng` takes and `torch.load(weights_only=True)` reads.

    Example:
        >>> state = capture_rng()
        >>> first = torch.rand(2)
        >>> restore_rng(state)
        []
        >>> bool((torch.rand(2) == first).all())
        True
    """
    state: dict[str, object] = {"format": FORMAT, "versions": dict(_versions())}
    state.update(cast("dict[str, object]", to_tensors(streams())))
    state.update(_capture_accelerators())
    return state


def restore_rng(state: object) -> list[str]:
    """Put back what `capture_rng` returned.

    All that can be restored is restored; the rest is told, never raised.

    Args:
        state: what `capture_rng` returned, in this process or another.

    Returns:
        One sentence for each generator that could not be put back as it was.

    Raises:
        MismatchError: if `state` is not such a state, or of a format this version cannot read.

    Example:
        >>> restore_rng({"weights": 1})
        Traceback (most recent call last):
        ...
        lightning_sbckpt.errors.MismatchError: cannot restore the random states: expected what \
capture_rng() returns (format 1), found a dict with the keys ['weights']; ...
    """
    if not isinstance(state, Mapping) or not {"format", "python", "torch"} <= set(state):
        found = (
            f"a {type(state).__name__} with the keys {sorted(map(str, state))}"
            if isinstance(state, Mapping)
            else f"a {type(state).__name__}"
        )
        raise MismatchError(
            "cannot restore the random states: expected what capture_rng() returns "
            f"(format {FORMAT}), found {found}; load the file that was saved from capture_rng(), "
            "or skip the random states."
        )
    if state["format"] != FORMAT:
        raise MismatchError(
            f"cannot restore the random states: they have format {state['format']!r} and this "
            f"version reads format {FORMAT}; use the version of lightning-sbckpt that saved them, "
            "or skip the random states."
        )
    problems: list[str] = []
    plain = cast("dict[str, Any]", to_bytes(dict(state)))
    for name in ("python", "torch", "numpy"):
        if name not in plain:
            continue
        if name == "numpy" and "numpy" not in sys.modules and not importable("numpy"):
            problems.append("numpy's random state was saved, but numpy is not installed here.")
            continue
        try:
            set_streams({name: plain[name]})
        except Exception as error:
            # What a hostile file holds is of any shape.
            problems.append(
                f"{name}'s random state could not be restored ({error}); it was saved with "
                f"{_said(state.get('versions'))}, this is {_said(_versions())}."
            )
    return problems + _restore_accelerators(state)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave every global generator, on exit, as it was on entry.

    Example:
        >>> import random
        >>> before = torch.get_rng_state()
        >>> with isolated_rng():
        ...     _ = torch.rand(3), random.random()
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    before = streams()
    accelerators = _capture_accelerators()
    try:
        yield
    finally:
        # Looking is much faster than setting, and most of the time nothing was drawn.
        now = streams()
        set_streams({name: state for name, state in before.items() if state != now.get(name)})
        _set_those_drawn_from(accelerators)


def captures_states_of(device_type: str) -> bool:
    """Return whether the random states of devices of a type can be captured.

    Example:
        >>> captures_states_of("cuda"), captures_states_of("meta")
        (True, False)
    """
    return device_type in ("cpu", _MPS) or _family(device_type) is not None


# -- parts -------------------------------------------------------------------------------------


@cache
def _versions() -> Mapping[str, str]:
    numpy = sys.modules.get("numpy")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__) if numpy else "not imported",
    }


def _said(versions: object) -> str:
    if not isinstance(versions, Mapping):
        return "unknown versions"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _capture_accelerators() -> dict[str, object]:
    state: dict[str, object] = {}
    for name, family in _families():
        if family.is_available() and family.is_initialized():
            state[name] = family.get_rng_state_all()
            state[name + _CURRENT] = int(family.current_device())
    if torch.backends.mps.is_available():
        state[_MPS] = torch.mps.get_rng_state()
    return state


def _families() -> Iterator[tuple[str, Any]]:
    """Yield the types of devices that number their generators, each with torch's module for it."""
    names = ["cuda", "xpu"]
    # Since torch 2.6; it knows those of other vendors, which bring a module of their own.
    accelerator = getattr(torch, "accelerator", None)
    found = accelerator.current_accelerator() if accelerator is not None else None
    if found is not None and found.type not in (*names, _MPS):
        names.append(found.type)
    for name in names:
        family = _family(name)
        if family is not None:
            yield name, family


def _family(name: str) -> Any:
    family = getattr(torch, name, None)
    return family if all(hasattr(family, each) for each in _NEEDED) else None


def _restore_accelerators(state: Mapping[str, object]) -> list[str]:
    problems = []
    for name in sorted(str(key).removesuffix(_CURRENT) for key in state if _CURRENT in str(key)):
        states, trained_on = state.get(name), state.get(name + _CURRENT)
        try:
            problems += _restore_by_use(name, cast("Any", states), cast("Any", trained_on))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problems.append(
                f"the random states of {name.upper()} devices could not be restored ({error})."
            )
    # Of releases that did not note the current device.
    if "cuda" in state and "cuda" + _CURRENT not in state:
        problems += _restore_by_number(cast("list[torch.Tensor]", state["cuda"]))
    if _MPS in state:
        if torch.backends.mps.is_available():
            torch.mps.set_rng_state(cast("torch.Tensor", state[_MPS]))
        else:
            problems.append("the random state of MPS was saved, but there is no MPS device here.")
    return problems


def _restore_by_use(name: str, states: Sequence[torch.Tensor], trained_on: int) -> list[str]:
    family = _family(name)
    here = family.device_count() if family is not None and family.is_available() else 0
    if not here:
        sentence = (
            f"the random state of the {name.upper()} device that the run trained on was saved, and none "
            "is here."
        )
        return [sentence]
    trains_on = int(family.current_device())
    if here == len(states) and trains_on == trained_on:
        for device, state in enumerate(states):
            family.set_rng_state(state, device)
        return []
    family.set_rng_state(states[trained_on], trains_on)
    # Which of the others is which can't be known. A rank sees those of all ranks on its machine.
    lost = [
        str(device)
        for device, state in enumerate(states)
        if device != trained_on and _was_drawn_from(state)
    ]
    if not lost:
        return []
    sentence = (
        f"the random states of {name.upper()} device {', '.join(lost)} were not restored: the run trained "
        f"on device {trained_on} of {len(states)} and trains on device {trains_on} of {here}, which "
        "got the state of that one alone."
    )
    return [sentence]


def _was_drawn_from(state: torch.Tensor) -> bool:
    # Of CUDA's and XPU's: the seed, and how far it has come since (seen in torch 2.4 to 2.13).
    data = bytes(state.tolist())
    return len(data) != 2 * _NUMBER or any(data[_NUMBER:])


def _restore_by_number(states: Sequence[torch.Tensor]) -> list[str]:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(states[:here]):
        torch.cuda.set_rng_state(state, device)
    if here == len(states):
        return []
    sentence = (
        f"the random states of {len(states)} CUDA devices were saved and {here} are here; "
        f"{min(here, len(states))} were restored, by their number."
    )
    return [sentence]


def _set_those_drawn_from(before: Mapping[str, object]) -> None:
    """Put back the states that are others now; setting one begins cuDNN's dropout anew."""
    now = _capture_accelerators()
    for name, family in _families():
        then = cast("Sequence[torch.Tensor]", before.get(name, ()))
        for device, (old, new) in enumerate(
            zip(then, cast("Sequence[torch.Tensor]", now.get(name, ())), strict=False)
        ):
            if not torch.equal(old, new):
                family.set_rng_state(old, device)
    if _MPS in before and not torch.equal(
        cast("torch.Tensor", before[_MPS]), cast("torch.Tensor", now[_MPS])
    ):
        torch.mps.set_rng_state(cast("torch.Tensor", before[_MPS]))
