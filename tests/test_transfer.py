"""Parameter transfer: collecting files from local folders and loading them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_sbckpt.errors import (
    CheckpointNameError,
    CheckpointNotFoundError,
    ConfigurationError,
    HookError,
    HookSignatureError,
    MismatchError,
)
from lightning_sbckpt.hooks import (
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    register_checkpoint_hooks,
)
from lightning_sbckpt.transfer import Pretrainer, torch_parameter_transfer


@register_checkpoint_hooks
class Both:
    """An object whose class has a load hook and a transfer hook."""

    @mark_as_saver
    def save(self, path): ...

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.got = ("load", Path(path).read_text(), end_of_epoch)

    @mark_as_transfer
    def transfer(self, path):
        self.got = ("transfer", Path(path).read_text())


@register_checkpoint_hooks
class LoadOnly:
    """An object whose class has a load hook alone."""

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.got = ("load", Path(path).read_text(), end_of_epoch)


class Stateful:
    """An object of no known class with a state."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.fixture
def source(tmp_path):
    """A folder with files for the names a, b and model."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.ckpt").write_text("from a")
    (folder / "b.ckpt").write_text("from b")
    torch.save({"param": torch.tensor([5.0])}, folder / "model.ckpt")
    return folder


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("collect", [True, False])
def test_files_of_the_default_source_are_loaded_by_name(as_text, collect, source, tmp_path, scale):
    """Each object gets `<name>.ckpt`, whether collected or read in place, as string or path."""
    kind = str if as_text else Path
    target = tmp_path / "new" / "collected"
    model = scale(1.0)
    pretrainer = Pretrainer(kind(target) if collect else None, loadables={"model": model})
    files = pretrainer.collect_files(kind(source))
    assert files == {"model": (target if collect else source) / "model.ckpt"}
    pretrainer.load_collected()
    assert model.value == 5.0


def test_paths_of_their_own_win_over_the_default_source(source, tmp_path):
    """A name with a path is read from there, under whatever name the file has."""
    (tmp_path / "elsewhere.bin").write_text("from elsewhere")
    a, b = Both(), Both()
    pretrainer = Pretrainer(
        tmp_path / "collected", {"a": a, "b": b}, {"a": tmp_path / "elsewhere.bin"}
    )
    pretrainer.collect_files(source)
    pretrainer.load_collected()
    assert (a.got, b.got) == (("transfer", "from elsewhere"), ("transfer", "from b"))
    assert sorted(os.listdir(tmp_path / "collected")) == ["a.ckpt", "b.ckpt"]


def test_another_default_source_is_used_when_files_are_collected_again(source, tmp_path):
    """What was collected before does not become a path that wins over a new source."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.ckpt").write_text("from other")
    a = Both()
    pretrainer = Pretrainer(tmp_path / "collected", {"a": a})
    pretrainer.collect_files(source)
    pretrainer.collect_files(other)
    pretrainer.load_collected()
    assert a.got == ("transfer", "from other")
    assert (source / "a.ckpt").read_text() == "from a"


