"""The command `lightning-sbckpt`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt.errors import MissingDependencyError, SBCheckpointError

try:
    import click
except ImportError as error:
    raise MissingDependencyError(
        "the command lightning-sbckpt needs click and rich, which are not installed: "
        "pip install 'lightning-sbckpt[cli]'"
    ) from error

__all__ = ["main"]


@click.group()
@click.version_option(package_name="lightning-sbckpt")
def main() -> None:
    """Look after the checkpoints of lightning-sbckpt."""


@main.command()
@click.argument("factory", metavar="MODULE:FUNCTION")
@click.option(
    "--kill",
    "kills",
    multiple=True,
    metavar="HOOK:COUNT[,HOOK:COUNT...]",
    help="Where to kill the run: at the COUNT-th call of a callback hook. Several in one option are "
    "several deaths of one run. May be given again.",
)
@click.option("--timeout", default=600.0, show_default=True, help="Seconds one process may take.")
def selftest(factory: str, kills: tuple[str, ...], timeout: float) -> None:
    """Prove that your own run resumes exactly.

    FUNCTION is called with a folder and returns a Trainer with an SBCheckpoint on that folder, a
    module, and its data. The run goes through once, then it is killed and started again at each
    point, and every bit is compared. Exits with 0 if all agree, with 1 if something differs.
    """
    from lightning_sbckpt.plugin.selftest import DEFAULT_KILL_POINTS, run_selftest

    points = [kill.split(",") for kill in kills] or DEFAULT_KILL_POINTS
    try:
        report = run_selftest(_load(factory), points, timeout=timeout)
    except (SBCheckpointError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report))
    sys.exit(0 if report.exact else 1)


def _load(reference: str) -> Callable[[Path], Any]:
    module_name, _, name = reference.partition(":")
    # A script beside the user is what she means, and the console script alone would not see it.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return cast("Callable[[Path], Any]", getattr(importlib.import_module(module_name), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(
            f"{reference!r} can't be imported ({error}): expected the name of a module and of a "
            "function in it, such as my_training:make"
        ) from error


if __name__ == "__main__":
    main()
