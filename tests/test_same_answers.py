"""Both front ends without server or cluster: the same bytes, words and headers, under any prefix, for any origin."""

import asyncio
import dataclasses
import io
import json
from urllib.parse import quote, unquote, unquote_to_bytes

import pytest
from conftest import good
from starlette.applications import Starlette
from starlette.routing import Mount

import ray_tensorflow_flask
import ray_tensorflow_starlette
from shared_graph.errors import Error, Unavailable, WorkerLost
from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelKey, ModelVersion, Snapshot
from shared_graph.options import Options
from shared_graph.status import Status

LOADED = LoadedVersion({"signature_def": {"signature_def": {}}}, "", (), (), False, "")
VERSION = ModelVersion(ModelSource("a/é", 3, function="m:f"), "AVAILABLE", None, LOADED)
ADDER = ModelVersion(ModelSource("adder", 1, function="m:f"), "AVAILABLE", None, LOADED)
SNAPSHOT = Snapshot(
    1,
    {ModelKey("a/é", 3): VERSION, ModelKey("adder", 1): ADDER},
    frozenset(),
    {("a/é", None): 3, ("a/é", "stäble"): 3, ("adder", None): 1},
)


OPTIONS = Options(model=[VERSION.source])


class PlayedCluster:
    """Answers with what it was asked; ``made`` are all that there are."""

    made: list["PlayedCluster"] = []  # noqa: RUF012
    failure: Exception | None = None
    is_closed = False

    def __init__(self, options: Options):
        self.options, self.status = options, Status(options)
        self.made.append(self)

    def close(self):
        self.is_closed = True

    def start_in_background(self, home=None, on_failure=None):
        assert not self.is_closed
        if self.failure:
            raise self.failure
        self.status.apply_snapshot(SNAPSHOT)
        return self

    def add(self, value):
        assert not self.is_closed
        return value

    def request(self, model, verb, body, version):
        if body.content == b"lost":
            raise WorkerLost("lost")
        if body.content == b"bug":
            raise ValueError("a secret")
        if body.content == b"full":
            raise Unavailable("full")
        return b"\x93NUMPY" if body.query else json.dumps([model, verb, version, len(body.content)]).encode()

    async def add_async(self, value):
        return self.add(value)

    async def request_async(self, *arguments):
        return self.request(*arguments)


class Answer:
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes):
        self.status, self.body, self.headers = status, body, {name.title(): value for name, value in headers}

    @property
    def json(self):
        return json.loads(self.body)


class FlaskApp:
    def __init__(self, options: Options, prefix: str = "", is_raw_told: bool = True):
        self.app, self.prefix, self.is_raw_told = ray_tensorflow_flask.create_app(options), prefix, is_raw_told

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        raw, _, query = path.partition("?")
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": unquote_to_bytes(self.prefix).decode("latin-1"),
            "PATH_INFO": unquote_to_bytes(raw).decode("latin-1"),
            "QUERY_STRING": query,
            "SERVER_NAME": "a",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
        }
        if self.is_raw_told:
            environ["RAW_URI"] = quote(self.prefix, safe="/%") + path
        environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        told = []
        parts = self.app(environ, lambda status, headers: told.append((int(status.split()[0]), headers)))
        return Answer(*told[0], b"".join(parts))


class StarletteApp:
    def __init__(self, options: Options, prefix: str = "", is_raw_told: bool = True, is_mounted: bool = False):
        self.app, self.prefix, self.is_raw_told = ray_tensorflow_starlette.create_app(options), prefix, is_raw_told
        self.root_path = prefix
        if is_mounted:
            self.app, self.root_path = Starlette(routes=[Mount(unquote(prefix), self.app)]), ""

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        raw, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(self.prefix + raw),
            "root_path": unquote(self.root_path),
            "query_string": query.encode(),
            "headers": [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "server": ("a", 80),
        }
        if self.is_raw_told:
            scope["raw_path"] = (self.prefix + raw).encode()
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event):
            sent.append(event)

        asyncio.run(self.app(scope, receive, send))
        told = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
        return Answer(sent[0]["status"], told, b"".join(event.get("body", b"") for event in sent[1:]))


@pytest.fixture(autouse=True)
def played(monkeypatch):
    """Neither front end starts anything."""
    monkeypatch.setattr(ray_tensorflow_flask, "Cluster", PlayedCluster)
    monkeypatch.setattr(ray_tensorflow_starlette, "Cluster", PlayedCluster)
    monkeypatch.setattr(PlayedCluster, "made", [])


