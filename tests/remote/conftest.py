"""Stores to test against: fsspec's memory, and real servers."""

from __future__ import annotations

import logging
import uuid

import pytest

from lightning_sbckpt._remote import places
from lightning_sbckpt._remote.folder import RemoteFolder, Retries
from remote._servers import ALWAYS, SELDOM, started


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Give one server of each kind, for all tests that leave it alone and make a bucket of their own."""
    running = {}

    def server(scheme):
        if scheme not in running:
            running[scheme] = started(scheme, tmp_path_factory.mktemp(scheme) / "store")
        return running[scheme]

    yield server
    for each in running.values():
        each.kill()


@pytest.fixture(scope="session")
def s3_server(servers):
    """The server that most tests of a process of its own run against."""
    return servers("s3")


@pytest.fixture
def own_s3_server(tmp_path):
    """A server of this test alone, to be killed and held."""
    server = started("s3", tmp_path / "s3-server")
    yield server
    server.kill()


@pytest.fixture(params=ALWAYS)
def server(request, servers):
    """One server of each kind in turn."""
    return servers(request.param)


@pytest.fixture(params=ALWAYS)
def own_server(request, tmp_path):
    """One of each kind in turn, of this test alone, to be killed and held."""
    server = started(request.param, tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture(params=["memory", *ALWAYS, *SELDOM])
def place(request, servers):
    """A new URL and the options for it, on each kind of store."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    if request.param == "memory":
        return f"memory://{name}/run", {}
    server = servers(request.param)
    server.bucket(name)
    return f"{server.url(name)}/run", server.options


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
def _cache_of_its_own(monkeypatch, tmp_path):
    """Mirrors are noted in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """The libraries of the stores say a lot at DEBUG, which tests of our own log would drown in."""
    for name in ("botocore", "aiobotocore", "s3fs", "fsspec", "asyncio", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What paramiko says at ERROR is raised as well.
    for name in ("paramiko", "gcsfs", "azure", "adlfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
