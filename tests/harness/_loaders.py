"""Fits over loaders that are stopped anywhere and go on, and what they saw."""

# ruff: noqa: NPY002  The legacy random state of numpy is what many use.

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from augmented_dataset import SAMPLES, Augmented
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    get_worker_info,
)

from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.rng import capture_rng, restore_rng
from lightning_sbckpt.rng.streams import streams

BATCH = 3  # 8 batches, the last one shorter


EPOCHS = 3


class Plain(Dataset):
    def __init__(self, length=SAMPLES):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    """Shuffles through a buffer with python's global stream, and augments with torch's."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        buffer = []
        for number in range(first, SAMPLES, step):
            buffer.append(number)
            if len(buffer) > 4:
                yield self.sample(buffer.pop(random.randrange(len(buffer))))
        while buffer:
            yield self.sample(buffer.pop(random.randrange(len(buffer))))

    def sample(self, number):
        return torch.tensor([number, torch.rand(()).item(), np.random.rand()])


class Wrapped:
    """A batch that no tensors-only file holds."""

    def __init__(self, samples):
        self.values = torch.stack(samples)


MADE_ANEW = ("generator", "sampler", "batch_sampler")


def plain(dataset: Any = None, **options: Any) -> Callable[[], DataLoader]:
    kind = options.pop("kind", DataLoader)
    make = dataset or Augmented

    def loader() -> DataLoader:
        made = {name: value() if name in MADE_ANEW else value for name, value in options.items()}
        size = {} if "batch_size" in made or "batch_sampler" in made else {"batch_size": BATCH}
        return kind(make(), **size, **made)

    return loader


WORKERS = {"num_workers": 2, "prefetch_factor": 2}


PERSISTENT = {**WORKERS, "persistent_workers": True}


@dataclass(frozen=True)
class Stop:
    epoch: int
    batch: int | None  # None: between this epoch and the next


MID = (Stop(0, 2), Stop(0, 5), Stop(1, 3))


BETWEEN = (Stop(0, None), Stop(1, None), Stop(2, 1))


def seed_all(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def values(batch: Any) -> Any:
    """Return a batch as nested lists."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, Wrapped):
        return batch.values.tolist()
    if isinstance(batch, dict):
        return {key: values(part) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [values(part) for part in batch]
    return batch


def through_a_file(state: object) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """Epochs of fetching and drawing, with Lightning's fetcher, from the start or a saved state."""

    def __init__(self, make: Callable[[], Any], limit: int | None, saved: Any = None) -> None:
        self.tracker = LoaderTracker(lambda: "train")
        made = make()
        self.combined = (
            made if isinstance(made, CombinedLoader) else CombinedLoader(made, "max_size_cycle")
        )
        if isinstance(made, list):
            # Lightning takes a list for several loaders.
            self.combined = CombinedLoader(SimpleNamespace(), "max_size_cycle")
            self.combined.flattened = [made]
        if saved is not None:
            self.tracker.load(saved["loaders"])
        self.combined.flattened = [self.tracker.track(dl) for dl in self.combined.flattened]
        if limit is not None:
            self.combined.limits = limit
        self.fetcher = _PrefetchDataFetcher()
        self.fetcher.setup(self.combined)
        self.begun_at = (0, 0)
        if saved is not None:
            before = streams()
            iter(self.fetcher)  # as Lightning does, far too early
            assert streams() == before
            stop = saved["stop"]
            self.begun_at = (stop.epoch, stop.batch) if stop.batch else (stop.epoch + 1, 0)
            self.tracker.release(stop.batch is not None)
            if stop.batch is not None:
                iter(self.fetcher)
                assert streams() == before
                self.fetcher.fetched += stop.batch
                if self.fetcher.length is not None:
                    self.fetcher.done = self.fetcher.fetched >= self.fetcher.length
            assert restore_rng(saved["rng"]) == []

    def __iter__(self) -> Iterator[tuple[Stop, Any]]:
        """Yield what each batch was, at the point where it may be stopped."""
        for epoch in range(self.begun_at[0], EPOCHS):
            number = self.begun_at[1] if epoch == self.begun_at[0] else 0
            if number == 0:
                iter(self.fetcher)
            while not self.fetcher.done:
                try:
                    batch, _, _ = next(self.fetcher)
                except StopIteration:
                    # One of several loaders, without a length, was the shortest.
                    break
                number += 1
                drawn = [
                    torch.rand(()).item(),
                    np.random.rand(),
                    np.random.randn(),
                    random.random(),
                ]
                yield Stop(epoch, number), (values(batch), drawn)
            yield Stop(epoch, None), "end"

    def saved(self, stop: Stop) -> Any:
        before = streams()
        state = self.tracker.state(prefetched=len(self.fetcher.batches))
        assert streams() == before, "saving drew random numbers"
        return {**through_a_file({"loaders": state, "rng": capture_rng()}), "stop": stop}

    def close(self) -> None:
        self.fetcher.teardown()
        self.tracker.detach()


def whole(make: Callable[[], Any], limit: int | None) -> list[tuple[Stop, Any]]:
    seed_all(1)
    run = Run(make, limit)
    events = list(run)
    run.close()
    return events


def stopped(
    make: Callable[[], Any], stops: tuple[Stop, ...], limit: int | None
) -> tuple[list[tuple[Stop, Any]], list[str]]:
    """Run with stops: whatever comes after each is from loaders made anew."""
    seed_all(1)
    run, events = Run(make, limit), []
    waiting = list(stops)
    while True:
        for stop, event in run:
            events.append((stop, event))
            if waiting and stop == waiting[0]:
                break
        else:
            report = run.tracker.report()
            run.close()
            return events, report
        saved = run.saved(waiting.pop(0))
        run.close()
        seed_all(1000 + len(waiting))
        run = Run(make, limit, saved)


def cells(loaders: dict[str, Callable[[], Any]]) -> list[Any]:
    return [
        pytest.param(make, stops, id=f"{name} | {where}")
        for name, make in loaders.items()
        for where, stops in (("mid-epoch", MID), ("between epochs", BETWEEN))
    ]
