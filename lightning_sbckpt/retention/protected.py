"""What retention of one run must not touch: what others wrote or made, and what is in use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sbckpt.meta import AVERAGED_FROM, Checkpoint
from lightning_sbckpt.typing import CheckpointPredicate


@dataclass
class Protected:
    """Checkpoints that stay, each with the reason; called, it says whether another may go.

    Attributes:
        reasons: The checkpoints, with why. What is added later takes its place in the rules' rankings.
        wanted: Which of the others may go at all; None for all.
    """

    reasons: list[tuple[Checkpoint, str]]
    wanted: CheckpointPredicate | None = None
    _apart: frozenset[Path] = field(init=False)

    def __post_init__(self) -> None:
        """Set those apart that must not take the place of the run's best either."""
        self._apart = frozenset(ckpt.path for ckpt, _ in self.reasons)

    @property
    def text(self) -> str | None:
        """What the user asked for, as it is noted."""
        return None if self.wanted is None else getattr(self.wanted, "text", "a function")

    def __call__(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint may go, if no rule keeps it."""
        return checkpoint.path not in self._apart and (
            self.wanted is None or self.wanted(checkpoint)
        )


def protected_checkpoints(
    checkpoints: Iterable[Checkpoint],
    run: object,
    lineage_of: Callable[[Checkpoint], Mapping[str, object]],
    *,
    busy: Collection[Path] = (),
    wanted: CheckpointPredicate | None = None,
) -> Protected:
    """Return which checkpoints retention of a run must not touch.

    Args:
        checkpoints: Those there are.
        run: The id of the run.
        lineage_of: Returns where a checkpoint comes from; without `run` in it, no run is known.
        busy: Those that somebody is reading.
        wanted: Which of its own may go at all; None for all.

    Example:
        >>> ours, other = (Checkpoint(Path(name), {}, {}) for name in ("CKPT+a", "CKPT+b"))
        >>> found = protected_checkpoints([ours, other], "1", lambda c: {"run": str(int(c is ours))})
        >>> [(ckpt.path.name, reason) for ckpt, reason in found.reasons]
        [('CKPT+b', 'another run wrote it')]
        >>> found(ours), found(other)
        (True, False)
    """
    reasons = []
    for ckpt in checkpoints:
        lineage = lineage_of(ckpt)
        if lineage.get(AVERAGED_FROM) or ckpt.meta.get(AVERAGED_FROM):
            reasons.append((ckpt, "made by hand: an average"))
        elif lineage.get("run") != run:
            reasons.append((ckpt, "another run wrote it"))
        elif ckpt.path in busy:
            reasons.append((ckpt, "it is being uploaded"))
    return Protected(reasons, wanted)
