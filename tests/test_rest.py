"""TensorFlow Serving's REST API as only HTTP can show it: each rule once; test_codec has the values and paths."""

import gzip

import pytest
from conftest import error, good, real_models

HALF_PLUS_TWO = "saved_model_half_plus_two_cpu"
starlette_only = pytest.mark.parametrize("front_end", ["starlette"], indirect=True)  # of what the workers do alone


def available(version: int) -> dict:
    status = {"error_code": "OK", "error_message": ""}
    return {"model_version_status": [{"version": str(version), "state": "AVAILABLE", "status": status}]}


@pytest.mark.parametrize(
    "path, version", [("/v1/models/adder", 1), ("/v1/models/words/versions/00010", 10), ("/V1/MODELS/%6Cinear?x=1", 1)]
)
def test_the_status_of_a_model_or_a_version_is_available(front_end, path, version):
    assert good(front_end.get(path)) == available(version)


def test_the_status_of_what_is_not_served_is_not_found(front_end):
    text = error(front_end.get("/v1/models/nope"), 404)
    assert text.endswith("(Could not find any versions of model nope)")
    error(front_end.get("/v1/models/linear/versions/50"), 404, "linear")


def tensor(dtype: str, name: str, *sizes: int, unknown_rank: bool = False) -> dict:
    shape = {"dim": [{"size": str(size), "name": ""} for size in sizes], "unknown_rank": unknown_rank}
    return {"dtype": dtype, "tensor_shape": shape, "name": name}


@pytest.mark.parametrize("path", ["/v1/models/{}/metadata", "/V1/models/{}/versions/1/metadata"])
def test_metadata_has_the_signatures_as_proto3_json(front_end, path):
    document = good(front_end.get(path.format("%6cinear")))
    assert document["model_spec"] == {"name": "linear", "signature_name": "", "version": "1"}
    assert document["metadata"] == {
        "signature_def": {
            "signature_def": {
                "serving_default": {
                    "inputs": {"x": tensor("DT_FLOAT", "x:0", -1, 3)},
                    "outputs": {"y": tensor("DT_FLOAT", "add:0", -1, 2)},
                    "method_name": "tensorflow/serving/predict",
                    "defaults": {},
                }
            }
        }
    }
    scalar, echo, scores = (
        good(front_end.get(path.format(name)))["metadata"]["signature_def"]["signature_def"]
        for name in ("scalar", "echo", "scores")
    )
    assert scalar["serving_default"]["outputs"]["mean"]["tensor_shape"] == {"dim": [], "unknown_rank": False}
    assert echo["string"]["inputs"]["x"] == tensor("DT_STRING", "in_string:0", unknown_rank=True)
    assert scores["regress"]["method_name"] == "tensorflow/serving/regress"


@pytest.mark.parametrize(
    "path",
    [
        "/V1/Models/picky/VERSIONS/001:predict",
        "/v1/models/%70icky:predict?a=/v1/models:b",
        "http://a/v1/models/picky:predict",
    ],
)
def test_the_case_percent_encoding_a_query_and_a_host_in_the_url_make_no_difference(front_end, path):
    assert good(front_end.post(path, {"instances": [1, 3]})) == {"predictions": [0.5, 1.5]}


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/v1/"),
        ("GET", "/v1//models/linear"),
        ("GET", "/v1/models/linear/"),
        ("POST", "/v1/models/linear"),
        ("POST", "/v1/models/linear%3Apredict"),
        ("POST", "/v1/models%2Flinear:predict"),
        ("PUT", "/v1/models/linear:predict"),
        ("OPTIONS", "/v1/models/linear"),
    ],
)
def test_any_other_url_under_v1_is_malformed(front_end, method, path):
    assert error(front_end.request(method, path, b"no JSON"), 400) == f"Malformed request: {method} {path}"


