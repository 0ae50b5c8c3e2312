"""The command `consolidate`: one checkpoint of plain files from one that ranks wrote in pieces."""

from __future__ import annotations

from contextlib import ExitStack

import click

from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import echo, json_option, print_json
from lightning_sbckpt.cli._folders import locate

__all__ = ["consolidate"]


@click.command()
@click.argument("ckpt")
@click.option("--to", metavar="PATH", help="The folder for it; by default the one of CKPT.")
@click.option("--name", help="Its name; by default that of CKPT and +whole.")
@json_option
def consolidate(ckpt: str, to: str | None, name: str | None, as_json: bool) -> None:
    """Write checkpoint CKPT, which ranks saved in pieces, as one of plain files; print its path.

    Each state in pieces becomes one file for torch.load: the model's, and an optimizer's with its
    parameters by number, as torch has it. The others are copied. The whole is never in memory, and
    neither a GPU nor other ranks are needed. The new checkpoint is pinned.
    """
    from lightning_sbckpt.consolidation import consolidate as put_together

    _, found = locate(ckpt)
    with ExitStack() as stack:
        tell = progress_bar(stack, "consolidating")
        saved = put_together(found, to, name=name, on_progress=tell)
    if as_json:
        print_json({"path": str(saved.path), "meta": saved.meta})
    else:
        echo(str(saved.path))
