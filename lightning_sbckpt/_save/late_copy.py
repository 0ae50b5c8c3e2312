"""A copy that hides behind forward and backward.

Parameters and the optimizer's state don't change between one optimizer step and the next, so large
tensors are copied in a thread while training goes on, and only the next optimizer step has to wait
for the end of it. Small ones, and whatever is no tensor, are copied at once.

From a GPU they are copied by the GPU, on a stream of their own. Nobody waits there for the end: what
the GPU is asked to do after the optimizer's step begins does.

Whether somebody wrote to a tensor meanwhile is told by its version counter, which every in-place
operation of torch raises when it has ended: a copy whose tensors have other versions afterwards than
at its beginning is of no use. (Writing through `tensor.data` or a pointer goes past the counter.)

The idea is that of lazy asynchronous checkpointing: CheckFreq (FAST 2021), DataStates-LLM (HPDC
2024).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from threading import Event, Lock, Thread

import torch
import xxhash

from lightning_sbckpt._format.image import Left
from lightning_sbckpt._io.devices import CapturingError
from lightning_sbckpt._io.memory import address_of
from lightning_sbckpt._save.arena import Frozen
from lightning_sbckpt.errors import SaveError

_libc = ctypes.CDLL(None, use_errno=True)
# Called so, it gives up the interpreter's lock and keeps to one core.
_memcpy = _libc.memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p
# Linux only.
_read_memory = getattr(_libc, "process_vm_readv", None)
if _read_memory is not None:
    _read_memory.restype = ctypes.c_ssize_t
    _spans = ctypes.c_void_p, ctypes.c_ulong
    _read_memory.argtypes = [ctypes.c_int, *_spans, *_spans, ctypes.c_ulong]
# Hashed soon after they are copied, so many bytes are still in a cache. Fewer at a time would make
# training wait: each call gives up the interpreter's lock, and takes it back from a loop that wants it.
_BLOCK = 8 * 2**20


class LateCopy:
    """Copies storages in a thread of its own, and waits there for what devices copy.

    Args:
        parts: The storages, in the processor's memory, each with the address it is copied to.
        tensors: The tensors whose storages those are.
        files: The files that lack nothing but these storages; they get their checksums.
        left: What devices copy, whose storages `tensors` have too.
    """

    def __init__(
        self,
        parts: Iterable[tuple[torch.UntypedStorage, int]],
        tensors: Sequence[torch.Tensor],
        files: Iterable[Frozen] = (),
        left: Sequence[Left] = (),
    ) -> None:
        self._changed: bool | None = None
        self._moved = False
        self._deciding = Lock()
        self._parts = sorted(parts, key=lambda part: part[1])
        self._files = sorted(files, key=lambda file: address_of(file.memory))
        self._versions = [(tensor, version_of(tensor)) for tensor in tensors]
        self._left = left
        self._hidden = [(s, s.nbytes(), s.data_ptr()) for each in left for s in each.hidden]
        self._copied_here = Event()
        self._thread: Thread | None = Thread(target=self._copy, name="sbckpt-copy")
        try:
            self._thread.start()
        except RuntimeError:
            # The interpreter is exiting and starts no thread any more.
            self._thread = None
            self._copy()

    @property
    def done(self) -> bool:
        """Whether everything is copied."""
        return self._thread is None or not self._thread.is_alive()

    def hold(self) -> None:
        """Return when what is copied may change: what devices are to do from now on waits there.

        Raises:
            SaveError: A CUDA graph is being captured.
        """
        self._copied_here.wait()
        try:
            for each in self._left:
                for begun in each.begun:
                    begun.hold()
        except CapturingError as error:
            raise SaveError(
                "a CUDA graph is captured that may write to tensors which are being copied for a "
                "checkpoint, and a graph can't wait for the copy. Use save_mode='async', or "
                "call wait() before the capture"
            ) from error

    def wait(self) -> None:
        """Return when everything is copied."""
        if self._thread is not None:
            self._thread.join()

    @property
    def known_changed(self) -> bool:
        """Whether it is known by now that the copy is of no use."""
        return self._changed is True

    def changed(self) -> bool:
        """Return whether some tensor was written to, from the beginning until this is first called.

        An operation that ran during the copy may not have raised its counter when the copy ended,
        so call this after `hold` or `wait` where no such operation can still be running: in the thread that
        trains, or long after.
        """
        with self._deciding:
            if self._changed is None:
                self._changed = self._is_written_to()
            self._versions, self._hidden = [], []
            return self._changed

    def _copy(self) -> None:
        try:
            self._copy_parts()
        finally:
            self._parts, self._files = [], []
            self._copied_here.set()
        for each in self._left:
            each.finish()
        with self._deciding:
            if self._is_written_to():
                self._changed = True

    def _copy_parts(self) -> None:
        hashing = _Hashing(self._files)
        copied = 0
        for storage, address in self._parts:
            size, source = storage.nbytes(), storage.data_ptr()
            for start in range(0, size, _BLOCK):
                length = min(_BLOCK, size - start)
                whole = _copy_if_there(address + start, source + start, length)
                # Whoever frees or resizes a storage, to offload its parameters, say, is not counted
                # as writing to a tensor.
                if not whole or (storage.nbytes(), storage.data_ptr()) != (size, source):
                    self._moved = True
                    return
                copied += length
                if copied >= _BLOCK:
                    hashing.advance(address + start + length)
                    copied = 0
        hashing.finish()

    def _is_written_to(self) -> bool:
        return (
            self._moved
            or any(version_of(tensor) != version for tensor, version in self._versions)
            or any((s.nbytes(), s.data_ptr()) != (size, at) for s, size, at in self._hidden)
        )


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _copy_if_there(target: int, source: int, length: int) -> bool:
    """Copy memory that may be freed meanwhile; return whether all of it was there.

    The kernel reads what is not mapped any more as an error, where `memcpy` would end the process.
    It copies at two thirds of the speed.
    """
    if _read_memory is not None:
        to, at = _Span(target, length), _Span(source, length)
        count = _read_memory(os.getpid(), ctypes.byref(to), 1, ctypes.byref(at), 1, 0)
        if count == length:
            return True
        if count >= 0 or ctypes.get_errno() == errno.EFAULT:
            return False
    # No such call, or not for us (a container): as good as it gets.
    _memcpy(target, source, length)
    return True


class _Hashing:
    """Hashes files from the first byte to the last, as far as their bytes are there."""

    def __init__(self, files: Sequence[Frozen]) -> None:
        self._waiting = list(reversed(files))
        self._hasher = xxhash.xxh3_128()
        self._done = 0

    def advance(self, address: int) -> None:
        """Go on up to an address: all that lies before it is there."""
        while self._waiting:
            file = self._waiting[-1]
            stop = min(file.size, address - address_of(file.memory))
            if stop > self._done:
                self._hasher.update(file.memory[self._done : stop])
                self._done = stop
            if stop < file.size:
                return
            self._end_file()

    def finish(self) -> None:
        """Go on to the end of the last file."""
        while self._waiting:
            file = self._waiting[-1]
            self._hasher.update(file.memory[self._done : file.size])
            self._end_file()

    def _end_file(self) -> None:
        self._waiting.pop().checksum = self._hasher.hexdigest()
        self._hasher, self._done = xxhash.xxh3_128(), 0


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to in place, or -1 if nothing counts it."""
    # Tensors made in inference mode have no counter, and nothing may write to them outside it.
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other name