@pytest.mark.parametrize(
    "path, which",
    [
        ("PICKY", "Latest(PICKY)"),
        ("picky/versions/50", "Specific(picky, 50)"),
        ("%2570icky", "Latest(%70icky)"),
        ("a%2Fb%3Fc", "Latest(a/b?c)"),
        ("%C3%A9%E2%82%AC+", "Latest(é€+)"),
        ("%2e%2e", "Latest(..)"),
    ],
)
def test_a_model_that_is_not_served_is_named_decoded(front_end, path, which):
    message = f"Servable not found for request: {which}"
    assert error(front_end.post(f"/v1/models/{path}:predict", b"nonsense"), 404) == message
    assert error(front_end.get(f"/v1/models/{path}/metadata"), 404) == message


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("nope/labels/x%2F:predict", b"nonsense", 400, "Unrecognized servable version label: x/"),
        ("nope/versions/18446744073709551615:predict", b"nonsense", 400, "18446744073709551615"),
        ("several/versions/50:classify", b"[5]", 404, "Servable not found for request: Specific(several, 50)"),
        ("several:predict", b"[" * 100_000, 400, "JSON"),
        ("several:predict", b'{"signature_name": 5, "instances": 5, "inputs": 5}', 400, "signature_name"),
        ("several:predict", b'{"signature_name": "no", "inputs": 5}', 400, 'Serving signature name: "no" not found'),
        ("several:predict", b'{"instances": ["\\ud800"]}', 400, "instances[0]"),
        ("several:classify", b'{"examples": [{}]}', 400, "classify"),
    ],
)
def test_of_several_errors_the_first_wins(front_end, path, body, status, message):
    error(front_end.post(f"/v1/models/{path}", body), status, message)


@pytest.mark.parametrize(
    "body, headers",
    [
        (b'{"instances": [1, 2]}', {}),
        (b'{"instances": [1, 2]}', {"Content-Type": "multipart/form-data"}),
        (b'{"instances": [1, 2]}', {"Content-Type": "application/json; charset=utf-16"}),
        (gzip.compress(b'{"instances": [1, 2]}'), {"Content-Encoding": "gzip"}),
        ([b'{"inst', b'ances": [1', b", 2]}"], {}),
    ],
    ids=["plain", "form", "utf-16", "gzip", "chunked"],
)
def test_a_body_may_be_packed_or_chunked_and_its_content_type_never_matters(front_end, body, headers):
    body = iter(body) if isinstance(body, list) else body
    answer = front_end.request("POST", "/v1/models/picky:predict", body, headers)
    assert good(answer) == {"predictions": [0.5, 1.0]}
    assert int(answer.headers["Content-Length"]) == len(answer.body)


@starlette_only
@pytest.mark.parametrize(
    "model, document, answer",
    [
        ("linear", '{"instances": [[1, 2, 3], [0, 0, 0]]}', '{"predictions": [[22.5, 27.5], [0.5, -0.5]]}'),
        (
            "several",
            '{"instances": [{"x": [1, 2], "n": 3}, {"n": -1, "x": [5, 0.5]}]}',
            '{"predictions": [{"next": 4, "scaled": [3.0, 6.0], "total": 9.0},'
            ' {"next": 0, "scaled": [-5.0, -0.5], "total": -5.5}]}',
        ),
        (
            "several",
            '{"inputs": {"x": [[1, 2]], "n": [3], "extra": null}}',
            '{"outputs": {"next": [4], "scaled": [[3.0, 6.0]], "total": [9.0]}}',
        ),
        ("scalar", '{"inputs": [1, 2, 6]}', '{"outputs": 3.0}'),
        ("scalar", '{"instances": [1, 2, 6]}', None),
        (
            "fixed",
            '{"instances": [1, 2, 3, 4]}',
            '{"predictions": [1.0, 3.0, 6.0, 10.0]}',
        ),  # whatever shape it declares
        ("failing", '{"signature_name": "no_rows", "instances": [1, 2]}', '{"predictions": []}'),
        ("failing", '{"signature_name": "first_row", "inputs": [1, 2]}', '{"outputs": {"all": [1, 2], "first": [1]}}'),
        ("failing", '{"signature_name": "first_row", "instances": [1, 2]}', None),
        ("echo", '{"instances": [0.1, 1e39, -Infinity, NaN]}', '{"predictions": [0.1, Infinity, -Infinity, NaN]}'),
        (
            "echo",
            '{"signature_name": "to_bytes", "instances": ["text", {"b64": "/wA="}]}',
            '{"predictions": [{"b64": "dGV4dA=="}, {"b64": "/wA="}]}',
        ),
        (
            "words",
            '{"signature_name": "upper", "instances": [{"word": "é two"}]}',
            '{"predictions": [{"length": 6, "word": "é TWO"}]}',
        ),
    ],
)
def test_a_model_answers_rows_with_predictions_and_columns_with_outputs(front_end, model, document, answer):
    answered = front_end.predict(model, document.encode())
    if answer is None:
        error(answered, 400)
    else:
        assert (answered.status, answered.body.decode()) == (200, answer.replace(", ", ",").replace(": ", ":"))


