"""The Flask front end: a thread for each request, which waits for its answer.

    python ray_tensorflow_flask.py --workers 2 --model half_plus_two=DIR
    curl '127.0.0.1:8080/?value=3'
    curl -d '{"instances": [1.0, 2.0, 5.0]}' 127.0.0.1:8080/v1/models/half_plus_two:predict

Or any WSGI server on ``ray_tensorflow_flask:app``: the cluster starts with the first request.
"""

import contextlib
import logging
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from ray_tensorflow import (
    FRONT_END, MAX_BODY_BYTES, Cluster, Error, Metrics, Options, Pending, Reply, allow_connections, answer, reply_error,
    start_logging, too_large)


def create_app(options: Options | None = None) -> Flask:
    """The WSGI application. Without ``options`` they are read from the environment when the cluster starts."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1  # a chunked body is cut there without a word
    starting, metrics = threading.Lock(), Metrics()
    clusters: list[Cluster] = []

    def start() -> Cluster:
        """The cluster of this process, started when first asked for: after any fork of the server's."""
        with starting:
            if not clusters:
                clusters.append(Cluster(options or Options.from_environment()))
                clusters[0].begin(one_of_many=options is None)
            return clusters[0]

    @app.before_request  # not a route: TensorFlow Serving's rules match the path before it is decoded, and any method
    def handle() -> Response:
        g.started = time.monotonic()
        cluster, body = start(), request.get_data(cache=False)
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
        reply = answer(cluster, metrics, request.environ["REQUEST_METHOD"], raw_path(), request.query_string.decode("latin-1"),
                       request.headers.get("Content-Encoding", ""), body)
        if isinstance(reply, Pending):
            reply = reply.encode(cluster.run(reply.call, client_gone(request.environ)))
        return response(reply)

    @app.errorhandler(Error)
    def error(error: Error) -> Response:
        return response(reply_error(error))

    @app.errorhandler(RequestEntityTooLarge)
    def body_too_large(_) -> Response:
        return response(reply_error(too_large()))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        return response(reply_error(Error(f"{error.name}: {request.method} {request.path[:100]}", error.code or 500)))

    @app.after_request
    def count(answered: Response) -> Response:
        for cluster in clusters:
            metrics.observe(cluster, raw_path(), answered.status_code, time.monotonic() - g.started)
        return answered

    app.start = start
    return app


def raw_path() -> str:
    """The path as it was sent, where the server tells; WSGI itself only has it percent-decoded."""
    target = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI")
    target = target or urllib.parse.quote(request.path, safe="/:!$&'()*+,;=@~")
    return re.sub("^https?://[^/?]*", "", target, flags=re.I).partition("?")[0]


def client_gone(environ: dict) -> Callable[[], bool] | None:
    """Asks whether the client has closed its connection, where the server tells which one that is."""
    connection = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")
    if connection is None:
        return None

    def gone() -> bool:
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    return gone


def response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, reply.headers)


app = create_app()


WAKES_PER_S = 10_000  # of all threads that wait for Python's lock: each looks once an interval, and thousands do little else


class Server(ThreadedWSGIServer):
    """Werkzeug's threaded server, but threads that are done wait for more work, since starting one takes as long as a request;
    and in the end the requests that are under way are answered."""

    request_queue_size = 2048  # clients that wait to be let in

    def __init__(self, host: str, port: int, app: Flask):
        self.busy: set[RequestThread] = set()
        self.idle: list[RequestThread] = []  # the last one is the next to work
        self.draining = False
        super().__init__(host, port, app, RequestHandler)

    def process_request(self, connection: socket.socket, client_address) -> None:
        try:
            thread = self.idle.pop()
        except IndexError:
            thread = RequestThread(self)
            thread.start()
        thread.connection = connection
        self.busy.add(thread)
        sys.setswitchinterval(max(0.005, len(self.busy) / WAKES_PER_S))
        thread.inbox.put((connection, client_address))

    def drain(self, seconds: float) -> None:
        """Wait until all requests are answered, so long at most; who has not asked for anything is not waited for."""
        self.draining = True
        end, busy = time.monotonic() + seconds, list(self.busy)
        for thread in busy:
            if connection := thread.connection:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # what has arrived is still read
        for thread in busy:
            thread.join(max(0, end - time.monotonic()))


class RequestThread(threading.Thread):
    """Handles one connection after another, until there is none for a while."""

    IDLE_S = 5.0

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.server, self.inbox = server, queue.SimpleQueue()
        self.connection: socket.socket | None = None  # on which no request has come yet

    def run(self) -> None:
        while not (self.server.draining and self not in self.server.busy):
            try:
                connection, client_address = self.inbox.get(timeout=self.IDLE_S)
            except queue.Empty:
                try:
                    self.server.idle.remove(self)
                    return
                except ValueError:  # a connection is on its way to this very thread
                    continue
            self.server.process_request_thread(connection, client_address)
            self.server.busy.discard(self)
            self.server.idle.append(self)


class RequestHandler(WSGIRequestHandler):
    """Werkzeug's, but what is not even HTTP is refused in JSON as well."""

    error_content_type = "application/json"
    error_message_format = '{"error": "This is not a request that HTTP allows here (%(code)d)"}'
    default_request_version = "HTTP/1.0"  # in which it is refused: 0.9 has no status

    def parse_request(self) -> bool:
        line = self.raw_requestline.decode("latin-1")
        try:
            _, target, _ = line.split()  # two may be HTTP 0.9, or cut short: "GET /" would be an add
            urllib.parse.urlsplit(target)  # as Werkzeug will
        except ValueError:
            self.raw_requestline = b"-"  # which is refused
        return super().parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        super().send_error(code if code < 500 else 400, message, explain)  # 505: a wrong version is the client's error, too

    def run_wsgi(self) -> None:
        threading.current_thread().connection = None
        super().run_wsgi()


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_logging()
    allow_connections()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    host, port = options.listen
    app = create_app(options)
    RequestHandler.timeout = options.timeout_s  # of a client that stops in the middle
    server = Server(host, port, app)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    cluster = app.start()
    logging.getLogger("ray_tensorflow").info("listening on http://%s:%d", host, server.port)
    server.serve_forever(poll_interval=0.1)
    server.drain(options.timeout_s + 1)
    cluster.close()


if __name__ == "__main__":
    main()
