"""What one graph promises, with TensorFlow in this process and one parameter server's TensorFlow server beside it."""

import os
import shutil
import threading

import numpy as np
import pytest

import example_models
import ray_tensorflow
from ray_tensorflow import (
    ADDER, PYTHON_FUNCTION, STATE_CHANGING, Graph, ModelSource, Options, import_tensorflow, model_source, operation_types,
    server_config)

BIG = np.finfo(np.float64).max


@pytest.fixture(scope="module")
def tf():
    """TensorFlow as actors import it; the environment is as before afterwards."""
    before = dict(os.environ)
    yield import_tensorflow()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def address(tf) -> str:
    """The address of a TensorFlow server, booted as the parameter server boots it; it ends with this process."""
    server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=server_config(tf, Options(), False))
    yield server.target.removeprefix("grpc://")


@pytest.fixture
def load(tf, address):
    """``load(source)``: a Graph with a session on the parameter server, first values in place unless ``restore=False``."""
    graphs = []

    def load(source, restore: bool = True) -> Graph:
        graph = Graph(tf, model_source(source))
        graph.connect(tf, [address], Options())
        graphs.append(graph)
        if restore:
            graph.restore()
        return graph

    yield load
    for graph in graphs:
        graph.session.close()


ADDER_SOURCE = ModelSource(ADDER, 1, function="ray_tensorflow:build_adder")


@pytest.fixture
def adder(load) -> Graph:
    """The adder, its sum at 0."""
    return load(ADDER_SOURCE)


def add(adder: Graph, *values: float) -> list[float]:
    """The sums after each of the values."""
    return adder.run("serving_default", [np.array(values, np.float64)])[0].tolist()


def one(graph: Graph, *arrays, signature: str = "serving_default"):
    """The only output for these inputs, in the order of the inputs' names."""
    return graph.run(signature, [np.asarray(array) for array in arrays])[0]


# -- the adder ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_adds_gives_each_caller_the_sum_right_after_its_own(adder):
    assert add(adder, 1, 2, 4) == [1, 3, 7]
    assert add(adder, 8) == [15]


def test_an_empty_batch_of_adds_changes_nothing(adder):
    add(adder, 5)
    assert add(adder) == []
    assert add(adder, 0) == [5]


@pytest.mark.parametrize("values", [
    [np.nan], [np.inf], [-np.inf], [1, np.nan, 1], [1, np.inf, -np.inf], [BIG, BIG], [-BIG, -BIG], [BIG, BIG, -BIG]], ids=str)
def test_adds_to_no_finite_sum_fail_and_change_nothing(adder, values):
    add(adder, 5)
    with pytest.raises(Exception, match="the sum would not be finite"):
        add(adder, *values)
    assert add(adder, 0) == [5]


@pytest.mark.parametrize("start", [2.0**24, 2.0**31, 2.0**53 - 2])
def test_the_sum_counts_on_where_a_float32_would_stop(adder, start):
    add(adder, start)
    assert add(adder, 1, 1) == [start + 1, start + 2]


def test_sums_are_those_of_one_addition_after_the_other(adder):
    values = np.random.default_rng(1).standard_normal(1000)
    total, expected = 0.0, []
    for value in values.tolist():
        expected.append(total := total + value)
    assert add(adder, *values[:400]) + add(adder, *values[400:]) == expected


def test_adds_of_many_sessions_at_once_are_each_seen_once(adder, load, clients):
    graphs = [adder, *(load(ADDER_SOURCE, restore=False) for _ in range(3))]
    values = [2.0**(i % 40) for i in range(200)]
    sums = clients(8, lambda i: add(graphs[i % 4], values[i])[0], range(200))
    assert sorted(np.diff([0, *sorted(sums)])) == sorted(values)


def test_the_adder_warms_up_without_adding(adder):
    add(adder, 3)
    adder.warm_up()
    assert add(adder, 0) == [3]


# -- between-graph replication -----------------------------------------------------------------------------------------


def test_two_sessions_share_the_variable(adder, load):
    other = load(ADDER_SOURCE, restore=False)
    assert [add(adder, 1), add(other, 2), add(adder, 4)] == [[1], [3], [7]]


def test_a_session_that_is_not_linked_has_a_variable_of_its_own(tf, address, adder, load, monkeypatch):
    add(adder, 5)
    config = ray_tensorflow.session_config(tf, [address])
    config.experimental.share_session_state_in_clusterspec_propagation = False
    monkeypatch.setattr(ray_tensorflow, "session_config", lambda *_: config)
    isolated = load(ADDER_SOURCE)
    assert [add(isolated, 1), add(adder, 0)] == [[1], [5]]


