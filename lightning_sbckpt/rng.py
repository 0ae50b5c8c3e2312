"""Every random generator a run draws from: captured as plain values, put back, isolated.

Two families. The *global* ones (python's `random`, numpy's legacy state, torch on the CPU and on
each accelerator) are captured together by `capture_rng`. Generators that objects hold for
themselves are found by `generators_in` and captured one by one.

What is captured loads with `torch.load(..., weights_only=True)`: numbers, strings, tuples,
dictionaries, and byte tensors for everything else.
"""

from __future__ import annotations

import platform
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union, cast

import torch

from lightning_sbckpt._streams import (
    bytes_of,
    frozen,
    python_dict,
    python_tuple,
    set_streams,
    streams,
    tensor_of,
    thawed,
    to_bytes,
    to_tensors,
)
from lightning_sbckpt.errors import MismatchError

if TYPE_CHECKING:
    import numpy as np

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

Generator = Union[torch.Generator, random.Random, "np.random.Generator", "np.random.RandomState"]

FORMAT = 1

# A dataset may hold half of the program; beyond this many objects the search stops.
_MOST_OBJECTS = 512
_MOST_ITEMS = 16
_DEEPEST = 5


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
        if name == "numpy" and "numpy" not in sys.modules and not _importable("numpy"):
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


def generators_in(obj: object) -> dict[str, Generator]:
    """Return the random generators that `obj` and the objects it holds keep for themselves.

    Looks at instance attributes, and in lists, tuples and dictionaries of moderate length.
    Modules, tensors and classes are not entered.

    Args:
        obj: a loader, sampler, dataset, transform...

    Returns:
        Dotted attribute path -> generator, in the order in which they were found. A generator
        that is reachable in two ways is named once.

    Example:
        >>> from types import SimpleNamespace
        >>> sampler = SimpleNamespace(generator=torch.Generator())
        >>> list(generators_in(SimpleNamespace(sampler=sampler, generator=sampler.generator)))
        ['generator']
    """
    kinds = _generator_kinds()
    found: dict[str, Generator] = {}
    seen: set[int] = set()
    level: list[tuple[str, object]] = [("", obj)]
    # Breadth first, so that the shortest name wins and the limit cuts off the remotest objects.
    for _ in range(_DEEPEST):
        below: list[tuple[str, object]] = []
        for path, holder in level:
            for name, value in _members(holder):
                if isinstance(value, _LEAVES) or id(value) in seen:
                    continue
                if isinstance(value, kinds):
                    seen.add(id(value))
                    if not isinstance(value, random.SystemRandom):
                        found[f"{path}{name}"] = cast("Generator", value)
                elif len(seen) < _MOST_OBJECTS and _may_enter(value):
                    seen.add(id(value))
                    below.append((f"{path}{name}.", value))
        level = below
    return found


def generator_state(generator: Generator) -> dict[str, object]:
    """Return the state of one generator as plain values.

    Example:
        >>> state = generator_state(random.Random(3))
        >>> other = random.Random()
        >>> set_generator_state(other, state)
        >>> other.random() == random.Random(3).random()
        True
    """
    return cast("dict[str, object]", to_tensors(raw_generator_state(generator)))


def set_generator_state(generator: Generator, state: Mapping[str, object]) -> None:
    """Put back what `generator_state` returned.

    Raises:
        MismatchError: if the state is of another kind of generator.

    Example:
        >>> set_generator_state(torch.Generator(), generator_state(random.Random(0)))
        Traceback (most recent call last):
        ...
        lightning_sbckpt.errors.MismatchError: cannot set the state of a torch.Generator: ...
    """
    plain = cast("dict[str, Any]", to_bytes(dict(state)))
    kind = _kind(generator)
    if plain.get("kind") != kind:
        raise MismatchError(
            f"cannot set the state of a {kind}: the state given is that of a "
            f"{plain.get('kind', 'thing that is no generator')}; make the same kind of generator "
            "as when it was saved."
        )
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(tensor_of(plain["state"]))
        elif isinstance(generator, random.Random):
            generator.setstate(python_tuple(plain["state"]))
        else:
            _set_numpy(generator, thawed(plain["state"]))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise MismatchError(
            f"cannot set the state of a {kind}: {error}; was it saved on another device, or with "
            "another bit generator?"
        ) from error


def install_generator(root: object, path: str, state: Mapping[str, object]) -> bool:
    """Give the generator at `path` below `root` the state, making it if there is None yet.

    Many datasets make their generator when the first sample is asked for; one that finds it
    already there goes on with it.

    Returns:
        Whether there is now such a generator.

    Example:
        >>> from types import SimpleNamespace
        >>> dataset = SimpleNamespace(rng=None)
        >>> install_generator(dataset, "rng", generator_state(random.Random(3)))
        True
        >>> dataset.rng.random() == random.Random(3).random()
        True
    """
    holder: Any = root
    *parents, last = path.split(".")
    for name in parents:
        holder = dict(_members(holder)).get(name)
        if holder is None:
            return False
    current = dict(_members(holder)).get(last)
    if isinstance(current, _generator_kinds()):
        generator = cast("Generator", current)
    elif current is None and hasattr(holder, "__dict__"):
        made = _new_generator(cast("dict[str, Any]", to_bytes(dict(state))))
        if made is None:
            return False
        generator = made
        setattr(holder, last, generator)
    else:
        return False
    try:
        set_generator_state(generator, state)
    except MismatchError:
        return False
    return True


def raw_generator_state(generator: Generator) -> dict[str, object]:
    """Return `generator_state` with bytes in place of tensors, as it crosses processes fastest.

    Example:
        >>> sorted(raw_generator_state(torch.Generator()))
        ['kind', 'state']
    """
    if isinstance(generator, torch.Generator):
        state: object = bytes_of(generator.get_state())
    elif isinstance(generator, random.Random):
        state = python_dict(generator.getstate())
    else:
        state = frozen(_get_numpy(generator))
    return {"kind": _kind(generator), "state": state}


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


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


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


def _get_numpy(generator: Any) -> object:
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_numpy(generator: Any, state: object) -> None:
    if hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _generator_kinds() -> tuple[type, ...]:
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy.random" in sys.modules:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return kinds


def _kind(generator: Generator) -> str:
    if isinstance(generator, torch.Generator):
        return "torch.Generator"
    if isinstance(generator, random.Random):
        return "random.Random"
    return f"numpy.random.{type(generator).__name__}"


def _new_generator(state: Mapping[str, Any]) -> Generator | None:
    kind = state.get("kind")
    if kind == "torch.Generator":
        return torch.Generator()
    if kind == "random.Random":
        return random.Random(0)  # noqa: S311
    if not _importable("numpy"):
        return None
    import numpy as np

    if kind == "numpy.random.RandomState":
        return np.random.RandomState(0)
    bits = getattr(np.random, str(state["state"].get("bit_generator")), None)
    if kind == "numpy.random.Generator" and bits is not None:
        return np.random.Generator(bits(0))
    return None


_PLAIN = (str, bytes, int, float, complex, type(None))
_LEAVES = (*_PLAIN, type, ModuleType, torch.Tensor, torch.nn.Module)


def _may_enter(value: object) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return 0 < len(value) <= _MOST_ITEMS
    return hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None))


def _members(holder: object) -> list[tuple[str, object]]:
    if isinstance(holder, dict):
        return [(str(key), value) for key, value in list(holder.items())]
    if isinstance(holder, (list, tuple)):
        return [(str(index), value) for index, value in enumerate(holder)]
    return list(getattr(holder, "__dict__", {}).items())
