"""What the workers of a DataLoader carry across: their random states and their dataset's state.

A worker draws augmentations from random streams that live in its process and die with it. Here
the worker sends its state along with each batch, and a worker that is started to go on with an
earlier run sets that state before its first sample. So nothing has to be loaded twice, and workers
that persist over epochs go on exactly, too.

The classes travel to the workers by pickle, whatever the start method.
"""

# The iterators of a DataLoader have no public interface.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from lightning_sbckpt.plugin.data.objects import Baseline, DataState
from lightning_sbckpt.rng import install_generator, raw_generator_state
from lightning_sbckpt.rng.generators import with_state
from lightning_sbckpt.rng.streams import set_streams, streams

__all__ = [
    "StartWorker",
    "TagBatch",
    "TaggedBatch",
    "WatchedIterable",
    "WorkerState",
    "tagging",
]

WorkerState = dict[str, Any]
"""Of one worker: the streams and generators that are not as when it was started."""


class TaggedBatch:
    """A batch, and the random states of its worker right after it."""

    __slots__ = ("batch", "begun", "state", "worker")

    def __init__(
        self, batch: object, worker: int, state: WorkerState, begun: WorkerState | None
    ) -> None:
        self.batch = batch
        self.worker = worker
        self.state = state
        self.begun = begun

    def pin_memory(self, device: object = None) -> TaggedBatch:
        """Pin the batch alone: this is what the pinning thread calls."""
        from torch.utils.data._utils.pin_memory import pin_memory

        self.batch = pin_memory(self.batch, device)  # type: ignore[no-untyped-call]
        return self


class _Worker:
    """What this worker process remembers of its start. In the main process it stays unused."""

    def __init__(self) -> None:
        self.base: WorkerState = {}
        self.begun: WorkerState | None = None
        self.data = DataState({}, Baseline())
        self.sends_states = False
        self.refused: list[str] = []

    def start(self, root: Mapping[str, object], *, sends_states: bool) -> None:
        """Note what there is before the first sample."""
        self.data = DataState(dict(root), Baseline(), in_worker=True)
        self.sends_states = sends_states
        self.base = {}
        self.base = self.now(states=False)

    def now(self, *, states: bool) -> WorkerState:
        """Return what differs from the base; most workers draw from one stream only.

        Args:
            states: Ask the objects that offer a state, too.
        """
        found = self.data.look_again()
        state: WorkerState = dict(streams())
        state["held"] = {
            name: raw_generator_state(generator)
            for name, generator in with_state(found.wanted).items()
        }
        state = {name: value for name, value in state.items() if value != self.base.get(name)}
        if data := self.data.take(states=states):
            # In a tuple, since what a user's state holds goes as it is.
            state["data"] = (data,)
        if self.data.untold:
            state["untold"] = list(self.data.untold)
        if self.refused:
            state["refused"] = self.refused
        return state


_worker = _Worker()


class TagBatch:
    """A collate function that sends the worker's random states along with what it collates."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self._depth = 0

    def __call__(self, samples: object) -> object:
        """Collate, then look at the random states."""
        self._depth += 1
        try:
            batch = self.collate(samples)
        finally:
            self._depth -= 1
        info = get_worker_info()
        # A loader's own function may call `loader.collate_fn` for the parts of a batch.
        if info is None or self._depth:
            return batch
        begun, _worker.begun = _worker.begun, None
        state = _worker.now(states=_worker.sends_states)
        return TaggedBatch(batch, info.id, state, begun)


class StartWorker:
    """A `worker_init_fn` that runs the user's, then sets the states the worker goes on with."""

    def __init__(
        self,
        init: Callable[[int], object] | None,
        states: Mapping[int, WorkerState],
        collate: object,
        *,
        sends_states: bool,
    ) -> None:
        self.init = init
        self.states = dict(states)
        self.collate = collate
        self.sends_states = sends_states

    def __call__(self, worker: int) -> None:
        """Start worker number `worker`."""
        info = get_worker_info()
        dataset = getattr(info, "dataset", None)
        if isinstance(dataset, WatchedIterable):
            # The user's function, and the dataset itself, are to find what they always find.
            object.__setattr__(info, "dataset", dataset.watched)
            dataset = dataset.watched
        if self.init is not None:
            self.init(worker)
        root = {"dataset": dataset, "collate_fn": self.collate}
        _worker.start(root, sends_states=self.sends_states)
        state = dict(self.states.get(worker, {}))
        _worker.refused = []
        for data in state.pop("data", ()):
            _worker.refused += _worker.data.set(data)
        # The releases before the first knew of the generators of the dataset alone.
        for name, generator in state.pop("generators", {}).items():
            install_generator(dataset, name, generator)
        for name, generator in state.pop("held", {}).items():
            if not install_generator(root, name, generator):
                _worker.refused.append(
                    f"its random generator {name!r} is gone, or of another kind now"
                )
        set_streams(state)


class WatchedIterable(IterableDataset[Any]):
    """An iterable dataset that notes the worker's random states when it is iterated anew.

    Between the last batch of one epoch and the first of the next, a persistent worker may draw
    without sending a batch; a replay of the next epoch has to start from after that.
    """

    def __init__(self, watched: IterableDataset[Any]) -> None:
        self.watched = watched

    def __iter__(self) -> Iterator[Any]:
        """Note, then iterate the dataset."""
        if get_worker_info() is not None:
            _worker.begun = _worker.now(states=True)
        return iter(self.watched)


class _Tagging:
    """What is added to the class of a DataLoader's iterator, to take the tags off its batches."""

    worker_states: dict[int, WorkerState]
    begun_states: dict[int, WorkerState]
    before_last: tuple[int, WorkerState | None] | None
    _is_resetting: bool

    def __next__(self) -> object:
        data = super().__next__()  # type: ignore[misc]
        if isinstance(data, TaggedBatch):
            self.before_last = (data.worker, self.worker_states.get(data.worker))
            self.worker_states[data.worker] = data.state
            if data.begun is not None:
                self.begun_states[data.worker] = data.begun
            return data.batch
        return data

    def _reset(self, *args: object, **kwargs: object) -> None:
        # Persistent workers finish what they were sent in the epoch that ends here, and the
        # iterator throws it away: those tags pass through _get_data only.
        for info in self._task_info.values():  # type: ignore[attr-defined]
            self._note_state(info[1:])
        self._is_resetting = True
        self.begun_states = {}
        try:
            super()._reset(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._is_resetting = False
        self.before_last = None

    def _get_data(self) -> object:
        data = super()._get_data()  # type: ignore[misc]
        if self._is_resetting:
            self._note_state(data)
        return data

    def _note_state(self, data: object) -> None:
        if isinstance(data, TaggedBatch):
            self.worker_states[data.worker] = data.state
        elif isinstance(data, tuple):
            for part in data:
                self._note_state(part)


@cache
def _tagging_class(kind: Hashable) -> type:
    assert isinstance(kind, type)
    return type(f"{kind.__name__}", (_Tagging, kind), {"__module__": kind.__module__})


def tagging(iterator: Any, states: Mapping[int, WorkerState]) -> Any:
    """Make an iterator whose workers tag their batches take the tags off.

    The class of the iterator is changed, not wrapped, since a loader with persistent workers gives
    the same iterator to whoever iterates it.

    Args:
        iterator: a multiprocessing iterator of a DataLoader, just made.
        states: what its workers were started with.
    """
    iterator.__class__ = _tagging_class(cast("Hashable", type(iterator)))
    iterator.worker_states = dict(states)
    iterator.begun_states = {}
    iterator.before_last = None
    iterator._is_resetting = False
    return iterator
