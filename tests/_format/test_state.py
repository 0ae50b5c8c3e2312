"""State on disk: what torch opens without us, what comes back unchanged, what needs trust."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from _foreign import forget_manifest
from _releases import needs_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_sbckpt import Checkpointer, trusting_pickle
from lightning_sbckpt._format import encode as state_module
from lightning_sbckpt._format.encode import save_state
from lightning_sbckpt._format.load import load_state, pickled_path
from lightning_sbckpt.errors import (
    CheckpointNameError,
    DamagedCheckpointError,
    SaveError,
    UntrustedPickleError,
)


@pytest.fixture(autouse=True)
def _nothing_warned_of_yet(monkeypatch):
    monkeypatch.setattr(state_module, "_warned", set())


class Opaque:
    """A class of the user's that only pickle can hold."""

    def __init__(self, word):
        self.word = word

    def __repr__(self):
        return f"Opaque({self.word!r})"

    def __eq__(self, other):
        return isinstance(other, Opaque) and other.word == self.word

    def __hash__(self):
        return hash(self.word)


class Holder:
    """A stateful object with any state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def same(first, second):
    """Return whether two states have the same types, structure and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(second.contiguous().reshape(-1).view(torch.uint8))
        )
    if isinstance(first, (np.ndarray, np.generic)):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            # The bytes that pad a long double are anything.
            and (first.dtype.char in "gG" or first.tobytes() == second.tobytes())
            and (first.dtype.kind not in "fc" or np.array_equal(first, second, equal_nan=True))
        )
    if isinstance(first, float):
        return first.hex() == second.hex()
    return first == second


def there_and_back(folder, state):
    """Save a state, see that torch opens the file by itself, and return what we load."""
    file = folder / "state.ckpt"
    save_state(state, file)
    torch.load(file, weights_only=True)
    assert not pickled_path(file).exists()
    return load_state(file)


