"""Every model answers as in a plain session, from Python and over HTTP, alone and in company."""

import base64
import contextlib
import os
import shutil

import example_models
import numpy as np
import pytest
from conftest import good, real_models, wait_until

from shared_graph.cluster import Cluster
from shared_graph.errors import InvalidRequest, ModelError

REAL = sorted(real_models())
OTHER = {"counter", "counting", "line", "failing", "gate", "scores"}  # these change, fail, wait, or want examples
STATELESS = [name for name in (*example_models.SAVED, *example_models.FUNCTIONS) if name not in OTHER] + REAL
SLOW = {"basic_pitch"}  # 50 ms a run
MISDECLARED = ("saved_model_half_plus_three", "tensorflow/serving/regress")  # says that its input is a float


class Reference:
    """(signature, inputs, outputs) for each signature of a model, as a plain session answers."""

    writing = ()  # signatures

    def __init__(self, name: str, source: str):
        self.name, self.plain, self.random = name, example_models.PlainSession(source), np.random.default_rng(7)
        signatures = [s for s in self.plain.names if not s.startswith("__") and (name, s) != MISDECLARED]
        signatures = [s for s in signatures if s not in self.writing]
        self.cases = []
        for signature in signatures * (2 if name in SLOW else 6):
            inputs = self.sample(signature)
            self.cases.append((signature, inputs, self.plain.predict(inputs, signature)))

    def sample(self, signature: str) -> dict[str, np.ndarray]:
        """Random inputs, of one to three rows where their number is free."""
        rows, inputs = self.random.integers(1, 4), {}
        for key, name in self.plain.names[signature][0].items():
            tensor = self.plain.graph.get_tensor_by_name(name)
            first, *others = [None] if tensor.shape.rank is None else tensor.shape.as_list()
            shape = [first or rows, *(size or 3 for size in others)]
            if tensor.dtype.name == "string":
                texts = [example(self.random)] if self.name in REAL else [b"two", b"", "é".encode(), b'a\0\n"']
                inputs[key] = self.random.choice(np.array(texts, object), shape)
            else:
                inputs[key] = (self.random.random(shape) * 8).astype(tensor.dtype.as_numpy_dtype)
        return inputs


def example(random) -> bytes:
    """A serialized tf.train.Example with two float features."""
    from tensorflow.core.example import example_pb2

    message = example_pb2.Example()
    for name in ("x", "x2"):
        message.features.feature[name].float_list.value.append(random.random())
    return message.SerializeToString()


@pytest.fixture(scope="module")
def reference(models):
    """``reference(name)``: the model's cases, made once."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, Reference(name, models[name]).cases)


def assert_same(outputs: dict, expected: dict) -> None:
    """The same names, dtypes and shapes; floats to rounding, relative to the largest, all else exactly."""
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        wanted = np.asarray(expected[name])
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        if wanted.dtype.kind == "f":
            allowed = 64 * np.finfo(wanted.dtype).eps * np.abs(wanted).max(initial=0)
            np.testing.assert_allclose(array, wanted, rtol=0, atol=allowed)
        else:
            assert array.tolist() == wanted.tolist()


def over_http(front_end, expected: dict):
    """``predict`` as Cluster has it; the outputs become as the expected ones are."""

    def encode(value):
        return [encode(v) for v in value] if isinstance(value, list) else {"b64": base64.b64encode(value).decode()}

    def decode(value):
        if isinstance(value, list):
            return [decode(v) for v in value]
        return base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()

    def predict(inputs: dict, model: str, signature: str) -> dict[str, np.ndarray]:
        inputs = {
            key: encode(array.tolist()) if array.dtype == object else array.tolist() for key, array in inputs.items()
        }
        outputs = good(front_end.predict(model, {"signature_name": signature, "inputs": inputs}))["outputs"]
        outputs = outputs if len(expected[signature]) > 1 else dict.fromkeys(expected[signature], outputs)
        dtypes = {key: np.asarray(array).dtype for key, array in expected[signature].items()}
        return {
            key: np.array(decode(value) if dtypes[key] == object else value, dtypes[key])
            for key, value in outputs.items()
        }

    return predict


@pytest.mark.parametrize("front_end", ["starlette"], indirect=True)
@pytest.mark.parametrize("door", ["Python", "two parameter servers", "HTTP"])
@pytest.mark.parametrize("name", STATELESS)
def test_a_model_answers_as_in_a_plain_session_alone_and_in_company(
    cluster, two, front_end, reference, clients, door, name
):
    cases = reference(name)
    likes = {signature: outputs for signature, _, outputs in cases}
    predict = over_http(front_end, likes) if door == "HTTP" else (cluster if door == "Python" else two).predict
    for count, repeats in ((1, 1), (32, 1 if name in SLOW else 4)):
        outputs = clients(count, lambda case: predict(case[1], name, case[0]), cases * repeats)
        for output, (_, _, expected) in zip(outputs, cases * repeats):
            assert_same(output, expected)


def test_workers_have_but_a_part_of_tensorflow_whatever_functions_are_served(cluster):
    """They have what the functions have made; all of it has Keras, which has h5py."""
    health, has_all = cluster.health(), {}
    for actor in health["parameter_servers"] + health["workers"]:
        with open(f"/proc/{actor['pid']}/maps") as file:
            has_all[actor["pid"]] = "/h5py/" in file.read()
    assert [*has_all.values()] == [True, False, False]


def test_a_model_that_counts_counts_each_request_once(cluster, clients):
    x = np.zeros(1, np.int64)
    before = int(cluster.predict(x, "counter", "read")["count"])
    counts = clients(16, lambda _: int(cluster.predict(x, "counter", "count")["count"]), range(100))
    assert sorted(counts) == list(range(before + 1, before + 101))


def test_a_model_that_cannot_be_loaded_is_404_and_its_status_tells_why_while_others_are_served(tmp_path, models):
    """Mirrored, so that one which changes its variables is among them."""
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01\x12\x7fnot a SavedModel")
    bad = {"torn": str(tmp_path), "broken": "example_models:broken", "counter": "example_models:counter"}
    sources = [f"{name}={source}" for name, source in bad.items()]
    cluster = Cluster(workers=1, placement="mirrored", model=[*sources, "example_models:linear"]).start_in_background()
    with contextlib.closing(cluster):
        wait_until(lambda: cluster.health()["status"] == "ready")
        assert cluster.predict([[1, 1, 1]], "linear")["y"].tolist() == [[9.5, 11.5]]
        for name, source in bad.items():
            with pytest.raises(InvalidRequest, match=rf"^Servable not found for request: Latest\({name}\)$") as caught:
                cluster.predict([1], name)
            assert caught.value.status == 404
            message = cluster.health()["models"][name]["error"]
            assert message.startswith(f"Model {name} ({source}) cannot be loaded: ") and "\n" not in message
            assert cluster.status.version_status(name, None)["model_version_status"] == [
                {"version": "1", "state": "END", "status": {"error_code": "UNKNOWN", "error_message": message}}
            ]
        assert "--placement shared" in message
        shutil.copytree(os.path.join(models["affine"], "1"), tmp_path, dirs_exist_ok=True)
        assert cluster.reload("torn") == 1, "it looks only at models that it has"
        with pytest.raises(InvalidRequest, match="Latest"):
            cluster.reload("broken")
        with pytest.raises(ModelError, match=r"^Model broken \("):
            cluster.start()
