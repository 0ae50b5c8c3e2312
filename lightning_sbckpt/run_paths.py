"""Paths that mean a checkpoint of a run: `run/best`, `run/newest`, and the folder `run` itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt._layout.publish import folder_names, is_checkpoint
from lightning_sbckpt._remote.places import display_path, resolve_local
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt.errors import CheckpointNotFoundError
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention.noted import best_by, run_rules

__all__ = ["WORDS", "checkpoint_of_run", "folder_of", "means_run", "place_in_run", "resolved"]

logger = logging.getLogger("lightning_sbckpt")

T = TypeVar("T")

WORDS = ("best", "newest")
"""What may stand after the folder of a run."""


def means_run(path: object) -> bool:
    """Return whether a path is that of a run, or of its best or newest checkpoint.

    Of URLs only those that end in one of the words are: no store is asked about any other.

    Example:
        >>> means_run("runs/nowhere/best")
        False
    """
    return _run_of(path) is not None


def checkpoint_of_run(
    path: object,
    *,
    newest: bool = False,
    part: str | None = None,
    verified: Verified | None = None,
) -> tuple[Checkpoint, str]:
    """Return the sound checkpoint that the path of a run means, and why it is that one.

    Args:
        path: Of the folder of a run it is the best, if the run noted what is best, or the newest.
        newest: Of the folder of a run it is the newest.
        part: The name of a recoverable that it must have.
        verified: Gets the files that were read.

    Raises:
        CheckpointNotFoundError: No checkpoint there is sound, or it isn't known which is best.
    """
    run = _run_of(path)
    if run is None:
        raise CheckpointNotFoundError(f"{path} is no folder of checkpoints")
    root, word = run
    criterion = None
    if word == "best" or not (word or newest):
        criterion = best_by(run_rules(root).rules)
    if word == "best" and criterion is None:
        raise CheckpointNotFoundError(
            f"{path}: which checkpoint of {display_path(root)} is best is not known, since no rule "
            f"Best(...) was noted there. Give the checkpoint itself, or {display_path(root)}/newest"
        )
    key = None if criterion is None else criterion.key
    lowest = criterion is not None and criterion.lowest
    folder = CheckpointFolder(root, access="read")
    found = folder.find_sound_checkpoint(
        ckpt_predicate=None if part is None else lambda ckpt: part in ckpt.paramfiles,
        min_key=key if lowest else None,
        max_key=None if lowest else key,
    )
    if found is None:
        wanted = [] if part is None else [f"has {part!r}"]
        wanted += [] if criterion is None else [f"has the {criterion.describe()}"]
        which = f" that {' and '.join(wanted)}" if wanted else ""
        raise CheckpointNotFoundError(
            f"{path}: there is no sound checkpoint in {display_path(root)}{which}"
        )
    if verified is not None:
        verified.take(folder.verified)
    why = "the newest" if criterion is None else f"the best: {criterion.describe()}"
    return found, f"{path} means {found.path.name}, {why}"


def resolved(path: T, part: str | None = None, verified: Verified | None = None) -> T | Path | str:
    """Return the folder of the checkpoint that the path of a run means; any other path as it is.

    Of a URL it is the URL of the checkpoint: the mirror of another rank may lie elsewhere.

    Args:
        path: A path.
        part: The name of a recoverable that it must have.
        verified: Gets the files that were read.

    Example:
        >>> resolved("runs/digits/CKPT+a")
        'runs/digits/CKPT+a'
    """
    if not means_run(path):
        return path
    found, why = checkpoint_of_run(path, part=part, verified=verified)
    logger.info("%s", why)
    return place_in_run(path, found)


def place_in_run(path: object, found: Checkpoint) -> Path | str:
    """Return the URL of a checkpoint that was found by the URL of a run, or else its folder.

    Example:
        >>> place_in_run("run/best", Checkpoint(Path("run/CKPT+a"), {}, {})).name
        'CKPT+a'
    """
    return display_path(found.path) if is_url(path) else found.path


def folder_of(source: Checkpoint | str | os.PathLike[str], part: str | None = None) -> Path:
    """Return the local folder of a checkpoint, given by its record, a path, a URL, or that of a run.

    Args:
        source: The checkpoint.
        part: Of a run, the name of a recoverable that it must have.

    Raises:
        CheckpointNotFoundError: A run has no sound checkpoint, or it isn't known which is best.
        RemoteError: The store of a URL can't be asked.

    Example:
        >>> folder_of("runs/digits/CKPT+a").name
        'CKPT+a'
    """
    if isinstance(source, (str, os.PathLike)):
        return resolve_local(resolved(source, part))
    # SpeechBrain's record has one, too.
    return Path(source.path)


def _run_of(path: object) -> tuple[Path, str] | None:
    """Return the folder of a run and the word after it, if a path is of that form."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    if is_url(path):
        above, _, word = os.fspath(path).rstrip("/").rpartition("/")
        root = resolve_local(above) if word in WORDS else None
        return (root, word) if root is not None and folder_names(root) else None
    place = Path(path)
    if is_checkpoint(place):
        return None
    if place.is_dir():
        return (place, "") if folder_names(place) else None
    if place.name in WORDS and place.parent.is_dir() and folder_names(place.parent):
        return place.parent, place.name
    return None
