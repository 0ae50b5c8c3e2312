"""A server that goes away, hangs, comes back, or refuses; an uploader that is killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_sbckpt._remote.folder import RemoteFolder, Retries
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import RemoteError
from remote._local_checkpoint import FILES, local_checkpoint

QUICK = Retries(attempts=3, first_delay=0.1)

# Seconds; without a bound these tests would not end at all. A busy machine needs some of them.
BOUND = 60


def remote(server, retries=QUICK, **options) -> RemoteFolder:
    server.bucket("bucket")
    url = f"{server.url('bucket')}/run"
    return RemoteFolder(url, retries=retries, storage_options={**server.options, **options})


def once(work):
    """Return a callback that does something at its first call only."""
    left = threading.Semaphore(1)

    def callback(count):
        if left.acquire(blocking=False):
            work()

    return callback


@pytest.mark.sample(1)
def test_a_server_killed_in_the_middle_of_an_upload_is_an_error_in_bounded_time(
    own_server, tmp_path
):
    """Nothing of it is visible, what was there is whole, and the next upload works."""
    folder = remote(own_server)
    folder.publish(local_checkpoint(tmp_path / "first"), "CKPT+first")
    local = local_checkpoint(tmp_path / "local", large=6 * BLOCK)
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"upload .*bucket/run/CKPT\+a.*3 times") as caught:
        folder.publish(local, "CKPT+a", progress=once(own_server.kill))
    assert time.monotonic() - started < BOUND
    assert "Check that the store can be reached" in str(caught.value)
    own_server.start()
    assert {name: sorted(files) for name, files in folder.listing().items()} == {
        "CKPT+first": FILES
    }
    folder.publish(local, "CKPT+a")
    assert sorted(folder.listing()) == ["CKPT+a", "CKPT+first"]
    folder.fetch("CKPT+a", "model.ckpt", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (local / "model.ckpt").read_bytes()


@pytest.mark.sample(1)
def test_a_server_that_is_back_after_two_seconds_costs_only_time(own_server, tmp_path, caplog):
    """Even one that has forgotten the parts it had: the file is sent again."""
    caplog.set_level(logging.INFO, "lightning_sbckpt")
    # More often than needed, unless the server is slow to start.
    folder = remote(own_server, Retries(attempts=9, first_delay=1.0))
    local = local_checkpoint(tmp_path / "local", large=6 * BLOCK)

    def restart():
        own_server.kill()
        threading.Timer(2.0, own_server.start).start()

    folder.publish(local, "CKPT+a", progress=once(restart))
    assert sorted(folder.listing()["CKPT+a"]) == FILES
    folder.fetch("CKPT+a", "model.ckpt", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (local / "model.ckpt").read_bytes()
    assert any("attempt 2 of 9" in line for line in caplog.messages)


def impatient(server, seconds) -> RemoteFolder:
    return remote(server, Retries(attempts=2, first_delay=0.1), **server.impatient(seconds))


@pytest.mark.sample(1)
def test_a_server_that_hangs_does_not_hang_us(own_server, tmp_path):
    """An answer is waited for so long, so often; and the folder works when the server goes on."""
    folder = remote(own_server)
    folder.publish(local_checkpoint(tmp_path / "local"), "CKPT+a")
    hasty = impatient(own_server, 1)
    own_server.hold()
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"list .*bucket/run: tried 2 times"):
        hasty.listing()
    with pytest.raises(RemoteError, match=r"CKPT\+b: tried 2 times"):
        hasty.publish(tmp_path / "local", "CKPT+b")
    assert time.monotonic() - started < BOUND
    own_server.go_on()
    assert list(folder.listing()) == ["CKPT+a"]


@pytest.mark.long
def test_a_server_that_hangs_in_the_middle_of_an_upload_does_not_hang_us(own_server, tmp_path):
    """Its parts end within their waits, all together and not one after the other.

    What is sent to a server that does not read is bounded, too: the libraries bound answers only.
    """
    folder = impatient(own_server, 1)
    local = local_checkpoint(tmp_path / "local", large=12 * BLOCK)
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"upload .*bucket/run/CKPT\+a"):
        folder.publish(local, "CKPT+a", progress=once(own_server.hold))
    assert time.monotonic() - started < BOUND
    own_server.go_on()
    assert remote(own_server).listing() == {}


@pytest.mark.sample(1)
def test_a_server_that_is_not_there_is_never_an_empty_folder(own_server):
    """A run would start from scratch; the error says where it looked."""
    folder = remote(own_server)
    own_server.kill()
    for look in (folder.listing, folder.check, folder.sweep):
        with pytest.raises(RemoteError, match=r"list .*bucket/run: tried 3 times"):
            look()


def test_a_bucket_that_is_not_there_is_an_error_at_once(s3_server, caplog):
    """And not an empty folder; it is not made either, since the name may be wrong."""
    caplog.set_level(logging.INFO, "lightning_sbckpt")
    folder = RemoteFolder("s3://no-such-bucket/run", storage_options=s3_server.options)
    for look in (folder.check, folder.listing):
        with pytest.raises(RemoteError, match="there is no bucket 'no-such-bucket'"):
            look()
    assert caplog.messages == []


def test_a_wrong_secret_is_not_tried_again(s3_server, tmp_path, caplog):
    """Neither to list, nor to read, nor to upload."""
    caplog.set_level(logging.INFO, "lightning_sbckpt")
    folder = remote(s3_server, secret="another-secret")
    local = local_checkpoint(tmp_path / "local")
    for work in (folder.check, folder.listing, lambda: folder.publish(local, "CKPT+a")):
        with pytest.raises(RemoteError, match="check the credentials"):
            work()
    assert not any("attempt" in line for line in caplog.messages)


@pytest.mark.long
def test_credentials_and_endpoint_come_from_the_environment(s3_server):
    """So a job script has them, and neither code nor configuration of the run."""
    s3_server.bucket("from-environment")
    code = (
        "from lightning_sbckpt._remote.folder import RemoteFolder as F; "
        "f = F('s3://from-environment/run'); f.check(); f.write('CKPT+a', 'CKPT.yaml', b'1'); "
        "print(list(f.listing()))"
    )
    environment = {**os.environ, **s3_server.environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "['CKPT+a']", done.stderr


def killed_uploads(server, tmp_path: Path, count: int, seed: int) -> list[bool]:
    """Kill so many uploads of one checkpoint, each at a random time; return which were visible."""
    chance = random.Random(seed)
    folder = remote(server)
    local = local_checkpoint(tmp_path / "local", large=3 * BLOCK)
    folder.publish(local, "CKPT+before")
    started = time.monotonic()
    folder.publish(local, "CKPT+measured")
    usual = time.monotonic() - started
    digest = folder.digest("CKPT+measured", "model.ckpt")
    visible = []
    for number in range(count):
        name = f"CKPT+{number}"
        child = os.fork()
        if not child:
            try:
                folder.publish(local, name)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, 1.6 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        listing = folder.listing()
        assert sorted(listing["CKPT+before"]) == FILES
        visible.append(name in listing)
        if name in listing:
            assert sorted(listing[name]) == FILES
            assert folder.digest(name, "model.ckpt") == digest
            folder.remove(name)
    # What the others left is no hindrance, and goes.
    folder.publish(local, "CKPT+0")
    folder.sweep(older_than_seconds=-60)
    assert sorted(folder._folders()) == ["CKPT+0", "CKPT+before", "CKPT+measured"]
    return visible


@pytest.mark.sample(1)
def test_an_uploader_killed_at_any_time_leaves_nothing_or_a_whole_checkpoint(own_server, tmp_path):
    """A few random times, the same at every run of the tests."""
    killed_uploads(own_server, tmp_path, 8, seed=6)


@pytest.mark.slow
def test_an_uploader_killed_at_many_times_leaves_nothing_or_a_whole_checkpoint(
    own_server, tmp_path
):
    """Both ends are met: some uploads were done when the kill came, most were not."""
    visible = killed_uploads(own_server, tmp_path, 80, seed=random.randrange(10**6))
    assert any(visible)
    assert not all(visible)


def test_parts_of_an_upload_that_nobody_goes_on_with_are_given_up(own_s3_server, tmp_path):
    """They are seen in no listing, and are paid for; those of a young upload stay."""
    folder = remote(own_s3_server)
    filesystem = folder._store.filesystem
    where = {"Bucket": "bucket", "Key": "run/CKPT+a/model.ckpt"}
    made = filesystem.call_s3("create_multipart_upload", **where)
    part = {"PartNumber": 1, "UploadId": made["UploadId"], "Body": b"1" * 6 * 2**20}
    filesystem.call_s3("upload_part", **where, **part)

    def under_way():
        found = filesystem.call_s3("list_multipart_uploads", Bucket="bucket", Prefix="run/")
        return [upload["Key"] for upload in found.get("Uploads", ())]

    folder.sweep()
    assert under_way() == ["run/CKPT+a/model.ckpt"]
    folder.sweep(older_than_seconds=-60)
    assert under_way() == []


MEASURE = """
import sys, threading, time
from pathlib import Path
from lightning_sbckpt._remote.folder import RemoteFolder
local, target = map(Path, sys.argv[1:3])
folder = RemoteFolder(sys.argv[3])
folder.check()

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

for work in (
    lambda: folder.publish(local, "CKPT+a"),
    lambda: folder.fetch("CKPT+a", "model.ckpt", target),
    lambda: folder.digest("CKPT+a", "model.ckpt"),
):
    base, peak, done = anonymous(), 0, False
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done = True
    watcher.join()
    print(peak - base)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "own_server", ["s3", pytest.param("sftp", marks=pytest.mark.slow)], indirect=True
)
def test_a_large_file_is_never_whole_in_memory(own_server, tmp_path):
    """200 MB go up, come down and are checked, each with less than 100 MB more than before."""
    own_server.bucket("bucket")
    local = local_checkpoint(tmp_path / "local", large=200 * 10**6)
    url = f"{own_server.url('bucket')}/run"
    arguments = [sys.executable, "-c", MEASURE, str(local), str(tmp_path / "back"), url]
    environment = {**os.environ, **own_server.environment}
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    used = [float(line) for line in done.stdout.split()]
    assert len(used) == 3
    assert max(used) < 100, used
    assert (tmp_path / "back").stat().st_size == 200 * 10**6
