"""Models as people have them: what is initialized in which order, what is no array, checkpoints, frozen graphs, Keras,
formats; with TensorFlow in this process."""

import os
import subprocess
import sys

import example_models
import numpy as np
import pytest
from conftest import one

from shared_graph.errors import InvalidRequest, ModelError
from shared_graph.graph import Graph
from shared_graph.merging import find_batchable
from shared_graph.model_source import ModelSource
from shared_graph.options import Options
from shared_graph.rest_api import find_signature

# -- what is initialized, in which order, and what is not --------------------------------------------------------------


def made_from_others(tf):
    """A local variable made from a global one, and a table made from both."""
    x = tf.placeholder(tf.int64, [None], name="x")
    w = tf.get_variable("w", initializer=np.int64([10, 20]))
    local = tf.get_local_variable("local", initializer=lambda: w.read_value() + 1, use_resource=True)
    entries = tf.lookup.KeyValueTensorInitializer(w.read_value(), local.read_value())
    return {
        "serving_default": ({"x": x}, {"y": tf.lookup.StaticHashTable(entries, 0).lookup(x) + 0 * (w[0] + local[0])})
    }


def test_variables_are_initialized_first_then_local_ones_then_tables_and_saved_weights_count(tf, load):
    for _ in range(5):
        assert one(load("test_real_models:made_from_others"), np.int64([10, 20, 30])) == [11, 21, 0]
    source = ModelSource("anew", 1, function="test_real_models:made_from_others")
    graph = load(source, restore=False)
    graph.restore({"w": np.int64([7, 8])})
    assert one(graph, np.int64([7, 8, 10])) == [8, 9, 0]


def without_initializer(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    with tf.variable_scope("lost", use_resource=True):
        w = tf.get_variable("w", [], collections=[])
    return {"serving_default": ({"x": x}, {"y": tf.function(lambda: x * w)()})}


def reference_without_initializer(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    with tf.variable_scope("lost", use_resource=False):
        w = tf.get_variable("w", [], collections=[])
    return {"serving_default": ({"x": x}, {"y": x * w})}


def never_started(tf):
    x = tf.placeholder(tf.int64, [None], name="x")
    iterator = tf.data.make_initializable_iterator(tf.data.Dataset.range(3))
    return {"serving_default": ({"x": x}, {"y": x + iterator.get_next()})}


def started(tf):
    x = tf.placeholder(tf.int64, [None], name="x")
    iterator = tf.data.make_initializable_iterator(tf.data.Dataset.range(5, 7))
    tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
    return {"serving_default": ({"x": x}, {"y": x + iterator.get_next()})}


def imported_table(tf):
    """Of a graph that is imported: an initializer of a table is in none of its collections."""
    with tf.Graph().as_default() as frozen:
        word = tf.placeholder(tf.string, [None], name="word")
        entries = tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([1, 2], tf.int64), name="fill")
        tf.identity(tf.lookup.StaticHashTable(entries, -1, name="words").lookup(word), name="number")
    word, number, filled = tf.import_graph_def(
        frozen.as_graph_def(), return_elements=["word:0", "number:0", "fill/LookupTableImportV2"], name=""
    )
    tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, filled)
    return {"serving_default": ({"word": word}, {"number": number})}


def test_a_table_in_a_graph_that_is_imported_is_filled_by_what_is_in_the_collection(load):
    assert one(load("test_real_models:imported_table"), np.array([b"a", b"b", b"c"], object)) == [1, 2, -1]


@pytest.mark.parametrize(
    ["function", "name"],
    [
        ("without_initializer", "'lost/w'"),
        ("reference_without_initializer", "'lost/w'"),
        ("never_started", "'IteratorV2'"),
    ],
)
def test_what_an_output_needs_and_nothing_initializes_is_named(load, function, name):
    with pytest.raises(ModelError, match=f"^nothing initializes {name}, which an output needs$"):
        load(f"test_real_models:{function}")


def test_so_it_is_in_a_saved_model_too(tf, load, tmp_path):
    for name, function in (("lost", without_initializer), ("never", never_started), ("well", started)):
        with tf.Graph().as_default(), tf.Session() as session:
            signatures = function(tf)
            session.run([v.initializer for v in tf.global_variables()])
            example_models.write(tf, session, str(tmp_path / name), signatures)
    with pytest.raises(ModelError, match=r"^nothing initializes 'lost/w'"):
        load(str(tmp_path / "lost"))
    with pytest.raises(ModelError, match=r"^nothing initializes 'IteratorV2'"):
        load(str(tmp_path / "never"))
    for graph in (load(str(tmp_path / "well")), load("test_real_models:started")):
        assert one(graph, np.int64([1])) == [6]


