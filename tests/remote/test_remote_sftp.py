"""What a store over SSH needs beyond the others: whole small files, dates, waits, forks, one answer each."""

from __future__ import annotations

import gc
import os
import time

import pytest

from lightning_sbckpt._remote.folder import RemoteFolder, Retries
from lightning_sbckpt._remote.stores import open_filesystem
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import RemoteError
from lightning_sbckpt.verify import verify
from remote._local_checkpoint import FILES, local_checkpoint
from remote._machines import Machines, run_python

pytestmark = pytest.mark.parametrize("own_server", ["sftp"], indirect=True)


@pytest.fixture
def url(own_server):
    return f"{own_server.url('bucket')}/run"


@pytest.fixture
def folder(own_server, url):
    retries = Retries(attempts=3, first_delay=0.1)
    return RemoteFolder(url, retries=retries, storage_options=own_server.options)


DIES = """
import os, signal, sys
from remote._machines import filled
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._remote import sftp

checkpointer = Checkpointer(sys.argv[1], {"model": filled(1.0), "other": filled(1.0)})
checkpointer.save_checkpoint(name="a")

kind = sftp.sftp_class()
def half(self, path, mode="rb", opened=kind._open, **kwargs):
    stream = opened(self, path, mode, **kwargs)
    if mode == "wb" and "CKPT.yaml" in path:
        stream.write(b"unixtime: 17")
        os.kill(os.getpid(), signal.SIGKILL)
    return stream
kind._open = half
checkpointer.recoverables = {"model": filled(2.0), "other": filled(2.0)}
checkpointer.save_checkpoint(name="b")
"""

GOES_ON = """
import sys
from remote._machines import filled
from lightning_sbckpt import Checkpointer

with Checkpointer(sys.argv[1], {"model": filled(0.0), "other": filled(0.0)}) as checkpointer:
    print(checkpointer.recover_if_possible().path.name)
    checkpointer.claim()
"""


