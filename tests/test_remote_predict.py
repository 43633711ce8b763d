"""remote_predict in a graph of one's own, against our own front ends and against servers that misbehave."""

import json
import os
import re
import socket
import socketserver
import threading

import numpy as np
import pytest
from conftest import Server, owned_by_session

from shared_graph.remote_predict_op import remote_predict
from shared_graph.tensorflow_runtime import import_tensorflow

OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, INTERNAL, UNAVAILABLE = 0, 3, 4, 5, 13, 14  # error codes

FAILURES = {  # arguments of remote_predict (or a whole reply), status code, HTTP status, a part of the message
    "away": ({"target_address": "127.0.0.1:1"}, UNAVAILABLE, 503, "127.0.0.1:1 cannot be reached"),
    "version": ({"model_version": 7}, NOT_FOUND, 404, "Servable not found for request: Specific(half_plus_two, 7)"),
    "signature": ({"signature_name": "nope"}, INVALID_ARGUMENT, 400, 'Serving signature name: "nope" not found'),
    "more_inputs": ({"inputs": {"x": "float32", "z": "float32"}}, INVALID_ARGUMENT, 400, "'z'"),
    "output": ({"outputs": {"z": "float32"}}, INVALID_ARGUMENT, 400, "'z'"),
    "input_type": ({"inputs": {"x": "string"}}, INVALID_ARGUMENT, 400, "inputs.x[0]: expected a number"),
    "output_type": ({"outputs": {"y": "string"}}, INVALID_ARGUMENT, 400, "y[0]: expected a string"),
    "refuses": ({"model_name": "picky"}, INVALID_ARGUMENT, 400, "x must not be negative"),
    "silent": ({"reply": "nothing", "max_rpc_deadline_millis": 50}, DEADLINE_EXCEEDED, 504, "within 50 ms"),
    "garbage": ({"reply": "what?\r\n\r\n"}, INTERNAL, 500, "does not answer as it should"),
    "html": ({"reply": "HTTP/1.1 404 Oh\r\n\r\n<html>"}, INTERNAL, 500, "does not answer as it should"),
    "bad_error": ({"reply": "HTTP/1.1 500 Oh\r\n\r\n[]"}, INTERNAL, 500, "does not answer as it should"),
    "accepted": ({"reply": "HTTP/1.1 202 Oh\r\n\r\n{}"}, INTERNAL, 500, "does not answer as it should"),
    "teapot": ({"reply": 'HTTP/1.1 503 Oh\r\n\r\n{"error": "short and stout"}'}, UNAVAILABLE, 503, "short and stout"),
}
SUCCESSES = {
    "plain": {},
    "numbers": {
        "model_name": "several",
        "inputs": {"x": "float32", "n": "int64"},
        "outputs": {"total": "float32", "next": "int64"},
    },
    "text": {
        "model_name": "echo",
        "signature_name": "to_bytes",
        "inputs": {"x": "string"},
        "outputs": {"y_bytes": "string"},
    },
    "version_named": {"model_version": 1},
}


