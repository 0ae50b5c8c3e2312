"""Averages of states and checkpoints."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_sbckpt.averaging import average_checkpoints, average_state_dicts
from lightning_sbckpt.errors import ConfigurationError, MismatchError, SBCheckpointError
from lightning_sbckpt.meta import Checkpoint


def write(folder, **states):
    """Write a checkpoint folder with these recoverables and return its record."""
    folder.mkdir()
    files = {}
    for name, state in states.items():
        files[name] = folder / f"{name}.ckpt"
        torch.save(state, files[name])
    return Checkpoint(folder, {}, files)


def weights(value, **more):
    return {"weight": torch.tensor([value]), **more}


@pytest.fixture
def three(tmp_path):
    """Three checkpoints whose model has the weights 1, 2 and 6."""
    return [
        write(tmp_path / f"CKPT+{v}", model=weights(v), head=weights(-v)) for v in (1.0, 2.0, 6.0)
    ]


def test_the_average_is_the_mean_of_each_tensor():
    """Every floating tensor is averaged by name."""
    average = average_state_dicts(weights(v, bias=torch.tensor(-v)) for v in (1.0, 2.0, 6.0))
    assert average == {"weight": torch.tensor([3.0]), "bias": torch.tensor(-3.0)}


def test_the_average_of_one_is_a_copy():
    """One state is its own average, in tensors of its own."""
    state = weights(1.0)
    average = average_state_dicts([state])
    assert torch.equal(average["weight"], state["weight"])
    assert average["weight"].data_ptr() != state["weight"].data_ptr()


def test_the_states_given_are_not_changed():
    """Neither the dictionaries nor their tensors change, the first one's included."""
    model = torch.nn.Linear(2, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = [model.state_dict(), {key: value + 1 for key, value in before.items()}]
    average_state_dicts(states)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert all(torch.equal(states[0][key], before[key]) for key in before)


@pytest.mark.parametrize(
    "value", [torch.tensor(20), torch.tensor([True, False]), torch.tensor(7, dtype=torch.uint8)]
)
def test_integers_and_booleans_are_those_of_the_first(value):
    """Counts, indices and masks have no mean: the first state's are taken, in their own type."""
    average = average_state_dicts([{"x": value}, {"x": torch.zeros_like(value)}])
    assert average["x"].dtype == value.dtype
    assert torch.equal(average["x"], value)


def test_batch_norm_gets_a_state_that_it_can_go_on_with():
    """The averaged state of real modules loads, with a whole number of batches."""
    models = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    for batches, model in zip((3, 2), models, strict=True):
        for _ in range(batches):
            model(torch.randn(4, 2))
    average = average_state_dicts(model.state_dict() for model in models)
    assert average["num_batches_tracked"].dtype == torch.int64
    merged = torch.nn.BatchNorm1d(2)
    merged.load_state_dict(average)
    assert merged.num_batches_tracked == 3
    means = torch.stack([model.running_mean for model in models])
    torch.testing.assert_close(merged.running_mean, means.mean(0))
    assert average._metadata == models[0].state_dict()._metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single_precision(dtype):
    """Sums of many half-precision numbers neither overflow nor lose small terms."""
    large = [{"x": torch.tensor(60000.0, dtype=dtype)}] * 4
    assert torch.equal(average_state_dicts(large)["x"], large[0]["x"])
    one, small = torch.tensor(1.0, dtype=dtype), torch.tensor(2.0**-12, dtype=dtype)
    average = average_state_dicts([{"x": one}] + [{"x": small}] * 4095)["x"]
    assert average.dtype == dtype
    expected = torch.tensor((1.0 + 4095 * 2.0**-12) / 4096, dtype=dtype)
    assert torch.equal(average, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float32])
def test_wide_types_are_averaged_in_their_own(dtype):
    """Double precision keeps its digits; complex numbers are averaged, too."""
    tiny = torch.tensor(1.0, dtype=dtype) + 2.0**-40
    average = average_state_dicts([{"x": tiny}, {"x": tiny}])["x"]
    assert average.dtype == dtype
    assert torch.equal(average, tiny)


