"""Work that releases the interpreter's lock, shared out among a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

# Memory is as fast as it gets with a few; more would take processors from others.
_MAX_THREADS = 4


def useful_threads() -> int:
    """Return how many threads are worth having for what memory sets the pace of."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return min(_MAX_THREADS, processors)


def run_all(work: Callable[[T], object], items: Iterable[T], *, most: int) -> None:
    """Call `work` with each item, by at most so many threads; the first failure is raised.

    Args:
        work: Is called from several threads at once.
        items: Each is taken by the next thread that is free, in their order.
        most: How many threads the work is worth.
    """
    threads = min(useful_threads(), most)
    # A list's iterator may be shared by threads, a generator may not.
    waiting = iter(list(items))

    def take() -> None:
        for item in waiting:
            work(item)

    if threads < 2:
        take()
        return
    with ThreadPoolExecutor(threads - 1, "sbckpt-read") as pool:
        futures: list[Future[None]] = []
        # What is known to the caller's context is known to them: who counts the bytes, say. Where
        # the system starts no more threads, those that there are take all the items, and this one.
        with suppress(RuntimeError):
            futures.extend(pool.submit(copy_context().run, take) for _ in range(threads - 1))
        take()
        for future in futures:
            future.result()