SPECIAL = torch.tensor([1.0, -0.0, float("inf"), float("-inf"), float("nan")])
TENSORS = {
    **{
        str(dtype): SPECIAL.to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    **{
        str(dtype): torch.tensor([0, 1, 5]).to(dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    },
    "complex64": torch.tensor([1 + 2j, -3.5j]),
    "complex128": torch.tensor([1 + 2j], dtype=torch.complex128),
    "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "no elements": torch.empty(0, 3),
    "no dimensions": torch.tensor(2.5),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "every second": torch.arange(9)[::2],
    "channels last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "expanded": torch.ones(1).expand(4),
    "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
}

ARRAYS = {
    **{
        dtype: np.array([0, 1, 3]).astype(dtype)
        for dtype in (*"?bBhHiIlLqQefdgFDG", ">f4", ">i8", "<u2", ">c16", "S3", "U4", ">U2")
    },
    "datetime64": np.array(["2026-01-02", "NaT"], dtype="datetime64[ns]"),
    "timedelta64": np.array([3, 4], dtype="timedelta64[s]"),
    "special": np.array([np.nan, -0.0, np.inf]),
    "no dimensions": np.array(2.5),
    "empty": np.empty((0, 3), dtype=np.float32),
    "transposed": np.arange(6).reshape(2, 3).T,
    "every second": np.arange(9)[::2],
    "backwards": np.arange(4.0)[::-1],
    "fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "not writeable": np.broadcast_to(np.float32(1), (3,)),
}

SCALARS = [
    *(np.dtype(kind).type(1) for kind in "?bBhHiIlLefdgFD"),
    np.str_("word"),
    np.bytes_(b"word"),
    np.datetime64("2026-01-02"),
    np.float64("nan"),
]


class TestPlainState:
    """What comes back unchanged from a file that `torch.load(weights_only=True)` opens."""

    @pytest.mark.parametrize("kind", TENSORS)
    def test_tensors_keep_type_shape_and_bits(self, tmp_path, kind):
        """In whatever memory layout they were."""
        assert same(there_and_back(tmp_path, {"it": TENSORS[kind]}), {"it": TENSORS[kind]})

    @pytest.mark.parametrize("kind", ARRAYS)
    def test_arrays_keep_type_byte_order_shape_and_bits(self, tmp_path, kind):
        """And can be written to, whatever they were."""
        loaded = there_and_back(tmp_path, [ARRAYS[kind]])[0]
        assert same(loaded, ARRAYS[kind])
        assert loaded.flags.writeable

    @pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.dtype.str)
    def test_numpy_scalars_stay_numpy_scalars(self, tmp_path, scalar):
        """Of their type, although torch refuses them in a tensors-only file."""
        assert same(there_and_back(tmp_path, (scalar,)), (scalar,))

    @needs_torch("2.6", "tensors-only loading of bytes and of complex numbers")
    def test_plain_things_and_containers_keep_their_types(self, tmp_path):
        """Nested in each other, the order of keys kept."""
        state = {
            "none": None,
            "flags": [True, False],
            "numbers": (1, -2.5, 2**80, float("inf"), 1j),
            3: "three",
            (1, "pair"): b"bytes",
            "no bytes": [b""],
            "ordered": OrderedDict(z=1, a=[{"deep": (torch.ones(2), [])}]),
            "path": Path("some/where.txt"),
            "set": {1, 2},
            "counter": Counter({2: 1, 5: 2}),
            "size": torch.Size([2, 3]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "empty": [{}, [], (), OrderedDict()],
        }
        assert same(there_and_back(tmp_path, state), state)

    def test_a_state_that_is_no_dictionary_is_one_too(self, tmp_path):
        """Whatever `state_dict` returns."""
        for state in ([1, torch.ones(1)], torch.ones(2), np.arange(3), 5, Path("x")):
            assert same(there_and_back(tmp_path, state), state)

    def test_the_metadata_of_a_state_dict_stays_on_it(self, tmp_path):
        """Which torch keeps as an attribute of the OrderedDict."""
        state = torch.nn.BatchNorm1d(2).state_dict()
        state["extra"] = np.arange(2)
        loaded = there_and_back(tmp_path, state)
        assert loaded._metadata == state._metadata
        assert same(loaded["extra"], np.arange(2))

    def test_shared_tensors_stay_shared_and_are_written_once(self, tmp_path):
        """The same tensor twice, and two views of one memory."""
        base = torch.arange(100_000.0)
        state = {"a": base, "b": base, "head": base[:10], "nested": [{"again": base}]}
        loaded = there_and_back(tmp_path, state)
        assert (tmp_path / "state.ckpt").stat().st_size < 1.1 * base.nbytes
        loaded["a"][0] = 7
        for other in (loaded["b"], loaded["head"], loaded["nested"][0]["again"]):
            assert other[0] == 7

    def test_the_state_given_is_not_changed(self, tmp_path):
        """No container of it is written to."""
        inner = [np.arange(3), Path("x"), Opaque("o")]
        state = {"inner": inner, "tensor": torch.ones(1)}
        save_state(state, tmp_path / "state.ckpt")
        assert state["inner"] is inner and len(inner) == 3
        assert isinstance(inner[0], np.ndarray) and inner[2] == Opaque("o")

    @needs_torch("2.6", "tensors-only loading of bytes and of complex numbers")
    @given(
        state=st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.binary()
            | st.complex_numbers(allow_nan=False)
            | hnp.arrays(
                st.one_of(
                    hnp.floating_dtypes(),
                    hnp.integer_dtypes(),
                    hnp.boolean_dtypes(),
                    hnp.unicode_string_dtypes(),
                ),
                hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
            )
            | hnp.arrays(np.float32, 3).map(torch.from_numpy),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.lists(inner, max_size=4).map(tuple)
                | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
                | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
            ),
            max_leaves=12,
        )
    )
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_any_state_of_these_comes_back(self, tmp_path, state):
        """Whatever is nested in what."""
        # A folder for each: what one leaves must not be taken for the next one's.
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            assert same(there_and_back(Path(folder), state), state)


