"""Many front ends on one graph, by ``--address``, and many machines, played by Ray nodes on this one."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys

import pytest
from conftest import OWNER, REPOSITORY, Server, good, processes, wait_until
from test_survival import Clients, assert_counted_once, workers

from shared_graph.actors import gpu_share
from shared_graph.supervisor import ENDED

NODES = """
import sys
from ray.cluster_utils import Cluster as Nodes

def main():
    nodes, others, options = Nodes(), [], {"num_cpus": 1, "num_gpus": int(sys.argv[1])}
    try:
        nodes.add_node(include_dashboard=False, object_store_memory=80 * 2**20, **options)
        print(nodes.address, flush=True)
        for command in sys.stdin:
            if command == "add\\n":
                others.append(nodes.add_node(object_store_memory=80 * 2**20, **options))
            else:
                nodes.remove_node(others.pop(), allow_graceful=False)
            print("done", flush=True)
    finally:
        nodes.shutdown()

main()
"""


class Nodes:
    """A Ray cluster whose nodes come and go, beside the first one; who joins it needs a token."""

    def __init__(self, patch: pytest.MonkeyPatch, gpus: int = 0):
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
        paths = {"PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ["PYTHONPATH"]])}  # where actors find the modules
        for name, value in (token | paths).items():
            patch.setenv(name, value)
        self.owner = f"nodes with {gpus} GPUs"
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES, str(gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {OWNER: self.owner},
        )
        self.address = self.read(lambda line: ":" in line)

    def read(self, wanted) -> str:
        while not wanted(line := self.process.stdout.readline().strip()):
            assert line or self.process.poll() is None
        return line

    def tell(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.read(lambda line: line == "done")

    def actors(self) -> list[str]:
        kinds = ("ray::ParameterServer", "ray::Worker")
        return [command for command in processes(self.owner).values() if command.startswith(kinds)]

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        wait_until(lambda: not processes(self.owner), 90, "Ray to end")


@pytest.fixture(scope="module")
def nodes():
    """With one node for all tests of this file but the last."""
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Nodes(patch)) as nodes:
        yield nodes


@pytest.fixture
def address(nodes):
    """Of the Ray cluster, on which nothing is left by the time that a test has ended."""
    yield nodes.address
    wait_until(lambda: not nodes.actors(), 60, "the actors to end after the last front end")


def command(*options: str) -> subprocess.CompletedProcess:
    """Run ``ray_tensorflow.py``."""
    script = os.path.join(REPOSITORY, "ray_tensorflow.py")
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=180)


@pytest.mark.long
def test_many_front_ends_of_both_kinds_share_one_graph_and_do_not_notice_when_one_is_killed(address):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(kind, "--address", address, "--workers", "2"))
            for kind in ("starlette", "starlette", "flask", "flask")
        ]
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


def test_front_ends_that_share_a_graph_change_versions_together(address, folder):
    """A client that goes from one to the other sees no version go back."""
    folder.copy(1)
    options = ["--address", address, "--workers", "2", "--model", f"m={folder.path}"]
    with Server("flask", *options) as one, Server("starlette", *options) as other:
        for server in (one, other):
            server.wait_ready(workers=2)
        seen = []

        def ask() -> int:
            for server in (one, other):
                seen.append(good(server.predict("m", {"instances": [0.0]}))["predictions"][0]["number"])
            return seen[-1]

        for version in (2, 3, 4):
            assert ask() == version - 1
            folder.copy(version)
            wait_until(lambda: ask() == version, 60)
        assert seen == sorted(seen) and set(seen) == {1, 2, 3, 4}


@pytest.mark.long
def test_each_front_end_has_a_deadline_of_its_own(address):
    """Not that of the one which has made the workers."""
    options = ["--address", address, "--workers", "1", "--model", "example_models:napping"]
    with (
        Server("starlette", *options, "--timeout-s", "1") as hasty,
        Server("flask", *options, "--timeout-s", "30") as patient,
    ):
        for server in (hasty, patient):
            server.wait_ready()
        assert hasty.predict("napping", {"instances": [3.0]}).status == 504
        assert good(patient.predict("napping", {"instances": [3.0]}))["predictions"] == [3.0]
        assert (hasty.add(1), patient.add(1)) == (1, 2)


@pytest.mark.long
def test_nothing_is_left_of_a_front_end_that_is_killed_while_it_starts(nodes, address):
    with Server("starlette", "--address", address, "--workers", "1") as server:
        wait_until(nodes.actors)
        server.process.kill()


MAKE_AND_DIE = """
import os, sys
from shared_graph.actors import create_actor
from shared_graph.options import Options
from shared_graph.ray_runtime import ray_runtime

