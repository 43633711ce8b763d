"""Werkzeug's threaded server, made so that no client can keep others waiting by saying nothing."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

THREADS = 128  # which wait for answers; requests beyond these wait for a thread
HEAD_S = 2.0  # in which the head of a request has to arrive

_thread = threading.local()


def waited_s() -> float:
    """For how long the request of this thread has waited for it."""
    return getattr(_thread, "waited_s", 0.0)


class Handler(WSGIRequestHandler):
    """One request, after which its connection is closed."""

    error_content_type = "application/json"  # of what is hardly HTTP: no HTML there, either
    error_message_format = '{"error": "%(explain)s"}'

    def setup(self) -> None:
        self.timeout = self.server.patience_s  # of one read or write
        super().setup()

    def parse_request(self) -> bool:
        """Python's own takes a head that was cut short for a whole one, and that would be an add."""
        stream, self.rfile = self.rfile, HeadLines(self.rfile)
        try:
            is_request, last = super().parse_request(), self.rfile.last
        finally:
            self.rfile = stream
        self.server.head_has_come(self.connection)
        if is_request and last == b"":
            self.send_error(400, explain="The head of the request was cut short")
            return False
        return is_request


class HeadLines:
    """What the lines of a head are read from, and the last one of them."""

    def __init__(self, stream: BinaryIO):
        self.last, self._stream = None, stream

    def readline(self, limit: int = -1) -> bytes:
        self.last = self._stream.readline(limit)
        return self.last


class ThreadedServer(ThreadedWSGIServer):
    """A connection gets one of a bounded number of threads when something comes on it. It is read from for HEAD_S until
    its head is there, and for ``patience_s`` until its body is. In the end requests under way are finished."""

    def __init__(self, listener: socket.socket, app: Callable, patience_s: float):
        host, port = listener.getsockname()[:2]
        super().__init__(host, port, app, Handler, fd=listener.fileno())  # which makes a socket of its own of it
        listener.close()
        self.socket.setblocking(False)
        self.patience_s, self.is_stopping = patience_s, False
        self._ends: dict[socket.socket, float] = {}  # by when what is read has to have come
        self._heads: set[socket.socket] = set()  # connections without a request
        self.pool = ThreadPoolExecutor(THREADS)

    def serve_until_stopped(self) -> None:
        """Returns when all requests have their answers."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
        with selectors.DefaultSelector() as silent:
            silent.register(self.socket, selectors.EVENT_READ)
            looked = time.monotonic()
            while not self.is_stopping:
                for key, _ in silent.select(0.1):
                    if key.fileobj is self.socket:
                        self._accept(silent)
                    else:
                        silent.unregister(key.fileobj)
                        self.pool.submit(self._answer, key.fileobj, key.data, time.monotonic())
                if time.monotonic() - looked > 0.1:
                    looked = time.monotonic()
                    self._cut([connection for connection, end in list(self._ends.items()) if end < looked])
            silent.unregister(self.socket)
            self.server_close()
            for key in list(silent.get_map().values()):
                self.shutdown_request(key.fileobj)
        self._cut(list(self._heads))
        self.pool.shutdown()

    def stop(self) -> None:
        """Safe in a signal's handler, and in any thread."""
        self.is_stopping = True

    def _accept(self, silent: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            connection, address = self.get_request()
            self._ends[connection] = time.monotonic() + HEAD_S
            self._heads.add(connection)
            silent.register(connection, selectors.EVENT_READ, address)

    def _answer(self, connection: socket.socket, address: Any, came: float) -> None:
        _thread.waited_s = time.monotonic() - came
        self.process_request_thread(connection, address)

    def head_has_come(self, connection: socket.socket) -> None:
        self._heads.discard(connection)
        self._ends[connection] = time.monotonic() + self.patience_s

    def _cut(self, connections: list[socket.socket]) -> None:
        """Read no more from them; answers can still be sent."""
        for connection in connections:
            self._ends.pop(connection, None)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def shutdown_request(self, request: socket.socket) -> None:
        self._ends.pop(request, None)
        self._heads.discard(request)
        super().shutdown_request(request)
