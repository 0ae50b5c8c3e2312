"""Conditions on meta as text: what they mean, what they refuse, and that they reach nothing else."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import Expression, as_predicate, parse_predicate
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.selection import importance, rank_checkpoints

META = {
    "unixtime": 1.5e9,
    "end-of-epoch": True,
    "val_acc": 0.95,
    "val/acc": 0.9,
    "stage": "full",
    "epoch": 7,
    "best": False,
    "note": None,
    "nan": float("nan"),
    "orbit": 1,
    "sizes": [8, 16],
    "scores": {"wer": {"clean": 2.5}, "a.b": 1},
    "meta": "its own",
    "größe": 3,
    "it's": 4,
}


def judge(text, meta=META):
    """Return what an expression says of one checkpoint: True, False, or None for can't tell."""
    return parse_predicate(text).judge(Checkpoint(Path("run/CKPT+a"), meta, {}))


@pytest.mark.parametrize(
    "true",
    [
        'val_acc > 0.9 and stage == "full"',
        "val_acc >= 0.95 and val_acc <= 0.95 and val_acc == 0.95",
        "stage == 'full'",
        "stage != 'half'",
        "stage < 'g'",
        "epoch",
        "not best",
        "`end-of-epoch`",
        "`val/acc` >= 0.9",
        'meta["val/acc"] >= 0.9',
        "meta['end-of-epoch'] == true",
        "`meta` == 'its own'",
        '"val/acc" in meta and "wer" not in meta',
        'scores["wer"]["clean"] < 3',
        'meta["scores"]["wer"]["clean"] == 2.5',
        'scores["a.b"] == 1',
        "sizes[1] == 16",
        "8 in sizes and 9 not in sizes",
        "'ul' in stage",
        'stage in ["full", "half"]',
        "stage in ['full',]",
        "stage not in []",
        "sizes == [8, 2 * 8]",
        "epoch in [epoch]",
        "true and True and not false and not False",
        "none == None and null == none",
        "note == none",
        "note in [none]",
        "0 < epoch <= 7 < 8",
        "1 + 2 * 3 == 7 and (1 + 2) * 3 == 9",
        "10 - 3 - 2 == 5",
        "7 // 2 % 2 == 1 and 7 / 2 == 3.5",
        "-epoch == -7 and +epoch == 7",
        "val_acc * 100 - 95 < 0.001",
        "1_000 == 1e3 and .5 == 0.5 and 1. == 1 and 2E-1 == 0.2",
        "not epoch > 9 and epoch > 1 or best",
        "best or best or orbit",
        "orbit and notable or orbit",
        "nan != nan and not nan > 1 and not nan < 1",
        "größe == 3",
        "`it's` == 4",
        r"'it\'s' in meta",
        "\n  epoch\n  ==\t7\n",
        "(" * 50 + "epoch" + ")" * 50,
    ],
)
def test_what_is_true(true):
    """Python's meaning and precedence, on the keys of the meta."""
    assert judge(true) is True


@pytest.mark.parametrize(
    "false",
    [
        "val_acc > 0.95",
        "best",
        "stage == 'Full'",
        "stage == 1",
        "sizes == 8",
        "not `end-of-epoch`",
        "0 < epoch < 7",
        "7 > epoch > missing",
        "missing > 1 and best",
        "'wer' in meta",
        "epoch in []",
        "0.0",
        "''",
        "note",
        "nan > 0 or nan <= 0",
        "false or False",
        "not (epoch == 7)",
        "epoch == 7 and epoch == 8 or epoch == 9",
    ],
)
def test_what_is_false(false):
    """An operation with an answer, which is no."""
    assert judge(false) is False


