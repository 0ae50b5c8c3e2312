"""How long it takes to load into a live model and optimizer, until every byte is usable."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from benchmarks.disk import renew_memory, scratch, warm
from benchmarks.measure import Section, Settings, Table, size_label, timed
from benchmarks.peer import Peer
from benchmarks.peers import FOUND, LOADING, opened
from benchmarks.states import State

READ = "one read of the bytes"
HASHED = "hash, then read, in all threads"
# As much as fits into the cache of a processor.
_BLOCK = 2**18
_BIG = 1000
_FOR_BIG = ("lightning-sbckpt, sync", FOUND, "torch.save + fsync", "torch.load, mmap=True")
# How the peers are called when it is their loading that is measured.
_NAMES = {
    "lightning-sbckpt, sync": "lightning-sbckpt",
    "torch.save + fsync": "torch.load + load_state_dict",
}


def run(settings: Settings) -> Section:
    """Measure."""
    live = Table("Into a model and optimizer that have trained", "s", READ)
    fresh = Table("Into a new model and optimizer, which has no moments yet", "s", READ)
    section = Section(
        "load",
        "Loading",
        "As in a process that has just started, where loading happens: the files are in the page "
        "cache, the system has memory enough that was in use a moment before, and the process has "
        "given back all that it doesn't use. Measured is the time until one number of every page of "
        "every tensor has been read, so that what is mapped lazily is loaded too. This package "
        "finds the newest checkpoint and verifies its checksums within that time; the others "
        "verify nothing, so there is a row for loading a checkpoint that was found and verified "
        f"before. The reference is *{READ}* into the memory of a tensor, which is ready. "
        f"*{HASHED}*: the same bytes, in equal shares, and nothing else: the least that a load can "
        "take which verifies first and needs no second copy. DCP and torch_checkpointing load in "
        "place and need moments that exist.",
        {"live": live, "fresh": fresh},
    )
    for size in settings.sizes:
        chosen = {name: make for name, make in LOADING.items() if size < _BIG or name in _FOR_BIG}
        seconds = settings.seconds_for(size) / 2
        state = State(size)
        with (
            scratch(settings.folder / "load") as folder,
            opened(chosen, state, folder, section.failures) as peers,
        ):
            for name, peer in peers.items():
                try:
                    peer.save()
                except Exception as error:
                    section.failures[name] = f"could not save: {error}"
            # The checksum of a file that is only seconds old is not remembered.
            time.sleep(2.5)
            ready = {name: peer for name, peer in peers.items() if name not in section.failures}
            target = State(size, seed=1)
            file = Bytes(folder / "bytes", state.bytes())
            for table, subjects in (
                (live, {_named(name): _into_live(peer, target) for name, peer in ready.items()}),
                (
                    fresh,
                    {
                        _named(name): _into_fresh(peer, size)
                        for name, peer in ready.items()
                        if peer.loads_into_fresh
                    },
                ),
            ):
                table.add(
                    size_label(size),
                    settings.interleave(
                        {READ: file.read, HASHED: file.hash_and_read, **subjects},
                        7,
                        seconds=seconds,
                        failures=section.failures,
                    ),
                )
        print(f"  load: {size_label(size)} done", flush=True)
    return section


def _named(name: str) -> str:
    return _NAMES.get(name, name.removesuffix(" + fsync"))


def _into_live(peer: Peer, target: State) -> Callable[[], float]:
    def load() -> float:
        target.settle()
        target.change()
        return _timed_load(peer, target)

    return load


def _into_fresh(peer: Peer, size: int) -> Callable[[], float]:
    def load() -> float:
        return _timed_load(peer, State(size, seed=1, has_moments=False))

    return load


def _timed_load(peer: Peer, target: State) -> float:
    warm(peer.folder)
    peer.before_load(target)
    renew_memory(int(target.megabytes * 1.2e6))
    return timed(lambda: (peer.load(target), target.touch()))


class Bytes:
    """A file of as many bytes as a state has, and memory that is ready for them.

    It is aligned as that of live tensors is: to an address that is no multiple of 32, as that of a
    large `bytearray` never is, some processors copy at a third of the pace.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._buffer = memoryview(torch.zeros(size, dtype=torch.uint8).numpy())
        path.write_bytes(self._buffer)
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads)
        share = -(-size // threads)
        self._shares = [(start, min(share, size - start)) for start in range(0, size, share)]

    def read(self) -> float:
        """Read, and return the seconds."""
        warm(self._path)
        return timed(lambda: self._fill((0, self._size)))

    def hash_and_read(self) -> float:
        """Hash, then read, in equal shares by as many threads as torch has; return the seconds."""
        warm(self._path)
        return timed(
            lambda: [list(self._pool.map(do, self._shares)) for do in (self._hash, self._fill)]
        )

    def _hash(self, share: tuple[int, int]) -> None:
        start, size = share
        hasher = xxhash.xxh3_128()
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(start)
            block = memoryview(bytearray(_BLOCK))
            while count := stream.readinto(block[:size]):
                hasher.update(block[:count])
                size -= count

    def _fill(self, share: tuple[int, int]) -> None:
        start, size = share
        left = self._buffer[start : start + size]
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while count := stream.readinto(left):
                left = left[count:]
