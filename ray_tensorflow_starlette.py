"""The Starlette front end: one event loop, in which all requests wait for their answers.

    python ray_tensorflow_starlette.py --workers 2 --model half_plus_two=DIR

Or any ASGI server on ``ray_tensorflow_starlette:app``: the cluster starts and ends with the application's lifespan.
Below another application nobody runs that, unless it is handed on, and the cluster starts with the first request:

    Starlette(routes=[Mount("/tf", app)], lifespan=app.router.lifespan_context)
"""

import asyncio
import contextlib
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from shared_graph import http_api
from shared_graph.bodies import HttpBody
from shared_graph.cluster import Cluster
from shared_graph.errors import Error, InvalidRequest
from shared_graph.http_server import Server, run_front_end
from shared_graph.options import Options
from shared_graph.web_socket import WebSockets


def create_app(options: Options | None = None, on_failure: Callable[[Error], object] = lambda error: None) -> Starlette:
    """The ASGI application. Without ``options`` they are read from the environment when the cluster starts;
    ``on_failure`` is called when nothing will be served any more."""
    cluster: Cluster | None = None

    def start(home: asyncio.AbstractEventLoop | None = None) -> Cluster:
        """Start the cluster, unless it is there."""
        nonlocal cluster
        if cluster is None:
            cluster = Cluster(options or Options.from_environment()).start_in_background(home, on_failure)
        return cluster

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        nonlocal cluster
        cluster = None  # should there have been a lifespan before, as in tests of an application
        start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(cluster.close)

    async def serve(request: Request) -> Response:
        try:
            start()
            return respond(request, await answer(request))
        except Exception as error:
            return await refuse(request, error)

    async def answer(request: Request) -> http_api.Answer:
        query = request.scope["query_string"].decode("latin-1")
        call = http_api.match_path(request.method, sent_path(request), request.headers)
        if answer := http_api.tell(cluster.status, call):
            return answer
        if call.verb == "add":
            value = http_api.parse_value(query, request.scope["http_version"])
            return http_api.answer_with(await cluster.add_async(value))
        is_gzip = "gzip" in request.headers.get("Content-Encoding", "").lower()
        body = HttpBody(await read_body(request), is_gzip, query)
        return http_api.answer_with(await cluster.request_async(call.model, call.verb, body, call.version))

    async def read_body(request: Request) -> bytes:
        parts = []
        with cluster.status.batcher.pending.arriving() as hold:
            try:
                async with asyncio.timeout(cluster.options.timeout_s):
                    async for part in request.stream():
                        hold(part)
                        parts.append(part)
            except (TimeoutError, ClientDisconnect):
                raise InvalidRequest("The body did not arrive within the deadline", 408) from None
        return b"".join(parts)

    def sent_path(request: Request) -> str:
        prefix = request.scope.get("root_path", "")
        sent = (request.scope.get("raw_path") or b"").decode("latin-1")  # the path itself has it decoded alone
        return http_api.path_below(prefix, sent, request.scope["path"].removeprefix(prefix))

    def respond(request: Request, answer: http_api.Answer) -> Response:
        headers = http_api.headers_of(answer, cluster and cluster.options, request.headers)
        return Response(answer.body, answer.status, headers)

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else None
        answer = http_api.error_answer(error, status, cluster and cluster.status, request.method, sent_path(request))
        return respond(request, answer)

    sockets = WebSockets(start)
    routes = [WebSocketRoute("/ws", sockets.serve), Route("/{path:path}", serve, methods=http_api.METHODS)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse}, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.sockets = sockets
    return app


app = create_app()


def make_server(options: Options, on_failure: Callable[[Error], object]) -> Server:
    app = create_app(options, on_failure)
    return Server(app, options.timeout_s, app.state.sockets.finish)


if __name__ == "__main__":
    run_front_end(__doc__, make_server)
