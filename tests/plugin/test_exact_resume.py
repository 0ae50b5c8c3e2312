"""A killed run ends with the bits of one that was not."""

from __future__ import annotations

import exact_cells
import pytest

from lightning_sbckpt.plugin.selftest import assert_resume_exact


class Cell:
    """A cell by name, so that it reaches the other process whatever it is made of."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, dirpath):
        return exact_cells.CELLS[self.name](dirpath)


@pytest.mark.parametrize("name", exact_cells.CELLS)
def test_a_killed_run_ends_with_the_same_bits(name):
    """Killed at batches of two epochs, twice in one, in validation and at an epoch's end."""
    points = exact_cells.FEWER_BATCHES.get(name, exact_cells.POINTS)
    assert_resume_exact(Cell(name), points, timeout=120)
