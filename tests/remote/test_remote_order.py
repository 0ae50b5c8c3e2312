"""A checkpoint comes and goes as a whole: what is put, removed and swept, and in which order."""

from __future__ import annotations

import threading
import time

import pytest

from lightning_sbckpt._remote import listing
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    RemoteError,
)
from remote._local_checkpoint import FILES, local_checkpoint
from remote._recorder import record


@pytest.mark.sample(1)
def test_the_marker_is_put_last_and_removed_first(folder, tmp_path):
    """In every operation: publishing, replacing, removing."""
    recorder = record(folder)
    # What is done beside it, and not after it, would be done before it.
    recorder.fail = lambda _, operation, file: time.sleep(0.1 * (file == "CKPT.yaml"))
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK + 1)
    folder.publish(local, "CKPT+a")
    assert recorder.events[-1] == ("pipe_file", "CKPT.yaml")
    assert sum(file == "CKPT.yaml" for _, file in recorder.events) == 1
    assert len(recorder.events) >= len(FILES)
    recorder.events.clear()
    folder.publish(local, "CKPT+a")
    assert recorder.events[0] == ("rm_file", "CKPT.yaml")
    assert recorder.events[-1] == ("pipe_file", "CKPT.yaml")
    recorder.events.clear()
    folder.remove("CKPT+a")
    assert recorder.events[0] == ("rm_file", "CKPT.yaml")
    assert {operation for operation, _ in recorder.events} == {"rm_file"}
    assert len(recorder.events) == len(FILES)


def test_replacing_leaves_nothing_of_the_old_one(folder, tmp_path):
    """Files that only the old one had are gone, and the content is the new one's."""
    folder.publish(local_checkpoint(tmp_path / "old", mark=b"1"), "CKPT+a")
    folder.write("CKPT+a", "ANNOTATIONS.yaml", b"of the old one")
    new = local_checkpoint(tmp_path / "new", mark=b"2")
    (new / "empty.ckpt").unlink()
    folder.publish(new, "CKPT+a")
    assert sorted(folder.listing()["CKPT+a"]) == [file for file in FILES if file != "empty.ckpt"]
    assert folder.read("CKPT+a", "MANIFEST.yaml") == b"manifest 2"


@pytest.mark.sample(1)
def test_stopping_at_any_operation_leaves_nothing_visible_or_the_whole(folder, tmp_path):
    """As if the process had died there: each changing operation in turn is the first not done."""
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK + 1)
    folder.publish(local, "CKPT+before")
    recorder = record(folder)
    folder._tidy = lambda name: None

    seen = set()
    for last in range(1, 40):
        recorder._count = 0

        def stop(number, operation, file, last=last):
            if number >= last:
                raise PermissionError("the process is dead")

        recorder.fail = stop
        try:
            folder.publish(local, "CKPT+a")
        except RemoteError:
            done = False
        else:
            done = True
        recorder.fail = lambda *_: None
        listing = folder.listing()
        assert sorted(listing["CKPT+before"]) == FILES
        assert ("CKPT+a" in listing) == done
        if done:
            assert sorted(listing["CKPT+a"]) == FILES
            break
        seen.add(last)
    assert len(seen) >= len(FILES) - 1


def test_a_failed_upload_takes_away_what_it_had_put(folder, tmp_path):
    """And the error is that of the upload, whatever the tidying up does."""
    recorder = record(folder)

    def full(number, operation, file):
        if file == "MANIFEST.yaml":
            raise PermissionError("quota")

    recorder.fail = full
    with pytest.raises(
        RemoteError, match=r"upload .*CKPT\+a/MANIFEST.yaml: PermissionError: quota"
    ):
        folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    recorder.fail = lambda *_: None
    assert folder._folders() == {}


def test_if_the_answer_about_the_marker_is_lost_the_other_files_stay(folder, tmp_path):
    """It may have arrived, or arrive late: a checkpoint is then there, and a whole one."""
    recorder = record(folder)

    def lose(number, operation, file):
        if file == "CKPT.yaml":
            raise TimeoutError

    recorder.fail = lose
    local = local_checkpoint(tmp_path / "local")
    with pytest.raises(RemoteError, match=r"CKPT\+a/CKPT.yaml: tried 3 times.*TimeoutError"):
        folder.publish(local, "CKPT+a")
    recorder.fail = lambda *_: None
    assert folder.listing() == {}
    folder.write("CKPT+a", "CKPT.yaml", b"late")
    assert sorted(folder.listing()["CKPT+a"]) == FILES


