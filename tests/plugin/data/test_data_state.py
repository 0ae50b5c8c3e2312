"""Data that keeps a state goes on bit for bit: counters, orders, streams that don't begin anew.

The harness is that of `test_loaders.py`: each cell runs once to the end, then it is stopped at some
places and goes on in loaders made anew.
"""

# The legacy global state of numpy is part of what is tested.
# ruff: noqa: NPY002

from __future__ import annotations

import functools
import itertools
import random
from collections import deque

import numpy as np
import pytest
import torch
from _loaders import (
    BATCH,
    PERSISTENT,
    WORKERS,
    Plain,
    Stop,
    Stream,
    cells,
    plain,
    stopped,
    whole,
)
from augmented_dataset import SAMPLES
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

CUT = (Stop(0, 3), Stop(0, None), Stop(1, 2), Stop(1, None), Stop(2, 1))


def numbers():
    info = get_worker_info()
    first, step = (0, 1) if info is None else (info.id, info.num_workers)
    return range(first, SAMPLES, step)


# -- iterable datasets -------------------------------------------------------------------------


class CountsEpochs(IterableDataset):
    """Shuffled by its own count of epochs, which begins as an attribute of the class."""

    epoch = 0

    def __iter__(self):
        order = torch.randperm(len(numbers()), generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        for index in order.tolist():
            yield torch.tensor([numbers()[index], self.epoch])


class CountsAfterwards(IterableDataset):
    """Counts an epoch when it is over."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        for number in numbers():
            yield torch.tensor([number, self.epoch, torch.rand(()).item()])
        self.epoch += 1


class Offers:
    """Offers what it counts as a state."""

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


class OffersItsCount(Offers, CountsEpochs):
    pass


class OffersItsCountAfterwards(Offers, CountsAfterwards):
    pass


class GoesOn(IterableDataset):
    """Begins where the last iteration stopped, if that was before the end."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        if self.position >= SAMPLES:
            self.position = 0
        while self.position < SAMPLES:
            self.position += 1
            yield torch.tensor([self.position, random.random()])


class BeginsAnewByItself(IterableDataset):
    """As Hugging Face's: its state is a place, and an iteration begins there only if it is given one."""

    def __init__(self):
        self._state = {"index": 0}
        self._starting = None

    def __iter__(self):
        first, self._state = self._starting["index"] if self._starting else 0, {"index": 0}
        for index in range(first, len(numbers())):
            self._state["index"] = index + 1
            yield torch.tensor([numbers()[index], torch.rand(()).item()])

    def state_dict(self):
        return dict(self._state)

    def load_state_dict(self, state):
        self._starting = state


class HoldsAStream(IterableDataset):
    """Holds a generator that draws, and takes a number of samples from it for each epoch."""

    def __init__(self):
        self.source = self.samples()

    def samples(self):
        for number in itertools.count():
            yield torch.tensor([number, np.random.rand(), torch.rand(()).item()])

    def __iter__(self):
        yield from itertools.islice(self.source, SAMPLES)


class MakesAStreamLate(HoldsAStream):
    """Makes its generator when it is first asked."""

    def __init__(self):
        self.source = None

    def __iter__(self):
        if self.source is None:
            self.source = self.samples()
        return super().__iter__()


class HoldsALoader(IterableDataset):
    """Goes round and round a loader of its own."""

    def __init__(self):
        self.loader = DataLoader(Plain(10), shuffle=True)
        self.iterator = iter(self.loader)

    def __iter__(self):
        for _ in range(SAMPLES):
            try:
                yield next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.loader)
                yield next(self.iterator)


