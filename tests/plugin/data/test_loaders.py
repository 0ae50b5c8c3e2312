"""A loader taken up again gives the batches, and leaves the random states, of one that never stopped.

Lightning's own fetcher and `CombinedLoader` fetch the batches here, as in a fit, and "training"
draws random numbers between them. Each cell of the tables runs once to the end; then it is stopped
at some places, each time going on in loaders made anew under other random states, from a state
that went through a file read with `weights_only=True`.
"""

# The legacy global state of numpy is part of what is tested.
# ruff: noqa: NPY002

from __future__ import annotations

import gc
import io
import itertools
import pickle
import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _loaders import (
    BATCH,
    BETWEEN,
    MID,
    PERSISTENT,
    WORKERS,
    Plain,
    Run,
    Stop,
    Stream,
    Wrapped,
    cells,
    plain,
    seed_all,
    stopped,
    through_a_file,
    values,
    whole,
)
from _processes import context as processes
from _releases import needs_torch, since, version_of
from augmented_dataset import SAMPLES, Augmented, KnowsItsWorker
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_sbckpt.errors import ConfigurationError, MismatchError
from lightning_sbckpt.plugin.data import handle, position, sampling
from lightning_sbckpt.plugin.data import workers as _loader_workers
from lightning_sbckpt.plugin.data.tracker import LoaderTracker, TrackedLoader
from lightning_sbckpt.rng import capture_rng, restore_rng
from lightning_sbckpt.rng.streams import streams

# -- datasets ----------------------------------------------------------------------------------


class OwnGenerators(Plain):
    """Has generators of its own, one of them made at the first sample."""

    def __init__(self):
        super().__init__()
        self.numpy = np.random.default_rng(5)
        self.transforms = [SimpleNamespace(generator=torch.Generator().manual_seed(1))]
        self.late = None

    def __getitem__(self, index):
        if self.late is None:
            info = get_worker_info()
            self.late = random.Random(0 if info is None else info.id)
        drawn = torch.rand((), generator=self.transforms[0].generator).item()
        return torch.tensor([index, self.numpy.random(), drawn, self.late.random()])


class SizedStream(Stream):
    def __len__(self):
        return SAMPLES


class LegacyNormals(Stream):
    """Draws numpy's legacy normals, which keep one in reserve."""

    def sample(self, number):
        return torch.tensor([number, np.random.randn()])


class StatefulStream(IterableDataset):
    """Knows its own position, and augments with the global streams."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        numbers = list(range(first, SAMPLES, step))
        while self.position < len(numbers):
            self.position += 1
            yield torch.tensor([numbers[self.position - 1], torch.rand(()).item()])
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class StatefulDataset(Augmented):
    def __init__(self):
        self.served = 0

    def __getitem__(self, index):
        self.served += 1
        return torch.cat([super().__getitem__(index), torch.tensor([self.served])])

    def state_dict(self):
        return {"served": self.served}

    def load_state_dict(self, state):
        self.served = state["served"]


# -- samplers and loaders of users -------------------------------------------------------------


class EagerSampler:
    """Draws its permutation when it is asked for an iterator, not at the first index."""

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter(torch.randperm(SAMPLES).tolist())


class DrawsEveryIndex(EagerSampler):
    """Draws at every index, and what comes depends on all draws before."""

    def __iter__(self):
        left = list(range(SAMPLES))
        while left:
            yield left.pop(random.randrange(len(left)))


class CountsEpochs(EagerSampler):
    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        yield from torch.randperm(SAMPLES, generator=generator).tolist()


class PositionSampler(EagerSampler):
    """Its state is a position within the order of an epoch; it begins at the position it has."""

    def __init__(self):
        self.epoch = 0
        self.position = 0

    def __iter__(self):
        if self.position >= SAMPLES:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        for index in order[self.position :].tolist():
            self.position += 1
            yield index

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class GeneratorStateSampler(EagerSampler):
    """Its state is that of a generator which `vars` does not show."""

    __slots__ = ("generator",)

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        yield from torch.randperm(SAMPLES, generator=self.generator).tolist()

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


class UnsizedBatches:
    """A batch sampler without a length."""

    def __iter__(self):
        order = torch.randperm(SAMPLES).tolist()
        for first in range(0, SAMPLES, BATCH):
            yield order[first : first + BATCH]


class Batches:
    """A loader that is nothing but iterable, and draws for every batch."""

    def __iter__(self):
        for number in range(8):
            yield torch.tensor([number, np.random.rand()])


class StatefulBatches:
    """A loader of the user's that carries its own state."""

    def __init__(self):
        self.position = 0

    def __len__(self):
        return 8

    def __iter__(self):
        self.position = self.position % 8
        while self.position < 8:
            self.position += 1
            yield torch.tensor([self.position, torch.rand(()).item()])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Doubling(DataLoader):
    """A DataLoader whose iteration the user has changed."""

    def __iter__(self):
        for batch in super().__iter__():
            yield 2 * batch