class TestPickledState:
    """What only pickle can hold is apart, said, and read only when trusted."""

    STATE = staticmethod(
        lambda: {
            "plain": torch.ones(2),
            "buffer": [1, {"item": Opaque("in a list")}],
            "pair": (Opaque("in a tuple"), 2),
        }
    )

    def test_it_goes_into_a_file_beside_the_plain_one(self, tmp_path):
        """The plain file has None in its places, and opens with torch alone."""
        save_state(self.STATE(), tmp_path / "replay.ckpt")
        assert sorted(os.listdir(tmp_path)) == ["replay+pickled.ckpt", "replay.ckpt"]
        plain = torch.load(tmp_path / "replay.ckpt", weights_only=True)
        assert plain["buffer"] == [1, {"item": None}] and plain["pair"] == (None, 2)
        assert torch.equal(plain["plain"], torch.ones(2))

    def test_the_runs_of_one_user_read_it_back(self, tmp_path, caplog):
        """Nothing is asked for, and nothing warned of."""
        Checkpointer(tmp_path, {"replay": Holder(self.STATE())}).save_checkpoint()
        holder = Holder()
        Checkpointer(tmp_path, {"replay": holder}).recover_if_possible()
        assert same(holder.state, self.STATE())
        assert not [r for r in caplog.records if r.levelno == logging.WARNING]

    def test_without_trust_another_user_is_refused_and_nothing_is_loaded(
        self, tmp_path, another_user
    ):
        """The error names what is held, where, and what to do."""
        Checkpointer(tmp_path, {"replay": Holder(self.STATE())}).save_checkpoint()
        another_user()
        holder = Holder("untouched")
        with pytest.raises(UntrustedPickleError) as caught:
            Checkpointer(tmp_path, {"replay": holder}).recover_if_possible()
        message = str(caught.value)
        assert "replay['buffer'][1]['item'] (a Opaque), " in message
        assert "replay['pair'][0] (a Opaque)" in message
        assert "marked with a secret that is not known here" in message
        assert "LIGHTNING_SBCKPT_SECRET" in message and "trust_pickle=True" in message
        assert holder.state == "untouched"

    def test_with_trust_another_user_gets_it_in_its_place(self, tmp_path, another_user):
        """By the option of the checkpointer, or inside the block; not after it."""
        Checkpointer(tmp_path, {"replay": Holder(self.STATE())}).save_checkpoint()
        another_user()
        holder = Holder()
        Checkpointer(tmp_path, {"replay": holder}, trust_pickle=True).recover_if_possible()
        assert same(holder.state, self.STATE())
        holder.state = None
        checkpointer = Checkpointer(tmp_path, {"replay": holder})
        with trusting_pickle():
            checkpointer.recover_if_possible()
        assert same(holder.state, self.STATE())
        with pytest.raises(UntrustedPickleError):
            checkpointer.recover_if_possible()

    def test_opening_it_is_the_same(self, tmp_path, another_user):
        """`Checkpoint.open` gives all of it or an error."""
        saved = Checkpointer(tmp_path, {"replay": Holder(self.STATE())}).save_checkpoint()
        assert same(saved.open("replay"), self.STATE())
        another_user()
        with pytest.raises(UntrustedPickleError, match="buffer"):
            saved.open("replay")

    def test_what_cannot_be_pickled_is_named(self, tmp_path):
        """Every such place, when it is saved."""
        state = {"fine": Opaque("x"), "bad": [lambda: 1], "worse": (open(os.devnull),)}  # noqa: SIM115, PTH123
        with pytest.raises(
            SaveError, match=r"\['bad'\]\[0\] is a function: (.|\n)*\['worse'\]\[0\]"
        ):
            Checkpointer(tmp_path, {"replay": Holder(state)}).save_checkpoint()
        state["worse"][0].close()

    def test_the_file_beside_is_no_recoverable(self, tmp_path):
        """It isn't listed among the paramfiles, and no recoverable may take its name."""
        ckpt = Checkpointer(tmp_path, {"replay": Holder(self.STATE())}).save_checkpoint()
        assert set(ckpt.paramfiles) == {"replay"}
        with pytest.raises(CheckpointNameError, match=r"'replay\+pickled'"):
            Checkpointer(tmp_path, {"replay+pickled": Holder()})

    @pytest.mark.parametrize(
        "value",
        [
            {np.int64(3): "a numpy key", Path("x"): 1},
            np.array([Opaque("o"), None], dtype=object),
            np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
            {Opaque("key"): torch.ones(1)},
            len,
            Opaque,
        ],
        ids=repr,
    )
    def test_strange_values_come_back_under_trust(self, tmp_path, value):
        """Each whole, the values beside it staying plain."""
        file = tmp_path / "state.ckpt"
        save_state({"odd": value, "plain": 1}, file)
        assert torch.load(file, weights_only=True) == {"odd": None, "plain": 1}
        with trusting_pickle():
            loaded = load_state(file)["odd"]
        assert type(loaded) is type(value)
        equal = loaded == value
        assert equal.all() if isinstance(equal, np.ndarray) else equal

    def test_a_tensor_with_attributes_of_its_own_does_not_spoil_the_plain_file(self, tmp_path):
        """Torch would put the attribute into the same file, which then nobody opens."""
        tensor = torch.ones(1)
        tensor.note = Opaque("note")
        file = tmp_path / "state.ckpt"
        save_state({"odd": tensor, "plain": torch.zeros(1)}, file)
        assert set(torch.load(file, weights_only=True)) == {"odd", "plain"}
        with trusting_pickle():
            assert load_state(file)["odd"].note == Opaque("note")


