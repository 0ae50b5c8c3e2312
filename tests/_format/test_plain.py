"""Values of more types than torch's unpickler takes, as plain things that come back what they were."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import io
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from uuid import UUID

import numpy as np
import pytest
import torch

from lightning_sbckpt import trusting_pickle
from lightning_sbckpt._format.encode import save_state, torch_bytes
from lightning_sbckpt._format.load import load_state, pickled_path
from lightning_sbckpt._format.plain import TAG
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError

omegaconf = pytest.importorskip("omegaconf")
OmegaConf, DictConfig, ListConfig = omegaconf.OmegaConf, omegaconf.DictConfig, omegaconf.ListConfig


class Kind(enum.Enum):
    """An enumeration of the user's."""

    A = "a"


@dataclasses.dataclass
class Options:
    """A dataclass of the user's, and a schema of OmegaConf."""

    rate: float = 0.1
    kind: Kind = Kind.A


class AttributeLike(dict):
    """A subclass may be more than its members."""


def config(**flags: bool) -> DictConfig:
    made = OmegaConf.create(
        {"lr": 0.1, "net": {"sizes": [1, {"a": "${lr}"}], "none": None}, "lacks": "???", 3: True}
    )
    for name, value in flags.items():
        getattr(OmegaConf, f"set_{name}")(made.net, value)
    return made


PLAIN = {
    "path": Path("a/b"),
    "pure path": PurePosixPath("a"),
    "windows path": PureWindowsPath("c:/a"),
    "datetime": dt.datetime(2026, 11, 22, 1, 2, 3, 4, dt.timezone.utc, fold=1),
    "naive": dt.datetime(2026, 11, 22),
    "date": dt.date(2026, 11, 22),
    "time": dt.time(1, 2, 3, 4, dt.timezone(dt.timedelta(hours=-3), "home")),
    "timedelta": dt.timedelta(-3, 4, 5),
    "timezone": dt.timezone(dt.timedelta(hours=1)),
    "namespace": Namespace(a=1, b=Namespace(c=Path("x"), d=[dt.timedelta(1)])),
    "simple namespace": SimpleNamespace(a=(1, 2)),
    "set": {1, "a"},
    "set of paths": {Path("a")},
    "frozenset": frozenset([1, (2, Path("x"))]),
    "empty frozenset": frozenset(),
    "deque": deque([1, Path("a")], maxlen=3),
    "defaultdict": defaultdict(list, {"a": [Path("x")]}),
    "defaultdict of none": defaultdict(None, {"a": 1}),
    "counter": Counter("aab"),
    "ordered": OrderedDict(b=Path("x"), a=2),
    "range": range(1, 10, 2),
    "slice": slice(1, None, 2),
    "decimal": Decimal("1.50"),
    "uuid": UUID(int=5),
    "ellipsis": (..., 1),
    "complex": 1j,
    "no bytes": b"",
    "bytes": b"x",
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1),
    "size": torch.Size([1, 2]),
    "numpy": np.float32(1.5),
    "numpy bool": np.bool_(True),
    "numpy time": np.datetime64("2026-11-22"),
    "array": np.arange(6, dtype=">i2").reshape(2, 3),
    "looks like ours": {TAG: "path", "path": "x"},
    "config": config(),
    "part of a config": config().net.sizes,
    "flags": config(struct=True, readonly=True),
    "list config": ListConfig([1, {"a": "x"}]),
    "no config": DictConfig(None),
    "one interpolation": OmegaConf.create({"a": DictConfig("${b}"), "b": {"c": 1}}),
    "class of a config": DictConfig,
}


def form(value: object) -> object:
    """Return what is compared: type, value, and all that an OmegaConf node is."""
    if isinstance(value, (DictConfig, ListConfig)):
        flags = value._metadata.flags, value._metadata.key_type, value._metadata.element_type
        parent = value._get_parent()
        content = OmegaConf.to_container(value, resolve=False) if value._content else value._content
        return type(value), flags, content, None if parent is None else form(parent)
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value), [form(each) for each in value]
    extra = getattr(value, "default_factory", None), getattr(value, "maxlen", None)
    return type(value), value, extra, repr(value)


@pytest.mark.parametrize("name", PLAIN)
def test_a_value_comes_back_without_pickle(tmp_path, another_user, name):
    """For everybody, with its type; alone, in containers and twice."""
    value = PLAIN[name]
    file = tmp_path / "x.ckpt"
    save_state({"alone": value, "in": [(value,)]}, file)
    assert not pickled_path(file).exists()
    torch.load(file, weights_only=True)
    another_user()
    got = load_state(file)
    assert form(got["alone"]) == form(value)
    assert form(got["in"][0][0]) == form(value)


