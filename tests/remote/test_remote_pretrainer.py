"""A `Pretrainer` brings the files that it loads from a store, as from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sbckpt import Pretrainer
from lightning_sbckpt._remote import places
from lightning_sbckpt.errors import CheckpointNotFoundError, RemoteError
from remote._machines import Machines, filled, impatient


@pytest.fixture
def machines(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Machines(*place, tmp_path)
    both = {"encoder": filled(1.0), "decoder": filled(2.0)}
    found.another(both).save_checkpoint(name="a")
    return found


def pretrainer(machines, tmp_path, models, **kwargs):
    options = {"storage_options": machines.options} if machines.options else {}
    return Pretrainer(tmp_path / "collected", models, **options, **kwargs)


@pytest.mark.sample(2)
def test_files_of_a_checkpoint_in_a_store_are_collected_and_loaded(machines, tmp_path, monkeypatch):
    """By the checkpoint as the default source, by a URL of one file, and as `pathlib` spells it."""
    # As in another process, which knows no more of the store than it is told here.
    monkeypatch.setattr(places, "_remotes", {})
    source = f"{machines.url}/CKPT+a"
    models = {"encoder": filled(0.0), "decoder": filled(0.0), "third": filled(0.0)}
    paths = {"decoder": f"{source}/decoder.ckpt", "third": Path(f"{source}/encoder.ckpt")}
    collector = pretrainer(machines, tmp_path, models, paths=paths)
    collected = collector.collect_files(default_source=source)
    assert collected == {name: tmp_path / "collected" / f"{name}.ckpt" for name in models}
    collector.load_collected()
    assert [model.bias[0] for model in models.values()] == [1.0, 2.0, 1.0]
    assert sorted(path.name for path in (tmp_path / "collected").iterdir()) == [
        "decoder.ckpt",
        "encoder.ckpt",
        "third.ckpt",
    ]


def test_files_of_folders_and_stores_go_together(machines, tmp_path):
    """Each is where it says."""
    torch.save(filled(7.0).state_dict(), tmp_path / "local.ckpt")
    models = {"encoder": filled(0.0), "local": filled(0.0)}
    paths = {"local": f"file://{tmp_path}/local.ckpt"}
    collector = pretrainer(machines, tmp_path, models, paths=paths)
    collector.collect_files(default_source=f"{machines.url}/CKPT+a")
    collector.load_collected()
    assert [model.bias[0] for model in models.values()] == [1.0, 7.0]
    # What is a folder by another name needs no copy of its own.
    assert (tmp_path / "collected" / "local.ckpt").samefile(tmp_path / "local.ckpt")


@pytest.mark.sample(1)
def test_what_a_checkpointer_knows_of_its_store_is_known_here(machines, tmp_path):
    """The options need not be said twice."""
    model = filled(0.0)
    collector = Pretrainer(tmp_path / "collected", {"encoder": model})
    collector.collect_files(default_source=f"{machines.url}/CKPT+a")
    collector.load_collected()
    assert model.bias[0] == 1.0


def test_files_that_are_not_in_the_store_are_all_listed_and_nothing_is_collected(
    machines, tmp_path
):
    """What is there already stays as it is."""
    models = {name: filled(0.0) for name in ("encoder", "x", "y")}
    collector = pretrainer(machines, tmp_path, models)
    (tmp_path / "collected").mkdir()
    (tmp_path / "collected" / "encoder.ckpt").write_bytes(b"before")
    with pytest.raises(CheckpointNotFoundError) as caught:
        collector.collect_files(default_source=f"{machines.url}/CKPT+a")
    for name in "xy":
        assert f"{name!r}: there is no file {machines.url}/CKPT+a/{name}.ckpt" in str(caught.value)
    assert "encoder" not in str(caught.value)
    assert [path.name for path in (tmp_path / "collected").iterdir()] == ["encoder.ckpt"]
    assert (tmp_path / "collected" / "encoder.ckpt").read_bytes() == b"before"


def test_a_store_that_can_not_be_reached_is_an_error_with_its_url(
    own_server, tmp_path, monkeypatch
):
    """And not a missing file."""
    url = f"{own_server.url('bucket')}/run"
    options = own_server.options
    own_server.kill()
    impatient(url, options, monkeypatch)
    collector = Pretrainer(
        tmp_path / "collected", {"encoder": filled(0.0)}, storage_options=options
    )
    with pytest.raises(RemoteError, match=r"fetch .*bucket/run/encoder\.ckpt: tried"):
        collector.collect_files(default_source=url)
    assert list((tmp_path / "collected").iterdir()) == []


@pytest.mark.parametrize("url", ["s3://bucket/models", Path("s3://bucket/models")])
def test_without_a_folder_to_bring_it_to_a_url_is_refused_with_what_to_do(url):
    """Files are loaded from this machine."""
    with pytest.raises(
        CheckpointNotFoundError, match=r"s3:/+bucket/models is in a store.*collect_in"
    ):
        Pretrainer(loadables={"a": filled(0.0)}).collect_files(default_source=url)
