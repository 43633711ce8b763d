"""Many front ends on one graph, by ``--address``, and many machines, played by Ray nodes on this one."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPOSITORY, Server, folders, wait_until
from test_survival import Clients, workers

NODES = """
import sys
from ray.cluster_utils import Cluster as Nodes

def main():
    nodes, others = Nodes(), []
    try:
        nodes.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
        print(nodes.address, flush=True)
        for command in sys.stdin:
            if command == "add\\n":
                others.append(nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20))
            else:
                nodes.remove_node(others.pop(), allow_graceful=False)
            print("done", flush=True)
    finally:
        nodes.shutdown()

main()
"""

# a pre-forking server: one socket, bound before the fork, and processes that all accept from it
PRE_FORK = """
import contextlib, os, signal, socketserver, sys, threading
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from ray_tensorflow_flask import app

class Quiet(WSGIRequestHandler):
    def log_request(self, *_):
        pass

class Server(socketserver.ThreadingMixIn, WSGIServer):
    request_queue_size = 128

server = Server(("127.0.0.1", int(sys.argv[1])), Quiet)
server.set_app(app)
server.socket.setblocking(False)  # another process may accept first
children = []
for _ in range(2):
    if not (child := os.fork()):
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever(0.1)
        sys.exit()
    children.append(child)

def end(*_):
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

signal.signal(signal.SIGTERM, end)
for child in children:
    os.waitpid(child, 0)
"""


class Nodes:
    """A Ray cluster whose nodes come and go."""

    def __init__(self, folder):
        script = folder / "nodes.py"
        script.write_text(NODES)
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.address = self.read(lambda line: ":" in line)

    def read(self, wanted) -> str:
        while not wanted(line := self.process.stdout.readline().strip()):
            assert line or self.process.poll() is None
        return line

    def tell(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.read(lambda line: line == "done")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def environment():
    """For processes that find the modules and may join the Ray cluster."""
    path = os.pathsep.join([REPOSITORY, os.path.dirname(__file__)])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"PYTHONPATH": path} | token).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def nodes(environment, tmp_path):
    before = folders()
    nodes = Nodes(tmp_path)
    nodes.tell("add")
    yield nodes
    wait_until(lambda: folders() == before, 30, "the actors to end after the last front end")
    nodes.close()


@pytest.fixture
def many(tmp_path, monkeypatch, environment):
    """``many(**options)``: two servers of two processes each, of either kind, with options from the environment."""
    (tmp_path / "prefork.py").write_text(PRE_FORK)

    @contextlib.contextmanager
    def start(**options):
        for name, value in options.items():
            monkeypatch.setenv(f"RAY_TENSORFLOW_{name.upper()}", value)
        uvicorn = [sys.executable, "-m", "uvicorn", "ray_tensorflow_starlette:app", "--workers", "2", "--port", "{port}"]
        flask = [sys.executable, str(tmp_path / "prefork.py"), "{port}"]
        with Server("starlette", command=uvicorn) as starlette, Server("flask", command=flask) as flask:
            yield starlette, flask

    return start


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def ask_each_process(server, path: str, processes: int = 2):
    """The answers of several processes on one port, which take connections as they come."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: server.get(path), range(20 * processes)))


