"""The Flask front end: one thread for each request, which waits for its answer.

    python ray_tensorflow_flask.py --workers 2 --model half_plus_two=DIR
    curl '127.0.0.1:8080/?value=3'
    curl -d '{"instances": [1.0, 2.0, 5.0]}' 127.0.0.1:8080/v1/models/half_plus_two:predict

Or any WSGI server on ``ray_tensorflow_flask:app``: the cluster starts with the first request.
"""

import logging
import re
import signal
import threading
import urllib.parse

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import WSGIRequestHandler, make_server

from ray_tensorflow import (
    FRONT_END, MAX_BODY_BYTES, Cluster, Error, Options, Pending, Reply, answer, reply_error, start_logging, too_large)


def create_app(options: Options | None = None) -> Flask:
    """The WSGI application. Without ``options`` they are read from the environment when the cluster starts."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1  # a chunked body is cut there without a word
    starting = threading.Lock()
    clusters: list[Cluster] = []

    def start() -> Cluster:
        """The cluster of this process, started when first asked for: after any fork of the server's."""
        with starting:
            if not clusters:
                clusters.append(Cluster(options or Options.from_environment()))
                clusters[0].begin()
            return clusters[0]

    @app.before_request  # not a route: TensorFlow Serving's rules match the path before it is decoded, and any method
    def handle() -> Response:
        try:
            cluster, body = start(), request.get_data(cache=False)
            if len(body) > MAX_BODY_BYTES:
                raise too_large()
            reply = answer(cluster, request.method, raw_path(), request.query_string.decode("latin-1"),
                           request.headers.get("Content-Encoding", ""), body)
            if isinstance(reply, Pending):
                reply = reply.encode(cluster.run(reply.call))
        except Error as error:
            reply = reply_error(error)
        except RequestEntityTooLarge:
            reply = reply_error(too_large())
        return response(reply)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        return response(reply_error(Error(f"{error.name}: {request.method} {request.path[:100]}", error.code or 500)))

    app.start = start
    return app


def raw_path() -> str:
    """The path as it was sent, where the server tells; WSGI itself only has it percent-decoded."""
    target = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI")
    target = target or urllib.parse.quote(request.path, safe="/:!$&'()*+,;=@~")
    return re.sub("^https?://[^/?]*", "", target, flags=re.I).partition("?")[0]


def response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, reply.headers)


app = create_app()


def main() -> None:
    options = Options.from_command_line(__doc__.partition("\n")[0], FRONT_END)
    start_logging()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    WSGIRequestHandler.error_content_type = "application/json"  # of what is not even HTTP; by default HTML
    WSGIRequestHandler.error_message_format = '{"error": "This is not a request that HTTP allows here (%(code)d)"}'
    host, port = options.listen
    app = create_app(options)
    server = make_server(host, port, app, threaded=True, request_handler=WSGIRequestHandler)
    cluster = app.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    logging.getLogger("ray_tensorflow").info("listening on http://%s:%d", host, server.port)
    server.serve_forever()
    cluster.close()


if __name__ == "__main__":
    main()
