"""``TensorFlowVariables``: the variables behind an output, by name and as one vector, in this process."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, START_S

from shared_graph.errors import InvalidRequest
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.variables import TensorFlowVariables

NETWORK = {"net/b": [0.5, -0.5], "net/w": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}


@pytest.fixture
def tf():
    """TensorFlow, inside a fresh graph."""
    tf = import_tensorflow(whole=True)
    with tf.Graph().as_default():
        yield tf


def network(tf, scope="net", resource=True):
    """An output with two variables behind it, of 6 and 2 numbers."""
    with tf.variable_scope(scope, use_resource=resource):
        w = tf.get_variable("w", initializer=NETWORK["net/w"])
        b = tf.get_variable("b", initializer=NETWORK["net/b"])
        return tf.matmul(tf.ones([1, 3]), w) + b


def ready(tf, output, **arguments) -> TensorFlowVariables:
    """With a session in which everything is initialized."""
    variables = TensorFlowVariables(output, tf.Session(), **arguments)
    variables.sess.run(tf.global_variables_initializer())
    return variables


def plain(variables) -> dict:
    return {name: array.tolist() for name, array in variables.get_weights().items()}


@pytest.mark.parametrize("resource", [True, False], ids=["resource variables", "reference variables"])
def test_weights_are_got_and_set_by_name_also_some_of_them(tf, resource):
    variables = ready(tf, network(tf, resource=resource))
    assert plain(variables) == NETWORK
    assert [*variables.variables] == [*variables.placeholders] == [*variables.assignment_nodes] == [*NETWORK]
    variables.set_weights({"net/b": [1, 2]})
    assert plain(variables) == NETWORK | {"net/b": [1, 2]}
    assert variables.sess.run(variables.variables["net/b"]).tolist() == [1, 2]
    variables.sess.run(variables.assignment_nodes["net/b"], {variables.placeholders["net/b"]: [3, 4]})
    assert plain(variables) == NETWORK | {"net/b": [3, 4]}


def test_a_program_of_tensorflow_2_stays_one():
    code = """
from concurrent.futures import ThreadPoolExecutor
import tensorflow as tf
from shared_graph import TensorFlowVariables, remote_predict

with tf.Graph().as_default():
    w = tf.compat.v1.get_variable("w", initializer=[1.0, 2.0])
    session = tf.compat.v1.Session()
    session.run(w.initializer)
    y = w * 2
variables = TensorFlowVariables(y, session)
variables.set_flat(variables.get_flat() + 1)
assert variables.get_flat().tolist() == [2, 3]
with tf.Graph().as_default():
    remote_predict(["x"], [tf.constant([1.0])], ["y"], "127.0.0.1:1", "m")
with ThreadPoolExecutor() as threads:
    assert tf.executing_eagerly() and threads.submit(tf.executing_eagerly).result()
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=START_S)


@pytest.mark.parametrize("string", [b"hello", b"zeros\0\0", b""])
def test_a_single_string_is_got_as_it_is(tf, string):
    """As dtype S, numpy would strip zeros from its end."""
    variables = ready(tf, tf.get_variable("greeting", initializer=string))
    assert variables.get_weights()["greeting"].tolist() == string
    assert variables.get_weights()["greeting"].dtype == object


def test_flat_weights_are_one_vector_in_the_order_of_the_names_and_setting_any_makes_no_operation(tf):
    variables = ready(tf, network(tf))
    tf.get_default_graph().finalize()  # whatever made an operation would fail
    assert type(variables.get_flat_size()) is int and variables.get_flat_size() == 8
    assert variables.get_flat().tolist() == [0.5, -0.5, 1, 2, 3, 4, 5, 6]
    variables.set_flat(np.arange(8))
    assert plain(variables) == {"net/b": [0, 1], "net/w": [[2, 3], [4, 5], [6, 7]]}
    variables.set_weights({"net/b": [9, 9]})
    assert variables.get_flat().tolist() == [9, 9, 2, 3, 4, 5, 6, 7]


def test_many_variables_take_few_runs_and_those_that_do_not_fit_together_several(tf, monkeypatch):
    """A run that is new costs the server a look at the whole graph: one for each of 500 variables took long."""
    each = [tf.get_variable(f"v{number}", [8], initializer=tf.ones_initializer()) for number in range(9)]
    variables = ready(tf, tf.add_n(each))
    runs, run = [], variables.sess.run
    monkeypatch.setattr(variables.sess, "run", lambda *arguments: runs.append(None) or run(*arguments))
    for most, count in ((2**20, 1), (64, 5), (1, 9)):
        monkeypatch.setattr("shared_graph.variables.MAX_RUN_BYTES", most)
        runs.clear()
        weights = variables.get_weights()
        variables.set_weights({name: value + 1 for name, value in weights.items()})
        assert len(runs) == 2 * count and variables.get_flat().tolist() == [float(weights["v0"][0] + 1)] * 72