@pytest.mark.parametrize(
    "unknown",
    [
        "missing",
        "missing > 1",
        "not missing > 1",
        "missing == 1",
        "missing != 1",
        "missing == missing",
        "missing + 1 > 0",
        "-missing < 0",
        "missing in [1]",
        "missing not in [1]",
        "epoch in [missing]",
        "1 in missing",
        "'a' in missing",
        "val_acc > 0.9 and missing > 1",
        "best or missing",
        "0 < missing < 9",
        "note > 1",
        "note + 1 > 0",
        "1 in note",
        "1 / 0 > 1",
        "1 % 0 > 1",
        "1" + "0" * 400 + " / 1.5 > 1",
        'scores["cer"] > 1',
        'scores["wer"]["clean"]["x"] > 1',
        "sizes[2] > 1",
        'sizes["a"] > 1',
        'stage["a"] > 1',
        "epoch[0] > 1",
        'meta["missing"] > 1',
        "`val acc` > 1",
        "Val_acc > 0",
    ],
)
def test_what_a_checkpoint_cannot_tell_is_neither_and_chooses_nothing(unknown):
    """A missing key doesn't make its negation true: neither chooses the checkpoint."""
    assert judge(unknown) is None
    assert judge(f"not ({unknown})") is None
    assert judge(f"({unknown}) or orbit") is True
    assert judge(f"({unknown}) and best") is False
    assert parse_predicate(unknown)(Checkpoint(Path("a"), META, {})) is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The expression is empty: expected a condition such as val_acc > 0.9"),
        ("  \n", "The expression is empty"),
        ("val_acc >", "'val_acc >' ends too early"),
        ("(a", "ends too early"),
        ("not", "ends too early"),
        ("val_acc > > 1", "can't be read at character 11, '> 1': expected comparisons"),
        ("val_acc = 1", "at character 9, '= 1': write == for equal"),
        ("a && b", "at character 3, '&& b': write and"),
        ("a || b", "at character 3, '|| b': write or"),
        ("!a", "at character 1, '!a': write not"),
        ("a is None", "at character 3, 'is None': write == or !="),
        ("a b", "at character 3, 'b'"),
        ("9abc", "at character 2, 'abc'"),
        ("a > 1)", r"at character 6, '\)'"),
        ('stage == "full', "at character 10, '\"full': a quote is missing"),
        ("`val/acc > 1", "at character 1, .*a quote is missing"),
        ("``", "at character 1, .*a quote is missing"),
        ("val.acc > 1", "at character 4, '.acc > 1': attributes are not part"),
        ("a[b]", "at character 3"),
        ("a[-1]", "at character 3"),
        ("a[1.5]", "at character 4"),
        ("- - 1", "at character 3"),
        ("a; b", "at character 2"),
        ("a # b", "at character 3"),
        ("a\x00b", "at character 2"),
        ("a, b", "at character 2"),
        ("{}", "at character 1"),
        ("a := 1", "at character 3"),
    ],
)
def test_a_syntax_error_is_one_line_with_the_place_and_the_way_out(text, message):
    """The character, what stands there, and what to write instead."""
    with pytest.raises(SelectionError, match=message) as caught:
        parse_predicate(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bomb",
    [
        "9**9**9",
        "9 ** 9",
        "().__class__",
        "stage.__class__.__mro__",
        "__import__('os')",
        "open('/etc/passwd')",
        "[x for x in [1]]",
        "{x for x in [1]}",
        "lambda: 1",
        "a if b else c",
        "f'{stage}'",
        "1 << 9999999",
        "~1",
        "1 @ 1",
        "a(b)",
        "yield 1",
        "-" * 900 + "1",
        "not " * 200 + "1",
        "(1+" * 200 + "1" + ")" * 200,
        "(" * 400 + "1" + ")" * 400,
        "[" * 200 + "]" * 200,
        "1 in [" * 100 + "1" + "]" * 100,
        "9" * 2000,
        "1 + " * 300 + "1",
    ],
)
def test_what_could_reach_out_or_take_for_ever_is_refused_at_once(bomb):
    """No calls, attributes, powers, loops; bounded length and nesting."""
    # Of this thread alone: what else the machine does meanwhile takes as long as it likes.
    begin = time.thread_time()
    with pytest.raises(SelectionError):
        parse_predicate(bomb)
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize(
    "bomb", ["'a' * 999999999 == 1", "'%999999999d' % 1 == 1", "stage + stage == 1", "[1] * 9 == 1"]
)
def test_only_numbers_are_calculated_with(bomb):
    """Texts and lists don't grow."""
    with pytest.raises(SelectionError, match="can't be calculated"):
        judge(bomb)


@given(text=st.text(alphabet="ab1.'\"`()[]<>=!+-*/% andortim_\\\n", max_size=30))
def test_any_text_is_an_expression_or_refused(text):
    """Whatever is written, there is a result or a SelectionError, and nothing else."""
    try:
        predicate = parse_predicate(text)
        predicate(Checkpoint(Path("a"), META, {}))
    except SelectionError:
        pass


NUMBERS = st.integers(-5, 5) | st.sampled_from([0.5, -1.5])


@st.composite
def formulas(draw, depth=3):
    """Draw an expression, and what it is in Python, where `and` and `or` may give any value."""
    kind = draw(st.sampled_from("nnkcab!")) if depth else "n"
    if kind == "n":
        number = draw(NUMBERS)
        return (str(number) if number >= 0 else f"({number})",) * 2
    if kind == "k":
        return (draw(st.sampled_from(["x", "y"])),) * 2
    inner = formulas(depth - 1)
    (a, python_a), (b, python_b), (c, python_c) = draw(inner), draw(inner), draw(inner)
    if kind == "c":
        sign = draw(st.sampled_from(["+", "-", "*"]))
        relation = draw(st.sampled_from(["<", "<=", "==", "!="]))
        pattern = f"({{}} {sign} {{}} {relation} {{}})"
        return pattern.format(a, b, c), pattern.format(python_a, python_b, python_c)
    if kind == "!":
        return f"(not {a})", f"(not {python_a})"
    first, second = ("and", "or") if kind == "a" else ("or", "and")
    pattern = f"({{}} {first} {{}} {second} {{}})"
    return pattern.format(a, b, c), f"bool{pattern.format(python_a, python_b, python_c)}"


