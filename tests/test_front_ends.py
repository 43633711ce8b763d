"""Both front ends over real HTTP: the shared sum under load, what is refused in which words, starting, overload and the end."""

import asyncio
import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, Server, processes, wait_until

KINDS = ("flask", "starlette")


def add(server, value) -> float:
    answer = server.get(f"/?value={value}")
    assert answer.status == 200, answer
    return answer.json["result"]


def assert_is_an_error(answer, status: int):
    """One sentence as JSON, and nothing of what is inside."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/json" and list(answer.json) == ["error"] and len(answer.body) < 500
    message = answer.json["error"]
    assert message and "\n" not in message and "Traceback" not in message


async def get_all(port: int, clients: int, paths: list[str]) -> list[tuple[int, bytes]]:
    """Status and body for each path, asked by so many clients at once; each keeps its connection as long as the server does."""
    todo, answers = iter(enumerate(paths)), [None] * len(paths)

    async def client():
        reader = writer = None
        for i, path in todo:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            version, status = (await reader.readline()).split()[:2]
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip().lower()
            answers[i] = int(status), await reader.readexactly(int(headers["content-length"]))
            if version == b"HTTP/1.0" or headers.get("connection") == "close":
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async with asyncio.timeout(240):
        await asyncio.gather(*[client() for _ in range(clients)])
    return answers


# -- the shared sum ----------------------------------------------------------------------------------------------------


def test_20000_adds_from_64_clients_are_each_seen_once_and_alone(front_end):
    values = list(range(1, 20_001))
    random.Random(1).shuffle(values)
    before = add(front_end, 0)
    answers = asyncio.run(get_all(front_end.port, 64, [f"/?value={value}" for value in values]))
    assert {status for status, _ in answers} == {200}
    results = sorted(float(body.removeprefix(b'{"result": ').removesuffix(b"}")) for _, body in answers)
    assert add(front_end, 0) == before + sum(values) == results[-1]
    assert sorted(after - earlier for earlier, after in zip([before, *results], results)) == sorted(values)


def test_an_answer_is_the_sum_right_after_its_own_add(front_end):
    before = add(front_end, 0)
    assert [add(front_end, value) - before for value in (3, "-1.5", "%2B2", "1e1", ".5")] == [3, 1.5, 3.5, 13.5, 14]


def test_without_a_value_one_is_added(front_end):
    before = add(front_end, 0)
    assert [front_end.get(path).json["result"] - before for path in ("/", "/?", "/?other=5")] == [1, 2, 3]


WRONG_VALUES = {
    "empty": "value=", "text": "value=abc", "nan": "value=nan", "inf": "value=inf", "minus infinity": "value=-Infinity",
    "too large": "value=1e999", "twice": "value=1&value=2", "the same twice": "value=1&value=1",
    "10,000 digits": "value=" + "9" * 10_000, "10,000 characters": "value=" + "x" * 10_000, "space": "value=%20",
    "hexadecimal": "value=0x10", "underscore": "value=1_0", "comma": "value=1,5", "two numbers": "value=1%202",
    "true": "value=true", "other digits": "value=%D9%A3", "not UTF-8": "value=%ff", "zero byte": "value=1%00",
    "markup": "value=<b>1</b>", "a thousand fields": "&".join(["value=1"] * 1000)}


@pytest.mark.parametrize("query", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_refused_with_one_sentence_and_changes_nothing(front_end, query):
    before = add(front_end, 0)
    assert_is_an_error(front_end.get(f"/?{query}"), 400)
    assert add(front_end, 0) == before


def test_head_is_answered_like_get_but_without_a_body(front_end):
    answer = front_end.request("HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")


# -- health ------------------------------------------------------------------------------------------------------------


def test_health_tells_about_the_parameter_server_and_each_worker(front_end):
    answer = front_end.get("/health")
    health = answer.json
    assert (answer.status, health["status"]) == (200, "ready")
    assert [server["index"] for server in health["parameter_servers"]] == [0]
    assert [(worker["index"], worker["state"]) for worker in health["workers"]] == [(0, "ready"), (1, "ready")]
    pids = [actor["pid"] for actor in health["parameter_servers"] + health["workers"]]
    assert len(set(pids)) == 3 and set(pids) <= set(processes("session"))


def imports_tensorflow(pid: int) -> bool:
    """Has the process loaded TensorFlow's library?"""
    with open(f"/proc/{pid}/maps") as file:
        return any("/site-packages/tensorflow/" in line for line in file)


