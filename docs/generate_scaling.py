"""Measure what a save costs with many ranks, and write the tables of `docs/scaling.md`.

    python docs/generate_scaling.py           everything: about five minutes on two cores
    python docs/generate_scaling.py --quick   few ranks and rounds, printed and not written

Nothing here knows a figure. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import _page  # noqa: E402

from benchmarks import environment, made_up_ranks, rank_counts, ranks  # noqa: E402
from benchmarks.made_up_ranks import Cost  # noqa: E402

PAGE = HERE / "scaling.md"
SIZES = (8, 512, 10_000)
# Bytes in a second between two machines: 10 Gbit/s.
NETWORK = 1.25e9
# Seconds of one message, and how often a small collective of N ranks waits for one: log2(N).
MESSAGE = 50e-6

NAMES = {
    "make_dir": "folders made",
    "create": "files created",
    "flush_file": "files flushed",
    "flush_dir": "folders flushed",
    "rename": "renames",
    "listing": "listings of the run's folder",
    "folder_listing": "listings of a checkpoint's folder",
    "remove_file": "files removed",
    "remove_dir": "folders removed",
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table, the first column to the left and the others to the right."""
    return _page.table(head, rows, "---:")


def seconds(value: float) -> str:
    """Return a time as people read it."""
    return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def megabytes(value: float) -> str:
    """Return a size as people read it."""
    return f"{value / 1e6:,.2f} MB" if value < 1e7 else f"{value / 1e6:,.0f} MB"


def counts(folder: Path) -> tuple[list[str], int]:
    """Return the table of what is counted in one save, and how many collectives that are."""
    folder.mkdir(parents=True)
    alone, removing = (rank_counts.counts_of(2, folder, keep)[0] for keep in (99, 1))
    more = rank_counts.counts_of(4, folder, 99)
    same = without_folders(more[0]["counts"]) == without_folders(alone["counts"])
    rows: list[list[object]] = [["files in the checkpoint", len(alone["files"]), "the same"]]
    for name, text in NAMES.items():
        rows.append([text, alone["counts"].get(name, 0), removing["counts"].get(name, 0)])
    others = sum(
        times for told in more[1:] for what, times in told["counts"].items() if what in NAMES
    )
    rows.append(["the same, by all other ranks", others, others])
    collectives = 0
    for name in rank_counts.COLLECTIVES:
        times = alone["counts"].get(name, 0)
        collectives += times
        rows.append([f"`{name}`", times, removing["counts"].get(name, 0)])
    told = "are the same" if same else "DIFFER"
    lines = table(["in one save", "nothing removed", "one removed"], rows)
    return [*lines, "", f"With four ranks instead of two the figures {told}."], collectives


def without_folders(counted: dict[str, int]) -> dict[str, int]:
    """Return the counts without one that depends on the clock.

    A folder as new as the tick of the disk's clock is listed again when it is looked at again.
    """
    return {name: times for name, times in counted.items() if name != "folder_listing"}


def rank_zero(folder: Path, sizes: Sequence[int], collectives: int) -> list[str]:
    """Return the tables of what rank zero does for so many ranks, in both forms."""
    found: dict[tuple[int, str], Cost] = {}
    # The first save of a process pays for what is imported on the way.
    made_up_ranks.cost(2, "stacked", folder / "first")
    for size in sizes:
        for form in reversed(ranks.FORMS):
            found[size, form] = made_up_ranks.cost(size, form, folder)
    rows = []
    for size in sizes:
        for form in reversed(ranks.FORMS):
            cost = found[size, form]
            everywhere = cost.arriving * (size if form == "lists" else 1)
            work = cost.unpacking + cost.stacking + cost.writing
            wire = cost.arriving / NETWORK
            hops = collectives * MESSAGE * max(1, size - 1).bit_length()
            rows.append(
                [
                    f"{size:,} {form}",
                    megabytes(cost.arriving),
                    megabytes(everywhere),
                    seconds(cost.unpacking),
                    seconds(cost.stacking),
                    f"{seconds(cost.writing)} ({megabytes(cost.written)})",
                    seconds(work + wire + hops),
                    seconds(cost.reading),
                ]
            )
    head = [
        "ranks",
        "to rank zero",
        "to all ranks",
        "unpacked in",
        "put together in",
        "written in",
        "with the network (model)",
        "read back in",
    ]
    return table(head, rows)


def of_each_rank() -> list[str]:
    """Return the table of the bytes that one more rank adds."""
    rows = [[f"`{name}.ckpt`", f"{size:,}"] for name, size in made_up_ranks.adds(32).items()]
    return table(["file", "bytes of one more rank"], rows)


def simulation(folder: Path, sizes: Sequence[int], rounds: int) -> list[str]:
    """Return the tables of many processes saving together, and the lines through them."""
    measured = ranks.measure(sizes, folder, rounds)
    lines: list[str] = []
    for form in ranks.FORMS:
        rows = []
        for size, taken in measured[form].items():
            cells = []
            for phase in ranks.PHASES:
                values = [each[phase] for each in taken]
                low, high = 1e3 * min(values), 1e3 * max(values)
                cells.append(f"{1e3 * statistics.median(values):.1f} ({low:.1f} to {high:.1f})")
            rows.append([size, *cells])
        lines += [f"`{form}`, milliseconds, median (lowest to highest) of {rounds} saves:", ""]
        lines += [*table(["ranks", *ranks.PHASES], rows), ""]
    rows = []
    for form in ranks.FORMS:
        for phase in ("collecting", "writing", "total"):
            line = ranks.line_of(measured[form], phase)
            rows.append(
                [
                    f"{form}, {phase}",
                    f"{1e3 * line.slope:.2f} ± {1e3 * line.error:.2f}",
                    *(extrapolated(line, size) for size in SIZES[1:]),
                ]
            )
    head = ["line through all rounds", "ms per rank", *(f"at {size:,} ranks" for size in SIZES[1:])]
    return [*lines, *table(head, rows)]


def extrapolated(line: ranks.Line, size: int) -> str:
    """Return the seconds for so many ranks, unless the slope may as well be none."""
    return seconds(line.at(size)) if line.slope > 2 * line.error else "no slope seen"


def sharded(sizes: Sequence[int]) -> list[str]:
    """Return the table of the formulas for sharded models; only the manifest is measured."""
    rows = []
    for size in sizes:
        length, took = made_up_ranks.manifest_of(size)
        rows.append([f"{size:,}", f"{size + 1:,}", f"1/{size:,}", megabytes(length), seconds(took)])
    head = [
        "ranks",
        "files of one sharded object",
        "of the object, by each rank",
        "manifest",
        "made in",
    ]
    return table(head, rows)


def main() -> int:
    """Measure all, and rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few ranks, printed only")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on a real disk")
    given = parser.parse_args()
    sizes = SIZES[:2] if given.quick else SIZES
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="benchmarks-") as scratch:
        folder = Path(scratch)
        counted, collectives = counts(folder / "counts")
        tables = {
            "counts": counted,
            "rank": of_each_rank(),
            "simulation": simulation(
                folder / "simulation",
                ranks.RANKS[:3] if given.quick else ranks.RANKS,
                2 if given.quick else 7,
            ),
            "zero": rank_zero(folder / "zero", sizes, collectives),
            "sharded": sharded(SIZES),
            "environment": table(
                ["what", "which"],
                [
                    *environment.describe(folder).items(),
                    ("load average as it began", f"{load:.1f}"),
                ],
            ),
        }
    for name, lines in tables.items():
        print("\n".join(lines), end="\n\n")
        if not given.quick:
            _page.write_section(PAGE, name, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
