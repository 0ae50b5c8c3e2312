"""`python -m benchmarks.compare REV1 REV2`: has a commit made something slower, or faster?

Both are checked out beside the working tree. The figures are taken by the benchmarks of the working
tree, in processes of their own that import one commit's package or the other's, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import UnavailableError, end_in_order, interleave, median
from benchmarks.probe import FIGURES

_HERE = Path(__file__).parent


@contextmanager
def checked_out(revision: str, folder: Path, repository: Path) -> Iterator[Path]:
    """Give the files of a commit in a folder, and take them away afterwards."""
    git = ["git", "-C", str(repository), "worktree"]
    add = [*git, "add", "--detach", "--quiet", str(folder), revision]
    done = subprocess.run(add, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{revision} can't be checked out: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def probe(figure: str, source: Path, tools: Path, *options: str) -> list[float]:
    """Take a figure of the package in a source tree.

    Raises:
        UnavailableError: That package can't do it.
    """
    # Before an installed package.
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tools}"}
    command = [sys.executable, "-m", "benchmarks.probe", figure, *options]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=tools, env=environment
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(answer["package"]).resolve().parents[1] != source.resolve():
        raise RuntimeError(f"measured {answer['package']} instead of the package in {source}")
    if "unavailable" in answer:
        raise UnavailableError(answer["unavailable"])
    return [float(value) for value in answer["values"]]


def compare(first: Path, second: Path, figure: str, tools: Path, given: Any) -> str:
    """Return a line about a figure of the second package against the first."""
    options = ("--size", str(given.size), "--dir", str(tools.parent))
    failures: dict[str, str] = {}
    values = interleave(
        {
            given.first: lambda: median(probe(figure, first, tools, *options)),
            given.second: lambda: median(probe(figure, second, tools, *options)),
        },
        rounds=given.rounds,
        seconds=given.seconds,
        warmup=0,
        failures=failures,
    )
    if failures:
        why = "; ".join(f"{revision}: {reason}" for revision, reason in failures.items())
        return f"{figure:8} not compared: {why}"
    before, after = values[given.first], values[given.second]
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    unit = "µs" if figure == "idle" else "ms"
    scale = 1.0 if figure == "idle" else 1e3
    return (
        f"{figure:8} {median(before) * scale:9.2f} {unit} -> {median(after) * scale:9.2f} {unit}   "
        f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compare two commits, figure by figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("first", help="a commit")
    parser.add_argument("second", help="the commit to compare with it")
    parser.add_argument("--only", default="save,load,small,find,idle,import", help="figures")
    parser.add_argument("--size", type=int, default=100, help="of the state, in MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="per figure, at about")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to write: a real disk")
    given = parser.parse_args(arguments)
    given.dir = given.dir.resolve()
    end_in_order()
    figures = given.only.split(",")
    unknown = sorted(set(figures) - set(FIGURES))
    if unknown:
        parser.error(f"no figures: {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    with ExitStack() as stack:
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", dir=given.dir))
        folder = Path(made)
        # The same benchmarks for both, without the working tree's package beside them.
        tools = folder / "tools"
        shutil.copytree(_HERE, tools / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        trees = [
            stack.enter_context(checked_out(revision, folder / f"tree-{number}", _HERE))
            for number, revision in enumerate((given.first, given.second))
        ]
        print(f"{given.first} -> {given.second}: below 1x the second is faster", flush=True)
        for figure in figures:
            print(compare(*trees, figure, tools, given), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