@pytest.mark.long
def test_many_front_ends_of_both_kinds_share_one_graph_and_do_not_notice_when_one_is_killed(nodes, many):
    adds = 20_000  # through each server, by two processes
    with many(address=nodes.address, workers="2", model="example_models:linear") as (starlette, flask):
        for server in (starlette, flask):
            server.wait_ready(workers=2)
            wait_until(lambda: all(answer.status == 200 for answer in ask_each_process(server, "/health")), 60)
        before = {tuple(sorted(worker["pid"] for worker in answer.json["workers"]))
                  for server in (starlette, flask) for answer in ask_each_process(server, "/health")}
        assert len(before) == 1  # the same workers for all

        def add(numbered):
            server, _ = numbered
            answer = server.get("/?value=1")
            assert answer.status == 200, answer
            return answer.json["result"]

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(add, [(server, i) for i in range(adds) for server in (starlette, flask)]))
        assert sorted(results) == list(range(1, 2 * adds + 1))

        os.kill(children(flask.process.pid)[0], signal.SIGKILL)
        clients = Clients(starlette, lambda client, asked: ("GET", "/?value=1", None, 1), 4)
        end = time.monotonic() + 10  # until long after the others know that it is gone
        wait_until(lambda: time.monotonic() > end, 20)
        answers = clients.stop()
        assert [answer for answer in answers if answer[1] != 200] == []
        assert flask.get("/?value=0").json == {"result": 2 * adds + len(answers)} == starlette.get("/?value=0").json
        after = workers(starlette)
        assert {tuple(sorted(worker["pid"] for worker in after))} == before and not any(w["restarts"] for w in after)


def test_a_front_end_that_wants_another_graph_is_told_so(nodes):
    with Server("starlette", "--address", nodes.address, "--workers", "1") as server:
        server.wait_ready()
        command = [sys.executable, os.path.join(REPOSITORY, "ray_tensorflow.py"), "--address", nodes.address, "--workers", "3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "ray_tensorflow.py: error: --workers 3: the shared cluster runs with 1"


@pytest.mark.long
def test_workers_on_a_node_that_is_lost_come_back_on_another_and_on_a_new_one(nodes):
    with Server("starlette", "--address", nodes.address, "--workers", "4", "--timeout-s", "20") as server:
        server.wait_ready(workers=4)
        used = [worker["node"] for worker in workers(server)]
        assert sorted(used.count(node) for node in set(used)) == [2, 2]
        home = server.get("/health").json["parameter_servers"][0]["node"]
        clients = Clients(server, lambda client, asked: ("GET", "/?value=1", None, 1), 16)
        wait_until(lambda: len(clients.answers) > 100)
        nodes.tell("remove")
        wait_until(lambda: [w["node"] for w in workers(server) if w["state"] == "ready"] == [home] * 4, what="workers at home")
        nodes.tell("add")
        moved = workers(server)[0]
        os.kill(moved["pid"], signal.SIGKILL)
        wait_until(lambda: (now := workers(server)[0])["state"] == "ready" and now["pid"] != moved["pid"])
        assert workers(server)[0]["node"] not in used
        answers = clients.stop()
        total = server.get("/?value=0").json["result"]
    assert {status for _, status, _, _ in answers} <= {200, 502, 503, 504}
    acknowledged = [document["result"] for _, status, document, _ in answers if status == 200]
    assert len(set(acknowledged)) == len(acknowledged)
    assert len(acknowledged) <= total <= len(acknowledged) + sum(status == 502 for _, status, _, _ in answers)


def test_without_an_address_a_second_process_of_a_server_says_in_one_sentence_what_to_do(many):
    with many(workers="1") as servers:
        for server in servers:
            wait_until(server.is_listening)
            healths = wait_until(lambda: {"ready", "failed"} == set(
                (found := {answer.json["status"]: answer for answer in ask_each_process(server, "/health")})) and found)
            refused = healths["failed"]
            assert refused.status == 503 and "RAY_TENSORFLOW_ADDRESS=auto" in refused.json["error"]
            answers = ask_each_process(server, "/?value=1")
            assert {answer.status for answer in answers} == {200, 503}
            assert {answer.json["error"] for answer in answers if answer.status == 503} == {refused.json["error"]}


@pytest.mark.long
def test_servers_on_ports_of_their_own_do_not_count_as_one():
    command = [sys.executable, "-m", "uvicorn", "ray_tensorflow_starlette:app", "--port", "{port}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", REPOSITORY)
        patch.setenv("RAY_TENSORFLOW_WORKERS", "1")
        with Server("starlette", command=command) as one, Server("starlette", command=command) as other:
            assert one.wait_ready().get("/?value=1").json == other.wait_ready().get("/?value=1").json == {"result": 1}
