"""Opening a store: its library, its options; forks and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import fsspec
import pytest

from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.errors import (
    ConfigurationError,
    MissingDependencyError,
)
from remote._local_checkpoint import local_checkpoint


@pytest.mark.sample(2)
def test_it_may_be_used_after_a_fork_on_both_sides(folder, tmp_path):
    """The connections of an asynchronous filesystem don't survive one; they are opened anew."""
    local = local_checkpoint(tmp_path / "local", large=2 * BLOCK)
    folder.publish(local, "CKPT+a")
    child = os.fork()
    if not child:
        code = 1
        try:
            if folder.listing() and folder.read("CKPT+a", "MANIFEST.yaml") == b"manifest 1":
                folder.publish(local, "CKPT+child")
                code = 0 if "CKPT+child" in folder.listing() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    there = folder.listing()
    assert "CKPT+a" in there
    # What a forked process puts into its own memory is not here.
    assert ("CKPT+child" in there) == (folder._store.scheme != "memory")


@pytest.mark.sample(1)
def test_many_threads_may_use_one_folder(folder, tmp_path):
    """A writer uploads while the training process lists and reads."""
    local = local_checkpoint(tmp_path / "local", large=BLOCK + 1)
    folder.publish(local, "CKPT+a")
    problems = []

    def look():
        try:
            for _ in range(5):
                assert folder.read("CKPT+a", "MANIFEST.yaml") == b"manifest 1"
                assert folder.digest("CKPT+a", "model.ckpt").size == BLOCK + 1
                assert "CKPT+a" in folder.listing()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    folder.publish(local, "CKPT+b")
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(
    ("url", "extra"),
    [("s3://b/r", "s3"), ("gs://b/r", "gcs"), ("abfs://c/r", "azure"), ("sftp://h/r", "sftp")],
)
def test_a_missing_library_is_said_with_what_to_install(url, extra, monkeypatch):
    """As the name of an extra of this package."""

    def missing(scheme):
        raise ImportError(f"Install something for {scheme}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'lightning-sbckpt\[{extra}\]'"):
        RemoteFolder(url).check()


def test_an_unknown_scheme_is_refused():
    """With schemes that are known."""
    with pytest.raises(ConfigurationError, match=r"no store for nonsense://.*s3://"):
        RemoteFolder("nonsense://x/y").check()


def test_a_password_in_the_url_is_refused_and_not_repeated():
    """It would end in logs, in files and on screens."""
    with pytest.raises(ConfigurationError, match="storage_options") as caught:
        RemoteFolder("sftp://me:hunter2@host/run")
    assert "hunter2" not in str(caught.value)


def test_nothing_is_imported_before_a_url_is_used():
    """The libraries of the stores take seconds to load."""
    code = (
        "import sys, torch; before = set(sys.modules); import lightning_sbckpt._remote.folder as f; "
        "f.RemoteFolder('s3://b/run'); new = set(sys.modules) - before; "
        "sys.exit(', '.join({'fsspec', 's3fs', 'aiobotocore', 'aiohttp'} & new) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
