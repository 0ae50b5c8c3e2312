"""Meta: plain numbers in, safe YAML on disk, nothing strange read."""

from __future__ import annotations

import enum
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sbckpt import Checkpointer, ckpt_recency
from lightning_sbckpt._format.flat_yaml import parse_flat
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import Checkpoint, dump_meta, parse_yaml, plain_meta, read_meta


def there_and_back(meta):
    """Return meta as it is read from what is written."""
    return parse_yaml(dump_meta(plain_meta(meta)), "CKPT.yaml")


def mean_metric():
    metric = torchmetrics.MeanMetric()
    metric.update([1.0, 2.0])
    return metric


class Colour(str, enum.Enum):
    RED = "red"


PLAIN = [
    (torch.tensor(0.5), 0.5),
    (torch.tensor([[3]]), 3),
    (torch.tensor(True), True),
    (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
    (torch.tensor(1.5, requires_grad=True), 1.5),
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.int64(7), 7),
    (np.bool_(True), True),
    (np.array(2), 2),
    (np.str_("word"), "word"),
    (mean_metric(), 1.5),
    (Colour.RED, "red"),
    ("text: with 'signs' # and\nlines ü", "text: with 'signs' # and\nlines ü"),
    ("\x85 \u2028 \u2029", "\x85 \u2028 \u2029"),
    ("1e3", "1e3"),
    ("null", "null"),
    (1e300, 1e300),
    (1e-9, 1e-9),
    (2**70, 2**70),
    (math.inf, math.inf),
    (-math.inf, -math.inf),
    (None, None),
    ((1, (2.0, "x")), [1, [2.0, "x"]]),
    (OrderedDict(b=torch.tensor(1), a=[np.float32(2)]), {"b": 1, "a": [2.0]}),
]


class TestPlainNumbers:
    """What is written are plain values that any safe loader reads."""

    @pytest.mark.parametrize(("value", "expected"), PLAIN, ids=lambda value: repr(value)[:30])
    def test_numbers_become_plain(self, value, expected):
        """The value and its type, read by us and by plain PyYAML."""
        data = dump_meta(plain_meta({"key": value}))
        for read in (parse_yaml(data, "CKPT.yaml"), yaml.safe_load(data)):
            assert read == {"key": expected}
            assert type(read["key"]) is type(expected)

    def test_nan_is_a_number(self):
        """Alone, nested, from a tensor."""
        read = there_and_back({"a": math.nan, "b": [torch.tensor(math.nan)]})
        assert math.isnan(read["a"]) and math.isnan(read["b"][0])

    def test_the_order_of_keys_is_kept(self):
        """A person reads first what was given first."""
        assert list(there_and_back({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]

    def test_the_values_given_are_not_changed(self):
        """Nor shared with what is returned."""
        tensor, inner = torch.ones(2), {"x": torch.tensor(1.0)}
        plain = plain_meta({"tensor": tensor, "inner": inner})
        plain["tensor"][0] = 5
        assert torch.equal(tensor, torch.ones(2))
        assert isinstance(inner["x"], torch.Tensor)

    @given(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
                ),
                max_leaves=10,
            ),
            max_size=5,
        )
    )
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_any_plain_meta_comes_back(self, meta):
        """Whatever text and numbers, nested in whatever way."""
        assert there_and_back(meta) == meta


TENSORS = {
    "floats": torch.tensor([1.0, -0.0, math.inf, 0.1]),
    "matrix": torch.arange(6).reshape(2, 3),
    "booleans": torch.tensor([True, False]),
    "bfloat16": torch.tensor([1.0, 0.3]).bfloat16(),
    "half": torch.tensor([1.0, 0.3]).half(),
    "double": torch.tensor([0.1, 1e300], dtype=torch.float64),
    "complex": torch.tensor([1 + 2j, -0.1j]),
    "complex number": torch.tensor(1 + 2j),
    "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "empty": torch.empty(0, 3, dtype=torch.int16),
    "empty complex": torch.empty(0, dtype=torch.complex64),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}


