"""Templates kept from save to save: when one serves again, and what is patched in it."""

from __future__ import annotations

import gc
import io
import math
import struct
import weakref
import zipfile
import zlib
from collections import OrderedDict

import pytest
import torch
from _releases import needs_torch
from _torch_files import form_of, without_checksums, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._format import templates as templates_module
from lightning_sbckpt._format.image import Image
from lightning_sbckpt._format.templates import Templates, describe

# What a template is made with; without, each file is written by torch itself.
needs_templates = needs_torch("2.6", "torch.serialization.skip_data")

NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]


@pytest.fixture
def made(monkeypatch):
    """A list of the states for which a template was made."""
    states = []
    original = templates_module.make_template

    def counted(state):
        states.append(state)
        return original(state)

    monkeypatch.setattr(templates_module, "make_template", counted)
    return states


def image_bytes(templates, state, name="model.ckpt"):
    """Return the file that the templates make of a state."""
    image = templates.image(name, state, describe(state))
    assert isinstance(image, Image)
    data = bytearray(image.size)
    image.fill(0, memoryview(data))
    return bytes(data)


def fresh_bytes(state):
    """Return the file that a template made for this state gives."""
    return image_bytes(Templates(), state)


def loaded(data):
    """Return what plain torch reads in a file."""
    return torch.load(io.BytesIO(data), weights_only=True)


