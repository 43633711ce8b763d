"""Starts Ray; finds and calls actors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from typing import Any

import ray
from ray._private import ray_constants

from shared_graph.errors import Unavailable, first_sentence
from shared_graph.options import Options


def about_this_actor() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
        "gpus": ray.get_gpu_ids(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


async def find_actor(name: str, namespace: str):
    """Raises ValueError when there is none."""
    return await asyncio.to_thread(ray.get_actor, name, namespace)


async def call(reference):
    """The value of a Ray call; an error of ours arrives as it was raised."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


# For the Ray that we start.
RAY_SETTINGS = {
    "worker_niceness": 0,  # else actors, at nice 15, starve beside a busy web process
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,  # no process that waits for tasks
    "raylet_client_connect_timeout_milliseconds": 20,  # else a first attempt that comes too early costs a second
    "raylet_client_num_connect_attempts": 500,
    "gcs_rpc_server_connect_timeout_s": 3,  # a worker that starts looks four times for a Ray that has been killed,
    "gcs_rpc_server_reconnect_timeout_s": 3,  # and one that runs once
    "task_events_report_interval_ms": 0,
    "enable_timeline": False,  # nobody asks for these, and they cost
    "enable_metrics_collection": False,
    "event_stats": False,
}


@contextlib.contextmanager
def ray_runtime(options: Options):
    """Ray for as long as the block runs: the cluster at ``options.address``, one that runs in this process already, or
    a local one of our own that listens on 127.0.0.1 alone and leaves no process and no file behind."""
    if ray.is_initialized():
        yield
        return
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the package's parent
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
            where = {
                "address": "local",
                "num_cpus": options.threads,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                "_temp_dir": os.path.join(folder, "r"),  # with room for sockets
                "_system_config": dict(RAY_SETTINGS),
            }  # to which Ray adds this folder
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
