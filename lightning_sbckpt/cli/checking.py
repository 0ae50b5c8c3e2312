"""The commands that check: `verify` the bytes on the disk, `selftest` a run of one's own."""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import json_option, printable
from lightning_sbckpt.cli._folders import name_of
from lightning_sbckpt.errors import RemoteError, SBCheckpointError
from lightning_sbckpt.verify import Verification
from lightning_sbckpt.verify import verify as verify_folder

__all__ = ["selftest", "verify"]


@click.command()
@click.argument("factory", metavar="MODULE:FUNCTION")
@click.option(
    "--kill",
    "kills",
    multiple=True,
    metavar="HOOK:COUNT[,HOOK:COUNT...]",
    help="Where to kill the run: at the COUNT-th call of a callback hook. Several in one option are "
    "several deaths of one run. May be given again. By default after the first save: within an "
    "epoch, in a validation, at the end of an epoch.",
)
@click.option(
    "--ranks",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many processes a run has: the Trainer's devices times its nodes.",
)
@click.option("--timeout", default=600.0, show_default=True, help="Seconds one run may take.")
def selftest(factory: str, kills: tuple[str, ...], ranks: int, timeout: float) -> None:
    """Prove that your own run resumes exactly.

    FUNCTION is called with a folder and returns a Trainer with an SBCheckpoint on that folder, a
    module, and its data. The run goes through once, then it is killed and started again at each
    point, and every bit is compared. Exits with 0 if all agree, with 1 if something differs, with 2
    if nothing was proved: the script can't be run, no batch is trained, no kill point is reached.
    """
    make = _Reference.parse(factory)
    # A script beside the user is what she means, and the console script alone would not see it.
    sys.path.insert(0, str(Path.cwd()))
    # It has everything loaded while this process still imports torch, and forks each run at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_sbckpt.plugin.selftest", *make.imports()])
    forkserver.ensure_running()
    from lightning_sbckpt.plugin.selftest import run_selftest

    points = [kill.split(",") for kill in kills] or None
    try:
        with _ending_in_order():
            report = run_selftest(make, points, ranks=ranks, timeout=timeout)
    except (SBCheckpointError, RuntimeError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(str(report))
    sys.exit(0 if report.exact else 1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@click.option("--workers", default=2, show_default=True, help="How many files are read at once.")
def verify(path: Path, as_json: bool, workers: int) -> None:
    """Read every byte of the checkpoints in PATH and compare it with what was written.

    PATH is the folder of all checkpoints, or one checkpoint, also run/best and run/newest. Exits with 0 if no damage was found,
    with 1 if some was, with 2 if PATH holds no checkpoints.
    """
    from lightning_sbckpt.run_paths import resolved

    try:
        with ExitStack() as stack:
            started = time.perf_counter()
            found = verify_folder(
                resolved(path) if path.name in ("best", "newest") else path,
                workers=workers,
                on_progress=progress_bar(stack, "verifying"),
            )
            seconds = time.perf_counter() - started
    except RemoteError:
        raise
    except (SBCheckpointError, OSError) as error:
        _exit_for_no_checkpoints(str(error))
    if not found:
        _exit_for_no_checkpoints(f"there are no checkpoints in {name_of(path)}")
    click.echo(_as_json(found) if as_json else _as_lines(found, seconds))
    damage = any(one.problems or one.annotation_problems for one in found)
    sys.exit(1 if damage else 0)


def _exit_for_no_checkpoints(message: str) -> NoReturn:
    click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(2)


def _as_json(found: Sequence[Verification]) -> str:
    return json.dumps(
        [
            {
                "path": display_path(one.path),
                "status": one.status,
                "problems": one.problems,
                "annotation_problems": one.annotation_problems,
                "remarks": one.remarks,
                "bytes": one.bytes,
            }
            for one in found
        ],
        indent=2,
    )


def _as_lines(found: Sequence[Verification], seconds: float) -> str:
    lines = []
    for one in found:
        lines.append(f"{one.status:<10}  {one.path.name}  {one.bytes / 1e6:,.1f} MB")
        lines += [
            f"{'':<10}    {text}"
            for text in (*one.problems, *one.annotation_problems, *one.remarks)
        ]
    counts = ", ".join(
        f"{count} {status}"
        for status in ("sound", "damaged", "unverified")
        if (count := sum(one.status == status for one in found))
    )
    size = sum(one.bytes for one in found)
    lines.append(f"{counts}: {size / 1e6:,.1f} MB read in {seconds:.2f} s")
    return "\n".join(map(printable, lines))


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Turn signals that end a process into an exit, so that what was begun is ended, too."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for caught in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            previous[caught] = signal.signal(caught, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Reference:
    """A function of a script, imported where it is called: the script may end its process."""

    module: str
    function: str

    @classmethod
    def parse(cls, text: str) -> _Reference:
        module, _, function = text.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), function]):
            raise click.BadParameter(f"{text!r} is not {_EXPECTED}")
        return cls(module, function)

    def imports(self) -> list[str]:
        """Return what the script imports of libraries that may be imported before a fork.

        Nothing of the user's own: what that draws or counts when it is imported must be as it is in
        a new process.
        """
        script = Path(*self.module.split(".")).with_suffix(".py")
        try:
            nodes = list(ast.walk(ast.parse(script.read_bytes())))
        except (OSError, SyntaxError, ValueError):
            return ["lightning.pytorch"]
        plain = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        plain += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        found = [name for name in plain if name.partition(".")[0] in _LIBRARIES]
        return ["lightning.pytorch" if name == "lightning" else name for name in found]

    def __call__(self, folder: Path) -> Any:
        from lightning_sbckpt.plugin.selftest import NotTestedError

        try:
            make = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError, SystemExit) as error:
            what = f"{self.module}:{self.function}"
            kind = type(error).__name__
            raise NotTestedError(
                f"{what!r} can't be imported ({kind}: {error}): expected {_EXPECTED}. What trains or "
                'exits in the script belongs below `if __name__ == "__main__":`'
            ) from error
        return make(folder)


_LIBRARIES = {
    *("lightning", "pytorch_lightning", "torch", "torchaudio", "torchdata", "torchmetrics"),
    *("torchvision", "numpy", "pandas", "scipy", "sklearn", "timm", "transformers"),
}
_EXPECTED = "the name of a module and of a function in it, such as my_training:make"
