"""What is read from a graph's definition, and done to it, before it is run: no session here."""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from shared_graph.errors import ModelError, first_sentence
from shared_graph.models import Signature, TensorSpec

# Operations that change what a later run sees
STATE_CHANGING = re.compile(
    r"Assign\w*|(Resource)?(Sparse)?Apply\w+|ResourceScatter\w+|Scatter(Add|Sub|Mul|Div|Min|Max|Update|Nd\w+)"
    r"|ResourceStridedSliceAssign|(Resource)?CountUpTo|LookupTable(Insert|Import|Remove)\w*|(Queue|Barrier|Stack)\w+"
    r"|(Map)?(Uns|S)tage|Rng\w+|Stateful(Standard|Uniform|Truncated|Random)\w*|Write\w+|(OneShot|MultiDevice)?Iterator(V2)?"
    r"|(Sparse|Resource)?Accumulator\w+|Reader\w+|Save(V2|Slices)?|MergeV2Checkpoints"
)
PYTHON_FUNCTION = re.compile(r"(Eager)?PyFunc(Stateless)?")
VARIABLE = ("VarHandleOp", "VariableV2", "Variable")
ITERATOR = ("Iterator", "IteratorV2")
KERAS = "a Keras model is served by what model.export(DIR) writes: call that, and give the DIR"


def prepare_nodes(meta_graph, container: str) -> None:
    """Make a graph's nodes, those of its functions included, ready to be imported beside other models'."""
    from tensorflow.python.framework import op_def_registry

    inputs = {info.name.partition(":")[0] for d in meta_graph.signature_def.values() for info in d.inputs.values()}
    functions, tables = meta_graph.graph_def.library.function, {}
    for node in itertools.chain(meta_graph.graph_def.node, *(function.node_def for function in functions)):
        node.device = ""  # of the machine that saved it (tensorflow#4011)
        definition = op_def_registry.get(node.op)
        attributes = {attribute.name for attribute in definition.attr} if definition else ()
        if node.name in inputs and node.op in ("Placeholder", "PlaceholderV2"):
            node.attr["shape"].shape.Clear()  # like TensorFlow Serving, we leave the judgement to the kernels
            node.attr["shape"].shape.unknown_rank = True
        if "container" in attributes:  # else equal names in two models would be one variable
            own = node.attr["container"].s
            node.attr["container"].s = container.encode() + (b"/" + own if own else b"")
        shared_name = node.attr["shared_name"].s if "shared_name" in attributes else b""
        if re.fullmatch(rb"hash_table_[0-9a-f-]{36}", shared_name):  # random: else each process had a table of its own
            node.attr["shared_name"].s = tables.setdefault(shared_name, b"hash_table_%d" % len(tables))
        if "use_locking" in attributes:  # else two runs at once lose updates
            node.attr["use_locking"].b = True


def name_python_functions(graph_def, names: list[str] | None) -> list[str]:
    """The tokens by which a graph calls its Python functions, in the order in which it has them; each process numbers
    its own. If ``names`` are given, the graph calls them these from now on; the tokens of before are returned."""
    nodes = [node for node, *_ in nodes_run(graph_def) if PYTHON_FUNCTION.fullmatch(node.op)]
    tokens = list(dict.fromkeys(node.attr["token"].s.decode() for node in nodes))
    if names is not None:
        if len(names) != len(tokens):
            raise ValueError(f"there are {len(tokens)} Python functions in it, and {len(names)} where it runs")
        new = dict(zip(tokens, names))
        for node in nodes:
            node.attr["token"].s = new[node.attr["token"].s.decode()].encode()
    return tokens


def nodes_run(graph_def) -> Iterator[tuple[Any, list[str], str]]:
    """The nodes of a graph and of all functions that are called in it, each with the names that it calls and that of
    the function that it is in; in the same order in each process, which a library and a node's attributes are not."""
    functions = {function.signature.name: function.node_def for function in graph_def.library.function}
    nodes = [(node, "") for node in graph_def.node]
    for node, where in nodes:  # which grow meanwhile
        attributes = [node.attr[key] for key in sorted(node.attr)]
        called = [f.name for attribute in attributes for f in [attribute.func, *attribute.list.func] if f.name]
        for name in [node.op, *called]:
            nodes.extend([(inner, name) for inner in functions.pop(name, ())])
        yield node, called, where


