"""Checkpoints as a table that a person can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._views.columns import columns_of, metric_keys
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import Criterion, importance, newest_first, rank_checkpoints

__all__ = ["marks_of", "table"]


def table(
    checkpoints: Iterable[Checkpoint],
    *,
    min_key: str | None = None,
    max_key: str | None = None,
    keys: Sequence[str] | None = None,
    width: int | None = None,
    now: float | None = None,
    remarks: Mapping[Path, str] | None = None,
) -> str:
    """Return a table of checkpoints, newest first, the best and the newest marked.

    Args:
        checkpoints: The checkpoints, in any order.
        min_key: Mark the checkpoint with the lowest value of this key as the best.
        max_key: Mark the checkpoint with the highest value of this key as the best.
        keys: The meta keys to show; by default all that hold numbers.
        width: In characters; columns for which there is no room are left out, and a last line says
            which. By default as wide as the contents.
        now: In seconds since the epoch: show how long ago checkpoints were saved, and not when.
        remarks: A sentence beside each checkpoint, by its path.

    Returns:
        Lines of text.

    Raises:
        SelectionError: Both `min_key` and `max_key` were given.

    Example:
        >>> ckpt = Checkpoint(Path("CKPT+a"), {"unixtime": 0.0, "epoch": 3, "loss": 0.25}, {})
        >>> table([ckpt], min_key="loss").splitlines()[-1].split()[-3:]
        ['0.25', 'best,', 'newest']
    """
    # It imports rich, which is optional.
    from lightning_sbckpt._views.grid import ENDLESS, as_text

    criterion = importance(min_key=min_key, max_key=max_key)
    ckpts = newest_first(checkpoints)
    if not ckpts:
        return "no checkpoints"
    columns = columns_of(
        ckpts,
        metrics=list(keys) if keys is not None else metric_keys(ckpts, None),
        marks=marks_of(ckpts, criterion),
        now=now,
        end_of_epoch=now is None,
    )
    said = None if remarks is None else [printable(remarks.get(ckpt.path, "")) for ckpt in ckpts]
    return as_text(columns, width or ENDLESS, remarks=said)


def marks_of(checkpoints: Iterable[Checkpoint], criterion: Criterion) -> dict[Path, list[str]]:
    """Return the words that stand beside checkpoints: best, newest, pinned, ephemeral.

    Args:
        checkpoints: All checkpoints, in any order.
        criterion: Which is best; that by which the newest is marks none.

    Example:
        >>> marks_of([Checkpoint(Path("CKPT+a"), {"unixtime": 1.0}, {})], importance())
        {...Path('CKPT+a'): ['newest']}
    """
    ckpts = newest_first(checkpoints)
    # Without a key the best would be the newest, which is marked anyway.
    ranked = rank_checkpoints(ckpts, criterion, limit=1) if criterion.key is not None else []
    marks: dict[Path, list[str]] = {ckpt.path: ["best"] for ckpt in ranked}
    for ckpt in ckpts[:1]:
        marks.setdefault(ckpt.path, []).append("newest")
    for ckpt in ckpts:
        for word in ("pinned", "ephemeral"):
            if ckpt.meta.get(word):
                marks.setdefault(ckpt.path, []).append(word)
    return marks
