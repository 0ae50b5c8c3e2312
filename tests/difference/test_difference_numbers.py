"""How a change of a tensor is measured, in every type and order in memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from _differences import comparer, numbers, one_change, saver
from _releases import needs_torch

from lightning_sbckpt.difference import diff
from lightning_sbckpt.difference.states import _PIECE


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


@pytest.fixture
def compare(save):
    return comparer(save)


# torch remarks on what it will drop, and on what it doesn't check.
pytestmark = pytest.mark.filterwarnings("ignore:.*(Sparse|quantized|TypedStorage)")

FLOATING = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
WHOLE = ["int64", "int32", "int16", "int8", "uint8"]
UNSIGNED = [
    pytest.param(dtype, marks=needs_torch("2.5", f"saving of {dtype}"))
    for dtype in ("uint16", "uint32", "uint64")
]


@pytest.mark.parametrize("dtype", [*FLOATING, *WHOLE, *UNSIGNED, "complex64", "complex128"])
def test_a_change_is_measured_in_every_type(compare, dtype):
    """How many elements, how much at most, and how much relative to what was there."""
    file = compare({"w": numbers(dtype, 3, 4, 0)}, {"w": numbers(dtype, 3, 4, 2)})
    change = one_change(file)
    assert (change.name, change.dtype, change.shape) == ("w", dtype, (3,))
    assert (change.elements, change.changed, change.largest) == (3, 1, 2.0)
    assert change.relative == pytest.approx(2 / 5)
    assert not file.equal


def test_booleans_that_flip_are_counted(compare):
    """From true to false is a change of one."""
    file = compare({"m": torch.tensor([True, False])}, {"m": torch.tensor([True, True])})
    assert (one_change(file).changed, one_change(file).largest) == (1, 1.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_whole_numbers_lose_no_digit_and_do_not_run_over(compare, sign):
    """Neighbours that are one double are told apart, and the two ends are as far as they are."""
    large = 2**62
    file = compare({"n": torch.tensor([large])}, {"n": torch.tensor([large + sign])})
    assert one_change(file).largest == 1.0
    ends = [torch.tensor([end]) for end in (2**63 - 1, -(2**63))][::sign]
    far = compare({"n": ends[0]}, {"n": ends[1]})
    assert one_change(far).largest == pytest.approx(2.0**64)


def test_nan_at_the_same_place_is_no_change(compare):
    """Whatever its bits are; infinity, too, and a zero with a sign."""
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    before = torch.stack([nan, torch.tensor(math.inf), torch.tensor(0.0)])
    after = torch.stack([other_nan, torch.tensor(math.inf), torch.tensor(-0.0)])
    file = compare({"w": before}, {"w": after})
    assert file.changed == ()
    assert file.equal
    assert file.equal_tensors == 1


def test_what_is_no_number_before_and_after_does_not_spoil_the_rest(compare):
    """The change is relative to the numbers there were."""
    before = torch.tensor([math.nan, math.inf, 3.0, 4.0])
    after = torch.tensor([math.nan, math.inf, 3.0, 5.0])
    assert one_change(compare({"w": before}, {"w": after})).relative == 0.2


def test_a_number_that_became_nan_comes_first(compare):
    """Its largest change is NaN, and it stands before any other change."""
    nan = torch.tensor([1.0, math.nan])
    file = compare(
        {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.full((2,), 100.0), "b": nan}
    )
    changes = {change.name: change for change in file.changed}
    assert math.isnan(changes["b"].largest)
    assert changes["b"].changed == 1
    assert math.isnan(changes["b"].relative)


def test_largest_changes_are_ordered_across_files(save):
    """Relative to what was there, NaN first, and no more than asked for."""
    first = save(model={"a": torch.ones(1), "b": torch.ones(1)}, ema={"c": torch.ones(1)})
    second = save(
        model={"a": torch.ones(1) * 2, "b": torch.ones(1) * math.nan}, ema={"c": torch.ones(1) * 4}
    )
    found = diff(first, second)
    assert [(file, one.name) for file, one in found.largest_changes()] == [
        ("model", "b"),
        ("ema", "c"),
        ("model", "a"),
    ]
    assert len(found.largest_changes(2)) == 2


def test_what_was_zero_has_changed_infinitely(compare):
    """There is no norm to compare with."""
    assert one_change(compare({"w": torch.zeros(2)}, {"w": torch.ones(2)})).relative == math.inf


def test_tensors_larger_than_a_piece_are_compared_to_their_end(compare):
    """A change in the last element of several pieces and a bit is found, and all are counted."""
    before = torch.zeros(3 * _PIECE + 5)
    before[0] = 2.0
    after = before.clone()
    after[-1] = 1.0
    change = one_change(compare({"w": before}, {"w": after}))
    assert (change.elements, change.changed, change.relative) == (3 * _PIECE + 5, 1, 0.5)
    after[_PIECE] = 3.0
    change = one_change(compare({"w": before}, {"w": after}))
    assert (change.changed, change.largest) == (2, 3.0)


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        torch.nn.Parameter,
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
    ],
    ids=["transposed", "part of a larger one", "parameter", "sparse", "csr"],
)
def test_the_values_count_and_not_how_they_lie_in_memory(compare, rearrange):
    """Another order in memory is no change, and a change is found in any."""
    x = torch.arange(12.0).reshape(3, 4) + 1
    moved = x.clone()
    moved[2, 3] = 0.0
    same = compare({"w": rearrange(x)}, {"w": rearrange(x.clone()), "other": torch.ones(1)})
    assert same.equal_tensors == 1
    assert same.changed == ()
    change = one_change(compare({"w": rearrange(x)}, {"w": rearrange(moved)}))
    assert (change.changed, change.largest) == (1, 12.0)


def test_two_orders_in_memory_are_compared_by_place(compare):
    """A tensor that was transposed in memory alone is equal to what it was."""
    x = torch.arange(12.0).reshape(3, 4)
    file = compare({"w": x}, {"w": x.t().contiguous().t()})
    assert (file.equal_tensors, file.equal) == (1, True)


def test_large_tensors_of_two_orders_are_compared_slice_by_slice(compare):
    """Rows longer than a piece and shorter ones alike."""
    for shape in ((3, _PIECE + 1), (_PIECE + 1, 3)):
        x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
        y = x.t().contiguous().t()
        y[-1, -1] += 0.5
        change = one_change(compare({"w": x}, {"w": y}))
        assert (change.elements, change.changed, change.largest) == (x.numel(), 1, 0.5)


def test_quantized_tensors_are_compared_by_what_they_stand_for(compare):
    """Their values, not their codes."""
    before, after = (
        torch.quantize_per_tensor(torch.tensor([1.0, value]), 0.5, 0, torch.qint8)
        for value in (2.0, 3.0)
    )
    assert one_change(compare({"q": before}, {"q": after})).largest == 1.0


@needs_torch("2.8", "torch.float4_e2m1fn_x2")
def test_what_torch_cannot_compute_with_is_named(compare):
    """Equal bytes are equal; others may mean anything, and make the files differ."""
    before, after = (
        torch.full((2,), code, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for code in (1, 2)
    )
    assert compare({"q": before}, {"q": before.clone(), "w": torch.ones(1)}).equal_tensors == 1
    file = compare({"q": before}, {"q": after})
    assert file.not_compared == (
        "q: its bytes differ, and torch can't compute with float4_e2m1fn_x2",
    )
    assert not file.equal


def test_a_sparse_tensor_too_large_to_be_made_dense_is_named(compare):
    """Not compared, and so not called equal."""
    before, after = (
        torch.sparse_coo_tensor([[0], [0]], [value], (5000, 5000)) for value in (1.0, 2.0)
    )
    (sentence,) = compare({"w": before}, {"w": after}).not_compared
    assert sentence.startswith("w: it is sparse (sparse_coo), and with 25,000,000 elements too")


def test_another_shape_or_type_is_told_with_both(compare):
    """And not compared any further."""
    file = compare(
        {"w": torch.ones(2, 3), "t": torch.ones(1), "s": torch.ones(2)},
        {"w": torch.ones(3, 2), "t": torch.ones(1).half(), "s": torch.ones(2).to_sparse()},
    )
    assert [(one.name, one.before, one.after) for one in file.reshaped] == [
        ("w", "float32 (2, 3)", "float32 (3, 2)"),
        ("t", "float32 (1)", "float16 (1)"),
        ("s", "float32 (2)", "float32 (2) sparse_coo"),
    ]
    assert file.changed == ()


MEASURE = """
import sys
from pathlib import Path
from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt.difference import diff
def peak():
    (line,) = [line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
small, a, b = (read_checkpoint(Path(path)) for path in sys.argv[1:])
diff(small, a, names=["small"])
before = peak()
found = diff(a, b)
assert len(found.files[0].changed) == 2, found
print((peak() - before) / 1e6)
"""


@pytest.mark.long
def test_large_tensors_are_compared_in_little_memory(save):
    """Two states of 200 MB take less than 50 MB more, in a process of its own."""
    big = torch.zeros(25_000_000)
    small = {"w": torch.ones(300_000)}
    paths = [
        str(save(model={"x": big + n, "y": big - n}, small={"w": small["w"] + n}).path)
        for n in range(3)
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50
