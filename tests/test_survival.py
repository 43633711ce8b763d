"""What is left when processes are killed or stopped: no acknowledged add is lost or counted twice, no request is left without an
answer, nothing is silently reset."""

import contextlib
import http.client
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
import ray_tensorflow
from conftest import REPOSITORY, Server, folders, processes, wait_until
from ray_tensorflow import ADDER_SOURCE, Checkpoints, Cluster, ModelError, ModelSource, Unavailable

DEADLINE_S = 20


def workers(server) -> list[dict]:
    return server.get("/health").json["workers"]


def parameter_server(server) -> dict:
    return server.get("/health").json["parameter_servers"][0]


class Clients:
    """So many clients, each on a connection of its own, asking without a pause; every answer is noted."""

    def __init__(self, server, ask, count: int):
        self.server, self.ask, self.stopped = server, ask, threading.Event()
        self.answers: list[tuple] = []  # what was asked, status, document, seconds
        self.pool = ThreadPoolExecutor(count)
        self.running = [self.pool.submit(self._run, client) for client in range(count)]

    def _run(self, client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE_S + 30)
        asked = 0
        while not self.stopped.is_set():
            asked += 1
            method, path, body, what = self.ask(client, asked)
            started = time.monotonic()
            connection.request(method, path, body)
            response = connection.getresponse()
            document = json.loads(response.read())
            self.answers.append((what, response.status, document, time.monotonic() - started))
        connection.close()

    def stop(self) -> list[tuple]:
        self.stopped.set()
        for running in self.running:
            running.result(DEADLINE_S + 60)
        self.pool.shutdown()
        return self.answers


def kept_count(path: str) -> float | None:
    with contextlib.suppress(FileNotFoundError), np.load(path) as file:
        return float(file["variables/count"])


def kill(actor: dict) -> None:
    os.kill(actor["pid"], signal.SIGKILL)


def ready_workers(server) -> list[dict]:
    """As soon as there are two of them."""
    try:
        return wait_until(lambda: len(found := [w for w in workers(server) if w["state"] == "ready"]) > 1 and found, 60)
    except AssertionError:
        raise AssertionError(f"{workers(server)}\n{server.output()}") from None


def kill_one_worker(server) -> None:
    """One that is ready, and not the last one."""
    kill(random.choice(ready_workers(server)))


def kill_parameter_server(server) -> None:
    kill(wait_until(lambda: (found := parameter_server(server))["state"] == "ready" and found, 60, "the parameter server"))


def killing(server, seconds: float, every: float, *ways) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        random.choice(ways)(server)
        time.sleep(every)


@pytest.mark.long
def test_no_acknowledged_add_is_lost_or_counted_twice_and_no_answer_is_late_whatever_is_killed():
    """32 clients that add and 8 that predict, for 60 s in each phase: a worker is killed every 5 s, then the parameter
    server every 15 s, then either. No prediction fails because a worker dies."""

    def adding(client, asked):
        return "GET", "/?value=1", None, 1

    def predicting(client, asked):
        row = [client, asked % 1000, 1]
        return "POST", "/v1/models/linear:predict", json.dumps({"instances": [row]}), row

    random.seed(4)
    with Server("starlette", "--workers", "3", "--timeout-s", str(DEADLINE_S), "--model", "example_models:linear") as server:
        server.wait_ready(workers=3)
        adds, predictions = Clients(server, adding, 32), Clients(server, predicting, 8)
        killing(server, 60, 5, kill_one_worker)
        predicted = len(predictions.answers)
        killing(server, 60, 15, kill_parameter_server)
        killing(server, 60, 5, kill_one_worker, kill_parameter_server)
        added, predicted_all = adds.stop(), predictions.stop()
        server.wait_ready(workers=3)
        total = server.get("/?value=0").json["result"]

    statuses = [status for _, status, _, _ in added + predicted_all]
    assert set(statuses) <= {200, 502, 503, 504}
    assert max(seconds for *_, seconds in added + predicted_all) < DEADLINE_S + 1
    acknowledged = [document["result"] for _, status, document, _ in added if status == 200]
    doubtful = sum(status == 502 for _, status, _, _ in added)
    assert len(acknowledged) <= total <= len(acknowledged) + doubtful and len(acknowledged) > 1000
    assert len(set(acknowledged)) == len(acknowledged)
    assert all(status == 200 for _, status, _, _ in predicted_all[:predicted])
    for (a, b, c), status, document, _ in predicted_all:
        assert status != 200 or document == {"predictions": [[a + 3 * b + 5 * c + 0.5, 2 * a + 4 * b + 6 * c - 0.5]]}


