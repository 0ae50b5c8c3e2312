"""Random generators are captured as plain values and put back exactly."""

# The legacy global state of numpy is what is tested.
# ruff: noqa: NPY002

from __future__ import annotations

import io
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.rng import capture as rng
from lightning_sbckpt.rng import (
    capture_rng,
    generator_state,
    generators_in,
    install_generator,
    isolated_rng,
    restore_rng,
    set_generator_state,
)
from lightning_sbckpt.rng import streams as _streams
from lightning_sbckpt.rng.streams import set_streams, streams


def through_a_file(state):
    """Return what a tensors-only reader makes of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DRAWS = {
    "python": random.random,
    # Both keep the second of two normal deviates in reserve.
    "python's normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy's normal": np.random.randn,
    "torch": lambda: torch.rand(()).item(),
    "torch's normal": lambda: torch.randn(()).item(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
@pytest.mark.parametrize("before", [0, 1, 700], ids=lambda n: f"after {n} draws")
def test_every_stream_goes_on_from_where_it_was_captured(draw, before):
    """The next draws after a restore are those that came after the capture."""
    for _ in range(before):
        draw()
    state = through_a_file(capture_rng())
    expected = [draw() for _ in range(5)]
    draw()

    assert restore_rng(state) == []
    assert [draw() for _ in range(5)] == expected


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_capturing_draws_nothing(draw):
    """A run with captures in between draws what a run without them does."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = [draw() for _ in range(4)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    drawn = []
    for _ in range(4):
        capture_rng()
        drawn.append(draw())
    assert drawn == expected


def test_a_normal_deviate_in_reserve_is_part_of_the_state():
    """Two states of numpy with the same words differ by the reserve, and both come back."""
    np.random.seed(3)
    np.random.randn()
    with_reserve = capture_rng()
    np.random.randn()
    without = capture_rng()
    expected = np.random.randn()

    restore_rng(with_reserve)
    np.random.randn()
    assert np.random.randn() == expected
    restore_rng(without)
    assert np.random.randn() == expected


def test_the_fast_ways_to_the_words_tell_what_the_slow_ones_do(monkeypatch):
    """Reading the generators where they lie gives what python and numpy say."""
    random.gauss(0, 1)
    np.random.randn()
    fast = streams()
    assert _streams._python_memory.address and _streams._numpy_memory.address
    monkeypatch.setattr(_streams._python_memory, "address", 0)
    monkeypatch.setattr(_streams._numpy_memory, "address", 0)
    assert streams() == fast


def test_another_bit_generator_under_numpy_is_captured_too():
    """Numpy's global generator may be replaced; the one there is is captured."""
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        np.random.randn()
        state = through_a_file(capture_rng())
        expected = np.random.randn(3).tolist()
        restore_rng(state)
        assert np.random.randn(3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.long
def test_numpy_is_left_alone_when_nothing_has_imported_it():
    """Capturing imports nothing, and says nothing about numpy then."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from lightning_sbckpt.rng import capture_rng, restore_rng\n"
        "del sys.modules['numpy']\n"
        "state = capture_rng(); assert restore_rng(state) == []\n"
        "print('numpy' in state, state['versions']['numpy'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False not imported", done.stderr


def test_what_cannot_be_restored_is_told_and_the_rest_is_restored(monkeypatch):
    """A state from a machine with other devices is restored as far as it goes."""
    state = capture_rng()
    expected = random.random()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    state["torch"] = torch.zeros(3, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    problems = restore_rng(state)

    assert random.random() == expected
    assert len(problems) == 2
    assert "torch's random state could not be restored" in problems[0]
    assert f"saved with python {sys.version.split()[0]}" in problems[0]
    assert "2 CUDA devices were saved and 0 are here" in problems[1]


def test_numpy_that_is_gone_is_told(monkeypatch):
    """A state with numpy's, where there is no numpy, is restored without it."""
    state = capture_rng()
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setattr(rng, "importable", lambda name: False)
    assert restore_rng(state) == [
        "numpy's random state was saved, but numpy is not installed here."
    ]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"weight": 1}, r"a dict with the keys \['weight'\]"),
        ([1], "a list"),
        ({"format": 99, "python": 0, "torch": 0}, "they have format 99 and this version reads"),
    ],
)
def test_what_is_no_random_state_is_refused(state, found):
    """The message says what was found and what was expected."""
    before = streams()
    with pytest.raises(MismatchError, match=found):
        restore_rng(state)
    assert streams() == before


def test_nothing_drawn_in_isolation_is_seen_outside():
    """Not even when the block fails."""
    random.gauss(0, 1)
    np.random.randn()
    before = streams()
    with pytest.raises(ZeroDivisionError), isolated_rng():
        random.seed(1)
        np.random.randn(5)
        torch.rand(3)
        assert 1 / 0
    assert streams() == before


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(4),
    "random": lambda: random.Random(4),
    "numpy PCG64": lambda: np.random.default_rng(4),
    "numpy MT19937": lambda: np.random.Generator(np.random.MT19937(4)),
    "numpy Philox": lambda: np.random.Generator(np.random.Philox(4)),
    "numpy SFC64": lambda: np.random.Generator(np.random.SFC64(4)),
    "numpy RandomState": lambda: np.random.RandomState(4),
}


