"""HTML for notebooks: a checkpoint as a card, a folder as a table.

Whatever stands in names and meta is escaped. It has no colours of its own beyond shades of the text
around it, so that it reads on light and on dark, and a reader that drops the style shows plain tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sbckpt._display.wording import (
    say_duration,
    say_number,
    say_size,
    say_text,
    say_when,
    short_name,
)
from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.records import remote_files

if TYPE_CHECKING:
    from lightning_sbckpt.meta import Checkpoint

ROWS = 50
_MANIFEST_NAME = "MANIFEST.yaml"
_MANIFEST_BYTES = 2**20
_METRICS = 8
_LONGEST_CELL = 24

_STYLE = (
    "<style>.sbckpt{font-size:.9em;line-height:1.45}"
    ".sbckpt table{border-collapse:collapse;margin:.4em 0;color:inherit}"
    ".sbckpt th,.sbckpt td{padding:.15em .8em .15em 0;text-align:left;vertical-align:top;"
    "border-bottom:1px solid rgba(128,128,128,.25)}"
    ".sbckpt .w{white-space:nowrap}"
    ".sbckpt .n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    ".sbckpt .q{opacity:.65}"
    ".sbckpt .b{font-weight:600}</style>"
)


def checkpoint_card(
    checkpoint: Checkpoint, parse_yaml: Callable[[bytes, Path], Mapping[str, object]]
) -> str:
    """Return a card of one checkpoint: meta, files, sizes, lineage.

    Args:
        checkpoint: The checkpoint.
        parse_yaml: How to read its manifest.
    """
    path, meta = checkpoint.path, checkpoint.meta
    parts = [_heading(path.name, str(path.parent))]
    try:
        manifest = _manifest(path, parse_yaml)
        files = _files(path, manifest.get("files"))
    except FileNotFoundError:
        manifest, files = {}, _said(f"{path} is not there (any more): only its meta is known")
    except Exception as error:  # A card that can't be drawn must not hide the value behind it.
        manifest, files = {}, _said(f"{path} can't be read: {error}")
    parts.append(_rows((key, say_number(value)) for key, value in _readable(meta)))
    parts.append(files)
    lineage = manifest.get("lineage")
    if isinstance(lineage, dict):
        known = [(key, say_number(value)) for key, value in lineage.items() if value is not None]
        parts.append(_rows(known, "lineage"))
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        written = ", ".join(f"{key} {value}" for key, value in versions.items())
        parts.append(_said(f"written with {written}"))
    return _framed(parts)


def folder_table(
    title: str,
    root: Path,
    checkpoints: Sequence[Checkpoint],
    metrics: Sequence[str],
    marks: Mapping[Path, Sequence[str]],
    remarks: Sequence[str] = (),
) -> str:
    """Return a table of the newest checkpoints of a folder.

    Args:
        title: What it is.
        root: The folder.
        checkpoints: All that there are, newest first.
        metrics: The keys of the meta to show, the most important first.
        marks: Words about some of them.
        remarks: Sentences below.
    """
    count = len(checkpoints)
    counted = f"{count:,} checkpoint{'' if count == 1 else 's'}" if count else "no checkpoints yet"
    parts = [_heading(title, str(root)), f"<div>{counted}</div>"]
    shown = checkpoints[:ROWS]
    keys = list(metrics)[:_METRICS]
    step = "global_step" if any("global_step" in ckpt.meta for ckpt in shown) else "step"
    if shown:
        places = [key for key in (step, "epoch") if any(key in ckpt.meta for ckpt in shown)]
        head = ["name", *(key.rpartition("_")[2] for key in places), "age", "size", *keys, ""]
        cells = "".join(
            f"<th{_NUMBER if 0 < place < len(head) - 1 else ''}>{_safe(name)}</th>"
            for place, name in enumerate(head)
        )
        body = "".join(_row(ckpt, places, keys, marks.get(ckpt.path, ())) for ckpt in shown)
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
    if count > len(shown):
        parts.append(_said(f"and {count - len(shown):,} more, older than these"))
    if len(metrics) > len(keys):
        more = ", ".join(metrics[_METRICS : _METRICS + 12])
        parts.append(_said(f"not shown: {more}{', …' if len(metrics) > _METRICS + 12 else ''}"))
    parts += [_said(remark) for remark in remarks]
    return _framed(parts)


def tables_card(
    title: str,
    where: object,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]],
    remarks: Sequence[str] = (),
) -> str:
    """Return a card of tables.

    Args:
        title: What it is.
        where: Stands below it.
        tables: Of each a title, the head, and rows; of many rows the first are shown.
        remarks: Sentences below.
    """
    parts = [_heading(title, say_text(where))]
    for name, head, rows in tables:
        cells = "".join(f"<th>{_safe(each)}</th>" for each in head)
        body = "".join(
            f"<tr>{''.join(f'<td>{_safe(say_number(cell))}</td>' for cell in row)}</tr>"
            for row in rows[:ROWS]
        )
        parts.append(f'<div class="b">{_safe(name)}</div>' if name else "")
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        if len(rows) > ROWS:
            parts.append(_said(f"and {len(rows) - ROWS:,} more"))
    return _framed([*parts, *map(_said, remarks)])


def shown(title: str, where: object, card: Callable[[], str]) -> str:
    """Return a card, or one that says why there is none: a notebook would show a traceback.

    Args:
        title: What it is.
        where: Stands below it.
        card: Makes it.
    """
    try:
        return card()
    except Exception as error:
        problem = f"{type(error).__name__}: {say_text(error, 500)}"
        return _framed([_heading(title, say_text(where)), _said(f"can't be shown: {problem}")])


_NUMBER = ' class="n"'


def _row(
    checkpoint: Checkpoint, places: Sequence[str], keys: Sequence[str], marks: Sequence[str]
) -> str:
    meta = checkpoint.meta
    values = [
        *(say_number(meta.get(place)) for place in places),
        _age(meta.get("unixtime")),
        _size(checkpoint.path),
        *(say_number(meta.get(key)) for key in keys),
    ]
    cells = "".join(f"<td{_NUMBER}>{_safe(value, _LONGEST_CELL)}</td>" for value in values)
    name = _safe(short_name(checkpoint.path.name), 80)
    return f'<tr><td class="w">{name}</td>{cells}<td class="b">{_safe(", ".join(marks))}</td></tr>'


def _files(path: Path, described: object) -> str:
    """Return a table of the files, and what is said of those that are not as they were written."""
    found = {
        str(file.relative_to(path)): file.lstat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }
    found |= remote_files(path)
    if not path.is_dir():
        raise FileNotFoundError(path)
    written = described if isinstance(described, dict) else {}
    rows = []
    for name in sorted({*found, *map(str, written)}):
        fields = written.get(name)
        size = fields.get("size") if isinstance(fields, dict) else None
        said = say_size(found[name]) if name in found else "missing"
        if name in found and isinstance(size, int) and size != found[name]:
            said += f", but {size:,} bytes were written"
        rows.append((name, said))
    rows.append(("together", say_size(sum(found.values()))))
    return _rows(rows, "files")


def _manifest(
    path: Path, parse_yaml: Callable[[bytes, Path], Mapping[str, object]]
) -> Mapping[str, object]:
    file = path / _MANIFEST_NAME
    try:
        data = read_regular(file, _MANIFEST_BYTES)
    except FileNotFoundError:
        return {}  # SpeechBrain's have none.
    return parse_yaml(data, file)


def _readable(meta: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    for key, value in meta.items():
        if key == "unixtime" and (age := _age(value)) != "unknown":
            yield "saved", f"{say_when(value)} ({age} ago)"
        else:
            yield key, value


def _age(unixtime: object) -> str:
    if isinstance(unixtime, bool) or not isinstance(unixtime, (int, float)):
        return "unknown"
    try:
        return say_duration(max(1, round(time.time() - unixtime)))
    except (OverflowError, ValueError):  # Not finite, or beyond all numbers.
        return "unknown"


def _size(folder: Path) -> str:
    try:
        with os.scandir(folder) as entries:
            here = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        return say_size(here + sum(remote_files(folder).values()))
    except OSError:
        return "gone"


def _rows(pairs: Iterable[tuple[str, str]], title: str = "") -> str:
    body = "".join(
        f'<tr><td class="q">{_safe(key)}</td><td>{_safe(value)}</td></tr>' for key, value in pairs
    )
    head = f'<div class="b">{_safe(title)}</div>' if title else ""
    return f"{head}<table><tbody>{body}</tbody></table>" if body else ""


def _heading(title: str, where: str) -> str:
    place = f'<div class="q">{_safe(where)}</div>'
    return f'<div><span class="b">{_safe(title)}</span>{place}</div>'


def _said(sentence: str) -> str:
    return f'<div class="q">{_safe(sentence)}</div>'


def _framed(parts: Iterable[str]) -> str:
    return f'<div class="sbckpt">{_STYLE}{"".join(parts)}</div>'


def _safe(text: object, longest: int = 500) -> str:
    return escape(say_text(text, longest))
