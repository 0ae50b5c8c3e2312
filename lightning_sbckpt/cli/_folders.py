"""Which folder and which checkpoint a word on the command line means, or one line on why none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from lightning_sbckpt._catalog.catalog import Catalog
from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._layout.manifest import lineage_of
from lightning_sbckpt._layout.publish import (
    CKPT_PREFIX,
    folder_names,
    is_checkpoint,
    read_checkpoint,
)
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.places import place_of, resolve_local
from lightning_sbckpt._remote.urls import is_url, local_path, normal_url
from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import NO, REFUSED, Failure, collected_warnings, echo
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention.noted import best_by, run_rules
from lightning_sbckpt.selection import Criterion, newest_first, rank_checkpoints
from lightning_sbckpt.verify import verify

# What a run leaves in its folder beside checkpoints: such a folder is ours, and may be empty yet.
_OURS = ("HISTORY.jsonl", ".lock", ".index.json", ".staging+", ".removed+", ".replaced+")
_MOST_LOOKED_INTO = 200


@dataclass(frozen=True)
class Folder:
    """A folder of checkpoints, open for reading: nothing in it is made or changed.

    Attributes:
        path: As it was given; of a URL, the local one.
        catalog: Looks into it.
        mirror: Of a URL, what brings here what is in the store.
        checkpoints: Those that can be read, newest first.
        remarks: What else was found, such as a checkpoint that can't be read; a line each.
    """

    path: Path
    # Not a Checkpointer, which can save and load, and imports torch for it.
    catalog: Catalog
    mirror: Mirror | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """What a person calls it: its URL, or its path."""
        return self.mirror.url if self.mirror is not None else str(self.path)

    def look(self, *, ask_store: bool = True) -> list[str]:
        """Bring `checkpoints` up to date, and return what can't be read."""
        with collected_warnings() as remarks:
            if ask_store and self.mirror is not None:
                self.mirror.refresh()
            self.checkpoints[:] = newest_first(self.catalog.checkpoints())
        return remarks

    def warn(self) -> None:
        """Print the remarks on stderr."""
        for remark in self.remarks:
            echo(f"Warning: {remark}", err=True)


def open_folder(path: str | Path) -> Folder:
    """Return a folder of checkpoints, or end the command in one line that says what is there."""
    named, path = name_of(path), resolve_local(path)
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_url(named):
            raise Failure(f"there are no checkpoints in {named}") from error
        what = "is no folder" if path.exists() else f"is not there{_close_path(path)}"
        raise Failure(f"{path} {what}: expected a folder of checkpoints") from error
    except OSError as error:
        raise Failure(f"{path} can't be read: {error.strerror or error}", REFUSED) from error
    if is_checkpoint(path):
        above = named.rpartition("/")[0] if is_url(named) else path.parent
        raise Failure(
            f"{named} is one checkpoint: expected the folder of all of them, {above}. To look "
            f"at one: lightning-sbckpt show {named}"
        )
    if names and not any(name.startswith((CKPT_PREFIX, *_OURS)) for name in names):
        raise Failure(f"there are no checkpoints in {path}{_runs_below(path, names)}")
    folder = Folder(path, Catalog(path, keep_index=False), place_of(path)[1])
    # Of a URL the store was asked when its local folder was looked for.
    folder.remarks[:] = folder.look(ask_store=not is_url(named))
    return folder


def name_of(path: str | Path) -> str:
    """Return what a user has named, as it was before it became a path."""
    return normal_url(path) if is_url(path) and local_path(path) is None else str(path)


