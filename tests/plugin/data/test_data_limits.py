"""Where the search through data, and the comparison of its values, have limits: exact on both sides, or said.

The harness is that of `test_loaders.py`.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from multiprocessing import Value
from typing import NamedTuple

import numpy as np
import pytest
import torch
from augmented_dataset import SAMPLES
from test_loaders import PERSISTENT, WORKERS, Stop, plain, stopped, whole
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_sbckpt.plugin.data import objects
from lightning_sbckpt.plugin.data.objects import Baseline, DataState
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.data.values import Mark, kept, put
from lightning_sbckpt.rng import walk
from lightning_sbckpt.rng.walk import Walk

STOPS = (Stop(0, 3), Stop(1, None))


class Part:
    """Counts what it gives."""

    def __init__(self):
        self.count = 0

    def give(self):
        self.count += 1
        return self.count


class Offers(Part):
    """Offers its count as a state, from where no attribute shows it."""

    def __init__(self):
        self._hidden = Part()

    def give(self):
        return self._hidden.give()

    def state_dict(self):
        return {"count": self._hidden.count}

    def load_state_dict(self, state):
        self._hidden.count = state["count"]


class Slots:
    """Counts in a slot."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    give = Part.give


class Draws(Part):
    """Draws from a generator of its own."""

    def __init__(self):
        self.rng = random.Random(3)

    def give(self):
        return self.rng.random()


class Lists(Part):
    """Counts in a list."""

    def __init__(self):
        self.counts = [0]

    def give(self):
        self.counts[0] += 1
        return self.counts[0]


class Deep(Part):
    """Has its part a number of containers down."""

    def __init__(self):
        part = Part()
        self.parts = [part]
        for _ in range(20):
            self.parts = [self.parts]
        self.give = part.give


class Record:
    """Has no method that changes it."""

    def __init__(self):
        self.seen = 0


class MapStyle(Dataset):
    """Asks a part for each of its samples."""

    def __init__(self, kind, number):
        self.parts = [kind() for _ in range(number)]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([float(index), float(self.parts[index * 7 % len(self.parts)].give())])


class Stream(MapStyle, IterableDataset):
    """The same as an iterable."""

    __len__ = None

    def __iter__(self):
        yield from map(self.__getitem__, range(SAMPLES))


KINDS = (Part, Offers, Slots, Draws, Lists, Deep)


class Mixed(MapStyle):
    """Has parts of all kinds."""

    def __init__(self, number):
        self.parts = [KINDS[n % len(KINDS)]() for n in range(number)]


class MixedStream(Stream):
    """The same as an iterable."""

    def __init__(self):
        self.parts = Mixed(101).parts


LOADERS = {
    "as many as are entered at once": plain(lambda: Mixed(64), shuffle=True),
    "one more": plain(lambda: Mixed(65), shuffle=True),
    "a thousand": plain(lambda: MapStyle(Part, 1001), shuffle=True),
    "in workers": plain(lambda: Mixed(101), **PERSISTENT),
    "of a stream in workers": plain(MixedStream, **WORKERS),
    "of a stream in workers that persist": plain(MixedStream, **PERSISTENT),
}


@pytest.mark.parametrize("name", LOADERS)
def test_parts_in_a_list_go_on_however_long_it_is(name):
    """Counters, states and generators alike, in attributes, slots and far below."""
    make = LOADERS[name]
    assert stopped(make, STOPS, None)[0] == whole(make, None)


def warnings_of(dataset, **options):
    tracker = LoaderTracker(lambda: "train")
    tracker.track(DataLoader(dataset, **options))
    return tracker.warnings()


def test_records_in_a_long_list_are_watched_at_some_places():
    """Those of which none can change by itself; a change of one is said once, with their number."""
    dataset = MapStyle(Record, 1001)
    assert warnings_of(dataset) == []
    data = DataState({"dataset": dataset}, Baseline())
    for record in dataset.parts:
        record.seen += 1
    assert "changed" not in data.take()
    (told,) = data.untold
    assert told == "dataset.parts, of whose 1,001 objects not each is followed: seen"


def test_records_in_a_list_of_a_thousand_are_kept():
    """Up to there each is followed."""
    data = DataState({"dataset": MapStyle(Record, 1000)}, Baseline())
    data._root["dataset"].parts[999].seen = 3
    assert data.take()["changed"] == {("dataset.parts.999", "seen"): 3}


@pytest.mark.parametrize(("most", "told"), [(200, False), (100, True)])
def test_more_objects_than_are_entered_are_said_at_the_first_fit(most, told, monkeypatch):
    """If they may change by themselves."""
    monkeypatch.setattr(walk, "MOST_OBJECTS", most)
    found = warnings_of(MapStyle(Part, 110))
    assert any("not all of them were searched" in each for each in found) is told


