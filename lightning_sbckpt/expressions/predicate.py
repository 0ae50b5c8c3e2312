"""Expressions as predicates, with messages for keys that no checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions.grammar import parse
from lightning_sbckpt.expressions.nodes import UNKNOWN, MixedKindsError, Node
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.typing import CheckpointPredicate

__all__ = ["Expression", "as_predicate", "parse_predicate"]


@dataclass(frozen=True)
class Expression:
    """A condition on meta, read from text; a predicate. Made by `parse_predicate`.

    Attributes:
        text: The text.
        keys: The keys in the meta that it asks for.

    Example:
        >>> from pathlib import Path
        >>> accurate = parse_predicate("val_acc > 0.9")
        >>> accurate(Checkpoint(Path("CKPT+a"), {"val_acc": 0.95}, {}))
        True
        >>> accurate(Checkpoint(Path("CKPT+b"), {"unixtime": 1.0}, {}))
        False
        >>> sorted(accurate.keys)
        ['val_acc']
    """

    text: str
    keys: frozenset[str] = field(repr=False, compare=False)
    _node: Node = field(repr=False, compare=False)

    def __call__(self, checkpoint: Checkpoint) -> bool:
        """Return whether the condition holds; False if the checkpoint lacks what is asked for.

        Raises:
            SelectionError: Values are compared, or calculated with, that don't go together.
        """
        return bool(self.judge(checkpoint))

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as text: callbacks travel to spawned processes."""
        return parse_predicate, (self.text,)

    def judge(self, checkpoint: Checkpoint) -> bool | None:
        """Return whether the condition holds, or None if the checkpoint can't tell.

        Raises:
            SelectionError: As when called.

        Example:
            >>> from pathlib import Path
            >>> b = Checkpoint(Path("CKPT+b"), {"unixtime": 1.0}, {})
            >>> parse_predicate("val_acc > 0.9").judge(b) is None
            True
        """
        try:
            value = self._node.value(checkpoint.meta)
        except MixedKindsError as error:
            raise SelectionError(
                f"The expression {self.text!r} can't be applied to checkpoint {checkpoint.path}: "
                f"{error}. Compare numbers with numbers and texts with texts; if only some "
                "checkpoints are of another kind, say which are meant before an 'and'."
            ) from error
        return None if value is UNKNOWN else bool(value)

    def check_keys(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Refuse an expression that asks for a key which none of the checkpoints has.

        No checkpoints have no keys to compare with, so then nothing is refused.

        Raises:
            SelectionError: There is such a key; the message names it and the keys that exist.

        Example:
            >>> from pathlib import Path
            >>> ckpt = Checkpoint(Path("CKPT+a"), {"unixtime": 1.0, "val_acc": 0.95}, {})
            >>> parse_predicate("val_ac > 0.9").check_keys([ckpt])
            Traceback (most recent call last):
            lightning_sbckpt.errors.SelectionError: The expression 'val_ac > 0.9' asks for ...
        """
        known: set[str] = set()
        how_many = 0
        for ckpt in checkpoints:
            how_many += 1
            known.update(map(str, ckpt.meta))
        unknown = sorted(self.keys - known)
        if not unknown or not how_many:
            return
        close = [match for key in unknown for match in get_close_matches(key, known, n=1)]
        meant = f" Did you mean {', '.join(map(_written, close))}?" if close else ""
        lack = "the one checkpoint lacks" if how_many == 1 else f"all {how_many} checkpoints lack"
        raise SelectionError(
            f"The expression {self.text!r} asks for {', '.join(map(_written, unknown))}, which "
            f"{lack}. The keys there are: {', '.join(map(_written, sorted(known)))}.{meant}"
        )


def parse_predicate(text: str) -> Expression:
    """Return the predicate that a text stands for.

    Args:
        text: A condition on meta, such as `val_acc > 0.9 and stage == "full"`.

    Returns:
        A function from a checkpoint to whether the condition holds for its meta.

    Raises:
        SelectionError: The text is no expression; the message says at which character.

    Example:
        >>> from pathlib import Path
        >>> ckpt = Checkpoint(Path("CKPT+a"), {"val/acc": 0.95, "stage": "full"}, {})
        >>> parse_predicate('`val/acc` > 0.9 and stage in ["full", "half"]')(ckpt)
        True
        >>> parse_predicate("val_acc = 0.9")
        Traceback (most recent call last):
        lightning_sbckpt.errors.SelectionError: The expression 'val_acc = 0.9' can't be read ...
    """
    if not isinstance(text, str):
        raise SelectionError(
            f"parse_predicate was given {text!r}, expected a text such as 'val_acc > 0.9'."
        )
    node = parse(text)
    return Expression(text.strip(), node.keys, node)


def as_predicate(
    given: str | CheckpointPredicate | None, *, among: Iterable[Checkpoint] | None = None
) -> CheckpointPredicate | None:
    """Return a predicate, whether it was given as text, as a function or not at all.

    Args:
        given: An expression as text, a function of a checkpoint, or None.
        among: The checkpoints to choose from, if they are at hand: a text that asks for a key
            which none of them has is refused.

    Returns:
        The predicate; None for None.

    Raises:
        SelectionError: The text is no expression, or what was given is nothing of the three.

    Example:
        >>> from pathlib import Path
        >>> predicate = as_predicate("epoch >= 3")
        >>> predicate(Checkpoint(Path("CKPT+a"), {"epoch": 4}, {}))
        True
        >>> as_predicate(None) is None
        True
    """
    if given is None or (callable(given) and not isinstance(given, str)):
        return given
    if not isinstance(given, str):
        raise SelectionError(
            f"A predicate is {given!r}, expected a function of a checkpoint, or an expression such "
            "as 'val_acc > 0.9'."
        )
    expression = parse_predicate(given)
    if among is not None:
        expression.check_keys(among)
    return expression


def _written(key: str) -> str:
    return key if key.isidentifier() else f"`{key}`"
