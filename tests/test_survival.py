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
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import REPOSITORY, Server, folders, processes, wait_until
from ray_tensorflow import ADDER_SOURCE, Checkpoints, Cluster, Error, ModelError, ModelSource, Unavailable

TIMEOUT_S = 20


def workers(server) -> list[dict]:
    return server.get("/health").json["workers"]


def parameter_server(server) -> dict:
    return server.get("/health").json["parameter_servers"][0]


def kill(actor: dict) -> None:
    os.kill(actor["pid"], signal.SIGKILL)


def kill_a_worker(server, least: int = 2) -> dict:
    """One that is ready, as soon as there are so many."""
    ready = wait_until(
        lambda: len(found := [worker for worker in workers(server) if worker["state"] == "ready"]) >= least and found,
        what="workers to be ready")
    kill(killed := random.choice(ready))
    return killed


def kill_the_parameter_server(server) -> dict:
    kill(killed := wait_until(lambda: (found := parameter_server(server))["state"] == "ready" and found))
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
        for running in self.running:
            running.result(TIMEOUT_S + 60)
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


@pytest.mark.parametrize("seconds", [15, pytest.param(60, marks=pytest.mark.long)])
def test_no_acknowledged_add_is_lost_or_counted_twice_and_no_answer_is_late_whatever_is_killed(seconds):
    options = ["--workers", "3", "--timeout-s", str(TIMEOUT_S), "--model", "example_models:linear"]
    with Server("starlette", *options) as server:
        server.wait_ready(workers=3)
        adds, predictions, end = Clients(server, 32), Clients(server, 8, predict), time.monotonic() + seconds
        while time.monotonic() < end:
            for kill_one in (kill_a_worker, kill_a_worker, kill_the_parameter_server):
                kill_one(server)
                answered = len(adds.answers)
                wait_until(lambda: len(adds.answers) > answered + 100, what="adds to go on")
        added, predicted = adds.stop(), predictions.stop()
        assert_counted_once(added, server.get("/?value=0").json["result"])
    assert sum(status == 200 for _, _, status, _, _ in added) > 100
    assert max(seconds for *_, seconds in added + predicted) < TIMEOUT_S + 1.5
    assert {status for _, _, status, _, _ in predicted} <= {200, 502, 503, 504}
    for client, number, status, document, _ in predicted:
        a, b, c = row_of(client, number)
        assert status != 200 or document == {"predictions": [[a + 3 * b + 5 * c + 0.5, 2 * a + 4 * b + 6 * c - 0.5]]}


def test_no_prediction_fails_because_a_worker_dies():
    with Server("starlette", "--workers", "2", "--model", "example_models:linear") as server:
        server.wait_ready(workers=2)
        clients = Clients(server, 8, predict)
        for _ in range(2):
            wait_until(lambda: len(clients.answers) > 100)
            killed = kill_a_worker(server)
            wait_until(lambda: (now := workers(server)[killed["index"]])["state"] == "ready" and now["restarts"])
            clients.answers.clear()
        assert {status for _, _, status, _, _ in clients.stop()} == {200}


def test_a_worker_that_stops_answering_is_replaced_while_requests_go_on_and_nothing_is_counted_twice_after_it_wakes():
    with Server("starlette", "--workers", "2", "--max-batch", "2") as server:
        server.wait_ready(workers=2)
        stopped = workers(server)[0]
        clients = Clients(server, 8)
        wait_until(lambda: len(clients.answers) > 100)
        os.kill(stopped["pid"], signal.SIGSTOP)
        wait_until(lambda: workers(server)[0]["state"] == "hung", 30)
        answered = len(clients.answers)
        wait_until(lambda: len(clients.answers) > answered + 300, 30, "requests to go on")
        wait_until(lambda: workers(server)[0]["restarts"] == 1, 60)
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped["pid"], signal.SIGCONT)
        server.wait_ready(workers=2)
        assert workers(server)[0]["pid"] != stopped["pid"]
        assert_counted_once(clients.stop(), server.get("/?value=0").json["result"])


def test_a_worker_that_was_only_slow_to_answer_takes_its_turn_again():
    with Cluster(workers=2).start(2) as cluster:
        worker = cluster.health()["workers"][1]
        os.kill(worker["pid"], signal.SIGSTOP)
        wait_until(lambda: cluster.health()["workers"][1]["state"] == "hung", 30)
        os.kill(worker["pid"], signal.SIGCONT)
        wait_until(lambda: cluster.health()["workers"][1]["state"] == "ready", 30)
        assert [cluster.add(1, worker=1), cluster.add(1, worker=0)] == [1, 2]
        assert cluster.health()["workers"][1]["pid"] == worker["pid"]


@pytest.mark.long
def test_a_parameter_server_that_stops_answering_is_replaced():
    with Cluster(workers=1) as cluster:
        assert cluster.add(5) == 5
        os.kill(cluster.health()["parameter_servers"][0]["pid"], signal.SIGSTOP)
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"] == 1)
        assert cluster.add(2) == 7


# -- what is kept ------------------------------------------------------------------------------------------------------

MODEL = ModelSource("m", 1, function="a:b")
WEIGHTS = {
    "sum": np.float64(0.1) * 3, "a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "flag": np.array(True),
    "none": np.zeros((0, 3), np.int8), "text": np.array([[b"x\0", b"", b"long"]], object)}


@pytest.fixture
def checkpoints(tmp_path):
    """Of a run that has begun, in a folder of its own."""
    (tmp_path / ".run-1").touch()
    return Checkpoints(str(tmp_path), run="1", durable=True)


