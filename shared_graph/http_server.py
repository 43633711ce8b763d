"""The program that a front end is, and its server, uvicorn; how a WSGI application runs under it, in threads."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import socket
import sys
import time
import types
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared_graph.bodies import MAX_BODY_BYTES
from shared_graph.errors import Error
from shared_graph.logs import listen, start_program
from shared_graph.memory import keep_memory_low
from shared_graph.options import FRONT_END, Options, check_start
from shared_graph.threads import keep_task

THREADS = 128  # which wait for bodies and answers; requests beyond these wait for a thread, but not those for pages
CAME = "shared_graph.came"  # in a WSGI environment: when the request came, as time.monotonic() has it
OFFER = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    """uvicorn's, which loses the body of a request that offers to go on with another protocol, as Java's own client
    does with HTTP/2 in each (uvicorn#2722): such an offer is not taken anyhow, and not seen here."""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"POST "):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = OFFER.sub(b"", head) + end + rest
        super().data_received(data)


class Server(uvicorn.Server):
    """uvicorn's would leave all running at a second Ctrl-C. This one stops in order however often it is told to: it
    awaits ``finish(seconds)``, and then lets requests under way finish within their deadline."""

    def __init__(self, app: Callable, timeout_s: float, finish: Callable[[float], Awaitable[object]] | None = None):
        config = uvicorn.Config(app, http=Protocol, log_level="warning", access_log=False, proxy_headers=False)
        config.lifespan, config.ws_max_size, config.ws_per_message_deflate = "on", MAX_BODY_BYTES, False
        config.timeout_graceful_shutdown = math.ceil(timeout_s) + 1
        super().__init__(config)
        self._finish, self._tasks = finish, set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        keep_task(self._tasks, keep_memory_low())  # of 128 threads each has bodies in another of malloc's arenas
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in [*self.servers, *(sockets or [])]:
            listener.close()
        if self._finish:
            await self._finish(self.config.timeout_graceful_shutdown)
        await super().shutdown(sockets)


def run_front_end(document: str | None, make_server: Callable[[Options, Callable[[Error], None]], Server]) -> None:
    """Run a front end until it is told to end, or until nothing will be served any more, or at all: then its status
    is 1. ``make_server`` gets the options of the command line, and a function to call with such a failure."""
    options = Options.from_command_line((document or "").partition("\n")[0], FRONT_END)  # python -OO has none
    start_program()
    failures: list[Error] = []

    def fail(error: Error) -> None:
        failures.append(error)
        server.should_exit = True

    try:
        check_start(options)
        listener, server = listen(options.host, options.port), make_server(options, fail)
        server.run([listener])
    except Error as error:
        failures.append(error)
    if failures:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {failures[0]}")


class Threaded:
    """A WSGI application as an ASGI one. With the server it starts and stops: ``start`` is called with its loop, then
    ``stop``. What of a body has not come within ``timeout_s`` is an OSError where it is read."""

    def __init__(self, app: Callable, start: Callable, stop: Callable[[], object], timeout_s: float):
        self._app, self._start, self._stop, self._timeout_s = app, start, stop, timeout_s
        self._pool, self._pages = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(4)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self._start(asyncio.get_running_loop())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await asyncio.to_thread(self._stop)
            return await send({"type": "lifespan.shutdown.complete"})
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        loop, came = asyncio.get_running_loop(), time.monotonic()
        environ = environ_of(scope, Body(receive, loop, came + self._timeout_s)) | {CAME: came}
        is_page = scope["method"] != "POST" and scope["path"] != "/"  # such as health, which asks for no work
        pool = self._pages if is_page else self._pool
        status, headers, content = await loop.run_in_executor(pool, answer, self._app, environ)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def waited_s(environ: dict[str, Any]) -> float:
    """For how long a request has waited for its thread, as far as the server tells."""
    return time.monotonic() - environ[CAME] if CAME in environ else 0.0


class Body:
    """Of a request, as it arrives in ``loop``; with the one method of PEP 3333's that the Flask front end calls."""

    def __init__(self, receive: Callable, loop: asyncio.AbstractEventLoop, deadline: float):
        self._receive, self._loop, self._deadline = receive, loop, deadline
        self._part, self._has_more = b"", True

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at its end. Raises OSError when it does not arrive."""
        while not self._part and self._has_more:
            left_s = max(0.0, self._deadline - time.monotonic())
            event = asyncio.run_coroutine_threadsafe(self._receive(), self._loop).result(left_s)
            if event["type"] == "http.disconnect":
                raise ConnectionError("The client has gone")
            self._part, self._has_more = event.get("body", b""), event.get("more_body", False)
        part, self._part = self._part[:size], self._part[size:]
        return part


def environ_of(scope: dict[str, Any], body: Body) -> dict[str, Any]:
    """PEP 3333's of an ASGI scope; RAW_URI, as gunicorn calls it, is the path as it was sent. Of several headers of one
    name the first counts, as under Starlette, and one with an underscore is another than that with a hyphen."""
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": scope["path"].encode().decode("latin-1"),
        "RAW_URI": scope["raw_path"].decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": scope["server"][0],
        "SERVER_PORT": str(scope["server"][1]),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input": body,
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in scope["headers"]:
        key = name.decode("latin-1").upper().replace("_", " ").replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        environ.setdefault(key, value.decode("latin-1"))
    return environ


def answer(app: Callable, environ: dict[str, Any]) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body."""
    begun: list[tuple] = []
    with contextlib.closing(app(environ, lambda *status_and_headers: begun.append(status_and_headers))) as parts:
        content = b"".join(parts)
    status, headers = begun[-1][:2]
    return int(status[:3]), [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers], content
