"""More clients than there is room for, clients that never finish, and the end of a server that is at work."""

import asyncio
import contextlib
import json
import resource
import select
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import Server, good, long, owned_by_session, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from shared_graph.cluster import Cluster
from shared_graph.errors import DeadlineExceeded

KINDS = pytest.mark.parametrize("kind", ["flask", "starlette"])


async def burst(port: int, clients: int) -> list[bytes]:
    """All connect, then all ask at the same time; the whole answers."""
    connected = await asyncio.gather(*[asyncio.open_connection("127.0.0.1", port) for _ in range(clients)])

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET /?value=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    async with asyncio.timeout(240):
        return await asyncio.gather(*[ask(*streams) for streams in connected])


def test_2000_clients_at_once_are_each_answered_and_what_was_refused_changed_nothing(front_end):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    before, done = front_end.add(0), 0
    for answer in asyncio.run(burst(front_end.port, 2000)):
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split()[1]
        assert status in (b"200", b"503"), answer
        done += status == b"200"
        if status == b"503":
            assert json.loads(body)["error"].startswith("Too many") and b"\r\nretry-after: 1" in head.lower()
    assert done >= 500
    assert front_end.add(0) == before + done
    wait_until(lambda: front_end.get("/health").json["waiting"] == 0)


@pytest.fixture(scope="module")
def impatient():
    """A cluster of one worker in which deadlines are short."""
    with owned_by_session():
        models = [f"example_models:{name}" for name in ("gate", "spinning", "napping")]
        cluster = Cluster(workers=1, timeout_s=2, model=models).start()
    yield cluster
    cluster.close()


def test_after_requests_have_expired_in_a_worker_the_next_ones_are_served(impatient, tmp_path, clients):
    def ask(name: str):
        try:
            return impatient.predict([str(tmp_path / name)], "gate")["path"].tolist()
        except DeadlineExceeded:
            return None

    (tmp_path / "open").touch()
    assert clients(20, ask, ["shut"] * 20) == [None] * 20
    (tmp_path / "shut").touch()
    wait_until(lambda: impatient.health()["workers"][0]["in_flight"] == 0)
    assert clients(20, ask, ["open"] * 20) == [[str(tmp_path / "open").encode()]] * 20


def test_requests_past_their_deadline_cost_no_add_beside_them(impatient, clients):
    """Such a run made a worker look for another parameter server: 10,000 adds a second became 1,483."""
    before, added = impatient.health()["workers"][0], impatient.add(0)

    def nap(_) -> bool:
        with pytest.raises(DeadlineExceeded):
            impatient.predict([2.5], "napping")
        return True

    with ThreadPoolExecutor(1) as pool:
        napping = pool.submit(clients, 4, nap, range(4))
        while not napping.done():
            added += 1
            assert impatient.add(1) == added
        assert napping.result() == [True] * 4
    wait_until(lambda: impatient.health()["workers"][0] == before, 30)


def test_the_deadline_of_a_batch_of_a_map_counts_from_when_it_is_sent_and_no_other_runs_within_it(impatient):
    results = impatient.map([[1.2]] * 3, "napping")
    assert [result["y"].item() for result in results] == [np.float32(1.2)] * 3


def run_endlessly(cluster, model: str) -> None:
    with pytest.raises(DeadlineExceeded):
        cluster.predict([12345.0], model)


def test_a_run_that_never_ends_is_ended_and_told_by_health_and_all_others_are_served(impatient):
    before, added = impatient.health()["workers"][0], impatient.add(0)
    run_endlessly(impatient, "spinning")

    def is_told() -> bool:
        nonlocal added
        added += 1
        assert impatient.add(1) == added
        trouble = impatient.health()["workers"][0]["trouble"]
        return trouble == "a run of model spinning version 1 has not ended at its deadline"

    wait_until(is_told, 30)
    assert impatient.predict([1.0], "spinning")["y"] == [1]
    wait_until(lambda: impatient.health()["workers"][0] == before, 30)


@pytest.mark.long
@pytest.mark.parametrize("placement", ["shared", "mirrored"])
def test_a_run_that_nobody_can_end_is_told_by_health_and_ends_its_worker_and_all_others_are_served(placement):
    models = ["example_models:asleep", "example_models:linear"]
    with Cluster(workers=2, timeout_s=3, placement=placement, model=models).start(workers=2) as cluster:
        run_endlessly(cluster, "asleep")
        troubles, added = set(), 0

        def is_replaced() -> bool:
            nonlocal added
            workers = cluster.health()["workers"]
            troubles.update(worker.get("trouble") for worker in workers)
            sound = [worker["index"] for worker in workers if worker["state"] == "ready" and not worker["trouble"]]
            added += 1  # where an add cannot be lost with the worker
            assert cluster.add(1, worker=None if len(sound) == 2 else sound[0]) == added
            assert cluster.predict([2.0], "asleep")["y"] == [2]
            assert cluster.predict(np.ones((1, 3)), "linear")["y"].tolist() == [[9.5, 11.5]]
            return len(sound) == 2 and sum(worker["restarts"] for worker in workers) == 1

        wait_until(is_replaced, 60)
        assert troubles == {None, "a run of model asleep version 1 has not ended at its deadline"}


