"""The JSON codec and the paths without Ray: TensorFlow Serving's own cases, the rules of its code, and our few others.

All bodies go through the one door that the workers use, ``decode``: arrays come out, and what makes outputs the answer.
"""

import base64
import gzip
import json
import math

import numpy as np
import pytest

from shared_graph.errors import InvalidRequest
from shared_graph.http_api import match_path, parse_value
from shared_graph.json_codec import plain
from shared_graph.models import Signature, TensorSpec
from shared_graph.rest_api import decode
from shared_graph.tensorflow_runtime import import_tensorflow

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
nan, inf = math.nan, math.inf


def signature(inputs: dict, outputs=("y",), method: str = "predict", name: str = "serving_default") -> Signature:
    """With inputs by name and numpy's dtype, as all that the codec looks at; "object" are strings."""
    specs = {input: TensorSpec(dtype, None) for input, dtype in sorted(inputs.items())}
    return Signature(name, specs, dict.fromkeys(outputs), f"tensorflow/serving/{method}", writes=False, calls_out=False)


def predict(body: str | bytes, is_gzip: bool = False, **inputs: str) -> dict[str, np.ndarray]:
    """The arrays that a signature with these inputs is fed with."""
    body = body if isinstance(body, bytes) else body.encode()
    asked, feed, _ = decode({"serving_default": signature(inputs)}, "predict", (body, is_gzip))
    return dict(zip(asked.inputs, feed))


def column(text: str, dtype: str) -> np.ndarray:
    """The array that a JSON value in columnar format becomes."""
    return predict(f'{{"inputs": {text}}}', x=dtype)["x"]


def strings(values) -> np.ndarray:
    array = np.empty(np.shape(values), object)
    array[...] = values
    return array


def answer(verb: str, document: dict, **outputs) -> bytes:
    """The body of the answer with these outputs to a request."""
    inputs = {"x": "int32"} if verb == "predict" else {"inputs": "object"}
    asked = {"serving_default": signature(inputs, outputs, verb)}
    _, _, encode = decode(asked, verb, (json.dumps(document).encode(), False))
    return encode([plain(np.asarray(output), name) for name, output in outputs.items()])


def by_row(**outputs) -> bytes:
    return answer("predict", {"instances": [0]}, **outputs)


def by_column(**outputs) -> bytes:
    return answer("predict", {"inputs": [0]}, **outputs)


def refused(where: str, function, *arguments, status: int = 400, **more) -> None:
    """Calling it is answered with this status and with one sentence, not too long, that has this in it."""
    with pytest.raises(InvalidRequest) as caught:
        function(*arguments, **more)
    assert caught.value.status == status
    assert where in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def assert_same(array: np.ndarray, expected, dtype: str) -> None:
    """Equal in dtype, shape and values, the sign of zero included."""
    expected = strings(expected) if dtype == "object" else np.array(expected, dtype)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(array, expected)
    if dtype in FLOATS:
        np.testing.assert_array_equal(np.signbit(array), np.signbit(expected))


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, words",
    [
        *[
            (body, "JSON")
            for body in (
                b"",
                b" ",
                b"instances = [1, 2]",
                b'{"instances": [nan]}',
                b'{"instances": [1,]}',
                b'{"instances": [1]',
                b'{"instances": [1]} {}',
                b'{"x": "\xff", "instances": [1]}',
                b"\xff\xfe{\0}\0",
                b"[" * 100_000,
                b'{"instances": [' + b"1" * 5_000 + b"]}",
            )
        ],
        *[(body, "object") for body in ("[]", "1", '"instances"', "null", "NaN", json.dumps([1] * 10_000))],
    ],
)
def test_what_is_not_json_or_no_object_is_refused(body, words):
    refused(words, predict, body, x="float32")


def test_what_cannot_be_decompressed_or_becomes_huge_is_refused():
    for body in (b"", b"{}", gzip.compress(b"{}")[:5], gzip.compress(b'{"instances": [1]}')[:-12]):
        refused("JSON", predict, body, True, x="int32")
    refused("64 MiB", predict, gzip.compress(bytes(65 * 2**20), 1), True, status=413, x="int32")


