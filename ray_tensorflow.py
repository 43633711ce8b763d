"""TensorFlow graphs, shared by many processes through Ray, served to many requests at once.

A Ray *parameter server* actor holds the only copy of a ``tf.compat.v1`` graph's variables. *Worker* actors each build
the same graph against it (between-graph replication) and run it asynchronously. A *front end* (this command, or the
Flask and Starlette apps beside it) gathers concurrent requests into batches and hands them round-robin to the workers.

    front end ──> Cluster ──> Batcher ──> round robin ──> Worker actor ──> session.run ──> ParameterServer actor(s)
    HTTP in and out           gathers what        decodes, merges, runs,           variables, tables, kernels;
                              queued up           splits, encodes                  the first one loads and keeps

    python ray_tensorflow.py                                 # worker i adds i to the shared sum
    python ray_tensorflow_starlette.py --model DIR           # serve a SavedModel beside it
    python ray_tensorflow_flask.py --model module:function   # or a graph of one's own

The process that imports this file never imports tensorflow, and nothing starts before a ``Cluster`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import http.client
import importlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import resource
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import uvloop

# Ray reads these two when it is imported, and never again.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # else it takes SIGTERM from whoever handles it
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")  # a paragraph; we have a line for it

import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger("ray_tensorflow")


# == Errors: what can go wrong, as one tree; each message is one sentence that says what happened and what to do =======


class Error(Exception):
    """Base of all errors that this project raises on purpose. ``status`` is its HTTP status code."""

    status = 500

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message.encode(errors="replace").decode())  # JSON may have brought half a surrogate pair
        self.status = status or self.status


class OptionError(Error):
    """An option has a value that is not allowed."""


class InvalidRequest(Error):
    """The request can never succeed as it is: it is wrong in itself, or names what does not exist."""
    status = 400


class Unavailable(Error):
    """Not now, but perhaps soon: the cluster is starting, stopping, or has too much to do."""
    status = 503


class WorkerLost(Error):
    """A worker or its parameter server went away meanwhile; a change that was asked for may have been applied."""
    status = 502


class DeadlineExceeded(Error):
    """The request's deadline passed before its answer came."""
    status = 504


class ModelError(Error):
    """The model itself failed: on this request, or when it was loaded."""


def first_sentence(error: BaseException | str) -> str:
    """A message without what TensorFlow puts around it: "From /job:...", the nodes, the traces."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("From /job:", "[[", "Graph execution error:"))]
    return re.sub(r"\s*\[\[.*?\]\]", "", lines[0]) if lines else type(error).__name__


# == Options: one dataclass is the source of every name, type, default, limit and help text ============================

ADDER = "adder"
FRONT_END, COMMAND = "front end", "command"


def option(default, help: str, parse: Callable[[Any], Any], only: str | None = None):
    """A field of ``Options``; ``parse`` checks a value (given as text or not), or raises ValueError(what is allowed).
    ``only`` says whose command line has it: a FRONT_END's, the COMMAND's, or everybody's."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "only": only})


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable[[Any], Any]:
    def parse(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            result = kind(value)
            is_exact = result == float(value) and math.isfinite(result) and not isinstance(value, bool)
            if is_exact and least <= result <= most and not (above and result == least):
                return result
        limits = f"{'above' if above else 'of at least'} {least}{f' and at most {most}' if most < math.inf else ''}"
        raise ValueError(f"a {'whole ' if kind is int else ''}number {limits}")

    return parse


def matching(pattern: str, allowed: str, convert: Callable[[str], Any] = str) -> Callable[[Any], Any]:
    def parse(value):
        if not isinstance(value, (str, bool, os.PathLike)) or not re.fullmatch(pattern, str(value), re.S):
            raise ValueError(allowed)
        return convert(str(value))

    return parse


text = matching(".+", "a non-empty text")
array_file = matching(r".*\.np[yz]", "a file whose name ends in .npy or .npz")
switch = matching("(?i:1|true|0|false)", "1 or 0", lambda value: value.lower() in ("1", "true"))


class ModelSource(NamedTuple):
    """Where a served model comes from: a SavedModel's folder, or a function that builds a graph."""
    name: str
    version: int | None  # None: the folder has numbered versions, which come and go
    folder: str | None = None
    function: str | None = None  # "module:function"

    def __str__(self) -> str:
        return f"{self.name} ({self.folder or self.function})"

    def versions(self) -> dict[int, ModelSource]:
        """What can be loaded at the moment."""
        if self.version is not None:
            return {self.version: self}
        names = {path.partition("/")[0] for path in glob.glob("*/saved_model.pb*", root_dir=self.folder)}
        return {int(name): ModelSource(self.name, int(name), os.path.join(self.folder, name))
                for name in names if name.isdecimal()}

    def labels(self) -> dict[str, int]:
        """The symbolic links ``stable -> 123`` beside the versions."""
        links = glob.glob("*", root_dir=self.folder) if self.version is None else ()
        targets = {link: os.path.basename(os.path.realpath(os.path.join(self.folder, link))) for link in links}
        return {link: int(target) for link, target in targets.items() if target.isdecimal() and not link.isdecimal()}


def model_source(value) -> ModelSource:
    """Parse ``[NAME=]DIR`` or ``[NAME=]module:function``."""
    if isinstance(value, ModelSource):
        return value
    name, where = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", str(value), re.S).groups()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", where) and not os.path.isdir(where):
        return ModelSource(name or where.partition(":")[2], 1, function=where)
    if not where or not os.path.isdir(where):
        raise ValueError("a folder that exists, or module:function, with an optional NAME= before it")
    parent, base = os.path.split(os.path.abspath(where))
    if glob.glob("saved_model.pb*", root_dir=where):  # perhaps one version of several, named outright
        is_version = base.isdecimal()
        name = name or (os.path.basename(parent) if is_version else base)
        return ModelSource(name, int(base) if is_version else 1, os.path.abspath(where))
    source = ModelSource(name or base, None, os.path.abspath(where))
    if not source.versions():
        raise ValueError("a folder with a saved_model.pb in it, or in one of its folders that are named by a number")
    return source


def model_sources(values) -> tuple[ModelSource, ...]:
    values = values.split(",") if isinstance(values, str) else values if isinstance(values, (list, tuple)) else [values]
    sources = tuple(map(model_source, values))
    [(name, count)] = collections.Counter([ADDER, *(source.name for source in sources)]).most_common(1)
    if count > 1:
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
        " [NAME=]module:function (a graph of your own); repeatable, in the environment with commas", model_sources)
    parameter_servers: int = option(1, "TensorFlow ps tasks, over which variables are spread", number(int, 1))
    placement: str = option(
        "shared", "shared: models live and run on the parameter server, one copy in all; mirrored: each worker keeps a"
        " copy of the weights on its own device and runs there", matching("shared|mirrored", "shared or mirrored"))
    max_batch: int = option(64, "most requests that one session.run takes together", number(int, 1))
    batch_wait_ms: float = option(0.0, "how long a batch may wait for company, in milliseconds", number(float, 0))
    max_queue: int = option(1024, "waiting requests past which new ones are refused", number(int, 1))
    timeout_s: float = option(30.0, "deadline of one request, in seconds", number(float, 0, above=True))
    exact: bool = option(
        False, "merge rows of several requests only where every answer stays the same to the last bit", switch)
    checkpoint_dir: str | None = option(
        None, "folder in which the sum and changed variables are kept, through power cuts and for the next start;"
        " without it they are kept as long as the program runs", text)
    address: str | None = option(
        None, "Ray cluster to join ('auto': the one that runs here), else one is started", text)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 where the platform sets PORT", text, FRONT_END)
    port: int = option(8080, "port to listen on; PORT where the platform sets it", number(int, 0, 65535), FRONT_END)
    input: str | None = option(
        None, "rows to predict with the one --model: .npy, or .npz by input name", array_file, COMMAND)
    output: str | None = option(None, "where predictions go: .npy, or .npz by output name", array_file, COMMAND)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError as error:
                shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                message = f"--{field.name.replace('_', '-')} {shown!s:.200}: must be {error}"
                raise OptionError(message) from None
        if (self.input is None) != (self.output is None):
            raise OptionError("--input and --output: one needs the other")
        if self.input is not None and len(self.model) != 1:
            raise OptionError(f"--input {self.input}: needs exactly one --model to predict with, not {len(self.model)}")

    @classmethod
    def from_environment(cls, kind: str = FRONT_END, **changes) -> Options:
        """Options from ``RAY_TENSORFLOW_<NAME>`` variables, and PORT for a front end; ``changes`` beat them."""
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: os.environ.get(f"RAY_TENSORFLOW_{name.upper()}") for name in names}
        if kind == FRONT_END and os.environ.get("PORT"):
            changes = {"port": os.environ["PORT"], "host": "0.0.0.0"} | {k: v for k, v in found.items() if v} | changes
        return cls(**{name: value for name, value in found.items() if value} | changes)

    @classmethod
    def from_command_line(cls, description: str, kind: str, arguments: list[str] | None = None) -> Options:
        """Options from the command line of a FRONT_END or the COMMAND; a wrong one ends the program with status 2."""
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
        for field in dataclasses.fields(cls):
            if field.metadata["only"] in (None, kind):
                default = "" if field.default in (None, (), False) else f" (default: {field.default})"
                how = {"action": "append"} if field.name == "model" else {}
                how = {"action": "store_true"} if field.default is False else how | {"metavar": field.name.upper()}
                parser.add_argument(f"--{field.name.replace('_', '-')}", help=field.metadata["help"] + default,
                                    default=argparse.SUPPRESS, **how)
        try:
            return cls.from_environment(kind, **vars(parser.parse_args(arguments)))
        except OptionError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")

    @property
    def shared(self) -> dict[str, str]:
        """What all front ends of one shared cluster must have in common, as text."""
        with open(__file__, "rb") as file:
            texts = {"ray_tensorflow.py": hashlib.sha256(file.read()).hexdigest()}
        for name in "workers threads model parameter_servers placement max_batch exact checkpoint_dir".split():
            value = getattr(self, name)
            texts[f"--{name.replace('_', '-')}"] = ",".join(map(str, value)) if name == "model" else str(value)
        return texts


# == Graphs: a model in one process, whether it comes from a SavedModel or from a function =============================


class TensorSpec(NamedTuple):
    dtype: str  # numpy's name for it; "object": strings, as bytes
    shape: tuple[int | None, ...] | None  # None is a free axis

    @property
    def has_rows(self) -> bool:
        return bool(self.shape) and self.shape[0] is None


@dataclasses.dataclass
class Signature:
    """What can be run: named inputs to named outputs, in the order of their sorted names."""

    name: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    method: str  # tensorflow/serving/predict, /classify or /regress
    writes: bool  # running it changes variables: it is never run twice for one request
    calls_out: bool  # it runs Python functions, such as remote_predict: it may wait for what only another place can do
    merged: bool = False  # rows of several requests may share one run


class Model(NamedTuple):
    """A version of a served model as everybody but its graph knows it."""

    source: ModelSource
    state: str  # LOADING, AVAILABLE, UNLOADING or END, as TensorFlow Serving has them; MOVING: wait for another version
    error: str | None = None  # why it could not be loaded
    metadata: dict[str, Any] = {}  # its SignatureDefs as proto3 JSON, when the parameter server has loaded it
    merged: list[str] = []  # the signatures of which several requests may share one run
    calls_out: bool = False
    weights: str | None = None  # which ones, of a mirror

    @property
    def version(self) -> int:
        return self.source.version


Version = int | str | None  # a version, a label, or None: the latest
Key = tuple[str, Version]  # what is asked for: a model's name, and that
Arrays = dict[str, np.ndarray]  # by name


def build_adder(tf):
    """The built-in model: a shared float64 sum to which values are added; each gets the sum right after its own add.

    Read, cumulative sum and assignment are one critical section of one ``session.run``, so that no other worker's add
    slips between (tensorflow#6360). The new sum is checked, and kept, before it is assigned: a run that fails changes
    nothing, and no sum is answered that is not on disk. float64, because a float32 sum stops counting at 2**24.
    """
    value = tf.placeholder(tf.float64, [None], name="value")
    total = tf.get_variable("sum", [], tf.float64, tf.zeros_initializer())

    def add():
        sums = tf.cumsum(tf.concat([[total.read_value()], value], axis=0))
        sums = tf.debugging.check_numerics(sums, "the sum would not be finite")
        kept = tf.numpy_function(keep_sum, [sums[-1]], tf.float64)  # runs in the parameter server, as the variable does
        kept.set_shape([])
        with tf.control_dependencies([total.assign(kept, read_value=False)]):
            return sums[1:]

    return {"serving_default": ({"value": value}, {"sum": tf.CriticalSection(shared_name="sum").execute(add)})}


# Rows are applied in order, and a run that fails has changed nothing: so requests may share a run although it writes.
build_adder.atomic = True
ADDER_SOURCE = ModelSource(ADDER, 1, function="ray_tensorflow:build_adder")


