"""Parallel inference over data: ``Cluster.map`` and ``map_async`` over any iterable."""

import asyncio
import contextlib
import itertools
import re
import threading

import numpy as np
import pytest
from conftest import wait_until
from ray_tensorflow import InvalidRequest, ModelError

AHEAD = 8  # batches that a map of a cluster with two workers keeps in flight
BOTH = pytest.mark.parametrize("blocking", [True, False], ids=["map", "map_async"])


def is_idle(cluster) -> bool:
    health = cluster.health()
    return health["waiting"] + sum(worker["in_flight"] for worker in health["workers"]) == 0


def consume(cluster, blocking: bool, batches, each=lambda result: True, **arguments) -> None:
    """Give each result of a map to a function, and leave the loop when that returns something false."""
    if blocking:
        for result in cluster.map(batches, **arguments):
            if not each(result):
                break
        return

    async def loop():
        async with contextlib.aclosing(cluster.map_async(batches, **arguments)) as results:
            async for result in results:
                if not each(result):
                    break

    asyncio.run(loop())


async def asynchronously(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


def test_a_thousand_batches_of_mixed_sizes_come_in_order(cluster):
    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((size, 2)).astype(np.float32), "n": random.integers(-9, 10, size)}
               for size in random.integers(1, 201, 1000)]
    for batch, result in zip(batches, cluster.map(batches, "several"), strict=True):
        assert np.array_equal(result["scaled"], batch["x"] * batch["n"].astype(np.float32)[:, None])
        assert np.array_equal(result["next"], batch["n"] + 1)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
@pytest.mark.parametrize("blocking, kind", [(True, list), (True, iter), (False, iter), (False, asynchronously)])
def test_any_iterable_is_mapped_whole(cluster, blocking, kind, ordered):
    batches = [np.arange(size, dtype=np.float32) + 200 * i for i, size in enumerate([1, 200, 3, 64, 65, 1, 17] * 5)]
    found = []
    consume(
        cluster, blocking, kind(batches), lambda result: found.append(result["y"]) or True,
        model="picky", ordered=ordered)
    found = found if ordered else sorted(found, key=lambda array: array[0])
    assert [array.tolist() for array in found] == [(batch / 2).tolist() for batch in batches]


@BOTH
def test_an_iterable_without_batches_gives_nothing(cluster, blocking):
    consume(cluster, blocking, [], lambda result: pytest.fail("a result of nothing"), model="picky")


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

    consume(cluster, blocking, endless(), each, model="picky")
    wait_until(lambda: is_idle(cluster), what="nothing in flight")
    assert 200 <= ahead[-1] <= 200 + AHEAD


def test_a_cancelled_task_stops_the_work(cluster):
    pulled, pulling, go_on = itertools.count(), threading.Event(), threading.Event()

    def batches():
        yield [1.0]
        pulling.set()
        go_on.wait(60)
        yield from ([1.0] for _ in pulled)

    async def consume_all():
        async for _ in cluster.map_async(batches(), "picky"):
            pass

    async def cancel() -> bool:
        task = asyncio.create_task(consume_all())
        await asyncio.to_thread(pulling.wait)
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        return task.cancelled()

    assert asyncio.run(cancel())
    wait_until(lambda: is_idle(cluster), what="nothing in flight")
    assert next(pulled) <= AHEAD


@BOTH
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
@pytest.mark.parametrize("bad, error, message", [
    (np.float32([4, -4]), ModelError, "batch 7: .*x must not be negative.*"),
    (np.array(["four"]), InvalidRequest, "batch 7: .*'x'.*"),
    ([[1.0], [2.0, 3.0]], InvalidRequest, "batch 7: .*ragged.*"),
], ids=["refused by the model", "wrong dtype", "ragged"])
def test_an_error_names_the_batch_and_leaves_the_cluster_serving(cluster, blocking, ordered, bad, error, message):
    batches = [np.float32([4])] * 7 + [bad] + [np.float32([4])] * 30
    with pytest.raises(error) as raised:
        consume(cluster, blocking, batches, model="picky", ordered=ordered)
    assert raised.value.status == 400 and re.fullmatch(message, str(raised.value))
    wait_until(lambda: is_idle(cluster), what="nothing in flight")
    assert cluster.predict([3.0], "picky")["y"] == [1.5]


@BOTH
def test_an_error_of_the_iterable_itself_is_passed_on(cluster, blocking):
    def broken():
        yield [1.0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume(cluster, blocking, broken(), model="picky")


@BOTH
@pytest.mark.parametrize("wrong", [{"model": "nobody"}, {"model": "picky", "signature": "nothing"}], ids=str)
def test_an_unknown_model_or_signature_is_refused(cluster, blocking, wrong):
    with pytest.raises(InvalidRequest, match="not found"):
        consume(cluster, blocking, [[1.0]], **wrong)
