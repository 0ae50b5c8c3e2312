"""Checkpoints as a table that a person can read."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from lightning_sbckpt.errors import MissingDependencyError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.selection import importance, newest_first, rank_checkpoints

__all__ = ["table"]

_NO_METRICS = {"unixtime", "end-of-epoch", "epoch", "step", "global_step"}


def table(
    checkpoints: Iterable[Checkpoint],
    *,
    min_key: str | None = None,
    max_key: str | None = None,
    keys: Sequence[str] | None = None,
    width: int | None = None,
) -> str:
    """Return a table of checkpoints, newest first, the best and the newest marked.

    Args:
        checkpoints: The checkpoints, in any order.
        min_key: Mark the checkpoint with the lowest value of this key as the best.
        max_key: Mark the checkpoint with the highest value of this key as the best.
        keys: The meta keys to show; by default all that hold numbers.
        width: In characters; by default as wide as the contents.

    Returns:
        Lines of text.

    Raises:
        MissingDependencyError: The library rich is not installed.
        SelectionError: Both `min_key` and `max_key` were given.

    Example:
        >>> ckpt = Checkpoint(Path("CKPT+a"), {"unixtime": 0.0, "epoch": 3, "loss": 0.25}, {})
        >>> table([ckpt], min_key="loss").splitlines()[-1].split()[-3:]
        ['0.25', 'best,', 'newest']
    """
    rich_table, rich_box, rich_console = _rich()
    criterion = importance(min_key=min_key, max_key=max_key)
    ckpts = newest_first(checkpoints)
    if not ckpts:
        return "no checkpoints"
    metrics = list(keys) if keys is not None else _metric_keys(ckpts)
    # Without a key the best would be the newest, which is marked anyway.
    ranked = rank_checkpoints(ckpts, criterion, limit=1) if criterion.key is not None else []
    marks: dict[Path, list[str]] = {ckpt.path: ["best"] for ckpt in ranked}
    marks.setdefault(ckpts[0].path, []).append("newest")
    for ckpt in ckpts:
        if ckpt.meta.get("pinned"):
            marks.setdefault(ckpt.path, []).append("pinned")

    grid = rich_table.Table(box=rich_box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("name", no_wrap=True)
    grid.add_column("saved")
    for name in ("epoch", "step", "end of epoch", "size", *metrics):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for ckpt in ckpts:
        step = ckpt.meta.get("global_step", ckpt.meta.get("step"))
        grid.add_row(
            ckpt.path.name,
            _when(ckpt),
            _short(ckpt.meta.get("epoch")),
            _short(step),
            _short(ckpt.meta.get("end-of-epoch")),
            _size(ckpt),
            *(_short(ckpt.meta.get(key)) for key in metrics),
            ", ".join(marks.get(ckpt.path, [])),
        )
    out = io.StringIO()
    # Without markup and emoji: brackets and colons in names mean themselves.
    console = rich_console.Console(
        file=out,
        width=width or 10_000,
        no_color=True,
        markup=False,
        emoji=False,
        # The text is returned, in a notebook and in a terminal alike.
        force_jupyter=False,
        force_terminal=False,
    )
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


def _rich() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError as error:
        raise MissingDependencyError(
            "Cannot draw a table of checkpoints: the library rich is not installed. Install it "
            "with: pip install 'lightning-sbckpt[cli]'"
        ) from error
    return rich.table, rich.box, rich.console


def _metric_keys(checkpoints: Sequence[Checkpoint]) -> list[str]:
    found = {
        key: None
        for ckpt in checkpoints
        for key, value in ckpt.meta.items()
        if key not in _NO_METRICS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }
    return list(found)


def _when(checkpoint: Checkpoint) -> str:
    try:
        moment = time.localtime(ckpt_recency(checkpoint))
    except (OverflowError, ValueError, OSError):  # no time in the meta, or none there can be
        return "unknown"
    return time.strftime("%Y-%m-%d %H:%M:%S", moment)


def _size(checkpoint: Checkpoint) -> str:
    try:
        files = [file.stat() for file in checkpoint.path.rglob("*") if file.is_file()]
        if not checkpoint.path.is_dir():
            return "gone"  # removed since it was listed
    except OSError:
        return "gone"
    size = _bytes(sum(file.st_size for file in files))
    if all(file.st_nlink == 1 for file in files):
        return size
    # The others are shared with other checkpoints, and stay when this one goes.
    return f"{size}, {_bytes(sum(file.st_size for file in files if file.st_nlink == 1))} own"


def _bytes(count: int) -> str:
    size = float(count)
    units = iter(("B", "KB", "MB", "GB"))
    unit = next(units)
    while size >= 999.5:
        size, unit = size / 1000, next(units, "TB")
    return f"{size:.3g} {unit}"


def _short(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
