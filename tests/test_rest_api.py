"""TensorFlow Serving's own cases, the rules of its code, and our few others, without Ray.

All bodies go through the one door that the workers use, ``decode``: arrays come out, and what makes outputs the answer.
"""

import base64
import contextlib
import gc
import gzip
import io
import json
import math
import os

import numpy as np
import pytest
from conftest import forget_peak, in_a_process_of_its_own, memory_mb
from test_json_codec import FLOATS, INTEGERS, assert_same, refused, strings
from test_npy_codec import loaded, npy, npz

import shared_graph.rest_api as module
from shared_graph.bodies import FREE_BYTES, MAX_BODY_BYTES, MAX_RATIO, HttpBody
from shared_graph.errors import InvalidRequest
from shared_graph.json_codec import MAX_VALUES, json_ready, survey
from shared_graph.models import Signature, TensorSpec
from shared_graph.rest_api import MAX_CAST_BYTES, decode
from shared_graph.tensorflow_runtime import import_tensorflow

nan, inf = math.nan, math.inf


def signature(inputs: dict, outputs=("y",), method: str = "predict", name: str = "serving_default") -> Signature:
    """With inputs by name and numpy's dtype, as all that the codec looks at; "object" are strings."""
    specs = {input: TensorSpec(dtype, None) for input, dtype in sorted(inputs.items())}
    return Signature(
        name, specs, dict.fromkeys(outputs, TensorSpec("float32", None)), f"tensorflow/serving/{method}", False, False
    )


def predict(body: str | bytes, is_gzip: bool = False, **inputs: str) -> dict[str, np.ndarray]:
    """The arrays that a signature with these inputs is fed with."""
    body = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    decoded = decode({"serving_default": signature(inputs)}, "predict", HttpBody(body, is_gzip))
    return dict(zip(decoded.signature.inputs, decoded.feed))


def answer(verb: str, document: dict, **outputs) -> bytes:
    """The body of the answer with these outputs to a request."""
    inputs = {"x": "int32"} if verb == "predict" else {"inputs": "object"}
    decoded = decode(
        {"serving_default": signature(inputs, outputs, verb)}, verb, HttpBody(json.dumps(document).encode())
    )
    assert decoded.is_json
    return decoded.encode([json_ready(np.asarray(output), name) for name, output in outputs.items()])


def by_row(**outputs) -> bytes:
    return answer("predict", {"instances": [0]}, **outputs)


def by_column(**outputs) -> bytes:
    return answer("predict", {"inputs": [0]}, **outputs)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_decompressed_or_becomes_huge_is_refused():
    for body in (b"", b"{}", gzip.compress(b"{}")[:5], gzip.compress(b'{"instances": [1]}')[:-12]):
        refused("JSON", predict, body, True, x="int32")
    refused("64 MiB", predict, gzip.compress(bytes(65 * 2**20), 1), True, status=413, x="int32")
    refused("64 MiB", predict, gzip.compress(b'{"instances": [' + b"[]," * 2**20), True, status=413, x="int32")


LONG_NUMBER = b"1" * 20 + b","  # by which it is the standard library that reads
HEAVIEST = [  # an element, and what is before the first one
    (b"[" * 30 + b"]" * 30, LONG_NUMBER + '"\U0001f600",'.encode()),
    (b"[" * 30 + b"]" * 30, b""),
    ('"\u0100"'.encode(), b""),
    (b"[1e1]", b""),
    (b'{"a":0}', b""),
]


def heavy_body(element: bytes, before: bytes, size_bytes: int = 100 * 2**10) -> bytes:
    """A packed document of as many of an element as are taken, and zeros behind it, so that it may unpack to more."""
    count = (MAX_RATIO * size_bytes - 1000) // (len(element) + 1)
    while True:
        document = b'{"instances": [' + before + b",".join([element] * count) + b"]}"
        with contextlib.suppress(InvalidRequest):
            survey(document)
            return gzip.compress(document, 1).ljust(size_bytes, b"\0")
        count = count * 9 // 10


