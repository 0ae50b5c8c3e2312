"""A loader whose iterations are tracked, and what it shares with the tracker of the fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex
from weakref import ref

from lightning_sbckpt.plugin._positions import LoaderPosition
from lightning_sbckpt.rng import isolated_rng

if TYPE_CHECKING:
    from lightning_sbckpt.plugin.loaders import LoaderTracker


class TrackedLoader:
    """A loader that is, to all who look, the one it stands for; its iterations are tracked.

    `isinstance` and attributes, read or set, are those of the loader, which is `__wrapped__`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from lightning_sbckpt.plugin.loaders import LoaderTracker
        >>> tracker = LoaderTracker(lambda: "train")
        >>> loader = tracker.track(DataLoader(range(4), batch_size=2))
        >>> isinstance(loader, DataLoader), len(loader), loader.batch_size
        (True, 2, 2)
        >>> [batch.tolist() for batch in loader]
        [[0, 1], [2, 3]]
    """

    __slots__ = ("__wrapped__", "_sb_track", "_sb_tracker")

    __wrapped__: Any
    _sb_track: Track
    _sb_tracker: LoaderTracker

    def __init__(self, wrapped: Any, track: Track, tracker: LoaderTracker) -> None:
        object.__setattr__(self, "__wrapped__", wrapped)
        object.__setattr__(self, "_sb_track", track)
        object.__setattr__(self, "_sb_tracker", tracker)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__wrapped__)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        attributes: dict[str, Any] = vars(self.__wrapped__)
        return attributes

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__wrapped__, name)
        # Only a loader that has a state of its own looks as if it had one.
        if name == "state_dict":
            return self._sb_track.state_dict
        if name == "load_state_dict":
            return self._sb_track.load_state_dict
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_iterator" and value is None:
            # So Lightning ends workers. Ours must not be the last hand that holds them.
            self._sb_track.position.let_go()
        setattr(self.__wrapped__, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__wrapped__, name)

    def __iter__(self) -> Iterator[object]:
        return self._sb_track.iterate()

    def __len__(self) -> int:
        return len(self.__wrapped__)

    def __bool__(self) -> bool:
        return bool(self.__wrapped__)

    def __getitem__(self, index: Any) -> object:
        return self.__wrapped__[index]

    def __eq__(self, other: object) -> bool:
        return bool(self.__wrapped__ == getattr(other, "__wrapped__", other))

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __dir__(self) -> Iterable[str]:
        return dir(self.__wrapped__)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # What goes to another process is the loader; tracking is this process's.
        return _itself, (self.__wrapped__,)


class Track:
    """What one `TrackedLoader` shares with its tracker.

    Nothing here refers back to the tracker strongly, nor does an iteration to what holds it:
    workers are to end with the last reference to them, not when garbage is collected.
    """

    def __init__(
        self, tracker: LoaderTracker, stage: str, index: int, position: LoaderPosition
    ) -> None:
        self._tracker = ref(tracker)
        self.stage = stage
        self.index = index
        self.position = position

    @property
    def tracker(self) -> LoaderTracker:
        tracker = self._tracker()
        # Who iterates a TrackedLoader holds its tracker.
        assert tracker is not None
        return tracker

    @property
    def key(self) -> tuple[str, int]:
        return self.stage, self.index

    @property
    def name(self) -> str:
        return f"{self.stage} loader {self.index} ({type(self.position.loader).__name__})"

    def iterate(self) -> Iterator[object]:
        tracker, position = self.tracker, self.position
        tracker.is_complete[self.stage] = True
        if tracker.is_holding:
            return iter(())
        pending = tracker.take_pending(self)
        keeps_last = tracker.keeps_last(self.stage)
        place = None if pending is None else pending["iteration"]
        if pending is not None and place and tracker.is_mid_epoch and self.stage == "train":
            iteration = position.resume(pending, keeps_last=keeps_last)
        else:
            if pending is not None:
                position.prepare_epoch(pending)
            iteration = position.begin(keeps_last=keeps_last)
        self._take_notes()
        return iteration

    def state_dict(self) -> Mapping[str, object]:
        """Return the loader's own state, as Lightning asks for it; but start nothing for it."""
        loader = self.position.loader
        # torchdata's loader would start its workers to give a state before the first batch.
        if getattr(loader, "__dict__", {}).get("_iterator", loader) is None:
            return {}
        with isolated_rng():
            state: Mapping[str, object] = loader.state_dict()
            return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Load the loader's own state, unless the tracker has a better one for it."""
        if not self.tracker.is_holding and self.key not in self.tracker.pending:
            self.position.loader.load_state_dict(state)

    def _take_notes(self) -> None:
        notes, self.position.notes = self.position.notes, []
        self.tracker.notes += [f"{self.name}: {note}." for note in notes]


def _itself(loader: object) -> object:
    return loader
