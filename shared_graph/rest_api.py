"""TensorFlow Serving's REST contract: bodies to arrays, and arrays to answers. Workers do both.

The libraries that read and write are two modules below: ``json_codec``, and ``npy_codec`` for bodies that are files.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import operator
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from shared_graph.bodies import MAX_BODY_BYTES, HttpBody, is_array_file, unpack
from shared_graph.errors import InvalidRequest
from shared_graph.json_codec import excerpt, json_text, parse_json, parse_string, parse_tensor, string_problem
from shared_graph.models import Arrays, Signature, to_array
from shared_graph.npy_codec import read_arrays, write_arrays
from shared_graph.tensorflow_runtime import import_tensorflow

LARGE_JSON_BYTES = 2**20  # longer documents are read one at a time
MAX_CAST_BYTES = 2 * MAX_BODY_BYTES  # of an array from a file, as the dtype that its input wants

_reading_large = threading.Lock()


class Decoded(NamedTuple):
    """A request that can be run, alone or with others."""

    signature: Signature
    feed: list[np.ndarray]  # one for each input, in the signature's order
    encode: Callable[[list[np.ndarray]], Any]  # the answer from its outputs, or from its rows of a merged run's outputs
    is_json: bool  # ``encode`` takes what ``json_codec.json_ready`` makes of outputs, not the outputs themselves


def decode(signatures: dict[str, Signature], verb: str, body: Any) -> Decoded:
    """Raises InvalidRequest.

    ``body`` is a float for the verb "add", a signature's name and the inputs for "arrays", else a ``HttpBody``.
    """
    if verb == "add":
        feed = [np.array([body])]
        return Decoded(signatures["serving_default"], feed, lambda outputs: float(outputs[0][0]), False)
    if verb == "arrays":
        signature = find_signature(signatures, body[0])
        return Decoded(signature, feed_of(signature, body[1]), lambda outputs: by_name(signature, outputs), False)
    content, is_gzip, query = HttpBody(*body)
    content = unpack(content) if is_gzip else content
    is_large = len(content) > LARGE_JSON_BYTES and not is_array_file(content)
    with reading_large() if is_large else contextlib.nullcontext():
        return decode_content(signatures, verb, content, query)


@contextlib.contextmanager
def reading_large() -> Iterator[None]:
    """One at a time: each takes up to 200 MB for a moment, and two that share Python's lock are no sooner done. The
    garbage collector, which would look at millions of new objects again and again, made others wait four times as long.
    """
    with _reading_large:
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def decode_content(signatures: dict[str, Signature], verb: str, content: bytes, query: str) -> Decoded:
    """Of what a body holds, the array file or the JSON document. Raises InvalidRequest."""
    if verb == "predict" and is_array_file(content):
        signature = find_signature(signatures, signature_in(query))
        feed = feed_of(signature, read_arrays(content), MAX_CAST_BYTES)
        return Decoded(signature, feed, lambda outputs: write_arrays(by_name(signature, outputs)), False)
    document = parse_json(content)
    signature = find_signature(signatures, document.get("signature_name", ""))
    if verb == "predict":
        is_row, feed = parse_predict(document, signature)
        return Decoded(signature, feed, lambda outputs: encode_predict(signature, is_row, outputs), True)
    if signature.method != f"tensorflow/serving/{verb}" or list(signature.inputs) != ["inputs"]:
        why = f"its method is {signature.method!r} and its inputs are {list(signature.inputs)}"
        raise InvalidRequest(f"Signature {signature.name!r} is not for {verb}: {why}")
    examples = parse_examples(document)
    check_rows(signature, len(examples))
    return Decoded(signature, [examples], lambda outputs: encode_results(signature, verb, len(examples), outputs), True)


def find_signature(signatures: dict[str, Signature], name: Any) -> Signature:
    if not isinstance(name, str):
        raise InvalidRequest(f"signature_name must be a string, not {excerpt(name)}")
    signature = signatures.get(name or "serving_default")
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{name or "serving_default"}" not found in signature def')
    if signature.refusal:
        raise InvalidRequest(signature.refusal)
    return signature


def signature_in(query: str) -> str:
    """The ``signature_name`` of a query string, "" if there is none."""
    try:
        names = urllib.parse.parse_qs(query, max_num_fields=100, errors="strict").get("signature_name", [""])
    except ValueError:
        names = []
    if len(names) != 1:
        raise InvalidRequest("signature_name must be given once, in a query string that can be parsed")
    return names[0]


def by_name(signature: Signature, outputs: list[np.ndarray]) -> Arrays:
    return dict(zip(signature.outputs, outputs))


def feed_of(signature: Signature, inputs: Any, most_bytes: float = math.inf) -> list[np.ndarray]:
    """Arrays, one or by name, as the signature's inputs, each at most so large. Raises InvalidRequest."""
    if not isinstance(inputs, dict) and len(signature.inputs) == 1:
        inputs = dict.fromkeys(signature.inputs, inputs)
    if not isinstance(inputs, dict) or inputs.keys() != signature.inputs.keys():
        given = f"{sorted(map(str, inputs))!s:.200}" if isinstance(inputs, dict) else "one array"
        raise InvalidRequest(f"Signature {signature.name!r} takes the inputs {sorted(signature.inputs)}, not {given}")
    feed = []
    for name, spec in signature.inputs.items():
        dtype = np.dtype(spec.dtype)
        if np.size(inputs[name]) * dtype.itemsize > most_bytes:
            why = f"as which it is larger than {most_bytes >> 20} MiB"
            raise InvalidRequest(f"input {name!r} takes {dtype}, {why}", 413)
        feed.append(to_array(f"input {name!r}", inputs[name], dtype))
    return feed