def test_the_web_process_has_not_loaded_tensorflow_after_serving(front_end):
    add(front_end, 0)
    assert front_end.predict("linear", {"instances": [[1, 2, 3]]}).status == 200
    assert not imports_tensorflow(front_end.process.pid)
    assert imports_tensorflow(front_end.get("/health").json["workers"][0]["pid"])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "/nothing", "/health/", "/index.html", "/%00", "/../etc/passwd", "/%2e%2e/", "/" + "x" * 5000, "/static/x", "/v1",
    "/v2/models/adder"])
def test_an_unknown_path_is_404(front_end, path):
    assert_is_an_error(front_end.get(path), 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/?value=1", "/health"])
def test_another_method_is_405_and_changes_nothing(front_end, method, path):
    before = add(front_end, 0)
    assert_is_an_error(front_end.request(method, path), 405)
    assert add(front_end, 0) == before


def post(server, parts, length: str) -> tuple[int, bytes]:
    """Status and body for a POST; its answer may come before everything is sent."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(f"POST /v1/models/adder:predict HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # it has heard enough
            for part in parts:
                connection.sendall(part)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


def test_a_body_that_is_too_large_is_413(front_end):
    status, body = post(front_end, [b" " * 2**20] * 65, f"Content-Length: {65 * 2**20}")
    assert status == 413 and body.startswith(b'{"error": "') and b"64 MiB" in body


def test_a_body_that_is_too_large_but_does_not_say_so_is_413(front_end):
    part = b"%x\r\n%b\r\n" % (2**20, b" " * 2**20)
    status, body = post(front_end, [part] * 65 + [b"0\r\n\r\n"], "Transfer-Encoding: chunked")
    assert status == 413 and body.startswith(b'{"error": "') and b"64 MiB" in body


def test_a_large_body_that_is_allowed_is_read(front_end):
    body = b'{"instances": [0]' + b" " * 8 * 2**20 + b"}"
    status, answer = post(front_end, [body], f"Content-Length: {len(body)}")
    assert status == 200 and answer.startswith(b'{"predictions": [')


NOT_HTTP = {
    "no request line": b"hello\r\n\r\n", "unknown method": b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
    "wrong version": b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n", "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "endless request line": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "endless header": b"GET /nothing HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "wrong length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"}


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_hardly_http_is_never_answered_with_html_or_a_trace_and_changes_nothing(front_end, sent):
    before, received = add(front_end, 0), b""
    with socket.create_connection(("127.0.0.1", front_end.port), 30) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        while not received.endswith((b"}", b".")) and (part := connection.recv(2**16)):
            received += part
    assert b"html" not in received.lower() and b"Traceback" not in received
    assert add(front_end, 0) == before


# -- starting, overload, the end ---------------------------------------------------------------------------------------


def assert_nothing_is_left(server):
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))
    wait_until(lambda: not processes("test"), 15, f"these to end: {processes('test')}")


@pytest.mark.parametrize("kind", KINDS)
def test_health_is_503_while_starting_and_200_with_the_parameter_server_and_one_worker(kind):
    """With more workers than can start at once, of which serving does not wait for the last; SIGTERM ends it all."""
    with Server(kind, "--workers", "3") as server:
        wait_until(server.is_listening)
        health = server.get("/health")
        assert health.status == 503 and health.json["status"] == "starting" and int(health.headers["Retry-After"]) > 0
        assert [worker["state"] for worker in health.json["workers"]] == ["starting"] * 3
        for answer in (server.get("/?value=1"), server.predict("adder", {"instances": [1]}), server.get("/v1/models/adder")):
            assert_is_an_error(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0
        assert server.get("/?value=x").status in (400, 503) and server.get("/nothing").status == 404

        def ready():
            answer = server.get("/health")
            return answer if answer.status == 200 else None

        health = wait_until(ready).json
        assert health["status"] == "ready" and health["parameter_servers"][0]["pid"] and health["workers"][0]["state"] == "ready"
        assert add(server, 5) == 5  # what was refused has changed nothing
        assert server.stop(signal.SIGTERM) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
        assert "Traceback" not in server.output()
        assert_nothing_is_left(server)


@pytest.mark.parametrize("kind", KINDS)
def test_overload_is_refused_with_503_and_over_when_it_is_over(kind):
    """Each add that was answered counts, and none that was refused; Ctrl-C ends it all."""
    with Server(kind, "--workers", "1", "--max-batch", "1", "--max-queue", "3").wait_ready() as server:
        done = refused = 0
        end = time.monotonic() + 60
        while not (done and refused):
            assert time.monotonic() < end
            answers = asyncio.run(get_all(server.port, 64, ["/?value=1"] * 256))
            assert {status for status, _ in answers} <= {200, 503}
            done += sum(status == 200 for status, _ in answers)
            refused += sum(status == 503 for status, _ in answers)
            assert all(body.startswith(b'{"error": "Too many requests') for status, body in answers if status == 503)
        assert [add(server, 0) for _ in range(5)] == [done] * 5
        assert server.get("/health").json["waiting"] == 0
        assert server.stop(signal.SIGINT) in (0, 128 + signal.SIGINT, -signal.SIGINT)
        assert "Traceback" not in server.output()
        assert_nothing_is_left(server)


@pytest.mark.parametrize("kind, number", list(zip(KINDS, (signal.SIGTERM, signal.SIGINT))))
def test_a_signal_while_starting_ends_a_front_end_cleanly(kind, number):
    with Server(kind, "--workers", "2") as server:
        wait_until(server.is_listening)
        assert server.get("/health").status == 503
        assert server.stop(number) in (0, 128 + number, -number)
        assert "Traceback" not in server.output()
        assert_nothing_is_left(server)


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_that_is_taken_is_told_in_one_sentence_and_leaves_nothing(kind):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(kind, "--port", str(taken.getsockname()[1]))
        assert server.process.wait(60) not in (0, -signal.SIGKILL)
        assert "Traceback" not in server.output() and "in use" in server.output()
    wait_until(lambda: not processes("test"), 15, f"these to end: {processes('test')}")


def test_a_model_that_cannot_be_loaded_is_told_by_health_and_to_every_request():
    with Server("starlette", "--workers", "1", "--model", "broken=example_models:no_such_function") as server:
        wait_until(server.is_listening)

        def failed():
            answer = server.get("/health")
            return answer if answer.status == 503 and answer.json["status"] != "starting" else None

        assert "broken" in wait_until(failed).json["error"]
        answer = server.get("/?value=1")
        assert_is_an_error(answer, 503)
        assert "broken" in answer.json["error"] and server.get("/health").json["status"] == "failed"


# -- other servers -----------------------------------------------------------------------------------------------------

WSGI_SERVER = """
import signal, sys, threading
from wsgiref.simple_server import make_server
from ray_tensorflow_flask import app

def reporting(environ, start_response):
    if environ["PATH_INFO"] == "/modules":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(sys.modules).encode()]
    return app(environ, start_response)