def test_a_file_that_arrived_shorter_is_found_before_the_marker_is_put(folder, tmp_path):
    """Size by size, in the store's own words."""
    recorder = record(folder)
    real = recorder._real.pipe_file

    def losing(path, data, **kwargs):
        return real(path, data[:-1] if path.endswith("MANIFEST.yaml") else data, **kwargs)

    recorder._real.pipe_file = losing
    try:
        with pytest.raises(RemoteError, match=r"MANIFEST.yaml has 9 bytes, expected 10"):
            folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    finally:
        del recorder._real.pipe_file
    assert folder.listing() == {}
    assert ("pipe_file", "CKPT.yaml") not in recorder.events


@pytest.mark.sample(1)
def test_errors_that_pass_are_outlived_in_every_operation(folder, tmp_path):
    """Two of three attempts fail, at whatever is asked; nobody notices but the log."""
    recorder = record(folder)
    failures: dict[tuple[int, str, str], int] = {}
    lock = threading.Lock()

    def flaky(_, operation, file):
        key = (threading.get_ident(), operation, file)
        with lock:
            failures[key] = failures.get(key, 0) + 1
            if failures[key] % 3:
                raise ConnectionResetError("by peer")

    recorder.fail = flaky
    local = local_checkpoint(tmp_path / "local", large=1000)
    folder.publish(local, "CKPT+a")
    assert sorted(folder.listing()["CKPT+a"]) == FILES
    folder.write("CKPT+a", "note", b"1")
    assert folder.read("CKPT+a", "note") == b"1"
    folder.fetch("CKPT+a", "model.ckpt", tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == (local / "model.ckpt").read_bytes()
    folder.remove("CKPT+a")
    assert folder.listing() == {}
    assert len(failures) >= 10


def test_a_folder_without_the_marker_is_not_uploaded(folder, tmp_path):
    """Nothing would ever see it."""
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"has no CKPT\.yaml"):
        folder.publish(tmp_path, "CKPT+a")
    assert folder._folders() == {}


def test_a_link_is_not_followed_and_nothing_becomes_visible(folder, tmp_path):
    """What it leads to is no part of the checkpoint."""
    local = local_checkpoint(tmp_path / "local")
    (local / "link.ckpt").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic link"):
        folder.publish(local, "CKPT+a")
    assert folder._folders() == {}


@pytest.mark.sample(2)
def test_files_that_stay_here_are_not_uploaded(folder, tmp_path):
    """A mirror keeps notes of its own in the folder."""
    local = local_checkpoint(tmp_path / "local")
    (local / ".not-uploaded").touch()
    folder.publish(local, "CKPT+a", skip=[".not-uploaded"])
    assert sorted(folder.listing()["CKPT+a"]) == FILES


@pytest.mark.sample(1)
def test_the_store_copies_what_another_checkpoint_has(folder, tmp_path):
    """Nothing of it is sent; where it can't be copied it is uploaded all the same."""
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK)
    folder.publish(local, "CKPT+a")
    recorder = record(folder)
    sent = []
    copies = {"model.ckpt": "CKPT+a", "MANIFEST.yaml": "CKPT+gone"}
    folder.publish(local, "CKPT+b", progress=sent.append, copies=copies)
    copied = ("cp_file", "model.ckpt") in recorder.events
    assert copied == folder._store.of_objects
    assert (sum(sent) < 1000) == copied
    assert folder.digest("CKPT+b", "model.ckpt") == folder.digest("CKPT+a", "model.ckpt")
    assert folder.read("CKPT+b", "MANIFEST.yaml") == b"manifest 1"
    assert recorder.events[-1] == ("pipe_file", "CKPT.yaml")


def test_sweeping_takes_old_leftovers_and_keeps_young_ones_and_checkpoints(folder, tmp_path):
    """Young ones may be the upload of another process."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    folder.write("CKPT+unfinished", "model.ckpt", b"1")
    folder.write("other", "model.ckpt", b"1")
    assert folder.sweep() == []
    assert folder.sweep(older_than_seconds=30) == []
    assert sorted(folder._folders()) == ["CKPT+a", "CKPT+unfinished"]
    assert folder.sweep(older_than_seconds=-30) == ["CKPT+unfinished"]
    assert sorted(folder._folders()) == ["CKPT+a"]
    with folder._store.use() as filesystem:
        assert filesystem.exists(folder._store.path("other", "model.ckpt"))


def test_one_file_keeps_its_folder_young(folder, monkeypatch):
    """The youngest counts, since a long upload has old files."""
    folder.write("CKPT+u", "a.ckpt", b"1")
    folder.write("CKPT+u", "b.ckpt", b"1")
    real = listing.RemoteFile.of

    def aged(info):
        found = real(info)
        age = 10**6 if info["name"].endswith("a.ckpt") else 0
        return listing.RemoteFile(found.size, found.tag, found.modified - age)

    monkeypatch.setattr(listing.RemoteFile, "of", aged)
    assert folder.sweep(3600) == []
    assert "CKPT+u" in folder._folders()
