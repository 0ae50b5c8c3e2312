"""Numbers, sizes and times in few characters, and text that can't spoil where it is put."""

from __future__ import annotations

import math
import reprlib
import time

# What training needs to go on exactly, and nobody looks at.
MACHINERY = ("callbacks", "loaders", "loops", "metrics", "nonpersistent", "rng")


def say_number(value: object) -> str:
    """Return a value of the meta in few characters.

    Example:
        >>> say_number(0.123456), say_number(1200), say_number(True), say_number(None)
        ('0.1235', '1200', 'yes', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    # Of a long list only the beginning is ever made into text.
    if isinstance(value, (list, tuple, dict, set)):
        return say_text(reprlib.repr(value))
    text = say_text(value)
    # A tensor is several lines.
    return text if isinstance(value, str) else text.replace("�", " ")


def say_text(value: object, longest: int = 200) -> str:
    r"""Return a text with no control characters and of no more than some length.

    Example:
        >>> say_text("a\x1b[1mb"), say_text("abcdef", 3)
        ('a�[1mb', 'ab…')
    """
    try:
        text = str(value)
    except Exception:  # Text for people comes from objects of anybody; one that can't, is named.
        text = f"a {type(value).__name__} that can't be printed"
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def say_size(count: float) -> str:
    """Return a number of bytes in powers of 1000.

    Example:
        >>> say_size(999), say_size(1_234_567)
        ('999 B', '1.23 MB')
    """
    size = float(count)
    units = iter(("B", "KB", "MB", "GB"))
    unit = next(units)
    while size >= 999.5:
        size, unit = size / 1000, next(units, "TB")
        if unit == "TB":
            break
    return f"{size:.3g} {unit}"


def say_duration(seconds: float) -> str:
    """Return a time in its two largest units at most.

    Example:
        >>> say_duration(0.0123), say_duration(75), say_duration(7300), say_duration(200_000)
        ('12 ms', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = int(seconds)
    for (large, length), (small, part) in (
        (("d", 86_400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def say_when(moment: object) -> str:
    """Return a time in seconds since the epoch as date and time of day, where we are.

    Example:
        >>> say_when(None), say_when(float("inf"))
        ('unknown', 'unknown')
    """
    try:
        seconds = float(moment) if isinstance(moment, (int, float)) else math.nan
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # no time there can be
        return "unknown"


def printable(text: str) -> str:
    r"""Return text of which no character does anything: names may hold any, and steer a terminal.

    Example:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def short_name(name: str) -> str:
    """Return the name of a checkpoint without what all of them begin with.

    Example:
        >>> short_name("CKPT+2026-11-22+10-15-03+00")
        '2026-11-22+10-15-03+00'
    """
    return printable(name.removeprefix("CKPT+"))


def by_interest(name: str) -> tuple[bool, bool, str]:
    """Return how files are sorted: the model, what else learns, then the machinery of the run.

    Example:
        >>> sorted(["loops", "optimizer", "rng", "model"], key=by_interest)
        ['model', 'optimizer', 'loops', 'rng']
    """
    return name in MACHINERY, name != "model", name