server = make_server("127.0.0.1", int(sys.argv[1]), reporting)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())  # wsgiref swallows a SystemExit
server.serve_forever()
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Popen's arguments for a server in another folder, that finds ours on the path and its options in the environment."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([REPOSITORY, os.path.dirname(__file__), str(tmp_path)]))
    monkeypatch.setenv("RAY_TENSORFLOW_WORKERS", "2")
    monkeypatch.setenv("RAY_TENSORFLOW_MODEL", "net=example_models:linear")
    monkeypatch.setenv("RAY_TENSORFLOW_MAX_QUEUE", "77")
    (tmp_path / "empty").mkdir()
    return {"cwd": tmp_path / "empty"}


def serves_as_configured(server) -> bool:
    server.wait_ready(workers=2)
    assert server.predict("net", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
    assert [add(server, value) for value in (1, 2, 3)] == [1, 3, 6]
    assert_is_an_error(server.get("/nothing"), 404)
    return len(server.get("/health").json["workers"]) == 2


def test_uvicorn_serves_the_starlette_app_from_another_folder_and_never_loads_tensorflow(elsewhere):
    command = [sys.executable, "-m", "uvicorn", "ray_tensorflow_starlette:app", "--port", "{port}"]
    with Server("starlette", command=command, **elsewhere) as server:
        assert serves_as_configured(server)
        assert not imports_tensorflow(server.process.pid)
        server.stop(signal.SIGTERM)
        assert "Traceback" not in server.output()
        assert_nothing_is_left(server)


def test_a_wsgi_server_serves_the_flask_app_from_another_folder_and_never_imports_tensorflow(elsewhere, tmp_path):
    (tmp_path / "serve.py").write_text(WSGI_SERVER)
    with Server("flask", command=[sys.executable, str(tmp_path / "serve.py"), "{port}"], **elsewhere) as server:
        assert serves_as_configured(server)
        modules = server.get("/modules").body.decode().split()
        assert "ray_tensorflow_flask" in modules and "tensorflow" not in modules
        assert server.stop(signal.SIGTERM) == 0
        assert_nothing_is_left(server)


def test_importing_all_three_files_starts_nothing_and_imports_no_tensorflow_and_reads_no_environment():
    program = """
import glob, os, sys, threading
import ray_tensorflow, ray_tensorflow_flask, ray_tensorflow_starlette
import ray
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
children = [open(path).read() for path in glob.glob("/proc/self/task/*/children")]
assert not any(children), children
assert "tensorflow" not in sys.modules
assert not ray.is_initialized()
"""
    environment = {"PYTHONPATH": REPOSITORY, "RAY_TENSORFLOW_WORKERS": "nonsense", "RAY_TENSORFLOW_MODEL": "nowhere", "PORT": "x"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