def test_a_worker_that_stops_answering_is_replaced_while_requests_go_on_and_nothing_is_counted_twice_after_it_wakes():
    with Server("starlette", "--workers", "2", "--max-batch", "2") as server:
        server.wait_ready(workers=2)
        stopped = workers(server)[0]
        clients = Clients(server, lambda client, asked: ("GET", "/?value=1", None, 1), 8)
        wait_until(lambda: len(clients.answers) > 100)
        os.kill(stopped["pid"], signal.SIGSTOP)
        wait_until(lambda: workers(server)[0]["state"] == "hung", 30)
        answered = len(clients.answers)
        wait_until(lambda: len(clients.answers) > answered + 300 or clients.stopped.is_set(), 4, "requests to go on")
        assert workers(server)[0]["state"] == "hung"  # still: it was the others that answered
        wait_until(lambda: workers(server)[0]["restarts"] == 1, 30)
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped["pid"], signal.SIGCONT)
        server.wait_ready(workers=2)
        assert workers(server)[0]["pid"] != stopped["pid"]
        answers = clients.stop()
        total = server.get("/?value=0").json["result"]
    acknowledged = sum(status == 200 for _, status, _, _ in answers)
    doubtful = sum(status == 502 for _, status, _, _ in answers)
    assert acknowledged + doubtful == len(answers) and acknowledged <= total <= acknowledged + doubtful


def test_a_worker_that_was_only_slow_to_answer_takes_its_turn_again():
    with Cluster(workers=2).start(2) as cluster:
        worker = cluster.health()["workers"][1]
        os.kill(worker["pid"], signal.SIGSTOP)
        wait_until(lambda: cluster.health()["workers"][1]["state"] == "hung", 30)
        os.kill(worker["pid"], signal.SIGCONT)
        wait_until(lambda: cluster.health()["workers"][1]["state"] == "ready", 30)
        assert [cluster.add(1, worker=1), cluster.add(1, worker=0)] == [1, 2]
        assert cluster.health()["workers"][1] == worker


@pytest.mark.long
def test_a_parameter_server_that_stops_answering_is_replaced(monkeypatch):
    monkeypatch.setattr(ray_tensorflow, "HUNG_S", {"worker": 5.0, "parameter server": 3.0})
    with Cluster(workers=1).start() as cluster:
        assert cluster.add(5) == 5
        os.kill(cluster.health()["parameter_servers"][0]["pid"], signal.SIGSTOP)
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"] == 1, 30)
        assert cluster.add(2) == 7


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_sum_goes_on_after_a_stop_and_a_start_with_a_checkpoint_folder(tmp_path):
    folder, left = str(tmp_path / "kept"), folders()
    for kind, signal_number, first in (("starlette", signal.SIGTERM, 1.5), ("flask", signal.SIGKILL, 3.0)):
        with Server(kind, "--workers", "1", "--checkpoint-dir", folder) as server:
            server.wait_ready()
            assert server.get("/?value=1.5").json == {"result": first}
            server.stop(signal_number)
    wait_until(lambda: not processes("test"), 30)
    for killed in folders() - left:
        shutil.rmtree(killed)  # nobody was left to do it
    with Cluster(workers=1, checkpoint_dir=folder).start() as cluster:
        assert cluster.add(1) == 4
        with pytest.raises(Unavailable, match=f"{folder} is in use by another program"):
            Cluster(workers=1, checkpoint_dir=folder).start()
        assert cluster.add(1) == 5


MODEL = ModelSource("m", 1, function="a:b")
WEIGHTS = {"sum": np.float64(0.1) * 3, "a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "text": np.array([b"x\0", b""], object),
           "flag": np.array(True), "none": np.zeros((0, 3), np.int8)}


def test_what_was_kept_comes_back_to_the_last_bit(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), durable=True)
    assert checkpoints.load(MODEL) is None
    checkpoints.keep(MODEL, WEIGHTS)
    back = checkpoints.load(MODEL)
    assert back.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        value = np.asarray(value)
        assert (back[name].dtype, back[name].shape, back[name].tolist()) == (value.dtype, value.shape, value.tolist())


