"""Both front ends over real HTTP: the sum, what is told and refused, starting and ending, and servers that run them."""

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import REPOSITORY, Answer, Server, command_of, error, family, folders, good, long, processes, wait_until
from prometheus_client.parser import text_string_to_metric_families

KINDS = pytest.mark.parametrize("kind", ["flask", "starlette"])


def test_adds_of_64_clients_at_once_are_each_seen_once_and_alone(front_end, clients):
    values = list(range(1, 2001))
    random.Random(1).shuffle(values)
    before = front_end.add(0)
    results = sorted(clients(64, front_end.add, values))
    assert front_end.add(0) == before + sum(values) == results[-1]
    assert sorted(after - earlier for earlier, after in zip([before, *results], results)) == sorted(values)


def test_an_answer_is_the_sum_right_after_its_own_add_and_without_a_value_one_is_added(front_end):
    before = front_end.add(0)
    assert [front_end.add(value) - before for value in (3, "-1.5", "%2B2", "1e1", ".5")] == [3, 1.5, 3.5, 13.5, 14]
    assert [good(front_end.get(path))["result"] - before for path in ("/", "/?", "/?other=5")] == [15, 16, 17]


def imports_tensorflow(pid: int) -> bool:
    """Has the process loaded TensorFlow's library?"""
    with open(f"/proc/{pid}/maps") as file:
        return any("/site-packages/tensorflow/" in line for line in file)


def test_health_tells_about_the_parameter_server_and_each_worker(front_end):
    health = good(front_end.get("/health"))
    assert health["status"] == "ready" and [server["index"] for server in health["parameter_servers"]] == [0]
    assert [(worker["index"], worker["state"]) for worker in health["workers"]] == [(0, "ready"), (1, "ready")]
    pids = [actor["pid"] for actor in health["parameter_servers"] + health["workers"]]
    assert len(set(pids)) == 3 and set(pids) <= set(processes("session"))
    assert {name: health["models"][name]["merged"] for name in ("linear", "centered", "counter")} == {
        "linear": ["serving_default"],
        "centered": [],
        "counter": [],
    }
    assert good(front_end.predict("linear", {"instances": [[1, 0, 0]]})) == {"predictions": [[1.5, 1.5]]}
    assert imports_tensorflow(pids[0]) and not imports_tensorflow(front_end.process.pid)
    head = front_end.request("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")


