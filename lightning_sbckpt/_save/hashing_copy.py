"""Copying files-to-be into memory: by several threads, each block hashed while it is in the cache.

One core copies at about half the pace of the memory, and hashing a block just copied takes a third
of what it takes when the bytes have to come from memory again, beside a training that wants both. A
hash goes through a file from its beginning to its end, so each file has one thread that copies and
hashes; a thread that has no file left copies for the others, always the next block, which is hashed
soon after (copied from the end of the file, blocks were out of the cache when the hash came to them).
What threads tell each other takes no lock but where one waits: each lock is a chance to be held up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Condition, Thread

import xxhash

from lightning_sbckpt._io.direct_write import Source
from lightning_sbckpt._io.threads import useful_threads

_BLOCK = 2**20
# Below this, starting a thread costs more than it saves.
_WORTH_THREADS = 16 * 2**20


def copy_hashed(files: Sequence[tuple[Source, memoryview]]) -> list[str]:
    """Copy the content of each file into its memory.

    Args:
        files: Contents that lie in the processor's memory, and of their size where they go.

    Returns:
        The XXH3 128-bit hash of each.
    """
    if not files:
        return []
    works = [_Work(source, memory) for source, memory in files]
    todo = deque(sorted(works, key=lambda work: len(work.memory)))
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while todo:
                try:
                    mine = todo.pop()
                except IndexError:
                    break
                mine.copy_and_hash()
            while max(works, key=lambda each: each.left).help():
                pass
        except BaseException as error:
            failed.append(error)
            for each in works:
                each.give_up()

    threads = [Thread(target=work, name="sbckpt-copy") for _ in range(_helpers(works))]
    started = []
    try:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:
                break  # The interpreter is exiting and starts no thread any more.
            started.append(thread)
        work()
    finally:
        for thread in started:
            thread.join()
    if failed:
        raise failed[0]
    return [each.hasher.hexdigest() for each in works]


def _helpers(works: Sequence[_Work]) -> int:
    if sum(len(work.memory) for work in works) < _WORTH_THREADS:
        return 0
    return useful_threads() - 1


class _Work:
    """One file being copied, block by block, by its owner and by helpers."""

    def __init__(self, source: Source, memory: memoryview) -> None:
        self.memory = memory
        self.hasher = xxhash.xxh3_128()
        self._source = source
        self._count = -(-len(memory) // _BLOCK)
        # Threads may take from the one and add to the other without a lock.
        self._todo = deque(range(self._count))
        self._copied: set[int] = set()
        self._changed = Condition()
        self._given_up = False

    @property
    def left(self) -> int:
        """How many blocks nobody has begun to copy."""
        return len(self._todo)

    def copy_and_hash(self) -> None:
        """Copy what no helper copies, and hash everything."""
        for number in range(self._count):
            while number not in self._copied:
                if not self._copy_next() and not self._comes(number):
                    return
            self.hasher.update(self._block(number))

    def help(self) -> bool:
        """Copy one block; return False if there is none left."""
        if not self._copy_next():
            return False
        with self._changed:
            self._changed.notify_all()
        return True

    def give_up(self) -> None:
        """Let whoever waits go on, since the copy is of no use."""
        self._todo.clear()
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _copy_next(self) -> bool:
        try:
            number = self._todo.popleft()
        except IndexError:
            return False
        self._source.fill(number * _BLOCK, self._block(number))
        self._copied.add(number)
        return True

    def _comes(self, number: int) -> bool:
        """Wait for a block that a helper copies; return False if it never comes."""
        with self._changed:
            while number not in self._copied and not self._given_up:
                self._changed.wait()
            return number in self._copied

    def _block(self, number: int) -> memoryview:
        return self.memory[number * _BLOCK : (number + 1) * _BLOCK]
