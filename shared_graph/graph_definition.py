"""What is read from a graph's definition, and done to it, before it is run: no session here."""

from __future__ import annotations

import collections
import copy
import functools
import hashlib
import itertools
import re
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from shared_graph.models import Signature, TensorSpec

# Operations that change what a later run sees
STATE_CHANGING = re.compile(
    r"Assign\w*|(Resource)?(Sparse)?Apply\w+|ResourceScatter\w+|Scatter(Add|Sub|Mul|Div|Min|Max|Update|Nd\w+)"
    r"|(Resource)?StridedSliceAssign|(Resource)?CountUpTo|LookupTable(Insert|Import|Remove)\w*|(Queue|Barrier)\w+"
    r"|(Ordered)?(Map)?(Stage(Clear)?|Unstage(NoKey)?|Clear)|(Add|Take)(Many)?Sparse\w+TensorsMap|DestroyResourceOp"
    r"|Rng\w+|Stateful(Standard|Uniform|Truncated|Random)\w*|Write\w+|(OneShot|MultiDevice)?Iterator(V2)?|NegTrain"
    r"|BoostedTrees(CenterBias|Create|Deserialize|Flush|Update)\w*|SdcaShrinkL1"
    r"|(Sparse|Resource)?Accumulator\w+|Reader\w+|Save(V2|Slices)?|MergeV2Checkpoints"
)
PYTHON_FUNCTION = re.compile(r"(Eager)?PyFunc(Stateless)?")
VARIABLE = ("VarHandleOp", "VariableV2", "Variable")
ITERATOR = ("Iterator", "IteratorV2")


def prepare_nodes(meta_graph, container: str) -> None:
    """Make a graph's nodes, those of its functions included, ready to be imported beside other models'."""
    from tensorflow.python.framework import op_def_registry

    inputs = {info.name.partition(":")[0] for d in meta_graph.signature_def.values() for info in d.inputs.values()}
    for node in all_nodes(meta_graph.graph_def):
        node.device = ""  # of the machine that saved it (tensorflow#4011)
        definition = op_def_registry.get(node.op)
        attributes = {attribute.name for attribute in definition.attr} if definition else ()
        if node.name in inputs and node.op in ("Placeholder", "PlaceholderV2"):
            node.attr["shape"].shape.Clear()  # like TensorFlow Serving, we leave the judgement to the kernels
            node.attr["shape"].shape.unknown_rank = True
        if "container" in attributes:  # else equal names in two models would be one variable
            own = node.attr["container"].s
            node.attr["container"].s = container.encode() + (b"/" + own if own else b"")
        if "use_locking" in attributes:  # else two runs at once lose updates
            node.attr["use_locking"].b = True


def unknown_operations(graph_def) -> set[str]:
    """Those that nobody has brought into this process."""
    from tensorflow.python.framework import op_def_registry

    functions = {function.signature.name for function in graph_def.library.function}
    wanted = {node.op for node in all_nodes(graph_def)} - functions
    return {operation for operation in wanted if op_def_registry.get(operation) is None}


def all_nodes(graph_def) -> Iterator[Any]:
    """The nodes of a graph, and those of the functions in it."""
    return itertools.chain(graph_def.node, *(function.node_def for function in graph_def.library.function))


def nodes_behind(graph_def, ends: Iterable[str]) -> list:
    """The nodes of these names, or of tensors of these names, and all that they depend on."""
    nodes = {node.name: node for node in graph_def.node}
    seen, left = set(), list(ends)
    while left:
        name = node_of(left.pop())
        if name in nodes and name not in seen:
            seen.add(name)
            left.extend(nodes[name].input)
    return [node for name, node in nodes.items() if name in seen]


def node_of(tensor: str) -> str:
    """Of ``name``, ``name:1``, ``^name``, or in a function ``name:output:1``."""
    return tensor.lstrip("^").partition(":")[0]