class Payload:
    """Runs a command of the attacker's when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


class TestMaliciousPickles:
    """No pickle runs by listing, finding or recovering."""

    @pytest.fixture(params=["in place", "plain pickle", "beside"])
    def poisoned(self, request, tmp_path):
        """A checkpointer, and the folder that its one file's payload would make.

        There is no manifest, so that nothing but the way of reading protects.
        """
        ckpt = Checkpointer(tmp_path / "run", {"obj": Holder({"a": 1})}).save_checkpoint()
        forget_manifest(ckpt.path)
        file, payload = ckpt.paramfiles["obj"], Payload(tmp_path / "attacked")
        if request.param == "in place":
            torch.save({"a": payload}, file)
        elif request.param == "plain pickle":
            file.write_bytes(pickle.dumps(payload))
        else:
            torch.save({("a",): payload}, pickled_path(file))
        return Checkpointer(tmp_path / "run", {"obj": Holder()}), tmp_path / "attacked"

    def test_nothing_is_executed(self, poisoned):
        """Recovering and loading refuse."""
        checkpointer, target = poisoned
        (ckpt,) = checkpointer.list_checkpoints()
        assert checkpointer.find_checkpoint() == ckpt
        assert checkpointer.find_sound_checkpoint() == ckpt
        for load in (checkpointer.recover_if_possible, lambda: checkpointer.load_checkpoint(ckpt)):
            with pytest.raises(UntrustedPickleError, match=r"obj(\+pickled)?\.ckpt.*trust_pickle"):
                load()
        assert not target.exists()

    def test_the_payload_would_have_done_it(self, poisoned):
        """Read with trust it does, so the test above can fail."""
        checkpointer, target = poisoned
        checkpointer.trust_pickle = True
        # Where the file is no torch file at all, that shows only after the payload has run.
        with contextlib.suppress(DamagedCheckpointError):
            checkpointer.recover_if_possible()
        assert target.is_dir()