def test_a_client_killed_in_the_middle_of_the_marker_leaves_no_checkpoint(
    own_server, url, tmp_path, monkeypatch
):
    """Half of a `CKPT.yaml` is on the server, under another name; the next start puts the whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_python(DIES, own_server, tmp_path / "of-the-process", url, code_wanted=-9)
    there = own_server.folder / "bucket" / "run" / "CKPT+b"
    # The server has noticed that the client is gone, and ended what it had begun.
    half, end = there / ".CKPT.yaml.part", time.monotonic() + 30
    while not (half.exists() and half.read_bytes()) and time.monotonic() < end:
        time.sleep(0.05)
    assert half.read_bytes() == b"unixtime: 17"
    assert (there / "model.ckpt").exists()
    assert not (there / "CKPT.yaml").exists()
    machines = Machines(url, own_server.options, tmp_path)
    reader = machines.another(access="read")
    assert [each.path.name for each in reader.list_checkpoints()] == ["CKPT+a"]
    said = run_python(GOES_ON, own_server, tmp_path / "of-the-process", url)
    assert said.split() == ["CKPT+b"]
    assert [each.path.name for each in reader.list_checkpoints()] == ["CKPT+a", "CKPT+b"]
    assert {found.status for found in verify(reader.checkpoints_dir)} == {"sound"}
    assert not (there / ".CKPT.yaml.part").exists()


def test_a_small_file_is_replaced_in_one_step(folder):
    """While it is written it has another name, and it is never gone."""
    folder.write("CKPT+a", "NOTE.yaml", b"1")
    client, seen = folder._store.filesystem.ftp, []
    real = client.posix_rename

    def rename(source, target):
        seen.append((source.rpartition("/")[2], folder.read("CKPT+a", "NOTE.yaml")))
        real(source, target)

    client.posix_rename = rename
    folder.write("CKPT+a", "NOTE.yaml", b"2")
    assert seen == [(".NOTE.yaml.part", b"1")]
    assert folder.read("CKPT+a", "NOTE.yaml") == b"2"


def test_a_server_without_the_extension_for_renames_does(folder, tmp_path):
    """The plain rename of SFTP replaces nothing, so the old one goes first."""
    client = folder._store.filesystem.ftp

    def unknown(source, target):
        raise OSError("Operation unsupported")

    client.posix_rename = unknown
    local = local_checkpoint(tmp_path / "local")
    folder.publish(local, "CKPT+a")
    folder.write("CKPT+a", "MANIFEST.yaml", b"another")
    assert sorted(folder.listing()["CKPT+a"]) == FILES
    assert folder.read("CKPT+a", "MANIFEST.yaml") == b"another"


def test_what_replaces_a_file_is_dated_later_however_fast_it_comes(folder, tmp_path):
    """Times are whole seconds there, and nothing else tells another machine of a change."""
    local = local_checkpoint(tmp_path / "local")
    tags = set()
    for _ in range(3):
        folder.publish(local, "CKPT+a")
        tags.add(folder.listing()["CKPT+a"]["CKPT.yaml"].tag)
        folder.write("CKPT+a", "NOTE.yaml", b"1")
        tags.add(folder.listing()["CKPT+a"]["NOTE.yaml"].tag + " of the note")
    assert len(tags) == 6


def test_every_wait_is_bounded_and_what_the_user_sets_stays(own_server, url):
    """Connecting, logging in, and every answer after that."""
    made = open_filesystem(url, {**own_server.options, "timeout": 3})
    waits = [made.ssh_kwargs[name] for name in ("timeout", "auth_timeout", "banner_timeout")]
    assert waits == [3, 10, 10]
    assert made.ftp.get_channel().gettimeout() == 30
    made = open_filesystem(url, {**own_server.options, "channel_timeout": 7})
    assert made.ftp.get_channel().gettimeout() == 7


def test_a_wrong_password_is_not_tried_again(own_server, url, caplog):
    """The error says what to check, and not what the password was."""
    caplog.set_level("INFO", "lightning_sbckpt")
    folder = RemoteFolder(url, storage_options={**own_server.options, "password": "hunter2"})
    with pytest.raises(RemoteError, match=r"can't open sftp://.*AuthenticationException") as caught:
        folder.check()
    assert "Check the URL, the credentials" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not any("attempt" in line for line in caplog.messages)


def test_a_connection_that_was_lost_is_opened_again(own_server, folder, tmp_path):
    """By the next operation, whichever it is, without an error: a night without one is enough."""
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    for work in (
        folder.listing,
        folder.check,
        lambda: folder.read("CKPT+a", "CKPT.yaml"),
        lambda: folder.digest("CKPT+a", "model.ckpt"),
        lambda: folder.write("CKPT+a", "NOTE.yaml", b"1"),
        lambda: folder.publish(tmp_path / "local", "CKPT+b"),
        lambda: folder.remove("CKPT+b"),
    ):
        own_server.kill()
        own_server.start()
        work()
    assert sorted(folder.listing()["CKPT+a"]) == sorted([*FILES, "NOTE.yaml"])


def test_what_a_fork_does_to_its_copy_does_not_reach_the_server(folder, tmp_path):
    """A connection that ends in the child would end, by what it says then, that of the parent."""
    local = local_checkpoint(tmp_path / "local", large=BLOCK + 1)
    folder.publish(local, "CKPT+a")
    connection = folder._store.filesystem
    child = os.fork()
    if not child:
        try:
            folder._store._filesystem = None
            connection.ftp.close()
            connection.client.close()
            del connection
            gc.collect()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(folder.listing()["CKPT+a"]) == FILES
    assert folder.digest("CKPT+a", "model.ckpt").size == BLOCK + 1
    assert folder._store.filesystem is connection


def test_a_write_that_the_server_refuses_is_an_error_wherever_it_is(folder, monkeypatch):
    """Many are on their way at once; the answer to each is looked at."""
    filesystem = folder._store.filesystem
    folder.write("", "x", b"1")
    from paramiko.sftp import CMD_WRITE

    real, asked = filesystem.ftp._async_request, []

    def spoil(fileobj, kind, *args):
        if kind == CMD_WRITE:
            asked.append(args)
            if len(asked) == 150:
                # A handle that the server does not know.
                args = (b"nothing", *args[1:])
        return real(fileobj, kind, *args)

    monkeypatch.setattr(filesystem.ftp, "_async_request", spoil)
    with (
        pytest.raises(OSError, match=r"\S"),
        filesystem.open(folder._store.path("large"), "wb") as stream,
    ):
        stream.write(b"1" * 5 * 2**20)
