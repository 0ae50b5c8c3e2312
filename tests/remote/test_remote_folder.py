"""What is on a store: listed, read, fetched and checked, as each kind of store has it."""

from __future__ import annotations

import itertools
import os

import pytest
import xxhash

from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    RemoteError,
)
from remote._local_checkpoint import FILES, local_checkpoint
from remote._recorder import record

# Not every server takes such names as they are.
FREE = {"\x01": ["memory"], "b": ["memory", "s3", "sftp", "gs"]}


def test_what_was_published_is_listed_with_sizes_and_read_back(folder, tmp_path):
    """Every file, those in folders too, by its relative name."""
    local = local_checkpoint(tmp_path / "local")
    folder.publish(local, "CKPT+a")
    listing = folder.listing()
    assert list(listing) == ["CKPT+a"]
    assert sorted(listing["CKPT+a"]) == FILES
    for file, found in listing["CKPT+a"].items():
        data = (local / file).read_bytes()
        assert found.size == len(data)
        assert folder.read("CKPT+a", file) == data


def test_a_folder_that_does_not_exist_yet_has_no_checkpoints(folder):
    """So a first start finds nothing, and says nothing."""
    folder.check()
    assert folder.listing() == {}
    assert folder.sweep() == []


def test_only_checkpoints_with_their_marker_are_listed(folder, tmp_path):
    """Other names, files at the top, and an upload that is not done, are no checkpoints."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    folder.write("CKPT+unfinished", "model.ckpt", b"1")
    folder.write("logs", "CKPT.yaml", b"1")
    folder.write("CKPT+a", "ANNOTATIONS.yaml", b"said")
    assert list(folder.listing()) == ["CKPT+a"]
    assert "ANNOTATIONS.yaml" in folder.listing()["CKPT+a"]


def test_a_name_that_leads_out_of_the_folder_is_not_listed(folder):
    """A reader makes local files of these names; anybody may have put them there."""
    folder.write("CKPT+x", "CKPT.yaml", b"1")
    with folder._store.use() as filesystem:
        for name in ("CKPT+x/ok", "CKPT+x/a\\b", "CKPT+x/\x01"):
            if folder._store.scheme in FREE.get(name[-1], [folder._store.scheme]):
                filesystem.pipe_file(f"{folder._store.path()}/{name}", b"1")
    if folder._store.scheme == "memory":
        store = filesystem.store
        store[f"{folder._store.path()}/CKPT+x/../../etc"] = store[
            f"{folder._store.path()}/CKPT+x/ok"
        ]
    try:
        assert sorted(folder.listing()["CKPT+x"]) == ["CKPT.yaml", "ok"]
    finally:
        if folder._store.scheme == "memory":
            del store[f"{folder._store.path()}/CKPT+x/../../etc"]


def test_a_file_of_the_folder_itself_is_written_and_read_beside_the_checkpoints(folder):
    """Its place is that of any file there, without an empty name in between."""
    folder.write("", "HISTORY.jsonl", b"{}")
    assert folder.read("", "HISTORY.jsonl") == b"{}"
    with folder._store.use() as filesystem:
        assert filesystem.exists(f"{folder._store.path()}/HISTORY.jsonl")
    assert folder.listing() == {}


def test_an_object_that_marks_a_folder_is_no_file(folder, tmp_path):
    """Consoles of stores make them; on the disk it would stand where the folder must be."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    real = folder._store.filesystem.find

    def with_marks(root, **kwargs):
        found = real(root, **kwargs)
        marks = [f"{root}/CKPT+a/", f"{root}/CKPT+a/model.dcp/"]
        return found | {name: {"name": name, "size": 0, "type": "file"} for name in marks}

    folder._store.filesystem.find = with_marks
    try:
        assert sorted(folder.listing()["CKPT+a"]) == FILES
    finally:
        del folder._store.filesystem.find


