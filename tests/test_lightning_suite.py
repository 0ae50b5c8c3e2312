"""How a difference between Lightning's tests with and without the callback is judged."""

from __future__ import annotations

import _lightning_suite as suite
import pytest

TWICE = "models/test_restore.py::test_fit_twice"
REFUSED = suite.Outcome(
    "failed", "ConfigurationError: run/CKPT+1 is of another experiment than ..."
)
PASSED = suite.Outcome("passed", "")


def test_a_difference_with_its_reason_and_its_error_is_right():
    """It is counted, and nothing is wrong."""
    differ, wrong = suite.compare({TWICE: PASSED}, {TWICE: REFUSED})
    assert differ[TWICE].why.startswith("The test fits a second, new module")
    assert wrong == []


@pytest.mark.parametrize(
    ("test", "ours", "says"),
    [
        (
            "loops/test_loops.py::test_new",
            suite.Outcome("failed", "boom"),
            "passed alone, failed with",
        ),
        (
            "loops/test_loops.py::test_new",
            suite.Outcome("skipped", ""),
            "passed alone, skipped with",
        ),
        (TWICE, suite.Outcome("failed", "KeyError: 'lr'"), "fails, but not with"),
        (TWICE, PASSED, "passes, and is expected not to"),
        (f"{TWICE}[1]", PASSED, "passes, and is expected not to"),
    ],
)
def test_any_other_difference_is_wrong(test, ours, says):
    """One without a reason, one with another error, and one that is no difference any more."""
    _, (wrong,) = suite.compare({test: PASSED}, {test: ours})
    assert says in wrong


def test_a_test_that_never_ended_differs():
    """As the process died in it, or before."""
    _, (wrong,) = suite.compare({TWICE: PASSED}, {})
    assert "fails, but not with" in wrong


def test_a_test_that_fails_alone_says_nothing():
    """Whatever it does with the callback."""
    failed = suite.Outcome("failed", "no network")
    assert suite.compare({TWICE: failed}, {TWICE: PASSED}) == ({}, [])


def test_the_page_counts_differences_by_reason():
    """A row for each folder, and one for each reason."""
    differ, _ = suite.compare({TWICE: PASSED}, {TWICE: REFUSED})
    page = suite.page({"models": (230, differ)})
    assert "| `models` | 230 | 229 | 1 |" in page
    assert "`test_restore.py::test_fit_twice`" in page
