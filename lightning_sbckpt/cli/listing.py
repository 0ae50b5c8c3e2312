"""The command `ls`: the checkpoints of a folder as a table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lightning_sbckpt._display.wording import say_number, short_name
from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt._views.columns import (
    metric_keys,
    size_of,
    step_of,
)
from lightning_sbckpt._views.timeline import CheckpointHistory, build_timeline
from lightning_sbckpt.cli._common import counted, echo, json_option, print_json, printable
from lightning_sbckpt.cli._folders import Folder, open_folder, require_key
from lightning_sbckpt.cli._plan import Standing, chosen_rules, rule_options, standing
from lightning_sbckpt.cli._screen import listing_of, listing_of_gone
from lightning_sbckpt.expressions import as_predicate
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention import Decision
from lightning_sbckpt.retention.noted import events_of

__all__ = ["ls"]


@click.command()
@click.argument("path", default=".", type=click.Path(path_type=Path))
@click.option("--where", metavar="EXPR", help="Only those whose meta fits: 'val_acc > 0.9'.")
@click.option("--sort", metavar="KEY", help="By a key of the meta, or by age, name or size.")
@click.option("--desc", is_flag=True, help="Sort the other way round.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("-k", "--key", "keys", multiple=True, help="A key to show. May be given again.")
@click.option("--removed", is_flag=True, help="Those that are gone, and why.")
@rule_options
@json_option
def ls(
    path: Path,
    where: str | None,
    sort: str | None,
    desc: bool,
    limit: int | None,
    keys: tuple[str, ...],
    removed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """List the checkpoints in PATH, newest first, with what the rules say of each.

    The best is marked by the first rule Best(...): of the options, or of the run itself.
    """
    folder = open_folder(path)
    if removed:
        _list_removed(folder, limit, as_json)
        return
    found = standing(folder, chosen_rules(folder, **options))
    remarks = [*folder.remarks, *([found.remark] if found.remark else [])]
    for key in keys:
        require_key(key, folder.checkpoints)
    shown = _sorted(_fitting(folder, where), sort, descending=desc)[:limit]
    if as_json:
        print_json(
            {
                "folder": folder.shown,
                "checkpoints": [
                    _as_json(ckpt, found.marks.get(ckpt.path, []), found.decisions.get(ckpt.path))
                    for ckpt in shown
                ],
                "problems": remarks,
            }
        )
        return
    if not folder.checkpoints:
        echo(f"no checkpoints in {printable(folder.shown)}")
    elif not shown:
        echo(f"none of {counted(len(folder.checkpoints))} in {printable(folder.shown)} fits")
    else:
        metrics = keys or metric_keys(shown, found.criterion.key)
        listing_of(
            shown,
            metrics=metrics,
            marks=found.marks,
            decisions=found.decisions,
            note=_best_in_words(found, folder.checkpoints),
        ).show()
    if 0 < len(shown) < len(folder.checkpoints):
        echo(counted(len(shown), of=len(folder.checkpoints)))
    for remark in remarks:
        echo(printable(remark))


def _best_in_words(found: Standing, checkpoints: Sequence[Checkpoint]) -> str:
    key = found.criterion.key
    for ckpt in checkpoints:
        if key is not None and "best" in found.marks.get(ckpt.path, ()):
            by = f"{found.criterion.describe()}: {say_number(ckpt.meta[key])}"
            return f"best: {short_name(ckpt.path.name)}, {printable(by)}"
    return ""


def _fitting(folder: Folder, where: str | None) -> list[Checkpoint]:
    predicate = as_predicate(where, among=folder.checkpoints)
    return [ckpt for ckpt in folder.checkpoints if predicate is None or predicate(ckpt)]


def _sorted(
    checkpoints: Sequence[Checkpoint], sort: str | None, *, descending: bool
) -> list[Checkpoint]:
    """Return them sorted; those without the key last, either way."""
    if sort is None or sort == "age":
        # Newest first already, which is by age.
        return list(reversed(checkpoints) if descending else checkpoints)
    if sort not in ("name", "size"):
        require_key(sort, checkpoints)
    keyed = [(_sort_key(ckpt, sort), ckpt) for ckpt in checkpoints]
    having = [(key, ckpt) for key, ckpt in keyed if key is not None]
    having.sort(key=lambda pair: pair[0], reverse=descending)
    return [ckpt for _, ckpt in having] + [ckpt for key, ckpt in keyed if key is None]


def _sort_key(checkpoint: Checkpoint, sort: str) -> tuple[int, float, str] | None:
    value: object
    if sort == "name":
        value = checkpoint.path.name
    elif sort == "size":
        size = size_of(checkpoint)
        value = None if size is None else size.total
    else:
        value = checkpoint.meta.get(sort)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (int, float)):
        return (0, value, "")
    return (1, 0.0, str(value))


def _as_json(ckpt: Checkpoint, marks: Sequence[str], decision: Decision | None) -> object:
    size = size_of(ckpt)
    return {
        "name": ckpt.path.name,
        "path": display_path(ckpt.path),
        "unixtime": ckpt_recency(ckpt),
        "step": step_of(ckpt),
        "epoch": ckpt.meta.get("epoch"),
        "bytes": None if size is None else size.total,
        "own_bytes": None if size is None else size.own,
        "marks": list(marks),
        "stays": None if decision is None else decision.keep,
        "reason": None if decision is None else decision.reason,
        "meta": ckpt.meta,
    }


def _list_removed(folder: Folder, limit: int | None, as_json: bool) -> None:
    timeline = build_timeline(folder.checkpoints, events_of(folder.path))
    gone = [life for life in reversed(timeline.lives) if life.state in ("removed", "gone")]
    # One that can't be read is not gone.
    gone = [life for life in gone if not (folder.path / life.name).exists() or life.removed]
    gone.sort(key=lambda life: life.removed or life.made or 0.0, reverse=True)
    shown = gone[:limit]
    if as_json:
        print_json([_gone_as_json(life) for life in shown])
    elif not timeline.has_history:
        echo(f"what was removed from {folder.shown} is not known: it has no HISTORY.jsonl")
    elif not shown:
        echo(f"nothing was removed from {printable(folder.shown)}")
    else:
        listing_of_gone(shown, now=time.time()).show()
        if len(shown) < len(gone):
            echo(f"{counted(len(shown), of=len(gone))} that are gone")


def _gone_as_json(life: CheckpointHistory) -> object:
    return {
        "name": life.name,
        "saved": life.made,
        "removed": life.removed,
        "reason": life.reason or None,
        "bytes": life.size,
        "meta": dict(life.meta),
    }
