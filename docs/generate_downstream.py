"""Kill and resume the training of other people's projects, and write the table of `docs/downstream.md`.

    python docs/generate_downstream.py            all of them, about half an hour on two cores
    python docs/generate_downstream.py darts      its row alone, the others stay
    python docs/generate_downstream.py --notes    the notes below the table, and nothing is run

Each row is written when it is done. It ends with 1 if something differs or fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "downstream")]

import killed_projects as run  # noqa: E402
from _page import section, table, write_section  # noqa: E402

PAGE = HERE / "downstream.md"
TITLES = (
    "project",
    "with",
    "Lightning",
    "killed three times",
    "best",
    "test",
    "predict",
    "its own loading",
)


def row_of(name: str, result: dict[str, Any]) -> str:
    """Return a line of the table."""
    if "error" in result:
        return f"| {name} | | | not run: {result['error']} | | | | |"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    kills = "the same bits"
    if not all(result["resumed"][1:]):
        kills = "began anew"
    elif result["differences"]:
        kills = f"**differs**: {result['differences'][0]}"
    cells = [name, versions, result["Lightning"], kills, *(result[use] for use in run.USES)]
    return f"| {' | '.join(cells)} |"


def rows_of_page() -> dict[str, str]:
    """Return the lines of the table as it stands, by project."""
    lines = section(PAGE, "table").splitlines()
    return {line.split(" | ")[0].strip("| "): line for line in lines if " | " in line}


def notes() -> list[str]:
    """Return what the projects prevent, or want, as their files say."""
    lines = []
    for name in run.NAMES:
        said = run.declared(name)
        lines += [f"- **{name}**, {use}: {reason}" for use, reason in said["PREVENTS"].items()]
        lines += [f"- **{name}**: {note}" for note in said["NOTES"]]
    return lines


def write(rows: dict[str, str]) -> None:
    """Write the table and the notes."""
    known = (rows[name] for name in run.NAMES if name in rows)
    write_section(PAGE, "table", [*table(TITLES, ()), *known, "", *notes()])


def main() -> None:
    """Run the projects that are named, and write their rows."""
    rows = rows_of_page()
    names = () if sys.argv[1:] == ["--notes"] else sys.argv[1:] or run.NAMES
    good = True
    for name in names:
        result = run.measure(name)
        good &= run.is_good(result)
        rows[name] = row_of(name, result)
        print(rows[name], flush=True)
        write(rows)
    write(rows)
    sys.exit(not good)


if __name__ == "__main__":
    main()
