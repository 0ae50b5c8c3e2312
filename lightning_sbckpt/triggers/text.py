"""A trigger as text, as it is written in Python: `EveryNSteps(100) & AfterStep(1000)`. Nothing is executed."""

from __future__ import annotations

import ast
import operator

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.triggers import basic, combined
from lightning_sbckpt.triggers.moment import Trigger

# A function, as `WhenTrue` has one, can't be written down.
_TRIGGERS = {
    kind.__name__: kind
    for kind in (
        combined.AfterStep,
        combined.AllOf,
        combined.AnyOf,
        basic.AtSteps,
        combined.Ephemeral,
        basic.EveryInterval,
        basic.EveryNEpochs,
        basic.EveryNSteps,
        basic.FirstStep,
        basic.OnValidationEnd,
    )
}
_OPERATORS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_}


def parse_trigger(text: str) -> Trigger:
    """Return the trigger that a text stands for: calls with plain values, combined by `|` and `&`.

    Raises:
        ConfigurationError: It is no such text, or a trigger refuses the values.

    Example:
        >>> parse_trigger('EveryInterval("10 min")')
        EveryInterval(interval=600.0)
        >>> parse_trigger("EveryNStep(5)")
        Traceback (most recent call last):
        lightning_sbckpt.errors.ConfigurationError: 'EveryNStep(5)' is no trigger: ...
    """
    reason = "expected a call, such as EveryNSteps(1000)"
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(found, Trigger):
            return found
    except (SyntaxError, RecursionError, MemoryError):
        pass
    except (ValueError, TypeError, OverflowError) as error:
        reason = str(error)
    raise ConfigurationError(
        f"{text[:100]!r} is no trigger: {reason}. Write it as in Python, such as 'EveryNSteps(100) & "
        f"AfterStep(1000)'; there are {', '.join(sorted(_TRIGGERS))}"
    )


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        combine = _OPERATORS[type(node.op)]
        return combine(_value(node.left), _value(node.right))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(f"{ast.unparse(node)} is neither a call nor a plain value") from None
    name = ast.unparse(node.func)
    if name not in _TRIGGERS:
        raise ValueError(f"there is no trigger {name}")
    given = {str(each.arg): _value(each.value) for each in node.keywords}
    return _TRIGGERS[name](*map(_value, node.args), **given)  # type: ignore[arg-type] # they check