class ShufflesItself(IterableDataset):
    """Shuffles what it holds in place, each epoch on from the order of the last."""

    def __init__(self):
        self.array = np.arange(SAMPLES)
        self.tensor = torch.arange(SAMPLES)
        self.list = [(number, str(number)) for number in range(SAMPLES)]
        self.recent = deque(maxlen=3)
        self.weights = {"a": 0.0}

    def __iter__(self):
        generator = np.random.default_rng(len(self.recent))
        generator.shuffle(self.array)
        self.tensor[:] = self.tensor[torch.from_numpy(generator.permutation(SAMPLES))]
        random.Random(int(self.array[0])).shuffle(self.list)
        self.recent.append(int(self.array[0]))
        self.weights["a"] += 0.5
        for index in range(SAMPLES):
            yield torch.tensor(
                [
                    self.array[index],
                    self.tensor[index],
                    self.list[index][0],
                    sum(self.recent),
                    self.weights["a"],
                ]
            )


# -- loaders of users --------------------------------------------------------------------------


class Slice:
    """As gluonts': a number of batches, for each epoch, of one endless stream."""

    def __init__(self, iterable, length):
        self.iterable, self.length = iterable, length

    def __iter__(self):
        yield from itertools.islice(self.iterable, self.length)


def cyclic():
    data = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    for batch in itertools.cycle(data):
        yield batch + random.random()


class CountingLoader:
    """A loader whose state is the number of its epochs."""

    def __init__(self):
        self.hidden = {"epoch": 0}

    def __len__(self):
        return 8

    def __iter__(self):
        self.hidden["epoch"] += 1
        generator = torch.Generator().manual_seed(self.hidden["epoch"])
        for index in torch.randperm(8, generator=generator).tolist():
            yield torch.tensor([index, torch.rand(()).item()])

    def state_dict(self):
        return dict(self.hidden)

    def load_state_dict(self, state):
        self.hidden = dict(state)


class RestartsAtTheEnd:
    """As `torchdata.nodes.Loader`: given the state of after its last batch, it begins an epoch anew."""

    def __init__(self):
        self.epoch = self.position = 0
        self.was_given = False

    def __iter__(self):
        if not self.was_given or self.position == 8:
            self.epoch, self.position = self.epoch + 1, 0
        self.was_given = False
        order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < 8:
            self.position += 1
            yield torch.tensor([order[self.position - 1], torch.rand(()).item()])

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
        self.was_given = True


class Streaming(DataLoader):
    """As litData's: draws its seed with the first batch, and forgets a given place at its end only."""

    def __init__(self):
        self.current_epoch = self.done = self._latest_worker_idx = 0
        self.restore = False
        super().__init__(GivenByLoader(), BATCH)

    def __iter__(self):
        if not self.restore:
            self.current_epoch, self.done = self.current_epoch + 1, 0
        self.dataset.epoch, self.dataset.first = self.current_epoch, self.done * BATCH
        for batch in super().__iter__():
            self.done += 1
            yield batch
        self.restore = False

    def state_dict(self):
        return {"epoch": self.current_epoch, "done": self.done}

    def load_state_dict(self, state):
        self.current_epoch, self.done = state["epoch"], state["done"]
        self.restore = True


class GivenByLoader(IterableDataset):
    epoch = first = 0

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        for index in order.tolist()[self.first :]:
            yield torch.tensor([index, torch.rand(()).item()])


# -- map-style datasets, transforms, collate functions ----------------------------------------


class Counts(Dataset):
    """Gets harder with each sample that it has served."""

    def __init__(self):
        self.served = 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.served += 1
        return torch.tensor([index, self.served])


class OffersWhatItServed(Counts):
    def __init__(self):
        self._hidden = [0]

    def __getitem__(self, index):
        self._hidden[0] += 1
        return torch.tensor([index, self._hidden[0]])

    def state_dict(self):
        return {"served": self._hidden[0]}

    def load_state_dict(self, state):
        self._hidden[0] = state["served"]


class Collate:
    """Counts batches, and draws from a generator of its own."""

    def __init__(self):
        self.rng = np.random.RandomState(3)
        self.count = 0

    def __call__(self, samples):
        self.count += 1
        return torch.stack([torch.as_tensor(s) + self.rng.rand() + self.count for s in samples])


