"""Sizes and times as people write them: `"50 GB"`, `"10 min"`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta

from lightning_sbckpt.errors import SelectionError

_BYTES = {
    "B": 1,
    **{unit: 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB", "PB"), 1)},
    **{unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB", "PIB"), 1)},
}
_SECONDS = {
    **dict.fromkeys(("S", "SEC", "SECOND", "SECONDS"), 1),
    **dict.fromkeys(("M", "MIN", "MINUTE", "MINUTES"), 60),
    **dict.fromkeys(("H", "HOUR", "HOURS"), 3600),
    **dict.fromkeys(("D", "DAY", "DAYS"), 86_400),
    **dict.fromkeys(("W", "WEEK", "WEEKS"), 604_800),
}
_TOO_LARGE = 2**63
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*")


def parse_bytes(given: float | str, owner: str) -> int:
    """Return a number of bytes: `"50 GB"` is 50 * 1000**3 of them, `"50 GiB"` 50 * 1024**3.

    Raises:
        SelectionError: What was given is no positive size.
    """
    number = _number(given, _BYTES)
    if number is None or number < 1:
        raise SelectionError(
            f"{owner} has the size {given!r}, expected a number of bytes of at least 1, or a text "
            "such as '50 GB' or '500 MiB'."
        )
    return int(number)


def as_seconds(given: object) -> float | None:
    """Return a number of seconds, a `timedelta` or a text such as `"10 min"` as seconds, or None.

    Example:
        >>> as_seconds("90s"), as_seconds(timedelta(minutes=1)), as_seconds("soon")
        (90.0, 60.0, None)
    """
    number = _number(given.total_seconds() if isinstance(given, timedelta) else given, _SECONDS)
    return None if number is None else float(number)


def parse_seconds(given: timedelta | float | str, owner: str) -> float:
    """Return a number of seconds, of at least one.

    Raises:
        SelectionError: What was given is no such time.
    """
    number = as_seconds(given)
    if number is None or number < 1:
        raise SelectionError(
            f"{owner} has the time {given!r}, expected at least 1 second: a number of seconds, a "
            "datetime.timedelta, or a text such as '10 min' or '2 hours'."
        )
    return number


def say_bytes(number: int) -> str:
    """Return a number of bytes as a person says it, in powers of 1000."""
    for unit in ("PB", "TB", "GB", "MB", "KB"):
        if number >= _BYTES[unit]:
            return f"{number / _BYTES[unit]:.4g} {unit}"
    return f"{number} B"


def say_seconds(seconds: float) -> str:
    """Return a time in the largest unit of which it is a whole number."""
    for unit, length in (("week", 604_800), ("day", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            count = int(seconds // length)
            plural = "s" if count > 1 and unit in ("week", "day") else ""
            return f"{count} {unit}{plural}"
    return f"{seconds:g} s"


def _number(given: object, units: Mapping[str, int]) -> float | None:
    if isinstance(given, str):
        found = _QUANTITY.fullmatch(given)
        if found is None or found[2].upper() not in units:
            return None
        return min(float(found[1]) * units[found[2].upper()], _TOO_LARGE)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return None
    # Compared, since a whole number may be too large to be asked whether it is finite.
    return given if -_TOO_LARGE < given < _TOO_LARGE else None