def seeds_worker(worker: int) -> None:
    """Seed a worker as users do."""
    random.seed(get_worker_info().seed + 1)


def seeded(number: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(number)


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": plain(),
    "shuffle": plain(shuffle=True),
    "shuffle, seeded generator": plain(shuffle=True, generator=seeded),
    "generators of the dataset": plain(OwnGenerators, shuffle=True),
    "random with replacement": plain(sampler=lambda: RandomSampler(Plain(), replacement=True)),
    "random, more samples than the dataset": plain(
        sampler=lambda: RandomSampler(Plain(), num_samples=40, generator=seeded())
    ),
    "subset": plain(sampler=lambda: SubsetRandomSampler(range(4, 20))),
    "weighted": plain(sampler=lambda: WeightedRandomSampler(range(1, 23), 20)),
    "batch sampler": plain(batch_sampler=lambda: BatchSampler(RandomSampler(Plain()), 4, True)),
    "no batches": plain(shuffle=True, batch_size=None),
    "batch sampler without length": plain(batch_sampler=UnsizedBatches),
    "eager sampler": plain(sampler=EagerSampler),
    "sampler that draws every index": plain(sampler=DrawsEveryIndex),
    "sampler that counts epochs": plain(sampler=CountsEpochs),
    "sampler with a position": plain(sampler=PositionSampler),
    "sampler with a generator's state": plain(sampler=GeneratorStateSampler),
    "stateful distributed sampler": plain(
        sampler=lambda: StatefulDistributedSampler(Plain(), num_replicas=1, rank=0)
    ),
    "iterable": plain(Stream),
    "iterable with length": plain(SizedStream),
    "iterable with legacy normals": plain(LegacyNormals),
    "list": lambda: [torch.tensor([n]) for n in range(8)],
    "any iterable": Batches,
    "iteration changed": plain(shuffle=True, kind=Doubling),
    "own state": StatefulBatches,
    "torchdata": plain(shuffle=True, kind=StatefulDataLoader),
    "torchdata, seeded generator": plain(shuffle=True, generator=seeded, kind=StatefulDataLoader),
    "torchdata, weighted": plain(
        sampler=lambda: WeightedRandomSampler(range(1, 23), 20), kind=StatefulDataLoader
    ),
    "torchdata, eager sampler": plain(sampler=EagerSampler, kind=StatefulDataLoader),
    "torchdata, stateful dataset": plain(StatefulDataset, shuffle=True, kind=StatefulDataLoader),
    "torchdata, iterable": plain(Stream, kind=StatefulDataLoader),
    "torchdata, stateful iterable": plain(StatefulStream, kind=StatefulDataLoader),
    "torchdata, stateful iterable of odd batches": plain(
        StatefulStream, kind=StatefulDataLoader, collate_fn=Wrapped
    ),
    "cycle of two": lambda: CombinedLoader(
        [plain(shuffle=True)(), DataLoader(Augmented(), batch_size=8, shuffle=True)],
        "max_size_cycle",
    ),
    "cycle of two without length": lambda: CombinedLoader(
        {"long": plain(Stream)(), "short": DataLoader(Augmented(), batch_size=8, shuffle=True)},
        "max_size_cycle",
    ),
    "max size of two": lambda: CombinedLoader(
        [plain(shuffle=True)(), DataLoader(Augmented(), batch_size=8, shuffle=True)], "max_size"
    ),
    "min size of two": lambda: CombinedLoader(
        [plain(shuffle=True)(), DataLoader(Augmented(), batch_size=2, shuffle=True)], "min_size"
    ),
}

