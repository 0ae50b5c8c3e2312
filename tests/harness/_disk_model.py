"""A model of a disk that loses power: what a folder may hold when the machine comes back.

`ObservedStorage` writes down every operation as it is announced, and what the files held. From that
record `after_power_cut` makes a folder that a new process could find if the power had gone at any
chosen operation, under the weakest promises that a filesystem gives:

- after the last flush of a file, any of its later content survives: none, all, the first part, all
  of the length and none of the bytes, or some blocks of each;
- after the last flush of a folder, any subset of the later changes of its entries survives
  (create, rename, exchange, unlink, rmdir, link); one rename is atomic, and one exchange.

What nobody announces (the files that hooks of users write) is seen when it is flushed, and is as
unsafe as anything else until then. Other threads may be in the middle of what they announced last:
a flush counts only when its thread has gone on, or when a mark says that all is done.
"""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sbckpt._io.storage import LocalStorage

_SECTOR = 512


@dataclass
class Event:
    """One announced operation, or a mark of the test (`operation` is "mark")."""

    thread: int
    operation: str
    path: Path
    target: Path | None = None
    note: object = None
    # What is on the disk just before: of a file to be flushed, or of the one this thread wrote last.
    content: bytes | None = None
    written: tuple[Path, bytes] | None = None
    listing: dict[str, bytes | None] = field(default_factory=dict)


class ObservedStorage(LocalStorage):
    """A disk that writes down what is done to it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._lock = threading.Lock()
        self._last: dict[int, Event] = {}

    def before(self, operation: str, path: Path, target: Path | None = None) -> None:
        """Note the operation, and what the files concerned hold."""
        with self._lock:
            event = Event(threading.get_ident(), operation, path, target)
            last = self._last.get(event.thread)
            if last is not None and last.operation in ("create", "write"):
                content = _read(last.path)
                if content is not None:
                    event.written = (last.path, content)
            if operation == "flush_file":
                event.content = _read(path)
            if operation == "flush_dir":
                event.listing = {
                    entry.name: None if entry.is_dir(follow_symlinks=False) else _read(entry)
                    for entry in os.scandir(path)
                }
            self._last[event.thread] = event
            self.events.append(event)

    def mark(self, note: object) -> None:
        """Note that everything announced so far is done."""
        with self._lock:
            self.events.append(Event(threading.get_ident(), "mark", Path(), note=note))

    @property
    def operations(self) -> list[Event]:
        """The events that are no marks."""
        return [event for event in self.events if event.operation != "mark"]


def _read(path: os.PathLike[str]) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


class _File:
    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.later: list[bytes] = []

    def survivor(self, choose: Chooser) -> bytes:
        return choose.content(self.durable, self.later) if self.later else self.durable


class _Folder:
    def __init__(self) -> None:
        self.durable: dict[str, _File | _Folder] = {}
        self.current: dict[str, _File | _Folder] = {}


@dataclass
class _Change:
    """Entries that change in one atomic step: (folder, name, node, whether it is there after)."""

    parts: list[tuple[_Folder, str, _File | _Folder, bool]]
    index: int
    flushed: set[int] = field(default_factory=set)

    def apply(self, entries: Callable[[_Folder], dict[str, _File | _Folder]]) -> None:
        for folder, name, node, present in self.parts:
            if present:
                entries(folder)[name] = node
            elif entries(folder).get(name) is node:
                del entries(folder)[name]


class Chooser:
    """Decides what survives of what was not flushed."""

    def keeps(self) -> bool:
        """Return whether one change of an entry survives."""
        raise NotImplementedError

    def content(self, durable: bytes, later: list[bytes]) -> bytes:
        """Return what a file holds that was flushed as `durable` and became `later` since."""
        raise NotImplementedError


class Nothing(Chooser):
    """Nothing survives that was not flushed."""

    def keeps(self) -> bool:
        """No."""
        return False

    def content(self, durable: bytes, later: list[bytes]) -> bytes:
        """Return the flushed content."""
        return durable


class Everything(Chooser):
    """Everything survives."""

    def keeps(self) -> bool:
        """Yes."""
        return True

    def content(self, durable: bytes, later: list[bytes]) -> bytes:
        """Return the newest content."""
        return later[-1]


class NamesOnly(Chooser):
    """Every name survives and no content, as on filesystems that write the two apart."""

    def keeps(self) -> bool:
        """Yes."""
        return True

    def content(self, durable: bytes, later: list[bytes]) -> bytes:
        """Return zeros of the length that the file had come to."""
        return durable or bytes(len(later[-1]))


class Chance(Chooser):
    """Any subset, drawn with a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        # Sometimes nearly all survives and sometimes nearly nothing.
        self._share = self._random.choice([0.1, 0.5, 0.9])

    def keeps(self) -> bool:
        """Draw."""
        return self._random.random() < self._share

    def content(self, durable: bytes, later: list[bytes]) -> bytes:
        """Draw one of the kinds of damage."""
        new = self._random.choice(later)
        kind = self._random.randrange(5)
        if kind == 0:
            return durable
        if kind == 1:
            return new
        if kind == 2:
            return new[: self._random.randrange(len(new) + 1)]
        if kind == 3:
            return bytes(len(new))
        old = durable.ljust(len(new), b"\0")
        blocks = range(0, len(new), _SECTOR)
        return b"".join(
            (new if self._random.random() < 0.5 else old)[start : start + _SECTOR]
            for start in blocks
        )[: len(new)]


