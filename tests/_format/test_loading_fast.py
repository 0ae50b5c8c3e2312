"""Loading straight into live objects: the same result as torch's way, without a second copy."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from _releases import needs_torch

from lightning_sbckpt import Checkpointer, torch_parameter_transfer
from lightning_sbckpt._format import load_in_place, read_tensors
from lightning_sbckpt._format.index import read_outline
from lightning_sbckpt._format.load import load_state, trusting_pickle
from lightning_sbckpt._format.load_in_place import live_state
from lightning_sbckpt._format.read_tensors import read_owned
from lightning_sbckpt._io import digests
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError
from lightning_sbckpt.hooks.builtin import torch_recovery


def bits(tensor):
    """Return a tensor's values as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(first, second):
    """Return whether two states have the same types, structure and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return (first.dtype, first.shape, first.stride(), first.requires_grad) == (
            second.dtype,
            second.shape,
            second.stride(),
            second.requires_grad,
        ) and bits(first) == bits(second)
    if isinstance(first, float):
        return first.hex() == second.hex()
    return first == second


def saved(folder, state, name="state.ckpt", **options):
    """Save a state as torch does and return the file."""
    torch.save(state, folder / name, **options)
    return folder / name


PLAIN = {
    "every number type": {
        str(dtype): torch.tensor([0, 1, 5]).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
            *(torch.complex64, torch.complex128),
        )
    },
    "every layout": {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "every second": torch.arange(9)[::2],
        "channels last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(4),
        "no elements": torch.empty(0, 3),
        "no dimensions": torch.tensor(2.5),
        "a part of a larger one": torch.arange(100.0)[10:20],
    },
    "parameters": [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), False)],
    "needing gradients": torch.ones(2, requires_grad=True),
    "a module": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(),
    "plain values": {
        "numbers": (
            1,
            -1,
            255,
            256,
            70000,
            -(2**31),
            2**80,
            -(2**80),
            -2.5,
            float("inf"),
            True,
            None,
        ),
        (1, "pair"): ["word", "wörter\n", OrderedDict(z=1, a=[{}, [], (), (1, 2, 3, 4)])],
        "size": torch.Size([2, 3]),
        "type": torch.float16,
    },
    "four hundred tensors": [torch.full((i % 7,), float(i)) for i in range(400)],
    "no dictionary": torch.arange(3),
}


class TestWhatIsReadFast:
    """States as torch saves them come back without torch's reader."""

    @pytest.mark.parametrize("kind", PLAIN)
    def test_it_is_what_torch_reads(self, tmp_path, kind):
        """Types, structure, layouts and bits."""
        file = saved(tmp_path, PLAIN[kind])
        (state,) = read_owned(file)
        assert same(state, torch.load(file, weights_only=True))
        assert same(state, PLAIN[kind])

    def test_the_versions_of_layers_come_with_the_state(self, tmp_path):
        """Which torch keeps as an attribute of the OrderedDict."""
        state = torch.nn.BatchNorm1d(2).state_dict()
        (loaded,) = read_owned(saved(tmp_path, state))
        assert loaded._metadata == state._metadata

    @pytest.mark.parametrize("grouped", [False, True])
    def test_shared_memory_stays_shared_and_other_memory_separate(self, tmp_path, grouped):
        """The same tensor twice, and two views of one memory; not their neighbours in the file."""
        base = torch.arange(1000.0)
        state = {"a": base, "again": base, "head": base[:10], "other": torch.zeros(1000)}
        (loaded,) = read_owned(saved(tmp_path, state), grouped=grouped)
        assert loaded["a"] is loaded["again"]
        loaded["a"].fill_(7)
        assert loaded["head"].eq(7).all() and loaded["other"].eq(0).all()
        loaded["other"].fill_(8)
        assert loaded["a"].eq(7).all()

    def test_the_tensors_outlive_their_file(self, tmp_path):
        """Cut off and removed, it takes nothing with it; nothing of it is mapped."""
        file = saved(tmp_path, {"a": torch.ones(100_000)})
        (loaded,) = read_owned(file)
        assert file.name not in Path("/proc/self/maps").read_text()
        os.truncate(file, 0)
        file.unlink()
        assert loaded["a"].sum() == 100_000
        loaded["a"].add_(1)

    def test_large_tensors_are_read_in_pieces_by_threads(self, tmp_path, monkeypatch):
        """Every piece to its place, whatever their number."""
        monkeypatch.setattr(read_tensors, "_PIECE", 4096)
        state = {str(i): torch.randint(0, 256, (n,)) for i, n in enumerate((5, 4096, 100_001))}
        (loaded,) = read_owned(saved(tmp_path, state), grouped=True)
        assert same(loaded, state)


