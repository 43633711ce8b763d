"""The Starlette front end: one event loop, in which all requests wait for their answers.

    python ray_tensorflow_starlette.py --workers 2 --model half_plus_two=DIR

Or any ASGI server on ``ray_tensorflow_starlette:app``: the cluster starts and ends with the application's lifespan.
"""

import asyncio
import contextlib
import json
import math

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from shared_graph.bodies import MAX_BODY_BYTES, HttpBody, content_type
from shared_graph.cluster import Cluster
from shared_graph.errors import Error, InvalidRequest
from shared_graph.http_api import METHODS, match_path, parse_value
from shared_graph.json_codec import parse_json
from shared_graph.logs import start_program
from shared_graph.options import FRONT_END, Options


def create_app(options: Options | None = None) -> Starlette:
    """The ASGI application. Without ``options`` they are read from the environment when the cluster starts."""
    cluster: Cluster | None = None

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        nonlocal cluster
        cluster = Cluster(options or Options.from_environment()).start_in_background(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(cluster.close)

    async def add(request: Request) -> Response:
        value = parse_value(request.scope["query_string"].decode("latin-1"), request.scope["http_version"])
        return JSONResponse({"result": await cluster.add_async(value)})

    async def health(request: Request) -> Response:
        health = cluster.health()
        return JSONResponse(health, 200 if health["status"] == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(cluster.status.metrics(), media_type="text/plain; version=0.0.4")

    async def rest(request: Request) -> Response:
        name, version, verb = match_path(request.method, request.scope["raw_path"].decode("latin-1"))
        if request.method == "GET":
            return JSONResponse(
                getattr(cluster.status, "metadata" if verb == "metadata" else "version_status")(name, version)
            )
        cluster.status.get_model(name, version)
        body = bytearray()
        async with asyncio.timeout(cluster.options.timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)
        is_gzip = "gzip" in request.headers.get("Content-Encoding", "")
        answer = await cluster.request_async(
            name, verb, HttpBody(bytes(body), is_gzip, request.scope["query_string"].decode("latin-1")), version
        )
        return Response(answer, media_type=content_type(answer))

    async def push(socket: WebSocket) -> None:
        """Many requests at once on one WebSocket, each answered with its id as soon as it is done."""
        places = asyncio.Semaphore(cluster.options.max_queue)

        async def serve(message: bytes) -> None:
            identity = None
            try:
                document = parse_json(message)
                identity, model = document.get("id"), document.get("model")
                if model is None:
                    text = json.dumps({"result": await cluster.add_async(document.get("value"))})
                else:
                    text = (await cluster.request_async(str(model), "predict", HttpBody(message))).decode(
                        errors="replace"
                    )
            except Error as error:
                text = json.dumps(cluster.status.error_response(error)[0])
            await socket.send_text(f'{{"id": {json.dumps(identity)}, {text[1:]}')
            places.release()

        await socket.accept()
        try:
            async with asyncio.TaskGroup() as requests:  # a client that goes away takes all of its requests along
                while True:
                    await places.acquire()  # one that does not read its answers is not read from either
                    event = await socket.receive()
                    if event["type"] == "websocket.disconnect":
                        raise WebSocketDisconnect
                    requests.create_task(serve(event.get("bytes") or event["text"].encode("utf-8", "surrogatepass")))
        except* (WebSocketDisconnect, WebSocketDisconnected):  # the second one: answers behind the first that failed
            pass

    async def refuse(request: Request, error: Exception) -> Response:
        """Every error is JSON: ours, the framework's, and what nobody foresaw."""
        if isinstance(error, HTTPException):
            error = Error(f"{error.detail}: {request.method} {request.url.path[:100]}", error.status_code)
        elif isinstance(error, (TimeoutError, ClientDisconnect)):
            error = InvalidRequest("The body did not arrive within the deadline", 408)
        return JSONResponse(*cluster.status.error_response(error))

    routes = [
        Route("/", add),
        Route("/health", health),
        Route("/metrics", metrics),
        WebSocketRoute("/ws", push),
        Route("/{path:path}", rest, methods=METHODS),
    ]  # TensorFlow Serving's rules match the path as it was sent
    handlers = dict.fromkeys((Error, HTTPException, TimeoutError, ClientDisconnect, Exception), refuse)
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


app = create_app()


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_program(options)
    uvicorn.run(
        create_app(options),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(options.timeout_s) + 1,
    )


if __name__ == "__main__":
    main()
