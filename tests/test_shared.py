"""Many front ends on one graph, by ``--address``, and many machines, played by Ray nodes on this one."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys

import pytest
from conftest import OWNER, REPOSITORY, Server, processes, wait_until
from test_survival import Clients, assert_counted_once, workers

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


class Nodes:
    """A Ray cluster whose nodes come and go, beside the first one."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True)
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
def nodes():
    """With one node for all tests of this file; who joins it needs a token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    paths = {"PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ["PYTHONPATH"]])}  # where actors find the modules
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (token | paths).items():
            patch.setenv(name, value)
        with pytest.MonkeyPatch.context() as owned:
            owned.setenv(OWNER, "nodes")
            nodes = Nodes()
        yield nodes
        nodes.close()
        wait_until(lambda: not processes("nodes"), 90, "Ray to end")


def actors() -> list[str]:
    kinds = ("ray::ParameterServer", "ray::Worker")
    return [command for command in processes("nodes").values() if command.startswith(kinds)]


@pytest.fixture
def address(nodes):
    """Of the Ray cluster, on which nothing is left by the time that a test has ended."""
    yield nodes.address
    wait_until(lambda: not actors(), 60, "the actors to end after the last front end")


def command(*options: str) -> subprocess.CompletedProcess:
    """Run ``ray_tensorflow.py``."""
    script = os.path.join(REPOSITORY, "ray_tensorflow.py")
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=180)


@pytest.mark.long
def test_many_front_ends_of_both_kinds_share_one_graph_and_do_not_notice_when_one_is_killed(address):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(kind, "--address", address, "--workers", "2"))
                   for kind in ("starlette", "starlette", "flask", "flask")]
        for server in servers:
            server.wait_ready(workers=2)
        before = {tuple(worker["pid"] for worker in workers(server)) for server in servers}
        assert len(before) == 1  # the same workers for all
        killed, *others = clients = [Clients(server, 8) for server in servers]
        wait_until(lambda: all(len(client.answers) > 1000 for client in clients))
        killed.server.process.kill()
        lost = killed.stop()
        wait_until(lambda: sum(len(client.answers) for client in others) > 20_000, what="the others to go on")
        answers = [answer for client in others for answer in client.stop()]
        assert {status for _, _, status, _, _ in answers} == {200}
        totals = {server.add(0) for server in servers[1:]}
        assert len(totals) == 1
        assert_counted_once(answers + lost, totals.pop())
        assert {tuple(worker["pid"] for worker in workers(server)) for server in servers[1:]} == before


def test_a_front_end_that_wants_other_options_is_told_so(address):
    with Server("starlette", "--address", address, "--workers", "1") as server:
        server.wait_ready()
        done = command("--address", address, "--workers", "3")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "ray_tensorflow.py: error: --workers 3: the shared cluster runs with 1"
        assert server.add() == 1


def test_nothing_is_left_of_a_front_end_that_is_killed_while_it_starts(address):
    with Server("starlette", "--address", address, "--workers", "1") as server:
        wait_until(actors)
        server.process.kill()


def test_nothing_is_left_of_a_start_that_fails(address, tmp_path):
    (tmp_path / "adder.sum").write_bytes(b"???")
    done = command("--address", address, "--workers", "1", "--checkpoint-dir", str(tmp_path))
    assert done.returncode == 1 and str(tmp_path / "adder.sum") in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_workers_on_a_node_that_is_lost_come_back_on_another_and_on_a_new_one(nodes, address):
    nodes.tell("add")
    with Server("starlette", "--address", address, "--workers", "4", "--timeout-s", "20") as server:
        server.wait_ready(workers=4)
        used = [worker["node"] for worker in workers(server)]
        assert sorted(used.count(node) for node in set(used)) == [2, 2]
        home = server.get("/health").json["parameter_servers"][0]["node"]
        clients = Clients(server, 16)
        wait_until(lambda: len(clients.answers) > 100)
        nodes.tell("remove")
        wait_until(lambda: [worker.get("node") for worker in workers(server)] == [home] * 4, what="workers at home")
        nodes.tell("add")
        moved = workers(server)[0]
        os.kill(moved["pid"], signal.SIGKILL)
        wait_until(lambda: (now := workers(server)[0])["state"] == "ready" and now["pid"] != moved["pid"])
        assert workers(server)[0]["node"] not in used
        assert_counted_once(clients.stop(), server.add(0))
    nodes.tell("remove")