@pytest.mark.parametrize(
    "named, chosen, words",
    [
        ({}, "serving_default", None),
        ({"signature_name": ""}, "serving_default", None),
        ({"signature_name": "é\n"}, "é\n", None),
        *[
            ({"signature_name": name, "inputs": 5}, None, "signature_name")
            for name in (100, None, True, {}, ["x" * 1000])
        ],
        (
            {"signature_name": "Serving_Default", "inputs": 5},
            None,
            'Serving signature name: "Serving_Default" not found in signature def',
        ),
    ],
)
def test_the_signature_is_the_one_named_else_serving_default_and_a_wrong_one_is_refused_first(named, chosen, words):
    asked = {name: signature({"x": "int32"}, name=name) for name in ("serving_default", "é\n")}
    body = json.dumps({"instances": [1]} | named).encode(), False
    if chosen:
        assert decode(asked, "predict", body)[0].name == chosen
    else:
        refused(words, decode, asked, "predict", body)


@pytest.mark.parametrize(
    "body, inputs, expected",
    [
        (b'\xef\xbb\xbf \r\n\t{"instances": [1]}\n', {"x": "int32"}, {"x": [1]}),
        ('{"Instances": 5, "context": null, "deep": [[{"a": [{}]}]], "instances": [1]}', {"x": "int32"}, {"x": [1]}),
        ('{"instances": [1, 2.0, 5.003, 0.007]}', {"x": "float32"}, {"x": [1, 2, 5.003, 0.007]}),
        ('{"instances": [{"x": [1]}, {"x": [2]}]}', {"x": "int64"}, {"x": [[1], [2]]}),
        ('{"instances": [{"b64": "aGVsbG8="}, "world"]}', {"x": "object"}, {"x": [b"hello", b"world"]}),
        ('{"instances": [{"b64": "aGk="}]}', {"b64": "object"}, {"b64": [b"hi"]}),
        (
            '{"instances": [{"x": [[{"b64": "aGVsbG8="}], ["world"]]}]}',
            {"x": "object"},
            {"x": [[[b"hello"], [b"world"]]]},
        ),
        (
            '{"instances": [{"i": [[1, 2]], "s": ["foo"], "f": NaN}, {"f": Infinity, "s": ["bar"], "i": [[3, 4]]}]}',
            {"i": "int32", "s": "object", "f": "float64"},
            {"i": [[[1, 2]], [[3, 4]]], "s": [[b"foo"], [b"bar"]], "f": [nan, inf]},
        ),
        ('{"instances": [[], []]}', {"x": "float32"}, {"x": [[], []]}),
        (
            '{"inputs": {"i": [[1], [2]], "s": ["foo"], "b": {"b64": "aGk="}, "extra": {"z": null}}}',
            {"i": "int32", "s": "object", "b": "object"},
            {"i": [[1], [2]], "s": [b"foo"], "b": b"hi"},
        ),
        ('{"inputs": {"b64": "aGk="}}', {"x": "object"}, {"x": b"hi"}),
        ('{"inputs": 3}', {"x": "float32"}, {"x": 3}),
        ('{"inputs": [[[], []]]}', {"x": "object"}, {"x": [[[], []]]}),
    ],
)
def test_a_request_becomes_an_array_for_each_input(body, inputs, expected):
    arrays = predict(body, **inputs)
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        assert_same(arrays[name], values, inputs[name])


X, N_AND_S = {"x": "float32"}, {"n": "int32", "s": "object"}


@pytest.mark.parametrize(
    "inputs, body, where",
    [
        (X, "{}", "'instances'"),
        (X, '{"instances": [1], "inputs": [1]}', "'instances'"),
        (X, '{"instances": []}', "instances"),
        (X, '{"instances": null}', "instances"),
        (X, '{"instances": [{"x": 1}, {"x": 1, "y": 2}]}', "instances[1]"),
        (X, '{"instances": [{"x": 1}, 2]}', "[1]"),
        (X, '{"instances": [1, {"x": 1}]}', "instances[1]"),
        (X, '{"instances": [1, 2, null]}', "instances[2]"),
        (X, '{"instances": [[1, 2], 3]}', "instances[1]"),
        (X, '{"instances": [[1, 2], [[3, 4], 5]]}', "instances[1][0]"),
        (X, '{"instances": [[[1, 2], [3]]]}', "instances[0][1]"),
        (X, '{"instances": [[1], []]}', "instances[1]"),
        (X, '{"inputs": null}', "inputs"),
        (X, '{"inputs": {"y": [1]}}', "inputs"),
        (X, '{"inputs": {"x": [1, {"x": 1}]}}', "inputs.x[1]"),
        (X, '{"inputs": [[1], [2, 3]]}', "inputs[1]"),
        (X, json.dumps({"instances": [[0] * 9999 + ["x" * 10_000]]}), "instances[0][9999]"),
        (X, '{"inputs": ' + "[" * 70 + "1" + "]" * 70 + "}", "inputs"),
        (N_AND_S, '{"instances": [1, 2]}', "instances[0]"),
        (N_AND_S, '{"inputs": 3}', "inputs"),
        (N_AND_S, '{"instances": [{"n": 1, "s": "a"}, {"n": 1}]}', "instances[1]"),
        (N_AND_S, '{"instances": [{"n": 1, "s": "a", "t": 2}]}', "instances[0]"),
        (N_AND_S, '{"instances": [{"n": 1, "s": "a"}, {"n": 1, "s": 2}]}', "s of instances[1]"),
        (N_AND_S, '{"inputs": {"n": 1}}', "inputs"),
        (N_AND_S, '{"inputs": {"n": 1, "s": [["a"], [2]]}}', "inputs.s[1]"),
    ],
)
def test_what_is_wrong_in_a_request_is_told_by_its_place(inputs, body, where):
    refused(where, predict, body, **inputs)


