"""What generators of pages share: sections between markers, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def section(page: Path, name: str) -> str:
    """Return what stands between the markers of a section of a page."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->")
    return rest.partition(f"<!-- {name}: end -->")[0]


def write_section(page: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what stands between the markers of a section of a page.

    Raises:
        ValueError: The page lacks the markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page.name} has no section {name!r}")
    body = "\n".join(lines)
    page.write_text(f"{head}{begin}\n\n{body}\n\n{end}{tail}", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], rule: str = "---") -> list[str]:
    """Return a Markdown table; `rule` aligns all columns but the first."""
    lines = ["| " + " | ".join(head) + " |", "|---" + f"|{rule}" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
