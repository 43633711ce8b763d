"""What is restored of a SavedModel, and that all answers are those of TensorFlow's own loader."""

import example_models
import numpy as np
import pytest
from conftest import real_models
from tensorflow.python.saved_model import loader_impl

from shared_graph.errors import ModelError
from shared_graph.graph import Graph
from shared_graph.graph_definition import nodes_behind
from shared_graph.merging import sample_rows
from shared_graph.saved_variables import ASSIGN, restore_only_needed


def save(tf, folder: str, build, **how) -> str:
    """TF1: what ``build`` makes, signatures as a function of one's own has them, and perhaps what runs at the start."""
    with tf.Graph().as_default(), tf.Session() as session:
        signatures, main_op = build(tf, **how)
        session.run(tf.global_variables_initializer())
        definitions = {name: tf.saved_model.predict_signature_def(*sides) for name, sides in signatures.items()}
        builder = tf.saved_model.Builder(folder)
        builder.add_meta_graph_and_variables(session, ["serve"], definitions, main_op=main_op)
        builder.save()
    return folder


def variable(tf, name: str, values, is_resource: bool = True):
    return tf.get_variable(name, initializer=np.float32(values), use_resource=is_resource)


def trained(tf, is_resource: bool, with_training: bool = False):
    x = tf.placeholder(tf.float32, [None, 2], name="x")
    y = tf.matmul(x, variable(tf, "w", [[2], [3]], is_resource)) + variable(tf, "b", [5], is_resource)
    train = tf.train.AdamOptimizer(0.1).minimize(tf.reduce_mean(y**2))
    with tf.control_dependencies([train]):
        done = tf.identity(x)
    train = {"train": ({"x": x}, {"done": done})} if with_training else {}
    return {"serving_default": ({"x": x}, {"y": y})} | train, None


def of_other_names(tf, is_resource: bool):
    """A variable with two handles, of which one is restored and the other one read; and one in parts."""
    x = tf.placeholder(tf.float32, [None], name="x")
    variable(tf, "shared", 7)
    again = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name="shared", container="")
    parts = tf.get_variable("parts", [4], initializer=tf.ones_initializer(), partitioner=tf.fixed_size_partitioner(2))
    variable(tf, "unneeded", [1, 2], is_resource)
    y = x * tf.raw_ops.ReadVariableOp(resource=again, dtype=tf.float32) + tf.reduce_sum(parts)
    return {"serving_default": ({"x": x}, {"y": y})}, None


def made_at_the_start(tf, is_resource: bool):
    x = tf.placeholder(tf.float32, [None], name="x")
    first, later = variable(tf, "first", 3, is_resource), variable(tf, "later", 0, is_resource)
    variable(tf, "unneeded", 4, is_resource)
    return {"serving_default": ({"x": x}, {"y": x * later})}, tf.group(later.assign(2 * first))


def restored(tf, folder: str) -> set[str]:
    """The names of variables that a SavedModel's restore assigns to, once what nothing needs is left out."""
    meta_graph = loader_impl.SavedModelLoader(folder).get_meta_graph_def_from_tags(["serve"])
    restore_only_needed(tf, meta_graph)
    nodes, found = nodes_behind(meta_graph.graph_def, [meta_graph.saver_def.restore_op_name]), set()
    for node in nodes:
        called = node.attr["f"].func.name if "f" in node.attr else None
        for function in (f for f in meta_graph.graph_def.library.function if f.signature.name == called):
            arguments = dict(zip((argument.name for argument in function.signature.input_arg), node.input))
            found |= {arguments[inner.input[0]] for inner in function.node_def if inner.op in ASSIGN}
    return found | {node.input[0] for node in nodes if node.op in ASSIGN}


