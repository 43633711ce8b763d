"""What is left when processes are killed or stopped: each acknowledged add exactly once, and an answer for everyone."""

import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Server, command_of, error, family, folders, long, owned_by_session, processes, wait_until
from test_command import running, with_mounts

from shared_graph.cluster import Cluster
from shared_graph.errors import Error, Unavailable

TIMEOUT_S = 20


def workers(server) -> list[dict]:
    return server.get("/health").json["workers"]


def kill(actor: dict) -> None:
    os.kill(actor["pid"], signal.SIGKILL)


def kill_one(server, kind: str, least: int) -> dict:
    """One of the workers or parameter servers that are ready, as soon as there are so many. Not one that was killed
    just now: Ray takes a moment to tell."""

    def ready() -> list[dict] | None:
        found = [actor for actor in server.get("/health").json[kind] if actor["state"] == "ready"]
        found = [actor for actor in found if command_of(actor["pid"])]
        return found if len(found) >= least else None

    kill(killed := random.choice(wait_until(ready, what=f"{kind} to be ready")))
    return killed


class Clients:
    """So many clients, each on a connection of its own, asking without a pause; every answer is noted."""

    def __init__(self, server, count: int, ask=lambda client, number: ("GET", "/?value=1", None)):
        self.server, self.ask, self.stopped = server, ask, threading.Event()
        self.answers: list[tuple] = []  # client, number, status, document, seconds
        self.pool = ThreadPoolExecutor(count)
        self.running = [self.pool.submit(self._run, client) for client in range(count)]

    def _run(self, client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT_S + 30)
        for number in itertools.count():
            if self.stopped.is_set():
                return connection.close()
            started, status, document = time.monotonic(), 502, {}
            try:
                connection.request(*self.ask(client, number))
                response = connection.getresponse()
                status, document = response.status, json.loads(response.read())
            except (OSError, http.client.HTTPException):
                self.server.process.wait(10)  # which was killed: as if it had said 502
                return
            finally:
                self.answers.append((client, number, status, document, time.monotonic() - started))

    def stop(self) -> list[tuple]:
        self.stopped.set()
        for client in self.running:
            client.result(TIMEOUT_S + 60)
        self.pool.shutdown()
        return self.answers


def assert_counted_once(adds: list[tuple], total: float) -> None:
    """Adds of one, of which some failed, made this sum of what was 0: none is lost, and none counted twice."""
    assert {status for _, _, status, _, _ in adds} <= {200, 502, 503, 504}
    results = [document["result"] for _, _, status, document, _ in adds if status == 200]
    doubtful = sum(status in (502, 504) for _, _, status, _, _ in adds)  # a 503 has changed nothing
    assert len(results) <= total <= len(results) + doubtful
    assert len(set(results)) == len(results)


# -- processes are killed, and stopped ---------------------------------------------------------------------------------


def row_of(client: int, number: int) -> list[int]:
    return [client, number % 1000, 1]


def predict(client: int, number: int) -> tuple[str, str, str]:
    return "POST", "/v1/models/linear:predict", json.dumps({"instances": [row_of(client, number)]})


@pytest.fixture(scope="module")
def server():
    """With three workers, for all tests of this section one after the other."""
    options = ["--workers", "3", "--max-batch", "8", "--timeout-s", str(TIMEOUT_S), "--model", "example_models:linear"]
    with owned_by_session():
        server = Server("starlette", *options)
    with server:
        yield server.wait_ready(workers=3)


@pytest.fixture(scope="module", params=[1, long(6)], ids=["once", "often"])
def killed(request, server):
    """What clients were answered while processes were killed: adds and what they came to, predictions, and those that
    were answered before anything but a worker was killed."""
    before = server.add(0)
    adds, predictions, only_a_worker = Clients(server, 32), Clients(server, 8, predict), []
    for _ in range(request.param):
        for kind, least in (("workers", 2), ("parameter_servers", 1), ("workers", 2)):
            killed = kill_one(server, kind, least)
            answered = len(adds.answers)
            wait_until(lambda: len(adds.answers) > answered + 100, what="adds to go on")
            if not only_a_worker:
                back = lambda: workers(server)[killed["index"]].get("pid", killed["pid"]) != killed["pid"]
                wait_until(back)
                only_a_worker = list(predictions.answers)
    added, predicted = adds.stop(), predictions.stop()
    server.wait_ready(workers=3)
    return added, server.add(0) - before, predicted, only_a_worker