EXAMPLES = [{"x": [0.25, 0.75], "name": "ü"}, {"x": [1.0, 2.0]}]


@pytest.mark.parametrize(
    "verb, results",
    [("classify", [[["ü-a", 0.25], ["ü-b", 0.75]], [["-a", 1.0], ["-b", 2.0]]]), ("regress", [1.0, 3.0])],
)
def test_a_model_classifies_and_regresses(front_end, verb, results):
    for path in ("scores", "scores/versions/1"):
        answer = front_end.post(f"/v1/models/{path}:{verb}", {"signature_name": verb, "examples": EXAMPLES})
        assert good(answer) == {"results": results}


def test_the_adder_is_a_model_like_any_other(front_end):
    before = front_end.add(0)
    assert good(front_end.predict("adder", {"instances": [1, 2.5]})) == {"predictions": [before + 1, before + 3.5]}
    answer = front_end.post("/v1/models/adder/versions/1:predict", {"inputs": {"value": [-3.5]}})
    assert good(answer) == {"outputs": [before]}


def test_what_the_model_refuses_has_the_status_of_its_error_and_the_models_own_reason_alone(front_end):
    assert "[[" not in error(front_end.predict("picky", {"instances": [1, -1]}), 400, "x must not be negative")
    error(front_end.predict("linear", {"instances": [[1, 2]]}), 400)
    error(front_end.predict("failing", {"signature_name": "NOT_FOUND", "inputs": 1}), 404)
    document = {"signature_name": "regress", "examples": [{"x": [1.0]}]}
    error(front_end.post("/v1/models/scores:regress", document), 400, "x")


@starlette_only
@pytest.mark.parametrize(
    "model, document, answer",
    [
        (HALF_PLUS_TWO, {"instances": [1.0, 2.0, 5.0]}, {"predictions": [2.5, 3.0, 4.5]}),
        (HALF_PLUS_TWO, {"instances": [[1, 2], [3, 4]]}, {"predictions": [[2.5, 3.0], [3.5, 4.0]]}),
        (HALF_PLUS_TWO, {"instances": [{"x": [1.0]}, {"x": [2.0]}]}, {"predictions": [[2.5], [3.0]]}),
        (HALF_PLUS_TWO, {"signature_name": "serving_default", "inputs": [3.0, 4.0]}, {"outputs": [3.5, 4.0]}),
        (HALF_PLUS_TWO, {"signature_name": "regress_x2_to_y3", "instances": [[1.0]]}, {"predictions": [[3.5]]}),
        ("saved_model_half_plus_three", {"instances": [1.0, 2.0, 5.0]}, {"predictions": [3.5, 4.0, 5.5]}),
        ("saved_model_half_plus_two_tf2_cpu", {"instances": [1.0, 2.0, 5.0]}, {"predictions": [2.5, 3.0, 4.5]}),
        ("saved_model_half_plus_two_tf2_cpu", {"inputs": [[1.0], [2.0]]}, {"outputs": [[2.5], [3.0]]}),
        (HALF_PLUS_TWO, {"signature_name": "classify_x_to_y", "examples": [{"x": 20.0}]}, {"results": [[["", 12.0]]]}),
        (HALF_PLUS_TWO, {"signature_name": "regress_x_to_y2", "examples": [{"x": 2.0}]}, {"results": [4.0]}),
    ],
)
def test_a_real_model_answers_as_in_tensorflow_servings_documentation(front_end, model, document, answer):
    if model not in real_models():
        pytest.skip(f"the real model {model} is not here")
    verb = document.get("signature_name", "").partition("_")[0] if "examples" in document else "predict"
    assert good(front_end.get(f"/v1/models/{model}")) == available(123)
    assert good(front_end.post(f"/v1/models/{model}/versions/123:{verb}", document)) == answer