def _close_path(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    return _meant([str(path.parent / name) for name in get_close_matches(path.name, names, n=1)])


def _runs_below(path: Path, names: Sequence[str]) -> str:
    below = [
        str(path / name) for name in sorted(names)[:_MOST_LOOKED_INTO] if _has_runs(path / name)
    ]
    return _meant(below[:3])


def _has_runs(path: Path) -> bool:
    try:
        return bool(folder_names(path))
    except OSError:
        return False


def _meant(names: Iterable[str]) -> str:
    found = " or ".join(names)
    return f" (did you mean {found}?)" if found else ""


def resolve(folder: Folder, which: str) -> Checkpoint:
    """Return the checkpoint that a word on the command line means.

    Args:
        folder: Where to look.
        which: The name of a checkpoint, its path, or one of the words `best` and `newest`: best is
            by the first rule `Best` that the run noted.
    """
    if which == "newest":
        if not folder.checkpoints:
            raise Failure(f"there are no checkpoints in {folder.shown}", NO)
        return folder.checkpoints[0]
    if which == "best":
        criterion = best_by(run_rules(folder.path).rules)
        if criterion is None:
            raise Failure(
                f"what is best in {folder.shown} is not known: no rule Best(...) was noted there. "
                "Name the checkpoint, or find it with: lightning-sbckpt best PATH --min-key KEY"
            )
        return best_of(folder, criterion)
    for name in (which, f"{CKPT_PREFIX}+{which}"):
        path = Path(name) if os.sep in name else folder.path / name
        if is_checkpoint(path):
            return read_one(path)
    names = [ckpt.path.name for ckpt in folder.checkpoints]
    close = get_close_matches(which, names, n=2)
    raise Failure(f"there is no checkpoint {which} in {folder.shown}{_meant(close)}")


def locate(path: str | Path) -> tuple[Folder, Checkpoint]:
    """Return the checkpoint at a path, and its folder; its last part may be `best` or `newest`."""
    named = name_of(path)
    if is_url(named):
        return _locate_in_store(named)
    path = resolve_local(path)
    if not is_checkpoint(path) and path.name not in ("best", "newest") and _has_runs(path):
        raise Failure(
            f"{path} is a folder of checkpoints: name one of them, such as {path / 'newest'}"
        )
    if is_checkpoint(path):
        # Absolute, since a checkpoint may be the working folder itself.
        return open_folder(path.parent), read_one(path)
    parent = open_folder(path.parent)
    return parent, resolve(parent, path.name)


def _locate_in_store(url: str) -> tuple[Folder, Checkpoint]:
    above, _, last = url.rpartition("/")
    if (
        last not in ("best", "newest")
        and not last.startswith(CKPT_PREFIX)
        and _has_runs(resolve_local(url))
    ):
        raise Failure(f"{url} is a folder of checkpoints: name one of them, such as {url}/newest")
    parent = open_folder(above)
    return parent, resolve(parent, last)


def read_one(path: Path) -> Checkpoint:
    """Return the record of a checkpoint; if its meta can't be read, that is the answer."""
    try:
        return read_checkpoint(path)
    except CheckpointNotFoundError:
        raise
    except MetaError as error:
        raise Failure(f"the checkpoint can't be read: {error}", NO) from error


def best_of(folder: Folder, criterion: Criterion, predicate: str | None = None) -> Checkpoint:
    """Return the best checkpoint, or end the command if there is none."""
    if criterion.key is not None:
        require_key(criterion.key, folder.checkpoints)
    found = next(
        of_newest_run(folder, rank_checkpoints(folder.checkpoints, criterion, predicate)), None
    )
    if found is None:
        raise Failure(f"no checkpoint in {folder.shown} is a candidate: {criterion.describe()}", NO)
    return found


def of_newest_run(folder: Folder, ranked: Iterable[Checkpoint]) -> Iterator[Checkpoint]:
    """Yield those of some checkpoints that no other run wrote than the one that saved last.

    Several runs may share a folder, and each has its own best. What no run wrote belongs to any.
    """
    noted = (lineage_of(ckpt).get("run") for ckpt in folder.checkpoints)
    run = next((one for one in noted if one is not None), None)
    for ckpt in ranked:
        if lineage_of(ckpt).get("run") in (None, run):
            yield ckpt


def first_sound(candidates: Iterable[Checkpoint], *, aloud: bool = False) -> Checkpoint | None:
    """Return the first checkpoint whose files are those that were written.

    Args:
        candidates: Are read one after the other; those removed meanwhile are passed over.
        aloud: Warn of each that is stepped over.
    """
    for ckpt in candidates:
        with ExitStack() as stack:
            try:
                found = verify(ckpt.path, on_progress=progress_bar(stack, "verifying"))
            except CheckpointNotFoundError:
                continue
        problems = [problem for one in found for problem in one.problems]
        if not problems:
            return ckpt
        if aloud:
            name, why = printable(ckpt.path.name), printable(problems[0])
            echo(f"Warning: stepped over {name}: {why}", err=True)
    return None


def require_key(key: str, checkpoints: Sequence[Checkpoint]) -> None:
    """End the command if no checkpoint has a key in its meta, and name those there are."""
    known = sorted({str(name) for ckpt in checkpoints for name in ckpt.meta})
    if checkpoints and key not in known:
        close = get_close_matches(key, known, n=1)
        raise Failure(
            f"no checkpoint has the key {key!r}{_meant(close)}; the keys are: {', '.join(known)}"
        )
