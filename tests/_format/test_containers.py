"""States come back as torch.save and torch.load give them: what is one object stays one."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.containers import containers_in, rebuild
from lightning_sbckpt._format.encode import save_state
from lightning_sbckpt._format.load import load_state


class Odd:
    """Something that only pickle can hold."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


def shape_of(root: object) -> list[object]:
    """Return what a value is made of, and which of its containers are the same."""
    numbers: dict[int, int] = {}
    form: list[object] = []
    waiting = [root]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple):
            if id(value) in numbers:
                form.append(("again", numbers[id(value)]))
                continue
            numbers[id(value)] = len(numbers)
            pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            form.append((kind, [key for key, _ in pairs]))
            waiting += [member for _, member in reversed(pairs)]
        elif isinstance(value, torch.Tensor):
            form.append((tuple(value.shape), value.tolist()))
        else:
            form.append((kind, value))
    return form


LEAVES = [
    lambda rng: rng.randrange(10**6),
    lambda rng: rng.random(),
    lambda _: 1j,
    lambda _: 2**70,
    lambda rng: Path(f"p{rng.randrange(9)}"),
    lambda rng: torch.full((2,), rng.randrange(9)),
    lambda _: None,
    lambda rng: Odd(rng.randrange(9)),
    lambda _: frozenset([1, (2, 3)]),
]


def random_state(seed: int, *, odd: bool) -> object:
    """Return containers that share containers, and lists and dictionaries that contain themselves."""
    rng = random.Random(seed)
    leaves = LEAVES if odd else [leaf for leaf in LEAVES if leaf is not LEAVES[7]]
    made: list[object] = []
    for _ in range(rng.randrange(2, 25)):
        members = [
            rng.choice(made) if made and rng.random() < 0.5 else rng.choice(leaves)(rng)
            for _ in range(rng.randrange(4))
        ]
        kind = rng.choice([dict, OrderedDict, list, tuple])
        if kind in (dict, OrderedDict):
            made.append(kind((f"k{n}", member) for n, member in enumerate(members)))
        else:
            made.append(kind(members))
    for container in made:
        if isinstance(container, list) and rng.random() < 0.3:
            container.append(rng.choice(made))
        if isinstance(container, dict) and rng.random() < 0.3:
            container["more"] = rng.choice(made)
    return {"all": made, "first": made[0], "last": made[-1]}


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "with what only pickle holds"])
def test_random_states_come_back_as_from_torch(tmp_path, odd):
    """Structure, types, values, and which containers are one, with cycles."""
    for seed in range(60):
        state = random_state(seed, odd=odd)
        torch.save(state, tmp_path / "torch.ckpt")
        expected = torch.load(tmp_path / "torch.ckpt", weights_only=False)
        save_state(state, tmp_path / "ours.ckpt")
        got = load_state(tmp_path / "ours.ckpt")
        assert shape_of(got) == shape_of(expected), seed
        (tmp_path / "ours+pickled.ckpt").unlink(missing_ok=True)


def test_shared_containers_cost_nothing(tmp_path):
    """A tuple of two that are the same, thirty times over, is thirty tuples, not a billion."""
    shared: object = (1,)
    for _ in range(30):
        shared = (shared, shared)
    started = time.perf_counter()
    copy = rebuild([shared, [shared]])
    assert copy[0] is copy[1][0] and copy[0][0] is copy[0][1]
    assert len(list(containers_in(copy))) == 33
    assert time.perf_counter() - started < 5


def test_depth_costs_nothing():
    """Ten thousand lists in each other, where Python's own recursion ends at a thousand."""
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    assert len(list(containers_in(rebuild(deep)))) == 10_001


def test_a_list_that_contains_itself_is_saved(tmp_path):
    """As torch.save takes it."""
    state = [1j]
    state.append((state, {"again": state}))
    save_state(state, tmp_path / "x.ckpt")
    got = load_state(tmp_path / "x.ckpt")
    assert got[1][0] is got and got[1][1]["again"] is got


def test_an_odd_thing_in_a_shared_tuple_is_everywhere(tmp_path):
    """The plain file has None in the tuple, wherever the tuple is."""
    pair = (Odd(1), 2)
    save_state({"a": pair, "b": [pair], "c": {"d": (pair, pair)}}, tmp_path / "x.ckpt")
    got = load_state(tmp_path / "x.ckpt")
    assert got["a"] == pair
    assert got["a"] is got["b"][0] is got["c"]["d"][0] is got["c"]["d"][1]


@pytest.mark.parametrize("extra", [{}, {"c": 1j}, {"c": Path("x")}, {"c": Odd(1)}], ids=range(4))
def test_one_list_stays_one_in_a_checkpoint(tmp_path, extra):
    """Whatever else the state holds, and for plain torch, too."""

    class Holds:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    twice = [1, 2]
    saver = Checkpointer(tmp_path, {"m": Holds({"a": twice, "b": twice, **extra})})
    file = saver.save_checkpoint().paramfiles["m"]
    plain = torch.load(file, weights_only=True)
    assert plain["a"] is plain["b"]
    reader = Checkpointer(tmp_path, {"m": Holds(None)})
    reader.recover_if_possible()
    got = reader.recoverables["m"].state
    assert got["a"] is got["b"]