def import_tensorflow():
    """``tensorflow.compat.v1``, imported here and nowhere else, in the actors alone."""
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):  # break loopback gRPC (tensorflow#50626)
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
        if ray.is_initialized() and not ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows all GPUs to actors that asked for none (ray#28215)
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()  # and not disable_v2_behavior(), which brings reference variables back
    tf.get_logger().setLevel("ERROR")
    gc.freeze()  # a look at all of TensorFlow's objects would stop requests for a tenth of a second, now and then
    sys.setswitchinterval(0.001)  # requests wait for Python's lock while another thread builds a new version's graph
    return tf


def session_config(tf, addresses: list[str], timeout_s: float):
    """The one session config: variables live on the ``ps`` tasks and are shared by all sessions made with it.

    The TF servers know nothing of each other; each session brings the cluster along. Without ``share_session_state``
    each would get a private copy of the server's state. Without a timeout a run on a server that died would never end.
    """
    config = tf.ConfigProto(
        allow_soft_placement=True, operation_timeout_in_ms=round(timeout_s * 1000),
        experimental=tf.ConfigProto.Experimental(share_session_state_in_clusterspec_propagation=True))
    config.cluster_def.job.add(name="ps", tasks=dict(enumerate(addresses)))
    return config


PLACES = 2  # batches that a front end sends a worker at once: one runs while the next one is decoded


def server_config(tf, options: Options, calls_out: bool):
    """Thread and GPU limits, for a server or a local session; a session on a server ignores them (tensorflow#4455).

    Python functions that wait for another server get threads beside those that compute, else they wait for themselves;
    and there is one in which a new version can be restored while others compute.
    """
    waiting = PLACES * options.workers if calls_out else 0
    return tf.ConfigProto(
        intra_op_parallelism_threads=options.threads, inter_op_parallelism_threads=options.threads + waiting + 1,
        gpu_options=tf.GPUOptions(allow_growth=True), allow_soft_placement=True)


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
        meta_graph = self._build(tf) if self._loader is None else copy.deepcopy(
            self._loader.get_meta_graph_def_from_tags(["serve"]))
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
                feed, fetch = ({key: self.graph.get_tensor_by_name(side[key].name) for key in sorted(side)}
                               for side in (definition.inputs, definition.outputs))
                types = operation_types(tf, meta_graph.graph_def, [tensor.op.name for tensor in fetch.values()])
                self.signatures[name] = Signature(
                    name, *({key: tensor_spec(tensor, side[key].tensor_shape) for key, tensor in tensors.items()}
                            for side, tensors in ((definition.inputs, feed), (definition.outputs, fetch))),
                    method=definition.method_name, writes=any(map(STATE_CHANGING.fullmatch, types)),
                    calls_out=not self.atomic and any(map(PYTHON_FUNCTION.fullmatch, types)))
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
                infos = [{key: tf.saved_model.build_tensor_info(tf.convert_to_tensor(value))  # of a variable: its value
                          for key, value in side.items()} for side in sides]
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
        self._callables = {name: self.session._make_callable_from_options(CallableOptions(feed=feed, fetch=fetch))
                           for name, (feed, fetch) in self._ends.items()}

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

    def find_merged(self, options: Options) -> list[str]:
        """The signatures of which several requests may share a run."""
        return [name for name, signature in self.signatures.items()
                if signature.inputs and not signature.calls_out
                and all(spec.has_rows for spec in [*signature.inputs.values(), *signature.outputs.values()])
                and (self.atomic if signature.writes else self._rows_are_independent(signature, options))]

    def _rows_are_independent(self, signature: Signature, options: Options) -> bool:
        """Is each row's answer the same, whatever rows it shares a run with? Tried on random rows.

        Not a matter of course: a softmax over the batch, its mean or its length are other numbers in other company.
        Matrix products of several rows add in another order than those of one, and so differ in the last digits: that
        is allowed, unless ``--exact``; many sizes then, since kernels are picked by shape.
        """
        sizes = [2, 3, 5, 8, 13, 16, 32, options.max_batch] if options.exact else [2, 8, 16]
        sample = sample_rows(signature, max(sizes))
        try:
            alone = [self.run(signature.name, [array[i:i + 1] for array in sample]) for i in range(8)]
            for size in sizes:
                together = self.run(signature.name, [array[:size] for array in sample])
                for result, *singles in zip(together, *alone[:size]):
                    if len(result) != size or not same(result[:8], np.concatenate(singles), options.exact):
                        return False
        except Exception as error:  # it does not like our random rows, and we cannot know what it likes
            log.info("model %s: %r is not merged: %s", self.source.name, signature.name, first_sentence(error))
            return False
        return True

    def warm_up(self) -> None:
        """The first run of a signature is slow (tensorflow/serving#385): do it early, changing nothing."""
        for signature in self.signatures.values():
            if not signature.calls_out and (not signature.writes or self.atomic):
                with contextlib.suppress(ModelError):  # a sample that the model refuses has warmed it up as well
                    self.run(signature.name, sample_rows(signature, 0 if self.atomic else 1))


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
    r"|(Map)?(Uns|S)tage|Rng\w+|Stateful(Standard|Uniform|Truncated|Random)\w+|WriteFile")
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


def sample_rows(signature: Signature, rows: int) -> list[np.ndarray]:
    """Random inputs with this many rows, by sorted name: numbers of several magnitudes, zeros and ones, words."""
    random, arrays = np.random.default_rng(0), []
    words = b"the of and to in is good bad new film music price 7 2024 London ! ? :-)".split()
    for spec in signature.inputs.values():
        shape = tuple(3 if n is None else n for n in spec.shape or ())
        shape = (rows, *shape[1:]) if spec.has_rows else shape
        if spec.dtype == "object":
            array = np.empty(shape, object)
            array.flat = [b" ".join(random.choice(words, random.integers(0, 12))) for _ in range(array.size)]
        elif np.dtype(spec.dtype).kind in "biu":
            array = random.integers(0, 2, shape)  # an index must be within its table
        else:
            array = random.standard_normal(shape) * 10 ** random.uniform(-2, 2, shape[:1] + (1,) * len(shape[1:]))
        arrays.append(array.astype(spec.dtype))
    return arrays


def same(a: np.ndarray, b: np.ndarray, exact: bool) -> bool:
    """Are two answers equal: floats to rounding, relative to the largest number of their row, all else exactly?"""
    if a.shape != b.shape or a.dtype == object or a.dtype.kind in "biu":
        return np.array_equal(a, b)
    if exact or not a.size:
        return a.tobytes() == b.tobytes()
    epsilon = 2**-7 if a.dtype.name == "bfloat16" else np.finfo(a.dtype).eps
    units = 8 if a.itemsize == 2 else 128  # of 16 bits, whose last digits are coarse
    a, b = (array.astype(np.result_type(array, np.float64)).reshape(len(array), -1) for array in (a, b))
    largest = np.max(np.abs(b), axis=1, keepdims=True, where=np.isfinite(b), initial=0)
    return np.allclose(a, b, rtol=0, atol=units * epsilon * largest, equal_nan=True)


# tensorflow::error::Code to HTTP status, as TensorFlow Serving has it; any other is 500
HTTP_STATUS = {1: 499, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 14: 503,
               16: 401}
DISCONNECTED = (4, 10, 14)  # what a run fails with when its parameter server is gone, or another one is in its place


def failure_of(error: Exception) -> ModelError | ConnectionError:
    """What a run raises when TensorFlow raised this. Our own Python functions in graphs fail with "HTTP 503: why"."""
    if ours := re.search(r"RuntimeError: HTTP (\d{3}): (.*)", str(error)):
        return ModelError(ours[2], int(ours[1]))
    code, message = getattr(error, "error_code", None), first_sentence(error)
    return ConnectionError(message) if code in DISCONNECTED else ModelError(message, HTTP_STATUS.get(code, 500))


# == TensorFlowVariables: the variables behind an output, to get and to set, in any process ============================


class TensorFlowVariables:
    """Gets and sets the variables behind an output: by name, as Ray's users know it, or as one flat vector.

    ``output`` is a tensor or an operation, or a list of them; found are the variables that it depends on in any way,
    and ``input_variables`` beside them. With ``prefix=True`` names lack the scope that all have in common, so that two
    copies of a network under two scopes can exchange weights. All operations are made here.

    ``variables``, ``placeholders`` and ``assignment_nodes`` are dicts by name. After ray.experimental.tf_utils.
    """

    def __init__(self, output, sess=None, input_variables=None, prefix: bool = False):
        tf = import_tensorflow()
        self.sess = sess
        self.variables, self.placeholders, self.assignment_nodes, self._values = {}, {}, {}, {}
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        found = variable_operations([getattr(o, "op", o) for o in outputs] + [v.op for v in input_variables or ()])
        if not found:
            return
        graph, scopes = found[0].graph, [op.name.rpartition("/")[0] + "/" for op in found]
        scope = os.path.commonprefix(scopes).rpartition("/")[0] if prefix else ""
        objects = {v.op.name: v for v in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)}
        for operation in found:
            name = operation.name[len(scope) + 1:] if scope else operation.name
            handle, dtype = operation.outputs[0], operation.get_attr("dtype")
            with graph.as_default(), tf.colocate_with(operation):
                new = tf.placeholder(dtype, tf.TensorShape(operation.get_attr("shape")), name=f"Placeholder_{name}")
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
        ends = np.cumsum([placeholder.shape.num_elements() for placeholder in self.placeholders.values()])
        parts = zip(np.split(new_weights, ends[:-1]), self.placeholders.items())
        # the vector has one dtype, but the variables may differ
        self.set_weights({name: part.reshape(p.shape).astype(p.dtype.as_numpy_dtype) for part, (name, p) in parts})

    def get_weights(self) -> Arrays:
        """The variables' values by name; one at a time, since a protobuf has 2 GiB at most (tensorflow#2233)."""
        return {name: np.asarray(self._session().run(value)) for name, value in self._values.items()}

    def set_weights(self, new_weights: Arrays) -> None:
        """Set some or all variables. A wrong name or shape is an InvalidRequest, and then none of them is set."""
        feeds = {}
        for name, value in new_weights.items():
            if name not in self.placeholders:
                raise InvalidRequest(f"there is no variable {name!r}; there are {sorted(self.placeholders)}")
            placeholder, value = self.placeholders[name], np.asarray(value)
            shape = tuple(placeholder.shape.as_list())
            if value.shape != shape:
                raise InvalidRequest(f"variable {name!r} has the shape {shape}, not {value.shape}")
            feeds[name] = to_array(f"variable {name!r}", value, np.dtype(placeholder.dtype.as_numpy_dtype))
            if feeds[name].nbytes >= 2**31 - 2**20:
                raise InvalidRequest(f"variable {name!r} is larger than the 2 GiB that TensorFlow can be fed")
        small = sum(value.nbytes for value in feeds.values()) < 2**30
        for names in [list(feeds)] if small else [[name] for name in feeds]:
            nodes = [self.assignment_nodes[name] for name in names]
            self._session().run(nodes, {self.placeholders[name]: feeds[name] for name in names})

    def _session(self):
        if self.sess is None:
            raise InvalidRequest("there is no session yet: give sess, or call set_session")
        return self.sess


def variable_operations(operations: list) -> list:
    """The operations that hold variables among these and all that they depend on, sorted by name."""
    seen, stack = set(), list(operations)
    while stack:
        operation = stack.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            stack.extend([*(tensor.op for tensor in operation.inputs), *operation.control_inputs])
    found = (operation for operation in seen if operation.type in ("VarHandleOp", "VariableV2", "Variable"))
    return sorted(found, key=lambda operation: operation.name)


def to_array(what: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """Cast without loss of kind: ints to floats, not floats to ints; text to bytes. Raises InvalidRequest."""
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.itemsize == dtype.itemsize:  # bfloat16, which numpy's files do not know
        array = array.view(dtype)
    if dtype == object:
        flat = [v.encode() if isinstance(v, str) else v for v in array.astype(object).ravel().tolist()]
        if not all(isinstance(v, bytes) for v in flat):
            raise InvalidRequest(f"{what} takes text or bytes, not {array.dtype}")
        return objects(flat).reshape(array.shape)
    if array.dtype == dtype:
        return array
    if not (np.can_cast(array.dtype, dtype, "same_kind") or array.size == 0):
        raise InvalidRequest(f"{what} takes {dtype}, not {array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(result, array):
        raise InvalidRequest(f"{what} has a value outside the range of {dtype}")
    return result


def objects(values: Iterable[Any]) -> np.ndarray:
    """A vector of these, whatever they are."""
    return np.fromiter(values, object)


# == Remote predict: another server's model as an operation of one's own graph =========================================

# HTTP status to tensorflow::error::Code, where a server of TensorFlow Serving's REST contract answered with an error
ERROR_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 10, 413: 3, 429: 8, 499: 1, 501: 12, 502: 14, 503: 14, 504: 4}


def remote_predict(
    input_tensor_aliases: list[str], input_tensors: list, output_tensor_aliases: list[str], target_address: str,
    model_name: str, model_version: int = -1, max_rpc_deadline_millis: int = 3000, output_types: list | None = None,
    name: str = "remote_predict", signature_name: str = "serving_default", fail_op_on_rpc_error: bool = True
):
    """In a graph: the outputs of a model at ``target_address`` ("host:port"), a server of TensorFlow Serving's REST.

    Returns the output tensors, of ``output_types`` (float32 if not given) and unknown shape; a run fails when the call
    does. With ``fail_op_on_rpc_error=False`` returns (status_code, status_error_message, output tensors) and never
    fails because of the call: the code is an int32 ``tensorflow::error::Code``, 0 for success, and outputs are empty
    scalars after an error. ``model_version`` -1 is the latest. The deadline counts from the last byte that came.

    Source: tensorflow_serving/experimental/tensorflow/ops/remote_predict. Raises ValueError when lengths do not agree.
    """
    tf = import_tensorflow()
    types = [tf.as_dtype(dtype) for dtype in output_types or [tf.float32] * len(output_tensor_aliases)]
    if not model_name:
        raise ValueError("model_name must be specified.")
    for kind, aliases, there in (("input_tensors", input_tensor_aliases, input_tensors),
                                 ("output_types", output_tensor_aliases, types)):
        if len(aliases) != len(there):
            raise ValueError(f"{len(aliases)} aliases do not fit {len(there)} {kind}")
    dtypes = {alias: np.dtype(t.as_numpy_dtype) for alias, t in zip(output_tensor_aliases, types)}
    path = f"/v1/models/{urllib.parse.quote(model_name, safe='')}"
    path += f"/versions/{model_version}" if model_version >= 0 else ""

    def call(*inputs):
        failure = None
        outputs = [np.array(b"", object) if dtype == object else np.zeros((), dtype) for dtype in dtypes.values()]
        named = {alias: np.asarray(value) for alias, value in zip(input_tensor_aliases, inputs)}
        try:
            outputs = call_remote(target_address, path, signature_name, named, dtypes, max_rpc_deadline_millis / 1000)
        except Error as error:
            failure = error
        except TimeoutError:
            failure = DeadlineExceeded(f"{target_address} did not answer within {max_rpc_deadline_millis} ms")
        except OSError as error:
            failure = Unavailable(f"{target_address} cannot be reached: {error.strerror or error}")
        except Exception as error:
            failure = ModelError(f"{target_address} does not answer as it should: {first_sentence(error)}")
        if failure is None:
            return [np.int32(0), b"", *outputs]
        if fail_op_on_rpc_error:
            raise RuntimeError(f"HTTP {failure.status}: {failure}")
        return [np.int32(ERROR_CODES.get(failure.status, 13)), str(failure).encode(), *outputs]

    code, message, *outputs = tf.numpy_function(call, input_tensors, [tf.int32, tf.string, *types], name=name)
    code.set_shape([])
    message.set_shape([])
    return outputs if fail_op_on_rpc_error else (code, message, outputs)


def call_remote(
    address: str, path: str, signature_name: str, inputs: Arrays, dtypes: dict[str, np.dtype], seconds: float
) -> list[np.ndarray]:
    """The outputs of one predict over REST. Raises Error with the server's answer, TimeoutError, OSError."""
    deadline = time.monotonic() + seconds
    document = json.loads(request_http(address, "GET", f"{path}/metadata", None, deadline))
    signature = document["metadata"]["signature_def"]["signature_def"].get(signature_name)
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{signature_name}" not found in signature def')
    if inputs.keys() != signature["inputs"].keys() or dtypes.keys() - signature["outputs"].keys():
        there = [sorted(signature[side]) for side in ("inputs", "outputs")]
        raise InvalidRequest(f"aliases {sorted(inputs)} and {sorted(dtypes)} do not fit {there[0]} and {there[1]}")
    columns = ", ".join(f"{json.dumps(name)}: {json_text(plain(array, '_bytes'))}" for name, array in inputs.items())
    body = f'{{"signature_name": {json.dumps(signature_name)}, "inputs": {{{columns}}}}}'.encode()
    outputs = json.loads(request_http(address, "POST", f"{path}:predict", body, deadline))["outputs"]
    named = outputs if len(signature["outputs"]) > 1 else dict.fromkeys(signature["outputs"], outputs)
    return [parse_tensor(name, named[name], dtype) for name, dtype in dtypes.items()]


def request_http(address: str, method: str, path: str, body: bytes | None, deadline: float) -> bytes:
    """The body of a 200 answer. Raises Error with status and message of another, TimeoutError, OSError."""
    host, _, port = address.rpartition(":")
    left = max(0.001, deadline - time.monotonic())
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=left)) as connection:
        connection.request(method, path, body)
        response = connection.getresponse()
        text = response.read()
    if time.monotonic() >= deadline:
        raise TimeoutError
    if response.status != 200:
        raise Error(json.loads(text).get("error", "no reason was given"), response.status)
    return text


