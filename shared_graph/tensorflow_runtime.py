"""Imports TensorFlow, all of it or only the part that this package uses; makes the configs of sessions and servers;
tells what a run's error means.

A session, a server, a SavedModel and the adder need 600 of the 2,350 modules that ``import tensorflow`` imports, 0.4
of the time and half of the memory. So there are two kinds of import here, after which the same graphs are built, to the
last byte, and the same kernels are found, all of which are in the C++ library:

*whole* is ``import tensorflow.compat.v1``, for functions of the user's, which are given ``tf``: where they are called.

*slim* imports ``NAMES`` and ``MODULES`` and what these need themselves. Python imports a package before its modules,
and it is ``tensorflow/__init__.py`` that imports all the rest. So ``sys.modules["tensorflow"]`` is then a bare module,
made from the package's spec, whose code has not run. It runs, in this very module, as soon as anybody asks for
something in it, be it ``import keras`` or ``import tensorflow as tf; tf.nn`` in a module of the user's. Modules that
are there already stay what they are: graphs and sessions made before go on working.

``NAMES`` and ``MODULES`` are private to TensorFlow, against our rule. Where they are not as expected, the whole is
imported, and a line in the log says why. To use one more name in this package, add it there: a test compares them with
what the package uses, and with the public API. Nothing else knows of any of this.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from shared_graph.errors import ModelError, first_sentence
from shared_graph.options import REMOTE_CALLS_AT_ONCE, Options

log = logging.getLogger(__name__)

LOST_LIMIT_S = 600.0  # behind a deadline: so long a server that is gone is asked
VERSIONS = "2.21."  # of TensorFlow, for which the two lists below were made and tested

# What this package calls ``tf.NAME``, by the module of TensorFlow that has it; NAME=OTHER where it is OTHER there
NAMES = {
    "core.example.example_pb2": "train.Example",
    "core.protobuf.config_pb2": "ConfigProto GPUOptions",
    "python.client.session": "Session",
    "python.framework.dtypes": "as_dtype bfloat16 float32 float64 int32 resource string",
    "python.framework.graph_util_impl": "GraphDef",
    "python.framework.importer": "import_graph_def",
    "python.framework.ops": "Graph GraphKeys colocate_with=_colocate_with control_dependencies device"
    " disable_eager_execution",
    "python.framework.tensor_conversion": "convert_to_tensor=convert_to_tensor_v1_with_dispatch",
    "python.framework.tensor_shape": "TensorShape",
    "python.framework.tensor_util": "make_ndarray=MakeNdarray make_tensor_proto",
    "python.ops.array_ops": "concat identity placeholder zeros",
    "python.ops.control_flow_ops": "group",
    "python.ops.control_flow_v2_toggles": "control_flow_v2_enabled disable_control_flow_v2 enable_control_flow_v2",
    "python.ops.critical_section_ops": "CriticalSection",
    "python.ops.gen_array_ops": "debugging.check_numerics",
    "python.ops.gen_control_flow_ops": "no_op",
    "python.ops.gen_resource_variable_ops": "raw_ops.AssignVariableOp raw_ops.DestroyResourceOp raw_ops.ReadVariableOp"
    " raw_ops.VarIsInitializedOp",
    "python.ops.gen_state_ops": "raw_ops.Assign raw_ops.IsVariableInitialized",
    "python.ops.init_ops": "zeros_initializer=Zeros",
    "python.ops.lookup_ops": "tables_initializer",
    "python.ops.math_ops": "cumsum",
    "python.ops.script_ops": "numpy_function",
    "python.ops.resource_variables_toggle": "disable_resource_variables enable_resource_variables"
    " resource_variables_enabled",
    "python.ops.variable_scope": "get_variable",
    "python.ops.variables": "global_variables_initializer local_variables_initializer",
    "python.platform.tf_logging": "get_logger",
    "python.saved_model.signature_constants": "saved_model.PREDICT_METHOD_NAME",
    "python.saved_model.signature_def_utils_impl": "saved_model.build_signature_def",
    "python.saved_model.utils_impl": "saved_model.build_tensor_info",
    "python.training.device_setter": "train.replica_device_setter",
    "python.training.saver": "train.import_meta_graph",
    "python.training.server_lib": "train.Server",
}
# What else this package imports, and what counts by being imported: tensors get their ``+`` and ``[1:]``, and the
# collections of a MetaGraph become Python objects (these modules, and some of the above, call register_proto_function)
MODULES = (
    "core.protobuf.meta_graph_pb2",
    "python.framework.op_def_registry",
    "python.saved_model.loader_impl",
    "python.ops.tensor_getitem_override",
    "python.ops.tensor_math_operator_overrides",
    "python.ops.ref_variable",
    "python.training.queue_runner_impl",
)

_importing = threading.RLock()


def import_tensorflow(whole: bool = False, is_ours: bool = True) -> Any:
    """``tensorflow.compat.v1``, imported here and nowhere else: in actors, and in a process that has graphs of its own.

    All of it if it is to be ``whole``, and where somebody has imported it already or a part cannot be had alone; else a
    namespace with ``NAMES``, which is all that this package needs. The whole may still come after the part. In a
    process that is not ours, but the user's, nothing is set that holds for all of it.
    """
    with _importing:
        _prepare_environment()
        if whole or not (tf := _import_slim()):
            import tensorflow.compat.v1 as tf
        if is_ours:
            tf.disable_eager_execution()  # and not disable_v2_behavior(), which brings reference variables back
            tf.get_logger().setLevel("ERROR")
            _quiet_python()
        return tf


@functools.cache
def _prepare_environment() -> None:
    """What TensorFlow reads when it is imported."""
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):  # break loopback gRPC (tensorflow#50626)
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)


@functools.cache
def _quiet_python() -> None:
    """Once in a process: a second freeze would make all graphs immortal that were made since the first one."""
    gc.freeze()  # a look at all of TensorFlow's objects would stop requests for a tenth of a second, now and then
    sys.setswitchinterval(0.001)  # requests wait for Python's lock while another thread builds a new version's graph


@functools.cache
def _import_slim() -> SimpleNamespace | None:
    """The namespace of ``NAMES``; None where only the whole will do."""
    if "tensorflow" in sys.modules:
        return None
    try:
        spec = importlib.util.find_spec("tensorflow")
        package = sys.modules["tensorflow"] = importlib.util.module_from_spec(spec)  # bare: made, not run
        tf = _slim_namespace(package)
    except Exception as error:  # whatever another TensorFlow than ours may do
        log.warning("all of TensorFlow is imported, since a part of it cannot be had alone: %r", error)
        sys.modules.pop("tensorflow", None)
        return None
    _complete_on_demand(package, tf)
    return tf


def _complete_on_demand(package: ModuleType, tf: SimpleNamespace) -> None:
    """Make the bare package the whole one when it is asked for what it lacks. Its path is taken away, since Python asks
    a package for that before it imports another module of it: so an import, too, makes it whole."""
    loading = threading.RLock()

    def complete(name: str) -> Any:  # called for an attribute that is not there (PEP 562)
        is_asked_of_any_module = name.startswith("__") and name not in ("__path__", "__version__")
        with loading:
            if not is_asked_of_any_module and "__path__" not in vars(package):
                importlib.reload(package)  # sets the path, and then runs the package's code
                tf.disable_eager_execution()  # which has switched it on
        if name in vars(package):
            return vars(package)[name]
        raise AttributeError(f"module 'tensorflow' has no attribute {name!r}")

    package.__getattr__ = complete
    del package.__path__


def _slim_namespace(package: ModuleType) -> SimpleNamespace:
    """Do what ``tensorflow/__init__.py`` does, as far as it matters here; raises when that cannot be done."""
    folders = [os.path.join(path, "tensorflow-plugins") for path in sys.path]
    folders += [os.path.join(path, "core", "kernels") for path in package.__path__]
    variables = ("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "TF_USE_MODULAR_FILESYSTEM")
    if found := [*filter(os.path.isdir, folders), *filter(os.environ.get, variables)]:
        raise ImportError(f"{found} make it load other libraries")
    os.environ["TF2_BEHAVIOR"] = "1"  # some modules look at it when they are imported
    importlib.import_module("tensorflow.python.pywrap_tensorflow")  # comes first: it loads the C++ library
    version = importlib.import_module("tensorflow.python.framework.versions").VERSION
    if not version.startswith(VERSIONS):
        raise ImportError(f"it is {version}, and not {VERSIONS}x")
    importlib.import_module("tensorflow.python.compat.v2_compat").enable_v2_behavior()
    for place in MODULES:
        importlib.import_module(f"tensorflow.{place}")
    tf = SimpleNamespace()
    for place, names in NAMES.items():
        module = importlib.import_module(f"tensorflow.{place}")
        for entry in names.split():
            name, _, other = entry.partition("=")
            *scope, last = name.split(".")
            owner = functools.reduce(lambda owner, part: vars(owner).setdefault(part, SimpleNamespace()), scope, tf)
            setattr(owner, last, getattr(module, other or last))
    return tf


def session_config(tf, addresses: list[str], options: Options, runs_python: bool):
    """The one session config: variables live on the ``ps`` tasks and are shared by all sessions made with it; without
    ``addresses`` they live in this process.

    The TF servers know nothing of each other; each session brings the cluster along. Without ``share_session_state``
    each would get a private copy of the server's state. Deadlines are kept outside of TensorFlow. The timeout, far
    behind them, is for what waits for a server that is gone, be it the end of a session: it would wait for ever.
    """
    if not addresses:
        return server_config(tf, options, runs_python)
    config = tf.ConfigProto(
        allow_soft_placement=True,
        operation_timeout_in_ms=int(1000 * (options.timeout_s + LOST_LIMIT_S)),
        experimental=tf.ConfigProto.Experimental(share_session_state_in_clusterspec_propagation=True),
    )
    config.cluster_def.job.add(name="ps", tasks=dict(enumerate(addresses)))
    return config


def server_config(tf, options: Options, runs_python: bool):
    """Thread and GPU limits, for a server or a local session; a session on a server ignores them (tensorflow#4455).

    Python functions that wait for another server have threads beside those that compute, else they wait for themselves.
    """
    waiting = REMOTE_CALLS_AT_ONCE * options.workers if runs_python else 0
    return tf.ConfigProto(
        intra_op_parallelism_threads=options.threads,
        inter_op_parallelism_threads=options.compute_threads + waiting,
        gpu_options=tf.GPUOptions(allow_growth=True),
        allow_soft_placement=True,
    )


def rerun_refused(run: Callable, *arguments: Any) -> Any:
    """What ``run`` returns; a parameter server refuses one run in 43,000, as one that it has had before.

    It knows the last 100,000 runs by a number each, which a run's thread draws first thing, from a generator seeded
    with 32 bits (TensorFlow's ``GetUniqueRequestId``). A run that is refused as a worker's has done nothing, so it is
    run again. Not one that is refused as a master's: that one TensorFlow itself has sent again, see Graph.run.
    """
    for is_last in (False, False, True):
        try:
            return run(*arguments)
        except Exception as error:
            if is_last or "(Worker) request was received twice" not in str(error):
                raise


# tensorflow::error::Code to HTTP status, as TensorFlow Serving has it; any other is 500
STATUS = {1: 499, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 14: 503, 16: 401}


def failure_of(error: Exception) -> ModelError:
    """What a run raises when TensorFlow raised this. Our own Python functions in graphs fail with "HTTP 503: why"."""
    if ours := re.search(r"RuntimeError: HTTP ([45]\d\d): (.*)", str(error)):
        return ModelError(ours[2], int(ours[1]))
    if isinstance(error, UnicodeDecodeError):  # what was wrong with a request's bytes has no code any more
        return ModelError(first_sentence(error), 400)
    return ModelError(first_sentence(error), STATUS.get(getattr(error, "error_code", None), 500))