def test_what_was_kept_comes_back_to_the_last_bit(checkpoints):
    assert checkpoints.load(MODEL, is_needed=True) == {}
    checkpoints.keep(MODEL, WEIGHTS)
    back = checkpoints.load(MODEL, is_needed=True)
    assert back.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert (back[name].shape, back[name].tolist()) == (value.shape, value.tolist())
        assert back[name].dtype == value.dtype


def test_a_sum_that_was_kept_comes_back_to_the_last_bit(checkpoints):
    assert checkpoints.load(ADDER_SOURCE, is_needed=True) == {}
    for total in (0.0, 0.1 * 3, -0.0, 2.0**1000):
        checkpoints.keep_sum(total)
        assert checkpoints.load(ADDER_SOURCE, is_needed=True)["sum"].tobytes() == np.float64(total).tobytes()


@pytest.mark.parametrize("source", [ADDER_SOURCE, MODEL], ids=str)
def test_a_checkpoint_cut_short_at_any_length_or_with_any_byte_changed_is_refused_by_name(checkpoints, source):
    checkpoints.keep_sum(42.0)
    checkpoints.keep(MODEL, {"sum": np.float64(42)})
    path = checkpoints.path(source)
    with open(path, "rb") as file:
        whole = file.read()
    for contents in [whole[:length] for length in range(len(whole))]:
        with open(path, "wb") as file:
            file.write(contents)
        with pytest.raises(ModelError, match=path):
            checkpoints.load(source, is_needed=True)
    for at in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            back = checkpoints.load(source, is_needed=True)
        except ModelError as error:
            assert path in str(error)
        else:  # a byte that says nothing, such as the date
            assert list(back.values()) == [42]


def test_files_that_have_gone_are_not_taken_for_a_beginning(tmp_path):
    (tmp_path / ".run-1").touch()
    Checkpoints(str(tmp_path), run="1", durable=True).begin()
    again = Checkpoints(str(tmp_path), run="1", durable=True)
    assert again.load(MODEL, is_needed=False) == {}
    with pytest.raises(ModelError, match=again.path(MODEL)):
        again.load(MODEL, is_needed=True)
    with pytest.raises(Unavailable, match="variables are gone"):
        Checkpoints(str(tmp_path / "elsewhere"), run="1", durable=True)


@pytest.mark.parametrize("damage", ["cut short", "of another model"])
def test_a_damaged_checkpoint_stops_the_start_with_a_sentence_that_names_the_file(tmp_path, damage):
    path = str(tmp_path / ("adder.sum" if damage == "cut short" else "counter.1.npz"))
    with open(path, "wb") as file:
        file.write(bytes(3)) if damage == "cut short" else np.savez(file, **{"variables/w": np.zeros(3)})
    with pytest.raises(Error, match=path):
        Cluster(workers=1, checkpoint_dir=str(tmp_path), model="example_models:counter").start()


def test_the_sum_goes_on_after_a_stop_and_a_start_with_a_checkpoint_folder(tmp_path):
    folder, before = str(tmp_path / "kept"), folders()
    for kind, number, first in (("starlette", signal.SIGTERM, 1.5), ("flask", signal.SIGKILL, 3.0)):
        with Server(kind, "--workers", "1", "--checkpoint-dir", folder) as server:
            server.wait_ready()
            assert server.get("/?value=1.5").json == {"result": first}
            server.stop(number)
    wait_until(lambda: all("Agent" in command for command in processes("test").values()), 30, "Ray to end")
    for pid in processes("test"):  # Ray's two agents, which take a minute to end when their front end was killed
        os.kill(pid, signal.SIGKILL)
    for left in folders() - before:  # Ray's, with its logs
        shutil.rmtree(left)
    with Cluster(workers=1, checkpoint_dir=folder) as cluster:
        assert cluster.add(1) == 4
        with pytest.raises(Unavailable, match=f"{folder} is in use by another program"):
            Cluster(workers=1, checkpoint_dir=folder).start()
        assert cluster.add(1) == 5


def test_the_variables_of_a_model_that_changes_them_come_back_after_a_crash_and_after_a_clean_stop(tmp_path):
    options = {"workers": 1, "checkpoint_dir": str(tmp_path), "model": "example_models:counter"}

    def count(cluster) -> int:
        return cluster.predict({"x": [0]}, "counter", "count")["count"].item()

    def crash(cluster) -> None:
        kill(cluster.health()["parameter_servers"][0])
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"])

    with Cluster(**options) as cluster:
        cluster.set_weights("counter", {"count": np.int64(100)})
        crash(cluster)
        assert [count(cluster) for _ in range(3)] == [101, 102, 103]
    with Cluster(**options) as cluster:
        assert count(cluster) == 104


# A disk of its own for the program, which the machine may not allow
SMALL_DISK = """
set -e
mount -t tmpfs -o size=256k none "$1"
shift
exec "$@"
"""


def test_on_a_full_disk_adds_are_refused_and_served_again_when_there_is_room(tmp_path):
    unshare = ["unshare", "--mount", "--map-root-user", "bash", "-c", SMALL_DISK, "-", str(tmp_path)]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process mount a disk of its own")
    front_end = [sys.executable, os.path.join(REPOSITORY, "ray_tensorflow_starlette.py"), "--port", "{port}"]
    options = ["--workers", "1", "--checkpoint-dir", str(tmp_path)]
    with Server("starlette", *options, command=[*unshare, *front_end]) as server:
        server.wait_ready()
        assert server.get("/?value=1").json == {"result": 1.0}
        filler = f"/proc/{server.process.pid}/root{tmp_path}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(256))
        refused = server.get("/?value=1")
        assert refused.status == 503 and refused.headers["Retry-After"] and "No space left" in refused.json["error"]
        os.remove(filler)
        assert server.get("/?value=1").json == {"result": 2.0}
