"""What a model's graph promises, with TensorFlow in this process and a parameter server's TensorFlow server."""

import ast
import contextlib
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import example_models
import numpy as np
import pytest
from conftest import HERE, REPOSITORY, one, real_models, wait_until

import shared_graph.graph as module
from shared_graph import tensorflow_runtime
from shared_graph.batch_runner import NOT_HALVED
from shared_graph.errors import ModelError
from shared_graph.graph import Graph, build_graph, end_session
from shared_graph.graph_definition import STATE_CHANGING, equal_signatures, keep_what_runs
from shared_graph.merging import find_batchable, sample_rows
from shared_graph.model_source import ADDER_SOURCE, ModelSource
from shared_graph.options import Options
from shared_graph.tensorflow_runtime import failure_of

BIG = np.finfo(np.float64).max
ONES = np.ones((1, 3), np.float32)
ZERO = np.zeros(1, np.int64)


# -- the adder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def add(load):
    """``add(*values)``: the sums of the adder, which begins at 0, after each of the values."""
    adder = load(ADDER_SOURCE)
    return lambda *values: one(adder, np.array(values, np.float64))


def test_a_batch_of_adds_gives_each_caller_the_sum_right_after_its_own_and_goes_on_where_a_float32_would_stop(add):
    big = 2.0**53 - 9
    assert [add(1, 2, 4), add(), add(big), add(1, 1)] == [[1, 3, 7], [], [big + 7], [big + 8, big + 9]]


@pytest.mark.parametrize("values", [[np.nan], [-np.inf], [1, np.inf, -np.inf], [BIG, BIG, -BIG]], ids=str)
def test_adds_to_no_finite_sum_fail_and_change_nothing(add, values):
    add(5)
    with pytest.raises(ModelError, match="the sum would not be finite"):
        add(*values)
    assert add(0) == [5]


@pytest.mark.parametrize("servers", [1, 2])
def test_a_run_that_tensorflow_takes_for_another_one_is_run_again_unless_a_part_of_it_may_have_been_applied(
    load, servers
):
    from tensorflow.python.framework.errors_impl import AbortedError

    adder = load(ADDER_SOURCE)
    run, refusals = adder._callables["serving_default"], iter([True, True, False])
    adder._probes *= servers

    def refusing(*feed):
        if next(refusals):
            raise AbortedError(None, None, "The same RunGraph (Worker) request was received twice. graph_handle: 1")
        return run(*feed)

    adder._callables["serving_default"] = refusing
    if servers > 1:
        with pytest.raises(ModelError, match="may or may not have been changed") as failure:
            one(adder, np.array([3.0]))
        assert next(refusals) and failure.value.status in NOT_HALVED
    else:
        assert one(adder, np.array([3.0])) == [3]


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled beside another", "sent twice"])
def test_a_run_that_may_have_been_applied_is_told_so_and_not_run_again_but_one_that_reads_is(load, is_cancelled):
    """TensorFlow sends a run again when its connection was lost, and the server refuses it, whatever the first did."""
    from tensorflow.python.framework.errors_impl import AbortedError, CancelledError

    def interrupt(graph) -> list:
        """What has been run by then, once more than it is answered."""
        run, seen = graph._callables["serving_default"], []

        def interrupted(*feed):
            seen.append(run(*feed))
            if is_cancelled:
                graph.cancel_runs()
                raise CancelledError(None, None, "Step was cancelled by an explicit call to `Session::Close()`.")
            if len(seen) < 2:
                raise AbortedError(None, None, "The same RunCallable (Master) request was received twice. step_id: 1")
            return seen[-1]

        graph._callables["serving_default"] = interrupted
        return seen

    adder, reader = load(ADDER_SOURCE), load("example_models:linear")
    added, feed = interrupt(adder), [np.float32([[1, 2, 3]])]
    with pytest.raises(ModelError, match="what it changes may or may not have been changed") as failure:
        adder.run("serving_default", [np.array([3.0])], time.monotonic() + 30)
    assert failure.value.status == 502 and [array.tolist() for [array] in added] == [[3.0]]
    expected = reader.run("serving_default", feed)
    interrupt(reader)
    assert np.array_equal(reader.run("serving_default", feed, time.monotonic() + 30), expected)


@pytest.mark.long
def test_of_a_quarter_of_a_million_adds_none_is_refused_or_added_twice(add):
    """One in 43,000 is taken by TensorFlow for one of the last 100,000: five in these, none in one of 100 trials."""
    with ThreadPoolExecutor(8) as threads:
        sums = [one_sum for (one_sum,) in threads.map(lambda _: add(1), range(250_000))]
    assert sorted(sums) == list(range(1, 250_001))


# -- models, also side by side -----------------------------------------------------------------------------------------


def test_devices_of_the_machine_that_saved_a_model_do_not_matter(load, models, tmp_path):
    from tensorflow.core.protobuf import saved_model_pb2

    file = shutil.copytree(os.path.join(models["affine"], "1"), tmp_path / "affine") / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for meta_graph in saved.meta_graphs:
        for nodes in [meta_graph.graph_def.node, *(f.node_def for f in meta_graph.graph_def.library.function)]:
            for node in nodes:
                node.device = "/job:trainer/replica:0/task:3/device:GPU:1"
    file.write_bytes(saved.SerializeToString())
    assert one(load(str(file.parent)), np.array([[3, 5]], np.float32)) == [[1]]


def test_a_tensor_may_be_called_by_its_operation_alone(load, models, tmp_path):
    """As TensorFlow Serving takes it: "x" is "x:0"."""
    from tensorflow.core.protobuf import saved_model_pb2

    file = shutil.copytree(os.path.join(models["affine"], "1"), tmp_path / "affine") / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for definition in saved.meta_graphs[0].signature_def.values():
        for info in (*definition.inputs.values(), *definition.outputs.values()):
            info.name = info.name.removesuffix(":0")
    file.write_bytes(saved.SerializeToString())
    assert one(load(str(file.parent)), np.array([[3, 5]], np.float32)) == [[1]]


