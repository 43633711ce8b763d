"""Messages of the WebSocket, without a server: what each asks for, and that a large one is not read for it."""

import json
import time

import pytest

from shared_graph.errors import InvalidRequest
from shared_graph.messages import LARGE_BYTES, BadMessage, Message, error_text, read_message, result_text

PADDING = " " * LARGE_BYTES
BODY = '"instances": [' + "1, " * LARGE_BYTES + "1]"


@pytest.mark.parametrize("padding", ["", PADDING], ids=["small", "large"])
@pytest.mark.parametrize(
    "head, call",
    [
        ('"model": "m"', ("m", None, "predict")),
        ('"model": "m", "version": 3', ("m", 3, "predict")),
        ('"label": "st\\u00e4ble",\n"model" : "m"', ("m", "stäble", "predict")),
        ('"verb": "classify", "model": "m", "label": null', ("m", None, "classify")),
        ('"verb": "regress", "model": "m", "more": {"a": [1, {"b": "}"}]}', ("m", None, "regress")),
    ],
)
def test_a_message_says_what_it_asks_for_as_a_url_does(head, call, padding):
    message = ('{"id": [1, "x"], ' + head + ', "instances": [1]' + padding + "}").encode()
    assert read_message(message) == Message('[1, "x"]', call, None)


def test_without_a_model_a_value_is_added():
    assert read_message(b'{"value": 3}') == Message("null", ("adder", None, "add"), 3)


DEEP = "[" * 1000 + "]" * 1000


def test_what_is_nested_so_deeply_that_it_cannot_be_answered_is_refused_before_it_is_done():
    with pytest.raises(BadMessage, match="id is nested too deeply") as raised:
        read_message(f'{{"id": {DEEP}, "value": 1}}'.encode())
    assert raised.value.identity == "null"
    with pytest.raises(BadMessage, match="value must be one finite number") as raised:
        read_message(f'{{"id": 7, "value": {DEEP}}}'.encode())
    assert raised.value.identity == "7"
    assert read_message(f'{{"id": 7, "model": {DEEP}}}'.encode()).call.model.startswith("[[[")


@pytest.mark.parametrize(
    "document, message",
    [
        ({"model": "m", "version": 1, "label": "x"}, "not both"),
        *(({"model": "m", "version": version}, "version must be") for version in (-1, 1.0, True, "1", 2**63, [1])),
        ({"model": "m", "label": 3}, "label must be a string, not 3"),
        *(({"model": "m", "verb": verb}, "verb must be one of") for verb in ("train", "PREDICT", 1, [])),
    ],
)
def test_what_a_message_says_wrongly_is_refused_with_its_id(document, message):
    for padding in ("", PADDING):
        text = json.dumps({"id": 7} | document)[:-1] + ', "instances": []' + padding + "}"
        with pytest.raises(BadMessage, match=message) as raised:
            read_message(text.encode())
        assert raised.value.identity == "7" and raised.value.status == 400


@pytest.mark.parametrize("value", ["3", None, True, [3], 10**400])
def test_a_value_that_is_no_finite_number_is_refused_with_its_id(value):
    with pytest.raises(BadMessage, match="value must be one finite number") as raised:
        read_message(json.dumps({"id": 7, "value": value}).encode())
    assert raised.value.identity == "7"


@pytest.mark.parametrize("message", [b"", b" ", b"[]", b"null", b"\x93NUMPY\x01", b"PK\x03\x04", b"\xff", b'{"id": 1'])
def test_what_is_no_json_object_is_refused_also_when_it_is_large(message):
    for padding in (b"", PADDING.encode()):
        with pytest.raises(InvalidRequest, match="JSON"):
            read_message(message + padding)


def test_a_large_message_that_says_its_model_too_late_is_refused():
    for text in (f'{{{BODY}, "model": "m"}}', f'{{"id": 1{PADDING}, "model": "m", {BODY}}}', '{"a": ' * LARGE_BYTES):
        with pytest.raises(InvalidRequest, match="before instances, inputs, examples"):
            read_message(text.encode())


@pytest.mark.parametrize("key", ["id", "version", "label", "verb", "model"])
@pytest.mark.parametrize("rows", ["[1, 2]", '{"x": [1], "s": "]"}', '{"b64": "QQ=="}', '"a text"'])
def test_a_large_message_that_says_behind_its_rows_what_is_to_be_answered_is_refused(key, rows):
    """Else another version would answer, or nobody could tell whose answer it is."""
    with pytest.raises(InvalidRequest, match="before instances, inputs, examples"):
        read_message(f'{{"model": "m", "inputs": {rows}{PADDING}, "{key}" : 1}}'.encode())
    for inside in (f'[{{"{key}": 1}}]', f'{{"x": [1], "{key}": 1}}', f'{{"{key}": {{"b64": "QQ=="}}}}', rows):
        for end in ("", ', "signature_name": "s"'):
            said = f'{{"id": [7], "model": "m", "inputs": {inside}{PADDING}{end}}}'
            assert read_message(said.encode()).call.model == "m"


def test_a_large_message_costs_no_more_than_its_head():
    message = ('{"id": 1, "model": "m", "instances": [' + "[]," * 10_000_000 + "[]]}").encode()
    begun = time.thread_time()
    assert read_message(message).call.model == "m"
    assert time.thread_time() - begun < 0.5


def test_answers_have_the_id_first_and_errors_their_status():
    assert read_message('{"id": "ü", "value": 1}'.encode()).identity == '"\\u00fc"'
    assert result_text('"\\u00fc"', 3.0) == '{"id": "\\u00fc", "result": 3.0}'
    assert result_text("null", b'{"predictions":[1]}') == '{"id": null, "predictions":[1]}'
    assert json.loads(error_text(f"{10**30}", InvalidRequest("no", 404))) == {
        "id": 10**30,
        "error": "no",
        "status": 404,
    }