@pytest.mark.parametrize("deep", [7, 8])
def test_a_long_list_that_is_too_deep_to_look_into_is_said(deep):
    """Its items are looked into eight levels down."""
    item = 1
    for _ in range(deep):
        item = (item,)
    assert Walk(()).through({"items": [item] * 65}).is_whole is (deep == 7)


# -- values ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A plain record."""

    first: int
    second: int


class Words(list):
    """A list of the user's, which gives something else when it is iterated."""

    def __iter__(self):
        return iter(())


@dataclass
class Table:
    """Holds a value of any kind."""

    value: object


def grown(kind):
    def change(value):
        value[3] = value.get(3, 0) + 1

    return lambda: kind(dict.fromkeys(range(100), 0)), change


def at(index, change=1):
    def write(value):
        value[index] = value[index] + change

    return write


def in_a_dictionary(value):
    value["a"][1]["n"] += 1


FIELDS = np.dtype([("count", "i4"), ("name", "U3")])
IN_PLACE = {
    "an item of a long list": (lambda: list(range(5000)), at(1234)),
    "an item of a list of lists": (
        lambda: [[[0]] for _ in range(500)],
        lambda v: v[77][0].append(1),
    ),
    "a dictionary in a list": (lambda: [{"n": 0} for _ in range(3)], lambda v: v[1].update(n=1)),
    "a list in a dictionary": (lambda: {"a": [0, {"n": 0}]}, in_a_dictionary),
    "a count of a long dictionary": grown(dict),
    "a counter": grown(Counter),
    "an ordered dictionary": grown(OrderedDict),
    "a dictionary with a default": grown(lambda items: defaultdict(int, items)),
    "a set": (lambda: {1, 2}, lambda v: v.add(3)),
    "a deque": (lambda: deque(range(100), 100), lambda v: v.append(7)),
    "a deque inside": (lambda: deque(range(100)), at(50)),
    "a list of a class of its own": (lambda: Words([1, 2]), lambda v: v.append(3)),
    "an element of a large array": (lambda: np.zeros(2**19), at(123_457)),
    "an element of a large tensor": (lambda: torch.zeros(2**20), at(123_457)),
    "words in an array": (lambda: np.array([f"{n}.png" for n in range(99)]), lambda v: v.sort()),
    "an array of records": (lambda: np.zeros(3, FIELDS), lambda v: v["count"].__iadd__(1)),
    "bytes": (lambda: bytearray(9), at(3)),
    "a number that processes share": (lambda: Value("i", 3), lambda v: setattr(v, "value", 4)),
}
REPLACED = {
    "a number of numpy's": (np.int64(3), np.int64(4)),
    "a date of numpy's": (np.datetime64("2026-11-22"), np.datetime64("2026-11-23")),
    "a named tuple": (Pair(1, 2), Pair(3, 4)),
    "a frozen set": (frozenset({1}), frozenset({1, 2})),
    "a deque": (None, deque([1, 2], 3)),
    "bytes": (b"ab", b"abc"),
}


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool((a == b).all())
    if hasattr(a, "get_obj"):
        return a.value == b.value
    is_deque = isinstance(a, deque)
    plainly = list.copy(a) == list.copy(b) if isinstance(a, list) else a == b
    return type(a) is type(b) and plainly and (not is_deque or a.maxlen == b.maxlen)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_value_that_changes_in_place_is_kept_and_put_back_in_place(name):
    """Wherever in it the change is."""
    make, change = IN_PLACE[name]
    table = Table(make())
    data = DataState({"dataset": table}, Baseline())
    change(table.value)
    state = data.take()
    other = Table(make())
    there = other.value
    assert DataState({"dataset": other}, Baseline()).set(state) == []
    assert other.value is there
    assert same(other.value, table.value)


@pytest.mark.parametrize("name", REPLACED)
def test_a_value_that_is_replaced_is_kept(name):
    """As the same kind."""
    before, after = REPLACED[name]
    table = Table(before)
    data = DataState({"dataset": table}, Baseline())
    table.value = after
    other = Table(before)
    assert DataState({"dataset": other}, Baseline()).set(data.take()) == []
    assert same(other.value, after)


class Frame:
    """A table of another library's."""

    __module__ = "pandas.core.frame"


UNKEPT = {
    "a table": (Frame(), lambda holder: setattr(holder, "value", Frame())),
    "objects in an array": (np.array([{}, {}], object), lambda h: h.value.__setitem__(0, {"a": 1})),
    "too many numbers": (list(range(200_001)), lambda h: at(7)(h.value)),
    "too large an array": (np.zeros(2**21 + 1), lambda h: at(7)(h.value)),
    "too many counts": (dict.fromkeys(range(200_001), 0), lambda h: at(7)(h.value)),
    "objects of a dictionary": ({"a": object()}, lambda h: h.value.update(a=object())),
    "a parameter": (torch.nn.Parameter(torch.zeros(2)), lambda h: h.value.detach().add_(1)),
}


