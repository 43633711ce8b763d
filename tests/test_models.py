"""Every model answers as in a plain session, whichever way it is asked, alone and in company."""

import base64
import json
import os

import example_models
import numpy as np
import pytest
from conftest import owned_by_session, real_models, wait_until
from ray_tensorflow import Cluster, InvalidRequest, ModelError

REAL = sorted(real_models())
OTHER = {"counter", "failing", "scores"}  # those that change, fail, or want serialized examples have tests of their own
STATELESS = [name for name in (*example_models.SAVED, *example_models.FUNCTIONS) if name not in OTHER] + REAL
SLOW = {"basic_pitch"}  # 50 ms a run
MISDECLARED = ("saved_model_half_plus_three", "tensorflow/serving/regress")  # its input is declared a float, but is text


class Reference:
    """Inputs for each signature of a model, and what a plain session answers to them."""

    def __init__(self, name: str, source: str):
        self.name, self.plain = name, example_models.PlainSession(source)
        numbers = np.random.default_rng(7)
        self.cases = [  # (signature, inputs, outputs)
            (signature, inputs := self.sample(signature, numbers), self.plain.predict(inputs, signature))
            for signature in self.plain.names if not signature.startswith("__") and (name, signature) != MISDECLARED
            for _ in range(2 if name in SLOW else 6)]

    def sample(self, signature: str, numbers) -> dict[str, np.ndarray]:
        """Random inputs, of one to three rows where their number is free."""
        rows, inputs = int(numbers.integers(1, 4)), {}
        for key, name in self.plain.names[signature][0].items():
            tensor = self.plain.graph.get_tensor_by_name(name)
            shape = tuple(tensor.shape.as_list()) if tensor.shape.rank is not None else (None,)
            shape = tuple(3 if size is None else size for size in shape[1:]) if shape[:1] == (None,) else shape
            shape = (rows, *shape) if tensor.shape.rank is None or tensor.shape.as_list()[:1] == [None] else shape
            dtype = tensor.dtype.as_numpy_dtype
            if dtype is object:
                texts = [b"two", b"", "é".encode(), b"unheard", b"a\0\n\""]
                texts = [example(numbers) for _ in range(9)] if self.name in REAL else texts
                inputs[key] = numbers.choice(np.array(texts, object), shape)
            elif dtype is np.bool_:
                inputs[key] = numbers.random(shape) < 0.5
            else:
                inputs[key] = (numbers.random(shape) * 8).astype(dtype)
        return inputs


def example(numbers) -> bytes:
    """A serialized tf.train.Example with two float features."""
    from tensorflow.core.example import example_pb2

    message = example_pb2.Example()
    for name in ("x", "x2"):
        message.features.feature[name].float_list.value.append(numbers.random())
    return message.SerializeToString()


@pytest.fixture(scope="module")
def reference(models):
    """``reference(name)``: the model's Reference, made once."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, Reference(name, models[name]))


def assert_same(outputs: dict, expected: dict) -> None:
    """The same names, dtypes and shapes; floats to rounding, relative to the largest, all else exactly."""
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        wanted = np.asarray(expected[name])
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        if wanted.dtype.kind == "f":
            largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
            np.testing.assert_allclose(array, wanted, rtol=0, atol=64 * np.finfo(wanted.dtype).eps * largest)
        else:
            assert array.tolist() == wanted.tolist()


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("name", STATELESS)
def test_a_model_answers_as_in_a_plain_session(cluster, reference, clients, name, count):
    cases = reference(name).cases * (1 if name in SLOW or count == 1 else 8)
    outputs = clients(count, lambda case: cluster.predict(case[1], name, case[0]), cases)
    for got, (_, _, expected) in zip(outputs, cases):
        assert_same(got, expected)


@pytest.mark.parametrize("front_end", ["starlette"], indirect=True)
@pytest.mark.parametrize("name", STATELESS)
def test_a_model_answers_over_http_as_in_a_plain_session(front_end, reference, clients, name):
    cases = [case for case in reference(name).cases if (name, case[0]) != ("echo", "half")]  # which has no JSON
    cases *= 1 if name in SLOW else 4
    ask = lambda case: front_end.predict(name, {"signature_name": case[0], "inputs": to_json(case[1])})
    for answer, (_, _, expected) in zip(clients(32, ask, cases), cases):
        assert answer.status == 200, answer
        outputs = answer.json["outputs"]
        outputs = outputs if len(expected) > 1 else {next(iter(expected)): outputs}
        assert_same({k: from_json(v, np.asarray(expected[k]).dtype) for k, v in outputs.items()}, expected)


def to_json(inputs: dict[str, np.ndarray]) -> dict:
    """Arrays as plain values, text as base64."""

    def encode(value):
        return [encode(v) for v in value] if isinstance(value, list) else {"b64": base64.b64encode(value).decode()}

    return {key: encode(array.tolist()) if array.dtype == object else array.tolist() for key, array in inputs.items()}


def from_json(value, dtype) -> np.ndarray:
    """A scalar or a nested list of the answer, read back as the output's dtype."""

    def decode(value):
        if isinstance(value, list):
            return [decode(v) for v in value]
        return base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()

    return np.array(decode(value), object) if dtype == object else np.array(value, dtype)


