"""What can go wrong, as one tree; each message is one sentence that says what happened and what to do."""

from __future__ import annotations

import re


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
