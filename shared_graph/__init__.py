"""TensorFlow graphs, shared by many processes through Ray, served to many requests at once.

    front end ──> Cluster ──> Batcher ──> round robin ──> Worker actor ──> session.run ──> ParameterServer actor(s)
    HTTP in and out           gathers what        decodes, merges, runs,           variables, tables, kernels;
                              queued up           splits, encodes                  the first one loads and keeps

A Ray *parameter server* actor holds the only copy of a ``tf.compat.v1`` graph's variables. *Worker* actors each build
the same graph against it (between-graph replication) and run it asynchronously. A *front end* gathers concurrent
requests into batches and hands them round-robin to the workers. From the bottom up; each imports only from those above:

    errors, wire, threads, memory             what everybody uses: errors, frames, threads, memory given back
    logs                                      log lines, open files, the address to listen on
    model_source, models, options             models, their sources and arrays; one dataclass for all options
    handles                                   actors as others hold them: found, called, ended
    ray_runtime, tensorflow_runtime           Ray and TensorFlow, each started in one place
    adder, checkpoints, bundles, load_marks   the built-in model; variables, graphs and marks of loading, in files
    graph_definition, saved_variables         what is read from a graph's definition; what of a SavedModel is restored
    functions                                 what a function has made
    variables, graph                          a model's graph in one process, and the variables behind its outputs
    merging                                   which of its signatures may share runs
    bodies, json_codec, npy_codec, rest_api   TensorFlow Serving's REST contract: bodies in, answers out
    remote_predict_op                         another server's model as an operation
    slots, batch_runner                       whose turn it is; what a worker does with a batch
    version_manager, loader                   what is served, and how it is loaded
    parameter_server, replica, worker, actors  the two actors, and what a worker has of the parameter server
    pace, connection, batcher                 a front end's requests on their way to the workers
    metrics, status, supervisor               what a front end's process counts and knows; which actors live
    home_loop, mapping, cluster               the calls, from any thread or event loop
    progress, files                           whole files, and how far they are
    http_api, messages                        what front ends answer, over HTTP and on a WebSocket
    http_server, web_socket                   the program and server of either front end; Starlette's WebSocket

The imports do not show one ring: the parameter server calls a worker's ``sync``, a worker the server's ``report``.
Neither this import nor a front end imports tensorflow, and nothing starts before a ``Cluster`` does.
"""

import importlib
import os

# Ray reads these two when it is imported, and never again.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # else it takes SIGTERM from whoever handles it
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")  # a paragraph; we have a line for it

_NAMES = {
    "cluster": ["Cluster"],
    "errors": ["DeadlineExceeded", "Error", "InvalidRequest", "ModelError", "OptionError", "Unavailable", "WorkerLost"],
    "options": ["Options"],
    "remote_predict_op": ["remote_predict"],
    "variables": ["TensorFlowVariables"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """Imported on first use, so that an actor that needs the adder does not import the cluster."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
