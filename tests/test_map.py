"""Parallel inference over data: ``Cluster.map`` and ``map_async`` over any iterable."""

import asyncio
import contextlib
import itertools
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import wait_until

from shared_graph.errors import InvalidRequest, ModelError

AHEAD = 8  # batches that a map of a cluster with two workers keeps in flight
BOTH = pytest.mark.parametrize("blocking", [True, False], ids=["map", "map_async"])


def wait_idle(cluster) -> None:
    def is_idle():
        health = cluster.health()
        return health["waiting"] + sum(worker["in_flight"] for worker in health["workers"]) == 0

    wait_until(is_idle, what="nothing in flight")


def consume(cluster, blocking: bool, batches, each=lambda result: True, model="picky", **arguments) -> None:
    """Give each result of a map to a function, and leave the loop when that returns something false."""
    if blocking:
        for result in cluster.map(batches, model, **arguments):
            if not each(result):
                break
        return

    async def loop():
        async with contextlib.aclosing(cluster.map_async(batches, model, **arguments)) as results:
            async for result in results:
                if not each(result):
                    break

    asyncio.run(loop())


async def asynchronously(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
@pytest.mark.parametrize("blocking, kind", [(True, list), (True, iter), (False, iter), (False, asynchronously)])
def test_any_iterable_is_mapped_whole_and_in_order(cluster, blocking, kind, ordered):
    sizes = np.random.default_rng(0).integers(1, 201, 300)
    batches = [np.arange(size, dtype=np.float32) + 200 * i for i, size in enumerate(sizes)]
    found = []
    consume(cluster, blocking, kind(batches), lambda result: found.append(result["y"]) or True, ordered=ordered)
    found = found if ordered else sorted(found, key=lambda array: array[0])
    assert [array.tolist() for array in found] == [(batch / 2).tolist() for batch in batches]
    consume(cluster, blocking, kind([]), lambda result: pytest.fail("a result of nothing"), ordered=ordered)


@BOTH
@pytest.mark.parametrize("kind", [lambda array: array, lambda array: {"x": array}], ids=["array", "by name"])
def test_an_iterable_may_have_one_buffer_for_all_of_its_batches(cluster, blocking, kind):
    """As those have that read a camera, or a file."""

    def batches():
        buffer = np.empty(3, np.float32)
        for i in range(100):
            buffer[:] = i
            yield kind(buffer)

    found = []
    consume(cluster, blocking, batches(), lambda result: found.append(result["y"].tolist()) or True)
    assert found == [[i / 2] * 3 for i in range(100)]


def test_as_they_finish_a_long_batch_holds_up_no_short_ones(cluster):
    batches = [np.zeros(4_000_000, np.float32), *[np.zeros(1, np.float32)] * AHEAD]
    sizes = [len(result["y"]) for result in cluster.map(batches, "picky", ordered=False)]
    assert sizes[0] == 1 and sorted(sizes) == [1] * AHEAD + [4_000_000]


@BOTH
def test_an_endless_generator_runs_ahead_by_no_more_than_the_bound_and_leaving_stops_the_work(cluster, blocking):
    pulled, taken, ahead = itertools.count(1), itertools.count(1), []

    def endless():
        for number in pulled:
            ahead.append(number)
            yield np.full(1 + number % 200, number, np.float32)

    def each(result):
        number = next(taken)
        assert (result["y"] == number / 2).all() and ahead[-1] - number <= AHEAD
        return number < 200

    consume(cluster, blocking, endless(), each)
    wait_idle(cluster)
    assert 200 <= ahead[-1] <= 200 + AHEAD


@BOTH
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
def test_an_iterable_may_wait_for_the_results_of_what_it_has_given(cluster, blocking, ordered):
    """As a search does, whose next step depends on the last: 16 batches were pulled before the first result came."""
    results, found = queue.SimpleQueue(), []

    def steps():
        batch = np.float32([1024])
        for _ in range(10):
            yield batch
            batch = results.get(timeout=60)

    def each(result):
        found.append(result["y"].item())
        results.put(result["y"])
        return True

    consume(cluster, blocking, steps(), each, ordered=ordered)
    assert found == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]