class TestTensors:
    """Larger tensors are mappings marked as such, which every YAML reader takes."""

    @pytest.mark.parametrize("kind", TENSORS)
    def test_type_shape_and_values_come_back(self, kind):
        """Also nested in lists and dictionaries."""
        tensor = TENSORS[kind]
        read = there_and_back({"t": tensor, "nested": [{"deep": tensor}]})
        for found in (read["t"], read["nested"][0]["deep"]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found, tensor.resolve_conj())

    def test_arrays_become_tensors(self):
        """A confusion matrix, say."""
        found = there_and_back({"matrix": np.arange(4).reshape(2, 2)})["matrix"]
        assert torch.equal(found, torch.arange(4).reshape(2, 2))

    def test_a_person_can_read_it(self):
        """One line with type, shape and numbers."""
        text = dump_meta(plain_meta({"loss": torch.tensor([1.0, 2.5])})).decode()
        assert "loss: {'!tensor': float32, shape: [2], data: [1.0, 2.5]}" in text

    @pytest.mark.parametrize(
        "text",
        [
            "{'!tensor': float32, shape: [2], data: [1.0]}",
            "{'!tensor': save, shape: [1], data: [1.0]}",
            "{'!tensor': float33, shape: [1], data: [1.0]}",
            "{'!tensor': float32, data: [1.0]}",
            "{'!tensor': float32, shape: [x], data: [1.0]}",
            "{'!tensor': int64, shape: [1], data: [99999999999999999999999]}",
            "{'!tensor': float32, shape: [1], data: [text]}",
            "{'!tensor': 5}",
        ],
    )
    def test_a_mapping_that_makes_no_tensor_is_an_error_of_the_file(self, text):
        """Which names it."""
        with pytest.raises(MetaError, match=r"CKPT\.yaml can't be read as safe YAML"):
            parse_yaml(f"t: {text}".encode(), "CKPT.yaml")


class TestRefused:
    """What YAML can't hold is refused at save."""

    def test_every_value_is_named_at_once(self):
        """By key and place, with its type."""
        with pytest.raises(MetaError) as caught:
            plain_meta(
                {
                    "fine": 1,
                    "model": object(),
                    "deep": {"list": [1, {2}]},
                    "bytes": b"",
                    5: "number as key",
                    "words": np.array(["a", "b"], dtype=object),
                }
            )
        message = str(caught.value)
        for part in ("'model' is a object", "'deep'['list'][1] is a set", "'bytes' is a bytes"):
            assert part in message
        assert "5 is a int" in message
        assert "fine" not in message
        assert "recoverables instead" in message

    def test_a_refused_meta_saves_nothing(self, tmp_path):
        """The folder stays empty."""
        with pytest.raises(MetaError, match="'model'"):
            Checkpointer(tmp_path, {"m": torch.nn.Linear(1, 1)}).save_checkpoint({"model": set()})
        assert list(tmp_path.iterdir()) == []

    def test_two_keys_that_become_one_are_not_lost_silently(self):
        """Nested keys that are plain only after conversion."""
        assert there_and_back({"by_class": {np.int64(1): 0.5, 2: 0.25}}) == {
            "by_class": {1: 0.5, 2: 0.25}
        }


MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)
ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
HOSTILE = {
    "aliases that grow": ALIASES.encode(),
    "merge bomb": MERGES.encode(),
    "flow nesting": b"a: " + b"[" * 1_000_000,
    "closed nesting": b"a: " + b"{b: " * 300_000 + b"}" * 300_000,
    "block nesting": b"- " * 300_000,
    "key nesting": b"? " * 300_000,
    "too large": b"a: '" + b"x" * 17 * 2**20 + b"'",
    "a list": b"- 1",
    "a word": b"word",
    "nothing": b"",
    "binary": bytes(range(256)),
    "zeros": bytes(100),
    "tag of Python": b"a: !!python/object/apply:os.getcwd []",
    "name of Python": b"a: !!python/name:os.system",
    "unknown tag": b"a: !other 1",
    "empty integer": b"a: !!int ''",
    "no timestamp": b"a: !!timestamp x",
    "no date": b"a: 2026-99-99",
    "no boolean": b"a: !!bool maybe",
    "two documents": b"a: 1\n---\nb: 2\n",
    "alias of nothing": b"a: *b",
}


class TestHostileFiles:
    """What is no meta is an error that names the file, and never more than that."""

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_it_is_refused_and_the_healthy_rest_is_listed(self, tmp_path, caplog, kind):
        """With one warning for each such folder, however often the folder is listed."""
        with pytest.raises(MetaError, match=r"^some/CKPT\.yaml "):
            parse_yaml(HOSTILE[kind], Path("some/CKPT.yaml"))
        checkpointer = Checkpointer(tmp_path)
        healthy = checkpointer.save_checkpoint()
        (tmp_path / "CKPT+hostile").mkdir()
        (tmp_path / "CKPT+hostile" / "CKPT.yaml").write_bytes(HOSTILE[kind])
        for _ in range(2):
            assert checkpointer.list_checkpoints() == [healthy]
        assert checkpointer.recover_if_possible() == healthy
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "left out an unreadable checkpoint" in warning and "CKPT+hostile" in warning

    def test_the_parser_would_not_have_survived_it(self):
        """Without the limit, the nesting ends the whole process."""
        script = """
import sys, yaml
try:
    yaml.load(b"a: " + b"[" * 1_000_000, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
except RecursionError:
    sys.exit(1)
"""
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
        assert done.returncode != 0

    def test_ordinary_nesting_is_fine(self):
        """Many brackets are not deep brackets."""
        meta = {"rows": [[i, {"x": [i]}] for i in range(1000)]}
        assert there_and_back(meta) == meta

    def test_recover_does_not_start_anew_beside_an_unreadable_checkpoint(self, tmp_path):
        """When it is the only one, training from scratch would be worse than an error."""
        (tmp_path / "CKPT+a").mkdir()
        (tmp_path / "CKPT+a" / "CKPT.yaml").write_bytes(b"- 1")
        checkpointer = Checkpointer(tmp_path)
        assert checkpointer.list_checkpoints() == []
        with pytest.raises(RuntimeError, match=r"every checkpoint .* is damaged: CKPT\+a: "):
            checkpointer.recover_if_possible()


