"""The limit on bytes: what it drops of what the rules keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sbckpt._display.quantities import parse_bytes, say_bytes
from lightning_sbckpt._format.omega import opaque
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import BytesOf


@opaque
@dataclass(frozen=True)
class Budget:
    """Bound the bytes of all checkpoints of the folder: the least wanted go first.

    It gives no reason to keep a checkpoint. What the other rules keep goes from the least wanted
    on until the rest fits: a checkpoint is wanted as much as it stands high in the rule that wants
    it most. The best of each `Best` and `Important`, the newest, pinned and otherwise protected
    checkpoints never go; if they alone are more than the budget, their reasons say so.

    A file that several checkpoints share counts once and goes with the last of them. A checkpoint
    that holds nothing of its own costs nothing, so it stays.

    Args:
        limit: The bytes, as a number or as text: `"50 GB"` (1000**3 each), `"50 GiB"` (1024**3).
        bytes_of: The bytes of each checkpoint: a function of it, or a mapping from its path; to a
            number, or from whatever identifies each file to the bytes of that. By default those
            that the checkpoints take on the disk.

    Raises:
        SelectionError: The limit is no positive number of bytes.

    Example:
        >>> from lightning_sbckpt.retention import Newest, plan_retention
        >>> ckpts = [Checkpoint(Path(n), {"unixtime": t}, {}) for t, n in enumerate("abc")]
        >>> rules = [Newest(3), Budget("1 KB", bytes_of=lambda ckpt: 400)]
        >>> for decision in plan_retention(ckpts, rules):
        ...     print(decision)
        keep   c: among the newest 3
        keep   b: among the newest 3
        remove a: 200 B over the budget of 1 KB, the least wanted (among the newest 3)
    """

    limit: float | str
    bytes_of: BytesOf | Mapping[Path, Mapping[Hashable, int] | int] | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuse a limit that is no size."""
        object.__setattr__(self, "limit", parse_bytes(self.limit, "Budget"))

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return False: a limit is no reason to keep a checkpoint or to let it go."""
        del checkpoint
        return False

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return nothing, see `considers`."""
        del checkpoints
        return {}

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return nothing, see `considers`."""
        del checkpoint
        return ""

    def exceeding(
        self,
        wanted: Sequence[Checkpoint],
        fixed: Sequence[Checkpoint],
        bytes_of: BytesOf | None,
    ) -> tuple[dict[Checkpoint, str], str | None]:
        """Return what goes, each with the reason, and what to say if the rest is still too much.

        Args:
            wanted: The checkpoints that may go, the most wanted first.
            fixed: Those that stay in any case; they count, too.
            bytes_of: How large checkpoints are, if the budget itself doesn't know.

        Raises:
            SelectionError: Nobody knows how large checkpoints are.
        """
        limit = int(self.limit)
        files = {ckpt.path: self._files(ckpt, bytes_of) for ckpt in (*wanted, *fixed)}
        sizes = {file: size for one in files.values() for file, size in one.items()}
        holders = Counter(file for one in files.values() for file in one)
        total = sum(sizes.values())
        over = f"{say_bytes(total - limit)} over the budget of {say_bytes(limit)}"
        gone: list[Checkpoint] = []
        for ckpt in reversed(wanted):
            if total <= limit:
                break
            gone.append(ckpt)
            for file in files[ckpt.path]:
                holders[file] -= 1
                total -= 0 if holders[file] else sizes[file]
        dropped = {
            ckpt: f"{over}, the least wanted"
            for ckpt in gone
            if any(not holders[file] and sizes[file] for file in files[ckpt.path])
        }
        if total <= limit:
            return dropped, None
        excess = f"{say_bytes(total - limit)} over the budget of {say_bytes(limit)}"
        return dropped, f"stays although the checkpoints are {excess}"

    def _files(self, checkpoint: Checkpoint, given: BytesOf | None) -> Mapping[Hashable, int]:
        source = given if self.bytes_of is None else self.bytes_of
        if source is None:
            raise SelectionError(
                f"Budget of {say_bytes(int(self.limit))} can't tell how large the checkpoint "
                f"{checkpoint.path} is: pass bytes_of to Budget or to plan_retention, a function "
                "of the checkpoint or a mapping from its path to a number of bytes."
            )
        if isinstance(source, Mapping):
            if checkpoint.path not in source:
                raise SelectionError(
                    f"Budget was given bytes_of as a mapping which lacks {checkpoint.path}: it "
                    "has to have the path of every checkpoint of the folder."
                )
            found = source[checkpoint.path]
        else:
            found = source(checkpoint)
        return {checkpoint.path: found} if isinstance(found, int) else found
