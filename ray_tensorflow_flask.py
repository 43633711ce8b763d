"""The Flask front end: a thread for each request, which waits for its answer.

    python ray_tensorflow_flask.py --workers 2 --model half_plus_two=DIR

Or any WSGI server with threads on ``ray_tensorflow_flask:app``: the cluster starts with the first request.
"""

import asyncio
import threading
from collections.abc import Callable

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from shared_graph import http_api
from shared_graph.bodies import HttpBody
from shared_graph.cluster import Cluster
from shared_graph.errors import Error, InvalidRequest, Unavailable
from shared_graph.http_server import Server, Threaded, run_front_end, waited_s
from shared_graph.options import Options
from shared_graph.threads import check_threads

PART_BYTES = 2**16  # of a body, as it arrives


def create_app(options: Options | None = None, on_failure: Callable[[Error], object] = lambda error: None) -> Flask:
    """The WSGI application. Without ``options`` they are read from the environment when the cluster starts;
    ``on_failure`` is called when nothing will be served any more."""
    check_threads()
    cluster, starting = None, threading.Lock()
    app = Flask(__name__, static_folder=None)
    app.config |= {"PROVIDE_AUTOMATIC_OPTIONS": False, "SERVER_NAME": "localhost"}  # else not every Host is taken
    app.url_map.merge_slashes = app.url_map.strict_slashes = False  # neither of which is to redirect

    def start(home: asyncio.AbstractEventLoop | None = None) -> None:
        """Start the cluster of this process when it is first asked for: after any fork of the server's."""
        nonlocal cluster
        with starting:
            if cluster is None:
                cluster = Cluster(options or Options.from_environment()).start_in_background(home, on_failure)

    def stop() -> None:
        if cluster:
            cluster.close()

    @app.route("/", methods=http_api.METHODS)
    @app.route("/<path:path>", methods=http_api.METHODS)
    def serve(path: str = "") -> Response:
        start()
        query = request.query_string.decode("latin-1")
        call = http_api.match_path(request.method, sent_path(), request.headers)
        if waited_s(request.environ) > cluster.options.timeout_s:
            raise Unavailable("Too many connections are waiting already; try again later.")
        if answer := http_api.tell(cluster.status, call):
            return respond(answer)
        if call.verb == "add":
            value = http_api.parse_value(query, request.environ["SERVER_PROTOCOL"])
            return respond(http_api.answer_with(cluster.add(value)))
        is_gzip = "gzip" in request.headers.get("Content-Encoding", "").lower()
        body = HttpBody(read_body(), is_gzip, query)
        return respond(http_api.answer_with(cluster.request(call.model, call.verb, body, call.version)))

    def read_body() -> bytes:
        parts = []
        with cluster.status.batcher.pending.arriving() as hold:
            try:
                while part := request.stream.read(PART_BYTES):
                    hold(part)
                    parts.append(part)
            except (HTTPException, OSError):
                raise InvalidRequest("The body did not arrive within the deadline", 408) from None
        return b"".join(parts)

    def sent_path() -> str:
        sent = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI")  # WSGI itself has it decoded alone
        return http_api.path_below(request.root_path, sent, request.path)

    def respond(answer: http_api.Answer) -> Response:
        response = Response(answer.body, answer.status)
        response.headers.clear()
        response.headers.update(http_api.headers_of(answer, cluster and cluster.options, request.headers))
        return response

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> Response:
        status = error.code if isinstance(error, HTTPException) else None
        return respond(http_api.error_answer(error, status, cluster and cluster.status, request.method, sent_path()))

    app.start, app.stop = start, stop
    return app


app = create_app()


def make_server(options: Options, on_failure: Callable[[Error], object]) -> Server:
    app = create_app(options, on_failure)
    return Server(Threaded(app, app.start, app.stop, options.timeout_s), options.timeout_s)


if __name__ == "__main__":
    run_front_end(__doc__, make_server)