def model_and_optimizer():
    """Return a model and an optimizer with moments, and a scheduler's state, as one state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}], lr=0.1
    )
    return model, optimizer


def step(model, optimizer):
    """Do one step of training."""
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_current(templates, state):
    """Check that the file is right for this very state, as `torch.save` would have written it."""
    data = image_bytes(templates, state)
    assert form_of(loaded(data)) == form_of(loaded(fresh_bytes(state)))
    stream = io.BytesIO()
    torch.save(state, stream)
    assert without_checksums(data) == without_checksums(stream.getvalue())


@needs_templates
class TestOneTemplateServesAgain:
    """While names, shapes and types stay, nothing is pickled."""

    def test_training_steps_and_learning_rates_need_no_new_template(self, made):
        """A model and an optimizer with two groups: made once each, right at every step."""
        model, optimizer = model_and_optimizer()
        templates = Templates()
        step(model, optimizer)
        for lr in (0.1, 0.01, -0.0, math.inf, math.nan, 5e-324, 1e308):
            optimizer.param_groups[0]["lr"] = 0.1
            step(model, optimizer)
            optimizer.param_groups[0]["lr"] = lr
            for name, part in (("model.ckpt", model), ("optimizer.ckpt", optimizer)):
                data = image_bytes(templates, part.state_dict(), name)
                stream = io.BytesIO()
                torch.save(part.state_dict(), stream)
                assert form_of(loaded(data)) == form_of(loaded(stream.getvalue()))
        assert len(made) == 2

    def test_a_checkpointer_makes_templates_at_its_first_save_only(self, made, tmp_path):
        """Through `save_checkpoint`, in every mode."""
        for mode in ("sync", "async", "overlap"):
            model, optimizer = model_and_optimizer()
            step(model, optimizer)
            checkpointer = Checkpointer(
                tmp_path / mode, {"model": model, "optimizer": optimizer}, save_mode=mode
            )
            del made[:]
            for _ in range(4):
                step(model, optimizer)
                checkpointer.save_checkpoint()
            checkpointer.wait()
            assert len(made) == 2
            path = checkpointer.find_checkpoint().path
            stored = torch.load(path / "optimizer.ckpt", weights_only=True)
            assert form_of(stored) == form_of(loaded(fresh_bytes(optimizer.state_dict())))

    def test_each_file_has_its_own(self, made):
        """Two files of the same form don't share one, and don't drive each other out."""
        templates = Templates()
        first, second = {"a": torch.zeros(2), "x": 1.0}, {"a": torch.ones(2), "x": 2.0}
        for _ in range(3):
            assert loaded(image_bytes(templates, first, "first.ckpt"))["x"] == 1.0
            assert loaded(image_bytes(templates, second, "second.ckpt"))["x"] == 2.0
        assert len(made) == 2

    def test_new_objects_of_the_same_form_are_as_good(self, made):
        """It is the form that counts, not which tensors and containers were saved before."""
        templates = Templates()
        for number in range(3):
            state = {"a": [torch.full((3,), float(number)), number / 3], "name": "x" * 3}
            assert_current(templates, state)
        assert len(made) == 3 + 1  # One for each fresh file to compare with, and one.


# What changes, and whether the template may serve again.
CHANGES = {
    "a float": (0.1, 0.2, True),
    "a float to one that looks alike": (0.1, 0.1 + 2**-56, True),
    "zero to minus zero": (0.0, -0.0, True),
    "minus zero to zero": (-0.0, 0.0, True),
    "a float to NaN": (1.0, math.nan, True),
    "NaN to another NaN": (math.nan, NAN_WITH_PAYLOAD, True),
    "NaN to a number": (math.nan, 1.0, True),
    "an int": (1, 2, False),
    "True to 1": (True, 1, False),
    "1 to True": (1, True, False),
    "0 to False": (0, False, False),
    "1 to 1.0": (1, 1.0, False),
    "1.0 to 1": (1.0, 1, False),
    "1.0 to True": (1.0, True, False),
    "a string": ("ab", "ac", False),
    "a string of other letters": ("ab", "äb", False),
    "a string to None": ("None", None, False),
    "a list to a tuple": ([1], (1,), False),
    "a dictionary to an ordered one": ({"a": 1}, OrderedDict(a=1), False),
    "the order of keys": ({"a": 1, "b": 1}, {"b": 1, "a": 1}, False),
    "a key": ({"a": 1}, {"b": 1}, False),
    "a key 1 to True": ({1: "x"}, {True: "x"}, False),
    "a key that is a float": ({1.5: "x"}, {2.5: "x"}, True),
    "one member more": ([1], [1, 1], False),
    "nesting": ([[1], 2], [[1, 2]], False),
    "empty lists in another order": ([[], [[]]], [[[]], []], False),
    "attributes of an ordered dictionary": (
        lambda: _with_metadata(1),
        lambda: _with_metadata(2),
        False,
    ),
    "a shape": (lambda: torch.ones(2, 3), lambda: torch.ones(3, 2), False),
    "a dtype of the same size": (lambda: torch.ones(2), lambda: torch.ones(2).int(), False),
    "strides": (lambda: torch.ones(2, 2), lambda: torch.ones(2, 2).t(), False),
    "an offset": (lambda: torch.arange(4)[0:2], lambda: torch.arange(4)[1:3], False),
    "the size of the storage": (lambda: torch.arange(4)[:2], lambda: torch.arange(5)[:2], False),
    "requires_grad": (
        lambda: torch.ones(2),
        lambda: torch.ones(2, requires_grad=True),
        False,
    ),
    "a tensor to a parameter": (
        lambda: torch.ones(2, requires_grad=True),
        lambda: torch.nn.Parameter(torch.ones(2)),
        False,
    ),
    "a storage shared or not": (
        lambda: _two_views(shared=True),
        lambda: _two_views(shared=False),
        False,
    ),
    "which storage is shared": (lambda: _three(0, 0, 1), lambda: _three(0, 1, 0), False),
    "the same tensor or another of the same storage": (
        lambda: [tensor := torch.ones(2), tensor],
        lambda: [tensor := torch.ones(2), tensor.view(2)],
        False,
    ),
    "the same list twice or an equal one": (
        lambda: [part := [1], part],
        lambda: [[1], [1]],
        False,
    ),
    "the same tuple twice": (lambda: [part := (0.5, 1), part], lambda: _pair_twice(0.75), True),
    "which list is there again": (lambda: _lists(0), lambda: _lists(1), False),
    "the outer or the inner list again": (lambda: _nested(0), lambda: _nested(1), False),
    "values of tensors": (lambda: torch.ones(3), lambda: torch.zeros(3), True),
    "an empty tensor's shape": (lambda: torch.empty(0, 3), lambda: torch.empty(3, 0), False),
}


def _with_metadata(version):
    state = OrderedDict(weight=torch.ones(2))
    state._metadata = {"": {"version": version}}
    return state


def _two_views(*, shared):
    base = torch.arange(4.0)
    return [base[:2], base[2:] if shared else torch.arange(4.0)[2:]]


def _three(*which):
    bases = [torch.zeros(2), torch.ones(2)]
    return [bases[number].view(2) for number in which]


def _pair_twice(value):
    pair = (value, 1)
    return [pair, pair]


def _lists(which):
    lists = [[], []]
    return [*lists, lists[which]]


def _nested(which):
    inner = []
    outer = [inner]
    return [outer, (outer, inner)[which]]


def _value(given):
    return given() if callable(given) else given


@needs_templates
class TestWhatMayChange:
    """Whatever differs, the file is right; only floats and bytes of tensors are patched in."""

    @pytest.mark.parametrize("what", CHANGES)
    def test_the_file_is_that_of_the_new_state(self, what, made):
        """And a template is made anew exactly when more than floats and bytes have changed."""
        before, after, kept = CHANGES[what]
        templates = Templates()
        first = {"lr": 0.5, "it": _value(before), "end": torch.arange(3)}
        second = {"lr": 0.25, "it": _value(after), "end": torch.arange(3)}
        for state in (first, second, first):
            del made[:]
            image_bytes(templates, state)
            if state is not first:
                assert bool(made) is not kept
            assert_current(templates, state)

    @given(st.lists(st.lists(st.floats(), min_size=4, max_size=4), min_size=2, max_size=6))
    @settings(max_examples=50, deadline=None)
    def test_floats_anywhere_are_patched_in_their_places(self, rows):
        """In keys, tuples, attributes and containers that are there twice, bit for bit."""
        templates = Templates()
        for first, second, third, fourth in rows:
            shared = (second, 0.5)
            ordered = OrderedDict([("a", first), ("b", shared), ("c", [shared, torch.ones(1)])])
            ordered._metadata = {"momentum": third, "again": shared}
            state = {"lr": fourth, "it": ordered, "0.5": 0.5}
            assert form_of(loaded(image_bytes(templates, state))) == form_of(
                loaded(fresh_bytes(state))
            )

    def test_bytes_that_look_like_a_float_are_no_float(self, made):
        """A string with the very bytes of one, before it, is left alone."""
        looks = "G" + struct.pack(">d", 2.0000000298023224).decode("latin-1")
        templates = Templates()
        for value in (2.0000000298023224, 3.0):
            state = {looks: looks, "value": value}
            assert loaded(image_bytes(templates, state)) == state
        assert len(made) == 1

    @pytest.mark.parametrize("state", [{"lr": 0.5}, {"lr": 0.5, "a": torch.ones(3)}])
    def test_zip_tools_read_the_patched_record(self, state):
        """`data.pkl` has its true checksum after a float was patched in, in both places."""
        templates = Templates()
        for value in (0.5, 0.25, 0.125):
            state["lr"] = value
            data = image_bytes(templates, state)
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # Python's zipfile checks while reading.
                pickled = archive.read("archive/data.pkl")
                assert struct.pack(">d", value) in pickled
                checksum = struct.pack("<I", zlib.crc32(pickled))
            assert data[data.index(b"PK\x07\x08") :][4:8] == checksum
            assert data.count(checksum) >= 2

    def test_an_unreadable_record_gets_its_template_anew(self, made, monkeypatch):
        """Where floats are not found as expected, nothing is patched."""
        monkeypatch.setattr(templates_module, "_places_of_floats", lambda pickled, floats: None)
        templates = Templates()
        for value in (0.5, 0.25):
            assert loaded(image_bytes(templates, {"lr": value}))["lr"] == value
        assert len(made) == 2

    def test_an_index_of_another_form_gets_its_template_anew(self, made, monkeypatch):
        """Where the checksum can't be set, nothing is patched."""
        monkeypatch.setattr(templates_module, "_INDEX_ENTRY_SIZE", 47)
        templates = Templates()
        for value in (0.5, 0.25):
            assert loaded(image_bytes(templates, {"lr": value}))["lr"] == value
        assert len(made) == 2


