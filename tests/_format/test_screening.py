"""Small files that would kill their reader, or keep it busy for ever, are refused before it begins."""

from __future__ import annotations

import collections
import io
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.index import read_outline
from lightning_sbckpt._format.load import load_state, open_state
from lightning_sbckpt._format.screening import ScreeningError, screen, screen_file
from lightning_sbckpt.errors import DamagedCheckpointError, SBCheckpointError, brief

DEEP = b")" + b"\x85" * 1_000_000
"""A tuple nested a million deep."""

SHARED = b")" + b"2\x86" * 60
"""A tuple of two halves that are each the same tuple, sixty times over."""

FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NO_HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + data


def tensor(shape, stride, count, *, key="0"):
    """A tensor in a pickle, on a storage of `count` float32."""
    storage = b"(" + text("storage") + FLOATS + text(key) + text("cpu") + number(count) + b"tQ"
    size = b"(" + b"".join(map(number, shape)) + b"t"
    steps = b"(" + b"".join(map(number, stride)) + b"t"
    return REBUILD + b"(" + storage + number(0) + size + steps + b"\x89" + NO_HOOKS + b"tR"


def state_of(*items):
    """The pickle of a dictionary with one key `w`, or of one key with what is given."""
    return b"\x80\x02}" + b"".join(items) + b"s."


def write(path, pickled, records=None):
    """A file as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", sys.byteorder)
        for key, data in (records or {}).items():
            archive.writestr(f"m/data/{key}", data)
        archive.writestr("m/version", b"3\n")
    return path


READ = """
import pathlib, sys
from lightning_sbckpt._format.load import load_state, open_state
from lightning_sbckpt.errors import DamagedCheckpointError
for read in (load_state, open_state):
    try:
        read(pathlib.Path(sys.argv[1]))
    except DamagedCheckpointError:
        continue
    sys.exit("it was read")
"""

HOSTILE = {
    "a key nested a million deep": state_of(DEEP, b"N"),
    "a key whose hash takes 2**60 steps": state_of(SHARED, b"N"),
    "a set of such keys": b"\x80\x02\x8f(" + SHARED + b"\x90.",
    "a set made by a call": b"\x80\x02cbuiltins\nset\n](" + SHARED + b"e\x85R.",
    "a counter made by a call": b"\x80\x02ccollections\nCounter\n](" + SHARED + b"e\x85R.",
    "many bytes of nothing": b"\x80\x02cbuiltins\nbytearray\n" + number(2**40) + b"\x85R.",
    "a codec that takes time": b"\x80\x02c_codecs\nencode\n"
    + text("a" * 9)
    + text("idna")
    + b"\x86R.",
    "an expanded tensor": state_of(text("w"), tensor([2**40], [0], 1)),
    "an empty tensor of a huge shape": state_of(text("w"), tensor([2**40, 0], [1, 1], 1)),
    "a storage larger than its record": state_of(text("w"), tensor([2], [1], 2**20)),
    "an item set in a tensor": b"\x80\x02"
    + tensor([1], [1], 1)
    + number(2**20)
    + number(1)
    + b"s.",
    "nothing but a mark": b"\x80\x02(.",
    "an extension of the registry": b"\x80\x02\x82\x01.",
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_hostile_pickle_is_damage_in_bounded_time_and_memory(tmp_path, name, layout):
    """Every reader of a state says that the file is damaged; none dies, hangs or asks for gigabytes."""
    path = tmp_path / "model.ckpt"
    if layout == "zip":
        write(path, HOSTILE[name], {"0": b"\0" * 4})
    else:
        path.write_bytes(HOSTILE[name])
    if name == "a key nested a million deep":
        # In a process of its own, which it kills if it is not refused.
        command = [sys.executable, "-c", READ, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert read_outline(path, lambda stored: stored) is None
    for read in (load_state, open_state):
        with pytest.raises(SBCheckpointError):
            read(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_before_torch_gets_it(tmp_path, name):
    """Whatever this release of torch would say of it: older ones crash, or worse."""
    path = write(tmp_path / "model.ckpt", HOSTILE[name], {"0": b"\0" * 4})
    with path.open("rb") as stream, pytest.raises(ScreeningError):
        screen_file(stream)


def sparse_coo():
    made = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (2,), is_coalesced=True)
    made._indices()[0, 1] = 10**12
    return made


def sparse_csr():
    made = torch.eye(2).to_sparse_csr()
    made.crow_indices()[1:] = 10**12
    return made


def sparse_bsr():
    made = torch.eye(4).to_sparse_bsr((2, 2))
    made.col_indices()[1] = 10**12
    return made


@pytest.mark.parametrize("make", [sparse_coo, sparse_csr, sparse_bsr])
@pytest.mark.parametrize("read", [load_state, open_state])
def test_sparse_tensor_with_an_index_outside_is_refused(tmp_path, make, read):
    """Torch doesn't look, and whatever is done with the tensor reads and writes elsewhere in memory."""
    torch.save({"weight": make()}, tmp_path / "model.ckpt")
    with pytest.raises(DamagedCheckpointError):
        read(tmp_path / "model.ckpt")


