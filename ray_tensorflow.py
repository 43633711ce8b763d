"""TensorFlow graphs, shared by many processes through Ray, served to many requests at once.

A Ray *parameter server* actor holds the only copy of a ``tf.compat.v1`` graph's variables. *Worker* actors each
build the same graph against it (between-graph replication) and run it asynchronously. A *front end* (this command, or
the Flask and Starlette apps beside it) gathers concurrent requests into batches and hands them round-robin to the workers.

    front end ─> Cluster ─> Batcher ─┬─> Worker 0 ─┐
                                     ├─> Worker 1 ─┼─ session.run ─> ParameterServer
                                     └─> Worker 2 ─┘                 variables, tables, kernels

    python ray_tensorflow.py                                 # worker i adds i to the shared sum
    python ray_tensorflow_starlette.py --model DIR           # serve SavedModels beside it: curl '127.0.0.1:8080/?value=3'
    python ray_tensorflow_flask.py --model module:function   # or a graph of one's own

The process that imports this file never imports tensorflow, and nothing starts before a ``Cluster`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import binascii
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import hmac
import http.client
import importlib
import itertools
import json
import logging
import math
import os
import pickle
import queue
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import ray
import ray.exceptions
from ray._private import ray_constants
from ray._private import services as ray_services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger("ray_tensorflow")


# ======================================================================================================================
# Errors: what can go wrong, as one tree; each message is one sentence that says what happened and what to do
# ======================================================================================================================


class Error(Exception):
    """Base of all errors that this project raises on purpose. ``status`` is its HTTP status code."""

    def __init__(self, message: str, status: int = 500):
        super().__init__(message, status)  # both are arguments, so that the error survives a pickle
        self.message, self.status = message, status

    def __str__(self) -> str:
        return self.message


class OptionError(Error):
    """An option has a value that is not allowed."""


class InvalidRequest(Error):
    """The request can never succeed as it is: it is wrong in itself, or names what does not exist."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message, status)


class Unavailable(Error):
    """Not now, but perhaps soon: the cluster is starting, stopping, or has too much to do."""

    def __init__(self, message: str, status: int = 503):
        super().__init__(message, status)


class WorkerLost(Error):
    """A worker went away while it ran a request that changes variables: the change may or may not have been applied."""

    def __init__(self, message: str, status: int = 502):
        super().__init__(message, status)


class ServerLost(Error):
    """A worker's session has lost its parameter server: nobody knows what of the run has been applied."""


class DeadlineExceeded(Error):
    """The request's deadline passed before its answer came."""

    def __init__(self, message: str, status: int = 504):
        super().__init__(message, status)


class ModelError(Error):
    """The model itself failed on this request."""


# ======================================================================================================================
# Options: one dataclass is the source of every name, type, default, limit and help text
# ======================================================================================================================


FRONT_END, COMMAND = "front end", "command"


def option(default, help: str, parse: Callable[[Any], Any], only: str | None = None):
    """A field of ``Options``; ``parse`` checks a value (given as text or not), or raises ValueError(what is allowed).

    ``only`` says whose command line has it: a FRONT_END's, the COMMAND's, or everybody's.
    """
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "only": only})


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable[[Any], Any]:
    def parse(value):
        allowed = f"a {'whole ' if kind is int else ''}number {'above' if above else 'of at least'} {least}"
        allowed += f" and at most {most}" if most < math.inf else ""
        try:
            result, as_float = kind(value), float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(allowed) from None
        large_enough = least < result if above else least <= result
        if isinstance(value, bool) or result != as_float or not large_enough or not result <= most or math.isinf(result):
            raise ValueError(allowed)
        return result

    return parse


def text(value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a non-empty text")
    return value


def one_of(*values: str) -> Callable[[Any], str]:
    def parse(value):
        if value not in values:
            raise ValueError(" or ".join(values))
        return value

    return parse


def array_file(value) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value).endswith((".npy", ".npz")):
        raise ValueError("a file whose name ends in .npy or .npz")
    return os.fspath(value)


class ModelSource(NamedTuple):
    """Where a served model comes from: a SavedModel's folder, or a function that builds a graph."""

    name: str
    version: int
    folder: str | None = None  # of the SavedModel itself
    function: str | None = None  # "module:function"

    def __str__(self) -> str:
        return f"{self.name} ({self.folder or self.function})"


def is_saved_model(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("saved_model.pb", "saved_model.pbtxt"))


def model_source(value) -> ModelSource:
    """Parse ``[NAME=]DIR`` or ``[NAME=]module:function``; a folder of numbered versions means its highest."""
    if isinstance(value, ModelSource):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("[NAME=]DIR or [NAME=]module:function")
    value = os.fspath(value)
    name, equals, where = value.partition("=")
    if not (equals and re.fullmatch(r"[\w.-]+", name)):
        name, where = "", value
    folder = os.path.abspath(where)
    if not where or not os.path.isdir(folder):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", where):
            return ModelSource(name or where.partition(":")[2], 1, function=where)
        raise ValueError("a folder that exists, or module:function, with an optional NAME= before it")
    if os.path.basename(folder).isdecimal() and is_saved_model(folder):  # one version of several, named outright
        return ModelSource(name or os.path.basename(os.path.dirname(folder)), int(os.path.basename(folder)), folder)
    if is_saved_model(folder):
        return ModelSource(name or os.path.basename(folder), 1, folder)
    versions = [v for v in os.listdir(folder) if v.isdecimal() and is_saved_model(os.path.join(folder, v))]
    if not versions:
        raise ValueError("a folder with a saved_model.pb in it, or in one of its folders that are named by a number")
    version = max(versions, key=int)
    return ModelSource(name or os.path.basename(folder), int(version), os.path.join(folder, version))


def model_sources(values) -> tuple[ModelSource, ...]:
    values = values.split(",") if isinstance(values, str) else list(values) if isinstance(values, (list, tuple)) else [values]
    sources = tuple(model_source(value) for value in values)
    names = [ADDER] + [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"one model for each name, but {name!r} stands for two (NAME=... gives another name)")
    return sources


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be set. Command line beats environment (``RAY_TENSORFLOW_<NAME>``) beats default.

    A wrong value raises OptionError, one sentence with the option, the value and what is allowed.
    """

    workers: int = option(4, "worker actors", number(int, 1))
    threads: int = option(1, "CPUs of the Ray that is started, and threads of each TensorFlow server", number(int, 1))
    model: tuple[ModelSource, ...] = option(
        (), "a model to serve beside the adder: [NAME=]DIR (a SavedModel, or a folder of numbered versions) or"
        " [NAME=]module:function (a graph of your own); repeatable, in the environment separated by commas", model_sources)
    parameter_servers: int = option(1, "TensorFlow ps tasks, over which variables are spread", number(int, 1))
    placement: str = option(
        "shared", "shared: models live and run on the parameter server, one copy in all; mirrored: each worker keeps a copy of the"
        " weights on its own device and runs there", one_of("shared", "mirrored"))
    max_batch: int = option(64, "most requests that one session.run takes together", number(int, 1))
    batch_wait_ms: float = option(0.0, "how long a batch may wait for company, in milliseconds", number(float, 0))
    max_queue: int = option(1024, "waiting requests past which new ones are refused", number(int, 1))
    checkpoint_dir: str | None = option(
        None, "folder in which the sum and changed variables are kept, through power cuts and for the next start; without it they"
        " are kept as long as the program runs", text)
    timeout_s: float = option(30.0, "deadline of one request, in seconds", number(float, 0, above=True))
    address: str | None = option(None, "Ray cluster to join ('auto': the one that runs here), else one is started", text)
    host: str | None = option(None, "address to listen on: 0.0.0.0 where the platform sets PORT, else 127.0.0.1", text, FRONT_END)
    port: int | None = option(None, "port to listen on: PORT where the platform sets it, else 8080", number(int, 0, 65535), FRONT_END)
    input: str | None = option(None, "rows to predict with the one --model: .npy, or .npz by input name", array_file, COMMAND)
    output: str | None = option(None, "where the predictions go: .npy, or .npz by output name", array_file, COMMAND)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError as error:
                shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                raise OptionError(f"--{field.name.replace('_', '-')} {shown!s:.200}: must be {error}") from None
        if (self.input is None) != (self.output is None):
            raise OptionError("--input and --output: one needs the other")
        if self.input is not None and len(self.model) != 1:
            raise OptionError(f"--input {self.input}: needs exactly one --model to predict with, not {len(self.model)}")

    @classmethod
    def from_environment(cls, **changes) -> Options:
        """Options from ``RAY_TENSORFLOW_<NAME>`` variables; ``changes`` beat them."""
        for field in dataclasses.fields(cls):
            value = os.environ.get(f"RAY_TENSORFLOW_{field.name.upper()}")
            if value and field.name not in changes:
                changes[field.name] = value
        return cls(**changes)

    @classmethod
    def from_command_line(cls, description: str, kind: str, arguments: list[str] | None = None) -> Options:
        """Options from the command line of a FRONT_END or the COMMAND; a wrong one ends the program with status 2."""
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
        for field in dataclasses.fields(cls):
            if field.metadata["only"] in (None, kind):
                default = "" if field.default in (None, ()) else f" (default: {field.default})"
                parser.add_argument(
                    f"--{field.name.replace('_', '-')}", help=field.metadata["help"] + default, default=argparse.SUPPRESS,
                    action="append" if field.name == "model" else "store", metavar=field.name.upper().split("_")[-1])
        try:
            options = cls.from_environment(**vars(parser.parse_args(arguments)))
            if kind == FRONT_END:
                options.listen  # PORT may be wrong as well
            return options
        except OptionError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")

    @property
    def shared(self) -> dict[str, Any]:
        """Those that all front ends of one shared cluster must have in common."""
        names = ("workers", "threads", "model", "parameter_servers", "placement", "max_batch", "checkpoint_dir")
        return {name: getattr(self, name) for name in names}

    @property
    def listen(self) -> tuple[str, int]:
        """Host and port for a front end; platforms that set ``PORT`` route to all interfaces."""
        platform = os.environ.get("PORT")
        try:
            port = self.port if self.port is not None else number(int, 0, 65535)(platform or 8080)
        except ValueError as error:
            raise OptionError(f"PORT {platform:.200}: must be {error}") from None
        return self.host or ("0.0.0.0" if platform else "127.0.0.1"), port


# ======================================================================================================================
# Models: a MetaGraphDef with signatures, whether it comes from a SavedModel or from a function
# ======================================================================================================================


class TensorSpec(NamedTuple):
    """``dtype`` is numpy's name for it ("object": strings, as bytes); ``shape`` has None for a free axis, or is None."""

    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def free_first_axis(self) -> bool:
        return bool(self.shape) and self.shape[0] is None


@dataclasses.dataclass
class Signature:
    """What can be run: named inputs to named outputs. Plain values only, since it crosses processes."""

    name: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    writes: bool  # running it changes variables: it is never run twice for one request
    batched: bool = False  # rows of several requests may share one run: each answer is the same to the last bit
    calls_out: bool = False  # it runs Python functions, such as remote_predict: it may wait for what only another slot can do
    method: str = "tensorflow/serving/predict"


@dataclasses.dataclass
class Model:
    """A loaded model as the front ends know it."""

    name: str
    version: int
    signatures: dict[str, Signature]
    metadata: dict[str, Any]  # its SignatureDefs as proto3 JSON


ADDER = "adder"


def build_adder(tf):
    """The built-in model: a shared float64 sum to which values are added; each gets the sum right after its own add.

    Read, cumulative sum and assignment are one critical section of one ``session.run``, so that no other worker's add
    slips between (tensorflow#6360). The new sum is checked, and kept, before it is assigned: a run that fails changes nothing,
    and no sum is ever answered that is not on disk. float64, because a float32 sum stops counting at 2**24.
    """
    value = tf.placeholder(tf.float64, [None], name="value")
    total = tf.get_variable("sum", [], tf.float64, tf.zeros_initializer())

    def add():
        sums = tf.cumsum(tf.concat([[total.read_value()], value], axis=0))
        sums = tf.debugging.check_numerics(sums, "the sum would not be finite")
        kept = tf.numpy_function(keep_sum, [sums[-1]], tf.float64)  # runs where the variable is: in the parameter server
        kept.set_shape([])
        with tf.control_dependencies([total.assign(kept, read_value=False)]):
            return sums[1:]

    sums = tf.CriticalSection(shared_name="sum").execute(add)
    return {"serving_default": ({"value": value}, {"sum": sums})}


# Rows are applied in order, and a run that fails has changed nothing: so requests may share a run although it writes.
build_adder.atomic = True


