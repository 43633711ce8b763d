"""Threads for what may never end: of their own while it runs, and used again."""

import asyncio
import gc
import os
import threading
import weakref

import pytest

from shared_graph.threads import OwnThread, Turns, in_own_thread


def raise_it(error: BaseException) -> None:
    raise error


def test_a_thread_that_is_done_is_used_again_and_one_that_hangs_holds_up_nobody():
    async def scenario():
        hangs, threads = threading.Event(), set()
        hanging = asyncio.create_task(in_own_thread(hangs.wait))
        for _ in range(100):
            threads.add(await asyncio.wait_for(in_own_thread(threading.get_ident), 10))
        assert len(threads) == 1
        together = threading.Barrier(8)
        await asyncio.wait_for(asyncio.gather(*(in_own_thread(together.wait) for _ in range(8))), 10)
        assert not hanging.done()
        hangs.set()
        assert await hanging

    asyncio.run(scenario())


def test_what_holds_a_thread_has_it_alone_as_long_as_it_lives():
    async def scenario():
        thread = OwnThread()
        ident = await thread.run(threading.get_ident)
        assert {await in_own_thread(threading.get_ident) for _ in range(10)}.isdisjoint({ident})
        assert await thread.run(threading.get_ident) == ident
        del thread
        assert await in_own_thread(threading.get_ident) == ident

    asyncio.run(scenario())


def test_a_thread_whose_work_nobody_waits_for_any_more_is_used_again_when_that_is_done_and_not_before():
    goes_on, idents = threading.Event(), []

    def work() -> None:
        idents.append(threading.get_ident())
        goes_on.wait(10)

    async def scenario():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_own_thread(work), 0.05)
        others = {await asyncio.wait_for(in_own_thread(threading.get_ident), 10) for _ in range(10)}
        assert others.isdisjoint(idents)
        goes_on.set()
        held = []
        while idents[0] not in [await thread.run(threading.get_ident) for thread in held]:
            held = [OwnThread() for _ in range(20)]  # each that is idle is among them

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_it_raises_is_raised_and_what_ends_programs_is_an_error_like_others():
    async def scenario():
        with pytest.raises(ValueError, match="no"):
            await in_own_thread(raise_it, ValueError("no"))
        for error in (StopIteration("no"), SystemExit("no"), KeyboardInterrupt("no")):
            with pytest.raises(RuntimeError, match=f"{type(error).__name__} no"):
                await in_own_thread(raise_it, error)
        assert await in_own_thread(abs, -1) == 1

    asyncio.run(scenario())


def test_what_it_raises_holds_neither_the_thread_nor_what_was_worked_on():
    class Large:
        def work(self) -> None:
            raise ValueError

    async def scenario():
        idents, objects = set(), weakref.WeakSet()
        for _ in range(50):
            objects.add(large := Large())
            try:  # pytest.raises makes a cycle of its own
                await in_own_thread(large.work)
            except ValueError:
                del large
            idents.add(await in_own_thread(threading.get_ident))
        assert len(idents) == 1 and not objects and "large" not in locals()

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_a_cancelled_wait_and_a_closed_loop_leave_the_thread_usable():
    goes_on, is_over = threading.Event(), threading.Event()

    def work() -> None:
        goes_on.wait(10)
        is_over.set()

    async def scenario():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_own_thread(work), 0.01)

    asyncio.run(scenario())
    goes_on.set()
    assert is_over.wait(10)
    assert asyncio.run(in_own_thread(abs, -1)) == 1


def test_a_forked_child_has_no_thread_of_its_parent():
    held = OwnThread()
    assert asyncio.run(in_own_thread(abs, -1)) == 1
    if (child := os.fork()) == 0:
        try:
            del held
            os._exit(asyncio.run(asyncio.wait_for(in_own_thread(abs, -3), 10)))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_where_no_thread_can_be_started_any_more_it_says_so_and_later_ones_do_not_wait_for_it(monkeypatch):
    async def scenario():
        busy = [OwnThread() for _ in range(200)]  # each that was idle is among them
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
            patch.setattr(threading.Thread, "start", lambda thread: raise_it(RuntimeError("can't start new thread")))
            await in_own_thread(abs, -1)
        assert await asyncio.wait_for(in_own_thread(abs, -1), 10) == 1
        del busy

    asyncio.run(scenario())


@pytest.mark.simulated
async def test_so_many_have_a_turn_at_once_and_who_takes_long_keeps_nobody_waiting():
    turns, loop = Turns(2, 30), asyncio.get_running_loop()

    async def work(seconds: float) -> float:
        """When it was done."""
        async with turns.turn():
            await asyncio.sleep(seconds)
        return loop.time()

    def at_work(*durations: float) -> list[asyncio.Task]:
        return [asyncio.create_task(work(seconds)) for seconds in durations]

    async def ends(tasks: list[asyncio.Task], began: float) -> list[int]:
        return [round(end - began) for end in await asyncio.gather(*tasks)]

    began = loop.time()
    assert await ends(at_work(10, 10, 10, 10, 10), began) == [10, 10, 20, 20, 30]
    began = loop.time()
    slow = at_work(100, 100)
    cancelled, *others = at_work(1, 10, 10, 10)
    await asyncio.sleep(1)
    cancelled.cancel()
    assert await ends(others, began) == [40, 40, 50]
    assert await ends(slow, began) == [100, 100]
    began = loop.time()
    assert await ends(at_work(10, 10, 10), began) == [10, 10, 20], "who took long has given two turns back"
