"""Writing a state by torch's own writer, and counting the bytes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, cast

import torch

from lightning_sbckpt._disk.progress import moved

_BLOCK = 8 * 2**20


def write_torch(state: object, path: Path) -> None:
    """Write a state as `torch.save` does."""
    with path.open("wb") as stream:
        write_torch_to(state, stream)


def write_torch_to(state: object, stream: IO[bytes]) -> None:
    """Write a state to an open file as `torch.save` does."""
    torch.save(state, cast("IO[bytes]", _Counted(stream)))


class _Counted:
    """A file that counts what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write bytes, a block at a time: a tensor is handed over whole."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._stream.write(block)
            moved(len(block))
        return len(view)

    def flush(self) -> None:
        """Flush the file."""
        self._stream.flush()