@pytest.mark.parametrize(
    "text, dtypes, expected",
    [
        ("[7, -0]", (*FLOATS, *INTEGERS), [7, 0]),
        ("[-1.5, 1e3, -0.0, 0.1]", FLOATS, [-1.5, 1000, -0.0, 0.1]),
        ("[NaN, Infinity, -Infinity, 1e400, -1e400, 1e-400]", FLOATS, [nan, inf, -inf, inf, -inf, 0]),
        ("[1e39, -1e39]", ("float32", "float16"), [inf, -inf]),
        ("[1" + "0" * 400 + ", NaN]", FLOATS, [inf, nan]),
        (
            "[9007199254740993, 123456789012345678901234567890]",
            ("float64",),
            [2.0**53, 123456789012345678901234567890.0],
        ),
        *[
            (f"[{np.iinfo(dtype).min}, {np.iinfo(dtype).max}]", (dtype,), [np.iinfo(dtype).min, np.iinfo(dtype).max])
            for dtype in INTEGERS
        ],
        ("[true, false]", ("bool",), [True, False]),
        (r'["", "\u00e9\u20ac\ud83d\ude00", "a\u0000", "aGk="]', ("object",), [b"", "é€😀".encode(), b"a\0", b"aGk="]),
        ('[["a", {"b64": "AP8="}], [{"b64": ""}, "b"]]', ("object",), [[b"a", b"\0\xff"], [b"", b"b"]]),
        (r'[{"b64": "aGVsbG8"}, {"b64": " aG\nVs bG8= "}]', ("object",), [b"hello", b"hello"]),
    ],
)
def test_a_value_is_accepted(text, dtypes, expected):
    for dtype in dtypes:
        assert_same(column(text, dtype), expected, dtype)


@pytest.mark.parametrize(
    "right, wrong, dtypes",
    [
        ("1", "1.0", INTEGERS),
        ("1", "NaN", INTEGERS),
        ("1", "1" + "0" * 400, INTEGERS),
        *[("1", wrong, (*FLOATS, *INTEGERS)) for wrong in ("true", "null", '"1"', '{"b64": "AAAA"}')],
        ("true", "1", ("bool",)),
        ('"1"', "1", ("object",)),
        ('"1"', "null", ("object",)),
        *[
            ("1", str(end), (dtype,))
            for dtype in INTEGERS
            for end in (np.iinfo(dtype).min - 1, np.iinfo(dtype).max + 1)
        ],
        *[
            ('"a"', wrong, ("object",))
            for wrong in (
                '{"b64": "a"}',
                '{"b64": "aGk!"}',
                '{"b64": "_-8="}',
                '{"b64": 5}',
                '{"b64": "aGk=", "x": 1}',
                "{}",
                r'"\ud800"',
            )
        ],
    ],
)
def test_a_value_of_another_type_or_beyond_its_range_is_refused_by_its_place(right, wrong, dtypes):
    for dtype in dtypes:
        refused("inputs", column, wrong, dtype)
        refused("inputs[1][0]", column, f"[[{right}], [{wrong}]]", dtype)