def given_twice(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": x + 1}), "twice": ({"a": x, "b": x}, {"y": x})}


def test_a_signature_that_cannot_be_run_takes_no_other_along(load, models, tmp_path):
    from tensorflow.core.protobuf import saved_model_pb2

    file = shutil.copytree(os.path.join(models["affine"], "1"), tmp_path / "affine") / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    next(iter(saved.meta_graphs[0].signature_def["double"].outputs.values())).name = "gone:0"
    file.write_bytes(saved.SerializeToString())
    pruned, twice = load(str(file.parent)), load("test_graph:given_twice")
    assert one(pruned, np.array([[3, 5]], np.float32)) == [[1]] and one(twice, np.float32([1])) == [2]
    assert pruned.signatures["double"].refusal.endswith("its output 'twice' is called gone:0, which is not there")
    assert twice.signatures["twice"].refusal.endswith("two of its inputs are one tensor")


OLD_STYLE = """
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()

def chained(tf):
    x, w = tf.placeholder(tf.float32, [], name="x"), tf.get_variable("w", [3], initializer=tf.zeros_initializer())
    y = tf.scatter_add(tf.scatter_update(w, [0], [x]), [0], [1.0])
    return {"serving_default": ({"x": x}, {"y": y})}
"""

IMPORTS_LATE = """
def build(tf):
    x, before = tf.placeholder(tf.float32, [], name="x"), tf.get_variable("before", initializer=1.0)
    import late_style
    return {"serving_default": ({"x": x}, {"y": x + before + tf.get_variable("after", initializer=1.0)})}
"""


def test_what_a_module_switches_off_when_it_is_imported_is_for_its_own_functions_alone(tf, load, tmp_path, monkeypatch):
    """The first line of many a program of TensorFlow 1."""

    def kinds(source: ModelSource) -> list[str]:
        return [operation.type for operation in Graph(tf, source).graph.get_operations()]

    for name, text in {"old_style": OLD_STYLE, "late_style": OLD_STYLE, "late": IMPORTS_LATE}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sources = [ADDER_SOURCE, *Options(model=["example_models:line", "example_models:spinning"]).model]
    before = [kinds(source) for source in sources]
    try:
        old = load("old_style:chained")
        assert [kinds(source) for source in sources] == before
        assert kinds(old.source) == kinds(old.source) and "VariableV2" in kinds(old.source)
        assert one(old, np.float32(5)) == [6, 0, 0]  # not so with resource variables
        late = load("late:build").source
        assert kinds(late) == kinds(late) and "VarHandleOp" not in kinds(late)
        assert [kinds(source) for source in sources] == before
    finally:
        tf.enable_v2_tensorshape()
        tf.enable_tensor_equality()


def calls_python(tf):
    x = tf.placeholder(tf.float64, [], name="x")
    y = tf.numpy_function(lambda x: 2 * x, [x], tf.float64)
    return {"serving_default": ({"x": x}, {"y": x + 1}), "python": ({"x": x}, {"y": y})}


def test_a_python_function_of_a_saved_model_is_not_taken_for_one_of_this_process(tf, load, tmp_path):
    """It is called by its number, which was that of the adder's: what was sent was then kept as the sum."""
    folder = str(tmp_path / "saved")
    with tf.Graph().as_default(), tf.Session() as session:
        example_models.write(tf, session, folder, calls_python(tf))
    graph = load(folder)
    assert one(graph, 1.0) == 2
    assert graph.signatures["python"].refusal.endswith("it calls a Python function, which no SavedModel has")
    load("test_graph:calls_python").run("python", [np.float64(3)])  # a function's own is there


def test_metadata_has_its_names_in_order(load):
    definitions = load("example_models:echo").metadata()["signature_def"]["signature_def"]
    sides = [list(definitions["all"][side]) for side in ("inputs", "outputs")]
    assert sides == [sorted(side) for side in sides] and len(sides[0]) == 11


def outputs_that_are_there_already(tf):
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=[1.0, 2.0])
    y = x + 1
    return {"serving_default": ({"x": x}, {"again": x, "twice": y, "variable": w, "x": x, "y": y})}


def test_an_output_may_be_an_input_itself_a_variable_or_two_outputs(load):
    outputs = load("test_graph:outputs_that_are_there_already").run("serving_default", [np.float32([1])])
    assert [output.tolist() for output in outputs] == [[1], [2], [1, 2], [1], [2]]


def test_saved_models_whose_variables_have_the_same_names_keep_their_own(tf, load, tmp_path):
    for name, value in (("half", 0.5), ("double", 2.0)):
        with tf.Graph().as_default(), tf.Session() as session:
            x, factor = tf.placeholder(tf.float32, [None]), tf.get_variable("factor", initializer=value)
            session.run(factor.initializer)
            tf.saved_model.simple_save(session, str(tmp_path / name), {"x": x}, {"y": x * factor})
    half, double = load(str(tmp_path / "half")), load(str(tmp_path / "double"))
    assert [one(half, np.float32([6])), one(double, np.float32([6]))] == [[3], [12]]


@pytest.mark.parametrize("name", ["a.b", "_", "Übung"])
def test_one_function_under_two_names_is_two_models_whatever_the_names(load, name):
    source = ModelSource(name, 1, function="example_models:counter")
    first, second = load(source), load(source._replace(name=f"{name}2"))
    assert [one(first, ZERO, signature="count") for _ in range(3)] == [1, 2, 3]
    assert one(second, ZERO, signature="count") == 1