def with_functions(nodes: Iterable[Any], library) -> tuple[list, set[str]]:
    """Nodes, and those of all functions that are called in them; and the names of the functions that are not."""
    functions, found = {function.signature.name: function.node_def for function in library.function}, list(nodes)
    for node in found:  # which grow meanwhile
        called = [f.name for attribute in node.attr.values() for f in [attribute.func, *attribute.list.func]]
        for name in [node.op, *called]:
            found.extend(functions.pop(name, ()))
    return found, {*functions}


def operations_run(graph_def, ends: Iterable[str] | None = None) -> list[str]:
    """The types of the nodes behind ``ends``, or of all in a graph, and of those in functions that are called there."""
    nodes = graph_def.node if ends is None else nodes_behind(graph_def, ends)
    return [node.op for node in with_functions(nodes, graph_def.library)[0]]


def signature_tensors(meta_graph) -> list[str]:
    """The names of all that signatures take and give."""
    sides = [side for d in meta_graph.signature_def.values() for side in (d.inputs, d.outputs)]
    return [info.name for side in sides for info in side.values()]


def keep_what_runs(meta_graph) -> None:
    """Leave only what is behind the signatures' tensors, for who saves and restores nothing, on one device: of a Keras
    model it is less than half. In place, since constants may be large."""
    nodes, library = meta_graph.graph_def.node, meta_graph.graph_def.library
    kept = nodes_behind(meta_graph.graph_def, signature_tensors(meta_graph))
    names, unused = {node.name for node in kept}, with_functions(kept, library)[1]
    if library.gradient or any("api_implements" in function.attr for function in library.function):
        unused = set()  # some are found by other means than a call, such as an LSTM's for GPUs
    for i in reversed(range(len(nodes))):
        nodes[i].attr.pop("_class", None)  # colocated with what is left out
        if nodes[i].name not in names:
            del nodes[i]
    for i in reversed(range(len(library.function))):
        if library.function[i].signature.name in unused:
            del library.function[i]
    meta_graph.ClearField("collection_def")
    meta_graph.ClearField("saver_def")


def calls_python(operations: Iterable[str]) -> bool:
    return any(map(PYTHON_FUNCTION.fullmatch, operations))


def operations_behind(operations: list) -> set:
    """These operations and all that they depend on."""
    seen, stack = set(), list(operations)
    while stack:
        operation = stack.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            stack.extend([*(tensor.op for tensor in operation.inputs), *operation.control_inputs])
    return seen


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
    types = set(operations_run(graph_def, [tensor.name for tensor in fetches.values()]))
    if calls_python(types) and is_saved:  # by a token, which in this process is another function's, such as the adder's
        signature.refusal = f"Signature {name!r} cannot be served: it calls a Python function, which no SavedModel has"
        return signature, [], []
    signature.inputs = {key: tensor_spec(tensor, definition.inputs[key]) for key, tensor in feeds.items()}
    signature.outputs = {key: tensor_spec(tensor, definition.outputs[key]) for key, tensor in fetches.items()}
    signature.mutates_state = any(map(STATE_CHANGING.fullmatch, types))
    signature.runs_python = not atomic and calls_python(types)
    return signature, list(feeds.values()), list(fetches.values())


