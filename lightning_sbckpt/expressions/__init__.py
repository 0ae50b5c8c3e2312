"""Conditions on the meta of a checkpoint as text: `val_acc > 0.9 and stage == "full"`.

For the command line, for configuration files, and wherever a predicate is expected. An expression
has keys, numbers, texts in quotes, lists, `true`, `false`, `none`, comparisons (also chained),
`in`, `and`, `or`, `not`, and `+ - * / // %` on numbers, with Python's meaning and precedence,
other than that `and` and `or` answer true or false, and not with one of their sides.
A key that is no plain word is written in backticks, `` `val/acc` ``, or `meta["val/acc"]`, which
reaches what is inside a mapping, too: `scores["wer"]["clean"]`. `"val/acc" in meta` asks whether
a key is there.

A key that a checkpoint lacks makes what is said about it neither true nor false, and a checkpoint
of which the whole is neither is not chosen: `not val_acc > 0.9` does not choose one without
`val_acc`. So do numbers that can't be computed, as in `1 / 0`, and comparisons with an empty value.

Nothing is evaluated as Python. There are no calls, attributes, powers or loops, and length and
nesting are bounded, so that text from a stranger costs microseconds and reaches nothing but meta.
"""

from __future__ import annotations

from lightning_sbckpt.expressions.predicate import Expression, as_predicate, parse_predicate

__all__ = ["Expression", "as_predicate", "parse_predicate"]