def shapeless(tf):
    """Variables whose shapes are not known before they have values, of both kinds."""
    x = tf.placeholder(tf.float32, [None], name="x")
    y = x
    for kind, is_resource in (("resource", True), ("reference", False)):
        with tf.variable_scope(kind, use_resource=is_resource):
            first = tf.placeholder_with_default([1.0, 2.0], None)
            w = tf.get_variable("w", initializer=first, validate_shape=False, dtype=tf.float32)
        y = y * tf.reduce_sum(w)
    return {"serving_default": ({"x": x}, {"y": y})}


def test_variables_of_unknown_shape_are_loaded_saved_set_and_given_back(tf, load, tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        signatures = shapeless(tf)
        session.run(tf.global_variables_initializer())
        example_models.write(tf, session, str(tmp_path / "saved"), signatures)
    for source in ("test_real_models:shapeless", str(tmp_path / "saved")):
        graph = load(source)
        assert one(graph, np.float32([2])) == [18]
        weights = graph.variables.get_weights()
        assert {name: value.tolist() for name, value in weights.items()} == {
            "reference/w": [1, 2],
            "resource/w": [1, 2],
        }
        graph.variables.set_weights({"reference/w": np.float32([1, 1, 1])})
        assert graph.variables.get_flat().tolist() == [1, 1, 1, 1, 2] and graph.variables.get_flat_size() == 5
        graph.variables.set_flat(np.arange(5))
        assert one(graph, np.float32([2])) == [2 * 3 * 7]
        graph.free()
        graph = load(source, restore=False)  # as after a restart
        graph.restore(weights)
        assert one(graph, np.float32([2])) == [18]
        graph.free()


# -- what is no array --------------------------------------------------------------------------------------------------


def strange_sides(tf, kind: str):
    """A tensor of this kind as an input and as an output."""
    if kind == "SparseTensor":
        return tf.sparse_placeholder(tf.float32), tf.sparse.from_dense([[1.0, 0.0]])
    if kind == "RaggedTensor":
        return tf.ragged.placeholder(tf.float32, 1), tf.ragged.constant([[1.0], []])
    x = tf.placeholder(tf.as_dtype(kind), [None])
    return x, tf.identity(x)


STRANGE = ["SparseTensor", "RaggedTensor", "quint8", "qint32"]


def strange(tf):
    """A signature for each side of each kind, and one that is well."""
    x = tf.placeholder(tf.float32, [None], name="x")
    signatures = {"serving_default": ({"x": x}, {"y": 2 * x})}
    for kind in STRANGE:
        given, made = strange_sides(tf, kind)
        signatures |= {f"{kind} input": ({"s": given}, {"y": x}), f"{kind} output": ({"x": x}, {"s": made})}
    return signatures


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", STRANGE)
def test_a_saved_model_with_a_tensor_that_is_no_array_is_served_but_for_that_signature(
    tf, load, strange_saved, kind, side
):
    graph = strange_saved
    assert one(graph, np.float32([1])) == [2]
    signature = graph.signatures[f"{kind} {side}"]
    what = {"SparseTensor": "a SparseTensor", "RaggedTensor": "a composite tensor"}.get(kind, f"of type {kind}")
    assert signature.refusal.startswith(f"Signature '{kind} {side}' cannot be served: its {side} 's' is {what}")
    info = graph.metadata()["signature_def"]["signature_def"][f"{kind} {side}"][f"{side}s"]["s"]
    assert {"SparseTensor": "coo_sparse", "RaggedTensor": "composite_tensor"}.get(kind, "name") in info
    with pytest.raises(InvalidRequest, match=r"its .* 's' is"):
        find_signature(graph.signatures, signature.name)
    assert find_batchable(graph, Options()) == (("serving_default",), ())


@pytest.fixture(scope="module")
def strange_saved(tf, address, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("strange") / "saved")
    with tf.Graph().as_default(), tf.Session() as session:
        infos = {
            name: [{key: tf.saved_model.build_tensor_info(value) for key, value in side.items()} for side in sides]
            for name, sides in strange(tf).items()
        }
        definitions = {name: tf.saved_model.build_signature_def(*sides) for name, sides in infos.items()}
        builder = tf.saved_model.Builder(folder)
        builder.add_meta_graph_and_variables(session, ["serve"], definitions)
        builder.save()
    graph = Graph(tf, Options(model=folder).model[0])
    graph.connect([address], Options())
    graph.restore({})
    return graph


def test_a_signature_that_names_a_variable_and_not_its_value_takes_no_other_along(tf, load, tmp_path):
    folder = str(tmp_path / "saved")
    with tf.Graph().as_default(), tf.Session() as session:
        x, n = tf.placeholder(tf.float32, [None]), tf.get_variable("n", initializer=1, use_resource=True)
        session.run(n.initializer)
        there = tf.saved_model.predict_signature_def({"x": x}, {"y": 2 * x + tf.cast(n, tf.float32)})
        look = tf.saved_model.build_signature_def({}, {"n": tf.saved_model.build_tensor_info(n)})
        builder = tf.saved_model.Builder(folder)
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": there, "look": look})
        builder.save()
    graph = load(folder)
    assert one(graph, np.float32([1])) == [3]
    assert graph.signatures["look"].refusal.endswith("its output 'n' is of no type that has arrays")


def sparse_input(tf):
    return {"serving_default": ({"s": tf.sparse_placeholder(tf.float32)}, {"y": tf.constant(1)})}


def ragged_output(tf):
    return {"serving_default": ({}, {"r": tf.ragged.constant([[1.0], []])})}


def no_tensor(tf):
    return {"serving_default": ({}, {"y": object()})}


def no_dict(tf):
    return [tf.constant(1)]


def no_name(tf):
    return {"serving_default": (tf.constant([1.0]), {"y": tf.constant([1.0])})}


def one_side(tf):
    return {"serving_default": {"y": tf.constant([1.0])}}


def no_signature(tf):
    return {}


def empty_iterator(tf):
    return next(iter([]))


def leaves(tf):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ["function", "why"],
    [
        (
            "sparse_input",
            "^signature 'serving_default': input 's' is a SparseTensor; give its indices, values and dense",
        ),
        ("ragged_output", "^signature 'serving_default': output 'r' is a RaggedTensor; give its flat_values and row_"),
        ("no_tensor", "^signature 'serving_default': output 'y' is no tensor: "),
        ("no_name", r"^no_name returned .*, not a dict of signatures: \(inputs, outputs\), both dicts$"),
        ("one_side", "^one_side returned .*, not a dict of signatures"),
        ("no_signature", "^no_signature returned {}, not a dict of signatures"),
        ("no_dict", r"^no_dict returned \[<tf.Tensor.*, not a dict of signatures"),
    ],
)
def test_a_function_that_gives_what_is_no_array_is_refused_by_name(load, function, why):
    with pytest.raises(ModelError, match=why) as caught:
        load(f"test_real_models:{function}")
    assert "\n" not in str(caught.value)


