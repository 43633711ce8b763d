"""What is waited for in the background: a thread for each thing that may never end, and tasks that are kept."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from shared_graph.errors import Error


async def in_own_thread(function: Callable, *arguments: Any) -> Any:
    """What the function returns, or raises. If the wait for it is cancelled it goes on, and nobody hears of it."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            outcome = function(*arguments), None
        except BaseException as error:  # a user's; a future takes neither StopIteration nor what ends programs
            is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            outcome = None, error if is_plain else RuntimeError(f"{type(error).__name__} {error}".strip())
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, daemon=True, name=getattr(function, "__name__", "work")).start()
    return await future


def keep_task(tasks: set[asyncio.Task], coroutine: Coroutine) -> None:
    """Run it in the background, and keep it in ``tasks`` until it is done: a loop forgets what nobody holds."""
    task = asyncio.get_running_loop().create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def watch_death(actor: Any) -> None:
    """Returns when it is gone; such a call returns now and then, and is made again."""
    with contextlib.suppress(Error):
        while True:
            await actor.call("death_watch")


def check_threads() -> None:
    """Raises Error where threads are no threads: under gevent or eventlet whatever waits would wait for ever."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    for name, is_patched in (
        ("gevent", gevent and (gevent.is_module_patched("threading") or gevent.is_module_patched("socket"))),
        ("eventlet", eventlet and (eventlet.is_monkey_patched("thread") or eventlet.is_monkey_patched("socket"))),
    ):
        if is_patched:
            why = f"{name} has replaced this process' threads and sockets, with which Ray does not work"
            raise Error(f"{why}: use gunicorn's threads (--worker-class gthread --threads 128), or uvicorn.")
