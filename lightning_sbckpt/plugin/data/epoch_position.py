"""How far an epoch is, in samples: what stays the same when ranks or batches become others."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EpochPosition"]


@dataclass(frozen=True)
class EpochPosition:
    """How much of an epoch's training data is used up.

    Attributes:
        batches: How many batches each rank has trained on.
        batch_size: Of one rank; None if it is not known.
        ranks: How many there are.
        length: How many batches the epoch has for each rank; None if that is not known.

    Example:
        >>> seven_of_eight = EpochPosition(batches=7, batch_size=4, ranks=1, length=8)
        >>> seven_of_eight.samples
        28
        >>> seven_of_eight.batches_with(batch_size=4, ranks=2, length=4)
        3
    """

    batches: int
    batch_size: int | None
    ranks: int
    length: int | None

    @property
    def samples(self) -> int | None:
        """How many samples all ranks have trained on together."""
        return None if self.batch_size is None else self.batches * self.batch_size * self.ranks

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of the epoch."""
        return self.length is not None and self.batches >= self.length

    def batches_with(self, *, batch_size: int | None, ranks: int, length: int | None) -> int:
        """Return how many batches are as far in an epoch that is divided in another way.

        They are never more than were trained on: a sample may come twice, none is left out. One is
        left of an epoch that is not over, since validation follows the last one.

        Args:
            batch_size: Of one rank; None if it is not known.
            ranks: How many there are.
            length: How many batches the epoch has for each rank; None if that is not known.

        Example:
            >>> half = EpochPosition(batches=4, batch_size=None, ranks=2, length=8)
            >>> half.batches_with(batch_size=None, ranks=1, length=16)
            8
            >>> EpochPosition(8, 4, 1, 8).batches_with(batch_size=4, ranks=3, length=2)
            2
        """
        if (batch_size, ranks, length) == (self.batch_size, self.ranks, self.length):
            # A length may be a guess.
            return self.batches
        if self.is_over and length is not None:
            return length
        if self.samples is not None and batch_size:
            found = self.samples // (batch_size * ranks)
        elif self.length and length is not None:
            found = self.batches * length // self.length
        else:
            found = self.batches
        return found if length is None else max(0, min(found, length - 1))