def import_tensorflow():
    """``tensorflow.compat.v1``, imported here and nowhere else, in the actors alone."""
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):  # they break loopback gRPC (tensorflow#50626)
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
        if ray.is_initialized() and not ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all GPUs visible to actors that asked for none (ray#28215)
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()  # and not disable_v2_behavior(), which brings reference variables back
    tf.get_logger().setLevel(os.environ.get("RAY_TENSORFLOW_LOG", "ERROR"))
    return tf


def session_config(tf, addresses: list[str], timeout_s: float = 0):
    """The one session config: variables live on the ``ps`` tasks and are shared by all sessions made with it.

    The TF servers know nothing of each other; each session brings the cluster along. Without ``share_session_state``
    every session would get a private copy of the parameter server's state. Without a timeout a run on a server that died
    would never return.
    """
    config = tf.ConfigProto(
        allow_soft_placement=True, operation_timeout_in_ms=round(timeout_s * 1000),
        experimental=tf.ConfigProto.Experimental(share_session_state_in_clusterspec_propagation=True))
    job = config.cluster_def.job.add(name="ps")
    for task, address in enumerate(addresses):
        job.tasks[task] = address
    return config


def server_config(tf, options: Options, calls_out: bool):
    """Thread and GPU limits, for a server or a local session; a session on a server ignores them (tensorflow#4455).

    Python functions that wait for another server get threads beside those that compute, else they would wait for themselves.
    """
    waiting = IN_FLIGHT_PER_WORKER * options.workers if calls_out else 0
    return tf.ConfigProto(
        intra_op_parallelism_threads=options.threads, inter_op_parallelism_threads=options.threads + waiting,
        gpu_options=tf.GPUOptions(allow_growth=True), allow_soft_placement=True)


class Graph:
    """A model's graph in one process, ready for one session: ``signatures``, ``run`` and, where it is held, ``restore``.

    All operations are made here, once; then the graph is finalized (tensorflow#4151). Stateful nodes get the model's name as
    their container, since equal names in two models would otherwise be one variable on the parameter server.

    The device rule, for task ``home`` of ``tasks`` parameter servers: a graph of one's own runs at home, and its variables are
    spread over all of them; a SavedModel is at home as a whole. A mirror (``tasks`` 0) is all on this process's own device.
    """

    def __init__(self, tf, source: ModelSource, home: int = 0, tasks: int = 1):
        from tensorflow.python.saved_model import loader_impl

        self.source, self.home = source, home
        self.graph = tf.Graph()
        self._loader = self._builder = self.session = self._callables = None
        if source.folder:
            self._loader = loader_impl.SavedModelLoader(source.folder)
            meta_graph = copy.deepcopy(self._loader.get_meta_graph_def_from_tags(["serve"]))
            for node in itertools.chain(meta_graph.graph_def.node, *(f.node_def for f in meta_graph.graph_def.library.function)):
                node.device = ""  # devices of the machine that saved it (tensorflow#4011)
            self.atomic = False
        else:
            meta_graph = self._build(tf)
        set_containers(meta_graph.graph_def, source.name.encode().hex())  # no underscore is allowed in a container's name
        self.signature_defs = meta_graph.signature_def

        # Inputs lose their static shapes: like TensorFlow Serving, we leave the judgement to the kernels.
        inputs = {info.name.partition(":")[0] for d in self.signature_defs.values() for info in d.inputs.values()}
        for node in meta_graph.graph_def.node:
            if node.name in inputs and node.op in ("Placeholder", "PlaceholderV2"):
                node.attr["shape"].shape.Clear()
                node.attr["shape"].shape.unknown_rank = True
        device = f"/job:ps/task:{home}" if tasks else None
        if source.function and tasks > 1:
            device = tf.train.replica_device_setter(tasks, worker_device=device)
        with self.graph.as_default(), tf.device(device):
            self._saver = tf.train.import_meta_graph(meta_graph)
            names = {t.name for d in self.signature_defs.values() for t in d.outputs.values() if t.dtype and t.name}
            self.variables = TensorFlowVariables([self.graph.get_tensor_by_name(name) for name in sorted(names)])
        self.graph.finalize()

        self.signatures = {}
        for name, definition in self.signature_defs.items():
            tensors = [*definition.inputs.values(), *definition.outputs.values()]
            if definition.outputs and all(t.WhichOneof("encoding") == "name" and t.dtype for t in tensors):
                inputs, outputs = ({k: tensor_spec(self.graph, v[k]) for k in sorted(v)} for v in (definition.inputs, definition.outputs))
                types = operation_types(meta_graph.graph_def, [t.name for t in definition.outputs.values()])
                writes = any(map(STATE_CHANGING.fullmatch, types))
                calls_out = not self.atomic and any(map(PYTHON_FUNCTION.fullmatch, types))
                self.signatures[name] = Signature(
                    name, inputs, outputs, writes, calls_out=calls_out, method=definition.method_name)

    def _build(self, tf):
        """Call the user's function, in a graph of its own, and describe what it made as a SavedModel would."""
        from tensorflow.core.protobuf import meta_graph_pb2

        module, _, name = self.source.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        self.atomic = getattr(function, "atomic", False)
        self._builder = tf.Graph()  # kept: it owns the Python functions of its py_func operations
        with self._builder.as_default():
            signatures = {  # a variable may stand for its value
                signature: [{name: tf.convert_to_tensor(value) for name, value in side.items()} for side in (inputs, outputs)]
                for signature, (inputs, outputs) in function(tf).items()}
            initializers = tf.global_variables_initializer(), tf.local_variables_initializer(), tf.tables_initializer()
            initializer = tf.group(*initializers, name="initialize_all")
        meta_graph = meta_graph_pb2.MetaGraphDef(graph_def=self._builder.as_graph_def())
        self._initializer = initializer.name
        for signature, sides in signatures.items():
            infos = [{name: tf.saved_model.build_tensor_info(tensor) for name, tensor in side.items()} for side in sides]
            meta_graph.signature_def[signature].CopyFrom(
                tf.saved_model.build_signature_def(*infos, method_name=tf.saved_model.PREDICT_METHOD_NAME))
        return meta_graph

    def connect(self, tf, addresses: list[str], options: Options, timeout_s: float = 0) -> None:
        """Make the session, on the parameter servers at these addresses or in this process, and a callable for each signature.

        Called again it makes another session, and leaves the first one behind, which may wait for a server that is gone.
        """
        from tensorflow.core.protobuf import config_pb2

        target = f"grpc://{addresses[self.home]}" if addresses else ""
        config = session_config(tf, addresses, timeout_s) if addresses else server_config(tf, options, self.calls_out)
        session, callables, places = tf.Session(target, self.graph, config), {}, {}
        for name in self.signatures:
            definition = self.signature_defs[name]
            feed = [definition.inputs[alias].name for alias in sorted(definition.inputs)]
            fetch = [definition.outputs[alias].name for alias in sorted(definition.outputs)]
            once = list(dict.fromkeys(fetch))  # TensorFlow wants each tensor named once
            places[name] = [once.index(tensor) for tensor in fetch]
            # half the time of session.run, and no check against static shapes; make_callable is session.run in disguise
            call = config_pb2.CallableOptions(feed=feed, fetch=once)
            callables[name] = session._make_callable_from_options(call)
        left = [self.session, self._callables]
        self.session, self._callables, self._places = session, callables, places
        self.variables.set_session(session)
        threading.Thread(target=left.clear, daemon=True).start()  # the end of a session waits for its server as well

    @property
    def calls_out(self) -> bool:
        return any(signature.calls_out for signature in self.signatures.values())

    def run(self, signature: str, feed: list[np.ndarray]) -> list[np.ndarray]:
        """The one ``session.run``: arrays in the order of the sorted input names to arrays in that of the outputs."""
        outputs = self._callables[signature](*feed)
        outputs = [np.array(output, object) if isinstance(output, bytes) else np.asarray(output) for output in outputs]
        return [outputs[place] for place in self._places[signature]]

    def restore(self, variables: bool = True) -> None:
        """Put the variables' (unless they come from elsewhere) and tables' first values in place."""
        if self._loader:
            if variables:
                self._loader.restore_variables(self.session, self._saver)
            self._loader.run_init_ops(self.session, ["serve"])
        else:
            self.session.run(self.graph.get_operation_by_name(self._initializer))

    def describe(self, max_batch: int) -> Model:
        """What the front ends have to know of this model. Finds out by experiment which signatures can be batched."""
        from google.protobuf import json_format

        for signature in self.signatures.values():
            specs = [*signature.inputs.values(), *signature.outputs.values()]
            if signature.inputs and not signature.calls_out and all(spec.free_first_axis for spec in specs):
                signature.batched = self.atomic if signature.writes else self._rows_are_independent(signature, max_batch)
        definitions = {
            name: json_format.MessageToDict(d, always_print_fields_with_no_presence=True, preserving_proto_field_name=True)
            for name, d in sorted(self.signature_defs.items())}
        return Model(self.source.name, self.source.version, self.signatures, {"signature_def": {"signature_def": definitions}})

    def _rows_are_independent(self, signature: Signature, max_batch: int, seconds: float = 5.0) -> bool:
        """Is each row's answer the same to the last bit, whatever rows it shares a run with?

        Not a matter of course: matrix products and convolutions of several rows add in another order than those of one,
        and oneDNN picks its kernels by shape. Tried on random rows; a model too slow to be tried gains little anyway.
        """
        deadline = time.monotonic() + seconds
        rows = sample_rows(signature, max_batch)
        alone: list[list[np.ndarray]] = []
        try:
            for together in sorted({2, 3, 5, 8, 13, 16, 32, max_batch}):
                while len(alone) < together <= max_batch:
                    alone.append(self.run(signature.name, [array[len(alone):len(alone) + 1] for array in rows]))
                    if time.monotonic() > deadline:
                        return False
                if together <= max_batch:
                    results = self.run(signature.name, [array[:together] for array in rows])
                    for result, *singles in zip(results, *alone[:together]):
                        if not same_bits(result, np.concatenate(singles)):
                            return False
        except Exception as error:  # it does not like our random rows, and we cannot know what it likes
            log.info("model %s: signature %r is not batched: %s", self.source.name, signature.name, first_sentence(str(error)))
            return False
        return True

    def warm_up(self) -> None:
        """The first run of a signature is slow (tensorflow/serving#385): do it before anybody waits, changing nothing."""
        for signature in self.signatures.values():
            if not signature.calls_out and (not signature.writes or self.atomic):
                with contextlib.suppress(Exception):  # a sample that the model refuses has warmed it up as well
                    self.run(signature.name, sample_rows(signature, 0 if self.atomic else 1))


class TensorFlowVariables:
    """Gets and sets the variables behind an output: by name, as Ray's users know it, or as one flat vector.

    ``output`` is a tensor or an operation, or a list of them; found are the variables that it depends on in any way, control
    dependencies included, and ``input_variables`` beside them. With ``prefix=True`` names lack the scope that all have in
    common, so that two copies of a network under two scopes can exchange weights. All operations are made here, once.

    ``variables``, ``placeholders`` and ``assignment_nodes`` are dicts by name. After ray.experimental.tf_utils.
    """

    def __init__(self, output, sess=None, input_variables=None, prefix: bool = False):
        tf = import_tensorflow()
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        self.sess = sess
        operations = variable_operations([getattr(o, "op", o) for o in outputs])
        operations |= {variable.op.name: variable.op for variable in input_variables or ()}
        scope = os.path.commonprefix([name.rpartition("/")[0] + "/" for name in operations]).rpartition("/")[0] if prefix else ""
        named = {name[len(scope) + 1:] if scope else name: operation for name, operation in sorted(operations.items())}
        graph = next(iter(operations.values()), getattr(outputs[0], "graph", None)).graph if operations else None
        objects = {v.op.name: v for v in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)} if operations else {}
        self.variables, self.placeholders, self.assignment_nodes, self._values = {}, {}, {}, {}
        with graph.as_default() if operations else contextlib.nullcontext():
            for name, operation in named.items():
                handle = operation.outputs[0]
                dtype, shape = operation.get_attr("dtype"), operation.get_attr("shape")
                with tf.colocate_with(operation):
                    new = tf.placeholder(dtype, tf.TensorShape(shape), name="Placeholder_" + name)
                    if operation.type == "VarHandleOp":
                        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
                        assign = tf.raw_ops.AssignVariableOp(resource=handle, value=new)
                    else:  # a reference variable of TensorFlow 1
                        value, assign = tf.identity(handle), tf.raw_ops.Assign(ref=handle, value=new).op
                self.variables[name] = objects.get(operation.name, handle)
                self.placeholders[name], self.assignment_nodes[name], self._values[name] = new, assign, value

    def set_session(self, sess) -> None:
        self.sess = sess

    def get_flat_size(self) -> int:
        """How many numbers all variables have together."""
        return sum(placeholder.shape.num_elements() for placeholder in self.placeholders.values())

    def get_flat(self) -> np.ndarray:
        """All variables as one vector, in the order of their sorted names."""
        return np.concatenate([value.ravel() for value in self.get_weights().values()] or [np.zeros(0)])

    def set_flat(self, new_weights: np.ndarray) -> None:
        """Set all variables from one vector of ``get_flat_size()`` numbers."""
        new_weights = np.asarray(new_weights)
        if new_weights.shape != (self.get_flat_size(),):
            raise InvalidRequest(f"flat weights must have the shape ({self.get_flat_size()},), not {new_weights.shape}")
        sizes = [placeholder.shape.num_elements() for placeholder in self.placeholders.values()]
        parts = np.split(new_weights, np.cumsum(sizes)[:-1])
        shaped = {name: part.reshape(p.shape) for part, (name, p) in zip(parts, self.placeholders.items())}
        if new_weights.dtype.kind in "biuf":  # the vector has one dtype, but the variables may differ
            shaped = {name: part.astype(self.placeholders[name].dtype.as_numpy_dtype) for name, part in shaped.items()}
        self.set_weights(shaped)

    def get_weights(self) -> dict[str, np.ndarray]:
        """The variables' values by name, one at a time: together they may be more than a protobuf can hold (tensorflow#2233)."""
        return {name: np.asarray(self._session().run(value)) for name, value in self._values.items()}

    def set_weights(self, new_weights: dict[str, np.ndarray]) -> None:
        """Set some or all variables. A wrong name or shape is an InvalidRequest, and then none of them is set."""
        feeds = {}
        for name, value in new_weights.items():
            if name not in self.placeholders:
                raise InvalidRequest(f"there is no variable {name!r}; there are {sorted(self.placeholders)}")
            placeholder, value = self.placeholders[name], np.asarray(value)
            if value.shape != tuple(placeholder.shape.as_list()):
                raise InvalidRequest(f"variable {name!r} has the shape {tuple(placeholder.shape.as_list())}, not {value.shape}")
            feeds[name] = to_array(f"variable {name!r}", value, TensorSpec(np.dtype(placeholder.dtype.as_numpy_dtype).name, None))
            if feeds[name].nbytes >= 2**31 - 2**20:
                raise InvalidRequest(f"variable {name!r} is larger than the 2 GiB that TensorFlow can be fed")
        together = [feeds] if sum(value.nbytes for value in feeds.values()) < 2**30 else [{name: feeds[name]} for name in feeds]
        for part in together:
            nodes = [self.assignment_nodes[name] for name in part]
            self._session().run(nodes, {self.placeholders[name]: value for name, value in part.items()})

    def _session(self):
        if self.sess is None:
            raise InvalidRequest("there is no session yet: give sess, or call set_session")
        return self.sess


def variable_operations(operations: list) -> dict[str, Any]:
    """The operations that hold variables among these and all that they depend on, by name."""
    seen, stack = set(), list(operations)
    while stack:
        operation = stack.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            stack.extend([*(tensor.op for tensor in operation.inputs), *operation.control_inputs])
    return {operation.name: operation for operation in seen if operation.type in ("VarHandleOp", "VariableV2", "Variable")}


def set_containers(graph_def, container: str) -> None:
    """Put each resource of a graph, those of its functions included, into the named container."""
    from tensorflow.python.framework import op_def_registry

    for node in itertools.chain(graph_def.node, *(function.node_def for function in graph_def.library.function)):
        definition = op_def_registry.get(node.op)
        if definition and any(attribute.name == "container" for attribute in definition.attr):
            own = node.attr["container"].s
            node.attr["container"].s = container.encode() + (b"/" + own if own else b"")


# Operations that change what a later run sees
STATE_CHANGING = re.compile(
    r"Assign\w*|(Resource)?(Sparse)?Apply\w+|ResourceScatter\w+|Scatter(Add|Sub|Mul|Div|Min|Max|Update|Nd\w+)"
    r"|ResourceStridedSliceAssign|(Resource)?CountUpTo|LookupTable(Insert|Import|Remove)\w*|(Queue|Barrier|Stack)\w+|(Map)?(Uns|S)tage"
    r"|Rng\w+|Stateful(Standard|Uniform|Truncated|Random)\w+|WriteFile")
PYTHON_FUNCTION = re.compile(r"(Eager)?PyFunc(Stateless)?")


def operation_types(graph_def, outputs: list[str]) -> set[str]:
    """The types of all operations that these tensors depend on: by inputs, control inputs and called functions."""
    functions = {f.signature.name: f.node_def for f in graph_def.library.function}
    nodes = {node.name: node for node in graph_def.node}
    seen, stack = {}, [nodes[name.partition(":")[0]] for name in outputs]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if nodes.get(node.name) is node:  # within a function all nodes count, so nothing is followed there
            stack.extend(nodes[name.lstrip("^").partition(":")[0]] for name in node.input)
        for attribute in node.attr.values():
            for function in [attribute.func, *attribute.list.func]:
                stack.extend(functions.get(function.name, ()))
        stack.extend(functions.get(node.op, ()))
    return {node.op for node in seen.values()}


def tensor_spec(graph, info) -> TensorSpec:
    """The declared shape, and the dtype that the tensor has: there are SavedModels that declare another one."""
    shape = None if info.tensor_shape.unknown_rank else tuple(None if d.size < 0 else d.size for d in info.tensor_shape.dim)
    return TensorSpec(np.dtype(graph.get_tensor_by_name(info.name).dtype.as_numpy_dtype).name, shape)


def sample_rows(signature: Signature, rows: int) -> list[np.ndarray]:
    """Random inputs with this many rows, by sorted name: normal numbers, zeros and ones, empty strings."""
    random = np.random.default_rng(0)
    arrays = []
    for spec in signature.inputs.values():
        shape = tuple(3 if n is None else n for n in spec.shape or ())
        shape = (rows, *shape[1:]) if spec.free_first_axis else shape
        dtype = np.dtype(spec.dtype)
        if dtype == object:
            arrays.append(np.full(shape, b"", object))
        else:
            numbers = random.integers(0, 2, shape) if dtype.kind in "biu" else random.standard_normal(shape)
            arrays.append(numbers.astype(dtype))
    return arrays


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and (a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes())


def failure_of(error: Exception) -> tuple[int | None, str]:
    """The ``tensorflow::error::Code`` and the message of what made a run fail."""
    return PythonFailure.find(error) or (getattr(error, "error_code", None), first_sentence(str(error)))


def first_sentence(message: str) -> str:
    """TensorFlow's message without its first line's "From /job:..." and without the nodes and traces after it."""
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("From /job:", "[[", "Graph execution error:"))]
    return re.sub(r"\s*\[\[.*?\]\]", "", lines[0]) if lines else "no reason was given"


# ======================================================================================================================
# Remote predict: another server's model as an operation of one's own graph
# ======================================================================================================================

# HTTP status to tensorflow::error::Code, where a server of TensorFlow Serving's REST contract answered with an error
ERROR_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 10, 413: 3, 429: 8, 499: 1, 501: 12, 502: 14, 503: 14, 504: 4}


def remote_predict(
    input_tensor_aliases: list[str], input_tensors: list, output_tensor_aliases: list[str], target_address: str, model_name: str,
    model_version: int = -1, max_rpc_deadline_millis: int = 3000, output_types: list | None = None, name: str | None = None,
    signature_name: str = "serving_default", fail_op_on_rpc_error: bool = True
):
    """In a graph: the outputs of a model at ``target_address`` ("host:port"), a server of TensorFlow Serving's REST predict.

    Returns the output tensors, of ``output_types`` (float32 if not given) and unknown shape; a run fails when the call does. With
    ``fail_op_on_rpc_error=False`` returns (status_code, status_error_message, output tensors) and never fails because of the
    call: the code is an int32 ``tensorflow::error::Code``, 0 for success, and the outputs are empty scalars after an error.
    ``model_version`` -1 is the latest. The deadline is for the whole call, in milliseconds.

    Source: tensorflow_serving/experimental/tensorflow/ops/remote_predict. Raises ValueError when the lengths do not agree.
    """
    tf = import_tensorflow()
    dtypes = [tf.as_dtype(dtype) for dtype in output_types or [tf.float32] * len(output_tensor_aliases)]
    if not model_name:
        raise ValueError("model_name must be specified.")
    if len(input_tensor_aliases) != len(input_tensors):
        raise ValueError(f"{len(input_tensor_aliases)} input_tensor_aliases do not fit {len(input_tensors)} input_tensors")
    if len(output_tensor_aliases) != len(dtypes):
        raise ValueError(f"{len(output_tensor_aliases)} output_tensor_aliases do not fit {len(dtypes)} output_types")
    specs = {alias: TensorSpec(np.dtype(t.as_numpy_dtype).name, None) for alias, t in zip(output_tensor_aliases, dtypes)}
    version = f"/versions/{model_version}" if model_version >= 0 else ""
    path = f"/v1/models/{urllib.parse.quote(model_name, safe='')}{version}"

    def call(*inputs):
        named = dict(zip(input_tensor_aliases, inputs))
        code, message, outputs = call_remote(target_address, path, signature_name, named, specs, max_rpc_deadline_millis / 1000)
        if code and fail_op_on_rpc_error:
            raise PythonFailure(code, message)
        return [np.int32(code), message.encode(), *outputs]

    name = name or "remote_predict"
    code, message, *outputs = tf.numpy_function(call, input_tensors, [tf.int32, tf.string, *dtypes], name=name)
    for scalar in (code, message):
        scalar.set_shape([])
    return outputs if fail_op_on_rpc_error else (code, message, outputs)


class PythonFailure(Exception):
    """How a Python function in a graph fails with a ``tensorflow::error::Code`` and words of its own.

    TensorFlow makes it a part of a message of its own, in which only plain characters are safe.
    """

    def __init__(self, code: int, message: str):
        super().__init__(f"<{code}:{base64.b64encode(message.encode()).decode()}>")

    @staticmethod
    def find(error: Exception) -> tuple[int, str] | None:
        """Code and message, when this is what made a run fail."""
        found = re.search(r"PythonFailure: <(\d+):([\w+/=]*)>", str(error))
        return (int(found[1]), base64.b64decode(found[2]).decode()) if found else None


