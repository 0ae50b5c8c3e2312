"""A difference of two checkpoints, as lines that a person reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_sbckpt._display.wording import MACHINERY, by_interest, printable
from lightning_sbckpt.difference import Difference, FileDifference, TensorChange


def lines_of(found: Difference, top: int, *, in_full: bool) -> list[str]:
    """Return the lines.

    Args:
        found: What differs.
        top: How many of the largest changes are listed.
        in_full: List those in the machinery of a run, too.
    """
    lines = [f"A  {found.before}", f"B  {found.after}"]
    lines += [f"  meta {one.name}: {one.before} -> {one.after}" for one in found.meta_changed]
    lines += [f"  meta {key}: only in A" for key in found.meta_missing]
    lines += [f"  meta {key}: only in B" for key in found.meta_added]
    lines += [f"{name}: only in A" for name in found.files_missing]
    lines += [f"{name}: only in B" for name in found.files_added]
    of_file: dict[str, list[TensorChange]] = {}
    for name, change in found.largest_changes():
        of_file.setdefault(name, []).append(change)
    for file in sorted(found.files, key=lambda file: by_interest(file.name)):
        if file.name in MACHINERY and not in_full and not file.equal:
            lines.append(f"{_of_file(file, (), 0)[0]} (more: --name {printable(file.name)})")
        else:
            lines += _of_file(file, of_file.get(file.name, ()), top)
    lines.append("equal" if found.equal else "different")
    return lines


def _of_file(file: FileDifference, changes: Sequence[TensorChange], top: int) -> list[str]:
    lines = [f"{file.name}: {file.summary()}"]
    if changes and top:
        lines += [f"  {row}" for row in _table(changes[:top])]
    if len(changes) > top:
        lines.append(f"  ... and {len(changes) - top} more tensors that changed less")
    lines += _some([f"{one.name}: {one.before} -> {one.after}" for one in file.reshaped], top)
    lines += _some([f"{name}: only in A" for name in file.missing], top)
    lines += _some([f"{name}: only in B" for name in file.added], top)
    values = [f"{one.name or 'its contents'}: {one.before} -> {one.after}" for one in file.values]
    return [*lines, *_some(values, top), *_some(list(file.not_compared), top)]


def _some(texts: Sequence[str], most: int) -> list[str]:
    lines = [f"  {text}" for text in texts[:most]]
    return [*lines, f"  ... and {len(texts) - most} more"] if len(texts) > most else lines


def _table(changes: Sequence[TensorChange]) -> list[str]:
    rows = [("tensor", "shape", "changed", "largest", "relative")]
    for one in changes:
        shape = "x".join(map(str, one.shape)) or "()"
        share = f"{100 * one.changed / one.elements:.3g}%"
        rows.append(
            (
                one.name,
                f"{shape} {one.dtype}",
                share,
                f"{one.largest:.3g}",
                _relative(one),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _relative(change: TensorChange) -> str:
    if math.isinf(change.relative):
        return "was zero"
    return f"{change.relative:.3g}"