def test_a_tag_changes_when_the_content_does_and_only_then(folder, tmp_path):
    """By it a mirror knows which small files to bring again."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    before = folder.listing()["CKPT+a"]
    folder.write("CKPT+a", "MANIFEST.yaml", b"manifest 2")
    after = folder.listing()["CKPT+a"]
    assert before["MANIFEST.yaml"].size == after["MANIFEST.yaml"].size
    assert before["MANIFEST.yaml"].tag != after["MANIFEST.yaml"].tag
    assert before["model.ckpt"].tag == after["model.ckpt"].tag


@pytest.mark.sample(2)
def test_what_another_process_changes_is_seen(folder, place, tmp_path):
    """No listing is remembered, neither by us nor by the library."""
    url, options = place
    other = RemoteFolder(url, storage_options=options)
    assert folder.listing() == {}
    other.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    assert list(folder.listing()) == ["CKPT+a"]
    other.remove("CKPT+a")
    assert folder.listing() == {}


@pytest.mark.sample(3)
@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_file_of_any_size_comes_back_bit_for_bit(folder, tmp_path, size):
    """Fetched and by its checksum, at and around the size of a block."""
    local = local_checkpoint(tmp_path / "local", large=size)
    arrived = []
    folder.publish(local, "CKPT+a", progress=arrived.append)
    data = (local / "model.ckpt").read_bytes()
    target = tmp_path / "here" / "model.ckpt"
    target.parent.mkdir()
    folder.fetch("CKPT+a", "model.ckpt", target)
    assert target.read_bytes() == data
    assert list(target.parent.iterdir()) == [target]
    digest = folder.digest("CKPT+a", "model.ckpt")
    assert digest.size == size
    assert digest.xxh3_128 == xxhash.xxh3_128(data).hexdigest()
    assert sum(arrived) == sum((local / file).stat().st_size for file in FILES)


@pytest.mark.sample(1)
def test_a_block_that_comes_short_is_asked_for_again(folder, tmp_path):
    """A connection that ends early is no end of the file."""
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK + 5)
    folder.publish(local, "CKPT+a")
    filesystem = folder._store.filesystem
    real, numbers = filesystem.cat_file, itertools.count(1)

    def short(path, start=None, end=None, **kwargs):
        number = next(numbers)
        data = real(path, start=start, end=end, **kwargs)
        return data[:-1] if number == 2 else data

    filesystem.cat_file = short
    try:
        folder.fetch("CKPT+a", "model.ckpt", tmp_path / "model.ckpt")
    finally:
        del filesystem.cat_file
    assert next(numbers) == 5
    assert (tmp_path / "model.ckpt").read_bytes() == (local / "model.ckpt").read_bytes()


@pytest.mark.sample(1)
def test_a_file_that_is_replaced_while_it_is_read_is_said_and_not_mixed(folder, tmp_path):
    """Half of the old and half of the new would be neither."""
    folder.publish(local_checkpoint(tmp_path / "local", large=2 * BLOCK), "CKPT+a")
    blocks = folder._blocks("CKPT+a", "model.ckpt", "read")
    next(blocks)
    folder.write("CKPT+a", "model.ckpt", os.urandom(2 * BLOCK))
    with pytest.raises(RemoteError, match="replaced by another while it was read"):
        list(blocks)


def test_a_fetch_that_fails_leaves_no_file(folder, tmp_path):
    """Neither the target nor the beginning of it; an older target stays."""
    folder.publish(local_checkpoint(tmp_path / "local", large=2 * BLOCK), "CKPT+a")
    target = tmp_path / "here" / "model.ckpt"
    target.parent.mkdir()
    target.write_bytes(b"old")
    recorder = record(folder)

    def refuse(number, operation, file):
        if operation == "cat_file":
            raise PermissionError("no")

    recorder.fail = refuse
    with pytest.raises(RemoteError, match=r"fetch .*model.ckpt .*PermissionError: no"):
        folder.fetch("CKPT+a", "model.ckpt", target)
    assert [path.name for path in target.parent.iterdir()] == ["model.ckpt"]
    assert target.read_bytes() == b"old"


def test_what_is_not_there_is_an_error_of_its_own(folder, tmp_path):
    """It was removed by another process, mostly; that is no failure of the store."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    for work in (
        lambda: folder.read("CKPT+a", "other"),
        lambda: folder.read("CKPT+b", "CKPT.yaml"),
        lambda: folder.digest("CKPT+b", "CKPT.yaml"),
        lambda: folder.fetch("CKPT+b", "CKPT.yaml", tmp_path / "x"),
        lambda: folder.remove("CKPT+b"),
    ):
        with pytest.raises(CheckpointNotFoundError, match=r"run/CKPT\+"):
            work()
    assert not (tmp_path / "x").exists()


def test_a_large_file_is_not_read_as_a_small_one(folder, tmp_path):
    """Its size is looked at first."""
    folder.publish(local_checkpoint(tmp_path / "local", large=1001), "CKPT+a")
    with pytest.raises(RemoteError, match="it has 1,001 bytes, more than 1,000"):
        folder.read("CKPT+a", "model.ckpt", most=1000)