def test_strings_and_what_has_no_static_shape_share_no_run_with_what_takes_room(tf, monkeypatch):
    """Nobody knows how large they are."""
    words, empty = tf.get_variable("words", initializer=[b"a"]), tf.get_variable("empty", [0, 3])
    free = tf.get_variable("free", initializer=tf.placeholder_with_default([1.0], [None]), validate_shape=False)
    numbers = tf.get_variable("numbers", [2])
    variables = ready(tf, tf.group(*(v.read_value() for v in (words, empty, free, numbers))))
    runs, run = [], variables.sess.run
    monkeypatch.setattr(variables.sess, "run", lambda fetches: runs.append(sorted(fetches)) or run(fetches))
    variables.get_weights()
    assert runs == [["empty", "free"], ["numbers"], ["words"]]


def test_behind_a_training_step_are_slots_and_an_integer_that_go_there_and_back(tf):
    step, loss = tf.train.get_or_create_global_step(), tf.reduce_sum(network(tf))
    train = tf.train.MomentumOptimizer(0.1, 0.9).minimize(loss, global_step=step)
    variables = ready(tf, train)
    assert [*variables.variables] == ["global_step", "net/b", "net/b/Momentum", "net/w", "net/w/Momentum"]
    assert [*TensorFlowVariables(loss).variables] == ["net/b", "net/w"]
    variables.sess.run(train)
    flat, weights = variables.get_flat(), plain(variables)
    variables.sess.run(train)
    variables.set_flat(flat)
    assert plain(variables) == weights and weights["global_step"] == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"net/c": [1, 2]}, r"there is no variable 'net/c'; there are \['net/b', 'net/w'\]"),
        ({"net/w": [1, 2]}, r"'net/w' has the shape \(3, 2\), not \(2,\)"),
        ({"net/w": [["a", "b"]] * 3}, "'net/w' takes float32, not strings"),
        (None, "weights are arrays by the names of variables, not NoneType"),
        ([1] * 7, r"\(8,\), not \(7,\)"),
        (np.zeros((2, 4)), r"\(8,\), not \(2, 4\)"),
    ],
    ids=["name", "shape", "dtype", "none", "too few", "not flat"],
)
def test_wrong_weights_are_refused_in_one_sentence_and_nothing_is_half_set(tf, wrong, message):
    variables = ready(tf, network(tf))
    with pytest.raises(InvalidRequest, match=message):
        if isinstance(wrong, dict | None):
            variables.set_weights(wrong and {"net/b": [8, 9]} | wrong)
        else:
            variables.set_flat(wrong)
    assert plain(variables) == NETWORK


def test_without_a_session_it_says_what_to_do_and_takes_one_later(tf):
    variables = TensorFlowVariables(network(tf))
    with pytest.raises(InvalidRequest, match="set_session"):
        variables.get_weights()
    for number in (1.0, 2.0):  # each session has its own values
        variables.set_session(tf.Session())
        variables.set_flat(np.full(8, number))
        assert variables.get_flat().tolist() == [number] * 8


def test_control_dependencies_and_input_variables_count_and_others_do_not(tf):
    depended, given, _ = (tf.get_variable(name, []) for name in ("depended", "given", "other"))
    with tf.control_dependencies([depended.assign_add(1)]):
        output = tf.constant(1.0)
    assert [*TensorFlowVariables(output).variables] == ["depended"]
    assert [*TensorFlowVariables([output], input_variables=[given]).variables] == ["depended", "given"]
    assert [*TensorFlowVariables(tf.constant(1.0)).variables] == []


def test_without_the_prefix_variables_in_no_scope_and_in_one_keep_their_names(tf):
    a, b = tf.get_variable("a", initializer=1.0), tf.get_variable("net/b", initializer=2.0)
    assert list(TensorFlowVariables(a + b, prefix=True).variables) == ["a", "net/b"]


def test_two_copies_under_two_scopes_exchange_weights_without_the_prefix(tf):
    with tf.variable_scope("worker"):
        mine = ready(tf, network(tf, "online"), prefix=True)
    its = ready(tf, network(tf, "target"), prefix=True)
    mine.set_flat(np.arange(8))
    its.set_weights(mine.get_weights())
    assert [*mine.variables] == [*its.variables] == ["b", "w"]
    assert its.get_flat().tolist() == list(range(8))