# == REST: TensorFlow Serving's contract. Front ends match paths, workers decode bodies and encode answers =============

MAX_BODY_BYTES = 64 * 2**20
SLICE = 50_000  # numbers that are made JSON at once: Python's lock is held meanwhile
PATHS = {  # case-insensitive but for the method's name; as sent, still percent-encoded
    "POST": re.compile(
        r"(?i:/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?):(classify|regress|predict)", re.A),
    "GET": re.compile(r"(?i:/v1/models(?:/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(/metadata)?)?)", re.A)}
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]  # all but two of which are malformed


def match_path(method: str, path: str) -> tuple[str, Version, str]:
    """Model; version, label or None: the latest; status, metadata, predict, classify or regress. Or InvalidRequest."""
    if path in ("/", "/health", "/metrics"):
        raise InvalidRequest(f"{path} answers GET, not {method}", 405)
    if path[:4].lower() != "/v1/":
        raise InvalidRequest(f"There is nothing at {path[:100]}: try /, /health, /metrics or /v1/models/<name>", 404)
    match = PATHS[method].fullmatch(path) if method in PATHS else None
    if not match:
        raise InvalidRequest(f"Malformed request: {method} {path[:1000]}")
    name, version, label, verb = match.groups()
    if name is None:
        raise InvalidRequest("Missing model name in request.")
    if version and (len(version) > 19 or int(version) >= 2**63):
        raise InvalidRequest(f"The version {version[:100]} is not a number of 64 bits")
    verb = verb if method == "POST" else "metadata" if verb else "status"
    return urllib.parse.unquote(name), int(version) if version else label and urllib.parse.unquote(label), verb


def not_found(name: str, version: Version) -> InvalidRequest:
    if isinstance(version, str):
        return InvalidRequest(f"Unrecognized servable version label: {version}")
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return InvalidRequest(f"Servable not found for request: {which}", 404)


def parse_value(query: str, http_version: str = "1.1") -> float:
    """The number in ``?value=3``; 1 if there is none. Raises InvalidRequest unless it is one finite number."""
    if http_version.endswith("0.9"):
        raise InvalidRequest("HTTP 0.9 is not spoken here: a request that was cut short looks like it")
    try:
        values = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=100, errors="strict")
        [value] = values.get("value", ["1"])
    except ValueError:
        raise InvalidRequest("value must be given once, in a query string that can be parsed") from None
    if len(value) > 100 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.A | re.I):
        raise InvalidRequest(f"value must be one finite number, not {value[:100]!r}")
    return finite(float(value))


def finite(value: Any) -> float:
    """Raises InvalidRequest unless the value is one finite number."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise InvalidRequest(f"value must be one finite number, not {value!r:.100}")
    return float(value)


# -- from JSON to arrays -----------------------------------------------------------------------------------------------


def decode(signatures: dict[str, Signature], verb: str, body: Any) -> tuple[Signature, list[np.ndarray], Callable]:
    """A request's signature, its array for each input, and what makes its outputs the answer: those of ``Graph.run``
    for the verbs "add" and "arrays", else what ``plain`` makes of them. Raises InvalidRequest.

    ``body`` is a float for the verb "add", a signature's name and the inputs for "arrays", else the body that came over
    HTTP, and whether it is gzip.
    """
    if verb == "add":
        return signatures["serving_default"], [np.array([body])], lambda outputs: float(outputs[0][0])
    document = parse_json(*body) if verb != "arrays" else {"signature_name": body[0]}
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise InvalidRequest(f"signature_name must be a text, not {shown(name)}")
    signature = signatures.get(name or "serving_default")
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{name or "serving_default"}" not found in signature def')
    if verb == "arrays":
        return signature, feed_of(signature, body[1]), lambda outputs: dict(zip(signature.outputs, outputs))
    if verb == "predict":
        is_row, feed = parse_predict(document, signature)
        return signature, feed, lambda outputs: encode_predict(signature, is_row, outputs)
    if signature.method != f"tensorflow/serving/{verb}" or list(signature.inputs) != ["inputs"]:
        raise InvalidRequest(f"Signature {signature.name!r} is not for {verb}: its method is {signature.method!r}"
                             f" and its inputs are {list(signature.inputs)}")
    examples = parse_examples(document)
    return signature, [examples], lambda outputs: encode_results(signature, verb, len(examples), outputs)


def feed_of(signature: Signature, inputs: Any) -> list[np.ndarray]:
    if not isinstance(inputs, dict) and len(signature.inputs) == 1:
        inputs = dict.fromkeys(signature.inputs, inputs)
    if not isinstance(inputs, dict) or inputs.keys() != signature.inputs.keys():
        given = sorted(map(str, inputs)) if isinstance(inputs, dict) else "one array"
        raise InvalidRequest(f"Signature {signature.name!r} takes the inputs {sorted(signature.inputs)}, not {given}")
    return [to_array(f"input {name!r}", inputs[name], np.dtype(spec.dtype)) for name, spec in signature.inputs.items()]


def parse_json(body: bytes, is_gzip: bool = False) -> dict[str, Any]:
    """A JSON object, with NaN and Infinity as bare tokens. Raises InvalidRequest."""
    try:
        if is_gzip:
            unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            body = unzip.decompress(body, MAX_BODY_BYTES)
            if unzip.unconsumed_tail:
                raise InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError, zlib.error) as error:
        raise InvalidRequest(f"The body is not JSON that can be read: {first_sentence(error)}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {shown(document)}")
    return document


def shown(value: Any) -> str:
    """A JSON value in an error message, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "(something nested deeply)"
    return text if len(text) <= 100 else text[:100] + "..."


def parse_predict(document: dict[str, Any], signature: Signature) -> tuple[bool, list[np.ndarray]]:
    """Is it row format, and one array for each input."""
    if ("instances" in document) == ("inputs" in document):
        raise InvalidRequest("There must be either 'instances' (rows) or 'inputs' (columns)")
    is_row, names = "instances" in document, list(signature.inputs)
    where = "instances" if is_row else "inputs"
    value = document[where]
    if is_row and (not isinstance(value, list) or not value):
        raise InvalidRequest(f"instances: expected a list that is not empty, got {shown(value)}")
    first = value[0] if is_row else value
    if len(names) == 1 and (not isinstance(first, dict) or first.keys() == {"b64"}):
        columns = {where: value}
    elif is_row:
        for i, row in enumerate(value):
            if not isinstance(row, dict) or row.keys() != signature.inputs.keys():
                raise InvalidRequest(f"instances[{i}]: expected an object of {names}, got {shown(row)}")
        columns = {f"{name} of instances": [row[name] for row in value] for name in names}
    else:
        if not isinstance(value, dict) or not value.keys() >= signature.inputs.keys():
            raise InvalidRequest(f"inputs: expected an object of {names}, got {shown(value)}")
        columns = {f"inputs.{name}": value[name] for name in names}
    dtypes = [np.dtype(spec.dtype) for spec in signature.inputs.values()]
    return is_row, [parse_tensor(where, column, dtype) for (where, column), dtype in zip(columns.items(), dtypes)]


JSON_TYPES = {  # by the kind of a dtype (V is bfloat16): what its elements may be
    "b": ((bool,), "true or false"), "i": ((int,), "a whole number"), "u": ((int,), "a whole number"),
    "O": ((str, dict), 'a text or {"b64": "..."}'), "f": ((int, float), "a number"), "V": ((int, float), "a number")}