def nearly_twins(tf):
    """Signatures that do the same as the first of their group, whose names begin with its name; and all the others."""

    def function(work=lambda a, b: a - w * b):
        return tf.function(work)  # of another name each time

    w = tf.get_variable("w", initializer=2.0)
    x, y, deep = (tf.placeholder(tf.float32, [None], name=name) for name in ("x", "y", "deep"))
    more = iter([tf.placeholder(tf.float32, [None], name=f"p{i}") for i in range(20)])
    halves, inner = tf.split(tf.concat([x, y], 0), 2), tf.identity(deep)
    batch = functools.partial(tf.raw_ops.Batch, num_batch_threads=1, max_batch_size=9, batch_timeout_micros=9)
    pairs = [(next(more), next(more)) for _ in range(5)]
    given, made = [{"a": a, "b": b} for a, b in pairs], [function()(x, y) for _ in range(2)]
    return {
        "serving_default": ({"a": x, "b": y}, {"out": function()(x, y)}),
        "inputs of others": ({"a": x, "b": y}, {"out": function()(x, y)}),
        "far": (given[0], {"out": function()(*pairs[0])}),
        "far, again": (given[1], {"out": function()(*pairs[1])}),
        "swapped": (given[2], {"out": function()(*pairs[2][::-1])}),
        "plus": (given[3], {"out": function(lambda a, b: a + w * b)(*pairs[3])}),
        "key": ({"a": pairs[4][0], "c": pairs[4][1]}, {"out": function()(*pairs[4])}),
        "name": ({"a": x, "b": y}, {"result": function()(x, y)}),
        "half": ({"a": x, "b": y}, {"out": halves[0]}),
        "half, again": ({"a": x, "b": y}, {"out": halves[0]}),
        "other": ({"a": x, "b": y}, {"out": halves[1]}),
        "inner": ({"a": deep}, {"out": tf.sqrt(inner)}),
        "itself": ({"a": made[0]}, {"out": made[0]}),
        "unfed": ({"a": next(more)}, {"out": made[1]}),
        "through": ({"a": x, "b": y}, {"p": x, "q": y}),
        "crossed": ({"a": y, "b": x}, {"p": x, "q": y}),
        "later": ({"a": halves[0]}, {"out": halves[0], "twice": 2 * halves[0]}),
        "none": ({"a": next(more)}, {"out": tf.sqrt(inner)}),  # fails, since nothing is fed
        "queue": ({"a": x}, {"out": batch(in_tensors=[x], grad_timeout_micros=9).batched_tensors[0]}),
        "batch": ({"a": x}, {"out": batch(in_tensors=[x], grad_timeout_micros=9).batched_tensors[0]}),
        "w": ({}, {"out": w}),
        "same": ({"a": x}, {"out": x}),
    }


def run_of_its_own(graph, name: str, feed: list) -> list:
    """By the tensors that the signature names."""
    sides = [sorted(side.items()) for side in (graph._definitions[name].inputs, graph._definitions[name].outputs)]
    inputs, outputs = ([info.name for _, info in side] for side in sides)
    return graph.session.run(outputs, dict(zip(inputs, feed)))


def test_signatures_that_do_the_same_are_one_and_those_that_only_look_like_it_are_not(load):
    graph = load("test_graph:nearly_twins")
    firsts = {name: name.partition(",")[0] for name in graph.equal}
    assert graph.equal == firsts and len(firsts) == 22
    feed = [np.float32([5, 7]), np.float32([1, 2])]
    for name, first in firsts.items():
        if name != first:
            given = feed[: len(graph.signatures[name].inputs)]
            [expected], [found] = run_of_its_own(graph, name, given), graph.run(name, given)
            assert expected.tolist() == found.tolist() != []


def test_the_two_signatures_of_a_keras_model_and_the_two_names_of_an_estimators_head_are_one(load, models):
    graph = load(models["picture"])
    feed = [np.random.default_rng(0).random((2, 28, 28, 1), np.float32)]
    expected = [run_of_its_own(graph, name, feed)[0].tobytes() for name in ("serve", "serving_default")]
    assert len(set(graph.equal.values())) == 1 and set(expected) == {graph.run("serve", feed)[0].tobytes()}
    if estimator := real_models("more_models").get("estimator_taxi"):
        graph = load(estimator)
        assert graph.equal["serving_default"] == "classification" and len(set(graph.equal.values())) == 3


@pytest.mark.parametrize("change", [None, "attribute", "gradient", "another use"])
def test_signatures_by_functions_of_which_not_all_is_known_are_not_one(tf, change):
    with tf.Graph().as_default() as graph:
        pairs = [(x, tf.function(lambda x: 2 * x)(x)) for x in (tf.placeholder(tf.float32, [None]) for _ in range(2))]
        definitions = {
            f"{i}": tf.saved_model.predict_signature_def({"x": x}, {"y": y}) for i, (x, y) in enumerate(pairs)
        }
    graph_def = graph.as_graph_def()
    calls = [node for node in graph_def.node if "f" in node.attr]
    if change == "attribute":
        calls[1].attr["f"].func.attr["V"].i = 2
    elif change == "gradient":
        graph_def.library.gradient.add(function_name=calls[0].attr["f"].func.name, gradient_func="g")
    elif change == "another use":
        graph_def.node.add(name="other", op="Identity", input=[calls[1].input[0]])
    assert equal_signatures(graph_def, definitions) == {"0": "0", "1": "1" if change else "0"}


def in_functions(tf):
    """Two that would be one, but for a queue in their function that is known by the name of who calls it."""

    @tf.function
    def batched(x):
        how = {"num_batch_threads": 1, "max_batch_size": 9, "batch_timeout_micros": 9, "grad_timeout_micros": 9}
        return tf.raw_ops.Batch(in_tensors=[x], **how).batched_tensors[0]

    x = tf.placeholder(tf.float32, [None])
    return {name: ({"x": x}, {"y": batched(x)}) for name in ("serving_default", "again")}


def test_what_functions_hold_by_their_callers_names_makes_no_signatures_one(load):
    assert load("test_graph:in_functions").equal == {name: name for name in ("again", "serving_default")}


# -- which signatures share runs ---------------------------------------------------------------------------------------


