"""The position of the data: every loader of a fit, tracked, saved between two batches, resumed.

`LoaderTracker` sees each loader where the strategy sees it and puts a transparent `TrackedLoader`
in its place. How a loader gets back to where it was is told in `position.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex, cast
from weakref import ref

from lightning_sbckpt.errors import ConfigurationError, MismatchError
from lightning_sbckpt.plugin._private.trainer import wrap
from lightning_sbckpt.plugin.data.objects import Baseline, asks
from lightning_sbckpt.plugin.data.position import LoaderPosition
from lightning_sbckpt.rng import isolated_rng
from lightning_sbckpt.rng.walk import MOST_OBJECTS, is_opaque
from lightning_sbckpt.typing import Stateful

__all__ = ["LoaderTracker", "TrackedLoader"]

FORMAT = 1

STAGES = ("train", "validate")


class LoaderTracker:
    """Knows where every training and validation loader of one fit is.

    Args:
        stage: says for which stage a loader is being made: "train" and "validate" are tracked, the
            loaders of any other stage are left alone.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> tracker = LoaderTracker(lambda: "train")
        >>> batches = iter(tracker.track(DataLoader(range(100), shuffle=True)))
        >>> given = [next(batches).item() for _ in range(3)]
        >>> state = tracker.state()
        >>> expected = next(batches).item()

        In a new process, whatever its random state:

        >>> tracker = LoaderTracker(lambda: "train")
        >>> tracker.load(state)
        >>> loader = tracker.track(DataLoader(range(100), shuffle=True))
        >>> tracker.release(mid_epoch=True)
        >>> next(iter(loader)).item() == expected
        True
        >>> tracker.placed
        ['train loader 0 (DataLoader): 3 batches skipped by index, none loaded.']
    """

    def __init__(self, stage: Callable[[], str]) -> None:
        self._stage = stage
        self._groups: dict[str, list[Track]] = {name: [] for name in STAGES}
        self.is_complete = dict.fromkeys(STAGES, False)
        self.pending: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._saved_counts: dict[str, int] = {}
        self.placed: list[str] = []
        self.notes: list[str] = []
        self._undo: Callable[[], None] | None = None
        self.is_holding = False
        self.is_mid_epoch = False
        self._baseline = Baseline()
        self._told: set[str] = set()

    # -- seeing the loaders ---------------------------------------------------------------------

    def attach(self, strategy: Any) -> None:
        """Track each loader that `strategy.process_dataloader` returns from now on.

        Attaching again does nothing; only this instance of a strategy is changed.
        """
        if self._undo is not None:
            return

        def process_dataloader(original: Callable[[object], object], dataloader: object) -> object:
            return self.track(original(dataloader))

        self._undo = wrap(strategy, "process_dataloader", process_dataloader)

    def detach(self) -> None:
        """Leave the strategy as it was; loaders that are tracked already stay so.

        Their iterators are let go of, so that their workers end when nobody else needs them.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None
        for group in self._groups.values():
            for track in group:
                track.position.let_go()

    def track(self, loader: Any) -> Any:
        """Return a loader tracked, or the loader itself when the stage is not one of ours.

        Once a loader of a stage has been iterated, its group is complete: the next one that is
        made begins a new group, as when loaders are made again every few epochs.
        """
        stage = self._stage()
        if stage not in STAGES:
            return loader
        if type(loader) is TrackedLoader:
            loader = loader.__wrapped__
        former = list(self._groups[stage])
        if self.is_complete[stage]:
            self.forget(stage)
            self._end_epoch_of(former, loader)
        group = self._groups[stage]
        # The same loader made "again" may still have its workers.
        position = next((t.position for t in former if t.position.handle.loader is loader), None)
        track = Track(self, stage, len(group), position or LoaderPosition(loader, self._baseline))
        group.append(track)
        if not self.is_holding and track.key in self.pending:
            track.position.restore_now(self.pending[track.key])
        return TrackedLoader(loader, track, self)

    def _end_epoch_of(self, former: list[Track], loader: object) -> None:
        """Take loaders that are replaced to where their epoch ended, for the objects they share.

        What is the new loaders' own begins as it was made, as in a run that goes through.
        """
        for track in former:
            goes_on = self.is_mid_epoch and track.stage == "train"
            if self.is_holding or goes_on or track.position.handle.loader is loader:
                continue
            pending = self.take_pending(track)
            if pending is not None:
                track.position.prepare_epoch(pending)
                track.take_notes()

    def complete(self, stage: str) -> None:
        """Say that the group of a stage is complete: the next loader begins a new one."""
        self.is_complete[stage] = True

    def forget(self, stage: str) -> None:
        """Begin a new group of loaders for a stage."""
        self._groups[stage] = []
        self.is_complete[stage] = False

    # -- saving and going on --------------------------------------------------------------------

    def state(self, prefetched: int = 0) -> dict[str, object]:
        """Return where all loaders are, as values that `torch.load(weights_only=True)` reads.

        To be called between two batches. Draws no random number.

        Args:
            prefetched: how many batches were taken from the training loaders that have not been
                trained on yet: Lightning takes one ahead when the length is not known.
        """
        if prefetched not in (0, 1):
            raise ConfigurationError(
                f"the place of the training loaders is known for 0 or 1 prefetched batches, not "
                f"for {prefetched}: save where fewer have been fetched ahead."
            )
        with isolated_rng():
            return {
                "format": FORMAT,
                "train": [track.position.state(prefetched) for track in self._groups["train"]],
                "validate": [track.position.state(0) for track in self._groups["validate"]],
            }

    def load(self, state: object) -> None:
        """Take a state, and hold every loader until `release`.

        A held loader's iterator is empty and touches no random state: Lightning iterates loaders
        long before the present random states are restored.

        Raises:
            MismatchError: if `state` is not the state of a tracker.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            found = (
                f"format {state.get('format')!r}"
                if isinstance(state, Mapping)
                else f"a {type(state).__name__}"
            )
            raise MismatchError(
                "cannot restore the position of the data: expected what LoaderTracker.state() "
                f"returns (format {FORMAT}), found {found}; load the file that was saved from it, "
                "with the version of lightning-sbckpt that saved it."
            )
        self.pending = {
            (stage, index): saved for stage in STAGES for index, saved in enumerate(state[stage])
        }
        self._saved_counts = {stage: len(state[stage]) for stage in STAGES}
        self.placed, self.notes = [], []
        self.is_holding = True

    def release(self, mid_epoch: bool) -> None:
        """End holding.

        Args:
            mid_epoch: whether the next iteration of the training loaders goes on with the saved
                one. Otherwise the state was saved between two epochs and it is a fresh one.
        """
        self.is_holding = False
        self.is_mid_epoch = mid_epoch
        for stage in STAGES:
            for track in self._groups[stage]:
                if track.key in self.pending:
                    track.position.restore_now(self.pending[track.key])

    def batch_size(self) -> int | None:
        """Return the size of a batch of the first training loader, if it is known."""
        if not self._groups["train"]:
            return None
        return cast("int | None", self._groups["train"][0].position.handle.describe()["batch_size"])

    # -- telling --------------------------------------------------------------------------------

    def news(self) -> list[str]:
        """Return the warnings that have not been returned before, as training brings them up."""
        found = [sentence for sentence in self.warnings() if sentence not in self._told]
        self._told.update(found)
        return found

    def warnings(self) -> list[str]:
        """Return what can't be made exact for these loaders, or costs time, and what to change."""
        return [
            f"{track.name}: {sentence}."
            for stage in STAGES
            for track in self._groups[stage]
            for sentence in _nondeterminism_warnings(track.position)
        ]

    def report(self) -> list[str]:
        """Return, after a resume, what is not as it was; `placed` says how loaders were positioned."""
        sentences = []
        for stage, saved in self._saved_counts.items():
            here = len(self._groups[stage])
            if saved != here and (here or stage == "train"):
                sentences.append(f"{saved} {stage} loaders were saved and {here} are here.")
        return sentences + self.notes + self.news()

    # -- what the tracks ask --------------------------------------------------------------------

    def take_pending(self, track: Track) -> Mapping[str, Any] | None:
        """Return what was saved of a loader, once."""
        return self.pending.pop(track.key, None)

    def keeps_last(self, stage: str) -> bool:
        """Return whether the state before the last batch is wanted, too."""
        # Lightning fetches a batch ahead only when it does not know the length.
        group = self._groups[stage]
        return stage == "train" and any(
            track.position.handle.describe()["length"] is None for track in group
        )


