"""The kinds of stores that tests run against, each a real server on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from remote._azure_server import AzureServer
from remote._gcs_server import GcsServer
from remote._s3_server import S3Server
from remote._server import Server
from remote._sftp_server import SftpServer

SERVERS: dict[str, type[Server]] = {
    kind.scheme: kind for kind in (S3Server, SftpServer, GcsServer, AzureServer)
}
# The servers of the last two come from elsewhere than the development tools.
ALWAYS = ["s3", "sftp"]
SELDOM = [pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("gs", "abfs")]


def started(scheme: str, folder: Path) -> Server:
    """Start a server, or skip the test and say what is to be installed."""
    kind = SERVERS[scheme]
    missing = kind.missing()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return kind(folder)