def test_a_variable_outlives_the_session_that_made_it(load):
    first = load(ADDER_SOURCE)
    add(first, 5)
    first.session.close()
    assert add(load(ADDER_SOURCE, restore=False), 0) == [5]


def test_variables_and_all_operations_are_placed_on_the_parameter_server(tf, adder):
    metadata = tf.RunMetadata()
    definition = adder.signature_defs["serving_default"]
    adder.session.run(
        definition.outputs["sum"].name, {definition.inputs["value"].name: [1.0]},
        tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE, output_partition_graphs=True), metadata)
    nodes = [node for partition in metadata.partition_graphs for node in partition.node]
    variables = [node for node in nodes if node.op == "VarHandleOp"]
    assert variables and all(node.device.startswith("/job:ps/replica:0/task:0/") for node in nodes)
    assert {stats.device.split("/")[1] for stats in metadata.step_stats.dev_stats} == {"job:ps"}


# -- one graph, made once ----------------------------------------------------------------------------------------------


def test_a_thousand_runs_leave_the_graph_as_it_was(adder):
    before = len(adder.graph.get_operations())
    for i in range(1000):
        add(adder, 1)
    assert len(adder.graph.get_operations()) == before
    assert add(adder, 0) == [1000]


def test_nobody_can_add_operations_to_a_graph(tf, adder):
    with adder.graph.as_default(), pytest.raises(RuntimeError, match="finalized"):
        tf.constant(1)


def test_a_graph_runs_in_any_thread_whatever_graph_is_the_default_there(tf, load):
    graph = load("example_models:linear")
    answers = []

    def run():
        with tf.Graph().as_default():
            answers.append(one(graph, np.ones((1, 3), np.float32)).tolist())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [[[9.5, 11.5]]] * 4


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_function_is_a_model(load):
    graph = load("example_models:several")
    outputs = graph.run("serving_default", [np.array([2, 3]), np.array([[1, 2], [3, 4]], np.float32)])  # n, x
    assert [output.tolist() for output in outputs] == [[3, 4], [[2, 4], [9, 12]], [6, 21]]  # next, scaled, total


def test_a_saved_model_of_tf1_brings_its_tables(load, models):
    graph = load(models["words"])
    assert one(graph, np.array([b"two", b"zero", b"unheard"], object)).tolist() == [2, 0, 3]
    assert one(graph, np.array([1, 9]), signature="back").tolist() == [b"one", b"?"]


def test_a_folder_of_numbered_versions_is_its_highest_number(load, models):
    assert load(models["words"]).source.version == 10


def test_a_saved_model_of_tf2_brings_its_variables(load, models):
    graph = load(models["affine"])
    assert one(graph, np.array([[1, 1], [3, 5]], np.float32)).tolist() == [[1], [1]]
    assert one(graph, np.array([4], np.int32), signature="double").tolist() == [8]


def test_a_convolutional_network_answers_as_in_a_plain_session(load, models):
    x = np.random.default_rng(1).random((3, 28, 28, 1), np.float32)
    plain = example_models.PlainSession(models["picture"])
    (name,), (output,) = plain.names["serving_default"]
    assert one(load(models["picture"]), x).tobytes() == plain.predict({name: x})[output].tobytes()


def test_a_fed_shape_may_be_any_that_the_kernels_take(load):
    """TensorFlow Serving feeds its half_plus_two, declared as [-1, 1], a vector."""
    graph = load("example_models:centered")
    assert one(graph, np.array([1, 3], np.float32)).tolist() == [-1, 1]


def test_a_second_restore_brings_back_the_first_values(adder):
    add(adder, 5)
    adder.restore()
    assert add(adder, 0) == [0]


# -- models side by side -----------------------------------------------------------------------------------------------


def test_models_whose_variables_have_the_same_names_do_not_touch_each_other(load):
    x = np.ones((1, 3), np.float32)
    linear = load("example_models:linear")
    same_names = load("example_models:same_names")
    assert [one(linear, x).tolist(), one(same_names, x).tolist()] == [[[9.5, 11.5]], [[67]]]