@given(formula=formulas(), x=NUMBERS, y=NUMBERS)
def test_where_nothing_is_missing_the_answer_is_pythons(formula, x, y):
    """Precedence, chains and truth, against Python itself."""
    text, python = formula
    assert judge(text, {"x": x, "y": y}) is bool(eval(python, {}, {"x": x, "y": y}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage > 1", r"'full' \(str\) > 1 \(int\) has no answer"),
        ("1 in epoch", r"1 \(int\) in 7 \(int\) has no answer"),
        ("1 in stage", r"1 \(int\) in 'full' \(str\) has no answer"),
        ("sizes in meta", "has no answer"),
        ("stage + 1 > 1", r"'full' \(str\) \+ 1 \(int\) can't be calculated"),
        ("grid > 1", r"tensor\(\[1., 2.\]\) \(Tensor\) > 1 \(int\) has no answer"),
        ("grid == 1", "is neither true nor false"),
        ("grid and true", "is neither true nor false"),
        ("grids == grids2", "has no answer"),
    ],
)
def test_kinds_that_do_not_go_together_are_named_with_the_checkpoint(text, message):
    """A mistake of the writer's, and not a reason to choose nothing in silence."""
    grid = torch.tensor([1.0, 2.0])
    meta = {**META, "grid": grid, "grids": [grid], "grids2": [grid.clone()]}
    with pytest.raises(SelectionError, match=message) as caught:
        judge(text, meta)
    assert "run/CKPT+a" in str(caught.value)
    assert repr(text) in str(caught.value)


def test_what_decides_already_hides_what_does_not_go_together():
    """`and` and `or` stop where Python's do, so mixed folders can be sorted out."""
    assert judge("best and stage > 1") is False
    assert judge("orbit or stage > 1") is True


def runs():
    """Return the records of three checkpoints."""
    metas = [{"val_acc": 0.5, "end-of-epoch": True}, {"val_acc": 0.95}, {"loss": 1.0}]
    return [
        Checkpoint(Path("run") / name, {"unixtime": i, **meta}, {})
        for i, (name, meta) in enumerate(zip("abc", metas, strict=True))
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_ac > 0.9", "asks for val_ac, which all 3 checkpoints lack.*Did you mean val_acc?"),
        ("val_ac > 0.9", "The keys there are: `end-of-epoch`, loss, unixtime, val_acc"),
        ("zzz > 1 or yyy > 1", r"asks for yyy, zzz, which all 3 checkpoints lack.*val_acc\.$"),
        ("end-of-epoch", "asks for end, epoch, of"),
        ("meta['zz'] == 1", "asks for zz"),
        ("`a b` == 1", "asks for `a b`"),
    ],
)
def test_a_key_that_no_checkpoint_has_is_refused_with_the_keys_there_are(text, message):
    """A slip of the pen must not look like an empty result."""
    with pytest.raises(SelectionError, match=message):
        as_predicate(text, among=runs())


def test_a_key_that_some_have_or_no_checkpoints_at_all_are_fine():
    """Only a key that is nowhere is a mistake; `"x" in meta` may always be asked."""
    as_predicate("loss > 1 and val_acc > 1", among=runs())
    as_predicate("anything > 1", among=[])
    as_predicate('"anything" in meta', among=runs())
    with pytest.raises(SelectionError, match="which the one checkpoint lacks"):
        as_predicate("loss > 1", among=runs()[:1])


def test_a_ranking_takes_an_expression_where_it_takes_a_predicate():
    """With the check of the keys; a parsed one is taken as it is."""
    newest = importance()
    chosen = rank_checkpoints(iter(runs()), newest, "val_acc > 0.1")
    assert [ckpt.path.name for ckpt in chosen] == ["b", "a"]
    with pytest.raises(SelectionError, match="asks for nowhere"):
        rank_checkpoints(runs(), newest, "nowhere > 0.1")
    assert rank_checkpoints(runs(), newest, parse_predicate("nowhere > 0.1")) == []


def test_as_predicate_leaves_functions_and_none_alone():
    """So that it can stand wherever either may be given."""
    assert as_predicate(None) is None
    assert as_predicate(callable) is callable
    expression = parse_predicate("a > 1")
    assert as_predicate(expression, among=runs()) is expression


@pytest.mark.parametrize("wrong", [5, ["a > 1"], {"a": 1}, True])
def test_what_is_no_predicate_is_refused(wrong):
    """With what was given."""
    with pytest.raises(SelectionError, match="expected a function of a checkpoint, or an expr"):
        as_predicate(wrong)
    with pytest.raises(SelectionError, match="expected a text such as"):
        parse_predicate(wrong)


def test_an_expression_is_a_value_that_travels_as_text():
    """Equal texts are equal; pickling gives an expression that works; it prints as its text."""
    one, same = parse_predicate(" a > 1 "), parse_predicate("a > 1")
    assert one == same
    assert len({one, same}) == 1
    assert str(one) == "a > 1"
    assert repr(one) == "Expression(text='a > 1')"
    back = pickle.loads(pickle.dumps(one))
    assert isinstance(back, Expression)
    assert back(Checkpoint(Path("a"), {"a": 2}, {})) is True
    assert back.keys == {"a"}
