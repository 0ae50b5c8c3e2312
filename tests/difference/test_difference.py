"""What differs between two checkpoints: meta, files, names, values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from _differences import comparer, one_change, saver
from _foreign import forget_manifest

from lightning_sbckpt import Checkpoint, Checkpointer, mark_as_loader, mark_as_saver
from lightning_sbckpt import register_checkpoint_hooks as with_hooks
from lightning_sbckpt.difference import diff
from lightning_sbckpt.difference.states import _PIECE
from lightning_sbckpt.errors import MismatchError


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


@pytest.fixture
def compare(save):
    return comparer(save)


def test_tensors_that_came_and_went_are_named(compare):
    """Added is what only the second has, missing what only the first has."""
    file = compare(
        {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.ones(1), "c": torch.ones(1)}
    )
    assert (file.missing, file.added, file.equal_tensors) == (("a",), ("c",), 1)
    assert not file.equal


def adam(steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 / steps)
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return optimizer.state_dict()


def test_tensors_in_the_state_of_an_optimizer_have_paths(save):
    """Through dictionaries and lists, joined by slashes; numbers in between are values."""
    (file,) = diff(save(optimizer=adam(1)), save(optimizer=adam(2))).files
    names = {change.name for change in file.changed}
    assert {"state/0/exp_avg", "state/1/exp_avg_sq", "state/0/step"} <= names
    (value,) = file.values
    assert (value.name, value.before, value.after) == ("param_groups/0/lr", "0.1", "0.05")


def test_values_that_are_no_tensors_are_compared(compare):
    """Numbers with their type, texts, None, empty containers, NaN with NaN, and long ones cut."""
    file = compare(
        {"a": 1, "b": "x", "c": None, "d": [], "e": math.nan, "f": True, "g": "y" * 200, "h": 1},
        {
            "a": 2,
            "b": "x",
            "c": 0,
            "d": {},
            "e": math.nan,
            "f": 1,
            "g": "z" * 200,
            "h": torch.ones(2),
        },
    )
    assert [(one.name, one.before, one.after) for one in file.values[:4]] == [
        ("a", "1", "2"),
        ("c", "None", "0"),
        ("d", "[]", "{}"),
        ("f", "True", "1"),
    ]
    assert len(file.values[4].before) == 80
    assert file.values[5].after == "a tensor, float32 (2)"


def test_a_tensor_that_became_a_number_is_told(compare):
    """As the reverse."""
    (value,) = compare({"a": torch.ones(2)}, {"a": 1}).values
    assert (value.before, value.after) == ("a tensor, float32 (2)", "1")


def test_arrays_of_numpy_are_compared_like_tensors(compare):
    """Also where this package stores them in a way of its own."""
    file = compare(
        {"x": np.array([1, 2]), "s": np.float64(1.0)}, {"x": np.array([1, 4]), "s": np.float64(1.0)}
    )
    assert (one_change(file).name, one_change(file).largest) == ("x", 2.0)
    assert file.equal_tensors == 1


def test_equal_checksums_spare_the_reading(save):
    """Files of the same bytes by their manifests are said to be so, and not opened."""
    state = {"w": torch.ones(4)}
    first, second = save(model=state), save(model=state)
    for ckpt in (first, second):
        ckpt.paramfiles["model"].unlink()
        ckpt.paramfiles["model"].touch()
    found = diff(first, second)
    assert found.files[0].same_bytes
    assert found.equal


def test_without_manifests_the_files_are_read(save):
    """As those of SpeechBrain, which has none."""
    state = {"w": torch.ones(4)}
    first, second = save(model=state), save(model=state)
    forget_manifest(first.path)
    (file,) = diff(first, second).files
    assert (file.same_bytes, file.equal_tensors, file.equal) == (False, 1, True)


def test_meta_is_compared_key_by_key(save):
    """Changed, added and missing keys; when it was saved makes no difference."""
    model = {"w": torch.ones(1)}
    first = save({"loss": 0.5, "epoch": 1, "x": torch.ones(2)}, model=model)
    second = save({"loss": 0.25, "acc": 0.9, "x": torch.ones(2)}, model=model)
    found = diff(first, second)
    changed = {one.name: (one.before, one.after) for one in found.meta_changed}
    assert changed.keys() == {"unixtime", "loss"}
    assert changed["loss"] == ("0.5", "0.25")
    assert (found.meta_missing, found.meta_added) == (("epoch",), ("acc",))
    assert not found.equal
    more = save({"loss": 0.5, "epoch": 1, "x": torch.ones(2), "acc": 1}, model=model)
    assert not diff(first, more).equal
    assert not diff(more, first).equal
    again = save({"loss": 0.5, "epoch": 1, "x": torch.ones(2)}, model=model)
    assert diff(first, again).equal
    assert not diff(first, save({"loss": 0.5, "epoch": 1, "x": torch.zeros(2)}, model=model)).equal


def test_recoverables_that_came_and_went_are_named(save):
    """And only those that both have are compared."""
    w = {"w": torch.ones(1)}
    found = diff(save(model=w, optimizer=w), save(model=w, ema=w))
    assert (found.files_missing, found.files_added) == (("optimizer",), ("ema",))
    assert [file.name for file in found.files] == ["model"]
    assert not found.equal


def test_only_what_is_asked_for_is_compared(save):
    """By the names of files, and by a pattern of the names of tensors; and then no meta."""
    first = save(
        {"loss": 1},
        model={"enc.w": torch.ones(1), "dec.w": torch.ones(1)},
        ema={"w": torch.ones(1)},
    )
    second = save(
        {"loss": 2},
        model={"enc.w": torch.ones(1), "dec.w": torch.zeros(1), "dec.b": 1},
        ema={"w": torch.zeros(1)},
    )
    assert diff(first, second, names=["model"], keys="enc.*").equal
    assert [file.name for file in diff(first, second, names=["ema"]).files] == ["ema"]
    dec = diff(first, second, keys="model/dec*")
    assert [(file, change.name) for file, change in dec.largest_changes()] == [("model", "dec.w")]
    assert [file.added for file in dec.files] == [(), ("dec.b",)]
    assert dec.meta_changed == ()


def test_an_unknown_recoverable_is_refused_with_those_there_are(save):
    """Rather than said to be equal."""
    first = save(model={"w": torch.ones(1)})
    with pytest.raises(MismatchError, match=r"can't compare 'modle': .* has model; .* has model"):
        diff(first, first, names=["modle"])


@with_hooks
class Counter:
    """A recoverable whose file is text, as SpeechBrain's epoch counter's."""

    def __init__(self, value):
        self.value = value

    @mark_as_saver
    def save(self, path):
        Path(path).write_text(self.value)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.value = Path(path).read_text()


def saved_as(folder, name, obj):
    return Checkpointer(folder, {"it": obj}).save_checkpoint(name=name)


def test_files_that_are_no_torch_files_are_compared_as_text_or_bytes(tmp_path):
    """A short text is shown; of anything else it is told that it can't be read."""
    one, two, again = (
        saved_as(tmp_path, name, Counter(v)) for name, v in zip("abc", "121", strict=True)
    )
    (file,) = diff(one, two).files
    assert [(v.before, v.after) for v in file.values] == [("1", "2")]
    assert diff(one, again).equal
    long = [saved_as(tmp_path, f"{v}", Counter(v * 200)) for v in "de"]
    (sentence,) = diff(*long).files[0].not_compared
    assert sentence.startswith("its bytes differ: ")
    assert "can't be read by torch.load" in sentence


