"""Every random generator a run draws from: captured as plain values, put back, isolated.

Two families. The *global* ones (python's `random`, numpy's legacy state, torch on the CPU and on
each accelerator) are captured together by `capture_rng`. Generators that objects hold for
themselves are found by `generators_in` and captured one by one.

What is captured loads with `torch.load(..., weights_only=True)`: numbers, strings, tuples,
dictionaries, and byte tensors for everything else.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch

from lightning_sbckpt._generators import (
    generator_state,
    generators_in,
    importable,
    install_generator,
    raw_generator_state,
    set_generator_state,
)
from lightning_sbckpt._streams import (
    set_streams,
    streams,
    to_bytes,
    to_tensors,
)
from lightning_sbckpt.errors import MismatchError

__all__ = [
    "capture_rng",
    "generator_state",
    "generators_in",
    "install_generator",
    "isolated_rng",
    "raw_generator_state",
    "restore_rng",
    "set_generator_state",
]

FORMAT = 1


def capture_rng() -> dict[str, object]:
    """Return the state of every global random generator, drawing from none.

    Numpy is captured only if it was imported, CUDA only if it was initialised: a generator that
    nothing has drawn from needs no state.

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
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
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
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
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
    accelerators = {k: v for k, v in capture_rng().items() if k in ("cuda", "mps")}
    try:
        yield
    finally:
        # Looking is much faster than setting, and most of the time nothing was drawn.
        now = streams()
        set_streams({name: state for name, state in before.items() if state != now.get(name)})
        _restore_accelerators(accelerators)


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


def _restore_accelerators(state: Mapping[str, object]) -> list[str]:
    problems = []
    if "cuda" in state:
        problems += _restore_cuda(cast("list[torch.Tensor]", state["cuda"]))
    if "mps" in state:
        if torch.backends.mps.is_available():
            torch.mps.set_rng_state(cast("torch.Tensor", state["mps"]))
        else:
            problems.append("the random state of MPS was saved, but there is no MPS device here.")
    return problems


def _restore_cuda(states: list[torch.Tensor]) -> list[str]:
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