class Disk:
    """The disk below a folder, as it is known to be and as it may be.

    Args:
        base: The folder that all paths are below.
        start: A folder with what `base` held durably before the first event.
    """

    def __init__(self, base: Path, start: Path) -> None:
        self.base = base
        self._root = _scan(start)
        self._pending: list[_Change] = []
        self._done: list[int] = []
        self._index = 0

    def after_power_cut(self, events: list[Event], at: int, choose: Chooser, into: Path) -> None:
        """Write into a new folder what may be left if the power goes just before an event.

        It can be asked once.

        Args:
            events: The record of everything that was done.
            at: Before which of them the power goes.
            choose: What survives.
            into: The folder to make.
        """
        self._done = _moments(events)
        for self._index, event in enumerate(events[:at]):
            self._replay(event, done=self._is_done(self._index, at))
        durable = {id(folder): dict(folder.durable) for folder in _folders(self._root)}
        for change in self._pending:
            for part in change.parts:
                for folder in (part[0], part[2]):
                    if isinstance(folder, _Folder):
                        durable.setdefault(id(folder), dict(folder.durable))
        for change in self._pending:
            if choose.keeps():
                change.apply(lambda folder: durable[id(folder)])
        _write_out(self._root, into, lambda folder: durable.get(id(folder), folder.durable), choose)

    def _replay(self, event: Event, *, done: bool) -> None:
        if event.written is not None:
            path, content = event.written
            node = self._find(path)
            if isinstance(node, _File) and (node.later or [node.durable])[-1] != content:
                node.later.append(content)
        if event.operation in ("mark", "write"):
            return
        if event.operation == "flush_dir":
            self._replay_flush_of_folder(event, done=done)
            return
        *above, name = _parts(event.path, self.base)
        folder = self._folder(above)
        there = folder.current.get(name)
        if event.operation in ("make_dir", "create"):
            new: _File | _Folder = _Folder() if event.operation == "make_dir" else _File()
            self._change((folder, name, new, True))
        elif event.operation in ("remove_file", "remove_dir"):
            if there is not None:
                self._change((folder, name, there, False))
        elif event.operation == "rename":
            assert event.target is not None and there is not None, event
            *above, new_name = _parts(event.target, self.base)
            into = self._folder(above)
            self._change((into, new_name, there, True), (folder, name, there, False))
        elif event.operation == "exchange":
            assert event.target is not None and there is not None, event
            *above, other_name = _parts(event.target, self.base)
            into = self._folder(above)
            other = into.current[other_name]
            self._change((into, other_name, there, True), (folder, name, other, True))
        elif event.operation == "link":
            assert event.target is not None and there is not None, event
            *above, new_name = _parts(event.target, self.base)
            self._change((self._folder(above), new_name, there, True))
        elif event.operation == "flush_file":
            if there is None:  # Written by a hook: this is the first that is seen of it.
                there = _File()
                self._change((folder, name, there, True))
            assert isinstance(there, _File), event
            content = event.content or b""
            if done:
                there.durable, there.later = content, []
            else:
                there.later.append(content)
        else:
            raise AssertionError(f"an operation that this model does not know: {event}")

    def _replay_flush_of_folder(self, event: Event, *, done: bool) -> None:
        flushed = self._folder(_parts(event.path, self.base))
        for entry, content_or_none in event.listing.items():
            if entry not in flushed.current:
                unseen: _File | _Folder = _Folder()
                if content_or_none is not None:
                    unseen = _File()
                    unseen.later.append(content_or_none)
                self._change((flushed, entry, unseen, True))
        if done:
            self._flush_entries(flushed)

    def _change(self, *parts: tuple[_Folder, str, _File | _Folder, bool]) -> None:
        change = _Change(list(parts), self._index)
        change.apply(lambda folder: folder.current)
        self._pending.append(change)

    def _flush_entries(self, flushed: _Folder) -> None:
        left = []
        for change in self._pending:
            settled = change.index == self._index or self._is_done(change.index, self._index)
            if settled and any(part[0] is flushed for part in change.parts):
                change.flushed.add(id(flushed))
            if {id(part[0]) for part in change.parts} <= change.flushed:
                change.apply(lambda folder: folder.durable)
            else:
                left.append(change)
        self._pending = left

    def _is_done(self, index: int, at: int) -> bool:
        """Return whether one operation had returned when another was announced."""
        return self._done[index] <= at

    def _find(self, path: Path) -> _File | _Folder | None:
        node: _File | _Folder | None = self._root
        for part in _parts(path, self.base):
            node = node.current.get(part) if isinstance(node, _Folder) else None
        return node

    def _folder(self, parts: Iterable[str]) -> _Folder:
        node = self._root
        for part in parts:
            inner = node.current.get(part)
            if inner is None:  # Made by a hook, or by somebody who did not announce it.
                inner = _Folder()
                self._change((node, part, inner, True))
            assert isinstance(inner, _Folder), parts
            node = inner
        return node


