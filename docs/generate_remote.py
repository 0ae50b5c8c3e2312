"""Measure what a run at a URL costs, and write the table of `docs/remote.md`.

    python docs/generate_remote.py           about two minutes on two cores
    python docs/generate_remote.py --quick   one round of a small state, printed and not written

The store is a real S3 server on this machine (`pip install -e ".[dev]"` brings it), so the network is
the fastest there is. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import fsspec  # noqa: E402
from _page import table, write_section  # noqa: E402
from remote._s3_server import S3Server  # noqa: E402

from benchmarks import environment  # noqa: E402
from benchmarks.disk import flush, remove  # noqa: E402
from benchmarks.measure import interleave, median, timed  # noqa: E402
from benchmarks.states import State  # noqa: E402
from lightning_sbckpt import Checkpointer  # noqa: E402

PAGE = HERE / "remote.md"
MEGABYTES, ROUNDS = 200, 7

FOLDER = "a save to a folder"
UPLOAD = "one plain upload of its files"
URL = "a save to a URL"
STALL = "the stall of an asynchronous save to a URL"
DOWNLOAD = "one plain download of its files"
RECOVER = "recovering"


class Costs:
    """The subjects of the figures, on one state.

    Args:
        folder: Where to write; on a real disk.
        server: The store.
        megabytes: The size of the state, in millions of bytes.
    """

    def __init__(self, folder: Path, server: S3Server, megabytes: float) -> None:
        self._folder = folder
        self._options = server.options
        self._files = fsspec.filesystem("s3", **server.options)
        self._state = State(megabytes)
        self._numbers = itertools.count()
        server.bucket("runs")
        self._local = self._checkpointer(folder / "local")
        self._remote = self._checkpointer("s3://runs/sync", folder / "mirror")
        self._async = self._checkpointer("s3://runs/async", folder / "mirror-async", "async")
        # What is kept from save to save, and there must be something to load.
        for checkpointer in (self._local, self._remote, self._async):
            self._save(checkpointer)

    def _checkpointer(
        self, where: Path | str, mirror: Path | None = None, mode: str = "sync"
    ) -> Checkpointer:
        objects = {"model": self._state.model, "optimizer": self._state.optimizer}
        remote = {} if mirror is None else {"local_dir": mirror, "storage_options": self._options}
        return Checkpointer(where, objects, save_mode=mode, **remote)

    def subjects(self) -> dict[str, Callable[[], float]]:
        """Return what is measured, in seconds."""
        return {
            FOLDER: lambda: self._save(self._local),
            UPLOAD: self._upload,
            URL: lambda: self._save(self._remote),
            STALL: lambda: self._save(self._async),
            DOWNLOAD: self._download,
            RECOVER: self._recover,
        }

    def _save(self, checkpointer: Checkpointer) -> float:
        self._state.change()
        seconds = timed(lambda: checkpointer.save_and_keep_only(num_to_keep=1))
        checkpointer.wait()
        return seconds

    def _upload(self) -> float:
        newest = self._local.find_checkpoint()
        assert newest is not None
        target = f"runs/plain-{next(self._numbers)}"
        seconds = timed(lambda: self._files.put(f"{newest.path}/", target, recursive=True))
        self._files.rm(target, recursive=True)
        return seconds

    def _download(self) -> float:
        newest = self._remote.find_checkpoint()
        assert newest is not None
        with self._empty() as folder:
            source = f"runs/sync/{newest.path.name}"

            def download() -> None:
                self._files.get(source, str(folder), recursive=True)
                flush(folder)

            return timed(download)

    def _recover(self) -> float:
        with self._empty() as folder:

            def recover() -> None:
                found = self._checkpointer("s3://runs/sync", folder / "mirror")
                assert found.recover_if_possible() is not None

            return timed(recover)

    @contextmanager
    def _empty(self) -> Iterator[Path]:
        folder = self._folder / f"new-{next(self._numbers)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)


def ratios_of(found: dict[str, list[float]]) -> list[str]:
    """Return the ratios as a table."""

    def row(what: str, against: str, above: list[float], below: list[float]) -> tuple[str, ...]:
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        return what, against, spread

    both = [a + b for a, b in zip(found[FOLDER], found[UPLOAD], strict=True)]
    return table(
        ("what", "against", "ratio"),
        [
            row(f"{URL}, until it is in the store", f"{FOLDER}, and {UPLOAD}", found[URL], both),
            row(STALL, FOLDER, found[STALL], found[FOLDER]),
            row(
                f"{RECOVER} on a machine that has nothing yet, verified",
                f"{DOWNLOAD}, flushed",
                found[RECOVER],
                found[DOWNLOAD],
            ),
        ],
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a small state")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to write: a real disk")
    given = parser.parse_args()
    megabytes, rounds = (20, 1) if given.quick else (MEGABYTES, ROUNDS)
    folder = Path(tempfile.mkdtemp(prefix="remote-", dir=given.dir))
    server = S3Server(folder / "server")
    failures: dict[str, str] = {}
    try:
        subjects = Costs(folder, server, megabytes).subjects()
        found = interleave(subjects, rounds=rounds, at_least=rounds, seconds=0, failures=failures)
        where = environment.describe(folder)
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
    if failures:
        raise SystemExit(f"not measured: {failures}")
    lines = [
        (
            f"Side by side in one run, {megabytes} MB of state, an S3 server on the same machine; "
            f"medians of {rounds} rounds, in brackets the lowest and highest. Processors: "
            f"{where['processors']}."
        ),
        "",
        *ratios_of(found),
    ]
    print("\n".join(lines))
    if not given.quick:
        write_section(PAGE, "costs", lines)


if __name__ == "__main__":
    main()