def test_one_function_under_two_names_is_two_models(load):
    first, second = load("first=example_models:counter"), load("second=example_models:counter")
    x = np.zeros(1, np.int64)
    assert [one(first, x, signature="count").item() for _ in range(3)] == [1, 2, 3]
    assert one(second, x, signature="count").item() == 1


def test_saved_models_whose_variables_have_the_same_names_keep_their_own(tf, load, tmp_path):
    for name, value in (("half", 0.5), ("double", 2)):
        with tf.Graph().as_default(), tf.Session() as session:
            x, factor = tf.placeholder(tf.float32, [None]), tf.get_variable("factor", initializer=float(value))
            y = x * factor
            session.run(factor.initializer)
            tf.saved_model.simple_save(session, str(tmp_path / name), {"x": x}, {"y": y})
    half, double = load(tmp_path / "half"), load(tmp_path / "double")
    assert [one(half, np.array([6], np.float32)).item(), one(double, np.array([6], np.float32)).item()] == [3, 12]


def test_the_container_of_each_resource_is_its_model_also_inside_functions(tf, models):
    for name in ("affine", "words", "picture"):
        definition = Graph(tf, model_source(f"{name}={models[name]}")).graph.as_graph_def()
        nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
        containers = {node.attr["container"].s for node in nodes if "container" in node.attr}
        assert containers == {name.encode().hex().encode()}


@pytest.mark.parametrize("name", ["a.b", "a-b", "a_b", "_", "Übung", "a/b"])
def test_a_model_may_have_any_name(load, name):
    source = model_source("example_models:counter")._replace(name=name)
    graph = load(source)
    assert one(graph, np.zeros(1, np.int64), signature="count").item() == 1


# -- devices -----------------------------------------------------------------------------------------------------------


def test_devices_of_the_machine_that_saved_a_model_do_not_matter(load, models, tmp_path):
    from tensorflow.core.protobuf import saved_model_pb2

    folder = shutil.copytree(os.path.join(models["affine"], "1"), tmp_path / "affine")
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for meta_graph in saved.meta_graphs:
        library = meta_graph.graph_def.library.function
        for node in [*meta_graph.graph_def.node, *(node for function in library for node in function.node_def)]:
            node.device = "/job:trainer/replica:0/task:3/device:GPU:1"
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
    graph = load(str(folder))
    assert one(graph, np.array([[3, 5]], np.float32)).tolist() == [[1]]
    definition = graph.graph.as_graph_def()
    devices = {node.device for node in definition.node}
    devices |= {node.device for function in definition.library.function for node in function.node_def}
    assert devices <= {"", "/job:ps/task:0"}


# -- which signatures change state -------------------------------------------------------------------------------------


def variable(tf):
    return tf.get_variable("v", [3], tf.float32, tf.zeros_initializer())


def reads(tf):
    return variable(tf).read_value() * 2


def updates(tf):
    return variable(tf).assign_add([1.0, 1, 1])


def updates_first(tf):
    with tf.control_dependencies([variable(tf).assign_add([1.0, 1, 1], read_value=False)]):
        return tf.constant(1)


def updates_in_a_branch(tf):
    v = variable(tf)
    return tf.cond(tf.placeholder(tf.bool, []), lambda: v.assign_add([1.0, 1, 1]).read_value(), lambda: v.read_value())


def updates_in_a_loop(tf):
    v = variable(tf)

    def body(i):
        with tf.control_dependencies([v.assign_add([1.0, 1, 1], read_value=False)]):
            return i + 1

    return tf.while_loop(lambda i: i < 3, body, [0])


def updates_in_a_function(tf):
    import tensorflow

    v = variable(tf)
    inner = tensorflow.function(lambda: v.assign_add([1.0, 1, 1]).read_value())
    return tensorflow.function(lambda: inner())()


def updates_some_rows(tf):
    return variable(tf).scatter_update(tf.IndexedSlices([1.0], [0]))


def trains(tf):
    v = variable(tf)
    return tf.train.AdamOptimizer().minimize(tf.reduce_sum(v * v))


def inserts_into_a_table(tf):
    import tensorflow

    table = tensorflow.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    with tf.control_dependencies([table.insert(tf.constant(["a"]), tf.constant([1], tf.int64))]):
        return tf.constant(1)


def looks_up_in_a_table(tf):
    import tensorflow

    return tensorflow.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1).lookup(tf.constant(["a"]))


def takes_from_a_queue(tf):
    return tf.FIFOQueue(3, [tf.float32]).dequeue()


def is_beside_an_update(tf):
    updates(tf)
    return tf.constant(1)