class Nested:
    def __init__(self, depth):
        self.inner = Nested(depth - 1) if depth else random.Random(5)

    def draw(self):
        return self.inner.draw() if isinstance(self.inner, Nested) else self.inner.random()


class Slots:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = np.random.default_rng(6)


def drawing(generator):
    def draw():
        return 2 * generator.random()

    return draw


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(8)

    def forward(self):
        return torch.rand((), generator=self.generator).item()


def draw_from(rng, _scale):
    return rng.random()


shared = np.random.default_rng(9)
SHARED = [Nested(0)]


def draw_shared():
    return shared.random() + SHARED[0].draw()


class DrawsEverywhere(Counts):
    """Draws from generators wherever one may hide."""

    of_class = random.Random(10)

    def __init__(self):
        type(self).of_class.seed(10)
        SHARED[0].inner.seed(14)
        shared.bit_generator.state = np.random.default_rng(9).bit_generator.state
        self.nested = Nested(8)
        self.slots = Slots()
        self.closure = drawing(random.Random(7))
        self.partial = functools.partial(draw_from, random.Random(11), 1)
        self.method = Nested(1).draw
        self.builtin = random.Random(13).random
        self.many = [Nested(0) for _ in range(100)]
        self.module = torch.nn.Sequential(Module())
        self.deque = deque([{"rng": random.Random(12)}])

    def __getitem__(self, index):
        drawn = [
            self.nested.draw(),
            self.slots.rng.random(),
            self.closure(),
            self.partial(),
            self.method(),
            self.builtin(),
            self.many[index].draw(),
            self.module[0](),
            self.deque[0]["rng"].random(),
            self.of_class.random(),
            draw_shared(),
        ]
        return torch.tensor([index, *drawn])


# -- batch samplers ----------------------------------------------------------------------------


