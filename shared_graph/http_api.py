"""What both front ends answer, without a framework: paths, methods, values, origins, and the bytes of each answer."""

from __future__ import annotations

import base64
import functools
import hashlib
import http
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from shared_graph.adder import require_finite
from shared_graph.bodies import content_type
from shared_graph.errors import Error, InvalidRequest
from shared_graph.json_codec import json_text
from shared_graph.metrics import CONTENT_TYPE
from shared_graph.model_source import ADDER
from shared_graph.models import VersionChoice
from shared_graph.options import Options
from shared_graph.status import Status

log = logging.getLogger(__name__)

MODEL = r"/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?"
PATHS = {  # case-insensitive but for the verb; as sent, still percent-encoded
    "POST": re.compile(rf"(?i:/v1/models{MODEL}):(classify|regress|predict)", re.A),
    "GET": re.compile(rf"(?i:/v1/models(?:{MODEL}(/metadata)?)?)", re.A),
}
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]  # of which /v1/ knows only GET and POST
PAGES = {  # what is asked for, and the methods that may ask
    "/": ("add", "GET"),
    "/health": ("health", "GET, HEAD"),
    "/metrics": ("metrics", "GET, HEAD"),
    "/monitoring/prometheus/metrics": ("metrics", "GET, HEAD"),  # where TensorFlow Serving has them
    "/dashboard": ("dashboard", "GET, HEAD"),
}
SIMPLE_VALUE = re.compile(r"value=(-?\d{1,15})", re.A)  # what most queries are
VALUE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.A | re.I)
JSON = {"Content-Type": "application/json"}
DASHBOARD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dashboard.html")


class Call(NamedTuple):
    """What a request asks for."""

    model: str
    version: VersionChoice
    verb: str  # add, predict, classify, regress; or what ``tell`` answers


