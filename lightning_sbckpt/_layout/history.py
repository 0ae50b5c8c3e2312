"""What has happened in a folder of checkpoints: `HISTORY.jsonl`, one line for each event.

A checkpoint that was removed leaves nothing behind that could be drawn or asked about. So each save,
each removal with its reason, and the rules that were followed are noted here, in lines of JSON that
`grep` and `jq` read. Nothing rests on it: it is not flushed, a line cut off by a crash is passed
over, and a folder without the file is as good as one with it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.records import file_mode
from lightning_sbckpt.meta import END_OF_TIME, Checkpoint

logger = logging.getLogger("lightning_sbckpt")

HISTORY_NAME = "HISTORY.jsonl"

# A text in the meta may be long; here it is to be recognized, no more.
_LONGEST_TEXT = 200
_LONGEST_LIST = 100
# More than any run writes: whoever put such a file there did not mean it to be read.
MAX_BYTES = 2**26
_EVENT = re.compile(rb"^\{\"event\": .*$", re.MULTILINE)

# What each event must have to be believed.
_FIELDS: dict[str, dict[str, type]] = {
    "saved": {"name": str, "meta": dict, "lineage": dict},
    "removed": {"name": str, "reason": str},
    "rules": {"rules": list},
}


class History:
    """Writes down what happens in one folder; nothing ever fails because of it.

    Args:
        root: The folder of all checkpoints.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / HISTORY_NAME
        self._rules: tuple[list[str], str | None] | None = None
        self._ends_with_line = False
        self._complained = False

    def saved(
        self, checkpoint: Checkpoint, lineage: Mapping[str, object], size: int, seconds: float
    ) -> None:
        """Note that a checkpoint was published.

        Args:
            checkpoint: The checkpoint.
            lineage: Where its weights come from.
            size: The bytes of its files.
            seconds: From the call to the publication.
        """
        self._note(
            "saved",
            name=checkpoint.path.name,
            meta=_small(checkpoint.meta),
            lineage=_small(lineage),
            bytes=size,
            seconds=round(seconds, 4),
        )

    def removed(self, name: str, reason: str) -> None:
        """Note that a checkpoint was removed, and why."""
        self._note("removed", name=name, reason=reason)

    def kept_by(self, rules: Sequence[object], predicate: object = None) -> bool:
        """Note what retention goes by, and return whether it is not what was noted last.

        Args:
            rules: The rules.
            predicate: Which checkpoints may be removed at all: None, an expression, which has its
                text, or a function, which has none.
        """
        only = None if predicate is None else getattr(predicate, "text", "a function")
        found = ([repr(rule) for rule in rules], only)
        if found == self._rules:
            return False
        self._rules = found
        self._note("rules", rules=found[0], predicate=only)
        return True

    def _note(self, event: str, **fields: object) -> None:
        try:
            line = json.dumps({"event": event, "time": time.time(), **fields}, allow_nan=False)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self._path, flags | os.O_CLOEXEC, file_mode(self._path.parent))
            try:
                _require_own_file(descriptor)
                self._append(descriptor, line.encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "%s is not written, so what happened is not known later: %s",
                    self._path,
                    error.strerror or error,
                )

    def _append(self, descriptor: int, line: bytes) -> None:
        if not self._ends_with_line:
            # A crash or a full disk may have left half a line.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
        # One write at the end of the file: the lines of several processes don't mix.
        self._ends_with_line = os.write(descriptor, line) == len(line)


def _require_own_file(descriptor: int) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if found.st_nlink > 1:
        raise OSError(
            errno.EMLINK,
            "it has a second name elsewhere (a hard link), and what stands there would change, too. "
            f"Make it a file of its own: cp {HISTORY_NAME} x && mv x {HISTORY_NAME}",
        )


def read_history(root: Path) -> list[dict[str, Any]]:
    """Return what was noted in a folder, oldest first; nothing if there is no history.

    Every entry has `event` (`"saved"`, `"removed"` or `"rules"`) and `time`, in seconds since the
    epoch. Lines that can't be read are left out.

    Args:
        root: The folder of all checkpoints.

    Raises:
        OSError: The file is there and can't be read.
    """
    try:
        data = read_regular(Path(os.path.realpath(root), HISTORY_NAME), MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Found by their beginning: a line that is no event costs nothing.
    lines = (found.group() for found in _EVENT.finditer(data))
    return [entry for line in lines if (entry := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        right = isinstance(entry, dict) and 0 <= float(entry["time"]) < END_OF_TIME
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    if not right or not isinstance(kind := entry.get("event"), str):
        return None
    fields = _FIELDS.get(kind)
    if fields is None or any(not isinstance(entry.get(name), of) for name, of in fields.items()):
        return None
    return cast("dict[str, Any]", entry)


def _small(values: Mapping[str, object]) -> dict[str, object]:
    """Return what is short enough to be noted; JSON has no word for NaN and infinity."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
        if _is_short(value)
        or (isinstance(value, list) and len(value) <= _LONGEST_LIST and all(map(_is_name, value)))
    }


def _is_short(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or _is_name(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT
