"""Predicts for each batch of an iterable, however long, with a bounded number of batches in flight."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from shared_graph.errors import Error
from shared_graph.models import Arrays
from shared_graph.options import MAX_BATCHES_IN_FLIGHT, Options

END = object()


def map_batches(
    batches: Iterable[Any], submit: Callable[[Any], Future], options: Options, ordered: bool
) -> Iterator[Arrays]:
    """The answers, in order or as they come. The iterable is pulled in a thread of its own, as places get free: it may
    wait for answers that come from here. Raises Error that says which batch it is about, or what the iterable raises.
    """
    limit = min(2 * MAX_BATCHES_IN_FLIGHT * options.workers, options.max_queue)
    places, stopped = threading.Semaphore(limit), threading.Event()
    arrived: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()  # number and future, or END and what was raised
    pending: dict[int, Future] = {}

    def pull() -> None:
        numbered, failure = enumerate(batches), None
        try:
            while places.acquire() and not stopped.is_set() and (item := next(numbered, None)):
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
        except Exception as error:
            failure = error
        arrived.put((END, failure))

    threading.Thread(target=pull, daemon=True, name="map").start()
    try:
        is_pulled, failure = False, None
        while not is_pulled or pending:
            number, future = arrived.get()
            if number is END:
                is_pulled, failure = True, future
                if failure and ordered:
                    raise failure
                continue
            try:
                outputs = future.result()
            except Error as error:
                raise type(error)(f"batch {number}: {error}", error.status) from error
            del pending[number]
            places.release()
            yield outputs
        if failure:
            raise failure
    finally:
        stopped.set()
        places.release()
        for future in list(pending.values()):
            future.cancel()
