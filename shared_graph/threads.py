"""Work in the background: a thread of its own for a call that may never return, tasks that stay referenced, turns."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import functools
import os
import queue
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any

from shared_graph.errors import Error

_idle: list[queue.SimpleQueue] = []  # the inboxes of threads that wait for work


def _forget_threads() -> None:
    global _idle
    _idle = []  # not cleared: what was made before the fork still gives its inbox back to the old list


os.register_at_fork(after_in_child=_forget_threads)


class OwnThread:
    """A thread that runs one call after another, for the holder of this object alone.

    When nobody holds it any more the thread is used again: each new one would allocate in another of malloc's arenas,
    until all are large. A graph holds one for life, so that its memory lies together and leaves no holes in the next's.
    """

    def __init__(self):
        idle = _idle
        try:
            self._inbox = idle.pop()
        except IndexError:
            self._inbox = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._inbox,), daemon=True, name="own_thread").start()
        weakref.finalize(self, idle.append, self._inbox).atexit = False  # then it may be busy

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """A future of what the function returns, or raises."""
        future: Future = Future()
        self._inbox.put((self, future, functools.partial(function, *arguments)))
        return future

    async def run(self, function: Callable, *arguments: Any) -> Any:
        """As ``submit``, awaited. If the wait for it is cancelled it goes on, and nobody hears of it."""
        try:
            return await asyncio.wrap_future(self.submit(function, *arguments))
        finally:
            del self  # else what is raised would hold it by its traceback


def _work(inbox: queue.SimpleQueue) -> None:
    while True:
        thread, future, work = inbox.get()
        result, error = _outcome(work)
        del thread, work  # so that this thread is free again before whoever waits for the result wants one
        with contextlib.suppress(InvalidStateError):  # the wait was cancelled
            future.set_result(result) if error is None else future.set_exception(error)
        del future, result, error


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returns, and what it raises."""
    try:
        return work(), None
    except BaseException as error:  # a user's; a future takes neither StopIteration nor what ends programs
        is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
        return None, error if is_plain else RuntimeError(f"{type(error).__name__} {error}")


async def in_own_thread(function: Callable, *arguments: Any) -> Any:
    """As ``OwnThread.run``, in one for this alone."""
    return await OwnThread().run(function, *arguments)


class Turns:
    """So many at once have a turn; who takes longer than ``patience_s`` keeps nobody waiting any more."""

    def __init__(self, count: int, patience_s: float):
        self._free, self._patience_s = asyncio.Semaphore(count), patience_s

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """For as long as the block runs."""
        await self._free.acquire()
        is_left = False

        def leave() -> None:
            nonlocal is_left
            if not is_left:
                is_left = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._patience_s, leave)
        try:
            yield
        finally:
            timer.cancel()
            leave()


def keep_task(tasks: set[asyncio.Task], coroutine: Coroutine) -> None:
    """Run it in the background, and keep it in ``tasks`` until it is done: a loop forgets what nobody holds."""
    task = asyncio.get_running_loop().create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def watch_death(actor: Any, then: Callable = lambda: None, *arguments: Any) -> None:
    """Calls ``then`` when the actor is gone. A ``death_watch`` ends by itself now and then, and is called again."""
    with contextlib.suppress(Error):
        while True:
            await actor.call("death_watch")
    then(*arguments)


def check_threads() -> None:
    """Raises Error where threads are no threads: under gevent or eventlet whatever waits would wait for ever."""
    for function in (_thread.start_new_thread, socket.socket):
        if (name := function.__module__.partition(".")[0]) in ("gevent", "eventlet"):
            why = f"{name} has replaced this process' threads and sockets, with which Ray does not work"
            raise Error(f"{why}: use gunicorn's threads (--worker-class gthread --threads 128), or uvicorn.")