@pytest.mark.parametrize("name", UNKEPT)
def test_a_value_that_cannot_be_kept_is_named_when_it_changes(name):
    """By its owner and its name."""
    value, change = UNKEPT[name]
    table = Table(value)
    data = DataState({"dataset": table}, Baseline())
    data.take()
    assert not data.untold
    change(table)
    assert "changed" not in data.take()
    assert list(data.untold) == ["dataset: value"]


@pytest.mark.parametrize(("number", "is_kept"), [(200_000, True), (200_001, False)])
def test_so_many_items_are_kept(number, is_kept):
    """The limit itself."""
    assert isinstance(kept([0] * number), dict) is is_kept


@pytest.mark.parametrize(("size", "is_kept"), [(2**24, True), (2**24 + 1, False)])
def test_so_many_bytes_are_kept(size, is_kept):
    """The limit itself, of arrays and tensors."""
    for value in (np.zeros(size, "u1"), torch.zeros(size, dtype=torch.uint8)):
        assert isinstance(kept(value), (dict, torch.Tensor)) is is_kept


def test_what_takes_long_is_compared_ever_more_rarely_until_it_changes():
    """When it is seen late, that is said, since the saves before lack it."""
    table = Table(list(range(300_000)))
    data = DataState({"dataset": table}, Baseline())
    for _ in range(5):
        data.take()
    table.value[7] = -1
    data.take()
    data.take()
    assert not data.untold
    data.take()
    assert list(data.untold) == ["dataset: value, until now,", "dataset: value"]


def test_a_worker_of_many_objects_compares_their_lists_rarely_until_they_change():
    """After that, each time."""
    dataset = MapStyle(Lists, 101)
    data = DataState({"dataset": dataset}, Baseline(), in_worker=True)
    dataset.parts[3].give()
    assert data.take()["changed"] == {("dataset.parts.3", "counts"): {"list": [1]}}
    for _ in range(6):
        dataset.parts[3].give()
        state = data.take()
    assert state["changed"] == {("dataset.parts.3", "counts"): {"list": [7]}}
    assert not data.untold


def test_an_object_that_is_replaced_goes_on_as_the_new_one():
    """A transform that gets stronger each epoch, say; what differs is given to the one there."""
    holder = Table(Part())
    data = DataState({"dataset": holder}, Baseline())
    holder.value = Part()
    holder.value.count = 5
    data.look()
    other = Table(Part())
    assert DataState({"dataset": other}, Baseline()).set(data.take()) == []
    assert other.value.count == 5


def test_an_object_that_is_not_there_yet_is_named():
    """It can't be given what it counted."""
    dataset = MapStyle(Part, 0)
    dataset.late = None
    data = DataState({"dataset": dataset}, Baseline())
    dataset.late = Part()
    data.look()
    data.take()
    dataset.late.give()
    other = MapStyle(Part, 0)
    other.late = None
    (problem,) = DataState({"dataset": other}, Baseline()).set(data.take())
    assert problem == "its 'dataset.late' is not there yet, and can't be given its 'count'"


def test_what_a_worker_cannot_be_given_back_is_said():
    """It tells with its first batch."""
    tracker = LoaderTracker(lambda: "train")
    dataset = MapStyle(Part, 1)
    dataset.late = None
    loader = tracker.track(DataLoader(dataset, num_workers=1))
    iterator = iter(loader)
    next(iterator)
    state = tracker.state()
    changed = state["train"][0]["iteration"]["workers"][0]["data"][0]["changed"]
    changed["dataset.late", "count"] = 3
    del iterator
    other = LoaderTracker(lambda: "train")
    dataset = MapStyle(Part, 1)
    loader = other.track(DataLoader(dataset, num_workers=1))
    other.load(state)
    other.release(mid_epoch=True)
    next(iter(loader))
    assert any("'dataset.late' is not there yet" in each for each in other.news())


def test_a_shared_list_stays_shared():
    """What two objects hold is put back in place."""
    shared = [1, 2, 3]
    holder = Table(shared)
    put(holder, "value", kept([3, 2, 1]))
    assert shared == [3, 2, 1]


def test_marks_don_not_ask_a_class_of_the_users():
    """Its `__iter__` may draw random numbers."""
    assert Mark.of(Words([1])).differs(Words([2]))


def test_many_objects_are_looked_at_again_at_each_doubling(monkeypatch):
    """A generator that is made late is found."""
    monkeypatch.setattr(objects, "_MANY_OBJECTS", 1)
    dataset = MapStyle(Part, 3)
    data = DataState({"dataset": dataset}, Baseline())
    for _ in range(5):
        data.look_again()
    dataset.late = random.Random(1)
    data.look_again()
    assert not data.generators()
    data.look_again()
    data.look_again()
    assert list(data.generators()) == ["dataset.late"]