def scatters_into_a_new_tensor(tf):
    return tf.scatter_nd([[1]], [1.0], [3]) + tf.tensor_scatter_nd_update(tf.zeros([3]), [[0]], [1.0])


def loops_over_rows(tf):
    return tf.map_fn(lambda row: row * 2, tf.placeholder(tf.float32, [None, 3]))


def gathers_a_list_in_a_loop(tf):
    x = tf.placeholder(tf.float32, [])
    y = tf.while_loop(lambda y: y < 100, lambda y: y * x, [x])
    return tf.gradients(y, x)[0]


def counts_bits(tf):
    import tensorflow

    return tensorflow.raw_ops.PopulationCount(x=tf.placeholder(tf.uint8, [None]))


def draws_random_numbers(tf):
    return tf.random.uniform([3])


def draws_from_a_generator(tf):
    import tensorflow

    return tensorflow.random.Generator.from_seed(1).uniform([3])


@pytest.mark.parametrize("build", [
    updates, updates_first, updates_in_a_branch, updates_in_a_loop, updates_in_a_function, updates_some_rows, trains,
    inserts_into_a_table, takes_from_a_queue, draws_from_a_generator], ids=lambda build: build.__name__)
def test_what_changes_state_is_known(tf, build):
    assert changes(tf, build)


@pytest.mark.parametrize("build", [
    reads, looks_up_in_a_table, is_beside_an_update, scatters_into_a_new_tensor, loops_over_rows, gathers_a_list_in_a_loop,
    counts_bits, draws_random_numbers], ids=lambda build: build.__name__)
def test_what_only_computes_is_known(tf, build):
    assert not changes(tf, build)


def changes(tf, build) -> bool:
    with tf.Graph().as_default() as graph:
        output = build(tf)
        return any(map(STATE_CHANGING.fullmatch, operation_types(graph.as_graph_def(), [output.name])))


def test_signatures_of_one_model_are_told_apart_by_what_they_change(load):
    signatures = load("example_models:counter").signatures
    assert {name: signature.writes for name, signature in signatures.items()} == {"count": True, "read": False}


@pytest.mark.parametrize("name", ["words", "affine", "picture", "linear", "several", "echo"])
def test_no_signature_of_a_model_that_only_computes_counts_as_changing(load, models, name):
    assert not any(signature.writes for signature in load(models[name]).signatures.values())


def test_warming_up_changes_no_state(load):
    graph = load("example_models:counter")
    graph.describe(8)
    graph.warm_up()
    assert one(graph, np.zeros(1, np.int64), signature="read").item() == 0


# -- which signatures are batched --------------------------------------------------------------------------------------


@pytest.mark.parametrize(["name", "batched"], [
    ("words", {"serving_default", "back", "upper"}), ("affine", {"double"}), ("several", {"serving_default"}),
    ("centered", set()), ("scalar", set()), ("fixed", set()), ("picture", set()), ("counter", set()), ("echo", set())])
def test_a_signature_is_batched_only_if_each_row_is_answered_as_if_alone(load, models, name, batched):
    signatures = load(models[name]).describe(64).signatures
    assert {name for name, signature in signatures.items() if signature.batched} >= batched
    if not batched:
        assert not any(signature.batched for signature in signatures.values())


def test_adds_are_batched_although_they_change_the_sum(adder):
    signature = adder.describe(64).signatures["serving_default"]
    assert signature.batched and signature.writes


def test_finding_out_what_can_be_batched_adds_nothing(adder):
    adder.describe(64)
    assert add(adder, 0) == [0]


def test_a_model_is_not_batched_beyond_what_was_tried(load):
    """With --max-batch 1 nothing can be told from a run of several rows, and nothing needs to be."""
    graph = load("example_models:several")
    graph.describe(1)
    assert one(graph, np.array([2]), np.array([[1, 2]], np.float32)).tolist() == [3]


def test_a_signature_that_calls_python_is_known(tf):
    with tf.Graph().as_default() as graph:
        output = tf.numpy_function(lambda: np.float32(1), [], tf.float32)
        types = operation_types(graph.as_graph_def(), [output.name])
    assert any(map(PYTHON_FUNCTION.fullmatch, types))


def test_a_variable_may_be_an_output_itself(load):
    w, y = load("example_models:bare").run("serving_default", [np.array([1.0], np.float32)])
    assert (w.tolist(), y.tolist()) == ([1.0, 2.0], [2.0])