options = Options(address=sys.argv[1], parameter_servers=2)
with ray_runtime(options):
    for index in range(2):
        create_actor(options, "ray_tensorflow", "parameter server", index, "run")
    os._exit(0)
"""


@pytest.mark.long
def test_nothing_is_left_of_actors_that_were_made_and_never_called(nodes, address):
    subprocess.run([sys.executable, "-c", MAKE_AND_DIE, address], check=True, timeout=180)
    wait_until(nodes.actors)


@pytest.mark.long
def test_a_front_end_that_was_away_until_the_shared_cluster_ended_does_not_begin_another_sum(nodes, address):
    with Server("starlette", "--address", address, "--workers", "1").wait_ready() as server:
        assert server.add(5) == 5
        server.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: not nodes.actors(), 60, "the actors to end, since no front end is heard")
        server.process.send_signal(signal.SIGCONT)
        assert server.process.wait(60) == 1
        assert server.output().splitlines()[-1] == f"ray_tensorflow_starlette.py: error: {ENDED}"
        assert "Traceback" not in server.output()


@pytest.mark.long
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
        for _ in range(8):  # on which of two nodes a worker comes back is Ray's to say
            moved = workers(server)[0]
            if moved["node"] not in used:
                break
            os.kill(moved["pid"], signal.SIGKILL)
            wait_until(lambda: (now := workers(server)[0])["state"] == "ready" and now["pid"] != moved["pid"])
        assert workers(server)[0]["node"] not in used
        assert_counted_once(clients.stop(), server.add(0))
    nodes.tell("remove")


def test_a_front_end_that_wants_other_options_is_told_so(nodes, tmp_path):
    """The last of these, which leaves its actors to the end of the nodes."""
    options = "--address", nodes.address, "--checkpoint-dir", str(tmp_path)
    with Server("starlette", *options, "--workers", "1") as server:
        server.wait_ready()
        done = command(*options, "--workers", "3")
        assert done.returncode == 1
        differs = "The shared cluster runs with other options: --workers 3 (it runs with 1)"
        assert done.stderr.splitlines()[-1] == f"ray_tensorflow.py: error: {differs}"
        assert server.add() == 1


# -- GPUs: Ray's logical ones, by what each actor sees -----------------------------------------------------------------


@pytest.mark.parametrize(
    ["gpus", "actors", "share"],
    [(0, 5, 0), (1, 1, 1), (8, 5, 1), (1, 2, 0.5), (2, 5, 0.3333), (1, 3, 0.3333), (4, 5, 0.5)],
)
def test_gpus_are_shared_out_evenly(gpus, actors, share):
    assert gpu_share(gpus, actors) == share


@pytest.mark.long
def test_each_actor_is_pinned_to_its_part_of_a_gpu(monkeypatch, tmp_path):
    """Three workers and the parameter server are two to each GPU."""
    options = "--workers", "3", "--checkpoint-dir", str(tmp_path)
    with (
        contextlib.closing(Nodes(monkeypatch, gpus=2)) as nodes,
        Server("starlette", "--address", nodes.address, *options) as server,
    ):
        server.wait_ready(workers=3)
        health = server.get("/health").json
        actors = health["parameter_servers"] + health["workers"]
        assert sorted(actor["gpus"] for actor in actors) == [[0], [0], [1], [1]]
        assert all(actor["cuda_visible_devices"] == str(actor["gpus"][0]) for actor in actors)
        assert [server.add() for _ in range(3)] == [1, 2, 3]
