"""Stores to test against: fsspec's memory, and a real S3 server."""

from __future__ import annotations

import logging
import uuid

import pytest

from lightning_sbckpt._remote import places
from lightning_sbckpt._remote.folder import RemoteFolder, Retries
from remote._s3_server import MISSING, S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """One server for all tests that leave it alone; each makes a bucket of its own."""
    server = _started(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def own_s3_server(tmp_path):
    """A server of this test alone, to be killed and held."""
    server = _started(tmp_path / "s3-server")
    yield server
    server.kill()


def _started(folder) -> S3Server:
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    return S3Server(folder)


@pytest.fixture(params=["memory", "s3"])
def place(request):
    """A new URL and the options for it, on each kind of store."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    if request.param == "memory":
        return f"memory://{name}/run", {}
    server = request.getfixturevalue("s3_server")
    server.bucket(name)
    return f"s3://{name}/run", server.options


@pytest.fixture
def folder(place):
    """The folder at that URL, with short waits between attempts."""
    url, options = place
    retries = Retries(attempts=3, first_delay=0.05)
    return RemoteFolder(url, retries=retries, storage_options=options)


@pytest.fixture(autouse=True)
def _no_store_is_known(monkeypatch):
    """How a URL is opened is known to a process for good; the server of another test is gone."""
    monkeypatch.setattr(places, "_remotes", {})


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """The libraries of the stores say a lot at DEBUG, which tests of our own log would drown in."""
    for name in ("botocore", "aiobotocore", "s3fs", "fsspec", "asyncio", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
