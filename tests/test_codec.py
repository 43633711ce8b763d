"""The JSON codec and the paths, without Ray and TensorFlow: TensorFlow Serving's own cases (util/json_tensor_test.cc,
model_servers/http_rest_api_util_test.cc), the rules of its code, and the few places where we decide otherwise."""

import base64
import gzip
import json
import math
import sys
import urllib.parse

import numpy as np
import pytest

from ray_tensorflow import (
    GET_PATH, HTTP_STATUS, MAX_BODY_BYTES, POST_PATH, Error, InvalidRequest, Signature, TensorSpec, decimals, encode_predict,
    parse_json, parse_leaves, parse_predict, parse_rows, parse_tensor, parse_value, reply_error, shown, unzip, without_depths)

NUMPY = {"float": "float32", "double": "float64", "string": "object", "half": "float16"}
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"]
NUMBERS = ["float", "double", *INTEGERS]
b64_hello, b64_world, b64_tf, b64_serving = (
    {"b64": base64.b64encode(word).decode()} for word in (b"hello", b"world", b"tf", b"serving"))
nan, inf = math.nan, math.inf


def spec(dtype: str) -> TensorSpec:
    """By TensorFlow's name for the dtype."""
    return TensorSpec(NUMPY.get(dtype, dtype), None)


def signature(**inputs: str) -> Signature:
    return Signature("serving_default", {name: spec(dtype) for name, dtype in sorted(inputs.items())}, {}, False)


def predict(body: str | bytes, **inputs: str):
    """Parse a request for a signature with these inputs: is it row format, and the arrays by name."""
    asked = signature(**inputs)
    row, arrays = parse_predict(parse_json(body if isinstance(body, bytes) else body.encode()), asked)
    return row, dict(zip(asked.inputs, arrays))


def leaf(text: str, dtype: str):
    """The tensor that one JSON value becomes."""
    return parse_tensor(json.loads(text), spec(dtype))


def assert_same(array: np.ndarray, expected, dtype: str):
    dtype = np.dtype(NUMPY.get(dtype, dtype))
    assert array.dtype == dtype
    assert array.shape == np.shape(expected)
    np.testing.assert_array_equal(array, np.array(expected, dtype))


def refused(message: str, function, *arguments, status: int = 400, **more) -> str:
    """Calling it is answered with this status and with a message that has this in it; the message."""
    with pytest.raises(InvalidRequest) as caught:
        function(*arguments, **more)
    assert message in caught.value.message
    assert caught.value.status == status
    return caught.value.message


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, message", [
    ("", "The document is empty"),
    ("\ufeff", "The document is empty"),
    ("   ", "The document is empty. at offset: 3"),
    ("instances = [1, 2]", "Invalid value. at offset: 0"),
    ('{"instances": [nan]}', "Invalid value. at offset: 15"),
    ('{"instances": [+1]}', "Invalid value. at offset: 15"),
    ('{"instances": [.5]}', "Invalid value. at offset: 15"),
    ('{"instances": [tru]}', "Invalid value. at offset: 15"),
    ('{"instances": [1,]}', ""),
    ('{"instances": [1.]}', ""),
    ('{"instances": [01]}', ""),
    ('{"instances": [1e]}', ""),
    ('{"instances": [1 2]}', "Missing a comma"),
    ('{"instances": [1]', "Missing a comma"),
    ('{"instances" [1]}', "Missing a colon after a name of object member."),
    ("{'instances': [1]}", "Missing a name for object member."),
    ('{"instances": [1]} x', "The document root must not be followed by other values."),
    ('{"instances": [1]} {}', "The document root must not be followed by other values."),
    ('{"instances": ["a]}', "Missing a closing quotation mark in string."),
    ('{"instances": ["a\nb"]}', "Invalid encoding in string."),
    ('{"instances": ["\\x"]}', "Invalid escape character in string."),
    ('{"instances": ["\\u12g4"]}', "Incorrect hex digit after \\u escape in string."),
    ('{"instances": [1] /* one */}', ""),
    ("[" * 100_000, ""),
    ('{"a":' * 100_000, ""),
])
def test_what_is_not_json_is_a_parse_error(body, message):
    assert refused(message, parse_json, body.encode()).startswith("JSON Parse error: ")


@pytest.mark.parametrize("body", [b'{"signature_name": "\xff"}', b'{"instances": ["\xc3("]}', b"\xff\xfe{\x00}\x00"])
def test_a_body_that_is_not_utf_8_is_a_parse_error(body):
    refused("JSON Parse error: Invalid encoding in string.", parse_json, body)


@pytest.mark.parametrize("body", ["[]", "[1, 2]", "1", '"instances"', "null", "true", "NaN"])
def test_json_that_is_not_an_object_is_refused(body):
    assert refused("Is not object", parse_json, body.encode()).startswith("JSON Value: ")


def test_a_byte_order_mark_is_skipped():
    assert parse_json(b'\xef\xbb\xbf{"instances": [1]}') == {"instances": [1]}


def test_white_space_around_the_document_is_skipped():
    assert parse_json(b' \r\n\t{"instances": [1]}\n') == {"instances": [1]}


def test_of_a_key_given_twice_the_last_one_counts():
    assert predict('{"instances": [1], "instances": [2]}', x="int32")[1]["x"].tolist() == [2]
    assert predict('{"inputs": {"x": [1], "x": [2]}}', x="int32")[1]["x"].tolist() == [2]
    assert predict('{"instances": [{"x": 1, "x": 2}]}', x="int32")[1]["x"].tolist() == [2]