def complex_numbers(tf):
    x = tf.placeholder(tf.complex64, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": x * x})}


def test_complex_numbers_are_arrays(load):
    graph = load("test_real_models:complex_numbers")
    assert one(graph, np.complex64([1j, 2])) == [-1, 4]


# -- what people have beside SavedModels -------------------------------------------------------------------------------


def from_checkpoint(tf):
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", [2], initializer=tf.zeros_initializer())
    tf.train.init_from_checkpoint(os.environ["TEST_CHECKPOINT"], {"/": "/"})
    return {"serving_default": ({"x": x}, {"y": x * tf.reduce_sum(w)})}


def test_weights_come_from_a_checkpoint_of_tensorflow_1_until_others_are_set(tf, load, tmp_path, monkeypatch):
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(tf.get_variable("w", initializer=[3.0, 4.0]).initializer)
        monkeypatch.setenv("TEST_CHECKPOINT", tf.train.Saver().save(session, str(tmp_path / "model.ckpt")))
    graph = load("test_real_models:from_checkpoint")
    assert one(graph, np.float32([2])) == [14]
    graph.restore({"w": np.float32([1, 1])})  # as after a restart, what was set
    assert one(graph, np.float32([2])) == [4]


def frozen(tf):
    definition = tf.GraphDef()
    with open(os.environ["TEST_FROZEN"], "rb") as file:
        definition.ParseFromString(file.read())
    x, y = tf.import_graph_def(definition, return_elements=["x:0", "y:0"], name="")
    return {"serving_default": ({"x": x}, {"y": y})}


def test_a_frozen_graph_is_served_by_a_function_that_imports_it(tf, load, tmp_path, monkeypatch):
    with tf.Graph().as_default() as graph:
        tf.multiply(tf.placeholder(tf.float32, [None], name="x"), [3.0], name="y")
    (tmp_path / "frozen.pb").write_bytes(graph.as_graph_def().SerializeToString())
    monkeypatch.setenv("TEST_FROZEN", str(tmp_path / "frozen.pb"))
    graph = load("test_real_models:frozen")
    assert one(graph, np.float32([1, 2])) == [3, 6] and find_batchable(graph, Options()).batchable


def keras_network():
    import keras

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1), keras.layers.Dropout(0.5)])


