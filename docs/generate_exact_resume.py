"""Measure what resumes exactly, and write the table of `docs/exact-resume.md`.

    python docs/generate_exact_resume.py                    with the Lightning that is installed
    python docs/generate_exact_resume.py 2.4.0 2.5.0 2.6.6  and with these, a core share of the cells
    python docs/generate_exact_resume.py --cell base        this row alone, the others stay

Each cell is a run of `tests/plugin/exact_cells.py` that is killed by SIGKILL at each of its points,
started again, and compared bit for bit with one that was not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from _page import section, table, write_section

HERE = Path(__file__).resolve().parent
PAGE = HERE / "exact-resume.md"
sys.path.insert(0, str(HERE.parent / "tests" / "plugin"))


def measure(names: list[str]) -> dict[str, str]:
    """Return the verdict on each cell, with the Lightning that this process imports."""
    import exact_cells

    from lightning_sbckpt.plugin.selftest import run_selftest

    verdicts = {}
    for name in names:
        try:
            report = run_selftest(
                exact_cells.Cell(name),
                exact_cells.points_of(name),
                ranks=exact_cells.ranks_of(name),
                timeout=300,
            )
        except RuntimeError as error:
            verdicts[name] = f"not run: {str(error).strip().splitlines()[-1][:80]}"
        else:
            verdicts[name] = f"exact, {len(report.rows)} of {len(report.rows)} kills"
            if not report.exact:
                differing = sum(bool(row.differences) for row in report.rows)
                verdicts[name] = f"differs after {differing} of {len(report.rows)} kills"
        print(f"{name}: {verdicts[name]}", file=sys.stderr, flush=True)
    return verdicts


def measure_release(release: str) -> dict[str, str]:
    """Return the verdicts on the core share with another release of Lightning."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", folder, f"lightning=={release}"], check=True)
        measured = subprocess.run(
            [sys.executable, __file__, "--measure"],
            env={**os.environ, "PYTHONPATH": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    verdicts: dict[str, str] = json.loads(measured.stdout.splitlines()[-1])
    return verdicts


def table_of(columns: dict[str, dict[str, str]]) -> list[str]:
    """Return a Markdown table, a row for each cell and a column for each release."""
    cells = dict.fromkeys(name for verdicts in columns.values() for name in verdicts)
    rows = [[cell, *(v.get(cell, "") for v in columns.values())] for cell in cells]
    return table(["run", *(f"Lightning {release}" for release in columns)], rows)


def columns_of(body: str) -> dict[str, dict[str, str]]:
    """Return what `table_of` made a table of."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in body.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    (_, *titles), *cells = rows
    return {
        title.removeprefix("Lightning "): {name: verdicts[number] for name, *verdicts in cells}
        for number, title in enumerate(titles)
    }


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", help="further releases of Lightning")
    parser.add_argument("--cell", action="append", help="only this one, with the release installed")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import exact_cells

    if arguments.measure:
        print(json.dumps(measure(list(exact_cells.CORE))))
        return
    unknown = [name for name in arguments.cell or () if name not in exact_cells.CELLS]
    if unknown:
        parser.error(f"no such cell: {', '.join(unknown)}; they are in tests/plugin/exact_cells.py")
    if arguments.cell and arguments.releases:
        parser.error("--cell measures with the release that is installed, and no other")
    before = section(PAGE, "generated")
    versions = ", ".join(
        [f"Python {platform.python_version()}"]
        + [f"{name} {version(name)}" for name in ("torch", "torchmetrics", "numpy", "torchdata")]
    )
    measured_with = f"Measured with {versions}, on {platform.machine()} CPUs."
    installed = version("lightning")
    if arguments.cell:
        columns = columns_of(before)
        if measured_with not in before or installed not in columns:
            parser.error(f"the other rows were not: {measured_with} Lightning {installed}")
        columns[installed] |= measure(arguments.cell)
        # In the order of the cells.
        columns[installed] = {
            name: columns[installed][name]
            for name in exact_cells.CELLS
            if name in columns[installed]
        }
    else:
        columns = {installed: measure(list(exact_cells.CELLS))}
        for release in arguments.releases:
            if release not in columns:
                columns[release] = measure_release(release)
    write_section(PAGE, "generated", [measured_with, "", *table_of(columns)])


if __name__ == "__main__":
    main()