def _nondeterminism_warnings(position: LoaderPosition) -> list[str]:
    loader = position.handle.loader
    data = position.handle.data
    found = _about_iterators(position)
    found += [
        f"its {path} has a state_dict that only the loader of its library can call, so a resume "
        "reads the epoch again from its beginning; use that loader to go on at once"
        for path, obj in data.found.objects.items()
        if asks(type(obj)) and not isinstance(loader, Stateful)
    ]
    found += [
        f"its {what} changes as it is iterated, and no checkpoint has that: a resume is not exact if "
        "the data depends on it; give its owner state_dict and load_state_dict"
        for what in position.untold()
    ]
    if not data.found.is_whole:
        found.append(
            f"it holds more than {MOST_OBJECTS:,} objects, and not all of them were searched for "
            "random generators and counters, which are then not saved; hold those in attributes "
            "of the dataset itself"
        )
    found += position.refused()
    found += [
        f"its {path} is a random.SystemRandom, which has no state; use random.Random"
        for path, generator in data.found.wanted.items()
        if isinstance(generator, random.SystemRandom)
    ]
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        found.append(
            "with in_order=False the order of its batches depends on which worker is faster; a "
            "resume can't repeat it; use in_order=True"
        )
    log = None if position.handle.latest is None else position.handle.latest.log
    if log is not None and not log.is_complete:
        found.append(
            "its dataset draws from random streams that training draws from, too, more often than "
            "is kept for a resume; give the dataset a generator of its own"
        )
    return found


