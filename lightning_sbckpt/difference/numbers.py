"""How far two tensors of the same shape and type are apart, counted piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

# Doubles hold every whole number below it.
_EXACT = 2.0**53


@cache
def can_compute(dtype: torch.dtype) -> bool:
    """Return whether torch can turn numbers of this type into doubles."""
    try:
        one = torch.zeros(dtype.itemsize, dtype=torch.uint8, device="cpu").view(dtype)
        one.to(_wide(dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def same_bytes(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether two pieces, of one dimension and without gaps, have the same bytes."""
    return torch.equal(before.view(torch.uint8), after.view(torch.uint8))


@dataclass
class Tally:
    """What was found in the pieces so far.

    Attributes:
        changed: How many elements differ. NaN is equal to NaN.
        largest: The largest absolute change; NaN where a number has become NaN, or the reverse.
    """

    changed: int = 0
    largest: float = 0.0
    _squares: float = 0.0
    _squares_of_change: float = 0.0

    @property
    def relative(self) -> float:
        """The norm of the change over the norm of what was there before, NaN and infinity apart."""
        if not self.changed:
            return 0.0
        if not self._squares:
            return math.nan if math.isnan(self._squares_of_change) else math.inf
        return math.sqrt(self._squares_of_change) / math.sqrt(self._squares)

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Compare two pieces, of one dimension and without gaps."""
        wide = _wide(before.dtype)
        x = before.to(wide)
        self._squares += x.nan_to_num(0.0, 0.0, 0.0).abs().square_().sum().item()
        if same_bytes(before, after):
            return
        y = after.to(wide)
        if before.dtype.is_floating_point or before.dtype.is_complex:
            differs = (x != y).logical_and_((x.isnan() & y.isnan()).logical_not_())
            change = (x - y)[differs].abs()
        else:
            change = _whole_change(before, after, (x - y).abs())
            change = change[change != 0]
        if not change.numel():
            return  # Zeros of both signs, or NaN in several spellings.
        self.changed += change.numel()
        self.largest = _larger(self.largest, change.max().item())
        self._squares_of_change += change.square_().sum().item()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _whole_change(before: torch.Tensor, after: torch.Tensor, about: torch.Tensor) -> torch.Tensor:
    """Return the changes of whole numbers, to the last digit where a double has it."""
    if before.dtype.itemsize < 8:
        return about
    exact = (before.view(torch.int64) - after.view(torch.int64)).abs().double()
    # Where the numbers lie far apart the subtraction may have run over.
    return torch.where(about < _EXACT, exact, about)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