def parse_tensor(where: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """A nested list, or a scalar, to an array. Raises InvalidRequest."""
    if dtype.kind not in JSON_TYPES:
        raise InvalidRequest(f"{where}: {dtype} cannot be given as JSON", 501)
    types, expected = JSON_TYPES[dtype.kind]
    elements = np.array(value, object)  # as deep as all its lists have the same length
    flat = elements.ravel().tolist()
    texts = list(map(parse_string, flat)) if dtype == object else ()
    try:
        if list in map(type, flat):
            sizes = [len(element) if isinstance(element, list) else None for element in flat]
            wrong, expected = [size != sizes[0] for size in sizes], f"a list of {sizes[0]}" if sizes[0] else expected
        elif texts:
            wrong = [text is None for text in texts]
        elif not set(map(type, flat)) <= set(types):
            wrong = [type(element) not in types for element in flat]
        else:
            with np.errstate(over="ignore"):
                return np.array(flat, dtype if dtype.kind in "biu" else float).astype(dtype).reshape(elements.shape)
    except OverflowError:  # a number of hundreds of digits, or one that the dtype does not have
        if dtype.kind not in "iu":
            return np.array([float(str(element)) for element in flat]).astype(dtype).reshape(elements.shape)
        limits, expected = np.iinfo(dtype), f"a whole number that {dtype} has"
        wrong = [not limits.min <= element <= limits.max for element in flat]
    if dtype == object and True not in wrong:
        return objects(texts).reshape(elements.shape)
    index = wrong.index(True) if True in wrong else 0
    place = "".join(f"[{i}]" for i in np.unravel_index(index, elements.shape))
    raise InvalidRequest(f"{where}{place}: expected {expected}, got {shown(flat[index])}")


def parse_string(value: Any) -> bytes | None:
    """The bytes of a text or of ``{"b64": "..."}``; None if it is neither."""
    try:
        if isinstance(value, str):
            return value.encode()
        [text] = value.values() if value.keys() == {"b64"} else ()
        text = re.sub(r"\s", "", text, flags=re.A)
        return base64.b64decode(text if "=" in text else text + "=" * (-len(text) % 4), validate=True)
    except (AttributeError, TypeError, ValueError):
        return None


def parse_examples(document: dict[str, Any]) -> np.ndarray:
    """Serialized ``tf.train.Example`` protos, an object array [n]; a common context comes before each."""
    examples, context = document.get("examples"), document.get("context", {})
    if not isinstance(examples, list) or not examples:
        raise InvalidRequest(f"examples: expected a list that is not empty, got {shown(examples)}")
    before = serialize_example("context", context)
    return objects(before + serialize_example(f"examples[{i}]", example) for i, example in enumerate(examples))


def serialize_example(where: str, features: Any) -> bytes:
    if not isinstance(features, dict):
        raise InvalidRequest(f"{where}: expected an object, got {shown(features)}")
    example, kinds = import_tensorflow().train.Example(), {str: "bytes_list", dict: "bytes_list", float: "float_list"}
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        try:
            [kind] = {kinds.get(type(v), "int64_list") for v in values} or {"int64_list"}
            take = {"bytes_list": parse_string, "float_list": float, "int64_list": int}[kind]
            getattr(example.features.feature[name], kind).value.extend(map(take, values))
        except (TypeError, ValueError):  # what protobuf does not take, or of several kinds
            expected = "numbers or texts, all of one kind"
            raise InvalidRequest(f"{where}.{name}: expected {expected}, got {shown(value)}") from None
    return example.SerializeToString()


# -- from arrays to JSON -----------------------------------------------------------------------------------------------


def encode_predict(signature: Signature, is_row: bool, outputs: list[np.ndarray]) -> bytes:
    names, rows = list(signature.outputs), outputs[0].shape[:1]
    if is_row and (not rows or any(output.shape[:1] != rows for output in outputs)):
        shapes = [list(output.shape) for output in outputs]
        raise InvalidRequest(f"Outputs {names} of shapes {shapes} have not one row for each instance")
    if len(names) == 1:
        text = json_text(outputs[0])
    elif is_row:
        step, texts = max(1, SLICE * rows[0] // max(1, sum(output.size for output in outputs))), []
        for i in range(0, rows[0], step):
            columns = [output[i:i + step].tolist() for output in outputs]
            texts.append(json.dumps([dict(zip(names, row)) for row in zip(*columns)], ensure_ascii=False)[1:-1])
        text = "[" + ", ".join(texts) + "]"
    else:
        text = "{" + ", ".join(f"{json.dumps(name)}: {json_text(output)}" for name, output in zip(names, outputs)) + "}"
    text = f'{{"{"predictions" if is_row else "outputs"}": {text}}}'
    return text.encode("utf-8", "surrogateescape")  # strings that are not UTF-8 pass as they are


def json_text(array: np.ndarray) -> str:
    """Nested lists, made in slices."""
    if array.size <= SLICE or not array.ndim:
        return json.dumps(array.tolist(), ensure_ascii=False)
    step = SLICE * len(array) // array.size
    slices = (json_text(array[i:i + step])[1:-1] for i in range(0, len(array), step)) if step else map(json_text, array)
    return "[" + ", ".join(slices) + "]"


def plain(array: np.ndarray, name: str) -> np.ndarray:
    """An output of this name with elements that JSON has, for a whole batch at once, since numpy's calls are dear."""
    if array.dtype == object and name.endswith("_bytes"):
        return objects({"b64": base64.b64encode(v).decode()} for v in array.flat).reshape(array.shape)
    if array.dtype == object:
        return objects(v.decode("utf-8", "surrogateescape") for v in array.flat).reshape(array.shape)
    if array.dtype.kind in "fV" and array.itemsize < 8:
        return shortest(array)
    if array.dtype.kind not in "fbiu":
        raise InvalidRequest(f"Output {name!r} is of type {array.dtype}, which JSON does not have", 501)
    return array


def shortest(array: np.ndarray) -> np.ndarray:
    """Float64 with the same few decimals that the narrower floats have: 0.1, and not 0.10000000149011612."""
    result = np.full(array.shape, np.nan)
    with np.errstate(all="ignore"):
        if array.dtype == np.float32:  # tried on all at once, which is twelve times faster
            wide = array.astype(np.float64)
            magnitude = np.floor(np.log10(np.abs(wide)))
            for digits in (6, 7, 8, 9):
                scale = 10.0 ** (digits - 1 - magnitude)
                near = np.where(scale >= 1, np.rint(wide * scale) / scale, np.rint(wide * scale) * (1 / scale))
                is_found = np.isnan(result) & (np.abs(magnitude) < 10) & (near.astype(np.float32) == array)
                result[is_found] = near[is_found]
    left = np.isnan(result)
    result[left] = [float(str(value)) for value in array[left]]
    return result


def encode_results(signature: Signature, verb: str, examples: int, outputs: list[np.ndarray]) -> bytes:
    """Classify: [label, score] for each class of each example; regress: one number each."""
    named, shapes = dict(zip(signature.outputs, outputs)), {output.shape for output in outputs}
    if verb == "regress" and named.keys() == {"outputs"} and shapes <= {(examples,), (examples, 1)}:
        return f'{{"results": {json_text(named["outputs"].reshape(-1))}}}'.encode()
    shape = next(iter(shapes))
    if verb == "regress" or not named.keys() <= {"classes", "scores"} or len(shapes) > 1 or (
            len(shape) != 2 or shape[0] != examples):
        expected = "'outputs' [n]" if verb == "regress" else "'classes', 'scores' or both, [n, classes]"
        raise InvalidRequest(f"To {verb} {examples} examples there must be {expected}, not {list(named)} {shapes}")
    columns = [named.get(name, np.full(shape, default)).tolist()
               for name, default in (("classes", ""), ("scores", 0.0))]
    results = [list(map(list, zip(*row))) for row in zip(*columns)]
    return json.dumps({"results": results}, ensure_ascii=False).encode("utf-8", "surrogateescape")


# == The parameter server: holds the variables, keeps them, and in `shared` placement runs the models ==================

KEEP_EVERY_S = 10.0  # how old the kept variables of a model may be that changes them when it runs
LOOK_EVERY_S = 1.0  # between two looks at the models' folders
GONE_S = 10.0  # a shared cluster ends when no front end has been heard for so long


class Checkpoints:
    """Variables in files of one folder: ``adder.sum``, and ``<model>.<version>.npz``, written aside and renamed.

    What is written has survived a killed process; if ``durable``, a power cut as well. Whoever starts a cluster makes
    the folder, and an empty file ``.run-<run>`` in it, to which the names of all files are written that have been kept:
    so neither another machine's folder nor one whose files have gone is taken for a beginning. Methods raise Error.
    """

    def __init__(self, folder: str, run: str, durable: bool):
        self.folder, self.durable, self._sum_file = folder, durable, None
        self._marker = os.path.join(folder, f".run-{run}")
        try:
            with open(self._marker) as marker:
                self._kept = marker.read().splitlines()
            self._lock = open(os.path.join(folder, ".lock"), "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
        except BlockingIOError:
            raise Unavailable(f"The checkpoint folder {folder} is in use by another program.") from None
        except OSError as error:
            raise Unavailable(f"The variables are gone, since {error.filename} cannot be read ({error.strerror}): bring"
                              " the folder back or start the program anew.") from None

    def path(self, source: ModelSource) -> str:
        name = "adder.sum" if source == ADDER_SOURCE else f"{source.name}.{source.version}.npz"
        return os.path.join(self.folder, name)

    def keep(self, source: ModelSource, weights: Arrays) -> None:
        plain = {f"variables/{name}": value if value.dtype != object else np.array(value + b".", "S")
                 for name, value in weights.items()}  # numpy strips zeros from the end of a text
        self._write_first(self.path(source), lambda file: np.savez(file, **plain))

    def keep_sum(self, total: float) -> None:
        """The adder's, twice over; for each batch, and so in place once there is a file: that takes a hundredth of the
        time, and so few bytes are in one sector of the disk, which is written as a whole or not at all."""
        record, path = struct.pack("<dd", total, total), self.path(ADDER_SOURCE)
        if self._sum_file is None:
            self._write_first(path, lambda file: file.write(record))
            self._sum_file = os.open(path, os.O_WRONLY)
            return
        with naming_file(path):
            if not os.fstatvfs(self._sum_file).f_bavail:  # there are file systems that need room even so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._sum_file, record, 0)
            if self.durable:
                os.fdatasync(self._sum_file)

    def load(self, source: ModelSource) -> Arrays:
        """What was kept last, if anything was. Raises ModelError when it is damaged, or has gone since."""
        path = self.path(source)
        try:
            with open(path, "rb") as file:
                if source != ADDER_SOURCE:
                    return {name.removeprefix("variables/"): array if array.dtype.kind != "S" else objects(
                        text[:-1] for text in array.flat).reshape(array.shape) for name, array in np.load(file).items()}
                record = file.read()
                if len(record) != 16 or record[:8] != record[8:]:
                    raise ValueError("it is not one number twice")
                return {"sum": np.frombuffer(record)[0]}
        except Exception as error:  # there is no end to what numpy and zipfile raise
            if isinstance(error, FileNotFoundError) and os.path.basename(path) not in self._kept:
                return {}
            raise ModelError(f"The checkpoint {path} is damaged or gone ({first_sentence(error)}): put a good one"
                             " there, or remove it and start the program anew.") from None

    def remember(self, key: str, find: Callable[[], Any]) -> Any:
        """``find()``, found once for each key and folder."""
        path = os.path.join(self.folder, f".{key}.json")
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return json.load(file)
        found = find()
        self._write_aside(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def _write_first(self, path: str, write: Callable[[Any], Any]) -> None:
        """Write it aside; from now on it has to be there when this run's parameter server comes back."""
        self._write_aside(path, write)
        if os.path.basename(path) not in self._kept:
            self._kept.append(os.path.basename(path))
            self._write_aside(self._marker, lambda file: file.write("\n".join(self._kept).encode()))

    def _write_aside(self, path: str, write: Callable[[Any], Any]) -> None:
        with naming_file(path):
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
def naming_file(path: str):
    try:
        yield
    except OSError as error:
        raise Unavailable(f"The variables cannot be kept in {path}: {error.strerror}.") from None


checkpoints: Checkpoints | None = None  # of this process, where it is the first parameter server


def keep_sum(total: np.ndarray) -> np.ndarray:
    """Called by the adder's graph with the new sum before it is assigned: one that cannot be kept fails the run."""
    try:
        if checkpoints:
            checkpoints.keep_sum(total.item())
    except Unavailable as error:
        raise RuntimeError(f"HTTP {error.status}: {error}") from None
    return total


class ParameterServer:
    """A Ray actor with a TensorFlow server in it, and on that the state of the models, or its part of it.

    The first one also loads the models, onto all of them, and keeps their variables. It knows other actors by name.
    """

    def __init__(self, index: int, options: Options, namespace: str, folder: str, run: str):
        self.index, self.options, self.namespace, self.folder, self.run = index, options, namespace, folder, run
        self.server = None
        self.about: dict[str, Any] | None = None  # what ``start`` tells of this life, when all is loaded
        self.models: dict[Key, Model] = {}  # each loaded version, label and latest; and versions that come or failed
        self.edition = 0  # of these
        self.graphs: dict[Key, Graph] = {}  # by name and version
        self.stamps: dict[Key, tuple] = {}  # of the files of a version that is not loaded, and whether they were tried
        self.trouble: str | None = None  # with keeping variables
        self.silent_s = 0  # how long no front end has been heard
        self.turn = concurrent.futures.ThreadPoolExecutor(1)  # so that the event loop can always answer ping()
        self.starting, self.refreshing, self.ending = asyncio.Lock(), asyncio.Lock(), None

    async def start(self, wanted: dict[str, str] | None = None) -> dict[str, Any]:
        """Boot, and in the first one load; about this life of the actor, and what it has now.

        Idempotent. The first one's returns when every variable is restored. Raises ModelError or Unavailable, and
        OptionError to a front end that ``wanted`` another cluster than this one, which it would share.
        """
        self.silent_s, ours = 0, self.options.shared
        if self.options.address and self.ending is None:
            self.ending = asyncio.create_task(self._end_when_left())
        for name, value in (wanted or ours).items():
            if value != ours[name]:
                raise OptionError(f"{name} {value}: the shared cluster runs with {ours[name]}")
        async with self.starting:
            if self.about is None:
                self.addresses = [await self._in_turn(self._boot)]
                if self.index == 0:
                    await self._load()
                self.about = about_this_actor() | {
                    "life": secrets.token_hex(8), "folder": self.folder, "addresses": self.addresses}
            return self.about | self._news()

    async def stay(self) -> None:
        """Never returns: a call whose failure tells at once that this process is gone."""
        await asyncio.Event().wait()

    def _news(self) -> dict[str, Any]:
        return {"edition": self.edition, "models": self.models}

    async def ping(self, edition: int) -> tuple[str | None, dict[str, Any] | None]:
        """What is wrong with keeping variables, if anything is; and what it has now, if that is another edition."""
        self.silent_s = 0
        return self.trouble, self._news() if edition != self.edition else None

    async def get_weights(self, model: str, version: int | None = None) -> Arrays:
        await self.start()  # should this be a new life that nobody has called yet
        version = version or self.models[model, None].version
        return await self._in_turn(self.graphs[model, version].variables.get_weights)

    async def set_weights(self, model: str, weights: Arrays) -> None:
        """They are kept when this returns, and every worker has them, or is dead."""
        await self.start()
        key = model, self.models[model, None].version
        async with self.starting:  # nobody is told of weights that are just being replaced
            await self._in_turn(self.graphs[key].variables.set_weights, weights)
            await self._in_turn(self._keep, key)
            if self.models[key].weights:
                self._tell(key, self.models[key]._replace(weights=secrets.token_hex(8)))
        if self.models[key].weights:
            await self._update_workers()

    async def reload(self, model: str) -> dict[str, Any]:
        """Look at a model's folder now; what there is then."""
        await self.start()
        for source in self.options.model:
            if source.name == model:
                await self._refresh(source)
        return self._news()

    async def keep(self) -> None:
        """Keep the variables of the models that change them when they run."""
        for key, graph in list(self.graphs.items()):
            if graph.writes and self.models[key].metadata:
                await self._in_turn(self._keep, key)

    async def _in_turn(self, method, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.turn, method, *arguments)

    async def _workers(self) -> list:
        """Those that there are."""
        names = [f"worker {index}" for index in range(self.options.workers)]
        found = await asyncio.gather(*(find_actor(name, self.namespace) for name in names), return_exceptions=True)
        return [worker for worker in found if not isinstance(worker, Exception)]

    async def _update_workers(self) -> list[dict[str, Any]]:
        """What those say that have now what is here, one after another, since that takes them time from what they do.
        Those that are dead begin their next life with it."""
        updated = []
        for worker in await self._workers() if self.about else ():  # else they wait for ``start``
            with contextlib.suppress(ray.exceptions.RayError):
                updated.append(await worker.start.remote())
        return updated

    def _boot(self) -> str:
        """The address of a TensorFlow server on a port that the system picks. It ends with this process.

        Its own job is called ``boot``, because the sessions that come with a cluster of their own call it ``ps``.
        """
        global checkpoints
        tf = import_tensorflow()
        if self.server is None:
            if self.index == 0:
                checkpoints = Checkpoints(self.folder, self.run, durable=self.options.checkpoint_dir is not None)
                self.graphs = build_functions(tf, self.options)
            config = server_config(tf, self.options, any(graph.calls_out for graph in self.graphs.values()))
            self.server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=config)
        return f"{ray.util.get_node_ip_address()}:{self.server.target.rpartition(':')[2]}"

    async def _load(self) -> None:
        """Load all models onto this server and the others, whose addresses are added."""
        names = [f"parameter server {index}" for index in range(1, self.options.parameter_servers)]
        others = [await find_actor(name, self.namespace) for name in names]
        for other in others:
            self.addresses += (await call(other.start.remote()))["addresses"]
        for source in [ADDER_SOURCE, *self.options.model]:
            await self._refresh(source)
        if error := self.models[ADDER, 1].error:
            raise ModelError(error)
        self.lives = asyncio.create_task(self._live(others)), asyncio.create_task(self._watch_folders())

    async def _live(self, others: list) -> None:
        """Keep variables now and then. End with another parameter server, so that Ray brings both back and all is
        loaded anew."""
        stays = [asyncio.ensure_future(call(other.stay.remote())) for other in others]
        kept = time.monotonic()
        while True:
            await asyncio.sleep(1)
            if any(stay.done() for stay in stays):
                os._exit(1)
            if time.monotonic() - kept > KEEP_EVERY_S:
                try:
                    await self.keep()
                    self.trouble = None
                except Exception as error:  # it is tried again soon, and meanwhile ping() tells
                    self.trouble = first_sentence(error)
                kept = time.monotonic()

    async def _end_when_left(self) -> None:
        """End a shared cluster when no front end has been heard for a while, also one that never was well."""
        while self.silent_s < GONE_S:
            await asyncio.sleep(1)  # and counted: a process that was stopped for long has not heard that it was left
            self.silent_s += not self.starting.locked()
        with contextlib.suppress(Exception):
            await self.keep()
        if self.options.checkpoint_dir is None and self.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        for actor in [*(await self._workers() if self.index == 0 else []), ray.get_runtime_context().current_actor]:
            await asyncio.to_thread(ray.kill, actor)

    # -- versions come and go ------------------------------------------------------------------------------------------

    def _tell(self, key: Key, model: Model | None) -> None:
        others = {other: its for other, its in self.models.items() if other != key}
        self.models, self.edition = others | ({key: model} if model else {}), self.edition + 1

    async def _watch_folders(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for source in self.options.model:
                try:
                    await self._refresh(source, at_once=False)
                except Exception as error:
                    self.trouble = first_sentence(error)

    async def _refresh(self, source: ModelSource, at_once: bool = True) -> None:
        """Serve the highest version that is there and can be loaded, and those that labels point to."""
        name = source.name
        async with self.refreshing:
            there, labels = await asyncio.to_thread(lambda: (source.versions(), source.labels()))
            wanted = {which: self.models[name, which].version
                      for which in [None, *labels] if (name, which) in self.models}
            for version in sorted(there, reverse=True):
                if await self._have(there[version], at_once):
                    wanted[None] = version
                    break
            for label, version in labels.items():
                if version in there and await self._have(there[version], at_once):
                    wanted[label] = version
                elif version not in there and (name, version) not in self.models:
                    why = f"The label {label!r} of model {name} points to version {version}, which is not there."
                    self._tell((name, version), Model(source._replace(version=version), "END", why))
            await self._move(name, wanted)
            for key, model in self.models.items():
                if key == (name, model.version) and model.version not in wanted.values():
                    if model.metadata:
                        await self._unload(key)
                    elif model.version not in {*there, *labels.values()}:
                        self._tell(key, None)

    async def _have(self, source: ModelSource, at_once: bool) -> bool:
        """Is this version loaded? If not it is tried, unless its files still change, or have failed as they are."""
        key = source.name, source.version
        if key in self.models and self.models[key].metadata:
            return True
        stamp, last = await asyncio.to_thread(stamp_of, source), self.stamps.get(key)
        if not at_once and last != (stamp, False):
            self.stamps[key] = last if last == (stamp, True) else (stamp, False)
            return False
        self.stamps[key] = stamp, True
        self._tell(key, Model(source, "LOADING"))
        try:
            self._tell(key, await asyncio.to_thread(self._load_version, source))
            if any(key not in worker["graphs"] for worker in await self._update_workers()):
                raise ModelError(f"Model {source} cannot be loaded by a worker.")
            self._tell(key, self.models[key]._replace(state="AVAILABLE"))
            del self.stamps[key]
        except Exception as error:
            why = f"Model {source} cannot be loaded: {type(error).__name__}: {first_sentence(error)}"
            await self._unload(key, Model(source, "END", str(error) if isinstance(error, Error) else why))
            if isinstance(error, Unavailable):
                raise
        return bool(self.models[key].metadata)

    def _load_version(self, source: ModelSource) -> Model:
        """In a thread of its own, which may take long."""
        tf, key, is_mirror = import_tensorflow(), (source.name, source.version), is_mirrored(self.options, source)
        graph = self.graphs[key] = self.graphs.get(key) or build_graph(tf, self.options, source)
        graph.connect(tf, self.addresses, self.options)
        graph.restore()
        if is_mirror and graph.writes:
            raise ModelError(f"Model {source} cannot be loaded: it changes its variables when it runs and cannot be"
                             " mirrored: use --placement shared.")
        try:
            graph.variables.set_weights(checkpoints.load(source))
        except InvalidRequest as error:
            raise ModelError(f"The checkpoint {checkpoints.path(source)} is not of this model: {error}") from None
        if graph.writes:
            self._keep(key)
        rule = f"merged-{self.options.max_batch}-{self.options.exact}-{graph.fingerprint}"
        merged = checkpoints.remember(rule, lambda: graph.find_merged(self.options))
        weights = secrets.token_hex(8) if is_mirror else None
        return Model(source, "LOADING", None, graph.metadata(), merged, graph.calls_out, weights)

    async def _move(self, name: str, wanted: dict[str | None, int]) -> None:
        """Let the latest and the labels stand for other versions. First all workers stop to answer with the old ones,
        or are dead, and let who asks wait; only then they answer with the new ones. So nobody sees a version go back.
        """
        now = {key: its for key, its in self.models.items() if key[0] == name and key[1] != its.version}
        then = {(name, which): self.models[name, version] for which, version in wanted.items()}
        moving = {key: its if key in now and now[key].version == its.version else its._replace(state="MOVING")
                  for key, its in then.items()}
        others = {key: its for key, its in self.models.items() if key not in now}
        for stands_for in (moving, then) if moving != now else ():
            self.models, self.edition = others | stands_for, self.edition + 1
            await self._update_workers()

    async def _unload(self, key: Key, failed: Model | None = None) -> None:
        """Give back the memory of a version that is of no use any more, or has failed, when all on it is answered."""
        self._tell(key, failed or self.models[key]._replace(state="UNLOADING", metadata={}))
        await self._update_workers()
        if graph := self.graphs.get(key):
            if graph.writes and not failed:
                await self._in_turn(self._keep, key)
            if graph.source.folder:  # that of a function stays, see build_functions
                del self.graphs[key]
            await asyncio.to_thread(graph.free)
        if not failed:
            self._tell(key, None)

    def _keep(self, key: Key) -> None:
        """Keep a model's variables, if they are not as they were kept last."""
        graph = self.graphs[key]
        if graph.source == ADDER_SOURCE:  # each run keeps the sum, and no other add can come between
            graph.run("serving_default", [np.zeros(1)])
            return
        weights = graph.variables.get_weights()
        fingerprint = zlib.crc32(pickle.dumps(weights))
        if graph.kept != fingerprint:
            checkpoints.keep(graph.source, weights)
            graph.kept = fingerprint


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


def stamp_of(source: ModelSource) -> list[tuple]:
    """The files of a version, with their sizes and times."""
    paths = glob.glob(f"{glob.escape(source.folder)}/**", recursive=True) if source.folder else ()
    return [(path, os.path.getsize(path), os.path.getmtime(path)) for path in sorted(paths)]


def is_mirrored(options: Options, source: ModelSource) -> bool:
    return options.placement == "mirrored" and source != ADDER_SOURCE


def about_this_actor() -> dict[str, Any]:
    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "gpus": ray.get_gpu_ids(),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")}


async def find_actor(name: str, namespace: str):
    """Raises ValueError when there is none."""
    return await asyncio.to_thread(ray.get_actor, name, namespace)


async def call(reference):
    """The value of a Ray call; an error of ours arrives as it was raised."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


# == The workers: each builds the same graphs against the parameter server, and answers what it is sent ================


class Worker:
    """A Ray actor that answers requests, for Ray calls and for who comes to its door.

    A request is (verb, body, seconds that are left for it, has it been sent to another worker before), see ``decode``.
    """

    def __init__(self, index: int, options: Options, namespace: str):
        self.index, self.options, self.namespace = index, options, namespace
        self.have: tuple | None = None  # of the parameter server: its life, and the edition of what it has
        self.graphs: dict[Key, Graph] = {}  # by name and version
        self.models: dict[Key, Model] = {}  # what is answered
        self.weights: dict[Key, str] = {}  # which ones each mirror has
        self.moved = asyncio.Event()  # when what is MOVING among them no longer is
        self.runs: dict[Key, set[asyncio.Future]] = collections.defaultdict(set)
        self.starting = asyncio.Lock()
        self.door, self.key = None, secrets.token_bytes(32)
        self.lines: set[asyncio.StreamWriter] = set()
        self.trips: set[asyncio.Task] = set()
        importer = concurrent.futures.ThreadPoolExecutor(1)  # imports in two threads may block each other
        self.tensorflow = importer.submit(import_tensorflow)  # now, while the parameter server does the same

    async def start(self) -> dict[str, Any]:
        """Have what the parameter server has now; about this life of the actor, its door and the key to it.

        Idempotent, for the first start, a parameter server that came back, new versions, and new weights in a mirror.
        """
        async with self.starting:
            await asyncio.wrap_future(self.tensorflow)
            if self.door is None:
                self.loop = asyncio.get_running_loop()
                host = ray.util.get_node_ip_address()
                self.listener = await asyncio.start_server(self._serve_line, host, limit=2**24)
                self.door = self.listener.sockets[0].getsockname()[:2]
            try:
                while True:
                    server = await find_actor("parameter server 0", self.namespace)
                    there = await call(server.start.remote())
                    if self.have == (there["life"], there["edition"]):
                        about = {"door": self.door, "key": self.key, "graphs": list(self.graphs)}
                        return about_this_actor() | about
                    is_new_life = self.have is None or self.have[0] != there["life"]
                    if is_new_life:
                        self.gone = asyncio.ensure_future(call(server.stay.remote()))  # one call a life: it never ends
                        self.runs.clear()  # what still runs fails, since it waits for one that is gone
                    await asyncio.to_thread(self._connect, there, is_new_life)
                    for key, graph in self.graphs.items():
                        model = there["models"].get(key)
                        if model and model.weights not in (None, self.weights.get(key)):
                            weights = await call(server.get_weights.remote(*key))
                            await asyncio.to_thread(graph.variables.set_weights, weights)
                            self.weights[key] = model.weights
                    await self._move(there["models"])
                    self.have = there["life"], there["edition"]
            except Exception:  # whoever it answers is to look for another one
                self._leave()
                raise

    async def stay(self) -> None:
        """Never returns: a call whose failure tells at once that this process is gone."""
        await asyncio.Event().wait()

    async def ping(self, edition: int) -> tuple[None, None]:
        """Is the event loop alive?"""
        return None, None

    async def answer(self, model: str, requests: list[tuple], version: Version = None) -> list[Any]:
        """One answer for each request, in order: what its verb promises, or an Error. Raises WorkerLost."""
        answers = {}
        await self._run((model, version), requests, answers.update)
        return [answers[index] for index in range(len(requests))]

    async def _serve_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer batches from one front end. Until it has shown the key, nothing that comes is looked at."""
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            if not secrets.compare_digest(await asyncio.wait_for(reader.readexactly(len(self.key)), 10), self.key):
                return
            self.lines.add(writer)
            while True:
                number, key, requests = await read_frame(reader)
                trip = asyncio.create_task(self._run(key, requests, functools.partial(self._reply, writer, number)))
                self.trips.add(trip)
                trip.add_done_callback(self._end_trip)
        self.lines.discard(writer)

    def _reply(self, writer: asyncio.StreamWriter, number: int, answers: dict[int, Any]) -> None:
        self.loop.call_soon_threadsafe(writer.writelines, to_frame((number, answers)))

    def _end_trip(self, trip: asyncio.Task) -> None:
        self.trips.discard(trip)
        trip.exception()  # if there is one, the line is closed, which tells who waits

    async def _run(self, key: Key, requests: list[tuple], reply: Callable[[dict[int, Any]], Any]) -> None:
        have, arrived = self.have, time.monotonic()
        try:
            while (model := self.models.get(key)) and model.state == "MOVING":
                await self.moved.wait()
            if model is None or not model.metadata:
                raise not_found(*key)
            graph = self.graphs[key[0], model.version]
            executor = self.callers if graph.calls_out else self.runners
            run = self.loop.run_in_executor(executor, answer_requests, graph, requests, reply, arrived)
            self.runs[key].add(run)
            run.add_done_callback(self.runs[key].discard)
            await run
        except ConnectionError as error:
            if self.have is have:
                self._leave()
            raise WorkerLost(f"The parameter server of worker {self.index} was lost: {error}") from None
        except Exception as error:  # whatever it is: nobody is to wait for ever
            message = f"Worker {self.index} failed: {type(error).__name__}: {first_sentence(error)}"
            reply(dict.fromkeys(range(len(requests)), error if isinstance(error, Error) else Error(message)))

    def _leave(self) -> None:
        """Answer nobody until the next ``start``."""
        self.have = None
        for writer in self.lines:
            writer.close()

    def _connect(self, there: dict[str, Any], is_new_life: bool) -> None:
        """Have every version's graph, connected. What still waits for the parameter server's last life is left."""
        tf = import_tensorflow()
        self.graphs = self.graphs or build_functions(tf, self.options, mirrors=True)
        if is_new_life:
            self.runners = concurrent.futures.ThreadPoolExecutor(PLACES)
            self.callers = concurrent.futures.ThreadPoolExecutor(16)  # of models that call out, perhaps to each other
        for key, model in there["models"].items():
            is_mirror, graph = is_mirrored(self.options, model.source), self.graphs.get(key)
            is_connected = graph and graph.session and (is_mirror or not is_new_life)
            if key[1] != model.version or not model.metadata or is_connected:
                continue
            try:
                graph = graph or build_graph(tf, self.options, model.source, is_mirror)
            except Exception:
                log.exception("%s", model.source)  # the parameter server sees what is not in ``graphs``
                continue
            for signature in model.merged:
                graph.signatures[signature].merged = True
            if is_mirror:
                graph.connect(tf, [], self.options)
                graph.restore(variables=False)
            else:  # a plain client session straight on the parameter server: one of our own would be one more hop
                graph.connect(tf, there["addresses"], self.options, self.options.timeout_s + 1)
            graph.warm_up()
            self.graphs[key] = graph

    async def _move(self, models: dict[Key, Model]) -> None:
        """Answer with these, when all that still runs on what is others now is answered; who asks for that waits."""
        other = {key: model._replace(state="MOVING") for key, model in self.models.items()
                 if key not in models or models[key].version != model.version
                 or models[key].state == "MOVING" or not models[key].metadata}
        self.models = self.models | other
        while (runs := {run for key in other for run in self.runs[key]}) and not self.gone.done():
            await asyncio.wait({self.gone, *runs}, return_when=asyncio.FIRST_COMPLETED)
        if self.gone.done():
            raise WorkerLost(f"The parameter server of worker {self.index} was lost: {self.gone.exception()}")
        self.models, moved, self.moved = models, self.moved, asyncio.Event()
        moved.set()
        for key in [key for key in self.graphs if key not in models or not models[key].metadata]:
            self.graphs[key].disconnect()
            self.weights.pop(key, None)
            if self.graphs[key].source.folder:
                del self.graphs[key]


def answer_requests(
    graph: Graph, requests: list[tuple], reply: Callable[[dict[int, Any]], Any], arrived: float
) -> None:
    """Decode, group, merge, run, split, encode; ``reply({index: answer or Error})`` as each group is done, for each
    request once: those that came too late are not run.

    Requests for one signature with rows of one shape are one group if they may share a run. Raises ConnectionError.
    """
    refused: dict[int, Error] = {}
    groups: dict[Any, list[tuple]] = {}
    for index, (verb, body, seconds, is_repeated) in enumerate(requests):
        try:
            signature, feed, encode = decode(graph.signatures, verb, body)
            if is_repeated and (signature.writes or signature.calls_out):
                raise WorkerLost("A worker was lost; the change that was asked for may or may not have been applied.")
        except Error as error:
            refused[index] = error.with_traceback(None)
            continue
        is_merged = signature.merged and all(array.ndim and len(array) == len(feed[0]) for array in feed)
        is_json = verb not in ("add", "arrays")
        key = (is_json, signature.name, *(array.shape[1:] for array in feed)) if is_merged else (is_json, index)
        groups.setdefault(key, []).append((index, signature, feed, encode, arrived + seconds))
    if refused:
        reply(refused)

    def run(signature: Signature, feed: list[np.ndarray]) -> list[np.ndarray]:
        outputs = graph.run(signature.name, feed)
        return list(map(plain, outputs, signature.outputs)) if is_json else outputs

    for (is_json, *_), group in groups.items():
        now = time.monotonic()
        due = [request[:-1] for request in group if now < request[-1]]
        answers = run_merged(run, due) if len(due) > 1 else None
        late = {index: DeadlineExceeded("The deadline passed in the worker") for index, *_, end in group if now >= end}
        reply(late | (answers or {index: attempt(lambda: encode(run(signature, feed)))
                                  for index, signature, feed, encode in due}))


def attempt(function: Callable, *arguments) -> Any:
    """What it returns, or the Error that it raises."""
    try:
        return function(*arguments)
    except Error as error:
        return error.with_traceback(None)


def run_merged(run: Callable, group: list[tuple]) -> dict[int, Any] | None:
    """The answers of requests that share a run; None when each must have one of its own, so that a bad one fails alone.

    Nothing has been changed then: a signature that writes is only merged when a run that fails changes nothing.
    """
    _, signature, _, _ = group[0]
    feeds = [feed for _, _, feed, _ in group]
    ends = list(itertools.accumulate(len(feed[0]) for feed in feeds))
    try:
        outputs = run(signature, list(map(np.concatenate, zip(*feeds))))
    except Error:
        return None
    if any(output.shape[:1] != (ends[-1],) for output in outputs):
        signature.merged = False
        return None
    return {index: attempt(encode, [output[end - len(feed[0]):end] for output in outputs])
            for (index, _, feed, encode), end in zip(group, ends)}


# == Lines: how batches travel. One call of Ray's takes ten times the processor time of a message on a connection ======

LARGE_BYTES = 2**16  # an array of so many bytes goes beside the pickle, uncopied


def to_frame(value: Any) -> list[Any]:
    """Parts to be written one after another: how many there are, their sizes, a pickle, large arrays."""
    parts: list[Any] = [b""]
    parts[0] = pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < LARGE_BYTES or parts.append(b.raw()))
    return [struct.pack(f"<I{len(parts)}Q", len(parts), *(memoryview(part).nbytes for part in parts)), *parts]


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """Raises EOFError or OSError when the connection is gone. Arrays are read-only."""
    [count] = struct.unpack("<I", await reader.readexactly(4))
    sizes = struct.unpack(f"<{count}Q", await reader.readexactly(8 * count))
    pickled, *arrays = [await reader.readexactly(size) for size in sizes]
    return pickle.loads(pickled, buffers=arrays)


class Line:
    """The connection of this process to one life of a worker. ``closed`` is done when it is gone."""

    def __init__(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, batcher: Batcher):
        self.index = index
        self.is_hung = False  # it gets no new work unless there is no other
        self.trips: dict[int, dict[int, Request]] = {}  # what is not answered yet
        self.writer, self._numbers = writer, itertools.count()
        self.closed = asyncio.create_task(self._listen(reader, batcher))
        batcher.add(self)

    def send(self, key: Key, requests: list[Request]) -> None:
        number, now = next(self._numbers), time.monotonic()
        self.trips[number] = dict(enumerate(requests))
        contents = [(request.verb, request.body, request.deadline - now, request.is_repeated) for request in requests]
        self.writer.writelines(to_frame((number, key, contents)))

    async def _listen(self, reader: asyncio.StreamReader, batcher: Batcher) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                number, answers = await read_frame(reader)
                trip = self.trips.get(number, {})
                for index, answer in answers.items():
                    if request := trip.pop(index, None):
                        batcher.resolve(request, answer)
                if not trip and self.trips.pop(number, None) is not None:
                    batcher.dispatch()
        self.writer.close()
        batcher.remove(self)


# == The batcher: gathers concurrent requests before they travel, and hands them to the workers round-robin ============

TRIP_BYTES = 2**25  # most that requests which travel together have together
HELD_BYTES = 2**28  # most that all requests have which are not answered
BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, math.inf)  # of the histogram of answers


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One caller's request on its way to a worker, and ``future``, for which the caller waits."""

    key: Key
    model: Model
    worker: int | None  # the one that is to do it, if it matters
    verb: str
    body: Any
    future: asyncio.Future
    size_bytes: int
    deadline: float
    timer: asyncio.TimerHandle | None = None  # that ends the wait at the deadline
    is_repeated: bool = False  # a worker was lost that had it


class Batcher:
    """Whatever queued up while the last batches ran is the next batch. Lives in one event loop; nothing here waits.

    Requests for one model travel together, ``max_batch`` at most. Every request has its answer at the latest when its
    deadline has passed. What a lost worker had to do runs once more elsewhere, but for adds.
    """

    def __init__(self, options: Options):
        self.options = options
        self.lines: list[Line] = []  # to the workers that can be called; whose turn it is comes first
        self.held_bytes = 0  # of the requests that are not answered
        self.answered: collections.Counter[tuple[str, str]] = collections.Counter()  # by model and verb
        self.took: collections.Counter[float] = collections.Counter()  # by bucket
        self.took_s = 0.0
        self._queues = collections.defaultdict(collections.deque)  # by key and worker
        # while one runs, decoding the next one takes processor time from it where there is hardly any to spare
        self.at_once = PLACES if os.cpu_count() > 2 else 1
        self._is_due, self._closed = False, None

    @property
    def waiting(self) -> int:
        """Requests that are not sent yet."""
        return sum(map(len, self._queues.values()))

    async def submit(self, key: Key, model: Model, verb: str, body: Any, worker: int | None = None) -> Any:
        """The answer to a request, which waits in its queue first. Raises Error."""
        if self._closed:
            raise self._closed.with_traceback(None)
        if self.waiting >= self.options.max_queue or self.held_bytes > HELD_BYTES:
            raise Unavailable(f"Too many requests are waiting already ({self.waiting}); try again later.")
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self.options.timeout_s
        request = Request(key, model, worker, verb, body, loop.create_future(), size_of(body), deadline)
        request.timer = loop.call_later(self.options.timeout_s, self._end_wait, request)
        self.held_bytes += request.size_bytes
        self._queues[key, worker].append(request)
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self.dispatch)  # after all that is ready in this turn of the loop
        return await request.future

    def resolve(self, request: Request, answer: Any) -> None:
        """Give a caller the answer, unless there is one or nobody waits for it any more."""
        self.held_bytes, request.size_bytes = self.held_bytes - request.size_bytes, 0
        request.timer.cancel()
        if request.future.done():
            return
        if isinstance(answer, Exception):
            return request.future.set_exception(answer)
        request.future.set_result(answer)
        seconds = time.monotonic() - request.deadline + self.options.timeout_s
        self.answered[request.key[0], request.verb] += 1
        self.took[next(end for end in BUCKETS_S if seconds <= end)] += 1
        self.took_s += seconds

    def add(self, line: Line) -> None:
        self.lines.insert(0, line)
        self.dispatch()

    def remove(self, line: Line) -> None:
        """It is gone. What it had runs once more elsewhere, or is answered with why it cannot."""
        if line in self.lines:
            self.lines.remove(line)
        for request in reversed([request for trip in line.trips.values() for request in trip.values()]):
            if request.verb == "add" or request.is_repeated:
                why = "a change that was asked for may or may not have been applied"
                self.resolve(request, WorkerLost(f"Worker {line.index} was lost; {why}."))
            else:
                request.is_repeated = True
                self._queues[request.key, request.worker].appendleft(request)
        line.trips.clear()
        self.dispatch()

    def close(self, error: Error | None) -> None:
        """Answer all that is left, and whatever comes, with this; until called with None."""
        self._closed = error
        under_way = [trip.values() for line in self.lines for trip in line.trips.values()]
        for request in itertools.chain(*self._queues.values(), *under_way) if error else ():
            self.resolve(request, error)
        self.dispatch()  # which drops what has its answer

    def _end_wait(self, request: Request) -> None:
        message = f"No answer within the deadline of {self.options.timeout_s:g} s"
        self.resolve(request, DeadlineExceeded(f"{message}; a change that was asked for may have been applied."))
        self.dispatch()  # which drops it from its queue

    def dispatch(self) -> None:
        """Send all batches that are due to workers that have a place. Models take turns, and so do workers."""
        self._is_due, keys = False, collections.deque(self._queues)
        while keys:
            key = keys.popleft()
            if batch := self._next_batch(*key):
                line, requests = batch
                self.lines.remove(line)
                self.lines.append(line)
                line.send(key[0], requests)
                keys.append(key)

    def _next_batch(self, key: Key, worker: int | None) -> tuple[Line, list[Request]] | None:
        """What of this queue is to be sent now, and to whom; if it is due, and there is a place for it."""
        queue = self._queues[key, worker]
        while queue and queue[0].future.done():  # nobody waits for it any more
            self.resolve(queue.popleft(), None)
        if not queue:
            del self._queues[key, worker]
            return None
        model = queue[0].model
        lines = [line for line in self.lines if worker in (None, line.index)]
        lines = [line for line in lines if not line.is_hung] or lines
        lines = [line for line in lines if len(line.trips) < PLACES]
        if not lines:
            return None
        is_one_run, count = model.merged and self.options.placement == "shared", len(queue)
        if not is_one_run:  # all workers get their part
            count = -(-count // sum(PLACES - len(line.trips) for line in lines))
        under_way = [next(iter(trip.values()))
                     for line in self.lines if not line.is_hung for trip in line.trips.values()]
        if model.merged and count < self.options.max_batch:
            early_s = queue[0].deadline - self.options.timeout_s + self.options.batch_wait_ms / 1000 - time.monotonic()
            if early_s > 0:
                asyncio.get_running_loop().call_later(early_s, self.dispatch)
                return None
            if is_one_run and [other.key for other in under_way].count(key) >= self.at_once:  # more would be smaller
                return None
        if model.calls_out and sum(other.model.calls_out for other in under_way) >= PLACES * len(self.lines) - 1:
            return None  # what it waits for may need a place, too
        requests, size_bytes = [], 0
        while queue and len(requests) < min(count, self.options.max_batch) and size_bytes < TRIP_BYTES:
            request = queue.popleft()
            if request.future.done():
                self.resolve(request, None)
            else:
                size_bytes += request.size_bytes
                requests.append(request)
        return lines[0], requests


def size_of(body: Any) -> int:
    """Roughly the bytes that travel: an HTTP body's, or those of arrays."""
    first, second = body if isinstance(body, tuple) else (b"", 0)
    arrays = second.values() if isinstance(second, dict) else [second]
    return len(first) + sum(getattr(array, "nbytes", 0) for array in arrays)


# == The cluster: what scripts, notebooks and front ends hold in their hands ===========================================

PING_S = 0.5  # between two looks at an actor
SUSPECT_S = 1.5  # a worker that has not answered for so long gets no new work
PATIENCE_S = {"worker": 4.0, "parameter server": 30.0}  # an actor that has not answered for so long is ended


@dataclasses.dataclass(eq=False)
class Member:
    """What this process knows of one actor."""

    kind: str  # "parameter server" or "worker"
    index: int
    state: str = "starting"  # ready, hung
    restarts: int = 0
    pid: int | None = None  # of its last life
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # this life
    edition: int = 0  # of what the first parameter server has
    actor: Any = None
    line: Line | None = None  # to a worker

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


class Cluster:
    """A parameter server and its workers, with a blocking and an awaitable door to each call.

        with Cluster(options) as cluster:              # scripts, threads, Flask, notebooks
            cluster.add(3.0)
            cluster.predict({"x": x}, model="m")

        async with Cluster(options) as cluster:        # inside any running event loop
            await cluster.add_async(3.0)

    Calls may come from several threads and event loops at once; all work is done in the *home loop*: one that ``begin``
    is given, else one in a thread of the cluster's own, which owns Ray: Ray's processes end with who started them.
    """

    def __init__(self, options: Options | None = None, **changes):
        self.options = dataclasses.replace(options or Options(), **changes)
        self._servers = [Member("parameter server", index) for index in range(self.options.parameter_servers)]
        self._workers = [Member("worker", index) for index in range(self.options.workers)]
        self.models: dict[Key, Model] = {}
        self._batcher = Batcher(self.options)
        self._errors: collections.Counter[int] = collections.Counter()  # by HTTP status
        self._failure: Error | None = None  # why nothing is served, when that is not just for the moment
        self._changed, self._maker = threading.Condition(), concurrent.futures.ThreadPoolExecutor(1)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: int | None = None  # the thread of the home loop
        self._described, self._first, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._run, self._folder = secrets.token_hex(8), None  # in which variables are kept
        self._namespace = "ray_tensorflow" if self.options.address else f"ray_tensorflow-{self._run}"

    # -- life ----------------------------------------------------------------------------------------------------------

    def begin(self, home: asyncio.AbstractEventLoop | None = None) -> Cluster:
        """Start everything in the background, in the running loop ``home`` if given; ``health`` tells how far it is."""
        with self._changed:
            if self._thread is None and self._failure is None:
                self._loop = home or uvloop.new_event_loop()
                self._thread = threading.Thread(target=self._live, args=[home is None], daemon=True)
                self._thread.start()
                atexit.register(self.close)
        return self

    def start(self, workers: int = 1) -> Cluster:
        """Start everything; returns when all models are loaded and so many workers are ready.

        Raises OptionError, ModelError or Unavailable when that cannot be.
        """
        self.begin()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or (
                sum(worker.state == "ready" for worker in self._workers) >= workers))
        errors = [ModelError(model.error) for (name, _), model in self.models.items()
                  if model.error and (name, None) not in self.models]
        if failure := self._failure or next(iter(errors), None):
            self.close()
            raise failure
        return self

    def close(self) -> None:
        """Answer what is left with Unavailable and end every process that was started. Safe to call twice."""
        atexit.unregister(self.close)
        with self._changed:
            self._failure = Unavailable("The server is shutting down.")
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError, AttributeError):  # the loop is closed, or never was
            self._loop.call_soon_threadsafe(self._closing.set)
        if self._thread:
            self._thread.join()

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
        return self.ask(ADDER, "add", finite(value), worker=worker)

    async def add_async(self, value: float, worker: int | None = None) -> float:
        """As ``add``, awaitable."""
        return await self.ask_async(ADDER, "add", finite(value), worker=worker)

    def predict(self, inputs: Any, model: str, signature: str = "serving_default", version: Version = None) -> Arrays:
        """Run a signature of a served model.

        ``inputs`` are arrays by input name (or just the array, of a sole input), of a dtype that numpy casts to the
        input's without loss of kind (ints to floats, not floats to ints; text for strings). The result is arrays by
        output name; they may be read-only: copy what you want to write to. Raises InvalidRequest, ModelError,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        return self.ask(model, "arrays", (signature, as_arrays(inputs)), version)

    async def predict_async(
        self, inputs: Any, model: str, signature: str = "serving_default", version: Version = None
    ) -> Arrays:
        """As ``predict``, awaitable."""
        return await self.ask_async(model, "arrays", (signature, as_arrays(inputs)), version)

    def get_weights(self, model: str) -> Arrays:
        """The variables of a served model by name. Arrays may be read-only: copy what you want to write to."""
        self.find(model)
        return self._wait(self._cross(self._call_server("get_weights", model)))

    def set_weights(self, model: str, weights: Arrays) -> None:
        """Set some or all variables of a served model; a wrong name or shape is an InvalidRequest, and none is set.

        Once it returns, no later request is answered with the old ones, mirrors included.
        """
        self.find(model)
        self._wait(self._cross(self._call_server("set_weights", model, as_arrays(weights))))

    def reload(self, model: str) -> int:
        """Look now for new versions and labels of a model, which happens once a second; the version in use then.

        Raises InvalidRequest, Unavailable or WorkerLost.
        """
        async def reload() -> int:
            self._learn(self._servers[0], await self._call_server("reload", model))
            return self.find(model).version

        return self._cross(reload()).result()

    def map(
        self, batches: Iterable[Any], model: str, signature: str = "serving_default", version: Version = None,
        ordered: bool = True
    ) -> Iterator[Arrays]:
        """``predict`` for each batch of any iterable, however long and of whatever sizes, in order or as they finish.

        Keeps a bounded number of batches in flight and pulls no faster than they can be sent. An error says which batch
        it is about, counted from 0. Leaving the loop early stops the work.
        """
        about, pending, source = 0, {}, enumerate(batches)
        ahead = min(2 * PLACES * self.options.workers, self.options.max_queue)
        try:
            while True:
                for about, batch in itertools.islice(source, ahead - len(pending)):
                    found, body = self.find(model, version), (signature, as_arrays(batch))
                    pending[self._cross(self._batcher.submit((model, version), found, "arrays", body))] = about
                if not pending:
                    return
                done = pending if ordered else concurrent.futures.wait(pending, return_when="FIRST_COMPLETED").done
                future = next(iter(done))
                about = pending.pop(future)
                yield future.result()
        except Error as error:
            raise type(error)(f"batch {about}: {error}", error.status) from error
        finally:
            for future in pending:
                future.cancel()

    async def map_async(self, batches: Iterable[Any] | AsyncIterable[Any], *arguments, **options) -> AsyncIterator[Any]:
        """As ``map``, for ``async for``; ``batches`` may be asynchronous too. It is threads that wait, not the loop."""
        end = object()
        if isinstance(batches, AsyncIterable):
            batches = from_loop(aiter(batches), asyncio.get_running_loop())
        results = self.map(batches, *arguments, **options)
        try:
            while (result := await asyncio.to_thread(next, results, end)) is not end:
                yield result
        finally:
            with contextlib.suppress(ValueError):  # a thread still waits there, and drops it when it has its result
                await asyncio.to_thread(results.close)

    def find(self, name: str, version: Version = None) -> Model:
        """A served model's version, or what a label stands for, or the latest. Raises InvalidRequest in TensorFlow
        Serving's words, or Unavailable."""
        if self._failure or not self.models:
            failure = self._failure or Unavailable("The server is starting; try again later.")
            raise failure.with_traceback(None)  # else that of one that is raised again and again grows
        model = self.models.get((name, version))
        if model is None or model.state not in ("AVAILABLE", "MOVING"):
            raise not_found(name, version)
        return model

    def describe(self, name: str, version: Version, verb: str) -> dict[str, Any]:
        """What TensorFlow Serving's REST API answers to GET: a model's "metadata", or its versions' "status"."""
        if verb == "metadata":
            model = self.find(name, version)
            spec = {"name": name, "signature_name": "", "version": str(model.version)}
            return {"model_spec": spec, "metadata": model.metadata}
        version = self.find(name, version).version if isinstance(version, str) else version
        self.find(ADDER)
        found = [model for key, model in self.models.items()
                 if key == (name, model.version) and version in (None, model.version)]
        if not found:
            which = "any versions" if version is None else f"version {version}"
            raise InvalidRequest(f"There is no such model (Could not find {which} of model {name})", 404)
        return {"model_version_status": [
            {"version": str(model.version), "state": model.state, "status": {
                "error_code": "UNKNOWN" if model.error else "OK", "error_message": model.error or ""}}
            for model in sorted(found, key=lambda model: -model.version)]}

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: status, parameter servers, workers, models; asks nobody, waits for nothing."""
        status = "failed" if self._failure else "recovering" if self._first.is_set() else "starting"
        if not self._failure and any(worker.state != "starting" for worker in self._workers):
            status = "ready"

        def shown(member: Member) -> dict[str, Any]:
            known = {"index": member.index, "state": member.state, "restarts": member.restarts} | member.about
            return known | ({"in_flight": sum(map(len, member.line.trips.values()))} if member.line else {})

        models = {name: {"version": None, "merged": [], "labels": {}, "error": None} for name, _ in self.models}
        for (name, which), model in self.models.items():
            if which is None:
                models[name] |= {"version": model.version, "merged": model.merged}
            elif isinstance(which, str):
                models[name]["labels"][which] = model.version
            elif model.error:
                models[name]["error"] = model.error
        return {"status": status, "error": self._failure and str(self._failure),
                "parameter_servers": list(map(shown, self._servers)), "workers": list(map(shown, self._workers)),
                "models": models, "waiting": self._batcher.waiting}

    def refuse(self, error: Exception) -> tuple[dict[str, str], int, dict[str, str]]:
        """What a front end answers to a request that raised this: body, status and headers."""
        if not isinstance(error, Error):
            log.error("a request failed", exc_info=error)
            error = Error("Internal error")
        self._errors[error.status] += 1
        return {"error": str(error)}, error.status, {"Retry-After": "1"} if error.status in (429, 503) else {}

    def metrics(self) -> str:
        """What ``GET /metrics`` answers: what this process has done, in Prometheus' text format."""
        batcher, took = self._batcher, itertools.accumulate(self._batcher.took[end] for end in BUCKETS_S)
        samples = {("answers_total", "counter"): [
            (f'{{model="{model}",kind="{verb}"}}', count) for (model, verb), count in sorted(batcher.answered.items())]}
        samples["errors_total", "counter"] = [(f'{{code="{c}"}}', count) for c, count in sorted(self._errors.items())]
        samples["answer_seconds", "histogram"] = [
            *((f'_bucket{{le="{str(end).replace("inf", "+Inf")}"}}', count) for end, count in zip(BUCKETS_S, took)),
            ("_sum", batcher.took_s), ("_count", batcher.took.total())]
        samples["waiting_requests", "gauge"] = [("", batcher.waiting)]
        samples["model_version", "gauge"] = [
            (f'{{model="{name}"}}', model.version) for (name, which), model in self.models.items() if which is None]
        samples["restarts_total", "counter"] = [
            (f'{{actor="{member}"}}', member.restarts) for member in self._servers + self._workers]
        lines = []
        for (name, kind), values in samples.items():
            lines.append(f"# TYPE ray_tensorflow_{name} {kind}")
            lines.extend(f"ray_tensorflow_{name}{suffix} {value}" for suffix, value in values)
        return "\n".join(lines) + "\n"

    # -- from any thread or loop to the home loop ----------------------------------------------------------------------

    def ask(self, model: str, verb: str, body: Any, version: Version = None, worker: int | None = None) -> Any:
        """What ``decode`` says of the verb. Raises Error."""
        found = self.find(model, version)
        return self._wait(self._cross(self._batcher.submit((model, version), found, verb, body, worker)))

    async def ask_async(
        self, model: str, verb: str, body: Any, version: Version = None, worker: int | None = None
    ) -> Any:
        """As ``ask``, awaitable."""
        answer = self._batcher.submit((model, version), self.find(model, version), verb, body, worker)
        return await (answer if threading.get_ident() == self._home else asyncio.wrap_future(self._cross(answer)))

    async def _call_server(self, method: str, model: str, *arguments) -> Any:
        """Call the first parameter server."""
        if self._servers[0].state == "starting":
            raise Unavailable("The parameter server is being started; try again later.")
        try:
            return await call(getattr(self._servers[0].actor, method).remote(model, *arguments))
        except ray.exceptions.RayActorError:
            raise WorkerLost("The parameter server was lost; a change may or may not have been applied.") from None

    def _cross(self, door: Coroutine) -> concurrent.futures.Future:
        """Run it in the home loop."""
        if threading.get_ident() == self._home:
            door.close()
            raise InvalidRequest("A blocking call in the cluster's own event loop would never return: await its twin,"
                                 " or use asyncio.to_thread.")
        return asyncio.run_coroutine_threadsafe(door, self._loop)

    def _wait(self, future: concurrent.futures.Future) -> Any:
        try:
            return future.result(self.options.timeout_s + 5)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within the deadline of {self.options.timeout_s:g} s.") from None

    # -- in the home loop ----------------------------------------------------------------------------------------------

    def _live(self, is_own_loop: bool) -> None:
        """The thread that owns Ray, and mostly the home loop, from start to end."""
        try:
            with ray_runtime(self.options):
                if is_own_loop:
                    self._loop.run_until_complete(self._serve())
                else:
                    asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
                self._maker.shutdown(cancel_futures=True)  # what is made later would start another Ray
                if not self.options.address:
                    self._end_actors()
        except Exception as error:
            if not self._closing.is_set():  # else it was ended on purpose while it started
                why = f"Ray could not be started: {first_sentence(error)}"
                self._fail(error if isinstance(error, Error) else Unavailable(why))
        finally:
            if is_own_loop:
                self._loop.close()
            with self._changed:
                self._failure = self._failure or Unavailable("The server is shutting down.")
                self._changed.notify_all()

    async def _serve(self) -> None:
        """Until ``close``."""
        self._home = threading.get_ident()
        tasks = [asyncio.create_task(self._keep(member)) for member in self._servers + self._workers]
        await self._closing.wait()
        self._batcher.close(Unavailable("The server is shutting down."))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lines = [worker.line.closed for worker in self._workers if worker.line]
        self._lose(self._servers[0])  # and so all lines
        await asyncio.gather(*lines)
        self._home = None

    async def _keep(self, member: Member) -> None:
        """Bring an actor up to date, and again whenever it, or the parameter server, was away; until cancelled."""
        if member.kind == "worker" and (member.index or self.options.address):  # else beside the parameter server
            await (self._first if member.index else self._described).wait()  # one that serves comes first
        while True:
            started = time.monotonic()
            try:
                member.actor = member.actor or await self._loop.run_in_executor(self._maker, self._make, member)
                await self._start(member)
                log.info("%s ready  pid %d  %.1f s", member, member.pid, time.monotonic() - started)
                log.warning("%s lost  pid %d  %s", member, member.pid, await self._watch(member))
            except OptionError as error:
                self._remove_folder()
                return self._fail(error)
            except ray.exceptions.ActorDiedError:  # for good: a shared cluster that had ended
                member.actor = None
            except ray.exceptions.ActorUnavailableError:
                pass  # Ray is starting it anew
            except Exception as error:
                log.warning("%s could not start: %s", member, first_sentence(error))
                if isinstance(error, Error) and member is self._servers[0]:
                    self._fail(error)
            self._lose(member)
            await asyncio.sleep(PING_S)

    def _make(self, member: Member):
        """The actor of this name; Ray keeps it alive, and the cluster has only one, whoever made it."""
        is_worker, is_first = member.kind == "worker", member is self._servers[0]
        gpus, sharers = int(ray.cluster_resources().get("GPU", 0)), self.options.workers
        if self.options.placement == "shared":
            sharers += self.options.parameter_servers
        elif not is_worker:
            gpus = 0
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return ray.remote(Worker if is_worker else ParameterServer).options(
            name=str(member), namespace=self._namespace, get_if_exists=True, max_restarts=-1, max_concurrency=10_000,
            lifetime="detached" if self.options.address else None, num_cpus=0.001, num_gpus=gpu_share(gpus, sharers),
            scheduling_strategy=here if is_first else "SPREAD",  # where the folder is
            enable_task_events=False,  # of which Ray would keep 100,000: half a gigabyte
        ).remote(member.index, self.options, self._namespace, *([] if is_worker else [self._make_folder(), self._run]))

    def _make_folder(self) -> str:
        """Where variables are kept, ready for the parameter server (see Checkpoints)."""
        try:
            self._folder = self._folder or self.options.checkpoint_dir or tempfile.mkdtemp(prefix="ray_tensorflow_")
            os.makedirs(self._folder, exist_ok=True)
            open(os.path.join(self._folder, f".run-{self._run}"), "a").close()
        except OSError as error:
            raise Unavailable(f"The folder for variables cannot be used: {error.filename}: {error.strerror}.") from None
        return self._folder

    def _remove_folder(self) -> None:
        if self._folder and not self.options.checkpoint_dir:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self, member: Member) -> None:
        """Call ``start``, and have what follows from it."""
        is_first = member is self._servers[0]
        about = await call(member.actor.start.remote(*([self.options.shared] if is_first else [])))
        if is_first:
            if about["folder"] != self._folder:  # others made this cluster
                self._remove_folder()
            self._learn(member, about)
            self._failure = None
            self._batcher.close(None)
            self._described.set()
        elif member.kind == "worker":
            await self._described.wait()
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*about["door"], limit=2**24), 10)
            writer.write(about["key"])
            member.line = Line(member.index, reader, writer, self._batcher)
            self._first.set()
        member.restarts += member.pid not in (None, about["pid"])
        member.about = {name: about[name] for name in ("pid", "node", "gpus", "cuda_visible_devices")}
        member.state, member.pid = "ready", about["pid"]
        with self._changed:
            self._changed.notify_all()

    def _learn(self, server: Member, about: dict[str, Any]) -> None:
        """What the first parameter server has now."""
        for (name, which), model in about["models"].items():
            before = self.models.get((name, which))
            if model.error and model != before:
                log.error("%s", model.error)
            if which != model.version and before and before.version != model.version:
                log.info("model %s: %s is version %d", name, which or "the latest", model.version)
        self.models, server.edition = about["models"], about["edition"]

    async def _watch(self, member: Member) -> str:
        """Why an actor was lost, as soon as it is. One that is silent is ended, whereupon Ray starts it anew."""
        stay, ping, silent_s = asyncio.ensure_future(call(member.actor.stay.remote())), None, 0.0
        signs = [stay, *([member.line.closed] if member.line else [])]
        try:
            while not any(sign.done() for sign in signs):
                ping = ping or asyncio.ensure_future(call(member.actor.ping.remote(member.edition)))
                asked = time.monotonic()
                await asyncio.wait([*signs, ping], timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if ping.done() and not ping.exception():
                    member.about["trouble"], news = ping.result()
                    ping, silent_s = None, 0.0
                    self._set_hung(member, False)
                    if news:
                        self._learn(member, news)
                    await asyncio.wait(signs, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                elif time.monotonic() - asked < 1.5 * PING_S:  # else it is this very loop that comes too late
                    silent_s += PING_S
                    self._set_hung(member, silent_s > SUSPECT_S)
                if silent_s > PATIENCE_S[member.kind]:
                    await self._kill(member)
                    return f"it did not answer for {PATIENCE_S[member.kind]:g} s"
            return "its process is gone" if stay.done() else "its connection was closed"
        finally:
            for future in filter(None, (stay, ping)):
                future.cancel() or future.cancelled() or future.exception()

    def _set_hung(self, member: Member, is_hung: bool) -> None:
        if is_hung != (member.state == "hung"):
            member.state = "hung" if is_hung else "ready"
            log.warning("%s is %s  pid %d", member, member.state, member.pid)
        if member.line:
            member.line.is_hung = is_hung

    async def _kill(self, member: Member) -> None:
        """End the process of an actor that hears nothing; Ray by itself would leave it as it is."""
        there = NodeAffinitySchedulingStrategy(member.about["node"], soft=False)
        if member.about["node"] == ray.get_runtime_context().get_node_id():
            return kill_process(member.pid)
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone as well
            await call(ray.remote(num_cpus=0, scheduling_strategy=there)(kill_process).remote(member.pid))

    def _lose(self, member: Member) -> None:
        member.state, member.about = "starting", {}
        for worker in [member] if member.kind == "worker" else self._workers:  # which have to connect anew
            if worker.line:
                worker.line.writer.close()
        member.line = None

    def _fail(self, error: Error) -> None:
        """Answer everything with this, until the parameter server is well."""
        if str(error) != str(self._failure):
            log.error("%s", error)
        self._batcher.close(error)
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _end_actors(self) -> None:
        """Keep what is to be kept, and end the actors that are this cluster's alone."""
        with contextlib.suppress(Exception):
            if self._described.is_set():
                ray.get(self._servers[0].actor.keep.remote(), timeout=10)
        for member in self._workers + self._servers:
            if member.actor is not None:
                ray.kill(member.actor)
        self._remove_folder()


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def gpu_share(gpus: int, actors: int) -> float:
    """How many GPUs each actor gets, such that all of them fit: whole ones, or a part of one."""
    if not gpus:
        return 0
    return 1 if gpus >= actors else math.floor(10_000 / -(-actors // gpus)) / 10_000


def as_arrays(inputs: Any) -> Any:
    """Arrays by name, or one array. Raises InvalidRequest."""
    try:
        is_named = isinstance(inputs, dict)
        return {name: np.asarray(value) for name, value in inputs.items()} if is_named else np.asarray(inputs)
    except ValueError:
        raise InvalidRequest("An input is ragged: all its rows must have the same shape") from None


def from_loop(items: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """Asynchronous items, in a thread that is not the loop's."""
    end = object()

    async def step():
        return await anext(items, end)

    while (item := asyncio.run_coroutine_threadsafe(step(), loop).result()) is not end:
        yield item


# For the Ray that we start.
RAY_SETTINGS = {
    "worker_niceness": 0,  # else actors, at nice 15, starve beside a busy web process
    "prestart_worker_first_driver": False, "enable_worker_prestart": False,  # no process that waits for tasks
    "raylet_client_connect_timeout_milliseconds": 20,  # else a first attempt that comes too early costs a second
    "raylet_client_num_connect_attempts": 500,
    "gcs_rpc_server_connect_timeout_s": 3,  # a worker that starts looks four times for a Ray that has been killed,
    "gcs_rpc_server_reconnect_timeout_s": 3,  # and one that runs once
    "task_events_report_interval_ms": 0, "enable_timeline": False,  # nobody asks for these, and they cost
    "enable_metrics_collection": False, "event_stats": False}


@contextlib.contextmanager
def ray_runtime(options: Options):
    """Ray for as long as the block runs: the cluster at ``options.address``, one that runs in this process already, or
    a local one of our own that listens on 127.0.0.1 alone and leaves no process and no file behind."""
    if ray.is_initialized():
        yield
        return
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [here, *(path or os.getcwd() for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix)))]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}  # actors find modules where this process does
    folder, where, is_clustered = None, {"address": options.address}, ray_constants.ENABLE_RAY_CLUSTER
    try:
        if not options.address:
            temporary = tempfile.gettempdir()
            folder = tempfile.mkdtemp(prefix="ray_tensorflow_", dir=temporary if len(temporary) < 18 else "/tmp")
            if shutil.disk_usage(folder).free < 2**20:  # Ray would try for ever
                raise Unavailable(f"Less than 1 MiB is free in {os.path.dirname(folder)}: make room, or set TMPDIR.")
            variables["KERAS_HOME"] = os.path.join(folder, "keras")  # else Keras makes a folder at home
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if not os.environ.get("RAY_AUTH_TOKEN_PATH"):  # else it is written to the home folder
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray_constants.ENABLE_RAY_CLUSTER = False  # of several nodes: nothing else keeps all of Ray on 127.0.0.1
            where = {"address": "local", "num_cpus": options.threads, "include_dashboard": False,
                     "object_store_memory": 80 * 2**20, "_temp_dir": os.path.join(folder, "r"),  # with room for sockets
                     "_system_config": dict(RAY_SETTINGS)}  # to which Ray adds this folder
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="CRITICAL", **where)
        yield
    except ConnectionError as error:
        reason = f"{first_sentence(error)} (if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        raise Unavailable(f"No Ray cluster answers at {options.address!r}: {reason}") from None
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = is_clustered
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


# == The command: add in all workers, or predict a whole file ==========================================================


def predict_file(cluster: Cluster, model: str, source: str, target: str) -> None:
    """Stream the rows of ``source`` through a model's default signature into ``target``, with progress shown.

    ``.npy`` files may be larger than memory. The target appears whole or not at all. Raises InvalidRequest.
    """
    try:
        loaded = np.load(source, mmap_mode="r")
        columns = {name: loaded[name] for name in loaded.files} if source.endswith(".npz") else {None: loaded}
        [total] = {len(column) for column in columns.values()}
        row_bytes = sum(column.nbytes for column in columns.values()) // max(total, 1)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = f"cannot be read as arrays that have as many rows each: {first_sentence(error)}"
        raise InvalidRequest(f"{source} {reason}") from None

    rows = max(cluster.options.max_batch, 2**16 // max(row_bytes, 1))

    def batches():
        for start in range(0, max(total, 1), rows):  # one of no rows, too: for the outputs' types and shapes
            batch = {name: column[start:start + rows] for name, column in columns.items()}
            yield batch.get(None, batch)

    begun, shown, done, written = time.monotonic(), 0.0, 0, {}
    with tempfile.TemporaryDirectory(prefix=".ray_tensorflow_", dir=os.path.dirname(target) or ".") as folder:
        for outputs in cluster.map(batches(), model):
            count = min(rows, total - done)
            for name, array in outputs.items():
                if array.shape[:1] != (count,):
                    raise InvalidRequest(f"Output {name!r} has not one row for each of the input: {list(array.shape)}")
                if array.dtype == object:  # texts, whose width is only known at the end
                    written.setdefault(name, []).extend(array.tolist())
                    continue
                if name not in written:
                    path, shape = os.path.join(folder, f"{len(written)}.npy"), (total, *array.shape[1:])
                    written[name] = np.lib.format.open_memmap(path, "w+", array.dtype, shape) if total else array
                written[name][done:done + count] = array
            done += count
            if time.monotonic() - shown > 1 or done == total:
                shown, rate = time.monotonic(), done / (time.monotonic() - begun)
                print(f"{done}/{total} rows  {rate:.0f} rows/s  {(total - done) / max(rate, 1e-9):.0f} s left",
                      file=sys.stderr)
        if target.endswith(".npy") and len(written) > 1:
            raise InvalidRequest(f"{target} holds one array, but the outputs are {sorted(written)}: name it .npz")
        arrays, whole = {name: np.asarray(value) for name, value in written.items()}, os.path.join(folder, target[-4:])
        np.savez(whole, **arrays) if target.endswith(".npz") else np.save(whole, *arrays.values())
        os.replace(whole, target)


def start_program(front_end: Options | None = None) -> None:
    """One log line an event, on standard error; as many open files as the system allows: each client needs one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2**16), most))
    gc.freeze()  # Ray's objects: a sixth of the adds of 256 clients, for looking whether they are garbage
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)
    if front_end:
        log.info("starting; http://%s:%d answers 503 until a worker is ready", front_end.host, front_end.port)


async def run_command(options: Options) -> int:
    """Worker i adds the value i, all at once; or a file is predicted. The exit status: 128 + n after signal n."""
    ended_by: list[int] = []

    def end(number: int, task: asyncio.Task) -> None:
        ended_by.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number, asyncio.current_task())
    cluster, started = Cluster(options), time.monotonic()

    async def add(worker: int) -> None:
        started = time.monotonic()
        total = await cluster.add_async(worker, worker)
        print(f"worker {worker}: added {worker}, sum {total}, {time.monotonic() - started:.3f} s", flush=True)

    try:
        await asyncio.to_thread(cluster.start, options.workers)
        print(f"started: {options.workers} workers, {time.monotonic() - started:.1f} s", flush=True)
        if options.input:
            await asyncio.to_thread(predict_file, cluster, options.model[0].name, options.input, options.output)
        else:
            await asyncio.gather(*map(add, range(options.workers)))
            print(f"sum: {await cluster.add_async(0)}", flush=True)
        return 0
    except asyncio.CancelledError:
        return 128 + ended_by[0]
    finally:
        await asyncio.to_thread(cluster.close)


def main() -> None:
    options = Options.from_command_line("Add the workers' numbers up in one shared graph, or predict a file.", COMMAND)
    start_program()
    try:
        sys.exit(asyncio.run(run_command(options)))
    except (Error, OSError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


if __name__ == "__main__":
    from ray_tensorflow import main  # as a module, so that actors find its classes under the same name

    main()
