"""Gathers concurrent requests before they travel, and hands them to the workers round-robin."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import math
import os
import time
from typing import Any

from shared_graph.errors import DeadlineExceeded, Error, Unavailable, WorkerLost
from shared_graph.models import Key, Model
from shared_graph.options import PLACES, Options
from shared_graph.wire import read_frame, to_frame


class Line:
    """The connection of this process to one life of a worker. ``closed`` is done when it is gone."""

    def __init__(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, batcher: Batcher):
        self.index = index
        self.is_hung = False  # it gets no new work unless there is no other
        self.trips: dict[int, dict[int, Request]] = {}  # what is not answered yet
        self.writer, self._numbers = writer, itertools.count()
        self.closed = asyncio.create_task(self._listen(reader, batcher))
        batcher.add(self)

    def send(self, key: Key, requests: list[Request]) -> None:
        number, now = next(self._numbers), time.monotonic()
        self.trips[number] = dict(enumerate(requests))
        contents = [(request.verb, request.body, request.deadline - now, request.is_repeated) for request in requests]
        self.writer.writelines(to_frame((number, key, contents)))

    async def _listen(self, reader: asyncio.StreamReader, batcher: Batcher) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                number, answers = await read_frame(reader)
                trip = self.trips.get(number, {})
                for index, answer in answers.items():
                    if request := trip.pop(index, None):
                        batcher.resolve(request, answer)
                if not trip and self.trips.pop(number, None) is not None:
                    batcher.dispatch()
        self.writer.close()
        batcher.remove(self)


TRIP_BYTES = 2**25  # most that requests which travel together have together
HELD_BYTES = 2**28  # most that all requests have which are not answered
BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, math.inf)  # of the histogram of answers


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One caller's request on its way to a worker, and ``future``, for which the caller waits."""

    key: Key
    model: Model
    worker: int | None  # the one that is to do it, if it matters
    verb: str
    body: Any
    future: asyncio.Future
    size_bytes: int
    deadline: float
    timer: asyncio.TimerHandle | None = None  # that ends the wait at the deadline
    is_repeated: bool = False  # a worker was lost that had it