class Answer(NamedTuple):
    """What is sent back."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = JSON


# -- what is asked for -------------------------------------------------------------------------------------------------


def path_below(prefix: str, sent: str | None, path: str) -> str:
    """The path that the rules match: as it was ``sent``, still percent-encoded, without the prefix under which the
    server has put the application (SCRIPT_NAME, root_path). ``path`` is the decoded one without it."""
    if not sent:  # the server does not tell
        return urllib.parse.quote(path or "/", safe="/:!$&'()*+,;=@~")
    sent = sent.partition("?")[0]
    if not sent.startswith("/"):
        sent = re.sub(r"^\w+://[^/]*", "", sent)  # http://host/path, as proxies are asked
        sent = sent if sent.startswith("/") else f"/{sent}"
    prefix, parts = prefix.rstrip("/"), sent.split("/")
    count = 1 + prefix.count("/")
    return "/" + "/".join(parts[count:]) if urllib.parse.unquote("/".join(parts[:count])) == prefix else sent


def match_path(method: str, path: str, headers: Mapping[str, str] | None = None) -> Call:
    """What a method on a path asks for. Raises InvalidRequest."""
    if method == "OPTIONS" and headers and "Origin" in headers:  # a browser asks what a page may do
        return Call("", None, "options")
    if path in PAGES:
        verb, methods = PAGES[path]
        if method not in methods.split(", "):
            raise InvalidRequest(f"{path} answers {methods.replace(', ', ' and ')}, not {method[:100]}", 405)
        return Call(ADDER if verb == "add" else "", None, verb)
    if path[:4].lower() != "/v1/":
        places = "/, /health, /metrics, /dashboard or /v1/models/<name>"
        raise InvalidRequest(f"There is nothing at {path[:100]}: try {places}", 404)
    match = PATHS[method].fullmatch(path) if method in PATHS else None
    if not match:
        raise InvalidRequest(f"Malformed request: {method} {path[:1000]}")
    name, version, label, verb = match.groups()
    if name is None:
        raise InvalidRequest("Missing model name in request.")
    version = version and (version.lstrip("0") or "0")
    if version and (len(version) > 19 or int(version) >= 2**63):
        raise InvalidRequest(f"The version {version[:100]} is not a number of 64 bits")
    verb = verb if method == "POST" else "metadata" if verb else "status"
    return Call(urllib.parse.unquote(name), int(version) if version else label and urllib.parse.unquote(label), verb)


def parse_value(query: str, http_version: str = "1.1") -> float:
    """The number in ``?value=3``; 1 if there is none. Raises InvalidRequest unless it is one finite number."""
    if http_version.endswith("0.9"):
        raise InvalidRequest("HTTP 0.9 is not spoken here: a request that was cut short looks like it")
    if simple := SIMPLE_VALUE.fullmatch(query):
        return float(simple[1])
    try:
        values = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=100, errors="strict")
        [value] = values.get("value", ["1"])
    except ValueError:
        raise InvalidRequest("value must be given once, in a query string that can be parsed") from None
    if len(value) > 1000 or not VALUE.fullmatch(value):
        raise InvalidRequest(f"value must be one finite number, not {value[:100]!r}")
    return require_finite(float(value))


# -- what is answered --------------------------------------------------------------------------------------------------


def tell(status: Status, call: Call) -> Answer | None:
    """The answer to what asks for no work; None: a worker has to do it. Raises InvalidRequest, Unavailable."""
    if call.verb == "add":
        return None
    if call.verb == "options":
        return Answer(b"", 200, {})
    if call.verb == "health":
        health = status.health()
        return Answer(json_bytes(health), 200 if health["status"] == "ready" else 503)
    if call.verb == "metrics":
        return Answer(status.metrics.text(), 200, {"Content-Type": CONTENT_TYPE})
    if call.verb == "dashboard":
        page, headers = dashboard_page()
        return Answer(page, 200, headers)
    if call.verb == "status":
        return Answer(json_bytes(status.version_status(call.model, call.version)))
    if call.verb == "metadata":
        return Answer(json_bytes(status.metadata(call.model, call.version)))
    status.get_model(call.model, call.version)  # before its body is read
    return None


@functools.cache
def dashboard_page() -> tuple[bytes, dict[str, str]]:
    """Body and headers. Only the style and the script that stand in the file may be used: their hashes are told."""
    with open(DASHBOARD, "rb") as file:
        page = file.read()

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "style-src": hashes(b"style"),
        "script-src": hashes(b"script"),
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def json_bytes(document: Any) -> bytes:
    """For both front ends alike. A label may be the name of a link, with bytes in it that are no UTF-8."""
    try:
        return json_text(document)
    except TypeError:
        return json.dumps(document, separators=(",", ":")).encode()


def answer_with(result: Any) -> Answer:
    """A sum, or what a worker has written."""
    if isinstance(result, bytes):
        return Answer(result, 200, {"Content-Type": content_type(result)})
    return Answer(json_bytes({"result": result}))


def error_answer(error: Exception, code: int | None, status: Status | None, method: str, path: str) -> Answer:
    """Every error is JSON: ours, the framework's (with ``code``), and what nobody foresaw. ``status`` counts it, if
    there is one."""
    model, verb, headers = None, None, dict(JSON)
    if code:
        error = InvalidRequest(f"{http.HTTPStatus(code).phrase}: {method[:100]} {path[:100]}", code)
    try:
        model, _, verb = match_path(method, path)
    except InvalidRequest as refusal:
        error = refusal if code else error  # a method that the framework does not know, say
    error = own_error(error, status, model, verb)
    if error.status == 405 and path in PAGES:
        headers["Allow"] = PAGES[path][1]
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    return Answer(json_bytes({"error": str(error)}), error.status, headers)


def own_error(error: Exception, status: Status | None, model: str | None = None, verb: str | None = None) -> Error:
    """The error as ours; one that nobody foresaw is logged, and told without what is inside."""
    if not isinstance(error, Error):
        log.error("a request failed", exc_info=error)
        error = Error("Internal error")
    if status:
        status.metrics.count_error(error.status, model, verb)
    return error


# -- pages of other origins, in browsers -------------------------------------------------------------------------------


def headers_of(answer: Answer, options: Options | None, asked: Mapping[str, str]) -> dict[str, str]:
    """An answer's headers, with those that let a browser show it to a page of another origin. ``asked`` are the headers
    of the request."""
    if not options or not (allowed := options.allow_origin):
        return answer.headers
    headers = dict(answer.headers)
    origin, wanted = asked.get("Origin"), asked.get("Access-Control-Request-Headers")
    if "*" not in allowed:
        headers["Vary"] = "Origin"
    if origin is None or not ({"*", origin.lower()} & set(allowed)):
        return headers
    headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
    headers["Access-Control-Expose-Headers"] = "Retry-After"
    if asked.get("Access-Control-Request-Method") is None:
        return headers
    if wanted is not None and re.fullmatch(r"[\w, -]{0,1000}", wanted, re.A):
        headers["Access-Control-Allow-Headers"] = wanted
    headers["Access-Control-Allow-Methods"] = "GET, HEAD, POST"
    headers["Access-Control-Max-Age"] = "600"
    return headers


def may_open_socket(options: Options, origin: str | None, host: str | None) -> bool:
    """A browser opens a WebSocket for a page of any origin, and leaves it to the server to refuse."""
    if origin is None or {"*", origin.lower()} & set(options.allow_origin):
        return True
    return host is not None and origin.lower().partition("://")[2] == host.lower()