def test_interpolations_work_after_loading(tmp_path):
    """In the whole, and in a part whose interpolation leads out of it."""
    save_state({"part": config().net}, tmp_path / "x.ckpt")
    part = load_state(tmp_path / "x.ckpt")["part"]
    assert part.sizes[1].a == 0.1


PICKLED = {
    "enum": Kind.A,
    "dataclass": Options(),
    "schema": OmegaConf.structured(Options),
    "enum in a config": OmegaConf.create({"a": Kind.A}),
    "resolver": OmegaConf.create({"a": "${oc.env:HOME}"}),
    "nested resolver": OmegaConf.create({"a": "${${b}:x}", "b": "oc.env"}),
    "own factory": defaultdict(Options, {}),
    "function": torch.relu,
    "class": Options,
    "subclass of dict": AttributeLike(a=1),
}


@pytest.mark.parametrize("name", PICKLED)
def test_what_more_than_plain_things_make_is_marked(tmp_path, another_user, name):
    """It comes back for the user whose run wrote it, or under trust."""
    value = PICKLED[name]
    file = tmp_path / "x.ckpt"
    save_state({"value": value}, file)
    assert pickled_path(file).exists()
    assert load_state(file) == {"value": value}
    another_user()
    with pytest.raises(UntrustedPickleError, match=r"x\['value'\] \(a "):
        load_state(file)
    with trusting_pickle():
        assert load_state(file) == {"value": value}


def written(tmp_path: Path, value: object) -> Path:
    """Return a file with a value as a hostile author would write it."""
    file = tmp_path / "x.ckpt"
    file.write_bytes(torch_bytes({"value": value}))
    return file


@pytest.mark.parametrize(
    "fields",
    [
        {TAG: "path"},
        {TAG: "datetime", "date": [0, 0, 0], "fields": [], "fold": 7, "tzinfo": None},
        {TAG: "timedelta", "days": 10**12, "seconds": 0, "microseconds": 0},
        {TAG: "ndarray", "dtype": "O", "shape": [1], "data": torch.zeros(8).byte()},
        {TAG: "ndarray", "dtype": "<f8", "shape": [2**40], "data": torch.zeros(8).byte()},
        {TAG: "scalar", "dtype": "<f8", "shape": [], "data": "text"},
        {TAG: "set", "items": [[1]]},
        {TAG: "set", "items": 3},
        {TAG: "mapping", "items": [1]},
        {TAG: "namespace", "items": OrderedDict()},
        {TAG: "defaultdict", "factory": "eval", "items": {}},
        {TAG: "pure path", "kind": "Path", "path": "x"},
        {TAG: "range", "range": [1, 2, 0]},
        {TAG: "decimal", "text": "x"},
        {TAG: "uuid", "hex": 3},
        {TAG: "type", "name": "os.system"},
        {TAG: "omegaconf", "root": ["DictConfig", {"x": 1}, 3], "path": ["a"]},
        {TAG: "omegaconf", "root": ["os.system", None, "true"], "path": []},
        {TAG: "omegaconf", "root": None, "path": None},
    ],
    ids=str,
)
def test_a_description_of_nothing_is_damage(tmp_path, fields):
    """Nothing that a file says is imported or called, and nothing else is raised."""
    with pytest.raises(DamagedCheckpointError, match="a value in the file that is said to be"):
        load_state(written(tmp_path, fields))


@pytest.mark.parametrize("tag", ["a new kind", 3, None, ["path"]], ids=repr)
def test_an_unknown_description_is_an_error(tmp_path, tag):
    """It may be from a newer release."""
    with pytest.raises(MismatchError, match="this release doesn't know"):
        load_state(written(tmp_path, {TAG: tag}))


@pytest.mark.parametrize("text", ["${call:x}", "a ${b} ${call:x}", "${${a}:x}", "${call: ${b}}"])
def test_a_resolver_in_a_file_is_not_called(tmp_path, text):
    """One that the program has registered may run what it is given (`eval` is a popular one)."""
    called = []
    OmegaConf.register_new_resolver("call", called.append, replace=True)
    fields = {
        TAG: "omegaconf",
        "root": ["DictConfig", None, [["a", ["value", None, text]]]],
        "path": [],
    }
    file = written(tmp_path, fields)
    with pytest.raises(UntrustedPickleError, match="calls a resolver of OmegaConf"):
        load_state(file)
    assert not called
    with trusting_pickle():
        assert isinstance(load_state(file)["value"], DictConfig)


def test_the_file_is_plain(tmp_path):
    """Whoever opens it with torch alone sees what it is."""
    save_state({"a": dt.timedelta(1)}, tmp_path / "x.ckpt")
    plain = torch.load(io.BytesIO((tmp_path / "x.ckpt").read_bytes()), weights_only=True)
    assert plain == {"a": {TAG: "timedelta", "days": 1, "seconds": 0, "microseconds": 0}}