def test_no_acknowledged_add_is_lost_or_counted_twice_and_no_answer_is_late_whatever_is_killed(killed):
    added, total, predicted, _ = killed
    assert_counted_once(added, total)
    assert sum(status == 200 for _, _, status, _, _ in added) > 100
    assert max(seconds for *_, seconds in added + predicted) < TIMEOUT_S + 1.5


def test_no_prediction_fails_because_a_worker_dies_and_none_is_wrong_whatever_is_killed(killed):
    *_, predicted, only_a_worker = killed
    assert len(only_a_worker) > 100 and {status for _, _, status, _, _ in only_a_worker} == {200}
    assert {status for _, _, status, _, _ in predicted} <= {200, 502, 503, 504}
    for client, number, status, document, _ in predicted:
        a, b, c = row_of(client, number)
        assert status != 200 or document == {"predictions": [[a + 3 * b + 5 * c + 0.5, 2 * a + 4 * b + 6 * c - 0.5]]}


def test_a_worker_that_stops_answering_is_replaced_while_requests_go_on_and_nothing_is_counted_twice_after_it_wakes(
    server,
):
    stopped, before = workers(server)[0], server.add(0)
    clients = Clients(server, 64)  # more than a worker is sent at once
    wait_until(lambda: len(clients.answers) > 100)
    os.kill(stopped["pid"], signal.SIGSTOP)
    wait_until(lambda: workers(server)[0]["state"] == "hung", 30)
    answered = len(clients.answers)
    wait_until(lambda: len(clients.answers) > answered + 300, 30, "requests to go on")
    wait_until(lambda: workers(server)[0]["restarts"] == stopped["restarts"] + 1, 60)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped["pid"], signal.SIGCONT)
    server.wait_ready(workers=3)
    assert workers(server)[0]["pid"] != stopped["pid"]
    assert_counted_once(clients.stop(), server.add(0) - before)


def test_a_worker_that_was_only_slow_to_answer_takes_its_turn_again(cluster):
    worker, before = cluster.health()["workers"][1], cluster.add(0)
    os.kill(worker["pid"], signal.SIGSTOP)
    wait_until(lambda: cluster.health()["workers"][1]["state"] == "hung", 30)
    os.kill(worker["pid"], signal.SIGCONT)
    wait_until(lambda: cluster.health()["workers"][1]["state"] == "ready", 30)
    assert [cluster.add(1, worker=1), cluster.add(1, worker=0)] == [before + 1, before + 2]
    assert cluster.health()["workers"][1]["pid"] == worker["pid"]


@pytest.mark.long
def test_a_parameter_server_that_stops_answering_is_replaced():
    with Cluster(workers=1) as cluster:
        assert cluster.add(5) == 5
        os.kill(cluster.health()["parameter_servers"][0]["pid"], signal.SIGSTOP)
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"] == 1)
        assert cluster.add(2) == 7


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_stops_the_start_with_a_sentence_that_names_the_file(tmp_path):
    """As one that is damaged does: test_shared."""
    path = str(tmp_path / "counter.1.npz")
    np.savez(path, **{"variables/w": np.zeros(3)})
    with pytest.raises(Error, match=path):
        Cluster(workers=1, checkpoint_dir=str(tmp_path), model="example_models:counter").start()


def kill_and_see_all_end(process: subprocess.Popen, agents_too: bool) -> None:
    """Ray's two agents take a minute, in which they try to tell the GCS, which is gone too
    (ray/_private/process_watcher.py): they are ended here unless they are to be waited for."""
    before = family(process.pid)
    for name in ("gcs_server", "raylet", "Agent", "ray::ParameterServer", "ray::Worker"):
        assert name in " ".join(before.values())
    process.kill()
    process.wait()

    def left(but: str = "none") -> list[int]:
        return [pid for pid in before if command_of(pid) and but not in before[pid]]

    wait_until(lambda: not (left() if agents_too else left(but="Agent")), 120, "all to end")
    for pid in left():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_command_that_is_killed_while_workers_start_leaves_nothing_running():
    with running("--workers", "4") as run:
        wait_until(lambda: "worker 0 ready" in run.read("stderr"), what="worker 0")
        kill_and_see_all_end(run.process, agents_too=True)
        assert not processes(run.owner)


