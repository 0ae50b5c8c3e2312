"""A connection that is slow: it stands before a server and hands on so many bytes in a second."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_CHUNK = 2**14


class SlowConnection:
    """What connects to `port` reaches a server, slowly.

    Args:
        server: The port of the server.
        rate: Bytes in a second, each way, of each connection.
    """

    def __init__(self, server: int, rate: float) -> None:
        self._server, self._rate = server, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # Closed.
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._hand_on, args=pair, daemon=True).start()

    def _hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                target.sendall(data)
                time.sleep(len(data) / self._rate)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