WORKER_LOADERS: dict[str, Callable[[], Any]] = {
    "workers": plain(KnowsItsWorker, shuffle=True, **WORKERS),
    "three workers, one batch ahead": plain(shuffle=True, num_workers=3, prefetch_factor=1),
    "workers, seeded generator": plain(shuffle=True, generator=seeded, **WORKERS),
    "workers, generators of the dataset": plain(OwnGenerators, shuffle=True, **WORKERS),
    "workers, seeded by the user": plain(worker_init_fn=seeds_worker, **WORKERS),
    "workers, no batches": plain(shuffle=True, batch_size=None, **WORKERS),
    "workers, eager sampler": plain(sampler=EagerSampler, **WORKERS),
    "workers, sampler that draws every index": plain(sampler=DrawsEveryIndex, **WORKERS),
    "workers, sampler with a position": plain(sampler=PositionSampler, **WORKERS),
    "workers, batch sampler without length": plain(batch_sampler=UnsizedBatches, **WORKERS),
    "workers, iterable": plain(Stream, **WORKERS),
    "persistent": plain(KnowsItsWorker, shuffle=True, **PERSISTENT),
    "persistent, seeded generator": plain(shuffle=True, generator=seeded, **PERSISTENT),
    "persistent, generators of the dataset": plain(OwnGenerators, shuffle=True, **PERSISTENT),
    "persistent, eager sampler": plain(sampler=EagerSampler, **PERSISTENT),
    "persistent, sampler that draws every index": plain(sampler=DrawsEveryIndex, **PERSISTENT),
    "persistent, iterable": plain(Stream, **PERSISTENT),
    "persistent, iterable with length": plain(SizedStream, **PERSISTENT),
    "torchdata, workers": plain(shuffle=True, kind=StatefulDataLoader, **WORKERS),
    "torchdata, persistent": plain(shuffle=True, kind=StatefulDataLoader, **PERSISTENT),
    "torchdata, workers, rare snapshots": plain(
        StatefulDataset, kind=StatefulDataLoader, snapshot_every_n_steps=3, **WORKERS
    ),
    "torchdata, workers, iterable": plain(Stream, kind=StatefulDataLoader, **WORKERS),
    "torchdata, workers, stateful iterable": plain(
        StatefulStream, kind=StatefulDataLoader, **WORKERS
    ),
}


@pytest.fixture(autouse=True)
def _new_torchdata(request):
    """Leave out what `StatefulDataLoader` itself does not give back in earlier releases."""
    if "torchdata" in request.node.name and not since(version_of("torchdata"), "0.10"):
        pytest.skip("torchdata before 0.10 does not give back the position of a sampler")


# -- the run -----------------------------------------------------------------------------------


@pytest.mark.sample(52)
@pytest.mark.parametrize(("make", "stops"), cells(LOADERS))
def test_a_loader_without_workers_goes_on_bit_for_bit(make, stops):
    """All batches after three stops, and all random numbers, are those of a run never stopped."""
    expected = whole(make, None)
    assert stopped(make, stops, None)[0] == expected