class Sneaky:
    """What only pickle can hold."""

    def __init__(self, value):
        self.value = value


@pytest.mark.filterwarnings("ignore")
def test_what_only_pickle_holds_is_not_read_and_named_if_its_bytes_differ(compare):
    """The tensors beside it are compared."""
    file = compare({"w": torch.ones(1), "p": Sneaky(1)}, {"w": torch.zeros(1), "p": Sneaky(2)})
    assert file.not_compared == ("model+pickled.ckpt, which only pickle can read, has other bytes",)
    assert one_change(file).name == "w"
    same = compare({"w": torch.ones(1), "p": Sneaky(1)}, {"w": torch.zeros(1), "p": Sneaky(1)})
    assert same.not_compared == ()
    alone = compare({"w": torch.ones(1), "p": Sneaky(1)}, {"w": torch.ones(1), "p": Sneaky(2)})
    assert not alone.same_bytes
    assert not alone.equal


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    """Not even one that stands in for the file of tensors."""
    sprung = tmp_path / "sprung"
    ckpts = []
    for name in "ab":
        folder = tmp_path / f"CKPT+{name}"
        folder.mkdir()
        torch.save({"w": Trap(sprung), "n": name}, folder / "model.ckpt")
        ckpts.append(Checkpoint(folder, {}, {"model": folder / "model.ckpt"}))
    (file,) = diff(*ckpts).files
    assert not sprung.exists()
    assert "holds objects that only pickle can hold" in file.not_compared[0]


def test_folders_in_place_of_files_are_compared_by_their_bytes(tmp_path):
    """A hook may write a folder."""
    ckpts = []
    for name, text in zip("abc", ("x", "x", "y"), strict=True):
        folder = tmp_path / f"CKPT+{name}"
        (folder / "it.ckpt").mkdir(parents=True)
        (folder / "it.ckpt" / "part").write_text(text)
        ckpts.append(Checkpoint(folder, {}, {"it": folder / "it.ckpt"}))
    assert diff(ckpts[0], ckpts[1]).files[0].same_bytes
    assert diff(ckpts[0], ckpts[2]).files[0].not_compared == (
        "it is a folder, with other bytes in it",
    )


def test_progress_is_told_up_to_the_end(save):
    """In bytes, never backwards, of the files that are read."""
    big = torch.zeros(3 * _PIECE)
    first = save(model={"w": big}, same={"w": torch.ones(1)})
    second = save(model={"w": big + 1}, same={"w": torch.ones(1)})
    told = []
    diff(first, second, on_progress=lambda done, total: told.append((done, total)))
    total = sum(ckpt.paramfiles["model"].stat().st_size for ckpt in (first, second))
    done = [step for step, _ in told]
    assert {of for _, of in told} == {total}
    assert done == sorted(done)
    assert len(set(done)) >= 4
    assert done[-1] == total


def test_all_of_it_goes_into_json(compare, save):
    """NaN and infinity as texts."""
    found = diff(
        save({"a": 1}, model={"w": torch.zeros(2)}), save({"a": 2}, model={"w": torch.ones(2)})
    )
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["equal"] is False
    assert read["files"][0]["changed"][0]["relative"] == "inf"
    assert read["files"][0]["changed"][0]["shape"] == [2]
