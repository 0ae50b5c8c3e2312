"""Meta that `yaml.dump` wrote with Python's tags is read as plain values, and nothing is executed."""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import pytest
import torch
import yaml
from _foreign import forget_manifest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.yaml import parse_yaml
from lightning_sbckpt.errors import MetaError

SCALAR = "!!python/object/apply:numpy._core.multiarray.scalar"
NUMBERS = [
    np.float64(0.5),
    np.float32(0.1),
    np.float16(1.5),
    np.longdouble("-0.1"),
    np.longdouble("inf"),
    np.int8(-3),
    np.int64(2**40),
    np.uint64(2**63),
    np.bool_(True),
    np.array(2.5, dtype=">f4")[()],
    np.array(2.5, dtype=">f8"),
    np.mean([0.25, 0.5]),
    torch.tensor(0.5),
    torch.tensor(3),
    torch.tensor(True),
    torch.tensor(0.5, dtype=torch.bfloat16),
    torch.tensor(0.1, dtype=torch.float64),
    torch.tensor([0.5]),
    torch.tensor(0.5, requires_grad=True),
    torch.nn.Parameter(torch.tensor(1.5)),
    torch.arange(5)[3],
]


def written(value):
    """Read back what SpeechBrain would write of a value."""
    return parse_yaml(yaml.dump({"value": value}).encode(), "CKPT.yaml")["value"]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_are_plain_numbers(value):
    """Of numpy and of torch; with the value that `item` gives."""
    found = written(value)
    assert type(found) in (int, float, bool)
    assert found == (value.item() if type(found) is int else float(value))


def test_they_were_written_the_same_by_older_numpy():
    """Before numpy 2 the function had another path."""
    text = yaml.dump({"value": np.float64(0.5)})
    older = text.replace("numpy._core.", "numpy.core.")
    newer = text.replace("numpy.core.", "numpy._core.")
    assert older != newer
    for form in (older, newer):
        assert parse_yaml(form.encode(), "CKPT.yaml") == {"value": 0.5}


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0, 2.0]),
        np.array([[1, 2, 3], [4, 5, 6]]),
        np.asfortranarray(np.array([[1, 2, 3], [4, 5, 6]], dtype="f4")),
        np.array([True, False]),
        np.zeros((0, 3)),
    ],
    ids=repr,
)
def test_arrays_are_tensors(array):
    """As those that are saved here."""
    found = written(array)
    assert found.tolist() == (array.tolist() if array.size else [])


