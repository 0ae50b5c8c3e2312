"""A rule of retention as text, as it is printed: `Best("val_loss", 2)`. Nothing is executed."""

from __future__ import annotations

import ast
from typing import cast

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.retention.budget import Budget
from lightning_sbckpt.retention.ranked import Best, Newest, Pareto
from lightning_sbckpt.retention.spaced import EveryNEpochs, EveryNSteps, Milestones, TimeSpaced
from lightning_sbckpt.retention.where import Where
from lightning_sbckpt.typing import RetentionRule

_LONGEST = 10_000

# Those that a function is part of can't be written down.
_RULES = {
    rule.__name__: rule
    for rule in (
        Best,
        Budget,
        EveryNEpochs,
        EveryNSteps,
        Milestones,
        Newest,
        Pareto,
        TimeSpaced,
        Where,
    )
}


def parse_rule(text: str) -> RetentionRule:
    """Return the rule that a text stands for, written as in Python, with plain values only.

    Args:
        text: Such as `Newest(3)`, `Best("val_loss", 2, mode="min")`, `Budget("50 GB")`.

    Raises:
        SelectionError: It is no such text, the rule is not known, or it refuses the values.

    Example:
        >>> parse_rule('Best("val_loss", 2)')
        Best(key='val_loss', n=2, mode='min', ephemeral=False)
        >>> parse_rule("Best(open('x'))")
        Traceback (most recent call last):
        lightning_sbckpt.errors.SelectionError: "Best(open('x'))" is no rule ...
    """
    if len(text) > _LONGEST:
        raise _refusal(f"{text[:40]}…", f"it has {len(text):,} characters")
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise _refusal(text, "expected the name of a rule and its values in parentheses")
        if call.func.id not in _RULES:
            raise _refusal(text, f"there is no rule {call.func.id}")
        if any(keyword.arg is None for keyword in call.keywords):
            raise _refusal(text, "** has no meaning here")
        values = [ast.literal_eval(value) for value in call.args]
        if any(keyword.arg == "bytes_of" for keyword in call.keywords):
            raise _refusal(text, "bytes_of is a function, which has no text")
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        if isinstance(error, SelectionError):
            raise
        raise _refusal(text, "expected plain values: numbers, texts, lists") from error
    try:
        return cast("RetentionRule", _RULES[call.func.id](*values, **named))
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, SelectionError):
            raise
        raise _refusal(text, str(error)) from error


def _refusal(text: str, reason: str) -> SelectionError:
    return SelectionError(
        f"{text!r} is no rule of retention: {reason}. Write one as in Python, such as "
        f"'Best(\"val_loss\", 2)'; there are {', '.join(sorted(_RULES))}"
    )