def keras_loaded(tf):
    import keras

    return predicted(tf, keras.models.load_model(os.environ["TEST_KERAS"]))


def keras_weights(tf):
    model = keras_network()
    model.set_weights([np.ones((4, 1)), np.ones(1)])
    return predicted(tf, model)


def keras_tensors(tf):
    model = keras_network()
    return {"serving_default": ({"x": model.inputs[0]}, {"y": model.outputs[0]})}


def keras_untrained(tf):
    """Its weights are to be set."""
    return predicted(tf, keras_network())


def predicted(tf, model):
    x = tf.placeholder(tf.float32, [None, 4], name="x")
    return {"serving_default": ({"x": x}, {"y": model(x)})}


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("function", ["keras_loaded", "keras_weights", "keras_tensors"])
def test_a_keras_model_whose_weights_would_be_lost_is_refused_with_what_to_do(
    load, tmp_path, monkeypatch, function, suffix
):
    monkeypatch.setenv("TEST_KERAS", str(tmp_path / f"model.{suffix}"))
    if function == "keras_loaded":
        program = "import os, test_real_models; test_real_models.keras_network().save(os.environ['TEST_KERAS'])"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    with pytest.raises(ModelError, match=r"Keras.*model.export\(DIR\)"):
        load(f"test_real_models:{function}")


def test_a_keras_model_without_loaded_weights_is_served_with_those_that_are_set(load):
    graph = load("test_real_models:keras_untrained")
    graph.variables.set_weights({name: np.ones_like(w) for name, w in graph.variables.get_weights().items()})
    assert one(graph, np.float32([[1, 2, 3, 4]])) == [[11]]


def test_a_keras_models_variables_have_the_same_names_however_often_a_process_has_built_it(tf):
    graphs = [Graph(tf, Options(model="test_real_models:keras_untrained").model[0]) for _ in range(2)]
    assert [*graphs[0].variables.variables] == [*graphs[1].variables.variables]


# -- which signatures are tried on real rows ---------------------------------------------------------------------------


def with_a_format(tf):
    """Rows that random words are not, with and without a change, and a call."""
    x = tf.placeholder(tf.string, [None], name="x")
    y = tf.io.decode_json_example(x)
    count = tf.get_variable("count", [], initializer=tf.zeros_initializer())
    with tf.control_dependencies([count.assign_add(1.0)]):
        counted = tf.identity(y)
    return {
        "json": ({"x": x}, {"y": y}),
        "images": ({"x": x}, {"y": tf.map_fn(tf.io.decode_png, x, tf.uint8)}),
        "base64": ({"x": x}, {"y": tf.io.decode_base64(x)}),
        "numbers": ({"x": x}, {"y": tf.strings.to_number(x)}),
        "joined": ({"x": x}, {"y": tf.fill(tf.shape(x), tf.strings.reduce_join(x))}),
        "writes": ({"x": x}, {"y": counted}),
        "calls": ({"x": x}, {"y": tf.numpy_function(lambda x: x, [y], tf.string)}),
    }


@pytest.mark.parametrize("exact", [False, True])
def test_signatures_that_refuse_random_rows_are_tried_on_real_ones_unless_they_write_or_call_out(load, exact):
    verdict = find_batchable(load("test_real_models:with_a_format"), Options(exact=exact))
    assert verdict == ((), ("base64", "images", "json", "numbers"))


# -- memory ------------------------------------------------------------------------------------------------------------


def without_kernel(tf):
    """There is an operation of this name, but nothing that runs it any more."""
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=[1.0])
    [buckets] = tf.raw_ops.BoostedTreesBucketize(float_values=[x], bucket_boundaries=[w])
    return {"serving_default": ({"x": x}, {"y": buckets})}


def test_the_memory_of_a_graph_that_cannot_run_is_given_back(tf, load, address):
    with pytest.raises(tf.errors.InvalidArgumentError, match="No OpKernel was registered"):
        load("test_real_models:without_kernel")
    graph = Graph(tf, Options(model="test_real_models:without_kernel").model[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="No OpKernel was registered"):
        graph.connect([address], Options())
    graph.free()