def scrape(server, path: str = "/metrics") -> dict[tuple, float]:
    """Value by a sample's name and the values of its labels, in the order of their names."""
    answer = server.get(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = text_string_to_metric_families(answer.body.decode())
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


def test_answers_and_errors_are_counted_by_model_and_kind_and_errors_by_status(front_end):
    before = scrape(front_end)
    for path in ("/?value=0", "/?value=0", "/?value=x", "/nothing"):
        front_end.get(path)
    for model in ("linear", "linear", "linear", "nobody"):
        front_end.predict(model, {"instances": [[1, 2, 3]]})
    front_end.predict("linear", {"instances": [[1, 2]]})
    after = scrape(front_end, "/monitoring/prometheus/metrics")
    moved = {name: value - before.get(name, 0) for name, value in after.items() if "_total" in name[0]}
    assert moved["ray_tensorflow_answers_total", "add", "adder"] == 2
    assert moved["ray_tensorflow_answers_total", "predict", "linear"] == 3
    assert {key[1:]: by for key, by in moved.items() if key[0] == "ray_tensorflow_errors_total" and by} == {
        ("400", "add", "adder"): 1,
        ("404", "", ""): 1,
        ("404", "predict", ""): 1,  # what anybody asks for makes no new series
        ("400", "predict", "linear"): 1,
    }
    assert after["ray_tensorflow_sum",] == front_end.add(0)
    assert after["ray_tensorflow_restarts_total", "worker 1"] == after["ray_tensorflow_in_flight_requests", "1"] == 0


@pytest.mark.parametrize(
    "method, path, status",
    [
        *[
            ("GET", f"/?{query}", 400)
            for query in ("value=", "value=nan", "value=1&value=2", "value=%ff", "value=1%00", "value=" + "9" * 10_000)
        ],
        *[
            ("GET", path, 404)
            for path in (
                "/nothing",
                "/health/",
                "/ws",
                "/%00",
                "//etc/passwd",
                "/../etc/passwd",
                "/" + "x" * 5000,
                "/static/x",
                "/v1",
            )
        ],
        *[
            (method, path, 405)
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
            for path in ("/?value=1", "/health", "/metrics")
        ],
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_served_is_refused_and_changes_nothing(front_end, method, path, status):
    before = front_end.add(0)
    error(front_end.request(method, path), status)
    assert front_end.add(0) == before


@pytest.mark.parametrize(
    "sent", ["GET /", "GET /?value=5 HTTP/1.1", "GET /?value=5 HTTP/1.1\r\n", "GET /?value=5 HTTP/1.1\r\nHost: a\r\n"]
)
def test_a_request_whose_head_is_cut_short_adds_nothing(front_end, sent):
    before = front_end.add(0)
    with socket.create_connection(("127.0.0.1", front_end.port), 60) as connection:
        connection.sendall(sent.encode())
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert not received or received.split()[1] == b"400" or b'"error"' in received, received
    assert front_end.add(0) == before


@pytest.mark.parametrize(
    "line, status",
    [("get /?value=5", 400), ("GET //?value=5", 404), ("GET http://[::1/", 400), ("GET /health%0A/", 404)],
)
def test_what_only_looks_like_what_is_served_is_refused(front_end, line, status):
    before = front_end.add(0)
    received = raw(front_end, f"{line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert received.split()[1] == b"%d" % status and b"<html" not in received.lower(), received
    assert front_end.add(0) == before


def test_an_add_may_be_asked_for_with_the_server_before_it_as_proxies_are(front_end):
    before = front_end.add(0)
    received = raw(front_end, b"GET http://a/?value=5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert received.split()[1] == b"200" and front_end.add(0) == before + 5, received


def raw(server, sent: bytes) -> bytes:
    """All that is answered until the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


CHUNKED = (
    b"POST /v1/models/linear:predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
)
DOCUMENT = b'{"instances": [[1, 0, 0]]}'


@pytest.mark.parametrize(
    "body, status",
    [
        (b"%x\r\n%b\r\n0\r\n\r\n" % (len(DOCUMENT), DOCUMENT), 200),
        (b"%x;a=b\r\n%b\r\n0\r\nX: y\r\nZ: z\r\n\r\n" % (len(DOCUMENT), DOCUMENT), 200),
        (b"1A\r\n%b\r\n5\r\n    \n\r\n0\r\n\r\n" % DOCUMENT, 200),
        (b"x\r\n", 400),
        (b"2\r\n" + DOCUMENT, 400),
    ],
    ids=["plain", "extension and trailers", "two chunks", "no length", "longer"],
)
def test_chunks_are_put_together_whatever_is_said_around_them(front_end, body, status):
    received = raw(front_end, CHUNKED + body)
    assert received.split()[1] == b"%d" % status, received
    assert status != 200 or received.endswith(b'{"predictions":[[1.5,1.5]]}')


@pytest.mark.parametrize("cut", [2, 4])
@pytest.mark.parametrize("offer", [b"Upgrade: h2c", b"upgrade: h2c", b"UPGRADE:TLS/1.2, HTTP/3", b"Upgrade: websocket"])
def test_a_request_that_offers_to_go_on_with_another_protocol_is_answered_with_http_1(front_end, offer, cut):
    """As Java's own client sends each of its requests."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nHost: a\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n" + offer
    with socket.create_connection(("127.0.0.1", front_end.port), 60) as connection:
        for _ in range(2):  # on one connection
            head = b"POST /v1/models/linear:predict HTTP/1.1\r\nContent-Length: %d\r\n%b\r\n\r\n"
            head %= len(DOCUMENT), offer
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head[:-cut])
            front_end.get("/health")  # so that it comes as two packets
            connection.sendall(head[-cut:] + DOCUMENT)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert good(Answer(response)) == {"predictions": [[1.5, 1.5]]}


@pytest.mark.parametrize(
    "head",
    [
        b"Host: %b.x" % (b"a" * 64),
        b"Host: a..b",
        b"Host: a\r\nContent_Encoding: gzip",
        b"Host: a\r\nContent-Encoding: identity\r\nContent-Encoding: gzip",
    ],
)
def test_either_front_end_takes_odd_heads(front_end, head):
    with socket.create_connection(("127.0.0.1", front_end.port), 60) as connection:
        start = b"POST /v1/models/linear:predict HTTP/1.1\r\nContent-Length: %d\r\n%b\r\n\r\n"
        connection.sendall(start % (len(DOCUMENT), head) + DOCUMENT)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert good(Answer(response)) == {"predictions": [[1.5, 1.5]]}


def test_chunks_that_are_cut_short_are_given_up_and_nothing_else_happens(front_end):
    """What was announced and did not come was read from behind a buffer, and that ended the process."""
    for announced in (b"100000", b"5f5e100"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", front_end.port), 60) as connection:
                connection.sendall(CHUNKED + announced + b"\r\n" + bytes(4000))
                connection.shutdown(socket.SHUT_WR)
                received = b"".join(iter(lambda c=connection: c.recv(2**16), b""))
                assert not received or received.split()[1] in (b"400", b"408"), received
    assert front_end.process.poll() is None and front_end.get("/health").status == 200


@pytest.mark.parametrize(
    "header, before, after",
    [(f"Content-Length: {65 * 2**20}", b"", b""), ("Transfer-Encoding: chunked", b"100000\r\n", b"\r\n")],
)
def test_a_body_that_is_too_large_is_413_whether_it_says_so_or_not(front_end, header, before, after):
    with socket.create_connection(("127.0.0.1", front_end.port), 60) as connection:
        connection.sendall(f"POST /v1/models/picky:predict HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # it has heard enough
            for _ in range(65):
                connection.sendall(before + b" " * 2**20 + after)
        response = http.client.HTTPResponse(connection)
        response.begin()
        error(Answer(response), 413)


def test_a_large_body_that_is_allowed_is_read(front_end):
    assert good(front_end.predict("picky", b'{"instances": [1]' + b" " * 8 * 2**20 + b"}")) == {"predictions": [0.5]}


@pytest.mark.parametrize("kind", [long("flask"), "starlette"])
def test_while_it_starts_all_that_needs_the_graph_is_503_and_a_signal_ends_it(kind):
    with Server(kind, "--workers", "2") as server:
        wait_until(server.is_listening)
        health = server.get("/health")
        assert health.status == 503 and health.json["status"] == "starting"
        assert [worker["state"] for worker in health.json["workers"]] == ["starting"] * 2
        for answer in (
            server.get("/?value=1"),
            server.predict("adder", {"instances": [1]}),
            server.get("/v1/models/adder"),
        ):
            error(answer, 503)
        error(server.get("/nothing"), 404)
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("kind", [long("flask"), "starlette"])
def test_ctrl_c_ends_it_in_order_and_leaves_nothing_however_often_it_comes(kind):
    before = folders()
    with Server(kind, "--workers", "1") as server:
        wait_until(lambda: "gcs_server" in " ".join(family(server.process.pid).values()), what="Ray")
        left = family(server.process.pid)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in server.output(), 60)
        assert server.process.wait(60) == 0
        assert (list(filter(command_of, left)), folders() - before) == ([], set())
        assert "Traceback" not in server.output()


@KINDS
def test_a_port_that_is_taken_is_told_in_one_sentence_before_anything_starts(kind):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(kind, "--port", str(port))
        assert server.process.wait(60) == 1
        sentence = f"error: --host 127.0.0.1 --port {port} cannot be listened on: address already in use"
        assert server.output() == f"ray_tensorflow_{kind}.py: {sentence}\n"


@KINDS
@pytest.mark.parametrize("host", ["a..b", "a" * 70, "no.such.host.invalid"])
def test_a_host_that_there_cannot_be_is_told_in_one_sentence(kind, host):
    server = Server(kind, "--host", host)
    assert server.process.wait(60) == 1
    sentence = f"ray_tensorflow_{kind}.py: error: --host {host} --port "
    assert server.output().startswith(sentence) and server.output().count("\n") == 1


@KINDS
def test_a_model_that_can_never_be_loaded_is_told_in_one_sentence_before_anything_starts(kind):
    server = Server(kind, "--model", "no_such_module:build")
    assert server.process.wait(60) == 1
    assert server.output().startswith(f"ray_tensorflow_{kind}.py: error: --model ")
    assert server.output().count("\n") == 1 and "no_such_module" in server.output()


@pytest.mark.parametrize("kind", ["flask", long("starlette")])
def test_when_nothing_can_be_served_any_more_the_program_ends_with_status_1_and_one_sentence(kind):
    with Server(kind, "--workers", "1", "--checkpoint-dir", "/proc/none") as server:
        assert server.process.wait(60) == 1
        sentence = f"ray_tensorflow_{kind}.py: error: The folder for variables cannot be used: /proc/none: "
        assert sum(line.startswith(sentence) for line in server.output().splitlines()) == 1
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("kind", ["flask", long("starlette")])
def test_when_ray_dies_the_program_ends_with_status_1(kind):
    with Server(kind, "--workers", "1").wait_ready() as server:
        before = family(server.process.pid)
        os.kill(next(pid for pid, command in before.items() if "gcs_server" in command.split()[0]), signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert f"ray_tensorflow_{kind}.py: error: Ray's " in server.output()
        assert "Traceback" not in server.output()
        for pid in filter(command_of, before):  # Ray's agent takes its time
            os.kill(pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["flask", "starlette"])
def test_the_log_says_with_date_and_level_what_happens(kind):
    with Server(kind, "--workers", "2", "--host", "::1", "--model", "example_models:linear") as server:
        log = lambda what: re.findall(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d INFO {what}$", server.output(), re.M)
        wait_until(lambda: log("ready: 2 workers"))
        assert log(rf"http://\[::1\]:{server.port} answers 503 until a worker is ready") and log("starting: 2 workers")
        assert len(log(r"worker \d ready  pid \d+  \d+\.\d s")) == 2
        assert log("model linear: the latest is version 1")
        assert server.stop() in (0, -signal.SIGTERM)
        assert log("stopping") and len(log("ready: 2 workers")) == 1


def test_a_program_that_shows_its_log_itself_gets_our_lines_once():
    program = """
import logging, sys
logging.basicConfig(format="mine: %(message)s", stream=sys.stdout, level=logging.INFO)
from shared_graph.logs import show_log
show_log(); show_log()
logging.getLogger("shared_graph.cluster").info("starting")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("mine: starting\n", "")
    program = program.replace("logging.basicConfig", "dict")
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"[-\d]{10} [:\d]{8} INFO starting\n", done.stderr) and done.stdout == ""


PREFORKING_WSGI_SERVER = """
import os, signal, sys, threading
from wsgiref.simple_server import make_server
from ray_tensorflow_flask import app

assert threading.active_count() == 1
if child := os.fork():
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
server = make_server("127.0.0.1", int(sys.argv[1]), app)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""
OTHER_SERVERS = {
    "flask": ["-c", PREFORKING_WSGI_SERVER.replace("{", "{{").replace("}", "}}"), "{port}"],
    "starlette": ["-m", "uvicorn", "ray_tensorflow_starlette:app", "--port", "{port}"],
}


@pytest.mark.parametrize("kind", ["flask", long("starlette")])
def test_another_server_runs_the_app_from_another_folder_with_options_from_the_environment(kind, tmp_path):
    """That of Flask loads the application and then forks (tensorflow#2448)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ["PYTHONPATH"]]),
        "RAY_TENSORFLOW_WORKERS": "1",
        "RAY_TENSORFLOW_MODEL": "net=example_models:linear",
    }
    command = [sys.executable, *OTHER_SERVERS[kind]]
    with Server(kind, command=command, cwd=tmp_path, env=environment).wait_ready() as server:
        assert good(server.predict("net", {"instances": [[1, 0, 0]]})) == {"predictions": [[1.5, 1.5]]}
        assert [server.add(value) for value in (1, 2, 3)] == [1, 3, 6]
        error(server.get("/nothing"), 404)
        assert len(server.get("/health").json["workers"]) == 1
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