BOTH = pytest.mark.parametrize("App", [FlaskApp, StarletteApp])
REQUESTS = [  # method, path, body
    ("GET", "/", b""),
    ("GET", "/?value=2.5", b""),
    ("GET", "/?value=x", b""),
    ("HEAD", "/", b""),
    ("POST", "/", b""),
    ("OPTIONS", "/health", b""),
    ("BREW", "/", b""),
    ("BREW", "/v1/models/m", b""),
    ("HEAD", "/v1/models/adder", b""),
    ("PUT", "/v1/models/adder:predict", b""),
    ("OPTIONS", "/v1/models/adder:predict", b""),
    ("GET", "/health", b""),
    ("GET", "/dashboard", b""),
    ("GET", "/nothing%2F", b""),
    ("GET", "/v1/models", b""),
    ("GET", "/v1/models/adder", b""),
    ("GET", "/v1/models/a%2F%C3%A9", b""),
    ("GET", "/v1/models/a%2f%c3%a9/versions/3/metadata", b""),
    ("GET", "/v1/models/nope%25", b""),
    ("POST", "/V1/Models/a%2F%C3%A9/labels/st%C3%A4ble:predict", b"12345"),
    ("POST", "/v1/models/a%2F%C3%A9/labels/x:predict", b"12345"),
    ("POST", "/v1/models/a%2F%C3%A9/versions/4:classify", b"12345"),
    ("POST", "/v1/models/adder:predict?signature_name=x", b"12345"),
    ("POST", "/v1/models/adder:predict", b"lost"),
    ("POST", "/v1/models/adder:predict", b"bug"),
    ("POST", "/v1/models/adder:predict", b"full"),
    ("POST", "/v1/models/adder%3Apredict", b""),
]


def test_after_one_lifespan_there_may_be_another():
    """As in the tests of an application that has ours in it."""

    async def ask() -> int:
        async with app.app.router.lifespan_context(app.app):
            return (await asyncio.to_thread(app.request, "GET", "/?value=2.5")).status

    app = StarletteApp(OPTIONS)
    assert [asyncio.run(ask()), asyncio.run(ask())] == [200, 200]
    assert [cluster.is_closed for cluster in PlayedCluster.made] == [True, True]


def test_both_answer_the_same_bytes_words_and_headers():
    flask, starlette = FlaskApp(OPTIONS), StarletteApp(OPTIONS)
    for method, path, body in REQUESTS:
        ours, theirs = flask.request(method, path, body), starlette.request(method, path, body)
        assert (ours.status, ours.body) == (theirs.status, theirs.body) or method == "HEAD", (method, path)
        assert ours.headers == theirs.headers, (method, path)


@pytest.mark.parametrize("is_raw_told", [True, False])
@pytest.mark.parametrize("prefix", ["/tf", "/a/b", "/v1", "/caf%C3%A9"])
@pytest.mark.parametrize(
    "App", [FlaskApp, StarletteApp, lambda *given: StarletteApp(*given, True)], ids=["flask", "starlette", "mount"]
)
def test_under_a_prefix_all_is_answered_as_without(App, prefix, is_raw_told):
    plain, below = FlaskApp(OPTIONS), App(OPTIONS, prefix, is_raw_told)
    for method, path, body in REQUESTS:
        if method in ("BREW", "HEAD") or (not is_raw_told and "%" in path):
            continue  # a server that tells only decoded paths cannot tell %2F from /
        there, here = plain.request(method, path, body), below.request(method, path, body)
        assert (there.status, there.body) == (here.status, here.body), (method, path)


