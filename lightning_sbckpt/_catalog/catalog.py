"""Which checkpoints a folder holds, looked at anew each time and read only when they changed.

Three stores stand one behind the other: what this process has read before, the index of the folder
(`_catalog/index.py`), and the checkpoint folders, which alone are right. What was read before counts as long
as the folder and its `CKPT.yaml` have the inode and the times that they had then. Who asks again and
again lets the kernel say whether anything has changed (`_catalog/watch.py`).
"""

from __future__ import annotations

import copy
import logging
import os
import time
from pathlib import Path

from lightning_sbckpt._catalog.index import Entry, Identity, Row, read_index, write_index
from lightning_sbckpt._catalog.watch import Watch, watch
from lightning_sbckpt._io.records import RECORDS_NAME
from lightning_sbckpt._layout.publish import (
    folder_names,
    is_replacing,
    paramfiles,
    read_folder,
)
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError
from lightning_sbckpt.meta import META_NAME, Checkpoint, ckpt_recency, usable_time
from lightning_sbckpt.selection import Criterion, rank_checkpoints, shortlist
from lightning_sbckpt.typing import CheckpointPredicate

logger = logging.getLogger("lightning_sbckpt")

# A smaller folder is read faster than an index is worth.
_MANY = 64

# A file that is changed twice within one tick of its filesystem's clock has the same time after
# both, so a time as young as that says nothing yet. The tick is 10 ms at most where times have
# fractions of a second, and up to 2 s where they have none.
_TICK_NS = 100_000_000
_COARSE_TICK_NS = 2_500_000_000

# How often a folder is listed in which checkpoints come and go, and how much longer each time until
# then: a tenth of a second in all.
_ATTEMPTS = 8
_PAUSE_SECONDS = 0.004

_NO_IDENTITY: Identity = (0, 0, 0, 0, 0, 0, 0)


class _Known:
    """What was found in one checkpoint folder, and whether that holds while its times stay."""

    # Made when they are asked for: a path and a dictionary take longer than all the rest.
    _path: Path | None = None
    _paramfiles: dict[str, Path]
    _is_flat = False
    _meta: dict[str, object] | None = None
    _names: list[str]
    _row: Row

    def __init__(self, identity: Identity, *, settled: bool, problem: str | None = None) -> None:
        self.identity = identity
        self.settled = settled
        self.problem = problem

    @classmethod
    def from_index(cls, identity: Identity, row: Row) -> _Known:
        """Return what the index says, which holds settled checkpoints only."""
        known = cls(identity, settled=True)
        known._row = row
        return known

    @classmethod
    def from_folder(
        cls, identity: Identity, meta: dict[str, object], names: list[str], *, settled: bool
    ) -> _Known:
        """Return what was read."""
        known = cls(identity, settled=settled)
        known._meta, known._names = meta, names
        return known

    def value(self, key: str) -> object:
        """Return one value of the meta, or None."""
        if self._meta is not None:
            return self._meta.get(key)
        _, kind, place = self._row
        column = kind.columns.get(key)
        return None if column is None else column[place]

    def entry(self) -> Entry:
        """Return everything."""
        if self._meta is None:
            _, kind, place = self._row
            self._meta, self._names = kind.meta(place), kind.names
        return Entry(self.identity, self._meta, self._names)

    def record(self, root: Path, name: str) -> Checkpoint:
        """Return the checkpoint; nothing that the caller changes in it comes back here."""
        _, meta, names = self.entry()
        if self._path is None:
            self._path = path = root / name
            self._paramfiles = paramfiles(path, names)
            plain = (float, int, str, type(None))
            self._is_flat = all(isinstance(value, plain) for value in meta.values())
        copied = dict(meta) if self._is_flat else copy.deepcopy(meta)
        return Checkpoint(self._path, copied, dict(self._paramfiles))