def test_an_asynchronous_iterable_may_wait_for_the_results_of_what_it_has_given(cluster):
    async def search() -> list[float]:
        results, found = asyncio.Queue(), []

        async def steps():
            batch = np.float32([1024])
            for _ in range(10):
                yield batch
                batch = await results.get()

        async for result in cluster.map_async(steps(), "picky"):
            found.append(result["y"].item())
            results.put_nowait(result["y"])
        return found

    assert asyncio.run(asyncio.wait_for(search(), 60)) == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]


def test_what_cannot_be_iterated_is_told_and_nobody_waits(cluster):
    with pytest.raises(TypeError, match="'function' object is not iterable"):
        next(cluster.map(lambda: [[1.0]], "linear"))


def test_many_maps_at_once_leave_the_threads_of_the_loop_to_what_they_wait_for(cluster):
    """Each held one of the cpu + 4 threads of ``asyncio.to_thread``."""

    async def slowly():
        for _ in range(3):
            await asyncio.to_thread(time.sleep, 0.001)
            yield [1.0]

    async def all_at_once() -> list:
        maps = [consume_all(cluster.map_async(slowly(), "picky")) for _ in range(40)]
        return await asyncio.wait_for(asyncio.gather(*maps), 60)

    assert asyncio.run(all_at_once()) == [3] * 40


def test_a_cancelled_map_whose_iterable_never_ends_does_not_keep_the_program(cluster):
    items: queue.Queue = queue.Queue()

    async def cancel() -> bool:
        task = asyncio.create_task(consume_all(cluster.map_async(iter(items.get, None), "picky")))
        await asyncio.wait([task], timeout=0.5)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, cancel()).result(30)
    items.put(None)


async def consume_all(results) -> int:
    return len([result async for result in results])


def test_a_cancelled_task_stops_the_work(cluster):
    pulled, pulling, go_on = itertools.count(), threading.Event(), threading.Event()

    def batches():
        yield [1.0]
        pulling.set()
        go_on.wait(60)
        yield from ([1.0] for _ in pulled)

    async def cancel() -> bool:
        task = asyncio.create_task(consume_all(cluster.map_async(batches(), "picky")))
        await asyncio.to_thread(pulling.wait)
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        return task.cancelled()

    assert asyncio.run(cancel())
    wait_idle(cluster)
    assert next(pulled) <= AHEAD


def broken():
    yield [1.0]
    raise ZeroDivisionError("of the iterable itself")


@BOTH
@pytest.mark.parametrize(
    "arguments, bad, error, message",
    [
        ({}, np.float32([4, -4]), ModelError, "batch 7: .*x must not be negative.*"),
        ({"ordered": False}, np.float32([4, -4]), ModelError, "batch 7: .*x must not be negative.*"),
        ({}, np.array(["four"]), InvalidRequest, "batch 7: .*'x'.*"),
        ({}, [[1.0], [2.0, 3.0]], InvalidRequest, "batch 7: .*ragged.*"),
        ({}, None, ZeroDivisionError, "of the iterable itself"),
        ({"model": "nobody"}, [1.0], InvalidRequest, ".*not found.*"),
        ({"signature": "nothing"}, [1.0], InvalidRequest, ".*not found.*"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_error_names_the_batch_and_leaves_the_cluster_serving(cluster, blocking, arguments, bad, error, message):
    batches = broken() if bad is None else [np.float32([4])] * 7 + [bad] + [np.float32([4])] * 30
    with pytest.raises(error) as raised:
        consume(cluster, blocking, batches, **arguments)
    assert re.fullmatch(message, str(raised.value))
    wait_idle(cluster)
    assert cluster.predict([3.0], "picky")["y"] == [1.5]
