"""Whose turn it is, where many share a few slots."""

import asyncio
import random

import pytest

from shared_graph.slots import RECENT_S, Gate, Recent, Slots

pytestmark = pytest.mark.simulated


def test_the_last_slot_is_kept_for_who_has_none_unless_nobody_else_has_asked_lately():
    slots = Slots(2)
    slots.take("slow")
    assert not slots.may_take("slow", is_alone=False) and slots.may_take("fast", is_alone=False)
    assert slots.may_take("slow", is_alone=True)
    slots.take("fast")
    assert not slots.may_take("third", is_alone=True) and slots.free == 0
    slots.give_back("slow")
    slots.give_back("fast")
    assert slots.free == 2 and not slots.taken


def test_who_asked_last_counts_for_some_seconds_and_is_forgotten_then():
    recent = Recent()
    recent.note("a", 10.0)
    assert recent.alone_at("a", 10.0) <= 10.0 and recent.alone_at("b", 10.0) == 10.0 + RECENT_S
    recent.note("b", 11.0)
    assert recent.alone_at("a", 11.0) == 11.0 + RECENT_S
    for number in range(1000):
        recent.note(number, 20.0 + number)
        recent.alone_at(number, 20.0 + number)
    assert len(recent._asked) < 10


def test_who_asks_again_counts_from_then_on():
    recent = Recent()
    for key, now in (("a", 10.0), ("b", 11.0), ("a", 12.0)):
        recent.note(key, now)
    assert recent.alone_at("c", 12.0) == 12.0 + RECENT_S


async def test_two_slow_kinds_of_work_do_not_stop_a_fast_one_and_one_alone_has_all_places():
    gate, loop, took = Gate(2), asyncio.get_running_loop(), []

    async def work(kind: str, seconds: float) -> None:
        asked = loop.time()
        await gate.enter(kind)
        took.append((kind, loop.time() - asked))
        await asyncio.sleep(seconds)
        gate.leave(kind)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work("fast", 0.001))
        for _ in range(8):
            tasks.create_task(work("slow", 2.0))
        for _ in range(20):
            tasks.create_task(work("fast", 0.001))
            await asyncio.sleep(0.1)
    assert max(seconds for kind, seconds in took if kind == "fast") < 0.01
    started = loop.time()
    await asyncio.sleep(RECENT_S + 1)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(work("slow", 2.0))
    assert loop.time() - started < RECENT_S + 1 + 8.1  # two at a time


async def test_the_last_slot_goes_to_whoever_of_those_that_wait_may_have_it_first():
    gate, loop, entered = Gate(3), asyncio.get_running_loop(), {}

    async def enter(kind: str) -> None:
        await gate.enter(kind)
        entered[kind] = loop.time() - begun

    await gate.enter("a")
    await gate.enter("b")
    begun = loop.time()
    waiting = [asyncio.create_task(enter("a"))]  # until b has not asked for some seconds
    await asyncio.sleep(0.5)
    waiting.append(asyncio.create_task(enter("b")))  # which it does again
    await asyncio.wait(waiting, timeout=RECENT_S + 1)
    assert entered == {"b": pytest.approx(RECENT_S)}
    gate.leave("b")
    await asyncio.wait(waiting)
    for kind in "aab":
        gate.leave(kind)


@pytest.mark.parametrize("seed", range(100))
async def test_whoever_comes_gets_in_and_no_more_are_in_than_may_be_whatever_is_cancelled(seed):
    chance, count = random.Random(seed), random.Random(seed).randint(1, 4)
    gate, inside, served = Gate(count), 0, 0

    async def work(kind: int) -> None:
        nonlocal inside, served
        await gate.enter(kind)
        inside += 1
        assert inside <= count
        try:
            await asyncio.sleep(chance.choice([0, 0.01, 1]))
            served += 1
        finally:
            inside -= 1
            gate.leave(kind)

    tasks = []
    for _ in range(100):
        tasks.append(asyncio.create_task(work(chance.randint(0, 3))))
        await asyncio.sleep(chance.choice([0, 0, 0.1]))
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    assert served == sum(result is None for result in results) and inside == 0
    assert gate._slots.free == count
