"""What can go wrong, as one tree; each message is one sentence that says what happened and what to do.

Error 500
├── OptionError          an option has a value that is not allowed
├── InvalidRequest 400   the request can never succeed as it is
├── Unavailable 503      not now, but perhaps soon
│   └── ActorUnavailable   an actor's process is gone; Ray starts it anew, or (``is_final``) never will
├── WorkerLost 502       a change that was asked for may have been applied
├── DeadlineExceeded 504 the answer did not come in time
└── ModelError 500       the model itself failed, with the status that TensorFlow Serving has for its error
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class Error(Exception):
    """Base of all errors that this project raises on purpose. ``status`` is its HTTP status code."""

    status = 500

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message.encode(errors="replace").decode())  # JSON may have brought half a surrogate pair
        self.status = status or self.status

    def __reduce__(self):
        return type(self), (str(self), self.status)


class OptionError(Error):
    """An option has a value that is not allowed."""


class InvalidRequest(Error):
    """The request can never succeed as it is: it is wrong in itself, or names what does not exist."""

    status = 400


class Unavailable(Error):
    """Not now, but perhaps soon: the cluster is starting, stopping, or has too much to do."""

    status = 503


class ActorUnavailable(Unavailable):
    """An actor could not be called. ``is_final``: it never comes back; else it does, unless Ray itself has ended."""

    is_final = False


class WorkerLost(Error):
    """A worker or its parameter server went away meanwhile; a change that was asked for may have been applied."""

    status = 502


class DeadlineExceeded(Error):
    """The request's deadline passed before its answer came."""

    status = 504


class ModelError(Error):
    """The model itself failed: on this request, or when it was loaded."""


NOISE = re.compile(
    r'([A-Z_]+: )?From /job:|=+$|\[\[|Graph execution error:|Detected at node|Node:|Traceback|File "|Original stack'
    r"|\d+ root error\(s\)"
)


def first_sentence(error: BaseException | str) -> str:
    """A message without what TensorFlow puts around it: "From /job:...", the nodes, the traces."""
    if isinstance(error, UnicodeDecodeError):  # TensorFlow's message has bytes of a request that are no UTF-8
        error = error.object.decode(errors="replace")
    text = re.sub(r"^Detected at node .*?^Node: [^\n]*", "", str(error)[:10_000], flags=re.S | re.M)  # with a trace
    lines = [line for line in map(str.strip, text.splitlines()) if line and not NOISE.match(line)]
    if not lines:
        return type(error).__name__
    line = re.sub(r"^\(0\) [A-Z_]+: ", "", lines[0])  # of several errors
    line = re.sub(r"\{\{function_node [^}]*\}\} ?", "", line)  # TensorFlow tells it once for each level
    line = re.sub(r"\{\{node ([^}]*)\}\}", r"\1", line)
    return re.sub(r" ?\[\[[^\]]*\]\]", "", line)[:1000]


@contextlib.contextmanager
def as_own_errors(what: str) -> Iterator[None]:
    """Other libraries' errors become an Error of text alone, so that no process has to import what raised them."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise Error(f"{what}: {type(error).__name__}: {first_sentence(error)}") from None
