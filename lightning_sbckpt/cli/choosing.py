"""The command `best`: a path alone, for scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt.cli._common import (
    NO,
    Failure,
    echo,
    json_option,
    print_json,
)
from lightning_sbckpt.cli._folders import (
    Folder,
    first_sound,
    of_newest_run,
    open_folder,
    require_key,
)
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.retention.noted import best_by, run_rules
from lightning_sbckpt.selection import Criterion, importance, rank_checkpoints

__all__ = ["best"]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--min-key", metavar="KEY", help="The lowest value of this key is best.")
@click.option("--max-key", metavar="KEY", help="The highest value of this key is best.")
@click.option("--where", metavar="EXPR", help="Only those whose meta fits: 'val_acc > 0.9'.")
@click.option("--sound", is_flag=True, help="Read it in full, and step over damaged ones.")
@click.option("--all-runs", is_flag=True, help="Of all runs in the folder, not the last one's.")
@json_option
def best(
    path: Path,
    min_key: str | None,
    max_key: str | None,
    where: str | None,
    sound: bool,
    all_runs: bool,
    as_json: bool,
) -> None:
    """Print the path of the best checkpoint in PATH, and nothing else.

    If several runs have saved there, it is the best of the one that saved last.
    Without a key it is best by the first rule Best(...) of the run; if there is none, the newest.
    Exits with 1 if there is none. For scripts: $(lightning-sbckpt best run --min-key val_loss)
    """
    folder = open_folder(path)
    folder.warn()
    criterion = importance(min_key=min_key, max_key=max_key)
    if criterion.key is None:
        criterion = best_by(run_rules(folder.path).rules) or criterion
    else:
        require_key(criterion.key, folder.checkpoints)
    ranked = rank_checkpoints(folder.checkpoints, criterion, where)
    candidates = iter(ranked) if all_runs else of_newest_run(folder, ranked)
    found = first_sound(candidates, aloud=True) if sound else next(candidates, None)
    if found is None:
        raise Failure(_why_none(folder, criterion, where, ranked), NO)
    if as_json:
        print_json(
            {"path": display_path(found.path), "by": criterion.describe(), "meta": found.meta}
        )
    elif sys.stdout.isatty():
        echo(printable(display_path(found.path)))
    else:
        # A script must get the path itself.
        click.echo(display_path(found.path))


def _why_none(
    folder: Folder, criterion: Criterion, where: str | None, candidates: list[Checkpoint]
) -> str:
    if not folder.checkpoints:
        return f"there are no checkpoints in {folder.shown}"
    if candidates:
        return f"all {len(candidates)} candidates in {folder.shown} are damaged"
    fits = f" for which {where}" if where else ""
    return (
        f"none of the {len(folder.checkpoints)} checkpoints in {folder.shown} is a candidate"
        f"{fits} ({criterion.describe()})"
    )
