"""The WebSocket of the Starlette front end: many requests at once on one socket, each answered by its id."""

import contextlib
import http.client
import json
import socket
import struct
import time

import pytest
from conftest import wait_until
from websockets.sync.client import connect

pytestmark = pytest.mark.parametrize("front_end", ["starlette"], indirect=True)


@pytest.fixture
def open_socket(front_end):
    """``open_socket()``: one more connection to /ws; all are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            connect(f"ws://127.0.0.1:{front_end.port}/ws", close_timeout=1, max_size=None)
        )


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
    "message, identity, status, error",
    [
        ("{nope", None, 400, "JSON"),
        (b"\xff\xfe", None, 400, "JSON"),
        (b"", None, 400, "JSON"),
        ("", None, 400, "JSON"),
        ("[]", None, 400, "object"),
        (b"\x93NUMPY\x01\x00", None, 400, "JSON"),
        (b"\x93NUMPY" + b" " * 2**17, None, 400, "JSON"),
        ({}, None, 400, "value"),
        ({"id": [1, {"a": None}]}, [1, {"a": None}], 400, "value"),
        ({"id": "ü", "value": True}, "ü", 400, "value"),
        ('{"id": 3, "value": NaN}', 3, 400, "value"),
        ({"id": 4, "value": 10**400}, 4, 400, "value"),
        ({"id": 5, "model": "nope", "instances": [1]}, 5, 404, "Servable not found for request: Latest(nope)"),
        ({"id": 6, "model": ["linear"], "instances": [1]}, 6, 404, "Servable not found"),
        ({"id": 7, "model": "linear"}, 7, 400, "instances"),
        ({"id": 9, "model": "linear", "instances": [["\ud800"]]}, 9, 400, "instances[0][0]"),
        ({"id": 10, "model": "linear", "instances": [[1, 2]]}, 10, 400, ""),
        ({"id": 11, "model": "words", "version": 11, "instances": []}, 11, 404, "Specific(words, 11)"),
        (
            {"id": 12, "model": "words", "label": "x", "instances": []},
            12,
            400,
            "Unrecognized servable version label: x",
        ),
        ({"id": 13, "model": "words", "verb": "classify", "examples": [{}]}, 13, 400, "classify"),
    ],
    ids=range(20),
)
def test_a_bad_message_gets_an_error_with_its_id_and_the_socket_stays_open(
    open_socket, message, identity, status, error
):
    ws = open_socket()
    send(ws, message)
    [answer] = receive(ws, 1)
    assert answer == {"id": identity, "error": answer["error"], "status": status}
    assert answer["error"] and error in answer["error"]
    send(ws, b'{"id": "bytes", "model": "linear", "instances": [[1, 0, 0]]}')
    assert receive(ws, 1) == [{"id": "bytes", "predictions": [[1.5, 1.5]]}]


def test_version_and_verb_mean_what_they_mean_in_a_url(open_socket):
    ws = open_socket()
    send(
        ws,
        {"id": 1, "model": "words", "version": 10, "instances": ["two"]},
        {"id": 2, "model": "scores", "verb": "regress", "signature_name": "regress", "examples": [{"x": [1.0, 2.0]}]},
        {"id": 3, "model": "scores", "verb": "classify", "signature_name": "classify", "examples": [{"x": [1.0, 2.0]}]},
    )
    answers = {answer.pop("id"): answer for answer in receive(ws, 3)}
    assert answers == {1: {"predictions": [2]}, 2: {"results": [3.0]}, 3: {"results": [[["-a", 1.0], ["-b", 2.0]]]}}


def test_large_messages_are_answered_and_do_not_keep_others_waiting(front_end, open_socket):
    """Six of 12 MiB with four million lists each took the event loop for 11 s. Now only workers read them."""
    ws, count = open_socket(), 200_000
    send(ws, {"id": "rows", "model": "linear", "instances": [[1, 0, 0]] * count})
    [answer] = receive(ws, 1)
    assert answer["id"] == "rows" and answer["predictions"] == [[1.5, 1.5]] * count
    send(ws, *['{"id": 1, "model": "linear", "instances": [' + "[]," * 2**22 + "[]]}"] * 6)
    slowest = 0.0
    for _ in range(20):
        begun = time.monotonic()
        front_end.get("/health")
        slowest = max(slowest, time.monotonic() - begun)
    assert {answer["status"] for answer in receive(ws, 6)} == {413} and slowest < 1


def test_a_page_of_another_origin_opens_no_socket(front_end):
    for origin, status in (("http://evil.example", 403), (f"http://127.0.0.1:{front_end.port}", 101)):
        key = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        headers = key | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": origin}
        connection = http.client.HTTPConnection("127.0.0.1", front_end.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/ws", headers=headers)
            assert connection.getresponse().status == status


def test_answers_are_not_compressed_and_a_message_may_be_as_large_as_a_body(front_end, open_socket):
    ws = open_socket()
    assert "Sec-WebSocket-Extensions" not in ws.response.headers
    message = '{"id": 1, "model": "picky", "instances": [1]' + " " * 20 * 2**20 + "}"
    send(ws, message)
    assert receive(ws, 1) == [{"id": 1, "predictions": [0.5]}]


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
