"""Devices other than the processor, as far as copies from them are concerned.

CUDA (and ROCm, which torch calls by the same name) copies into pinned memory by itself, on the stream
of the device that holds the tensor, and torch returns as soon as the copy is begun. From any other
device, and into any other memory, torch returns when the copy has ended.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


def copy_by_themselves(devices: Collection[torch.device]) -> bool:
    """Return whether one of the devices makes use of pinned memory.

    Example:
        >>> copy_by_themselves([torch.device("cpu"), torch.device("mps")])
        False
    """
    return any(device.type == "cuda" for device in devices)


def wait_for_copies(devices: Collection[torch.device]) -> None:
    """Return when every copy that this thread has begun from the devices has ended.

    Args:
        devices: Those that were copied from, and no others: waiting for one makes a context there.
    """
    for device in sorted(devices, key=str):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
