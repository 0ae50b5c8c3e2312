"""A folder of checkpoints as a person looks at it: what happened there, and the card of a notebook."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_sbckpt._display import cards
from lightning_sbckpt._layout.history import read_history
from lightning_sbckpt._layout.manifest import lineage_of
from lightning_sbckpt._views.timeline import Timeline, build_timeline
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import newest_first

logger = logging.getLogger("lightning_sbckpt")

_MOST_UNREADABLE = 5


def read_timeline(
    root: Path,
    look: Callable[[], tuple[Sequence[Checkpoint], Mapping[Path, str]]],
    *,
    with_lineage: bool,
) -> Timeline:
    """Return what happened to each checkpoint of a folder.

    Args:
        root: The folder.
        look: Returns the checkpoints that are there, and why some can't be read.
        with_lineage: Ask the manifests of those that the history doesn't tell of where their
            weights come from.
    """
    try:
        events = read_history(root)
    except OSError as error:
        logger.warning("going on without the history: %s", error)
        events = []
    # After the history: what is saved between the two is there, and not taken for gone.
    there, problems = look()
    unreadable = {path.name: why for path, why in problems.items()}
    return build_timeline(
        there, events, unreadable=unreadable, lineage_of=lineage_of if with_lineage else None
    )


def folder_card(title: str, root: Path, timeline: Timeline, remarks: Sequence[str] = ()) -> str:
    """Return the HTML that a notebook shows of a folder.

    Args:
        title: What it is.
        root: The folder.
        timeline: What happened there.
        remarks: Sentences below.
    """
    there = [life.checkpoint for life in timeline.lives if life.checkpoint is not None]
    unreadable = [life for life in timeline.lives if life.state == "unreadable"]
    said = [*remarks]
    said += [f"{life.name} can't be read: {life.reason}" for life in unreadable[:_MOST_UNREADABLE]]
    more = len(unreadable) - _MOST_UNREADABLE
    if more > 0:
        said.append(f"and {more:,} more can't be read")
    shown = timeline.metrics_of_those_there()
    return cards.folder_table(title, root, newest_first(there), shown, timeline.marks(), said)
