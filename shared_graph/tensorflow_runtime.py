"""Imports TensorFlow, in the actors alone, and configures its sessions and servers."""

from __future__ import annotations

import functools
import gc
import os
import sys

from shared_graph.options import MAX_BATCHES_IN_FLIGHT, REMOTE_CALLS_AT_ONCE, Options


@functools.cache  # what it does beside the import takes 10 us, and freezing twice makes every graph immortal
def import_tensorflow():
    """``tensorflow.compat.v1``, imported here and nowhere else, in the actors alone."""
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):  # break loopback gRPC (tensorflow#50626)
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()  # and not disable_v2_behavior(), which brings reference variables back
    tf.get_logger().setLevel("ERROR")
    gc.freeze()  # a look at all of TensorFlow's objects would stop requests for a tenth of a second, now and then
    sys.setswitchinterval(0.001)  # requests wait for Python's lock while another thread builds a new version's graph
    return tf


def session_config(tf, addresses: list[str]):
    """The one session config: variables live on the ``ps`` tasks and are shared by all sessions made with it.

    The TF servers know nothing of each other; each session brings the cluster along. Without ``share_session_state``
    each would get a private copy of the server's state. No timeout: deadlines are kept outside of TensorFlow.
    """
    config = tf.ConfigProto(
        allow_soft_placement=True,
        experimental=tf.ConfigProto.Experimental(share_session_state_in_clusterspec_propagation=True),
    )
    config.cluster_def.job.add(name="ps", tasks=dict(enumerate(addresses)))
    return config


def server_config(tf, options: Options, runs_python: bool):
    """Thread and GPU limits, for a server or a local session; a session on a server ignores them (tensorflow#4455).

    As many inter-op threads as there can be runs, else slow ones stop all others; Python functions that wait for
    another server have more runs, else they wait for themselves; and there is one thread in which a new version can be
    restored while others compute.
    """
    runs = options.workers * (MAX_BATCHES_IN_FLIGHT + (REMOTE_CALLS_AT_ONCE if runs_python else 0))
    return tf.ConfigProto(
        intra_op_parallelism_threads=options.threads,
        inter_op_parallelism_threads=options.threads + runs + 1,
        gpu_options=tf.GPUOptions(allow_growth=True),
        allow_soft_placement=True,
    )
