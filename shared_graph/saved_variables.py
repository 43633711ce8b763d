"""What a SavedModel restores: only variables that something needs. Keras exports each one twice, and TensorFlow 1 those
of an optimizer as well: memory that would never come back, since TensorFlow keeps it in a pool."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from shared_graph.graph_definition import VARIABLE, node_of, nodes_behind, signature_tensors

AT_START = ("saved_model_main_op", "legacy_init_op")  # collections of what is run then
ASSIGN = ("Assign", "AssignVariableOp")


def restore_only_needed(tf, meta_graph) -> None:
    """Leave out what restores variables that neither a signature nor what runs at the start needs. What is not as
    TensorFlow makes it stays as it is."""
    graph_def, others = meta_graph.graph_def, meta_graph.collection_def
    ends = signature_tensors(meta_graph)
    ends += [name for key in AT_START if key in others for name in others[key].node_list.value]
    functions = {function.signature.name: function for function in graph_def.library.function}
    inside = (node for function in functions.values() for node in function.node_def)
    needed = {resource_name(node) for node in [*nodes_behind(graph_def, ends), *inside] if node.op in VARIABLE}
    variables = [node for node in graph_def.node if node.op in VARIABLE]
    unneeded = {node.name for node in variables if resource_name(node) not in needed}
    restoring = nodes_behind(graph_def, [meta_graph.saver_def.restore_op_name])
    for call in restoring:  # TensorFlow 2 has a function for it
        if "f" in call.attr and (function := functions.get(call.attr["f"].func.name)):
            arguments = zip((argument.name for argument in function.signature.input_arg), call.input)
            left_out = {name for name, tensor in arguments if tensor in unneeded}
            gone = _leave_out(tf, function.node_def, list(function.node_def), left_out)
            for key in [key for key, name in function.control_ret.items() if name in gone]:
                del function.control_ret[key]
                function.signature.control_output.remove(key)
    _leave_out(tf, graph_def.node, restoring, unneeded)


def resource_name(node) -> str:
    return node.attr["shared_name"].s.decode() or node.name


def _leave_out(tf, nodes, restoring: Iterable, unneeded: set[str]) -> set[str]:
    """Of these nodes, some of which restore: what assigns to unneeded variables, and what is read for that. Returns the
    names of nodes that are gone."""
    by_name = {node.name: node for node in restoring}
    uses = collections.Counter(node_of(tensor) for node in nodes for tensor in node.input)
    as_value = collections.Counter(place_of(tensor) for node in nodes for tensor in node.input if tensor[0] != "^")
    gone, unread = set(), set()
    for node in by_name.values():
        if node.op in ASSIGN and node.input[0] in unneeded and not as_value[node.name, 0]:
            gone.add(node.name)
            value = by_name.get(node_of(node.input[1]))
            if value is not None and value.op == "Identity" and uses[value.name] == 1:
                gone.add(value.name)
                unread.add(place_of(value.input[0]))
            else:
                unread.add(place_of(node.input[1]))
    if not gone:
        return gone
    moved = {}
    for node in [node for node in by_name.values() if node.op == "RestoreV2"]:
        dtypes, constants = node.attr["dtypes"].list.type, [by_name.get(node_of(t)) for t in node.input[1:3]]
        read = [i for i in range(len(dtypes)) if (node.name, i) not in unread or as_value[node.name, i] > 1] or [0]
        if len(read) < len(dtypes) and all(c and c.op == "Const" and uses[c.name] == 1 for c in constants):
            for constant in constants:
                array = tf.make_ndarray(constant.attr["value"].tensor)
                constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(array[read]))
            dtypes[:] = [dtypes[i] for i in read]
            for changed in (node, *constants):
                changed.attr.pop("_output_shapes", None)
            moved |= {(node.name, old): str(new) for new, old in enumerate(read)}
    for node in nodes:
        node.input[:] = [with_index(t, moved.get(place_of(t))) for t in node.input if node_of(t) not in gone]
    for i in reversed(range(len(nodes))):
        if nodes[i].name in gone:
            del nodes[i]
    return gone


def place_of(tensor: str) -> tuple[str, int]:
    """The node, and which of its outputs it is."""
    index = tensor.rpartition(":")[2]
    return node_of(tensor), int(index) if ":" in tensor else 0


def with_index(tensor: str, index: str | None) -> str:
    """Another output of the same node; that without an index is the first one, and stays it."""
    return tensor if index is None or tensor[0] == "^" or ":" not in tensor else tensor.rpartition(":")[0] + ":" + index