def looks_across_its_batch(tf):
    x, n, text = (tf.placeholder(*spec) for spec in ((tf.float32, [None, 3]), (tf.int64, [None]), (tf.string, [None])))
    mean, variance = tf.nn.moments(x, [0])
    outputs = {
        "softmax": tf.nn.softmax(x, axis=0),
        "softmax of bfloat16": tf.nn.softmax(tf.cast(x, tf.bfloat16), axis=0),
        "batch statistics": tf.nn.batch_normalization(x, mean, variance, None, None, 0.001),
        "a little of the mean": x + 0.001 * mean,
        "ranks": tf.argsort(x[:, 0]),
        "running sum": tf.cumsum(x, axis=0),
        "row count": tf.fill(tf.shape(x)[:1], tf.shape(x)[0]),
        "one row less": x[1:],
        "one number": tf.reduce_mean(x),
    }
    signatures = {name: ({"x": x}, {"y": y}) for name, y in outputs.items()}
    wide = tf.placeholder(tf.float32, [None, 12])  # of which each random row has a number that has no logarithm
    prices, words = tf.log(wide), tf.strings.split(tf.strings.join([text, " a"]), result_type="RaggedTensor")
    padded = words.to_tensor()
    width = 16 * ((tf.shape(padded)[1] + 15) // 16)
    padded = tf.pad(tf.strings.length(padded), [[0, 0], [0, width - tf.shape(padded)[1]]])
    signatures["relative prices"] = {"x": wide}, {"y": prices - tf.reduce_mean(prices)}
    signatures["as wide as the longest"] = {"text": text}, {"y": tf.reduce_mean(tf.cast(padded, tf.float32), 1)}
    signatures["distinct"] = {"n": n}, {"y": tf.unique(n).idx}
    pixels, largest = tf.placeholder(tf.uint8, [None, 4]), tf.reduce_max(n)
    brightest = tf.maximum(tf.cast(tf.reduce_max(pixels), tf.float32), 1)
    signatures["scaled by the brightest"] = {"pixels": pixels}, {"y": tf.cast(pixels, tf.float32) / brightest}
    signatures["as wide as the largest"] = {"n": n}, {"y": tf.one_hot(n, tf.cast(largest + 1, tf.int32))}
    signatures["joined"] = {"text": text}, {"y": tf.strings.join([text, tf.strings.reduce_join(text)])}
    series, steps = tf.placeholder(tf.float32, [None, None, 2]), tf.range(3)
    used = tf.reduce_max(tf.where(tf.reduce_any(tf.not_equal(series, 0), [0, 2]), steps + 1, 0 * steps))
    signatures["cut where all are padded"] = {"x": series}, {"y": series[:, :used]}
    for sign in "|,;/_":
        lengths = tf.cast(
            tf.strings.length(tf.strings.split(text, sign, result_type="RaggedTensor").to_tensor("")), tf.float32
        )
        signatures[f"lists with {sign}"] = {"text": text}, {"y": tf.reduce_mean(lengths, 1)}
    return signatures


def tells_nothing_on_random_rows(tf):
    """All of them get the same answer, be it right or wrong."""
    text, pixels = tf.placeholder(tf.string, [None]), tf.placeholder(tf.uint8, [None, 8])
    words = tf.lookup.KeyValueTensorInitializer(["horror", "comedy"], [1.0, 2.0])
    found = tf.lookup.StaticHashTable(words, 0.0).lookup(
        tf.strings.split(text, result_type="RaggedTensor").to_tensor("")
    )
    bright = tf.ragged.boolean_mask(pixels, pixels > 250).to_tensor()
    return {
        "unknown words": ({"text": text}, {"y": tf.reduce_sum(found, 1)}),
        "nothing found": ({"pixels": pixels}, {"y": bright, "first": pixels[:, 0]}),
        "no number": ({"text": text}, {"y": tf.log(tf.cast(tf.strings.length(text), tf.float32) - 1000)}),
    }


def minds_its_rows(tf):
    """Each answer depends on its own row alone, apart from rounding."""
    x, n, text = (tf.placeholder(*spec) for spec in ((tf.float32, [None, 3]), (tf.int64, [None]), (tf.string, [None])))
    w = tf.get_variable("w", [3, 5], initializer=tf.random_normal_initializer(seed=1))
    words = tf.strings.split(text)
    words = tf.SparseTensor(words.indices, tf.strings.to_hash_bucket_fast(words.values, 5), words.dense_shape)
    scores = tf.nn.softmax(tf.nn.safe_embedding_lookup_sparse(tf.transpose(w), words))
    labels = tf.gather(["bad", "so so", "good"], tf.argmax(scores, axis=1))
    outputs = {
        "network": tf.nn.relu(x @ w),
        "bfloat16": tf.cast(x, tf.bfloat16) @ tf.cast(w, tf.bfloat16),
        "boolean": x > 0,
        "no number": tf.log(x),
        "rounding": x * (1 + 1e-8 * tf.cast(tf.shape(x)[0], tf.float32)),
    }
    return {name: ({"x": x}, {"y": y}) for name, y in outputs.items()} | {
        "integer": ({"n": n}, {"y": n * 3}),
        "index": ({"n": n}, {"y": tf.gather([1.0, 2.0, 3.0], n)}),
        "text": ({"text": text}, {"y": tf.strings.upper(text)}),
        "classifier": ({"text": text}, {"label": labels, "scores": scores}),
    }


def looks_across_when_switched_on(tf):
    x, on, signatures = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.float32, [None]), {}
    for dtype in (tf.bool, tf.int32, tf.bfloat16, tf.float32):
        switch = tf.get_variable(f"switch_{dtype.name}", initializer=tf.zeros([], dtype))
        signatures[f"turn {dtype.name}"] = {"on": on}, {"on": tf.identity(switch.assign(tf.cast(on[0], dtype)))}
        signatures[dtype.name] = {"x": x}, {"y": x - tf.cast(switch, tf.float32) * tf.reduce_mean(x, 0)}
    return signatures


def not_to_the_last_bit(tf):
    x = tf.placeholder(tf.float32, [None])
    return {"serving_default": ({"x": x}, {"y": tf.sin(x)})}


def large_rows(tf):
    x = tf.placeholder(tf.float32, [None, 1000, 1000, 4])
    return {"serving_default": ({"x": x}, {"y": tf.reduce_mean(x, [1, 2, 3])})}


@pytest.mark.parametrize("exact", [False, True])
def test_of_large_rows_few_are_tried(load, exact):
    graph, rows = load("test_graph:large_rows"), []
    run = graph.run
    graph.run = lambda signature, feed: rows.append(len(feed[0])) or run(signature, feed)
    assert find_batchable(graph, Options(exact=exact)).batchable == ("serving_default",)
    assert max(rows) == (3 if exact else 2)


def test_signatures_share_runs_unless_they_look_across_their_batch_or_with_exact_differ_in_the_last_bit(load):
    assert find_batchable(load("test_graph:looks_across_its_batch"), Options()).batchable == ()
    assert find_batchable(load("test_graph:looks_across_when_switched_on"), Options()).batchable == ()
    assert find_batchable(load("test_graph:not_to_the_last_bit"), Options(exact=True)).batchable == ()
    graph = load("test_graph:tells_nothing_on_random_rows")
    assert find_batchable(graph, Options()) == ((), tuple(graph.signatures))
    graph = load("test_graph:minds_its_rows")
    assert set(find_batchable(graph, Options()).batchable) == set(graph.signatures)
    exact = set(find_batchable(graph, Options(exact=True)).batchable)
    assert exact >= {"integer", "text", "boolean"} and "rounding" not in exact


