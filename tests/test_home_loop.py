"""The way into the home loop, where its thread is not there: nothing waits for what will never end."""

import asyncio
import contextlib
import gc
import os
import threading
import weakref

import pytest
from conftest import wait_until

from shared_graph.errors import DeadlineExceeded, Unavailable
from shared_graph.home_loop import HomeLoop


async def main(closing: asyncio.Event) -> None:
    await closing.wait()


def made(around=contextlib.nullcontext, fail=lambda error: None) -> HomeLoop:
    return HomeLoop(main, around, fail, lambda: Unavailable("It is over."))


def started() -> HomeLoop:
    home = made()
    home.start(None)
    return home


def test_a_forked_child_that_stops_does_not_wait_for_a_thread_that_it_does_not_have():
    home = started()
    if not (child := os.fork()):
        home.stop()
        os._exit(7)
    status = wait_until(lambda: os.waitpid(child, os.WNOHANG)[1], 10, "the child to end")
    assert os.waitstatus_to_exitcode(status) == 7
    home.stop()


def test_one_that_was_made_before_a_fork_may_be_started_in_the_child_and_one_that_was_started_is_refused_there():
    async def answer() -> int:
        return 5

    home, running = made(), started()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            home.start(None)
            assert home.result(answer(), 10) == 5
            home.stop()
            with pytest.raises(Unavailable, match="A forked process has no cluster"):
                running.result(answer(), 10)
            os._exit(7)
        os._exit(1)
    status = wait_until(lambda: os.waitpid(child, os.WNOHANG)[1], 20, "the child to end")
    assert os.waitstatus_to_exitcode(status) == 7
    running.stop()


def test_where_no_thread_can_be_started_stop_returns(monkeypatch):
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    home = made()
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError):
        home.start(None)
    home.stop()


def test_what_is_told_of_a_failure_may_stop_it():
    def around():
        raise Unavailable("Ray could not be started.")

    told = threading.Event()

    def fail(error: Exception) -> None:
        home.stop()
        told.set()

    home = made(around, fail)
    home.start(None)
    assert told.wait(10)
    home.stop()


def test_a_signal_handler_that_stops_it_may_interrupt_a_call_at_any_step():
    home = started()

    class Interrupted(set):
        def add(self, future) -> None:
            home.stop()
            super().add(future)

    def call() -> None:
        with pytest.raises(Unavailable, match="It is over"):
            home.result(asyncio.sleep(1000))
        ended.set()

    home._calls, ended = Interrupted(), threading.Event()
    threading.Thread(target=call, daemon=True).start()
    assert ended.wait(10), "stop() waits for what waits for it"


def test_a_signal_handler_that_stops_it_may_interrupt_its_start(monkeypatch):
    begin, ended, home = threading.Thread.start, threading.Event(), made()

    def interrupted(thread: threading.Thread) -> None:
        if thread is home._thread:
            home.stop()
        begin(thread)

    def start() -> None:
        home.start(None)
        ended.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    threading.Thread(target=start, daemon=True).start()
    assert ended.wait(10), "stop() waits for the start that it has interrupted"
    assert home._ended.wait(10), "what was begun goes on"


def test_a_blocking_call_that_is_past_its_deadline_is_given_up_in_the_loop_as_well():
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    home = started()
    with pytest.raises(DeadlineExceeded):
        home.result(endless(), 0.05)
    assert ended.wait(10)
    home.stop()


def test_a_blocking_call_that_fails_is_gone_at_once_with_what_it_was_given():
    """Front ends look for garbage seldom."""

    class Body:
        pass

    async def fail(body: Body) -> None:
        raise Unavailable("no")

    def call() -> weakref.ref:
        body = Body()
        with contextlib.suppress(Unavailable):
            home.result(fail(body))
        return weakref.ref(body)

    home = started()
    gc.disable()
    try:
        body = call()
        wait_until(lambda: body() is None, 10, "it to go")
    finally:
        gc.enable()
        home.stop()
