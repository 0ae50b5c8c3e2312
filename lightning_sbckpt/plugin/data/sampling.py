"""The order of the samples: what a sampler's state is, and how its draws are made again.

The samplers of torch draw from the global random streams at most once per epoch, so to rebuild
their order it is enough to know the streams at that moment. Others may draw at any index, with
training drawing in between: those are watched, and what a replay could not know by itself is kept.
"""

from __future__ import annotations

import copy
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from lightning_sbckpt.rng.streams import set_streams, streams
from lightning_sbckpt.typing import Stateful

__all__ = [
    "DrawLog",
    "Order",
    "WatchedSampler",
    "counters",
    "fingerprint",
    "is_well_known",
    "samplers_in",
    "samplers_state",
    "set_samplers",
]

# About 80 MB with all three streams; nobody wants more of that in a checkpoint.
MOST_RECORDS = 8192

_PLAIN = (int, float, str, type(None))


class DrawLog:
    """Keeps the random streams before each draw, where a replay would come with other ones.

    A replay makes the same draws without the training in between. As long as nothing else used a
    stream since the last draw, the replay has that stream right by itself, and nothing is kept.
    """

    def __init__(self) -> None:
        self.known = streams()
        self.records: dict[int, dict[str, object]] = {}
        self.is_complete = True
        self._before: dict[str, object] = {}

    def before(self) -> None:
        """Note the streams right before a draw."""
        self._before = streams()

    def after(self, number: int) -> None:
        """Note what draw `number` did to the streams, and keep what will be needed."""
        for name, state in streams().items():
            before = self._before.get(name)
            if state == before:
                continue
            if before is not None and before != self.known.get(name):
                if len(self.records) < MOST_RECORDS:
                    self.records.setdefault(number, {})[name] = before
                else:
                    self.is_complete = False
            self.known[name] = state

    def apply(self, number: int) -> None:
        """Set the streams as they were before draw `number`, where they are known to differ."""
        if number in self.records:
            set_streams(self.records[number])

    def resumed(self) -> None:
        """Go on watching after a replay has ended."""
        self.known = streams()

    def state(self) -> dict[str, object]:
        """Return the log as a few large tensors: thousands of small ones would load slowly."""
        packed: dict[str, object] = {"is_complete": self.is_complete}
        for name in ("python", "torch", "numpy"):
            numbers = [n for n, record in self.records.items() if name in record]
            states = [_pack(name, self.records[n][name]) for n in numbers]
            if states and all(len(state) == len(states[0]) > 0 for state in states):
                data = torch.frombuffer(bytearray(b"".join(states)), dtype=torch.uint8)
                packed[name] = (numbers, data.reshape(len(states), -1))
            elif states:
                packed["is_complete"] = False
        return packed

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.records = {}
        self.is_complete = bool(state["is_complete"])
        for name in ("python", "torch", "numpy"):
            for number, row in zip(*state.get(name, ((), ())), strict=True):
                data = bytes(bytearray(row.tolist()))
                self.records.setdefault(number, {})[name] = _unpack(name, data)


class Order:
    """The indices of one iteration over a sampler that is not one of torch's own."""

    def __init__(self, sampler: Any, *, log: DrawLog, remember: int) -> None:
        self.sampler = sampler
        self.log = log
        self.drawn = 0
        self.replays_until = 0
        self.tail: deque[tuple[int, object]] = deque(maxlen=remember)
        self.states: deque[tuple[int, object]] = deque(maxlen=remember)
        self._is_stateful = any(isinstance(s, Stateful) for s in _chain("", sampler).values())
        self._iterator = iter(sampler)
        log.resumed()

    def __iter__(self) -> Iterator[object]:
        """Return itself."""
        return self

    def __next__(self) -> object:
        """Return the next index, or batch of indices."""
        number = self.drawn
        if self._is_stateful:
            self.states.append((number, copy.deepcopy(_states(_chain("", self.sampler)))))
        if number < self.replays_until:
            self.log.apply(number)
            index = next(self._iterator)
            if number + 1 == self.replays_until:
                self.log.resumed()
        else:
            self.log.before()
            index = next(self._iterator)
            self.log.after(number)
        self.tail.append((number, index))
        self.drawn += 1
        return index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_iterator"], name)

    def goes_on_from(self, state: Mapping[str, Any], at: int) -> None:
        """Have the samplers load their own state, as of before draw `at`, and iterate anew."""
        _load_states(_chain("", self.sampler), state)
        self._iterator = iter(self.sampler)
        self.drawn = at
        self.tail.clear()

    def state_at(self, number: int) -> object:
        """Return the samplers' own state before draw `number`, if it is still remembered."""
        if number == self.drawn and self._is_stateful:
            return copy.deepcopy(_states(_chain("", self.sampler)))
        return dict(self.states).get(number)

    def fingerprints(self) -> dict[int, int]:
        """Return the last draws, by number, in short."""
        found = {number: fingerprint(index) for number, index in self.tail}
        return {number: value for number, value in found.items() if value is not None}


