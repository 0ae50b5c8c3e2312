"""Files of other formats, written whole or not at all."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedCheckpointError,
    MismatchError,
    MissingDependencyError,
    SaveError,
    UntrustedPickleError,
)
from lightning_sbckpt.export import publish_file, to_safetensors, to_state_dict

BOTH = pytest.mark.parametrize("export", [to_safetensors, to_state_dict])


class State:
    """A recoverable with any state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Tied(torch.nn.Module):
    """A model of which two parameters are one, with a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(3)


@pytest.fixture
def save(tmp_path):
    """A function that saves an object, or a state, as the model."""

    def save(model, name="model"):
        obj = model if hasattr(model, "state_dict") else State(model)
        return Checkpointer(tmp_path / "run", {name: obj}).save_checkpoint()

    return save


def header(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), sorted(file.keys())


@BOTH
def test_the_tensors_are_those_of_the_checkpoint(save, tmp_path, export):
    """Bit for bit, of every type, read by the format's own library and nothing of ours."""
    state = {
        str(dtype): torch.tensor([1, 0, 2]).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    }
    state["moved"] = torch.arange(6.0).reshape(2, 3).t()
    path = export(save(state), tmp_path / "out").path
    read = safetensors.torch.load_file if export is to_safetensors else torch.load
    loaded = read(path)
    assert loaded.keys() == state.keys()
    assert all(loaded[key].dtype == state[key].dtype for key in state)
    assert all(torch.equal(loaded[key].float(), state[key].float()) for key in state)


def test_a_plain_torch_file_needs_nothing_of_ours(save, tmp_path):
    """It opens in a process that can't import this package, tensors only."""
    path = to_state_dict(save(torch.nn.Linear(2, 1)), tmp_path / "model.pt").path
    code = (
        "import sys, torch; sys.modules['lightning_sbckpt'] = None\n"
        f"model = torch.nn.Linear(2, 1); model.load_state_dict(torch.load({str(path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_recoverable_is_chosen_by_name(save, tmp_path):
    """And a folder's path will do for the checkpoint."""
    saved = save({"w": torch.ones(2)}, name="ema")
    path = to_safetensors(str(saved.path), tmp_path / "a", "ema").path
    assert torch.equal(safetensors.torch.load_file(path)["w"], torch.ones(2))


@BOTH
def test_an_unknown_recoverable_is_refused_with_those_there_are(save, tmp_path, export):
    """Nothing is written."""
    with pytest.raises(MismatchError, match=r"no recoverable 'net' to export; it has: 'model'"):
        export(save({"w": torch.ones(1)}), tmp_path / "a", "net")
    assert not (tmp_path / "a").exists()


def test_tied_weights_are_written_once_and_loaded_as_tied(save, tmp_path):
    """As the library's own `save_model` does, whose `load_model` finds both names again."""
    model = Tied()
    exported = to_safetensors(save(model), tmp_path / "a")
    assert exported.remarks == (
        "head.weight is the same tensor as embed.weight, which stands for both",
    )
    metadata, names = header(exported.path)
    assert metadata == {"format": "pt", "head.weight": "embed.weight"}
    assert "head.weight" not in names
    other = Tied()
    safetensors.torch.load_model(other, exported.path)
    assert torch.equal(other.head.weight, model.embed.weight)
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)


def test_tensors_that_overlap_are_written_in_full(save, tmp_path):
    """A part of another tensor, and one in another order."""
    whole = torch.arange(6.0).reshape(2, 3)
    state = {"whole": whole, "row": whole[1], "turned": whole.t(), "flat": whole.view(6)}
    exported = to_safetensors(save(state), tmp_path / "a")
    loaded = safetensors.torch.load_file(exported.path)
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert exported.remarks[0] == "row shares memory with whole, and is written in full"
    assert len(exported.remarks) == 3


def test_empty_tensors_share_nothing(save, tmp_path):
    """Although they all lie at no address."""
    exported = to_safetensors(save({"a": torch.ones(0), "b": torch.ones(0)}), tmp_path / "a")
    assert exported.remarks == ()
    assert header(exported.path)[1] == ["a", "b"]


@pytest.mark.parametrize("keys", ["enc.*", ["enc.w", "enc.b"]])
def test_only_the_tensors_asked_for_are_written(save, tmp_path, keys):
    """By one pattern or by several; what else is in the state does not matter."""
    state = {"enc.w": torch.ones(1), "enc.b": torch.ones(1), "dec.w": torch.ones(1), "n": 3}
    path = to_safetensors(save(state), tmp_path / "a", keys=keys).path
    assert header(path)[1] == ["enc.b", "enc.w"]


def test_a_pattern_that_fits_nothing_names_some_of_what_there_is(save, tmp_path):
    """Rather than write an empty file."""
    with pytest.raises(MismatchError, match=r"fits 'encoder\.\*'; the first names are: enc\.w"):
        to_safetensors(save({"enc.w": torch.ones(1)}), tmp_path / "a", keys="encoder.*")


def test_what_is_no_tensor_is_refused_by_name(save, tmp_path):
    """The format has no place for it; all are named, and what to do."""
    state = {"w": torch.ones(1), "n": 3, "extra": {"a": 1}}
    with pytest.raises(MismatchError, match=r"'n' is of type int; 'extra' is of type dict\. Leave"):
        to_safetensors(save(state), tmp_path / "a")
    with pytest.raises(MismatchError, match="holds a list, expected a dictionary of tensors"):
        to_safetensors(save([torch.ones(1)]), tmp_path / "a")