@BOTH
@pytest.mark.parametrize(
    "method, path, status, allow",
    [
        ("HEAD", "/", 405, "GET"),
        ("BREW", "/", 405, "GET"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/dashboard", 405, "GET, HEAD"),
        ("HEAD", "/health", 503, None),
        ("HEAD", "/metrics", 200, None),
        ("HEAD", "/monitoring/prometheus/metrics", 200, None),
        ("HEAD", "/dashboard", 200, None),
        ("HEAD", "/v1/models/adder", 400, None),
        ("HEAD", "/nothing", 404, None),
    ],
)
def test_only_get_adds_and_who_may_not_is_told_what_may(App, method, path, status, allow):
    answer = App(OPTIONS).request(method, path)
    assert (answer.status, answer.headers.get("Allow")) == (status, allow)


PREFLIGHT = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type, x-a"}


@BOTH
def test_without_allowed_origins_a_preflight_is_what_tensorflow_serving_makes_of_it(App):
    app = App(OPTIONS)
    for path in ("/v1/models/adder:predict", "/"):
        answer = app.request("OPTIONS", path, Origin="https://a.example", **PREFLIGHT)
        assert (answer.status, answer.body) == (200, b"")
        assert not any(name.startswith("Access-Control") for name in answer.headers)
    answer = app.request("OPTIONS", "/v1/models/adder:predict")
    assert (answer.status, answer.json) == (400, {"error": "Malformed request: OPTIONS /v1/models/adder:predict"})
    assert "Access-Control-Allow-Origin" not in app.request("GET", "/", Origin="https://a.example").headers


@BOTH
@pytest.mark.parametrize(
    "allowed, origin, told",
    [
        (["https://a.example", "http://b:1"], "https://a.example", "https://a.example"),
        (["https://a.example", "http://b:1"], "HTTP://B:1", "HTTP://B:1"),
        (["https://a.example"], "https://a.example.evil", None),
        (["https://a.example"], "null", None),
        (["*"], "https://c.example", "*"),
        (["*"], "null", "*"),
    ],
)
def test_pages_of_allowed_origins_may_ask_and_see_answers_and_errors(App, allowed, origin, told):
    app = App(dataclasses.replace(OPTIONS, allow_origin=allowed))
    answer = app.request("OPTIONS", "/v1/models/adder:predict", Origin=origin, **PREFLIGHT)
    assert (answer.status, answer.body, answer.headers.get("Access-Control-Allow-Origin")) == (200, b"", told)
    if told:
        assert answer.headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST"
        assert answer.headers["Access-Control-Allow-Headers"] == "content-type, x-a"
    for method, path, body, status in (
        ("GET", "/", b"", 200),
        ("GET", "/dashboard", b"", 200),
        ("GET", "/nothing", b"", 404),
        ("BREW", "/v1/x", b"", 400),
        ("POST", "/v1/models/adder:predict", b"bug", 500),
        ("POST", "/v1/models/adder:predict", b"full", 503),
    ):
        answer = app.request(method, path, body, Origin=origin)
        assert (answer.status, answer.headers.get("Access-Control-Allow-Origin")) == (status, told), path
        assert ("Vary" in answer.headers) == (allowed != ["*"])
    assert "Access-Control-Allow-Origin" not in app.request("GET", "/").headers


@BOTH
def test_what_nobody_foresaw_is_told_without_what_is_inside(App):
    answer = App(OPTIONS).request("POST", "/v1/models/adder:predict", b"bug")
    assert (answer.status, answer.json) == (500, {"error": "Internal error"})


@BOTH
def test_an_app_that_cannot_start_says_why_and_tries_again(App, monkeypatch):
    app = App(OPTIONS)
    monkeypatch.setattr(PlayedCluster, "failure", Error("no such thing"))
    for _ in range(2):
        answer = app.request("GET", "/")
        assert (answer.status, answer.json) == (500, {"error": "no such thing"})
    monkeypatch.setattr(PlayedCluster, "failure", None)
    assert good(app.request("GET", "/")) == {"result": 1.0}


@BOTH
def test_one_cluster_is_started_by_the_first_request(App):
    app = App(OPTIONS)
    assert PlayedCluster.made == []
    for _ in range(3):
        assert good(app.request("GET", "/")) == {"result": 1.0}
    assert len(PlayedCluster.made) == 1


@BOTH
def test_a_body_that_is_too_large_is_refused_and_none_is_counted_when_it_is_read(App):
    app = App(OPTIONS)
    assert good(app.request("POST", "/v1/models/adder:predict", b" " * 2**26))[3] == 2**26
    assert app.request("POST", "/v1/models/adder:predict", b" " * (2**26 + 1)).status == 413
    [cluster] = PlayedCluster.made
    assert cluster.status.batcher.pending.count == 0
    cluster.status.batcher.pending.hold(2**28 - 10)
    answer = app.request("POST", "/v1/models/adder:predict", b" " * 100)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert app.request("POST", "/v1/models/adder:predict", b"12345").status == 200
    assert cluster.status.batcher.pending.count == 2**28 - 10
