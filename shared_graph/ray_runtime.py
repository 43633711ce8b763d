"""Starts Ray, once for all clusters of a process; and watches it, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future
from typing import Any

import ray
from ray._private import ray_constants

from shared_graph.errors import Error, Unavailable, first_sentence
from shared_graph.options import Options

log = logging.getLogger(__name__)

# For the Ray that we start.
RAY_SETTINGS = {
    "memory_monitor_refresh_ms": 0,  # it ends actors where 95 % of the memory is used, be it by others
    "worker_niceness": 0,  # else actors, at nice 15, starve beside a busy web process
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,  # no process that waits for tasks
    "worker_maximum_startup_concurrency": 8,  # else one actor after another, where there is one CPU
    "raylet_client_connect_timeout_milliseconds": 20,  # else a first attempt that comes too early costs a second
    "raylet_client_num_connect_attempts": 500,
    "gcs_rpc_server_connect_timeout_s": 3,  # a worker that starts looks four times for a Ray that has been killed,
    "gcs_rpc_server_reconnect_timeout_s": 3,  # and one that runs once
    "timeout_ms_task_wait_for_death_info": 50,  # a call of an actor that is just brought back fails after this, and at
    "core_worker_internal_heartbeat_ms": 200,  # the next of these beats; else both take a second
    "task_events_report_interval_ms": 0,
    "enable_timeline": False,  # nobody asks for these, and they cost
    "enable_metrics_collection": False,
    "event_stats": False,
}
_lock = threading.Lock()
_users = 0  # clusters that hold the Ray that we have started
_address: str | None = None  # of that one
_ended = threading.Event()  # set when none does any more
_owner: threading.Thread | None = None  # Ray's processes end with the thread that has started them
_is_inherited = False  # Ray runs in the process that this one was forked from, and can neither run nor begin here


def _note_fork() -> None:
    global _lock, _users, _is_inherited
    _lock, _users, _is_inherited = threading.Lock(), 0, ray.is_initialized()


os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def ray_runtime(options: Options) -> Iterator[None]:
    """Ray for as long as the block runs: one that runs in this process already, be it the user's or another cluster's,
    else the cluster at ``options.address``, or a local one of our own. Raises Unavailable."""
    global _users, _address, _owner, _ended
    if _is_inherited:
        why = "This process was forked from one in which Ray runs, and so cannot have a cluster"
        raise Unavailable(f"{why}: use multiprocessing's spawn, or fork before the cluster starts.")
    with _lock:
        is_ours = _users > 0 or not ray.is_initialized()  # else it is the user's, and not ours to end
        if is_ours:
            if _users and options.address not in (None, _address):
                raise Unavailable(f"This process runs on another Ray already, not on {options.address}.")
            if _users == 0:
                _address = options.address
                started, _ended = Future(), threading.Event()
                _owner = threading.Thread(target=_own_ray, args=[options, started, _ended], daemon=True)
                _owner.start()
                try:
                    started.result()
                except Exception:
                    _owner.join()
                    raise
            _users += 1
    try:
        yield
    finally:
        if is_ours:
            with _lock:
                _users -= 1
                if _users == 0:
                    _ended.set()
                    _owner.join()


def _own_ray(options: Options, started: Future, ended: threading.Event) -> None:
    try:
        with joined_ray(options) if options.address else local_ray(options):
            started.set_result(None)
            ended.wait()
    except Exception as error:
        if started.done():
            log.error("Ray did not end in order", exc_info=error)
        else:
            why = f"Ray could not be started: {first_sentence(error)}"
            started.set_exception(error if isinstance(error, Error) else Unavailable(why))


def variables_of_actors() -> dict[str, str]:
    """So that actors find modules where this process does."""
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [parent, *(path or os.getcwd() for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix)))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


@contextlib.contextmanager
def joined_ray(options: Options) -> Iterator[None]:
    """A connection to the Ray cluster at ``options.address``."""
    try:
        check_address(options.address)
        start_ray(address=options.address, runtime_env={"env_vars": variables_of_actors()})
        yield
    except ConnectionError as error:
        reason = f"{first_sentence(error)} (if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        raise Unavailable(f"No Ray cluster answers at {options.address!r}: {reason}") from None
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises ConnectionError where nobody listens: Ray would try for a quarter of an hour, and nothing would end it."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():  # else it is "auto", or Ray's client, which give up by themselves
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None


@contextlib.contextmanager
def local_ray(options: Options) -> Iterator[None]:
    """A Ray of our own that listens on 127.0.0.1 alone and leaves no process and no file behind."""
    temporary, is_clustered = tempfile.gettempdir(), ray_constants.ENABLE_RAY_CLUSTER
    is_short = temporary.isascii() and len(temporary) < 18  # as Ray's sockets need it
    folder = tempfile.mkdtemp(prefix="ray_tensorflow_", dir=temporary if is_short else "/tmp")
    try:
        if shutil.disk_usage(folder).free < 2**20:  # Ray would try for ever
            where = f"Less than 1 MiB is free in {os.path.dirname(folder)}"
            raise Unavailable(f"{where}: make room, or set TMPDIR, to a folder of less than 18 characters.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            if os.environ.get(name) == "":  # which Ray takes for no authentication, and for no token
                del os.environ[name]
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):  # else it is written to the home folder
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray_constants.ENABLE_RAY_CLUSTER = False  # of several nodes: nothing else keeps all of Ray on 127.0.0.1
        os.mkdir(os.path.join(folder, "t"))
        variables = variables_of_actors() | {
            "KERAS_HOME": os.path.join(folder, "keras"),  # else Keras makes a folder at home
            "RAY_gcs_server_port_wait_time_s": "15",  # for so long all threads stand still when it ends while it starts
            "PYTHONOPTIMIZE": "",  # at 2 Ray's agents fail, which need docstrings, and Ray with them
            "TMPDIR": os.path.join(folder, "t"),  # what actors leave when they are killed is gone at the end
        }
        with in_environment(variables):
            start_ray(
                address="local",
                num_cpus=options.threads,
                include_dashboard=False,
                object_store_memory=80 * 2**20,
                _temp_dir=os.path.join(folder, "r"),
                _system_config=dict(RAY_SETTINGS),  # to which Ray adds this folder
            )
        yield
    finally:
        try:
            ray.shutdown()
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = is_clustered
            shutil.rmtree(folder, ignore_errors=True)


def start_ray(**where: Any) -> None:
    ray.init(log_to_driver=False, logging_level="CRITICAL", **where)


@contextlib.contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """``variables`` are in the environment of processes that the block starts. Ray's own way to set them for actors, a
    runtime environment, costs two seconds of processor time at each start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def watch_ray() -> Awaitable[str]:
    """The name of the first process of our own Ray that ends, as soon as it does: all the rest ends with it."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    for name, pid in _ray_processes():
        with contextlib.suppress(OSError):  # it has ended; or a sandbox has no such descriptors, and all is seen later
            descriptor = os.pidfd_open(pid)
            loop.add_reader(descriptor, lambda name=name: ended.done() or ended.set_result(name))
            ended.add_done_callback(lambda _, d=descriptor: (loop.remove_reader(d), os.close(d)))
    return ended


def _ray_processes() -> Iterator[tuple[str, int]]:
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:
            for pid in map(int, file.read().split()):
                with open(f"/proc/{pid}/comm") as comm:
                    if (name := comm.read().strip()) in ("raylet", "gcs_server"):
                        yield name, pid
