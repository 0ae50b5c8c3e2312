"""Reading a state in pieces runs no code, whatever its files hold, and leaves its folder never."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from _releases import needs_torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._sharded.contents import Chunk, _require_exact_cover, read_contents
from lightning_sbckpt._sharded.reading import SavedShards
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


class Dangerous:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def folder(tmp_path):
    """A state as DCP alone writes it, in a checkpoint."""
    found = tmp_path / "CKPT+a" / "model.dcp"
    found.mkdir(parents=True)
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(3), "count": 5, "betas": (0.9, 0.99)}
    save(state, storage_writer=FileSystemWriter(found), no_dist=True)
    (found.parent / "CKPT.yaml").write_text("unixtime: 1.0\nend-of-epoch: true\n")
    return found


def described(folder):
    return FileSystemReader(folder).read_metadata()


def describe(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_dcp_alone_has_written_is_read(folder):
    """Tensors, numbers and tuples."""
    state = SavedShards(folder).state()
    assert torch.equal(state.pop("weight"), torch.ones(2, 3))
    assert torch.equal(state.pop("bias"), torch.zeros(3))
    assert state == {"count": 5, "betas": (0.9, 0.99)}


@pytest.mark.parametrize("where", ["instead", "planner_data", "storage_meta", "dtype"])
def test_code_in_the_description_is_not_run_by_listing_finding_or_recovering(
    folder, tmp_path, where
):
    """It is refused by the name of what it would have called."""
    mark = tmp_path / "mark"
    metadata = described(folder)
    if where == "instead":
        metadata = Dangerous(mark)
    elif where == "dtype":
        metadata.state_dict_metadata["weight"].properties.dtype = Dangerous(mark)
    else:
        setattr(metadata, where, Dangerous(mark))
    describe(folder, metadata)
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(3, 2)}, access="read")
    assert len(checkpointer.list_checkpoints()) == 1
    assert checkpointer.find_checkpoint() is not None
    with pytest.raises(UntrustedPickleError, match=r"\.metadata names posix\.mkdir") as caught:
        checkpointer.recover_if_possible()
    assert "it was not read" in str(caught.value)
    assert not mark.exists()
    # The test can fail: this is what DCP does with such a file.
    with contextlib.suppress(AttributeError):
        FileSystemReader(folder).read_metadata()
    assert mark.exists()


def put_value(folder, name, data):
    """Give a value other bytes."""
    metadata = described(folder)
    index = next(key for key in metadata.storage_data if key.fqn == name)
    info = metadata.storage_data[index]
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, len(data)
    with file.open("ab") as stream:
        stream.write(data)
    describe(folder, metadata)


@pytest.mark.parametrize("name", ["count", "weight"])
def test_code_in_a_value_or_a_tensor_is_not_run(folder, tmp_path, name):
    """DCP reads values by torch.load(weights_only=False); here no value is read so."""
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save(Dangerous(mark), buffer)
    put_value(folder, name, buffer.getvalue())
    with pytest.raises(UntrustedPickleError, match="an object that only pickle can hold"):
        SavedShards(folder).state()
    assert not mark.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "", "x\0y"])
def test_no_path_leads_out_of_the_folder(folder, name):
    """A name of a file is a name, not a path."""
    metadata = described(folder)
    next(iter(metadata.storage_data.values())).relative_path = name
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match="as the name of a file of this folder"):
        read_contents(folder)


def test_a_link_in_the_folder_is_not_followed(folder, tmp_path):
    """It may lead anywhere."""
    file = next(folder.glob("*.distcp"))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match="symbolic link"):
        SavedShards(folder).state()


def change_chunk(metadata):
    metadata.state_dict_metadata["weight"].chunks[0].offsets = torch.Size([1, 0])


def change_size(metadata):
    metadata.state_dict_metadata["weight"].size = torch.Size([200, 3])


def change_type(metadata):
    metadata.state_dict_metadata["weight"].properties.dtype = "float32"


def change_place(metadata):
    metadata.planner_data["weight"] = ("weight", 1.5)


def drop_storage(metadata):
    metadata.storage_data.clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_chunk, "a piece .* of a tensor of size"),
        (change_size, "pieces that don't make up a tensor"),
        (change_type, "'float32' as the type of a tensor"),
        (change_place, "as a place in a state"),
        (drop_storage, "KeyError"),
    ],
)
def test_a_description_that_can_not_be_true_is_damage(folder, change, reason):
    """The message names the file and says what was found."""
    metadata = described(folder)
    change(metadata)
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match=reason) as caught:
        read_contents(folder)
    assert str(folder / ".metadata") in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps(None)])
def test_what_is_no_description_is_damage(folder, data):
    """Cut off, or something else."""
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="recover from another checkpoint"):
        read_contents(folder)


def test_a_list_as_long_as_a_file_says_does_not_fill_the_memory(folder):
    """An index is no larger than what there is."""
    metadata = described(folder)
    metadata.planner_data["weight"] = ("weight", 2**40)
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match="says that"):
        SavedShards(folder).state()


def test_a_class_that_a_description_would_change_is_not_the_one_of_the_process(folder):
    """A pickle can set attributes of classes that it names; those it gets are its own."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    name = b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n"
    # The class itself, then BUILD with a state of slots: setattr(StorageMeta, "mark", 7).
    data = name + b"(N}S'mark'\nI7\nstb."
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        read_contents(folder)
    assert not hasattr(StorageMeta, "mark")
    pickle.loads(data)
    assert StorageMeta.mark == 7
    del StorageMeta.mark