@functools.cache
def _parts(path: Path, base: Path) -> tuple[str, ...]:
    # The record is gone through for every cut, and has the same paths each time.
    return path.relative_to(base).parts


def _moments(events: list[Event]) -> list[int]:
    """Return for each event the first one at which it had returned, or one more than there are."""
    never = len(events) + 1
    found, mark, next_of = [never] * len(events), never, {}
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        found[index] = min(mark, next_of.get(event.thread, never))
        next_of[event.thread] = index
        if event.operation == "mark":
            mark = index
    return found


def _scan(path: Path) -> _Folder:
    folder = _Folder()
    for entry in os.scandir(path):
        inside: _File | _Folder
        if entry.is_dir(follow_symlinks=False):
            inside = _scan(Path(entry.path))
        else:
            inside = _File(Path(entry.path).read_bytes())
        folder.durable[entry.name] = folder.current[entry.name] = inside
    return folder


def _folders(folder: _Folder) -> Iterator[_Folder]:
    yield folder
    for node in folder.durable.values():
        if isinstance(node, _Folder):
            yield from _folders(node)


def _write_out(
    folder: _Folder,
    into: Path,
    entries: Callable[[_Folder], dict[str, _File | _Folder]],
    choose: Chooser,
    written: dict[int, Path] | None = None,
) -> None:
    written = {} if written is None else written
    into.mkdir()
    for name, node in sorted(entries(folder).items()):
        if isinstance(node, _Folder):
            _write_out(node, into / name, entries, choose, written)
        elif id(node) in written:
            os.link(written[id(node)], into / name)
        else:
            (into / name).write_bytes(node.survivor(choose))
            written[id(node)] = into / name
