"""fsspec's SFTP made fit for checkpoints: whole files at once, bounded waits, a safe fork.

Three things that the protocol doesn't have are made here. A small file is put in one step, by a
rename over the old one. A file that replaces another is always dated later, since times are whole
seconds and nothing else tells the two apart. And what is sent or asked for goes in many requests at
once, where one after the other would wait for each answer: the requests are of 32 KiB.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any
from weakref import WeakSet

# What is on its way without an answer; more would only fill the buffers of a server that hangs.
_IN_FLIGHT = 2**20
_REQUEST = 2**15
_MOST_REMEMBERED = 1000

_WAITS = ("timeout", "banner_timeout", "auth_timeout")
# This is paramiko's name for the wait for a channel; here it bounds every answer.
_ANSWER = "channel_timeout"

_open: WeakSet[Any] = WeakSet()
_left_behind: list[Any] = []


def bounded(options: Mapping[str, object], connect: float, answer: float) -> dict[str, object]:
    """Return the options of a connection with bounds for waiting; those that are set stay."""
    return {**dict.fromkeys(_WAITS, connect), _ANSWER: answer, **options}


@cache
def sftp_class() -> type[Any]:
    """Return the class of filesystems.

    Raises:
        ImportError: paramiko is not installed.
    """
    from fsspec.implementations.sftp import SFTPFileSystem
    from paramiko import SFTPError, SSHException  # type: ignore[import-untyped]

    class Sftp(SFTPFileSystem):  # type: ignore[misc]  # fsspec has no types.
        """One connection."""

        def __init__(self, host: str, **kwargs: Any) -> None:
            self._removed: dict[str, float] = {}
            super().__init__(host, **kwargs)
            seconds = float(kwargs[_ANSWER])
            self.ftp.get_channel().settimeout(seconds)
            _bound_sending(self.client.get_transport().sock, seconds)
            _open.add(self.ftp)

        def usable_after(self, error: Exception) -> bool:
            """Return whether the connection still is what it was."""
            # After a wait that was given up, the next answer would be taken for another's.
            broken = isinstance(error, (TimeoutError, EOFError, SSHException, SFTPError))
            return not broken and bool(self.client.get_transport().is_active())

        def close(self) -> None:
            with suppress(Exception):
                self.client.close()

        def cat_file(
            self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
        ) -> bytes:
            with self.ftp.open(self._strip_protocol(path), "rb") as stream:
                size = int(stream.stat().st_size or 0)
                first = min(start or 0, size)
                last = size if end is None else min(end, size)
                if first >= last:
                    return b""
                return b"".join(stream.readv([(first, last - first)]))

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
            """Put a file in one step: who looks sees it whole, or what was there before."""
            folder, _slash, name = path.rpartition("/")
            beside = f"{folder}/.{name}.part"
            with self._open(beside, "wb") as stream:
                stream.write(value)
            self._date_after_the_last(beside, path)
            try:
                self.ftp.posix_rename(beside, path)
            except OSError as error:
                if error.errno is not None or not self.usable_after(error):
                    raise
                # A server without that extension has a rename that replaces nothing.
                with suppress(FileNotFoundError):
                    self.ftp.remove(path)
                self.ftp.rename(beside, path)

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            stream = self.ftp.open(path, mode)
            return _Writer(stream) if mode == "wb" else stream

        def _rm(self, path: str) -> None:
            found = self.ftp.stat(path)
            self.ftp.remove(path)
            if len(self._removed) >= _MOST_REMEMBERED:
                self._removed.clear()
            self._removed[path] = float(found.st_mtime or 0)

        def _date_after_the_last(self, beside: str, path: str) -> None:
            try:
                before = float(self.ftp.stat(path).st_mtime or 0)
            except FileNotFoundError:
                before = self._removed.get(path, 0.0)
            # A server that lets no times be set has them as they are.
            if before >= float(self.ftp.stat(beside).st_mtime or 0):
                with suppress(PermissionError):
                    self.ftp.utime(beside, (before + 1, before + 1))

    return Sftp


class _Writer:
    """A file that is sent in many requests at once, each of which is answered before it is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> _Writer:  # noqa: PYI034  # `Self` is of Python 3.11.
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing asks the server once more; one that just did not answer is not waited for again.
        if kind is None or not issubclass(kind, Exception):
            self._stream.close()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _IN_FLIGHT):
            piece = view[start : start + _IN_FLIGHT]
            last = (len(piece) - 1) // _REQUEST * _REQUEST
            self._stream.set_pipelined(True)
            self._stream.write(bytes(piece[:last]))
            # Waits for the answers to all.
            self._stream.set_pipelined(False)
            self._stream.write(bytes(piece[last:]))


def _bound_sending(connection: socket.socket, seconds: float) -> None:
    """Let what nobody takes be an error in bounded time; paramiko would wait for ever."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with suppress(OSError):
            milliseconds = int(seconds * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _after_fork() -> None:
    # What the child's copy of a connection would say at its end, the server would take for the
    # parent's. So it can say nothing, and does not end.
    for client in list(_open):
        _left_behind.append(client)
        with suppress(Exception):
            client.get_channel().get_transport().sock.close()


os.register_at_fork(after_in_child=_after_fork)