def call_remote(
    address: str, path: str, signature_name: str, inputs: dict[str, np.ndarray], specs: dict[str, TensorSpec], seconds: float
) -> tuple[int, str, list[np.ndarray]]:
    """``tensorflow::error::Code``, message and outputs of one predict over REST, within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        document = json.loads(request_http(address, "GET", f"{path}/metadata", None, deadline))
        signature = document["metadata"]["signature_def"]["signature_def"].get(signature_name)
        if signature is None:
            raise InvalidRequest(f'Serving signature name: "{signature_name}" not found in signature def')
        if inputs.keys() != signature["inputs"].keys():
            raise InvalidRequest(f"input aliases {sorted(inputs)} do not match the signature's {sorted(signature['inputs'])}")
        if missing := specs.keys() - signature["outputs"].keys():
            raise InvalidRequest(f"output alias {min(missing)!r} is not among the signature's {sorted(signature['outputs'])}")
        texts = {name: json_texts(np.asarray(array), 0, f"{name}_bytes")[0] for name, array in inputs.items()}
        body = f'{{"signature_name": {json.dumps(signature_name)}, "inputs": {json_object(texts)}}}'
        outputs = json.loads(request_http(address, "POST", f"{path}:predict", body.encode(), deadline))["outputs"]
        named = outputs if len(signature["outputs"]) > 1 else dict.fromkeys(signature["outputs"], outputs)
        return 0, "", [parse_tensor(named[name], spec) for name, spec in specs.items()]
    except Error as error:
        code, message = ERROR_CODES.get(error.status, 13), error.message
    except TimeoutError:
        code, message = 4, f"{address} did not answer within {seconds * 1000:g} ms"
    except OSError as error:
        code, message = 14, f"{address} cannot be reached: {error.strerror or error}"
    except (http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        code, message = 13, f"{address} does not answer as TensorFlow Serving does: {type(error).__name__}: {error}"
    empty = [np.array(b"", object) if spec.dtype == "object" else np.zeros((), spec.dtype) for spec in specs.values()]
    return code, " ".join(message.split()), empty


def request_http(address: str, method: str, path: str, body: bytes | None, deadline: float) -> bytes:
    """The body of a 200 answer. Raises Error with the status and message of another, TimeoutError after the deadline, OSError."""
    host, _, port = address.rpartition(":")
    left = max(0.001, deadline - time.monotonic())
    connection = http.client.HTTPConnection(host, int(port), timeout=left)
    connection.connect()
    # the socket's own timeout starts anew with each byte that arrives
    end = threading.Timer(left, shut_down, [connection.sock])
    end.start()
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException):
        if time.monotonic() < deadline:
            raise
    finally:
        end.cancel()
        connection.close()
    if time.monotonic() >= deadline:
        raise TimeoutError
    if response.status != 200:
        raise Error(json.loads(text).get("error", "no reason was given"), response.status)
    return text


def shut_down(connected: socket.socket) -> None:
    """Let whoever waits for this socket go on, with an error."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


# ======================================================================================================================
# The parameter server: holds the variables, and in `shared` placement runs the models
# ======================================================================================================================

KEEP_EVERY_S = 10.0  # how old the kept variables of a model may be that changes them when it runs


SUM_RECORD = struct.Struct("<dI")  # the adder's sum and the CRC-32 of its eight bytes


class Checkpoints:
    """Variables in files, one for each model: ``<model>.<version>.npz`` in a folder, written aside and renamed; and ``adder.sum``.

    What is written has survived a killed process; if ``durable``, a power cut as well. Only one program at a time may use a
    folder. Methods raise Error, a sentence that names the file.
    """

    def __init__(self, folder: str, durable: bool):
        self.folder, self.durable = folder, durable
        self._sum_file: int | None = None
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock = open(os.path.join(folder, ".lock"), "w")
            deadline = time.monotonic() + 5  # a parameter server that was just ended may still have it
            while not self._is_ours():
                if time.monotonic() > deadline:
                    raise Unavailable(f"The checkpoint folder {folder} is in use by another program.")
                time.sleep(0.1)
        except OSError as error:
            raise Unavailable(f"The checkpoint folder {folder} cannot be used: {error.strerror}.") from None

    def _is_ours(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
            return True
        return False

    def path(self, source: ModelSource) -> str:
        return os.path.join(self.folder, "adder.sum" if source == ADDER_SOURCE else f"{source.name}.{source.version}.npz")

    def keep(self, source: ModelSource, weights: dict[str, np.ndarray]) -> None:
        plain = {f"variables/{name}": as_plain(value) for name, value in weights.items()}
        with self._keeping(source):
            self._write_aside(source, lambda file: np.savez(file, **plain))

    def keep_sum(self, total: float) -> None:
        """The adder's, for each batch, and so in place once there is a file: that takes a hundredth of the time, and so few bytes
        are in one sector of the disk, which is written as a whole or not at all."""
        record = sum_record(total)
        with self._keeping(ADDER_SOURCE):
            if self._sum_file is None:
                self._write_aside(ADDER_SOURCE, lambda file: file.write(record))
                self._sum_file = os.open(self.path(ADDER_SOURCE), os.O_WRONLY)
                return
            if not os.fstatvfs(self._sum_file).f_bavail:  # there are file systems that need room even so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._sum_file, record, 0)
            if self.durable:
                os.fdatasync(self._sum_file)

    def load(self, source: ModelSource) -> dict[str, np.ndarray] | None:
        """What was kept last, or None if nothing ever was."""
        path = self.path(source)
        if not os.path.exists(path):
            return None
        try:
            if source == ADDER_SOURCE:
                with open(path, "rb") as file:
                    return {"sum": np.float64(read_sum_record(file.read()))}
            with np.load(path, allow_pickle=False) as file:
                return {name.removeprefix("variables/"): from_plain(file[name]) for name in file.files}
        except Exception as error:  # there is no end to what numpy and zipfile raise
            raise ModelError(f"The checkpoint {path} is damaged ({first_sentence(str(error))}): put a good one in its place, or"
                             " remove it to start without.") from None

    def _write_aside(self, source: ModelSource, write: Callable[[BinaryIO], Any]) -> None:
        path = self.path(source)
        with open(path + ".new", "wb") as file:
            write(file)
            if self.durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(path + ".new", path)
        if self.durable:
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    @contextlib.contextmanager
    def _keeping(self, source: ModelSource):
        try:
            yield
        except OSError as error:
            raise Unavailable(f"The variables cannot be kept in {self.path(source)}: {error.strerror}.") from None


def sum_record(total: float) -> bytes:
    return SUM_RECORD.pack(total, zlib.crc32(struct.pack("<d", total)))


def read_sum_record(record: bytes) -> float:
    """Raises ValueError when it is not one."""
    total = SUM_RECORD.unpack(record)[0] if len(record) == SUM_RECORD.size else math.nan
    if record != sum_record(total):
        raise ValueError("it is not a sum and its CRC-32")
    return total


def as_plain(array: np.ndarray) -> np.ndarray:
    """Strings as fixed-width bytes, each with a full stop behind it since numpy strips zeros from the end."""
    array = np.asarray(array)
    return np.array([text + b"." for text in array.ravel()], "S").reshape(array.shape) if array.dtype == object else array


def from_plain(array: np.ndarray) -> np.ndarray:
    return np.array([text[:-1] for text in array.ravel()], object).reshape(array.shape) if array.dtype.kind == "S" else array


checkpoints: Checkpoints | None = None  # of this process, where it is the first parameter server
ADDER_SOURCE = ModelSource(ADDER, 1, function=f"{__name__}:build_adder")


def keep_sum(total: np.ndarray) -> np.ndarray:
    """Called by the adder's graph with the new sum before it is assigned: a sum that cannot be kept fails the run."""
    try:
        if checkpoints:
            checkpoints.keep_sum(total.item())
    except Error as error:
        raise PythonFailure(ERROR_CODES[error.status], error.message) from None
    return total


class ParameterServer:
    """A Ray actor with a TensorFlow server in it, and on that the state of the models, or its part of it.

    The first of them also loads the models, onto all of them, and keeps their variables in ``folder``; ``again`` says that
    this program has had a first one before, so that what it kept has to be there.
    """

    def __init__(self, index: int, options: Options, folder: str, again: bool):
        self.index, self.options, self.folder, self.again = index, options, folder, again
        self.graphs: dict[str, Graph] = {}
        self.server = None
        self.description: tuple[list[str], list[Model]] | None = None
        self.kept: dict[str, int] = {}  # a fingerprint of each model's variables as they were kept last
        self.trouble: str | None = None  # with keeping them
        self.versions: dict[str, tuple[int, list]] = {}  # of mirrored models
        self.count = time.time_ns()  # never again a number that an earlier parameter server gave out
        self.executor = concurrent.futures.ThreadPoolExecutor(1, "in turn")
        self.staying = asyncio.Event()
        self.keeping: asyncio.Future | None = None

    # Each of these runs in the one thread, one at a time, so that the event loop can always answer about().

    async def serve(self) -> str:
        return await self._in_turn(self._serve)

    async def start(self, others: list[str]) -> tuple[list[str], list[Model]]:
        description = await self._in_turn(self._start, others)
        self.keeping = self.keeping or asyncio.ensure_future(self._keep_now_and_then())
        return description

    async def get_weights(self, model: str) -> dict[str, np.ndarray]:
        return await self._in_turn(self._get_weights, model)

    async def set_weights(self, model: str, weights: dict[str, np.ndarray]) -> None:
        """They are kept when this returns."""
        await self._in_turn(self._set_weights, model, weights)

    async def latest(self, model: str) -> tuple[int, list]:
        """The number of the weights' version, and (in a list, so that Ray leaves it alone) where the object store has them."""
        return await self._in_turn(self._latest, model)

    async def keep(self) -> None:
        """Keep the variables that models have changed since they were kept last."""
        await self._in_turn(self._keep)

    async def _in_turn(self, method, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.executor, method, *arguments)

    # These two wait for nothing.

    async def stay(self) -> None:
        """Returns only when it is called again: a call whose failure tells at once that this process is gone."""
        await stay(self)

    async def about(self) -> dict[str, Any]:
        """Process id, node, the devices that this actor may use, and what is wrong with keeping variables, if anything is."""
        return about_this_actor() | ({"trouble": self.trouble} if self.trouble else {})

    def _serve(self) -> str:
        """Boot the TensorFlow server on a port that the system picks; its address. It ends with this process (tensorflow#4713).

        Its own job is called ``boot``, because the sessions that come with a cluster of their own call it ``ps``.
        """
        global checkpoints
        tf = import_tensorflow()
        if self.server is None:
            if self.index == 0:
                checkpoints = Checkpoints(self.folder, durable=self.options.checkpoint_dir is not None)
            self.graphs = {graph.source.name: graph for graph in build_graphs(tf, self.options)}
            config = server_config(tf, self.options, any(graph.calls_out for graph in self.graphs.values()))
            self.server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=config)
        return f"{ray.util.get_node_ip_address()}:{self.server.target.rpartition(':')[2]}"

    def _start(self, others: list[str]) -> tuple[list[str], list[Model]]:
        """Load the models onto this server and the ``others``; the addresses of all, and what can be served.

        Called again, it just returns the same. Raises ModelError when a model cannot be loaded.
        """
        if self.description is None:
            tf = import_tensorflow()
            addresses = [self._serve(), *others]
            models = []
            for graph in self.graphs.values():
                with loading(graph.source):
                    graph.connect(tf, addresses, self.options)
                    graph.restore()
                self._bring_back(graph)
                with loading(graph.source):
                    models.append(graph.describe(self.options.max_batch))
                if is_mirrored(self.options, graph.source) and self._changes(graph):
                    reason = "changes its variables when it runs, so it cannot be mirrored: use --placement shared"
                    raise ModelError(f"model {graph.source} {reason}")
            self.description = addresses, models
        return self.description

    def _bring_back(self, graph: Graph) -> None:
        """Set the variables to what was kept of them, and keep those of the models that change them from now on."""
        weights = checkpoints.load(graph.source)
        path = checkpoints.path(graph.source)
        if weights is not None:
            try:
                graph.variables.set_weights(weights)
            except InvalidRequest as error:
                raise ModelError(f"The checkpoint {path} is not of this model: {error}") from None
        elif self.again and self._changes(graph):
            raise ModelError(f"The checkpoint {path} is gone, and the model's changed variables with it: start the program anew.")
        if graph.source == ADDER_SOURCE:
            checkpoints.keep_sum(graph.variables.get_weights()["sum"].item())
        else:
            self._keep_if_changed(graph)

    def _changes(self, graph: Graph) -> bool:
        return any(signature.writes for signature in graph.signatures.values())

    def _get_weights(self, model: str) -> dict[str, np.ndarray]:
        return self.graphs[model].variables.get_weights()

    def _set_weights(self, model: str, weights: dict[str, np.ndarray]) -> None:
        graph = self.graphs[model]
        graph.variables.set_weights(weights)
        self.versions.pop(model, None)
        if graph.source != ADDER_SOURCE:
            checkpoints.keep(graph.source, graph.variables.get_weights())
            return
        try:
            graph.run("serving_default", [np.zeros(1)])  # keeps the sum, and no other add can come between
        except Exception as error:
            raise Unavailable(failure_of(error)[1]) from None

    def _latest(self, model: str) -> tuple[int, list]:
        if model not in self.versions:
            self.count += 1
            self.versions[model] = self.count, [ray.put(self._get_weights(model))]
        return self.versions[model]

    def _keep(self) -> None:
        for graph in self.graphs.values():
            if not graph.atomic:  # the others keep each change themselves, before it is answered
                self._keep_if_changed(graph)

    def _keep_if_changed(self, graph: Graph) -> None:
        if self._changes(graph):
            weights = graph.variables.get_weights()
            fingerprint = hash(tuple((name, zlib.crc32(as_plain(value).tobytes())) for name, value in weights.items()))
            if self.kept.get(graph.source.name) != fingerprint:
                checkpoints.keep(graph.source, weights)
                self.kept[graph.source.name] = fingerprint

    async def _keep_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(KEEP_EVERY_S)
            try:
                await self.keep()
                self.trouble = None
            except Exception as error:  # it is tried again soon, and meanwhile about() tells
                self.trouble = first_sentence(str(error))


def build_graphs(tf, options: Options, mirrors: bool = False) -> list[Graph]:
    """The graphs of all models, built in the same order and under the same device rule in every process."""
    graphs = []
    for index, source in enumerate([ADDER_SOURCE, *options.model]):
        home = 0 if source.function else index % options.parameter_servers
        with loading(source):
            graphs.append(Graph(tf, source, home, 0 if mirrors and is_mirrored(options, source) else options.parameter_servers))
    return graphs


@contextlib.contextmanager
def loading(source: ModelSource):
    """Whatever goes wrong in this block is a ModelError that names the model."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"model {source} cannot be loaded: {type(error).__name__}: {first_sentence(str(error))}") from error


def is_mirrored(options: Options, source: ModelSource) -> bool:
    return options.placement == "mirrored" and source.name != ADDER


def about_this_actor() -> dict[str, Any]:
    return {
        "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "gpus": ray.get_gpu_ids(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")}


async def stay(actor) -> None:
    """Until the actor is asked to stay anew."""
    actor.staying.set()
    actor.staying = asyncio.Event()
    await actor.staying.wait()


# ======================================================================================================================
# Lines: how batches travel. Ray starts and places the actors, watches them and moves weights; but one of its calls takes
# milliseconds of processor time over all processes, several times what a small run does
# ======================================================================================================================


class Door(NamedTuple):
    """Where a worker takes batches, from whoever knows the key."""

    address: tuple[str, int]
    key: bytes


def listen(run: Callable[..., Any]) -> Door:
    """Make a door, at this node's own address: what comes there calls ``run``, in a thread for each line, and gets what it returns
    or the Error that it raises. Until a line has shown the key nothing of it is looked at."""
    host, key = ray.util.get_node_ip_address(), secrets.token_bytes(32)
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

    def accept() -> None:
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=serve, args=[stream], name="line", daemon=True).start()

    def serve(stream: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), stream:
            stream.settimeout(10)
            if not hmac.compare_digest(stream.recv(len(key), socket.MSG_WAITALL), key):
                return
            with as_connection(stream) as connection:
                while True:
                    arguments = receive(connection)
                    try:
                        answer = run(*arguments)
                    except Error as error:
                        answer = error.with_traceback(None)  # else it would keep this frame, and the frame it
                    send(connection, answer)

    threading.Thread(target=accept, name="door", daemon=True).start()
    return Door(listener.getsockname()[:2], key)


class Lines:
    """The connections of this process to one worker. On each travels one batch at a time, in a thread that waits for its results."""

    def __init__(self, door: Door):
        self._door, self._jobs = door, queue.SimpleQueue()
        self._streams: list[socket.socket] = []
        for _ in range(IN_FLIGHT_PER_WORKER):
            threading.Thread(target=self._live, name="ray_tensorflow line", daemon=True).start()

    def call(self, *arguments) -> concurrent.futures.Future:
        """Returns at once. The future raises the worker's Error, or, when that is gone, mostly OSError."""
        future = concurrent.futures.Future()
        self._jobs.put((arguments, future))
        return future

    def close(self) -> None:
        for _ in range(IN_FLIGHT_PER_WORKER):
            self._jobs.put(None)
        for stream in self._streams:
            shut_down(stream)

    def _live(self) -> None:
        with contextlib.ExitStack() as stack:
            connection = None
            while job := self._jobs.get():
                arguments, future = job
                try:
                    connection = connection or self._connect(stack)
                    send(connection, arguments)
                    answer = receive(connection)
                except EOFError:
                    answer = ConnectionError("it closed the connection")
                except Exception as error:  # whatever it is: nobody is to wait for this line for ever
                    answer = error.with_traceback(None)
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _connect(self, stack: contextlib.ExitStack) -> Connection:
        stream = stack.enter_context(socket.create_connection(self._door.address, 10))
        self._streams.append(stream)
        stream.sendall(self._door.key)
        return stack.enter_context(as_connection(stream))


def as_connection(stream: socket.socket) -> Connection:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.settimeout(None)
    return Connection(os.dup(stream.fileno()))


LARGE_ARRAY_BYTES = 2**16  # it goes beside the pickle, uncopied


def send(connection: Connection, value: Any) -> None:
    beside: list[pickle.PickleBuffer] = []
    connection.send_bytes(pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < LARGE_ARRAY_BYTES or beside.append(b)))
    for buffer in beside:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes(), buffers=iter(connection.recv_bytes, None))


# ======================================================================================================================
# The workers: each builds the same graphs against the parameter server, and runs what it is given
# ======================================================================================================================

# A result as it crosses processes: arrays in the order of the sorted output names, or (status, message).
Result = list[np.ndarray] | tuple[int, str]

# tensorflow::error::Code to HTTP status, as TensorFlow Serving has it; any other is 500
HTTP_STATUS = {1: 499, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 14: 503, 16: 401}
DISCONNECTED = (4, 10, 14)  # what a run fails with when its parameter server is gone, or another one is in its place


