"""TensorFlow Serving's REST API over real HTTP, the same from both front ends: predict, status, metadata and their errors.

The cases are those of TensorFlow Serving's own tests (http_rest_api_handler_test.cc, tensorflow_model_server_test.py,
json_tensor_test.cc), the rules of its code, and the few places where we decide otherwise.
"""

import base64
import gzip
import json
import struct

import pytest

from conftest import real_models

JSON = "application/json"
ODD = "%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D"
ODD_PLAIN = "!#$%&'()*+,/:;=?@[]"
OK = {"error_code": "OK", "error_message": ""}


def good(answer) -> dict:
    """The document of an answer that is 200 and JSON."""
    assert answer.status == 200, answer
    assert answer.headers["Content-Type"] == JSON
    return answer.json


def error(answer, status: int, message: str = "") -> str:
    """The message of an error of this status, which has to contain ``message``: JSON with one key, no trace of a stack."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == JSON
    assert answer.json.keys() == {"error"}
    text = answer.json["error"]
    assert isinstance(text, str) and text.strip()
    assert message in text
    assert "Traceback" not in text and "File \"" not in text
    return text


def real(name: str) -> str:
    """The name of a real model, or skip the test."""
    if name not in real_models():
        pytest.skip(f"the real model {name} is not here")
    return name


def available(version: int) -> dict:
    return {"model_version_status": [{"version": str(version), "state": "AVAILABLE", "status": OK}]}


def echo(front_end, signature: str, document: str, more: str = "") -> bytes:
    """The body of the answer of the model that gives back what it gets."""
    answer = front_end.post("/v1/models/echo:predict", f'{{"signature_name": "{signature}", {document}}}'.encode())
    assert (answer.status, answer.headers["Content-Type"]) == (200, JSON), answer
    return answer.body


def same_json(text: str, body: bytes) -> bool:
    """Equal as JSON, each number down to the way it is written, white space apart."""
    exact = {"parse_float": "float {}".format, "parse_int": "int {}".format, "parse_constant": "constant {}".format}
    return json.loads(text, **exact) == json.loads(body, **exact)


# -- status ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, version", [
    ("/v1/models/linear", 1), ("/v1/models/adder", 1), ("/v1/models/words", 10), ("/v1/models/picture", 3),
    ("/v1/models/linear/versions/1", 1), ("/v1/models/words/versions/10", 10), ("/v1/models/words/versions/00010", 10)])
def test_the_status_of_a_model_or_a_version_is_available(front_end, path, version):
    assert good(front_end.get(path)) == available(version)


@pytest.mark.parametrize("path", ["/v1/models/{}", "/v1/models/{}/versions/123", "/v1/models/{}/versions/00000123"])
@pytest.mark.parametrize("name", [
    "saved_model_half_plus_two_cpu", "saved_model_half_plus_three", "saved_model_half_plus_two_tf2_cpu"])
def test_the_status_of_a_real_model_is_that_of_tensorflow_servings_tests(front_end, name, path):
    assert good(front_end.get(path.format(real(name)))) == available(123)


@pytest.mark.parametrize("what", ["", "/metadata"])
@pytest.mark.parametrize("path, which", [
    ("/v1/models/foo", "Latest(foo)"), ("/v1/models/Linear", "Latest(Linear)"), ("/v1/models/words99", "Latest(words99)"),
    ("/v1/models/foo/versions/50", "Specific(foo, 50)"), ("/v1/models/linear/versions/50", "Specific(linear, 50)"),
    ("/v1/models/words/versions/2", "Specific(words, 2)"), ("/v1/models/linear/versions/0", "Specific(linear, 0)"),
    ("/v1/models/linear/versions/9223372036854775807", "Specific(linear, 9223372036854775807)"),
    (f"/v1/models/a{ODD}", f"Latest(a{ODD_PLAIN})"),
    ("/v1/models/metadata", "Latest(metadata)"), ("/v1/models/versions", "Latest(versions)")])
def test_status_and_metadata_of_what_is_not_served_are_not_found(front_end, path, which, what):
    error(front_end.get(path + what), 404, f"Servable not found for request: {which}")


# -- metadata ----------------------------------------------------------------------------------------------------------


def tensor(dtype: str, name: str, *sizes: int, unknown_rank: bool = False) -> dict:
    shape = {"dim": [{"size": str(size), "name": ""} for size in sizes], "unknown_rank": unknown_rank}
    return {"dtype": dtype, "tensor_shape": shape, "name": name}


def definition(inputs: dict, outputs: dict, method: str = "predict") -> dict:
    return {"inputs": inputs, "outputs": outputs, "method_name": f"tensorflow/serving/{method}", "defaults": {}}


def metadata(name: str, version: int, **signatures) -> dict:
    return {"model_spec": {"name": name, "signature_name": "", "version": str(version)},
            "metadata": {"signature_def": {"signature_def": signatures}}}


@pytest.mark.parametrize("path", [
    "/v1/models/linear/metadata", "/v1/models/linear/versions/1/metadata", "/V1/Models/linear/metadata",
    "/v1/models/%6cinear/metadata"])
def test_metadata_has_the_signatures_as_proto3_json(front_end, path):
    assert good(front_end.get(path)) == metadata(
        "linear", 1,
        serving_default=definition({"x": tensor("DT_FLOAT", "x:0", -1, 3)}, {"y": tensor("DT_FLOAT", "add:0", -1, 2)}))


def test_metadata_tells_a_scalar_from_an_unknown_rank(front_end):
    (definition,) = good(front_end.get("/v1/models/scalar/metadata"))["metadata"]["signature_def"]["signature_def"].values()
    assert definition["outputs"]["mean"]["tensor_shape"] == {"dim": [], "unknown_rank": False}
    definitions = good(front_end.get("/v1/models/echo/metadata"))["metadata"]["signature_def"]["signature_def"]
    assert definitions["string"]["inputs"]["x"] == tensor("DT_STRING", "in_string:0", unknown_rank=True)


def test_metadata_has_every_signature_of_a_saved_model(front_end):
    document = good(front_end.get("/v1/models/words/metadata"))
    assert document["model_spec"] == {"name": "words", "signature_name": "", "version": "10"}
    definitions = document["metadata"]["signature_def"]["signature_def"]
    assert definitions.keys() - {"__saved_model_init_op"} == {"serving_default", "back", "upper"}
    assert definitions["back"]["inputs"]["number"]["dtype"] == "DT_INT64"
    assert definitions["back"]["outputs"]["word"]["dtype"] == "DT_STRING"
    assert definitions["upper"]["outputs"].keys() == {"word", "length"}


def test_metadata_of_a_real_model_is_that_of_tensorflow_servings_tests(front_end):
    name = real("saved_model_half_plus_two_cpu")
    x, x2 = ({"x": tensor("DT_FLOAT", "x:0", -1, 1)}, {"inputs": tensor("DT_FLOAT", "x2:0", -1, 1)})
    example = {"inputs": tensor("DT_STRING", "tf_example:0", unknown_rank=True)}
    y, y2, y3 = (tensor("DT_FLOAT", f"{y}:0", -1, 1) for y in ("y", "y2", "y3"))
    expected = metadata(
        name, 123, serving_default=definition(x, {"y": y}), regress_x_to_y=definition(example, {"outputs": y}, "regress"),
        regress_x_to_y2=definition(example, {"outputs": y2}, "regress"),
        regress_x2_to_y3=definition(x2, {"outputs": y3}, "regress"),
        classify_x_to_y=definition(example, {"scores": y}, "classify"))
    answered = good(front_end.get(f"/v1/models/{name}/metadata"))
    answered["metadata"]["signature_def"]["signature_def"].pop("classify_x2_to_y3", None)  # in newer copies of this model only
    assert answered == expected


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, path", [
    # TensorFlow Serving's own cases
    ("GET", "/v1/foo"), ("POST", "/v1/foo"), ("GET", "/v1/models/debug/model_name"), ("POST", "/v1/models"),
    ("GET", "/v1/models/foo:predict"),
    ("GET", "/v1/models/foo/version/50:predict"), ("POST", "/v1/models/foo/version/50:regress"),
    ("POST", "/v1/models/foo/versions/HELLO:regress"),
    ("POST", "/v1/models/foo/metadata"), ("POST", "/v1/models/foo/label/some_label:regress"),
    ("POST", "/v1/models/foo/versions/some_label:regress"),
    ("POST", "/v1/models/foo/versions/50/labels/some_label:regress"), ("POST", "/v1/models/foo/version/50:predict"),
    ("POST", "/v1/models/foo/versions/string:predict"),
    # what follows from its patterns
    ("GET", "/v1/"), ("POST", "/v1/"), ("GET", "/v1/models/"), ("GET", "/v1/models/linear/"),
    ("GET", "/v1/models/linear/metadata/"), ("GET", "/v1//models/linear"),
    ("GET", "/v1/models//linear"), ("GET", "/v1/models/linear/versions"), ("GET", "/v1/models/linear/versions/x"),
    ("GET", "/v1/models/linear/versions/-1"),
    ("GET", "/v1/models/linear/versions/1.0"), ("GET", "/v1/models/linear/versions/1/labels/x"),
    ("GET", "/v1/models/linear/labels/x/versions/1"),
    ("POST", "/v1/models/linear"), ("POST", "/v1/models/linear:"), ("POST", "/v1/models/:predict"),
    ("POST", "/v1/models/linear:predict/"), ("POST", "/v1/models/linear/:predict"),
    ("POST", "/v1/models/linear:train"), ("POST", "/v1/models/linear%3Apredict"), ("POST", "/v1/models%2Flinear:predict"),
    ("POST", "/v1/models/linear:%70redict"),
    ("POST", "/V1/models"), ("POST", "/v1/models/linear:PREDICT"), ("POST", "/v1/models/linear:Predict"),
    ("POST", "/v1/models/linear/versions/1:Classify"),
    *[(method, path) for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
      for path in ("/v1/models/linear", "/v1/models/linear:predict", "/v1/models", "/v1/")],
])
def test_any_other_url_is_malformed(front_end, method, path):
    text = error(front_end.request(method, path, b"no JSON" if method != "TRACE" else None), 400)
    assert text == f"Malformed request: {method} {path}"


@pytest.mark.parametrize("path", ["/v1/models/linear", "/v1/models/linear:predict", "/v1/models", "/v1/"])
def test_head_is_malformed_too(front_end, path):
    answer = front_end.request("HEAD", path)
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (400, JSON, b"")


@pytest.mark.parametrize("path", [
    "/v1/models", "/v1/Models", "/v1/models/versions/5", "/v1/models/versions/5/metadata",
    "/v1/models/labels/x", "/v1/models/labels/x/metadata"])
def test_a_path_without_a_model_name_says_so(front_end, path):
    error(front_end.get(path), 400, "Missing model name")


@pytest.mark.parametrize("path", ["/v1", "/v2/models/linear", "/models/linear", "/V11/models/linear", "/statuspage", "/index"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_under_v1_is_not_found(front_end, method, path):
    error(front_end.request(method, path), 404)


@pytest.mark.parametrize("path", [
    "/V1/MODELS/picky:predict", "/v1/Models/picky:predict", "/v1/models/picky/versions/1:predict",
    "/v1/models/picky/VERSIONS/001:predict",
    "/v1/models/%70icky:predict", "/v1/models/%70%69%63%6b%79/versions/1:predict", "/v1/models/picky:predict?x=1",
    "/v1/models/picky:predict?", "/v1/models/picky:predict?a=/v1/models:b"])
def test_the_case_of_the_path_percent_encoding_and_the_query_make_no_difference(front_end, path):
    assert good(front_end.post(path, {"instances": [1, 3]})) == {"predictions": [0.5, 1.5]}


def test_a_url_in_absolute_form_is_accepted(front_end):
    """As clients send it to a proxy; each HTTP/1.1 server has to take it (RFC 9112, 3.2.2)."""
    assert good(front_end.get(f"http://127.0.0.1:{front_end.port}/v1/models/linear")) == available(1)
    answer = front_end.post(f"http://127.0.0.1:{front_end.port}/v1/models/picky:predict?x=1", {"instances": [1]})
    assert good(answer) == {"predictions": [0.5]}


@pytest.mark.parametrize("path", [
    "/V1/MODELS/linear", "/v1/models/linear/Versions/1", "/v1/models/%6Cinear", "/v1/models/linear?x=1",
    "/v1/models/linear?"])
def test_the_case_percent_encoding_and_the_query_make_no_difference_to_status(front_end, path):
    assert good(front_end.get(path)) == available(1)


@pytest.mark.parametrize("path", ["/v1/models/linear/METADATA", "/v1/models/linear/versions/1/Metadata"])
def test_metadata_in_upper_case_is_the_status(front_end, path):
    assert good(front_end.get(path)) == available(1)


@pytest.mark.parametrize("path, which", [
    ("foo", "Latest(foo)"), ("foo/versions/50", "Specific(foo, 50)"), ("picky/versions/50", "Specific(picky, 50)"),
    ("picky99", "Latest(picky99)"), ("PICKY", "Latest(PICKY)"),
    ("%2570icky", "Latest(%70icky)"), ("pi+cky", "Latest(pi+cky)"), ("pi%2Bcky%20%zz", "Latest(pi+cky %zz)"),
    (f"a{ODD}", f"Latest(a{ODD_PLAIN})"),
    ("%C3%A9%E2%82%AC", "Latest(é€)"), ("a%2Fb", "Latest(a/b)"), ("%2F", "Latest(/)"), ("a%3Apredict", "Latest(a:predict)"),
    ("a%3Fb", "Latest(a?b)"), ("..", "Latest(..)"), ("%2e%2e", "Latest(..)"),
    ("a%0Ab", "Latest(a\nb)"), ("a%0A", "Latest(a\n)")])
def test_predict_names_the_decoded_model_that_is_not_found(front_end, path, which):
    text = error(front_end.post(f"/v1/models/{path}:predict", {"instances": [1]}), 404)
    assert text == f"Servable not found for request: {which}"


def test_an_encoded_line_break_is_a_character_like_any_other(front_end):
    error(front_end.post("/v1/models/a%0Ab:predict", b"nonsense"), 400, "JSON Parse error: ")
    error(front_end.get("/v1/models/a%0A/"), 400, "Malformed request: GET /v1/models/a%0A/")
    error(front_end.get("/v1/models/a%0A"), 404, "Servable not found for request: Latest(a\n)")


@pytest.mark.parametrize("method, path", [
    ("POST", "/v1/models/picky/versions/{}:predict"), ("POST", "/v1/models/foo/versions/{}:regress"),
    ("GET", "/v1/models/picky/versions/{}"), ("GET", "/v1/models/picky/versions/{}/metadata")])
@pytest.mark.parametrize("version", ["9223372036854775808", "18446744073709551615", "9" * 5000])
def test_a_version_beyond_64_bits_cannot_be_converted(front_end, method, path, version):
    text = error(front_end.request(method, path.format(version), b'{"instances": [1]}'), 400, "Failed to convert version: ")
    assert len(text) < 300


@pytest.mark.parametrize("method, path", [
    ("POST", "/v1/models/picky/labels/{}:predict"), ("POST", "/v1/models/foo/labels/{}:predict"),
    ("GET", "/v1/models/picky/labels/{}"), ("GET", "/v1/models/picky/labels/{}/metadata"),
    ("GET", "/v1/models/foo/Labels/{}"), ("POST", "/v1/models/picky/labels/{}:classify"),
    ("POST", "/v1/models/picky/labels/{}:regress")])
@pytest.mark.parametrize("label, plain", [
    ("Version_Nonexistent", "Version_Nonexistent"), ("latest", "latest"), ("1", "1"), (ODD, ODD_PLAIN)])
def test_labels_are_not_recognized(front_end, method, path, label, plain):
    text = error(front_end.request(method, path.format(label), b'{"instances": ["x", "y"], "examples": [{}]}'), 400)
    assert text == f"Unrecognized servable version label: {plain}"


# -- the body ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, message", [
    (b"", "JSON Parse error: The document is empty"), (b" ", "JSON Parse error: The document is empty"),
    (b"instances = [1, 2]", "JSON Parse error: Invalid value"),
    (b'{"instances": [1, 2]', "JSON Parse error: "), (b'{"instances": [1]}x', "JSON Parse error: "),
    (b'{"instances": ["\xff"]}', "JSON Parse error: Invalid encoding"),
    (b"[" * 100_000, "JSON Parse error: "),
    (b"[1, 2]", "Is not object"), (b"null", "Is not object"), (b'"x"', "Is not object")])
def test_a_body_that_is_no_json_object_is_refused(front_end, body, message):
    error(front_end.post("/v1/models/picky:predict", body), 400, message)


@pytest.mark.parametrize("content_type", [
    None, "", "application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
    "multipart/form-data; boundary=x", "application/json; charset=utf-16", "application/octet-stream", "nonsense"])
def test_the_content_type_never_matters(front_end, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert good(front_end.request("POST", "/v1/models/picky:predict", b'{"instances": [1]}', headers)) == {"predictions": [0.5]}


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_a_gzip_body_is_accepted(front_end, encoding):
    body = gzip.compress(json.dumps({"instances": [float(i) for i in range(5000)]}).encode())
    predictions = good(front_end.request("POST", "/v1/models/picky:predict", body, {"Content-Encoding": encoding}))["predictions"]
    assert predictions == [i / 2 for i in range(5000)]


@pytest.mark.parametrize("body", [b'{"instances": [1]}', gzip.compress(b'{"instances": [1]}')[:-1], b""])
def test_a_body_that_is_not_the_gzip_it_claims_to_be_counts_as_empty(front_end, body):
    error(front_end.request("POST", "/v1/models/picky:predict", body, {"Content-Encoding": "gzip"}), 400,
          "JSON Parse error: The document is empty")


def test_a_chunked_body_is_accepted(front_end):
    parts = iter([b'{"inst', b'ances": [1', b', 2]}'])
    assert good(front_end.request("POST", "/v1/models/picky:predict", parts, {})) == {"predictions": [0.5, 1.0]}


def test_the_answer_tells_its_length_and_its_type(front_end):
    answer = front_end.predict("picky", {"instances": [1]})
    assert answer.headers["Content-Type"] == JSON
    assert int(answer.headers["Content-Length"]) == len(answer.body)


@pytest.mark.parametrize("extra", [
    '"x": 1', '"Instances": []', '"context": {}', '"a": {"b": [{"c": null}]}',
    '"deep": ' + "[" * 20_000 + "]" * 20_000, '"deep": ' + '{"a":' * 20_000 + "1" + "}" * 20_000])
def test_other_keys_are_ignored(front_end, extra):
    body = f'{{{extra}, "instances": [1], {extra}}}'.encode()
    assert good(front_end.post("/v1/models/picky:predict", body)) == {"predictions": [0.5]}


@pytest.mark.parametrize("value", ["100", "null", "true", "[]", '["serving_default"]', "{}", "1.5"])
def test_a_signature_name_that_is_no_string_is_refused(front_end, value):
    error(front_end.post("/v1/models/picky:predict", f'{{"signature_name": {value}, "instances": [1]}}'.encode()), 400,
          "'signature_name' key must be a string value.")
    error(front_end.post("/v1/models/picky:predict", f'{{"signature_name": {value}}}'.encode()), 400,
          "'signature_name' key must be a string value.")


@pytest.mark.parametrize("document", [{}, {"signature_name": ""}, {"signature_name": "serving_default"}])
def test_the_signature_is_serving_default_where_none_is_named(front_end, document):
    assert good(front_end.predict("picky", document | {"instances": [4]})) == {"predictions": [2.0]}


@pytest.mark.parametrize("name", [
    "nope", "Serving_Default", "serving_default ", "tensorflow/serving/predict", "é\n\"\\",
    "__saved_model_init_op"])
def test_an_unknown_signature_is_refused_by_name(front_end, name):
    text = error(front_end.predict("picky", {"signature_name": name, "instances": [4]}), 400)
    assert text == f'Serving signature name: "{name}" not found in signature def'


# -- which error wins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, body, status, message", [
    ("/v1/models/foo/version/50:predict", b"nonsense", 400, "Malformed request: "),
    ("/v1/models/foo/versions/18446744073709551615:predict", b"nonsense", 400, "Failed to convert version"),
    ("/v1/models/foo:predict", b"nonsense", 400, "JSON Parse error: "),
    ("/v1/models/foo/versions/50:predict", b"", 400, "JSON Parse error: "),
    ("/v1/models/foo/labels/x:predict", b"nonsense", 400, "JSON Parse error: "),
    ("/v1/models/foo:predict", b"[5]", 400, "Is not object"),
    ("/v1/models/foo/labels/x:predict", b"[5]", 400, "Is not object"),
    ("/v1/models/foo:predict", b'{"signature_name": 5, "instances": 5, "inputs": 5}', 400,
     "'signature_name' key must be a string value."),
    ("/v1/models/foo/labels/x:predict", b'{"signature_name": 5}', 400, "'signature_name' key must be a string value."),
    ("/v1/models/foo/labels/x:predict", b'{"signature_name": "nope", "instances": 5}', 400,
     "Unrecognized servable version label: x"),
    ("/v1/models/foo:predict", b'{"signature_name": "nope", "instances": 5, "inputs": 5}', 404,
     "Servable not found for request: Latest(foo)"),
    ("/v1/models/foo:predict", b"{}", 404, "Servable not found for request: Latest(foo)"),
    ("/v1/models/several/versions/50:predict", b'{"signature_name": "nope"}', 404,
     "Servable not found for request: Specific(several, 50)"),
    ("/v1/models/several:predict", b'{"signature_name": "nope", "instances": 5, "inputs": 5}', 400,
     'Serving signature name: "nope" not found'),
    ("/v1/models/several:predict", b'{"signature_name": "nope"}', 400, 'Serving signature name: "nope" not found'),
    ("/v1/models/several:predict", b'{"instances": [{"x": "a"}], "inputs": {"x": "a"}}', 400,
     "Not formatted correctly expecting only one of"),
    ("/v1/models/several:predict", b'{"signature_name": 5, "instances": [[1, 2], [3, 4], [5, 6, 7]]}', 400,
     "must be a string value"),
    ("/v1/models/failing:predict", b'{"signature_name": "NOT_FOUND", "instances": ["x"]}', 400, "not of expected type: int32"),
])
def test_of_several_errors_the_first_in_the_order_of_tensorflow_serving_wins(front_end, path, body, status, message):
    error(front_end.post(path, body), status, message)


# -- predict: values in and out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, shown", [
    ("[1, 2.5, -3]", "[1.0, 2.5, -3.0]"),
    ("[9000000, 999999, 0.5, 0.0003, 0.00003, 555557.5]", "[9e+06, 999999.0, 0.5, 0.0003, 3e-05, 555557.5]"),
    ("[NaN, Infinity, -Infinity]", "[NaN, Infinity, -Infinity]"),
    ("[1e39, -1e39, 1e400, -1e400, 1e-400]", "[Infinity, -Infinity, Infinity, -Infinity, 0.0]"),
    ("[0.1, 0.3333333333333333, 16777217, 1e20, -0.0, -0]", "[0.1, 0.333333343, 16777216.0, 1e+20, -0.0, 0.0]"),
    ("[[1, 2], [3, 4]]", "[[1.0, 2.0], [3.0, 4.0]]"), ("[[]]", "[[]]"), ("[[[0]]]", "[[[0.0]]]")])
def test_floats_come_back_as_text_in_tensorflow_servings_format(front_end, values, shown):
    assert same_json(f'{{"predictions": {shown}}}', echo(front_end, "float32", f'"instances": {values}'))
    assert same_json(f'{{"outputs": {shown}}}', echo(front_end, "float32", f'"inputs": {values}'))


@pytest.mark.parametrize("signature, values, shown", [
    ("float64", "[0.1, 0.30000000000000004, 1, 1e39, 1e400, 9007199254740993, -0.0, NaN]",
     "[0.1, 0.30000000000000004, 1.0, 1e+39, Infinity, 9007199254740992.0, -0.0, NaN]"),
    ("int8", "[127, -128, 300, -1]", "[127, -128, 44, -1]"), ("uint8", "[255, 0, 256, -1]", "[255, 0, 0, 255]"),
    ("int16", "[32767, 32768]", "[32767, -32768]"),
    ("int32", "[2147483647, -2147483648, 0]", "[2147483647, -2147483648, 0]"), ("uint32", "[4294967295, 0]", "[4294967295, 0]"),
    ("int64", "[9223372036854775807, -9223372036854775808]", "[9223372036854775807, -9223372036854775808]"),
    ("uint64", "[18446744073709551615]", "[18446744073709551615]"),
    ("bool", "[true, false]", "[true, false]"),
    ("string", r'["text", "", "\u00e9\u20ac \ud83d\ude00", "\"\\\/\b\f\n\r\t\u0001"]',
     r'["text", "", "é€ 😀", "\"\\/\b\f\n\r\t\u0001"]'),
    ("string", '[{"b64": "aGVsbG8="}, "d29ybGQ="]', '["hello", "d29ybGQ="]'),
    ("string", '[[{"b64": "aGVsbG8="}], [{"b64": "d29ybGQ="}]]', '[["hello"], ["world"]]'),
    ("to_bytes", '[{"b64": "/wA="}, "text", {"b64": "AA"}]', '[{"b64": "/wA="}, {"b64": "dGV4dA=="}, {"b64": "AA=="}]'),
    ("to_bytes", '[["a"]]', '[[{"b64": "YQ=="}]]')])
def test_every_dtype_goes_through_in_row_and_in_columnar_format(front_end, signature, values, shown):
    assert same_json(f'{{"predictions": {shown}}}', echo(front_end, signature, f'"instances": {values}'))
    assert same_json(f'{{"outputs": {shown}}}', echo(front_end, signature, f'"inputs": {values}'))
    rows = ", ".join(f'{{"x": {json.dumps(row)}}}' for row in json.loads(values))
    assert same_json(f'{{"predictions": {shown}}}', echo(front_end, signature, f'"instances": [{rows}]'))


@pytest.mark.parametrize("signature, value, shown", [
    ("float32", "3", "3.0"), ("int64", "-5", "-5"), ("bool", "true", "true"), ("string", '"hi"', '"hi"'),
    ("string", '{"b64": "aGk="}', '"hi"'), ("to_bytes", '"hi"', '{"b64": "aGk="}'), ("string", '""', '""')])
def test_columnar_format_holds_scalars(front_end, signature, value, shown):
    assert same_json(f'{{"outputs": {shown}}}', echo(front_end, signature, f'"inputs": {value}'))
    assert same_json(f'{{"outputs": {shown}}}', echo(front_end, signature, f'"inputs": {{"x": {value}}}'))


@pytest.mark.parametrize("signature", ["float32", "int64", "bool", "string", "to_bytes"])
@pytest.mark.parametrize("values", ["[]", "[[], []]"])
def test_columnar_format_holds_no_values_at_all(front_end, signature, values):
    assert same_json(f'{{"outputs": {values}}}', echo(front_end, signature, f'"inputs": {values}'))


def test_bytes_that_are_not_utf_8_pass_as_they_are(front_end):
    assert b'"\xffA\xfe"' in echo(front_end, "string", '"instances": [{"b64": "/0H+"}]')


ALL = {"float32": 1.5, "float64": 0.1, "int8": 1, "int16": -2, "int32": 3, "int64": 4, "uint8": 5, "uint32": 6, "uint64": 7,
       "bool": True, "string": "é"}


def test_several_inputs_and_outputs_are_objects_by_name_for_each_row(front_end):
    second = ALL | {"bool": False, "string": "b", "int8": 0}
    document = good(front_end.predict("echo", {"signature_name": "all", "instances": [ALL, second]}))
    assert document == {"predictions": [ALL, second]}
    assert all(type(document["predictions"][0][name]) is type(value) for name, value in ALL.items())


def test_several_inputs_and_outputs_in_columnar_format_are_one_object_whose_first_axes_may_differ(front_end):
    columns = {name: [[value]] * i for i, (name, value) in enumerate(ALL.items())}
    answer = good(front_end.predict("echo", {"signature_name": "all", "inputs": columns | {"extra": {"ignored": None}}}))
    assert answer == {"outputs": columns}


def test_the_order_of_names_makes_no_difference(front_end):
    rows = [{"x": [1, 2], "n": 3}, {"n": -1, "x": [5, 0.5]}]
    expected = [{"scaled": [3.0, 6.0], "total": 9.0, "next": 4}, {"scaled": [-5.0, -0.5], "total": -5.5, "next": 0}]
    assert good(front_end.predict("several", {"instances": rows})) == {"predictions": expected}


def test_zero_rows_are_an_empty_list(front_end):
    assert good(front_end.predict("failing", {"signature_name": "no_rows", "instances": [1, 2]})) == {"predictions": []}
    assert good(front_end.predict("failing", {"signature_name": "no_rows", "inputs": [1, 2]})) == {"outputs": {"a": [], "b": []}}


def test_zero_rows_go_in_by_columnar_format(front_end):
    assert good(front_end.predict("picky", {"inputs": []})) == {"outputs": []}
    assert good(front_end.predict("picky", {"inputs": {"x": []}})) == {"outputs": []}


@pytest.mark.parametrize("signature, message", [
    ("row_and_scalar", "Tensor name: total has no shape information"),
    ("first_row", "Tensor name: first has inconsistent batch size: 1 expecting: 2")])
def test_outputs_that_are_no_rows_are_refused_in_row_format_only(front_end, signature, message):
    error(front_end.predict("failing", {"signature_name": signature, "instances": [1, 2]}), 400, message)
    outputs = good(front_end.predict("failing", {"signature_name": signature, "inputs": [1, 2]}))["outputs"]
    assert outputs in ({"all": [1, 2], "total": 3}, {"all": [1, 2], "first": [1]})


def test_a_scalar_output_is_columnar_only(front_end):
    assert good(front_end.predict("scalar", {"inputs": [1, 2, 6]})) == {"outputs": 3.0}
    error(front_end.predict("scalar", {"instances": [1, 2, 6]}), 400, "Tensor name: mean has no shape information")


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_an_output_dtype_that_has_no_json_is_refused(front_end, key):
    error(front_end.predict("failing", {"signature_name": "complex", key: [1, 2]}), 400, "tensor type: complex64")


def test_an_input_dtype_that_has_no_json_is_501_in_columns_and_400_in_rows(front_end):
    error(front_end.predict("echo", {"signature_name": "half", "inputs": [1, 2]}), 501,
          "Conversion of JSON Value: 1 to type: half")
    error(front_end.predict("echo", {"signature_name": "half", "instances": [1, 2]}), 400,
          "Conversion of JSON Value: 1 to type: half")


def test_strings_are_text_in_and_out(front_end):
    words = ["two", "zero", {"b64": "b25l"}, "nowhere"]
    assert good(front_end.predict("words", {"instances": words})) == {"predictions": [2, 0, 1, 3]}
    assert good(front_end.predict("words", {"signature_name": "back", "inputs": {"number": [1, 7]}})) == {"outputs": ["one", "?"]}
    upper = {"signature_name": "upper", "instances": [{"word": "é two"}]}
    assert good(front_end.predict("words", upper)) == {"predictions": [{"word": "é TWO", "length": 6}]}


def test_the_adder_is_a_model_like_any_other(front_end):
    before = good(front_end.get("/?value=0"))["result"]
    assert good(front_end.predict("adder", {"instances": [1, 2.5]})) == {"predictions": [before + 1, before + 3.5]}
    assert good(front_end.post("/v1/models/adder/versions/1:predict", {"inputs": {"value": [-3.5]}})) == {"outputs": [before]}


def test_values_go_to_the_kernels_whatever_shape_the_signature_has(front_end):
    """The signature declares the shape [2, 3]; a cumulative sum takes any."""
    assert good(front_end.predict("fixed", {"instances": [[1, 2, 3], [4, 5, 6]]})) == {"predictions": [[1, 2, 3], [5, 7, 9]]}
    assert good(front_end.predict("fixed", {"instances": [1, 2, 3, 4]})) == {"predictions": [1, 3, 6, 10]}
    assert good(front_end.predict("fixed", {"inputs": [[[1]], [[2]], [[3]]]})) == {"outputs": [[[1]], [[3]], [[6]]]}
    error(front_end.predict("fixed", {"inputs": 3}), 400)


# -- predict: errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, document, message", [
    ("picky", {}, "Missing 'inputs' or 'instances' key"),
    ("picky", {"instances": [[1, 2], [3, 4]], "inputs": [[1, 2]]},
     "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"),
    ("picky", {"instances": 5}, "Expecting 'instances' to be an list/array"),
    ("picky", {"instances": None}, "Expecting 'instances' to be an list/array"),
    ("picky", {"instances": {"x": [1]}}, "Expecting 'instances' to be an list/array"),
    ("picky", {"instances": []}, "No values in 'instances' array"),
    ("picky", {"instances": [{}]}, "keys must be equal to: x"),
    ("picky", {"instances": [{"x": 1, "y": 1}]}, "does not have named input: y"),
    ("picky", {"instances": [1, {"x": 1}]}, "Expecting value/list but got object at item 1 of input list"),
    ("picky", {"instances": [{"x": 1}, [1]]}, "Expecting object but got list at item 1 of input list"),
    ("picky", {"instances": ["x", "y"]}, "not of expected type: float"),
    ("picky", {"instances": [None]}, "Type: Null is not of expected type: float"),
    ("picky", {"instances": [True]}, "Type: True is not of expected type: float"),
    ("picky", {"instances": [[1, 2], [3]]}, "Expecting tensor size: 2 but got: 1"),
    ("picky", {"instances": [[1, 2], [[3, 4]]]}, "Expecting shape [2] but got: [1,2]"),
    ("picky", {"instances": [[[1, 2], [3]]]}, "Encountered list at unexpected size: 1"),
    ("picky", {"inputs": [[1, 2], [3]]}, "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
    ("picky", {"inputs": [1, [2]]}, "Encountered list at unexpected level: 1 expected < 1"),
    ("picky", {"inputs": [[1], 2]}, "JSON Value: 2 found at incorrect level: 2"),
    ("picky", {"inputs": {}}, "Missing named input: x in 'inputs' object."),
    ("picky", {"inputs": {"y": [1]}}, "Missing named input: x in 'inputs' object."),
    ("picky", {"inputs": None}, "Type: Null is not of expected type: float"),
    ("picky", {"inputs": {"b64": "AAAA"}}, "Type: Object is not of expected type: float"),
    ("several", {"instances": [[1, 2]]},
     "instances is a plain list, but expecting list of objects as multiple input tensors required as per tensorinfo_map"),
    ("several", {"inputs": [[1, 2]]},
     "inputs is a plain value/list, but expecting an object as multiple input tensors required as per tensorinfo_map"),
    ("several", {"instances": [{"x": [1, 2]}]}, "keys must be equal to: n,x"),
    ("several", {"instances": [{"x": [1, 2], "n": 1.0}]}, "Type: Number is not of expected type: int64"),
    ("several", {"inputs": {"x": [[1, 2]]}}, "Missing named input: n in 'inputs' object."),
    ("words", {"instances": [1]}, "Type: Number is not of expected type: string"),
    ("words", {"inputs": [{"b64": "*"}]}, "Unable to base64 decode"),
    ("words", {"inputs": [{"b64": 1}]}, "not formatted correctly for base64 data"),
    ("words", {"instances": ["\ud800"]}, "surrogate"),
])
def test_a_wrong_request_is_told_what_is_wrong(front_end, model, document, message):
    error(front_end.predict(model, document), 400, message)


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_a_signature_without_inputs_cannot_be_called(front_end, key):
    error(front_end.predict("failing", {"signature_name": "no_inputs", key: [1]}), 400,
          "Failed to get input map for signature: no_inputs")


@pytest.mark.parametrize("document", [
    {"instances": [[0] * 10_000 + ["x" * 10_000]]}, {"inputs": [1], "instances": ["x" * 1000] * 1000},
    {"instances": {"x": [1] * 10_000}}, {"signature_name": ["x" * 1000] * 100}])
def test_a_message_that_shows_a_document_is_cut_short(front_end, document):
    assert len(error(front_end.predict("picky", document), 400)) < 1000


@pytest.mark.parametrize("code, status", [
    ("NOT_FOUND", 404), ("FAILED_PRECONDITION", 400), ("OUT_OF_RANGE", 400), ("CANCELLED", 499)])
def test_an_error_of_the_models_own_has_the_status_of_its_code(front_end, code, status):
    answer = front_end.predict("failing", {"signature_name": code, "inputs": 1})
    text = error(answer, status)
    assert "[[" not in text and "\n" not in text
    if code == "NOT_FOUND":
        assert "/no/such/file/1" in text


def test_values_that_the_model_refuses_are_400_with_its_reason(front_end):
    text = error(front_end.predict("picky", {"instances": [1, -1]}), 400, "x must not be negative")
    assert "\n" not in text and "[[" not in text
    error(front_end.predict("linear", {"instances": [[1, 2]]}), 400)
    error(front_end.predict("linear", {"instances": [1, 2, 3]}), 400)
    error(front_end.predict("linear", {"inputs": [[[1, 2, 3]]] * 2}), 400)
    assert good(front_end.predict("linear", {"instances": [[1, 2, 3]]})) == {"predictions": [[22.5, 27.5]]}


# -- real models: TensorFlow Serving's own cases -----------------------------------------------------------------------


@pytest.mark.parametrize("what, document, expected", [
    ("", {"instances": [[1.0, 2.0], [3.0, 4.0]]}, {"predictions": [[2.5, 3.0], [3.5, 4.0]]}),
    ("/versions/123", {"instances": [1.0, 2.0]}, {"predictions": [2.5, 3.0]}),
    ("", {"signature_name": "serving_default", "instances": [3.0, 4.0]}, {"predictions": [3.5, 4.0]}),
    ("", {"signature_name": "serving_default", "inputs": [3.0, 4.0]}, {"outputs": [3.5, 4.0]}),
    ("", {"instances": [2.0, 3.0, 4.0]}, {"predictions": [3.0, 3.5, 4.0]}),
    ("", {"inputs": [2.0, 3.0, 4.0]}, {"outputs": [3.0, 3.5, 4.0]}),
    ("", {"instances": [1.0, 2.0, 5.0]}, {"predictions": [2.5, 3.0, 4.5]}),
    ("", {"instances": [1, 2, 5]}, {"predictions": [2.5, 3.0, 4.5]}),
    ("", {"instances": [{"x": [1.0]}, {"x": [2.0]}]}, {"predictions": [[2.5], [3.0]]}),
    ("", {"inputs": {"x": [[1.0], [2.0]]}}, {"outputs": [[2.5], [3.0]]}),
    ("", {"inputs": 1}, {"outputs": 2.5}),
    # predict may be called on a regress signature
    ("", {"signature_name": "regress_x2_to_y3", "instances": [[1.0]]}, {"predictions": [[3.5]]}),
])
def test_half_plus_two_answers_as_in_tensorflow_servings_tests(front_end, what, document, expected):
    answer = front_end.post(f"/v1/models/{real('saved_model_half_plus_two_cpu')}{what}:predict", document)
    assert good(answer) == expected
    assert same_json(json.dumps(expected), answer.body)


@pytest.mark.parametrize("signature, value, answer", [
    ("regress_x_to_y", 80.0, 42.0), ("regress_x_to_y2", 2.0, 4.0), ("classify_x_to_y", 20.0, 12.0)])
def test_predict_on_a_signature_for_examples_takes_them_serialized(front_end, signature, value, answer):
    """The bytes are those of a tf.train.Example with the feature x."""
    feature = b"\x12\x06\x0a\x04" + struct.pack("<f", value)  # Feature.float_list.value, packed
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    example = b"\x0a" + bytes([len(features)]) + features
    document = {"signature_name": signature, "instances": [{"b64": base64.b64encode(example).decode()}]}
    assert good(front_end.predict(real("saved_model_half_plus_two_cpu"), document)) == {"predictions": [[answer]]}


def test_half_plus_three_answers_as_in_tensorflow_servings_documentation(front_end):
    name = real("saved_model_half_plus_three")
    assert good(front_end.predict(name, {"instances": [1.0, 2.0, 5.0]})) == {"predictions": [3.5, 4.0, 5.5]}
    error(front_end.predict("half", {"instances": [1.0, 2.0, 5.0]}), 404, "Servable not found for request: Latest(half)")


def test_half_plus_two_of_tensorflow_2_answers_the_same(front_end):
    name = real("saved_model_half_plus_two_tf2_cpu")
    assert good(front_end.predict(name, {"instances": [[1.0], [2.0], [5.0]]})) == {"predictions": [[2.5], [3.0], [4.5]]}
    assert good(front_end.predict(name, {"inputs": [[1.0], [2.0]]})) == {"outputs": [[2.5], [3.0]]}
    assert good(front_end.predict(name, {"instances": [1.0, 2.0, 5.0]})) == {"predictions": [2.5, 3.0, 4.5]}


@pytest.mark.parametrize("what, body, status, message", [
    ("{}:predict", b"", 400, "JSON Parse error: The document is empty"),
    ("{}:predict", b"instances = [1, 2]", 400, "JSON Parse error: Invalid value"),
    ("{}:predict", b'{"instances":["x","y"]}', 400, "not of expected type: float"),
    ("{}/labels/Version_Nonexistent:predict", b'{"instances":["x","y"]}', 400, "Unrecognized servable version label"),
    ("{}:predict", b'{"signature_name":100}', 400, "'signature_name' key must be a string value."),
    ("{}/versions/50:predict", b'{ "instances": [1] }', 404, "Servable not found for request: Specific("),
    ("{}99:predict", b'{ "instances": [1] }', 404, "Servable not found for request: Latest("),
])
def test_half_plus_two_refuses_what_tensorflow_servings_tests_have_it_refuse(front_end, what, body, status, message):
    error(front_end.post(f"/v1/models/{what.format(real('saved_model_half_plus_two_cpu'))}", body), status, message)