def admitted(server) -> int:
    """How many requests have gone to the worker or wait for it."""
    health = server.get("/health").json
    return health["waiting"] + health["workers"][0]["in_flight"]


@pytest.mark.parametrize("kind", ["flask", long("starlette")])
def test_a_signal_lets_requests_under_way_finish_and_refuses_new_ones(kind, tmp_path):
    gate = tmp_path / "open"
    options = ["--workers", "1", "--model", "example_models:gate", "--timeout-s", "300"]
    with Server(kind, *options).wait_ready() as server, ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(server.predict, "gate", {"instances": [str(gate)]}) for _ in range(8)]
        wait_until(lambda: admitted(server) == 8)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_listening(), what="new connections to be refused")
        assert server.process.poll() is None
        gate.touch()
        assert [good(future.result())["predictions"] for future in under_way] == [[str(gate)]] * 8
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


def test_a_signal_lets_what_is_under_way_on_a_websocket_finish(tmp_path):
    gate = tmp_path / "open"
    with Server("starlette", "--workers", "1", "--model", "example_models:gate").wait_ready() as server:
        with connect(f"ws://127.0.0.1:{server.port}/ws") as ws:
            for number in range(3):
                ws.send(json.dumps({"id": number, "model": "gate", "instances": [str(gate)]}))
            wait_until(lambda: admitted(server) == 3)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.is_listening(), what="new connections to be refused")
            gate.touch()
            answers = [json.loads(ws.recv(timeout=60)) for _ in range(3)]
            assert sorted(answer["id"] for answer in answers) == [0, 1, 2]
            assert {tuple(answer["predictions"]) for answer in answers} == {(str(gate),)}
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=60)
            assert closed.value.rcvd.code == 1012
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("kind", ["flask", long("starlette")])
def test_connections_that_say_nothing_keep_nobody_waiting_and_are_closed_at_the_end(kind):
    with contextlib.ExitStack() as stack, Server(kind, "--workers", "1").wait_ready() as server:

        def connect(begin: bytes, until: contextlib.ExitStack) -> None:
            for _ in range(200):
                connection = until.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
                connection.sendall(begin)

        for said in (b"", b"GET / HTTP/1.1\r\nHost: "):
            connect(said, stack)
            begun = time.monotonic()
            assert server.add(0) == server.add(0)
            assert time.monotonic() - begun < 1.5
        with contextlib.ExitStack() as half_sent:
            connect(b"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{", half_sent)
            begun = time.monotonic()
            assert [server.get(path).status for path in ("/health", "/metrics", "/v1/models/adder")] == [200] * 3
            assert time.monotonic() - begun < 1.5
        begun = time.monotonic()
        assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert time.monotonic() - begun < 15
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("kind", [long("flask"), long("starlette")])
def test_bodies_that_are_still_arriving_count_as_waiting_bytes(kind):
    """Of eight clients that stop after 50 MiB each five at most are let in."""
    with contextlib.ExitStack() as stack, Server(kind, "--workers", "1").wait_ready() as server:
        head = f"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\nContent-Length: {60 * 2**20}\r\n\r\n".encode()
        sent = []

        def begin(_: int) -> None:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
            with contextlib.suppress(OSError):
                connection.sendall(head + b" " * 50 * 2**20)
            sent.append(connection)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(begin, range(8)))
        statuses = []
        wait_until(lambda: statuses.extend(answered(sent)) or len(statuses) >= 3, 30)
        assert set(statuses) == {503} and len(statuses) <= 4
        assert server.add() == 1
        for connection in sent:
            connection.close()
        wait_until(lambda: server.predict("adder", b'{"instances": [1]' + b" " * 60 * 2**20 + b"}").status == 200, 30)


def answered(connections: list[socket.socket]) -> list[int]:
    """The statuses of those answers that have come since the last call."""
    found = []
    for connection in select.select([c for c in connections if c.fileno() >= 0], [], [], 0)[0]:
        with contextlib.suppress(OSError):
            if head := connection.recv(2**16):
                found.append(int(head.split()[1]))
                connection.close()
    return found


@pytest.mark.long
@KINDS
def test_a_client_that_never_finishes_its_body_holds_up_neither_others_nor_the_end(kind):
    with Server(kind, "--workers", "1", "--timeout-s", "3").wait_ready() as server:
        for number in range(2):
            with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
                connection.sendall(b"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
                assert server.add() == number + 1
                if number:
                    server.process.send_signal(signal.SIGTERM)
                received = b"".join(iter(lambda: connection.recv(2**16), b""))  # until it closes the connection
                assert not received or received.split()[1] in (b"400", b"408"), received
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()
