"""One loader in hand: what kind it is, the random state around it, and how its iterators are made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

from torch.utils.data import IterableDataset

from lightning_sbckpt.plugin.data.iteration import (
    Iteration,
    Place,
    is_datapipe,
    is_plain,
    is_standard,
    is_torchdata,
    length,
    mark_of,
    same,
)
from lightning_sbckpt.plugin.data.objects import Baseline, DataState
from lightning_sbckpt.plugin.data.sampling import (
    DrawLog,
    WatchedSampler,
    counters,
    is_well_known,
    samplers_in,
    samplers_state,
    set_samplers,
)
from lightning_sbckpt.plugin.data.workers import (
    StartWorker,
    TagBatch,
    WatchedIterable,
    WorkerState,
    tagging,
)
from lightning_sbckpt.rng import (
    capture_rng,
    generator_state,
    install_generator,
    restore_rng,
)
from lightning_sbckpt.typing import Stateful

__all__ = ["LoaderHandle"]


class LoaderHandle:
    """One loader: what is to be known of it, and iterators made of it that can be watched.

    Args:
        loader: Any that can be iterated.
        baseline: What the objects of the data were like when the fit began.

    Attributes:
        data: What the objects behind the loader know about where they are.
        placed: How it came to its place, a half sentence each.
        notes: What is not as it was, a half sentence each.
    """

    def __init__(self, loader: Any, baseline: Baseline) -> None:
        self.loader = loader
        # What a persistent iterator holds is either reachable without it or torch's own business.
        root = vars(loader) if is_standard(loader) else loader
        apart = samplers_in(loader).values()
        self.data = DataState(root, baseline, skip=("_iterator",), apart=apart)
        self.latest: Iteration | None = None
        self.placed: list[str] = []
        self.notes: list[str] = []
        self.baseline = counters(samplers_in(loader))
        # Whether its own state is a place within an epoch, as its first epoch shows.
        self.is_position: bool | None = None
        self.sampler: WatchedSampler | None = None

    # -- describing -----------------------------------------------------------------------------

    def describe(self) -> dict[str, object]:
        """Return what a loader must have in common with this one to be put where it is."""
        loader = self.loader
        batch_size = getattr(loader, "batch_size", None)
        return {
            "class": f"{type(loader).__module__}.{type(loader).__qualname__}",
            "length": length(loader),
            "batch_size": batch_size if isinstance(batch_size, int) else None,
            "num_workers": int(getattr(loader, "num_workers", 0) or 0),
            "samples": length(getattr(loader, "dataset", None)),
        }

    def compare(self, saved: Mapping[str, object]) -> None:
        """Note what differs from the loader that was saved."""
        here = self.describe()
        for name, said in (
            ("class", "its class"),
            ("length", "its length"),
            ("batch_size", "its batch size"),
            ("num_workers", "the number of its workers"),
            ("samples", "the length of its dataset"),
        ):
            if saved.get(name) != here[name]:
                self.notes.append(
                    f"{said} was {saved.get(name)} and is {here[name]}, so the run goes on, but not "
                    "bit for bit: an exact resume needs the same data in the same batches"
                )

    def moment(self, *, rng: bool = True) -> Place:
        """Return the random states, samplers and data of this moment."""
        moment: Place = {"rng": capture_rng()} if rng else {}
        self.data.look_again()
        moment["generators"] = {
            name: generator_state(generator) for name, generator in self.data.generators().items()
        }
        moment["samplers"] = samplers_state(self.loader, self.baseline)
        # torchdata's loader has the state of its dataset in its own.
        asks = not (self.mode() == "own" and is_torchdata(self.loader))
        moment["data"] = self.data.take(states=asks)
        return moment

    def set_moment(self, moment: Place, *, samplers: bool = False, states: bool = False) -> None:
        """Put everything back to a moment; samplers and the states of the data if asked to."""
        restore_rng(moment["rng"])
        self.set_generators(moment["generators"])
        if samplers and "samplers" in moment:
            set_samplers(self.loader, moment["samplers"], self.baseline, own_states=True)
        if "data" in moment:
            self.notes += self.data.set(moment["data"], states=states)

    def set_generators(self, states: Mapping[str, Any]) -> list[str]:
        """Give generators their states; return which are not there, a half sentence each."""
        self.data.look()
        here = self.data.generators()
        problems = []
        for name, state in states.items():
            # A dataset may be about to make its generator; a loader without one has none.
            if name not in here and not name.startswith("dataset.") and is_standard(self.loader):
                problems.append(f"its random generator {name!r} is not there any more")
            elif not install_generator(self.loader, name, state):
                problems.append(f"its random generator {name!r} is gone, or of another kind now")
        return problems

    @contextmanager
    def as_if_nothing_happened(self) -> Iterator[None]:
        """Put everything back afterwards to where it was."""
        before = self.moment()
        numbers = counters(samplers_in(self.loader))
        try:
            yield
        finally:
            restore_rng(before["rng"])
            self.set_generators(before["generators"])
            set_samplers(self.loader, {"counters": numbers}, {}, own_states=False)
            self.data.set(before["data"], states=False)

    # -- what kind of loader it is --------------------------------------------------------------

    def mode(self) -> str:
        """Return how it gets to a place: by its `"own"` state, by a `"map"` of indices, or by a `"replay"`."""
        loader = self.loader
        if not is_standard(loader):
            return "own" if isinstance(loader, Stateful) else "replay"
        iterable = isinstance(loader.dataset, IterableDataset)
        if is_torchdata(loader) and (iterable or isinstance(loader.dataset, Stateful)):
            return "own"
        return "replay" if iterable else "map"

    def is_custom(self) -> bool:
        """Return whether it is a loader of the user's, or another library's, with a state."""
        return not is_standard(self.loader) and isinstance(self.loader, Stateful)

    def has_workers(self) -> bool:
        """Return whether worker processes load its batches."""
        return is_standard(self.loader) and self.loader.num_workers > 0

    def persists(self) -> bool:
        """Return whether its workers go on from epoch to epoch."""
        return self.has_workers() and bool(self.loader.persistent_workers)

    # -- making iterators -----------------------------------------------------------------------

    def new_iterator(
        self, states: Mapping[int, WorkerState], gate: object = None
    ) -> tuple[Iterator[Any], bool]:
        """Make the loader's own iterator, with what we need in its workers and its order.

        Returns:
            The iterator, and whether it is new: persistent workers keep theirs.
        """
        loader = self.loader
        if not is_standard(loader):
            return iter(loader), True
        before = vars(loader).get("_iterator")
        makes_new = not (self.persists() and before is not None)
        swaps: dict[str, object] = {}
        if makes_new:
            swaps = self._swaps(states, gate)
        # Only while the iterator is made, when it takes these over: who looks at the loader at any
        # other time finds what the user put there.
        kept = {name: vars(loader)[name] for name in swaps}
        vars(loader).update(swaps)
        try:
            inner = iter(loader)
        finally:
            vars(loader).update(kept)
        if makes_new and loader.num_workers:
            tagging(inner, states)
        return inner, inner is not before

    def _swaps(self, states: Mapping[int, WorkerState], gate: object) -> dict[str, object]:
        loader = self.loader
        swaps: dict[str, object] = {}
        iterable = isinstance(loader.dataset, IterableDataset)
        if loader.num_workers:
            swaps["collate_fn"] = TagBatch(loader.collate_fn)
            # A replay needs them as of its beginning only.
            starts = not iterable or loader.persistent_workers
            swaps["worker_init_fn"] = StartWorker(
                loader.worker_init_fn,
                states,
                loader.collate_fn,
                sends_states=starts and not is_torchdata(loader),
            )
            if is_torchdata(loader):
                # With rarer snapshots its workers would be behind the states that we know.
                swaps["snapshot_every_n_steps"] = 1
            elif iterable and loader.persistent_workers and not is_datapipe(loader.dataset):
                swaps["dataset"] = WatchedIterable(loader.dataset)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = vars(loader)[name]
        self.sampler = None
        if gate is not None:
            swaps[name] = gate
        if not iterable and not is_well_known(sampler):
            self.sampler = WatchedSampler(sampler, remember=self.ahead() + 3)
            swaps.setdefault(name, self.sampler)
        return swaps

    def ahead(self) -> int:
        """Return how many batches its workers load in advance."""
        if not self.has_workers():
            return 0
        return int(self.loader.num_workers) * int(self.loader.prefetch_factor or 2)

    def iterate(self, inner: Iterator[object], place: Place, *, keeps_last: bool) -> Iteration:
        """Wrap an iterator of the loader so that it notes what a save needs."""
        mode = self.mode()
        order = None if self.sampler is None else self.sampler.latest
        log = None
        if not self.has_workers() and (
            mode == "replay"
            or self.is_custom()
            or (mode == "own" and not self._is_data_stateful(inner))
        ):
            log = DrawLog()
        before_next: Callable[[Iteration], None] | None = None
        if keeps_last and mode == "own":
            before_next = _weakly(self._note_own)
        elif keeps_last and mode == "map":
            before_next = _weakly(self._note_moment)
        iteration = Iteration(inner, place, log=log, order=order, before_next=before_next)
        iteration.keeps_batch = keeps_last and mode == "own"
        if mode == "map" and not self.has_workers():
            iteration.on_first.append(_weakly(self._note_first))
        return iteration

    def watch_beginning(self, iteration: Iteration) -> None:
        """Have a fresh iteration's first batches looked at, by which a replay is checked."""
        iteration.after = _weakly(self._note_mark)
        iteration.is_position = self.is_position
        if self.is_custom() and self.is_position:
            iteration.log = None

    def _note_mark(self, iteration: Iteration, batch: object) -> None:
        if iteration.yielded == 0:
            iteration.place["mark"] = mark_of(batch)
            if self.is_custom() and self.is_position is None:
                iteration.place["own_first"] = copy.deepcopy(self.loader.state_dict())
                return
        elif "own_first" in iteration.place:
            # A state that two batches leave as it was counts epochs, and says no place in one.
            first = iteration.place.pop("own_first")
            iteration.is_position = not same(first, self.loader.state_dict())
            self.is_position = iteration.is_position
            if iteration.is_position:
                iteration.log = None
        iteration.after = None

    def _is_data_stateful(self, inner: Any) -> bool:
        if not is_torchdata(self.loader):
            return True
        fetcher = getattr(inner, "_dataset_fetcher", None)
        return isinstance(self.loader.dataset, Stateful) or isinstance(
            getattr(fetcher, "dataset_iter", None), Stateful
        )

    def _note_first(self, iteration: Iteration) -> None:
        iteration.place["first"] = self.moment()

    def _note_moment(self, iteration: Iteration) -> None:
        iteration.place["before_last"] = self.moment()

    def _note_own(self, iteration: Iteration) -> None:
        # Of another library's loader the state after the last batch may be that of a new epoch.
        if self.is_custom() or iteration.yielded == 0 or not is_plain(iteration.last):
            iteration.place["own_before"] = copy.deepcopy(self.loader.state_dict())
            iteration.place["before_last"] = self.moment()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    # In a cycle of references, workers would wait for the garbage collector, which tears down
    # their queues in any order: they then take many seconds to end.
    reference = WeakMethod(method)

    def call(iteration: Iteration, *batch: object) -> None:
        alive = reference()
        if alive is not None:
            alive(iteration, *batch)

    return call
