"""The WebSocket of the Starlette front end: many requests at once on one socket, each answered by its id."""

import contextlib
import json
import re
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Server, owned_by_session, wait_until
from websockets.sync.client import connect

WAIT_MS = 1000  # for company: long enough for what a test sends at once to arrive together


@pytest.fixture(scope="module")
def server():
    """One worker, whose batches wait for company."""
    models = [part for name in ("linear", "gate", "crowd") for part in ("--model", f"example_models:{name}")]
    with owned_by_session():
        server = Server("starlette", "--workers", "1", "--batch-wait-ms", str(WAIT_MS), *models)
    with server:
        yield server.wait_ready()


@pytest.fixture
def open_socket(server):
    """``open_socket()``: one more connection to /ws; all are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(connect(f"ws://127.0.0.1:{server.port}/ws", close_timeout=1))


def send(ws, *documents) -> None:
    for document in documents:
        ws.send(document if isinstance(document, (str, bytes)) else json.dumps(document))


def receive(ws, count: int) -> list[dict]:
    return [json.loads(ws.recv(timeout=60)) for _ in range(count)]


def go_away(ws) -> None:
    """As when the client's machine crashes: a reset, no closing handshake."""
    ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ws.socket.shutdown(socket.SHUT_RD)
    ws.socket.close()


def total(server) -> float:
    return server.get("/?value=0").json["result"]


def test_each_of_a_thousand_adds_in_flight_on_one_socket_is_answered_once(server, open_socket):
    before, ws = total(server), open_socket()
    send(ws, *({"id": i, "value": 1} for i in range(1000)))
    answers = receive(ws, 1000)
    assert sorted(answer["id"] for answer in answers) == list(range(1000))
    assert sorted(answer["result"] for answer in answers) == [before + i for i in range(1, 1001)]
    with pytest.raises(TimeoutError):  # and nothing follows
        ws.recv(timeout=0.2)


def test_answers_come_as_they_are_done_and_are_told_apart_by_their_id(open_socket, tmp_path):
    ws, file = open_socket(), tmp_path / "open"
    send(ws, {"id": "slow", "model": "gate", "instances": [str(file)]})
    send(ws, *({"id": i, "model": "linear", "instances": [[i, 0, 0]]} for i in range(5)))
    answers = {answer["id"]: answer["predictions"] for answer in receive(ws, 5)}
    assert answers == {i: [[i + 0.5, 2 * i - 0.5]] for i in range(5)}
    file.touch()
    assert receive(ws, 1) == [{"id": "slow", "predictions": [str(file)]}]


def test_requests_of_several_sockets_and_of_http_share_a_batch(server, open_socket):
    first, second = open_socket(), open_socket()
    with ThreadPoolExecutor(1) as thread:
        send(first, {"id": 1, "model": "crowd", "instances": [12345]})
        send(second, {"id": 2, "model": "crowd", "inputs": {"x": [12345]}})
        http = thread.submit(server.predict, "crowd", {"instances": [12345]})
        assert receive(first, 1) == [{"id": 1, "predictions": [3.0]}]
        assert receive(second, 1) == [{"id": 2, "outputs": [3.0]}]
        assert http.result().json == {"predictions": [3.0]}


@pytest.mark.parametrize("message, identity, error", [
    ("{nope", None, "JSON Parse error: Missing a name for object member. at offset: 1"),
    ("", None, "JSON Parse error: The document is empty"),
    ("[]", None, "JSON Value: [] Is not object"),
    (b"\xff\xfe", None, "JSON Parse error: Invalid encoding in string. at offset: 0"),
    ({}, None, "A message has either a value to add or a model to run"),
    ({"id": 1}, 1, "A message has either a value to add or a model to run"),
    ({"id": [1, {"a": None}], "value": 1, "model": "linear"}, [1, {"a": None}],
     "A message has either a value to add or a model to run"),
    ({"id": "ü", "value": "x"}, "ü", 'value must be one finite number, not "x"'),
    ({"id": 2.5, "value": True}, 2.5, "value must be one finite number, not true"),
    ({"id": {}, "value": [1]}, {}, "value must be one finite number, not [1]"),
    ('{"id": 3, "value": NaN}', 3, "value must be one finite number, not nan"),
    ('{"id": 3, "value": 1e999}', 3, None),
    ({"id": 4, "value": 10**400}, 4, None),
    ({"id": 5, "model": 7}, 5, "model must be a name, not 7"),
    ({"id": 6, "model": "nope", "instances": [1]}, 6, "Servable not found for request: Latest(nope)"),
    ({"id": 7, "model": "linear"}, 7, "Missing 'inputs' or 'instances' key"),
    ({"id": 8, "model": "linear", "signature_name": "nope", "instances": [1]}, 8,
     'Serving signature name: "nope" not found in signature def'),
    ({"id": 9, "model": "linear", "instances": [["a"]]}, 9, None),
    ({"id": 10, "model": "linear", "instances": [[1, 2]]}, 10, None),
])
def test_a_bad_message_gets_an_error_with_its_id_and_the_socket_stays_open(open_socket, message, identity, error):
    ws = open_socket()
    send(ws, message)
    answer, = receive(ws, 1)
    assert answer == {"id": identity, "error": error or answer["error"]} and answer["error"]
    send(ws, {"id": "next", "value": "bad as well"})
    assert receive(ws, 1)[0]["id"] == "next"


def test_a_message_of_bytes_is_read_like_one_of_text(open_socket):
    ws = open_socket()
    send(ws, b'{"id": "bytes", "model": "linear", "instances": [[1, 0, 0]]}')
    assert receive(ws, 1) == [{"id": "bytes", "predictions": [[1.5, 1.5]]}]


def test_requests_of_a_client_that_went_away_are_not_run(server, open_socket):
    before, ws = total(server), open_socket()
    send(ws, *({"id": i, "value": 1} for i in range(10)))
    wait_until(lambda: server.get("/health").json["waiting"] == 10, 10)
    go_away(ws)
    wait_until(lambda: server.get("/health").json["waiting"] == 0, 10)
    assert total(server) == before


@pytest.mark.parametrize("leave", [go_away, lambda ws: ws.close()], ids=["reset", "close"])
def test_a_client_that_goes_away_in_the_middle_of_its_answers_leaves_no_trace(server, open_socket, tmp_path, leave):
    ws, file = open_socket(), tmp_path / "open"
    send(ws, *[{"model": "gate", "instances": [str(file)]}] * 5, *[{"value": 1}] * 1000)
    receive(ws, 1)
    leave(ws)
    file.touch()
    wait_until(lambda: server.get("/health").json["waiting"] == 0, 30)
    assert server.predict("linear", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
    assert not re.search("Traceback|Error|Exception|never retrieved", server.output())
