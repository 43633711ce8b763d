"""TensorFlow graphs, shared by many processes through Ray, served to many requests at once.

    front end ──> Cluster ──> Batcher ──> round robin ──> Worker actor ──> session.run ──> ParameterServer actor(s)
    HTTP in and out           gathers what        decodes, merges, runs,           variables, tables, kernels;
                              queued up           splits, encodes                  the first one loads and keeps

A Ray *parameter server* actor holds the only copy of a ``tf.compat.v1`` graph's variables. *Worker* actors each build
the same graph against it (between-graph replication) and run it asynchronously. A *front end* gathers concurrent
requests into batches and hands them round-robin to the workers. From the bottom up; each imports only from those above:

    errors, wire, models, options             what everybody says: errors, frames, models and arrays, options
    ray_runtime, tensorflow_runtime           Ray and TensorFlow, each started in one place
    adder, checkpoints, variables             the built-in model; variables in files, and behind an output
    graph, merging                            a model's graph in one process; which of its signatures may share runs
    json_codec, rest_api, remote_predict_op   TensorFlow Serving's REST contract, both ends
    batch_runner, version_manager             what a worker does with a batch; what is served
    parameter_server, worker                  the two actors
    batcher, status, supervisor, cluster      what a front end's process has: queues, knowledge, actors' lives, calls
    files, http_api, logs                     what the scripts need beside it

One ring is not seen in the imports: the parameter server calls ``worker.start``, which calls the former's ``start``.
The process that imports this never imports tensorflow, and nothing starts before a ``Cluster`` does.
"""

import importlib
import os

# Ray reads these two when it is imported, and never again.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # else it takes SIGTERM from whoever handles it
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")  # a paragraph; we have a line for it

_MODULES = {
    "Cluster": "cluster",
    "DeadlineExceeded": "errors",
    "Error": "errors",
    "InvalidRequest": "errors",
    "ModelError": "errors",
    "OptionError": "errors",
    "Options": "options",
    "TensorFlowVariables": "variables",
    "Unavailable": "errors",
    "WorkerLost": "errors",
    "remote_predict": "remote_predict_op",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """Imported on first use, so that an actor that needs the adder does not import the cluster."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
