"""A copy that hides behind forward and backward.

Parameters and the optimizer's state don't change between one optimizer step and the next, so large
tensors are copied in a thread while training goes on, and only the next optimizer step has to wait
for the end of it. Small ones, and whatever is no tensor, are copied at once.

Whether somebody wrote to a tensor meanwhile is told by its version counter, which every in-place
operation of torch raises when it has ended: a copy whose tensors have other versions afterwards than
at its beginning is of no use. (Writing through `tensor.data` or a pointer goes past the counter.)

The idea is that of lazy asynchronous checkpointing: CheckFreq (FAST 2021), DataStates-LLM (HPDC
2024).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from threading import Lock, Thread

import torch

# Called so, `memcpy` gives up the interpreter's lock and keeps to one core.
_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p


class LateCopy:
    """Copies storages in a thread of its own.

    Args:
        parts: The storages, in the processor's memory, each with the address it is copied to.
        tensors: The tensors whose storages those are.
    """

    def __init__(
        self, parts: Iterable[tuple[torch.UntypedStorage, int]], tensors: Sequence[torch.Tensor]
    ) -> None:
        self._changed: bool | None = None
        self._deciding = Lock()
        self._parts = list(parts)
        self._versions = [(tensor, _version(tensor)) for tensor in tensors]
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
        so call this after `wait` where no such operation can still be running: in the thread that
        trains, or long after.
        """
        with self._deciding:
            if self._changed is None:
                self._changed = self._is_written_to()
            self._versions = []
            return self._changed

    def _copy(self) -> None:
        for storage, address in self._parts:
            _memcpy(address, storage.data_ptr(), storage.nbytes())
        self._parts = []
        with self._deciding:
            if self._is_written_to():
                self._changed = True

    def _is_written_to(self) -> bool:
        return any(_version(tensor) != version for tensor, version in self._versions)


def _version(tensor: torch.Tensor) -> int:
    # Tensors made in inference mode have no counter, and nothing may write to them outside it.
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other name