def test_health_tells_which_signatures_share_runs(cluster):
    models = cluster.health()["models"]
    assert {name: models[name]["merged"] for name in ("linear", "several", "centered", "scalar", "counter")} == {
        "linear": ["serving_default"], "several": ["serving_default"], "centered": [], "scalar": [], "counter": []}


def test_answers_belong_to_their_requests(cluster, clients):
    def predict(i):
        rows = 1 + i % 3
        return cluster.predict({"x": np.full((rows, 2), i, np.float32), "n": np.full(rows, i)}, "several")

    for i, answer in enumerate(clients(32, predict, range(200))):
        assert answer["next"].tolist() == [i + 1] * (1 + i % 3)


def test_models_with_the_same_variable_names_keep_their_own_weights(cluster, clients):
    x = {"x": np.ones((1, 3), np.float32)}
    answers = clients(16, lambda name: cluster.predict(x, name)["y"].tolist(), ["linear", "same_names"] * 40)
    assert answers == [[[9.5, 11.5]], [[67]]] * 40


@pytest.mark.skipif(not REAL, reason="the real models are not here")
def test_half_plus_two_and_half_plus_three_keep_their_own_weights(cluster, clients):
    """They have variables of the same names; y = x / 2 + 2 and y = x / 2 + 3."""
    names = "saved_model_half_plus_two_cpu", "saved_model_half_plus_three"
    calls = [(name, float(x)) for x in range(40) for name in names]
    answers = clients(16, lambda call: cluster.predict({"x": np.float32([[call[1]]])}, call[0])["y"].item(), calls)
    assert answers == [x / 2 + (2 if "two" in name else 3) for name, x in calls]


# -- models that cannot be loaded, and models that count ---------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A cluster with two models that cannot be loaded, one that can, and a counter of TensorFlow 1's reference variables."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "saved_model.pb").write_bytes(b"not a SavedModel")
    models = [f"torn={folder}", "bad=example_models:broken", "example_models:linear", "example_models:old_counter"]
    with owned_by_session():
        cluster = Cluster(workers=2, threads=4, model=models).begin()
        wait_until(lambda: [worker["state"] for worker in cluster.health()["workers"]] == ["ready"] * 2)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("name", ["torn", "bad"])
def test_a_model_that_cannot_be_loaded_is_404_and_its_status_tells_why_while_others_are_served(mixed, name):
    assert mixed.health()["status"] == "ready"
    assert mixed.predict([[1, 1, 1]], "linear")["y"].tolist() == [[9.5, 11.5]]
    with pytest.raises(InvalidRequest, match=f"^Servable not found for request: Latest\\({name}\\)$") as caught:
        mixed.predict([1], name)
    assert caught.value.status == 404
    [version] = mixed.describe(name, None, "status")["model_version_status"]
    assert version["state"] == "END" and version["status"]["error_code"] != "OK"
    message = version["status"]["error_message"]
    assert message.startswith(f"Model {name} (") and "\n" not in message
    assert mixed.health()["models"][name]["error"] == message


def test_start_raises_what_is_wrong_with_a_model_in_one_sentence(mixed):
    with pytest.raises(ModelError, match=r"^Model bad \(no_such_module:build\) cannot be loaded: ") as caught:
        Cluster(workers=1, model="bad=no_such_module:build").start()
    assert "\n" not in str(caught.value)


def test_no_increment_of_a_reference_variable_is_lost_when_many_run_at_once(mixed, clients):
    assert mixed.health()["models"]["old_counter"]["merged"] == []
    counts = clients(32, lambda _: mixed.predict([0], "old_counter")["count"].item(), range(3000))
    assert max(counts) <= 3000 and mixed.get_weights("old_counter") == {"count": 3000}


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_of_a_models_own_is_changed_once_a_request(cluster, clients):
    x = {"x": np.zeros(1, np.int64)}
    before = int(cluster.predict(x, "counter", "read")["count"])
    counts = clients(16, lambda _: int(cluster.predict(x, "counter", "count")["count"]), range(100))
    assert sorted(counts) == list(range(before + 1, before + 101))


def test_health_knows_every_process_and_is_json(cluster):
    health = cluster.health()
    actors = health["parameter_servers"] + health["workers"]
    assert health["status"] == "ready" and [actor["state"] for actor in actors] == ["ready"] * 3
    assert len({actor["pid"] for actor in actors} | {os.getpid()}) == 4
    assert [worker["index"] for worker in health["workers"]] == [0, 1]
    assert set(health["models"]) == set(cluster.models) and json.loads(json.dumps(health))["status"] == "ready"