@in_a_process_of_its_own
def test_a_body_of_100_kib_takes_less_than_200_mb_for_a_moment_however_many_objects_it_is():
    """It was nearly 400 with lists in lists, which are 96 bytes and counted as one value."""
    before_mb = memory_mb(os.getpid(), "VmRSS")
    for heaviest in HEAVIEST:
        forget_peak(os.getpid())
        try:
            predict(heavy_body(*heaviest), True, x="object" if b'"' in heaviest[0] else "float32")
        except InvalidRequest as error:
            assert error.status == 400, error
        assert memory_mb(os.getpid(), "VmHWM") < before_mb + 200, heaviest


def test_large_documents_are_read_one_at_a_time_without_the_garbage_collector_which_is_back_afterwards(monkeypatch):
    seen = []

    def read(content: bytes):
        seen.append((gc.isenabled(), module._reading_large.locked()))
        raise InvalidRequest("it is only looked at")

    for name in ("parse_json", "read_arrays"):
        monkeypatch.setattr(module, name, read)
    for body, is_held in ((b" " * FREE_BYTES, False), (b" " * (FREE_BYTES + 1), True),
                          (b"\x93NUMPY".ljust(FREE_BYTES + 1), False)):  # fmt: skip
        refused("only looked at", predict, body, x="int32")
        assert seen.pop() == (not is_held, is_held)
        assert gc.isenabled() and not module._reading_large.locked()


def test_what_has_too_many_values_is_refused_whatever_its_signature():
    body = b'{"signature_name": 5, "instances": [0' + b",0" * MAX_VALUES + b"]}"
    refused("values", predict, body, status=413, x="int32")


def test_gzip_may_have_several_members_and_hold_an_array():
    halves = gzip.compress(b'{"instances"') + gzip.compress(b": [1, 2]}")
    assert_same(predict(halves, True, x="int32")["x"], [1, 2], "int32")
    assert_same(predict(gzip.compress(npy(np.int32([1, 2]))), True, x="int32")["x"], [1, 2], "int32")


@pytest.mark.parametrize("named, chosen, words", [
    ({}, "serving_default", None), ({"signature_name": ""}, "serving_default", None),
    ({"signature_name": "é\n"}, "é\n", None),
    *[({"signature_name": name, "inputs": 5}, None, "signature_name must be a string") for name in (
        100, 10**30, None, True, {}, ["x" * 1000])],
    ({"signature_name": "Serving_Default", "inputs": 5}, None,
     'Serving signature name: "Serving_Default" not found in signature def')])  # fmt: skip
def test_the_signature_is_the_one_named_else_serving_default_and_a_wrong_one_is_refused_first(named, chosen, words):
    asked = {name: signature({"x": "int32"}, name=name) for name in ("serving_default", "é\n")}
    body = HttpBody(json.dumps({"instances": [1]} | named).encode(), False, "signature_name=none")
    if chosen:
        assert decode(asked, "predict", body).signature.name == chosen
    else:
        refused(words, decode, asked, "predict", body)