def test_extra_state_is_that_of_the_first():
    """What a module keeps as extra state is anything: it is taken, not averaged."""
    first = {"net._extra_state": {"seen": 3}, "_extra_state": torch.tensor(1.0)}
    second = {"net._extra_state": None, "_extra_state": torch.tensor([2.0, 3.0])}
    assert average_state_dicts([first, second]) == first


def test_parameters_that_track_gradients_are_averaged_without_a_graph():
    """`named_parameters()` may be given as a state; the result is plain data."""
    states = [dict(torch.nn.Linear(1, 1).named_parameters()) for _ in range(2)]
    average = average_state_dicts(states)
    assert not any(value.requires_grad for value in average.values())


def test_every_difference_is_listed_at_once():
    """Missing and additional names, shapes and kinds of all states are in one message."""
    states = [
        {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1), "d": torch.zeros(1)},
        {"a": torch.zeros(2), "b": torch.zeros(3, 2), "d": torch.zeros(1, dtype=torch.int64)},
        {
            "a": torch.zeros(2),
            "b": torch.zeros(2, 3),
            "c": "text",
            "d": torch.zeros(1),
            "e": torch.zeros(1),
        },
    ]
    with pytest.raises(MismatchError) as caught:
        average_state_dicts(states)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:-1] == [
        "state dict 2: 'c' is missing",
        "state dict 2: 'b' has the shape (3, 2), (2, 3) in state dict 1",
        "state dict 2: 'd' is of type torch.int64, torch.float32 in state dict 1",
        "state dict 3: 'e' is not in state dict 1",
        "state dict 3: 'c' is of type str, expected a tensor",
    ]


def test_shapes_that_would_broadcast_are_refused():
    """Tensors that torch would add without complaint are still not the same parameter."""
    with pytest.raises(MismatchError, match=r"has the shape \(1,\), \(3,\) in state dict 1"):
        average_state_dicts([{"x": torch.zeros(3)}, {"x": torch.zeros(1)}])


def test_the_state_of_an_optimizer_is_refused():
    """Nested states have no average; the message says what was found."""
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(MismatchError, match="'param_groups' is of type list, expected a tensor"):
        average_state_dicts([optimizer.state_dict()])


@pytest.mark.parametrize(
    "average", [average_state_dicts, lambda n: average_checkpoints(n, "model")]
)
def test_nothing_to_average_is_an_error(average):
    """An empty selection is a mistake of its filter, and the error is also a ValueError."""
    with pytest.raises(ConfigurationError, match="Nothing to average") as caught:
        average(iter([]))
    assert isinstance(caught.value, ValueError)


class Tracked(dict):
    """A state that can be counted while it is alive."""


@pytest.fixture
def alive():
    """How many states are alive at the moment that a new one is made, at most."""
    states: weakref.WeakSet[Tracked] = weakref.WeakSet()

    class Hashable(Tracked):
        __hash__ = object.__hash__

    record = SimpleNamespace(most=0)

    def make(value):
        gc.collect()
        record.most = max(record.most, len(states))
        state = Hashable(weights(value))
        states.add(state)
        return state

    record.make = make
    return record


def test_no_state_is_kept_while_the_next_one_is_made(alive):
    """The running sum and one state are all that is in memory, even with many states."""
    average_state_dicts(alive.make(v) for v in (1.0, 2.0, 3.0, 4.0))
    assert alive.most == 0


def test_no_file_is_kept_while_the_next_one_is_loaded(alive, three):
    """Files are read one by one, each released before the next is opened."""
    average_checkpoints(three, "model", parameter_loader=lambda path: alive.make(1.0))
    assert alive.most == 0


def test_checkpoints_are_averaged_by_the_name_of_the_recoverable(three):
    """Each recoverable has its own average."""
    assert average_checkpoints(three, "model") == weights(3.0)
    assert average_checkpoints(three, "head") == weights(-3.0)


