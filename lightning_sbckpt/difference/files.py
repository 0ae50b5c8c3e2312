"""What differs between two files of one recoverable."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

import torch

from lightning_sbckpt._format.index import Stored
from lightning_sbckpt._format.names import pickled_path
from lightning_sbckpt._io.inside import open_folder_at
from lightning_sbckpt._io.open_regular import open_to_read
from lightning_sbckpt.difference.numbers import Tally, can_compute, same_bytes
from lightning_sbckpt.difference.states import SavedState, is_tensor, pieces, shape_of
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError

_CHUNK = 2**20
_LONGEST = 80

Place = tuple[object, ...]


@dataclass(frozen=True)
class ValueChange:
    """A value that is no tensor, or no longer the same: how it was written and how it is now.

    Attributes:
        name: Where it is.
        before: The value in the first checkpoint, as text, shortened.
        after: The value in the second.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class FormChange:
    """A tensor whose shape or type is another.

    Attributes:
        name: Where it is.
        before: Type and shape in the first checkpoint.
        after: Type and shape in the second.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class TensorChange:
    """A tensor of the same shape and type with other values.

    Attributes:
        name: Where it is.
        shape: Its shape.
        dtype: Its type, without `torch.`.
        elements: How many elements it has.
        changed: How many of them differ.
        largest: The largest absolute change; NaN where a number has become NaN, or the reverse.
        relative: The norm of the change over the norm of what was there before.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    changed: int
    largest: float
    relative: float


