"""Devices other than the processor, as far as copies from them are concerned.

CUDA (and ROCm, which torch calls by the same name) copies into pinned memory by itself, on the stream
of the device that holds the tensor, and torch returns as soon as the copy is begun. From any other
device, and into any other memory, torch returns when the copy has ended.

Torch's allocator of pinned memory rounds up to a power of two and keeps what is given back, so memory
of our own is pinned here: exactly as much as is needed, for as long as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Collection
from contextlib import suppress
from functools import cache

import torch

logger = logging.getLogger("lightning_sbckpt")

# The memory counts as pinned for each device, as torch has it too.
_PORTABLE = 1


def copy_by_themselves(devices: Collection[torch.device]) -> bool:
    """Return whether one of the devices makes use of pinned memory.

    Example:
        >>> copy_by_themselves([torch.device("cpu"), torch.device("mps")])
        False
    """
    return bool(_with_streams(devices))


def wait_for_copies(devices: Collection[torch.device]) -> None:
    """Return when every copy that this thread has begun from the devices has ended.

    Args:
        devices: Those that were copied from, and no others: waiting for one makes a context there.
    """
    for device in _with_streams(devices):
        torch.cuda.current_stream(device).synchronize()


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
