"""The states of all ranks as one: every rank gets its own back, and what is equal is there once."""

from __future__ import annotations

import io
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sbckpt._format.encode import save_state
from lightning_sbckpt._format.load import load_state
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin.state.per_rank import number_of_ranks, pack, stack_ranks, state_of_rank


def described(value):
    """Return a value as something that is equal only if types, shapes and bits are."""
    kind = type(value)
    if kind is torch.Tensor:
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return kind, value.dtype, tuple(value.shape), data
    if kind in (dict, OrderedDict):
        return kind, [(key, described(item)) for key, item in value.items()]
    if kind in (list, tuple):
        return kind, [described(item) for item in value]
    if kind is float:
        return kind, struct.pack("d", value)
    if kind is np.ndarray:
        return kind, value.dtype, value.shape, value.tobytes()
    return kind, value


def through_a_file(states):
    """Return each rank's state, packed, put together, written, read without pickle, and taken."""
    buffer = io.BytesIO()
    torch.save(stack_ranks([pack(state) for state in states]), buffer)
    buffer.seek(0)
    part = torch.load(buffer, weights_only=True)
    assert number_of_ranks(part) == len(states)
    return [state_of_rank(part, rank) for rank in range(len(states))]


def assert_all_come_back(states):
    for before, after in zip(states, through_a_file(states), strict=True):
        assert described(after) == described(before)


DTYPES = (torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.complex64)
SHAPES = ((), (0,), (3,), (2, 0, 2), (2, 3))
tensors = st.builds(
    lambda dtype, shape, fill: torch.full(shape, fill, dtype=dtype),
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.integers(0, 2),
)
leaves = (
    tensors
    | st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**127])
    | st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("nan")])
    | st.sampled_from(["", "a", "train"])
)
keys = st.sampled_from(["a", "b"]) | st.integers(0, 1)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=4))
def test_every_rank_gets_back_what_it_gave(states):
    """Whatever it is and however the ranks differ, down to the bits and the types of numbers."""
    assert_all_come_back(states)


@settings(max_examples=50, deadline=None)
@given(values, st.integers(2, 5))
def test_what_all_ranks_have_alike_is_kept_once(state, size):
    """One group, and nothing of a rank's own."""
    part = stack_ranks([pack(state) for _ in range(size)])
    (group,) = part["groups"]
    assert group["ranks"].tolist() == list(range(size))
    assert group["own"] == {}
    assert described(group["state"]) == described(state)


def random_state(rank):
    torch.manual_seed(rank)
    return {"words": torch.get_rng_state(), "seed": rank, "loss": rank / 3, "name": "train"}


def test_a_file_has_as_many_tensors_for_a_hundred_ranks_as_for_two():
    """Rank zero's work must not be an entry of a file for each rank."""

    def tensors_of(size):
        part = stack_ranks([pack(random_state(rank)) for rank in range(size)])
        (group,) = part["groups"]
        return {place: tuple(own.shape) for place, own in group["own"].items()}

    words = torch.get_rng_state().numel()
    for size in (2, 100):
        assert tensors_of(size) == {
            ("words",): (size, words),
            ("seed",): (size,),
            ("loss",): (size,),
        }
    assert_all_come_back([random_state(rank) for rank in range(100)])


def test_what_differs_in_one_rank_alone_is_still_its_own():
    """Not only the first two are looked at."""
    states = [{"words": torch.zeros(4, dtype=torch.uint8), "name": "a"} for _ in range(5)]
    states[3] = {"words": torch.tensor([0, 0, 0, 1], dtype=torch.uint8), "name": "b"}
    assert_all_come_back(states)


def test_tensors_of_another_length_and_ranks_without_anything_have_groups_of_their_own():
    """A metric that gathers values has as many as the rank has seen; gradients may be on some only."""
    states = [{"seen": [torch.arange(length)]} for length in (2, 3, 2)] + [None]
    part = stack_ranks([pack(state) for state in states])
    assert [group["ranks"].tolist() for group in part["groups"]] == [[0, 2], [1], [3]]
    assert_all_come_back(states)


def test_true_and_one_are_not_taken_for_the_same():
    """To python they are equal."""
    assert_all_come_back([{"flag": True}, {"flag": False}])
    assert_all_come_back([{"flag": True}, {"flag": 1}])
    assert_all_come_back([[True, 1, 1.0], [1, True, 1.0], [1.0, 1, True]])


def test_arrays_of_numpy_come_back_from_the_file_of_a_recoverable(tmp_path):
    """They go through the same file as any state with such things."""
    states = [{"order": np.arange(3) + rank, "big": 2**100 + rank} for rank in range(3)]
    save_state(stack_ranks([pack(state) for state in states]), tmp_path / "loaders.ckpt")
    part = load_state(tmp_path / "loaders.ckpt")
    for rank, state in enumerate(states):
        assert described(state_of_rank(part, rank)) == described(state)


def test_tensors_that_are_no_plain_ones_travel_whole():
    """A view, a transposed one, one with a gradient; and one that has no bytes in a row."""
    base = torch.arange(12.0).reshape(3, 4)
    for tensor in (base[:, 1:3], base.t(), base.clone().requires_grad_()[0]):
        (after,) = through_a_file([{"x": tensor}])
        assert torch.equal(after["x"], tensor) and not after["x"].requires_grad
    sparse = torch.eye(3).to_sparse()
    packed = [pack({"x": sparse * rank}) for rank in (1, 2)]
    for rank in range(2):
        found = state_of_rank(stack_ranks(packed), rank)["x"]
        assert torch.equal(found.to_dense(), torch.eye(3) * (rank + 1))


def test_a_tensor_in_several_places_travels_once_and_is_written_once():
    """A loader's state has its generators' states twice and more."""

    def state(rank):
        words = torch.full((10_000,), rank, dtype=torch.uint8)
        return {"created": words, "born": [words, torch.zeros(2)], "place": {"first": words}}

    assert len(pack(state(0)).data) == 10_000 + 8
    assert_all_come_back([state(rank) for rank in range(3)])
    buffer = io.BytesIO()
    torch.save(stack_ranks([pack(state(rank)) for rank in range(3)]), buffer)
    assert 30_000 < len(buffer.getvalue()) < 35_000


def test_the_attribute_of_a_state_dict_stays_on_it():
    """A module's state_dict carries the versions of its layers there."""
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert state._metadata
    found = state_of_rank(stack_ranks([pack({"own": state})]), 0)
    assert found["own"]._metadata == state._metadata


def test_what_is_packed_does_not_change_when_training_goes_on():
    """The file may be written later."""
    tensor = torch.zeros(3)
    packed = [pack({"x": tensor}), pack({"x": tensor + 1})]
    tensor.add_(5)
    assert state_of_rank(stack_ranks(packed), 0)["x"].tolist() == [0, 0, 0]


def test_a_list_of_states_is_read_as_it_was_written_before():
    """By a single process, and by the first release."""
    part = {"ranks": [{"seed": 1}, None]}
    assert number_of_ranks(part) == 2
    assert state_of_rank(part, 0) == {"seed": 1} and state_of_rank(part, 1) is None


def test_a_rank_that_is_not_there_is_named():
    """A file that was changed by somebody does not end in an error of an index."""
    part = stack_ranks([pack({"seed": 1}), pack({"seed": 2})])
    part["groups"][0]["ranks"] = torch.tensor([0, 7])
    with pytest.raises(MismatchError, match="states of 2 ranks has none of rank 1"):
        state_of_rank(part, 1)
