"""The commands that make something of checkpoints: `diff`, `average`, `export`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import (
    NO,
    Failure,
    echo,
    json_option,
    print_json,
)
from lightning_sbckpt.cli._folders import Folder, locate, open_folder, require_key, resolve
from lightning_sbckpt.meta import AVERAGED_FROM, Checkpoint
from lightning_sbckpt.retention.noted import best_by, run_rules
from lightning_sbckpt.selection import importance, rank_checkpoints

if TYPE_CHECKING:
    from lightning_sbckpt.export import Exported

__all__ = ["average", "diff", "export"]

_FORMATS = {
    ".ckpt": "lightning",
    ".safetensors": "safetensors",
    ".pt": "state-dict",
    ".pth": "state-dict",
}


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@click.option("--top", default=10, show_default=True, help="How many changes to list of each kind.")
@click.option("--keys", metavar="PATTERN", help="Only tensors of such names: 'encoder.*'.")
@click.option("--name", "names", multiple=True, help="Only this file; may be given again.")
@click.option("--meta-only", is_flag=True, help="Compare the meta, and no file.")
def diff(
    a: str,
    b: str,
    as_json: bool,
    top: int,
    keys: str | None,
    names: tuple[str, ...],
    meta_only: bool,
) -> None:
    """Compare checkpoint A with checkpoint B: meta, files, and each tensor.

    B may be the name alone of a checkpoint beside A, or the word best or newest. With --keys or
    --name only these are compared, and no meta. That they were saved at different times is no
    difference. Exits with 0 if they are equal, with 1 if they differ.
    """
    from lightning_sbckpt.cli._differing import lines_of
    from lightning_sbckpt.difference import diff as diff_checkpoints

    if meta_only and (keys or names):
        raise Failure(
            "--meta-only leaves out what --keys and --name ask for: give one or the other"
        )
    folder, before = locate(a)
    after = _beside(folder, b)
    if meta_only:
        before, after = before._replace(paramfiles={}), after._replace(paramfiles={})
    with ExitStack() as stack:
        found = diff_checkpoints(
            before,
            after,
            names=names or None,
            keys=keys,
            on_progress=progress_bar(stack, "comparing"),
        )
    if as_json:
        print_json(found.as_dict())
    else:
        echo("\n".join(lines_of(found, max(0, top), in_full=bool(names or keys))))
    sys.exit(0 if found.equal else NO)


def _beside(folder: Folder, which: str) -> Checkpoint:
    """Return a checkpoint by its path, or by its name in a folder."""
    if os.sep in which or Path(which).is_dir():
        return locate(which)[1]
    return resolve(folder, which)


@click.command()
@click.argument("root", metavar="PATH")
@click.argument("ckpts", metavar="[CKPT]...", nargs=-1)
@click.option("--best", type=click.IntRange(1), metavar="N", help="Average the best N.")
@click.option("--newest", type=click.IntRange(1), metavar="N", help="Average the newest N.")
@click.option("--min-key", help="Best is the lowest value of this key.")
@click.option("--max-key", help="Best is the highest value of this key.")
@click.option("--name", help="The new checkpoint's name; by default one with the time.")
@click.option(
    "--recoverable",
    "recoverables",
    multiple=True,
    default=["model"],
    show_default=True,
    help="What to average; may be given again.",
)
@click.option("--with-rest", is_flag=True, help="Copy the other files of the newest source.")
@click.option("--into", metavar="PATH", help="The folder for the new checkpoint; by default PATH.")
@json_option
def average(
    root: str,
    ckpts: tuple[str, ...],
    best: int | None,
    newest: int | None,
    min_key: str | None,
    max_key: str | None,
    name: str | None,
    recoverables: tuple[str, ...],
    with_rest: bool,
    into: str | None,
    as_json: bool,
) -> None:
    """Average checkpoints of PATH into a new one, and print its path.

    Which: those named, or --best N by a key (by default that of the run's own rules), or
    --newest N. The new one has no metrics, no run goes on from it by itself, and it is pinned.
    """
    from lightning_sbckpt.averaging import save_average

    if sum((bool(ckpts), best is not None, newest is not None)) != 1:
        raise Failure(
            "name the checkpoints to average, or give --best N, or --newest N: one of them"
        )
    if best is None and (min_key or max_key):
        raise Failure("--min-key and --max-key say which are best: give --best N with them")
    folder = open_folder(root)
    named = [_beside(folder, which) for which in ckpts]
    sources = named or _chosen(folder, best, newest, min_key, max_key)
    with ExitStack() as stack:
        saved = save_average(
            into or folder.path,
            sources,
            recoverables=recoverables,
            name=name,
            with_rest=with_rest,
            on_progress=progress_bar(stack, "averaging"),
        )
    if as_json:
        print_json({"path": display_path(saved.path), "meta": saved.meta})
    else:
        echo(display_path(saved.path))


def _chosen(
    folder: Folder,
    best: int | None,
    newest: int | None,
    min_key: str | None,
    max_key: str | None,
) -> Sequence[Checkpoint]:
    """Return the best or the newest ones, of which none is an average itself."""
    folder.warn()
    there = [ckpt for ckpt in folder.checkpoints if AVERAGED_FROM not in ckpt.meta]
    if newest is not None:
        found: Sequence[Checkpoint] = there[:newest]
        wanted = newest
    else:
        criterion = importance(min_key=min_key, max_key=max_key)
        if criterion.key is None:
            by_rules = best_by(run_rules(folder.path).rules)
            if by_rules is None:
                raise Failure(
                    f"what is best in {folder.shown} is not known: no rule Best(...) was noted "
                    "there. Say it with --min-key KEY or --max-key KEY"
                )
            criterion = by_rules
        assert criterion.key is not None
        require_key(criterion.key, there)
        assert best is not None
        found, wanted = rank_checkpoints(there, criterion, limit=best), best
    if not found:
        raise Failure(f"there are no checkpoints to average in {folder.shown}", NO)
    if len(found) < wanted:
        echo(f"Warning: {wanted} were asked for, and there are {len(found)}", err=True)
    return found


@click.command()
@click.argument("ckpt")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["lightning", "safetensors", "state-dict"]),
    help="By default that of the ending of OUT: .ckpt, .safetensors, .pt or .pth.",
)
@click.option("--name", help="Which recoverable; by default the model. (Lightning's has all.)")
@click.option("--keys", multiple=True, metavar="PATTERN", help="safetensors: only such tensors.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--trust-pickle", is_flag=True, help="Read what only pickle holds; it can run code.")
@json_option
def export(
    ckpt: str,
    out: Path,
    kind: str | None,
    name: str | None,
    keys: tuple[str, ...],
    overwrite: bool,
    trust_pickle: bool,
    as_json: bool,
) -> None:
    """Write checkpoint CKPT as the file OUT of another format.

    lightning: one .ckpt for Trainer.fit(ckpt_path=...) and load_from_checkpoint. safetensors: the
    tensors of the model. state-dict: the model alone, for torch.load. OUT is there or not, never
    half.
    """
    kind = kind or _FORMATS.get(out.suffix)
    if kind is None:
        raise Failure(f"the ending of {out} tells no format: say it with --format")
    if name is not None and kind == "lightning":
        raise Failure(
            "--name is for one recoverable, and Lightning's file has them all: leave it out"
        )
    if keys and kind != "safetensors":
        raise Failure(f"--keys is for safetensors, not for {kind}: leave it out")
    if trust_pickle and kind == "safetensors":
        raise Failure(
            "--trust-pickle is of no use for safetensors, which hold tensors: leave it out"
        )
    _, found = locate(ckpt)
    exported = _export(found, out, kind, name or "model", keys, overwrite, trust_pickle)
    if as_json:
        print_json({"path": str(exported.path), "remarks": exported.remarks})
        return
    for remark in exported.remarks:
        echo(f"Note: {remark}", err=True)
    echo(str(exported.path))


def _export(
    found: Checkpoint,
    out: Path,
    kind: str,
    name: str,
    keys: Sequence[str],
    overwrite: bool,
    trust_pickle: bool,
) -> Exported:
    from lightning_sbckpt.export import to_safetensors, to_state_dict

    if kind == "lightning":
        from lightning_sbckpt.plugin.export import to_lightning

    trust = {"overwrite": overwrite, "trust_pickle": trust_pickle}
    with ExitStack() as stack:
        tell = progress_bar(stack, "exporting")
        if kind == "lightning":
            return to_lightning(found, out, **trust, on_progress=tell)
        if kind == "state-dict":
            return to_state_dict(found, out, name, **trust, on_progress=tell)
        return to_safetensors(found, out, name, keys or None, overwrite=overwrite, on_progress=tell)
