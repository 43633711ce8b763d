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

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute, request_response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketClose, WebSocketDisconnect, WebSocketDisconnected

from ray_tensorflow import (
    FRONT_END, MAX_BODY_BYTES, Cluster, Error, Options, Pending, Reply, answer, answer_message, reply_error,
    start_logging, too_large, with_id)

LARGE_BYTES = 2**16  # JSON from here on is read and written in a thread, since the loop would stand still meanwhile


def create_app(options: Options | None = None) -> Starlette:
    """The ASGI application. Without ``options`` they are read from the environment when the cluster starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        app.state.cluster = cluster = Cluster(options or Options.from_environment())
        cluster.begin()
        gc.freeze()  # what has been imported stays: no need to look through it for garbage every few hundred requests
        gc.set_threshold(20_000, 20, 20)
        yield
        await asyncio.to_thread(cluster.close)

    async def handle(request: Request) -> Response:
        cluster = request.app.state.cluster
        try:
            body = await read_body(request)
            path, query = (request.scope[part].decode("latin-1") for part in ("raw_path", "query_string"))  # as they were sent
            encoding = request.headers.get("Content-Encoding", "")
            reply = await off_loop(len(body), answer, cluster, request.method, path, query, encoding, body)
        except Error as error:
            reply = reply_error(error)
        return response(await finish(cluster, reply))

    async def push(socket: WebSocket) -> None:
        """Many requests at once on one WebSocket, each answered with its id as soon as it is done."""
        cluster = socket.app.state.cluster
        places, sending = asyncio.Semaphore(cluster.options.max_queue), asyncio.Lock()

        async def serve(message: str | bytes) -> None:
            identity, reply = await off_loop(len(message), answer_message, cluster, message)
            reply = await finish(cluster, reply)
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

    async def http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        what = error.detail if isinstance(error, HTTPException) else "Internal error"
        return response(reply_error(Error(f"{what}: {request.method} {request.url.path[:100]}", status)))

    http = request_response(handle)

    async def default(scope: Scope, receive: Receive, send: Send) -> None:
        await (http if scope["type"] == "http" else WebSocketClose())(scope, receive, send)

    app = Starlette(
        routes=[WebSocketRoute("/ws", push)], lifespan=lifespan, exception_handlers={HTTPException: http_error, Exception: http_error})
    # not a route: TensorFlow Serving's rules match the path before it is decoded, and any method
    app.router.default = default
    return app


async def read_body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large()
    return b"".join(parts)


async def off_loop(size_bytes: int, function, *arguments):
    return await asyncio.to_thread(function, *arguments) if size_bytes > LARGE_BYTES else function(*arguments)


async def finish(cluster: Cluster, reply: Reply | Pending) -> Reply:
    """The reply, once the cluster has done what there is to do for it."""
    if isinstance(reply, Reply):
        return reply
    try:
        outputs = await cluster.run_async(reply.call)
        return await off_loop(sum(output.nbytes for output in outputs), reply.encode, outputs)
    except Error as error:
        return reply_error(error)


def response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, reply.headers)


app = create_app()


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_logging()
    host, port = options.listen
    logging.getLogger("ray_tensorflow").info("listening on http://%s:%d", host, port)
    uvicorn.run(create_app(options), host=host, port=port, log_level="warning", access_log=False, lifespan="on")


if __name__ == "__main__":
    main()
