"""Which checkpoints a folder holds, looked at anew each time and read only when they changed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from lightning_sbckpt._layout import META_NAME, list_folders, read_checkpoint
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency

logger = logging.getLogger("lightning_sbckpt")

# The year 10000. What claims to be later has no time that another could be after.
_END_OF_TIME = 253402300800.0

_Identity = tuple[int, int, int]


class Catalog:
    """The checkpoints of one folder.

    Args:
        root: The folder of all checkpoints.

    Attributes:
        unreadable: After a look, the checkpoints whose meta can't be read, each with the reason.
    """

    def __init__(self, root: Path) -> None:
        self.unreadable: dict[Path, str] = {}
        self._root = root
        self._known: dict[Path, tuple[_Identity, Checkpoint]] = {}

    def checkpoints(self) -> list[Checkpoint]:
        """Return every readable checkpoint by the order of names; warn once of each other one."""
        known: dict[Path, tuple[_Identity, Checkpoint]] = {}
        unreadable: dict[Path, str] = {}
        for folder in list_folders(self._root):
            try:
                stat, meta_stat = folder.stat(), (folder / META_NAME).stat()
                identity = (meta_stat.st_ino, stat.st_mtime_ns, meta_stat.st_mtime_ns)
                seen = self._known.get(folder)
                known[folder] = (
                    seen if seen and seen[0] == identity else (identity, read_checkpoint(folder))
                )
            except (CheckpointNotFoundError, FileNotFoundError):
                continue  # Removed since the folder was listed.
            except MetaError as error:
                unreadable[folder] = str(error)
                if folder not in self.unreadable:
                    logger.warning("left out an unreadable checkpoint: %s", error)
        self._known, self.unreadable = known, unreadable
        # Copies: what a caller does with a record must not come back in the next list.
        return [_copied(ckpt) for _, ckpt in known.values()]

    def newest_time(self) -> float:
        """Return the `unixtime` of the newest checkpoint, or 0."""
        times = map(ckpt_recency, self.checkpoints())
        return max((unixtime for unixtime in times if unixtime < _END_OF_TIME), default=0.0)


def _copied(ckpt: Checkpoint) -> Checkpoint:
    # Plain values need no copy, and there may be thousands of checkpoints.
    meta = {
        key: value if isinstance(value, (float, int, str, type(None))) else copy.deepcopy(value)
        for key, value in ckpt.meta.items()
    }
    return Checkpoint(ckpt.path, meta, dict(ckpt.paramfiles))