@pytest.mark.parametrize("unixtime", [math.inf, 1e300, 1e18, -1e300, math.nan, "soon", True])
def test_a_checkpoint_with_an_impossible_time_does_not_stop_the_next_save(tmp_path, unixtime):
    """It comes from elsewhere; ours have a time by the clock."""
    (tmp_path / "CKPT+alien").mkdir()
    (tmp_path / "CKPT+alien" / "CKPT.yaml").write_bytes(dump_meta({"unixtime": unixtime}))
    checkpointer = Checkpointer(tmp_path)
    first, second = checkpointer.save_checkpoint(), checkpointer.save_checkpoint()
    assert 1.7e9 < ckpt_recency(first) < ckpt_recency(second) < 1e10


def test_a_record_is_hashed_by_its_path():
    """So that it goes into sets although its meta is a dictionary."""
    a, b = (Checkpoint(Path("CKPT+a"), {"x": x}, {}) for x in (1, 2))
    assert hash(a) == hash(b) and len({a, b}) == 2


# What a file may hold between the key and the end of the line, as it would be written by hand.
WORDS = """
0 -0 1 -1 +1 00 01 -01 017 -017 0x1f 0b1 0o7 07 1_000 1:30 1:30.5 999999999999999999 9999999999999999999
1.5 -1.5 +1.5 1. .5 -.5 1.5e5 1.5e+5 1.5e-05 -1.5E+3 1e5 1e+5 1.0e+999 00.5 1_0.5 . -. .e1
.inf -.inf +.inf .Inf .nan .NaN -.nan inf nan NaN e1 _1 1_ - -- -a 1a a1 1.5a
true True TRUE tRUE false yes Yes no on ON off y n Y N null Null NULL nULL ~ = <<
2026-11-22 2026-11-22T10:15:03Z 10:15 a b a/b a-b a+b a.b a:b a,b a=b a@b a#b a'b a"b a!b a&b
CKPT+2026-11-22+10-15-03+00 '' 'a' '1' 'true' 'a b' 'a''b' 'a: b' 'a #b' '\\' ' ' 'a "a" "a
[] [1] {} {a: 1} [ ] { } | > ! !a !!int !!str & &a * *a % @ ` ? # : , a# a\\n --- ...
"""
SCALARS = [
    *WORDS.split(),
    "a b",
    "a  b",
    "a b c",
    "a yes",
    "yes a",
    " a",
    "a ",
    "a: b",
    "a #b",
    "- a",
    "",
    "é",
    "\t",
]
KEYS = [*SCALARS, "loss", "end-of-epoch", "val/loss", "x.y", "'quoted'", "k" * 128, "k" * 2000]
LINES = st.builds("{}{}{}".format, st.sampled_from(KEYS), st.sampled_from([": "] * 9 + [":", " : ", ":\t"]), st.sampled_from(SCALARS))  # fmt: skip
PLAIN_LINES = st.builds("key_{}: {}".format, st.integers(0, 9), st.sampled_from(SCALARS))
OTHER_LINES = st.sampled_from(["# comment", "#", " # indented", "", " ", "- 1", "---", "...", "%YAML 1.1", " a: 1", "a", "\ufeff"])  # fmt: skip


def same(found, expected):
    """Return whether two mappings are the same to the type, the sign and the order of keys."""
    return repr(found) == repr(expected) and all(
        type(found[key]) is type(expected[key])
        and (not isinstance(found[key], float) or same_float(found[key], expected[key]))
        for key in expected
    )


def same_float(found, expected):
    return math.copysign(1, found) == math.copysign(1, expected)


