"""Random generators that objects hold for themselves: found, captured one by one, put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, cast

import torch

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.rng.streams import (
    bytes_of,
    frozen,
    numpy_state,
    python_dict,
    python_tuple,
    tensor_of,
    to_bytes,
    to_tensors,
)
from lightning_sbckpt.rng.walk import Walk, members

if TYPE_CHECKING:
    import numpy as np

Generator = Union[torch.Generator, random.Random, "np.random.Generator", "np.random.RandomState"]


def generators_in(obj: object) -> dict[str, Generator]:
    """Return the random generators that `obj` and the objects it holds keep for themselves.

    Looks at attributes, in containers of any size and depth, in closures, partial functions and
    methods, and at the attributes of classes and modules that users' methods draw from.

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
    return with_state(Walk(generator_kinds()).through(obj).wanted)


def with_state(generators: Mapping[str, object]) -> dict[str, Generator]:
    """Return the generators without those that draw from the system, and have no state."""
    return {
        path: cast("Generator", generator)
        for path, generator in generators.items()
        if not isinstance(generator, random.SystemRandom)
    }


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
            _set_numpy(generator, numpy_state(plain["state"]))
    except Exception as error:
        # What a hostile file holds is of any shape.
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
    kinds = generator_kinds()
    holder: Any = root
    *parents, last = path.split(".")
    for name in parents:
        holder = dict(members(holder, kinds)).get(name)
        if holder is None:
            return False
    current = dict(members(holder, kinds)).get(last)
    if isinstance(current, kinds):
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


def importable(name: str) -> bool:
    """Return whether a library is installed."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _get_numpy(generator: Any) -> object:
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_numpy(generator: Any, state: object) -> None:
    if hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def generator_kinds() -> tuple[type, ...]:
    """Return the classes of generators, as far as their libraries are loaded."""
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
    if not importable("numpy"):
        return None
    import numpy as np

    if kind == "numpy.random.RandomState":
        return np.random.RandomState(0)
    # By no other name: `numpy.random.test` would run numpy's tests.
    bits: Any = None
    if kind == "numpy.random.Generator" and isinstance(state.get("state"), dict):
        bits = vars(np.random).get(str(state["state"].get("bit_generator")))
    is_bits = isinstance(bits, type) and issubclass(bits, np.random.BitGenerator)
    # The base of them all can't be made.
    return np.random.Generator(bits(0)) if is_bits and bits is not np.random.BitGenerator else None
