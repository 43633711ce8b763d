"""The connection of a front end to a worker, and the requests that wait for it and travel on it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from shared_graph.bodies import HttpBody
from shared_graph.models import ModelVersion, VersionChoice
from shared_graph.options import MAX_BATCHES_IN_FLIGHT
from shared_graph.slots import Slots
from shared_graph.wire import Answers, read_frame, to_frame

SIGNATURE_HINT = re.compile(rb'"signature_name"\s*:\s*"([^"\\]{1,100})"|^(?:.*&)?signature_name=([^&]{1,100})')
HINT_BYTES = 2000  # at each end of a body, in which the hint is looked for


class QueueKey(NamedTuple):
    """Requests with the same key wait in one queue, and travel together."""

    model: str
    choice: VersionChoice
    signature_hint: str
    worker: int | None  # the one that is to do it, if it matters


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One caller's request on its way to a worker, and ``future``, for which the caller waits."""

    key: QueueKey
    version: ModelVersion
    verb: str
    body: Any
    future: asyncio.Future
    size_bytes: int
    begun: float
    is_patient: bool  # its deadline counts from when it is sent
    deadline: float = 0.0
    timer: asyncio.TimerHandle | None = None  # that ends the wait at the deadline
    is_sent: bool = False
    sent_at: float = 0.0
    is_repeated: bool = False  # a worker that had it was lost


@dataclasses.dataclass(eq=False, slots=True)
class Queue:
    """Requests that wait, the first one first, and a timer that calls ``dispatch`` when they may be due."""

    dispatch: Callable[[], None]
    requests: collections.deque[Request] = dataclasses.field(default_factory=collections.deque)
    timer: asyncio.Handle | None = None
    rings_at: float = math.inf

    def set_timer(self, when: float) -> None:
        """Dispatch then, unless that is to happen sooner already."""
        if when < self.rings_at:
            self.stop_timer()
            self.rings_at = when
            self.timer = asyncio.get_running_loop().call_at(when, self._ring)

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self.rings_at:  # uvloop counts milliseconds, and is early by up to one
            self.timer = loop.call_later(0.001, self._ring)
            return
        self.rings_at = math.inf
        self.dispatch()

    def stop_timer(self) -> None:
        self.rings_at = math.inf
        if self.timer is not None:
            self.timer.cancel()


class WorkerConnection:
    """The connection of this process to one life of a worker. ``closed`` is done when it is gone."""

    def __init__(
        self,
        index: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        receive: Callable[[WorkerConnection, Answers], None],
        remove: Callable[[WorkerConnection], None],
    ):
        """``receive`` is called with each message that comes, ``remove`` when the connection is gone."""
        self.index = index
        self.is_hung = False  # it gets no new work unless there is no other
        self.was_ended = False  # for silence: what it had may have been the reason, and is not run again
        self.in_flight: dict[int, tuple[QueueKey, dict[int, Request]]] = {}  # by batch, what is not answered yet
        self.slots = Slots(MAX_BATCHES_IN_FLIGHT)
        self._writer, self._batch_ids = writer, itertools.count()
        self.closed = asyncio.create_task(self._listen(reader, receive, remove))

    def send(self, key: QueueKey, requests: list[Request], now: float) -> None:
        """Raises whatever pickling raises; then nothing has been sent. What is in flight when it is gone, is lost."""
        batch_id = next(self._batch_ids)
        contents = [(r.verb, r.body, r.deadline - now, r.is_repeated) for r in requests]
        frame = to_frame((batch_id, (key.model, key.choice), key.signature_hint, contents))
        self.in_flight[batch_id] = key, dict(enumerate(requests))
        self.slots.take(key)
        with contextlib.suppress(RuntimeError):  # uvloop's, once it is closed: ``_listen`` is about to see that
            self._writer.writelines(frame)

    @property
    def unanswered(self) -> int:
        """How many requests the worker has. For any thread."""
        return sum(len(batch) for _, batch in list(self.in_flight.values()))

    def close(self) -> None:
        """At once: a worker that reads nothing any more holds nobody up."""
        self._writer.transport.abort()

    async def _listen(self, reader: asyncio.StreamReader, receive: Callable, remove: Callable) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    receive(self, Answers._make(await read_frame(reader)))
        finally:
            self._writer.close()
            remove(self)


def hint_of(version: ModelVersion, body: Any) -> str:
    """The signature that is asked for, as far as it is seen without reading a body: for whose turn it is, no more."""
    signatures = version.loaded.metadata["signature_def"]["signature_def"]
    if len(signatures) == 1:
        return ""
    if isinstance(body, HttpBody):
        content = body.content
        ends = (content,) if len(content) <= 2 * HINT_BYTES else (content[:HINT_BYTES], content[-HINT_BYTES:])
        match = next(filter(None, map(SIGNATURE_HINT.search, [*ends, body.query.encode()])), None)
        hint = (match[1] or match[2]).decode(errors="replace") if match else ""
    else:
        hint = body[0] if isinstance(body, tuple) else ""
    return hint if hint in signatures and hint != "serving_default" else ""  # which nobody need name


def size_of(body: Any) -> int:
    """Roughly the bytes that travel: an HTTP body's, or those of arrays."""
    if isinstance(body, HttpBody):
        return len(body.content) + len(body.query)
    arrays = body[1] if isinstance(body, tuple) else 0
    return sum(getattr(array, "nbytes", 0) for array in (arrays.values() if isinstance(arrays, dict) else [arrays]))