def test_a_front_end_that_is_killed_leaves_nothing_running_and_with_a_checkpoint_folder_all_goes_on_with_the_next_start(
    tmp_path,
):
    """Then the parameter server crashes, then there is a clean stop: the sum and changed variables come back."""
    options, before = {"workers": 1, "checkpoint_dir": str(tmp_path), "model": "example_models:counter"}, folders()
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    def count(cluster) -> int:
        return cluster.predict({"x": [0]}, "counter", "count")["count"].item()

    with Server("flask", *arguments) as server:
        server.wait_ready()
        assert server.add(1.5) == 1.5
        kill_and_see_all_end(server.process, agents_too=False)
    for folder in folders() - before:  # its logs and sockets stay
        shutil.rmtree(folder)
    with Cluster(**options) as cluster:
        assert cluster.add(1) == 2.5
        with pytest.raises(Unavailable, match=f"{tmp_path} is in use by another program"):
            Cluster(**options).start()
        cluster.set_weights("counter", {"count": np.int64(100)})
        kill(cluster.health()["parameter_servers"][0])
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"])
        assert [count(cluster) for _ in range(3)] == [101, 102, 103] and cluster.add(1) == 3.5
    with Cluster(**options) as cluster:
        assert count(cluster) == 104 and cluster.add(1) == 4.5


def test_on_a_full_disk_adds_are_refused_and_served_again_when_there_is_room(tmp_path):
    before = with_mounts(f"mount -t tmpfs -o size=256k none {tmp_path}")
    with Server("starlette", "--workers", "1", "--checkpoint-dir", str(tmp_path), before=before) as server:
        server.wait_ready()
        assert server.add(1) == 1
        filler = f"/proc/{server.process.pid}/root{tmp_path}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(256))
        error(server.get("/?value=1"), 503, "No space left")
        os.remove(filler)
        assert server.add(1) == 2


# -- 100,000 requests --------------------------------------------------------------------------------------------------


def add_or_predict(client: int, number: int) -> tuple:
    """Adds of 1 and predictions in turn."""
    if number % 2:
        return "GET", "/?value=1", None
    return "POST", "/v1/models/linear:predict", json.dumps({"instances": [[number, 0, 0]]})


class Held(NamedTuple):
    """What a process holds."""

    name: str
    resident_kb: int
    threads: int
    files: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file.read().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(status["Name"], int(status["VmRSS"].split()[0]), int(status["Threads"]), files)

    def has_grown(self, before: "Held") -> bool:
        return (
            self.resident_kb > 1.05 * before.resident_kb + 5000
            or self.threads > before.threads + 4  # gRPC's pools come and go
            or self.files > before.files
        )


@pytest.mark.long
def test_after_20000_requests_80000_more_take_no_more_memory_threads_or_files():
    with Server("starlette", "--workers", "2", "--model", "example_models:linear").wait_ready(workers=2) as server:
        adds = 0
        for count in (20_000, 80_000):
            before = {pid: Held.by(pid) for pid in family(server.process.pid)}
            clients = Clients(server, 64, add_or_predict)
            wait_until(lambda: len(clients.answers) >= count, 500)
            answers = clients.stop()
            assert {status for _, _, status, _, _ in answers} == {200}
            adds += sum(number % 2 for _, number, *_ in answers)
        assert len(before) >= 6  # the front end, gcs, raylet, the parameter server, two workers
        assert server.add(0) == adds
        grown = {}

        def is_settled() -> bool:
            grown.clear()
            grown.update({pid: (was, now) for pid, was in before.items() if (now := Held.by(pid)).has_grown(was)})
            return not grown

        wait_until(is_settled, 30, grown)
