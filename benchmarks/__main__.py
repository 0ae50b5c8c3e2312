"""`python -m benchmarks`: measure, and write `benchmarks/RESULTS.md`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    environment,
    finding,
    loading,
    memory,
    report,
    saving,
    small,
    stalls,
    stepping,
)
from benchmarks.measure import Section, Settings, described, end_in_order
from benchmarks.peer import quiet

_HERE = Path(__file__).parent

# Each group with its share of the time.
GROUPS: dict[str, tuple[Callable[[Settings], Section], float]] = {
    "save": (saving.run, 0.22),
    "stall": (stalls.run_stall, 0.08),
    "lost": (stalls.run_lost, 0.32),
    "memory": (memory.run, 0.08),
    "load": (loading.run, 0.10),
    "find": (finding.run, 0.07),
    "small": (small.run_small, 0.02),
    "remove": (small.run_removal, 0.02),
    "dedup": (small.run_dedup, 0.005),
    "idle": (stepping.run_idle, 0.025),
    "import": (stepping.run_import, 0.03),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the groups that are asked for, and write the report.

    Returns:
        1 if a group failed as a whole; the report is written all the same.
    """
    given = _parse(arguments)
    quiet()
    end_in_order()
    if given.device:
        return _on_device(given)
    names = [name for name in GROUPS if not given.only or name in given.only]
    minutes = given.minutes or (0.6 if given.quick else 12.0)
    # Those that run share the time of those that don't, up to a point.
    factor = min(3.0, 1 / sum(GROUPS[name][1] for name in names))
    sections: list[Section] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=given.dir) as folder:
        for name in names:
            measure, share = GROUPS[name]
            settings = Settings(
                Path(folder), given.sizes, minutes * 60 * share * factor, quick=given.quick
            )
            print(f"{name}: about {settings.seconds:.0f} s", flush=True)
            start = time.perf_counter()
            try:
                section = measure(settings)
            except Exception as error:
                failed = True
                section = Section(name, name, "", failures={"the whole group": described(error)})
            section.seconds = time.perf_counter() - start
            print(f"{name}: took {section.seconds:.0f} s", flush=True)
            sections.append(section)
        where = environment.describe(Path(folder))
    found = report.write(sections, settings, where, given.out)
    for verdict in found:
        if verdict.is_met is not None:
            print(f"{verdict.mark:14} {verdict.what}: {verdict.measured}, {verdict.target}")
    print(f"written: {given.out}")
    return int(failed)


def _on_device(given: argparse.Namespace) -> int:
    # Not above: it needs what not every build of torch has.
    from benchmarks import gpu

    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=given.dir) as folder:
        rows = gpu.run(Path(folder), given.sizes[-1], given.device, rounds=2 if given.quick else 5)
    gpu.write(rows, gpu.name_of(given.device), given.out)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", type=_names, help=f"groups, of {','.join(GROUPS)}")
    parser.add_argument("--sizes", type=_sizes, help="sizes of the state in MB, as 10,100")
    parser.add_argument("--quick", action="store_true", help="10 and 100 MB, few rounds")
    parser.add_argument("--minutes", type=float, help="about how long to measure in all")
    parser.add_argument("--dir", type=Path, help="where to write while measuring: on a real disk")
    parser.add_argument("--out", type=Path, help="the report; drawings go beside it")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what a GPU's saves cost; cpu is a dry run of that",
    )
    given = parser.parse_args(arguments)
    if given.device:
        given.sizes = given.sizes or ((100,) if given.quick else (9000,))
        given.out = given.out or _HERE / "partial/GPU.md"
    is_whole = not (given.quick or given.only or given.sizes or given.minutes)
    given.sizes = given.sizes or ((10, 100) if given.quick else (10, 100, 500, 1500))
    # A part of the figures must not replace the whole.
    given.out = given.out or _HERE / ("RESULTS.md" if is_whole else "partial/RESULTS.md")
    # The default of tempfile is often memory, and no disk.
    given.dir = given.dir or Path.cwd()
    return given


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(GROUPS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no groups: {', '.join(unknown)}")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(size) for size in text.split(",")}))


if __name__ == "__main__":
    sys.exit(main())
