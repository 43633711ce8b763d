"""Gathers concurrent requests before they travel, and hands them to the workers round-robin. No Ray, no TensorFlow.

Whatever queued up while the last batches ran is the next batch. Each signature has a queue, as far as it can be known
without reading a body. Queues take turns: one that was served goes behind all others. All this lives in one event loop,
whose time is the only one there is, and waits for nothing.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

from shared_graph.bodies import PendingBytes
from shared_graph.connection import Queue, QueueKey, Request, WorkerConnection, hint_of, size_of
from shared_graph.errors import DeadlineExceeded, Error, InvalidRequest, Unavailable, WorkerLost
from shared_graph.models import ModelVersion, VersionChoice
from shared_graph.options import MAX_BATCHES_IN_FLIGHT, Options
from shared_graph.pace import Pace
from shared_graph.slots import Recent
from shared_graph.wire import Answers, WorkerInfo

MAX_BATCH_BYTES = 2**25  # of requests that travel together
MOST_PACES = 1000  # of queues, that are kept in mind
SLOW_S = 0.03  # a batch that takes longer may hold up others in the parameter server
LOST_WITHIN_S = 0.2  # in which workers that lose the parameter server are all lost; then what they had is sent again
MAYBE = "a change that was asked for may or may not have been applied"


class Batcher:
    """Every request is answered once, at the latest when its deadline has passed. What a lost worker had to do runs
    once more elsewhere, but for adds, and for what may be why the worker was lost."""

    def __init__(
        self,
        options: Options,
        observe: Callable[[Request, float], None] = lambda request, seconds: None,
        observe_batch: Callable[[str, int], None] = lambda model, count: None,
    ):
        """``observe`` is told of each answer, and how long it took; ``observe_batch`` of what is sent together."""
        self.options = options
        self.connections: list[WorkerConnection] = []  # to workers that can be called; whose turn it is comes first
        self.pending = PendingBytes()  # of requests that are not answered, and of bodies that are still arriving
        self.waiting = 0  # requests that are not sent yet
        self._observe, self._observe_batch = observe, observe_batch
        # whose turn it is comes first
        self._queues = collections.defaultdict[QueueKey, Queue](lambda: Queue(self.dispatch))
        self._recent = Recent()
        self._paces = collections.defaultdict[QueueKey, Pace](Pace)  # also of queues that there were
        # while one runs, decoding the next one takes processor time from it where there is hardly any to spare
        self.max_concurrent_batches = MAX_BATCHES_IN_FLIGHT if os.cpu_count() > 2 else 1
        self._answered_at = -math.inf  # when a caller last got a result
        self._is_scheduled, self._closed, self._repeat_at = False, None, -math.inf

    # -- requests ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        name: str,
        choice: VersionChoice,
        version: ModelVersion,
        verb: str,
        body: Any,
        worker: int | None = None,
        is_patient: bool = False,
    ) -> Any:
        """The answer to a request, which waits in its queue first. One that ``is_patient`` waits there for as long as
        others are answered, and then has the deadline from when it is sent. Raises Error."""
        if self._closed:
            raise self._closed.with_traceback(None)
        size_bytes = size_of(body)
        if not is_patient:  # of which ``map`` has a few under way, however large, and is not to fail half way
            if self.waiting >= self.options.max_queue:
                raise Unavailable(f"Too many requests are waiting already ({self.waiting}); try again later.")
            self.pending.hold(size_bytes)
        loop = asyncio.get_running_loop()
        key, now = QueueKey(name, choice, hint_of(version, body), worker), loop.time()
        request = Request(key, version, verb, body, loop.create_future(), size_bytes, now, is_patient)
        self._set_deadline(request, now)
        self._enqueue(request)
        self._recent.note(key, now)
        if len(self._paces) > MOST_PACES:  # each version that is asked for by its number has a queue of its own
            self._paces.clear()
        self._paces[key].asked(now)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self.dispatch)  # after all that is ready in this turn of the loop
        try:
            return await request.future
        except asyncio.CancelledError:
            if not request.is_sent:
                self.resolve(request, None)
                self.dispatch()
            raise
        finally:
            del request  # what is raised holds this frame by its traceback, and its future holds what is raised

    def resolve(self, request: Request, answer: Any) -> None:
        """Take it out of its queue, and give its caller the answer, unless there is one or nobody waits any more."""
        if not request.is_sent:
            self._leave_queue(request)
        if not request.is_patient:
            self.pending.release(request.size_bytes)
        request.size_bytes = 0
        request.timer.cancel()
        if request.future.done():
            return
        if isinstance(answer, Exception):
            return request.future.set_exception(answer)
        request.future.set_result(answer)
        self._answered_at = asyncio.get_running_loop().time()
        self._observe(request, self._answered_at - request.begun)

    def _enqueue(self, request: Request, first: bool = False) -> None:
        queue = self._queues[request.key].requests
        queue.appendleft(request) if first else queue.append(request)
        request.is_sent = False
        self.waiting += 1

    def _leave_queue(self, request: Request) -> None:
        with contextlib.suppress(ValueError):  # it has left already
            self._queues[request.key].requests.remove(request)
            self.waiting -= 1

    def _set_deadline(self, request: Request, now: float) -> None:
        if request.timer is not None:
            request.timer.cancel()
        request.deadline = now + self.options.timeout_s
        request.timer = asyncio.get_running_loop().call_at(request.deadline, self._end_wait, request)

    def _end_wait(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        if request.is_patient and not request.is_sent and self._answered_at > now - self.options.timeout_s:
            return self._set_deadline(request, self._answered_at)  # others get on
        why = MAYBE if request.is_sent else "it has not been sent to a worker, and changed nothing"
        late = DeadlineExceeded(f"No answer within the deadline of {self.options.timeout_s:g} s; {why}.")
        self.resolve(request, late)
        self.dispatch()

    # -- workers -------------------------------------------------------------------------------------------------------

    def add(self, connection: WorkerConnection) -> None:
        self.connections.insert(0, connection)
        self.dispatch()

    def remove(self, connection: WorkerConnection) -> None:
        """It is gone. What it had runs once more elsewhere, or is answered with why it cannot."""
        self.connections.remove(connection)
        lost = [request for _, batch in connection.in_flight.values() for request in batch.values()]
        connection.in_flight.clear()
        why = "did not answer any more and was ended" if connection.was_ended else "was lost"
        for request in reversed(lost):
            if request.future.done():
                self.resolve(request, None)
            elif connection.was_ended or request.verb == "add" or request.is_repeated:
                self.resolve(request, WorkerLost(f"Worker {connection.index} {why}; {MAYBE}."))
            else:
                request.is_repeated = True
                self._enqueue(request, first=True)
        self._repeat_at = asyncio.get_running_loop().time() + LOST_WITHIN_S
        self.dispatch()

    def receive(self, connection: WorkerConnection, message: Answers) -> None:
        """What a worker has answered of a batch."""
        key, batch = connection.in_flight.get(message.batch_id, (None, {}))
        request = None
        for index, answer in message.answers.items():
            if answered := batch.pop(index, None):
                request = answered
                self.resolve(request, answer)
        if request is not None and not batch:
            now = asyncio.get_running_loop().time()
            if not isinstance(answer, Exception):  # which may be quick where runs are slow
                self._paces[key].answered(len(message.answers), now - request.sent_at, now)
            del connection.in_flight[message.batch_id]
            connection.slots.give_back(key)
            self.dispatch()

    def close(self, error: Error) -> None:
        """Answer all that waits, and what comes until ``reopen``, with this. What was sent may have been applied."""
        self._closed = error
        for request in [request for queue in self._queues.values() for request in queue.requests]:
            self.resolve(request, error)
        for connection in self.connections:
            for _, batch in connection.in_flight.values():
                for request in batch.values():
                    self.resolve(request, WorkerLost(f"{str(error).rstrip('.')}; {MAYBE}."))
        self.dispatch()

    def reopen(self) -> None:
        self._closed = None
        self.dispatch()

    # -- whose turn it is ----------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send all batches that are due to workers that have a slot. Queues take turns, and so do workers."""
        self._is_scheduled, is_any_sent = False, True
        while is_any_sent:
            is_any_sent = False
            for key in list(self._queues):
                queue = self._queues[key]
                if not queue.requests:
                    self._queues.pop(key).stop_timer()
                elif batch := self._next_batch(key, queue):
                    self._send(key, queue, *batch)
                    is_any_sent = True

    def _send(self, key: QueueKey, queue: Queue, connection: WorkerConnection, count: int) -> None:
        now, requests = asyncio.get_running_loop().time(), self._take(key, queue, count)
        self._queues[key] = self._queues.pop(key)  # behind all others
        for request in requests:
            if request.is_patient:
                self._set_deadline(request, now)
            request.is_sent, request.sent_at = True, now
        try:
            connection.send(key, requests, now)
        except Exception as error:  # there is no end to what pickling raises
            for request in requests:
                self.resolve(request, InvalidRequest(f"The request cannot be sent to a worker: {error}"))
            return
        self._observe_batch(key.model, len(requests))
        self.connections.remove(connection)
        self.connections.append(connection)

    def _take(self, key: QueueKey, queue: Queue, count: int) -> list[Request]:
        requests, size_bytes = [], 0
        while queue.requests and len(requests) < count and size_bytes < MAX_BATCH_BYTES:
            request = queue.requests[0]
            if requests and (requests[-1].is_patient or request.is_patient) and self._is_slow(key):
                break  # its deadline is not to pass while others run that have been sent with it
            self._leave_queue(request)
            size_bytes += request.size_bytes
            requests.append(request)
        return requests

    def _next_batch(self, key: QueueKey, queue: Queue) -> tuple[WorkerConnection, int] | None:
        """To which worker how many requests of this queue are to be sent now; if that is due, and one has a slot."""
        version, now, count = queue.requests[0].version, asyncio.get_running_loop().time(), len(queue.requests)
        if queue.requests[0].is_repeated and now < self._repeat_at:
            return queue.set_timer(self._repeat_at)
        may_share = bool(version.loaded.batchable)
        is_one_run = may_share and self.options.placement == "shared"
        if is_one_run and count < self.options.max_batch:
            under_way = sum(c.slots.taken[key] for c in self.connections if not c.is_hung)
            if under_way >= self.max_concurrent_batches:
                return None  # more batches would be smaller ones
        candidates = self._candidates(key, version)
        alone_at = self._recent.alone_at(key, now)
        free = [c for c in candidates if c.slots.may_take(key, alone_at <= now)]
        if not free:
            if any(c.slots.free for c in candidates):
                queue.set_timer(alone_at)
            return None
        if not is_one_run:  # all workers get their part
            count = -(-count // sum(c.slots.free for c in candidates))
        runs_python = version.loaded.runs_python  # for which there are threads beside those that compute
        if alone_at > now and not runs_python and self._is_slow(key) and not self._may_compute():
            return queue.set_timer(alone_at)
        if may_share and count < self.options.max_batch:
            due_at = queue.requests[0].begun + self.options.batch_wait_ms / 1000
            if is_one_run and not under_way:
                due_at = max(due_at, self._paces[key].gathers_until)
            if due_at > now:
                return queue.set_timer(due_at)
        if runs_python and len(self._under_way(True)) >= MAX_BATCHES_IN_FLIGHT * len(self.connections) - 1:
            return None  # what it waits for may need a slot, too
        return free[0], min(count, self.options.max_batch)

    def _candidates(self, key: QueueKey, version: ModelVersion) -> list[WorkerConnection]:
        found = [c for c in self.connections if key.worker in (None, c.index)]
        found = [c for c in found if c.index not in version.missing_on] or found
        return [c for c in found if not c.is_hung] or found

    def _is_slow(self, key: QueueKey) -> bool:
        return self._paces[key].run_s > SLOW_S

    def _may_compute(self) -> bool:
        """May one more slow batch run, and leave a thread of the parameter server to what is fast?"""
        slow = sum(map(self._is_slow, self._under_way(False)))
        return self.options.placement == "mirrored" or slow < self.options.compute_threads - 1

    def _under_way(self, runs_python: bool) -> list[QueueKey]:
        """The queues of batches that are not answered yet, of models that run Python or of the others."""
        firsts = [(k, next(iter(b.values()))) for c in self.connections for k, b in c.in_flight.values() if b]
        return [k for k, request in firsts if request.version.loaded.runs_python == runs_python]


async def connect_worker(batcher: Batcher, index: int, info: WorkerInfo) -> WorkerConnection:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*info.address, limit=2**24)
    writer.write(info.authkey)
    connection = WorkerConnection(index, reader, writer, batcher.receive, batcher.remove)
    batcher.add(connection)
    return connection