@pytest.mark.sample(1)
@pytest.mark.parametrize(("make", "stops"), cells(WORKER_LOADERS))
def test_a_loader_with_workers_goes_on_bit_for_bit(make, stops):
    """So with workers, whose random streams live and die in their processes."""
    expected = whole(make, None)
    assert stopped(make, stops, None)[0] == expected


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "make",
    [LOADERS["shuffle"], WORKER_LOADERS["workers"], WORKER_LOADERS["persistent"]],
    ids=["plain", "workers", "persistent"],
)
@pytest.mark.parametrize("stops", [MID, BETWEEN], ids=["mid-epoch", "between epochs"])
def test_an_epoch_that_ends_early_goes_on_bit_for_bit(make, stops):
    """With `limit_train_batches`, persistent workers have begun batches nobody takes."""
    assert stopped(make, stops, 5)[0] == whole(make, 5)


@pytest.mark.parametrize(
    "make",
    [
        LOADERS["shuffle, seeded generator"],
        LOADERS["sampler that draws every index"],
        LOADERS["iterable"],
        LOADERS["torchdata, stateful iterable"],
        WORKER_LOADERS["persistent"],
        WORKER_LOADERS["persistent, iterable"],
        WORKER_LOADERS["torchdata, workers, stateful iterable"],
    ],
)
def test_tracking_alone_changes_nothing(make, monkeypatch):
    """Batches and random numbers are those of a run whose loaders are not tracked."""
    tracked = whole(make, None)
    monkeypatch.setattr(LoaderTracker, "track", lambda self, loader: loader)
    assert whole(make, None) == tracked


# -- the claims above can fail -----------------------------------------------------------------