def test_a_value_with_numpy_numbers_comes_back_as_it_was(tmp_path):
    """They are written as plain things, since tensors-only loading does not take them."""
    import numpy as np

    from lightning_sbckpt._io.storage import LocalStorage
    from lightning_sbckpt._sharded.writing import write_sharded
    from lightning_sbckpt._world.world import SingleProcess

    state = {"lr": np.float64(0.1), "where": Path("a/b"), "table": np.arange(4)}
    write_sharded({"model": state}, tmp_path, SingleProcess(), LocalStorage())
    found = SavedShards(tmp_path / "model.dcp").state()
    assert (type(found["lr"]), found["lr"], found["where"]) == (np.float64, 0.1, Path("a/b"))
    assert found["table"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"odd": Dangerous("x")}, "odd is a Dangerous, which only pickle can hold"),
        ({"a": {7: torch.ones(1)}}, "its key 7 in 'a' is a int"),
    ],
)
def test_what_would_not_come_back_is_refused_when_it_is_saved(tmp_path, state, reason):
    """And not when it is needed."""
    from lightning_sbckpt._io.storage import LocalStorage
    from lightning_sbckpt._sharded.writing import write_sharded
    from lightning_sbckpt._world.world import SingleProcess
    from lightning_sbckpt.errors import SaveError

    with pytest.raises(SaveError, match=reason):
        write_sharded({"model": state}, tmp_path, SingleProcess(), LocalStorage())


def test_a_plain_optimizer_says_that_its_groups_are_others(tmp_path):
    """The message has both."""
    from lightning_sbckpt._sharded.loading import load_sharded
    from lightning_sbckpt._sharded.states import optimizer_state

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = optimizer_state(optimizer, model)
    save(dict(state), storage_writer=FileSystemWriter(tmp_path / "o.dcp"), no_dist=True)
    other = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(MismatchError, match=r"groups of \[2\] parameters, the SGD of \[1\]"):
        load_sharded(other, tmp_path / "o.dcp", {"model": model})


def two_pieces(*pieces):
    """Change the description of the weight, 2 x 3, to other pieces of its one file."""

    def change(metadata):
        saved = metadata.state_dict_metadata["weight"]
        index = next(key for key in metadata.storage_data if key.fqn == "weight")
        info = metadata.storage_data.pop(index)
        saved.chunks = []
        for offsets, sizes in pieces:
            saved.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = MetadataIndex("weight", torch.Size(offsets))
            metadata.storage_data[place] = info

    return change


@pytest.mark.parametrize(
    "pieces",
    [
        [((0, 0), (1, 3)), ((0, 0), (1, 3))],
        [((0, 0), (1, 3)), ((0, 1), (1, 2)), ((1, 0), (1, 1))],
        [((0, 0), (2, 2)), ((1, 1), (1, 2))],
        [((0, 0), (1, 3)), ((0, 0), (1, 1)), ((1, 1), (1, 2))],
    ],
    ids=["twice", "in a row", "at a corner", "two sizes at one place"],
)
def test_pieces_that_overlap_are_damage(folder, pieces):
    """As large as the tensor together, they would leave a part of it as it was before."""
    metadata = described(folder)
    two_pieces(*pieces)(metadata)
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"overlaps another|don't make up"):
        read_contents(folder)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("columns", [1, 5, 100])
def test_pieces_of_a_mesh_make_up_a_tensor(rows, columns):
    """Of a mesh of 10,000 ranks, empty pieces among them, in a moment."""
    mesh = [Chunk((2 * r, 3 * c), (2, 3)) for r in range(rows) for c in range(columns)]
    _require_exact_cover((2 * rows, 3 * columns), [*mesh, Chunk((2 * rows, 0), (0, 3))])
    with pytest.raises(ValueError, match="don't make up"):
        _require_exact_cover((2 * rows, 3 * columns), mesh[:-1])


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32, torch.quint4x2])
def test_quantized_types_are_damage(folder, dtype):
    """Torch crashes where such a tensor is made of bytes alone; DCP saves none."""
    metadata = described(folder)
    metadata.state_dict_metadata["weight"].properties.dtype = dtype
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match="as the type of a tensor"):
        read_contents(folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02}N" + b"\x85" * 1000 + b"Ns.", "more than 200 deep"),
        (b"\x80\x02Nr\x00\x00\x00\x10.", "memo of 268,435,456 entries"),
        (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "key of more than 1,000 values"),
    ],
    ids=["deep", "memo", "shared"],
)
def test_description_that_would_kill_its_reader_is_damage(folder, data, reason):
    """It is refused before Python's unpickler begins."""
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=reason):
        read_contents(folder)


def test_piece_that_is_larger_than_its_file_is_damage(folder):
    """No memory is asked for that the folder has no bytes for."""
    metadata = described(folder)
    weight = metadata.state_dict_metadata["weight"]
    weight.size = torch.Size([2**40, 3])
    weight.chunks[0].sizes = torch.Size([2**40, 3])
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"a piece .* bytes"):
        read_contents(folder)
    for info in metadata.storage_data.values():
        info.length = 2**50
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match="expected a piece that ends at"):
        read_contents(folder)


def test_message_about_a_hostile_value_is_short(folder):
    """A value that takes for ever to print is shown by its beginning."""
    shared = ()
    for _ in range(40):
        shared = (shared, shared)
    metadata = described(folder)
    metadata.state_dict_metadata["weight"].properties.dtype = shared
    describe(folder, metadata)
    with pytest.raises(DamagedCheckpointError, match="as the type of a tensor") as caught:
        read_contents(folder)
    assert len(str(caught.value)) < 1000