class Misbehaving(socketserver.ThreadingTCPServer):
    """Answers every request with the same bytes; "nothing" is none."""

    daemon_threads, block_on_close = True, False

    def __init__(self, reply: str):
        self.reply, self.ended = reply, threading.Event()
        super().__init__(("127.0.0.1", 0), None)
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def finish_request(self, request: socket.socket, _):
        request.recv(2**16)
        if self.reply == "nothing":
            self.ended.wait()
        else:
            request.sendall(self.reply.encode())

    def handle_error(self, request, _):
        pass  # whoever asked has gone away

    def end(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


@pytest.fixture(scope="module")
def server():
    """One worker, and on it the models that are asked as well as those that ask them."""
    cases, misbehaving = dict(SUCCESSES), []
    for name, (arguments, *_) in FAILURES.items():
        cases[name] = dict(arguments)
        if reply := cases[name].pop("reply", None):
            misbehaving.append(Misbehaving(reply))
            cases[name]["target_address"] = f"127.0.0.1:{misbehaving[-1].server_address[1]}"
    models = [
        f"--model=example_models:{name}"
        for name in ("half_plus_two", "half_plus_remote", "remote", "several", "echo", "picky")
    ]
    with owned_by_session():
        server = Server("starlette", "--workers", "1", *models, env=os.environ | {"REMOTE_CASES": json.dumps(cases)})
    with server:
        yield server.wait_ready()
    for other in misbehaving:
        other.end()


def ask(server, signature: str, inputs) -> dict:
    answer = server.predict("remote", {"signature_name": signature, "inputs": inputs})
    assert answer.status == 200, answer
    return answer.json["outputs"]


def test_many_clients_of_models_that_ask_the_same_single_worker_do_not_deadlock(server, clients):
    answers = clients(32, lambda i: server.predict("half_plus_remote", {"instances": [i, 2, 5]}), range(128))
    assert [answer.json for answer in answers] == [{"predictions": [i / 2 + 3, 4.0, 5.5]} for i in range(128)]


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_call_has_its_code_and_message_and_the_failing_form_fails_with_them(server, case):
    arguments, code, status, message = FAILURES[case]
    dtypes = arguments.get("inputs", {"x": "float32"})
    inputs = {alias: ["a"] if dtype == "string" else [-1.0] for alias, dtype in dtypes.items()}
    outputs = ask(server, f"{case}_status", inputs)
    assert outputs["code"] == code and message in outputs["message"]
    assert outputs[next(iter(arguments.get("outputs", "y")))] == ("" if case == "output_type" else 0.0)
    answer = server.predict("remote", {"signature_name": case, "inputs": inputs})
    assert answer.status == status and answer.json == {"error": outputs["message"]}


@pytest.mark.parametrize(
    "case, inputs, outputs",
    [
        ("plain", [1.0, 2.0, 5.0], {"y": [2.5, 3.0, 4.5]}),
        ("plain", 1.0, {"y": 2.5}),
        ("plain", [], {"y": []}),
        ("version_named", [1.0], {"y": [2.5]}),
        (
            "numbers",
            {"x": [[1.0, 2.0], [0.1, 0.2]], "n": [3, 2**62]},
            {"total": [9.0, pytest.approx(0.3 * 2**62)], "next": [4, 2**62 + 1]},
        ),
        ("text", ["grüß", '"', ""], {"y_bytes": [{"b64": "Z3LDvMOf"}, {"b64": "Ig=="}, {"b64": ""}]}),
        ("text", [{"b64": "/wAB"}], {"y_bytes": [{"b64": "/wAB"}]}),
    ],
)
def test_tensors_of_all_kinds_and_several_outputs_pass_both_ways(server, case, inputs, outputs):
    assert ask(server, f"{case}_status", inputs) == {"code": OK, "message": "", **outputs}
    assert ask(server, case, inputs) == (outputs if len(outputs) > 1 else next(iter(outputs.values())))


def test_numbers_that_are_not_finite_pass_both_ways(server):
    assert str(ask(server, "plain", [float("nan"), float("inf"), float("-inf")])) == "[nan, inf, -inf]"


def run_here(*arguments, **keywords) -> list[np.ndarray]:
    tf = import_tensorflow(whole=True)
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(remote_predict(*arguments, **keywords))


@pytest.mark.parametrize("text", [b"zeros\0\0", b"", b"\xff"])
def test_a_single_string_is_sent_as_it_is(front_end, text):
    address, types = f"127.0.0.1:{front_end.port}", ["string"]
    (y,) = run_here(["x"], [text], ["y_bytes"], address, "echo", output_types=types, signature_name="to_bytes")
    assert y == text


def test_each_front_end_answers_remote_predict(front_end):
    (y,) = run_here(["x"], [np.float32([[1, 2, 3]])], ["y"], f"127.0.0.1:{front_end.port}", "linear")
    assert y.tolist() == [[22.5, 27.5]] and y.dtype == np.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_tensors": []}, "1 aliases do not fit 0 input_tensors"),
        ({"output_types": ["float32"] * 2}, "1 aliases do not fit 2 output_types"),
        ({"output_tensor_aliases": [], "output_types": ["string"]}, "0 aliases do not fit 1 output_types"),
        ({"model_name": ""}, "model_name must be specified."),
        ({"target_address": "localhost"}, "target_address must be host:port, not localhost"),
    ],
)
def test_arguments_that_do_not_agree_are_refused_when_the_graph_is_built(changes, message):
    arguments = {
        "input_tensor_aliases": ["x"],
        "input_tensors": [1.0],
        "output_tensor_aliases": ["y"],
        "target_address": "127.0.0.1:1",
        "model_name": "m",
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        run_here(**arguments | changes)