@dataclass(frozen=True)
class FileDifference:
    """What differs between the two files of one recoverable.

    Attributes:
        name: Of the recoverable.
        same_bytes: Whether the files are the same to the byte; then nothing in them was looked at.
        added: Names of tensors and values that only the second file has.
        missing: Names of those that only the first has.
        reshaped: Tensors of another shape or type.
        changed: Tensors with other values.
        values: Other values that differ.
        not_compared: What could not be compared, a sentence each; it may differ.
        equal_tensors: How many tensors are equal.
    """

    name: str
    same_bytes: bool = False
    added: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reshaped: tuple[FormChange, ...] = ()
    changed: tuple[TensorChange, ...] = ()
    values: tuple[ValueChange, ...] = ()
    not_compared: tuple[str, ...] = ()
    equal_tensors: int = 0

    def summary(self) -> str:
        """Return in a few words how much differs.

        Example:
            >>> FileDifference("model", added=("w",), equal_tensors=2).summary()
            '1 only in B, 2 tensors equal'
        """
        counts = {
            "changed": len(self.changed),
            "of another shape or type": len(self.reshaped),
            "only in A": len(self.missing),
            "only in B": len(self.added),
            "other values changed": len(self.values),
            "not compared": len(self.not_compared),
            "tensors equal": self.equal_tensors,
        }
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return "same bytes" if self.same_bytes else said or "nothing to compare"

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs, and nothing was left out."""
        found = (self.added, self.missing, self.reshaped, self.changed, self.values)
        return not any(found) and not self.not_compared


@dataclass(frozen=True)
class Selected:
    """The recoverable that is looked at, and which of its names.

    Attributes:
        name: Of the recoverable.
        pattern: Of the names, or None for all.
    """

    name: str
    pattern: str | None

    def has(self, place: Place) -> bool:
        """Return whether what is at a place is looked at."""
        if self.pattern is None:
            return True
        name = spell(place)
        return fnmatchcase(name, self.pattern) or fnmatchcase(f"{self.name}/{name}", self.pattern)


@dataclass
class _Found:
    """What has been found so far."""

    reshaped: list[FormChange] = field(default_factory=list)
    changed: list[TensorChange] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    equal_tensors: int = 0


def spell(place: Place) -> str:
    """Return a place in a state as text, such as `state/0/exp_avg`."""
    return "/".join(map(str, place))


def path_size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in _files(path).values())


def compare_files(
    before: Path, after: Path, selected: Selected, tell: Callable[[int], object]
) -> FileDifference:
    """Compare two files.

    Args:
        before: The first.
        after: The second.
        selected: What is looked at.
        tell: Called with the number of bytes read so far.
    """
    name = selected.name
    if before.is_dir() or after.is_dir():
        if _same_files(before, after):
            return FileDifference(name, same_bytes=True)
        return FileDifference(name, not_compared=("it is a folder, with other bytes in it",))
    try:
        with closing(SavedState(before)) as a, closing(SavedState(after)) as b:
            found = _compare_states(a, b, selected, tell)
            places = [[place for place in state.leaves if selected.has(place)] for state in (a, b)]
            added = [spell(place) for place in places[1] if place not in a.leaves]
            missing = [spell(place) for place in places[0] if place not in b.leaves]
    except (UntrustedPickleError, DamagedCheckpointError) as error:
        return _compare_bytes(before, after, name, str(error))
    beside = pickled_path(before), pickled_path(after)
    if selected.pattern is None and not _same_files(*beside):
        found.not_compared.append(f"{beside[1].name}, which only pickle can read, has other bytes")
    return FileDifference(
        name,
        added=tuple(added),
        missing=tuple(missing),
        reshaped=tuple(found.reshaped),
        changed=tuple(found.changed),
        values=tuple(found.values),
        not_compared=tuple(found.not_compared),
        equal_tensors=found.equal_tensors,
    )


def _compare_states(
    a: SavedState, b: SavedState, selected: Selected, tell: Callable[[int], object]
) -> _Found:
    found = _Found()
    done = 0
    for place, before in a.leaves.items():
        if place not in b.leaves or not selected.has(place):
            continue
        after, name = b.leaves[place], spell(place)
        if not (is_tensor(before) and is_tensor(after)):
            change = changed_value(name, before, after)
            found.values += [change] if change else []
            continue
        x, y = cast("Stored", before), cast("Stored", after)
        forms = _form(x), _form(y)
        if forms[0] != forms[1]:
            found.reshaped.append(FormChange(name, *forms))
            continue
        try:
            done = _compare_tensors(found, name, (a, x), (b, y), done, tell)
        except (MismatchError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, DamagedCheckpointError):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            found.not_compared.append(f"{name}: {reason}")
    return found


def _compare_tensors(
    found: _Found,
    name: str,
    first: tuple[SavedState, Stored],
    second: tuple[SavedState, Stored],
    done: int,
    tell: Callable[[int], object],
) -> int:
    tally, elements = Tally(), 0
    for before, after in pieces(*first, *second):
        if can_compute(before.dtype):
            tally.add(before, after)
        elif not same_bytes(before, after):
            raise MismatchError(f"its bytes differ, and torch can't compute with {_dtype(before)}")
        elements += before.numel()
        done += 2 * before.numel() * before.element_size()
        tell(done)
    leaf = first[1]
    if tally.changed:
        found.changed.append(
            TensorChange(
                name,
                shape_of(leaf),
                _dtype(leaf),
                elements,
                tally.changed,
                tally.largest,
                tally.relative,
            )
        )
    else:
        found.equal_tensors += 1
    return done


def _compare_bytes(before: Path, after: Path, name: str, reason: str) -> FileDifference:
    if _same_files(before, after):
        return FileDifference(name, same_bytes=True)
    texts = _text(before), _text(after)
    # An epoch counter, say, writes its number as text.
    if texts[0] is not None and texts[1] is not None:
        return FileDifference(name, values=(ValueChange("", texts[0], texts[1]),))
    return FileDifference(name, not_compared=(f"its bytes differ: {reason}",))


def changed_value(name: str, before: object, after: object) -> ValueChange | None:
    """Return how a value has changed, or None if it has not."""
    if _same(before, after):
        return None
    return ValueChange(name, _short(before), _short(after))


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_form = a.shape == b.shape and a.dtype == b.dtype
        floating = a.is_floating_point() or a.is_complex()
        return same_form and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=floating)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if a != a and b != b:  # noqa: PLR0124 - NaN
        return True
    try:
        return bool(a == b)
    except Exception:
        return repr(a) == repr(b)  # Arrays of words, and whatever else has no one answer.


def _short(value: object) -> str:
    if is_tensor(value):
        return f"a tensor, {_form(cast('Stored', value))}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _form(leaf: Stored | torch.Tensor) -> str:
    layout = "" if isinstance(leaf, Stored) or leaf.layout is torch.strided else f" {leaf.layout}"
    shape = ", ".join(map(str, shape_of(leaf)))
    return f"{_dtype(leaf)} ({shape}){layout.replace('torch.', '')}"


def _dtype(leaf: Stored | torch.Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _text(path: Path) -> str | None:
    try:
        with open_to_read(path) as stream:
            data = stream.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            return None
        text = data.decode().strip()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def _files(path: Path) -> dict[str, Path]:
    if path.is_dir():
        with open_folder_at(path) as folder:
            return {name: path / name for name, _ in folder.files()}
    return {"": path} if path.exists() else {}


def _same_files(before: Path, after: Path) -> bool:
    a, b = _files(before), _files(after)
    return a.keys() == b.keys() and all(_same_file(a[name], b[name]) for name in a)


def _same_file(before: Path, after: Path) -> bool:
    with open_to_read(before) as a, open_to_read(after) as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            return False
        while chunk := a.read(_CHUNK):
            if chunk != b.read(_CHUNK):
                return False
    return True
