"""The syntax of expressions over meta: one method of a reader for each rule of the grammar.

    either:     both ("or" both)*
    both:       negated ("and" negated)*
    negated:    "not"* comparison
    comparison: total (("==" | "!=" | "<=" | ">=" | "<" | ">" | "in" | "not" "in") total)*
    total:      product (("+" | "-") product)*
    product:    signed (("*" | "/" | "//" | "%") signed)*
    signed:     ["-" | "+"] atom ("[" (TEXT | INTEGER) "]")*
    atom:       NUMBER | TEXT | NAME | "`" KEY "`" | "(" either ")" | "[" either, ... "]"

The grammar is all there is to the language: it has no calls, no attributes, no powers, no loops,
so none can be asked for. Nothing is read twice, so the time is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import nodes
from lightning_sbckpt.expressions.nodes import Node

_MAX_LENGTH = 1000
_MAX_DEPTH = 50

_SPACE = re.compile(r"\s*")
_OR = re.compile(r"or\b")
_AND = re.compile(r"and\b")
_NOT = re.compile(r"not\b")
_IN = re.compile(r"in\b")
_RELATION = re.compile(r"[=!<>]=|[<>]|(?:in|not)\b")
_SIGN = re.compile(r"[+-]")
_FACTOR = re.compile(r"//|[*/%]")
_NUMBER = re.compile(r"\d+(_\d+)*(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")
_INTEGER = re.compile(r"\d+")
_TEXT = re.compile(r'"([^"\\\n]|\\.)*"|\'([^\'\\\n]|\\.)*\'')
_KEY = re.compile(r"`[^`\n]+`")
_NAME = re.compile(r"[^\W\d]\w*")
_PUNCTUATION = {character: re.compile(re.escape(character)) for character in "()[],"}

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
    return _Reader(text).read()


class _Reader:
    """Reads a text from left to right; each method of a rule returns its node."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._open_brackets = 0

    def read(self) -> Node:
        node = self._either()
        self._skip_space()
        if self._position < len(self._text):
            raise self._syntax_error()
        self._check_depth(node.depth)
        return node

    def _either(self) -> Node:
        parts = [self._both()]
        while self._take(_OR):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else nodes.disjunction(parts)

    def _both(self) -> Node:
        parts = [self._negated()]
        while self._take(_AND):
            parts.append(self._negated())
        return parts[0] if len(parts) == 1 else nodes.conjunction(parts)

    def _negated(self) -> Node:
        negations = 0
        while self._take(_NOT):
            negations += 1
        node = self._chain(self._total, _RELATION, nodes.comparison)
        for _ in range(negations):
            node = nodes.negation(node)
        return node

    def _total(self) -> Node:
        return self._chain(self._product, _SIGN, nodes.calculation)

    def _product(self) -> Node:
        return self._chain(self._signed, _FACTOR, nodes.calculation)

    def _chain(
        self,
        operand: Callable[[], Node],
        operator: re.Pattern[str],
        build: Callable[[Node, Sequence[tuple[str, Node]]], Node],
    ) -> Node:
        first = operand()
        others: list[tuple[str, Node]] = []
        while symbol := self._take(operator):
            if symbol == "not":
                self._require(_IN)
                symbol = "not in"
            others.append((symbol, operand()))
        return build(first, others) if others else first

    def _signed(self) -> Node:
        sign = self._take(_SIGN)
        node = self._atom()
        indices: list[str | int] = []
        while self._take(_PUNCTUATION["["]):
            index = self._take(_TEXT)
            indices.append(_unquoted(index) if index else int(self._require(_INTEGER)))
            self._require(_PUNCTUATION["]"])
        if indices:
            node = nodes.item(node, indices)
        return nodes.calculation(nodes.constant(0), [(sign, node)]) if sign else node

    def _atom(self) -> Node:
        if number := self._take(_NUMBER):
            is_float = any(character in ".eE" for character in number)
            return nodes.constant(float(number) if is_float else int(number))
        if text := self._take(_TEXT):
            return nodes.constant(_unquoted(text))
        if key := self._take(_KEY):
            return nodes.key(key[1:-1])
        if name := self._take(_NAME):
            if name == "meta":
                return nodes.whole_meta()
            return nodes.constant(_CONSTANTS[name]) if name in _CONSTANTS else nodes.key(name)
        bracket = self._take(_PUNCTUATION["("]) or self._require(_PUNCTUATION["["])
        self._open_brackets += 1
        self._check_depth(self._open_brackets)
        node = self._group() if bracket == "(" else self._listing()
        self._open_brackets -= 1
        return node

    def _group(self) -> Node:
        node = self._either()
        self._require(_PUNCTUATION[")"])
        return node

    def _listing(self) -> Node:
        items: list[Node] = []
        while not self._take(_PUNCTUATION["]"]):
            items.append(self._either())
            if not self._take(_PUNCTUATION[","]):
                self._require(_PUNCTUATION["]"])
                break
        return nodes.listing(items)

    def _skip_space(self) -> None:
        if space := _SPACE.match(self._text, self._position):
            self._position = space.end()

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Return what the pattern matches next and go past it; an empty text if nothing does."""
        self._skip_space()
        found = pattern.match(self._text, self._position)
        if found is None:
            return ""
        self._position = found.end()
        return found[0]

    def _require(self, pattern: re.Pattern[str]) -> str:
        found = self._take(pattern)
        if not found:
            raise self._syntax_error()
        return found

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise SelectionError(
                f"The expression {_cut(self._text, 60)!r} has parts nested {depth} deep, more than "
                f"the {_MAX_DEPTH} that one may have. Write a function of the checkpoint instead."
            )

    def _syntax_error(self) -> SelectionError:
        text, rest = self._text, self._text[self._position :]
        if not text.strip():
            return SelectionError(
                "The expression is empty: expected a condition such as val_acc > 0.9."
            )
        if not rest:
            return SelectionError(
                f"The expression {_cut(text, 60)!r} ends too early: something is missing at its "
                "end."
            )
        advice = next((words for pattern, words in _ADVICE if pattern.match(rest)), _EXPECTED)
        return SelectionError(
            f"The expression {_cut(text, 60)!r} can't be read at character {self._position + 1}, "
            f"{_cut(rest, 20)!r}: {advice}."
        )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _unquoted(text: str) -> str:
    # A backslash stands for the character after it, which may be a quote.
    return re.sub(r"\\(.)", r"\1", text[1:-1])