@pytest.mark.parametrize("body, inputs, expected", [
    (b'\xef\xbb\xbf \r\n\t{"instances": [1]}\n', {"x": "int32"}, {"x": [1]}),
    ('{"Instances": 5, "context": null, "deep": [[{"a": [{}]}]], "instances": [1]}', {"x": "int32"}, {"x": [1]}),
    (r'{"half": "\ud800", "nan": NaN, "instances": [1]}', {"x": "int32"}, {"x": [1]}),
    ('{"instances": [1], "instances": [2]}', {"x": "int32"}, {"x": [2]}),
    ('{"instances": [1, 2.0, 5.003, 0.007]}', {"x": "float32"}, {"x": [1, 2, 5.003, 0.007]}),
    ('{"instances": [{"x": [1]}, {"x": [2]}]}', {"x": "int64"}, {"x": [[1], [2]]}),
    ('{"instances": [{"b64": "aGVsbG8="}, "world"]}', {"x": "object"}, {"x": [b"hello", b"world"]}),
    ('{"instances": [{"b64": "aGk="}]}', {"b64": "object"}, {"b64": [b"hi"]}),
    ('{"instances": [{"x": [[{"b64": "aGVsbG8="}], ["world"]]}]}', {"x": "object"}, {"x": [[[b"hello"], [b"world"]]]}),
    ('{"instances": [{"i": [[1, 2]], "s": ["foo"], "f": NaN}, {"f": Infinity, "s": ["bar"], "i": [[3, 4]]}]}',
     {"i": "int32", "s": "object", "f": "float64"},
     {"i": [[[1, 2]], [[3, 4]]], "s": [[b"foo"], [b"bar"]], "f": [nan, inf]}),
    ('{"instances": [[], []]}', {"x": "float32"}, {"x": [[], []]}),
    ('{"inputs": {"i": [[1], [2]], "s": ["foo"], "b": {"b64": "aGk="}, "extra": {"z": null}}}',
     {"i": "int32", "s": "object", "b": "object"}, {"i": [[1], [2]], "s": [b"foo"], "b": b"hi"}),
    ('{"inputs": {"b64": "aGk="}}', {"x": "object"}, {"x": b"hi"}),
    ('{"inputs": {"b64": ["aGk="]}}', {"b64": "object"}, {"b64": [b"aGk="]}),
    ('{"instances": [{"b64": ["aGk="]}]}', {"b64": "object"}, {"b64": [[b"aGk="]]}),
    ('{"inputs": 3}', {"x": "float32"}, {"x": 3}),
    ('{"inputs": [[[], []]]}', {"x": "object"}, {"x": [[[], []]]})])  # fmt: skip
def test_a_request_becomes_an_array_for_each_input(body, inputs, expected):
    arrays = predict(body, **inputs)
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        assert_same(arrays[name], values, inputs[name])


X, N_AND_S = {"x": "float32"}, {"n": "int32", "s": "object"}


@pytest.mark.parametrize("inputs, body, where", [
    (X, "{}", "'instances'"), (X, '{"instances": [1], "inputs": [1]}', "'instances'"),
    (X, '{"instances": []}', "instances"), (X, '{"instances": null}', "instances"),
    (X, '{"instances": [{"x": 1}, {"x": 1, "y": 2}]}', "instances[1]"), (X, '{"instances": [{"x": 1}, 2]}', "[1]"),
    (X, '{"instances": [{"x": 1}, {"y": 1}]}', "instances[1]"),
    (X, '{"instances": [1, {"x": 1}]}', "instances[1]"), (X, '{"instances": [1, 2, null]}', "instances[2]"),
    (X, '{"instances": [[1, 2], [[3, 4], 5]]}', "instances[1][0]"),
    (X, '{"inputs": null}', "inputs"), (X, '{"inputs": {"y": [1]}}', "inputs"),
    (X, '{"inputs": {"x": [1, {"x": 1}]}}', "inputs.x[1]"), (X, '{"inputs": [[1], [2, 3]]}', "inputs[1]"),
    (X, json.dumps({"instances": [[0] * 9999 + ["x" * 10_000]]}), "instances[0][9999]"),
    (N_AND_S, '{"instances": [1, 2]}', "instances[0]"), (N_AND_S, '{"inputs": 3}', "inputs"),
    (N_AND_S, '{"instances": [{"n": 1, "s": "a"}, {"n": 1}]}', "instances[1]"),
    (N_AND_S, '{"instances": [{"n": 1, "s": "a"}, {"n": 1, "t": "a"}]}', "instances[1]"),
    (N_AND_S, '{"instances": [{"n": 1, "s": "a", "t": 2}]}', "instances[0]"),
    (N_AND_S, '{"instances": [{"n": 1, "s": "a"}, {"n": 1, "s": 2}]}', "s of instances[1]"),
    (N_AND_S, '{"inputs": {"n": 1}}', "inputs"),
    (N_AND_S, '{"inputs": {"n": 1, "s": [["a"], [2]]}}', "inputs.s[1]")])  # fmt: skip