class Custom:
    """A class that a user allows torch to load."""

    def __init__(self):
        self.word = "w"


OTHER = {
    "sparse": torch.eye(3).to_sparse(),
    "conjugated": torch.tensor([1 + 2j]).conj(),
    "counter": Counter({2: 1}),
    "bytes": b"bytes",
    "set": {1, 2},
    "device": torch.device("cpu"),
}
TAKEN_SINCE = {
    "bytes": needs_torch("2.5", "tensors-only loading of bytes"),
    "set": needs_torch("2.6", "tensors-only loading of sets"),
}


class TestWhatIsLeftToTorch:
    """What isn't known is read by torch, with the same result as ever."""

    @pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=TAKEN_SINCE.get(kind, ())) for kind in OTHER]
    )
    def test_it_is_told_apart_and_read(self, tmp_path, kind):
        """One such thing among others is enough."""
        file = saved(tmp_path, {"it": OTHER[kind], "plain": torch.ones(2)})
        assert read_owned(file) is None
        loaded = load_state(file)
        assert loaded["plain"].sum() == 2
        if kind == "sparse":
            assert loaded["it"].is_sparse and same(loaded["it"].to_dense(), torch.eye(3))
        else:
            assert loaded["it"] == OTHER[kind]

    def test_the_format_of_long_ago(self, tmp_path):
        """No zip archive."""
        file = saved(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
        assert read_owned(file) is None
        assert load_state(file)["a"].sum() == 2

    def test_another_pickle_protocol(self, tmp_path):
        """With opcodes of its own."""
        file = saved(tmp_path, {"a": torch.ones(2)}, pickle_protocol=4)
        assert read_owned(file) is None

    def test_another_byte_order(self, tmp_path):
        """Torch turns the bytes round; they are not taken as they are."""
        file = rewritten(saved(tmp_path, {"a": torch.ones(2)}), "byteorder", lambda _: b"big")
        assert read_owned(file) is None

    def test_a_compressed_archive(self, tmp_path):
        """Its bytes are not where the index says."""
        file = saved(tmp_path, {"a": torch.ones(50), "b": torch.rand(1000)})
        assert read_owned(rewritten(file, "data/0", lambda data: data)) is not None
        rewritten(file, "data/0", lambda data: data, zipfile.ZIP_DEFLATED)
        assert read_owned(file) is None

    @needs_torch("2.5", "torch.serialization.safe_globals")
    def test_a_class_of_the_users(self, tmp_path):
        """Even if torch is told to trust it: it may look at bytes that aren't there yet."""
        file = saved(tmp_path, {"a": Custom()})
        assert read_owned(file) is None
        with torch.serialization.safe_globals([Custom]):
            assert read_owned(file) is None
            assert load_state(file)["a"].word == "w"


def rewritten(file, record, change, compression=zipfile.ZIP_STORED):
    """Change one record of a torch file."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            if name.endswith(f"/{record}"):
                archive.writestr(name, change(data), compression)
            else:
                archive.writestr(name, data)
    return file


class TestHostileFiles:
    """Bytes that nobody wrote in good faith."""

    def test_a_name_in_the_pickle_is_never_looked_up(self, tmp_path):
        """Nor anything called."""

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        file = saved(tmp_path, {"a": Payload()})
        assert read_owned(file) is None
        with pytest.raises(UntrustedPickleError):
            load_state(file)
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize(
        "values",
        [
            b"K\x00K\x03\x85K\x01\x85",  # three elements of two
            b"K\x01K\x02\x85K\x01\x85",  # two from the second on
            b"K\x00K\x02\x85K\x02\x85",  # every second of two
            b"J\xff\xff\xff\xffK\x02\x85K\x01\x85",  # from one before the first on
            b"K\x00K\x02\x85)",  # no strides
        ],
    )
    def test_a_tensor_may_not_reach_beyond_its_storage(self, tmp_path, values):
        """In whatever way."""
        file = saved(tmp_path, torch.arange(2.0))

        def change(pickled):
            sound = b"K\x00K\x02\x85q\x06K\x01\x85q\x07"
            assert pickled.count(sound) == 1
            return pickled.replace(sound, values)

        assert read_outline(rewritten(file, "data.pkl", lambda same: same), tuple) is not None
        assert read_outline(rewritten(file, "data.pkl", change), tuple) is None

    @pytest.mark.parametrize(
        "pickled",
        [
            b"\x80\x02ctorch\nFloatStorage\n.",
            b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\ns.",
            b"\x80\x02](ctorch._utils\n_rebuild_tensor_v2\ne.",
            b"\x80\x02ctorch\nFloatStorage\nK\x01\x86.",
            b"\x80\x02}ctorch\nFloatStorage\nK\x01s.",
        ],
    )
    def test_a_name_is_no_value(self, tmp_path, pickled):
        """Where it stands for itself, it is not handed on."""
        file = rewritten(saved(tmp_path, torch.ones(2)), "data.pkl", lambda _: pickled)
        assert read_owned(file) is None

    def test_what_is_read_from_broken_pickles_is_what_torch_reads(self, tmp_path):
        """A thousand files with bytes of the pickle changed: the same, or left to torch."""
        draw = random.Random(3)
        state = {
            "a": torch.arange(4.0),
            "b": [torch.ones(2, 2).T, {"c": 1.5}],
            "o": OrderedDict(x=1),
        }
        file = saved(tmp_path, state)
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            begin = file.read_bytes().index(archive.read(name))
            length = archive.getinfo(name).file_size
        sound = file.read_bytes()
        read = 0
        for _ in range(1000):
            broken = bytearray(sound)
            for _ in range(draw.choice((1, 1, 2, 5))):
                broken[begin + draw.randrange(length)] = draw.randrange(256)
            file.write_bytes(broken)
            found = read_owned(file)
            if found is not None:
                read += 1
                assert same(found[0], torch.load(file, weights_only=True, map_location="cpu"))
        assert 50 < read < 900


def module():
    """Return a module with parameters, buffers of several types and tied weights."""
    torch.manual_seed(random.randrange(10**6))
    made = torch.nn.Sequential(
        torch.nn.Linear(3, 3),
        torch.nn.BatchNorm1d(3),
        torch.nn.Conv2d(2, 2, 3),
        torch.nn.Linear(3, 3),
    )
    made[3].weight = made[0].weight
    made[1].running_mean.normal_()
    made[1].num_batches_tracked.fill_(random.randrange(100))
    return made


def is_direct(obj, file):
    """Return whether a file is read straight into an object."""
    return live_state(obj, file) is not None


class TestLiveModules:
    """A module's tensors keep their memory and get the saved values."""

    def test_values_are_those_saved_in_the_same_memory(self, tmp_path):
        """Parameters, buffers, tied weights; whoever watches the version sees a change."""
        source, target = module(), module()
        file = saved(tmp_path, source.state_dict())
        before = {
            key: (value.data_ptr(), value._version) for key, value in target.state_dict().items()
        }
        parameters = list(target.parameters())
        assert is_direct(target, file)
        torch_recovery(target, file, True)
        assert same(target.state_dict(), source.state_dict())
        assert [id(p) for p in target.parameters()] == [id(p) for p in parameters]
        assert target[3].weight is target[0].weight
        for key, value in target.state_dict().items():
            assert value.data_ptr() == before[key][0]
            assert value._version > before[key][1]
        assert target[0].weight.requires_grad and target[0].weight.is_leaf

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.double(),
            lambda m: m.bfloat16(),
            lambda m: m.to(memory_format=torch.channels_last),
            lambda m: setattr(m[0], "weight", torch.nn.Parameter(torch.randn(6, 3)[::2])),
        ],
        ids=["double", "bfloat16", "channels last", "strided"],
    )
    def test_other_types_and_layouts_are_converted_as_torch_does(self, tmp_path, change):
        """Each tensor keeps its own."""
        file = saved(tmp_path, module().state_dict())
        ours, theirs = module(), module()
        for each in (ours, theirs):
            change(each)
        assert is_direct(ours, file)
        torch_recovery(ours, file, True)
        theirs.load_state_dict(torch.load(file, weights_only=True))
        assert same(ours.state_dict(), theirs.state_dict())

    def test_a_module_of_the_users_is_loaded_directly_too(self, tmp_path):
        """Its class changes nothing as long as it loads as torch does."""

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module()
                self.register_buffer("scratch", torch.zeros(2), persistent=False)

        source, target = Net(), Net()
        file = saved(tmp_path, source.state_dict())
        assert is_direct(target, file)
        torch_recovery(target, file, True)
        assert same(target.state_dict(), source.state_dict())

    def test_what_does_not_fit_is_told_by_torch(self, tmp_path):
        """Missing, unexpected and of another shape, all in one message."""
        state = {"weight": torch.ones(2, 3), "more": torch.ones(1)}
        file = saved(tmp_path, state)
        with pytest.raises(MismatchError) as caught:
            torch_recovery(torch.nn.Linear(3, 3), file, True)
        for part in ('Missing key(s) in state_dict: "bias"', '"more"', "size mismatch for weight"):
            assert part in str(caught.value)
        assert str(file) in str(caught.value)

    def test_a_transfer_takes_what_is_shared_by_name(self, tmp_path):
        """And leaves the rest as it is."""
        file = saved(tmp_path, {"weight": torch.ones(3, 3), "more": torch.ones(1)})
        target = torch.nn.Linear(3, 3)
        bias = target.bias.detach().clone()
        torch_parameter_transfer(target, file)
        assert target.weight.eq(1).all() and torch.equal(target.bias, bias)

    def test_two_saved_tensors_for_one_memory_are_taken_in_torchs_order(self, tmp_path):
        """The last one wins, as ever."""
        source = module()
        source[3].weight = torch.nn.Parameter(torch.full((3, 3), 9.0))
        file = saved(tmp_path, source.state_dict())
        ours, theirs = module(), module()
        assert not is_direct(ours, file)
        torch_recovery(ours, file, True)
        theirs.load_state_dict(torch.load(file, weights_only=True))
        assert same(ours.state_dict(), theirs.state_dict())
        assert ours[0].weight.eq(9).all()

    @pytest.mark.parametrize("where", ["whole", "part"])
    @pytest.mark.parametrize("kind", ["hook", "own way", "extra state"])
    def test_what_others_are_given_is_theirs_to_keep(self, tmp_path, kind, where):
        """A tensor that a hook keeps does not change with the weights, nor with the file."""
        kept = []

        class Keeping(torch.nn.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *rest):
                kept.append(state_dict[f"{prefix}weight"])
                super()._load_from_state_dict(state_dict, prefix, *rest)

        class Extra(torch.nn.Linear):
            def get_extra_state(self):
                return torch.ones(3, 3)

            def set_extra_state(self, state):
                kept.append(state)

        cls = {"hook": torch.nn.Linear, "own way": Keeping, "extra state": Extra}[kind]
        part = cls(3, 3)
        target = part if where == "whole" else torch.nn.Sequential(torch.nn.Linear(3, 3), part)
        with torch.no_grad():
            part.weight.fill_(1)
        file = saved(tmp_path, target.state_dict())
        if kind == "hook":
            # By this name in every release.
            part._register_load_state_dict_pre_hook(
                lambda _module, state, prefix, *_: kept.append(state[f"{prefix}weight"]),
                with_module=True,
            )
        torch_recovery(target, file, True)
        with torch.no_grad():
            part.weight.fill_(5)
        os.truncate(file, 0)
        (value,) = kept
        assert type(value) is torch.Tensor and value.eq(1).all()

    def test_a_load_state_dict_of_the_users_gets_ordinary_tensors(self, tmp_path):
        """In the class or on the object."""

        class Own(torch.nn.Linear):
            def load_state_dict(self, state_dict, *rest, **options):
                self.kept = state_dict["weight"]
                return super().load_state_dict(state_dict, *rest, **options)

        file = saved(tmp_path, torch.nn.Linear(3, 3).state_dict())
        target = Own(3, 3)
        assert not is_direct(target, file)
        torch_recovery(target, file, True)
        assert torch.equal(target.kept, target.weight)
        assert target.kept.data_ptr() != target.weight.data_ptr()
        plain = torch.nn.Linear(3, 3)
        plain.load_state_dict = target.load_state_dict
        assert not is_direct(plain, file)

    def test_a_module_without_memory_is_left_to_torch(self, tmp_path):
        """On the meta device nothing is read, and torch warns."""
        file = saved(tmp_path, torch.nn.Linear(3, 3, bias=False).state_dict())
        with pytest.warns(UserWarning, match="meta"):
            torch_recovery(torch.nn.Linear(3, 3, bias=False, device="meta"), file, True)


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "SGD without momentum": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Adafactor": lambda p: torch.optim.Adafactor(p),  # noqa: PLW0108 - not in every release
    "LBFGS": torch.optim.LBFGS,
    "capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), capturable=False),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
}

