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


def map_batches(
    batches: Iterable[Any], submit: Callable[[Any], Future], options: Options, ordered: bool
) -> Iterator[Arrays]:
    """The answers, in order or as they come. The iterable is pulled in a thread of its own, as places get free: it may
    wait for answers that come from here. Raises Error that says which batch it is about, or what the iterable raises.
    """
    slots = threading.Semaphore(min(2 * MAX_BATCHES_IN_FLIGHT * options.workers, options.max_queue))
    pending: dict[int, Future] = {}
    # number and future of each batch, in order or when it has its answer; at last END and what the iterable has raised
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    is_stopped, is_ended, failure = False, False, None

    def pull() -> None:
        numbered = enumerate(batches)
        while slots.acquire() and not is_stopped and (item := next(numbered, None)):
            number, batch = item
            try:
                future = submit(batch)
            except Error as error:
                future = Future()
                future.set_exception(error)
            pending[number] = future
            if ordered:
                arrived.put((number, future))
            else:
                future.add_done_callback(lambda future, number=number: arrived.put((number, future)))

    OwnThread().submit(pull).add_done_callback(lambda pulled: arrived.put((END, pulled.exception())))
    try:
        while not is_ended or pending:
            number, future = arrived.get()
            if number is END:
                is_ended, failure = True, future
                continue
            try:
                outputs = future.result()
            except Error as error:
                raise type(error)(f"batch {number}: {error}", error.status) from error
            del pending[number]
            slots.release()
            yield outputs
        if failure:
            raise failure
    finally:
        is_stopped = True
        slots.release()
        for future in list(pending.values()):
            future.cancel()


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
