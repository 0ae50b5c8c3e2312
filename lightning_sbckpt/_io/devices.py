"""Devices other than the processor, as far as copies from them are concerned.

CUDA (and ROCm, which torch calls by the same name) copies into pinned memory by itself, on the stream
of the device that holds the tensor, and torch returns as soon as the copy is begun. From any other
device, and into any other memory, torch returns when the copy has ended. To begin a copy takes some
microseconds, whatever its size, so small tensors that lie together in the file are put together on the
device first.

Torch's allocator of pinned memory rounds up to a power of two and keeps what is given back, so memory
of our own is pinned here: exactly as much as is needed, for as long as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch

logger = logging.getLogger("lightning_sbckpt")

# The memory counts as pinned for each device, as torch has it too.
_PORTABLE = 1
# What takes longer to begin than to copy.
_SMALL = 2**16
# At most so much of other things may lie between two tensors that are copied as one.
GAP = 4096
# At most so much memory of a device is taken to put tensors together.
_TOGETHER = 8 * 2**20


class CapturingError(RuntimeError):
    """A CUDA graph is being captured."""


class Part(NamedTuple):
    """Bytes of a storage on a device, and where they go."""

    storage: torch.UntypedStorage
    first: int
    start: int
    stop: int

    @property
    def data(self) -> torch.Tensor:
        """The bytes, where they are."""
        return bytes_of(self.storage)[self.first : self.first + self.stop - self.start]


class Begun:
    """Copies that have been begun, and may not have ended.

    Args:
        copied: What must stay until they have.
    """

    def __init__(self, copied: object = None) -> None:
        self._copied = copied
        self._events: list[tuple[torch.device, Any]] = []

    def note(self, device: torch.device) -> None:
        """Note that copies were begun on the current stream of a device."""
        for each in _with_streams([device]):
            # Whoever waits gives the processor to others meanwhile.
            event = cast("Any", torch.cuda.Event)(blocking=True)
            event.record(torch.cuda.current_stream(each))
            self._events.append((each, event))

    def wait(self) -> None:
        """Return when they have ended."""
        for _, event in self._events:
            event.synchronize()
        self._copied, self._events = None, []

    def hold(self) -> None:
        """Have the devices wait for them before they do what they are asked from now on.

        Raises:
            CapturingError: A CUDA graph is being captured, which can't wait.
        """
        for device, event in [*self._events]:
            if torch.cuda.is_current_stream_capturing():
                raise CapturingError
            torch.cuda.current_stream(device).wait_event(event)


def begin_copies(parts: Sequence[Part], out: memoryview, *, aside: bool = False) -> Begun:
    """Begin to copy from devices; what is queued there comes first.

    Args:
        parts: Sorted by where they go. What lies between small ones, up to `GAP`, is overwritten.
        out: Where they go.
        aside: Whether what is queued later need not wait for them.
    """
    begun = Begun(parts)
    by_device: dict[torch.device, list[list[Part]]] = {}
    for run in _runs(parts):
        by_device.setdefault(device_of(run[0].storage), []).append(run)
    by_itself = bool(_with_streams(by_device)) and is_pinned(out)
    try:
        for device, runs in by_device.items():
            with _stream_aside(device) if aside else nullcontext():
                try:
                    for run in runs:
                        _copy_run(run, out, by_itself=by_itself)
                finally:
                    begun.note(device)
    except BaseException:
        # They would go on into memory that is somebody else's by then.
        begun.wait()
        raise
    return begun


def begin_sending(targets: Iterable[tuple[torch.Tensor, memoryview]]) -> Begun:
    """Begin to copy bytes to devices; what is queued there later waits for it.

    Args:
        targets: One-dimensional tensors of bytes, each with what goes there.
    """
    begun = Begun()
    devices = set()
    for target, memory in targets:
        device = device_of(target.untyped_storage())
        devices.add(device)
        by_itself = bool(_with_streams([device])) and is_pinned(memory)
        target.copy_(torch.frombuffer(memory, dtype=torch.uint8), non_blocking=by_itself)
    for device in devices:
        begun.note(device)
    return begun


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage as a one-dimensional tensor of bytes that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def device_of(storage: torch.UntypedStorage) -> torch.device:
    """Return the device that a storage lies on."""
    return storage.device


def is_here(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies in the processor's memory."""
    return tensor.device.type == "cpu"