@pytest.mark.parametrize("depth", [10, 900, 5_000, 200_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_other_keys_are_ignored_however_deeply_nested(opening, closing, depth):
    value = opening * depth + "1" + closing * depth
    assert predict(f'{{"first": {value}, "instances": [1, 2], "last": {value}}}', x="int32")[1]["x"].tolist() == [1, 2]


@pytest.mark.parametrize("string", ['"', "\\", '\\"', '"]', "]", "[[[", '"}{', "a\\", '\\\\"[', "\n\"['", "\u2028"])
def test_deep_nesting_does_not_change_the_strings_beside_it(string):
    text = json.dumps({"a": string, "deep": 0, "b": [string], string: 1})
    deep = text.replace('"deep": 0', f'"deep": {"[" * 5_000}{json.dumps(string)}{"]" * 5_000}')
    document = parse_json(deep.encode())
    del document["deep"]
    assert document == {"a": string, "b": [string], string: 1}


def test_without_depths_leaves_what_is_not_deep_as_it_is():
    text = '{"a": [1, {"b": ["]", "\\"", "}"]}], "c": "[["}'
    assert without_depths(text) == text
    assert without_depths(text, 3) == '{"a": [1, null], "c": "[["}'
    assert without_depths("[[1], [2], 3]", 2) == "[null, null, 3]"


@pytest.mark.parametrize("closing", ["", '"'])
def test_a_deep_document_with_many_escaped_quotes_takes_linear_time(closing):
    body = b"[" * 5_000 + b'"' + b'\\"' * 300_000 + closing.encode()
    refused("JSON Parse error: ", parse_json, body)  # in quadratic time this would take minutes


# -- predict requests: TensorFlow Serving's own cases ------------------------------------------------------------------


@pytest.mark.parametrize("body, inputs, row, expected", [
    ('{"instances":[[1,2],[3,4],[5,6]]}', {"default": "int32"}, True, {"default": [[1, 2], [3, 4], [5, 6]]}),
    ('{"instances":[1,2.0,3,4,5.003,0.007,0.0]}', {"default": "float"}, True, {"default": [1, 2, 3, 4, 5.003, 0.007, 0]}),
    ('{"instances":[1.0,2,3,4,0.662,0,0.0]}', {"default": "double"}, True, {"default": [1, 2, 3, 4, 0.662, 0, 0]}),
    ('{"signature_name":"predict_images","instances":[[1,2]]}', {"default": "int32"}, True, {"default": [[1, 2]]}),
    ('{"instances":[{"b64":"aGVsbG8="},{"b64":"d29ybGQ="}]}', {"default": "string"}, True, {"default": [b"hello", b"world"]}),
    ('{"instances":[[{"b64":"aGVsbG8="}],[{"b64":"d29ybGQ="}]]}', {"default": "string"}, True,
     {"default": [[b"hello"], [b"world"]]}),
    ('{"instances":[{"default":[[{"b64":"aGVsbG8="}],[{"b64":"d29ybGQ="}]]}]}', {"default": "string"}, True,
     {"default": [[[b"hello"], [b"world"]]]}),
    ('{"instances":[{"int_tensor":[[1,2],[3,4],[5,6]],"str_tensor":["foo","bar"],"float_tensor":[1.0,NaN],"dbl_tensor":[NaN]},'
     '{"int_tensor":[[7,8],[9,0],[1,2]],"str_tensor":["baz","bat"],"float_tensor":[2.0,Infinity],"dbl_tensor":[2.0]}]}',
     {"int_tensor": "int32", "str_tensor": "string", "float_tensor": "float", "dbl_tensor": "double"}, True,
     {"int_tensor": [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]], "str_tensor": [[b"foo", b"bar"], [b"baz", b"bat"]],
      "float_tensor": [[1, nan], [2, inf]], "dbl_tensor": [[nan], [2]]}),
    ('{"inputs":{"int_tensor":[[[1,2],[3,4],[5,6]]]}}', {"int_tensor": "int32"}, False,
     {"int_tensor": [[[1, 2], [3, 4], [5, 6]]]}),
    ('{"inputs":[[[1,2],[3,4],[5,6]]]}', {"int_tensor": "int32"}, False, {"int_tensor": [[[1, 2], [3, 4], [5, 6]]]}),
    ('{"inputs":{"int_tensor":[[[1,2],[3,4],[5,6]]],"str_tensor":["foo","bar"],"bin_tensor":{"b64":"aGVsbG8="}}}',
     {"int_tensor": "int32", "str_tensor": "string", "bin_tensor": "string"}, False,
     {"int_tensor": [[[1, 2], [3, 4], [5, 6]]], "str_tensor": [b"foo", b"bar"], "bin_tensor": b"hello"}),
])
def test_a_request_becomes_the_tensors_that_tensorflow_serving_makes_of_it(body, inputs, row, expected):
    is_row, arrays = predict(body, **inputs)
    assert is_row == row
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        assert_same(arrays[name], values, inputs[name])


BOTH = {"int_tensor": "int32", "str_tensor": "string"}


@pytest.mark.parametrize("body, inputs, message", [
    ("", {"default": "int32"}, "document is empty"),
    ('{"instances":[[1,2],[3,4],[5,6,7]],"inputs":[[1,2],[3,4],[5,6,7]]}', {"default": "int32"},
     "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"),
    ('{"instances":[[1,2],[3,4],[5,6,7]]}', {"default": "int32"}, "Expecting tensor size: 2 but got: 3"),
    ('{"instances":[[1,2],[3,4],[[5,6]]]}', {"default": "int32"}, "Expecting shape [2] but got: [1,2]"),
    ('{"instances":[1,[1]]}', {"default": "int32"}, "Expecting shape [] but got: [1]"),
    ('{"instances":[[1,2],["a","b"]]}', {"default": "int32"}, "not of expected type: int32"),
    ('{"instances":[{"int_tensor":[[1,2],[3,4],[5,6]],"str_tensor":["foo","bar"]},'
     '{"int_tensor":[[[7,8],[9,0],[1,2]]],"str_tensor":["baz","bat"]}]}', BOTH, "Expecting shape [3,2] but got: [1,3,2]"),
    ('{"instances":[{"int_tensor":[[1,2],[3,4],[5,6],[7,8]],"str_tensor":["foo","bar"]},'
     '{"int_tensor":[[7,8],[9,0],[1,2]],"str_tensor":["baz","bat"]}]}', BOTH, "Expecting tensor size: 8 but got: 6"),
    ('{"instances":[{"int_tensor":[[1,2],[3,4],[5,6]],"str_tensor":["foo","bar"]},[1,20,30],'
     '{"int_tensor":[[7,8],[9,0],[1,2]],"str_tensor":["baz","bat"]}]}', BOTH,
     "Expecting object but got list at item 1 of input list"),
    ('{"instances":[["baz","bar"],{"str_tensor":["baz","bat"]}]}', {"str_tensor": "string"},
     "Expecting value/list but got object at item 1 of input list"),
])
def test_a_request_that_tensorflow_serving_refuses_is_refused_in_its_words(body, inputs, message):
    refused(message, predict, body, **inputs)


# -- predict requests: the rules of the code ---------------------------------------------------------------------------


@pytest.mark.parametrize("body, message", [
    ('{}', "Missing 'inputs' or 'instances' key"),
    ('{"Instances": [1]}', "Missing 'inputs' or 'instances' key"),
    ('{"instances": []}', "No values in 'instances' array"),
    ('{"instances": null}', "Expecting 'instances' to be an list/array"),
    ('{"instances": 1}', "Expecting 'instances' to be an list/array"),
    ('{"instances": "x"}', "Expecting 'instances' to be an list/array"),
    ('{"instances": {"x": [1]}}', "Expecting 'instances' to be an list/array"),
    ('{"instances": [], "inputs": null}', "Not formatted correctly"),
    ('{"inputs": null}', "JSON Value: null Type: Null is not of expected type: float"),
    ('{"inputs": {}}', "Missing named input: x in 'inputs' object."),
    ('{"inputs": {"y": [1]}}', "Missing named input: x in 'inputs' object."),
    ('{"inputs": {"x": {"x": 1}}}', "Type: Object is not of expected type: float"),
    ('{"instances": [{}]}', "keys must be equal to: x"),
    ('{"instances": [{"x": 1}, {}]}',
     "Failed to process element: 1 of 'instances' list. JSON object: {} keys must be equal to: x"),
    ('{"instances": [{"x": 1, "y": 2}]}', "does not have named input: y"),
    ('{"instances": [{"b64": 5}]}', "does not have named input: b64"),
    ('{"instances": [{"b64": "aGk=", "k": 1}]}', "does not have named input: "),
    ('{"instances": [{"x": 1}, 2]}', "Expecting object but got list at item 1 of input list"),
    ('{"instances": [{"x": 1}, {"b64": "aGk="}]}', "Expecting object but got list at item 1 of input list"),
    ('{"instances": [1, {"x": 1}]}', "Expecting value/list but got object at item 1 of input list"),
])
def test_the_form_of_a_request_is_checked(body, message):
    refused(message, predict, body, x="float")


@pytest.mark.parametrize("body, message", [
    ('{"instances": [1, 2]}', "instances is a plain list, but expecting list of objects as multiple input tensors required"),
    ('{"instances": [[1], [2]]}', "instances is a plain list, but expecting list of objects as multiple input tensors required"),
    ('{"instances": [{"b64": "aGk="}]}', ""),
    ('{"inputs": 3}', "inputs is a plain value/list, but expecting an object as multiple input tensors required"),
    ('{"inputs": [[1]]}', "inputs is a plain value/list, but expecting an object as multiple input tensors required"),
    ('{"inputs": {"b64": "aGk="}}', "inputs is a plain value/list, but expecting an object as multiple input tensors required"),
    ('{"inputs": {"n": 1}}', "Missing named input: s in 'inputs' object."),
    ('{"instances": [{"n": 1}]}', "keys must be equal to: n,s"),
    ('{"instances": [{"n": 1, "s": "a"}, {"n": 1}]}', "Failed to process element: 1 of 'instances' list."),
    ('{"instances": [{"n": 1, "s": "a", "t": 2}]}', "Failed to process element: 0 key: t of 'instances' list."),
    ('{"instances": [{"n": 1, "s": 2}]}', "Failed to process element: 0 key: s of 'instances' list."),
    ('{"instances": [{"n": 1, "s": "a"}, {"n": [1], "s": "a"}]}', "Failed to process element: 1 key: n of 'instances' list."),
    ('{"instances": [{"n": 1, "s": "a"}, null]}', "Expecting object but got list at item 1 of input list"),
])
def test_several_inputs_have_to_be_given_by_name(body, message):
    refused(message, predict, body, n="int32", s="string")


def test_an_object_of_inputs_may_have_extra_names():
    assert_same(predict('{"inputs": {"x": [1], "y": {"z": null}}}', x="float")[1]["x"], [1], "float")


def test_first_axes_in_columnar_format_may_differ():
    arrays = predict('{"inputs": {"a": [1, 2, 3], "b": [["x"]], "c": 5}}', a="int32", b="string", c="double")[1]
    assert [arrays[name].shape for name in "abc"] == [(3,), (1, 1), ()]


def test_a_sole_input_called_b64_is_taken_for_base64():
    assert_same(predict('{"instances": [{"b64": "aGk="}]}', b64="string")[1]["b64"], [b"hi"], "string")
    assert_same(predict('{"inputs": {"b64": "aGk="}}', b64="string")[1]["b64"], b"hi", "string")


@pytest.mark.parametrize("body", ['{"instances": [1]}', '{"inputs": [1]}', '{"inputs": {}}', "{}"])
def test_a_signature_without_inputs_cannot_be_called(body):
    refused("Failed to get input map for signature: serving_default", predict, body)


@pytest.mark.parametrize("values, shape", [
    ("3", ()), ("[]", (0,)), ("[3]", (1,)), ("[[]]", (1, 0)), ("[[], []]", (2, 0)), ("[[[1], [2]]]", (1, 2, 1)),
    ("[[[], []]]", (1, 2, 0))])
def test_the_shape_in_columnar_format_is_that_of_the_nested_list(values, shape):
    assert predict(f'{{"inputs": {values}}}', x="float")[1]["x"].shape == shape
    assert predict(f'{{"inputs": {{"x": {values}}}}}', x="float")[1]["x"].shape == shape


@pytest.mark.parametrize("values, shape", [("[3]", (1,)), ("[[]]", (1, 0)), ("[[], []]", (2, 0)), ("[[[1], [2]]]", (1, 2, 1))])
def test_the_shape_in_row_format_has_the_number_of_rows_first(values, shape):
    assert predict(f'{{"instances": {values}}}', x="float")[1]["x"].shape == shape
    rows = json.dumps([{"x": value} for value in json.loads(values)])
    assert predict(f'{{"instances": {rows}}}', x="float")[1]["x"].shape == shape


@pytest.mark.parametrize("rows, message", [
    ("[[], [1]]", "Expecting tensor size: 0 but got: 1"),
    ("[[[]], []]", "Expecting shape [1,0] but got: [0]"),
    ("[[1, 2], 3]", "Expecting tensor size: 2 but got: 1"),
    ("[[1], 3]", "Expecting shape [1] but got: []"),
    ("[[[1, 2], [3]]]", "Failed to process element: 0 of 'instances' list."),
    ("[[[1, 2], [3]]]", "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
    ("[[1, [2]]]", "Encountered list at unexpected level: 1 expected < 1"),
    ("[[[1], 2]]", "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
    ("[1, 2, null]", "Failed to process element: 2 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: null Type: Null"),
])
def test_ragged_rows_are_refused(rows, message):
    refused(message, predict, f'{{"instances": {rows}}}', x="float")


@pytest.mark.parametrize("value, message", [
    ("[[1, 2], [3]]", "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
    ("[[1], [2, 3]]", "Encountered list at unexpected size: 2 at level: 1 expected size: 1"),
    ("[1, [2]]", "Encountered list at unexpected level: 1 expected < 1"),
    ("[[1], 2]", "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
    ("[[], [1]]", "Encountered list at unexpected size: 1 at level: 1 expected size: 0"),
    ("[[1], []]", "Encountered list at unexpected size: 0 at level: 1 expected size: 1"),
])
def test_ragged_columns_are_refused(value, message):
    refused(message, predict, f'{{"inputs": {value}}}', x="float")


def test_a_list_nested_more_deeply_than_any_tensor_is_refused():
    for depth in (65, 300, 900, 5_000):
        refused("", predict, f'{{"inputs": {"[" * depth}1{"]" * depth}}}', x="float")
        refused("", predict, f'{{"instances": {"[" * depth}1{"]" * depth}}}', x="float")


# -- values, dtype by dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, dtype, expected", [
    *[("7", dtype, 7) for dtype in NUMBERS],
    *[("-0", dtype, 0) for dtype in NUMBERS],
    ("1.5", "float", 1.5), ("1e3", "float", 1000), ("1E+3", "double", 1000), ("-0.0", "double", -0.0),
    ("0.1", "float", np.float32(0.1)), ("0.1", "double", 0.1),
    ("16777217", "float", 16777216), ("9007199254740993", "double", 9007199254740992),
    ("123456789012345678901234567890", "double", 1.2345678901234568e29),
    ("123456789012345678901234567890", "float", np.float32(1.2345679e29)),
    ("1e39", "float", inf), ("-1e39", "float", -inf), ("1e39", "double", 1e39),
    ("1e400", "double", inf), ("-1e400", "double", -inf), ("1e400", "float", inf), ("1e-400", "double", 0),
    ("1" + "0" * 400, "double", inf), ("-1" + "0" * 400, "float", -inf),
    *[(text, dtype, value) for dtype in ("float", "double")
      for text, value in (("NaN", nan), ("Infinity", inf), ("-Infinity", -inf))],
    ("2147483647", "int32", 2**31 - 1), ("-2147483648", "int32", -(2**31)),
    ("9223372036854775807", "int64", 2**63 - 1), ("-9223372036854775808", "int64", -(2**63)),
    ("4294967295", "uint32", 2**32 - 1), ("18446744073709551615", "uint64", 2**64 - 1), ("9007199254740993", "int64", 2**53 + 1),
    ("300", "int8", 44), ("-1", "uint8", 255), ("256", "uint8", 0), ("32768", "int16", -32768), ("-2147483648", "int8", 0),
    ("true", "bool", True), ("false", "bool", False),
    ('"text"', "string", b"text"), ('""', "string", b""), ('"\u00e9\u20ac\\ud83d\\ude00"', "string", "é€😀".encode()),
    ('"a\\u0000b"', "string", b"a\0b"),
    ('"aGk="', "string", b"aGk="),
])
def test_a_value_is_accepted(text, dtype, expected):
    array = leaf(text, dtype)
    assert_same(array, expected, dtype)
    if dtype in ("float", "double"):
        assert np.signbit(array) == np.signbit(expected)


@pytest.mark.parametrize("text, kind, dtypes", [
    ("1.0", "Number", [*INTEGERS, "bool", "string"]),
    ("1e3", "Number", [*INTEGERS, "bool", "string"]),
    ("NaN", "Number", [*INTEGERS, "bool", "string"]),
    ("Infinity", "Number", [*INTEGERS, "bool", "string"]),
    ("1", "Number", ["bool", "string"]),
    ("0", "Number", ["bool"]),
    ("true", "True", [*NUMBERS, "string"]),
    ("false", "False", [*NUMBERS, "string"]),
    ("null", "Null", [*NUMBERS, "bool", "string"]),
    ('"1"', "String", [*NUMBERS, "bool"]),
    ('{"a": 1}', "Object", [*NUMBERS, "bool"]),
    ('{"b64": "AAAA"}', "Object", [*NUMBERS, "bool"]),
    ("2147483648", "Number", ["int8", "int16", "int32", "uint8"]),
    ("-2147483649", "Number", ["int8", "int16", "int32", "uint8"]),
    ("9223372036854775808", "Number", ["int64"]),
    ("-9223372036854775809", "Number", ["int64"]),
    ("-1", "Number", ["uint32", "uint64"]),
    ("4294967296", "Number", ["uint32"]),
    ("18446744073709551616", "Number", ["uint64", "int64", "int32"]),
    ("1" + "0" * 400, "Number", ["uint64", "int64", "bool", "string"]),
])
def test_a_value_of_another_type_is_refused(text, kind, dtypes):
    for dtype in dtypes:
        message = refused(f"Type: {kind} is not of expected type: {dtype}", leaf, text, dtype)
        assert message.startswith("JSON Value: ")
        refused(f"Type: {kind} is not of expected type: {dtype}", leaf, f"[[{text}]]", dtype)


@pytest.mark.parametrize("values, dtype", [
    ([1.5, 2, True], "float32"), ([1, 2, True], "int64"), ([True, 1], "bool"), (["a", None], "object"),
    ([1, 2.0], "int32")])
def test_one_wrong_value_among_right_ones_is_found(values, dtype):
    refused("is not of expected type", parse_leaves, values, dtype)


@pytest.mark.parametrize("dtype", ["half", "uint16", "bfloat16", "complex64", "complex128"])
def test_a_dtype_that_has_no_json_is_not_implemented_in_columns_and_invalid_in_rows(dtype):
    message = f"Conversion of JSON Value: 1 to type: {dtype}"
    refused(message, predict, '{"inputs": [1, 2]}', x=dtype, status=501)
    refused(message, predict, '{"inputs": 1}', x=dtype, status=501)
    refused("Failed to process element: 0 of 'instances' list. Error: ", predict, '{"instances": [1, 2]}', x=dtype, status=400)
    refused(message, predict, '{"instances": [{"x": 1}]}', x=dtype, status=400)


@pytest.mark.parametrize("dtype", ["half", "uint16", "complex64"])
def test_an_empty_list_passes_for_a_dtype_that_has_no_json(dtype):
    assert predict('{"inputs": []}', x=dtype)[1]["x"].shape == (0,)


def test_an_integer_of_more_digits_than_any_number_has_is_a_parse_error():
    refused("JSON Parse error: ", predict, '{"instances": [' + "1" * 5_000 + "]}", x="float")


def test_a_lone_surrogate_is_no_string():
    for body in ('{"instances": ["\\ud800"]}', '{"inputs": "\\udc00"}', '{"instances": ["\\ud800x"]}'):
        refused("The surrogate pair in string is invalid.", predict, body, x="string")


@pytest.mark.parametrize("text, expected", [
    ("aGVsbG8=", b"hello"), ("", b""), ("AA==", b"\0"), ("/+8=", b"\xff\xef"), ("////", b"\xff\xff\xff"),
    ("aGVsbG8", b"hello"), ("AA", b"\0"),  # padding is optional
    ("aGVs\nbG8=", b"hello"), (" a G V s\tbG8 =\r\n", b"hello"), (" \n", b""), ("aGVs bG8", b"hello"),  # white space is skipped
    ("aGl=", b"hi"),  # so are left-over bits
])
def test_base64_is_decoded_as_tensorflow_serving_does(text, expected):
    assert parse_tensor({"b64": text}, spec("string")).item() == expected


@pytest.mark.parametrize("text", [
    "a", "aGVsbG8==", "aGVsbG8===", "_-8=", "aGk=aGk=", "=", "====", "aGk!", "aG\u00e9=", "aG\u00a0k=",
    "a===", "aGVsbA="])
def test_what_is_not_base64_is_refused(text):
    refused("Unable to base64 decode", parse_tensor, {"b64": text}, spec("string"))


@pytest.mark.parametrize("value", [
    '{"b64": 5}', '{"b64": null}', '{"b64": ["aGk="]}', '{"B64": "aGk="}', "{}", '{"b64": "aGk=", "x": 1}'])
def test_an_object_that_is_not_just_b64_is_not_base64_data(value):
    message = refused("not formatted correctly for base64 data", leaf, value, "string")
    assert message.startswith("JSON Value: {")
    refused("not formatted correctly for base64 data", leaf, f'["a", {value}]', "string")


def test_base64_and_text_may_be_mixed_at_any_level():
    assert_same(leaf('[["a", {"b64": "AP8="}], [{"b64": ""}, "b"]]', "string"), [[b"a", b"\0\xff"], [b"", b"b"]], "string")


def test_strings_of_different_lengths_that_end_in_nul_are_kept():
    assert leaf('["a\\u0000", "", "\\u0000\\u0000"]', "string").tolist() == [b"a\0", b"", b"\0\0"]


def test_parsing_a_list_that_is_not_a_row_names_the_row():
    rows = [[1.0, 2.0]] * 1000 + [[1.0, "x"]] + [[1.0, 2.0]] * 1000
    refused("Failed to process element: 1000 of 'instances' list. Error: INVALID_ARGUMENT: ", parse_rows, rows,
            {"x": spec("float")})


# -- predict answers ---------------------------------------------------------------------------------------------------


def encode(row: bool, **outputs) -> str:
    """The body of the answer with these outputs, each ``(dtype, values)`` or an array."""
    arrays = {}
    for name in sorted(outputs):
        given = outputs[name]
        dtype, values = given if isinstance(given, tuple) else (None, given)
        if dtype == "string":
            arrays[name] = np.empty(np.shape(values), object)
            arrays[name][...] = values
        else:
            arrays[name] = values if dtype is None else np.array(values, NUMPY.get(dtype, dtype))
    asked = Signature("serving_default", {}, {name: TensorSpec(array.dtype.name, None) for name, array in arrays.items()}, False)
    reply = encode_predict(asked, row, list(arrays.values()))
    assert reply.status == 200
    assert reply.headers == {"Content-Type": "application/json"}
    return reply.body.decode("utf-8", "surrogateescape")


NUMBERED = ("int32", [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]])
FOUR_WORDS = ("string", [[b"hello", b"world"], [b"tf", b"serving"]])
NAMED = {
    "int_tensor": NUMBERED, "str_tensor": ("string", [[b"foo", b"bar"], [b"baz", b"bat"]]), "float_tensor": ("float", [[1], [2]]),
    "double_scalar_tensor": ("double", [8, 9]), "str_tensor_bytes": FOUR_WORDS}


@pytest.mark.parametrize("row, outputs, expected", [
    (True, {"int_tensor": NUMBERED}, {"predictions": NUMBERED[1]}),
    (False, {"int_tensor": NUMBERED}, {"outputs": NUMBERED[1]}),
    (True, {"int_tensor": ("int32", [1, 2, 3, 4, 5])}, {"predictions": [1, 2, 3, 4, 5]}),
    (False, {"int_tensor": ("int32", [1, 2, 3, 4, 5])}, {"outputs": [1, 2, 3, 4, 5]}),
    (True, {"str_tensor_bytes": FOUR_WORDS}, {"predictions": [[b64_hello, b64_world], [b64_tf, b64_serving]]}),
    (True, NAMED, {"predictions": [
        {"double_scalar_tensor": 8.0, "float_tensor": [1.0], "int_tensor": [[1, 2], [3, 4], [5, 6]], "str_tensor": ["foo", "bar"],
         "str_tensor_bytes": [b64_hello, b64_world]},
        {"double_scalar_tensor": 9.0, "float_tensor": [2.0], "int_tensor": [[7, 8], [9, 0], [1, 2]], "str_tensor": ["baz", "bat"],
         "str_tensor_bytes": [b64_tf, b64_serving]}]}),
    (False, NAMED, {"outputs": {
        "double_scalar_tensor": [8.0, 9.0], "float_tensor": [[1.0], [2.0]], "int_tensor": NUMBERED[1],
        "str_tensor": [["foo", "bar"], ["baz", "bat"]], "str_tensor_bytes": [[b64_hello, b64_world], [b64_tf, b64_serving]]}}),
    (True, {"int_tensor": np.zeros((0, 2), np.int32)}, {"predictions": []}),
    (True, {"str_tensor": np.zeros((0, 1, 2), object), "float_tensor": np.zeros((0, 3, 4), np.float32)}, {"predictions": []}),
    (False, {"x": np.zeros((0, 2), np.float32)}, {"outputs": []}),
    (False, {"x": np.zeros((2, 0), np.float32)}, {"outputs": [[], []]}),
    (False, {"x": np.zeros((2, 0, 3), bool)}, {"outputs": [[], []]}),
    (True, {"x": np.zeros((2, 0), np.float32)}, {"predictions": [[], []]}),
    (False, {"x": np.zeros((0, 2), np.int64), "y": np.zeros((1, 0), object)}, {"outputs": {"x": [], "y": [[]]}}),
    (False, {"x": ("int64", 5)}, {"outputs": 5}),
    (False, {"x": ("string", b"a")}, {"outputs": "a"}),
    (False, {"x": ("float", 5), "y": ("bool", [True, False])}, {"outputs": {"x": 5.0, "y": [True, False]}}),
    (False, {"x": ("int32", [1, 2]), "y": ("int32", [1])}, {"outputs": {"x": [1, 2], "y": [1]}}),
    (True, {'say "x"\\': ("int32", [1]), "é": ("int32", [2])}, {"predictions": [{'say "x"\\': 1, "é": 2}]}),
])
def test_outputs_become_the_json_that_tensorflow_serving_makes_of_them(row, outputs, expected):
    text = encode(row, **outputs)
    assert json.loads(text) == expected
    if isinstance(next(iter(expected.values())), (int, bool)):
        assert text == json.dumps(expected)


@pytest.mark.parametrize("outputs, message", [
    ({"tensor": ("int32", 5)}, "Tensor name: tensor has no shape information"),
    ({"a": ("int32", [1, 2]), "tensor": ("int32", 5)}, "Tensor name: tensor has no shape information"),
    ({"int_tensor": np.zeros((2, 3), np.int32), "str_tensor": np.full((1, 3), b"", object)},
     "Tensor name: str_tensor has inconsistent batch size: 1 expecting: 2"),
    ({"int_tensor": np.zeros((0, 2), np.int32), "str_tensor": np.full((1, 2), b"", object)},
     "Tensor name: str_tensor has inconsistent batch size: 1 expecting: 0"),
])
def test_outputs_that_are_no_rows_are_refused_in_row_format_only(outputs, message):
    refused(message, encode, True, **outputs)
    encode(False, **outputs)


@pytest.mark.parametrize("array, name", [
    (np.zeros(2, np.complex64), "complex64"), (np.zeros(2, np.float16), "half"), (np.zeros(2, np.uint16), "uint16"),
    (np.zeros(2, np.complex128), "complex128")])
@pytest.mark.parametrize("row", [True, False])
def test_a_dtype_that_has_no_json_cannot_be_answered(row, array, name):
    refused(f"tensor type: {name}", encode, row, tensor=array)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_answered_whole_at_both_ends_of_their_range(dtype):
    ends = [np.iinfo(dtype).min, 0, np.iinfo(dtype).max]
    assert encode(False, x=np.array(ends, dtype)) == f'{{"outputs": [{", ".join(map(str, ends))}]}}'


def test_bools_are_answered_as_bools():
    assert encode(True, x=("bool", [True, False])) == '{"predictions": [true, false]}'


@pytest.mark.parametrize("value, text", [
    # TensorFlow Serving's SixDigitPrecision and NonFinite
    (9000000, "9e+06"), (999999, "999999.0"), (0.5, "0.5"), (0.0003, "0.0003"), (0.00003, "3e-05"), (555557.5, "555557.5"),
    (nan, "NaN"), (inf, "Infinity"), (-inf, "-Infinity"), (3, "3.0"),
    # its rule: six digits where that is exact, else 9
    (0, "0.0"), (-0.0, "-0.0"), (1, "1.0"), (-1, "-1.0"), (100000, "100000.0"), (1e6, "1e+06"), (1234567, "1234567.0"),
    (16777216, "16777216.0"), (0.1, "0.1"), (0.2, "0.2"),
    (1 / 3, "0.333333343"), (2 / 3, "0.666666687"), (1e20, "1e+20"), (1e-7, "1e-07"), (0.0001, "0.0001"),
    (123456789, "123456792.0"),
    (3.4028234663852886e38, "3.40282347e+38"), (1.1754943508222875e-38, "1.17549435e-38"), (1.401298464324817e-45, "1.4013e-45"),
])
def test_a_float_is_written_as_tensorflow_serving_writes_it(value, text):
    assert decimals(np.array([value], np.float32)) == [text]
    assert encode(False, x=("float", value)) == f'{{"outputs": {text}}}'
    assert encode(True, x=("float", [[value, value]])) == f'{{"predictions": [[{text}, {text}]]}}'


@pytest.mark.parametrize("value, text", [
    (0, "0.0"), (-0.0, "-0.0"), (1, "1.0"), (0.1, "0.1"), (0.1 + 0.2, "0.30000000000000004"), (1 / 3, "0.33333333333333331"),
    (1e5, "100000.0"), (1234567, "1234567.0"),
    (1e20, "1e+20"), (1e300, "1e+300"), (2**53, "9007199254740992.0"), (1.7976931348623157e308, "1.7976931348623157e+308"),
    (5e-324, "4.94066e-324"), (nan, "NaN"), (inf, "Infinity"), (-inf, "-Infinity"),
])
def test_a_double_is_written_as_tensorflow_serving_writes_it(value, text):
    assert decimals(np.array([value], np.float64)) == [text]


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_every_number_read_back_is_the_same_to_the_last_bit(kind):
    random = np.random.default_rng(7)
    floats = {np.uint32: np.float32, np.uint64: np.float64}[kind]
    numbers = random.integers(0, np.iinfo(kind).max, 20_000, kind, endpoint=True).view(floats)  # any bits: tiny, huge, NaN
    numbers = np.concatenate([numbers, random.standard_normal(20_000).astype(floats),
                              random.integers(-999, 999, 5_000).astype(floats) / 8])
    back = np.array(json.loads(encode(True, x=numbers))["predictions"], floats)
    np.testing.assert_array_equal(back, numbers)
    assert (np.signbit(back) == np.signbit(numbers))[~np.isnan(numbers)].all()


def test_a_string_that_is_json_is_escaped():
    text = '"\\/\b\f\n\r\t\x01\x1f\x7f é€😀</script>'
    body = encode(True, x=("string", [text.encode()]))
    assert json.loads(body) == {"predictions": [text]}
    assert "é€😀</script>" in body  # what needs no escape is left as it is


def test_a_string_that_is_not_utf_8_is_passed_on_as_it_is():
    asked = Signature("s", {}, {"x": spec("string")}, False)
    assert encode_predict(asked, False, [np.array(b'\xff"\x80', object)]).body == b'{"outputs": "\xff\\"\x80"}'


@pytest.mark.parametrize("name, is_bytes", [
    ("x_bytes", True), ("_bytes", True), ("bytes", False), ("x_bytes_", False), ("x_BYTES", False)])
def test_only_a_string_output_whose_name_ends_in_bytes_is_base64(name, is_bytes):
    expected = {"b64": "/wA="} if is_bytes else "a"
    assert json.loads(encode(False, **{name: ("string", b"\xff\0" if is_bytes else b"a")})) == {"outputs": expected}
    assert json.loads(encode(False, **{name: ("int32", [1])})) == {"outputs": [1]}


@pytest.mark.parametrize("message", ['Bad key: "key"', "Bad key: 'key'", "é \n \\ \x00 \ud800"])
def test_an_error_is_an_object_with_one_key(message):
    reply = reply_error(Error(message, 418))
    assert reply.status == 418
    assert json.loads(reply.body) == {"error": message}
    assert reply.headers == {"Content-Type": "application/json"}
    if message.startswith("Bad key: '"):
        assert message.encode() in reply.body  # a single quote is not escaped


@pytest.mark.parametrize("status", [429, 503])
def test_an_overload_says_when_to_come_again(status):
    assert int(reply_error(Error("Not now", status)).headers["Retry-After"]) > 0


def test_a_message_that_shows_a_document_is_cut_short():
    assert len(shown({"x": list(range(100_000))})) < 500
    assert len(refused("Not formatted correctly", predict, f'{{"instances": {[1] * 10_000}, "inputs": 1}}', x="float")) < 1000
    assert len(refused("Is not object", parse_json, json.dumps([1] * 10_000).encode())) < 1000
    assert len(refused("keys must be equal", predict, f'{{"instances": [{{"x": {[1] * 10_000}}}]}}', x="int8", y="int8")) < 1000
    assert len(refused("is not of expected type", predict, json.dumps({"inputs": "x" * 10_000}), x="float")) < 1000


def test_every_error_code_of_tensorflow_has_tensorflow_servings_status():
    codes = {"CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "ALREADY_EXISTS": 6,
             "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9, "ABORTED": 10, "OUT_OF_RANGE": 11,
             "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14, "DATA_LOSS": 15, "UNAUTHENTICATED": 16}
    assert {name: HTTP_STATUS.get(code, 500) for name, code in codes.items()} == {
        "CANCELLED": 499, "UNKNOWN": 500, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404,
        "ALREADY_EXISTS": 409,
        "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 400, "ABORTED": 409, "OUT_OF_RANGE": 400,
        "UNIMPLEMENTED": 501, "INTERNAL": 500, "UNAVAILABLE": 503, "DATA_LOSS": 500, "UNAUTHENTICATED": 401}


# -- paths: TensorFlow Serving's own cases -----------------------------------------------------------------------------

ODD = "%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D"


@pytest.mark.parametrize("path, name, version, label, what", [
    (f"/v1/models/modelname{ODD}", f"modelname{ODD}", None, None, None),
    ("/v1/models/modelname/versions/99", "modelname", "99", None, None),
    ("/v1/models/modelname/labels/latest", "modelname", None, "latest", None),
    (f"/v1/models/modelname/labels/latest{ODD}", "modelname", None, f"latest{ODD}", None),
    ("/v1/models/modelname/labels/latest/metadata", "modelname", None, "latest", "metadata"),
    (f"/v1/models/modelname{ODD}/labels/latest{ODD}/metadata", f"modelname{ODD}", None, f"latest{ODD}", "metadata"),
    ("/v1/models/modelname/versions/99/metadata", "modelname", "99", None, "metadata"),
    ("/v1/models", None, None, None, None),
    ("/v1/models/metadata", "metadata", None, None, None),  # the status of a model of this name
    ("/v1/models/metadata/metadata", "metadata", None, None, "metadata"),
    ("/v1/models/versions", "versions", None, None, None),
    ("/v1/models/labels", "labels", None, None, None),
    ("/v1/models/versions/5", None, "5", None, None),
    ("/v1/models/labels/x", None, None, "x", None),
    ("/v1/models/labels/x/metadata", None, None, "x", "metadata"),
    ("/v1/models/versions/versions/5", "versions", "5", None, None),
    ("/v1/models/a b?c", "a b?c", None, None, None),
    ("/V1/MODELS/m/VERSIONS/5/METADATA", "m", "5", None, "METADATA"),
])
def test_a_get_path_is_taken_apart(path, name, version, label, what):
    assert GET_PATH.fullmatch(path).groups() == (name, version, label, what)


@pytest.mark.parametrize("path, name, version, label, what", [
    (f"/v1/models/modelname{ODD}:predict", f"modelname{ODD}", None, None, "predict"),
    ("/v1/models/modelname/versions/99:predict", "modelname", "99", None, "predict"),
    ("/v1/models/modelname/labels/latest:predict", "modelname", None, "latest", "predict"),
    (f"/v1/models/modelname{ODD}/labels/latest{ODD}:predict", f"modelname{ODD}", None, f"latest{ODD}", "predict"),
    ("/v1/models/m:classify", "m", None, None, "classify"),
    ("/v1/models/m:regress", "m", None, None, "regress"),
    ("/v1/models/foo/versions/18446744073709551615:predict", "foo", "18446744073709551615", None, "predict"),
    ("/v1/models/versions:predict", "versions", None, None, "predict"),
    ("/V1/Models/m/Labels/Latest:PREDICT", "m", None, "Latest", "PREDICT"),
])
def test_a_post_path_is_taken_apart(path, name, version, label, what):
    assert POST_PATH.fullmatch(path).groups() == (name, version, label, what)


@pytest.mark.parametrize("path", [
    "/v1/foo", "/v1/models/foo:predict", "/v1/models/foo/version/50:predict", "/v1/models/", "/v1/models/foo/",
    "/v1/models//versions/5", "/v1/models/foo/metadata/",
    "/v1/models/foo/versions/5/labels/x", "/v1/models/foo/labels/x/versions/5", "/v1/models/foo/versions/",
    "/v1/models/foo/versions/x", "/v1/models/foo/versions/-1",
    "/v1/models/foo/versions/\u0663", "/v1/models/foo/labels/", "/v1/models/foo/metadata/versions/5",
    "/v1/models/foo/versions/5/versions/5", "/v2/models/foo", "/v1/modelsfoo"])
def test_what_is_not_a_get_path_does_not_match(path):
    assert not GET_PATH.fullmatch(path)


@pytest.mark.parametrize("path", [
    "/v1/foo", "/v1/models", "/v1/models/foo/version/50:predict", "/v1/models/foo/versions/string:predict",
    "/v1/models/foo/metadata",
    "/v1/models/foo/versions/50/labels/some_label:regress", "/v1/models/foo", "/v1/models/:predict", "/v1/models/foo:",
    "/v1/models/foo:generate", "/v1/models/foo:predict/",
    "/v1/models/foo:predict:predict", "/v1/models/foo/versions/5/:predict", "/v1/models/foo/labels/:predict",
    "/v1/models/foo%3Apredict"])
def test_what_is_not_a_post_path_does_not_match(path):
    assert not POST_PATH.fullmatch(path)


def test_the_odd_characters_of_tensorflow_servings_tests_decode():
    assert urllib.parse.unquote(ODD) == "!#$%&'()*+,/:;=?@[]"


# -- the adder's query, gzip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query, value", [
    ("", 1), ("other=5", 1), ("VALUE=5", 1), ("value=3", 3), ("value=-2.5", -2.5), ("value=%2B3", 3), ("value=1e3", 1000),
    ("value=1E-3", 0.001), ("value=.5", 0.5), ("value=5.", 5),
    ("value=0", 0), ("value=-0", 0), ("value=007", 7), ("%76alue=%33", 3), ("a=1&value=4&b=2", 4), ("value=1e-400", 0),
    ("value=1.7976931348623157e308", sys.float_info.max)])
def test_the_value_of_a_query_is_read(query, value):
    assert parse_value(query) == value


@pytest.mark.parametrize("query", [
    "value", "value=", "value=abc", "value=nan", "value=NaN", "value=inf", "value=-Infinity", "value=1e999", "value=-1e999",
    "value=1&value=1", "value=1&value=", "value=1_000", "value=0x10",
    "value=1,5", "value=+3", "value=%203", "value=3%20", "value=3%0A", "value=3%00", "value=%D9%A3", "value=1;2", "value=1e",
    "value=.", "value=--1", "value=[3]", "value=true",
    "value=%FF", "value=" + "9" * 10_000, "value=0." + "0" * 10_000 + "1", "&".join(["value=1"] * 1000),
    "&".join(["a=1"] * 100_000)])
def test_a_query_without_one_finite_number_is_refused(query):
    assert len(refused("", parse_value, query)) < 200


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate, gzip"])
def test_a_gzip_body_is_decompressed(encoding):
    assert unzip(encoding, gzip.compress(b"{}" * 1000)) == b"{}" * 1000


@pytest.mark.parametrize("encoding", ["", "identity", "deflate", "br"])
def test_a_body_that_is_not_called_gzip_is_left_as_it_is(encoding):
    assert unzip(encoding, gzip.compress(b"{}")) == gzip.compress(b"{}")


@pytest.mark.parametrize("body", [
    b"", b"{}", gzip.compress(b"{}")[:-1], gzip.compress(b"{}")[:5], gzip.compress(b"{}")[:-8] + b"\0" * 8])
def test_what_cannot_be_decompressed_counts_as_empty(body):
    assert unzip("gzip", body) == b""


def test_a_small_body_that_decompresses_to_a_huge_one_is_too_large():
    huge = gzip.compress(bytes(MAX_BODY_BYTES + 2**20), 1)
    assert len(huge) < 2**20
    refused("larger than 64 MiB", unzip, "gzip", huge, status=413)


def test_a_body_of_just_the_limit_is_not_too_large():
    assert len(unzip("gzip", gzip.compress(bytes(MAX_BODY_BYTES), 1))) == MAX_BODY_BYTES
