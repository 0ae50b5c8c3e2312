"""What data can't be brought back to is told at the first fit, by name, and in the resume report."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from _runs import Steps, fit, make, raise_at
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.rng import walk as _walk
from lightning_sbckpt.rng.walk import Walk


class StoppedError(RuntimeError):
    """Ends a fit where a kill would."""


class Cycles(Dataset):
    """Takes what it adds to a sample from an iterator that goes on for ever."""

    def __init__(self):
        self.shifts = itertools.cycle([1, 2, 3])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(next(self.shifts))])


class Remembers(IterableDataset):
    """Keeps the samples that it gave, in a list that no file without pickle can hold."""

    def __init__(self):
        self.given = [torch.zeros(1)]

    def __iter__(self):
        for _ in range(4):
            self.given.append(self.given[-1] + 1)
            yield self.given[-1]


class Unseeded(IterableDataset):
    """Draws from the system at each epoch."""

    def __iter__(self):
        yield from torch.tensor([[random.SystemRandom().random()] for _ in range(4)])


def tracked(loader):
    tracker = LoaderTracker(lambda: "train")
    return tracker, tracker.track(loader)


def test_an_iterator_of_a_map_style_dataset_is_named():
    """Samples are not loaded again on the way to a place, so nothing can bring it there."""
    tracker, _ = tracked(DataLoader(Cycles()))
    (warning,) = tracker.warnings()
    assert "its dataset.shifts is an iterator" in warning
    assert "no checkpoint has its place" in warning
    assert "state_dict and load_state_dict" in warning


def test_what_changes_and_cannot_be_saved_is_named_at_the_first_save():
    """Once, by its owner and its name."""
    tracker, loader = tracked(DataLoader(Remembers(), batch_size=None))
    assert tracker.news() == []
    next(iter(loader))
    tracker.state()
    (warning,) = tracker.news()
    assert "its dataset: given changes as it is iterated" in warning
    tracker.state()
    assert tracker.news() == []


def test_a_cache_is_not_complained_about():
    """Nor what is made at the first use."""
    dataset = Cycles()
    dataset.shifts, dataset.cache, dataset.file = iter(()), {}, None
    tracker, _ = tracked(DataLoader(dataset))
    tracker.news()
    dataset.cache[3], dataset.file = torch.zeros(3), object()
    tracker.state()
    assert tracker.news() == []


def test_a_search_that_stops_says_so(monkeypatch):
    """Never without a word."""
    monkeypatch.setattr(_walk, "MOST_OBJECTS", 10)
    dataset = Cycles()
    dataset.shifts = None
    dataset.parts = [Cycles() for _ in range(20)]
    tracker, _ = tracked(DataLoader(dataset))
    assert any("not all of them were searched" in warning for warning in tracker.warnings())


def test_a_long_list_of_samples_is_searched_by_type():
    """A generator among a hundred thousand samples is found; without one, no sample is entered."""
    samples: list[object] = [(f"{number}.png", {"label": number}) for number in range(100_000)]
    walk = Walk((np.random.Generator,))
    found = walk.through({"samples": samples})
    assert found.is_whole
    assert not found.objects
    with_one = [*samples[:500], ("a", {"rng": np.random.default_rng()})]
    assert list(walk.through({"samples": with_one}).wanted) == ["samples.500.1.rng"]


def fitted(folder, data, stop=None):
    callbacks = [] if stop is None else [raise_at("on_train_batch_start", stop, StoppedError())]
    options = {"every_n_train_steps": 1, "restore_best": False, "trainer": {"max_epochs": 2}}
    run = make(folder, module=Steps(), callbacks=callbacks, **options)
    run.trainer.fit(run.module, data)
    return run


def test_a_stream_that_goes_on_is_told_at_the_first_fit(tmp_path, recwarn):
    """What it costs, and what to offer to go on at once; and again in the resume report."""

    class Slice:
        def __init__(self):
            self.source = iter(torch.arange(40.0).reshape(20, 2))

        def __iter__(self):
            return itertools.islice(self.source, 4)

    with pytest.raises(StoppedError):
        fitted(tmp_path, Slice(), stop=6)
    told = [str(each.message) for each in recwarn if "source is an iterator" in str(each.message)]
    assert len(told) == 1
    assert "loads all batches since the run began again" in told[0]
    run = fitted(tmp_path, Slice())
    report = run.callback.resume_report
    assert any("4 batches of earlier epochs loaded again" in place for place in report.data)
    assert any("source is an iterator" in note for note in report.notes)


def test_a_replay_that_gives_other_data_is_found_out(tmp_path):
    """By the first batch of the epoch."""
    data = DataLoader(Unseeded(), batch_size=None)
    with pytest.raises(StoppedError):
        fitted(tmp_path, data, stop=3)
    notes = fitted(tmp_path, data).callback.resume_report.notes
    assert any("the first batch of its epoch is not the one it was" in note for note in notes)


class Noisy(Steps):
    """Draws from generators of its own and of a part of it."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(3)
        self.part = torch.nn.Identity()
        self.part.generator = torch.Generator().manual_seed(5)

    def training_step(self, batch, batch_idx):
        noise = self.rng.random() + torch.rand((), generator=self.part.generator)
        return self.weight.sum() * noise


def test_generators_of_a_module_go_on(tmp_path):
    """Those of its parts, too."""
    whole = fit(tmp_path / "whole", module=Noisy(), restore_best=False)
    stop = raise_at("on_train_batch_start", 7, StoppedError())
    options = {"every_n_train_steps": 1, "restore_best": False}
    with pytest.raises(StoppedError):
        fit(tmp_path / "stopped", module=Noisy(), callbacks=[stop], **options)
    resumed = fit(tmp_path / "stopped", module=Noisy(), **options)
    assert torch.equal(resumed.module.weight, whole.module.weight)
