"""The Flask front end: a thread for each request, which waits for its answer.

    python ray_tensorflow_flask.py --workers 2 --model half_plus_two=DIR

Or any WSGI server on ``ray_tensorflow_flask:app``: the cluster starts with the first request.
"""

import concurrent.futures
import logging
import math
import signal
import threading
import time
import urllib.parse

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from shared_graph.bodies import MAX_BODY_BYTES, HttpBody, content_type
from shared_graph.cluster import Cluster
from shared_graph.errors import Error, InvalidRequest, Unavailable
from shared_graph.http_api import METHODS, match_path, parse_value
from shared_graph.logs import start_program
from shared_graph.options import FRONT_END, Options

THREADS = 128  # which wait for answers; connections beyond these wait for a thread
accepted = threading.local()  # when this thread's connection was


def create_app(options: Options | None = None) -> Flask:
    """The WSGI application. Without ``options`` they are read from the environment when the cluster starts."""
    cluster, starting = None, threading.Lock()
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1  # a chunked body is cut there without a word
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False

    @app.before_request
    def start() -> None:
        """Start the cluster of this process when it is first asked for: after any fork of the server's."""
        nonlocal cluster
        with starting:
            cluster = cluster or Cluster(options or Options.from_environment()).start_in_background()
        if time.monotonic() - getattr(accepted, "at", math.inf) > cluster.options.timeout_s:
            raise Unavailable("Too many connections are waiting already; try again later.")

    @app.get("/")
    def add() -> dict:
        query, http_version = request.query_string.decode("latin-1"), request.environ["SERVER_PROTOCOL"]
        return {"result": cluster.add(parse_value(query, http_version))}

    @app.get("/health")
    def health() -> tuple[dict, int]:
        health = cluster.health()
        return health, 200 if health["status"] == "ready" else 503

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(cluster.status.metrics(), mimetype="text/plain; version=0.0.4")

    @app.route("/<path:path>", methods=METHODS)  # TensorFlow Serving's rules match the path as it was sent
    def rest(path: str) -> Response | dict:
        sent = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI")  # WSGI itself has it decoded alone
        sent = sent or urllib.parse.quote(request.path, safe="/:!$&'()*+,;=@~")
        sent = sent if sent.startswith("/") else "/" + sent.split("/", 3)[-1]  # http://host/path, as proxies are asked
        name, version, verb = match_path(request.method, sent.partition("?")[0])
        if request.method == "GET":
            return getattr(cluster.status, "metadata" if verb == "metadata" else "version_status")(name, version)
        cluster.status.get_model(name, version)
        body = request.get_data(cache=False)
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)
        is_gzip = "gzip" in request.headers.get("Content-Encoding", "")
        query = request.query_string.decode("latin-1")
        answer = cluster.request(name, verb, HttpBody(body, is_gzip, query), version)
        return Response(answer, mimetype=content_type(answer))

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> tuple[dict, int, dict]:
        """Every error is JSON: ours, the framework's, and what nobody foresaw."""
        if isinstance(error, HTTPException):
            error = Error(f"{error.name}: {request.method} {request.path[:100]}", error.code or 500)
        return cluster.status.error_response(error)

    app.start = start
    return app


app = create_app()


class Server(ThreadedWSGIServer):
    """Werkzeug's threaded server, with a bounded number of threads; in the end those that are busy are waited for."""

    request_queue_size = 2048  # clients that wait to be let in
    threads = concurrent.futures.ThreadPoolExecutor(THREADS)

    def process_request(self, connection, address) -> None:
        self.threads.submit(self.process_in_thread, connection, address, time.monotonic())

    def process_in_thread(self, connection, address, now: float) -> None:
        accepted.at = now
        self.process_request_thread(connection, address)


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_program(options)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    WSGIRequestHandler.timeout = options.timeout_s  # of a client that stops in the middle
    WSGIRequestHandler.error_content_type = "application/json"  # of what is hardly HTTP: no HTML there, either
    WSGIRequestHandler.error_message_format = '{"error": "%(explain)s"}'
    app = create_app(options)
    server = Server(options.host, options.port, app)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    app.start()
    server.serve_forever(poll_interval=0.1)
    server.threads.shutdown()


if __name__ == "__main__":
    main()