class TestTheFastPath:
    """It gives what the safe loader gives, to the type, or leaves the file to it."""

    @given(
        st.lists(PLAIN_LINES | PLAIN_LINES | LINES | OTHER_LINES, max_size=5),
        st.sampled_from(["\n"] * 8 + ["\r\n", "\x85", "\r", "\x0b"]),
        st.booleans(),
    )
    @settings(max_examples=1500, deadline=None, derandomize=True)
    def test_lines_written_by_hand(self, lines, end, ended):
        """Every kind of key and scalar there is, and what is none."""
        data = (end.join(lines) + (end if ended else "")).encode()
        found = parse_flat(data)
        if found is not None:
            assert same(found, yaml.safe_load(data))

    @pytest.mark.long
    @given(
        st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=8),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.sampled_from(SCALARS)
            | st.text(max_size=8),
            min_size=1,
            max_size=6,
        )
    )
    @settings(max_examples=800, deadline=None, derandomize=True)
    def test_whatever_is_written(self, meta):
        """By our own dumper."""
        data = dump_meta(meta)
        found = parse_flat(data)
        assert found is None or same(found, yaml.safe_load(data))
        assert same(parse_yaml(data, "CKPT.yaml"), yaml.safe_load(data))

    def test_a_key_that_marks_tensors_is_refused_where_it_could_be_taken_for_one(self):
        """Else what was saved could not be read; alone on top it is a key like any other."""
        with pytest.raises(MetaError, match=r"'a' has the key '!tensor', which marks a tensor"):
            plain_meta({"a": {"!tensor": 1}})
        meta = {"unixtime": 1.0, "!tensor": None}
        assert parse_yaml(dump_meta(plain_meta(meta)), "CKPT.yaml") == meta

    @given(st.binary(max_size=30))
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_any_bytes_at_all(self, data):
        """Also after a healthy line."""
        for whole in (data, b"a: 1\n" + data):
            found = parse_flat(whole)
            assert found is None or same(found, yaml.safe_load(whole))

    @pytest.mark.parametrize("scalar", SCALARS)
    def test_every_scalar_alone(self, scalar):
        """So that none depends on being drawn."""
        data = f"key: {scalar}\n".encode()
        found = parse_flat(data)
        assert found is None or same(found, yaml.safe_load(data))

    @pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:20])
    def test_every_key_alone(self, key):
        """Also words that are something else, and longer ones than YAML allows."""
        data = f"{key}: 1.5\n".encode()
        found = parse_flat(data)
        assert found is None or same(found, yaml.safe_load(data))

    def test_what_a_run_saves_is_read_by_it(self):
        """Or it would be of no use."""
        meta = {
            "unixtime": 1790000000.123456,
            "end-of-epoch": True,
            "epoch": 3,
            "val/loss": 1e-05,
            "gain": -math.inf,
            "worst": math.nan,
            "big": 1e22,
            "nothing": None,
            "stage": "full",
            "commit": "7a1bc67",
            "seed": "1234",
            "note": "the second of three",
            "resumed_from": "CKPT+2026-11-22+10-15-03+00",
        }
        data = dump_meta(meta)
        assert same(parse_flat(data), yaml.safe_load(data))

    def test_it_takes_the_loader_out_of_the_way(self, monkeypatch):
        """A plain file is read without it, another one is not."""

        def no_loader(*_, **__):
            raise RuntimeError("the loader was asked")

        monkeypatch.setattr(yaml, "load", no_loader)
        assert parse_yaml(b"loss: 0.5\n", "CKPT.yaml") == {"loss": 0.5}
        with pytest.raises(MetaError, match="the loader was asked"):
            parse_yaml(b"loss: [0.5]\n", "CKPT.yaml")


@pytest.mark.parametrize("kind", ["a named pipe", "a symbolic link", "a folder", "a socket"])
def test_meta_is_read_from_regular_files_only(tmp_path, kind):
    """A pipe would be waited on for ever, and a link may lead out of the folder."""
    folder = tmp_path / "CKPT+a"
    folder.mkdir()
    path = folder / "CKPT.yaml"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a symbolic link":
        (tmp_path / "elsewhere").write_text("loss: 0.5\n")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "a folder":
        path.mkdir()
    else:
        os.mknod(path, 0o600 | 0o140000)
    with pytest.raises(MetaError, match=rf"CKPT\.yaml can't be read: it is {kind}"):
        read_meta(path)
    checkpointer = Checkpointer(tmp_path)
    healthy = checkpointer.save_checkpoint()
    assert checkpointer.list_checkpoints() == [healthy]


@pytest.mark.parametrize("where", ["whole", "part", "within"])
def test_containers_of_omegaconf_are_plain_ones_in_meta(where):
    """With what they refer to, wherever they stand."""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"})
    given = {"whole": config, "part": {"x": config.a.b}, "within": {"x": [config.a]}}[where]
    meant = {
        "whole": {"a": {"b": [1, 2]}, "c": [1, 2]},
        "part": {"x": [1, 2]},
        "within": {"x": [{"b": [1, 2]}]},
    }
    assert there_and_back(given) == meant[where]
