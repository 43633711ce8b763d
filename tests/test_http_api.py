"""Paths and values of requests, without a server: what each path asks for, and with which words it is refused."""

import json
import re

import pytest

from shared_graph.errors import Error, InvalidRequest, Unavailable
from shared_graph.http_api import (
    Answer,
    Call,
    error_answer,
    headers_of,
    json_bytes,
    match_path,
    may_open_socket,
    parse_value,
    path_below,
    tell,
)
from shared_graph.options import Options
from shared_graph.status import Status

ODD, ODD_PLAIN = "%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D", "!#$%&'()*+,/:;=?@[]"


@pytest.mark.parametrize(
    "method, path, expected",
    [
        ("GET", "/v1/models/m/versions/099", ("m", 99, "status")),
        ("GET", f"/v1/models/m/versions/{'0' * 5000}99", ("m", 99, "status")),
        ("GET", "/v1/models/m/versions/00", ("m", 0, "status")),
        ("GET", "/v1/models/m/versions/9223372036854775807/metadata", ("m", 2**63 - 1, "metadata")),
        ("GET", f"/v1/models/m{ODD}/metadata", (f"m{ODD_PLAIN}", None, "metadata")),
        ("GET", f"/v1/models/m/labels/{ODD}/metadata", ("m", ODD_PLAIN, "metadata")),
        ("POST", "/v1/models/m/Labels/latest:predict", ("m", "latest", "predict")),
        ("GET", "/v1/models/metadata", ("metadata", None, "status")),
        ("POST", "/v1/Models/m/Versions/5:classify", ("m", 5, "classify")),
        ("POST", f"/v1/models/{ODD}:regress", (ODD_PLAIN, None, "regress")),
        ("POST", "/v1/models/%2570+%C3%A9%0A%zz:predict", ("%70+é\n%zz", None, "predict")),
    ],
)
def test_a_path_is_taken_apart_before_it_is_decoded(method, path, expected):
    assert match_path(method, path) == expected


@pytest.mark.parametrize(
    "method, path, message, status",
    [
        *[
            ("GET", f"/v1/{path}", "Malformed request: GET", 400)
            for path in (
                "",
                "foo",
                "models/",
                "models/m/",
                "models/m:predict",
                "models//m",
                "models/m/versions",
                "models/m/versions/x",
                "models/m/versions/-1",
                "models/m/versions/\u0663",
                "models/m/versions/5/labels/x",
                "models/m/metadata/",
            )
        ],
        *[
            ("POST", f"/v1/{path}", "Malformed request: POST", 400)
            for path in (
                "models",
                "models/m",
                "models/m:",
                "models/:predict",
                "models/m:predict/",
                "models/m:train",
                "models/m:PREDICT",
                "models/m%3Apredict",
                "models/m/version/50:predict",
                "models/m/versions/5/labels/x:predict",
            )
        ],
        *[(method, "/v1/models/m:predict", "Malformed request", 400) for method in ("PUT", "HEAD", "get")],
        ("GET", "/v1/models", "Missing model name in request.", 400),
        ("POST", "/v1/models/m/versions/9223372036854775808:predict", "9223372036854775808", 400),
        ("GET", f"/v1/models/m/versions/{'9' * 5000}", "version", 400),
        ("GET", "/v2/models/m", "/v2/models/m", 404),
        ("POST", "/v1", "/v1", 404),
        ("POST", "/health", "GET", 405),
    ],
)
def test_a_path_that_leads_nowhere_says_why(method, path, message, status):
    with pytest.raises(InvalidRequest, match=re.escape(message)) as caught:
        match_path(method, path)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "query, value",
    [
        ("", 1),
        ("other=5", 1),
        ("value=3", 3),
        ("value=-1.5", -1.5),
        ("value=%2B2", 2),
        ("value=1e3", 1000),
        ("value=.5E-1", 0.05),
        ("value=5.", 5),
        ("value=1e-999", 0),
        ("value=0." + "3" * 900, 1 / 3),
        ("a=b&value=%37", 7),
        *[
            (query, None)
            for query in (
                "value",
                "value=",
                "value=abc",
                "value=nan",
                "value=-Infinity",
                "value=1e999",
                "value=1&value=1",
                "value=1_000",
                "value=0x10",
                "value=1,5",
                "value=+3",
                "value=3%20",
                "value=3%0A",
                "value=%D9%A3",
                "value=1e",
                "value=true",
                "value=%FF",
                "value=" + "9" * 10_000,
                "value=0." + "1" * 1_000,
                "&".join(["value=1"] * 1000),
            )
        ],
    ],
)
def test_a_query_has_one_finite_number_or_means_1_and_any_other_is_refused(query, value):
    if value is None:
        with pytest.raises(InvalidRequest, match="value"):
            parse_value(query)
    else:
        assert parse_value(query) == value


