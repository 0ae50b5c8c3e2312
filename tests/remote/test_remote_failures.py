"""A store that goes away, and processes that die: nothing half done is seen, and nothing is lost."""

from __future__ import annotations

import logging
import threading

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.records import stored_files
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.streams import Sender
from lightning_sbckpt.errors import RemoteError, SaveError
from lightning_sbckpt.verify import verify
from remote._machines import Machines, filled, impatient, run_python


@pytest.fixture
def server(own_server):
    own_server.bucket("bucket")
    return own_server


@pytest.fixture
def url(server):
    return f"{server.url('bucket')}/run"


@pytest.fixture
def machines(server, url, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    impatient(url, server.options, monkeypatch)
    return Machines(url, server.options, tmp_path)


def names_in(checkpointer):
    return [ckpt.path.name for ckpt in checkpointer.list_checkpoints()]


def die_in_next_upload(server, monkeypatch):
    """Let the server end as soon as a first file of a checkpoint has arrived."""
    real, done = Sender.put, []

    def put(self, *arguments):
        size = real(self, *arguments)
        if not done:
            done.append(True)
            server.kill()
        return size

    monkeypatch.setattr(Sender, "put", put)


def test_a_save_whose_upload_fails_raises_and_names_the_url(server, machines, monkeypatch, url):
    """The checkpoints before it are whole, and it goes up with the next save."""
    checkpointer = machines.another({"model": filled(1.0)})
    checkpointer.save_checkpoint(name="a")
    die_in_next_upload(server, monkeypatch)
    with pytest.raises(SaveError, match=rf"CKPT\+b could not be uploaded to {url}") as raised:
        checkpointer.save_checkpoint(name="b")
    assert isinstance(raised.value.__cause__, RemoteError)
    server.start()
    assert names_in(machines.another()) == ["CKPT+a"]
    checkpointer.save_checkpoint(name="c")
    other = machines.another()
    assert names_in(other) == ["CKPT+a", "CKPT+b", "CKPT+c"]
    assert {found.status for found in verify(other.checkpoints_dir)} == {"sound"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
def test_training_goes_on_without_the_store_if_it_is_asked_to(
    mode, server, machines, monkeypatch, caplog, url
):
    """A warning each time, and retention removes nothing until the store is back."""
    checkpointer = machines.another(save_mode=mode, on_save_error="warn")
    checkpointer.save_and_keep_only(name="a")
    checkpointer.wait()
    server.kill()
    for name in "bc":
        checkpointer.save_and_keep_only(name=name)
        checkpointer.wait()
        assert f"CKPT+{name} could not be uploaded to {url}" in caplog.text
    assert caplog.text.count("Training goes on, since on_save_error is 'warn'") == 2
    server.start()
    assert names_in(machines.another()) == ["CKPT+a"]
    checkpointer.save_checkpoint(name="d")
    checkpointer.wait()
    assert names_in(machines.another()) == [f"CKPT+{name}" for name in "abcd"]


def test_at_most_two_checkpoints_wait_here(server, machines, caplog):
    """The disk of this machine may be small; what is dropped is said."""
    checkpointer = machines.another(on_save_error="warn")
    server.kill()
    for name in "abc":
        checkpointer.save_checkpoint(name=name)
    assert "dropped" in caplog.text
    server.start()
    checkpointer.save_checkpoint(name="d")
    assert names_in(machines.another()) == ["CKPT+b", "CKPT+c", "CKPT+d"]


def test_what_waits_is_resumed_from_and_uploaded_at_the_next_start(server, machines, tmp_path):
    """It is newer than anything in the store, and whole."""
    first = machines.another({"model": filled(1.0)}, local_dir=tmp_path / "here")
    first.save_checkpoint(name="a")
    server.kill()
    first.recoverables["model"] = filled(2.0)
    with pytest.raises(SaveError):
        first.save_checkpoint(name="b")
    first.release()
    server.start()
    again = machines.another(local_dir=tmp_path / "here")
    assert again.recover_if_possible().path.name == "CKPT+b"
    assert again.recoverables["model"].bias[0] == 2.0
    again.claim()
    assert names_in(machines.another()) == ["CKPT+a", "CKPT+b"]


def test_a_store_that_can_not_be_reached_is_not_an_empty_one(server, machines, url):
    """A run that began anew would be worse than one that ends."""
    checkpointer = machines.another()
    checkpointer.save_checkpoint(name="a")
    server.kill()
    with pytest.raises(RemoteError, match=url):
        checkpointer.recover_if_possible()
    with pytest.raises(RemoteError, match=url):
        machines.another()
    with pytest.raises(RemoteError, match=url):
        machines.another(access="read").list_checkpoints()


@pytest.mark.parametrize("own_server", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_said_at_once(machines):
    """At construction, and not after the first epoch."""
    with pytest.raises(RemoteError, match=r"there is no bucket 'nowhere'"):
        Checkpointer("s3://nowhere/run", storage_options=machines.options)


def test_a_pin_that_does_not_reach_the_store_is_not_there_either(server, machines, monkeypatch):
    """Who is told that it failed finds it as it was."""
    checkpointer = machines.another()
    checkpointer.save_checkpoint(name="a")
    found = checkpointer.find_checkpoint()

    def refuse(self, name, file, data):
        raise RemoteError("can't write")

    monkeypatch.setattr(RemoteFolder, "write", refuse)
    with pytest.raises(RemoteError, match="can't write"):
        checkpointer.pin(found)
    assert "pinned" not in checkpointer.find_checkpoint().meta


def test_a_removal_that_the_store_refuses_leaves_the_checkpoint(machines, monkeypatch):
    """Here and there, and it is said."""
    checkpointer = machines.another()
    for name in "ab":
        checkpointer.save_checkpoint(name=name)

    def refuse(self, name):
        raise RemoteError("can't remove")

    folder = checkpointer.checkpoints_dir / "CKPT+a"
    before = folder.stat().st_ino
    monkeypatch.setattr(RemoteFolder, "remove", refuse)
    with pytest.raises(RemoteError, match="can't remove"):
        checkpointer.delete_checkpoints()
    assert folder.stat().st_ino == before
    assert names_in(checkpointer) == ["CKPT+a", "CKPT+b"]


DIES = """
import os, signal, sys
from remote._machines import filled
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._remote import folder, streams, uploading

url, point = sys.argv[1], int(sys.argv[2])
checkpointer = Checkpointer(url, {"model": filled(1.0), "other": filled(2.0)})
checkpointer.save_checkpoint(name="a")

calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

streams.Sender.put = counted(streams.Sender.put)
folder.RemoteFolder._compare = counted(folder.RemoteFolder._compare)
uploading.Uploads._upload = counted(uploading.Uploads._upload)
uploading.Mirror.note = counted(uploading.Mirror.note)
checkpointer.recoverables = {"model": filled(3.0), "other": filled(4.0)}
checkpointer.save_checkpoint(name="b")
print("survived", calls)
"""

GOES_ON = """
import sys
from remote._machines import filled
from lightning_sbckpt import Checkpointer

with Checkpointer(sys.argv[1], {"model": filled(0.0), "other": filled(0.0)}) as checkpointer:
    checkpointer.claim()
    print(checkpointer.recover_if_possible().path.name)
    print(float(checkpointer.recoverables["model"].bias[0]))
"""


# 1: before the upload; 2 to 4: among the files; 5: before they are compared; 6: before the
# CKPT.yaml; 7: before it is noted that all is there.
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "point", [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 5)] + [3, 6, 7]
)
def test_a_process_killed_in_an_upload_leaves_nothing_half_and_its_next_start_goes_on(
    point, server, machines, tmp_path, url
):
    """What it had saved here is what it resumes from, and is uploaded then."""
    cache = tmp_path / "of-the-process"
    run_python(DIES, server, cache, url, point, code_wanted=-9)
    seen = machines.another({"model": filled(0.0), "other": filled(0.0)})
    assert names_in(seen) == (["CKPT+a", "CKPT+b"] if point == 7 else ["CKPT+a"])
    assert {found.status for found in verify(seen.checkpoints_dir)} == {"sound"}
    assert run_python(GOES_ON, server, cache, url).split() == ["CKPT+b", "3.0"]
    assert names_in(seen) == ["CKPT+a", "CKPT+b"]
    assert {found.status for found in verify(seen.checkpoints_dir)} == {"sound"}


def test_the_points_at_which_it_is_killed_are_all_there_are(server, tmp_path, url):
    """So that none of the tests above is one of a process that lives."""
    said = run_python(DIES, server, tmp_path / "cache", url, 100)
    assert said.split() == ["survived", "7"]


def test_a_new_process_with_an_empty_cache_goes_on(server, machines, tmp_path, url):
    """Another machine, or the same one after its disk was replaced."""
    both = {"model": filled(7.0), "other": filled(8.0)}
    machines.another(both).save_checkpoint(name="x")
    assert run_python(GOES_ON, server, tmp_path / "new", url).split() == ["CKPT+x", "7.0"]


def test_a_look_while_a_save_is_uploaded_takes_it_for_neither_gone_nor_new(machines, monkeypatch):
    """The list of the store may be older than what this process has just put there."""
    checkpointer = machines.another({"model": filled(1.0)})
    checkpointer.save_checkpoint(name="a")
    real, began, go_on = RemoteFolder.listing, threading.Event(), threading.Event()

    def slow(self):
        found = real(self)
        began.set()
        assert go_on.wait(20)
        return found

    monkeypatch.setattr(RemoteFolder, "listing", slow)
    looking = threading.Thread(target=checkpointer.list_checkpoints)
    looking.start()
    assert began.wait(20)
    saved = checkpointer.save_checkpoint(name="b")
    go_on.set()
    looking.join()
    assert saved.paramfiles["model"].exists()
    assert stored_files(saved.path)
    monkeypatch.undo()
    assert names_in(checkpointer) == ["CKPT+a", "CKPT+b"]


@pytest.mark.sample(1)
def test_threads_that_read_at_once_share_what_is_brought(machines, monkeypatch):
    """Each file is brought once a machine, and whole."""
    machines.another({"model": filled(5.0)}).save_checkpoint(name="a")
    reader = machines.another(access="read")
    (found,) = reader.list_checkpoints()
    results, fetched = [], []
    fetch = RemoteFolder.fetch_into
    monkeypatch.setattr(
        RemoteFolder, "fetch_into", lambda self, *args: fetched.append(args) or fetch(self, *args)
    )
    threads = [
        threading.Thread(target=lambda: results.append(found.open("model")["bias"][0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [float(value) for value in results] == [5.0] * 4
    assert len(fetched) == 1


def test_the_reason_for_each_upload_is_said_once(machines, caplog, url):
    """One line for what was written here, one for what went up."""
    with caplog.at_level(logging.INFO, logger="lightning_sbckpt"):
        machines.another().save_checkpoint(name="a")
    said = [record.getMessage() for record in caplog.records]
    assert sum("saved" in line and "CKPT+a" in line for line in said) == 1
    assert sum(f"uploaded {url}/CKPT+a" in line for line in said) == 1