def test_hooks_are_chosen_by_name_then_transfer_then_load_then_state(source, tmp_path):
    """The custom hook first, then the class's transfer hook, its load hook, its state."""
    got = []
    stateful = Stateful()
    objects = {"custom": Both(), "both": Both(), "load": LoadOnly(), "stateful": stateful}
    paths = dict.fromkeys(objects, source / "a.ckpt") | {"stateful": source / "model.ckpt"}
    pretrainer = Pretrainer(
        loadables=objects,
        paths=paths,
        custom_hooks={"custom": lambda obj, path: got.append((obj, Path(path).read_text()))},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert got == [(objects["custom"], "from a")]
    assert objects["both"].got == ("transfer", "from a")
    assert objects["load"].got == ("load", "from a", False)
    assert stateful.state == {"param": torch.tensor([5.0])}


@pytest.mark.parametrize(
    ("condition", "loaded"),
    [
        (True, True),
        (False, False),
        (1, True),
        ("", False),
        (lambda: True, True),
        (lambda: 0, False),
    ],
)
def test_conditions_decide_what_is_collected_and_loaded(condition, loaded, source, tmp_path):
    """A value or a function; what is not to be loaded need not be there either."""
    a, b = Both(), Both()
    paths = {} if loaded else {"b": "nowhere/b.ckpt"}
    pretrainer = Pretrainer(
        tmp_path / "collected", {"a": a, "b": b}, paths, conditions={"b": condition}
    )
    assert pretrainer.is_loadable("a") is True
    assert pretrainer.is_loadable("b") is loaded
    assert set(pretrainer.collect_files(source)) == ({"a", "b"} if loaded else {"a"})
    pretrainer.load_collected()
    assert hasattr(b, "got") is loaded


def test_everything_can_be_added_later(source, tmp_path):
    """The add methods do what the arguments of the constructor do."""
    a, b = Both(), Both()
    pretrainer = Pretrainer()
    pretrainer.add_loadables({"a": a, "b": b})
    pretrainer.add_paths({"a": str(source / "b.ckpt")})
    pretrainer.add_custom_hooks({"a": lambda obj, path: setattr(obj, "got", Path(path).name)})
    pretrainer.add_conditions({"b": False})
    pretrainer.set_collect_in(tmp_path / "collected")
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert a.got == "a.ckpt"
    assert (tmp_path / "collected/a.ckpt").read_text() == "from b"


def test_two_pretrainers_share_nothing():
    """No default argument leaks from one to the next."""
    Pretrainer().add_loadables({"a": Both()})
    assert Pretrainer().loadables == {}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("models/asr/lm.ckpt", ("models/asr", "lm.ckpt")),
        (Path("models/lm.ckpt"), ("models", "lm.ckpt")),
        ("lm.ckpt", ("./", "lm.ckpt")),
        (Path("lm.ckpt"), ("./", "lm.ckpt")),
        ("/lm.ckpt", ("/", "lm.ckpt")),
    ],
)
def test_a_path_splits_into_source_and_file(path, split):
    """The last part is the file; without another one the source is the current folder."""
    assert Pretrainer.split_path(path) == split


def test_a_path_without_a_folder_is_in_the_current_one(source, monkeypatch):
    """A bare file name works."""
    monkeypatch.chdir(source)
    a = Both()
    pretrainer = Pretrainer(loadables={"a": a}, paths={"a": "b.ckpt"})
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert a.got == ("transfer", "from b")


def test_a_collected_folder_can_be_moved_away_from_its_source(source, tmp_path):
    """No symbolic link, even where the source is one: the files survive their source."""
    (source / "c.ckpt").symlink_to(source / "a.ckpt")
    pretrainer = Pretrainer(tmp_path / "collected", {"a": Both(), "c": Both()})
    pretrainer.collect_files(source)
    collected = list((tmp_path / "collected").iterdir())
    assert sorted(file.name for file in collected) == ["a.ckpt", "c.ckpt"]
    assert not any(file.is_symlink() for file in collected)
    shutil.rmtree(source)
    shutil.move(tmp_path / "collected", tmp_path / "moved")
    assert (tmp_path / "moved/c.ckpt").read_text() == "from a"


def test_a_collected_file_takes_no_space_of_its_own(source, tmp_path):
    """It is a second name of the same file."""
    files = Pretrainer(tmp_path / "collected", {"a": Both()}).collect_files(source)
    assert files["a"].samefile(source / "a.ckpt")