NEEDS = {"Adafactor": needs_torch("2.5", "torch.optim.Adafactor")}


def stepped(make, target, steps=2):
    """Return an optimizer of a module's that has made some steps."""
    optimizer = make(target.parameters())
    for _ in range(steps):
        for parameter in target.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(lambda: torch.tensor(1.0))
    return optimizer


class TestLiveOptimizers:
    """An optimizer's state is what torch makes of the same file."""

    @pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
    @pytest.mark.parametrize(
        "kind",
        [pytest.param(kind, marks=NEEDS.get(kind, ())) for kind in OPTIMIZERS],
    )
    def test_it_goes_on_as_the_saved_one(self, tmp_path, kind, begun):
        """Of every kind, new or in the middle of another training."""
        file = saved(tmp_path, stepped(OPTIMIZERS[kind], module()).state_dict())
        ours, theirs = (stepped(OPTIMIZERS[kind], module(), 3 * begun) for _ in range(2))
        torch_recovery(ours, file, True)
        theirs.load_state_dict(torch.load(file, weights_only=True))
        assert same(ours.state_dict(), theirs.state_dict())

    def test_moments_there_are_keep_their_memory(self, tmp_path):
        """So that there is never a second copy; whoever watches the version sees a change."""
        target = module()
        file = saved(tmp_path, stepped(torch.optim.Adam, module()).state_dict())
        optimizer = stepped(torch.optim.Adam, target)
        before = {
            (p, name): (value, value._version)
            for p, values in optimizer.state.items()
            for name, value in values.items()
        }
        torch_recovery(optimizer, file, True)
        for (p, name), (value, version) in before.items():
            assert optimizer.state[p][name] is value
            assert value._version > version

    def test_new_moments_are_each_their_own(self, tmp_path):
        """Writable, apart from each other, and from the file, which may go."""
        file = saved(tmp_path, stepped(torch.optim.Adam, module()).state_dict())
        expected = torch.load(file, weights_only=True)
        optimizer = torch.optim.Adam(module().parameters())
        assert is_direct(optimizer, file)
        torch_recovery(optimizer, file, True)
        os.truncate(file, 0)
        assert file.name not in Path("/proc/self/maps").read_text()
        assert same(optimizer.state_dict(), expected)
        moments = [v for values in optimizer.state.values() for v in values.values()]
        assert len({value.untyped_storage().data_ptr() for value in moments}) == len(moments)
        for number, value in enumerate(moments):
            value.fill_(number)
        assert [value.flatten()[0].item() for value in moments] == list(range(len(moments)))
        again = saved(tmp_path, optimizer.state_dict())
        assert again.stat().st_size < 30_000

    def test_an_optimizer_that_moments_share_memory_in_is_left_to_torch(self, tmp_path):
        """What is written to one of them would be in the other."""
        target = module()
        file = saved(tmp_path, stepped(torch.optim.Adam, module()).state_dict())
        optimizer = stepped(torch.optim.Adam, target)
        values = optimizer.state[target[0].weight]
        values["exp_avg"] = values["exp_avg_sq"]
        assert not is_direct(optimizer, file)
        values["exp_avg"] = target[0].weight.detach()
        weight = target[0].weight.detach().clone()
        torch_recovery(optimizer, file, True)
        assert torch.equal(target[0].weight, weight)

    def test_groups_that_do_not_fit_are_told_by_torch(self, tmp_path):
        """And nothing is loaded."""
        file = saved(tmp_path, stepped(torch.optim.Adam, module()).state_dict())
        optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters())
        with pytest.raises(MismatchError, match="doesn't match the size of optimizer's group"):
            torch_recovery(optimizer, file, True)
        assert not optimizer.state

    def test_hooks_and_classes_of_others_get_ordinary_tensors(self, tmp_path):
        """The moments there are stay as they were until torch takes the new ones."""
        file = saved(tmp_path, stepped(torch.optim.Adam, module()).state_dict())
        target = module()
        optimizer = stepped(torch.optim.Adam, target)
        before = optimizer.state[target[0].weight]["exp_avg"].clone()
        seen = []
        optimizer.register_load_state_dict_pre_hook(
            lambda it, state: seen.append(it.state[target[0].weight]["exp_avg"].clone())
        )
        assert not is_direct(optimizer, file)
        torch_recovery(optimizer, file, True)
        assert torch.equal(seen[0], before)

        class Own(torch.optim.Adam):
            def load_state_dict(self, state_dict):
                super().load_state_dict(state_dict)

        assert not is_direct(Own(target.parameters()), file)

    def test_parameters_elsewhere_get_their_moments_there(self, tmp_path, monkeypatch):
        """In batches, so that the whole file is never in memory; step counts stay where they are."""
        monkeypatch.setattr(load_in_place, "_BATCH", 16)
        file = saved(tmp_path, stepped(torch.optim.Adam, torch.nn.Linear(3, 3)).state_dict())
        optimizer = torch.optim.Adam(torch.nn.Linear(3, 3, device="meta").parameters())
        state = live_state(optimizer, file)
        assert [v.device.type for v in state["state"][0].values()] == ["cpu", "meta", "meta"]


