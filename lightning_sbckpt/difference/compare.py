"""Two checkpoints compared: meta, files, and every tensor in them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from lightning_sbckpt._display.wording import MACHINERY, by_interest
from lightning_sbckpt._format.names import pickled_path
from lightning_sbckpt._io.progress import Progress
from lightning_sbckpt._io.records import bring_file
from lightning_sbckpt._layout.manifest import Manifest, read_manifest
from lightning_sbckpt.difference.files import (
    FileDifference,
    Selected,
    TensorChange,
    ValueChange,
    changed_value,
    compare_files,
    path_size,
)
from lightning_sbckpt.errors import MetaError, MismatchError
from lightning_sbckpt.meta import Checkpoint

__all__ = ["Difference", "diff"]

# When it was saved says nothing about what was saved.
_NO_DIFFERENCE = ("unixtime",)


@dataclass(frozen=True)
class Difference:
    """What differs from one checkpoint to another.

    Attributes:
        before: The folder of the first checkpoint.
        after: The folder of the second.
        meta_changed: Meta keys whose values differ.
        meta_added: Meta keys that only the second has.
        meta_missing: Meta keys that only the first has.
        files_added: Names of recoverables that only the second has.
        files_missing: Names of recoverables that only the first has.
        files: What was found in the files that both have.

    Example:
        >>> Difference(Path("a"), Path("b"), files_added=("ema",)).equal
        False
    """

    before: Path
    after: Path
    meta_changed: tuple[ValueChange, ...] = ()
    meta_added: tuple[str, ...] = ()
    meta_missing: tuple[str, ...] = ()
    files_added: tuple[str, ...] = ()
    files_missing: tuple[str, ...] = ()
    files: tuple[FileDifference, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs but the time at which they were saved.

        Example:
            >>> Difference(Path("a"), Path("b")).equal
            True
        """
        meta = [change for change in self.meta_changed if change.name not in _NO_DIFFERENCE]
        keys = (*self.meta_added, *self.meta_missing)
        files = (*self.files_added, *self.files_missing)
        return not (meta or keys or files) and all(file.equal for file in self.files)

    def largest_changes(self, count: int | None = None) -> list[tuple[str, TensorChange]]:
        """Return the tensors that changed most, relative to what they were, each with its file.

        Args:
            count: How many; by default all.

        Example:
            >>> Difference(Path("a"), Path("b")).largest_changes()
            []
        """
        changes = [(file.name, change) for file in self.files for change in file.changed]
        # NaN first: it is what one looks for.
        changes.sort(
            key=lambda pair: math.inf if math.isnan(pair[1].relative) else pair[1].relative,
            reverse=True,
        )
        return changes[:count]

    def _repr_html_(self) -> str:
        from lightning_sbckpt._display import cards

        title, where = "equal" if self.equal else "different", f"{self.before} and {self.after}"
        files = sorted(self.files, key=lambda file: by_interest(file.name))
        summary: list[Sequence[object]] = [(file.name, file.summary()) for file in files]
        summary += [(name, "only in B") for name in self.files_added]
        summary += [(name, "only in A") for name in self.files_missing]
        meta: list[Sequence[object]]
        meta = [(one.name, one.before, one.after) for one in self.meta_changed]
        meta += [(key, "", "only in B") for key in self.meta_added]
        meta += [(key, "only in A", "") for key in self.meta_missing]
        changes: list[Sequence[object]] = [
            (file, one.name, f"{one.changed:,} of {one.elements:,}", one.largest, one.relative)
            for file, one in sorted(self.largest_changes(), key=lambda pair: by_interest(pair[0]))
            if file not in MACHINERY
        ]
        tables = [
            ("", ("file", "what differs"), summary),
            ("meta", ("", "A", "B"), meta),
            ("tensors", ("file", "tensor", "changed", "largest", "relative"), changes),
        ]
        return cards.shown(
            title,
            where,
            lambda: cards.tables_card(title, where, [each for each in tables if each[2]]),
        )

    def as_dict(self) -> dict[str, object]:
        """Return all of it in what JSON can hold; NaN and infinity as text.

        Example:
            >>> Difference(Path("a"), Path("b")).as_dict()["equal"]
            True
        """
        return {"equal": self.equal, **cast("dict[str, object]", _plain(asdict(self)))}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    names: Collection[str] | None = None,
    keys: str | None = None,
    on_progress: Progress | None = None,
) -> Difference:
    """Compare two checkpoints, without ever having more than a piece of a tensor in memory.

    Files that the two manifests give one checksum are the same and are not read. Of the others only
    tensors and plain values are read, whatever is trusted; what that can't tell is named in
    `not_compared`. NaN is equal to NaN at the same place. Nothing is verified.

    Args:
        a: The first.
        b: The second; what only it has was "added".
        names: Compare only the files of these recoverables, and no meta.
        keys: Compare only the tensors and values whose name, or `file/name`, fits this pattern,
            such as `"encoder.*"`, and no meta.
        on_progress: Called now and then with the bytes read so far and all bytes there are to read.

    Returns:
        What differs.

    Raises:
        MismatchError: Neither checkpoint has a recoverable that `names` asks for.
        OSError: A file can't be read.

    Example:
        >>> import tempfile, torch
        >>> from lightning_sbckpt import Checkpointer
        >>> model = torch.nn.Linear(2, 1)
        >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": model})
        >>> first = checkpointer.save_checkpoint()
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(0.5)
        >>> found = diff(first, checkpointer.save_checkpoint())
        >>> [(change.name, round(change.largest, 4)) for change in found.files[0].changed]
        [('bias', 0.5)]
    """
    _require_names(a, b, names)
    wanted = [
        name
        for name in dict.fromkeys([*a.paramfiles, *b.paramfiles])
        if names is None or name in names
    ]
    both = [name for name in wanted if name in a.paramfiles and name in b.paramfiles]
    manifests = (_manifest(a), _manifest(b))
    same = {name for name in both if _same_in_manifests(a.paramfiles[name].name, *manifests)}
    for name in both:
        for each in (a, b) if name not in same else ():
            bring_file(each.paramfiles[name], pickled_path(each.paramfiles[name]))
    sizes = {
        name: path_size(a.paramfiles[name]) + path_size(b.paramfiles[name])
        for name in both
        if name not in same
    }
    done, total = 0, sum(sizes.values())

    def tell(count: int) -> None:
        if on_progress is not None:
            on_progress(min(done + count, total), total)

    files = []
    for name in both:
        if name in same:
            files.append(FileDifference(name, same_bytes=True))
            continue
        selected = Selected(name, keys)
        files.append(compare_files(a.paramfiles[name], b.paramfiles[name], selected, tell))
        done += sizes[name]
        tell(0)
    old, new = (a.meta, b.meta) if names is None and keys is None else ({}, {})
    meta = [changed_value(key, old[key], new[key]) for key in old if key in new]
    return Difference(
        before=a.path,
        after=b.path,
        meta_changed=tuple(change for change in meta if change is not None),
        meta_added=tuple(key for key in new if key not in old),
        meta_missing=tuple(key for key in old if key not in new),
        files_added=tuple(name for name in wanted if name not in a.paramfiles),
        files_missing=tuple(name for name in wanted if name not in b.paramfiles),
        files=tuple(files),
    )


def _require_names(a: Checkpoint, b: Checkpoint, names: Collection[str] | None) -> None:
    unknown = [name for name in names or () if name not in {*a.paramfiles, *b.paramfiles}]
    if unknown:
        raise MismatchError(
            f"can't compare {', '.join(map(repr, unknown))}: neither checkpoint has such a file. "
            f"{a.path} has {', '.join(a.paramfiles) or 'none'}; {b.path} has "
            f"{', '.join(b.paramfiles) or 'none'}"
        )


def _manifest(checkpoint: Checkpoint) -> Manifest | None:
    try:
        return read_manifest(checkpoint.path)
    except (MetaError, OSError):
        return None  # Then every file is read.


def _same_in_manifests(filename: str, a: Manifest | None, b: Manifest | None) -> bool:
    if a is None or b is None or filename not in a.files:
        return False
    # What only pickle can hold lies beside the file, under a name of the same beginning.
    stem = filename.rpartition(".")[0]
    return _described(stem, a.files) == _described(stem, b.files)


def _described(stem: str, files: Mapping[str, object]) -> dict[str, object]:
    return {
        name: found for name, found in files.items() if name.startswith((f"{stem}.", f"{stem}+"))
    }


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
