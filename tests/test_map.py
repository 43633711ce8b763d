"""Parallel inference over data: ``Cluster.map`` and ``map_async`` over any iterable."""

import asyncio
import contextlib
import itertools
import re
import time

import numpy as np
import pytest

from conftest import wait_until
from example_models import PlainSession
from ray_tensorflow import IN_FLIGHT_PER_WORKER, InvalidRequest, ModelError

BOUND = 2 * IN_FLIGHT_PER_WORKER * 2  # batches that a map of a cluster with two workers keeps in flight
BOTH = pytest.mark.parametrize("blocking", [True, False], ids=["map", "map_async"])


def several(x, n):
    """What the example model of this name answers, by numpy."""
    scaled = x * n.astype(np.float32)[:, None]
    return {"scaled": scaled, "total": 0 + scaled[:, 0] + scaled[:, 1], "next": n + 1}


def mixed_batches(count):
    random = np.random.default_rng(count)
    for size in random.integers(1, 201, count):
        yield {"x": random.standard_normal((size, 2)).astype(np.float32), "n": random.integers(-1000, 1000, size)}


def assert_same_bits(result, expected):
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        assert (result[name].dtype, result[name].shape, result[name].tobytes()) == (array.dtype, array.shape, array.tobytes())


def consume(cluster, blocking, batches, each=lambda result: True, **arguments):
    """Give each result of a map to a function, and leave the loop when that returns something false."""
    if blocking:
        for result in cluster.map(batches, **arguments):
            if not each(result):
                break
        return

    async def loop():
        async for result in cluster.map_async(batches, **arguments):
            if not each(result):
                break
        await asyncio.to_thread(wait_until, lambda: idle(cluster), 10, "nothing in flight")

    asyncio.run(loop())


def idle(cluster) -> bool:
    return cluster.health()["waiting"] == 0 and not cluster._batcher._in_flight


async def asynchronously(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


# -- iterables ---------------------------------------------------------------------------------------------------------


def test_ten_thousand_batches_of_mixed_sizes_come_in_order_and_bit_equal_to_one_by_one(cluster):
    plain = PlainSession("example_models:several")
    for batch in mixed_batches(20):  # the formula is right
        assert_same_bits(several(**batch), plain.predict(batch))
        assert_same_bits(cluster.predict(batch, "several"), plain.predict(batch))
    results = 0
    for batch, result in zip(mixed_batches(10_000), cluster.map(mixed_batches(10_000), "several"), strict=True):
        assert_same_bits(result, several(**batch))
        results += 1
    assert results == 10_000


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
@pytest.mark.parametrize(
    "blocking, kind", [(True, list), (True, iter), (False, list), (False, iter), (False, asynchronously)],
    ids=["map list", "map generator", "map_async list", "map_async generator", "map_async async generator"])
def test_any_iterable_is_mapped_whole(cluster, blocking, kind, ordered):
    batches = [np.arange(size, dtype=np.float32) + 200 * i for i, size in enumerate([1, 200, 3, 64, 65, 128, 1, 17] * 5)]
    found = []
    consume(cluster, blocking, kind(batches), lambda result: found.append(result["y"]) or True, model="picky", ordered=ordered)
    found = found if ordered else sorted(found, key=lambda array: array[0])
    assert [array.tobytes() for array in found] == [(batch / 2).tobytes() for batch in batches]


@BOTH
def test_an_iterable_without_batches_gives_nothing(cluster, blocking):
    consume(cluster, blocking, [], lambda result: pytest.fail("a result of nothing"), model="picky")


@BOTH
def test_as_they_finish_a_long_batch_holds_up_no_short_ones(cluster, blocking):
    sizes = []
    batches = [np.zeros(4_000_000, np.float32), *[np.zeros(1, np.float32)] * 8]
    consume(cluster, blocking, batches, lambda result: sizes.append(len(result["y"])) or True, model="picky", ordered=False)
    assert sorted(sizes) == [1] * 8 + [4_000_000]
    assert sizes[0] == 1


@BOTH
def test_an_endless_generator_runs_ahead_by_no_more_than_the_bound(cluster, blocking):
    pulled, taken, ahead = 0, 0, []

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            ahead.append(pulled - taken)
            yield np.full(1 + pulled % 200, pulled, np.float32)

    def each(result):
        nonlocal taken
        taken += 1
        assert (result["y"] == taken / 2).all()
        return time.monotonic() < end

    end = time.monotonic() + 2
    consume(cluster, blocking, endless(), each, model="picky")
    assert taken > 50
    assert max(ahead) <= BOUND
    wait_until(lambda: idle(cluster), 10, "nothing in flight")


@BOTH
def test_leaving_early_stops_the_work(cluster, blocking):
    pulled = itertools.count()
    batches = (np.full(100, i, np.float32) for i in pulled)
    consume(cluster, blocking, batches, lambda result: result["y"][0] < 5, model="picky")
    wait_until(lambda: idle(cluster), 10, "nothing in flight")
    assert next(pulled) <= 11 + BOUND


def test_a_cancelled_task_stops_the_work(cluster):
    pulled = itertools.count()

    async def cancelled():
        started = asyncio.Event()

        async def loop():
            async for _ in cluster.map_async((np.ones(100, np.float32) for _ in pulled), "picky"):
                started.set()

        task = asyncio.create_task(loop())
        await started.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: idle(cluster), 10, "nothing in flight")
        return next(pulled)

    assert asyncio.run(cancelled()) < next(pulled) <= 1000


@BOTH
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as they finish"])
@pytest.mark.parametrize("bad, error, message", [
    (np.float32([4, -4]), ModelError, r"batch 7: .*x must not be negative.*"),
    (np.array(["four"]), InvalidRequest, r"batch 7: input 'x' takes float32, not <U4"),
    ({"z": [4.0]}, InvalidRequest, r"batch 7: signature 'serving_default' takes the inputs \['x'\], not \['z'\]"),
], ids=["refused by the model", "wrong dtype", "wrong name"])
def test_an_error_names_the_batch_and_leaves_the_cluster_serving(cluster, blocking, ordered, bad, error, message):
    batches = [np.float32([4])] * 7 + [bad] + [np.float32([4])] * 30
    with pytest.raises(error) as raised:
        consume(cluster, blocking, batches, model="picky", ordered=ordered)
    assert raised.value.status == 400 and re.fullmatch(message, str(raised.value))
    wait_until(lambda: idle(cluster), 10, "nothing in flight")
    assert cluster.predict([3.0], "picky")["y"] == [1.5]


def test_an_error_of_the_iterable_itself_is_passed_on(cluster):
    def broken():
        yield [1.0]
        raise ZeroDivisionError

    for blocking in (True, False):
        with pytest.raises(ZeroDivisionError):
            consume(cluster, blocking, broken(), model="picky")


def test_unknown_model_or_signature_is_refused(cluster):
    for wrong in ({"model": "nobody"}, {"model": "picky", "signature": "nothing"}):
        for blocking in (True, False):
            with pytest.raises(InvalidRequest, match="not found"):
                consume(cluster, blocking, [[1.0]], **wrong)
