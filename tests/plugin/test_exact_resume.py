"""A killed run ends with the bits of one that was not.

A seeded share of the cells runs with every `pytest`, all of them with `pytest -m "slow or not slow"
tests/plugin/test_exact_resume.py`. docs/generate_exact_resume.py writes down what it finds.
"""

from __future__ import annotations

import random

import exact_cells
import pytest
from _processes import start_server
from _releases import needs_lightning

from lightning_sbckpt.plugin.selftest import assert_resume_exact

SHARE = {
    *("base", "save_mode async", "save_mode overlap"),
    *random.Random(20).sample(sorted(set(exact_cells.CELLS) - set(exact_cells.ON_RANKS)), 4),
}


@pytest.fixture(autouse=True)
def server():
    """The processes of the self-test are forked from the server of all tests."""
    start_server()


def marks(name):
    slow = [] if name in SHARE else [pytest.mark.slow]
    if "weight averaging" in name and "stochastic" not in name:
        return [*slow, needs_lightning("2.6", "EMAWeightAveraging")]
    if name == "batch size finder":
        # Before, it takes one that it has not tried, and the run is over sooner.
        return [*slow, needs_lightning("2.6", "a batch size that was tried")]
    return slow


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in exact_cells.CELLS]
)
def test_a_killed_run_ends_with_the_same_bits(name):
    """Killed at batches of two epochs, twice in one, in validation and at an epoch's end."""
    assert_resume_exact(
        exact_cells.Cell(name),
        exact_cells.points_of(name),
        ranks=exact_cells.ranks_of(name),
        timeout=300,
    )


def test_the_share_is_what_it_seems():
    """Every name in it is that of a cell."""
    assert set(exact_cells.CELLS) >= {*SHARE, *exact_cells.CORE, *exact_cells.MORE_POINTS}
