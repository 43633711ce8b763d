"""TensorFlow Serving's REST contract: bodies to arrays, and arrays to answers. Workers do both."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import InvalidRequest
from shared_graph.json_codec import SLICE, json_text, parse_json, parse_string, parse_tensor, shown
from shared_graph.models import Signature, objects, to_array
from shared_graph.tensorflow_runtime import import_tensorflow


def decode(signatures: dict[str, Signature], verb: str, body: Any) -> tuple[Signature, list[np.ndarray], Callable]:
    """A request's signature, its array for each input, and what makes its outputs the answer: those of ``Graph.run``
    for the verbs "add" and "arrays", else what ``plain`` makes of them. Raises InvalidRequest.

    ``body`` is a float for the verb "add", a signature's name and the inputs for "arrays", else the body that came over
    HTTP, and whether it is gzip.
    """
    if verb == "add":
        return signatures["serving_default"], [np.array([body])], lambda outputs: float(outputs[0][0])
    document = parse_json(*body) if verb != "arrays" else {"signature_name": body[0]}
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise InvalidRequest(f"signature_name must be a text, not {shown(name)}")
    signature = signatures.get(name or "serving_default")
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{name or "serving_default"}" not found in signature def')
    if verb == "arrays":
        return signature, feed_of(signature, body[1]), lambda outputs: dict(zip(signature.outputs, outputs))
    if verb == "predict":
        is_row, feed = parse_predict(document, signature)
        return signature, feed, lambda outputs: encode_predict(signature, is_row, outputs)
    if signature.method != f"tensorflow/serving/{verb}" or list(signature.inputs) != ["inputs"]:
        raise InvalidRequest(
            f"Signature {signature.name!r} is not for {verb}: its method is {signature.method!r}"
            f" and its inputs are {list(signature.inputs)}"
        )
    examples = parse_examples(document)
    return signature, [examples], lambda outputs: encode_results(signature, verb, len(examples), outputs)


def feed_of(signature: Signature, inputs: Any) -> list[np.ndarray]:
    if not isinstance(inputs, dict) and len(signature.inputs) == 1:
        inputs = dict.fromkeys(signature.inputs, inputs)
    if not isinstance(inputs, dict) or inputs.keys() != signature.inputs.keys():
        given = sorted(map(str, inputs)) if isinstance(inputs, dict) else "one array"
        raise InvalidRequest(f"Signature {signature.name!r} takes the inputs {sorted(signature.inputs)}, not {given}")
    return [to_array(f"input {name!r}", inputs[name], np.dtype(spec.dtype)) for name, spec in signature.inputs.items()]


def parse_predict(document: dict[str, Any], signature: Signature) -> tuple[bool, list[np.ndarray]]:
    """Is it row format, and one array for each input."""
    if ("instances" in document) == ("inputs" in document):
        raise InvalidRequest("There must be either 'instances' (rows) or 'inputs' (columns)")
    is_row, names = "instances" in document, list(signature.inputs)
    where = "instances" if is_row else "inputs"
    value = document[where]
    if is_row and (not isinstance(value, list) or not value):
        raise InvalidRequest(f"instances: expected a list that is not empty, got {shown(value)}")
    first = value[0] if is_row else value
    if len(names) == 1 and (not isinstance(first, dict) or first.keys() == {"b64"}):
        columns = {where: value}
    elif is_row:
        for i, row in enumerate(value):
            if not isinstance(row, dict) or row.keys() != signature.inputs.keys():
                raise InvalidRequest(f"instances[{i}]: expected an object of {names}, got {shown(row)}")
        columns = {f"{name} of instances": [row[name] for row in value] for name in names}
    else:
        if not isinstance(value, dict) or not value.keys() >= signature.inputs.keys():
            raise InvalidRequest(f"inputs: expected an object of {names}, got {shown(value)}")
        columns = {f"inputs.{name}": value[name] for name in names}
    dtypes = [np.dtype(spec.dtype) for spec in signature.inputs.values()]
    return is_row, [parse_tensor(where, column, dtype) for (where, column), dtype in zip(columns.items(), dtypes)]


def parse_examples(document: dict[str, Any]) -> np.ndarray:
    """Serialized ``tf.train.Example`` protos, an object array [n]; a common context comes before each."""
    examples, context = document.get("examples"), document.get("context", {})
    if not isinstance(examples, list) or not examples:
        raise InvalidRequest(f"examples: expected a list that is not empty, got {shown(examples)}")
    before = serialize_example("context", context)
    return objects(before + serialize_example(f"examples[{i}]", example) for i, example in enumerate(examples))


def serialize_example(where: str, features: Any) -> bytes:
    if not isinstance(features, dict):
        raise InvalidRequest(f"{where}: expected an object, got {shown(features)}")
    example, kinds = import_tensorflow().train.Example(), {str: "bytes_list", dict: "bytes_list", float: "float_list"}
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        try:
            [kind] = {kinds.get(type(v), "int64_list") for v in values} or {"int64_list"}
            take = {"bytes_list": parse_string, "float_list": float, "int64_list": int}[kind]
            getattr(example.features.feature[name], kind).value.extend(map(take, values))
        except (TypeError, ValueError):  # what protobuf does not take, or of several kinds
            expected = "numbers or texts, all of one kind"
            raise InvalidRequest(f"{where}.{name}: expected {expected}, got {shown(value)}") from None
    return example.SerializeToString()


def encode_predict(signature: Signature, is_row: bool, outputs: list[np.ndarray]) -> bytes:
    names, rows = list(signature.outputs), outputs[0].shape[:1]
    if is_row and (not rows or any(output.shape[:1] != rows for output in outputs)):
        shapes = [list(output.shape) for output in outputs]
        raise InvalidRequest(f"Outputs {names} of shapes {shapes} have not one row for each instance")
    if len(names) == 1:
        text = json_text(outputs[0])
    elif is_row:
        step, texts = max(1, SLICE * rows[0] // max(1, sum(output.size for output in outputs))), []
        for i in range(0, rows[0], step):
            columns = [output[i : i + step].tolist() for output in outputs]
            texts.append(json.dumps([dict(zip(names, row)) for row in zip(*columns)], ensure_ascii=False)[1:-1])
        text = "[" + ", ".join(texts) + "]"
    else:
        text = "{" + ", ".join(f"{json.dumps(name)}: {json_text(output)}" for name, output in zip(names, outputs)) + "}"
    text = f'{{"{"predictions" if is_row else "outputs"}": {text}}}'
    return text.encode("utf-8", "surrogateescape")  # strings that are not UTF-8 pass as they are


def encode_results(signature: Signature, verb: str, examples: int, outputs: list[np.ndarray]) -> bytes:
    """Classify: [label, score] for each class of each example; regress: one number each."""
    named, shapes = dict(zip(signature.outputs, outputs)), {output.shape for output in outputs}
    if verb == "regress" and named.keys() == {"outputs"} and shapes <= {(examples,), (examples, 1)}:
        return f'{{"results": {json_text(named["outputs"].reshape(-1))}}}'.encode()
    shape = next(iter(shapes))
    if (
        verb == "regress"
        or not named.keys() <= {"classes", "scores"}
        or len(shapes) > 1
        or (len(shape) != 2 or shape[0] != examples)
    ):
        expected = "'outputs' [n]" if verb == "regress" else "'classes', 'scores' or both, [n, classes]"
        raise InvalidRequest(f"To {verb} {examples} examples there must be {expected}, not {list(named)} {shapes}")
    columns = [
        named.get(name, np.full(shape, default)).tolist() for name, default in (("classes", ""), ("scores", 0.0))
    ]
    results = [list(map(list, zip(*row))) for row in zip(*columns)]
    return json.dumps({"results": results}, ensure_ascii=False).encode("utf-8", "surrogateescape")