def draw_from(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn((), generator=generator).item()
    if isinstance(generator, random.Random):
        return generator.gauss(0, 1)
    return generator.standard_normal()


@pytest.mark.parametrize("make", GENERATORS.values(), ids=list(GENERATORS))
def test_a_generator_of_any_kind_goes_on_in_another_one(make):
    """Into one that is there, and into one that is yet to be made."""
    generator = make()
    draw_from(generator)
    state = through_a_file(generator_state(generator))
    expected = [draw_from(generator) for _ in range(3)]

    there, to_be_made = make(), SimpleNamespace(rng=None)
    set_generator_state(there, state)
    assert [draw_from(there) for _ in range(3)] == expected
    assert install_generator(to_be_made, "rng", state)
    assert [draw_from(to_be_made.rng) for _ in range(3)] == expected


def test_a_state_of_another_kind_of_generator_is_refused():
    """Both kinds are named; `install_generator` says no instead."""
    state = generator_state(random.Random(0))
    with pytest.raises(MismatchError, match=r"state of a torch\.Generator.*that of a random\.Rand"):
        set_generator_state(torch.Generator(), state)
    assert not install_generator(SimpleNamespace(rng=torch.Generator()), "rng", state)
    assert not install_generator(SimpleNamespace(), "a.rng", state)
    assert not install_generator(SimpleNamespace(rng="mine"), "rng", state)


def test_generators_are_found_where_samplers_datasets_and_transforms_keep_them():
    """In attributes, lists and dictionaries; once each; never in what can't hold a state."""
    shared = torch.Generator()
    transform = SimpleNamespace(rng=np.random.default_rng(1), system=random.SystemRandom())
    loader = SimpleNamespace(
        generator=shared,
        sampler=SimpleNamespace(generator=shared, inner={"random": random.Random(0)}),
        dataset=SimpleNamespace(
            transforms=[transform, transform],
            files=["name"] * 100_000,
            model=torch.nn.Linear(2, 2),
            state=np.random.RandomState(0),
        ),
    )
    loader.itself = loader
    assert list(generators_in(loader)) == [
        "generator",
        "dataset.state",
        "sampler.inner.random",
        "dataset.transforms.0.rng",
    ]


def test_the_streams_say_which_one_was_drawn_from():
    """They compare, and one alone can be put back."""
    before = streams()
    np.random.rand()
    after = streams()
    assert [name for name in before if before[name] != after[name]] == ["numpy"]
    set_streams({"numpy": before["numpy"]})
    assert streams() == before


def numpy_state(kind):
    generator = np.random.Generator(getattr(np.random, kind)(0))
    return generator, generator_state(generator)


@pytest.mark.parametrize("position", [-(2**30), -1, 625, 2**29, 2**60, "x", None])
def test_position_outside_of_the_words_is_refused(position):
    """Numpy does not look, and the next number drawn would be from anywhere in memory, or kill the process."""
    before = np.random.get_state()[2]
    state = capture_rng()
    state["numpy"]["state"]["pos"] = position
    (problem,) = restore_rng(state)
    assert "numpy's random state could not be restored" in problem
    assert np.random.get_state()[2] == before
    generator, state = numpy_state("MT19937")
    state["state"]["state"]["pos"] = position
    with pytest.raises(MismatchError, match="cannot set the state"):
        set_generator_state(generator, state)
    generator, state = numpy_state("Philox")
    state["state"]["buffer_pos"] = position
    with pytest.raises(MismatchError, match="cannot set the state"):
        set_generator_state(generator, state)


@pytest.mark.parametrize(
    "state",
    [
        ["MT19937", torch.zeros(624, dtype=torch.uint8), 2**29],
        {"bit_generator": "MT19937", "state": 5},
        {"bit_generator": "MT19937", "state": {"key": [1, 2], "pos": 1}},
        {"bit_generator": ["MT19937"]},
        5,
    ],
)
def test_state_of_another_shape_is_refused(state):
    """As a hostile file may hold it."""
    captured = {**capture_rng(), "numpy": state}
    assert "could not be restored" in restore_rng(captured)[0]
    for generator in (np.random.RandomState(0), np.random.Generator(np.random.PCG64(0))):
        saved = {**generator_state(generator), "state": state}
        with pytest.raises(MismatchError, match="cannot set the state"):
            set_generator_state(generator, saved)


@pytest.mark.parametrize("name", ["test", "seed", "Generator", "BitGenerator", "PCG65"])
def test_nothing_but_a_bit_generator_is_made_by_name(name):
    """The name stands in the file: numpy.random.test would run numpy's tests, seed would seed it."""
    dataset = SimpleNamespace(rng=None)
    state = {"kind": "numpy.random.Generator", "state": {"bit_generator": name}}
    before = np.random.get_state()[1].tolist()
    assert install_generator(dataset, "rng", state) is False
    assert np.random.get_state()[1].tolist() == before
    assert dataset.rng is None