def test_checkpoints_come_from_any_iterable_as_records_or_folders(three):
    """A generator, a path, a string, a record of someone else's: all in one call."""
    theirs = SimpleNamespace(path=three[2].path, paramfiles=three[2].paramfiles)
    mixed = iter([three[0], str(three[1].path), theirs])
    assert average_checkpoints(mixed, "model") == weights(3.0)
    assert average_checkpoints([ckpt.path for ckpt in three], "model") == weights(3.0)


def test_a_real_speechbrain_gets_the_same_average(three, speechbrain):
    """The result is that of the original on the same checkpoints."""
    theirs = speechbrain.utils.checkpoints.average_checkpoints(three, "model")
    assert theirs == average_checkpoints(three, "model")


def test_a_missing_recoverable_is_reported_with_what_there_is(three, tmp_path):
    """Every checkpoint without it is listed, with the names it has; nothing is loaded."""
    odd = write(tmp_path / "CKPT+odd", net=weights(1.0), head=weights(1.0))
    empty = write(tmp_path / "CKPT+empty")
    with pytest.raises(MismatchError, match="Cannot average 'model'") as caught:
        average_checkpoints([three[0], odd, empty.path], "model", parameter_loader=pytest.fail)
    message = str(caught.value)
    assert f"{odd.path} has head, net" in message
    assert f"{empty.path} has no recoverables" in message
    assert str(three[0].path) not in message


def test_a_mismatch_between_checkpoints_names_their_files(three, tmp_path):
    """The message leads to the files that differ."""
    odd = write(tmp_path / "CKPT+odd", model=weights(1.0, bias=torch.zeros(1)))
    with pytest.raises(MismatchError) as caught:
        average_checkpoints([three[0], odd], "model")
    expected = f"{odd.paramfiles['model']}: 'bias' is not in {three[0].paramfiles['model']}"
    assert expected in str(caught.value)


def test_a_file_that_holds_no_state_dict_is_refused_by_name(tmp_path):
    """A list has no names to average by."""
    odd = write(tmp_path / "CKPT+odd", model=[1, 2])
    with pytest.raises(MismatchError, match=r"model\.ckpt: it holds a list, expected a state dict"):
        average_checkpoints([odd], "model")


@pytest.mark.parametrize(
    ("loader", "seen"),
    [
        (lambda path: weights(0.0, seen=str(path)[-10:]), "model.ckpt"),
        (lambda path, map_location=None: weights(0.0, seen=map_location), "cpu"),
        (lambda path, **options: weights(0.0, seen=options["map_location"]), "cpu"),
        # Of the user, with the defaults that older releases warn of.
        pytest.param(
            torch.load, None, marks=pytest.mark.filterwarnings("ignore:You are using `torch.load`")
        ),
    ],
)
def test_a_loader_is_called_the_way_it_can_be(loader, seen, three):
    """With `map_location="cpu"` if it takes that, and else with the path alone."""
    states = average_checkpoints(three[:1], "model", parameter_loader=loader, averager=list)
    assert states[0].get("seen") == seen


def test_an_averager_of_ones_own_gets_an_iterator_and_returns_what_it_likes(three):
    """As in SpeechBrain, the averager decides what an average is."""

    def spread(states):
        assert next(states) == weights(1.0)
        return [state["weight"].item() for state in states]

    assert average_checkpoints(three, "model", averager=spread) == [2.0, 6.0]


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed_by_default(tmp_path):
    """A file that holds more than tensors is refused before anything of it runs."""
    sprung = tmp_path / "sprung"
    ckpt = write(tmp_path / "CKPT+trap", model={"weight": Trap(sprung)})
    with pytest.raises(SBCheckpointError):
        average_checkpoints([ckpt], "model")
    assert not sprung.exists()
    with ckpt.paramfiles["model"].open("wb") as file:
        pickle.dump(Trap(sprung), file, protocol=2)
    with pytest.raises(SBCheckpointError):
        average_checkpoints([ckpt], "model")
    assert not sprung.exists()