class WatchedSampler:
    """Stands in for a sampler while a loader is iterated, and watches each iteration."""

    def __init__(self, sampler: Any, *, remember: int) -> None:
        self.sampler = sampler
        self.remember = remember
        self.latest: Order | None = None

    def __iter__(self) -> Iterator[object]:
        """Iterate the sampler, watched."""
        self.latest = Order(self.sampler, log=DrawLog(), remember=self.remember)
        return self.latest

    def __len__(self) -> int:
        """Return the sampler's length."""
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)


def is_well_known(sampler: object) -> bool:
    """Return whether a sampler, and what it samples from, are torch's own and without state."""
    return all(
        type(part).__module__.partition(".")[0] in ("torch", "torchdata", "builtins")
        and not isinstance(part, Stateful)
        for part in _chain("", sampler).values()
    )


def samplers_in(loader: object) -> dict[str, object]:
    """Return the samplers of a loader, and what they sample from, by dotted name."""
    found: dict[str, object] = {}
    for name in ("batch_sampler", "sampler"):
        for path, sampler in _chain(name, getattr(loader, name, None)).items():
            if not any(sampler is other for other in found.values()):
                found[path] = sampler
    return found


def counters(samplers: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Return the plain numbers and words among the attributes of each sampler."""
    return {
        path: {
            name: value
            for name, value in vars(sampler).items()
            if isinstance(value, _PLAIN)
            # What a stateful sampler counts is in its state, but for the epoch it was told.
            and (name == "epoch" or not isinstance(sampler, Stateful))
        }
        for path, sampler in samplers.items()
        if hasattr(sampler, "__dict__")
    }


def samplers_state(
    loader: object, baseline: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    """Return what the samplers know about where they are.

    Args:
        loader: the loader.
        baseline: `counters` as they were when the loader was made. What has changed since was
            changed by sampling (or by `set_epoch`); what has not is a setting, which the user may
            want to be another one when resuming.
    """
    samplers = samplers_in(loader)
    changed = {
        path: {
            name: value
            for name, value in numbers.items()
            if name not in baseline.get(path, {}) or baseline[path][name] != value
        }
        for path, numbers in counters(samplers).items()
    }
    return {
        "states": copy.deepcopy(_states(samplers)),
        "counters": {path: numbers for path, numbers in changed.items() if numbers},
    }


def set_samplers(
    loader: object,
    state: Mapping[str, Any],
    baseline: Mapping[str, Mapping[str, object]],
    *,
    own_states: bool,
) -> None:
    """Put back what `samplers_state` returned; with `own_states`, by `load_state_dict`, too.

    What the state does not name was as when the loader was made, and becomes that again.
    """
    samplers = samplers_in(loader)
    for path, sampler in samplers.items():
        numbers = {**baseline.get(path, {}), **state["counters"].get(path, {})}
        for name, value in numbers.items():
            if vars(sampler).get(name) != value:
                setattr(sampler, name, value)
    if own_states:
        _load_states(samplers, state["states"])


def fingerprint(index: object) -> int | None:
    """Return a number that tells one draw from another, or None if it cannot be told."""
    text = repr(index)
    return None if " at 0x" in text else zlib.crc32(text.encode())


def _chain(name: str, sampler: Any) -> dict[str, object]:
    """Return a sampler and, by dotted name, what it samples from."""
    found: dict[str, object] = {}
    while sampler is not None and not isinstance(sampler, (list, range, tuple)):
        if any(sampler is other for other in found.values()):
            break
        found[name] = sampler
        name, sampler = (
            f"{name}.sampler",
            vars(sampler).get("sampler") if _has_dict(sampler) else None,
        )
    return found


def _has_dict(obj: object) -> bool:
    return hasattr(obj, "__dict__")


def _states(samplers: Mapping[str, object]) -> dict[str, object]:
    return {
        path: sampler.state_dict()
        for path, sampler in samplers.items()
        if isinstance(sampler, Stateful)
    }


def _load_states(samplers: Mapping[str, object], states: Mapping[str, Any]) -> None:
    for path, state in states.items():
        sampler = samplers.get(path)
        if isinstance(sampler, Stateful):
            sampler.load_state_dict(copy.deepcopy(state))


def _pack(name: str, state: Any) -> bytes:
    if name == "torch":
        return cast("bytes", state)
    if name == "python":
        gauss = state["gauss"]
        return cast("bytes", state["words"]) + struct.pack("<?d", gauss is not None, gauss or 0.0)
    if state["bit_generator"] != "MT19937":
        return b""
    twister = state["state"]
    return cast("bytes", twister["key"]["words"]) + struct.pack(
        "<iid", twister["pos"], state["has_gauss"], state["gauss"]
    )


def _unpack(name: str, data: bytes) -> object:
    if name == "torch":
        return data
    if name == "python":
        size = struct.calcsize("<?d")
        has_gauss, gauss = struct.unpack("<?d", data[-size:])
        return {"words": data[:-size], "gauss": gauss if has_gauss else None}
    size = struct.calcsize("<iid")
    pos, has_gauss, gauss = struct.unpack("<iid", data[-size:])
    key = {"dtype": "uint32", "words": data[:-size]}
    return {
        "bit_generator": "MT19937",
        "state": {"key": key, "pos": pos},
        "has_gauss": has_gauss,
        "gauss": gauss,
    }
