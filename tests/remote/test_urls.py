"""What is a URL, what is a path, and what is left of a URL after `pathlib`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sbckpt._remote.urls import is_url, local_path, normal_url
from lightning_sbckpt.errors import ConfigurationError


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "gs://b", "memory://run", "sftp://host/run", "file:///run"]
)
def test_a_url_stays_one_when_it_went_through_path(url):
    """`Path` makes one slash of two; the URL is told and repaired."""
    assert is_url(url)
    assert is_url(Path(url))
    assert normal_url(Path(url)) == normal_url(url) == url


@pytest.mark.parametrize(
    "path", ["run", "/abs/run", "C:/run", "C://run", "a:b", "run:1/x", "", b"s3://b", None, 3]
)
def test_a_path_is_no_url(path):
    """A Windows drive has one letter; a colon inside a name means nothing."""
    assert not is_url(path)


def test_slashes_at_the_end_and_large_letters_of_the_scheme_say_nothing():
    """One place has one URL, since the mirror is named after it."""
    assert normal_url("S3://Bucket/Run//") == "s3://Bucket/Run"


@pytest.mark.parametrize("chain", ["filecache::s3://bucket/run", "simplecache::memory://x"])
def test_a_chain_of_filesystems_is_refused_and_never_taken_for_a_path(chain):
    """As a path it would make a strange folder here."""
    assert is_url(chain)
    with pytest.raises(ConfigurationError, match="expected one scheme and a path"):
        normal_url(chain)


def test_the_url_of_a_file_is_its_path():
    """What is on this machine's disk needs no remote store."""
    assert local_path("file:///data/run") == Path("/data/run")
    assert local_path(Path("file:///data/run")) == Path("/data/run")
    assert local_path("local:///data/run") == Path("/data/run")
    assert local_path("data/run") == Path("data/run")
    assert local_path("s3://data/run") is None