@pytest.mark.parametrize(
    ["name", "merged"],
    [
        ("words", {"back", "upper"}),  # of random words it knows none
        ("affine", {"serving_default", "double"}),
        ("picture", {"serve", "serving_default"}),
        ("several", {"serving_default"}),
        ("scalar", set()),
        ("fixed", set()),
        ("counter", set()),
        ("echo", set()),
        ("adder", {"serving_default"}),
    ],
)
def test_models_share_runs_where_rows_are_told_apart_and_nothing_is_changed(load, models, name, merged):
    assert set(find_batchable(load(models.get(name, ADDER_SOURCE)), Options()).batchable) == merged


# -- which signatures change state -------------------------------------------------------------------------------------


def changes_state(tf):
    """In as many ways as there are."""
    v, table = variable_and_table(tf)

    def after(operation):
        with tf.control_dependencies([operation]):
            return tf.constant(1)

    inner = tf.function(lambda: v.assign_add([1.0, 1, 1]).read_value())
    return {
        name: ({}, {"y": y})
        for name, y in {
            "updates first": after(v.assign_add([1.0, 1, 1], read_value=False)),
            "updates in a branch": tf.cond(
                tf.equal(v[0], 0), lambda: v.assign_add([1.0, 1, 1]).read_value(), v.read_value
            ),
            "updates in a function": tf.function(lambda: inner())(),
            "trains": after(tf.train.AdamOptimizer().minimize(tf.reduce_sum(v * v))),
            "inserts": after(table.insert(tf.constant(["a"]), tf.constant([1], tf.int64))),
            "takes from a queue": tf.FIFOQueue(3, [tf.float32]).dequeue(),
            "takes from a dataset": tf.data.make_one_shot_iterator(tf.data.Dataset.range(9)).get_next(),
            "gathers gradients": after(tf.ConditionalAccumulator(tf.float32, []).apply_grad(1.0)),
            "writes a file": after(
                tf.raw_ops.SaveV2(prefix="x", tensor_names=["v"], shape_and_slices=[""], tensors=[v])
            ),
            "draws from a generator": tf.random.experimental.Generator.from_seed(1).uniform([3]),
        }.items()
    }


def only_computes(tf):
    v, table = variable_and_table(tf)
    v.assign_add([1.0, 1, 1])  # beside everything
    x = v[0]
    power = tf.while_loop(lambda y: y < 100, lambda y: y * x, [x])
    return {
        name: ({}, {"y": y})
        for name, y in {
            "reads": v.read_value() * 2,
            "looks up": table.lookup(tf.constant(["a"])),
            "scatters into a new tensor": tf.scatter_nd([[1]], [1.0], [3]),
            "gathers a list in a loop": tf.gradients(power, x)[0],
            "counts bits": tf.raw_ops.PopulationCount(x=tf.constant([7], tf.uint8)),
            "calls python": tf.numpy_function(lambda: np.float32(1), [], tf.float32),
        }.items()
    }


def variable_and_table(tf):
    v = tf.get_variable("v", [3], initializer=tf.zeros_initializer())
    return v, tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)


@pytest.mark.parametrize(
    "function, writes, runs_python", [(changes_state, True, []), (only_computes, False, ["calls python"])]
)
def test_what_changes_state_and_what_calls_python_is_known(tf, function, writes, runs_python):
    signatures = Graph(tf, ModelSource("m", 1, function=f"test_graph:{function.__name__}")).signatures
    assert {name: signature.mutates_state for name, signature in signatures.items()} == dict.fromkeys(
        signatures, writes
    )
    assert [name for name, signature in signatures.items() if signature.runs_python] == runs_python


@pytest.mark.parametrize(
    "operation, changes",
    [
        *((name, True) for name in (
            "AssignVariableOp", "AssignAddVariableOp", "ResourceApplyAdam", "ResourceScatterNdUpdate", "ScatterAdd",
            "LookupTableInsertV2", "QueueDequeueV2", "QueueEnqueueManyV2", "StridedSliceAssign", "RngSkip",
            "StatefulUniform", "WriteFile", "WriteScalarSummary", "SaveV2", "MergeV2Checkpoints", "ReaderReadV2",
            "OneShotIterator", "IteratorV2", "AccumulatorApplyGradient", "SparseAccumulatorTakeGradient", "Stage",
            "MapUnstage", "OrderedMapStage", "MapUnstageNoKey", "StageClear", "MapClear", "DestroyResourceOp",
            "NegTrain", "BoostedTreesUpdateEnsembleV2", "AddManySparseToTensorsMap")),
        *((name, False) for name in (
            "ReadVariableOp", "ScatterNd", "TensorScatterUpdate", "LookupTableFindV2", "TensorListStack",
            "AnonymousIteratorV3", "IteratorGetNext", "PopulationCount", "RandomUniform", "RestoreV2", "ReadFile",
            "StackPushV2", "StridedSlice", "StageSize", "MapPeek", "BoostedTreesPredict")),
    ],
)  # fmt: skip
def test_an_operation_that_changes_state_is_known_by_its_name(operation, changes):
    assert bool(STATE_CHANGING.fullmatch(operation)) is changes


def reference_counter(tf):
    """TensorFlow 1's reference variable, incremented without a lock around it."""
    with tf.variable_scope("", use_resource=False):
        count = tf.get_variable("count", [], tf.int64, tf.zeros_initializer())
    return {"serving_default": ({}, {"count": tf.identity(count.assign_add(1))})}


def test_no_increment_of_a_reference_variable_is_lost_when_many_run_at_once(load, clients):
    graphs = [load("test_graph:reference_counter"), load("test_graph:reference_counter", restore=False)]
    clients(16, lambda i: graphs[i % 2].run("serving_default", []), range(2000))
    assert graphs[0].variables.get_weights() == {"count": 2000}


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ["name", "signature", "x", "status"],
    [
        ("failing", "NOT_FOUND", np.int32(1), 404),
        ("failing", "FAILED_PRECONDITION", np.int32(1), 400),
        ("failing", "OUT_OF_RANGE", np.int32(1), 400),
        ("failing", "CANCELLED", np.int32(1), 499),
        ("picky", "serving_default", np.float32([-1]), 400),
        ("linear", "serving_default", np.float32([[1]]), 400),
    ],
)
def test_a_failure_has_tensorflow_servings_status_for_its_code_and_one_sentence(load, name, signature, x, status):
    with pytest.raises(ModelError) as caught:
        load(f"example_models:{name}").run(signature, [x])
    assert caught.value.status == status
    assert str(caught.value) and not [part for part in ("\n", "[[", "/job:") if part in str(caught.value)]


