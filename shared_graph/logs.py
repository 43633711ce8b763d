"""The log lines of a program, its open files, and the address that it listens on."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import sys

from shared_graph.errors import OptionError

log = logging.getLogger(__name__)

BACKLOG = 2048  # clients that wait to be let in


def show_log() -> None:
    """One line an event, on standard error, with date and level; unless the program has its own way to show them."""
    ours = logging.getLogger("shared_graph")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
    if not ours.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        ours.addHandler(handler)
        ours.propagate = False  # else each line comes twice once somebody sets up the root logger


def start_program() -> None:
    """Set up this process: open files up to the system's limit or 65,536, since each client needs one; little garbage
    collection; the log; SIGHUP ends it as SIGTERM does; and closed standard streams go to /dev/null."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # as nohup leaves it, it is ignored
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # the terminal has been closed
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2**16), most))
    gc.freeze()  # Ray's objects: to look whether they are garbage took a sixth of the adds of 256 clients
    gc.set_threshold(20_000)  # and to look at those of requests under way, once for 700 new ones, another fifth
    show_log()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a busy port is told before anything starts. Raises OptionError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        is_dual = host == "::" and socket.has_dualstack_ipv6()  # any address is one of the older kind, too
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        what = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise OptionError(f"--host {host} --port {port} cannot be listened on: {what.lower()}") from None
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    log.info("http://%s:%d answers 503 until a worker is ready", shown, port)
    return listener


def counted(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
