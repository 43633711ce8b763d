"""A model's graph in one process, whether it comes from a SavedModel or from a function."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import ModelError
from shared_graph.functions import ATOMIC, INITIALIZERS, call_function
from shared_graph.graph_definition import (
    ITERATOR,
    calls_python,
    describe_signature,
    equal_signatures,
    fingerprint_of,
    is_initialized,
    keep_what_runs,
    memory_graph,
    metadata_of,
    operations_behind,
    operations_run,
    prepare_nodes,
    probes,
    unknown_operations,
)
from shared_graph.model_source import ADDER, ADDER_SOURCE, ModelSource
from shared_graph.models import Arrays, array_of
from shared_graph.options import Options
from shared_graph.saved_variables import restore_only_needed
from shared_graph.tensorflow_runtime import failure_of, import_tensorflow, rerun_refused, session_config
from shared_graph.threads import OwnThread
from shared_graph.variables import TensorFlowVariables


class Graph:
    """A model's graph in one process: ``connect`` it to where it runs, ``restore`` variables held there, then ``run``.

    All operations are made here, once; then the graph is finalized (tensorflow#4151). The device rule, for task
    ``ps_task`` of ``ps_tasks`` parameter servers: a graph of one's own runs on it, and its variables are spread over
    all of them; a SavedModel is there as a whole. A mirror (``ps_tasks`` 0) is on this process's own device.
    """

    def __init__(
        self,
        tf,
        source: ModelSource,
        ps_task: int = 0,
        ps_tasks: int = 1,
        folder: str | None = None,
        is_whole: bool = True,
    ):
        """``folder``: from where a SavedModel is read, by default the source's; or what a function has ``made`` in
        another process: it is called here only for what its graph needs beside. ``is_whole``: else another process has
        the variables, and there is nothing here that initializes, saves, restores, sets or frees them: a fifth of the
        time and a third of the memory where there are many."""
        self._tf, self.source, self.ps_task, self.is_mirror = tf, source, ps_task, not ps_tasks
        self.session, self._callables = None, None
        self.own_thread: OwnThread | None = None  # held as long as this lives, for the sake of memory
        self.saved_checksum: int | None = None  # of its variables when they were saved last
        self.made: bytes | None = None  # by its function, as a SavedModel, until others have it
        meta_graph, self.fingerprint = self._read(folder or source.folder)
        self.atomic = source.function is not None and ATOMIC in meta_graph.collection_def
        if is_whole:
            restore_only_needed(tf, meta_graph)
        elif source.folder or ps_tasks == 1:  # else variables are spread in the order of all of them
            keep_what_runs(meta_graph)
        prepare_nodes(meta_graph, container=f"{source.name}/{source.version}".encode().hex())
        self._definitions = copy.deepcopy(dict(sorted(meta_graph.signature_def.items())))  # a part would hold all of it

        device = f"/job:ps/task:{ps_task}" if ps_tasks else None
        spread = tf.train.replica_device_setter(ps_tasks, worker_device=device) if ps_tasks > 1 else device
        self.graph, self.signatures, self._feeds_and_fetches = tf.Graph(), {}, {}
        with self.graph.as_default(), tf.device(spread if source.function else device):
            self._saver = tf.train.import_meta_graph(meta_graph)
            outputs = self._add_outputs(tf, meta_graph.graph_def)
            self.variables = TensorFlowVariables(outputs if is_whole else [])
            self._probes = probes(tf, self.graph)
            self._initialized = [is_initialized(tf, operation) for operation in self.variables.operations]
        self._restoring = [self._saver.saver_def.restore_op_name] if self._saver else []
        restoring = operations_behind(list(map(self.graph.get_operation_by_name, self._restoring)))
        common = restoring & operations_behind([tensor.op for tensor in outputs])
        self.has_tables_in_checkpoint = any("HashTable" in operation.type for operation in common)
        self.graph.finalize()
        self._memory = memory_graph(tf, self.graph, device) if is_whole else None
        self._outputs = [tensor.op for tensor in outputs]
        if not is_whole:
            self._forget_files()
        self.mutates_state = any(signature.mutates_state for signature in self.signatures.values())
        self.runs_python = any(signature.runs_python for signature in self.signatures.values())

    def _read(self, folder: str | None) -> tuple[Any, str]:
        """The MetaGraphDef in a SavedModel's folder, or of what the function makes, and its fingerprint."""
        from tensorflow.python.saved_model import loader_impl

        if folder is None:
            self._loader, (self._builder, saved_model) = None, self._call()
            self.made = saved_model.SerializeToString()
            return saved_model.meta_graphs[0], fingerprint_of(saved_model.meta_graphs[0])
        self._loader = loader_impl.SavedModelLoader(folder)
        meta_graph = self._loader.get_meta_graph_def_from_tags(["serve"])
        fingerprint, operations = fingerprint_of(meta_graph), operations_run(meta_graph.graph_def)
        runs_python_here = self.is_mirror and calls_python(operations)
        if self.source.function and (runs_python_here or unknown_operations(meta_graph.graph_def)):
            builder, own = self._call()  # which brings along the operations, and Python functions of this process
            if runs_python_here:
                self._builder, meta_graph = builder, own.meta_graphs[0]
                if sorted(operations_run(meta_graph.graph_def)) != sorted(operations):
                    raise ModelError("its graph is not the parameter server's: is it the same code?")
        return meta_graph, fingerprint

    def _call(self) -> tuple[Any, Any]:
        """What ``call_function`` returns: a graph, which owns the Python functions in it, and the SavedModel."""
        return call_function(import_tensorflow(whole=self.source != ADDER_SOURCE), self.source.function)

    def _add_outputs(self, tf, graph_def) -> list:
        """Describe each signature, and make what is fetched for it; its outputs."""
        outputs = []
        for name, definition in self._definitions.items():
            if not definition.outputs:
                continue  # an operation to be run at the start
            about = name, definition, self.atomic, self.source.folder is not None
            signature, feeds, fetches = describe_signature(tf, self.graph, graph_def, *about)
            self.signatures[name] = signature
            if signature.refusal is None:
                outputs.extend(fetches)
                # an output may be an input itself, or another output, and TensorFlow fetches neither
                self._feeds_and_fetches[name] = [t.name for t in feeds], [tf.identity(t).name for t in fetches]
        # of those that do the same the first one's callable and trial are for all
        self.equal = equal_signatures(graph_def, {name: self._definitions[name] for name in self._feeds_and_fetches})
        self._feeds_and_fetches = {first: self._feeds_and_fetches[first] for first in self.equal.values()}
        return outputs

    def connect(self, servers: list[str], options: Options) -> None:
        """To the parameter servers at these addresses, or in this process."""
        self._target = f"grpc://{servers[self.ps_task]}" if servers else ""
        self._config = session_config(self._tf, servers, options, self.runs_python)
        self._open_session()

    def _open_session(self) -> None:
        """And make a callable for each signature."""
        from tensorflow.core.protobuf.config_pb2 import CallableOptions

        session = self._tf.Session(self._target, self.graph, self._config)
        # half the time of session.run, and no check against static shapes; make_callable is session.run in disguise
        callables = {
            name: session._make_callable_from_options(CallableOptions(feed=feeds, fetch=fetches))
            for name, (feeds, fetches) in self._feeds_and_fetches.items()
        }
        self._use(session, {name: callables[first] for name, first in self.equal.items()})

    def disconnect(self, is_lost: bool = False) -> threading.Thread:
        """Returns the thread in which the session ends. ``is_lost``: its server has gone, and is not asked any more."""
        return self._use(None, None, is_lost)

    def _use(self, session, callables: dict | None, is_lost: bool = False) -> threading.Thread:
        left = [self.session, self._callables]
        self.session, self._callables = session, callables
        self.variables.set_session(session)
        ending = threading.Thread(target=end_session, args=[left, is_lost], daemon=True)
        ending.start()
        return ending

    def cancel_runs(self) -> None:
        """End what runs, as far as its kernels let themselves be ended, and go on in another session; there what may
        still be in time begins anew."""
        session = self.session
        self._open_session()
        session.close()

    def free(self) -> threading.Thread:
        """Give the memory of the variables and tables back; returns what ``disconnect`` does."""
        was_connected, ending = self.session is not None, self.disconnect()
        if was_connected:
            self._run_beside(self._memory.free)
        return ending

    def _run_beside(self, operations: list) -> None:
        """Of the memory graph. Where there is no server all goes with the session."""
        if operations and self._target:
            with self._tf.Session(self._target, self._memory.graph, self._config) as session:
                rerun_refused(session.run, operations)

    def run(
        self, signature: str, feed: list[np.ndarray], deadline: float = -math.inf, is_first: bool = True
    ) -> list[np.ndarray]:
        """The one ``session.run``: arrays in the order of the sorted input names to arrays in that of the outputs.

        If it is cancelled since another run does not end, it is repeated, until the ``deadline`` (of the monotonic
        clock). Raises ModelError with the HTTP status that fits, or ConnectionError when the parameter server has gone.
        """
        session, callables = self.session, self._callables
        if callables is None:
            raise ConnectionError("there is no connection to it")
        may_repeat = not self.signatures[signature].mutates_state
        may_be_half_done = len(self._probes) > 1 and not may_repeat  # if one of several servers refuses its part alone
        try:
            once = callables[signature]
            outputs = once(*feed) if may_be_half_done else rerun_refused(once, *feed)
        except Exception as error:
            failure, code = failure_of(error), getattr(error, "error_code", None)
        else:
            return list(map(array_of, outputs))
        # out here, where it does not hold the session: its end would wait for its server
        was_closed = code in CANCELLED or NOT_CREATED in str(failure)
        was_cancelled = was_closed and self.session is not session  # see cancel_runs
        if was_cancelled and may_repeat:
            if time.monotonic() < deadline:
                return self.run(signature, feed, deadline)
            failure.status = 499  # whatever it has heard
        elif code in PERHAPS_DISCONNECTED and not self._is_connected():
            raise ConnectionError(str(failure))
        elif code in PERHAPS_DISCONNECTED and is_first and may_repeat:
            return self.run(signature, feed, deadline, is_first=False)  # UNAVAILABLE, but the probes got through
        # TensorFlow sends a run again when its connection was lost; the server refuses it, whatever the first one did
        if not may_repeat and (was_cancelled or "request was received twice" in str(failure)):
            raise ModelError("The run was interrupted; what it changes may or may not have been changed.", 502)
        raise failure

    def _is_connected(self) -> bool:
        """ABORTED and UNAVAILABLE may be the model's own, too."""
        with contextlib.suppress(Exception):
            rerun_refused(self.session.run, self._probes)
            return True
        return False

    def restore(self, weights: Arrays) -> None:
        """Put the first values of the variables and tables in place; ``weights`` beat those of the files, of which a
        mirror has none. Raises ModelError when something behind an output then has no value."""
        from tensorflow.python.saved_model import loader_impl

        self._run_beside(self._memory.allocate)
        initializers = self.graph.get_collection(INITIALIZERS)  # of a function
        steps: list[tuple] = [(operation, self.session.run, operation) for operation in initializers]
        if self.source.folder:
            with self.graph.as_default():
                at_start = loader_impl.get_init_op(self._loader.get_meta_graph_def_from_tags(["serve"]))
            steps = [(at_start, self._loader.run_init_ops, self.session, ["serve"])]
            initializers = [at_start, *map(self.graph.get_operation_by_name, self._restoring)]
            if not self.is_mirror:
                rerun_refused(self._loader.restore_variables, self.session, self._saver)
            self.variables.set_weights(weights)
        for operation, *step in steps:  # which may make variables and tables of what is there by then
            rerun_refused(*step)
            if any("Assign" in behind.type for behind in operations_behind([operation])):
                self.variables.set_weights(weights)
        self._forget_files()
        self._check_initialized(initializers, set(weights))

    def _forget_files(self) -> None:
        self._loader = self._saver = None  # they hold all that was read

    def _check_initialized(self, initializers: list, given: set[str]) -> None:
        run, states = operations_behind(initializers), rerun_refused(self.session.run, self._initialized)
        given |= {op.inputs[0].op.name for op in run if op.type == "Assign"}  # of references; all have been allocated
        lost = [
            op.name
            for op, is_there in zip(self.variables.operations, states)
            if not is_there or (op.type != "VarHandleOp" and op.name not in given)
        ]
        made = {op.inputs[1].op for op in run if op.type == "MakeIterator"}
        lost += [op.name for op in operations_behind(self._outputs) if op.type in ITERATOR and op not in made]
        if lost:
            raise ModelError(f"nothing initializes {', '.join(map(repr, lost[:5]))}, which an output needs")

    def metadata(self) -> dict[str, Any]:
        return metadata_of(self._definitions)


def end_session(left: list, is_lost: bool) -> None:
    """``left`` holds it and its callables. When a callable goes, in whatever thread, it asks the server to forget it,
    and may wait; not after the session was closed, as it first is where the server ``is_lost`` and nobody answers."""
    if is_lost:
        with contextlib.suppress(Exception):
            left[0].close()
    left.clear()


CANCELLED, PERHAPS_DISCONNECTED = (1, 9, 10), (10, 14)  # 9, 10: as it began, its session was closed, or gone
NOT_CREATED = "A session is not created yet"  # the same, before it was sent


def is_mirrored(options: Options, source: ModelSource) -> bool:
    return options.placement == "mirrored" and source != ADDER_SOURCE


BUILD_PATIENCE_S = 10.0
_building, _begun = threading.Lock(), 0


def build_graph(options: Options, source: ModelSource, is_mirror: bool = False, **how: Any) -> Graph:
    """A version's graph, under the same device rule in every process; ``how`` as Graph has it."""
    global _begun
    index = [ADDER, *(model.name for model in options.model)].index(source.name)
    ps_task = 0 if source.function else index % options.parameter_servers
    is_alone, others = False, -1  # imports in two threads may block each other; but none waits for one that never ends
    while not is_alone and others != _begun:
        others, is_alone = _begun, _building.acquire(timeout=BUILD_PATIENCE_S)
    _begun += 1
    try:
        ps_tasks = 0 if is_mirror else options.parameter_servers
        return Graph(import_tensorflow(), source, ps_task, ps_tasks, **how)
    finally:
        if is_alone:
            _building.release()


async def build_in_own_thread(build: Callable[..., Graph], *arguments: Any) -> Graph:
    """What ``build`` returns, which from then on holds the thread, see OwnThread."""
    thread = OwnThread()
    graph = await thread.run(build, *arguments)
    graph.own_thread = graph.own_thread or thread
    return graph
