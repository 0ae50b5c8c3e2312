"""Run the suites that break things, and write their counts into `docs/durability.md`.

    python docs/generate_durability.py                 everything, the long share too: about 100 minutes
    python docs/generate_durability.py --share         the seeded share that every test run has
    python docs/generate_durability.py --processes 2   two tests at a time
    python docs/generate_durability.py tests/security/fuzz      one suite: the other rows stay as they are

The tests count what they do themselves; nothing here knows a figure.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import torch
from _page import section, table, write_section

HERE = Path(__file__).resolve().parent
PAGE = HERE / "durability.md"
SUITES = (
    "tests/durability/test_every_operation.py",
    "tests/durability/test_random_kills.py",
    "tests/durability/test_full_disk.py",
    "tests/_layout/test_damage.py",
    "tests/test_verify.py",
    "tests/_layout/test_lock.py",
    "tests/security/test_hostile.py",
    "tests/durability/test_clocks.py",
    "tests/durability/test_moments.py",
    "tests/durability/test_signals.py",
    "tests/durability/test_filesystems.py",
    "tests/_world/test_ranks_in_step.py",
    "tests/plugin/test_fit_in_step.py",
    "tests/plugin/test_killed_ranks.py",
    "tests/plugin/test_fit_signals.py",
    "tests/security/fuzz",
)


def run(suite: str, *, share: bool, processes: int) -> tuple[Counter[str], Counter[str], float]:
    """Run one suite; return how its tests ended, what they counted, and the seconds it took."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        selection = "not slow" if share else ""
        command = [sys.executable, "-m", "pytest", "-q", "-m", selection, f"--junitxml={report}"]
        if processes > 1:
            command += ["-n", str(processes), "--dist", "worksteal"]
        subprocess.run([*command, "--timeout=3600", suite], cwd=HERE.parent, check=False)
        (summary,) = ET.parse(report).getroot()  # noqa: S314 - pytest has just written it
    ended = Counter({key: int(summary.attrib[key]) for key in ("failures", "errors", "skipped")})
    ended["passed"] = int(summary.attrib["tests"]) - ended.total()
    counted: Counter[str] = Counter()
    for found in summary.iter("property"):
        if not found.attrib["value"].isdigit():
            continue  # Hypothesis reports about itself there, too.
        counted[found.attrib["name"]] += int(found.attrib["value"])
    return ended, counted, float(summary.attrib["time"])


def main() -> int:
    """Run all suites and rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", action="store_true", help="the seeded share only")
    parser.add_argument("suites", nargs="*", default=SUITES, help="which to run; all by default")
    parser.add_argument("--processes", type=int, default=1, help="how many tests run at a time")
    arguments = parser.parse_args()
    share, processes = arguments.share, arguments.processes
    known = section(PAGE, "counts").splitlines()
    rows = {line.split("`")[1]: line for line in known if line.startswith("| `")}
    failed = 0
    for suite in arguments.suites:
        ended, counted, seconds = run(suite, share=share, processes=processes)
        failed += ended["failures"] + ended["errors"]
        counts = "; ".join(f"{what}: {times:,}" for what, times in counted.items())
        rows[suite] = (
            f"| `{suite}`{' (share)' if share else ''} | {ended['passed']:,} | {ended['failures'] + ended['errors']} | "
            f"{ended['skipped']} | {counts} | {seconds:,.0f} |"
        )
    where = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        f'Everything (`pytest -m ""`), or where it says so the seeded share (`pytest`), on {where}:',
        "",
        *table(("suite", "passed", "failed", "skipped", "counted by the tests", "seconds"), ()),
        *(rows[suite] for suite in SUITES if suite in rows),
    ]
    write_section(PAGE, "counts", lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
