"""Each sentence of SECURITY.md has tests beside it, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)*)`", TEXT)))
ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and not line.startswith("|---")]
HEADINGS = [line for line in ROWS if line.endswith("| tests |")]


def missing_part(name: str) -> str | None:
    """Return the first part of a test's name that there is not."""
    file, *parts = name.split("::")
    if not (ROOT / file).is_file():
        return file
    node: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in parts:
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name == part
        ]
        if not found:
            return part
        node = found[0]
    return None


@pytest.mark.parametrize("name", NAMED)
def test_each_test_that_is_named_exists(name):
    """By its file, class and function."""
    assert missing_part(name) is None


def test_each_row_names_a_test():
    """A sentence without one is a promise that nobody keeps."""
    assert len(HEADINGS) == 6
    assert len(ROWS) > 30
    assert [row for row in ROWS if row not in HEADINGS and "`tests/" not in row] == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_nothing.py",
        f"tests/{Path(__file__).name}::test_x",
        "tests/_format/test_marks.py::TestX::y",
    ],
)
def test_a_name_that_does_not_exist_is_found(name):
    """So the tests above can fail."""
    assert missing_part(name) is not None