@pytest.mark.parametrize(["said", "status"], [(503, 503), (404, 404), (204, 500), (999, 500), (100, 500)])
def test_of_a_status_that_a_function_gives_its_failure_only_that_of_an_error_is_taken(said, status):
    failure = failure_of(Exception(f"RuntimeError: HTTP {said}: why\nTraceback"))
    assert failure.status == status and "why" in str(failure)


def test_when_runs_are_cancelled_those_that_may_be_in_time_begin_anew_and_the_others_end(tf, address, load):
    graph, deadline = load("example_models:spinning"), time.monotonic() + 1

    def is_ended(run) -> bool:
        graph.cancel_runs()  # however far it has come to begin
        return run.done()

    with ThreadPoolExecutor(2) as pool:
        in_time = pool.submit(graph.run, "serving_default", [np.float32([12345])], deadline)
        late = pool.submit(graph.run, "serving_default", [np.float32([12345])])
        wait_until(lambda: is_ended(late), 30)
        assert not in_time.done() or time.monotonic() >= deadline
        wait_until(lambda: is_ended(in_time), 30)
        assert time.monotonic() >= deadline
    assert {run.exception().status for run in (late, in_time)} == {499}
    assert one(graph, np.float32([1])) == [1]


@pytest.mark.parametrize(
    "error, message",
    [
        ("FailedPreconditionError", "Session is closed."),
        ("AbortedError", "Session 483654ae2098c332 is not found."),
        ("InvalidArgumentError", "A session is not created yet...."),
    ],
)
def test_a_run_that_finds_its_session_closed_since_another_run_is_cancelled_begins_anew(load, error, message):
    """Of two threads that run without pause, every sixth time; of two that feed a megabyte, every fifth time it was not
    found."""
    from tensorflow.python.framework import errors_impl

    graph = load("example_models:linear")

    def closed(*feed):
        graph.cancel_runs()
        raise getattr(errors_impl, error)(None, None, message)

    feed = [np.float32([[1, 2, 3]])]
    expected = graph.run("serving_default", feed)
    graph._callables["serving_default"] = closed
    assert np.array_equal(graph.run("serving_default", feed, time.monotonic() + 30), expected)


def spread(tf):
    """A table in two parts, which is read; and counted how often by a variable beside it."""
    x, count = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("count", initializer=0.0)
    w = tf.get_variable("w", [8], initializer=tf.ones_initializer(), partitioner=tf.fixed_size_partitioner(2))
    y = x * tf.reduce_sum(w)
    return {"read": ({"x": x}, {"y": y}), "count": ({"x": x}, {"y": y + count.assign_add(1.0)})}


def made_by(graph: Graph, path) -> str:
    """The folder from which another process has what a function has made."""
    (path / "saved_model.pb").write_bytes(graph.made)
    return str(path)


def test_who_has_no_variables_of_its_own_makes_nothing_to_set_them_and_answers_the_same(tf, address, load, tmp_path):
    """As a worker does, and also after another process has set the variables."""
    graph = load("example_models:linear")
    other = Graph(tf, graph.source, folder=made_by(graph, tmp_path), is_whole=False)
    assert other.fingerprint == graph.fingerprint and not other.variables.placeholders
    assert len(other.graph.get_operations()) < len(graph.graph.get_operations())
    other.connect([address], Options())
    graph.variables.set_weights({name: value + 1 for name, value in graph.variables.get_weights().items()})
    assert one(other, ONES) == one(graph, ONES)
    other.disconnect()


def save_colocated(tf, folder: str) -> None:
    """TF1: what is run stands where something stands that is not."""
    with tf.Graph().as_default(), tf.Session() as session:
        x, unused = tf.placeholder(tf.float32, [None]), tf.get_variable("unused", initializer=1.0)
        with tf.colocate_with(unused):
            y = 2 * x
        session.run(unused.initializer)
        tf.saved_model.simple_save(session, folder, {"x": x}, {"y": y})


def answers(graph: Graph) -> dict:
    """Of each signature that can be run, to the last bit: to random rows, or why they are refused."""
    found = {}
    for name, signature in graph.signatures.items():
        if signature.refusal is None and not signature.mutates_state:
            try:
                outputs = graph.run(name, sample_rows(signature, 3))
                found[name] = [output.tolist() if output.dtype == object else output.tobytes() for output in outputs]
            except ModelError as error:
                found[name] = error.status, re.sub("{{.*?}}", "", str(error))
    return found


def test_who_restores_nothing_has_only_what_runs_and_it_is_the_same(tf, address, load, models, tmp_path):
    save_colocated(tf, str(tmp_path / "colocated"))
    folders = [*(models[name] for name in example_models.SAVED), str(tmp_path / "colocated"), *real_models().values()]
    for source in [*folders, *(models[name] for name in ("linear", "echo", "counter", "failing"))]:
        graph = load(source)
        folder = graph.source.folder or made_by(graph, tmp_path)
        part = Graph(tf, graph.source, folder=folder, is_whole=False)
        found, expected = ((g.fingerprint, g.signatures, g.metadata(), g.equal) for g in (part, graph))
        sizes = [len(g.graph.get_operations()) for g in (part, graph)]
        assert found == expected and not part.variables.placeholders
        assert sizes[0] < sizes[1] or (sizes[0] == sizes[1] and not graph.variables.placeholders)
        part.connect([address], Options())
        assert answers(part) == answers(graph) != {}
        part.disconnect()


def spare(tf):
    """Variables, of which the second is behind no output."""
    a, _, c = (tf.get_variable(name, initializer=value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)))
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": a * x + c})}