# -- from JSON to arrays -----------------------------------------------------------------------------------------------


def parse_predict(document: dict[str, Any], signature: Signature) -> tuple[bool, list[np.ndarray]]:
    """Is it row format, and one array for each input."""
    if ("instances" in document) == ("inputs" in document):
        raise InvalidRequest("There must be either 'instances' (rows) or 'inputs' (columns)")
    is_row, names = "instances" in document, list(signature.inputs)
    where = "instances" if is_row else "inputs"
    value = document[where]
    if is_row and (not isinstance(value, list) or not value):
        raise InvalidRequest(f"instances: expected a list that is not empty, got {excerpt(value)}")
    if is_row:
        check_rows(signature, len(value))
    first = value[0] if is_row else value
    is_base64 = isinstance(first, dict) and first.keys() == {"b64"} and isinstance(first["b64"], str)
    if len(names) == 1 and (is_base64 or not isinstance(first, dict)):
        columns = {where: value}
    elif is_row:
        columns = dict(zip([f"{name} of instances" for name in names], columns_of(value, names)))
    else:
        if not isinstance(value, dict) or not value.keys() >= signature.inputs.keys():
            raise InvalidRequest(f"inputs: expected an object of {names}, got {excerpt(value)}")
        columns = {f"inputs.{name}": value[name] for name in names}
    dtypes = [np.dtype(spec.dtype) for spec in signature.inputs.values()]
    return is_row, [parse_tensor(where, column, dtype) for (where, column), dtype in zip(columns.items(), dtypes)]


def check_rows(signature: Signature, rows: int) -> None:
    """Before anything is changed: raises InvalidRequest where a static shape shows that there will not be ``rows``."""
    for name, spec in signature.outputs.items() if signature.mutates_state else ():
        if spec.shape is not None and spec.shape[:1] not in ((None,), (rows,)):
            why = f"output {name!r} of signature {signature.name!r} has not one row for each of {rows}"
            raise InvalidRequest(f"Nothing was changed: {why}; ask for it by 'inputs'")


def columns_of(rows: list[Any], names: list[str]) -> list[list[Any]]:
    """A list for each name, of rows that are objects with exactly these names."""
    if set(map(type, rows)) == {dict} and set(map(len, rows)) == {len(names)}:
        with contextlib.suppress(KeyError):
            return [list(map(operator.itemgetter(name), rows)) for name in names]
    i = next(i for i, row in enumerate(rows) if not isinstance(row, dict) or row.keys() != set(names))
    raise InvalidRequest(f"instances[{i}]: expected an object of {names}, got {excerpt(rows[i])}")