def equal_signatures(graph_def, definitions: dict[str, Any]) -> dict[str, str]:
    """By the name of each signature that of the first one which does the same with inputs of the same names: with the
    same tensors, as an Estimator's head has two names, or by a function that does the same, as Keras exports it twice.
    """
    library, nodes = graph_def.library, {node.name: node for node in graph_def.node}
    functions = {function.signature.name: function for function in library.function}
    uses = collections.Counter(tensor for node in graph_def.node for tensor in node.input)
    may_be_equal = not library.gradient and not any(names_a_resource(n) for f in library.function for n in f.node_def)

    @functools.cache
    def body_of(name: str) -> bytes:
        """What a function does, whatever it and its arguments are called."""
        body = copy.deepcopy(functions[name])
        body.signature.name = ""
        for argument in body.arg_attr.values():
            argument.attr.pop("_user_specified_name", None)
        return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()

    def work_of(definition) -> Hashable:
        inputs, outputs = (sorted(side.items()) for side in (definition.inputs, definition.outputs))
        work = [(key, info.dtype, info.tensor_shape.SerializeToString()) for key, info in inputs + outputs]
        given, taken = ([info.name.removesuffix(":0") for _, info in side] for side in (inputs, outputs))
        call = nodes[node_of(taken[0])]
        function = call.attr["f"].func if "f" in call.attr else None
        is_call = function is not None and function.name in functions and not function.attr
        is_all = {node_of(tensor) for tensor in taken} == {call.name} and call.name not in map(node_of, given)
        is_fed_alone = all(list(call.input).count(tensor) == uses[tensor] for tensor in given)
        if not (may_be_equal and is_call and is_all and is_fed_alone):
            return (*work, *given, *taken)
        fed = dict(zip(given, (f"input {key}" for key, _ in inputs)))
        work += [call.op, body_of(function.name), *(fed.get(tensor, tensor) for tensor in call.input)]
        work += [tensor.partition(":")[2] for tensor in taken]
        others = (call.attr[key] for key in sorted(call.attr) if key != "f")
        return (*work, *(attribute.SerializeToString(deterministic=True) for attribute in others))

    firsts: dict[Hashable, str] = {}
    return {name: firsts.setdefault(work_of(definition), name) for name, definition in definitions.items()}


def names_a_resource(node) -> bool:
    """Is what it holds another thing than what another node of its kind holds?"""
    return "container" in node.attr and not node.attr["shared_name"].s


def fingerprint_of(meta_graph) -> str:
    return hashlib.sha256(meta_graph.SerializeToString(deterministic=True)).hexdigest()


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
        tensor = tensor_of(graph, info)
    except (KeyError, ValueError):
        return f"is called {info.name}, which is not there"
    for declared in (info.dtype, tensor.dtype):  # there are SavedModels that declare another one
        try:
            dtype = tf.as_dtype(declared).base_dtype
            is_odd = dtype.is_quantized or (np.dtype(dtype.as_numpy_dtype).kind == "V" and dtype != tf.bfloat16)
        except (TypeError, KeyError, ValueError):
            return "is of no type that has arrays"
        if is_odd:
            return f"is of type {dtype.name}"
    return None


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


class MemoryGraph(NamedTuple):
    """A graph that gives back the memory of another one's variables and tables, even where that cannot be run."""

    graph: Any
    free: list  # the operations that do so; reference variables are not removed, only made empty
    allocate: list  # to be run before a restore, for reference variables


def memory_graph(tf, graph, device: str | None) -> MemoryGraph:
    holders = [
        operation.node_def
        for operation in graph.get_operations()
        if operation.outputs
        and not operation.inputs
        and "container" in operation.node_def.attr
        and (operation.type in VARIABLE or operation.outputs[0].dtype == tf.resource)
    ]
    made = MemoryGraph(tf.Graph(), [], [])
    with made.graph.as_default(), tf.device(device):
        definition = tf.GraphDef(node=holders, versions=graph.graph_def_versions)
        for node in definition.node:
            node.attr.pop("_class", None)  # colocated with what is not here
        tf.import_graph_def(definition, name="")
        for holder in made.graph.get_operations():
            with tf.colocate_with(holder):
                if holder.type == "VarHandleOp" or holder.type not in VARIABLE:
                    made.free.append(tf.raw_ops.DestroyResourceOp(resource=holder.outputs[0], ignore_lookup_error=True))
                    continue
                dtype, shape = holder.get_attr("dtype"), tf.TensorShape(holder.get_attr("shape"))
                nothing = tf.zeros([0], dtype)
                made.free.append(tf.raw_ops.Assign(ref=holder.outputs[0], value=nothing, validate_shape=False).op)
                if shape.is_fully_defined():
                    zeros = tf.zeros(shape, dtype)
                    filled = tf.raw_ops.Assign(ref=holder.outputs[0], value=zeros, validate_shape=False)
                    made.allocate.append(filled.op)
    made.graph.finalize()
    return made