def test_the_variables_of_a_function_are_on_the_same_servers_in_each_process(tf, tmp_path):
    source = ModelSource("spare", 1, function="test_graph:spare")
    graph = Graph(tf, source, ps_tasks=2)
    part = Graph(tf, source, 0, 2, made_by(graph, tmp_path), is_whole=False)
    devices = [
        {op.name: op.device for op in g.graph.get_operations() if op.type == "VarHandleOp"} for g in (graph, part)
    ]
    assert devices[0] == devices[1] and len(set(devices[0].values())) == 2


@pytest.mark.parametrize("found_otherwise", ["", "api_implements", "gradient"])
def test_functions_that_nothing_calls_are_left_out_unless_they_may_be_found_otherwise(tf, found_otherwise):
    from tensorflow.core.protobuf import meta_graph_pb2

    @tf.function
    def double(x):
        return 2 * x

    @tf.function
    def half(x):
        return x / 2

    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None], name="x")
        infos = [{key: tf.saved_model.build_tensor_info(value)} for key, value in (("x", x), ("y", double(double(x))))]
        half(x)
    meta_graph = meta_graph_pb2.MetaGraphDef(graph_def=graph.as_graph_def())
    meta_graph.signature_def["s"].CopyFrom(tf.saved_model.build_signature_def(*infos))
    library = meta_graph.graph_def.library
    [unused] = [function for function in library.function if "half" in function.signature.name]
    if found_otherwise == "gradient":
        library.gradient.add(function_name="f", gradient_func=unused.signature.name)
    elif found_otherwise:
        unused.attr["api_implements"].s = b"lstm"
    before = len(library.function)
    keep_what_runs(meta_graph)
    assert [node.op for node in meta_graph.graph_def.node].count("PartitionedCall") == 2
    assert before - len(library.function) == (not found_otherwise)


