"""Messages of the WebSocket: what one asks for, found without reading a large one, and what it is answered with."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, NamedTuple

from shared_graph.adder import require_finite
from shared_graph.errors import Error, InvalidRequest
from shared_graph.http_api import Call
from shared_graph.json_codec import excerpt, parse_json
from shared_graph.model_source import ADDER

LARGE_BYTES = 2**16  # a larger message is not parsed in the event loop: parsing one of 64 MiB takes seconds
BODY_KEYS = ("instances", "inputs", "examples")  # before which a large one has said all else
TOO_LATE = re.compile(rb'"(id|model|version|label|verb)"[ \t\r\n]*:')
BLANK = re.compile(r"[ \t\r\n]*")
VERBS = ("predict", "classify", "regress")


class Message(NamedTuple):
    """``identity`` is its id, as JSON; ``value`` that of an add."""

    identity: str
    call: Call
    value: Any


class BadMessage(InvalidRequest):
    """``identity`` is its id, as JSON, if it has said one."""

    identity = "null"


def read_message(message: bytes) -> Message:
    """Raises BadMessage."""
    document: dict[str, Any] = {}
    try:
        if len(message) > LARGE_BYTES:
            read_head(message, document)
        else:
            document = parse_json(message)
        return Message(identity_of(document), call_of(document), document.get("value"))
    except InvalidRequest as error:
        failure = BadMessage(str(error), error.status)
    with contextlib.suppress(InvalidRequest):
        failure.identity = identity_of(document)
    raise failure


def identity_of(document: dict[str, Any]) -> str:
    """Before anything is done: what cannot be answered is not to be done."""
    try:
        return json.dumps(document.get("id"))
    except RecursionError:
        raise InvalidRequest("id is nested too deeply") from None


def call_of(document: dict[str, Any]) -> Call:
    """``version``, ``label`` and ``verb`` mean what they mean in a URL of the REST API."""
    model, version, label, verb = (document.get(key) for key in ("model", "version", "label", "verb"))
    if model is None:
        require_finite(document.get("value"))
        return Call(ADDER, None, "add")
    if version is not None and (type(version) is not int or not 0 <= version < 2**63):
        raise InvalidRequest(f"version must be a number of 64 bits, not {excerpt(version)}")
    if label is not None and not isinstance(label, str):
        raise InvalidRequest(f"label must be a string, not {excerpt(label)}")
    if version is not None and label is not None:
        raise InvalidRequest("A message has a version or a label, not both")
    if verb is not None and verb not in VERBS:
        raise InvalidRequest(f"verb must be one of {', '.join(VERBS)}, not {excerpt(verb)}")
    model = model if isinstance(model, str) else excerpt(model)  # of which there is none
    return Call(model, label if version is None else version, verb or "predict")


def read_head(message: bytes, found: dict[str, Any]) -> None:
    """Add to ``found`` what a large message says before the first of BODY_KEYS. Raises InvalidRequest."""
    text, decoder = message[:LARGE_BYTES].decode("utf-8-sig", "replace"), json.JSONDecoder()
    place, expected = BLANK.match(text).end(), "{"
    with contextlib.suppress(ValueError, IndexError, RecursionError):
        while text[place] == expected:
            key, place = decoder.raw_decode(text, BLANK.match(text, place + 1).end())
            place = BLANK.match(text, place).end()
            if not isinstance(key, str) or text[place] != ":":
                break
            if key in BODY_KEYS and "model" in found:
                ends = message.rfind(b"]"), message.rfind(b"}", 0, message.rfind(b"}"))  # one of which ends the body
                if TOO_LATE.search(message, max(len(text[:place].encode()), *ends)):
                    break
                return
            found[key], place = decoder.raw_decode(text, BLANK.match(text, place + 1).end())
            place, expected = BLANK.match(text, place).end(), ","
    what = f"A message of more than {LARGE_BYTES // 1024} KiB must be a JSON object"
    raise InvalidRequest(f"{what} that has id, model, version, label and verb before {', '.join(BODY_KEYS)}")


def result_text(identity: str, result: Any) -> str:
    """The message that answers with a sum, or with the JSON that a worker has written."""
    body = result.decode(errors="replace") if isinstance(result, bytes) else json.dumps({"result": result})
    return f'{{"id": {identity}, {body[1:]}'


def error_text(identity: str, error: Error) -> str:
    return f'{{"id": {identity}, "error": {json.dumps(str(error))}, "status": {error.status}}}'