def test_compressed_records_are_refused(tmp_path):
    """A file that unpacks to a thousand times its size is not unpacked."""
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02N" * 1_000_000 + b".")
    with pytest.raises(DamagedCheckpointError, match="its records are compressed"):
        load_state(path)


def test_old_layout_is_refused_where_torch_reads_it_unsafely(tmp_path, monkeypatch):
    """With torch before 2.6 a file of the old layout can run code, so it needs trust."""
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert load_state(path)["w"].tolist() == [1.0, 1.0]
    monkeypatch.delattr(torch.serialization, "skip_data")
    with pytest.raises(DamagedCheckpointError, match=r"before 2\.6 reads unsafely"):
        load_state(path)


def any_value(rng, depth=0):
    kinds = ["number", "text", "tensor", "none"] + ["dict", "list", "tuple", "set"] * (depth < 3)
    kind = rng.choice(kinds)
    size = rng.randrange(4)
    if kind == "number":
        return rng.choice([1, -3, 2**40, 2**80, 0.5, True, 1j])
    if kind == "text":
        return rng.choice(["", "a", "ü" * 9, b"bytes", bytearray(b"more")])
    if kind == "tensor":
        dtype = rng.choice(
            [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
        )
        whole = torch.ones(6, 4, dtype=dtype)
        return rng.choice(
            [
                whole,
                whole[2:4].t(),
                whole[0:0],
                torch.nn.Parameter(torch.ones(2)),
                torch.Size([2, 3]),
                whole[:1].expand(50, 4),
                whole.to_sparse(),
                torch.float16,
            ]
        )
    if kind == "dict":
        keys = [rng.choice([rng.randrange(9), "k", (1, ("a", 2)), None]) for _ in range(size)]
        kinds = [dict, collections.OrderedDict]
        return rng.choice(kinds)((key, any_value(rng, depth + 1)) for key in keys)
    if kind == "list":
        return [any_value(rng, depth + 1) for _ in range(size)]
    if kind == "tuple":
        return tuple(any_value(rng, depth + 1) for _ in range(size))
    return {1, "a", (2, 3)} if kind == "set" else None


@pytest.mark.parametrize("seed", range(30))
def test_whatever_torch_writes_passes(seed):
    """No state that torch.save writes and torch.load reads is refused, in either layout."""
    rng = random.Random(seed)
    state = {"state": [any_value(rng) for _ in range(5)]}
    for new in (True, False):
        if not new and "sparse" in str(state):
            continue
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=new)
        file.seek(0)
        screen_file(file)
    for protocol in (2, 3, 4, 5):
        screen(pickle.dumps([1, (2, "a"), {"b": {3}}], protocol=protocol), longest=200)


def test_memo_of_billions_is_refused():
    """The unpickler in C makes an array as long as the largest index, which a few bytes can name."""
    with pytest.raises(ScreeningError, match=r"memo of 4,294,967,295 entries"):
        screen(b"\x80\x02Nr\xff\xff\xff\xff.", longest=8)


def test_shared_tuples_that_are_no_keys_pass():
    """Sharing is how torch.save keeps a state small; only hashing makes it expensive."""
    screen(b"\x80\x02" + SHARED + b".", longest=200)
    with pytest.raises(ScreeningError, match="key of more than"):
        screen(state_of(SHARED, b"N"), longest=200)


def test_damaged_state_among_healthy_ones_is_stepped_over(tmp_path, scale):
    """Recovery goes on with the checkpoint before one that would have killed it."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": scale(1.0)})
    checkpointer.save_checkpoint(name="healthy")

    def hostile_hook(_, path):
        write(path, HOSTILE["a key whose hash takes 2**60 steps"])

    hostile = Checkpointer(tmp_path / "run")
    hostile.add_recoverable("model", scale(1.0), custom_save_hook=hostile_hook)
    saved = hostile.save_checkpoint(name="hostile")
    with pytest.raises(DamagedCheckpointError):
        saved.open("model")


def test_message_stays_short_whatever_it_shows():
    """Deep, long and unprintable values make no message that never ends."""
    shared = ()
    for _ in range(60):
        shared = (shared, shared)
    assert len(brief(shared)) < 400
    assert len(brief(10**5000)) < 400
    assert len(brief({"a" * 10_000: ["b"] * 10_000})) < 400