class Reduced:
    """Something with a way of its own to be pickled, into another tensor at each time."""

    def __init__(self):
        self.times = 0

    def __reduce__(self):
        self.times += 1
        return torch.add, (torch.ones(1), float(self.times))


class TestWhatIsNotKept:
    """No template holds on to a state, and none is kept where the form isn't known in full."""

    @pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
    def test_no_memory_of_the_state_is_kept_alive(self, tmp_path, mode):
        """After a save the tensors can go, with their storages."""
        state = {"a": torch.zeros(1000), "large": torch.zeros(100_000)}

        class Holder:
            def state_dict(self):
                return state

            def load_state_dict(self, state):
                raise NotImplementedError

        holder = Holder()
        checkpointer = Checkpointer(tmp_path, {"it": holder}, save_mode=mode)
        checkpointer.save_checkpoint()
        checkpointer.before_update()
        checkpointer.wait()
        tensors = [weakref.ref(tensor) for tensor in state.values()]
        storages = [weakref.ref(tensor.untyped_storage()) for tensor in state.values()]
        checkpointer.recoverables.clear()
        state = None
        gc.collect()
        assert [reference() for reference in tensors + storages] == [None] * 4
        assert checkpointer.find_checkpoint() is not None

    @needs_templates
    @pytest.mark.parametrize(
        "special",
        [
            2**64,
            "\udcff",
            b"bytes",
            {1, 2},
            torch.Size([1]),
            torch.ones(2).to_sparse(),
            torch.empty(2, device="meta"),
            torch.ones(2, dtype=torch.complex64).conj(),
            # Not in every release.
            pytest.param(lambda: torch.nn.Buffer(torch.ones(2)), id="Buffer"),
            torch.ones(2).untyped_storage(),
        ],
        ids=lambda special: type(special).__name__,
    )
    def test_a_special_thing_means_a_new_template_each_time(self, special, made, tmp_path):
        """It is not described, so nobody can know that its pickle stays."""
        state = {"it": special() if callable(special) else special, "a": torch.ones(2)}
        assert describe(state) is None
        templates = Templates()
        for number in (1.0, 2.0):
            state["a"] = torch.full((2,), number)
            [path] = written(state, tmp_path, templates).values()
            assert torch.load(path, weights_only=True)["a"].tolist() == [number] * 2
        assert len(made) == 2

    @pytest.mark.filterwarnings("ignore")
    def test_a_nested_tensor_is_special_too(self):
        """It has neither sizes nor strides to describe."""
        assert describe([torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]) is None

    def test_what_is_pickled_otherwise_each_time_is_right_each_time(self, tmp_path):
        """A state in two files, of which the second is pickled: its values are those of the save."""
        state = {"it": Reduced(), "a": torch.ones(2)}
        templates = Templates()
        found = []
        for _ in range(2):
            paths = written(state, tmp_path, templates)
            found.append(pickle_value(paths["model+pickled.ckpt"]))
        assert found[1] > found[0]

    def test_a_container_in_itself_is_special(self):
        """It is pickled in a way of its own."""
        endless = [1.0]
        endless.append({"a": endless})
        assert describe(endless) is None

    def test_nesting_too_deep_to_be_described_is_no_error_here(self):
        """Whether it can be saved all the same is for torch to say."""
        state = 1.5
        for _ in range(100):
            state = [state]
        assert describe(state) is not None
        for _ in range(5000):
            state = [state]
        assert describe(state) is None


def pickle_value(path):
    """Return the number in the only tensor of a pickled file."""
    [tensor] = torch.load(path, weights_only=False).values()
    return tensor.item()