def test_tensors_stay_tensors():
    """Strided and empty ones included."""
    for tensor in (torch.tensor([1.0, 2.0]), torch.arange(6).reshape(2, 3).T, torch.zeros(0)):
        found = written(tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, 2), (1, 2)),
        (((1, 2), [3]), ((1, 2), [3])),
        ({"at": {(1, 2): 3}}, {"at": {(1, 2): 3}}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(float, a=1.0), {"a": 1.0}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.deque([1, 2]), [1, 2]),
        (frozenset([1]), [1]),
        (torch.Size([1, 2]), [1, 2]),
        (torch.device("cuda", 1), "cuda:1"),
        (pathlib.Path("/a/b"), "/a/b"),
        (np.str_("über"), "über"),
        (np.array(["a", "bc"]), ["a", "bc"]),
        (np.complex64(1 + 2j), "(1+2j)"),
        (1 + 2j, "1.0+2.0j"),
    ],
    ids=repr,
)
def test_other_values_of_the_list_are_plain_ones(value, plain):
    """What a recipe may put into the meta."""
    assert written(value) == plain


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [touch hacked]",
        "!!python/object/new:os.system [touch hacked]",
        "!!python/object/apply:builtins.eval ['1']",
        "!!python/object/apply:collections.namedtuple [a, b]",
        "!!python/object:collections.OrderedDict {}",
        "!!python/module:os ''",
        "!!python/name:os.system ''",
        "[!!python/name:os.system '']",
        "{? !!python/name:os.system '' : 1}",
        "!!python/tuple [!!python/name:os.system '']",
        "!!python/object/apply:numpy.dtype [f8]",
        f"{SCALAR} [1, 2]",
        f"{SCALAR} [!!python/name:a.b '', !!binary 'AA==']",
        f"{SCALAR} [!!python/object/apply:numpy.dtype [O], !!binary 'AA==']",
        f"{SCALAR} [!!python/object/apply:numpy.dtype [f8], !!binary 'AA==']",
        "!!python/object/apply:torch.storage._load_from_bytes [!!binary 'gAJjb3MKc3lzdGVtCi4=']",
        "!!python/object/apply:torch.storage._load_from_bytes [7]",
        "&a !!python/tuple [*a]",
        "&a !!python/object/apply:collections.OrderedDict [*a]",
        "!!python/object/apply:collections.OrderedDict [7]",
        "!!python/object/apply:collections.deque {listitems: 7}",
        "!!python/object/apply:pathlib.PosixPath [7]",
        "!!python/tuple {a: 1}",
        "!!python/object/apply:numpy._core.multiarray._reconstruct {args: [], state: [1, 2]}",
    ],
)
def test_anything_else_is_refused_and_runs_nothing(value, tmp_path, monkeypatch):
    """An unknown name, a part in the place of a value, values that can't be."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetaError):
        parse_yaml(f"loss: {value}\n".encode(), "CKPT.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ([2**40, 0], [0, 0]),
        ([2**40], [0]),
        ([9], [1]),
        ([2], [9]),
        ([-1], [1]),
        ([1] * 99, [1] * 99),
    ],
)
def test_a_shape_that_is_not_in_the_bytes_takes_no_memory(size, stride):
    """A few bytes of text make no tensor of terabytes."""
    text = yaml.dump({"value": torch.tensor([1.0, 2.0])})
    begin = text.index("- 0\n") + 4
    ends = text.index("- false", begin)
    tuples = "".join(f"- !!python/tuple {numbers}\n" for numbers in (size, stride))
    with pytest.raises(MetaError):
        parse_yaml((text[:begin] + tuples + text[ends:]).encode(), "CKPT.yaml")


def test_deep_tuples_and_growing_ones_are_refused():
    """By the bounds that hold for lists."""
    deep = "!!python/tuple [" * 1000 + "]" * 1000
    growing = "a0: &a0 !!python/tuple [x, x]\n" + "".join(
        f"a{i}: &a{i} !!python/tuple [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    for text in (f"deep: {deep}\n", growing):
        with pytest.raises(MetaError):
            parse_yaml(text.encode(), "CKPT.yaml")


DOUBLED = {
    "key": ("(x, y)", "!!python/tuple [*a{0}, *a{0}]", "? *a{0}\n: 1\n"),
    "set": ("(x, y)", "!!python/tuple [*a{0}, *a{0}]", "s: !!set\n  ? *a{0}\n"),
    "path": ("x", "!!python/object/apply:pathlib.PosixPath [*a{0}, *a{0}]", ""),
    "device": ("[x]", "[*a{0}, *a{0}]", "d: !!python/object/apply:torch.device [*a{0}]\n"),
    "dtype": ("[x]", "[*a{0}, *a{0}]", "d: !!python/object/apply:numpy.dtype [*a{0}]\n"),
    "deque": (
        "[x]",
        "!!python/object/apply:collections.deque {{args: [*a{0}], listitems: *a{0}}}",
        "",
    ),
    "ordered": (
        "[x]",
        "!!python/object/apply:collections.OrderedDict [[[*a{0}, *a{0}]]]",
        "",
    ),
    "parameter": (
        "!!python/tuple [x]",
        "!!python/tuple [*a{0}, *a{0}]",
        "? !!python/object/apply:torch._utils._rebuild_parameter [*a{0}]\n: 1\n",
    ),
}


@pytest.mark.parametrize("kind", DOUBLED)
def test_what_doubles_in_each_line_is_refused_or_stays_small(kind):
    """Sixty lines that would make 2 to the 60th of something, in memory or in time."""
    first, then, last = DOUBLED[kind]
    first = first.replace("(x, y)", "!!python/tuple [x, y]")
    lines = [f"a0: &a0 {first}\n"]
    lines += [f"a{i}: &a{i} {then.format(i - 1)}\n" for i in range(1, 61)]
    try:
        found = parse_yaml(("".join(lines) + last.format(60)).encode(), "CKPT.yaml")
    except MetaError:
        return
    assert len(repr(found)) < 2**16


def test_a_folder_with_such_meta_is_ranked_and_recovered(tmp_path, caplog):
    """It counts as sound: by a numpy number the best is found."""
    model = torch.nn.Linear(1, 1)
    with Checkpointer(tmp_path, {"model": model}) as checkpointer:
        for name, loss in (("a", 0.5), ("b", 0.25), ("c", 0.75)):
            saved = checkpointer.save_checkpoint(name=name)
            forget_manifest(saved.path)
            meta = {**saved.meta, "loss": np.float64(loss), "shape": (1, 2)}
            (saved.path / "CKPT.yaml").write_text(yaml.dump(meta))
    reader = Checkpointer(tmp_path, {"model": model})
    assert reader.recover_if_possible(min_key="loss").path.name == "CKPT+b"
    reader.annotate(reader.find_checkpoint(max_key="loss"), {"bleu": 1.0})
    reader.delete_checkpoints(min_keys=["loss"], importance_keys=())
    assert [ckpt.meta["shape"] for ckpt in reader.list_checkpoints()] == [(1, 2)]
    assert "unreadable" not in caplog.text