def test_files_are_copied_where_links_are_not_possible(source, tmp_path, monkeypatch):
    """Another file system, or one without links: a copy does as well."""

    def no_links(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    Pretrainer(tmp_path / "collected", {"a": Both()}).collect_files(source)
    assert os.listdir(tmp_path / "collected") == ["a.ckpt"]
    assert (tmp_path / "collected/a.ckpt").read_text() == "from a"
    assert not (tmp_path / "collected/a.ckpt").samefile(source / "a.ckpt")


def test_a_copy_that_fails_leaves_what_was_there(source, tmp_path, monkeypatch):
    """A full disk costs neither the file collected before nor leaves half a new one."""
    Pretrainer(tmp_path / "collected", {"a": Both()}).collect_files(source)

    def full(source, target):
        Path(target).write_text("fro")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    pretrainer = Pretrainer(tmp_path / "collected", {"a": Both()}, {"a": source / "b.ckpt"})
    with pytest.raises(OSError, match="No space left"):
        pretrainer.collect_files()
    assert os.listdir(tmp_path / "collected") == ["a.ckpt"]
    assert (tmp_path / "collected/a.ckpt").read_text() == "from a"


def test_a_file_in_its_place_is_not_written_again(source, monkeypatch):
    """Collecting into the source moves no bytes at all."""
    monkeypatch.setattr(os, "link", pytest.fail)
    monkeypatch.setattr(shutil, "copyfile", pytest.fail)
    Pretrainer(source, {"a": Both()}).collect_files(source)


@pytest.mark.parametrize("times", [1, 2])
def test_a_source_is_never_overwritten_with_itself(times, source):
    """Collecting into the source, or twice, leaves the files as they are and no others."""
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    pretrainer = Pretrainer(source, {"a": Both(), "b": Both()})
    for _ in range(times):
        pretrainer.collect_files(source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_collecting_again_from_another_place_replaces_the_file_and_not_the_source(source, tmp_path):
    """The name in the folder is replaced; the file it was linked to is not written to."""
    Pretrainer(tmp_path / "collected", {"a": Both()}).collect_files(source)
    Pretrainer(tmp_path / "collected", {"a": Both()}, {"a": source / "b.ckpt"}).collect_files()
    assert (tmp_path / "collected/a.ckpt").read_text() == "from b"
    assert (source / "a.ckpt").read_text() == "from a"


def test_what_was_collected_earlier_is_found_in_the_folder(source, tmp_path):
    """Another process, or an earlier run, may have collected."""
    Pretrainer(tmp_path / "collected", {"a": Both()}).collect_files(source)
    a = Both()
    Pretrainer(tmp_path / "collected", {"a": a}).load_collected()
    assert a.got == ("transfer", "from a")


def test_all_missing_files_are_listed_and_nothing_is_collected(source, tmp_path):
    """One message for every file that is not there, with the place that was looked at."""
    pretrainer = Pretrainer(
        tmp_path / "collected",
        {"a": Both(), "x": Both(), "y": Both()},
        {"y": tmp_path / "no" / "y.ckpt"},
    )
    with pytest.raises(CheckpointNotFoundError) as caught:
        pretrainer.collect_files(source)
    message = str(caught.value)
    assert f"'x': there is no file {source / 'x.ckpt'}" in message
    assert f"'y': there is no folder {tmp_path / 'no'}" in message
    assert "'a'" not in message
    assert not (tmp_path / "collected").exists()


@pytest.mark.parametrize("url", ["https://example.org/models", "hf://sb/asr"])
def test_a_url_of_the_web_is_refused_with_what_to_do(url):
    """Nothing is downloaded from there; the message says to do that first."""
    for pretrainer in (
        Pretrainer(loadables={"a": Both()}, paths={"a": f"{url}/a.ckpt"}),
        Pretrainer(loadables={"a": Both()}),
    ):
        with pytest.raises(CheckpointNotFoundError, match=r"is a URL.*Download the file first"):
            pretrainer.collect_files(default_source=url)


def test_a_repository_of_a_hub_is_refused_with_what_to_do(tmp_path, monkeypatch):
    """A source of the form owner/name that is no folder is probably a hub's."""
    monkeypatch.chdir(tmp_path)
    pretrainer = Pretrainer(loadables={"a": Both()}, paths={"a": "speechbrain/asr/lm.ckpt"})
    with pytest.raises(CheckpointNotFoundError, match="repository on a hub, download it first"):
        pretrainer.collect_files()


def test_a_name_without_path_or_default_source_is_refused(source):
    """Every such name is listed, and the message says both ways out."""
    pretrainer = Pretrainer(
        loadables={"a": Both(), "b": Both(), "c": Both()}, paths={"b": source / "b.ckpt"}
    )
    with pytest.raises(ConfigurationError, match=r"No file to load 'a', 'c' from.*add_paths"):
        pretrainer.collect_files()


def test_loading_before_collecting_is_refused():
    """Without a folder there is nowhere to look."""
    with pytest.raises(ConfigurationError, match=r"Cannot load 'a': .*Call collect_files first"):
        Pretrainer(loadables={"a": Both()}).load_collected()


def test_loading_what_is_not_in_the_folder_is_refused_before_anything_loads(source, tmp_path):
    """All missing files are listed, and no object is changed."""
    a = Both()
    pretrainer = Pretrainer(tmp_path / "collected", {"a": a, "b": Both(), "c": Both()})
    pretrainer.add_conditions({"c": False})
    pretrainer.collect_files(source)
    (tmp_path / "collected/b.ckpt").unlink()
    pretrainer.add_conditions({"c": True})
    with pytest.raises(CheckpointNotFoundError) as caught:
        pretrainer.load_collected()
    message = str(caught.value)
    assert f"'b': {tmp_path / 'collected/b.ckpt'}" in message
    assert f"'c': {tmp_path / 'collected/c.ckpt'}" in message
    assert not hasattr(a, "got")


def test_an_object_without_a_hook_is_refused_before_anything_loads(source):
    """The message names the object and the ways to give it a hook."""
    a = Both()
    pretrainer = Pretrainer(loadables={"a": a, "b": object()})
    pretrainer.collect_files(source)
    with pytest.raises(HookError, match=r"'b': no hook is known for a object.*custom_hooks"):
        pretrainer.load_collected()
    assert not hasattr(a, "got")


def test_a_hook_that_fails_is_named_with_object_and_file(source):
    """The error of the hook is chained."""

    def broken(obj, path):
        raise KeyError("vocabulary")

    pretrainer = Pretrainer(loadables={"a": Both()}, custom_hooks={"a": broken})
    pretrainer.collect_files(source)
    with pytest.raises(HookError, match=r"Cannot load 'a', a Both, from .*KeyError") as caught:
        pretrainer.load_collected()
    assert str(source / "a.ckpt") in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_hook_with_the_wrong_signature_is_refused_when_given():
    """Not at the end of a long preparation."""
    with pytest.raises(HookSignatureError, match="'a'"):
        Pretrainer(custom_hooks={"a": lambda obj: None})


@pytest.mark.parametrize("name", ["../a", "a/b", ""])
def test_a_name_that_would_leave_the_folder_is_refused(name):
    """Names become file names."""
    with pytest.raises(CheckpointNameError):
        Pretrainer(loadables={name: Both()})


def test_a_module_takes_what_fits_and_says_what_does_not(source, caplog):
    """Missing and unexpected parameters are warned about, shared ones loaded."""
    module = torch.nn.Module()
    module.param = torch.nn.Parameter(torch.zeros(1))
    module.extra = torch.nn.Parameter(torch.zeros(1))
    with caplog.at_level(logging.WARNING):
        torch_parameter_transfer(module, source / "model.ckpt")
    assert module.param.item() == 5.0
    assert "extra" in caplog.text


def test_a_module_of_another_shape_is_refused(source, scale):
    """The message of a mismatch is not wrapped a second time."""
    model = scale()
    model.param = torch.nn.Parameter(torch.zeros(3))
    pretrainer = Pretrainer(loadables={"model": model})
    pretrainer.collect_files(source)
    with pytest.raises(MismatchError, match=r"model\.ckpt"):
        pretrainer.load_collected()


def test_each_loaded_object_is_told_in_one_line(source, caplog):
    """Name and file."""
    pretrainer = Pretrainer(loadables={"a": Both()})
    pretrainer.collect_files(source)
    with caplog.at_level(logging.INFO, "lightning_sbckpt"):
        pretrainer.load_collected()
    assert caplog.messages == [f"loaded a from {source / 'a.ckpt'}"]