def no_op(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


MECHANISMS = {
    "random states when the iterator is made": (
        (handle.LoaderHandle, "set_moment", no_op),
        LOADERS["shuffle"],
        MID,
    ),
    "random states at the first batch": (
        (handle.LoaderHandle, "_note_first", no_op),
        LOADERS["shuffle"],
        MID,
    ),
    "generators": (
        (handle.LoaderHandle, "set_generators", lambda *a: []),
        LOADERS["generators of the dataset"],
        BETWEEN,
    ),
    "draws at every index": (
        (sampling.DrawLog, "apply", no_op),
        LOADERS["sampler that draws every index"],
        MID,
    ),
    "counters of samplers": (
        (sampling, "counters", lambda samplers: {}),
        LOADERS["sampler that counts epochs"],
        BETWEEN,
    ),
    "states of samplers": (
        (sampling, "_load_states", no_op),
        LOADERS["sampler with a position"],
        BETWEEN,
    ),
    "going on from the state of a sampler": (
        (position.LoaderPosition, "_check_order", lambda *a: False),
        LOADERS["stateful distributed sampler"],
        MID,
    ),
    "random states of workers": (
        (position, "_worker_states", lambda states: {}),
        WORKER_LOADERS["workers"],
        MID,
    ),
    "the turn of the workers": ((position, "turn_to", no_op), WORKER_LOADERS["workers"], MID),
    "two questions to the sampler": (
        (position, "draw_seed", no_op),
        WORKER_LOADERS["workers, eager sampler"],
        MID,
    ),
    "batches that nobody took": (
        (_loader_workers._Tagging, "_note_state", no_op),
        WORKER_LOADERS["persistent"],
        (Stop(1, 1),),
    ),
    "the beginning of an epoch in a worker": (
        (_loader_workers.WatchedIterable, "__iter__", lambda self: iter(self.watched)),
        WORKER_LOADERS["persistent, iterable"],
        MID,
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("mechanism", "make", "stops"), MECHANISMS.values(), ids=list(MECHANISMS))
def test_each_mechanism_is_needed(mechanism, make, stops, monkeypatch):
    """With any one of them switched off, a run that was stopped does not go on as it would have."""
    expected = whole(make, limit := 5 if mechanism[1] == "_note_state" else None)
    monkeypatch.setattr(*mechanism, raising=False)
    try:
        went_on, _ = stopped(make, stops, limit)
    except (RuntimeError, AssertionError, StopIteration):
        return
    assert went_on != expected


# -- other worlds ------------------------------------------------------------------------------


def one_batch_at_a_time(saved: Any, connection: Any, context: str | None) -> None:
    """Go on in a process of its own, where nothing is as it was."""
    seed_all(77)
    run = Run(plain(KnowsItsWorker, multiprocessing_context=context, **PERSISTENT), None, saved)
    connection.send(list(run))
    run.close()


@pytest.mark.sample(1)
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_go_on_in_a_new_process_whatever_their_start_method(context):
    """What is sent to the workers survives pickling, and nothing is taken from the old process."""
    make = plain(KnowsItsWorker, **PERSISTENT)
    expected = whole(make, None)
    seed_all(1)
    run = Run(make, None)
    for stop, _ in run:
        if stop == Stop(1, 3):
            break
    saved = run.saved(Stop(1, 3))
    run.close()

    here, there = processes.Pipe()
    child = processes.Process(target=one_batch_at_a_time, args=(saved, there, context))
    child.start()
    assert here.poll(120), "the child gave nothing"
    went_on = here.recv()
    child.join()
    assert went_on == expected[-len(went_on) :]
    assert len(went_on) == 5 + 1 + 8 + 1


class Pinnable:
    is_pinned = False

    def pin_memory(self):
        self.is_pinned = True
        return self


def test_a_tagged_batch_is_pinned_as_the_batch_would_be():
    """The pinning thread of torch pins what the worker collated and keeps the tag."""
    from torch.utils.data._utils.pin_memory import pin_memory

    tagged = pin_memory(_loader_workers.TaggedBatch([Pinnable()], 1, {"torch": b"1"}, None))
    assert isinstance(tagged, _loader_workers.TaggedBatch)
    assert tagged.batch[0].is_pinned and tagged.state == {"torch": b"1"}


def go_on(before: Any, after: Any, batches: int = 3) -> tuple[list[str], list[Any]]:
    """Take up one loader where another was; return the report and the next batches of both."""
    seed_all(1)
    tracker = LoaderTracker(lambda: "train")
    iterator = iter(tracker.track(before))
    for _ in range(batches):
        next(iterator)
    state = through_a_file(tracker.state())
    expected = values(next(iterator))
    seed_all(2)
    tracker = LoaderTracker(lambda: "train")
    tracker.load(state)
    loader = tracker.track(after)
    tracker.release(True)
    found = [values(batch) for batch in itertools.islice(iter(loader), 1)]
    return tracker.report(), [expected, *found]


def test_the_order_is_kept_when_the_number_of_workers_changes():
    """What was lost is the workers' random states, and the report says why."""
    report, (expected, found) = go_on(
        plain(Plain, shuffle=True)(), plain(Plain, shuffle=True, **WORKERS)()
    )
    assert found == expected
    (changed,) = report
    assert "the number of its workers was 0 and is 2, so the run goes on, but not bit" in changed


def test_changes_of_a_loader_are_reported():
    """Another batch size and another dataset are named, with both values."""
    report, _ = go_on(plain(Plain)(), plain(lambda: Plain(7), batch_size=2)())
    assert [sentence.partition(",")[0] for sentence in report] == [
        "train loader 0 (DataLoader): its length was 8 and is 4",
        "train loader 0 (DataLoader): its batch size was 3 and is 2",
        "train loader 0 (DataLoader): the length of its dataset was 22 and is 7",
    ]
    assert all("not bit for bit" in sentence for sentence in report)


def test_a_loader_that_is_too_short_now_is_reported():
    """Of an epoch that had given more batches than there are one is left, which it ends with."""
    report, batches = go_on(plain(Plain)(), plain(lambda: Plain(5))())
    assert len(batches) == 2
    assert "train loader 0 (DataLoader): its length was 8 and is 2" in report[0]


class Unseeded(EagerSampler):
    def __iter__(self):
        return iter(random.SystemRandom().sample(range(SAMPLES), SAMPLES))


def test_a_sampler_seeded_from_nowhere_is_found_out():
    """Its indices are drawn again and compared; nothing but the report can be done."""
    report, _ = go_on(plain(Plain, sampler=Unseeded)(), plain(Plain, sampler=Unseeded)())
    assert "its BatchSampler gave other indices than before" in report[0]
    assert "seed it, or give it state_dict and load_state_dict" in report[0]


def test_another_number_of_loaders_is_reported():
    """What is there is positioned in order; the report tells both numbers."""
    tracker = LoaderTracker(lambda: "train")
    for _ in range(2):
        tracker.track(plain(Plain)())
    state = tracker.state()
    tracker = LoaderTracker(lambda: "train")
    tracker.load(state)
    tracker.track(plain(Plain)())
    tracker.release(True)
    assert tracker.report() == ["2 train loaders were saved and 1 are here."]


def test_no_sample_is_loaded_to_skip_by_index():
    """A long way into an epoch costs no more than its indices."""

    class Counting(Plain):
        loaded = 0

        def __getitem__(self, index):
            type(self).loaded += 1
            return index

    seed_all(1)
    tracker = LoaderTracker(lambda: "train")
    iterator = iter(tracker.track(DataLoader(Counting(50_000), batch_size=10, shuffle=True)))
    for _ in range(4_000):
        next(iterator)
    state = tracker.state()
    expected, before = next(iterator).tolist(), Counting.loaded
    tracker = LoaderTracker(lambda: "train")
    tracker.load(state)
    loader = tracker.track(DataLoader(Counting(50_000), batch_size=10, shuffle=True))
    tracker.release(True)
    assert next(iter(loader)).tolist() == expected
    assert Counting.loaded == before + 10


def test_a_state_is_small_whatever_the_place():
    """It holds random states and counts, neither samples nor indices."""
    tracker = LoaderTracker(lambda: "train")
    iterator = iter(tracker.track(DataLoader(Plain(100_000), batch_size=10, shuffle=True)))
    for _ in range(3_000):
        next(iterator)
    file = io.BytesIO()
    torch.save(tracker.state(), file)
    assert file.tell() < 60_000


def test_what_cannot_be_exact_is_told_before_anything_breaks():
    """Each sentence names the loader and what to change."""
    tracker = LoaderTracker(lambda: "train")
    tracker.track(iter([1, 2]))
    sampler = EagerSampler()
    sampler.rng = random.SystemRandom()
    tracker.track(plain(Plain, sampler=lambda: sampler)())
    warnings = tracker.warnings()
    assert [warning.partition(":")[0] for warning in warnings] == [
        "train loader 0 (list_iterator)",
        "train loader 1 (DataLoader)",
    ]
    assert "a resume loads all batches since the run began again" in warnings[0]
    assert "random.SystemRandom" in warnings[1]


@needs_torch("2.6", "DataLoader(in_order=False)")
def test_batches_in_no_order_are_told_before_anything_breaks():
    """The sentence names the loader and what to change."""
    tracker = LoaderTracker(lambda: "train")
    tracker.track(plain(Plain, in_order=False, **WORKERS)())
    (warning,) = tracker.warnings()
    assert warning.startswith("train loader 0 (DataLoader): ")
    assert "use in_order=True" in warning


def test_more_draws_than_are_kept_are_told(monkeypatch):
    """Before anything breaks, and after a resume that can't be exact."""
    monkeypatch.setattr(sampling, "MOST_RECORDS", 2)
    seed_all(1)
    tracker = LoaderTracker(lambda: "train")
    iterator = iter(tracker.track(plain(Stream)()))
    for _ in range(5):
        next(iterator)
        random.random()
    assert "give the dataset a generator of its own" in tracker.warnings()[0]
    state = tracker.state()
    tracker = LoaderTracker(lambda: "train")
    tracker.load(state)
    loader = tracker.track(plain(Stream)())
    tracker.release(True)
    iter(loader)
    assert "more often than is kept" in tracker.report()[0]


# -- the proxy and the tracker -----------------------------------------------------------------


def tracked(loader: Any, stage: str = "train") -> Any:
    return LoaderTracker(lambda: stage).track(loader)


def test_a_tracked_loader_is_the_loader_to_all_who_look():
    """Class, attributes, length, equality, representation and copies by pickle."""
    loader = plain(shuffle=True)()
    proxy = tracked(loader)
    assert type(proxy) is TrackedLoader
    assert isinstance(proxy, DataLoader) and proxy.__class__ is DataLoader
    assert proxy.batch_size == BATCH and len(proxy) == 8 and bool(proxy)
    assert vars(proxy) is vars(loader)
    assert proxy == loader and hash(proxy) == hash(loader) and repr(proxy) == repr(loader)
    proxy.worker_init_fn = seeds_worker
    assert loader.worker_init_fn is seeds_worker
    assert type(pickle.loads(pickle.dumps(tracked(plain(Plain)())))) is DataLoader
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = proxy.nothing


def test_a_loader_without_length_has_none_when_tracked():
    """`len` raises TypeError, from which Lightning concludes that it is not known."""
    with pytest.raises(TypeError):
        len(tracked(plain(Stream)()))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_tracked_loader_looks_stateful_only_if_it_is(kind):
    """Lightning's own files keep what they had, and load into loaders that expect it."""
    assert isinstance(tracked(plain(kind=kind)()), _Stateful) == (kind is StatefulDataLoader)


def test_lightning_does_not_load_a_state_over_ours():
    """Its own loader state is of rank zero and of another moment; without ours, it is loaded."""
    state = {"position": 5}
    loader = tracked(StatefulBatches())
    loader.load_state_dict(state)
    assert loader.position == 5

    tracker = LoaderTracker(lambda: "train")
    saved = tracker.track(StatefulBatches()) and tracker.state()
    tracker = LoaderTracker(lambda: "train")
    tracker.load(saved)
    loader = tracker.track(StatefulBatches())
    loader.load_state_dict(state)
    assert loader.position == 0


def test_asking_a_loader_for_its_state_starts_nothing():
    """A StatefulDataLoader makes an iterator to answer, and draws its seed for that."""
    loader = tracked(plain(shuffle=True, kind=StatefulDataLoader)())
    before = streams()
    assert loader.state_dict() == {}
    assert loader._iterator is None and streams() == before


def test_the_loader_is_as_the_user_made_it_at_any_time():
    """What is put into it while its iterator is made is gone right after."""
    loader = plain(sampler=EagerSampler, worker_init_fn=seeds_worker, **PERSISTENT)()
    before = {k: v for k, v in vars(loader).items() if k != "_iterator"}
    iterator = iter(tracked(loader))
    assert {k: v for k, v in vars(loader).items() if k != "_iterator"} == before
    assert torch.is_tensor(next(iter(loader))), "who iterates the loader itself finds no tags"
    del iterator


def test_workers_end_when_lightning_ends_them():
    """The tracker holds no iterator longer than Lightning does."""
    proxy = tracked(plain(**WORKERS)())
    iterator = iter(proxy)
    next(iterator)
    workers = list(iterator.inner._workers)
    proxy._iterator = None
    del iterator
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("make", [plain(**WORKERS), plain(batch_sampler=UnsizedBatches, **WORKERS)])
def test_workers_end_with_the_last_reference(make, monkeypatch):
    """Without waiting for the garbage collector, which would make their end slow."""
    # Torch waits so long for one that doesn't end by itself: longer than a busy machine takes.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 120.0)
    gc.disable()
    try:
        loader = tracked(make())
        iterator = iter(loader)
        next(iterator)
        workers = list(iterator.inner._workers)
        begun = time.monotonic()
        del iterator, loader
        assert not any(worker.is_alive() for worker in workers)
        assert time.monotonic() - begun < 60
    finally:
        gc.enable()


def test_a_held_loader_gives_nothing_and_touches_nothing():
    """Neither the loader nor any random state, however often it is iterated."""
    tracker = LoaderTracker(lambda: "train")
    tracker.load(LoaderTracker(lambda: "train").state())
    loader = tracker.track(plain(shuffle=True, generator=seeded)())
    before, generator = streams(), loader.generator.get_state()
    assert list(loader) == [] and list(loader) == []
    assert streams() == before and torch.equal(loader.generator.get_state(), generator)
    tracker.release(False)
    assert len(list(loader)) == 8


class Strategy:
    def process_dataloader(self, dataloader):
        return dataloader


def test_attaching_changes_one_strategy_until_it_is_detached():
    """Loaders of the stages that matter are tracked, the others and other strategies are not."""
    stage = "train"
    tracker, strategy, other = LoaderTracker(lambda: stage), Strategy(), Strategy()
    tracker.attach(strategy)
    tracker.attach(strategy)
    loader = plain()()
    assert type(strategy.process_dataloader(loader)) is TrackedLoader
    assert other.process_dataloader(loader) is loader
    stage = "test"
    assert strategy.process_dataloader(loader) is loader
    tracker.detach()
    assert "process_dataloader" not in vars(strategy)


def test_detaching_gives_back_what_another_had_put_there():
    """A wrapper that was on the instance before is there again."""
    strategy, tracker = Strategy(), LoaderTracker(lambda: "train")
    strategy.process_dataloader = former = list
    tracker.attach(strategy)
    assert type(strategy.process_dataloader((1, 2))) is TrackedLoader
    tracker.detach()
    assert strategy.process_dataloader is former


def test_loaders_that_are_made_again_take_the_place_of_the_former_ones():
    """A group is complete once one of it has been iterated; of another stage, it stays."""
    stage = "validate"
    tracker = LoaderTracker(lambda: stage)
    iter(tracker.track(plain()()))
    stage = "train"
    for _ in range(2):
        for _ in range(2):
            proxy = tracker.track(plain()())
        iter(proxy)
    state = tracker.state()
    assert len(state["train"]) == 2 and len(state["validate"]) == 1


def test_loaders_that_are_made_again_keep_their_workers():
    """A persistent loader returned anew each epoch goes on, and so does its resumed self."""
    make = WORKER_LOADERS["persistent"]

    def epochs(saved: Any) -> Iterator[tuple[int, Any, LoaderTracker]]:
        loader, tracker = make(), LoaderTracker(lambda: "train")
        if saved is not None:
            tracker.load(saved)
        for epoch in range(3):
            proxy = tracker.track(loader)
            if saved is not None and epoch == 0:
                tracker.release(False)
            yield epoch, [values(batch) for batch in proxy], tracker
        tracker.detach()

    seed_all(1)
    run = epochs(None)
    next(run)
    _, _, tracker = next(run)
    saved = through_a_file({"loaders": tracker.state(), "rng": capture_rng()})
    expected = next(run)[1]
    restore_rng(saved["rng"])
    assert next(epochs(saved["loaders"]))[1] == expected


def test_validation_between_two_saves_goes_on_too():
    """A shuffled, persistent validation loader is, after a resume, where it would have been."""

    def validations(saved: Any, first: int) -> Iterator[tuple[Any, LoaderTracker]]:
        tracker = LoaderTracker(lambda: "validate")
        if saved is not None:
            tracker.load(saved)
        loader = tracker.track(plain(shuffle=True, generator=seeded, **PERSISTENT)())
        if saved is not None:
            tracker.release(True)
        for _ in range(first, 3):
            yield [values(batch) for batch in loader], tracker
        tracker.detach()

    seed_all(1)
    run = validations(None, 0)
    next(run)
    _, tracker = next(run)
    saved = through_a_file(tracker.state())
    expected = next(run)[0]
    seed_all(9)
    assert next(validations(saved, 2))[0] == expected


@pytest.mark.parametrize(
    ("state", "found"),
    [({"format": 9}, "found format 9"), ({}, "found format None"), (3, "an? int")],
)
def test_what_is_no_position_is_refused(state, found):
    """The message says what was found and what was expected."""
    with pytest.raises(MismatchError, match=f"position of the data.*{found}"):
        LoaderTracker(lambda: "train").load(state)


def test_more_than_one_prefetched_batch_is_refused():
    """Only one batch back is known."""
    with pytest.raises(ConfigurationError, match="0 or 1 prefetched batches, not for 2"):
        LoaderTracker(lambda: "train").state(prefetched=2)
