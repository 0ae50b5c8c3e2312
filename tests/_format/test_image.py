"""The file writer against `torch.save`: the same bytes, the same state when loaded."""

from __future__ import annotations

import errno
import io
import pickle
import sys
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from _releases import needs_torch
from _torch_files import (
    by_torch,
    checksums,
    contents_of,
    form_of,
    without_checksums,
    written,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format.encode import encode
from lightning_sbckpt._format.image import LARGE, make_template, storages_of
from lightning_sbckpt._format.load import load_state, trusting_pickle
from lightning_sbckpt._format.templates import describe
from lightning_sbckpt._io.direct_write import BLOCK
from lightning_sbckpt._save.items import _by_torch

# Files are put together here; without, each is written by torch itself.
needs_images = needs_torch("2.6", "torch.serialization.skip_data")

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
# Deadlines say how busy the machine is, not what the code does.
quietly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def tensors(draw, pool):
    """Draw a tensor: a new one, a view of an earlier one's storage, or an earlier one itself."""
    if pool and draw(st.booleans()):
        earlier = pool[draw(st.integers(0, len(pool) - 1))]
        if draw(st.booleans()):
            return earlier
        base = torch.empty(0, dtype=earlier.dtype).set_(earlier.untyped_storage())
    else:
        dtype = draw(st.sampled_from(DTYPES))
        count = draw(st.sampled_from([0, 1, 3, 16, 100]))
        data = torch.tensor(
            draw(st.lists(st.integers(0, 255), min_size=count, max_size=count)), dtype=torch.uint8
        ).repeat(dtype.itemsize)
        base = (data > 127) if dtype is torch.bool else data.view(dtype)
    tensor = base
    numel = base.numel()
    shape = draw(st.sampled_from(["whole", "0-dim", "none", "middle", "step", "repeat", "flip"]))
    if shape == "0-dim" and numel:
        tensor = base.as_strided((), (), draw(st.integers(0, numel - 1)))
    elif shape == "none":
        tensor = base.as_strided((3, 0, 2), (7, 1, 1), 0)
    elif shape == "middle" and numel:
        tensor = base[numel // 3 : numel - 1]
    elif shape == "step":
        tensor = base[::2]
    elif shape == "repeat" and numel:
        tensor = base[:1].expand(4, 1)
    elif shape == "flip" and numel >= 6:
        tensor = base[: numel // 3 * 3].view(3, -1).t()
    if draw(st.booleans()):
        grad = tensor.dtype.is_floating_point and draw(st.booleans())
        tensor = torch.nn.Parameter(tensor.detach(), requires_grad=grad)
    elif tensor.dtype in (torch.float32, torch.bfloat16, torch.complex64):
        # Of the newest types torch can't load its own files then.
        tensor = tensor.detach().requires_grad_(draw(st.booleans()))
    return tensor


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
keys = st.one_of(st.text(max_size=3, alphabet="ab.é"), st.integers(-3, 300), st.booleans())


@st.composite
def states(draw, depth=3, pool=None, containers=None):
    """Draw a state: containers in containers, values, tensors, some of them more than once."""
    pool = [] if pool is None else pool
    containers = [] if containers is None else containers
    choice = draw(st.integers(0, 9 if depth else 5)) if depth < 3 else 9
    if choice == 0 and containers:
        return draw(st.sampled_from(containers))
    if choice <= 1:
        return draw(plain)
    if choice <= 5:
        pool.append(draw(tensors(pool)))
        return pool[-1]
    count = draw(st.integers(0, 5))
    if choice <= 7:
        kind = tuple if choice == 6 else list
        made = kind(draw(states(depth - 1, pool, containers)) for _ in range(count))
    else:
        kind = draw(st.sampled_from([dict, OrderedDict]))
        names = draw(st.lists(keys, min_size=count, max_size=count))
        made = kind((name, draw(states(depth - 1, pool, containers))) for name in names)
        if kind is OrderedDict and draw(st.booleans()):
            made._metadata = {"": {"version": draw(st.integers(1, 3))}}
    containers.append(made)
    return made


def to_save(state):
    """Return what of a state is handed to torch, all of which tensors-only loading takes."""
    if describe(state) is not None:
        return state
    encoded, pickled = encode(state)
    assert not pickled
    return encoded


def bytes_by_torch(state):
    """Return the file that torch writes into a stream; into a path, it would be named after it."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


@needs_images
class TestEveryStateAgainstTorch:
    """Drawn states, written by the file writer and by `torch.save`."""

    @given(state=states())
    @quietly
    def test_loads_to_the_very_same_state_also_mapped(self, state):
        """Values, types, strides, storages, what is shared with what: all as from torch's file."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = by_torch(to_save(state), folder / "torch")
            ours = written(state, folder)["model.ckpt"]
            for mmap in (False, True):
                expected = form_of(torch.load(theirs, weights_only=True, mmap=mmap))
                assert form_of(torch.load(ours, weights_only=True, mmap=mmap)) == expected

    @given(state=states())
    @quietly
    def test_is_torchs_file_byte_for_byte_but_for_checksums_of_tensors(self, state):
        """Nothing differs but the CRCs of storages, which are zero, and the id made of them."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = bytes_by_torch(to_save(state))
            ours = written(state, folder)["model.ckpt"].read_bytes()
            assert without_checksums(ours) == without_checksums(theirs)
            # What is no storage has the checksum that zip wants.
            with zipfile.ZipFile(io.BytesIO(ours)) as archive:
                for record in archive.infolist():
                    if "/data/" in record.filename:
                        assert record.CRC == 0
                    else:
                        assert zlib.crc32(archive.read(record)) == record.CRC

    def test_a_state_without_tensor_bytes_is_torchs_file_exactly(self, tmp_path):
        """With no storage there is no checksum to leave out."""
        state = {"lr": 0.1, "empty": torch.empty(0), "names": ["a", "b"]}
        theirs = bytes_by_torch(state)
        assert written(state, tmp_path)["model.ckpt"].read_bytes() == theirs

    def test_with_checksums_off_only_those_of_torch_differ(self, tmp_path):
        """A user who switched CRCs off gets zeros from both, in every record."""
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            state = torch.nn.Linear(3, 2).state_dict()
            theirs = bytes_by_torch(state)
            ours = written(state, tmp_path)["model.ckpt"].read_bytes()
        finally:
            torch.serialization.set_crc32_options(before)
        assert without_checksums(ours) == without_checksums(theirs)
        assert ours == theirs


class Scaled(torch.Tensor):
    """A subclass of tensors, with a value of its own."""


def _with_attributes(tensor, **attributes):
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _quantized_per_channel():
    scales, points = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    return torch.quantize_per_channel(torch.randn(2, 5), scales, points, 0, torch.qint8)


# Made when asked for: some warn that they are of old kinds.
SPECIAL = {
    "sparse COO": lambda: torch.eye(3).to_sparse(),
    "sparse COO, not coalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0], [1, 1]], [1.0, 2.0], (2, 3)
    ),
    "sparse CSR": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(7), 0.1, 3, torch.quint8),
    "quantized by channel": _quantized_per_channel,
    "conjugated": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "meta": lambda: torch.empty(3, 2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "nested, jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "parameter with attributes": lambda: _with_attributes(
        torch.nn.Parameter(torch.ones(2)), decay=False, tag=torch.zeros(2)
    ),
    "buffer": lambda: torch.nn.Buffer(torch.ones(3)),
    "tensor with attributes": lambda: _with_attributes(torch.ones(2), scale=2),
    "computed with gradient": lambda: torch.ones(2, requires_grad=True) * 2,
    "parameter of float8": lambda: torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)),
    "made in inference mode": torch.inference_mode()(lambda: torch.ones(3)),
    "half a pair of unicode": lambda: "file-\udcff",
    "key of half a pair of unicode": lambda: {"file-\udcff": 1},
    "huge integer": lambda: 3**2000,
    "shape, type and device": lambda: [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
    "set": lambda: {1, 2},
    "bytes": lambda: b"abc",
    "complex number": lambda: 1 + 2j,
    "subclass": lambda: torch.ones(3).as_subclass(Scaled),
    "function": lambda: pickle.loads,
    "storage": lambda: torch.ones(3).untyped_storage(),
}
needs_pickle_here = {"subclass", "function"}


class TestEverySpecialThing:
    """What has no place in a template: it is written by torch, or as an image made anew."""

    @pytest.mark.parametrize("what", SPECIAL)
    @pytest.mark.filterwarnings("ignore")
    def test_beside_usual_tensors_it_loads_as_from_torchs_file(self, what, tmp_path):
        """Each in a state with shared tensors around it; nothing is lost or mixed up."""
        shared = torch.arange(20.0)
        special = SPECIAL[what]()
        state = {"a": shared, "it": special, "b": shared[3:], "again": special}
        encoded, pickled = encode(state)
        paths = written(state, tmp_path)
        expected = torch.load(by_torch(encoded, tmp_path / "torch"), weights_only=True)
        loaded = torch.load(paths["model.ckpt"], weights_only=True)
        assert form_of(loaded) == form_of(expected)
        assert bool(pickled) == (len(paths) == 2)
        if not pickled:
            # A bare storage torch itself loads as one of another class.
            assert what == "storage" or form_of(loaded["it"]) == form_of(encoded["it"])
            return
        assert loaded["it"] is None
        beside = torch.load(paths["model+pickled.ckpt"], weights_only=False)
        theirs = torch.load(by_torch(pickled, tmp_path / "torch"), weights_only=False)
        assert form_of(beside) == form_of(theirs)
        with trusting_pickle():
            whole = load_state(paths["model.ckpt"])
        assert type(whole["it"]) is type(special)

    @pytest.mark.parametrize("what", sorted(needs_pickle_here))
    def test_what_only_pickle_can_hold_goes_into_a_second_file(self, what, tmp_path):
        """The first file stays readable without trust."""
        paths = written({"it": SPECIAL[what](), "a": torch.ones(2)}, tmp_path)
        assert sorted(paths) == ["model+pickled.ckpt", "model.ckpt"]
        loaded = torch.load(paths["model.ckpt"], weights_only=True)
        assert loaded["it"] is None and loaded["a"].tolist() == [1.0, 1.0]

    def test_numpy_and_paths_come_back_as_themselves(self, tmp_path):
        """Through the plain dictionaries that stand for them."""
        state = {
            "array": np.arange(12).reshape(3, 4).T,
            "scalar": np.float32(0.25),
            "words": np.array(["a", "bc"]),
            "path": Path("a/b"),
            "tensor": torch.ones(2),
        }
        [path] = written(state, tmp_path).values()
        torch.load(path, weights_only=True)
        loaded = load_state(path)
        assert np.array_equal(loaded["array"], state["array"])
        assert loaded["array"].dtype == state["array"].dtype
        assert loaded["scalar"] == np.float32(0.25) and type(loaded["scalar"]) is np.float32
        assert loaded["words"].tolist() == ["a", "bc"]
        assert loaded["path"] == Path("a/b")

    def test_a_state_that_contains_itself_comes_back(self, tmp_path):
        """As from torch's file."""

        class Endless:
            def state_dict(self):
                state = {"a": torch.ones(1)}
                state["self"] = [state]
                return state

            def load_state_dict(self, state):
                self.loaded = state

        it = Endless()
        checkpointer = Checkpointer(tmp_path, {"it": it})
        checkpointer.save_checkpoint()
        checkpointer.recover_if_possible()
        assert it.loaded["self"][0] is it.loaded


@needs_images
class TestSizesAndCounts:
    """Where storages are copied in one way or another, and where there are very many."""

    @pytest.mark.parametrize("size", [1, LARGE - 1, LARGE, LARGE + 1, 5 * 2**20 + 3])
    def test_storages_of_every_size_arrive(self, size, tmp_path):
        """Small ones are copied by another function than large ones, and some span blocks."""
        state = {
            "before": torch.ones(5),
            "it": torch.randint(256, (size,), dtype=torch.uint8),
            "after": torch.arange(3),
            "twice": torch.randint(256, (size,), dtype=torch.uint8),
        }
        theirs = bytes_by_torch(state)
        ours = written(state, tmp_path)["model.ckpt"].read_bytes()
        assert without_checksums(ours) == without_checksums(theirs)

    def test_storages_that_lie_across_blocks_arrive_whole(self, tmp_path):
        """Small and large ones, so many that several begin in one block and end in the next."""
        sizes = [LARGE - 1000, LARGE + 1000] * 30
        state = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
        theirs = bytes_by_torch(state)
        assert len(theirs) > 3 * BLOCK
        ours = written(state, tmp_path)["model.ckpt"].read_bytes()
        assert without_checksums(ours) == without_checksums(theirs)

    def test_thousands_of_storages_stay_in_their_places(self, tmp_path):
        """All of one size, so that only their order tells them apart."""
        state = [torch.tensor([number]) for number in range(3000)]
        [path] = written(state, tmp_path).values()
        loaded = torch.load(path, weights_only=True)
        assert [tensor.item() for tensor in loaded] == list(range(3000))

    def test_a_storage_is_saved_whole_and_once_for_all_its_views(self, tmp_path):
        """A small view keeps its large storage, as with torch."""
        base = torch.arange(1000)
        [path] = written({"a": base[:2], "b": base[5:9].view(2, 2).t()}, tmp_path).values()
        assert [name for name in checksums(path.read_bytes()) if "data/" in name[:5]] == ["data/0"]
        loaded = torch.load(path, weights_only=True)
        loaded["a"].untyped_storage()[5 * 8] = 77
        assert loaded["b"][0, 0] == 77

    def test_the_defaults_of_new_tensors_dont_matter(self, tmp_path):
        """Under another default device and type the same bytes are written."""
        state = {"a": torch.randn(200_000), "b": torch.ones(3)}
        expected = written(state, tmp_path)["model.ckpt"].read_bytes()
        with torch.device("meta"), torch.inference_mode():
            assert written(state, tmp_path)["model.ckpt"].read_bytes() == expected

    def test_tensors_without_bytes_cause_no_warning(self, tmp_path, recwarn):
        """What is left out of the template was not there; also where warnings are errors."""
        [path] = written({"a": torch.empty(3, device="meta")}, tmp_path).values()
        assert torch.load(path, weights_only=True)["a"].is_meta
        assert not recwarn.list

    def test_two_types_of_one_storage_are_refused_as_torch_does(self, tmp_path):
        """The one thing that torch can't save says so here, too."""
        base = torch.ones(4)
        state = {"a": base, "b": base.view(torch.int32)}
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            written(state, tmp_path)


class OlderTorch:
    """A torch that writes the records of storages sorted by name: 0, 1, 10, 11, 2."""

    def __init__(self, monkeypatch):
        save = torch.serialization._save

        def in_order_of_words(obj, zip_file, *rest):
            sorting = _Sorting(zip_file)
            save(obj, sorting, *rest)
            sorting.finish()

        monkeypatch.setattr(torch.serialization, "_save", in_order_of_words)


class _Sorting:
    def __init__(self, zip_file):
        self.zip_file = zip_file
        self.records = []

    def write_record(self, name, data, size):
        self._add(name, lambda: self.zip_file.write_record(name, data, size))

    def write_record_metadata(self, name, size):
        self._add(name, lambda: self.zip_file.write_record_metadata(name, size))

    def _add(self, name, write):
        if name.startswith("data/"):
            self.records.append((name, write))
        else:
            write()

    def finish(self):
        for _, write in sorted(self.records, key=lambda record: record[0]):
            write()


class TestOtherReleasesOfTorch:
    """Without what the file writer builds on, or with it in another form."""

    @pytest.fixture
    def state(self):
        shared = torch.arange(12.0)
        return {"a": shared, "b": shared[3:], "many": [torch.tensor([n]) for n in range(30)]}

    @pytest.mark.parametrize("described", [True, False])
    def test_without_skip_data_torch_writes(self, state, tmp_path, monkeypatch, described):
        """Torch before 2.6: the same file as `torch.save` makes, by `torch.save`."""
        if not described:
            state["huge"] = 2**100
        monkeypatch.delattr(torch.serialization, "skip_data", raising=False)
        contents = contents_of(state)["model.ckpt"]
        assert contents.source is None
        assert contents.size >= 12 * 4 + 30 * 8
        path = written(state, tmp_path)["model.ckpt"]
        assert checksums(path.read_bytes())["data/0"] != 0
        theirs = torch.load(by_torch(state, tmp_path / "torch"), weights_only=True)
        assert form_of(torch.load(path, weights_only=True)) == form_of(theirs)

    def test_a_full_disk_is_told_in_its_own_words(self, tmp_path, monkeypatch):
        """Where torch writes, which complains of a position when it closes its archive."""
        written_so_far = []

        def write(stream, data):
            written_so_far.append(len(memoryview(data).cast("B")))
            if sum(written_so_far) > 500:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written_so_far[-1]

        monkeypatch.setattr("lightning_sbckpt._format.encode._Counted.write", write)
        with pytest.raises(OSError, match="No space left on device"):
            _by_torch({"a": torch.zeros(1000)}, tmp_path / "model.ckpt")

    @pytest.mark.parametrize("wrong", ["longer", "shorter", "one less", "one more", "split"])
    def test_holes_of_other_sizes_make_torch_write(self, state, tmp_path, monkeypatch, wrong):
        """Whatever a torch to come leaves out, it is filled only if it is understood."""
        from lightning_sbckpt._format import image

        class Other(image._FileWithHoles):
            def seek(self, offset, whence=0):
                position = super().seek(offset, whence)
                if len(self.holes) == 1:
                    start, size = self.holes[0]
                    self.holes[:] = {
                        "longer": [(start, size + 1)],
                        "shorter": [(start, size - 1)],
                        "one less": [],
                        "one more": [(start, size), (start + size, 64)],
                        "split": [(start, size - 8), (start + size - 8, 8)],
                    }[wrong]
                return position

        monkeypatch.setattr(image, "_FileWithHoles", Other)
        assert make_template(state) is None
        path = written(state, tmp_path)["model.ckpt"]
        theirs = torch.load(by_torch(state, tmp_path / "torch"), weights_only=True)
        assert form_of(torch.load(path, weights_only=True)) == form_of(theirs)

    def test_a_record_without_a_number_makes_torch_write(self, state, monkeypatch):
        """Where storages are named otherwise, nobody knows which is which."""
        save = torch.serialization._save

        class Renaming:
            def __init__(self, zip_file):
                self.write_record = zip_file.write_record
                self.zip_file = zip_file

            def write_record_metadata(self, name, size):
                self.zip_file.write_record_metadata(f"{name}-x", size)

        monkeypatch.setattr(
            torch.serialization, "_save", lambda obj, file, *rest: save(obj, Renaming(file), *rest)
        )
        assert make_template(state) is None

    @needs_images
    def test_records_in_the_order_of_words_are_filled_by_their_names(
        self, state, tmp_path, monkeypatch
    ):
        """Torch 2.6 writes `data/10` before `data/2`; storages of one size must not be mixed up."""
        OlderTorch(monkeypatch)
        names = list(checksums(bytes_by_torch(state)))
        assert names.index("data/10") < names.index("data/2")
        assert make_template(state) is not None
        path = written(state, tmp_path)["model.ckpt"]
        assert without_checksums(path.read_bytes()) == without_checksums(bytes_by_torch(state))
        loaded = torch.load(path, weights_only=True)
        assert [tensor.item() for tensor in loaded["many"]] == list(range(30))

    def test_storages_are_numbered_as_they_are_met(self):
        """Each once, however many tensors look at it, also empty ones."""
        shared, empty = torch.ones(3), torch.empty(0)
        found = storages_of({"a": [shared, empty], "b": shared[1:], "c": shared.untyped_storage()})
        assert [storage.nbytes() for storage in found] == [12, 0]

    @needs_images
    def test_a_copy_holds_no_second_one_of_the_state(self, tmp_path):
        """A template is bytes around holes: its size doesn't grow with the tensors."""
        template, storages = make_template({"a": torch.zeros(10_000_000)})
        assert sum(len(data) for _, data in template.fixed) < 3000
        assert template.size > 40_000_000 and len(storages) == 1
        assert sys.getsizeof(template.fixed) < 3000