def test_a_tensor_of_a_kind_that_the_format_lacks_is_refused(save, tmp_path):
    """By name, and nothing is left of the file."""
    with pytest.raises(MismatchError, match=r"can't be written as safetensors: .*sparse"):
        to_safetensors(save({"w": torch.eye(2).to_sparse()}), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_the_library_the_extra_to_install_is_named(save, tmp_path, monkeypatch):
    """Only for its own format."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lightning-sbckpt\[export\]'"):
        to_safetensors(save({"w": torch.ones(1)}), tmp_path / "a")
    to_state_dict(save({"w": torch.ones(1)}), tmp_path / "a")


@BOTH
def test_a_damaged_checkpoint_is_not_exported(save, tmp_path, export):
    """What is wrong would be passed on without the manifest that tells it."""
    saved = save({"w": torch.ones(100)})
    content = bytearray(saved.paramfiles["model"].read_bytes())
    content[len(content) // 2] ^= 0xFF
    saved.paramfiles["model"].write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"model\.ckpt has other bytes"):
        export(saved, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_only_pickle_holds_is_read_only_when_trusted(save, tmp_path, another_user):
    """The error says how to say so."""
    saved = save({"w": torch.ones(1), "p": State(1)})
    another_user()
    with pytest.raises(UntrustedPickleError, match="pass trust_pickle=True"):
        to_state_dict(saved, tmp_path / "a")
    path = to_state_dict(saved, tmp_path / "a", trust_pickle=True).path
    assert torch.load(path, weights_only=False)["p"].state == 1


@BOTH
def test_a_file_that_is_there_is_not_replaced_unless_told(save, tmp_path, export):
    """And then the old one is there until the new one is whole."""
    saved = save({"w": torch.ones(1)})
    target = tmp_path / "a"
    target.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"a is there already and was left as it is"):
        export(saved, target)
    assert target.read_text() == "mine"
    export(saved, target, overwrite=True)
    assert target.stat().st_size >= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]


def test_what_would_be_refused_is_not_written_first(tmp_path):
    """It may take minutes."""
    (tmp_path / "a").touch()
    with pytest.raises(ConfigurationError, match="is there already"):
        publish_file(tmp_path / "a", pytest.fail)


@BOTH
def test_the_file_may_be_read_by_whom_other_files_may(save, tmp_path, export):
    """Its mode is that of any new file."""
    path = export(save({"w": torch.ones(1)}), tmp_path / "a").path
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_path_that_can_be_no_file_is_refused(save, tmp_path):
    """A folder, and a file in no folder."""
    saved = save({"w": torch.ones(1)})
    with pytest.raises(ConfigurationError, match="can't be written: it is a folder"):
        to_state_dict(saved, tmp_path, overwrite=True)
    with pytest.raises(ConfigurationError, match=r"there is no folder .*nowhere"):
        to_state_dict(saved, tmp_path / "nowhere" / "a")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    """By its path."""
    with pytest.raises(CheckpointNotFoundError, match="is not a checkpoint"):
        to_state_dict(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, overwrite):
    """A full disk, say, in the middle of the file; nothing half is left anywhere."""
    if overwrite:
        (tmp_path / "a").write_text("before")

    def write(path):
        path.write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(SaveError, match="could not be written: No space left on device"):
        publish_file(tmp_path / "a", write, overwrite=overwrite)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == (
        {"a": "before"} if overwrite else {}
    )


def test_the_target_appears_when_the_file_is_whole(tmp_path):
    """While it is written there is nothing of its name."""
    seen = []

    def write(path):
        path.write_text("a")
        seen.append((tmp_path / "a").exists())
        seen.append(path.parent == tmp_path)

    publish_file(tmp_path / "a", write)
    assert seen == [False, True]
    assert (tmp_path / "a").read_text() == "a"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    """Somebody else was faster, and keeps the name."""

    def write(path):
        path.write_text("mine")
        (tmp_path / "a").write_text("theirs")

    with pytest.raises(ConfigurationError, match="is there already"):
        publish_file(tmp_path / "a", write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "theirs"}


def test_where_there_are_no_links_it_is_renamed(tmp_path, monkeypatch):
    """As on some network filesystems."""

    def no_links(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    publish_file(tmp_path / "a", lambda path: path.write_text("a"))
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a"]


def any_view(rng, base):
    """A view of a tensor, with any of torch's lazy bits."""
    view = base
    for _ in range(rng.randrange(1, 5)):
        steps = [lambda t: t[..., 1:], lambda t: t.transpose(0, -1), lambda t: t[:1].expand(3, -1)]
        steps += [torch.conj if base.is_complex() else torch._neg_view] * 2
        view = rng.choice(steps)(view)
        if not view.numel():
            return base
    return view


@pytest.mark.parametrize("seed", range(20))
def test_numbers_exported_are_those_that_torch_load_gives(save, tmp_path, seed):
    """Conjugated, negated, strided, expanded and shared views: the format takes bytes as they lie."""
    rng = random.Random(seed)
    base = torch.randn(3, 4, dtype=rng.choice([torch.complex64, torch.float32]))
    state = {"base": base} | {f"view{i}": any_view(rng, base) for i in range(5)}
    saved = save(state)
    expected = torch.load(saved.paramfiles["model"], weights_only=True)
    exported = to_safetensors(saved, tmp_path / "out.safetensors")
    with safetensors.safe_open(exported.path, "pt") as file:
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        shared = file.metadata()
    for name, tensor in expected.items():
        found = written[name] if name in written else written[shared[name]]
        assert torch.equal(found, tensor.resolve_conj().resolve_neg()), name


def test_names_that_collide_are_refused(save, tmp_path):
    """Of `1` and `"1"` one would be lost without a word."""
    saved = save({"1": torch.ones(1), 1: torch.zeros(1)})
    with pytest.raises(MismatchError, match="two tensors of the name '1'"):
        to_safetensors(saved, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