def test_graphs_are_built_one_at_a_time_for_as_long_as_they_get_on_and_one_that_never_ends_holds_up_no_other(
    monkeypatch,
):
    """What a function switches in TensorFlow holds for all that is built meanwhile."""
    never, at_work, most = threading.Event(), 0, 0

    def build(tf, source: ModelSource, *rule) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        never.wait() if source.name == "never" else time.sleep(0.2)
        at_work -= 1

    monkeypatch.setattr(module, "BUILD_PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "Graph", build)
    monkeypatch.setattr(module, "import_tensorflow", lambda: None)
    options = Options(model=[f"{name}=test_graph:spread" for name in ("never", *"abcdef")])
    with ThreadPoolExecutor(7) as pool:
        list(pool.map(lambda source: build_graph(options, source), options.model[1:]))
        assert most == 1
        hanging = pool.submit(build_graph, options, options.model[0])
        list(pool.map(lambda source: build_graph(options, source), options.model[1:4]))
        assert not hanging.done() and most == 2
        never.set()


SERVER = """
import sys
from shared_graph.tensorflow_runtime import import_tensorflow
server = import_tensorflow().train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0)
print(server.target.removeprefix("grpc://"), flush=True)
sys.stdin.read()
"""


def test_a_model_on_two_servers_has_lost_its_connection_when_the_second_has_gone(tf):
    """For reads, and for what writes. A run waits for the first until it is disconnected."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(subprocess.Popen([sys.executable, "-c", SERVER], **pipes)) for _ in range(2)]
        for server in servers:
            stack.callback(server.kill)
        addresses = [server.stdout.readline().strip() for server in servers]
        options = Options(parameter_servers=2, model=["test_graph:spread"])
        graph = build_graph(options, options.model[0])
        graph.connect(addresses, options)
        stack.callback(graph.disconnect, is_lost=True)  # else whoever frees it last would wait for them
        graph.restore({})
        feed = [np.float32([1, 2])]
        assert [graph.run(name, feed)[0].tolist() for name in ("read", "count")] == [[8, 16], [9, 17]]
        servers[1].kill()
        servers[1].wait()
        for name in ("read", "count", "read"):
            with pytest.raises(ConnectionError):
                graph.run(name, feed)


def test_what_is_asked_of_a_server_that_has_gone_ends_after_a_while_be_it_a_run_or_a_session(tf, monkeypatch):
    """TensorFlow would ask it again for ever, and hold the graph."""
    monkeypatch.setattr(tensorflow_runtime, "LOST_LIMIT_S", 2.0)
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        options = Options(model=["example_models:linear"], timeout_s=0.5)
        graph = build_graph(options, options.model[0])
        graph.connect([server.stdout.readline().strip()], options)
        graph.restore({})
        server.kill()
        server.wait()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(graph.run, "serving_default", [np.float32([[1, 2, 3]])])
            time.sleep(0.5)
            ending = graph.disconnect(is_lost=True)
            assert isinstance(run.exception(20), (ModelError, ConnectionError))
        ending.join(20)
        assert not ending.is_alive()


def calls_python_everywhere(tf):
    """Each output is the input times the number in its name, by Python functions in all kinds of functions."""
    x = tf.placeholder(tf.float32, [None], name="x")

    def times(factor: int, value):
        return tf.reshape(tf.numpy_function(lambda v: np.float32(factor * v), [value], tf.float32), tf.shape(value))

    def loop(factor: int):
        return tf.while_loop(lambda i, _: i < 1, lambda i, value: (i + 1, times(factor, value)), [0, x])[1]

    outputs = {f"mapped {i}": tf.map_fn(lambda v, i=i: times(i, v), x) for i in (2, 3, 4)}
    outputs |= {f"looped {i}": loop(i) for i in (5, 6)}
    outputs |= {f"called {i}": tf.function(lambda v, i=i: times(i, v))(x) for i in (7, 8)}
    outputs["chosen 9"] = tf.cond(tf.shape(x)[0] > 2, lambda: times(9, x), lambda: times(10, x))
    outputs["chosen 12"] = tf.cond(tf.shape(x)[0] > 3, lambda: times(11, x), lambda: times(12, x))
    return {"serving_default": ({"x": x}, outputs | {"direct 13": times(13, x)})}


WORKER = """
import sys
import numpy as np
from shared_graph.graph import build_graph
from shared_graph.model_source import ADDER_SOURCE
from shared_graph.options import Options
address, folder, adder = sys.argv[1:]
options = Options(model=["m=test_graph:calls_python_everywhere"])
graph, sums = (
    build_graph(options, source, folder=folder, is_whole=False)
    for source, folder in ((options.model[0], folder), (ADDER_SOURCE, adder))
)
for its in (graph, sums):
    its.connect([address], options)
[sum] = sums.run("serving_default", [np.float64([1, 2])])
outputs = graph.run("serving_default", [np.float32([1, 2, 3])])
print({name: output.tolist() for name, output in zip(graph.signatures["serving_default"].outputs, outputs)})
print(sum.tolist(), sums.atomic, graph.atomic, graph.runs_python, sums.runs_python)
print([name for name in ("test_graph", "tensorflow.python.keras", "tensorflow.nn") if name in sys.modules])
"""


def test_what_a_function_has_made_runs_elsewhere_without_its_module_and_its_python_functions_where_they_stand(
    load, address, tmp_path
):
    load("example_models:spinning")  # has numbered Python functions
    graph, sums = load("test_graph:calls_python_everywhere"), load(ADDER_SOURCE)
    for name in ("graph", "sums"):
        (tmp_path / name).mkdir()
    folders = made_by(graph, tmp_path / "graph"), made_by(sums, tmp_path / "sums")
    command = [sys.executable, "-c", WORKER, address, *folders]
    environment = os.environ | {"PYTHONPATH": REPOSITORY}  # there is no test_graph
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found, others, modules = done.stdout.splitlines()
    found = ast.literal_eval(found)
    assert found == {name: [int(name.split()[1]) * value for value in (1, 2, 3)] for name in found} and len(found) > 8
    assert others == "[1.0, 3.0] True False True False" and modules == "[]"


def starts_by_python(tf):
    """A variable and a table whose first values Python functions make."""
    x = tf.placeholder(tf.int64, [None], name="x")
    first, keys, values = (
        tf.numpy_function(lambda value=value: np.int64(value), [], tf.int64) for value in ([7], [1, 2], [10, 20])
    )
    variable = tf.get_variable("v", initializer=tf.ensure_shape(first, [1]))
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), -1)
    return {"serving_default": ({"x": x}, {"y": table.lookup(x) + variable})}


def told_by_the_clock(tf):
    """Another graph each time."""
    x = tf.placeholder(tf.float32, [None], name="x")
    y = tf.numpy_function(lambda x: 2 * x, [x], tf.float32)
    for _ in range(next(NUMBERS)):
        y += 1.0
    return {"serving_default": ({"x": x}, {"y": y})}


NUMBERS = itertools.count()

MIRROR = """
import sys
import numpy as np
from shared_graph.graph import build_graph
from shared_graph.options import Options
folder, *models = sys.argv[1:]
options = Options(placement="mirrored", model=[f"{model}=test_graph:{model}" for model in models])
for source in options.model[1:]:
    build_graph(options, source, is_mirror=True)  # another order
mirror = build_graph(options, options.model[0], is_mirror=True, folder=folder)
mirror.connect([], options)
mirror.restore({"v": np.int64([7])} if mirror.variables.variables else {})
signature = mirror.signatures["serving_default"]
outputs = mirror.run("serving_default", [np.array([1, 2, 3], signature.inputs["x"].dtype)])
print(mirror.fingerprint, {name: output.tolist() for name, output in zip(signature.outputs, outputs)})
"""


@pytest.mark.parametrize("function", ["calls_python_everywhere", "starts_by_python"])
def test_a_mirror_has_python_functions_of_its_own_whatever_its_process_has_built_before(tf, load, tmp_path, function):
    """Also those that only initialize. Each process numbers them as they come, and orders captures by hash."""
    graph = load(f"test_graph:{function}")
    signature = graph.signatures["serving_default"]
    outputs = graph.run("serving_default", [np.array([1, 2, 3], signature.inputs["x"].dtype)])
    expected = {name: output.tolist() for name, output in zip(signature.outputs, outputs)}
    command = [sys.executable, "-c", MIRROR, made_by(graph, tmp_path), function, "spread", "calls_python_everywhere"]
    environment = os.environ | {"PYTHONHASHSEED": "4", "PYTHONPATH": f"{REPOSITORY}:{HERE}"}
    command = list(dict.fromkeys(command))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    fingerprint, answers = done.stdout.split(" ", 1)
    assert fingerprint == graph.fingerprint and ast.literal_eval(answers) == expected


def test_a_mirror_whose_function_makes_another_graph_here_is_refused(tf, load, tmp_path):
    graph = load("test_graph:told_by_the_clock")
    with pytest.raises(ModelError, match="is it the same code"):
        Graph(tf, graph.source, ps_tasks=0, folder=made_by(graph, tmp_path))


BRINGS_OPERATIONS = """
import os

def build(tf):
    folder = os.path.join(tf.sysconfig.get_lib(), "lite/experimental/microfrontend/python/ops")
    operations = tf.load_op_library(os.path.join(folder, "_audio_microfrontend_op.so"))
    x = tf.placeholder(tf.int16, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": operations.audio_microfrontend(x)})}
"""

RUN_IT = """
import sys
import numpy as np
from shared_graph.graph import build_graph
from shared_graph.options import Options
options = Options(model="m=brings_operations:build")
graph = build_graph(options, options.model[0], folder=sys.argv[2], is_whole=False)
graph.connect([sys.argv[1]], options)
print(graph.run("serving_default", [np.arange(800, dtype=np.int16)])[0].tolist())
"""


def test_a_function_that_brings_operations_along_is_called_elsewhere_as_well(load, address, tmp_path, monkeypatch):
    (tmp_path / "brings_operations.py").write_text(BRINGS_OPERATIONS)
    monkeypatch.syspath_prepend(tmp_path)
    graph = load("brings_operations:build")
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    command = [sys.executable, "-c", RUN_IT, address, made_by(graph, tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == one(graph, np.arange(800, dtype=np.int16)) != []


@pytest.mark.parametrize("is_lost", [True, False])
def test_where_the_server_is_lost_a_session_is_closed_before_its_callables_go_and_else_they_tell_it(is_lost):
    events = []

    class Called:
        def __del__(self):
            events.append("gone")

    class Session:
        def close(self):
            events.append("closed")
            raise RuntimeError("there is no server any more")

    left = [Session(), {"serving_default": Called()}]
    end_session(left, is_lost)
    assert events == ["closed", "gone"][not is_lost :] and left == []
    end_session([None, None], is_lost)