def test_what_is_wrong_in_a_request_is_told_by_its_place(inputs, body, where):
    refused(where, predict, body, **inputs)


# -- examples ----------------------------------------------------------------------------------------------------------


def examples_of(text: str, verb: str = "classify") -> list[dict]:
    """The examples as plain values: feature name to (kind, values), read by TensorFlow itself."""
    asked = {"serving_default": signature({"inputs": "object"}, method=verb)}
    [serialized] = decode(asked, verb, HttpBody(text.encode())).feed
    found = []
    for features in map(import_tensorflow(whole=True).train.Example.FromString, serialized):
        kinds = {name: (feature, feature.WhichOneof("kind")) for name, feature in features.features.feature.items()}
        values = {name: kind and getattr(feature, kind).value for name, (feature, kind) in kinds.items()}
        found.append({name: (kind, list(values[name] or [])) for name, (_, kind) in kinds.items()})
    return found


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize("text, examples", [
    ('{"examples": [{"names": ["foo", "bar"], "ratings": [8.0, 9.0], "age": 20}, {"names": ["baz"], "ratings": 6.0}]}',
     [{"names": ("bytes_list", [b"foo", b"bar"]), "ratings": ("float_list", [8, 9]), "age": ("int64_list", [20])},
      {"names": ("bytes_list", [b"baz"]), "ratings": ("float_list", [6])}]),
    ('{"examples": [{"s": ["baz", {"b64": "aGVsbG8="}], "mix": [1, true, false]}, {"r": -Infinity}, {}]}',
     [{"s": ("bytes_list", [b"baz", b"hello"]), "mix": ("int64_list", [1, 1, 0])}, {"r": ("float_list", [-inf])}, {}]),
    ('{"context": {"query": "pizza", "n": [1, 2]}, "examples": [{"a": 1}, {"query": "mine"}]}',
     [{"query": ("bytes_list", [b"pizza"]), "n": ("int64_list", [1, 2]), "a": ("int64_list", [1])},
      {"query": ("bytes_list", [b"mine"]), "n": ("int64_list", [1, 2])}]),
    ('{"examples": [{"none": [], "a": 1}]}', [{"none": (None, []), "a": ("int64_list", [1])}]),
    ('{"examples": [{"x": [9223372036854775807, -9223372036854775808], "grüß": "ü\\u0000"}]}',
     [{"x": ("int64_list", [2**63 - 1, -2**63]), "grüß": ("bytes_list", ["ü\0".encode()])}])])  # fmt: skip
def test_examples_become_what_tensorflow_reads(text, examples, verb):
    assert examples_of(text, verb) == examples


@pytest.mark.parametrize("text, where", [
    ("{}", "examples"), ('{"examples": []}', "examples"), ('{"examples": {"x": 1}}', "examples"),
    ('{"examples": [{}, 5]}', "examples[1]"), ('{"context": null, "examples": [{}]}', "context"),
    *[(f'{{"examples": [{{"x": {wrong}}}]}}', "examples[0].x") for wrong in (
        "[10, null]", "[10, 10.0]", '["a", true]', "[[10], 20]", '{"y": 10}', '{"b64": "*"}', str(2**63), str(2**64),
        str(-2**63 - 1), "1" + "0" * 400)],
    ('{"examples": [{"x": ["a", {"b64": "*"}]}]}', 'examples[0].x: expected base64 in {"b64": "..."}'),
    ('{"examples": [{"x": [1, "a"]}]}', "examples[0].x: expected numbers or strings, all of one kind"),
    ('{"context": {"x": null}, "examples": [{}]}', "context.x")])  # fmt: skip
def test_a_wrong_example_is_told_by_its_place(text, where):
    refused(where, examples_of, text)


