"""What both front ends answer, without a framework: paths, methods and values."""

from __future__ import annotations

import re
import urllib.parse

from shared_graph.adder import require_finite
from shared_graph.errors import InvalidRequest
from shared_graph.models import VersionChoice

PATHS = {  # case-insensitive but for the method's name; as sent, still percent-encoded
    "POST": re.compile(
        r"(?i:/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?):(classify|regress|predict)", re.A
    ),
    "GET": re.compile(r"(?i:/v1/models(?:/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(/metadata)?)?)", re.A),
}
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]  # all but two of which are malformed


def match_path(method: str, path: str) -> tuple[str, VersionChoice, str]:
    """Model; version, label or None: the latest; status, metadata, predict, classify or regress. Or InvalidRequest."""
    if path in ("/", "/health", "/metrics"):
        raise InvalidRequest(f"{path} answers GET, not {method}", 405)
    if path[:4].lower() != "/v1/":
        raise InvalidRequest(f"There is nothing at {path[:100]}: try /, /health, /metrics or /v1/models/<name>", 404)
    match = PATHS[method].fullmatch(path) if method in PATHS else None
    if not match:
        raise InvalidRequest(f"Malformed request: {method} {path[:1000]}")
    name, version, label, verb = match.groups()
    if name is None:
        raise InvalidRequest("Missing model name in request.")
    if version and (len(version) > 19 or int(version) >= 2**63):
        raise InvalidRequest(f"The version {version[:100]} is not a number of 64 bits")
    verb = verb if method == "POST" else "metadata" if verb else "status"
    return urllib.parse.unquote(name), int(version) if version else label and urllib.parse.unquote(label), verb


def parse_value(query: str, http_version: str = "1.1") -> float:
    """The number in ``?value=3``; 1 if there is none. Raises InvalidRequest unless it is one finite number."""
    if http_version.endswith("0.9"):
        raise InvalidRequest("HTTP 0.9 is not spoken here: a request that was cut short looks like it")
    try:
        values = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=100, errors="strict")
        [value] = values.get("value", ["1"])
    except ValueError:
        raise InvalidRequest("value must be given once, in a query string that can be parsed") from None
    if len(value) > 100 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.A | re.I):
        raise InvalidRequest(f"value must be one finite number, not {value[:100]!r}")
    return require_finite(float(value))
