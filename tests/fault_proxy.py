"""An HTTP proxy on loopback that does to a share of the requests what networks and busy servers do."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ANSWERS = {
    status: f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>By the proxy.</Message></Error>".encode()
    for status, code in (("500", "InternalError"), ("501", "NotImplemented"), ("503", "SlowDown"))
}
# `500`, `503`, `reset`: the server never sees the request. `lost`: it does, and its answer never comes. `truncated`:
# half the body of its answer and no more; without a body, as `lost`. `slow`: all of it, late.
# Only where a test asks for it: `501`; `changed`, the last bit of the body is another.
FAULTS = ("500", "503", "slow", "reset", "lost", "truncated")


class FaultProxy:
    """Stands before the server at `target` while used as a context; `endpoint` is its own address.

    `share`: of the requests, or a function that says of each, by its number from 0, what happens. The faults are a
    function of `seed` and of the order in which requests come. `injected` counts them by kind, `sent`
    the bytes of bodies that went to the client.
    """

    def __init__(
        self,
        target: str,
        share: float | Callable[[int], str | None],
        faults: tuple[str, ...] = FAULTS,
        seed: int = 0,
        slow: float = 0.2,
        address: str = "127.0.0.1",
    ):
        self.target = urlsplit(target).netloc
        self.share, self.faults, self.slow = share, faults, slow
        self.requests, self.sent, self.injected = 0, 0, Counter[str]()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = _Server((address, 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://{address}:{self._server.server_port}"

    def draw(self) -> str | None:
        with self._lock:
            number = self.requests
            self.requests += 1
            fault = self.share(number) if callable(self.share) else self._draw(self.share)
            self.injected.update([fault] if fault else [])
            return fault

    def _draw(self, share: float) -> str | None:
        return self._random.choice(self.faults) if self._random.random() < share else None

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # the client keeps its connections
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request, client_address):
        """A client that gave up on a connection is no error of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def forward(self) -> None:
        proxy = self.server.proxy
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.draw()
        if fault in ANSWERS:
            return self.answer(int(fault), [], ANSWERS[fault])
        if fault == "reset":
            return self.reset()
        if fault == "slow":
            time.sleep(proxy.slow)
        connection = http.client.HTTPConnection(proxy.target, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        body, headers = response.read(), response.getheaders()
        connection.close()
        if fault == "lost" or (fault == "truncated" and not body):
            return self.reset()
        if fault == "changed":
            body = body[:-1] + bytes([body[-1] ^ 1])
        return self.answer(response.status, headers, body, cut=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of a HEAD, that of the body which is not sent
            elif name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        body = body[: len(body) // 2] if cut else body
        self.wfile.write(body)
        self.server.proxy.sent += len(body)
        self.close_connection = self.close_connection or cut
        return None

    def reset(self) -> None:
        """Closes so that the client gets a TCP reset instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
