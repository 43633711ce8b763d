"""The :classify and :regress of TensorFlow Serving's REST contract: cases of its own tests, and its words for what is wrong."""

import functools
import json
import math

import numpy as np
import pytest
from ray_tensorflow import Signature, TensorSpec, encode_classify, encode_regress, import_tensorflow, parse_examples, parse_json

INF = math.inf


# -- requests ----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> list[dict]:
    """The examples of a JSON document as plain values: feature name to (kind, values), read by TensorFlow itself."""
    Example = import_tensorflow().train.Example
    found = []
    for serialized in parse_examples(parse_json(text.encode())):
        features = Example.FromString(serialized).features.feature
        kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
        found.append({name: (kind, list(getattr(features[name], kind).value) if kind else []) for name, kind in kinds.items()})
    return found


def of_bytes(*values):
    return "bytes_list", list(values)


def of_floats(*values):
    return "float_list", [float(np.float32(value)) for value in values]


def of_ints(*values):
    return "int64_list", list(values)


@pytest.mark.parametrize("text, examples", [
    ('{"examples": [{"names": ["foo", "bar"], "ratings": [8.0, 9.0], "age": 20}, {"names": ["baz"], "ratings": 6.0}]}',
     [{"names": of_bytes(b"foo", b"bar"), "ratings": of_floats(8, 9), "age": of_ints(20)},
      {"names": of_bytes(b"baz"), "ratings": of_floats(6)}]),
    ('{"examples": [{"names": ["baz", {"b64": "aGVsbG8="}], "mix": [1, true, false]}, {"r": -Infinity}]}',
     [{"names": of_bytes(b"baz", b"hello"), "mix": of_ints(1, 1, 0)}, {"r": of_floats(-INF)}]),
    ('{"context": {"query": "pizza", "location": ["sfo"]}, "examples": [{"a": 1}, {"a": 2, "query": "mine"}]}',
     [{"query": of_bytes(b"pizza"), "location": of_bytes(b"sfo"), "a": of_ints(1)},
      {"query": of_bytes(b"mine"), "location": of_bytes(b"sfo"), "a": of_ints(2)}]),
    ('{"examples": [{}, {"empty": []}]}', [{}, {"empty": (None, [])}]),
    ('{"examples": [{"x": 1, "x": 2.5}]}', [{"x": of_floats(2.5)}]),
    ('{"examples": [{"x": [9223372036854775807, -9223372036854775808, -1, 0, 127, 128]}]}',
     [{"x": of_ints(2**63 - 1, -2**63, -1, 0, 127, 128)}]),
    ('{"examples": [{"x": 18446744073709551616, "y": -9223372036854775809, "z": 1e300}]}',
     [{"x": of_floats(2**64), "y": of_floats(-2**63), "z": of_floats(INF)}]),
    ('{"examples": [{"x": [1e2, 0.1, -0.0]}]}', [{"x": of_floats(100, 0.1, -0.0)}]),
    ('{"examples": [{"grüß": "ü\\u0000", "": "", "b": {"b64": ""}}]}',
     [{"grüß": of_bytes("ü\0".encode()), "": of_bytes(b""), "b": of_bytes(b"")}]),
    ('{"examples": [{"b": [{"b64": "aGVs\\nbG8="}, {"b64": "aGVsbG8"}]}]}', [{"b": of_bytes(b"hello", b"hello")}]),
    (json.dumps({"examples": [{"x": ["a" * 1000] * 100}]}), [{"x": of_bytes(*[b"a" * 1000] * 100)}]),
])
def test_examples_become_what_tensorflow_reads(text, examples):
    assert parsed(text) == examples


def test_not_a_number_becomes_one():
    assert math.isnan(parsed('{"examples": [{"x": NaN}]}')[0]["x"][1][0])


BAD_DOCUMENTS = [
    ("{}", 'JSON Value: {} When method is classify, key \'examples\' is expected and was not found'),
    ('{"context": [{"names": ["foo", "bar"]}]}', "Example must be JSON object but got JSON Array"),
    ('{"context": null, "examples": [{}]}', "Example must be JSON object but got JSON Null"),
    ('{"context": {"x": null}}', "Feature: x has element with unexpected JSON type: Null"),
    ('{"examples": {"names": ["foo", "bar"]}}', "Expecting 'examples' value to be an list/array"),
    ('{"examples": []}', "'examples' value is an empty array"),
    ('{"examples": [[{"names": ["foo", "bar"]}]]}', "Example must be JSON object but got JSON Array"),
    ('{"examples": [{}, 5]}', "Example must be JSON object but got JSON Number"),
    ('{"examples": [{"names": [10, null]}]}', "Feature: names has element with unexpected JSON type: Null"),
    ('{"examples": [{"names": [10, {"test": 10}]}]}', "Feature: names has element with unexpected JSON type: Object"),
    ('{"examples": [{"names": [[10], 20]}]}', "Feature: names has element with unexpected JSON type: Array"),
    ('{"examples": [{"names": [10, 10.0]}]}', "Unexpected element type in feature: names expecting type: int64"),
    ('{"examples": [{"names": [1.0, 2]}]}', "Unexpected element type in feature: names expecting type: float"),
    ('{"examples": [{"names": ["a", true]}]}', "Unexpected element type in feature: names expecting type: bytes"),
    ('{"examples": [{"names": [20, 18446744073709551603]}]}', "Feature: names has uint64_t element. Only int64_t is supported."),
    ('{"examples": [{"names": {"b64": "*"}}]}', "Unable to base64 decode"),
    ('{"signature_name": ["hello"], "examples": [{"names": ["foo", "bar"]}]}', "'signature_name' key must be a string value."),
    ("", "JSON Parse error: The document is empty"),
    ("[]", "JSON Value: [] Is not object"),
]