class Batcher:
    """Whatever queued up while the last batches ran is the next batch. Lives in one event loop; nothing here waits.

    Requests for one model travel together, ``max_batch`` at most. Every request has its answer at the latest when its
    deadline has passed. What a lost worker had to do runs once more elsewhere, but for adds.
    """

    def __init__(self, options: Options):
        self.options = options
        self.lines: list[Line] = []  # to the workers that can be called; whose turn it is comes first
        self.held_bytes = 0  # of the requests that are not answered
        self.answered: collections.Counter[tuple[str, str]] = collections.Counter()  # by model and verb
        self.took: collections.Counter[float] = collections.Counter()  # by bucket
        self.took_s = 0.0
        self._queues = collections.defaultdict(collections.deque)  # by key and worker
        # while one runs, decoding the next one takes processor time from it where there is hardly any to spare
        self.at_once = PLACES if os.cpu_count() > 2 else 1
        self._is_due, self._closed = False, None

    @property
    def waiting(self) -> int:
        """Requests that are not sent yet."""
        return sum(map(len, self._queues.values()))

    async def submit(self, key: Key, model: Model, verb: str, body: Any, worker: int | None = None) -> Any:
        """The answer to a request, which waits in its queue first. Raises Error."""
        if self._closed:
            raise self._closed.with_traceback(None)
        if self.waiting >= self.options.max_queue or self.held_bytes > HELD_BYTES:
            raise Unavailable(f"Too many requests are waiting already ({self.waiting}); try again later.")
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self.options.timeout_s
        request = Request(key, model, worker, verb, body, loop.create_future(), size_of(body), deadline)
        request.timer = loop.call_later(self.options.timeout_s, self._end_wait, request)
        self.held_bytes += request.size_bytes
        self._queues[key, worker].append(request)
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self.dispatch)  # after all that is ready in this turn of the loop
        return await request.future

    def resolve(self, request: Request, answer: Any) -> None:
        """Give a caller the answer, unless there is one or nobody waits for it any more."""
        self.held_bytes, request.size_bytes = self.held_bytes - request.size_bytes, 0
        request.timer.cancel()
        if request.future.done():
            return
        if isinstance(answer, Exception):
            return request.future.set_exception(answer)
        request.future.set_result(answer)
        seconds = time.monotonic() - request.deadline + self.options.timeout_s
        self.answered[request.key[0], request.verb] += 1
        self.took[next(end for end in BUCKETS_S if seconds <= end)] += 1
        self.took_s += seconds

    def add(self, line: Line) -> None:
        self.lines.insert(0, line)
        self.dispatch()

    def remove(self, line: Line) -> None:
        """It is gone. What it had runs once more elsewhere, or is answered with why it cannot."""
        if line in self.lines:
            self.lines.remove(line)
        for request in reversed([request for trip in line.trips.values() for request in trip.values()]):
            if request.verb == "add" or request.is_repeated:
                why = "a change that was asked for may or may not have been applied"
                self.resolve(request, WorkerLost(f"Worker {line.index} was lost; {why}."))
            else:
                request.is_repeated = True
                self._queues[request.key, request.worker].appendleft(request)
        line.trips.clear()
        self.dispatch()

    def close(self, error: Error | None) -> None:
        """Answer all that is left, and whatever comes, with this; until called with None."""
        self._closed = error
        under_way = [trip.values() for line in self.lines for trip in line.trips.values()]
        for request in itertools.chain(*self._queues.values(), *under_way) if error else ():
            self.resolve(request, error)
        self.dispatch()  # which drops what has its answer

    def _end_wait(self, request: Request) -> None:
        message = f"No answer within the deadline of {self.options.timeout_s:g} s"
        self.resolve(request, DeadlineExceeded(f"{message}; a change that was asked for may have been applied."))
        self.dispatch()  # which drops it from its queue

    def dispatch(self) -> None:
        """Send all batches that are due to workers that have a place. Models take turns, and so do workers."""
        self._is_due, keys = False, collections.deque(self._queues)
        while keys:
            key = keys.popleft()
            if batch := self._next_batch(*key):
                line, requests = batch
                self.lines.remove(line)
                self.lines.append(line)
                line.send(key[0], requests)
                keys.append(key)

    def _next_batch(self, key: Key, worker: int | None) -> tuple[Line, list[Request]] | None:
        """What of this queue is to be sent now, and to whom; if it is due, and there is a place for it."""
        queue = self._queues[key, worker]
        while queue and queue[0].future.done():  # nobody waits for it any more
            self.resolve(queue.popleft(), None)
        if not queue:
            del self._queues[key, worker]
            return None
        model = queue[0].model
        lines = [line for line in self.lines if worker in (None, line.index)]
        lines = [line for line in lines if not line.is_hung] or lines
        lines = [line for line in lines if len(line.trips) < PLACES]
        if not lines:
            return None
        is_one_run, count = model.merged and self.options.placement == "shared", len(queue)
        if not is_one_run:  # all workers get their part
            count = -(-count // sum(PLACES - len(line.trips) for line in lines))
        under_way = [
            next(iter(trip.values())) for line in self.lines if not line.is_hung for trip in line.trips.values()
        ]
        if model.merged and count < self.options.max_batch:
            early_s = queue[0].deadline - self.options.timeout_s + self.options.batch_wait_ms / 1000 - time.monotonic()
            if early_s > 0:
                asyncio.get_running_loop().call_later(early_s, self.dispatch)
                return None
            if is_one_run and [other.key for other in under_way].count(key) >= self.at_once:  # more would be smaller
                return None
        if model.calls_out and sum(other.model.calls_out for other in under_way) >= PLACES * len(self.lines) - 1:
            return None  # what it waits for may need a place, too
        requests, size_bytes = [], 0
        while queue and len(requests) < min(count, self.options.max_batch) and size_bytes < TRIP_BYTES:
            request = queue.popleft()
            if request.future.done():
                self.resolve(request, None)
            else:
                size_bytes += request.size_bytes
                requests.append(request)
        return lines[0], requests


def size_of(body: Any) -> int:
    """Roughly the bytes that travel: an HTTP body's, or those of arrays."""
    first, second = body if isinstance(body, tuple) else (b"", 0)
    arrays = second.values() if isinstance(second, dict) else [second]
    return len(first) + sum(getattr(array, "nbytes", 0) for array in arrays)