class Catalog:
    """The checkpoints of one folder.

    Args:
        root: The folder of all checkpoints.
        keep_index: Whether an index may be written there, for the next process.

    Attributes:
        unreadable: After a look, the checkpoints whose meta can't be read, each with the reason.
    """

    def __init__(self, root: Path, *, keep_index: bool = True) -> None:
        self.unreadable: dict[Path, str] = {}
        self._root = root
        self._keep_index = keep_index
        self._known: dict[str, _Known] = {}
        self._ranked: dict[Criterion, tuple[int, list[str]]] = {}
        self._not_indexed = 0
        self._calm = False
        self._can_watch = True
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the watch: it belongs to this object of this process."""
        return {**self.__dict__, "_watch": None}

    def checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint by the order of names; warn once of each other one."""
        self._look()
        return [known.record(self._root, name) for name, known in self._readable()]

    def find(
        self,
        criterion: Criterion,
        predicate: str | CheckpointPredicate | None = None,
        limit: int | None = None,
    ) -> list[Checkpoint]:
        """Return what `rank_checkpoints` makes of the checkpoints, without making all of them."""
        if predicate is not None or limit is None or criterion.function not in (None, ckpt_recency):
            # Functions of a user may look at every field of a record, and may change it.
            return rank_checkpoints(self.checkpoints(), criterion, predicate, limit)
        self._look()
        ranked = self._ranked.get(criterion)
        if ranked is None or not 0 <= limit <= ranked[0]:
            readable = self._readable()
            key = "unixtime" if criterion.key is None else criterion.key
            values = [known.value(key) for _, known in readable]
            chosen = shortlist(values, limit, lowest=criterion.lowest)
            records = [readable[i][1].record(self._root, readable[i][0]) for i in chosen]
            best = rank_checkpoints(records, criterion, limit=limit)
            ranked = self._ranked[criterion] = (limit, [ckpt.path.name for ckpt in best])
        return [self._known[name].record(self._root, name) for name in ranked[1][:limit]]

    def newest_time(self) -> float:
        """Return the `unixtime` of the newest checkpoint, or 0.

        What is known already is not looked at again: this is asked at every save.
        """
        self._look(again=False)
        times = (usable_time(known.value("unixtime")) for _, known in self._readable())
        return max(times, default=0.0)

    def _readable(self) -> list[tuple[str, _Known]]:
        return [(name, known) for name, known in self._known.items() if known.problem is None]

    def _look(self, *, again: bool = True) -> None:
        if again and self._watch is not None and self._watch.is_quiet():
            return
        if again:
            # Whoever asks a second time with nothing changed may ask a hundred times more.
            wanted = self._calm and self._can_watch and len(self._known) >= _MANY
            # Before anything is looked at, or what changes meanwhile would be noted by nobody.
            self._watch = watch(self._root, folder_names) if wanted else None
            self._can_watch = self._can_watch and (self._watch is not None or not wanted)
        before = known = self._known
        for attempt in range(_ATTEMPTS):
            known, is_whole = self._take_stock(known, again=again)
            if is_whole:
                break
            time.sleep(_PAUSE_SECONDS * attempt)
        changed = list(known.values()) != list(before.values())
        if changed:
            self._ranked.clear()
        if again:
            self._calm = not changed
        self._known = known
        self._warn_of_unreadable()
        self._index_if_behind()

    def _take_stock(
        self, before: dict[str, _Known], *, again: bool
    ) -> tuple[dict[str, _Known], bool]:
        """Return what is there, and whether it was so at one moment.

        It was not if a checkpoint went after all were listed: whoever prunes has published a newer
        one before, perhaps after the listing, too.
        """
        names = folder_names(self._root)
        unknown = sum(name not in before for name in names)
        index = read_index(self._root) if unknown >= _MANY else {}
        start = f"{self._root}{os.sep}"
        known = {}
        is_whole = True
        # Before anything is looked at, and that before it is read: what changes meanwhile will show.
        now = time.time_ns()
        # Asked once: a record is there before its folder is, and these folders are.
        is_all_here = not os.path.lexists(start + RECORDS_NAME)
        for name in names:
            seen = before.get(name)
            if seen is not None and not again:
                known[name] = seen
                continue
            try:
                identity = _identify(start + name)
            except (FileNotFoundError, NotADirectoryError):
                # Without meta, or removed since the folder was listed.
                is_whole = is_whole and os.path.lexists(start + name)
                continue
            except OSError as error:
                known[name] = _unreadable(_NO_IDENTITY, f"{start}{name}: {error.strerror}")
                continue
            if seen is not None and seen.identity == identity and seen.settled:
                known[name] = seen
            elif (row := index.get(name)) is not None and row[0] == identity:
                known[name] = _Known.from_index(identity, row)
            elif (found := self._read(name, identity, now, is_all_here)) is not None:
                known[name] = found
            else:
                is_whole = is_whole and os.path.lexists(start + name)
        # The only one may be between its old folder and its new one.
        return known, is_whole and (bool(known) or not is_replacing(self._root))

    def _read(self, name: str, identity: Identity, now: int, is_all_here: bool) -> _Known | None:
        settled = _is_settled(identity, now)
        try:
            meta, names = read_folder(f"{self._root}{os.sep}{name}", is_all_here=is_all_here)
        except CheckpointNotFoundError:
            return None
        except MetaError as error:
            return _unreadable(identity, str(error), settled=settled)
        self._not_indexed += settled
        return _Known.from_folder(identity, meta, names, settled=settled)

    def _warn_of_unreadable(self) -> None:
        unreadable = {
            self._root / name: known.problem
            for name, known in self._known.items()
            if known.problem is not None
        }
        for path, problem in unreadable.items():
            if path not in self.unreadable:
                logger.warning("left out an unreadable checkpoint: %s", problem)
        self.unreadable = unreadable

    def _index_if_behind(self) -> None:
        if not self._keep_index or len(self._known) < _MANY:
            return
        # Not at every look: reading a few folders is cheaper than writing all of them down.
        if self._not_indexed >= max(_MANY // 2, len(self._known) // 16):
            self._not_indexed = 0
            write_index(
                self._root,
                {name: known.entry() for name, known in self._readable() if known.settled},
            )


def _identify(folder: str) -> Identity:
    # Not a Path's own stat: there are thousands, and to make a Path costs more than the call.
    outer, meta = os.lstat(folder), os.lstat(f"{folder}{os.sep}{META_NAME}")
    return (
        outer.st_ino,
        outer.st_mtime_ns,
        outer.st_ctime_ns,
        meta.st_ino,
        meta.st_mtime_ns,
        meta.st_ctime_ns,
        meta.st_size,
    )


def _unreadable(identity: Identity, problem: str, *, settled: bool = False) -> _Known:
    return _Known(identity, settled=settled, problem=problem)


def _is_settled(identity: Identity, now: int) -> bool:
    """Return whether a later change would show in the times, see `_TICK_NS`."""
    newest = max(identity[1], identity[2], identity[4], identity[5])
    return now - newest > (_TICK_NS if identity[5] % 1_000_000_000 else _COARSE_TICK_NS)
