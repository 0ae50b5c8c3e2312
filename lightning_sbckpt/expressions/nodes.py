"""What the parts of an expression over meta mean: how each is computed, and nothing of its syntax.

What a checkpoint doesn't know stays unknown through every operation, as in SQL: a comparison with
it is unknown, and so is its negation. `unknown or True` is true, `unknown and False` is false.
Only numbers are calculated with, and nothing here calls, or looks inside, an object of others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Meta = Mapping[str, object]


class Unknown:
    """The value of what is not in the meta of a checkpoint."""

    def __repr__(self) -> str:
        """Return how it is called."""
        return "unknown"


UNKNOWN = Unknown()


class MixedKindsError(TypeError):
    """An operation on values of kinds that don't go together."""


@dataclass(frozen=True)
class Node:
    """A part of an expression.

    Attributes:
        value: Computes it from meta.
        keys: The keys that it asks for.
        depth: How many parts stand inside one another.
        is_meta: Whether it is the whole meta.
    """

    value: Callable[[Meta], object]
    keys: frozenset[str] = frozenset()
    depth: int = 1
    is_meta: bool = False


def constant(value: object) -> Node:
    """Return the node of a value that is written in the expression."""
    return Node(lambda _: value)


def whole_meta() -> Node:
    """Return the node of the meta itself."""
    return Node(lambda meta: meta, is_meta=True)


def key(name: str) -> Node:
    """Return the node of a key in the meta."""
    return Node(lambda meta: meta.get(name, UNKNOWN), frozenset([name]))


def item(owner: Node, indices: Sequence[str | int]) -> Node:
    """Return the node of something inside a mapping or list."""
    names = [index for index in indices[:1] if owner.is_meta and isinstance(index, str)]

    def value(meta: Meta) -> object:
        found = owner.value(meta)
        for index in indices:
            found = _inside(found, index)
        return found

    return Node(value, owner.keys | set(names), owner.depth + 1)


def listing(items: Sequence[Node]) -> Node:
    """Return the node of a list that is written in the expression."""

    def value(meta: Meta) -> object:
        values = [item.value(meta) for item in items]
        return UNKNOWN if any(value is UNKNOWN for value in values) else values

    return _above(items, value)


def negation(operand: Node) -> Node:
    """Return the node of `not ...`."""

    def value(meta: Meta) -> object:
        truth = _truth(operand.value(meta))
        return truth if truth is UNKNOWN else not truth

    return _above([operand], value)


def conjunction(operands: Sequence[Node]) -> Node:
    """Return the node of `... and ...`."""
    return _above(operands, lambda meta: _until(False, operands, meta))


def disjunction(operands: Sequence[Node]) -> Node:
    """Return the node of `... or ...`."""
    return _above(operands, lambda meta: _until(True, operands, meta))


def comparison(first: Node, others: Sequence[tuple[str, Node]]) -> Node:
    """Return the node of `a < b`, or of a chain such as `a < b <= c`."""

    def value(meta: Meta) -> object:
        outcome: object = True
        left = first.value(meta)
        for relation, node in others:
            right = node.value(meta)
            holds = _RELATIONS[relation](left, right)
            if holds is False:
                return False
            outcome = holds if holds is UNKNOWN else outcome
            left = right
        return outcome

    return _above([first, *(node for _, node in others)], value)


def calculation(first: Node, others: Sequence[tuple[str, Node]]) -> Node:
    """Return the node of a sum or product, computed from the left."""

    def value(meta: Meta) -> object:
        result = first.value(meta)
        for sign, node in others:
            result = _calculated(sign, result, node.value(meta))
        return result

    return _above([first, *(node for _, node in others)], value)


def _above(nodes: Sequence[Node], value: Callable[[Meta], object]) -> Node:
    keys = frozenset().union(*(node.keys for node in nodes))
    return Node(value, keys, 1 + max((node.depth for node in nodes), default=0))


def _inside(owner: object, index: str | int) -> object:
    if isinstance(owner, Mapping):
        return owner.get(index, UNKNOWN)
    if isinstance(owner, list) and isinstance(index, int) and index < len(owner):
        return owner[index]
    return UNKNOWN


def _until(decisive: bool, operands: Sequence[Node], meta: Meta) -> object:
    # What follows the decisive operand is not computed.
    outcome: object = not decisive
    for node in operands:
        truth = _truth(node.value(meta))
        if truth is decisive:
            return decisive
        outcome = truth if truth is UNKNOWN else outcome
    return outcome


def _truth(value: object) -> object:
    if value is UNKNOWN:
        return UNKNOWN
    if value is None or isinstance(value, (bool, int, float, str, list, Mapping)):
        return bool(value)
    raise MixedKindsError(f"{_shown(value)} is neither true nor false")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else f'{text[:37]}...'} ({type(value).__name__})"


def _equal(left: object, right: object) -> object:
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    for side in (left, right):
        _truth(side)  # Refuses tensors, which have no single answer.
    try:
        return bool(left == right)
    except RuntimeError as error:  # There is a tensor inside a list.
        raise MixedKindsError(f"{_shown(left)} == {_shown(right)} has no answer") from error


def _unequal(left: object, right: object) -> object:
    same = _equal(left, right)
    return same if same is UNKNOWN else not same


def _ordering(symbol: str, holds: Callable[..., bool]) -> Callable[..., object]:
    def compare(left: object, right: object) -> object:
        # An empty value counts as no value, as it does where checkpoints are ranked.
        if _nothing(left) or _nothing(right):
            return UNKNOWN
        texts = isinstance(left, str) and isinstance(right, str)
        if not texts and not (_is_number(left) and _is_number(right)):
            raise MixedKindsError(f"{_shown(left)} {symbol} {_shown(right)} has no answer")
        return holds(left, right)

    return compare


def _contained(left: object, right: object) -> object:
    if left is UNKNOWN or _nothing(right):
        return UNKNOWN
    in_text = isinstance(left, str) and isinstance(right, str)
    hashable = left is None or isinstance(left, (str, int, float))
    if isinstance(right, list):
        return any(_equal(left, item) is True for item in right)
    if in_text or (isinstance(right, Mapping) and hashable):
        return left in right  # type: ignore[operator] # known to be text or a mapping
    raise MixedKindsError(f"{_shown(left)} in {_shown(right)} has no answer")


def _not_contained(left: object, right: object) -> object:
    inside = _contained(left, right)
    return inside if inside is UNKNOWN else not inside


def _nothing(value: object) -> bool:
    return value is None or value is UNKNOWN


_RELATIONS: dict[str, Callable[[object, object], object]] = {
    "==": _equal,
    "!=": _unequal,
    "<": _ordering("<", operator.lt),
    "<=": _ordering("<=", operator.le),
    ">": _ordering(">", operator.gt),
    ">=": _ordering(">=", operator.ge),
    "in": _contained,
    "not in": _not_contained,
}

_CALCULATIONS: dict[str, Callable[..., object]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}


def _calculated(sign: str, left: object, right: object) -> object:
    if _nothing(left) or _nothing(right):
        return UNKNOWN
    if not (_is_number(left) and _is_number(right)):
        raise MixedKindsError(f"{_shown(left)} {sign} {_shown(right)} can't be calculated")
    try:
        return _CALCULATIONS[sign](left, right)
    except ArithmeticError:  # Divided by zero, or too large.
        return UNKNOWN
