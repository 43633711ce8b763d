"""The event loop in which all of a cluster's work is done, and the one way into it from threads and other loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from shared_graph.errors import DeadlineExceeded, Error, InvalidRequest, Unavailable

log = logging.getLogger(__name__)


class HomeLoop:
    """A loop that is given, or one in a thread of its own. What is run in it ends with it, at the latest."""

    def __init__(
        self,
        main: Callable[[asyncio.Event], Coroutine],
        around: Callable[[], contextlib.AbstractContextManager],
        fail: Callable[[Exception], None],
        why_over: Callable[[], Error],
    ):
        """``main(closing)`` runs in the loop, from its start to its end, within the context ``around``. ``fail`` is
        called with what ends it too early; ``why_over`` tells with what calls fail that come after the end."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_over = False
        self._main, self._around, self._fail, self._why_over = main, around, fail, why_over
        self._closing = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()  # all that the thread does
        self._loop_thread: int | None = None  # the thread of the loop, while it runs
        self._calls: set[concurrent.futures.Future] = set()  # from elsewhere, that are not answered
        self._starting, self._pid = threading.RLock(), 0  # of the process that has started it

    def start(self, home: asyncio.AbstractEventLoop | None) -> bool:
        """Begin in the background, and return True; False if it has begun already, or is over."""
        with self._starting:
            if self._thread is not None or self.is_over:
                return False
            self.loop, self._pid = home or uvloop.new_event_loop(), os.getpid()
            self._thread = threading.Thread(target=self._live, args=[home is None], daemon=True)
            self._thread.start()
            return True

    def stop(self) -> None:
        """Returns when all has ended. Safe to call twice, and in a signal handler, whatever that interrupts."""
        self.check_elsewhere()
        with self._starting:
            if self._thread is not None and not self.is_over:
                log.info("stopping")
            self.is_over = True
        if self._thread in (None, threading.current_thread()) or not self._thread.is_alive():  # as in a forked child
            return
        if self._loop_thread == threading.get_ident():  # whose loop has ended without us
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._closing.set)
        interrupt = None
        while not self._ended.is_set():
            try:
                self._ended.wait()  # no join: one that is interrupted takes the thread for ended (cpython#90882)
            except KeyboardInterrupt as error:  # a second one: nothing is to be left running
                interrupt = error
        self._thread.join()
        if interrupt:
            raise interrupt

    def check_elsewhere(self) -> None:
        """Raises InvalidRequest in the loop's own thread."""
        if threading.get_ident() == self._loop_thread and self.loop.is_running():
            raise InvalidRequest("close() in the cluster's own event loop would never return: use asyncio.to_thread.")

    def run(self, call: Coroutine) -> concurrent.futures.Future:
        """Run it in the loop, from elsewhere. Raises Error when that cannot be."""
        try:
            self._check_call()
            future = asyncio.run_coroutine_threadsafe(call, self.loop)
        except Exception as error:
            call.close()
            raise self._why_over() if isinstance(error, RuntimeError) else error from None  # the loop is closed
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        if self._ended.is_set():  # perhaps before this one was among those to be failed
            self._fail_calls()
        return future

    def result(self, call: Coroutine, timeout_s: float | None = None) -> Any:
        future = self.run(call)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise DeadlineExceeded("No answer within the deadline.") from None
        finally:
            del future  # which holds what is raised, whose traceback holds this frame

    async def awaited(self, call: Coroutine) -> Any:
        if threading.get_ident() == self._loop_thread:
            return await call
        return await asyncio.wrap_future(self.run(call))

    def _check_call(self) -> None:
        if self._pid not in (0, os.getpid()):
            raise Unavailable("A forked process has no cluster: let each start one, or join one, after the fork.")
        if self.is_over:
            raise self._why_over()
        if self._thread is None:
            raise Unavailable("Nothing was started: call start(), or use 'with'.")
        if threading.get_ident() == self._loop_thread:
            what = "A blocking call in the cluster's own event loop would never return"
            raise InvalidRequest(f"{what}: await its twin, or use asyncio.to_thread.")

    def _live(self, is_own: bool) -> None:
        try:
            with self._around():
                if is_own:
                    self.loop.run_until_complete(self._run_main())
                else:
                    asyncio.run_coroutine_threadsafe(self._run_main(), self.loop).result()
        except Exception as error:
            if not self._closing.is_set():  # else it was ended on purpose while it started
                self._fail(error)
        finally:
            self.is_over = True
            if is_own:
                self.loop.close()
            self._ended.set()
            self._fail_calls()

    def _fail_calls(self) -> None:
        for future in list(self._calls):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(self._why_over())

    async def _run_main(self) -> None:
        self._loop_thread = threading.get_ident()
        try:
            if not self.is_over:  # stopped before it was there
                await self._main(self._closing)
        finally:
            self._loop_thread = None