def is_pinned(memory: memoryview) -> bool:
    """Return whether a device copies into memory by itself."""
    return bool(torch.frombuffer(memory, dtype=torch.uint8).is_pinned())


def _runs(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield what is copied at once: one part, or several small ones that lie together."""
    run: list[Part] = []
    for part in parts:
        if run and not (
            max(part.stop - part.start, run[-1].stop - run[-1].start) < _SMALL
            and part.start - run[-1].stop <= GAP
            and part.stop - run[0].start <= _TOGETHER
            and device_of(part.storage) == device_of(run[0].storage)
        ):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _copy_run(run: Sequence[Part], out: memoryview, *, by_itself: bool) -> None:
    if len(run) > 1:
        # There may be no memory left there.
        with suppress(torch.cuda.OutOfMemoryError):
            whole = _put_together(run)
            _target(out, run[0].start, run[-1].stop).copy_(whole, non_blocking=by_itself)
            return
    for part in run:
        _target(out, part.start, part.stop).copy_(part.data, non_blocking=by_itself)


def _put_together(run: Sequence[Part]) -> torch.Tensor:
    first = run[0].data
    pieces = [first]
    between = torch.zeros(GAP, dtype=torch.uint8, device=first.device)
    for before, part in pairwise(run):
        pieces += [between[: part.start - before.stop], part.data]
    return torch.cat(pieces)


def _target(out: memoryview, start: int, stop: int) -> torch.Tensor:
    return torch.frombuffer(out[start:stop], dtype=torch.uint8)


def _stream_aside(device: torch.device) -> Any:
    """Return a context with another stream of a device, that waits for the current one."""
    if not _with_streams([device]):
        return nullcontext()
    stream = cast("Any", torch.cuda.Stream)(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def copy_by_themselves(devices: Collection[torch.device]) -> bool:
    """Return whether one of the devices makes use of pinned memory.

    Example:
        >>> copy_by_themselves([torch.device("cpu"), torch.device("mps")])
        False
    """
    return bool(_with_streams(devices))


def pin(memory: memoryview, devices: Collection[torch.device]) -> object:
    """Pin memory for copies from devices; a copy into memory that can't be pinned only takes longer.

    Args:
        memory: Not from torch's allocator. It must not be shared with forked processes.
        devices: Where tensors lie that will be copied.

    Returns:
        What keeps the memory pinned; when it goes, nothing may be copying any more. None if the memory
        was not pinned.
    """
    used = _with_streams(devices)
    if not used or not memory:
        return None
    device = used[0]
    try:
        # It makes a context on the current device, which may hold nothing of ours.
        with torch.cuda.device(device):
            return _Pinned(memory)
    except Exception as error:
        # There are limits on it, by the system or the driver, and systems that can't.
        _clear_error(device)
        _warn(str(error))
    return None


class _Pinned:
    """Memory that is pinned until this goes."""

    def __init__(self, memory: memoryview) -> None:
        # Held, since it must be pinned no longer before it is given back to the system.
        self._memory = memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, len(memory), _PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister of {len(memory):,} bytes gave error {code}")
        # Not at the exit of the interpreter, when CUDA may be gone: then it goes with the process.
        weakref.finalize(self, _unpin, runtime, address, os.getpid()).atexit = False


def _unpin(runtime: object, address: int, owner: int) -> None:
    # A forked process must not ask CUDA for anything, and has other memory there.
    if os.getpid() == owner:
        runtime.cudaHostUnregister(address)  # type: ignore[attr-defined]


def _clear_error(device: torch.device) -> None:
    """Take away the error that the runtime remembers: torch would raise it from its next kernel."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0)


@cache
def _warn(why: str) -> None:
    logger.warning(
        "memory for copies of tensors on a GPU could not be pinned (%s); copies go to ordinary "
        "memory, which is slower, and training waits for them. Raise the limit on locked "
        "memory (ulimit -l) if there is one",
        why,
    )


def _with_streams(devices: Collection[torch.device]) -> list[torch.device]:
    return sorted((device for device in devices if device.type == "cuda"), key=str)