@pytest.mark.parametrize("text, message", BAD_DOCUMENTS)
def test_a_bad_document_is_refused_before_the_model_is_looked_up(front_end, text, message):
    answer = front_end.post("/v1/models/nope:classify", text)
    assert answer.status == 400 and message in answer.json["error"]


# -- answers -----------------------------------------------------------------------------------------------------------


def encode(encoder, **outputs) -> str:
    """What the encoder writes for two examples, or as many as the first output has rows."""
    outputs = {name: np.array(value, object if name == "classes" else np.float32) for name, value in sorted(outputs.items())}
    specs = {name: TensorSpec(array.dtype.name, None) for name, array in outputs.items()}
    signature = Signature("s", {"inputs": TensorSpec("object", (None,))}, specs, False, False)
    return encoder(signature, len(next(iter(outputs.values()))), list(outputs.values())).body.decode()


@pytest.mark.parametrize("encoder, outputs, text", [
    (encode_classify, {"classes": [[b"car", b"bike", b"bus"], [b"car", b"bike", b"bus"]], "scores": [[0.2, 0.7, 0.1], [0.7, 0.1, 0.2]]},
     '{"results": [[["car", 0.2], ["bike", 0.7], ["bus", 0.1]], [["car", 0.7], ["bike", 0.1], ["bus", 0.2]]]}'),
    (encode_classify, {"scores": [[12.0]]}, '{"results": [[["", 12.0]]]}'),
    (encode_classify, {"classes": [[b"a"], ["\"ü".encode()]]}, '{"results": [[["a", 0.0]], [["\\"ü", 0.0]]]}'),
    (encode_classify, {"scores": [[math.nan, INF, -INF]]}, '{"results": [[["", NaN], ["", Infinity], ["", -Infinity]]]}'),
    (encode_regress, {"outputs": [0.2, 0.9, 1.0]}, '{"results": [0.2, 0.9, 1.0]}'),
    (encode_regress, {"outputs": [[0.2], [INF], [1], [-INF], [math.nan]]}, '{"results": [0.2, Infinity, 1.0, -Infinity, NaN]}'),
])
def test_results_are_written_as_tensorflow_serving_does(encoder, outputs, text):
    assert encode(encoder, **outputs) == text


# -- over HTTP ---------------------------------------------------------------------------------------------------------

EXAMPLES = [{"x": [0.25, 0.75], "name": "ü"}, {"x": [1.0, 2.0]}]


@pytest.mark.parametrize("method, signature, results", [
    ("classify", "classify", [[["ü-a", 0.25], ["ü-b", 0.75]], [["-a", 1.0], ["-b", 2.0]]]),
    ("classify", "only_scores", [[["", 0.25], ["", 0.75]], [["", 1.0], ["", 2.0]]]),
    ("classify", "scores_and_other", [[["", 0.25], ["", 0.75]], [["", 1.0], ["", 2.0]]]),
    ("classify", "only_classes", [[["ü-a", 0.0], ["ü-b", 0.0]], [["-a", 0.0], ["-b", 0.0]]]),
    ("regress", "regress", [1.0, 3.0]),
    ("regress", "regress_column", [1.0, 3.0]),
])
def test_a_model_classifies_and_regresses(front_end, method, signature, results):
    for path in ("scores", "scores/versions/1"):
        answer = front_end.post(f"/v1/models/{path}:{method}", {"signature_name": signature, "examples": EXAMPLES})
        assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
        assert answer.json == {"results": results}


def test_a_context_counts_where_an_example_says_nothing(front_end):
    document = {"signature_name": "classify", "context": {"name": "all", "x": [5.0, 6.0]}, "examples": [{}, {"name": "own"}]}
    assert front_end.post("/v1/models/scores:classify", document).json == {
        "results": [[["all-a", 5.0], ["all-b", 6.0]], [["own-a", 5.0], ["own-b", 6.0]]]}


