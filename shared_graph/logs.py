"""The log lines of a program, and its open files."""

from __future__ import annotations

import gc
import logging
import resource
import sys

from shared_graph.options import Options

log = logging.getLogger(__name__)


def start_program(front_end: Options | None = None) -> None:
    """One log line an event, on standard error; as many open files as the system allows: each client needs one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2**16), most))
    gc.freeze()  # Ray's objects: a sixth of the adds of 256 clients, for looking whether they are garbage
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("shared_graph").setLevel(logging.INFO)
    if front_end:
        log.info("starting; http://%s:%d answers 503 until a worker is ready", front_end.host, front_end.port)
