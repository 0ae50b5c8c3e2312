"""The command `show`: one checkpoint, and the tensors in its files, none of which is read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from lightning_sbckpt._display.wording import (
    MACHINERY,
    by_interest,
    printable,
    say_number,
    say_size,
    say_when,
)
from lightning_sbckpt._io.lazy import is_tensor, torch
from lightning_sbckpt._io.records import remote_files
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt._layout.publish import SHARDED_EXT
from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt._views.columns import age_of, files_of, size_of
from lightning_sbckpt.cli._common import (
    NO,
    Failure,
    echo,
    json_option,
    print_json,
)
from lightning_sbckpt.cli._folders import locate
from lightning_sbckpt.errors import MetaError, SBCheckpointError
from lightning_sbckpt.meta import Checkpoint, ckpt_recency

if TYPE_CHECKING:
    from lightning_sbckpt._sharded.contents import SavedTensor

__all__ = ["show"]

# As many tensors of a file as give an idea of it; --keys shows all.
_FEW = 12
_LONGEST_LINE = 300


class _Tensor(NamedTuple):
    """A tensor in a file, and where."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class _Content(NamedTuple):
    """What is in a file: its tensors, or why nobody can tell."""

    tensors: list[_Tensor]
    problem: str | None = None


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.option(
    "--keys",
    metavar="PATTERN",
    help="Show all tensors whose name fits: '*' or 'model/*.weight'.",
)
@json_option
def show(ckpt: Path, keys: str | None, as_json: bool) -> None:
    """Show one checkpoint: meta, lineage, files and the tensors in them.

    CKPT is its path; or its folder and the word best or newest, as in run/best. No tensor is read:
    a checkpoint of many gigabytes is shown as fast as a small one.
    """
    _, found = locate(ckpt)
    try:
        manifest = read_manifest(found.path)
        lineage = dict(manifest.lineage) if manifest is not None else {}
        remark = (
            None if manifest is not None else "it has no manifest: nothing tells if it is whole"
        )
    except MetaError as error:
        lineage, remark = {}, str(error)
    contents = {name: _content(found, name, keys) for name in found.paramfiles}
    if keys is not None and not any(content.tensors for content in contents.values()):
        raise Failure(f"no tensor in {display_path(found.path)} has a name that fits {keys!r}", NO)
    files = files_of(found.path) or {}
    if as_json:
        print_json(
            {
                "path": display_path(found.path),
                "meta": found.meta,
                "lineage": lineage,
                "problem": remark,
                "files": {name: stat.st_size for name, stat in sorted(files.items())},
                "tensors": {
                    name: [tensor._asdict() for tensor in content.tensors]
                    for name, content in contents.items()
                },
                "unreadable": {
                    name: content.problem
                    for name, content in contents.items()
                    if content.problem is not None
                },
            }
        )
        return
    if keys is None:
        _print_head(found, lineage, remark)
        echo("files")
        for name, stat in sorted(files.items()):
            echo(f"  {say_size(stat.st_size):>8}  {printable(name)}")
    # What a person looks for first comes first.
    for name in sorted(contents, key=by_interest):
        few = 0 if name in MACHINERY else _FEW
        _print_content(name, contents[name], None if keys is not None else few)


def _print_head(ckpt: Checkpoint, lineage: Mapping[str, object], remark: str | None) -> None:
    echo(printable(display_path(ckpt.path)))
    saved = f"{say_when(ckpt_recency(ckpt))}, {age_of(ckpt, time.time())}"
    echo(f"  saved {saved}; {size_of(ckpt) or 'gone'} on the disk")
    if remark is not None:
        echo(f"  {printable(remark)}")
    for title, values in (("meta", ckpt.meta), ("lineage", lineage)):
        shown = {key: value for key, value in values.items() if value is not None}
        if not shown:
            continue
        echo(title)
        width = min(24, max(len(printable(str(key))) for key in shown))
        for key, value in shown.items():
            text = printable(_text_of(value))
            echo(f"  {printable(str(key)):<{width}}  {text[:_LONGEST_LINE]}")


def _text_of(value: object) -> str:
    if is_tensor(value):
        return f"tensor of {_shape(tuple(value.shape))}"
    # In full where it is a number: this is where one looks for the last digit.
    return repr(value) if isinstance(value, float) else say_number(value)


def _print_content(name: str, content: _Content, most: int | None) -> None:
    if content.problem is not None:
        echo(f"{printable(name)}: {printable(content.problem)}")
        return
    if not content.tensors:
        return
    count = sum(tensor.numbers for tensor in content.tensors)
    plural = "s" if len(content.tensors) > 1 else ""
    echo(f"{printable(name)}: {len(content.tensors):,} tensor{plural}, {count:,} numbers")
    shown = content.tensors[:most]
    width = max((len(printable(tensor.name)) for tensor in shown), default=0)
    for tensor in shown:
        echo(f"  {printable(tensor.name):<{width}}  {_shape(tensor.shape):<14}  {tensor.dtype}")
    if 0 < len(shown) < len(content.tensors):
        echo(f"  and {len(content.tensors) - len(shown):,} more: --keys '{printable(name)}/*'")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _content(ckpt: Checkpoint, name: str, pattern: str | None) -> _Content:
    path = ckpt.paramfiles[name]
    in_pieces = path.suffix == SHARDED_EXT
    if path.is_dir() and not in_pieces:
        return _Content([])
    if pattern is None and ckpt.paramfiles[name].name in remote_files(ckpt.path):
        return _Content([], "in the store, not looked into; --keys '*' brings it here and does")
    try:
        state = _outline_of_pieces(path) if in_pieces else ckpt.open(name)
    except (SBCheckpointError, OSError) as error:
        return _Content([], str(error))
    tensors = [
        _Tensor(where, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for where, tensor in _tensors(state, "")
        if pattern is None or fnmatchcase(where, pattern) or fnmatchcase(f"{name}/{where}", pattern)
    ]
    return _Content(tensors)


def _outline_of_pieces(path: Path) -> object:
    """Return a state that ranks have written in pieces, its tensors without their bytes."""
    from lightning_sbckpt._sharded.reading import SavedShards

    def without_bytes(_: str, saved: SavedTensor) -> torch.Tensor:
        return torch.empty(saved.size, dtype=saved.dtype, device="meta")

    return SavedShards(path).state(without_bytes)


def _tensors(value: object, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every tensor of a state with its place in it, as in `state/0/exp_avg`."""
    if is_tensor(value):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{where}/{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _tensors(item, f"{where}/{place}" if where else str(place))
