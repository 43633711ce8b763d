"""Gathering those who ask again when they are answered, without waiting for those who do not."""

import asyncio
import random

import pytest
from test_batcher import Stage, turn

from shared_graph.pace import GATHER_S, Pace

pytestmark = pytest.mark.simulated
RUN_S = 0.02


def play(pace: Pace, batches: int, comes_back: int, count: int = 8) -> None:
    """Batches of so many, of whom so many come back at once."""
    for at in range(batches):
        pace.answered(count, RUN_S, at)
        for _ in range(comes_back):
            pace.asked(at + 0.001)


def test_it_waits_for_who_comes_back_until_most_have_and_no_longer_than_a_quarter_of_a_run():
    pace = Pace()
    assert pace.run_s > 1e9 and pace.gathers_until < 0  # nothing is known
    play(pace, 5, comes_back=8)
    pace.answered(8, RUN_S, 10)
    assert pace.gathers_until == 10 + GATHER_S
    for _ in range(6):
        assert pace.gathers_until > 10
        pace.asked(10.001)
    assert pace.gathers_until < 0  # enough are here
    for at in range(11, 30):
        pace.answered(8, 0.004, at)
        [pace.asked(at + 0.0005) for _ in range(8)]
    pace.answered(8, 0.004, 30)
    assert pace.gathers_until == pytest.approx(30.001)


@pytest.mark.parametrize("comes_back", range(6))
def test_it_does_not_wait_for_those_who_have_not_come_back_lately_or_came_too_late(comes_back):
    pace = Pace()
    play(pace, 20, comes_back=8)
    play(pace, 20, comes_back)
    pace.answered(8, RUN_S, 30)
    assert pace.gathers_until < 30
    for at in range(31, 50):
        pace.answered(8, RUN_S, at)
        [pace.asked(at + 2 * GATHER_S) for _ in range(8)]
    pace.answered(8, RUN_S, 50)
    assert pace.gathers_until < 50


async def test_clients_that_ask_again_when_they_are_answered_come_to_be_one_batch_and_not_two_halves():
    stage, waiting = Stage(), []
    stage.batcher.max_concurrent_batches = 1
    waiting += stage.ask(1, 2, 3, 4)
    await turn()
    waiting += stage.ask(5, 6, 7, 8)  # while the first half runs
    for _ in range(20):
        await asyncio.sleep(RUN_S)
        stage.workers[0].answer()
        await turn()
        again = [task for task in waiting if task.done()]
        waiting = [task for task in waiting if not task.done()]
        await asyncio.sleep(0.0005)
        waiting += stage.ask(*(task.result() / 2 for task in again))
        await turn()
        await turn()
    assert [len(bodies) for _, _, bodies in stage.sent[:3]] == [4, 4, 4]
    assert [len(bodies) for _, _, bodies in stage.sent[-10:]] == [8] * 10
    await asyncio.sleep(RUN_S)
    stage.workers[0].answer()
    await asyncio.gather(*waiting)


@pytest.mark.parametrize("seed", range(20))
async def test_a_request_waits_for_others_at_most_a_moment_whoever_comes_or_does_not(seed):
    r, loop, stage, tasks = random.Random(seed), asyncio.get_running_loop(), Stage(), []
    stage.batcher.max_concurrent_batches = 1
    could_be_sent, waits, worker = {}, [], stage.workers[0]
    send = worker.send

    def note_and_send(key, requests, now):
        waits.extend(now - could_be_sent.pop(request.body) for request in requests)
        send(key, requests, now)

    def answer():
        could_be_sent.update(dict.fromkeys(could_be_sent, loop.time()))
        worker.answer()

    worker.send = note_and_send
    for _ in range(300):
        bodies = [len(tasks) + i for i in range(r.choice([0, 0, 1, 1, 2, 5]))]
        could_be_sent.update(dict.fromkeys(bodies, loop.time()))
        tasks += stage.ask(*bodies)
        await turn()
        await asyncio.sleep(r.choice([0, 0.0005, 0.001, 0.01, 0.05]))
        if worker.in_flight and r.random() < 0.7:
            answer()
    while could_be_sent or worker.in_flight:
        await asyncio.sleep(1)
        answer()
    assert await asyncio.gather(*tasks) == [2 * body for body in range(len(tasks))]
    assert len(waits) == len(tasks) and max(waits) <= GATHER_S + 0.0011, seed
