"""Stores with folders, such as sftp: a put takes a while there, and a rename does not.

The disk of this machine, asked through fsspec, stands for them.
"""

from __future__ import annotations

import os

import pytest

from lightning_sbckpt._remote.folder import RemoteFolder, Retries
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import RemoteError
from remote._local_checkpoint import FILES, local_checkpoint


@pytest.fixture
def folder(tmp_path):
    return RemoteFolder(f"file://{tmp_path}/store/run", retries=Retries(attempts=2, first_delay=0))


def test_a_checkpoint_comes_is_replaced_and_goes_with_its_folders(folder, tmp_path):
    """No empty folder stays behind."""
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK + 1)
    folder.check()
    assert folder.listing() == {}
    folder.publish(local, "CKPT+a")
    folder.publish(local, "CKPT+a", copies={"model.ckpt": "CKPT+a"})
    folder.write("CKPT+a", "MANIFEST.yaml", b"another")
    listing = folder.listing()
    assert sorted(listing["CKPT+a"]) == FILES
    assert listing["CKPT+a"]["MANIFEST.yaml"].size == 7
    folder.fetch("CKPT+a", "model.ckpt", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (local / "model.ckpt").read_bytes()
    assert folder.digest("CKPT+a", "empty.ckpt").size == 0
    folder.remove("CKPT+a")
    assert os.listdir(tmp_path / "store" / "run") == []


def test_the_marker_appears_by_a_rename(folder, tmp_path):
    """While it is being written it has another name; and that is no file of a checkpoint."""
    filesystem = folder._store.filesystem
    real, seen = filesystem.mv, []

    def rename(source, target, **kwargs):
        seen.append((source.rpartition("/")[2], target.rpartition("/")[2], list(folder.listing())))
        return real(source, target, **kwargs)

    filesystem.mv = rename
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    assert seen[-1] == (".CKPT.yaml.part", "CKPT.yaml", [])
    assert sorted(folder.listing()["CKPT+a"]) == FILES
    (tmp_path / "store" / "run" / "CKPT+a" / ".ANNOTATIONS.yaml.part").touch()
    assert sorted(folder.listing()["CKPT+a"]) == FILES


def test_leftovers_go_with_their_folder(folder, tmp_path):
    """Old ones only, as on every store."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    folder.write("CKPT+b", "model.dcp/x", b"1")
    assert folder.sweep() == []
    assert folder.sweep(-60) == ["CKPT+b"]
    assert os.listdir(tmp_path / "store" / "run") == ["CKPT+a"]


def test_a_folder_that_can_not_be_listed_is_an_error_and_not_an_empty_one(folder, tmp_path):
    """Fsspec's own walk leaves out what it can't list; a run would start from scratch."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    real = folder._store.filesystem.ls

    def refuse(path, **kwargs):
        if path.endswith("CKPT+a"):
            raise PermissionError(path)
        return real(path, **kwargs)

    folder._store.filesystem.ls = refuse
    with pytest.raises(RemoteError, match=r"list file://.*check the credentials"):
        folder.listing()