def test_a_sum_that_was_kept_comes_back_to_the_last_bit(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), durable=True)
    assert checkpoints.load(ADDER_SOURCE) is None
    for total in (0.0, 0.1 * 3, -0.0, 2.0**1000):
        checkpoints.keep_sum(total)
        assert checkpoints.load(ADDER_SOURCE)["sum"].tobytes() == np.float64(total).tobytes()


@pytest.mark.parametrize("source", [ADDER_SOURCE, MODEL], ids=str)
def test_a_checkpoint_cut_short_at_any_length_or_with_any_byte_changed_is_refused_by_name(tmp_path, source):
    checkpoints = Checkpoints(str(tmp_path), durable=False)
    checkpoints.keep_sum(42.0)
    checkpoints.keep(MODEL, {"sum": np.float64(42)})
    path = checkpoints.path(source)
    with open(path, "rb") as file:
        whole = file.read()
    for length in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        with pytest.raises(ModelError, match=path):
            checkpoints.load(source)
    for at in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            back = checkpoints.load(source)
        except ModelError as error:
            assert path in str(error)
        else:  # a byte that says nothing, such as the date
            assert list(back.values()) == [42]


@pytest.mark.parametrize("damage", ["cut short", "of another model"])
def test_a_damaged_checkpoint_stops_the_start_with_a_sentence_that_names_the_file(tmp_path, damage):
    if damage == "cut short":
        path = str(tmp_path / "adder.sum")
        with open(path, "wb") as file:
            file.write(bytes(3))
    else:
        path = str(tmp_path / "counter.1.npz")
        np.savez(path, **{"variables/w": np.zeros(3)})
    command = [sys.executable, os.path.join(REPOSITORY, "ray_tensorflow.py"), "--workers", "1", "--checkpoint-dir", str(tmp_path)]
    command += ["--model", "example_models:counter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and path in last and "Traceback" not in done.stderr and "sum" not in done.stdout


def test_the_variables_of_a_model_that_changes_them_come_back_after_a_crash_and_after_a_clean_stop(tmp_path):
    def count(server) -> float:
        return server.predict("counter", {"signature_name": "count", "inputs": [0]}).json["outputs"]

    options = ["--workers", "1", "--checkpoint-dir", str(tmp_path), "--model", "example_models:counter"]
    with Server("starlette", *options) as server:
        server.wait_ready()
        assert [count(server) for _ in range(3)] == [1, 2, 3]
        kept = os.path.join(tmp_path, "counter.1.npz")
        wait_until(lambda: kept_count(kept) == 3, 30, "the count to be kept now and then")
        kill(parameter_server(server))
        wait_until(lambda: parameter_server(server)["restarts"] == 1)
        assert [count(server) for _ in range(2)] == [4, 5]
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    with Cluster(workers=1, checkpoint_dir=str(tmp_path), model="example_models:counter").start() as cluster:
        assert cluster.predict({"x": [0]}, "counter", "count")["count"] == 6
        cluster.set_weights("counter", {"count": np.int64(100)})
        kill(cluster.health()["parameter_servers"][0])
        wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"] == 1)
        assert cluster.predict({"x": [0]}, "counter", "count")["count"] == 101


# A disk of its own for the program, which the machine may not allow
SMALL_DISK = """
set -e
mount -t tmpfs -o size=256k none "$1"
shift
exec "$@"
"""


def test_on_a_full_disk_adds_are_refused_and_served_again_when_there_is_room(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    unshare = ["unshare", "--mount", "--map-root-user", "bash", "-c", SMALL_DISK, "-"]
    if subprocess.run([*unshare, str(folder), "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process mount a disk of its own")
    front_end = os.path.join(REPOSITORY, "ray_tensorflow_starlette.py")
    command = [*unshare, str(folder), sys.executable, front_end, "--port", "{port}", "--workers", "1", "--checkpoint-dir", str(folder)]
    with Server("starlette", command=command) as server:
        server.wait_ready()
        assert server.get("/?value=1").json == {"result": 1.0}
        filler = f"/proc/{server.process.pid}/root{folder}/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(256))
        refused = server.get("/?value=1")
        assert refused.status == 503 and refused.headers["Retry-After"] and "No space left" in refused.json["error"]
        os.remove(filler)
        assert server.get("/?value=1").json == {"result": 2.0}