def test_a_context_that_would_be_many_times_as_large_before_each_example_is_refused():
    """A body of 410 kB took 5.2 GB."""
    text = '{"context": {"x": "%s"}, "examples": [%s]}'
    assert len(examples_of(text % ("a" * 1000, ", ".join(["{}"] * 1000)))) == 1000
    refused("context: too large", examples_of, text % ("a" * 200_000, ", ".join(["{}"] * 50_000)), status=413)


# -- answers -----------------------------------------------------------------------------------------------------------

TEXTS = [["hello", "world"], ["tf", '"é\\\n']]
WORDS = strings([[text.encode() for text in row] for row in TEXTS])
B64 = [[{"b64": base64.b64encode(word).decode()} for word in row] for row in WORDS]
ENDS = [np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype) for dtype in INTEGERS]


@pytest.mark.parametrize("outputs, rows, columns", [
    ({"y": np.int32([[1, 2], [3, 4]])}, [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
    ({"y": np.array([True, False])}, [True, False], [True, False]),
    *[({"y": ends}, ends.tolist(), ends.tolist()) for ends in ENDS],
    *[({"a": ends, "b": ends}, [{"a": end, "b": end} for end in ends.tolist()], {"a": ends.tolist(),
    "b": ends.tolist()})
      for ends in ENDS],
    ({"y": WORDS}, TEXTS, TEXTS), ({"y_bytes": WORDS}, B64, B64), ({"n_bytes": np.int64([1])}, [1], [1]),
    ({"i": np.int32([[1], [2]]), "s": WORDS, "s_bytes": WORDS, "é": np.float64([0.5, 2])},
     [{"i": [1], "s": TEXTS[0], "s_bytes": B64[0], "é": 0.5}, {"i": [2], "s": TEXTS[1], "s_bytes": B64[1], "é": 2.0}],
     {"i": [[1], [2]], "s": TEXTS, "s_bytes": B64, "é": [0.5, 2.0]}),
    ({"y": np.zeros((0, 2), np.float32)}, [], []), ({"y": np.zeros((2, 0), np.float32)}, [[], []], [[], []]),
    ({"a": np.zeros((0, 1, 2), object), "b": np.zeros((0, 3), np.float32)}, [], {"a": [], "b": []}),
    ({"y": np.int64(5)}, None, 5), ({"y": strings(b"a")}, None, "a"),  # outputs that are no rows
    ({"a": np.int32([1, 2]), "b": np.float32(0.1)}, None, {"a": [1, 2], "b": 0.1}),
    ({"a": np.int32([1, 2]), "b": np.zeros((1, 3), bool)}, None, {"a": [1, 2], "b": [[False] * 3]}),
    *[({"y": np.array([0.1, 0.5], dtype),
    "z": np.array([True, False])}, [{"y": 0.1, "z": True}, {"y": 0.5, "z": False}],
       {"y": [0.1, 0.5], "z": [True, False]}) for dtype in FLOATS]])  # fmt: skip
def test_outputs_become_predictions_by_row_and_outputs_by_column(outputs, rows, columns):
    assert json.loads(by_column(**outputs)) == {"outputs": columns}
    if rows is None:
        refused("row", by_row, **outputs)
    else:
        assert json.loads(by_row(**outputs)) == {"predictions": rows}


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_that_are_none_are_bare_tokens_in_every_format(dtype):
    floats = np.array([[0.1, nan], [inf, -inf]], dtype)
    assert by_row(y=floats) == b'{"predictions":[[0.1,NaN],[Infinity,-Infinity]]}'
    assert by_column(y=floats, s=WORDS[:, 0]) == (
        b'{"outputs":{"y":[[0.1,NaN],[Infinity,-Infinity]],"s":["hello","tf"]}}'
    )
    assert by_row(y=floats, z=floats[1]) == (
        b'{"predictions":[{"y":[0.1,NaN],"z":Infinity},{"y":[Infinity,-Infinity],"z":-Infinity}]}'
    )
    assert by_column(y=floats[1, 1], z=floats[0, 1]) == b'{"outputs":{"y":-Infinity,"z":NaN}}'


@pytest.mark.parametrize("shape", [(120_000,), (60_000, 2), (2, 60_000), (2, 3, 20_000)])
def test_a_large_answer_is_the_same_as_a_small_one(shape):
    values = np.arange(math.prod(shape)).reshape(shape)
    assert json.loads(by_row(y=values)) == {"predictions": values.tolist()}
    assert json.loads(by_row(a=values, b=values)) == {"predictions": [{"a": row, "b": row} for row in values.tolist()]}


def test_a_string_that_is_not_utf_8_passes_as_it_is_beside_others():
    odd = strings([b'\xff"\x80', b"a"])
    assert by_column(y=odd[:1]) == b'{"outputs":["\xff\\"\x80"]}'
    assert by_row(y=odd, z=np.int8([1, 2])) == b'{"predictions":[{"y":"\xff\\"\x80","z":1},{"y":"a","z":2}]}'
    refused("complex64", by_row, status=501, y=np.zeros(2, np.complex64))
    refused("complex64", predict, '{"inputs": [1, 2]}', status=501, x="complex64")


def test_the_rows_of_a_merged_run_are_the_answers_that_they_would_be_alone():
    outputs = {"s": WORDS, "y": np.float32([[0.1, 2], [nan, 4]]), "n": np.int64([1, 2])}
    decoded = decode({"serving_default": signature(X, outputs)}, "predict", HttpBody(b'{"instances": [0]}'))
    together = [json_ready(output, name) for name, output in outputs.items()]
    for i in range(2):
        alone = [json_ready(output[i : i + 1], name) for name, output in outputs.items()]
        assert decoded.encode([output[i : i + 1] for output in together]) == decoded.encode(alone)


CLASSES, SCORES = strings([[b"a", b"b"], [b"c", "ü".encode()]]), np.float32([[0.2, 0.7], [inf, nan]])


@pytest.mark.parametrize("verb, outputs, text", [
    ("classify", {"classes": CLASSES, "scores": SCORES}, '[[["a",0.2],["b",0.7]],[["c",Infinity],["ü",NaN]]]'),
    ("classify", {"classes": CLASSES, "scores": SCORES[:1].repeat(2, 0)},
    '[[["a",0.2],["b",0.7]],[["c",0.2],["ü",0.7]]]'),
    ("classify", {"scores": SCORES}, '[[["",0.2],["",0.7]],[["",Infinity],["",NaN]]]'),
    ("classify", {"classes": CLASSES}, '[[["a",0.0],["b",0.0]],[["c",0.0],["ü",0.0]]]'),
    ("regress", {"outputs": np.float32([0.2, -inf])}, "[0.2,-Infinity]"),
    ("regress", {"outputs": np.float32([[0.2], [1]])}, "[0.2,1.0]"),
    *[("classify", outputs, None) for outputs in (
        {"other": SCORES}, {"scores": SCORES[0]}, {"scores": SCORES[:1]},
        {"classes": CLASSES, "scores": SCORES[:, :1]})],
    *[("regress", outputs, None) for outputs in (
        {"other": SCORES[0]}, {"outputs": SCORES}, {"outputs": SCORES[0, :1]}, {"outputs": SCORES[0,
        0]})]])  # fmt: skip
def test_results_are_labels_with_scores_or_numbers_and_other_outputs_are_refused(verb, outputs, text):
    if text is None:
        refused(verb, answer, verb, {"examples": [{}] * 2}, **outputs)
    else:
        assert answer(verb, {"examples": [{}] * 2}, **outputs).decode() == f'{{"results":{text}}}'


@pytest.mark.parametrize("verb, method, inputs", [
    ("classify", "predict", {"inputs": "object"}),
    ("regress", "regress", {"inputs": "object", "x": "float32"})])  # fmt: skip
def test_a_signature_for_something_else_neither_classifies_nor_regresses(verb, method, inputs):
    asked = {"serving_default": signature(inputs, method=method)}
    refused(verb, decode, asked, verb, HttpBody(b'{"examples": [{}]}'))


# -- arrays as files ---------------------------------------------------------------------------------------------------


def file_answer(body: bytes, inputs: dict, outputs: dict, query: str = "") -> bytes:
    asked = {name: signature(inputs, outputs, name=name) for name in ("serving_default", "other é")}
    decoded = decode(asked, "predict", HttpBody(body, False, query))
    assert not decoded.is_json
    assert decoded.signature.name == ("other é" if query else "serving_default")
    return decoded.encode(list(outputs.values()))


def test_a_file_is_answered_with_a_file_by_columns():
    x = np.float32([[1, 2]])
    assert loaded(file_answer(npy(x), X, {"y": x}))[""].tolist() == x.tolist()
    body = npz(n=np.array(3), s=np.array(["é"]))
    several = loaded(
        file_answer(body, N_AND_S, {"a": np.array(5), "b": WORDS}, "a=%ff&signature_name=other+%C3%A9&"[5:])
    )
    assert several["a"] == 5 and several["b"].tolist() == WORDS.tolist()


@pytest.mark.parametrize("query", [
    "signature_name=other&signature_name=other", "signature_name=%ff", "&".join(["a=1"] * 101)])  # fmt: skip
def test_a_query_that_cannot_be_read_is_refused_where_it_counts(query):
    body = HttpBody(npy(np.ones(2)), False, query)
    refused("signature_name", decode, {"serving_default": signature(X)}, "predict", body)
    assert decode({"serving_default": signature(X)}, "predict", HttpBody(b'{"inputs": 1}', False, query)).feed == [1]


def test_a_signature_that_is_not_there_is_refused_before_the_file_is_read():
    body = HttpBody(b"\x93NUMPY", False, "signature_name=no")
    refused('Serving signature name: "no" not found', decode, {"serving_default": signature(X)}, "predict", body)


@pytest.mark.parametrize("array, dtype, expected", [
    (np.int8([1, 2]), "float32", [1, 2]), (np.float64([0.1, 1e300]), "float32", [0.1, inf]), (np.int64([5]),
    "int8", [5]),
    (np.array([">f4"], "S3"), "object", [b">f4"]), (np.array(["é", "a\0b"]), "object", ["é".encode(), b"a\0b"]),
    (np.array([1, 2], ">i4"), "int32", [1, 2]), (np.asfortranarray([[1, 2], [3, 4]]), "int64", [[1, 2], [3, 4]]),
    (np.array(3), "int32", 3), (np.zeros((0, 2)), "int32", np.zeros((0, 2))), (np.float32([1]),
    "float16", [1])])  # fmt: skip
def test_an_array_of_another_dtype_is_cast_where_nothing_is_lost(array, dtype, expected):
    assert_same(predict(npy(array), x=dtype)["x"], expected, dtype)
    assert_same(predict(npz(x=array), x=dtype)["x"], expected, dtype)


def test_a_bfloat16_array_comes_as_the_bytes_that_numpy_makes_of_it():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    assert predict(npy(np.array([1.5, 2], bfloat16)), x="bfloat16")["x"].tolist() == [1.5, 2]


@pytest.mark.parametrize("array, dtype, words", [
    (np.array(["a"]), "float32", "'x' takes float32, not strings"), (np.array([b"ab"]),
    "int64", "'x' takes int64, not strings"),
    (np.float32([1]), "object", "'x' takes strings or bytes, not float32"), (np.float32([1]),
    "int32", "'x' takes int32, not float32"),
    (np.int32([300]), "int8", "range of int8"), (np.int64([1, -1]), "uint8", "range of uint8"),
    (np.array(["2020"], "M8[Y]"), "int64", "'x' takes int64"),
    (np.zeros(2, "V2"), "float16", "'x' takes float16, not |V2"), (np.zeros(2, "V2"), "int16", "'x' takes int16"),
    (np.zeros(2, "V8"), "object", "'x' takes strings or bytes"), (np.array(["\ud800"]),
    "object", "surrogate")])  # fmt: skip
def test_an_array_that_would_lose_something_is_refused_with_the_dtype_that_is_wanted(array, dtype, words):
    refused(words, predict, npy(array), x=dtype)
    refused(words, predict, npz(x=array), x=dtype)


def test_names_that_do_not_fit_are_refused_with_those_that_would():
    for body in (npz(y=np.ones(2)), npz(np.savez, **{"é" * 9000: np.ones(2)}), npz(x=np.ones(1), y=np.ones(1))):
        refused("['x']", predict, body, x="float32")
    refused("['n', 's'], not one array", predict, npy(np.ones(2)), **N_AND_S)


def test_a_file_is_for_predict_alone_and_bounded_as_any_body():
    asked = {"serving_default": signature({"inputs": "object"}, method="classify")}
    refused("JSON", decode, asked, "classify", HttpBody(npy(np.array([b"a"]))))
    file = io.BytesIO()
    np.savez_compressed(file, x=np.zeros(MAX_BODY_BYTES + 1, np.int8))
    refused("64 MiB", predict, file.getvalue(), status=413, x="int8")


def test_an_array_that_would_grow_past_the_limit_when_it_is_cast_is_not():
    array = np.zeros(MAX_CAST_BYTES // 8 + 1, np.int8)
    refused("float64, as which it is larger than 128 MiB", predict, npy(array), status=413, x="float64")
    assert predict(npy(array[1:]), x="float64")["x"].nbytes == MAX_CAST_BYTES
    asked = {"serving_default": signature({"x": "float64"})}
    assert decode(asked, "arrays", ("", array)).feed[0].nbytes > MAX_CAST_BYTES  # the program's own are its own


# -- from Python, and adds ---------------------------------------------------------------------------------------------


def test_adds_and_arrays_from_python_are_taken_as_they_are():
    adder = {"serving_default": signature({"value": "float64"}, ("sum",))}
    decoded = decode(adder, "add", 3.5)
    assert decoded.feed[0].tolist() == [3.5] and not decoded.is_json
    assert decoded.encode([np.float64([7])]) == 7.0
    decoded = decode(adder, "arrays", ("", {"value": np.int8([1, 2])}))
    assert decoded.feed[0].dtype == np.float64 and not decoded.is_json
    assert decoded.encode([np.float64([1, 3])])["sum"].tolist() == [1, 3]
    refused("['value'], not ['x']", decode, adder, "arrays", ("", {"x": np.ones(2)}))
    refused("signature def", decode, adder, "arrays", ("no", np.ones(2)))
    for value, kind in [([2**70], "object"), ([None, 1.0], "object"), ([1.0, "a"], "strings")]:
        refused(f"'value' takes float64, not {kind}", decode, adder, "arrays", ("", np.array(value, object)))


@pytest.mark.parametrize(
    ["shape", "is_refused"], [((), True), ((3,), True), ((2,), False), ((None, 5), False), (None, False)]
)
def test_what_writes_is_refused_before_it_runs_where_static_shapes_tell_that_its_outputs_have_other_rows(
    shape, is_refused
):
    writing = signature({"x": "int32"}, {"loss": "float32"}, name="train")
    writing.outputs["loss"], writing.mutates_state = TensorSpec("float32", shape), True
    by_rows, by_columns = ({"signature_name": "train", where: [1, 2]} for where in ("instances", "inputs"))
    assert decode({"train": writing}, "predict", HttpBody(json.dumps(by_columns).encode(), False, ""))
    if is_refused:
        body = HttpBody(json.dumps(by_rows).encode(), False, "")
        refused("Nothing was changed", decode, {"train": writing}, "predict", body)
    else:
        assert decode({"train": writing}, "predict", HttpBody(json.dumps(by_rows).encode(), False, ""))
