"""One page of HTML about a folder of checkpoints, complete in itself: nothing is loaded from a network.

It has a table that sorts, the picture of `Checkpointer.plot()`, each checkpoint as a bar from when it
was made to when it was removed, what is on the disk, which run went on from where, the rules, and what
is damaged.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_sbckpt._display.wording import say_text, say_when, short_name
from lightning_sbckpt._io.progress import Progress, Tally
from lightning_sbckpt._io.records import bring_file
from lightning_sbckpt._layout.manifest import file_damage, find_damage, read_manifest
from lightning_sbckpt._layout.sizes import checkpoint_bytes
from lightning_sbckpt._remote.places import display_path, resolve_local
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt._views.report_view import make_page
from lightning_sbckpt._views.timeline import Timeline
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    MetaError,
    MissingDependencyError,
    SBCheckpointError,
)
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.meta import Checkpoint, read_meta
from lightning_sbckpt.plotting import chosen_keys, svg_for_page, write_page

__all__ = ["report"]


def report(
    root: str | Path,
    path: str | Path | None = None,
    *,
    key: str | Sequence[str] | None = None,
    min_key: str | None = None,
    max_key: str | None = None,
    verify: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Write a page of HTML about a folder of checkpoints.

    Nothing in the folder is changed. Without matplotlib the page has no picture, and says so.

    Args:
        root: The folder of all checkpoints, or its URL.
        path: The file to write; by default `report.html` in the folder; of a URL, where we are.
        key: The metric to draw, or several; see `Checkpointer.plot`.
        min_key: A metric whose lowest value is to be marked as the best.
        max_key: A metric whose highest value is to be marked as the best.
        verify: Read every byte of what is there to find damage, instead of looking at presence and
            size of the files.
        on_progress: Called now and then with the bytes verified so far and all bytes there are.

    Returns:
        The file that was written.

    Raises:
        CheckpointNotFoundError: `root` is no folder.
        SelectionError: No checkpoint has a number under such a key.
        SaveError: The page can't be written.

    Example:
        >>> import tempfile
        >>> from lightning_sbckpt import Checkpointer
        >>> checkpointer = Checkpointer(tempfile.mkdtemp())
        >>> for loss in (0.5, 0.25, 0.75):
        ...     checkpointer.save_and_keep_only({"loss": loss}, min_keys=["loss"])
        >>> report(checkpointer.checkpoints_dir).name
        'report.html'
    """
    folder = resolve_local(root)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointNotFoundError(
            f"There is no report on {folder}: expected the folder of all checkpoints of a run, found "
            f"{found}. Name the folder that holds the CKPT+... folders"
        )
    timeline = CheckpointFolder(folder, access="read").timeline()
    shown = display_path(folder.absolute())
    beside = Path() if is_url(root) else folder
    target = Path(path) if path is not None else beside / "report.html"
    keys, modes = chosen_keys(timeline, key, min_key=min_key, max_key=max_key)
    there = [life.checkpoint for life in timeline.lives if life.checkpoint is not None]
    sizes = {ckpt.path.name: checkpoint_bytes(ckpt) for ckpt in there}
    tally = Tally(
        on_progress if verify else None, sum(sum(each.values()) for each in sizes.values())
    )
    damage = {}
    for ckpt in there:
        with tally.part(sum(sizes[ckpt.path.name].values())):
            damage[ckpt.path.name] = _damage(ckpt, verify=verify)
    page = make_page(
        timeline,
        title=shown.rpartition("/")[2],
        where=shown,
        keys=keys,
        modes=modes,
        sizes=sizes,
        damage={name: wrong for name, wrong in damage.items() if wrong},
        hyperparameters_of=_hyperparameters,
    )
    template = (files("lightning_sbckpt._views") / "report.html.jinja").read_text(encoding="utf-8")
    script = (files("lightning_sbckpt._views") / "report.js").read_text(encoding="utf-8")
    picture, no_picture = _picture(timeline, keys, modes)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["tidy"] = lambda name: say_text(short_name(name))
    text = environment.from_string(template).render(
        page=page,
        picture=picture,
        no_picture=no_picture,
        script=Markup(script),  # noqa: S704 - a file of this package
        # The only script that a browser runs on this page, whatever stands in names and meta.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        now=say_when(time.time()),
        verified=verify,
    )
    return write_page(target, text.encode(), "report")


def _hyperparameters(checkpoint: Checkpoint) -> Mapping[str, object]:
    file = checkpoint.path / "hparams.yaml"
    try:
        bring_file(file)
        return read_meta(file)
    except (SBCheckpointError, OSError):
        return {}  # A plain loop has none; and what can't be read is no loss for a page.


def _picture(
    timeline: Timeline, keys: Sequence[str], modes: Mapping[str, Literal["min", "max"]]
) -> tuple[Markup, str]:
    """Return the picture, or why there is none."""
    try:
        # matplotlib has escaped what it was given.
        return Markup(svg_for_page(timeline, keys, modes)), ""  # noqa: S704
    except MissingDependencyError as error:
        return Markup(), str(error)


def _damage(checkpoint: Checkpoint, *, verify: bool) -> Sequence[str]:
    if verify:
        return find_damage(checkpoint.path)
    try:
        manifest = read_manifest(checkpoint.path)
    except (MetaError, OSError) as error:
        return [str(error)]
    described = manifest.files if manifest is not None else {}
    found = (file_damage(checkpoint.path, name, described[name], None) for name in described)
    return [problem for problem in found if problem is not None]
