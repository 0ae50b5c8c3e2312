"""What the crash and damage suites have done, counted for the table in docs/durability.md."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()


def count(what: str, times: int = 1) -> None:
    """Note that something was done; the running test reports it as a property of its own."""
    COUNTS[what] += times
