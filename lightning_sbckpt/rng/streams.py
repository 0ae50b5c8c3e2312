"""The global random streams of the CPU, read fast enough to look at them around every batch.

A stream is a value that compares with `==`: bytes, numbers, and dictionaries of them. Python and
numpy would copy their 624 words one by one; here they are read where they lie.
"""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from collections.abc import Mapping
from typing import Any, cast

import torch

__all__ = [
    "bytes_of",
    "frozen",
    "numpy_state",
    "python_dict",
    "python_tuple",
    "set_streams",
    "streams",
    "tensor_of",
    "to_bytes",
    "to_tensors",
]


def streams() -> dict[str, object]:
    """Return the global generators of the CPU as values that compare with `==`.

    No tensor is made, and nothing is drawn.

    Example:
        >>> before = streams()
        >>> _ = random.random()
        >>> sorted(name for name, state in streams().items() if state != before[name])
        ['python']
    """
    found: dict[str, object] = {
        "python": _python_memory.state(),
        "torch": bytes_of(torch.default_generator.get_state()),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # Numpy imports its random part at the first use, and seeds it then from nowhere: a run
        # that goes on from here is to find there what this one will.
        found["numpy"] = _numpy_memory.state_of(numpy)
    return found


def set_streams(states: Mapping[str, Any]) -> None:
    """Put back some or all of what `streams` returned.

    Example:
        >>> before = streams()
        >>> first = random.random()
        >>> set_streams(before)
        >>> random.random() == first
        True
    """
    if "python" in states:
        random.setstate(python_tuple(states["python"]))
    if "torch" in states:
        torch.default_generator.set_state(tensor_of(states["torch"]))
    if "numpy" in states:
        import numpy as np

        np.random.set_state(numpy_state(states["numpy"]))  # noqa: NPY002
        _numpy_memory.forget()


def to_tensors(value: object) -> object:
    """Return nested dictionaries and lists with byte tensors in place of bytes.

    Example:
        >>> to_tensors({"words": b"ab"})
        {'words': tensor([97, 98], dtype=torch.uint8)}
    """
    if isinstance(value, bytes):
        return tensor_of(value)
    if isinstance(value, dict):
        return {key: to_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_tensors(item) for item in value]
    return value


def to_bytes(value: object) -> object:
    """Undo `to_tensors`.

    Example:
        >>> to_bytes(to_tensors({"words": b"ab"}))
        {'words': b'ab'}
    """
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return bytes_of(value.cpu().contiguous())
    if isinstance(value, dict):
        return {key: to_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_bytes(item) for item in value]
    return value


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a byte tensor on the CPU.

    Example:
        >>> bytes_of(tensor_of(b"ab"))
        b'ab'
    """
    # Three times faster than through numpy, and there without it.
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def tensor_of(data: bytes) -> torch.Tensor:
    """Return a byte tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class _PythonMemory:
    """Reads the words of python's global Mersenne Twister where they lie.

    `random.getstate` makes 625 integers, ten times slower. The layout (the position, then 624
    words, behind the header of every object) is CPython's; it is checked before it is relied on.
    """

    SIZE = 4 + 624 * 4

    def __init__(self) -> None:
        self.owner: random.Random | None = None
        self.address = 0

    def state(self) -> dict[str, object]:
        owner: Any = getattr(random.random, "__self__", None)
        if owner is not self.owner:
            self.owner, self.address = owner, 0
            address = id(owner) + object.__basicsize__
            if self._fits(owner) and self._read(address) == python_dict(random.getstate()):
                self.address = address
        return self._read(self.address) if self.address else python_dict(random.getstate())

    def _read(self, address: int) -> dict[str, object]:
        words = ctypes.string_at(address, self.SIZE)
        return {"words": words, "gauss": getattr(self.owner, "gauss_next", None)}

    def _fits(self, owner: object) -> bool:
        base = random.Random.__base__
        return (
            sys.implementation.name == "cpython"
            and isinstance(owner, random.Random)
            and base is not None
            and base.__basicsize__ >= object.__basicsize__ + self.SIZE
        )


def python_dict(state: tuple[Any, ...]) -> dict[str, object]:
    """Return what `random.Random.getstate` gave, as a stream."""
    _, numbers, gauss = state
    words = array("I", [numbers[-1], *numbers[:-1]]).tobytes()
    return {"words": words, "gauss": gauss}


def python_tuple(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what `random.Random.setstate` takes.

    Example:
        >>> state = random.Random(1).getstate()
        >>> python_tuple(python_dict(state)) == state
        True
    """
    position, *words = array("I", state["words"])
    return 3, (*words, position), state["gauss"]


_python_memory = _PythonMemory()


class _NumpyMemory:
    """Reads the words of numpy's global Mersenne Twister where they lie.

    `numpy.random.get_state` copies 624 words one by one, which takes longer than everything else
    here together; most runs never draw from it. The layout (624 words, then the position) is
    numpy's `mt19937_state`, the same since 1.17; it is checked once before it is relied on.
    """

    SIZE = 624 * 4 + 4

    def __init__(self) -> None:
        self.owner: object = None
        self.address = 0
        self.words = b""
        self.state: dict[str, Any] | None = None

    def forget(self) -> None:
        self.state = None

    def state_of(self, numpy: Any) -> object:
        # Before numpy 1.24 there is no public way to it.
        owner = getattr(numpy.random, "get_bit_generator", lambda: None)()
        if owner is None:
            return frozen(numpy.random.get_state(legacy=False))
        if owner is not self.owner:
            self.owner, self.address, self.state = owner, self._address(owner), None
        if not self.address:
            return frozen(numpy.random.get_state(legacy=False))
        words = ctypes.string_at(self.address, self.SIZE)
        # A normal deviate may wait in reserve, and taking it moves no word: only without one are
        # equal words an equal state.
        if self.state is not None and words == self.words and not self.state["has_gauss"]:
            return self.state
        self.words = words
        self.state = cast("dict[str, Any]", frozen(numpy.random.get_state(legacy=False)))
        return self.state

    def _address(self, owner: Any) -> int:
        if type(owner).__name__ != "MT19937":
            return 0
        address = int(owner.ctypes.state_address)
        state = owner.state["state"]
        told = state["key"].astype("uint32").tobytes() + int(state["pos"]).to_bytes(
            4, sys.byteorder, signed=True
        )
        return address if ctypes.string_at(address, self.SIZE) == told else 0


_numpy_memory = _NumpyMemory()


def frozen(value: object) -> object:
    """Return what numpy gave as a state, with bytes in place of arrays."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"dtype": str(value.dtype), "words": value.tobytes()}
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    return value


def numpy_state(value: object) -> dict[str, Any]:
    """Undo `frozen` for the state of a generator of numpy's.

    Raises:
        ValueError: Its position is outside of its words. Numpy does not look, and the next number
            would be from anywhere in memory, or end the process.
    """
    state = cast("dict[str, Any]", _thawed(value))
    kind = state["bit_generator"]
    words, position = 0, 0
    if kind == "MT19937":
        words, position = 624, state["state"]["pos"]
    elif kind == "Philox":
        words, position = 4, state["buffer_pos"]
    if not 0 <= int(position) <= words:
        raise ValueError(f"a {kind} has no word {position!r:.40}")
    return state


def _thawed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype", "words"}:
        import numpy as np

        return np.frombuffer(value["words"], dtype=value["dtype"]).copy()
    return {key: _thawed(item) for key, item in value.items()}