def check_answers(tf, load, folder: str) -> Graph:
    """Those of a graph are TensorFlow's own, to the last bit."""
    graph = load(folder)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.saved_model.load(session, ["serve"], graph.source.folder)
        for name, signature in graph.signatures.items():
            if signature.refusal is None and not signature.mutates_state:
                definition, feed = graph._definitions[name], sample_rows(signature, 3)
                fed = dict(zip([definition.inputs[key].name for key in sorted(definition.inputs)], feed))
                try:
                    expected = session.run([definition.outputs[key].name for key in sorted(definition.outputs)], fed)
                except tf.errors.InvalidArgumentError:  # random words are no serialized examples
                    with pytest.raises(ModelError):
                        graph.run(name, feed)
                    continue
                except ValueError:  # session.run feeds no other shape than the placeholder's, whatever is declared
                    continue
                for output, wanted in zip(graph.run(name, feed), expected, strict=True):
                    assert output.tolist() == wanted.tolist(), (folder, name)
    return graph


@pytest.mark.parametrize("is_resource", [True, False])
@pytest.mark.parametrize(
    "build, expected",
    [
        (trained, {"w", "b"}),
        (of_other_names, {"shared", "parts/part_0", "parts/part_1"}),
        (made_at_the_start, {"first", "later"}),
    ],
)
def test_variables_that_neither_a_signature_nor_the_start_needs_are_not_restored(
    tf, load, tmp_path, build, expected, is_resource
):
    folder = save(tf, str(tmp_path / "saved"), build, is_resource=is_resource)
    assert restored(tf, folder) == expected
    check_answers(tf, load, folder)


@pytest.mark.parametrize("is_resource", [True, False])
def test_what_a_training_signature_needs_is_restored(tf, load, tmp_path, is_resource):
    folder = save(tf, str(tmp_path / "saved"), trained, is_resource=is_resource, with_training=True)
    assert {"w", "b", "w/Adam", "w/Adam_1", "b/Adam", "beta1_power"} <= restored(tf, folder)
    graph = check_answers(tf, load, folder)
    before = graph.variables.get_weights()
    graph.run("train", [np.float32([[1, 1]])])
    assert not np.array_equal(graph.variables.get_weights()["w"], before["w"])


def test_of_a_keras_model_each_variable_is_restored_once(tf, load, models):
    graph = check_answers(tf, load, models["picture"])
    there = {operation.name for operation in graph.variables.operations}
    assert restored(tf, graph.source.folder) == there
    assert len([o for o in graph.graph.get_operations() if o.type == "VarHandleOp"]) >= 2 * len(there)  # each twice


def test_the_answers_of_all_models_are_tensorflows_own(tf, load, models):
    estimator = {name: folder for name, folder in real_models("more_models").items() if name == "estimator_taxi"}
    saved = {name: models[name] for name in example_models.SAVED}
    for folder in (saved | real_models() | estimator).values():
        check_answers(tf, load, folder)


@pytest.mark.parametrize("change", ["a name read elsewhere", "a value used elsewhere", "an assignment used elsewhere"])
def test_what_is_not_as_tensorflow_makes_it_stays_and_is_still_right(tf, load, tmp_path, change):
    folder = save(tf, str(tmp_path / "saved"), trained, is_resource=False)
    loader = loader_impl.SavedModelLoader(folder)
    nodes = {node.name: node for node in loader.get_meta_graph_def_from_tags(["serve"]).graph_def.node}
    adam = next(n for n in nodes.values() if n.op == "Assign" and n.input[0] == "w/Adam" and "save" in n.name)
    source = {
        "a name read elsewhere": "save/RestoreV2/tensor_names",
        "a value used elsewhere": adam.input[1],
        "an assignment used elsewhere": adam.name,
    }[change]
    graph_def = loader.get_meta_graph_def_from_tags(["serve"]).graph_def
    extra = graph_def.node.add(name="extra", op="Identity", input=[source])
    extra.attr["T"].type = tf.string.as_datatype_enum if "names" in source else tf.float32.as_datatype_enum
    (tmp_path / "saved" / "saved_model.pb").write_bytes(loader.saved_model.SerializeToString())
    assert ("w/Adam" in restored(tf, folder)) == (change == "an assignment used elsewhere")
    check_answers(tf, load, folder)
