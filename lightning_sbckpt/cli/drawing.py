"""The commands that draw: `plot` a metric over the steps, `report` a page about a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import NO, Failure, echo, json_option, print_json
from lightning_sbckpt.cli._folders import open_folder

if TYPE_CHECKING:
    from lightning_sbckpt.folder import CheckpointFolder

__all__ = ["plot", "report"]

F = TypeVar("F", bound=Callable[..., object])


def _drawing_options(command: F) -> F:
    """Give a command the options that say what is drawn."""
    for option in (
        click.option("--max-key", metavar="KEY", help="Mark its highest value as the best."),
        click.option("--min-key", metavar="KEY", help="Mark its lowest value as the best."),
        click.option(
            "-k",
            "--key",
            "keys",
            multiple=True,
            help="A key of the meta to draw, by default the one that the run ranks by. May be given "
            "again: each has a panel of its own.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The picture, which ends in .png or .svg; by default PATH/plot.png; of a URL, plot.png.",
)
@_drawing_options
@json_option
def plot(
    path: Path,
    out: Path | None,
    keys: tuple[str, ...],
    min_key: str | None,
    max_key: str | None,
    as_json: bool,
) -> None:
    """Draw a metric over the steps, with every checkpoint of PATH that was made.

    Those that are there are filled, those that were removed are hollow; the best, the pinned, and
    where the run was resumed are marked. Prints the path of the picture.
    """
    folder = _with_something_to_draw(path)
    target = out or (Path() if is_url(path) else path) / "plot.png"
    folder.plot(keys or None, min_key=min_key, max_key=max_key, path=target)
    _say_written(target, as_json=as_json)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The page, by default PATH/report.html; of a URL, report.html.",
)
@_drawing_options
@click.option("--verify", is_flag=True, help="Read every byte of what is there to find damage.")
@json_option
def report(
    path: Path,
    out: Path | None,
    keys: tuple[str, ...],
    min_key: str | None,
    max_key: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Write one page of HTML about PATH: table, plot, timeline, sizes, lineage, rules, damage.

    It is complete in itself and needs no network. Prints its path.
    """
    from lightning_sbckpt.report import report as write_report

    _with_something_to_draw(path)
    with ExitStack() as stack:
        written = write_report(
            path,
            out,
            key=keys or None,
            min_key=min_key,
            max_key=max_key,
            verify=verify,
            on_progress=progress_bar(stack, "verifying") if verify else None,
        )
    _say_written(written, as_json=as_json)


def _with_something_to_draw(path: Path) -> CheckpointFolder:
    from lightning_sbckpt.folder import CheckpointFolder

    opened = open_folder(path)
    opened.warn()
    folder = CheckpointFolder(opened.path, access="read")
    if not folder.timeline(with_lineage=False).lives:
        raise Failure(f"there are no checkpoints in {opened.shown} yet: nothing was drawn", NO)
    return folder


def _say_written(target: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"written": str(target)})
    else:
        echo(str(target))
