"""Gets and sets the variables behind an output, in any process."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from shared_graph.errors import InvalidRequest
from shared_graph.graph_definition import VARIABLE, operations_behind
from shared_graph.models import Arrays, array_of, to_array
from shared_graph.tensorflow_runtime import import_tensorflow, rerun_refused

MAX_RUN_BYTES = 2**28  # of several variables in one run: a protobuf has 2 GiB at most (tensorflow#2233)


class TensorFlowVariables:
    """Gets and sets the variables behind an output: by name, as Ray's users know it, or as one flat vector.

    ``output`` is a tensor or an operation, or a list of them. The variables are those that it depends on in any way,
    and ``input_variables``. With ``prefix=True`` names lack the scope that all have in common, so that two copies of a
    network under two scopes can exchange weights. All operations are made here.

    ``variables``, ``placeholders`` and ``assignment_nodes`` are dicts by name. After ray.experimental.tf_utils.
    """

    def __init__(self, output, sess=None, input_variables=None, prefix: bool = False):
        tf = import_tensorflow(is_ours=False)
        self.sess = sess
        self.variables, self.placeholders, self.assignment_nodes, self._values = {}, {}, {}, {}
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        behind = operations_behind([getattr(o, "op", o) for o in outputs] + [v.op for v in input_variables or ()])
        found = sorted((operation for operation in behind if operation.type in VARIABLE), key=lambda o: o.name)
        self.operations = found  # which hold them, in the same order
        if not found:
            return
        graph, scopes = found[0].graph, [os.path.dirname(f"/{op.name}") for op in found]
        scope = os.path.commonpath(scopes)[1:] if prefix else ""
        objects = {v.op.name: v for v in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)}
        for operation in found:
            name = operation.name[len(scope) + 1 :] if scope else operation.name
            handle, dtype, shape = operation.outputs[0], operation.get_attr("dtype"), operation.get_attr("shape")
            with graph.as_default(), tf.colocate_with(operation):
                new = tf.placeholder(dtype, tf.TensorShape(shape), name=f"Placeholder_{name}")
                if operation.type == "VarHandleOp":
                    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
                    assign = tf.raw_ops.AssignVariableOp(resource=handle, value=new)
                else:  # a reference variable of TensorFlow 1
                    is_known = new.shape.is_fully_defined()  # else it takes the shape of what it is given
                    value = tf.identity(handle)
                    assign = tf.raw_ops.Assign(ref=handle, value=new, validate_shape=is_known).op
            self.variables[name] = objects.get(operation.name, handle)
            self.placeholders[name], self.assignment_nodes[name], self._values[name] = new, assign, value

    def set_session(self, sess) -> None:
        self.sess = sess

    def get_flat_size(self) -> int:
        """How many numbers all variables have together."""
        return sum(math.prod(shape) for shape in self._shapes().values())

    def get_flat(self) -> np.ndarray:
        """All variables as one vector, in the order of their sorted names."""
        return np.concatenate([value.ravel() for value in self.get_weights().values()] or [np.zeros(0)])

    def set_flat(self, new_weights: np.ndarray) -> None:
        """Set all variables from one vector of ``get_flat_size()`` numbers."""
        new_weights = np.asarray(new_weights)
        if new_weights.shape != (self.get_flat_size(),):
            raise InvalidRequest(f"flat weights must have the shape ({self.get_flat_size()},), not {new_weights.shape}")
        shapes, dtypes = self._shapes(), [p.dtype.as_numpy_dtype for p in self.placeholders.values()]
        parts = np.split(new_weights, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
        # the vector has one dtype, but the variables may differ
        self.set_weights({n: p.reshape(s).astype(d) for (n, s), p, d in zip(shapes.items(), parts, dtypes)})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a variable without a static shape: that of its value."""
        return {
            name: tuple(p.shape.as_list()) if p.shape.is_fully_defined() else self._run(self._values[name]).shape
            for name, p in self.placeholders.items()
        }

    def get_weights(self) -> Arrays:
        """The variables' values by name."""
        sizes = {}  # of a string, and without a static shape: unknown
        for name, placeholder in self.placeholders.items():
            count = placeholder.shape.num_elements()
            sizes[name] = MAX_RUN_BYTES if count is None else count * (placeholder.dtype.size or MAX_RUN_BYTES)
        values: dict[str, Any] = {}
        for names in in_portions(sizes):
            values |= self._run({name: self._values[name] for name in names})
        return {name: array_of(value) for name, value in values.items()}

    def set_weights(self, new_weights: Arrays) -> None:
        """Set some or all variables. A wrong name or shape is an InvalidRequest, and then none of them is set."""
        if not isinstance(new_weights, dict):
            raise InvalidRequest(f"weights are arrays by the names of variables, not {type(new_weights).__name__}")
        feeds = {}
        for name, value in new_weights.items():
            if name not in self.placeholders:
                raise InvalidRequest(f"there is no variable {name!r}; there are {sorted(self.placeholders)}")
            placeholder, value = self.placeholders[name], np.asarray(value)
            if not placeholder.shape.is_compatible_with(value.shape):
                shape = tuple(placeholder.shape.as_list())
                raise InvalidRequest(f"variable {name!r} has the shape {shape}, not {value.shape}")
            feeds[name] = to_array(f"variable {name!r}", value, np.dtype(placeholder.dtype.as_numpy_dtype))
            if feeds[name].nbytes >= 2**31 - 2**20:
                raise InvalidRequest(f"variable {name!r} is larger than the 2 GiB that TensorFlow can be fed")
        for names in in_portions({name: value.nbytes for name, value in feeds.items()}):
            nodes = [self.assignment_nodes[name] for name in names]
            self._run(nodes, {self.placeholders[name]: feeds[name] for name in names})

    def _run(self, *arguments: Any) -> Any:
        if self.sess is None:
            raise InvalidRequest("there is no session yet: give sess, or call set_session")
        return rerun_refused(self.sess.run, *arguments)


def in_portions(sizes: dict[str, int]) -> list[list[str]]:
    """Names of variables by their bytes, for as few runs as may be: each that is new costs the server a look at the
    whole graph, which for each of 500 variables alone took a minute and a half."""
    portions, left = [], -1
    for name, size in sizes.items():
        if size > left:
            portions.append([])
            left = MAX_RUN_BYTES
        portions[-1].append(name)
        left -= size
    return portions
