"""The Starlette front end: one event loop, in which all requests wait for their answers.

    python ray_tensorflow_starlette.py --workers 2 --model half_plus_two=DIR
    curl '127.0.0.1:8080/?value=3'
    curl -d '{"instances": [1.0, 2.0, 5.0]}' 127.0.0.1:8080/v1/models/half_plus_two:predict

Or any ASGI server on ``ray_tensorflow_starlette:app``: the cluster starts and ends with the application's lifespan.
"""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ray_tensorflow import (
    FRONT_END, MAX_BODY_BYTES, Cluster, Error, InvalidRequest, Metrics, Options, Pending, Reply, Unavailable, allow_connections,
    answer, answer_message, reply_error, start_logging, too_large, with_id)

log = logging.getLogger("ray_tensorflow")
LARGE_BYTES = 2**16  # JSON from here on is read and written in a thread, since the loop would stand still meanwhile


def create_app(options: Options | None = None) -> Starlette:
    """The ASGI application. Without ``options`` they are read from the environment when the cluster starts."""
    metrics = Metrics()
    waiting: dict[Request, asyncio.Task] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        app.state.cluster = cluster = Cluster(options or Options.from_environment())
        cluster.begin(one_of_many=options is None)
        gc.freeze()  # what has been imported stays: no need to look through it for garbage every few hundred requests
        gc.set_threshold(20_000, 20, 20)
        sweeper = asyncio.create_task(give_up_on_the_gone(waiting))
        yield
        sweeper.cancel()
        await asyncio.to_thread(cluster.close)

    async def handle(request: Request) -> Response:
        started, cluster = time.monotonic(), request.app.state.cluster
        path, query = (request.scope[part].decode("latin-1") for part in ("raw_path", "query_string"))  # as they were sent
        try:
            if request.scope["http_version"] == "0.9":  # a request cut short may look like it: "GET /" would be an add
                raise InvalidRequest("HTTP 0.9 is not spoken here")
            body = await read_body(request, cluster.options.timeout_s) if has_body(request) else b""
            encoding = request.headers.get("Content-Encoding", "") if body else ""
            reply = await off_loop(len(body), answer, cluster, metrics, request.method, path, query, encoding, body)
            waiting[request] = asyncio.current_task()
            reply = await finish(cluster, reply)
        except Error as error:
            reply = reply_error(error)
        except (ClientDisconnect, asyncio.CancelledError):
            gone = await request.is_disconnected()
            reply = reply_error(Unavailable("The client went away.", 499) if gone else Unavailable("The server is shutting down."))
        except Exception:
            log.exception("a request failed")
            reply = reply_error(Error("Internal error"))
        finally:
            waiting.pop(request, None)
        metrics.observe(cluster, path, reply.status, time.monotonic() - started)
        return response(reply)

    async def push(socket: WebSocket) -> None:
        """Many requests at once on one WebSocket, each answered with its id as soon as it is done."""
        cluster = socket.app.state.cluster
        places, sending = asyncio.Semaphore(cluster.options.max_queue), asyncio.Lock()

        async def serve(message: str | bytes) -> None:
            started = time.monotonic()
            identity, reply = await off_loop(len(message), answer_message, cluster, message)
            try:
                reply = await finish(cluster, reply)
            except Error as error:
                reply = reply_error(error)
            metrics.observe(cluster, "/ws", reply.status, time.monotonic() - started)
            async with sending:
                await socket.send_text(with_id(identity, reply))
            places.release()

        await socket.accept()
        try:
            async with asyncio.TaskGroup() as requests:  # a client that goes away takes all of its requests along
                while True:
                    await places.acquire()  # one that does not read its answers is not read from either
                    event = await socket.receive()
                    if event["type"] == "websocket.disconnect":
                        raise WebSocketDisconnect
                    requests.create_task(serve(event.get("text") or event.get("bytes") or ""))
        except* (WebSocketDisconnect, WebSocketDisconnected):
            pass

    async def default(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await (await handle(Request(scope, receive, send)))(scope, receive, send)
        else:
            nothing = InvalidRequest(f"There is no WebSocket at {scope['path'][:100]}: try /ws", 404)
            await WebSocket(scope, receive, send).send_denial_response(response(reply_error(nothing)))

    app = Application(routes=[WebSocketRoute("/ws", push)], lifespan=lifespan)
    # not a route: TensorFlow Serving's rules match the path before it is decoded, and any method
    app.router.default = default
    return app


class Application(Starlette):
    """Starlette's, but without the two layers around each request and answer that turn exceptions into responses: here none is left."""

    def build_middleware_stack(self) -> ASGIApp:
        stack = self.router
        for kind, arguments, named in reversed(self.user_middleware):
            stack = kind(stack, *arguments, **named)
        return stack


async def give_up_on_the_gone(waiting: dict[Request, asyncio.Task]) -> None:
    """Each second, cancel the requests that have waited for one and whose client has gone away."""
    before: set[Request] = set()
    while True:
        await asyncio.sleep(1)
        for request in before & waiting.keys():
            if await request.is_disconnected() and request in waiting:
                waiting[request].cancel()
        before = set(waiting)


def has_body(request: Request) -> bool:
    return any(name == b"transfer-encoding" or name == b"content-length" and value != b"0" for name, value in request.scope["headers"])


async def read_body(request: Request, timeout_s: float) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise too_large()
    except TimeoutError:
        raise InvalidRequest(f"The body did not arrive within the deadline of {timeout_s:g} s", 408) from None
    return b"".join(parts)


async def off_loop(size_bytes: int, function, *arguments):
    return await asyncio.to_thread(function, *arguments) if size_bytes > LARGE_BYTES else function(*arguments)


async def finish(cluster: Cluster, reply: Reply | Pending) -> Reply:
    """The reply, once the cluster has done what there is to do for it."""
    if isinstance(reply, Reply):
        return reply
    outputs = await cluster.run_async(reply.call)
    return await off_loop(sum(output.nbytes for output in outputs), reply.encode, outputs)


def response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, reply.headers)


app = create_app()


class Protocol(AutoHTTPProtocol):
    """uvicorn's, but what is not even HTTP is refused in JSON as well, and each request learns that its client went away."""

    def send_400_response(self, msg: str) -> None:
        body = reply_error(Error(msg)).body
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
        self.transport.close()

    def _start_asgi_task(self, cycle, app) -> None:
        self.answering = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        if answering := getattr(self, "answering", None):  # uvicorn tells only the last of pipelined requests
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn's, but a signal is a wish to end well, however often it comes, and not a failure."""

    def handle_exit(self, *_) -> None:
        self.should_exit = True


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_logging()
    allow_connections()
    host, port = options.listen
    log.info("listening on http://%s:%d", host, port)
    server = Server(uvicorn.Config(
        create_app(options), host=host, port=port, http=Protocol, lifespan="on", log_level="warning", access_log=False, proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(options.timeout_s) + 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn does so itself, but only between its start and its end
    server.run()


if __name__ == "__main__":
    main()