def _about_iterators(position: LoaderPosition) -> list[str]:
    names = position.goes_on()
    if not names or not position.begins_anew():
        return []
    which = (
        "it is an iterator"
        if is_opaque(position.handle.loader)
        else f"its {names[0]} is an iterator"
    )
    if position.can_replay():
        consequence = (
            "which goes on in each epoch where it was in the last: a resume loads all batches since "
            "the run began again, and drops them; give its owner state_dict and load_state_dict to "
            "go on at once"
        )
    else:
        consequence = (
            "which goes on where it was, and no checkpoint has its place: a resume is not exact; "
            "give its owner state_dict and load_state_dict"
        )
    return [f"{which}, {consequence}"]


class TrackedLoader:
    """A loader that is, to all who look, the one it stands for; its iterations are tracked.

    `isinstance` and attributes, read or set, are those of the loader, which is `__wrapped__`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from lightning_sbckpt.plugin.data.tracker import LoaderTracker
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
        return f"{self.stage} loader {self.index} ({type(self.position.handle.loader).__name__})"

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
        self.take_notes()
        return iteration

    def state_dict(self) -> Mapping[str, object]:
        """Return the loader's own state, as Lightning asks for it; but start nothing for it."""
        loader = self.position.handle.loader
        # torchdata's loader would start its workers to give a state before the first batch.
        if getattr(loader, "__dict__", {}).get("_iterator", loader) is None:
            return {}
        with isolated_rng():
            state: Mapping[str, object] = loader.state_dict()
            return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Load the loader's own state, unless the tracker has a better one for it."""
        if not self.tracker.is_holding and self.key not in self.tracker.pending:
            self.position.handle.loader.load_state_dict(state)

    def take_notes(self) -> None:
        """Hand the tracker what the position has to tell."""
        for told, of_all in (
            (self.position.handle.placed, self.tracker.placed),
            (self.position.handle.notes, self.tracker.notes),
        ):
            of_all += [f"{self.name}: {note}." for note in told]
            told.clear()


def _itself(loader: object) -> object:
    return loader