class Worker:
    """A Ray actor that runs sessions on the parameter server, for whoever comes to its ``door``."""

    def __init__(self, index: int, options: Options):
        self.index, self.options = index, options
        self.graphs: dict[str, Graph] = {}
        self.versions: dict[str, int] = {}  # of the weights in each mirror
        self.staying = asyncio.Event()
        self.door = listen(self.run)
        importer = concurrent.futures.ThreadPoolExecutor(1, "import")  # one alone: imports in two threads may block each other
        self.tensorflow = importer.submit(import_tensorflow)  # now, while the parameter server does the same

    async def start(self, parameter_server, others: list[str]) -> tuple[dict[str, Any], Door]:
        """Build the graphs and warm them up; returns ``about_this_actor()`` and the door when ready to run.

        Called again, with a parameter server that was started anew, it leaves threads behind that still wait for the old one.
        """
        self.parameter_server = parameter_server
        self.turns = threading.Semaphore(IN_FLIGHT_PER_WORKER)
        tf = await asyncio.wrap_future(self.tensorflow)
        addresses, _ = await parameter_server.start.remote(others)
        await asyncio.to_thread(self._connect, tf, addresses)
        await self.refresh()
        await asyncio.to_thread(self._warm_up)
        return about_this_actor(), self.door

    def _connect(self, tf, addresses: list[str]) -> None:
        if not self.graphs:
            self.graphs = {graph.source.name: graph for graph in build_graphs(tf, self.options, mirrors=True)}
        for graph in self.graphs.values():
            if not is_mirrored(self.options, graph.source):
                # a plain client session straight on the parameter server: a server of our own would be one more hop
                graph.connect(tf, addresses, self.options, self.options.timeout_s + 1)  # when nobody waits for it any more
            elif graph.session is None:
                graph.connect(tf, [], self.options)
                graph.restore(variables=False)

    def _warm_up(self) -> None:
        for graph in self.graphs.values():
            graph.warm_up()

    async def refresh(self) -> None:
        """Bring the mirrors up to date, each version's weights through the object store once."""
        for model, graph in self.graphs.items():
            if is_mirrored(self.options, graph.source):
                version, (weights,) = await self.parameter_server.latest.remote(model)
                if self.versions.get(model) != version:
                    await asyncio.to_thread(graph.variables.set_weights, await weights)
                    self.versions[model] = version

    def run(self, model: str, signature: str, feeds: list[list[np.ndarray]]) -> list[Result]:
        """Run one signature on each of some feeds in turn. One that fails does not touch the others. Raises ServerLost."""
        with self.turns:
            return self._run(model, signature, feeds)

    def _run(self, model: str, signature: str, feeds: list[list[np.ndarray]]) -> list[Result]:
        graph, results = self.graphs[model], []
        for feed in feeds:
            try:
                results.append(graph.run(signature, feed))
                continue
            except Exception as error:  # answered to whoever asked
                (code, message), by_python = failure_of(error), PythonFailure.find(error)
            # not in the block above: an error that knew of TensorFlow's would keep the session, whose end waits for its server
            if code in DISCONNECTED and not by_python:
                raise ServerLost(f"The parameter server does not answer: {message}")
            results.append((HTTP_STATUS.get(code, 500), message))
        return results

    async def stay(self) -> None:
        """Returns only when it is called again: a call whose failure tells at once that this process is gone."""
        await stay(self)

    async def about(self) -> dict[str, Any]:
        """Process id, node, and the devices that this actor may use."""
        return about_this_actor()


# ======================================================================================================================
# The batcher: gathers concurrent requests before they travel, and hands them to the workers round-robin
# ======================================================================================================================

IN_FLIGHT_PER_WORKER = 2  # one batch runs while the next one travels
IN_FLIGHT_PER_KEY = 2  # of batches that are not full: more of them at once would only be smaller


class Key(NamedTuple):
    """What requests have to have in common to travel together."""

    model: str
    signature: str
    shapes: tuple  # of one row of each input, or None: runs alone
    worker: int | None  # the one worker that is to run it, if it matters
    calls_out: bool = False  # it may wait for a request that needs a slot as well: it must not take the last one


class WorkerId(NamedTuple):
    """One life of a worker: one that is started anew keeps its index."""

    index: int
    life: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One caller's request on its way."""

    key: Key
    feed: list[np.ndarray]
    rows: int
    writes: bool
    future: Any  # a concurrent.futures.Future, or an asyncio.Future of ``loop``
    loop: asyncio.AbstractEventLoop | None
    arrived: float = 0.0
    deadline: float = 0.0
    sent: bool = False  # to a worker
    expired: bool = False
    lost_one: bool = False  # a worker was lost that had it

    @property
    def over(self) -> bool:
        """Nobody waits for it any more: its deadline passed, or its caller went away."""
        return self.expired or self.future.done()


@dataclasses.dataclass(eq=False, slots=True)
class Batch:
    """Requests that travel together, to be merged into one run or not."""

    worker: WorkerId
    key: Key
    requests: list[Request]
    merge: bool


