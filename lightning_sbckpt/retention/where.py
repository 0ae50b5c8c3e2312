"""The rule that keeps what a condition holds for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_sbckpt._format.omega import opaque
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import Expression, as_predicate
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import function_name, newest_first
from lightning_sbckpt.typing import CheckpointPredicate


@opaque
@dataclass(frozen=True)
class Where:
    """Keep every checkpoint for which a condition holds.

    Considers every one if the condition is a function. If it is an expression, then those that
    have what the expression asks for, as `Best` considers those that have its key.

    Args:
        predicate: A function of a checkpoint, or an expression, see
            `lightning_sbckpt.expressions`.
        ephemeral: Consider those saved for recovery only, too.

    Raises:
        SelectionError: The expression can't be read, or there is no condition.

    Example:
        >>> from pathlib import Path
        >>> ckpts = [Checkpoint(Path(str(acc)), {"val_acc": acc}, {}) for acc in (0.95, 0.8)]
        >>> {ckpt.path.name: reason for ckpt, reason in Where("val_acc > 0.9").keeps(ckpts).items()}
        {'0.95': 'where val_acc > 0.9'}
    """

    predicate: str | CheckpointPredicate
    ephemeral: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Read an expression."""
        predicate = as_predicate(self.predicate)
        if predicate is None:
            raise SelectionError(
                "Where was given None, expected a function of a checkpoint, or an expression such "
                "as Where('val_acc > 0.9')."
            )
        object.__setattr__(self, "predicate", predicate)

    def __repr__(self) -> str:
        """Return it as it is written, so that it can be read again."""
        expression = self.predicate
        what = expression.text if isinstance(expression, Expression) else expression
        return f"Where({what!r}, ephemeral={self.ephemeral})"

    def considers(self, checkpoint: Checkpoint) -> bool:
        """Return whether the checkpoint can tell if the condition holds."""
        if isinstance(self.predicate, Expression):
            return self.predicate.judge(checkpoint) is not None
        return True

    def keeps(self, checkpoints: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
        """Return those for which the condition holds, newest first."""
        holds = self.predicate
        assert not isinstance(holds, str)
        found = [ckpt for ckpt in newest_first(checkpoints) if holds(ckpt)]
        return dict.fromkeys(found, f"where {self._what()}")

    def rejects(self, checkpoint: Checkpoint) -> str:
        """Return why a checkpoint is not kept by this rule."""
        del checkpoint
        return f"not where {self._what()}"

    def _what(self) -> str:
        if isinstance(self.predicate, Expression):
            return self.predicate.text
        return f"{function_name(self.predicate)} is true"  # type: ignore[arg-type] # no text by now
