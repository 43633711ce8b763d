"""More clients than there is room for, clients that go away, and the end of a server that is at work."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import struct
import time

import pytest
from conftest import Server, owned_by_session, wait_until

KINDS = ("flask", "starlette")


@pytest.fixture(scope="module", params=KINDS)
def server(request):
    """A queue of 256, and small batches: it does not serve as fast as 2,000 can ask. No deadline that a slow machine could pass."""
    with owned_by_session():
        server = Server(request.param, "--workers", "1", "--max-batch", "2", "--max-queue", "256", "--timeout-s", "300")
    with server:
        yield server.wait_ready()


def resident_bytes(pid: int, peak: bool = False) -> int:
    with open(f"/proc/{pid}/status") as file:
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+)" if peak else r"^VmRSS:\s+(\d+)", file.read(), re.M)[1])


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


# -- 2,000 at once -----------------------------------------------------------------------------------------------------


async def burst(port: int, clients: int) -> list[bytes]:
    """All connect, then all ask at the same time; the whole answers."""
    connected = await asyncio.gather(*[asyncio.open_connection("127.0.0.1", port) for _ in range(clients)])

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET /?value=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    async with asyncio.timeout(300):
        return await asyncio.gather(*[ask(*streams) for streams in connected])


def test_2000_clients_at_once_are_each_answered_and_a_second_later_all_is_as_before(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    assert server.get("/?value=0").json == {"result": 0}
    before, at_rest = resident_bytes(server.process.pid), threads(server.process.pid)
    answers = asyncio.run(burst(server.port, 2000))
    grown = resident_bytes(server.process.pid, peak=True) - before
    done = 0
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split()[1]
        assert status in (b"200", b"503"), answer
        done += status == b"200"
        if status == b"503":
            assert re.search(rb"\r\ncontent-type: application/json\r\n", head + b"\r\n", re.I), head
            assert re.search(rb"\r\nretry-after: [1-9]", head, re.I), head
            assert json.loads(body)["error"].startswith("Too many requests")
    assert done >= 256
    time.sleep(1)
    assert server.get("/?value=0").json == {"result": done}
    assert server.get("/health").json["waiting"] == 0
    assert grown < 200 * 2**20
    wait_until(lambda: threads(server.process.pid) <= at_rest + 5, 30)


# -- clients that go away ----------------------------------------------------------------------------------------------


def start_request(server, path: str) -> socket.socket:
    """A connection with a request for a path that waits in the "gate" until that exists."""
    connection = socket.create_connection(("127.0.0.1", server.port), 60)
    body = json.dumps({"instances": [path]}).encode()
    connection.sendall(b"POST /v1/models/gate:predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return connection


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def go_away(connection: socket.socket) -> None:
    connection.close()


def crash(connection: socket.socket) -> None:
    """As when the client's machine crashes: a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """Requests run one by one, and four may wait; a deadline that no test waits for."""
    with owned_by_session():
        server = Server(
            request.param, "--workers", "1", "--model", "example_models:gate", "--max-queue", "4", "--max-batch", "1", "--timeout-s", "300")
    with server:
        yield server.wait_ready()


def waiting(server) -> int:
    return server.get("/health").json["waiting"]


def admitted(server) -> int:
    """How many requests have gone to the worker or wait for it."""
    text = server.get("/metrics").body.decode()
    return sum(int(re.search(rf"^ray_tensorflow_{name} (\d+)$", text, re.M)[1]) for name in ("batch_size_sum", "waiting_requests"))


@pytest.mark.parametrize("leave", [go_away, crash])
def test_clients_that_go_away_free_their_places_in_the_queue(small, tmp_path, leave):
    gate, before = str(tmp_path / "open"), admitted(small)
    with contextlib.ExitStack() as stack:
        asking = []
        while waiting(small) < 4:  # the worker is given as much as it takes, and then the queue
            asking.append(stack.enter_context(start_request(small, gate)))
            wait_until(lambda: admitted(small) == before + len(asking))
        assert small.get("/?value=0").status == 503
        for _ in range(3):
            leave(asking.pop())
        wait_until(lambda: waiting(small) == 1)
        asking.append(stack.enter_context(start_request(small, gate)))
        wait_until(lambda: waiting(small) == 2)
        (tmp_path / "open").touch()
        assert {read_answer(connection)[0] for connection in asking} == {200}
    wait_until(lambda: waiting(small) == 0)
    assert small.get("/?value=0").status == 200


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_lets_requests_under_way_finish_and_refuses_new_ones(kind, number, tmp_path):
    """Whoever has not asked yet is not waited for, nor for one that is in the middle of its request; more signals change nothing."""
    gate = str(tmp_path / "open")
    with Server(kind, "--workers", "1", "--model", "example_models:gate", "--timeout-s", "300").wait_ready() as server:
        idle = socket.create_connection(("127.0.0.1", server.port), 60)
        answered_before = socket.create_connection(("127.0.0.1", server.port), 60)
        answered_before.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_answer(answered_before)[0] == 200
        under_way = [start_request(server, gate) for _ in range(8)]
        wait_until(lambda: admitted(server) == 8)
        for _ in range(3):
            server.process.send_signal(number)
            wait_until(lambda: refused(server.port), 10)
        assert server.process.poll() is None
        assert idle.recv(1) == b""
        (tmp_path / "open").touch()
        answers = [read_answer(connection) for connection in under_way]
        assert {status for status, _ in answers} == {200} and {json.loads(body)["predictions"][0] for _, body in answers} == {gate}
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.output()


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_never_finishes_its_body_holds_the_end_up_no_longer_than_the_deadline(kind):
    with Server(kind, "--workers", "1", "--timeout-s", "3").wait_ready() as server:
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(b"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            wait_until(lambda: server.get("/health").status == 200)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
        assert "Traceback" not in server.output()