class Batcher:
    """Whatever queued up while the last batches ran is the next batch. Usable from any thread and any event loop.

    ``run(worker, model, signature, feeds)`` starts work on a worker and returns a concurrent future of a list of Results,
    one for each feed. ``lost(worker)`` is called when that future fails. At most ``max_batch`` requests travel together;
    at most ``max_queue`` wait; every request has its answer at the latest when its deadline has passed.
    """

    def __init__(
        self, options: Options, run: Callable[..., concurrent.futures.Future], lost: Callable[[WorkerId, BaseException], None]
    ):
        self.options, self._run, self._lost = options, run, lost
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._queues: collections.OrderedDict[Key, collections.deque[Request]] = collections.OrderedDict()
        self._waiting = 0
        self.batch_sizes: collections.Counter[int] = collections.Counter()  # how many of each have gone to workers
        self._in_flight: dict[WorkerId, list[Batch]] = {}
        self._free: dict[WorkerId, int] = {}  # how many batches each ready worker could take; whose turn it is comes first
        self._unresolved: collections.OrderedDict[Request, None] = collections.OrderedDict()  # by arrival, and so by deadline
        self._unmergeable: set[tuple[str, str]] = set()
        self._again: list[Batch] = []  # to be sent once more, request by request
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._keep_time, name="ray_tensorflow batcher", daemon=True)
        self._thread.start()

    # -- for callers ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; its future will be resolved. Raises Unavailable when the queue is full or closed."""
        request.arrived = time.monotonic()
        request.deadline = request.arrived + self.options.timeout_s
        with self._lock:
            if self._closed:
                raise Unavailable(self._closed)
            if self._waiting >= self.options.max_queue:
                raise Unavailable(f"Too many requests are waiting already ({self._waiting}); try again later.")
            waiting = self._queues.setdefault(request.key, collections.deque())
            waiting.append(request)
            self._waiting += 1
            self._unresolved[request] = None
            if len(self._unresolved) == 1 or self.options.batch_wait_ms and len(waiting) == 1:
                self._wake.notify()

    def dispatch(self) -> None:
        """Send all batches that are due to workers that are free."""
        with self._lock:
            batches = list(iter(self._take, None))
        for batch in batches:
            self._send(batch)

    def forget(self, request: Request) -> None:
        """Its caller went away: make room for others."""
        with self._lock:
            if request in self._unresolved:
                self._expire(request)
                if not request.sent:
                    self._queues[request.key].remove(request)

    def add_worker(self, worker: WorkerId) -> None:
        """It takes work from now on, be it new or suspended before."""
        with self._lock:
            self._free[worker] = IN_FLIGHT_PER_WORKER - len(self._in_flight.get(worker, ()))
            self._wake.notify()

    def suspend_worker(self, worker: WorkerId) -> None:
        """It gets no new work, and nobody waits for company because of what it has."""
        with self._lock:
            self._free.pop(worker, None)
            self._wake.notify()

    def remove_worker(self, worker: WorkerId) -> None:
        """It is gone. What it had to read runs once more elsewhere; what it had to write may have been applied, and says so."""
        refused = []
        with self._lock:
            self._free.pop(worker, None)
            for batch in reversed(self._in_flight.pop(worker, [])):
                refused += self._take_back(batch)
            self._wake.notify()
        resolve(refused)

    def in_flight(self, worker: WorkerId) -> int:
        """How many requests this worker has at the moment."""
        with self._lock:
            return sum(len(batch.requests) for batch in self._in_flight.get(worker, ()))

    def waiting(self) -> int:
        return self._waiting

    def close(self, reason: str) -> None:
        """Refuse new requests, and answer those that are left with Unavailable."""
        with self._lock:
            self._closed = reason
            left, self._unresolved = list(self._unresolved), collections.OrderedDict()
            self._queues.clear()
            self._waiting = 0
            self._wake.notify()
        resolve([(request, Unavailable(reason)) for request in left])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _take(self) -> Batch | None:
        """The next batch that is due, with the worker whose turn it is; keys take turns too. Called with the lock held."""
        now = time.monotonic()
        for key in list(self._queues) if any(self._free.values()) else ():
            waiting = self._queues[key]
            while waiting and waiting[0].over:
                self._leave(waiting)
            if not waiting:
                del self._queues[key]
                continue
            merge = key.shapes is not None and key[:2] not in self._unmergeable
            full = len(waiting) >= self.options.max_batch
            if merge and not full:
                early = now < waiting[0].arrived + self.options.batch_wait_ms / 1000
                if early or sum(other == key for other in self._keys_in_flight()) >= IN_FLIGHT_PER_KEY:
                    continue
            if key.calls_out:
                calling = sum(other.calls_out for other in self._keys_in_flight())
                if calling >= IN_FLIGHT_PER_WORKER * len(self._free) - 1:
                    continue
            free = (worker for worker, places in self._free.items() if places and key.worker in (None, worker.index))
            if (worker := next(free, None)) is None:
                continue
            # requests that cannot share a run still share the trip, but leave their part to the other workers
            most = self.options.max_batch if merge else min(self.options.max_batch, -(-len(waiting) // sum(self._free.values())))
            taken = [self._leave(waiting) for _ in range(min(most, len(waiting)))]
            self._free[worker] = self._free.pop(worker) - 1  # and so it is the last in turn
            batch = Batch(worker, key, [request for request in taken if not request.over] or taken[:1], merge)
            for request in batch.requests:
                request.sent = True
            self.batch_sizes[len(batch.requests)] += 1
            self._queues.move_to_end(key)
            self._in_flight.setdefault(worker, []).append(batch)
            return batch
        return None

    def _keys_in_flight(self) -> Iterator[Key]:
        """Of the batches whose workers are in order."""
        return (batch.key for worker in self._free for batch in self._in_flight.get(worker, ()))

    def _leave(self, waiting: collections.deque[Request]) -> Request:
        """Take the first request out of its queue; one past its deadline has not counted as waiting since then."""
        request = waiting.popleft()
        self._waiting -= not request.expired
        if request.over:
            self._unresolved.pop(request, None)
        return request

    def _send(self, batch: Batch) -> None:
        batch.merge = batch.merge and len(batch.requests) > 1
        feeds = [request.feed for request in batch.requests]
        if batch.merge:
            feeds = [[np.concatenate(arrays) for arrays in zip(*feeds)]]
        try:
            future = self._run(batch.worker, batch.key.model, batch.key.signature, feeds)
        except Exception as error:
            future = concurrent.futures.Future()
            future.set_exception(error)
        future.add_done_callback(functools.partial(self._finish, batch))

    def _finish(self, batch: Batch, future: concurrent.futures.Future) -> None:
        """Give each request of a batch its part of the results. Runs in the thread that waited for them."""
        if error := future.exception():
            if self._is_under_way(batch):
                self.remove_worker(batch.worker)
                self._lost(batch.worker, error)
            return
        results: list[Result] = future.result()
        if batch.merge:
            rows = sum(request.rows for request in batch.requests)
            result = results[0]
            if isinstance(result, tuple) or any(array.shape[:1] != (rows,) for array in result):
                # One bad request fails alone: each gets a run of its own. Nothing has been changed: a signature that writes
                # is only merged when a run that fails changes nothing.
                if not isinstance(result, tuple):
                    self._unmergeable.add(batch.key[:2])
                batch.merge = False
                with self._lock:
                    self._again.append(batch)
                    self._wake.notify()
                return
            ends = list(itertools.accumulate(request.rows for request in batch.requests))
            results = [[array[end - request.rows:end] for array in result] for request, end in zip(batch.requests, ends)]
        if self._arrive(batch):
            outcomes = [result if isinstance(result, list) else ModelError(result[1], result[0]) for result in results]
            resolve(list(zip(batch.requests, outcomes)))

    def _is_under_way(self, batch: Batch) -> bool:
        """Has it not been given up, with its worker?"""
        return batch in self._in_flight.get(batch.worker, ())

    def _arrive(self, batch: Batch) -> bool:
        """Its worker has a free place again. False if nobody waits for this batch any more."""
        with self._lock:
            if not self._is_under_way(batch):
                return False
            for request in batch.requests:
                self._unresolved.pop(request, None)
            self._in_flight[batch.worker].remove(batch)
            if not self._in_flight[batch.worker]:
                del self._in_flight[batch.worker]
            if batch.worker in self._free:
                self._free[batch.worker] += 1
            if self._queues:
                self._wake.notify()
            return True

    def _take_back(self, batch: Batch) -> list[tuple[Request, Error]]:
        """A lost worker's batch, back to where it came from; those that cannot be, with the reason. Called with the lock held."""
        refused = []
        for request in reversed(batch.requests):
            if request.writes or request.lost_one or request.over:
                why = "; the change may or may not have been applied" if request.writes else ", the second one with this request"
                refused.append((request, WorkerLost(f"Worker {batch.worker.index} was lost{why}.")))
                self._unresolved.pop(request, None)
            else:
                request.sent, request.lost_one = False, True
                self._queues.setdefault(request.key, collections.deque()).appendleft(request)
                self._waiting += 1
        return refused

    def _expire(self, request: Request) -> None:
        """Nobody waits for it any more. Called with the lock held."""
        self._unresolved.pop(request, None)
        request.expired = True
        self._waiting -= not request.sent

    def _keep_time(self) -> None:
        """The batcher's own thread: sends what became due, and ends waits whose deadline has passed."""
        while True:
            expired = []
            with self._lock:
                now = time.monotonic()
                while self._unresolved and (request := next(iter(self._unresolved))).deadline <= now:
                    self._expire(request)
                    expired.append(request)
                times = [next(iter(self._unresolved)).deadline] if self._unresolved else []
                if self.options.batch_wait_ms:  # those whose wait is over only need a worker, whose return wakes this thread
                    due = [queue[0].arrived + self.options.batch_wait_ms / 1000 for queue in self._queues.values() if queue]
                    times += [at for at in due if at > now]
                again = [batch for batch in self._again if self._is_under_way(batch)]
                batches, self._again = again + list(iter(self._take, None)), []
                if not batches and not expired:
                    if self._closed:
                        return
                    self._wake.wait(max(0.001, min(times) - now) if times else None)
            for batch in batches:
                self._send(batch)
            resolve([(request, self._too_late(request)) for request in expired])

    def _too_late(self, request: Request) -> Error:
        late = f"No answer within the deadline of {self.options.timeout_s:g} s"
        if request.sent and request.writes:
            return WorkerLost(f"{late}; the change may or may not have been applied.")
        return DeadlineExceeded(f"{late}.")


def resolve(outcomes: list[tuple[Request, Any]]) -> None:
    """Give callers their results or errors; those of one event loop in one step, since waking it is what costs."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Request, Any]]] = {}
    for request, outcome in outcomes:
        by_loop.setdefault(request.loop, []).append((request, outcome))
    for loop, part in by_loop.items():
        if loop is None:
            set_outcomes(part)
        else:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(set_outcomes, part)


def set_outcomes(outcomes: list[tuple[Request, Any]]) -> None:
    for request, outcome in outcomes:
        with contextlib.suppress(concurrent.futures.InvalidStateError, asyncio.InvalidStateError):  # cancelled, or too late
            if isinstance(outcome, Exception):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)


# ======================================================================================================================
# The supervisor: starts the actors, watches them, and starts anew what dies or hangs
# ======================================================================================================================

PING_S = 0.5  # between two looks at an actor
SUSPECT_S = 1.5  # a worker that has not answered for so long gets no new work
HUNG_S = {"worker": 6.0, "parameter server": 30.0}  # an actor that has not answered for so long is ended


@dataclasses.dataclass
class Member:
    """What is known of one actor."""

    kind: str  # "parameter server" or "worker"
    index: int
    state: str = "starting"  # ready, or hung: it does not answer
    restarts: int = 0
    life: int = 0  # one more each time that it becomes ready
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    node: str | None = None
    actor: Any = None
    door: Door | None = None  # of a worker


class View(NamedTuple):
    """All that front ends have to know, as it was at one moment."""

    number: int
    models: dict[str, Model]
    servers: list[Member]
    workers: list[Member]
    failure: Error | None = None  # that cannot be mended


class Supervisor:
    """Owns the parameter servers and the workers. ``publish`` is called with each new View.

    A worker that is lost is started anew by itself. Parameter servers are lost together: variables are spread over them, and
    all of these come back as they were kept last. Then the workers, which live on, connect anew.
    """

    def __init__(self, options: Options, publish: Callable[[View], None], home: str, folder: str, again: bool = False):
        self.options, self.publish = options, publish
        self.home, self.folder = home, options.checkpoint_dir or folder  # the node on whose disk variables are kept, and where
        self.again = again  # has there been a parameter server before?
        self.servers = [Member("parameter server", index) for index in range(options.parameter_servers)]
        self.workers = [Member("worker", index) for index in range(options.workers)]
        self.view = View(0, {}, [], [])
        self._setting_weights = asyncio.Lock()
        self._starting = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._reports: dict[int, asyncio.Future] = {}  # by worker: somebody could not reach it

    async def run(self) -> None:
        """Until cancelled, or until something has failed that cannot be mended, which the last View tells."""
        running = self.options.parameter_servers * (self.options.placement == "shared")  # those that run models
        self._gpus = gpu_share(int(ray.cluster_resources().get("GPU", 0)), running + self.options.workers)
        self._server_gpus = self._gpus if running else 0
        try:
            while True:
                try:
                    models = await self._start_servers()
                except Exception as error:
                    if isinstance(error, Error) or not self.again:
                        raise
                    log.warning("parameter server could not start: %s", first_sentence(str(error)))
                    for server in self.servers:
                        self._end_actor(server)
                    await asyncio.sleep(1)  # or it would be tried without a pause
                    continue
                self.again = True
                self._show(models=models)
                await self._serve()
        except Exception as error:
            why = f"The parameter server could not be started: {first_sentence(str(error))}"
            self._show(failure=error if isinstance(error, Error) else Unavailable(why))
        finally:
            await self._end()

    def report(self, worker: WorkerId) -> None:
        """A front end could not reach this worker."""
        report = self._reports.get(worker.index)
        if self.workers[worker.index].life == worker.life and report and not report.done():
            report.set_result(None)

    async def set_weights(self, model: str, weights: list) -> None:
        """``weights``: in a list, where the object store has them. Returns when no worker answers with the old ones any more."""
        async with self._setting_weights:
            await call(self.servers[0].actor.set_weights.remote(model, weights[0]))
            if self.options.placement == "mirrored":
                for worker in self.workers:
                    if worker.state != "starting":
                        with contextlib.suppress(ray.exceptions.RayActorError):  # its successor starts with the new ones
                            await call(worker.actor.refresh.remote())

    # -- parameter servers ---------------------------------------------------------------------------------------------

    async def _start_servers(self) -> dict[str, Model]:
        """All of them, and meanwhile the first worker, which imports tensorflow in the same time."""
        started = time.monotonic()
        for server in self.servers:
            self._spawn(server, ParameterServer, self._server_gpus, self.folder, self.again)
        others = await asyncio.gather(*(call(server.actor.serve.remote()) for server in self.servers[1:]))
        self._others = list(others)
        if self.workers[0].actor is None:
            self._spawn(self.workers[0], Worker, self._gpus)
        _, models = await call(self.servers[0].actor.start.remote(self._others))
        for server in self.servers:
            server.about = await call(server.actor.about.remote())
            server.state, server.life = "ready", server.life + 1
            log.info("parameter server ready  pid %d  %.1f s", server.about["pid"], time.monotonic() - started)
        return {model.name: model for model in models}

    async def _serve(self) -> None:
        """Until a parameter server is lost."""
        first = asyncio.Event()  # the others start after the first worker is ready: serving comes first
        tasks = [asyncio.create_task(self._keep(worker, first)) for worker in self.workers]
        watches = [asyncio.create_task(self._watch(server)) for server in self.servers]
        try:
            done, _ = await asyncio.wait([*tasks, *watches], return_when=asyncio.FIRST_COMPLETED)
            reasons = [task.result() for task in done]  # or raises what made a worker impossible
        finally:
            for task in [*tasks, *watches]:
                task.cancel()
            await asyncio.gather(*tasks, *watches, return_exceptions=True)
        for server in self.servers:
            log.warning("parameter server lost  pid %d  %s", server.about["pid"], reasons[0])
            server.state, server.restarts = "starting", server.restarts + 1
            self._end_actor(server)
        for worker in self.workers:
            worker.state = "starting"
        self._show()

    # -- workers -------------------------------------------------------------------------------------------------------

    async def _keep(self, worker: Member, first: asyncio.Event) -> None:
        """Start a worker, watch it and start it anew, until cancelled."""
        if worker.index > 0:
            await first.wait()
        while True:
            try:
                async with self._starting:
                    await self._start(worker)
                first.set()
                reason = await self._watch(worker)
                log.warning("worker %d lost  pid %d  %s", worker.index, worker.about["pid"], reason)
                worker.restarts += 1
            except Exception as error:
                log.warning("worker %d could not start: %s", worker.index, first_sentence(str(error)))
                if isinstance(error, Error) and not any(worker.life for worker in self.workers):
                    raise  # it never will
                await asyncio.sleep(1)  # or it would be tried without a pause
            worker.state = "starting"
            self._show()
            self._end_actor(worker)

    async def _start(self, worker: Member) -> None:
        started = time.monotonic()
        if worker.actor is None:
            self._spawn(worker, Worker, self._gpus)
        worker.about, worker.door = await call(worker.actor.start.remote(self.servers[0].actor, self._others))
        async with self._setting_weights:  # none are set between its last look and its first request
            await call(worker.actor.refresh.remote())
            worker.state, worker.life = "ready", worker.life + 1
            self._show()
        log.info("worker %d ready  pid %d  %.1f s", worker.index, worker.about["pid"], time.monotonic() - started)

    # -- either --------------------------------------------------------------------------------------------------------

    def _spawn(self, member: Member, kind: type, gpus: float, *arguments) -> None:
        member.node, strategy = self._place(member, gpus)
        resources = {
            "num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 1000,
            "enable_task_events": False}  # of which Ray's gcs would keep 100,000: half a gigabyte
        actor = ray.remote(kind).options(scheduling_strategy=strategy, **resources)
        member.actor = actor.remote(member.index, self.options, *arguments)

    def _place(self, member: Member, gpus: float):
        """The node for a new actor: the one with the fewest of its kind, ours before others. Ray itself spreads actors that
        need something (a GPU), but puts those that need nothing anywhere, a soft affinity notwithstanding."""
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        if member is self.servers[0] and self.options.checkpoint_dir is None and self.home not in alive:
            raise Unavailable("The node of the parameter server was lost, and the variables with it: start the program anew"
                              " (--checkpoint-dir, a folder that all nodes share, would have kept them).")
        if gpus:
            return None, "SPREAD"
        fellows = self.servers if member.kind == "parameter server" else self.workers
        used = collections.Counter(fellow.node for fellow in fellows if fellow is not member and fellow.actor is not None)
        node = min(alive, key=lambda node: (used[node], node != self.home, node))
        return node, NodeAffinitySchedulingStrategy(node, soft=False)

    async def _watch(self, member: Member) -> str:
        """Returns why an actor was lost, as soon as it is."""
        stays, answer = asyncio.ensure_future(call(member.actor.stay.remote())), None
        report = asyncio.get_running_loop().create_future()
        if member.kind == "worker":
            self._reports[member.index] = report
        patience = HUNG_S[member.kind]
        try:
            while True:
                answer, silent_s = asyncio.ensure_future(call(member.actor.about.remote())), 0.0
                while not (stays.done() or report.done() or answer.done()):
                    asked = time.monotonic()
                    await asyncio.wait([stays, report, answer], timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                    if time.monotonic() - asked < 1.5 * PING_S:  # else it is this very thread that comes too late
                        silent_s += PING_S
                    if silent_s > patience:
                        await self._kill(member)
                        return f"it did not answer for {patience:g} s"
                    if silent_s > SUSPECT_S:
                        self._set_state(member, "hung")
                if answer.done() and not answer.exception():
                    self._set_state(member, "ready", answer.result())
                await asyncio.wait([stays, report], timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if report.done():
                    return "a front end could not reach it"
                if stays.done():
                    return first_sentence(str(stays.exception()))
        finally:
            for future in (stays, answer):
                future.cancel() or future.cancelled() or future.exception()

    def _set_state(self, member: Member, state: str, about: dict[str, Any] | None = None) -> None:
        if (state, about or member.about) != (member.state, member.about):
            if state != member.state:
                log.warning("%s %d is %s  pid %d", member.kind, member.index, state, member.about["pid"])
            member.state, member.about = state, about or member.about
            self._show()

    async def _kill(self, member: Member) -> None:
        """End the process of an actor that hears nothing; Ray by itself would leave it as it is."""
        if member.about["node"] == ray.get_runtime_context().get_node_id():
            kill_process(member.about["pid"])
        else:
            there = NodeAffinitySchedulingStrategy(member.about["node"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there)(kill_process)
            with contextlib.suppress(Exception):  # the node is gone as well
                await call(task.remote(member.about["pid"]))

    def _end_actor(self, member: Member) -> None:
        if member.actor is not None:
            ray.kill(member.actor)
            member.actor = None

    async def _end(self) -> None:
        """Keep what is to be kept, and end all actors."""
        if self.servers[0].state == "ready":
            with contextlib.suppress(Exception):
                await asyncio.wait_for(call(self.servers[0].actor.keep.remote()), 10)
        for member in [*self.workers, *self.servers]:
            member.state = "stopped"
            self._end_actor(member)
        if self.options.checkpoint_dir is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _show(self, **changes) -> None:
        servers, workers = ([dataclasses.replace(member) for member in members] for members in (self.servers, self.workers))
        self.view = self.view._replace(number=self.view.number + 1, servers=servers, workers=workers, **changes)
        self.publish(self.view)


POLL_S = 1.0
GONE_S = 8.0  # a front end that has not called for so long has ended without a word


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class SharedSupervisor:
    """A Ray actor with the one Supervisor of all front ends of a Ray cluster. The first front end makes it, the others find it by
    its name, and it ends, with all of its actors, soon after the last of them has gone.
    """

    def __init__(self, options: Options, home: str, folder: str):
        self.options = options
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self.supervisor = Supervisor(options, self._publish, home, folder, again)
        self.newer = asyncio.Event()
        self.front_ends: dict[str, float] = {}  # when they were last heard of
        self.running: asyncio.Task | None = None

    def _publish(self, view: View) -> None:
        self.newer.set()
        self.newer = asyncio.Event()

    async def changes(self, front_end: str, options: Options, seen: int) -> View:
        """The View, as soon as it is not number ``seen``, or after a second at the latest. Who does not call again is gone.

        Raises OptionError when the front end wants another graph than there is.
        """
        for name, there in self.options.shared.items():
            if options.shared[name] != there:
                shown = [",".join(map(str, v)) if isinstance(v, tuple) else v for v in (options.shared[name], there)]
                raise OptionError(f"--{name.replace('_', '-')} {shown[0]}: the shared cluster runs with {shown[1]}")
        self.front_ends[front_end] = time.monotonic()
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        if self.supervisor.view.number == seen:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.newer.wait(), POLL_S)
        return self.supervisor.view

    async def leave(self, front_end: str) -> None:
        self.front_ends.pop(front_end, None)

    async def report(self, worker: WorkerId) -> None:
        self.supervisor.report(worker)

    async def set_weights(self, model: str, weights: list) -> None:
        await self.supervisor.set_weights(model, weights)

    async def _run(self) -> None:
        """Supervise for as long as there are front ends; then end this very actor."""
        supervising = asyncio.create_task(self.supervisor.run())
        while self.front_ends:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            self.front_ends = {name: heard for name, heard in self.front_ends.items() if now - heard < GONE_S}
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
        ray.kill(ray.get_runtime_context().current_actor)


# ======================================================================================================================
# The cluster: what scripts, notebooks and front ends hold in their hands
# ======================================================================================================================


class Call(NamedTuple):
    """Checked work for a worker: ``feed`` has an array for each input, in the order of the sorted names."""

    model: str
    signature: Signature
    feed: list[np.ndarray]
    worker: int | None = None  # the one that is to do it, if it matters


class Cluster:
    """A parameter server and its workers, with a blocking and an awaitable door to each call.

        with Cluster(options) as cluster:              # scripts, threads, Flask, notebooks
            cluster.add(3.0)
            cluster.predict({"x": x}, model="m")

        async with Cluster(options) as cluster:        # inside any running event loop
            await cluster.add_async(3.0)

    Calls may come from several threads and several event loops at once. No event loop is ever made, fetched or patched
    here: one thread of the cluster's own owns Ray, since Ray's processes end with the thread that started them.
    """

    def __init__(self, options: Options | None = None, **changes):
        self.options = dataclasses.replace(options or Options(), **changes)
        self.models: dict[str, Model] = {}
        self._view = View(0, {}, [], [])
        self._lines: dict[WorkerId, Lines] = {}  # to the workers that can be called
        self._able: set[WorkerId] = set()  # those of them that get work
        self._dispatching: set[asyncio.AbstractEventLoop] = set()  # that will soon send what they have queued
        self._batcher = Batcher(self.options, self._run, self._report)
        self._ahead = min(2 * IN_FLIGHT_PER_WORKER * self.options.workers, self.options.max_queue)  # batches of one map
        self._changed = threading.Condition()
        self._status = "new"
        self._failure: Error | None = None
        self._is_awaited = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of that thread
        self._work: asyncio.Task | None = None  # what runs in it
        self._ask: Callable[..., concurrent.futures.Future] | None = None  # calls a method of the supervisor

    # -- life ----------------------------------------------------------------------------------------------------------

    def begin(self, one_of_many: bool = False) -> None:
        """Start everything in the background; ``health()`` tells how far it is.

        ``one_of_many``: this may be one of several processes of a server, of which only one can have a cluster of its own.
        """
        with self._changed:
            if self._status == "new":
                self._status = "starting"
                self._thread = threading.Thread(
                    target=self._live, args=[one_of_many and not self.options.address], name="ray_tensorflow cluster", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def start(self, workers: int = 1) -> Cluster:
        """Start everything; returns when the parameter server and so many workers are ready.

        Raises OptionError, ModelError or Unavailable when that cannot be.
        """
        self._is_awaited = True
        self.begin()
        with self._changed:
            self._changed.wait_for(
                lambda: self._count("ready") >= workers or self._failure or self._status in ("stopping", "stopped"))
        self._is_awaited = False
        if self._status != "serving" or self._failure:
            self.close()
            raise self._failure or Unavailable("The cluster was closed.")
        return self

    def close(self) -> None:
        """Answer what is left with Unavailable and end every process that was started. Safe to call twice."""
        atexit.unregister(self.close)
        with self._changed:
            self._status = "stopping" if self._thread and self._thread.is_alive() else "stopped"
            self._changed.notify_all()
            if self._work and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._work.cancel)
        self._batcher.close("The server is shutting down.")
        if self._thread:
            self._thread.join()
        for lines in self._lines.values():
            lines.close()

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *exception) -> None:
        self.close()

    async def __aenter__(self) -> Cluster:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, *exception) -> None:
        await asyncio.to_thread(self.close)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def add(self, value: float, worker: int | None = None) -> float:
        """Add a finite number to the shared sum; returns the sum right after this very add, as float64.

        ``worker`` is the number of the worker that is to do it, by default the next one. Raises InvalidRequest,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        return float(self.run(self.addition(value, worker))[0][0])

    async def add_async(self, value: float, worker: int | None = None) -> float:
        """As ``add``, awaitable."""
        return float((await self.run_async(self.addition(value, worker)))[0][0])

    def predict(
        self, inputs: dict[str, Any], model: str, signature: str = "serving_default", version: int | None = None
    ) -> dict[str, np.ndarray]:
        """Run a signature of a served model.

        ``inputs`` are arrays by input name (or just the array, of a sole input), of a dtype that numpy casts to the input's
        without loss of kind (ints to floats, not floats to ints; text for strings). The result is arrays by output name; they
        may be read-only, and views of a larger one: copy what you want to write to. Raises InvalidRequest, ModelError,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        spec = self.find(model, version, signature)
        return dict(zip(spec.outputs, self.run(Call(model, spec, feed_of(spec, inputs)))))

    async def predict_async(
        self, inputs: dict[str, Any], model: str, signature: str = "serving_default", version: int | None = None
    ) -> dict[str, np.ndarray]:
        """As ``predict``, awaitable."""
        spec = self.find(model, version, signature)
        return dict(zip(spec.outputs, await self.run_async(Call(model, spec, feed_of(spec, inputs)))))

    def get_weights(self, model: str) -> dict[str, np.ndarray]:
        """The variables of a served model by name. Arrays may be read-only: copy what you want to write to."""
        self.find_model(model)
        return get(self._server().get_weights.remote(model), self.options.timeout_s)

    async def get_weights_async(self, model: str) -> dict[str, np.ndarray]:
        """As ``get_weights``, awaitable."""
        return await asyncio.to_thread(self.get_weights, model)

    def set_weights(self, model: str, weights: dict[str, np.ndarray]) -> None:
        """Set some or all variables of a served model; a wrong name or shape is an InvalidRequest, and then none of them is set.

        Once it returns, no later request is answered with the old ones, mirrors included.
        """
        self.find_model(model)
        self._server()
        setting = self._ask("set_weights", model, [ray.put(weights)])
        try:
            setting.result(self.options.timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within the deadline of {self.options.timeout_s:g} s.") from None
        except ray.exceptions.RayTaskError as error:
            raise root_cause(error) from None
        except ray.exceptions.RayActorError:
            raise ServerLost("The parameter server was lost; the weights may or may not have been set.", 502) from None

    async def set_weights_async(self, model: str, weights: dict[str, np.ndarray]) -> None:
        """As ``set_weights``, awaitable."""
        await asyncio.to_thread(self.set_weights, model, weights)

    def map(
        self, batches: Iterable[Any], model: str, signature: str = "serving_default", version: int | None = None,
        ordered: bool = True
    ) -> Iterator[dict[str, np.ndarray]]:
        """``predict`` for each batch of any iterable, however long and of whatever sizes, in order or as they finish.

        Keeps a bounded number of batches in flight and pulls no faster than they can be sent. An error says which batch it
        is about, counted from 0. Leaving the loop early stops the work.
        """
        spec = self.find(model, version, signature)
        pending: dict[concurrent.futures.Future, int] = {}  # batch numbers

        def results(most: int):
            while len(pending) > most:
                first = pending if ordered else concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)[0]
                future = next(iter(first))
                with naming_batch(pending.pop(future)):
                    outputs = future.result()
                yield dict(zip(spec.outputs, outputs))

        try:
            for index, batch in enumerate(batches):
                with naming_batch(index):
                    pending[self._submit(Call(model, spec, feed_of(spec, batch))).future] = index
                yield from results(self._ahead - 1)
            yield from results(0)
        finally:
            for future in pending:
                future.cancel()

    async def map_async(
        self, batches: Iterable[Any] | AsyncIterable[Any], model: str, signature: str = "serving_default",
        version: int | None = None, ordered: bool = True
    ) -> AsyncIterator[dict[str, np.ndarray]]:
        """As ``map``, for ``async for``; ``batches`` may be asynchronous too, else a thread waits for them and not the loop."""
        spec = self.find(model, version, signature)
        pending: dict[asyncio.Future, int] = {}

        async def results(most: int):
            while len(pending) > most:
                first = pending if ordered else (await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]
                future = next(iter(first))
                with naming_batch(pending.pop(future)):
                    outputs = await future
                yield dict(zip(spec.outputs, outputs))

        try:
            index = 0
            async for batch in iterate(batches):
                with naming_batch(index):
                    pending[self._submit_async(Call(model, spec, feed_of(spec, batch))).future] = index
                index += 1
                async for result in results(self._ahead - 1):
                    yield result
            async for result in results(0):
                yield result
        finally:
            for future in pending:
                future.cancel()

    def run(self, call: Call, gone: Callable[[], bool] | None = None) -> list[np.ndarray]:
        """Do checked work: the outputs in the order of their sorted names.

        ``gone`` is asked each second whether the caller went away; then the work is given up and Unavailable raised.
        """
        request = self._submit(call)  # the batcher keeps the deadline
        while gone:
            with contextlib.suppress(TimeoutError):
                return request.future.result(1)
            if gone():
                self._batcher.forget(request)
                raise Unavailable("The client went away.", 499)
        return request.future.result()

    async def run_async(self, call: Call) -> list[np.ndarray]:
        """As ``run``, awaitable; who cancels it gives the work up."""
        request = self._submit_async(call)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._batcher.forget(request)
            raise

    @property
    def batch_sizes(self) -> collections.Counter[int]:
        """How many batches of each size have gone to workers."""
        return self._batcher.batch_sizes

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: status, parameter servers, workers with their state; asks nobody, waits for nothing."""
        view, options = self._view, self.options
        servers = view.servers or [Member("parameter server", index) for index in range(options.parameter_servers)]
        workers = view.workers or [Member("worker", index) for index in range(options.workers)]
        if self._status != "serving":
            status = "failed" if self._failure else "starting" if self._status == "new" else self._status
        elif self._failure:
            status = "failed"
        else:
            status = "ready" if self._count("ready") else "recovering" if any(worker.life for worker in workers) else "starting"

        def shown(member: Member) -> dict[str, Any]:
            return {"index": member.index, "state": member.state, "restarts": member.restarts, **member.about}

        in_flight = [{"in_flight": self._batcher.in_flight(WorkerId(worker.index, worker.life))} for worker in workers]
        health = {
            "status": status, "parameter_servers": [shown(server) for server in servers],
            "workers": [shown(worker) | its for worker, its in zip(workers, in_flight)], "models": sorted(self.models),
            "waiting": self._batcher.waiting()}
        return health | ({"error": str(self._failure)} if self._failure else {})

    def find(self, model: str, version: int | None = None, signature: str = "serving_default") -> Signature:
        """The signature of a served model. Raises InvalidRequest in TensorFlow Serving's words, or Unavailable."""
        found = self.find_model(model, version)
        if signature not in found.signatures:
            raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
        return found.signatures[signature]

    def find_model(self, name: str, version: int | None = None) -> Model:
        if self._failure:
            raise Unavailable(str(self._failure))
        if self._status in ("new", "starting"):
            raise Unavailable("The server is starting; try again later.")
        model = self.models.get(name)
        if model is None or version not in (None, model.version):
            which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise InvalidRequest(f"Servable not found for request: {which}", 404)
        return model

    def addition(self, value: float, worker: int | None = None) -> Call:
        """The Call that adds a value. Raises InvalidRequest unless it is one finite number."""
        try:
            array = np.array([value], np.float64)
        except (TypeError, ValueError, OverflowError):
            array = np.array([math.nan])
        if array.shape != (1,) or not math.isfinite(array[0]):
            raise InvalidRequest(f"value must be one finite number, not {value!r:.100}")
        return Call(ADDER, self.find(ADDER), [array], worker)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _submit(self, call: Call) -> Request:
        request = make_request(call, concurrent.futures.Future(), None)
        self._batcher.submit(request)
        self._batcher.dispatch()
        return request

    def _submit_async(self, call: Call) -> Request:
        loop = asyncio.get_running_loop()
        request = make_request(call, loop.create_future(), loop)
        self._batcher.submit(request)
        if loop not in self._dispatching:
            self._dispatching.add(loop)
            loop.call_soon(self._dispatch, loop)  # after all that is ready in this turn of the loop has come along
        return request

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._dispatching.discard(loop)
        self._batcher.dispatch()

    def _run(self, worker: WorkerId, model: str, signature: str, feeds: list[list[np.ndarray]]) -> concurrent.futures.Future:
        if worker not in self._lines:
            raise ServerLost(f"Worker {worker.index} has just been lost.")
        return self._lines[worker].call(model, signature, feeds)

    def _report(self, worker: WorkerId, error: BaseException) -> None:
        if self._status == "serving" and self._ask:
            log.warning("worker %d does not answer: %s", worker.index, first_sentence(str(error)))
            self._ask("report", worker)

    def _server(self):
        """The actor of the parameter server that has the models."""
        if not self._view.servers or self._view.servers[0].state != "ready":
            raise Unavailable("The parameter server is being started; try again later.")
        return self._view.servers[0].actor

    def _live(self, one_of_many: bool) -> None:
        """Own Ray from its start to its end, and run what tells of the actors meanwhile."""
        try:
            with only_process_of_its_server() if one_of_many else contextlib.nullcontext(), ray_runtime(self.options):
                asyncio.run(self._follow())
        except Exception as error:
            if self._status == "stopping":  # it was ended on purpose while it started
                pass
            elif isinstance(error, Error):
                self._fail(error)
            else:
                log.exception("the cluster failed")
                self._fail(Unavailable(f"Ray could not be started: {first_sentence(str(error))}"))
        finally:
            with self._changed:
                self._status = "stopped"
                self._changed.notify_all()

    async def _follow(self) -> None:
        with self._changed:
            if self._status == "stopping":
                return
            self._loop, self._work = asyncio.get_running_loop(), asyncio.current_task()
        home = ray.get_runtime_context().get_node_id()
        folder = os.path.join(tempfile.gettempdir(), f"ray_tensorflow_{secrets.token_hex(8)}")
        with contextlib.suppress(asyncio.CancelledError):
            await (self._follow_shared(home, folder) if self.options.address else self._supervise(home, folder))

    async def _supervise(self, home: str, folder: str) -> None:
        """A supervisor of our own."""
        supervisor = Supervisor(self.options, self._show, home, folder)

        async def do(method: str, *arguments):
            result = getattr(supervisor, method)(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        self._ask = lambda *what: asyncio.run_coroutine_threadsafe(do(*what), self._loop)
        await supervisor.run()

    async def _follow_shared(self, home: str, folder: str) -> None:
        """The supervisor that all front ends of this Ray cluster share, whichever of them made it."""
        here = NodeAffinitySchedulingStrategy(home, soft=True)
        make = ray.remote(SharedSupervisor).options(
            name="supervisor", get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=10_000,
            scheduling_strategy=here, enable_task_events=False)
        ourselves, seen = secrets.token_hex(8), -1
        while True:
            supervisor = make.remote(self.options, home, folder)
            self._ask = lambda method, *arguments: getattr(supervisor, method).remote(*arguments).future()
            try:
                while not self._failure:
                    view = await call(supervisor.changes.remote(ourselves, self.options, seen))
                    if view.number != seen:
                        seen = view.number
                        self._show(view)
                return
            except ray.exceptions.RayActorError as error:
                log.warning("the supervisor was lost: %s", first_sentence(str(error)))
                self._show(self._view._replace(servers=[], workers=[]))
                seen = -1
                await asyncio.sleep(PING_S)
            except asyncio.CancelledError:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(call(supervisor.leave.remote(ourselves)), 5)
                raise

    def _show(self, view: View) -> None:
        """Go on with the actors as they are now."""
        ready, hung = ({WorkerId(worker.index, worker.life): worker.door for worker in view.workers if worker.state == state}
                       for state in ("ready", "hung"))
        able = set(ready or hung)
        with self._changed:
            before, able_before, self._able = self._lines, self._able, able
            self._lines = {worker: before.get(worker) or Lines(door) for worker, door in (ready | hung).items()}
            self._view, self.models = view, view.models
            if self._status == "starting" and view.models:
                self._status = "serving"
            for worker in before.keys() - self._lines.keys():
                self._batcher.remove_worker(worker)
                before[worker].close()
            for worker in hung.keys() - able:
                self._batcher.suspend_worker(worker)
            for worker in sorted(able - able_before):
                self._batcher.add_worker(worker)
            if view.failure:
                self._fail(view.failure)
            self._changed.notify_all()
        if view.failure:
            self._batcher.close(str(view.failure))

    def _fail(self, error: Error) -> None:
        self._failure = error
        if not self._is_awaited:  # else whoever called start() gets it
            log.error("%s", error)

    def _count(self, state: str) -> int:
        return sum(worker.state == state for worker in self._view.workers)


def root_cause(error: BaseException) -> BaseException:
    """What was raised in an actor."""
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


async def call(reference):
    """The value of a Ray call; an error of ours arrives as it was raised."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        raise root_cause(error) from None


def get(reference, timeout_s: float | None = None):
    """The value of a Ray call; an error of ours arrives as it was raised."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise DeadlineExceeded(f"No answer within the deadline of {timeout_s:g} s.") from None
    except ray.exceptions.RayTaskError as error:
        raise root_cause(error) from None


def gpu_share(gpus: int, actors: int) -> float:
    """How many GPUs each actor gets, such that all of them fit: whole ones, or a part of one."""
    if not gpus:
        return 0
    return 1 if gpus >= actors else math.floor(10_000 / -(-actors // gpus)) / 10_000


def make_request(call: Call, future, loop) -> Request:
    shapes, rows, feed = None, 1, call.feed
    if call.signature.batched and all(array.ndim for array in feed) and len({len(array) for array in feed}) == 1:
        shapes, rows = tuple(array.shape[1:] for array in feed), len(feed[0])
    signature = call.signature
    key = Key(call.model, signature.name, shapes, call.worker, signature.calls_out)
    return Request(key, feed, rows, signature.writes or signature.calls_out, future, loop)


@contextlib.contextmanager
def naming_batch(index: int):
    """Errors in this block say which batch of a map they are about."""
    try:
        yield
    except Error as error:
        raise type(error)(f"batch {index}: {error.message}", error.status) from error


async def iterate(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Any iterable as an asynchronous one; what may block while it makes an item does so in a thread."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    elif isinstance(items, (list, tuple, np.ndarray)):
        for item in items:
            yield item
    else:
        iterator, end = iter(items), object()
        while (item := await asyncio.to_thread(next, iterator, end)) is not end:
            yield item


def feed_of(signature: Signature, inputs: Any) -> list[np.ndarray]:
    """Arrays of the signature's dtypes in the order of the sorted input names. Raises InvalidRequest."""
    if not isinstance(inputs, dict) and len(signature.inputs) == 1:
        inputs = dict.fromkeys(signature.inputs, inputs)
    if not isinstance(inputs, dict) or inputs.keys() != signature.inputs.keys():
        given = sorted(map(str, inputs)) if isinstance(inputs, dict) else type(inputs).__name__
        raise InvalidRequest(f"signature {signature.name!r} takes the inputs {sorted(signature.inputs)}, not {given}")
    return [to_array(f"input {name!r}", inputs[name], spec) for name, spec in signature.inputs.items()]


def to_array(what: str, value: Any, spec: TensorSpec) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidRequest(f"{what} is ragged: all its rows must have the same shape") from None
    if dtype == object:
        flat = [v.encode() if isinstance(v, str) else v for v in array.astype(object).ravel().tolist()]
        if not all(isinstance(v, bytes) for v in flat):
            raise InvalidRequest(f"{what} takes text or bytes, not {array.dtype}")
        result = np.empty(len(flat), object)
        result[:] = flat
        return result.reshape(array.shape)
    if array.dtype == dtype:
        return array
    if not (np.can_cast(array.dtype, dtype, "same_kind") or array.size == 0):
        raise InvalidRequest(f"{what} takes {spec.dtype}, not {array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(result, array):
        raise InvalidRequest(f"{what} has a value outside the range of {spec.dtype}")
    return result


@contextlib.contextmanager
def only_process_of_its_server():
    """Raises Unavailable in all processes but one that have the same bound TCP socket, as those of a pre-forking server do."""
    with contextlib.ExitStack() as claims:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if not is_socket(fd):
                continue
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as bound:
                if bound.family in (socket.AF_INET, socket.AF_INET6) and bound.getsockname()[1] and not is_connected(bound):
                    claim = claims.enter_context(socket.socket(socket.AF_UNIX))
                    try:  # freed when this process ends, however it does
                        claim.bind(f"\0ray_tensorflow/{os.fstat(bound.fileno()).st_ino}")
                    except OSError:
                        raise Unavailable(
                            "Another process of this server has a graph of its own already: to share one, start Ray with"
                            " `ray start --head` and the server with RAY_TENSORFLOW_ADDRESS=auto.") from None
        yield


def is_socket(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False


def is_connected(stream: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return bool(stream.getpeername())
    return False


# -- Ray itself --------------------------------------------------------------------------------------------------------

# For the Ray that we start, and only while it starts: its processes inherit them. What the environment says already is kept.
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else actors, at nice 15, starve beside a busy web process
    "RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0",  # no process that waits for ordinary tasks
    "RAY_raylet_client_connect_timeout_milliseconds": "20",  # else a first attempt that comes too early costs a second
    "RAY_raylet_client_num_connect_attempts": "500",
    "RAY_gcs_rpc_server_connect_timeout_s": "3",  # a worker that starts looks four times for a Ray that has been killed
    "RAY_task_events_report_interval_ms": "0", "RAY_enable_timeline": "0",  # nobody asks for these, and they cost at each call
    "RAY_enable_metrics_collection": "0", "RAY_event_stats": "0",
}


@contextlib.contextmanager
def ray_runtime(options: Options):
    """Ray for as long as the block runs: the cluster at ``options.address``, one that runs in this process already, or a
    local one of our own that listens on 127.0.0.1 alone and leaves no process and no file behind."""
    if ray.is_initialized():
        yield
        return
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [here, *(path or os.getcwd() for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix)))]
    python_path = os.pathsep.join(dict.fromkeys(paths))  # actors find modules where this process does, from any folder
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True  # else a clean stop that takes over 3 s is aborted
    if options.address:
        try:
            ray.init(options.address, namespace="ray_tensorflow", runtime_env={"env_vars": {"PYTHONPATH": python_path}}, **quiet)
        except ConnectionError as error:
            reason = f"{first_sentence(str(error))} (if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
            raise Unavailable(f"No Ray cluster answers at {options.address!r}: {reason}") from None
        try:
            yield
        finally:
            ray.shutdown()
        return

    folder = make_folder()
    variables = {name: value for name, value in RAY_SETTINGS.items() if name not in os.environ} | {"PYTHONPATH": python_path}
    if not os.path.exists(os.path.expanduser("~/.keras")):
        variables["KERAS_HOME"] = os.environ.get("KERAS_HOME") or os.path.join(folder, "keras")  # else Keras makes one at home
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):  # else it is written to the home folder; Ray keeps the first for the process
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray_constants.ENABLE_RAY_CLUSTER = False  # of several nodes: so everything of Ray's listens on 127.0.0.1
    try:
        with environment(variables), agents_that_end_with_raylet():
            ray.init(
                "local", num_cpus=options.threads, include_dashboard=False, object_store_memory=80 * 2**20,
                _temp_dir=os.path.join(folder, "r"), namespace="ray_tensorflow", **quiet)
        yield
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = True
        shutil.rmtree(folder, ignore_errors=True)


def make_folder() -> str:
    """A temporary folder for this user alone, in which Ray can have its own, that it opens to everybody; the path is short,
    since there are sockets in it."""
    try:
        parent = tempfile.gettempdir()
        parent = parent if len(parent) < 18 else "/tmp"
        if shutil.disk_usage(parent).free < 2**20:
            raise OSError(f"less than 1 MiB is free in {parent}")
        return tempfile.mkdtemp(prefix="ray_tensorflow_", dir=parent)
    except OSError as error:
        advice = "set TMPDIR to a folder with a path of less than 18 characters that has some"
        raise Unavailable(f"There is no room for Ray's temporary files, {error.strerror or error}: {advice}.") from None


@contextlib.contextmanager
def environment(variables: dict[str, str]):
    """What starts in this block has these variables; this process has its own again afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def agents_that_end_with_raylet():
    """When this process is killed, the kernel ends Ray's others with it (PR_SET_PDEATHSIG), but not the raylet's two agents: they
    try for a minute to tell the GCS, which is gone as well (ray/_private/process_watcher.py). Those that start here end too."""
    build = ray_services._build_python_executable_command_memory_profileable
    code = "import sys;del sys.path[0],sys.argv[0];import ctypes,runpy;"
    code += "ctypes.CDLL(None).prctl(1,9);runpy.run_path(sys.argv[0],None,__name__)"  # PR_SET_PDEATHSIG, SIGKILL; no quotes

    def command(component: str, *arguments, **options) -> list[str]:
        return build(component, *arguments, **options) + (["-c", code] if component.endswith("agent") else [])

    ray_services._build_python_executable_command_memory_profileable = command
    try:
        yield
    finally:
        ray_services._build_python_executable_command_memory_profileable = build


# ======================================================================================================================
# HTTP: what both front ends answer; the JSON codec is TensorFlow Serving's REST contract, read from its code
# (util/json_tensor.cc, model_servers/http_rest_api_util.cc and http_rest_api_handler.cc)
# ======================================================================================================================

MAX_BODY_BYTES = 64 * 2**20


class Reply(NamedTuple):
    """A finished answer."""

    status: int
    body: bytes
    content_type: str = "application/json"

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": self.content_type} | ({"Retry-After": "1"} if self.status in (429, 503) else {})


class Pending(NamedTuple):
    """An answer for which the cluster has to work first, and how the outputs become its Reply."""

    call: Call
    encode: Callable[[list[np.ndarray]], Reply]


def reply_json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def reply_error(error: Error) -> Reply:
    return reply_json({"error": error.message}, error.status)


def answer(
    cluster: Cluster, metrics: Metrics, method: str, path: str, query: str, content_encoding: str, body: bytes
) -> Reply | Pending:
    """The one entry of both front ends: a Reply, or what is still to be done for it. ``path`` is as sent, still percent-encoded.

    Raises Error, for ``reply_error``.
    """
    if path == "/health" and method in ("GET", "HEAD"):
        health = cluster.health()
        return reply_json(health, 200 if health["status"] == "ready" else 503)
    if path == "/metrics" and method in ("GET", "HEAD"):
        return Reply(200, metrics.text(cluster).encode(), "text/plain; version=0.0.4; charset=utf-8")
    if path == "/" and method in ("GET", "HEAD"):
        return add_value(cluster, parse_value(query))
    if path[:4].lower() == "/v1/":
        return answer_rest(cluster, method, path, unzip(content_encoding, body))
    if path in ("/", "/health", "/metrics"):
        raise InvalidRequest(f"{path} answers GET, not {method}", 405)
    raise InvalidRequest(f"There is nothing at {path[:100]}: try /, /health, /metrics or /v1/models/<name>", 404)


def answer_message(cluster: Cluster, message: str | bytes) -> tuple[str, Reply | Pending]:
    """One message of a WebSocket: its ``id`` as JSON, to go with the answer, and a Reply or what is still to be done for it."""
    identity = "null"
    try:
        document = parse_json(message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message)
        identity = json.dumps(document.get("id"))
        if ("value" in document) == ("model" in document):
            raise InvalidRequest("A message has either a value to add or a model to run")
        if "value" in document:
            return identity, add_value(cluster, document["value"])
        if not isinstance(document["model"], str):
            raise InvalidRequest(f"model must be a name, not {shown(document['model'])}")
        return identity, predict_document(cluster, document["model"], None, document)
    except Error as error:
        return identity, reply_error(error)


def with_id(identity: str, reply: Reply) -> str:
    return f'{{"id": {identity}, ' + reply.body.decode("utf-8", "replace")[1:]


def add_value(cluster: Cluster, value: Any) -> Pending:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"value must be one finite number, not {shown(value)}")
    return Pending(cluster.addition(value), encode_sum)


def encode_sum(outputs: list[np.ndarray]) -> Reply:
    return Reply(200, f'{{"result": {outputs[0].item()!r}}}'.encode())


def parse_value(query: str) -> float:
    """The number in ``?value=3``; 1 if there is none. Raises InvalidRequest unless it is one finite number."""
    if plain := re.fullmatch(r"value=(-?\d{1,15}(?:\.\d{1,15})?)", query, re.ASCII):  # parsing a query takes a while
        return float(plain[1])
    try:
        values = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=100, errors="strict").get("value", ["1"])
    except ValueError:
        raise InvalidRequest("The query string cannot be parsed") from None
    if len(values) > 1:
        raise InvalidRequest("value must be given once")
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", values[0][:101], re.ASCII)
    if not number or len(values[0]) > 100 or math.isinf(float(values[0])):
        raise InvalidRequest(f"value must be one finite number, not {values[0][:100]!r}")
    return float(values[0])


def unzip(content_encoding: str, body: bytes) -> bytes:
    """The body, decompressed when it is gzip. As with TensorFlow Serving, what cannot be decompressed counts as empty."""
    if "gzip" not in content_encoding.lower():
        return body
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        plain = decompressor.decompress(body, MAX_BODY_BYTES)
    except zlib.error:
        return b""
    if decompressor.unconsumed_tail:
        raise too_large()
    return plain if decompressor.eof else b""


def too_large() -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)


# -- REST: which model, and what of it ---------------------------------------------------------------------------------

POST_PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.I | re.A)
GET_PATH = re.compile(r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.I | re.A)


def answer_rest(cluster: Cluster, method: str, path: str, body: bytes) -> Reply | Pending:
    pattern = {"POST": POST_PATH, "GET": GET_PATH}.get(method)
    match = pattern.fullmatch(path) if pattern else None
    if not match or (method == "POST" and match[4] not in ("classify", "regress", "predict")):
        raise InvalidRequest(f"Malformed request: {method} {path[:1000]}")
    if match[1] is None:
        raise InvalidRequest("Missing model name in request.")
    name = urllib.parse.unquote(match[1])
    version = int(match[2]) if match[2] and len(match[2]) < 1000 else None
    if match[2] and (version is None or version >= 2**63):
        raise InvalidRequest(f"Failed to convert version: {match[2][:100]} to numeric.")
    document = parse_json(body) if method == "POST" else {}
    signature_name = name_of_signature(document)
    if match[3] is not None:
        raise InvalidRequest(f"Unrecognized servable version label: {urllib.parse.unquote(match[3])}")

    if method == "GET" and match[4] != "metadata":
        return reply_status(cluster, name, version)
    if method == "GET":
        model = cluster.find_model(name, version)
        spec = {"name": name, "signature_name": "", "version": str(model.version)}
        return reply_json({"model_spec": spec, "metadata": model.metadata})
    if match[4] == "predict":
        return predict_document(cluster, name, version, document)
    examples = parse_examples(document)  # in TensorFlow Serving's order: before the model is looked up
    signature = find_example_signature(cluster, name, version, signature_name, match[4])
    encode = encode_classify if match[4] == "classify" else encode_regress
    return Pending(Call(name, signature, [examples]), functools.partial(encode, signature, len(examples)))


def name_of_signature(document: dict[str, Any]) -> str:
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise InvalidRequest(f"JSON Value: {shown(document)} not formatted correctly. 'signature_name' key must be a string value.")
    return name or "serving_default"


def predict_document(cluster: Cluster, model: str, version: int | None, document: dict[str, Any]) -> Pending:
    signature = cluster.find(model, version, name_of_signature(document))
    row, feed = parse_predict(document, signature)
    return Pending(Call(model, signature, feed), functools.partial(encode_predict, signature, row))


def reply_status(cluster: Cluster, name: str, version: int | None) -> Reply:
    try:
        model = cluster.find_model(name, version)
    except InvalidRequest as error:
        reason = f"any versions of model {name}" if version is None else f"version {version} of model {name}"
        raise InvalidRequest(f"{error} (Could not find {reason})", 404) from None
    ok = {"error_code": "OK", "error_message": ""}
    return reply_json({"model_version_status": [{"version": str(model.version), "state": "AVAILABLE", "status": ok}]})


# -- metrics -----------------------------------------------------------------------------------------------------------

LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
KINDS_BY_PATH = {"/": ("add", ADDER), "/health": ("health", ""), "/metrics": ("metrics", "")}


class Metrics:
    """What ``GET /metrics`` tells about the requests of one front end, in the text format of Prometheus, version 0.0.4.

    Every label has one of a few known values, whatever is asked for.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, str, int]] = collections.Counter()  # by kind, model and code
        self._latencies: dict[str, list[int]] = {}  # by kind: how many in each bucket, the last of which has no end
        self._seconds: collections.Counter[str] = collections.Counter()

    def observe(self, cluster: Cluster, path: str, status: int, seconds: float) -> None:
        """One request to ``path`` was answered with ``status`` after so many seconds."""
        kind, model = kind_and_model(path[:500])
        if model not in cluster.models:
            model = ""
        with self._lock:
            self._requests[kind, model, status] += 1
            self._latencies.setdefault(kind, [0] * (len(LATENCIES_S) + 1))[bisect.bisect_left(LATENCIES_S, seconds)] += 1
            self._seconds[kind] += seconds

    def text(self, cluster: Cluster) -> str:
        health, batch_sizes = cluster.health(), dict(cluster.batch_sizes)
        with self._lock:
            requests, seconds = sorted(self._requests.items()), dict(self._seconds)
            latencies = {kind: list(counts) for kind, counts in sorted(self._latencies.items())}
        errors = collections.Counter()
        for (_, _, code), count in requests:
            if code >= 400:
                errors[code] += count
        powers = [2**i for i in range(cluster.options.max_batch.bit_length())]
        by_size = [0] * (len(powers) + 1)
        for size, count in batch_sizes.items():
            by_size[bisect.bisect_left(powers, size)] += count

        lines = []

        def family(name: str, kind: str, help: str) -> None:
            lines.extend((f"# HELP ray_tensorflow_{name} {help}", f"# TYPE ray_tensorflow_{name} {kind}"))

        def sample(name: str, value: float, **labels) -> None:
            inside = ",".join(f'{key}="{escaped(str(text))}"' for key, text in labels.items())
            lines.append(f"ray_tensorflow_{name}{{{inside}}} {value}" if inside else f"ray_tensorflow_{name} {value}")

        def histogram(name: str, ends: Iterable[float], counts: list[int], total: float, **labels) -> None:
            for end, count in zip([*ends, "+Inf"], itertools.accumulate(counts)):
                sample(f"{name}_bucket", count, **labels, le=end)
            sample(f"{name}_sum", total, **labels)
            sample(f"{name}_count", sum(counts), **labels)

        family("requests_total", "counter", "Requests answered.")
        for (kind, model, code), count in requests:
            sample("requests_total", count, kind=kind, model=model, code=code)
        family("errors_total", "counter", "Requests answered with an error.")
        for code, count in sorted(errors.items()):
            sample("errors_total", count, code=code)
        family("request_seconds", "histogram", "Seconds from a request to its answer.")
        for kind, counts in latencies.items():
            histogram("request_seconds", LATENCIES_S, counts, seconds[kind], kind=kind)
        family("batch_size", "histogram", "Requests that went to a worker together.")
        histogram("batch_size", powers, by_size, sum(size * count for size, count in batch_sizes.items()))
        family("waiting_requests", "gauge", "Requests that wait for a worker.")
        sample("waiting_requests", health["waiting"])
        for actors in ("worker", "parameter_server"):
            family(f"{actors}_restarts_total", "counter", f"How often a {actors.replace('_', ' ')} was started anew.")
            for actor in health[f"{actors}s"]:
                sample(f"{actors}_restarts_total", actor.get("restarts", 0), index=actor["index"])
        return "\n".join(lines) + "\n"


@functools.lru_cache(1024)
def kind_and_model(path: str) -> tuple[str, str]:
    """What a path asks for, and the model that it names, which there may not be."""
    if path in KINDS_BY_PATH:
        return KINDS_BY_PATH[path]
    if path == "/ws":
        return "message", ""
    if match := POST_PATH.fullmatch(path):
        return match[4].lower(), urllib.parse.unquote(match[1])
    if match := GET_PATH.fullmatch(path):
        return match[4].lower() if match[4] else "status", urllib.parse.unquote(match[1] or "")
    return "other", ""


def escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


# -- REST: from JSON to arrays -----------------------------------------------------------------------------------------

RAPIDJSON_MESSAGES = {  # of Python's, in the words of TensorFlow Serving's parser
    "Expecting value": "Invalid value.",
    "Extra data": "The document root must not be followed by other values.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Expecting ',' delimiter": "Missing a comma or ']' or '}' after a value.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid control character at": "Invalid encoding in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string."}


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object, with NaN and Infinity as bare tokens. Raises InvalidRequest."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"JSON Parse error: Invalid encoding in string. at offset: {error.start}") from None
    if not text:
        raise InvalidRequest("JSON Parse error: The document is empty")
    try:
        try:
            document = json.loads(text)
        except RecursionError:
            document = json.loads(without_depths(text))
    except json.JSONDecodeError as error:
        message = RAPIDJSON_MESSAGES.get(error.msg, error.msg + ".") if text.strip() else "The document is empty."
        raise InvalidRequest(f"JSON Parse error: {message} at offset: {error.pos}") from None
    except (ValueError, RecursionError) as error:  # an integer of more digits than Python converts
        raise InvalidRequest(f"JSON Parse error: {error or 'nested too deeply'}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"JSON Value: {shown(document)} Is not object")
    return document


def without_depths(text: str, most: int = 200) -> str:
    """JSON text with whatever is nested deeper replaced by null: no tensor has so many axes, and other keys are ignored."""
    kept, start, depth = [], 0, 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"?|[][{}]', text, re.S):
        if token[0] in "[{":
            depth += 1
            if depth == most:
                kept.append(text[start:token.start()])
        elif token[0] in "]}":
            depth -= 1
            if depth == most - 1:
                kept.append("null")
                start = token.end()
    return "".join(kept) + (text[start:] if depth < most else "")


def shown(value: Any) -> str:
    """A JSON value in an error message, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = "(nested deeply)"
    return text if len(text) <= 300 else text[:300] + "..."


TYPE_NAMES = {"float32": "float", "float64": "double", "float16": "half", "object": "string"}  # TensorFlow's, where not numpy's
# what TensorFlow Serving accepts for an integer tensor: the narrow ones take any int32, and wrap
INTEGER_RANGES = {
    **dict.fromkeys(("int8", "int16", "int32", "uint8"), (-(2**31), 2**31 - 1)),
    "int64": (-(2**63), 2**63 - 1), "uint32": (0, 2**32 - 1), "uint64": (0, 2**64 - 1)}


def parse_predict(document: dict[str, Any], signature: Signature) -> tuple[bool, list[np.ndarray]]:
    """Is it row format, and one array for each input by sorted name. Raises InvalidRequest in TensorFlow Serving's words."""
    if "instances" in document and "inputs" in document:
        reason = "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
        raise InvalidRequest(f"JSON Value: {shown(document)} {reason} ")
    if not signature.inputs:
        raise InvalidRequest(f"Failed to get input map for signature: {signature.name}")
    if "instances" in document:
        return True, parse_rows(document["instances"], signature.inputs)
    if "inputs" in document:
        return False, parse_columns(document["inputs"], signature.inputs)
    raise InvalidRequest("Missing 'inputs' or 'instances' key")


def parse_rows(instances: Any, inputs: dict[str, TensorSpec]) -> list[np.ndarray]:
    if not isinstance(instances, list):
        raise InvalidRequest(f"JSON Value: {shown(instances)} Expecting 'instances' to be an list/array")
    if not instances:
        raise InvalidRequest("JSON Value: [] No values in 'instances' array")
    if isinstance(instances[0], dict) and not is_base64(instances[0]):
        for i, row in enumerate(instances):
            if not isinstance(row, dict) or is_base64(row):
                raise InvalidRequest(f"Expecting object but got list at item {i} of input list")
            for name, value in row.items():
                if name not in inputs:
                    raise row_error(i, f"JSON object: does not have named input: {name}", name)
            if row.keys() != inputs.keys():
                keys = f"JSON object: {shown(row)} keys must be equal to: {','.join(inputs)}"
                raise InvalidRequest(f"Failed to process element: {i} of 'instances' list. {keys}")
        return [stack_rows([row[name] for row in instances], spec, name) for name, spec in inputs.items()]
    if len(inputs) > 1:
        raise InvalidRequest(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per tensorinfo_map")
    for i, row in enumerate(instances):
        if isinstance(row, dict) and not is_base64(row):
            raise InvalidRequest(f"Expecting value/list but got object at item {i} of input list")
    return [stack_rows(instances, spec) for spec in inputs.values()]


def stack_rows(rows: list[Any], spec: TensorSpec, name: str | None = None) -> np.ndarray:
    """One tensor of all rows at once; where that fails, row by row, to say which one is wrong."""
    try:
        return parse_tensor(rows, spec)
    except InvalidRequest:
        first = None
        for i, row in enumerate(rows):
            try:
                array = parse_tensor(row, spec)
            except InvalidRequest as error:
                raise row_error(i, error.message, name) from None
            first = array if first is None else first
            if array.size != first.size:
                raise row_error(i, f"Expecting tensor size: {first.size} but got: {array.size}", name)
            if array.shape != first.shape:
                raise row_error(i, f"Expecting shape {shape_text(first.shape)} but got: {shape_text(array.shape)}", name)
        raise


def row_error(i: int, message: str, name: str | None) -> InvalidRequest:
    key = f" key: {name}" if name is not None else ""
    return InvalidRequest(f"Failed to process element: {i}{key} of 'instances' list. Error: INVALID_ARGUMENT: {message}")


def parse_columns(value: Any, inputs: dict[str, TensorSpec]) -> list[np.ndarray]:
    if not isinstance(value, dict) or is_base64(value):
        if len(inputs) > 1:
            raise InvalidRequest(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per tensorinfo_map")
        return [parse_tensor(value, spec) for spec in inputs.values()]
    for name in inputs:
        if name not in value:
            raise InvalidRequest(f"Missing named input: {name} in 'inputs' object.")
    return [parse_tensor(value[name], spec) for name, spec in inputs.items()]


def parse_tensor(value: Any, spec: TensorSpec) -> np.ndarray:
    """A nested list, or a scalar, to an array of the spec's dtype; the shape is that of the first elements.

    Goes level by level with few steps of Python for each list. Raises InvalidRequest in TensorFlow Serving's words.
    """
    shape, inner = [], value
    while isinstance(inner, list):
        shape.append(len(inner))
        if not inner:
            break
        inner = inner[0]
    if len(shape) > 64:
        raise InvalidRequest(f"Encountered list at unexpected level: {len(shape)} expected < 64")
    flat = [value]
    for level, size in enumerate(shape):
        for item in flat if set(map(type, flat)) > {list} else ():
            if not isinstance(item, list):
                place = f"found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {len(shape)}"
                raise InvalidRequest(f"JSON Value: {shown(item)} {place}")
        for item in flat if set(map(len, flat)) > {size} else ():
            if len(item) != size:
                raise InvalidRequest(f"Encountered list at unexpected size: {len(item)} at level: {level} expected size: {size}")
        flat = list(itertools.chain.from_iterable(flat))
    if list in set(map(type, flat)):
        raise InvalidRequest(f"Encountered list at unexpected level: {len(shape)} expected < {len(shape)}")
    return parse_leaves(flat, spec.dtype).reshape(shape)


def parse_leaves(values: list[Any], dtype: str) -> np.ndarray:
    kinds = set(map(type, values))
    if dtype in ("float32", "float64"):
        check_leaves(values, dtype, kinds <= {int, float}, lambda v: type(v) in (int, float))
        try:
            array = np.array(values, np.float64)
        except OverflowError:  # an integer beyond float64
            array = np.array([float(str(v)) for v in values], np.float64)
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    if dtype in INTEGER_RANGES:
        low, high = INTEGER_RANGES[dtype]
        fine = kinds <= {int} and (not values or low <= min(values) and max(values) <= high)
        check_leaves(values, dtype, fine, lambda v: type(v) is int and low <= v <= high)
        return np.array(values, np.uint64 if low == 0 else np.int64).astype(dtype)
    if dtype == "bool":
        check_leaves(values, dtype, kinds <= {bool}, lambda v: type(v) is bool)
        return np.array(values, bool)
    if dtype == "object":
        check_leaves(values, dtype, kinds <= {str, dict}, lambda v: type(v) in (str, dict))
        array = np.empty(len(values), object)
        array[:] = [parse_string(v) for v in values]
        return array
    if values:
        raise InvalidRequest(f"Conversion of JSON Value: {shown(values[0])} to type: {TYPE_NAMES.get(dtype, dtype)}", 501)
    return np.empty(0, np.float16)  # nothing, of whatever it was


def check_leaves(values: list[Any], dtype: str, fine: bool, accepts: Callable[[Any], bool]) -> None:
    for value in () if fine else values:
        if not accepts(value):
            types = f"Type: {json_type(value)} is not of expected type: {TYPE_NAMES.get(dtype, dtype)}"
            raise InvalidRequest(f"JSON Value: {shown(value)} {types}")


def json_type(value: Any) -> str:
    """The type's name in TensorFlow Serving's messages."""
    if isinstance(value, bool):
        return str(value)
    return {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}.get(type(value), "Null")


def parse_string(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("JSON Parse error: The surrogate pair in string is invalid.") from None
    if not is_base64(value):
        raise InvalidRequest(f"JSON Value: {shown(value)} not formatted correctly for base64 data")
    text = re.sub(r"\s", "", value["b64"], flags=re.A)
    try:
        return base64.b64decode(text if "=" in text else text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("Unable to base64 decode") from None


def is_base64(value: dict[str, Any]) -> bool:
    return len(value) == 1 and isinstance(value.get("b64"), str)


# -- REST: from arrays to JSON -----------------------------------------------------------------------------------------


def encode_predict(signature: Signature, row: bool, outputs: list[np.ndarray]) -> Reply:
    named = dict(zip(signature.outputs, outputs))
    if not row:
        parts = {name: json_texts(array, 0, name)[0] for name, array in named.items()}
        text = next(iter(parts.values())) if len(parts) == 1 else json_object(parts)
        return Reply(200, b'{"outputs": ' + to_bytes(text) + b"}")
    for name, array in named.items():
        if array.ndim == 0:
            raise InvalidRequest(f"Tensor name: {name} has no shape information ")
        if len(array) != len(outputs[0]):
            raise InvalidRequest(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {len(outputs[0])}")
    columns = {name: json_texts(array, 1, name) for name, array in named.items()}
    if len(columns) == 1:
        rows = next(iter(columns.values()))
    else:
        rows = [json_object(dict(zip(columns, texts))) for texts in zip(*columns.values())]
    return Reply(200, b'{"predictions": [' + to_bytes(", ".join(rows)) + b"]}")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # strings that are not UTF-8 pass as they are, as in TensorFlow Serving


def json_object(texts: dict[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "}"


def json_texts(array: np.ndarray, axes: int, name: str) -> list[str]:
    """The array as JSON, one text for each element of its first ``axes`` axes."""
    kind, flat = array.dtype.kind, array.ravel()
    if kind == "f" and array.itemsize >= 4:
        texts = decimals(flat)
    elif kind == "b":
        texts = ["true" if value else "false" for value in flat.tolist()]
    elif kind in "iu" and array.dtype.name != "uint16":
        texts = list(map(str, flat.tolist()))
    elif kind == "O":
        if name.endswith("_bytes"):
            texts = [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in flat]
        else:
            texts = [json.dumps(value.decode("utf-8", "surrogateescape"), ensure_ascii=False) for value in flat]
    else:
        raise InvalidRequest(f"Failed to write JSON value for tensor type: {TYPE_NAMES.get(array.dtype.name, array.dtype.name)}")
    for axis in range(array.ndim - 1, axes - 1, -1):
        size = array.shape[axis]
        texts = [f"[{', '.join(texts[i * size:(i + 1) * size])}]" for i in range(math.prod(array.shape[:axis]))]
    return texts


def decimals(flat: np.ndarray) -> list[str]:
    """Floats as TensorFlow Serving writes them: six digits where that is exact, else as many as it takes (9 or 17).

    So each text, read back as the same type, is the same number to the last bit.
    """
    values = flat.tolist()
    texts = ("%g " * len(values) % tuple(values)).split()
    digits = "%.9g" if flat.itemsize == 4 else "%.17g"
    for i in np.flatnonzero(np.array(texts, np.float64).astype(flat.dtype) != flat).tolist():
        texts[i] = digits % values[i]
    tokens = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return [text if "." in text or "e" in text else tokens.get(text) or text + ".0" for text in texts]


# -- REST: classify and regress ----------------------------------------------------------------------------------------


def find_example_signature(cluster: Cluster, name: str, version: int | None, signature_name: str, method: str) -> Signature:
    """The signature, if it takes serialized ``tf.train.Example`` strings and answers to this method."""
    signature = cluster.find_model(name, version).signatures.get(signature_name)
    kind = {"classify": "classification", "regress": "regression"}[method]
    if signature is None:
        raise InvalidRequest(f"No signature was found with the name: {signature_name}")
    if signature.method != f"tensorflow/serving/{method}":
        raise InvalidRequest(f"Expected {kind} signature method_name to be tensorflow/serving/{method}. Was: {signature.method}")
    if len(signature.inputs) != 1:
        raise InvalidRequest("Expected one input Tensor.")
    if "inputs" not in signature.inputs:
        raise InvalidRequest(f"No {kind} inputs found in SignatureDef: {signature_name}")
    if signature.inputs["inputs"].dtype != "object":
        raise InvalidRequest(f"Expected a string input Tensor for the examples, but it is {signature.inputs['inputs'].dtype}.")
    return signature


def parse_examples(document: dict[str, Any]) -> np.ndarray:
    """Serialized ``tf.train.Example`` protos, an object array [n]; a common context comes before each, and so is merged."""
    context = serialize_example(document["context"]) if "context" in document else b""
    if "examples" not in document:
        raise InvalidRequest(f"JSON Value: {shown(document)} When method is classify, key 'examples' is expected and was not found")
    examples = document["examples"]
    if not isinstance(examples, list):
        raise InvalidRequest(f"JSON Value: {shown(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise InvalidRequest(f"JSON Value: {shown(document)} 'examples' value is an empty array")
    array = np.empty(len(examples), object)
    array[:] = [context + serialize_example(example) for example in examples]
    return array


def serialize_example(example: Any) -> bytes:
    """A JSON object as a ``tf.train.Example``, in protobuf's wire format (tensorflow/core/example/feature.proto)."""
    if not isinstance(example, dict):
        raise InvalidRequest(f"Example must be JSON object but got JSON {json_type(example)}")
    features = b"".join(  # map<string, Feature> feature = 1
        wire(1, wire(1, name.encode()) + wire(2, serialize_feature(name, value))) for name, value in example.items())
    return wire(1, features)


def serialize_feature(name: str, value: Any) -> bytes:
    values = value if isinstance(value, list) else [value]
    kinds = []
    for item in values:
        if item is None or isinstance(item, list) or isinstance(item, dict) and not is_base64(item):
            raise InvalidRequest(f"Feature: {name} has element with unexpected JSON type: {json_type(item)}")
        is_float = isinstance(item, float) or not isinstance(item, (bool, str, dict)) and not -(2**63) <= item < 2**64
        kinds.append("bytes" if isinstance(item, (str, dict)) else "float" if is_float else "int64")
        if kinds[-1] == "int64" and item >= 2**63:
            raise InvalidRequest(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
        if kinds[-1] != kinds[0]:
            raise InvalidRequest(f"Unexpected element type in feature: {name} expecting type: {kinds[0]}")
    if not values:
        return b""
    if kinds[0] == "bytes":
        return wire(1, b"".join(wire(1, parse_string(item)) for item in values))
    if kinds[0] == "float":
        return wire(2, wire(1, parse_leaves(values, "float32").tobytes()))
    return wire(3, wire(1, b"".join(varint(int(item) % 2**64) for item in values)))


def wire(field: int, payload: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return varint(field << 3 | 2) + varint(len(payload)) + payload


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def encode_regress(signature: Signature, examples: int, outputs: list[np.ndarray]) -> Reply:
    if len(outputs) != 1:
        raise InvalidRequest("Expected one output Tensor.")
    if "outputs" not in signature.outputs:
        raise InvalidRequest(f"No regression outputs found in SignatureDef: {signature.name}")
    values = check_output("output", outputs[0], "float32")
    if values.ndim != 1 and values.shape[1:] != (1,):
        shapes = f"either [batch_size] or [batch_size, 1] but got {shape_text(values.shape)}"
        raise InvalidRequest(f"Expected output Tensor shape to be {shapes}")
    if len(values) != examples:
        raise InvalidRequest(f"Input batch size did not match output batch size: {examples} vs. {len(values)}")
    return Reply(200, to_bytes(f'{{"results": {json_texts(values.reshape(-1), 0, "outputs")[0]}}}'))


def encode_classify(signature: Signature, examples: int, outputs: list[np.ndarray]) -> Reply:
    if len(outputs) > 2:
        raise InvalidRequest(f"Expected one or two output Tensors, found {len(outputs)}")
    named = dict(zip(signature.outputs, outputs))
    texts = {}
    for name, dtype in (("classes", "object"), ("scores", "float32")):
        if name in named:
            array = check_output(name, named[name], dtype)
            if array.ndim != 2:
                raise InvalidRequest(f"Expected Tensor shape: [batch_size num_classes] but got {shape_text(array.shape)}")
            if len(array) != examples:
                raise InvalidRequest(f"Expected {name} output batch size of {examples}. Got: {len(array)}")
            texts[name] = [json_texts(row, 1, name) for row in array]
    if not texts:
        raise InvalidRequest('Expected classification signature outputs to contain at least one of "classes" or "scores"')
    labels = texts.get("classes") or [['""'] * len(row) for row in texts["scores"]]
    scores = texts.get("scores") or [["0.0"] * len(row) for row in texts["classes"]]
    if len(labels[0]) != len(scores[0]):
        counts = f"{len(labels[0])} vs. {len(scores[0])}"
        raise InvalidRequest(f"Tensors class and score should match in num_classes. Got {counts}")
    pairs = [", ".join(f"[{label}, {score}]" for label, score in zip(*row)) for row in zip(labels, scores)]
    return Reply(200, to_bytes('{"results": [' + ", ".join(f"[{row}]" for row in pairs) + "]}"))


def check_output(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype != dtype:
        types = [f"DT_{TYPE_NAMES.get(t, t).upper()}" for t in (dtype, array.dtype.name)]
        raise InvalidRequest(f"Expected {name} Tensor of {types[0]}. Got: {types[1]}")
    return array


def shape_text(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


# ======================================================================================================================
# Whole files: predict .npy or .npz, larger than memory, into a file that appears whole or not at all
# ======================================================================================================================


async def predict_file(cluster: Cluster, model: str, source: str, target: str) -> None:
    """Stream the rows of ``source`` through a model's default signature into ``target``, with progress on standard error."""
    signature = cluster.find(model)
    with contextlib.ExitStack() as stack:
        columns = open_columns(source, signature, stack)
        total = next(iter(columns.values())).rows
        row_bytes = max(1, sum(column.row_bytes for column in columns.values()))
        most = max(1, 2**22 // row_bytes)  # many batches are in flight at once, and the file is larger than memory
        sizes = BatchSizes(min(cluster.options.max_batch, most), most, signature)

        def batches():
            left = total
            while True:  # at least one batch: of no rows, the outputs' dtypes and shapes
                rows = min(left, sizes.rows)
                yield {name: column.read(rows) for name, column in columns.items()}
                left -= rows
                if not left:
                    return

        writer = stack.enter_context(ArrayWriter(target, signature, total))
        progress = Progress(total)
        async for outputs in cluster.map_async(batches(), model):
            writer.write(outputs)
            sizes.rate = progress.show(writer.rows)
        writer.finish()
    log.info("%s: %d rows", target, total)


@dataclasses.dataclass
class BatchSizes:
    """How many rows go together: as the signature fixes it, or some tenths of a second of work where it makes no difference."""

    least: int
    most: int
    signature: Signature
    rate: float = 0.0  # rows a second, so far

    @property
    def rows(self) -> int:
        fixed = [spec.shape[0] for spec in self.signature.inputs.values() if spec.shape and spec.shape[0]]
        if fixed:
            return fixed[0]
        return min(self.most, max(self.least, int(self.rate / 5))) if self.signature.batched else self.least


class Column:
    """The rows of one array in .npy format, read one after another from a stream."""

    def __init__(self, name: str, stream: BinaryIO):
        self.name, self.stream = name, stream
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read_header is None:
            raise InvalidRequest(f"{name} has .npy version {version}, which is not known")
        shape, fortran, self.dtype = read_header(stream)
        if not shape or self.dtype.hasobject or fortran and len(shape) > 1:
            raise InvalidRequest(f"{name} must be an array with rows, in C order and without Python objects")
        self.rows, self.shape = shape[0], shape[1:]
        self.row_bytes = self.dtype.itemsize * math.prod(self.shape)

    def read(self, rows: int) -> np.ndarray:
        try:
            data = self.stream.read(rows * self.row_bytes)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidRequest(f"{self.name} cannot be read: {first_sentence(str(error))}") from None
        if len(data) < rows * self.row_bytes:
            raise InvalidRequest("The input file ends before its last row")
        return np.frombuffer(data, self.dtype).reshape(rows, *self.shape)


def open_columns(path: str, signature: Signature, stack: contextlib.ExitStack) -> dict[str, Column]:
    """A Column for each input of the signature. Raises InvalidRequest when the file does not fit."""
    try:
        if path.endswith(".npz"):
            archive = stack.enter_context(zipfile.ZipFile(path))
            streams = {name.removesuffix(".npy"): stack.enter_context(archive.open(name)) for name in archive.namelist()}
        else:
            streams = {next(iter(signature.inputs)): stack.enter_context(open(path, "rb"))}
        if streams.keys() != signature.inputs.keys():
            inputs = f"the inputs are {sorted(signature.inputs)} (.npz holds several)"
            raise InvalidRequest(f"{path} has {sorted(streams)}, but {inputs}")
        columns = {name: Column(f"{path}: {name}", stream) for name, stream in streams.items()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path} cannot be read: {first_sentence(str(error))}") from None
    if len({column.rows for column in columns.values()}) > 1:
        raise InvalidRequest(f"{path} has arrays with different numbers of rows")
    return columns


class ArrayWriter:
    """Writes outputs row by row into hidden files beside the target, which takes its place in one step when all is there."""

    def __init__(self, target: str, signature: Signature, total: int):
        if target.endswith(".npy") and len(signature.outputs) > 1:
            raise InvalidRequest(f"{target} holds one array, but the outputs are {sorted(signature.outputs)}: name it .npz")
        self.target, self.total, self.rows = target, total, 0
        folder, name = os.path.split(os.path.abspath(target))
        try:
            self.folder = tempfile.mkdtemp(prefix=f".{name}.", dir=folder)
        except OSError as error:
            raise InvalidRequest(f"{target} cannot be written: {error.strerror}") from None
        self.paths = {name: os.path.join(self.folder, f"{i}.npy") for i, name in enumerate(signature.outputs)}
        self.files: dict[str, BinaryIO] = {}
        self.texts: dict[str, list[bytes]] = {}  # of string outputs, whose width is only known at the end

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, outputs: dict[str, np.ndarray]) -> None:
        counts = {array.shape[:1] for array in outputs.values()}
        if len(counts) > 1 or counts == {()}:
            raise InvalidRequest("The outputs cannot be written row by row: they have different numbers of rows, or none")
        for name, array in outputs.items():
            if array.dtype == object:
                self.texts.setdefault(name, []).extend(array.tolist())
                continue
            if name not in self.files:
                self.files[name] = open(self.paths[name], "wb")
                shape = self.total, *array.shape[1:]
                header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(self.files[name], header)
            self.files[name].write(np.ascontiguousarray(array).data)
        self.rows += counts.pop()[0]

    def finish(self) -> None:
        if self.rows != self.total:
            raise InvalidRequest(f"The model made {self.rows} rows of {self.total}: its outputs are not row by row")
        for name, texts in self.texts.items():
            np.save(self.paths[name], np.array(texts, "S"))
        whole = next(iter(self.paths.values()))
        for file in self.files.values():
            file.close()
        if self.target.endswith(".npz"):
            whole = os.path.join(self.folder, "whole.npz")
            with zipfile.ZipFile(whole, "w", allowZip64=True) as archive:
                for name, path in self.paths.items():
                    archive.write(path, f"{name}.npy")
        os.replace(whole, self.target)


class Progress:
    """Rows, rows a second and time left: in place on a terminal, else a line now and then."""

    def __init__(self, total: int):
        self.total, self.started = total, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.shown = self.started

    def show(self, rows: int) -> float:
        """Called after each batch; returns rows a second."""
        now = time.monotonic()
        rate = rows / max(now - self.started, 1e-9)
        if now - self.shown >= (0.1 if self.terminal else 10) or rows == self.total:
            self.shown = now
            line = f"{rows}/{self.total} rows  {rate:.0f} rows/s  {(self.total - rows) / max(rate, 1e-9):.0f} s left"
            end = "\n" if not self.terminal or rows == self.total else ""
            print(f"\r\x1b[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)
        return rate


# ======================================================================================================================
# The command
# ======================================================================================================================


def start_logging() -> None:
    """One line an event, on standard error."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)


def allow_connections() -> None:
    """As many open files as the system allows: each client needs one, and many systems give 1,024 unless asked."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(most, 2**16)), most))


async def run_command(options: Options) -> int:
    """Worker i adds the value i to the shared sum, all at once; or a file is predicted. Returns the exit status: 128 + n after
    signal n."""
    ended_by: list[int] = []

    def end(number: int, task: asyncio.Task) -> None:
        ended_by.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number, asyncio.current_task())
    cluster = Cluster(options)
    try:
        started = time.monotonic()
        await asyncio.to_thread(cluster.start, options.workers)
        print(f"started: 1 parameter server, {options.workers} workers, {time.monotonic() - started:.1f} s", flush=True)

        async def add(worker: int) -> None:
            started = time.monotonic()
            total = await cluster.add_async(worker, worker)
            print(f"worker {worker}: added {worker}, sum {total}, {time.monotonic() - started:.3f} s", flush=True)

        if options.input:
            await predict_file(cluster, options.model[0].name, options.input, options.output)
            return 0
        await asyncio.gather(*map(add, range(options.workers)))
        print(f"sum: {await cluster.add_async(0)}", flush=True)
        return 0
    except asyncio.CancelledError:
        return 128 + ended_by[0]
    finally:
        await asyncio.to_thread(cluster.close)


def main() -> None:
    options = Options.from_command_line("Add the workers' numbers up in one shared graph, or predict a whole file.", COMMAND)
    start_logging()
    try:
        sys.exit(asyncio.run(run_command(options)))
    except (Error, OSError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


if __name__ == "__main__":
    from ray_tensorflow import main  # as a module, so that actors find its classes under the same name

    main()
