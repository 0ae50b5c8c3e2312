"""The table of `docs/downstream.md` is of the projects as they are declared here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
sys.path[:0] = [str(HERE), str(DOCS)]

import generate_downstream  # noqa: E402
import killed_projects as run  # noqa: E402


@pytest.mark.parametrize("name", run.NAMES)
def test_the_table_has_each_project_with_its_pins(name):
    """A project that was added, or another release of one, has been measured."""
    rows = [
        row for row in generate_downstream.rows_of_page().values() if row.startswith(f"| {name} ")
    ]
    pins = [pin.partition("[")[0].partition("==")[0] for pin in run.declared(name)["PINS"]]
    assert len(rows) == 1
    assert all(f"{pin} " in rows[0] for pin in pins)
    assert all(pin.partition("==")[2] in rows[0] for pin in run.declared(name)["PINS"])


def test_the_page_tells_what_projects_prevent():
    """What is not done with a project stands below the table, with the reason."""
    page = generate_downstream.PAGE.read_text(encoding="utf-8")
    assert all(note in page for note in generate_downstream.notes())


def test_a_resume_that_differs_is_no_success():
    """A row is good only if all agreed, and every restart went on from a checkpoint."""
    good = {"differences": [], "resumed": [None, "a", "b", "c"], **dict.fromkeys(run.USES, "yes")}
    assert run.is_good(good)
    assert run.is_good({**good, "test": "–"})
    for wrong in (
        {"differences": ["weights"]},
        {"resumed": [None, "a", None, "c"]},
        {"load": "KeyError: 'state_dict'"},
        {"error": "pip"},
    ):
        assert not run.is_good({**good, **wrong})