def examples_of(text: str, verb: str = "classify") -> list[dict]:
    """The examples as plain values: feature name to (kind, values), read by TensorFlow itself."""
    asked = {"serving_default": signature({"inputs": "object"}, method=verb)}
    _, [serialized], _ = decode(asked, verb, (text.encode(), False))
    found = []
    for features in map(import_tensorflow().train.Example.FromString, serialized):
        kinds = {name: (feature, feature.WhichOneof("kind")) for name, feature in features.features.feature.items()}
        found.append({name: (kind, list(getattr(feature, kind).value)) for name, (feature, kind) in kinds.items()})
    return found


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize(
    "text, examples",
    [
        (
            '{"examples": [{"names": ["foo", "bar"], "ratings": [8.0, 9.0], "age": 20},'
            ' {"names": ["baz"], "ratings": 6.0}]}',
            [
                {
                    "names": ("bytes_list", [b"foo", b"bar"]),
                    "ratings": ("float_list", [8, 9]),
                    "age": ("int64_list", [20]),
                },
                {"names": ("bytes_list", [b"baz"]), "ratings": ("float_list", [6])},
            ],
        ),
        (
            '{"examples": [{"s": ["baz", {"b64": "aGVsbG8="}], "mix": [1, true, false]}, {"r": -Infinity}, {}]}',
            [
                {"s": ("bytes_list", [b"baz", b"hello"]), "mix": ("int64_list", [1, 1, 0])},
                {"r": ("float_list", [-inf])},
                {},
            ],
        ),
        (
            '{"context": {"query": "pizza", "n": [1, 2]}, "examples": [{"a": 1}, {"query": "mine"}]}',
            [
                {"query": ("bytes_list", [b"pizza"]), "n": ("int64_list", [1, 2]), "a": ("int64_list", [1])},
                {"query": ("bytes_list", [b"mine"]), "n": ("int64_list", [1, 2])},
            ],
        ),
        (
            '{"examples": [{"x": [9223372036854775807, -9223372036854775808], "grüß": "ü\\u0000"}]}',
            [{"x": ("int64_list", [2**63 - 1, -(2**63)]), "grüß": ("bytes_list", ["ü\0".encode()])}],
        ),
    ],
)
def test_examples_become_what_tensorflow_reads(text, examples, verb):
    assert examples_of(text, verb) == examples


@pytest.mark.parametrize(
    "text, where",
    [
        ("{}", "examples"),
        ('{"examples": []}', "examples"),
        ('{"examples": {"x": 1}}', "examples"),
        ('{"examples": [{}, 5]}', "examples[1]"),
        ('{"context": null, "examples": [{}]}', "context"),
        *[
            (f'{{"examples": [{{"x": {wrong}}}]}}', "examples[0].x")
            for wrong in (
                "[10, null]",
                "[10, 10.0]",
                '["a", true]',
                "[[10], 20]",
                '{"y": 10}',
                '{"b64": "*"}',
                str(2**63),
            )
        ],
        ('{"context": {"x": null}, "examples": [{}]}', "context.x"),
    ],
)
def test_a_wrong_example_is_told_by_its_place(text, where):
    refused(where, examples_of, text)


# -- answers -----------------------------------------------------------------------------------------------------------

TEXTS = [["hello", "world"], ["tf", '"é\\\n']]
WORDS = strings([[text.encode() for text in row] for row in TEXTS])
B64 = [[{"b64": base64.b64encode(word).decode()} for word in row] for row in WORDS]
ENDS = [np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype) for dtype in INTEGERS]


