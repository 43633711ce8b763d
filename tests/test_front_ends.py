"""Both front ends over real HTTP: the shared sum, what is refused, starting and ending, and servers that run them."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys

import pytest
from conftest import REPOSITORY, Server, processes, wait_until

KINDS = pytest.mark.parametrize("kind", ["flask", "starlette"])


def add(server, value) -> float:
    answer = server.get(f"/?value={value}")
    assert answer.status == 200, answer
    return answer.json["result"]


def assert_is_an_error(answer, status: int) -> None:
    """One sentence as JSON, and nothing of what is inside."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/json" and list(answer.json) == ["error"]
    message = answer.json["error"]
    assert message and "\n" not in message and "Traceback" not in message and len(message) < 500
    assert ("Retry-After" in answer.headers) == (status in (429, 503))


# -- the shared sum ----------------------------------------------------------------------------------------------------


def test_adds_of_64_clients_at_once_are_each_seen_once_and_alone(front_end, clients):
    values = list(range(1, 2001))
    random.Random(1).shuffle(values)
    before = add(front_end, 0)
    results = sorted(clients(64, lambda value: add(front_end, value), values))
    assert add(front_end, 0) == before + sum(values) == results[-1]
    assert sorted(after - earlier for earlier, after in zip([before, *results], results)) == sorted(values)


def test_an_answer_is_the_sum_right_after_its_own_add(front_end):
    before = add(front_end, 0)
    assert [add(front_end, value) - before for value in (3, "-1.5", "%2B2", "1e1", ".5")] == [3, 1.5, 3.5, 13.5, 14]


def test_without_a_value_one_is_added(front_end):
    before = add(front_end, 0)
    assert [front_end.get(path).json["result"] - before for path in ("/", "/?", "/?other=5")] == [1, 2, 3]


# -- what is told ------------------------------------------------------------------------------------------------------


def test_health_tells_about_the_parameter_server_and_each_worker(front_end):
    answer = front_end.get("/health")
    health = answer.json
    assert (answer.status, health["status"]) == (200, "ready")
    assert [server["index"] for server in health["parameter_servers"]] == [0]
    assert [(worker["index"], worker["state"]) for worker in health["workers"]] == [(0, "ready"), (1, "ready")]
    pids = [actor["pid"] for actor in health["parameter_servers"] + health["workers"]]
    assert len(set(pids)) == 3 and set(pids) <= set(processes("session"))


def test_head_is_answered_like_get_but_without_a_body(front_end):
    answer = front_end.request("HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")


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


@pytest.mark.parametrize("query", [
    "value=", "value=abc", "value=nan", "value=1e999", "value=1&value=2", "value=%D9%A3", "value=%ff", "value=1%00",
    "value=" + "9" * 10_000, "&".join(["value=1"] * 1000)], ids=lambda query: query[:20])
def test_a_wrong_value_is_refused_and_changes_nothing(front_end, query):
    before = add(front_end, 0)
    assert_is_an_error(front_end.get(f"/?{query}"), 400)
    assert add(front_end, 0) == before


@pytest.mark.parametrize("path", [
    "/nothing", "/health/", "/ws", "/%00", "/../etc/passwd", "/%2e%2e/", "/" + "x" * 5000, "/static/x", "/v1",
    "/v2/models/adder", "/v1/models/nobody"], ids=lambda path: path[:20])
def test_an_unknown_path_is_404(front_end, path):
    assert_is_an_error(front_end.get(path), 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/?value=1", "/health"])
def test_another_method_is_405_and_changes_nothing(front_end, method, path):
    before = add(front_end, 0)
    assert_is_an_error(front_end.request(method, path), 405)
    assert add(front_end, 0) == before


def post(server, parts: list[bytes], header: str) -> tuple[int, bytes]:
    """Status and body for a POST; its answer may come before everything is sent."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(f"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # it has heard enough
            for part in parts:
                connection.sendall(part)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


@pytest.mark.parametrize("is_chunked", [False, True], ids=["told", "chunked"])
def test_a_body_that_is_too_large_is_413(front_end, is_chunked):
    part, header = b" " * 2**20, f"Content-Length: {65 * 2**20}"
    if is_chunked:
        part, header = b"%x\r\n%b\r\n" % (2**20, part), "Transfer-Encoding: chunked"
    status, body = post(front_end, [part] * 65 + [b"0\r\n\r\n"] * is_chunked, header)
    assert status == 413 and list(json.loads(body)) == ["error"]


def test_a_large_body_that_is_allowed_is_read(front_end):
    body = b'{"instances": [0]' + b" " * 8 * 2**20 + b"}"
    status, answer = post(front_end, [body], f"Content-Length: {len(body)}")
    assert status == 200 and answer.startswith(b'{"predictions": [')


# -- starting and ending -----------------------------------------------------------------------------------------------


@KINDS
def test_while_it_starts_all_that_needs_the_graph_is_503_and_a_signal_ends_it(kind):
    with Server(kind, "--workers", "2") as server:
        wait_until(server.is_listening)
        health = server.get("/health")
        assert health.status == 503 and health.json["status"] == "starting"
        assert [worker["state"] for worker in health.json["workers"]] == ["starting"] * 2
        for answer in (server.get("/?value=1"), server.predict("adder", {"instances": [1]}),
                       server.get("/v1/models/adder")):
            assert_is_an_error(answer, 503)
        assert_is_an_error(server.get("/nothing"), 404)
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


@KINDS
def test_a_port_that_is_taken_is_told_in_one_sentence_and_leaves_nothing(kind):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(kind, "--port", str(taken.getsockname()[1]))
        assert server.process.wait(60) not in (0, -signal.SIGKILL)
        assert "Traceback" not in server.output() and "in use" in server.output()


# -- other servers -----------------------------------------------------------------------------------------------------

WSGI_SERVER = """
import signal, sys, threading
from wsgiref.simple_server import make_server
from ray_tensorflow_flask import app

server = make_server("127.0.0.1", int(sys.argv[1]), app)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""
OTHER_SERVERS = {
    "flask": ["-c", WSGI_SERVER.replace("{", "{{").replace("}", "}}"), "{port}"],
    "starlette": ["-m", "uvicorn", "ray_tensorflow_starlette:app", "--port", "{port}"]}


@KINDS
def test_another_server_runs_the_app_from_another_folder_with_options_from_the_environment(kind, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ["PYTHONPATH"]]), "RAY_TENSORFLOW_WORKERS": "1",
        "RAY_TENSORFLOW_MODEL": "net=example_models:linear"}
    command = [sys.executable, *OTHER_SERVERS[kind]]
    with Server(kind, command=command, cwd=tmp_path, env=environment).wait_ready() as server:
        assert server.predict("net", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
        assert [add(server, value) for value in (1, 2, 3)] == [1, 3, 6]
        assert_is_an_error(server.get("/nothing"), 404)
        assert len(server.get("/health").json["workers"]) == 1
        assert not imports_tensorflow(server.process.pid)
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


def test_importing_all_three_files_starts_nothing_reads_no_environment_and_imports_no_tensorflow():
    program = """
import glob, sys, threading
import ray_tensorflow, ray_tensorflow_flask, ray_tensorflow_starlette
import ray
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert not any(open(path).read() for path in glob.glob("/proc/self/task/*/children"))
assert "tensorflow" not in sys.modules and not ray.is_initialized()
"""
    environment = {"PYTHONPATH": REPOSITORY, "RAY_TENSORFLOW_WORKERS": "nonsense", "PORT": "x"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