def ingredients(graph_def, definitions: dict[str, Any]) -> list[str]:
    """What a graph and the functions in it are made of, sorted: a hash for each operation, of its attributes (such as
    the value of a constant) and of what its inputs are made of; and one entry for each output of a signature. What
    signatures call their inputs and outputs counts; other names, numbers and orders, which differ from process to
    process as does the order of what a function captures, do not."""
    names, hashes = {function.signature.name for function in graph_def.library.function}, {}
    roles = collections.defaultdict(list)
    for signature, definition in definitions.items():
        for key, info in sorted(definition.inputs.items()):
            roles[info.name.partition(":")[0]].append((signature, key))

    def made_of(tensor: str, where: str) -> str:  # made before, but for a function's arguments and what closes a loop
        name, _, output = tensor.partition(":")
        made, by_call = hashes.get((where, name), ("", False))
        return f"{made} {'' if by_call else output}"

    for node, called, where in nodes_run(graph_def):
        is_call = bool(called) or node.op in names
        inputs = [f"{source[0] == '^'} {made_of(source.removeprefix('^'), where)}" for source in node.input]
        ordered = [] if is_call else [data for data, source in zip(inputs, node.input) if source[0] != "^"]
        attributes = {} if is_call else {key: a for key, a in node.attr.items() if key[0] != "_" and key != "token"}
        plain = sorted((key, attribute.SerializeToString(deterministic=True)) for key, attribute in attributes.items())
        kind, role = "a function" if node.op in names else node.op, "" if where else roles.get(node.name)
        parts = f"{kind} {role} {plain} {ordered} {sorted(inputs)}"
        hashes[where, node.name] = hashlib.sha256(parts.encode()).hexdigest(), is_call
    outputs = [f"{n} {key} {made_of(info.name, '')}" for n, d in definitions.items() for key, info in d.outputs.items()]
    return sorted([*(made for made, _ in hashes.values()), *outputs])


def operations_behind(operations: list) -> set:
    """These operations and all that they depend on."""
    seen, stack = set(), list(operations)
    while stack:
        operation = stack.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            stack.extend([*(tensor.op for tensor in operation.inputs), *operation.control_inputs])
    return seen


def check_signatures(name: str, returned: Any) -> None:
    """Raises ModelError unless it is what a model's function has to return."""
    pairs = list(returned.values()) if isinstance(returned, dict) else []
    are_sides = [isinstance(pair, (tuple, list)) and [isinstance(side, dict) for side in pair] for pair in pairs]
    if not pairs or any(kinds != [True, True] for kinds in are_sides):
        raise ModelError(f"{name} returned {returned!r:.100}, not a dict of signatures: (inputs, outputs), both dicts")


def tensor_info(tf, what: str, value):
    """Of a variable: its value."""
    kind = type(value).__name__
    if kind in ("SparseTensor", "SparseTensorValue"):
        raise ModelError(f"{what} is a SparseTensor; give its indices, values and dense_shape")
    if kind == "KerasTensor":
        raise ModelError(f"{what} is Keras's: {KERAS}")
    if "RaggedTensor" in kind:
        raise ModelError(f"{what} is a RaggedTensor; give its flat_values and row_splits, or to_tensor() of it")
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{what} is no tensor: {first_sentence(error)}") from None
    return tf.saved_model.build_tensor_info(tensor)


def check_keras(graph, initializers: list) -> None:
    """Raises ModelError where Keras has loaded weights, which it does by operations that nobody runs."""
    run = operations_behind(initializers)
    for operation in graph.get_operations():
        if STATE_CHANGING.fullmatch(operation.type) and operation not in run:
            keras = {frame.name for frame in operation.traceback or () if re.search(r"/(tf_)?keras/", frame.filename)}
            if keras & {"load_model", "load_weights", "set_weights"}:
                raise ModelError(f"it has a Keras model whose weights would not be the loaded ones; {KERAS}")


def describe_signature(
    tf, graph, graph_def, name: str, definition, atomic: bool, is_saved: bool
) -> tuple[Signature, list, list]:
    """A signature, and the tensors that are fed and fetched, in the order of their sorted names. One that cannot be
    run from here has the reason as its ``refusal``, and no tensors."""
    sides = ("input", definition.inputs), ("output", definition.outputs)
    signature = Signature(name, {}, {}, definition.method_name, mutates_state=False, runs_python=False)
    for side, infos in sides:
        for key, info in sorted(infos.items()):
            if why := strange_tensor(tf, graph, info):
                signature.refusal = f"Signature {name!r} cannot be served: its {side} {key!r} {why}"
                return signature, [], []
    feeds, fetches = ({key: tensor_of(graph, infos[key]) for key in sorted(infos)} for _, infos in sides)
    if len({tensor.name for tensor in feeds.values()}) < len(feeds):
        signature.refusal = f"Signature {name!r} cannot be served: two of its inputs are one tensor"
        return signature, [], []
    part = tf.graph_util.extract_sub_graph(graph_def, [tensor.op.name for tensor in fetches.values()])
    types = {node.op for node, *_ in nodes_run(part)}
    calls_python = any(map(PYTHON_FUNCTION.fullmatch, types))
    if calls_python and is_saved:  # by a token, which in this process is another function's, such as the adder's
        signature.refusal = f"Signature {name!r} cannot be served: it calls a Python function, which no SavedModel has"
        return signature, [], []
    signature.inputs = {key: tensor_spec(tensor, definition.inputs[key]) for key, tensor in feeds.items()}
    signature.outputs = {key: tensor_spec(tensor, definition.outputs[key]) for key, tensor in fetches.items()}
    signature.mutates_state = any(map(STATE_CHANGING.fullmatch, types))
    signature.runs_python = not atomic and calls_python
    return signature, list(feeds.values()), list(fetches.values())


