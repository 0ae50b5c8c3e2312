"""The syntax of expressions over meta, by the parser generator `lark`.

The grammar is all there is to the language: it has no calls, no attributes, no powers, no loops,
so none can be asked for. Parsing is LALR(1), in time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import nodes
from lightning_sbckpt.expressions.nodes import Node

if TYPE_CHECKING:
    from lark import UnexpectedInput

_MAX_LENGTH = 1000
_MAX_DEPTH = 50

_GRAMMAR = r"""
?start: either
?either: both ("or" both)*
?both: negated ("and" negated)*
?negated: comparison
    | "not" negated -> negation
?comparison: total (relation total)*
!relation: "==" | "!=" | "<=" | ">=" | "<" | ">" | "in" | "not" "in"
?total: product ((PLUS | MINUS) product)*
?product: signed ((STAR | SLASH | FLOOR | PERCENT) signed)*
?signed: part
    | MINUS part -> sign
    | PLUS part -> sign
?part: atom
    | atom ("[" index "]")+ -> item
index: STRING | INTEGER
?atom: NUMBER -> number
    | STRING -> text
    | NAME -> name
    | QUOTED -> quoted
    | "(" either ")"
    | "[" [either ("," either)* [","]] "]" -> listing

PLUS: "+"
MINUS: "-"
STAR: "*"
SLASH: "/"
FLOOR: "//"
PERCENT: "%"
NUMBER: /(\d+(_\d+)*)(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?/
INTEGER: /\d+/
STRING: /"([^"\\\n]|\\.)*"|'([^'\\\n]|\\.)*'/
QUOTED: /`[^`\n]+`/
NAME: /[^\W\d]\w*/
%ignore /\s+/
"""

# In YAML's spelling and in Python's.
_CONSTANTS = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "none": None,
    "None": None,
}

_ADVICE = (
    (re.compile(r"=(?!=)"), "write == for equal"),
    (re.compile(r"&"), "write and"),
    (re.compile(r"\|"), "write or"),
    (re.compile(r"!(?!=)"), "write not"),
    (re.compile(r"\*"), "powers are not part of the language"),
    (re.compile(r"\("), "calls are not part of the language"),
    (
        re.compile(r"\."),
        "attributes are not part of the language; for a key with a dot write `a.b`",
    ),
    (re.compile(r"is\b"), "write == or !="),
    (re.compile(r"(for|if|else|lambda)\b"), "such words are not part of the language"),
    (re.compile(r"[\"'`]"), "a quote is missing or too many"),
)
_EXPECTED = (
    "expected comparisons of keys, numbers and texts in quotes, joined by and, or, not; a key that "
    "is no plain word is written `val/acc`"
)


def parse(text: str) -> Node:
    """Return the node that a text stands for.

    Raises:
        SelectionError: The text is no expression; the message says where.
    """
    if len(text) > _MAX_LENGTH:
        raise SelectionError(
            f"The expression {_cut(text, 60)!r} has {len(text):,} characters, more than the "
            f"{_MAX_LENGTH:,} that one may have. Write a function of the checkpoint instead."
        )
    parser, syntax_error = _parser()
    try:
        node = parser(text)
    except syntax_error as error:
        raise SelectionError(_complaint(text, cast("UnexpectedInput", error))) from error
    if node.depth > _MAX_DEPTH:
        raise SelectionError(
            f"The expression {_cut(text, 60)!r} has parts nested {node.depth} deep, more than the "
            f"{_MAX_DEPTH} that one may have. Write a function of the checkpoint instead."
        )
    return node


def _complaint(text: str, error: UnexpectedInput) -> str:
    if not text.strip():
        return "The expression is empty: expected a condition such as val_acc > 0.9."
    token = getattr(error, "token", None)
    if getattr(token, "type", None) == "$END":
        return f"The expression {_cut(text, 60)!r} ends too early: something is missing at its end."
    place = cast("int", error.pos_in_stream)
    rest = text[place:]
    advice = next((words for pattern, words in _ADVICE if pattern.match(rest)), _EXPECTED)
    return (
        f"The expression {_cut(text, 60)!r} can't be read at character {place + 1}, "
        f"{_cut(rest, 20)!r}: {advice}."
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


@cache
def _parser() -> tuple[Callable[[str], Node], type[Exception]]:
    # Imported when an expression is first read.
    from lark import Lark, Transformer, UnexpectedInput

    class Builder(Transformer[object, Node]):
        """Makes a node of each rule as soon as it is read."""

        def either(self, parts: list[Node]) -> Node:
            return nodes.disjunction(parts)

        def both(self, parts: list[Node]) -> Node:
            return nodes.conjunction(parts)

        def negation(self, parts: list[Node]) -> Node:
            return nodes.negation(parts[0])

        def comparison(self, parts: list[object]) -> Node:
            return nodes.comparison(*_pairs(parts))

        def relation(self, words: list[str]) -> str:
            return " ".join(words)

        def total(self, parts: list[object]) -> Node:
            return nodes.calculation(*_pairs(parts))

        product = total

        def sign(self, parts: list[object]) -> Node:
            return nodes.calculation(*_pairs([nodes.constant(0), *parts]))

        def item(self, parts: list[object]) -> Node:
            return nodes.item(cast("Node", parts[0]), cast("list[str | int]", parts[1:]))

        def index(self, parts: list[str]) -> str | int:
            return _unquoted(parts[0]) if parts[0][0] in "\"'" else int(parts[0])

        def number(self, parts: list[str]) -> Node:
            return nodes.constant(_number(parts[0]))

        def text(self, parts: list[str]) -> Node:
            return nodes.constant(_unquoted(parts[0]))

        def name(self, parts: list[str]) -> Node:
            word = str(parts[0])
            if word == "meta":
                return nodes.whole_meta()
            return nodes.constant(_CONSTANTS[word]) if word in _CONSTANTS else nodes.key(word)

        def quoted(self, parts: list[str]) -> Node:
            return nodes.key(str(parts[0][1:-1]))

        def listing(self, parts: list[Node]) -> Node:
            return nodes.listing(parts)

    lark = Lark(_GRAMMAR, parser="lalr", transformer=Builder(), maybe_placeholders=False)
    return cast("Callable[[str], Node]", lark.parse), UnexpectedInput


def _pairs(parts: Sequence[object]) -> tuple[Node, list[tuple[str, Node]]]:
    others = zip(parts[1::2], parts[2::2], strict=True)
    return cast("Node", parts[0]), [(str(sign), cast("Node", node)) for sign, node in others]


def _number(text: str) -> int | float:
    return float(text) if any(character in ".eE" for character in text) else int(text)


def _unquoted(text: str) -> str:
    # A backslash stands for the character after it, which may be a quote.
    return re.sub(r"\\(.)", r"\1", text[1:-1])
