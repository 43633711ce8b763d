"""``TensorFlowVariables``: the variables behind an output, by name and as one vector, in this process."""

import numpy as np
import pytest

from ray_tensorflow import InvalidRequest, TensorFlowVariables


@pytest.fixture(scope="module")
def tensorflow():
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    return tf


@pytest.fixture
def tf(tensorflow):
    """TensorFlow, inside a fresh graph."""
    with tensorflow.Graph().as_default():
        yield tensorflow


def network(tf, scope="net", resource=True):
    """An output with two variables behind it, of 6 and 2 numbers."""
    with tf.variable_scope(scope, use_resource=resource):
        w = tf.get_variable("w", initializer=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        b = tf.get_variable("b", initializer=[0.5, -0.5])
        return tf.matmul(tf.ones([1, 3]), w) + b


def ready(tf, output, **arguments):
    """TensorFlowVariables with a session in which everything is initialized."""
    variables = TensorFlowVariables(output, **arguments)
    variables.set_session(tf.Session())
    variables.sess.run(tf.global_variables_initializer())
    return variables


def plain(weights):
    return {name: array.tolist() for name, array in weights.items()}


NETWORK = {"net/b": [0.5, -0.5], "net/w": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}

# -- TensorFlowVariables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", [True, False], ids=["resource variables", "reference variables"])
def test_weights_are_got_and_set_by_name_also_some_of_them(tf, resource):
    variables = ready(tf, network(tf, resource=resource))
    assert plain(variables.get_weights()) == NETWORK
    assert list(variables.variables) == list(variables.placeholders) == list(variables.assignment_nodes) == list(NETWORK)
    variables.set_weights({"net/b": [1, 2]})
    assert plain(variables.get_weights()) == NETWORK | {"net/b": [1.0, 2.0]}
    assert variables.sess.run(variables.variables["net/b"]).tolist() == [1.0, 2.0]
    variables.sess.run(variables.assignment_nodes["net/b"], {variables.placeholders["net/b"]: [3, 4]})
    assert plain(variables.get_weights()) == NETWORK | {"net/b": [3.0, 4.0]}


def test_flat_weights_are_one_vector_in_the_order_of_the_names(tf):
    variables = ready(tf, network(tf))
    assert variables.get_flat_size() == 8
    assert variables.get_flat().tolist() == [0.5, -0.5, 1, 2, 3, 4, 5, 6]
    variables.set_flat(np.arange(8))
    assert plain(variables.get_weights()) == {"net/b": [0, 1], "net/w": [[2, 3], [4, 5], [6, 7]]}


def test_flat_weights_go_there_and_back_with_an_integer_among_them(tf):
    step = tf.train.get_or_create_global_step()
    variables = ready(tf, tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(network(tf)), global_step=step))
    variables.sess.run(step.assign(7))
    flat = variables.get_flat()
    variables.sess.run(step.assign(8))
    variables.set_flat(flat)
    assert variables.get_weights()["global_step"] == 7
    assert variables.get_flat().tolist() == flat.tolist()


@pytest.mark.parametrize("wrong, message", [
    ({"net/c": [1, 2]}, r"there is no variable 'net/c'; there are \['net/b', 'net/w'\]"),
    ({"net/w": [1, 2]}, r"variable 'net/w' has the shape \(3, 2\), not \(2,\)"),
    ({"net/w": np.zeros((2, 3))}, r"variable 'net/w' has the shape \(3, 2\), not \(2, 3\)"),
    ({"net/w": [["a", "b"]] * 3}, "net/w.* takes float32, not <U1"),
    ([1] * 7, r"flat weights must have the shape \(8,\), not \(7,\)"),
    (np.zeros((2, 4)), r"flat weights must have the shape \(8,\), not \(2, 4\)"),
], ids=["name", "axes", "shape", "dtype", "too few", "not flat"])
def test_wrong_weights_are_refused_in_one_sentence_and_nothing_is_half_set(tf, wrong, message):
    variables = ready(tf, network(tf))
    with pytest.raises(InvalidRequest, match=message):
        variables.set_weights({"net/b": [8, 9]} | wrong) if isinstance(wrong, dict) else variables.set_flat(wrong)
    assert plain(variables.get_weights()) == NETWORK


def test_without_a_session_it_says_what_to_do_and_takes_one_later(tf):
    variables = TensorFlowVariables(network(tf))
    with pytest.raises(InvalidRequest, match="set_session"):
        variables.get_weights()
    for number in (1.0, 2.0):  # each session has its own values
        variables.set_session(tf.Session())
        assert variables.sess is not None
        variables.set_flat(np.full(8, number))
        assert variables.get_flat().tolist() == [number] * 8


def test_control_dependencies_and_input_variables_count_and_others_do_not(tf):
    depended, given, _ = (tf.get_variable(name, []) for name in ("depended", "given", "other"))
    with tf.control_dependencies([depended.assign_add(1)]):
        output = tf.constant(1.0)
    assert list(TensorFlowVariables(output).variables) == ["depended"]
    assert list(TensorFlowVariables([output], input_variables=[given]).variables) == ["depended", "given"]
    assert list(TensorFlowVariables(tf.constant(1.0)).variables) == []


def test_slot_variables_of_momentum_are_found_behind_a_minimize_operation(tf):
    loss = tf.reduce_sum(network(tf))
    minimize = tf.train.MomentumOptimizer(0.1, 0.9).minimize(loss)
    variables = ready(tf, minimize)
    assert list(variables.variables) == ["net/b", "net/b/Momentum", "net/w", "net/w/Momentum"]
    assert list(TensorFlowVariables(loss).variables) == ["net/b", "net/w"]
    variables.sess.run(minimize)
    assert variables.get_weights()["net/b/Momentum"].tolist() == [1, 1]


def test_two_copies_under_two_scopes_exchange_weights_without_the_prefix(tf):
    with tf.variable_scope("worker"):
        mine = ready(tf, network(tf, "online"), prefix=True)
    its = ready(tf, network(tf, "target"), prefix=True)
    mine.set_flat(np.arange(8))
    its.set_weights(mine.get_weights())
    assert list(mine.variables) == list(its.variables) == ["b", "w"]
    assert its.get_flat().tolist() == list(range(8))


def test_the_graph_does_not_grow_over_ten_thousand_set_weights(tf):
    variables = ready(tf, network(tf))
    before = len(tf.get_default_graph().get_operations())
    tf.get_default_graph().finalize()
    for i in range(10_000):
        variables.set_weights({"net/b": [i, i]})
    assert variables.get_flat()[:2].tolist() == [9999, 9999]
    variables.set_flat(variables.get_flat())
    assert len(tf.get_default_graph().get_operations()) == before
