"""Calls a user's function that makes a graph, and describes what it has made as a SavedModel would: from there on all
models are alike."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared_graph.errors import ModelError, first_sentence
from shared_graph.graph_definition import STATE_CHANGING, operations_behind

ATOMIC, INITIALIZERS = "shared_graph/atomic", "shared_graph/initializers"  # collections in the MetaGraphDef
KERAS = "a Keras model is served by what model.export(DIR) writes: call that, and give the DIR"

_switches: dict[str, tuple[bool, bool]] = {}  # by module: are there resource variables, and control flow v2?


def call_function(tf, where: str) -> tuple[Any, Any]:
    """Call ``module:function`` in a new graph; that graph, which owns the Python functions of its operations, and the
    SavedModel. Raises ModelError where it is none, and whatever the function raises."""
    graph, function, signatures = _call(tf, where)
    with graph.as_default():
        return graph, _saved_model(tf, where.partition(":")[2], graph, function, signatures)


def _call(tf, where: str) -> tuple[Any, Callable, Any]:
    """The graph, the function, and what it returned; with the same around it each time.

    What calls ``disable_v2_behavior()``, as many a program of TensorFlow 1 does when it is imported, does so for all
    that is built later in its process: here it is for that module alone. And Keras numbers layers on for as long as a
    thread lives.
    """
    module, _, name = where.partition(":")
    if module not in _switches:
        _switch(tf, True, True)
        importlib.import_module(module)
        _switches[module] = tf.resource_variables_enabled(), tf.control_flow_v2_enabled()
    function = getattr(importlib.import_module(module), name)

    def call() -> Any:
        with graph.as_default():
            return function(tf)

    for _ in range(3):  # once more when it has switched them itself, as it may by what it imports
        switches, graph = _switches[module], tf.Graph()
        _switch(tf, *switches)
        with ThreadPoolExecutor(1) as pool:
            returned = pool.submit(call).result() if "keras" in sys.modules else call()
        _switches[module] = tf.resource_variables_enabled(), tf.control_flow_v2_enabled()
        if _switches[module] == switches:
            break
    return graph, function, returned


def _switch(tf, has_resource_variables: bool, has_control_flow_v2: bool) -> None:
    tf.enable_resource_variables() if has_resource_variables else tf.disable_resource_variables()
    tf.enable_control_flow_v2() if has_control_flow_v2 else tf.disable_control_flow_v2()


def _saved_model(tf, name: str, graph, function: Callable, signatures: Any):
    """Without variables, whose first values ``INITIALIZERS`` make."""
    from tensorflow.core.protobuf import saved_model_pb2

    check_signatures(name, signatures)
    saved_model = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    meta_graph = saved_model.meta_graphs.add()
    meta_graph.meta_info_def.tags.append("serve")
    for signature, sides in signatures.items():
        infos = [
            {key: tensor_info(tf, f"signature {signature!r}: {kind} {key!r}", t) for key, t in side.items()}
            for kind, side in zip(("input", "output"), sides)
        ]
        definition = tf.saved_model.build_signature_def(*infos, tf.saved_model.PREDICT_METHOD_NAME)
        meta_graph.signature_def[signature].CopyFrom(definition)
    initializers = tf.global_variables_initializer(), tf.local_variables_initializer(), tf.tables_initializer()
    check_keras(graph, initializers)
    names = [tf.group(initializer).name for initializer in initializers]
    meta_graph.collection_def[INITIALIZERS].node_list.value.extend(names)
    if getattr(function, "atomic", False):
        meta_graph.collection_def[ATOMIC].int64_list.value.append(1)
    meta_graph.graph_def.CopyFrom(graph.as_graph_def())
    return saved_model


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
