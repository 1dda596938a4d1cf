"""A tunnel on loopback that can be cut, as an ssh tunnel is when the network changes."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit


class Tunnel:
    """Forwards connections to the server at `target` while used as a context; `address` is its own.

    `cut` ends its connections and has new ones refused, until `mend`.
    """

    def __init__(self, target: str):
        self._target = (urlsplit(target).hostname, urlsplit(target).port)
        self._listener: socket.socket | None = None
        self._ends: list[socket.socket] = []
        self._port = 0
        self.mend()
        self.address = f"http://127.0.0.1:{self._port}"

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        if self._listener is not None:
            self._end(self._listener)
            self._listener = None
        while self._ends:
            self._end(self._ends.pop())

    def __enter__(self) -> "Tunnel":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        self._end(sink)

    @staticmethod
    def _end(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
