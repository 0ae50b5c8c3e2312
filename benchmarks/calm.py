"""Waiting for the moments in which others leave the machine alone.

Processors, caches and memory may be shared with machines that can't be seen from here: a copy in memory
then takes three times as long as a moment before. So a short copy is timed before each measurement, for
every subject alike, and where it takes much longer than the shortest one of the run, the measurement
waits, for a while. The report says how long was waited, and how often in vain.
"""

from __future__ import annotations

import time

_BYTES = 32 * 2**20
_PROBES = 3
_PAUSE_SECONDS = 0.1
# So many times its best, and more: the copy is disturbed.
_DISTURBED = 1.4


class Calm:
    """How fast this machine is now, against its best.

    Attributes:
        waited: For how many seconds measurements were held back.
        begun: How many measurements were asked for.
        disturbed: How many of them were begun although the machine was busy.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self.begun = 0
        self.disturbed = 0
        self._best = float("inf")
        self._memory: tuple[memoryview, memoryview] | None = None

    def wait(self, patience: float) -> float:
        """Wait until the machine is as fast as it was, and return for how long.

        Args:
            patience: How many seconds to wait at most.
        """
        start = time.perf_counter()
        self.begun += 1
        while self._is_disturbed():
            if time.perf_counter() - start >= patience:
                self.disturbed += 1
                break
            time.sleep(_PAUSE_SECONDS)
        waited = time.perf_counter() - start
        self.waited += waited
        return waited

    def describe(self) -> dict[str, str]:
        """Return what a reader should know of it, as pairs of a name and a value."""
        if not self.begun:
            return {}
        return {
            "waited for a quieter machine": f"{self.waited:.0f} s in all",
            f"begun while a copy in memory took more than {_DISTURBED} times its best": (
                f"{self.disturbed:,} of {self.begun:,} measurements"
            ),
        }

    def _is_disturbed(self) -> bool:
        if self._memory is None:
            self._memory = memoryview(bytearray(_BYTES)), memoryview(bytearray(_BYTES))
            # The first ones are slow themselves; and the best is not known after one.
            for _ in range(10 * _PROBES):
                self._copy(*self._memory)
        # The shortest of a few, or every interrupt would count.
        return min(self._copy(*self._memory) for _ in range(_PROBES)) > _DISTURBED * self._best

    def _copy(self, target: memoryview, source: memoryview) -> float:
        start = time.perf_counter()
        target[:] = source
        taken = time.perf_counter() - start
        self._best = min(self._best, taken)
        return taken


MACHINE = Calm()
"""This one."""
