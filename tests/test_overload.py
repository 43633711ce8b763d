"""More clients than there is room for, clients that never finish, and the end of a server that is at work."""

import asyncio
import json
import resource
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Server, good, wait_until

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


def test_after_requests_have_expired_in_a_worker_the_next_ones_are_served(tmp_path, clients):
    with Cluster(workers=1, timeout_s=3, model="example_models:gate") as cluster:

        def ask(name: str):
            try:
                return cluster.predict([str(tmp_path / name)], "gate")["path"].tolist()
            except DeadlineExceeded:
                return None

        (tmp_path / "open").touch()
        assert clients(20, ask, ["shut"] * 20) == [None] * 20
        (tmp_path / "shut").touch()
        wait_until(lambda: cluster.health()["workers"][0]["in_flight"] == 0)
        assert clients(20, ask, ["open"] * 20) == [[str(tmp_path / "open").encode()]] * 20


def admitted(server) -> int:
    """How many requests have gone to the worker or wait for it."""
    health = server.get("/health").json
    return health["waiting"] + health["workers"][0]["in_flight"]


@KINDS
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
