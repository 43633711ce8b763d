"""Predicts for each batch of an iterable, however long, with a bounded number of batches in flight."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from shared_graph.errors import Error
from shared_graph.models import Arrays
from shared_graph.options import MAX_BATCHES_IN_FLIGHT, Options
from shared_graph.threads import OwnThread, in_own_thread

END = object()


class Pulled:
    """What has been pulled of an iterable; ``arrived`` gets number and future of each batch, in order or when it has
    its answer, and at last END and what the iterable raised, if it did."""

    def __init__(self, batches: Iterable[Any], submit: Callable[[Any], Future], limit: int, ordered: bool):
        self._batches, self._submit, self._ordered, self._is_stopped = batches, submit, ordered, False
        self.slots, self.pending = threading.Semaphore(limit), {}
        self.arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        OwnThread().submit(self._pull).add_done_callback(lambda pulled: self.arrived.put((END, pulled.exception())))

    def _pull(self) -> None:
        numbered = enumerate(self._batches)
        while self.slots.acquire() and not self._is_stopped and (item := next(numbered, None)):
            number, batch = item
            try:
                future = self._submit(batch)
            except Error as error:
                future = Future()
                future.set_exception(error)
            self.pending[number] = future
            if self._ordered:
                self.arrived.put((number, future))
            else:
                future.add_done_callback(lambda future, number=number: self.arrived.put((number, future)))

    def stop(self) -> None:
        self._is_stopped = True
        self.slots.release()
        for future in list(self.pending.values()):
            future.cancel()


def map_batches(
    batches: Iterable[Any], submit: Callable[[Any], Future], options: Options, ordered: bool
) -> Iterator[Arrays]:
    """The answers, in order or as they come. The iterable is pulled in a thread of its own, as places get free: it may
    wait for answers that come from here. Raises Error that says which batch it is about, or what the iterable raises.
    """
    limit = min(2 * MAX_BATCHES_IN_FLIGHT * options.workers, options.max_queue)
    pulled, is_ended, failure = Pulled(batches, submit, limit, ordered), False, None
    try:
        while not is_ended or pulled.pending:
            number, future = pulled.arrived.get()
            if number is END:
                is_ended, failure = True, future
                continue
            try:
                outputs = future.result()
            except Error as error:
                raise type(error)(f"batch {number}: {error}", error.status) from error
            del pulled.pending[number]
            pulled.slots.release()
            yield outputs
        if failure:
            raise failure
    finally:
        pulled.stop()


async def map_asynchronously(map_: Callable[..., Iterator[Any]], batches: Iterable[Any] | AsyncIterable[Any]) -> Any:
    """What ``map_`` makes of the batches, for ``async for``. Threads wait for it, not the loop; and threads of its own,
    since they may wait, and for ever, for what runs in those of the loop's executor."""
    if isinstance(batches, AsyncIterable):
        batches = from_loop(aiter(batches), asyncio.get_running_loop())
    results = map_(batches)
    try:
        while (result := await in_own_thread(next, results, END)) is not END:
            yield result
    finally:
        with contextlib.suppress(ValueError):  # a thread still waits there, and drops it when it has its result
            await in_own_thread(results.close)


async def next_of(items: AsyncIterator[Any]) -> Any:
    return await anext(items, END)


def from_loop(items: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """Asynchronous items, in a thread that is not the loop's."""
    while (item := asyncio.run_coroutine_threadsafe(next_of(items), loop).result()) is not END:
        yield item