def parse_examples(document: dict[str, Any]) -> np.ndarray:
    """Serialized ``tf.train.Example`` protos, an object array [n]; a common context comes before each."""
    examples, context = document.get("examples"), document.get("context", {})
    if not isinstance(examples, list) or not examples:
        raise InvalidRequest(f"examples: expected a list that is not empty, got {excerpt(examples)}")
    before = serialize_example("context", context) if context != {} else b""
    if len(before) * len(examples) > MAX_BODY_BYTES:
        raise InvalidRequest(f"context: too large to stand before each of {len(examples)} examples", 413)
    protos = (before + serialize_example(f"examples[{i}]", example) for i, example in enumerate(examples))
    return np.fromiter(protos, object)


INTEGERS, FLOATS, STRINGS = ("int64_list", int), ("float_list", float), ("bytes_list", parse_string)
FEATURE_KINDS = {int: INTEGERS, bool: INTEGERS, float: FLOATS, str: STRINGS, dict: STRINGS}  # by the type of a value


@functools.cache
def example_class() -> type:
    """Once, since who asks for TensorFlow waits for whoever imports more of it just then."""
    return import_tensorflow().train.Example


def serialize_example(where: str, features: Any) -> bytes:
    if not isinstance(features, dict):
        raise InvalidRequest(f"{where}: expected an object, got {excerpt(features)}")
    example = example_class()()
    feature = example.features.feature
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            feature[name].Clear()  # of no kind: missing
            continue
        try:
            [(kind, take)] = {*map(FEATURE_KINDS.__getitem__, map(type, values))}
            getattr(feature[name], kind).value.extend(map(take, values))
        except (KeyError, TypeError, ValueError):  # what protobuf does not take, or of several kinds
            problems = (string_problem(v) for v in values if parse_string(v) is None)
            expected = next(filter(None, problems), "numbers or strings, all of one kind")
            raise InvalidRequest(f"{where}.{name}: expected {expected}, got {excerpt(value)}") from None
    return example.SerializeToString()


# -- from arrays to JSON -----------------------------------------------------------------------------------------------


def encode_predict(signature: Signature, is_row: bool, outputs: list[np.ndarray]) -> bytes:
    """Outputs as ``json_ready`` makes them: one as its bare value, several by name, in row format one object a row."""
    names, rows = list(signature.outputs), outputs[0].shape[:1]
    if is_row and (not rows or any(output.shape[:1] != rows for output in outputs)):
        shapes = [list(output.shape) for output in outputs]
        raise InvalidRequest(f"Outputs {names} of shapes {shapes} have not one row for each instance")
    value: Any = outputs[0]
    if len(names) > 1:
        value = [dict(zip(names, row)) for row in zip(*map(rows_of, outputs))] if is_row else dict(zip(names, outputs))
    return json_text({"predictions" if is_row else "outputs": value})


def rows_of(array: np.ndarray) -> list[Any]:
    return array.tolist() if array.dtype == object else list(array)


def encode_results(signature: Signature, verb: str, examples: int, outputs: list[np.ndarray]) -> bytes:
    """Classify: [label, score] for each class of each example; regress: one number each."""
    named, shapes = by_name(signature, outputs), {output.shape for output in outputs}
    if verb == "regress" and named.keys() == {"outputs"} and shapes <= {(examples,), (examples, 1)}:
        return json_text({"results": named["outputs"].reshape(-1)})
    shape = next(iter(shapes))
    is_table = len(shapes) == 1 and len(shape) == 2 and shape[0] == examples
    if verb == "regress" or not named.keys() <= {"classes", "scores"} or not is_table:
        expected = "'outputs' [n]" if verb == "regress" else "'classes', 'scores' or both, [n, classes]"
        raise InvalidRequest(f"To {verb} {examples} examples there must be {expected}, not {list(named)} {shapes}")
    classes = named.get("classes", np.full(shape, "", object))
    scores = named.get("scores", np.zeros(shape))
    return json_text({"results": [list(zip(*row)) for row in zip(rows_of(classes), rows_of(scores))]})
