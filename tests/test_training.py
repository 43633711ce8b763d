"""The weights of served models, mirrored placement, and the two ways to train."""

import threading

import numpy as np
import pytest
import ray
from conftest import owned_by_session
from example_models import line

from shared_graph.cluster import Cluster
from shared_graph.errors import Error
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.variables import TensorFlowVariables

ROWS = np.eye(3, dtype=np.float32)


@pytest.fixture(scope="module")
def mirrored(cluster):
    """A cluster of its own with mirrors, in the Ray that runs already."""
    models = ["example_models:linear", "example_models:same_names"]
    with owned_by_session():
        own = Cluster(workers=2, placement="mirrored", model=models).start(workers=2)
    yield own
    own.close()


@pytest.fixture(params=["cluster", "mirrored"])
def served(request):
    """Both placements in turn, each with its weights restored afterwards."""
    cluster = request.getfixturevalue(request.param)
    before = cluster.get_weights("linear")
    yield cluster
    cluster.set_weights("linear", before)


def predict(cluster: Cluster, model: str = "linear", rows: np.ndarray = ROWS) -> list:
    return cluster.predict(rows, model)["y"].tolist()


def plain(weights: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: array.tolist() for name, array in weights.items()}


def test_a_served_model_answers_with_the_weights_that_are_set(served):
    weights, others = served.get_weights("linear"), predict(served, "same_names")
    assert plain(weights) == {"b": [0.5, -0.5], "w": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    served.set_weights("linear", {"b": [0, 100]})
    assert predict(served) == [[1, 102], [3, 104], [5, 106]]
    served.set_weights("linear", {name: array * 2 for name, array in weights.items()})
    assert predict(served) == [[3, 3], [7, 7], [11, 11]]
    assert predict(served, "same_names") == others  # which has variables of the same names


@pytest.mark.parametrize(
    "model, wrong, status, message",
    [("linear", {"b": [1, 1], "w": [1]}, 400, "'w'"), ("nobody", {"b": [1, 1]}, 404, "nobody")],
)
def test_wrong_weights_leave_a_served_model_unchanged(served, model, wrong, status, message):
    before = predict(served)
    with pytest.raises(Error, match=message) as raised:
        served.set_weights(model, wrong)
    assert raised.value.status == status and predict(served) == before


def test_once_set_weights_returns_no_request_is_answered_with_the_old_ones(served, clients):
    rounds, stop, wrong = [0], threading.Event(), []

    def ask(_):
        while not stop.is_set():
            least = rounds[0]
            found = predict(served)[0][0]
            if found < least:
                wrong.append((found, least))

    def change(_):
        try:
            for number in range(1, 21):
                served.set_weights("linear", {"w": np.full((3, 2), number), "b": [0, 0]})
                rounds[0] = number
        finally:
            stop.set()

    served.set_weights("linear", {"w": np.zeros((3, 2)), "b": [0, 0]})
    clients(16, lambda function: function(None), [change] + [ask] * 15)
    assert rounds == [20] and not wrong
    assert clients(16, lambda _: predict(served)[0][0], range(64)) == [20] * 64  # from every worker
    before = served.add(0)  # which works beside mirrors, too
    assert sorted(clients(16, lambda _: served.add(1), range(100))) == [before + i for i in range(1, 101)]


def test_while_weights_of_a_model_that_trains_are_set_nobody_is_answered_with_others(cluster, clients):
    given, stop = set(), threading.Event()

    def ask(_):
        while not stop.is_set():
            given.update(cluster.predict({"x": [1.0]}, "line")["y"].tolist())

    def change(_):
        try:
            for _ in range(5):
                cluster.set_weights("line", {"w": 1, "b": 1})
        finally:
            stop.set()

    cluster.set_weights("line", {"w": 1, "b": 1})
    clients(4, lambda function: function(None), [change] + [ask] * 3)
    assert given == {2.0}
    cluster.set_weights("line", {"w": 0, "b": 0})


def assert_learned(weights: dict[str, np.ndarray]) -> None:
    """y = 0.1 x + 0.3"""
    assert abs(weights["w"] - 0.1) < 0.001 and abs(weights["b"] - 0.3) < 0.001


class Learner:
    """Holds a copy of the network on its own graph, and some rows that nobody else has."""

    def __init__(self, seed: int):
        tf = import_tensorflow(whole=True)
        inputs, outputs = line(tf)["train"]
        self.variables = TensorFlowVariables(outputs["loss"], tf.Session())
        x = np.random.default_rng(seed).uniform(-1, 1, 100)
        self.step, self.feed = outputs, {inputs["x"]: x, inputs["y"]: 0.1 * x + 0.3}

    def train(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights after one step from these."""
        self.variables.set_weights(weights)
        self.variables.sess.run(self.step, self.feed)
        return self.variables.get_weights()


def test_synchronous_training_averages_the_steps_of_several_actors(cluster):
    learners = [ray.remote(Learner).options(num_cpus=0).remote(seed) for seed in range(3)]
    weights = {"w": np.float32(0), "b": np.float32(0)}
    for _ in range(201):
        sent = ray.put(weights)  # once for all
        steps = ray.get([learner.train.remote(sent) for learner in learners], timeout=120)
        weights = {name: np.mean([step[name] for step in steps], axis=0) for name in weights}
    assert_learned(weights)
    for learner in learners:
        ray.kill(learner)


def test_asynchronous_training_applies_gradients_to_the_shared_variables(cluster, clients):
    def train(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(100):
            x = random.uniform(-1, 1, 100)
            cluster.predict({"x": x, "y": 0.1 * x + 0.3}, "line", "train")

    clients(4, train, range(4))
    assert_learned(cluster.get_weights("line"))
    assert np.allclose(cluster.predict(np.arange(-1, 2), "line")["y"], [0.2, 0.3, 0.4], atol=0.002)
