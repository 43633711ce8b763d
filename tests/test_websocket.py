"""The WebSocket of the Starlette front end: many requests at once on one socket, each answered by its id."""

import contextlib
import json
import socket
import struct

import pytest
from conftest import wait_until
from websockets.sync.client import connect

pytestmark = pytest.mark.parametrize("front_end", ["starlette"], indirect=True)


@pytest.fixture
def open_socket(front_end):
    """``open_socket()``: one more connection to /ws; all are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(connect(f"ws://127.0.0.1:{front_end.port}/ws", close_timeout=1))


def send(ws, *documents) -> None:
    for document in documents:
        ws.send(document if isinstance(document, (str, bytes)) else json.dumps(document))


def receive(ws, count: int) -> list[dict]:
    return [json.loads(ws.recv(timeout=60)) for _ in range(count)]


def test_each_of_a_thousand_adds_in_flight_on_one_socket_is_answered_once(front_end, open_socket):
    before, ws = front_end.add(0), open_socket()
    send(ws, *({"id": i, "value": 1} for i in range(1000)))
    answers = receive(ws, 1000)
    assert sorted(answer["id"] for answer in answers) == list(range(1000))
    assert sorted(answer["result"] for answer in answers) == [before + i for i in range(1, 1001)]


def test_answers_come_as_they_are_done_and_are_told_apart_by_their_id(open_socket, tmp_path):
    ws, other, file = open_socket(), open_socket(), tmp_path / "open"
    send(ws, {"id": "slow", "model": "gate", "instances": [str(file)]})
    send(ws, *({"id": i, "model": "linear", "instances": [[i, 0, 0]]} for i in range(5)))
    send(other, {"id": 0, "model": "linear", "inputs": {"x": [[7, 0, 0]]}})
    answers = {answer["id"]: answer["predictions"] for answer in receive(ws, 5)}
    assert answers == {i: [[i + 0.5, 2 * i - 0.5]] for i in range(5)}
    assert receive(other, 1) == [{"id": 0, "outputs": [[7.5, 13.5]]}]
    file.touch()
    assert receive(ws, 1) == [{"id": "slow", "predictions": [str(file)]}]


@pytest.mark.parametrize(
    "message, identity, error",
    [
        ("{nope", None, "JSON"),
        (b"\xff\xfe", None, "JSON"),
        ("[]", None, "object"),
        ({}, None, "value"),
        ({"id": [1, {"a": None}]}, [1, {"a": None}], "value"),
        ({"id": "ü", "value": True}, "ü", "value"),
        ('{"id": 3, "value": NaN}', 3, "value"),
        ({"id": 4, "value": 10**400}, 4, "value"),
        ({"id": 5, "model": "nope", "instances": [1]}, 5, "Servable not found for request: Latest(nope)"),
        ({"id": 6, "model": ["linear"], "instances": [1]}, 6, "Servable not found"),
        ({"id": 7, "model": "linear"}, 7, "instances"),
        ({"id": 9, "model": "linear", "instances": [["\ud800"]]}, 9, "instances[0][0]"),
        ({"id": 10, "model": "linear", "instances": [[1, 2]]}, 10, ""),
    ],
)
def test_a_bad_message_gets_an_error_with_its_id_and_the_socket_stays_open(open_socket, message, identity, error):
    ws = open_socket()
    send(ws, message)
    [answer] = receive(ws, 1)
    assert answer == {"id": identity, "error": answer["error"]}
    assert answer["error"] and error in answer["error"]
    send(ws, b'{"id": "bytes", "model": "linear", "instances": [[1, 0, 0]]}')
    assert receive(ws, 1) == [{"id": "bytes", "predictions": [[1.5, 1.5]]}]


def crash(ws) -> None:
    """As when the client's machine does: a reset, no closing handshake."""
    ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ws.socket.shutdown(socket.SHUT_RD)
    ws.socket.close()


@pytest.mark.parametrize("leave", [crash, lambda ws: ws.close()], ids=["reset", "close"])
def test_a_client_that_goes_away_in_the_middle_of_its_answers_leaves_no_trace(front_end, open_socket, tmp_path, leave):
    ws, file, before = open_socket(), tmp_path / "open", len(front_end.output())
    send(ws, *[{"model": "gate", "instances": [str(file)]}] * 5, *[{"value": 1}] * 1000)
    receive(ws, 1)
    leave(ws)
    file.touch()
    wait_until(lambda: front_end.get("/health").json["waiting"] == 0, 60)
    assert front_end.predict("linear", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
    assert front_end.output()[before:] == ""