def metadata_of(definitions: dict[str, Any]) -> dict[str, Any]:
    """Of SignatureDefs, as TensorFlow Serving shows them; the same in each process, which a map's order is not."""
    from google.protobuf import json_format

    how = {"always_print_fields_with_no_presence": True, "preserving_proto_field_name": True}
    shown = {name: json_format.MessageToDict(definition, **how) for name, definition in definitions.items()}
    for definition in shown.values():
        for kind in {"inputs", "outputs", "defaults"} & definition.keys():
            definition[kind] = dict(sorted(definition[kind].items()))
    return {"signature_def": {"signature_def": shown}}


def tensor_of(graph, info):
    """Raises KeyError when it is not there."""
    return graph.get_tensor_by_name(info.name if ":" in info.name else f"{info.name}:0")


def strange_tensor(tf, graph, info) -> str | None:
    """Why a tensor cannot be given or taken as an array of numbers, strings or truth values; None if it can."""
    kinds = {"coo_sparse": "is a SparseTensor", "composite_tensor": "is a composite tensor (ragged or sparse)"}
    if why := kinds.get(info.WhichOneof("encoding")):
        return why
    try:
        dtype = tf.as_dtype(info.dtype)
        is_odd = dtype.is_quantized or (np.dtype(dtype.as_numpy_dtype).kind == "V" and dtype != tf.bfloat16)
    except (TypeError, KeyError, ValueError):
        return "is of no type that has arrays"
    try:
        tensor_of(graph, info)
    except (KeyError, ValueError):
        return f"is called {info.name}, which is not there"
    return f"is of type {dtype.name}" if is_odd else None


def tensor_spec(tensor, info) -> TensorSpec:
    """The declared shape, and the dtype that the tensor has: there are SavedModels that declare another one."""
    declared = info.tensor_shape
    shape = None if declared.unknown_rank else tuple(None if d.size < 0 else d.size for d in declared.dim)
    return TensorSpec(np.dtype(tensor.dtype.as_numpy_dtype).name, shape)


def is_initialized(tf, variable):
    if variable.type == "VarHandleOp":
        return tf.raw_ops.VarIsInitializedOp(resource=variable.outputs[0])
    return tf.raw_ops.IsVariableInitialized(ref=variable.outputs[0])


def probes(tf, graph) -> list:
    """Operations that do nothing: one on each server that has a part of the graph, since one alone gets through as long
    as its own server is there."""
    made = []
    for device in {operation.device for operation in graph.get_operations()}:
        with tf.device(device):
            made.append(tf.no_op(name="probe"))
    return made


def memory_graph(tf, graph, device: str | None) -> tuple[Any, list, list]:
    """A graph that gives back the memory of ``graph``'s variables and tables, even where that one cannot be run; its
    operations that do so, and those to run before a restore: reference variables are not removed, only made empty.
    """
    holders = [
        operation.node_def
        for operation in graph.get_operations()
        if operation.outputs
        and not operation.inputs
        and "container" in operation.node_def.attr
        and (operation.type in VARIABLE or operation.outputs[0].dtype == tf.resource)
    ]
    own, free, allocate = tf.Graph(), [], []
    with own.as_default(), tf.device(device):
        definition = tf.GraphDef(node=holders, versions=graph.as_graph_def().versions)
        for node in definition.node:
            node.attr.pop("_class", None)  # colocated with what is not here
        tf.import_graph_def(definition, name="")
        for holder in own.get_operations():
            with tf.colocate_with(holder):
                if holder.type == "VarHandleOp" or holder.type not in VARIABLE:
                    free.append(tf.raw_ops.DestroyResourceOp(resource=holder.outputs[0], ignore_lookup_error=True))
                    continue
                dtype, shape = holder.get_attr("dtype"), tf.TensorShape(holder.get_attr("shape"))
                nothing = tf.zeros([0], dtype)
                free.append(tf.raw_ops.Assign(ref=holder.outputs[0], value=nothing, validate_shape=False).op)
                if shape.is_fully_defined():
                    zeros = tf.zeros(shape, dtype)
                    allocate.append(tf.raw_ops.Assign(ref=holder.outputs[0], value=zeros, validate_shape=False).op)
    own.finalize()
    return own, free, allocate