class TestChangesWhileReading:
    """A file that is damaged after it was verified can't end the process."""

    @pytest.mark.parametrize("kind", ["module", "optimizer", "other"])
    def test_a_file_cut_off_meanwhile_is_told(self, tmp_path, monkeypatch, kind):
        """With the file and where it ends, and what to do."""
        source = torch.nn.Linear(100, 100)
        file = saved(tmp_path, source.state_dict())
        target = torch.nn.Linear(100, 100)
        if kind == "optimizer":
            file = saved(tmp_path, stepped(torch.optim.Adam, source).state_dict())
            target = torch.optim.Adam(source.parameters())
        real = read_tensors.identity_of

        def cut_off(descriptor):
            found = real(descriptor)
            os.truncate(file, 5000)
            return found

        monkeypatch.setattr(read_tensors, "identity_of", cut_off)
        with pytest.raises(DamagedCheckpointError) as caught:
            load_state(file) if kind == "other" else torch_recovery(target, file, True)
        message = str(caught.value)
        assert f"{file} was changed while it was read: it ends at byte 5,000" in message
        assert "load again" in message

    def test_a_file_written_over_meanwhile_is_told(self, tmp_path, monkeypatch):
        """Although every byte could be read."""
        file = saved(tmp_path, {"a": torch.ones(2)})
        real = read_tensors._read_piece

        def write_over(path, descriptor, piece):
            real(path, descriptor, piece)
            os.utime(path, ns=(0, 0))

        monkeypatch.setattr(read_tensors, "_read_piece", write_over)
        with pytest.raises(DamagedCheckpointError, match="its size or time is another"):
            load_state(file)

    def test_a_disk_that_fails_is_told(self, tmp_path, monkeypatch):
        """With the system's words."""
        file = saved(tmp_path, {"a": torch.ones(2)})

        def fail(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(read_tensors, "_read_piece", fail)
        with pytest.raises(DamagedCheckpointError, match=r"can't be read: Input/output error"):
            load_state(file)


@pytest.fixture
def digested(monkeypatch):
    """The names of files read in full for their checksum, of files that count as old enough."""
    read = []
    real = digests.read_digest
    monkeypatch.setattr(digests, "_TICK_SECONDS", -1.0)

    def note(stream):
        read.append(Path(f"/proc/self/fd/{stream.fileno()}").readlink().name)
        return real(stream)

    monkeypatch.setattr(digests, "read_digest", note)
    return read


class TestReadingOnce:
    """From search to load the checksum of a file is computed once."""

    def run(self, folder):
        """Return a checkpointer of a module and an optimizer."""
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        return Checkpointer(folder, {"model": model, "optimizer": optimizer})

    FILES = ("CKPT.yaml", "model.ckpt", "optimizer.ckpt")

    def test_a_checkpoint_that_was_just_found_sound_is_not_read_again(self, tmp_path, digested):
        """By whatever loads it next."""
        from lightning_sbckpt.plugin.state.parts import FolderReader

        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        found = checkpointer.find_sound_checkpoint()
        checkpointer.load_checkpoint(found)
        FolderReader(verified=checkpointer.verified).read(found.path)
        assert sorted(digested) == list(self.FILES)
        checkpointer.find_sound_checkpoint()
        assert len(digested) == 6  # A search always reads.

    def test_what_another_has_read_is_read_again(self, tmp_path, digested):
        """Nothing is known but what was handed on."""
        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        found = checkpointer.find_sound_checkpoint()
        self.run(tmp_path).load_checkpoint(found)
        assert len(digested) == 6

    def test_the_path_of_a_run_is_read_once(self, tmp_path, digested):
        """To find which checkpoint it means is a search."""
        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        checkpointer.load_checkpoint(tmp_path / "newest")
        assert sorted(digested) == list(self.FILES)

    def test_a_file_changed_since_is_read_again(self, tmp_path, digested):
        """Its bytes changed in place, its size and even its time as before."""
        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        found = checkpointer.find_sound_checkpoint()
        file = found.paramfiles["model"]
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        with file.open("r+b") as stream:
            stream.write(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(DamagedCheckpointError, match=r"model\.ckpt has other bytes"):
            checkpointer.load_checkpoint(found)

    def test_a_file_seconds_old_is_read_again(self, tmp_path, digested, monkeypatch):
        """Its clock may not have ticked between two changes."""
        # For longer than a busy machine takes from the save to the load.
        monkeypatch.setattr(digests, "_TICK_SECONDS", 600.0)
        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        checkpointer.load_checkpoint(checkpointer.find_sound_checkpoint())
        assert len(digested) == 6

    def test_after_the_window_all_is_read_again(self, tmp_path, digested, monkeypatch):
        """Bytes may have rotted meanwhile."""
        checkpointer = self.run(tmp_path)
        checkpointer.save_checkpoint()
        found = checkpointer.find_sound_checkpoint()
        now = digests.time.monotonic()
        monkeypatch.setattr(digests.time, "monotonic", lambda: now + 301)
        checkpointer.load_checkpoint(found)
        assert len(digested) == 6


class TestLookingIntoACheckpoint:
    """`Checkpoint.open` gives tensors that are read when they are looked at."""

    @pytest.fixture
    def ckpt(self, tmp_path):
        """A checkpoint of a module of 4 MB."""
        return Checkpointer(tmp_path, {"model": torch.nn.Linear(1000, 1000)}).save_checkpoint()

    def test_tensors_are_parts_of_the_file(self, ckpt):
        """With the saved values."""
        state = ckpt.open("model")
        assert "model.ckpt" in Path("/proc/self/maps").read_text()
        assert same(state, torch.load(ckpt.paramfiles["model"], weights_only=True))
        del state
        assert "model.ckpt" not in Path("/proc/self/maps").read_text()

    def test_writing_to_them_does_not_change_the_file(self, ckpt):
        """The mapping is private."""
        before = ckpt.paramfiles["model"].read_bytes()
        ckpt.open("model")["weight"].fill_(3)
        assert ckpt.paramfiles["model"].read_bytes() == before

    def test_an_unknown_name_is_told_with_those_there_are(self, ckpt):
        """And the folder."""
        with pytest.raises(
            MismatchError, match=r"no file for the recoverable 'modle'; it has: 'model'"
        ):
            ckpt.open("modle")

    def test_nothing_is_executed_even_under_trust(self, ckpt, tmp_path):
        """It is for looking."""

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        torch.save({"a": Payload()}, ckpt.paramfiles["model"])
        with trusting_pickle(), pytest.raises(UntrustedPickleError):
            ckpt.open("model")
        assert not (tmp_path / "made").exists()

    def test_a_file_that_cannot_be_mapped_is_read(self, ckpt):
        """The format of long ago; and damage is told."""
        file = ckpt.paramfiles["model"]
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        assert ckpt.open("model")["a"].sum() == 2
        os.truncate(file, 10)
        with pytest.raises(DamagedCheckpointError, match=r"model\.ckpt can't be read"):
            ckpt.open("model")


MEMORY = """
import sys, torch
from lightning_sbckpt.hooks.builtin import torch_recovery
from lightning_sbckpt._format.load import load_live_state

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024

model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(25)])
optimizer = torch.optim.Adam(model.parameters())
if sys.argv[2] == "begun":
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
small = torch.nn.Linear(1, 1)
torch.save(small.state_dict(), sys.argv[1] + "/small")
torch_recovery(small, sys.argv[1] + "/small", True)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if sys.argv[3] == "ours":
    torch_recovery(model, sys.argv[1] + "/model", True)
    torch_recovery(optimizer, sys.argv[1] + "/optimizer", True)
else:
    model.load_state_dict(torch.load(sys.argv[1] + "/model", weights_only=True))
    optimizer.load_state_dict(torch.load(sys.argv[1] + "/optimizer", weights_only=True))
print(status("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("begun", ["new", "begun"])
def test_there_is_no_second_copy_in_memory(tmp_path, begun):
    """Of 100 MB of weights and 200 MB of moments; torch's own way has one, so this can fail."""
    model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(25)])
    saved(tmp_path, model.state_dict(), "model")
    saved(tmp_path, stepped(torch.optim.Adam, model, 1).state_dict(), "optimizer")
    grown = {}
    for way in ("ours", "theirs"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), begun, way],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        grown[way] = float(done.stdout)
    moments = 191 if begun == "new" else 0
    assert grown["ours"] - moments < 30
    if begun == "begun":
        assert grown["theirs"] > 150