def test_concurrent_requests_get_their_own_results(front_end, clients):
    examples = [[{"x": [float(i), j / 2]} for j in range(1 + i % 3)] for i in range(60)]
    documents = [{"signature_name": "regress", "examples": part} for part in examples]
    answers = clients(20, functools.partial(front_end.post, "/v1/models/scores:regress"), documents)
    assert [answer.json["results"] for answer in answers] == [[i + j / 2 for j in range(1 + i % 3)] for i in range(60)]


@pytest.mark.parametrize("path, signature, status, message", [
    ("nope:classify", "classify", 404, "Servable not found for request: Latest(nope)"),
    ("scores/versions/50:regress", "regress", 404, "Servable not found for request: Specific(scores, 50)"),
    ("scores/labels/latest:regress", "regress", 400, "Unrecognized servable version label: latest"),
    ("scores/versions/18446744073709551615:regress", "regress", 400,
     "Failed to convert version: 18446744073709551615 to numeric."),
    ("scores/versions/HELLO:regress", "regress", 400, "Malformed request: POST /v1/models/scores/versions/HELLO:regress"),
    ("scores/versions/1/labels/a:regress", "regress", 400,
     "Malformed request: POST /v1/models/scores/versions/1/labels/a:regress"),
    ("scores/version/1:regress", "regress", 400, "Malformed request: POST /v1/models/scores/version/1:regress"),
    ("scores:CLASSIFY", "classify", 400, "Malformed request: POST /v1/models/scores:CLASSIFY"),
    ("scores:classify", "nope", 400, "No signature was found with the name: nope"),
    ("scores:classify", "serving_default", 400,
     "Expected classification signature method_name to be tensorflow/serving/classify. Was: tensorflow/serving/predict"),
    ("scores:regress", "classify", 400,
     "Expected regression signature method_name to be tensorflow/serving/regress. Was: tensorflow/serving/classify"),
    ("scores:classify", "classify_named", 400, "No classification inputs found in SignatureDef: classify_named"),
    ("scores:regress", "regress_two", 400, "Expected one input Tensor."),
    ("scores:classify", "classify_other", 400,
     'Expected classification signature outputs to contain at least one of "classes" or "scores"'),
    ("scores:classify", "classify_flat", 400, "Expected Tensor shape: [batch_size num_classes] but got [2]"),
    ("scores:classify", "classify_first", 400, "Expected scores output batch size of 2. Got: 1"),
    ("scores:classify", "classify_uneven", 400, "should match in num_classes. Got 2 vs. 1"),
    ("scores:classify", "classify_three", 400, "Expected one or two output Tensors, found 3"),
    ("scores:classify", "classify_numbers", 400, "Expected classes Tensor of DT_STRING. Got: DT_FLOAT"),
    ("scores:classify", "classify_double", 400, "Expected scores Tensor of DT_FLOAT. Got: DT_DOUBLE"),
    ("scores:regress", "regress_both", 400, "Expected one output Tensor."),
    ("scores:regress", "regress_other", 400, "No regression outputs found in SignatureDef"),
    ("scores:regress", "regress_wide", 400,
     "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [2,2]"),
    ("scores:regress", "regress_first", 400, "Input batch size did not match output batch size: 2 vs. 1"),
    ("scores:regress", "regress_int", 400, "Expected output Tensor of DT_FLOAT. Got: DT_INT32"),
])
def test_what_cannot_be_classified_or_regressed_says_why(front_end, path, signature, status, message):
    answer = front_end.post(f"/v1/models/{path}", {"signature_name": signature, "examples": EXAMPLES})
    assert answer.status == status and message in " ".join(answer.json["error"].split())


def test_one_tensor_may_be_the_output_of_two_names(front_end):
    answer = front_end.predict("scores", {"signature_name": "twice", "instances": [1.0]})
    assert answer.json == {"predictions": [{"a": 2.0, "b": 2.0}]}


@pytest.mark.parametrize("examples, message", [([{}], "x"), ([{"x": [1, 2]}], "x"), ([{"x": [1.0]}], "x")])
def test_an_example_that_the_model_cannot_read_is_refused_by_its_name(front_end, examples, message):
    answer = front_end.post("/v1/models/scores:regress", {"signature_name": "regress", "examples": examples})
    assert answer.status == 400 and message in answer.json["error"] and len(answer.json["error"]) < 500


@pytest.mark.parametrize("method, signature, x, results", [
    ("classify", "classify_x_to_y", 2.0, [[["", 3.0]]]),
    ("classify", "classify_x_to_y", 20.0, [[["", 12.0]]]),
    ("regress", "regress_x_to_y", 2.0, [3.0]),
    ("regress", "regress_x_to_y", 80.0, [42.0]),
    ("regress", "regress_x_to_y2", 2.0, [4.0]),
])
def test_half_plus_two_answers_as_in_tensorflow_servings_tests(front_end, models, method, signature, x, results):
    if (model := "saved_model_half_plus_two_cpu") not in models:
        pytest.skip(f"{model} is not here")
    answer = front_end.post(f"/v1/models/{model}:{method}", {"signature_name": signature, "examples": [{"x": x}]})
    assert answer.json == {"results": results}