class Buckets:
    """Batches of varying length, drawn anew for each epoch from those of the last."""

    def __init__(self):
        self.batches = [[index] for index in range(SAMPLES)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        order = [index for batch in self.batches for index in batch]
        random.shuffle(order)
        self.batches = []
        while order:
            size = random.randint(1, 5)
            self.batches.append(order[:size])
            order = order[size:]
        return iter(self.batches)


class ShufflesBatches:
    """Shuffles its batches in place when an epoch begins."""

    def __init__(self):
        self.batches = [list(range(n, min(n + 1 + n % 4, SAMPLES))) for n in range(0, SAMPLES, 2)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        random.shuffle(self.batches)
        yield from self.batches


class ShufflesAfterwards(ShufflesBatches):
    """As SpeechBrain's dynamic batches: those of the next epoch are made when one is over."""

    def __iter__(self):
        yield from self.batches
        random.shuffle(self.batches)


class UnsizedBuckets(Buckets):
    __len__ = None


class DrawsTokens:
    """Fills batches up to a number of tokens, an epoch from its own count."""

    def __init__(self):
        self.epoch = 0
        self.rng = np.random.default_rng(3)

    def __iter__(self):
        self.epoch += 1
        order = self.rng.permutation(SAMPLES)
        batch, tokens = [], 0
        for index in order.tolist():
            if tokens + index > 30 + self.epoch and batch:
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += index
        yield batch


LOADERS = {
    "counts epochs": plain(CountsEpochs),
    "counts epochs afterwards": plain(CountsAfterwards),
    "offers its count": plain(OffersItsCount),
    "offers its count afterwards": plain(OffersItsCountAfterwards),
    "goes on": plain(GoesOn),
    "begins anew by itself": plain(BeginsAnewByItself),
    "holds a stream": plain(HoldsAStream),
    "makes a stream late": plain(MakesAStreamLate),
    "holds a loader": plain(HoldsALoader),
    "shuffles itself": plain(ShufflesItself),
    "slice of a stream": lambda: Slice(cyclic(), 8),
    "loader that counts": CountingLoader,
    "restarts at the end": RestartsAtTheEnd,
    "streaming": Streaming,
    "map-style that counts": plain(Counts, shuffle=True),
    "map-style that offers a state": plain(OffersWhatItServed, shuffle=True),
    "collate function": lambda: DataLoader(Counts(), BATCH, True, collate_fn=Collate()),
    "generators everywhere": plain(DrawsEverywhere, shuffle=True),
    "buckets": plain(Counts, batch_sampler=Buckets),
    "buckets without length": plain(Counts, batch_sampler=UnsizedBuckets),
    "batches shuffled": plain(Counts, batch_sampler=ShufflesBatches),
    "batches shuffled afterwards": plain(Counts, batch_sampler=ShufflesAfterwards),
    "batches by tokens": plain(Counts, batch_sampler=DrawsTokens),
    "two, one of them endless": lambda: CombinedLoader(
        [Slice(cyclic(), 8), plain(CountsEpochs)()], "max_size_cycle"
    ),
    "max size, the one without length is shorter": lambda: CombinedLoader(
        [DataLoader(Plain(), 2, shuffle=True), plain(Stream)()], "max_size"
    ),
    "max size, the one without length is longer": lambda: CombinedLoader(
        {"a": DataLoader(Plain(), 8, shuffle=True), "b": plain(Stream)()}, "max_size"
    ),
    "min size, one without length": lambda: CombinedLoader(
        [DataLoader(Plain(), 2, shuffle=True), plain(CountsEpochs)()], "min_size"
    ),
}

WORKER_LOADERS = {
    "workers, counts epochs": plain(CountsEpochs, **WORKERS),
    "workers, begins anew by itself": plain(BeginsAnewByItself, **WORKERS),
    "workers, map-style that counts": plain(Counts, **WORKERS),
    "workers, map-style that offers a state": plain(OffersWhatItServed, **WORKERS),
    "workers, collate function": lambda: DataLoader(
        Counts(), BATCH, collate_fn=Collate(), **WORKERS
    ),
    "workers, generators everywhere": plain(DrawsEverywhere, **WORKERS),
    "workers, buckets": plain(Counts, batch_sampler=Buckets, **WORKERS),
    "persistent, counts epochs": plain(CountsEpochs, **PERSISTENT),
    "persistent, counts epochs afterwards": plain(CountsAfterwards, **PERSISTENT),
    "persistent, offers its count": plain(OffersItsCount, **PERSISTENT),
    "persistent, shuffles itself": plain(ShufflesItself, **PERSISTENT),
    "persistent, map-style that counts": plain(Counts, **PERSISTENT),
    "persistent, map-style that offers a state": plain(OffersWhatItServed, **PERSISTENT),
    "persistent, batches shuffled": plain(Counts, batch_sampler=ShufflesBatches, **PERSISTENT),
}


@pytest.mark.sample(14)
@pytest.mark.parametrize(("make", "stops"), cells(LOADERS))
def test_data_with_a_state_goes_on_bit_for_bit(make, stops):
    """All batches after three stops, and all random numbers, are those of a run never stopped."""
    assert stopped(make, stops, None)[0] == whole(make, None)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("make", "stops"), cells(WORKER_LOADERS))
def test_data_with_a_state_goes_on_in_workers(make, stops):
    """The copy of a dataset, and of a collate function, in each worker, too."""
    assert stopped(make, stops, None)[0] == whole(make, None)


# Only the library knows whether its loader, cut within an epoch, would have begun the next one anew.
CUTTABLE = [name for name in LOADERS if name != "restarts at the end"]


def test_a_loader_whose_epoch_was_cut_is_named():
    """It is given its state, and may take it for another place than it would have gone on from."""
    _, report = stopped(RestartsAtTheEnd, (Stop(0, None),), 4)
    assert any("its last epoch was cut" in sentence for sentence in report)


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", CUTTABLE)
def test_data_with_a_state_goes_on_from_an_epoch_that_was_cut(name):
    """Where `limit_train_batches` ends an epoch, its data may go on, or begin anew."""
    make = LOADERS[name]
    assert stopped(make, CUT, 4)[0] == whole(make, 4)