@pytest.mark.parametrize(
    "outputs, rows, columns",
    [
        ({"y": np.int32([[1, 2], [3, 4]])}, [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ({"y": np.array([True, False])}, [True, False], [True, False]),
        *[({"y": ends}, ends.tolist(), ends.tolist()) for ends in ENDS],
        ({"y": WORDS}, TEXTS, TEXTS),
        ({"y_bytes": WORDS}, B64, B64),
        ({"n_bytes": np.int64([1])}, [1], [1]),
        (
            {"i": np.int32([[1], [2]]), "s": WORDS, "s_bytes": WORDS, "é": np.float64([0.5, 2])},
            [
                {"i": [1], "s": TEXTS[0], "s_bytes": B64[0], "é": 0.5},
                {"i": [2], "s": TEXTS[1], "s_bytes": B64[1], "é": 2.0},
            ],
            {"i": [[1], [2]], "s": TEXTS, "s_bytes": B64, "é": [0.5, 2.0]},
        ),
        ({"y": np.zeros((0, 2), np.float32)}, [], []),
        ({"y": np.zeros((2, 0), np.float32)}, [[], []], [[], []]),
        ({"a": np.zeros((0, 1, 2), object), "b": np.zeros((0, 3), np.float32)}, [], {"a": [], "b": []}),
        ({"y": np.int64(5)}, None, 5),
        ({"y": strings(b"a")}, None, "a"),  # outputs that are no rows
        ({"a": np.int32([1, 2]), "b": np.float32(5)}, None, {"a": [1, 2], "b": 5.0}),
        ({"a": np.int32([1, 2]), "b": np.zeros((1, 3), bool)}, None, {"a": [1, 2], "b": [[False] * 3]}),
    ],
)
def test_outputs_become_predictions_by_row_and_outputs_by_column(outputs, rows, columns):
    assert json.loads(by_column(**outputs)) == {"outputs": columns}
    if rows is None:
        refused("row", by_row, **outputs)
    else:
        assert json.loads(by_row(**outputs)) == {"predictions": rows}


@pytest.mark.parametrize("dtype, bits", [("float16", "uint16"), ("float32", "uint32"), ("float64", "uint64")])
def test_every_float_is_the_shortest_decimal_of_its_dtype_and_read_back_the_same_to_the_last_bit(dtype, bits):
    answered = by_column(y=np.array([0.1, nan, inf, -inf, 3], dtype))
    assert answered == b'{"outputs": [0.1, NaN, Infinity, -Infinity, 3.0]}'
    numbers = np.random.default_rng(7).integers(0, np.iinfo(bits).max, 20_000, bits, endpoint=True).view(dtype)
    numbers[np.isnan(numbers)] = nan  # there are many, and one is answered
    assert_same(np.array(json.loads(by_row(y=numbers))["predictions"], dtype), numbers, dtype)


@pytest.mark.parametrize("shape", [(120_000,), (60_000, 2), (2, 60_000), (2, 3, 20_000)])
def test_a_large_answer_is_the_same_as_a_small_one(shape):
    values = np.arange(math.prod(shape)).reshape(shape)
    assert json.loads(by_row(y=values)) == {"predictions": values.tolist()}
    assert json.loads(by_row(a=values, b=values)) == {"predictions": [{"a": row, "b": row} for row in values.tolist()]}


def test_a_string_that_is_not_utf_8_passes_as_it_is_and_a_dtype_that_json_does_not_have_is_not_implemented():
    assert by_column(y=strings([b'\xff"\x80'])) == b'{"outputs": ["\xff\\"\x80"]}'
    refused("complex64", by_row, status=501, y=np.zeros(2, np.complex64))
    refused("complex64", column, "[1, 2]", "complex64", status=501)


CLASSES, SCORES = strings([[b"a", b"b"], [b"c", "ü".encode()]]), np.float32([[0.2, 0.7], [inf, nan]])


@pytest.mark.parametrize(
    "verb, outputs, text",
    [
        (
            "classify",
            {"classes": CLASSES, "scores": SCORES},
            '[[["a", 0.2], ["b", 0.7]], [["c", Infinity], ["ü", NaN]]]',
        ),
        ("classify", {"scores": SCORES}, '[[["", 0.2], ["", 0.7]], [["", Infinity], ["", NaN]]]'),
        ("classify", {"classes": CLASSES}, '[[["a", 0.0], ["b", 0.0]], [["c", 0.0], ["ü", 0.0]]]'),
        ("regress", {"outputs": np.float32([0.2, -inf])}, "[0.2, -Infinity]"),
        ("regress", {"outputs": np.float32([[0.2], [1]])}, "[0.2, 1.0]"),
        *[
            ("classify", outputs, None)
            for outputs in (
                {"other": SCORES},
                {"scores": SCORES[0]},
                {"scores": SCORES[:1]},
                {"classes": CLASSES, "scores": SCORES[:, :1]},
            )
        ],
        *[
            ("regress", outputs, None)
            for outputs in (
                {"other": SCORES[0]},
                {"outputs": SCORES},
                {"outputs": SCORES[0, :1]},
                {"outputs": SCORES[0, 0]},
            )
        ],
    ],
)
def test_results_are_labels_with_scores_or_numbers_and_other_outputs_are_refused(verb, outputs, text):
    if text is None:
        refused(verb, answer, verb, {"examples": [{}] * 2}, **outputs)
    else:
        assert answer(verb, {"examples": [{}] * 2}, **outputs).decode() == f'{{"results": {text}}}'


@pytest.mark.parametrize(
    "verb, method, inputs",
    [("classify", "predict", {"inputs": "object"}), ("regress", "regress", {"inputs": "object", "x": "float32"})],
)
def test_a_signature_for_something_else_neither_classifies_nor_regresses(verb, method, inputs):
    asked = {"serving_default": signature(inputs, method=method)}
    refused(verb, decode, asked, verb, (b'{"examples": [{}]}', False))


# -- paths, and the number in a query ----------------------------------------------------------------------------------

ODD, ODD_PLAIN = "%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D", "!#$%&'()*+,/:;=?@[]"


@pytest.mark.parametrize(
    "method, path, expected",
    [
        ("GET", "/v1/models/m/versions/099", ("m", 99, "status")),
        ("GET", "/v1/models/m/versions/9223372036854775807/metadata", ("m", 2**63 - 1, "metadata")),
        ("GET", f"/v1/models/m{ODD}/metadata", (f"m{ODD_PLAIN}", None, "metadata")),
        ("GET", f"/v1/models/m/labels/{ODD}/metadata", ("m", ODD_PLAIN, "metadata")),
        ("POST", "/v1/models/m/Labels/latest:predict", ("m", "latest", "predict")),
        ("GET", "/v1/models/metadata", ("metadata", None, "status")),
        ("POST", "/v1/Models/m/Versions/5:classify", ("m", 5, "classify")),
        ("POST", f"/v1/models/{ODD}:regress", (ODD_PLAIN, None, "regress")),
        ("POST", "/v1/models/%2570+%C3%A9%0A%zz:predict", ("%70+é\n%zz", None, "predict")),
    ],
)
def test_a_path_is_taken_apart_before_it_is_decoded(method, path, expected):
    assert match_path(method, path) == expected


@pytest.mark.parametrize(
    "method, path, message, status",
    [
        *[
            ("GET", f"/v1/{path}", "Malformed request: GET", 400)
            for path in (
                "",
                "foo",
                "models/",
                "models/m/",
                "models/m:predict",
                "models//m",
                "models/m/versions",
                "models/m/versions/x",
                "models/m/versions/-1",
                "models/m/versions/\u0663",
                "models/m/versions/5/labels/x",
                "models/m/metadata/",
            )
        ],
        *[
            ("POST", f"/v1/{path}", "Malformed request: POST", 400)
            for path in (
                "models",
                "models/m",
                "models/m:",
                "models/:predict",
                "models/m:predict/",
                "models/m:train",
                "models/m:PREDICT",
                "models/m%3Apredict",
                "models/m/version/50:predict",
                "models/m/versions/5/labels/x:predict",
            )
        ],
        *[(method, "/v1/models/m:predict", "Malformed request", 400) for method in ("PUT", "HEAD", "get")],
        ("GET", "/v1/models", "Missing model name in request.", 400),
        ("POST", "/v1/models/m/versions/9223372036854775808:predict", "9223372036854775808", 400),
        ("GET", f"/v1/models/m/versions/{'9' * 5000}", "version", 400),
        ("GET", "/v2/models/m", "/v2/models/m", 404),
        ("POST", "/v1", "/v1", 404),
        ("POST", "/health", "GET", 405),
    ],
)
def test_a_path_that_leads_nowhere_says_why(method, path, message, status):
    refused(message, match_path, method, path, status=status)


@pytest.mark.parametrize(
    "query, value",
    [
        ("", 1),
        ("other=5", 1),
        ("value=3", 3),
        ("value=-1.5", -1.5),
        ("value=%2B2", 2),
        ("value=1e3", 1000),
        ("value=.5E-1", 0.05),
        ("value=5.", 5),
        ("value=1e-999", 0),
        ("a=b&value=%37", 7),
        *[
            (query, None)
            for query in (
                "value",
                "value=",
                "value=abc",
                "value=nan",
                "value=-Infinity",
                "value=1e999",
                "value=1&value=1",
                "value=1_000",
                "value=0x10",
                "value=1,5",
                "value=+3",
                "value=3%20",
                "value=3%0A",
                "value=%D9%A3",
                "value=1e",
                "value=true",
                "value=%FF",
                "value=" + "9" * 10_000,
                "&".join(["value=1"] * 1000),
            )
        ],
    ],
)
def test_a_query_has_one_finite_number_or_means_1_and_any_other_is_refused(query, value):
    if value is None:
        refused("value", parse_value, query)
    else:
        assert parse_value(query) == value
