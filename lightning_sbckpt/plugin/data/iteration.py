"""One iteration over a loader, and what can be asked of loaders and their iterators."""

# The iterators of a DataLoader have no public interface.
# ruff: noqa: SLF001

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from lightning_sbckpt.plugin.data.sampling import DrawLog, Order
from lightning_sbckpt.rng.streams import set_streams, streams
from lightning_sbckpt.typing import Stateful

__all__ = [
    "Closed",
    "Iteration",
    "Place",
    "carries_data",
    "draw_seed",
    "forget_given_place",
    "is_datapipe",
    "is_plain",
    "is_standard",
    "is_torchdata",
    "length",
    "mark_of",
    "same",
    "started_apart",
    "turn_to",
    "vars_of",
]

# A batch is told apart by so many of its parts, and of each tensor by so many values.
_MOST_PARTS = 256
_MOST_VALUES = 256

Place = dict[str, Any]
"""Where an iteration is: how it came to be, and how many batches it gave."""


class Iteration:
    """One iteration over a loader: gives its batches and knows how many it gave."""

    def __init__(
        self,
        inner: Iterator[object],
        place: Place,
        *,
        log: DrawLog | None,
        order: Order | None,
        before_next: Callable[[Iteration], None] | None,
    ) -> None:
        self.inner = inner
        self.place = place
        self.log = log
        self.order = order
        self.yielded: int = 0
        self.ended = False
        self.ready: deque[object] = deque()
        self.keeps_batch = False
        self.last: object = None
        self.on_first: list[Callable[[Iteration], None]] = []
        self.after: Callable[[Iteration, object], None] | None = None
        self.if_empty: Callable[[], Iterator[object]] | None = None
        self.is_position: bool | None = None
        self._before_next = before_next
        self._is_watched = True

    def __iter__(self) -> Iteration:
        """Return itself."""
        return self

    def __next__(self) -> object:
        """Return the next batch."""
        if self._is_watched:
            return self._watched_next()
        try:
            batch = next(self.inner)
        except StopIteration:
            self._end()
            raise
        self.yielded += 1
        return batch

    def __len__(self) -> int:
        """Return the length that the loader's own iterator tells."""
        return len(self.inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def _watched_next(self) -> object:
        if self.yielded == 0 and not self.ended:
            for tell in self.on_first:
                tell(self)
        if self.ready:
            batch = self.ready.popleft()
        else:
            if self._before_next is not None:
                self._before_next(self)
            if self.log is not None:
                self.log.before()
            before = None if self.if_empty is None else streams()
            try:
                batch = next(self.inner)
            except StopIteration:
                batch = self._once_more(before)
            self.if_empty = None
            if self.log is not None:
                self.log.after(self.yielded)
            if self.after is not None:
                self.after(self, batch)
        if self.keeps_batch:
            self.last = batch
        self.yielded += 1
        self._is_watched = bool(self.ready or self._before_next or self.log or self.after)
        return batch

    def _once_more(self, before: dict[str, object] | None) -> object:
        if self.if_empty is not None and before is not None:
            self.inner, self.if_empty = self.if_empty(), None
            set_streams(before)
            try:
                return next(self.inner)
            except StopIteration:
                pass
        self._end()
        raise StopIteration

    def _end(self) -> None:
        self.ended = True


class Closed:
    """A sampler without indices, for an iterator that is to be made without beginning."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __len__(self) -> int:
        return len(self.sampler)


def length(obj: Any) -> int | None:
    """Return the length, or None if there is none."""
    try:
        return len(obj)
    except (TypeError, NotImplementedError):
        return None


def is_standard(loader: object) -> bool:
    """Return whether the loader makes its iterators as `DataLoader` does."""
    if not isinstance(loader, DataLoader):
        return False
    for name in ("__iter__", "_get_iterator"):
        owner = next(cls for cls in type(loader).__mro__ if name in vars(cls))
        if owner is not DataLoader and owner.__module__.partition(".")[0] != "torchdata":
            return False
    return True


def is_torchdata(loader: object) -> bool:
    """Return whether the loader is a `StatefulDataLoader`."""
    return is_standard(loader) and isinstance(loader, Stateful)


def is_datapipe(dataset: object) -> bool:
    """Return whether a dataset is one of the data pipes, which torch treats in ways of its own."""
    return any(cls.__name__ in ("IterDataPipe", "MapDataPipe") for cls in type(dataset).__mro__)


def carries_data(state: Mapping[str, Any]) -> bool:
    """Return whether the state of a `StatefulDataLoader` holds any of its dataset's."""
    snapshots = state.get("_snapshot", {}).get("_worker_snapshots")
    parts = [state] if snapshots is None else list(snapshots.values())
    return any(
        part is not None
        and (
            part.get("dataset_state") is not None
            or (part.get("fetcher_state") or {}).get("dataset_iter_state") is not None
        )
        for part in parts
    )


def is_plain(value: object) -> bool:
    """Return whether a tensors-only file can hold the value."""
    if type(value) in (dict, list, tuple):
        parts = value.values() if isinstance(value, dict) else value
        return all(is_plain(part) for part in parts)  # type: ignore[attr-defined]
    return type(value) in (torch.Tensor, int, float, bool, str, type(None))


def mark_of(batch: object) -> int:
    """Return a number that tells one batch from another, made of some of its values.

    Example:
        >>> mark_of([torch.ones(2), "a"]) == mark_of([torch.ones(2), "a"])
        True
        >>> mark_of({"x": torch.ones(2)}) == mark_of({"x": torch.zeros(2)})
        False
    """
    mark = 0
    waiting, seen = [batch], 0
    while waiting and seen < _MOST_PARTS:
        value = waiting.pop()
        seen += 1
        mark = zlib.crc32(_bytes_in(value), mark)
        if isinstance(value, Mapping):
            waiting += [part for item in list(value.items()) for part in item]
        elif isinstance(value, (list, tuple)):
            waiting += value[:_MOST_PARTS]
        elif not isinstance(value, (torch.Tensor, type)):
            waiting += list(vars_of(value).values())
    return mark


def _bytes_in(value: Any) -> bytes:
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        # Whatever a subclass does when it is taken apart is for whoever trains with it.
        with torch._C.DisableTorchFunctionSubclass():
            return _bytes_in_tensor(value)
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return f"{kind} {value!r}"[:1000].encode(errors="replace")
    if hasattr(value, "tobytes") and hasattr(value, "dtype") and value.dtype.kind in "biufcSUmM":
        some = value[:1] if getattr(value, "ndim", 0) else value
        return f"{kind} {getattr(value, 'shape', ())}".encode() + bytes(some.tobytes()[:4096])
    return kind.encode()


def _bytes_in_tensor(tensor: torch.Tensor) -> bytes:
    said = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    own = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    if not (plain and own) or tensor.is_quantized or tensor.numel() == 0:
        return said
    some = tensor.detach().flatten()[:_MOST_VALUES].resolve_conj().resolve_neg()
    return said + some.contiguous().view(torch.uint8).numpy().tobytes()


def draw_seed(loader: Any) -> None:
    """Draw as every iterator of a `DataLoader` does for the seed of its workers."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def forget_given_place(loader: Any) -> None:
    """Have the next epoch begin at its beginning, where a library would go back to a given place.

    Hugging Face's datasets begin each epoch at the place they were given, unless `set_epoch` tells them
    its number (seen in 5.2). litData's loader forgets it at the end of its iterator only, which a
    fetcher that knows the length never reaches (seen in 0.2).
    """
    dataset = getattr(loader, "dataset", None)
    if "_starting_state_dict" in vars_of(dataset):
        cast("Any", dataset)._starting_state_dict = None
    if vars_of(loader).get("restore") is True and "_latest_worker_idx" in vars_of(loader):
        loader.restore = False


def started_apart(
    loader: Any, inner: Iterator[object], torch_state: torch.Tensor
) -> Iterator[object]:
    """Iterate on, with the seed that a new iterator draws taken from a generator of its own.

    The one it stands for drew its seed long ago. A loader whose `__iter__` is a generator function draws
    it with the first batch.
    """
    generator = torch.Generator()
    generator.set_state(torch_state)
    kept, vars(loader)["generator"] = loader.generator, generator
    try:
        first = next(inner, inner)
    finally:
        vars(loader)["generator"] = kept
    if first is not inner:
        yield first
        yield from inner


def turn_to(inner: Any, worker: int) -> None:
    """Have worker number `worker` be the next that is given work."""
    for _ in range(worker):
        next(inner._worker_queue_idx_cycle)


def vars_of(obj: object) -> dict[str, Any]:
    """Return the attributes of an object, if it has any."""
    return getattr(obj, "__dict__", {})


def same(one: Any, other: Any) -> bool:
    """Return whether two states are equal, tensors and arrays included.

    Example:
        >>> same({"epoch": 1, "order": torch.arange(3)}, {"epoch": 1, "order": torch.arange(3)})
        True
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    try:
        return bool(one == other)
    except (ValueError, TypeError, RuntimeError):
        return bool((one == other).all()) if hasattr(one, "shape") else False
