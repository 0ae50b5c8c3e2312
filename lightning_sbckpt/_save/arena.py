"""Copies of live state, so that training may go on while they are written.

All of a checkpoint's files are laid out one behind the other in one piece of memory, which is kept
from save to save: copying into memory that is there already takes a sixth of the time that fresh
memory takes. The layout is that of the files, so the writer needs no second copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import xxhash

from lightning_sbckpt._format.image import Image, Left
from lightning_sbckpt._io.devices import copy_by_themselves, pin
from lightning_sbckpt._io.direct_write import ALIGNMENT, Source, round_up
from lightning_sbckpt._io.memory import huge_pages
from lightning_sbckpt._save.hashing_copy import copy_hashed

_SAMPLE = 64
_SAMPLES = 4096


@dataclass
class Frozen:
    """A file's bytes in memory of ours.

    Attributes:
        size: How many.
        memory: They, and zeros up to a multiple of the alignment.
        checksum: Their XXH3 128-bit hash, if it is known.
    """

    size: int
    memory: memoryview
    checksum: str | None = None

    @property
    def devices(self) -> Collection[torch.device]:
        """None: the bytes are in the processor's memory."""
        return ()

    def fill(self, start: int, out: memoryview) -> None:
        """Put the bytes from `start` on into `out`, as many as it holds."""
        out[:] = self.memory[start : start + len(out)]

    def view(self) -> memoryview | None:
        """Return all bytes, zero-padded to a multiple of the alignment."""
        return self.memory

    def sample(self) -> object:
        """Return a checksum of a few of the bytes, from all over."""
        hasher = xxhash.xxh3_64()
        for start in range(0, self.size, max(ALIGNMENT, self.size // _SAMPLES)):
            hasher.update(self.memory[start : start + _SAMPLE])
        return hasher.digest()


class Arena:
    """Memory for one copy of the state at a time.

    Attributes:
        capacity: Bytes that there are; they grow to the largest state seen.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._memory = memoryview(b"")
        self._owner: object = None
        self._pinned = False

    def take(
        self,
        sources: Mapping[str, Source],
        hideable: Collection[str] = (),
        *,
        devices: Collection[torch.device] = (),
    ) -> tuple[dict[str, Frozen], list[Left]]:
        """Copy files-to-be into the memory; what was taken before is overwritten.

        Args:
            sources: What to copy, by name.
            hideable: Names of those whose large storages may be copied later; if there are any,
                nothing here waits for a device.
            devices: Where tensors lie, but for the processor.

        Returns:
            The files, and what is still to be done until they are whole.
        """
        needed = sum(round_up(source.size) for source in sources.values())
        pinned = copy_by_themselves(devices)
        if needed > self.capacity or pinned != self._pinned:
            self._allocate(needed, devices)
        frozen = {}
        now: dict[str, tuple[Source, memoryview]] = {}
        left: list[Left] = []
        start = 0
        try:
            for name, source in sources.items():
                stop = start + round_up(source.size)
                memory = self._memory[start:stop]
                hide = name in hideable
                if isinstance(source, Image) and (hide or (hideable and source.devices)):
                    left.append(source.begin(memory, hide=hide))
                elif devices:
                    source.fill(0, memory[: source.size])
                else:
                    now[name] = (source, memory[: source.size])
                memory[source.size :] = bytes(len(memory) - source.size)
                frozen[name] = Frozen(source.size, memory)
                start = stop
        except BaseException:
            # What was begun goes on into this memory.
            for each in left:
                each.finish()
            raise
        for name, checksum in zip(now, copy_hashed([*now.values()]), strict=True):
            frozen[name].checksum = checksum
        return frozen, left

    def _allocate(self, size: int, devices: Collection[torch.device]) -> None:
        # First let go of the old: there must never be two.
        self._memory, self._owner, self.capacity = memoryview(b""), None, 0
        self._memory, self._owner = allocate(size, devices)
        self.capacity, self._pinned = size, copy_by_themselves(devices)


def allocate(size: int, devices: Collection[torch.device] = ()) -> tuple[memoryview, object]:
    """Return memory at an aligned address, in large pages where the system has them, and its owner.

    Args:
        size: In bytes.
        devices: Where tensors lie that will be copied; it is pinned if that helps, and if it can be.
    """
    memory = huge_pages(size)
    return memory, pin(memory, devices) or memory.obj
