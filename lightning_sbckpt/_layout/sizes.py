"""How many bytes checkpoints really take on the disk."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from stat import S_ISREG

from lightning_sbckpt._io.records import remote_files
from lightning_sbckpt.meta import Checkpoint

_BLOCK = 512  # What st_blocks counts in, whatever the blocks of the file system are.


def real_bytes(folder: Path) -> dict[Hashable, int]:
    """Return what each file below a folder takes on the disk, by what makes the file itself.

    Names that share one file (hard links) are one entry, also across folders, so that the entries
    of several checkpoints joined together count no byte twice. A sparse file counts what it takes.
    Links to elsewhere are not followed. What vanishes meanwhile counts nothing.

    Args:
        folder: The folder of a checkpoint.

    Returns:
        From (device, inode) to bytes; of a file in a store, from folder and name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.ckpt").write_bytes(bytes(5000))
        >>> (folder / "same.ckpt").hardlink_to(folder / "a.ckpt")
        >>> len(real_bytes(folder))
        1
    """
    found: dict[Hashable, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - thousands of files
            except OSError:
                continue
            if S_ISREG(stat.st_mode):
                # Not yet allocated by a file system that allocates late: the length is the promise.
                size = stat.st_blocks * _BLOCK or stat.st_size
                found[stat.st_dev, stat.st_ino] = size
    for name, size in remote_files(folder).items():
        found[str(folder), name] = size
    return found


def checkpoint_bytes(checkpoint: Checkpoint) -> dict[Hashable, int]:
    """Return what each file of a checkpoint takes on the disk, see `real_bytes`.

    Example:
        >>> checkpoint_bytes(Checkpoint(Path("nowhere"), {}, {}))
        {}
    """
    return real_bytes(checkpoint.path)
