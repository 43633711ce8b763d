"""A model's graph in one process, whether it comes from a SavedModel or from a function."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import itertools
import logging
import re
import threading
from typing import Any

import numpy as np

from shared_graph.errors import ModelError, first_sentence
from shared_graph.models import ADDER, ADDER_SOURCE, Key, ModelSource, Signature, TensorSpec
from shared_graph.options import Options
from shared_graph.tensorflow_runtime import server_config, session_config
from shared_graph.variables import TensorFlowVariables

log = logging.getLogger(__name__)


class Graph:
    """A model's graph in one process: ``connect`` it to where it runs, ``restore`` it where it is held, then ``run``.

    All operations are made here, once; then the graph is finalized (tensorflow#4151). The device rule, for task
    ``home`` of ``tasks`` parameter servers: a graph of one's own runs at home, and its variables are spread over all of
    them; a SavedModel is at home as a whole. A mirror (``tasks`` 0) is on this process's own device.
    """

    def __init__(self, tf, source: ModelSource, home: int = 0, tasks: int = 1):
        from tensorflow.python.saved_model import loader_impl

        self.source, self.home, self.atomic, self.session, self._callables = source, home, False, None, {}
        self.kept: int | None = None  # a fingerprint of its variables as they were kept last
        self._loader = loader_impl.SavedModelLoader(source.folder) if source.folder else None
        meta_graph = (
            self._build(tf)
            if self._loader is None
            else copy.deepcopy(self._loader.get_meta_graph_def_from_tags(["serve"]))
        )
        self._definitions = dict(sorted(meta_graph.signature_def.items()))
        prepare_nodes(meta_graph, container=f"{source.name}/{source.version}".encode().hex())
        self.fingerprint = hashlib.sha256(meta_graph.SerializeToString(deterministic=True)).hexdigest()

        device = f"/job:ps/task:{home}" if tasks else None
        if source.function and tasks > 1:
            device = tf.train.replica_device_setter(tasks, worker_device=device)
        self.graph, self.signatures, self._ends, outputs = tf.Graph(), {}, {}, []
        with self.graph.as_default(), tf.device(device):
            self._saver = tf.train.import_meta_graph(meta_graph)
            for name, definition in self._definitions.items():
                infos = [*definition.inputs.values(), *definition.outputs.values()]
                if not definition.outputs or not all(info.name and info.dtype for info in infos):
                    continue  # an operation to be run at the start, or a tensor that is not dense
                feed, fetch = (
                    {key: self.graph.get_tensor_by_name(side[key].name) for key in sorted(side)}
                    for side in (definition.inputs, definition.outputs)
                )
                types = operation_types(tf, meta_graph.graph_def, [tensor.op.name for tensor in fetch.values()])
                self.signatures[name] = Signature(
                    name,
                    *(
                        {key: tensor_spec(tensor, side[key].tensor_shape) for key, tensor in tensors.items()}
                        for side, tensors in ((definition.inputs, feed), (definition.outputs, fetch))
                    ),
                    method=definition.method_name,
                    writes=any(map(STATE_CHANGING.fullmatch, types)),
                    calls_out=not self.atomic and any(map(PYTHON_FUNCTION.fullmatch, types)),
                )
                outputs.extend(fetch.values())
                # an output may be an input itself, or another output, and TensorFlow fetches neither
                self._ends[name] = [t.name for t in feed.values()], [tf.identity(t).name for t in fetch.values()]
            self.variables = TensorFlowVariables(outputs)
            self._free, self._allocate = memory_operations(tf, self.graph)
        self.graph.finalize()
        self.writes = any(signature.writes for signature in self.signatures.values())
        self.calls_out = any(signature.calls_out for signature in self.signatures.values())

    def _build(self, tf):
        """Call the user's function, in a graph of its own, and describe what it made as a SavedModel would."""
        from tensorflow.core.protobuf import meta_graph_pb2

        module, _, name = self.source.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        self.atomic = getattr(function, "atomic", False)
        self._builder = tf.Graph()  # kept: it owns the Python functions of its py_func operations
        meta_graph = meta_graph_pb2.MetaGraphDef()
        with self._builder.as_default():
            for signature, sides in function(tf).items():
                infos = [
                    {
                        key: tf.saved_model.build_tensor_info(tf.convert_to_tensor(value))  # of a variable: its value
                        for key, value in side.items()
                    }
                    for side in sides
                ]
                definition = tf.saved_model.build_signature_def(*infos, tf.saved_model.PREDICT_METHOD_NAME)
                meta_graph.signature_def[signature].CopyFrom(definition)
            initializers = tf.global_variables_initializer(), tf.local_variables_initializer(), tf.tables_initializer()
            self._initializer = tf.group(*initializers, name="initialize_all").name
            meta_graph.graph_def.CopyFrom(self._builder.as_graph_def())
        return meta_graph

    def connect(self, tf, addresses: list[str], options: Options, timeout_s: float = 0) -> None:
        """Make the session, on the parameter servers at these addresses or in this process, and a callable for each
        signature."""
        from tensorflow.core.protobuf.config_pb2 import CallableOptions

        self.disconnect()
        target = f"grpc://{addresses[self.home]}" if addresses else ""
        config = session_config(tf, addresses, timeout_s) if addresses else server_config(tf, options, self.calls_out)
        self.session = self.variables.sess = tf.Session(target, self.graph, config)
        # half the time of session.run, and no check against static shapes; make_callable is session.run in disguise
        self._callables = {
            name: self.session._make_callable_from_options(CallableOptions(feed=feed, fetch=fetch))
            for name, (feed, fetch) in self._ends.items()
        }

    def disconnect(self) -> None:
        """Leave the session behind, to a thread, since its end may wait for a server that is gone."""
        left = [self.session, self._callables]
        self.session = self.variables.sess = self._callables = None
        if any(left):
            threading.Thread(target=left.clear, daemon=True).start()

    def free(self) -> None:
        """Give the memory of the variables and tables back."""
        if self.session:
            self.session.run(self._free)
        self.disconnect()

    def run(self, signature: str, feed: list[np.ndarray]) -> list[np.ndarray]:
        """The one ``session.run``: arrays in the order of the sorted input names to arrays in that of the outputs.

        Raises ModelError with the HTTP status that fits, or ConnectionError when the parameter server has gone.
        """
        try:
            outputs, failure = self._callables[signature](*feed), None
        except Exception as error:
            failure = failure_of(error)
        if failure:
            raise failure  # out here, where it does not hold the session: its end would wait for its server
        return [np.array(output, object) if isinstance(output, bytes) else np.asarray(output) for output in outputs]

    def restore(self, variables: bool = True) -> None:
        """Put the variables' (unless they come from elsewhere) and tables' first values in place."""
        self.session.run(self._allocate)
        if self._loader is None:
            return self.session.run(self.graph.get_operation_by_name(self._initializer))
        if variables:
            self._loader.restore_variables(self.session, self._saver)
        self._loader.run_init_ops(self.session, ["serve"])

    def metadata(self) -> dict[str, Any]:
        from google.protobuf import json_format

        how = {"always_print_fields_with_no_presence": True, "preserving_proto_field_name": True}
        definitions = {name: json_format.MessageToDict(d, **how) for name, d in self._definitions.items()}
        return {"signature_def": {"signature_def": definitions}}


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


def memory_operations(tf, graph) -> tuple[list, list]:
    """What gives back the memory of a graph's variables and tables; and what has to come before they are restored:
    reference variables cannot be removed, only be made empty."""
    free, allocate = [], []
    holders = [operation for operation in graph.get_operations() if operation.outputs and not operation.inputs]
    for holder in holders:
        with tf.colocate_with(holder):
            if holder.type in ("VariableV2", "Variable"):
                dtype, shape = holder.get_attr("dtype"), tf.TensorShape(holder.get_attr("shape"))
                nothing, zeros = tf.zeros([0], dtype), tf.zeros(shape, dtype)
                free.append(tf.raw_ops.Assign(ref=holder.outputs[0], value=nothing, validate_shape=False).op)
                allocate.append(tf.raw_ops.Assign(ref=holder.outputs[0], value=zeros, validate_shape=False).op)
            elif holder.outputs[0].dtype == tf.resource and "container" in holder.node_def.attr:
                free.append(tf.raw_ops.DestroyResourceOp(resource=holder.outputs[0], ignore_lookup_error=True))
    return free, allocate


# Operations that change what a later run sees
STATE_CHANGING = re.compile(
    r"Assign\w*|(Resource)?(Sparse)?Apply\w+|ResourceScatter\w+|Scatter(Add|Sub|Mul|Div|Min|Max|Update|Nd\w+)"
    r"|ResourceStridedSliceAssign|(Resource)?CountUpTo|LookupTable(Insert|Import|Remove)\w*|(Queue|Barrier|Stack)\w+"
    r"|(Map)?(Uns|S)tage|Rng\w+|Stateful(Standard|Uniform|Truncated|Random)\w+|WriteFile"
)
PYTHON_FUNCTION = re.compile(r"(Eager)?PyFunc(Stateless)?")


def operation_types(tf, graph_def, names: list[str]) -> set[str]:
    """The types of these operations and of all that they depend on, those within called functions included."""
    functions = {function.signature.name: function.node_def for function in graph_def.library.function}
    nodes = list(tf.graph_util.extract_sub_graph(graph_def, names).node)
    for node in nodes:  # which grow meanwhile
        called = [f.name for attribute in node.attr.values() for f in [attribute.func, *attribute.list.func]]
        for name in [node.op, *called]:
            nodes.extend(functions.pop(name, ()))
    return {node.op for node in nodes}


def tensor_spec(tensor, declared) -> TensorSpec:
    """The declared shape, and the dtype that the tensor has: there are SavedModels that declare another one."""
    shape = None if declared.unknown_rank else tuple(None if d.size < 0 else d.size for d in declared.dim)
    return TensorSpec(np.dtype(tensor.dtype.as_numpy_dtype).name, shape)


# tensorflow::error::Code to HTTP status, as TensorFlow Serving has it; any other is 500
HTTP_STATUS = {
    1: 499,
    3: 400,
    4: 504,
    5: 404,
    6: 409,
    7: 403,
    8: 429,
    9: 400,
    10: 409,
    11: 400,
    12: 501,
    14: 503,
    16: 401,
}
DISCONNECTED = (4, 10, 14)  # what a run fails with when its parameter server is gone, or another one is in its place


def failure_of(error: Exception) -> ModelError | ConnectionError:
    """What a run raises when TensorFlow raised this. Our own Python functions in graphs fail with "HTTP 503: why"."""
    if ours := re.search(r"RuntimeError: HTTP (\d{3}): (.*)", str(error)):
        return ModelError(ours[2], int(ours[1]))
    code, message = getattr(error, "error_code", None), first_sentence(error)
    return ConnectionError(message) if code in DISCONNECTED else ModelError(message, HTTP_STATUS.get(code, 500))


def build_graph(tf, options: Options, source: ModelSource, is_mirror: bool = False) -> Graph:
    """A version's graph, under the same device rule in every process."""
    index = [ADDER, *(model.name for model in options.model)].index(source.name)
    home = 0 if source.function else index % options.parameter_servers
    return Graph(tf, source, home, 0 if is_mirror else options.parameter_servers)


def build_functions(tf, options: Options, mirrors: bool = False) -> dict[Key, Graph]:
    """The graphs of functions, in the same order in every process: TensorFlow numbers the Python functions in them, and
    a parameter server runs what has the same number there."""
    graphs = {}
    for source in [ADDER_SOURCE, *options.model]:
        with contextlib.suppress(Exception):  # which comes again when the model is loaded
            if source.function:
                is_mirror = mirrors and is_mirrored(options, source)
                graphs[source.name, source.version] = build_graph(tf, options, source, is_mirror)
    return graphs


def is_mirrored(options: Options, source: ModelSource) -> bool:
    return options.placement == "mirrored" and source != ADDER_SOURCE