@pytest.mark.parametrize(
    "prefix, sent, path, expected",
    [
        ("", "/v1/models/a%2Fb?x=/y", "/v1/models/a/b", "/v1/models/a%2Fb"),
        ("", "http://h:1/v1/models/m?x", "/v1/models/m", "/v1/models/m"),
        ("", None, "/v1/models/a b", "/v1/models/a%20b"),
        ("", None, "", "/"),
        ("", "//etc/passwd", "//etc/passwd", "//etc/passwd"),
        ("/tf", "/tf/v1/models/m", "/v1/models/m", "/v1/models/m"),
        ("/tf/", "/tf/", "/", "/"),
        ("/tf", "/tf", "", "/"),
        ("/tf", "/v1/models/m", "/v1/models/m", "/v1/models/m"),  # the proxy has taken it off
        ("/tf", "/tfx/health", "/tfx/health", "/tfx/health"),
        ("/a b/c", "/a%20b/c/health?q", "/health", "/health"),
        ("/tf", "http://h/tf/health", "/health", "/health"),
        ("", "http://h?value=3", "", "/"),
        ("", "v1/models/m", "v1/models/m", "/v1/models/m"),
    ],
)
def test_the_prefix_under_which_a_server_puts_the_application_is_taken_off(prefix, sent, path, expected):
    assert path_below(prefix, sent, path) == expected


@pytest.mark.parametrize(
    "allowed, origin, host, may",
    [
        ([], None, "a", True),
        ([], "http://a:1", "A:1", True),
        ([], "http://a:1", "a:2", False),
        ([], "null", "a", False),
        ([], "http://evil", None, False),
        ([], "http://[::1", "a", False),
        ([], "null", None, False),
        (["http://b"], "http://b", "a", True),
        (["*"], "http://b", "a", True),
    ],
)
def test_a_browser_opens_a_socket_for_our_own_pages_and_for_allowed_ones(allowed, origin, host, may):
    assert may_open_socket(Options(allow_origin=allowed), origin, host) is may


def test_an_error_that_another_server_gave_a_model_is_passed_on_as_it_is():
    answer = error_answer(Error("Method Not Allowed", 405), None, None, "POST", "/v1/models/m:predict")
    assert answer.status == 405 and json.loads(answer.body) == {"error": "Method Not Allowed"}


def test_a_document_is_compact_and_any_name_can_be_in_it():
    assert json_bytes({"a": [1.0, "é"]}) == '{"a":[1.0,"é"]}'.encode()
    assert json_bytes({"a\udcff": [1.0, "é"]}) == b'{"a\\udcff":[1.0,"\\u00e9"]}'


def test_a_request_that_was_cut_short_is_no_add_though_it_looks_like_http_0_9():
    with pytest.raises(InvalidRequest, match=r"0\.9"):
        parse_value("value=3", "HTTP/0.9")
    assert parse_value("value=3", "1.0") == parse_value("value=3", "HTTP/1.1") == 3


@pytest.mark.parametrize("status", [400, 429, 500, 502, 503, 504])
def test_who_may_try_again_soon_is_told_when(status):
    headers = error_answer(Error("no", status), None, None, "GET", "/").headers
    assert headers.get("Retry-After") == ("1" if status in (429, 503) else None)


def test_what_nobody_foresaw_is_logged_and_nothing_of_it_is_answered(caplog):
    answer = error_answer(ValueError("a secret"), None, None, "GET", "/")
    assert (answer.status, json.loads(answer.body)) == (500, {"error": "Internal error"})
    assert [record.exc_info[1].args for record in caplog.records] == [("a secret",)]


@pytest.mark.parametrize(
    "wanted, allowed", [("X-A, content-type", True), ("a;b", False), ("é", False), ("a\r\nb", False)]
)
def test_a_browser_may_send_the_headers_that_it_asks_for_where_they_are_names(wanted, allowed):
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    headers = headers_of(Answer(b""), Options(allow_origin=["*"]), asked)
    assert headers.get("Access-Control-Allow-Headers") == (wanted if allowed else None)


def test_a_body_for_what_is_not_served_is_refused_before_it_is_read():
    with pytest.raises(Unavailable):
        tell(Status(Options()), Call("m", None, "predict"))
