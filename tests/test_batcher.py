"""How requests are gathered, sent and answered: the batcher with workers that the tests play, on a clock that jumps."""

import asyncio
import collections
import gc
import itertools
import random
import sys
import time

import numpy as np
import pytest
import uvloop
from conftest import long

from shared_graph.batcher import LOST_WITHIN_S, MOST_PACES, Batcher
from shared_graph.bodies import HttpBody
from shared_graph.connection import Queue, WorkerConnection, hint_of
from shared_graph.errors import DeadlineExceeded, InvalidRequest, Unavailable, WorkerLost
from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelVersion
from shared_graph.options import MAX_BATCHES_IN_FLIGHT, Options
from shared_graph.slots import RECENT_S, Slots
from shared_graph.wire import Answers, Batch, read_frame, to_frame

pytestmark = pytest.mark.simulated

KINDS = {
    "m": {"batchable": ("serving_default",)},
    "n": {"batchable": ("serving_default",)},
    "single": {},
    "other": {},
    "caller": {"runs_python": True},
}
LARGE_BYTES = 2**26


def version(name: str, batchable=(), runs_python=False, missing_on=(), signatures=("serving_default",)) -> ModelVersion:
    metadata = {"signature_def": {"signature_def": dict.fromkeys(signatures)}}
    loaded = LoadedVersion(metadata, "", batchable, (), runs_python, "")
    return ModelVersion(ModelSource(name, 1), "AVAILABLE", None, loaded, missing_on)


VERSIONS = {name: version(name, **kind) for name, kind in KINDS.items()}
VERSIONS["two signatures"] = version("two signatures", signatures=("slow", "fast"))


class PlayedConnection:
    """A connection to a worker: a test sees what was sent there, and answers when it pleases."""

    def __init__(self, index: int, batcher: Batcher, sent: list[tuple]):
        self.index, self.is_hung, self.was_ended, self.in_flight = index, False, False, {}
        self.slots, self.batcher, self.sent, self.ids = Slots(MAX_BATCHES_IN_FLIGHT), batcher, sent, itertools.count()
        batcher.add(self)

    def send(self, key: tuple, requests: list, now: float) -> None:
        if any(request.body == "cannot be pickled" for request in requests):
            raise TypeError("cannot pickle this")
        self.in_flight[next(self.ids)] = key, dict(enumerate(requests))
        self.slots.take(key)
        self.sent.append((self.index, key.model, [request.body for request in requests]))

    def answer(self, batch_id: int | None = None) -> None:
        """The batch that was sent first, with twice each request's body."""
        batch_id = min(self.in_flight) if batch_id is None else batch_id
        answers = {index: 2 * request.body for index, request in self.in_flight[batch_id][1].items()}
        self.batcher.receive(self, Answers(batch_id, answers))


class Stage:
    """A batcher and its workers; ``sent`` is what went to them: (worker, model, bodies) of each batch."""

    def __init__(self, workers: int = 1, **options):
        self.answered: list[tuple] = []  # what the batcher tells of each answer: body, seconds
        self.counts: list[tuple] = []  # and of each batch
        observe = lambda request, seconds: self.answered.append((request.body, seconds))
        observe_batch = lambda *batch: self.counts.append(batch)
        self.batcher, self.sent = Batcher(Options(**{"threads": 100} | options), observe, observe_batch), []
        self.batcher.max_concurrent_batches = 2  # as on a machine of many processors
        self.workers = [self.add_worker(index) for index in range(workers)]

    def add_worker(self, index: int) -> PlayedConnection:
        return PlayedConnection(index, self.batcher, self.sent)

    def ask(self, *bodies, model="m", worker=None, verb="predict", is_patient=False) -> list[asyncio.Task]:
        """A request for each body; what can be sent is sent at the end of the next turn of the loop."""
        version = VERSIONS[model]
        return [
            asyncio.ensure_future(self.batcher.submit(model, None, version, verb, body, worker, is_patient))
            for body in bodies
        ]

    @property
    def bodies(self) -> list[list]:
        return [bodies for _, _, bodies in self.sent]

    def is_empty(self) -> bool:
        """Is no place, byte or timer left over?"""
        batcher, loop = self.batcher, asyncio.get_running_loop()
        timers = [handle for handle in loop._scheduled if not handle.cancelled()]
        places = all(worker.slots.free == MAX_BATCHES_IN_FLIGHT for worker in batcher.connections)
        return (batcher.waiting, batcher.pending.count, batcher._queues, timers, places) == (0, 0, {}, [], True)


async def turn() -> None:
    """As much of the loop as a request needs to be sent."""
    for _ in range(3):
        await asyncio.sleep(0)


async def error_of(future: asyncio.Future) -> BaseException | None:
    await asyncio.wait([future])
    return future.exception()


async def test_a_lone_request_is_sent_at_once_and_whatever_queued_up_while_batches_ran_is_the_next_batch():
    stage, futures = Stage(), []
    for body in range(10):
        futures += stage.ask(body)
        await turn()
    assert stage.bodies == [[0], [1]]
    for _ in range(3):
        stage.workers[0].answer()
    assert stage.bodies == [[0], [1], [2, 3, 4, 5, 6, 7, 8, 9]] and stage.batcher.waiting == 0
    assert await asyncio.gather(*futures) == [2 * body for body in range(10)]
    assert stage.is_empty()


async def test_where_there_are_two_processors_a_batch_that_is_not_full_waits_for_the_one_under_way():
    stage = Stage(workers=2, max_batch=4)
    stage.batcher.max_concurrent_batches = 1
    for bodies in ([0], [1, 2], [3, 4, 5]):
        stage.ask(*bodies)
        await turn()
    assert stage.bodies == [[0], [1, 2, 3, 4]]  # which is full
    stage.workers[0].answer()
    stage.workers[1].answer()
    assert stage.bodies == [[0], [1, 2, 3, 4], [5]]


@pytest.mark.parametrize("processors, batches", [(1, 1), (2, 1), (3, MAX_BATCHES_IN_FLIGHT)])
def test_with_one_processor_or_two_one_batch_runs_at_a_time(monkeypatch, processors, batches):
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    assert Batcher(Options()).max_concurrent_batches == batches


async def test_no_more_than_max_batch_travel_together_and_queues_take_turns():
    stage = Stage(workers=2, max_batch=4)
    stage.ask(*range(12))
    stage.ask(99, model="n")
    await turn()
    assert [(model, bodies) for _, model, bodies in stage.sent] == [
        ("m", [0, 1, 2, 3]),
        ("n", [99]),
        ("m", [4, 5, 6, 7]),
    ]  # and the last place of each worker is kept
    await asyncio.sleep(RECENT_S + 1)
    assert stage.bodies[3:] == [[8, 9, 10, 11]]


async def test_a_queue_that_never_empties_does_not_starve_another():
    stage = Stage(max_batch=4)
    futures = stage.ask(*range(400))
    await turn()
    for _ in range(20):
        asked = stage.ask(1000, model="n")
        await turn()
        while not asked[0].done():
            batches = len(stage.sent)
            stage.workers[0].answer()
            await turn()
            assert len(stage.sent) <= batches + 1
        last = [model for _, model, _ in stage.sent]
        assert "n" in last[-3:], "it waited for more than one turn of the other"
    for future in futures:
        future.cancel()


async def test_a_slow_signature_leaves_a_place_to_others_and_has_all_again_when_nobody_else_asks():
    stage = Stage(workers=2)
    slow = stage.ask(*range(100), model="single")
    fast = stage.ask(1, model="other")
    await turn()
    for _ in range(10):
        assert [model for _, model, _ in stage.sent].count("single") <= 4
        [[index, batch_id]] = [
            (worker.index, batch_id)
            for worker in stage.workers
            for batch_id, (key, _) in worker.in_flight.items()
            if key.model == "other"
        ]
        stage.workers[index].answer(batch_id)
        await turn()
        assert all(future.done() for future in fast)
        fast = stage.ask(1, model="other")  # is served at once though none of the slow ones is answered
        await turn()
    stage.workers[index].answer(max(stage.workers[index].in_flight))
    await asyncio.sleep(RECENT_S + 1)
    assert all(worker.slots.free == 0 for worker in stage.workers) or not stage.batcher.waiting
    for future in slow + fast:
        future.cancel()


@pytest.mark.parametrize("slow", [["single"], ["single", "caller", "n"]], ids=["one", "three"])
async def test_slow_runs_leave_a_thread_of_the_parameter_server_to_what_is_fast_unless_nobody_asks(slow):
    stage = Stage(workers=4, max_batch=1, threads=1)  # so there are three threads
    futures = stage.ask(*range(5), model="other")
    await turn()
    for _ in range(5):  # now it is known that this one is fast
        for worker in stage.workers:
            while worker.in_flight:
                worker.answer()
    for model in slow:
        futures += stage.ask(*range(50), model=model)
    for _ in range(20):
        await asyncio.sleep(1.0)
        fast = stage.ask(1, model="other")
        await turn()
        kinds = [(key.model, worker, id) for worker in stage.workers for id, (key, _) in worker.in_flight.items()]
        assert sum(model in slow and model != "caller" for model, *_ in kinds) == 2
        assert ("caller" in slow) == any(model == "caller" for model, *_ in kinds)  # that has threads of its own
        [[_, worker, batch_id]] = [kind for kind in kinds if kind[0] == "other"]
        worker.answer(batch_id)
        await turn()
        assert fast[0].done(), "it waits for slow ones"
        if chosen := [kind for kind in kinds if kind[0] in slow]:
            chosen[0][1].answer(chosen[0][2])
    if len(slow) == 1:
        await asyncio.sleep(RECENT_S + 1)
        assert sum(len(worker.in_flight) for worker in stage.workers) == 8
    for future in futures:
        future.cancel()


async def test_calls_of_python_that_never_end_do_not_stop_what_has_not_been_seen_before():
    stage = Stage(workers=2, threads=1, timeout_s=1000)
    futures = stage.ask(*range(50), model="caller")
    await turn()
    assert sum(len(worker.in_flight) for worker in stage.workers) == 3
    for model in ("other", "single", "m"):
        [future] = stage.ask(1, model=model)
        await turn()
        assert stage.sent[-1][1] == model
        index = stage.sent[-1][0]
        stage.workers[index].answer(max(stage.workers[index].in_flight))
        assert await future == 2
    for future in futures:
        future.cancel()


def test_the_signature_that_a_body_asks_for_is_seen_where_it_stands_and_never_invented():
    two = VERSIONS["two signatures"]
    padding = b"1, " * 10_000
    for body, hint in [
        (b'{"signature_name": "slow", "instances": [1]}', "slow"),
        (b'{"instances": [' + padding + b'1], "signature_name":"fast"}', "fast"),
        (b'{"instances": [' + padding + b'"signature_name": "slow", ' + padding + b"1]}", ""),
        (b'{"signature_name": "unknown"}', ""),
        (b'{"signature\\u005fname": "slow"}', ""),
        (b"\xff\x00", ""),
    ]:
        assert hint_of(two, HttpBody(body)) == hint
    assert hint_of(two, ("slow", {})) == "slow" and hint_of(two, 3.0) == ""
    default = version("two", signatures=("serving_default", "other"))
    named, unnamed = HttpBody(b'{"signature_name": "serving_default"}'), HttpBody(b"{}")
    assert {hint_of(default, body) for body in (named, unnamed, ("serving_default", {}))} == {""}  # one queue
    assert hint_of(VERSIONS["m"], HttpBody(b'{"signature_name": "serving_default"}')) == ""
    assert hint_of(two, HttpBody(b"\x93NUMPY", query="a=b&signature_name=fast")) == "fast"


async def test_a_batch_waits_for_company_as_long_as_batch_wait_ms_with_one_timer_a_queue():
    stage, loop = Stage(batch_wait_ms=200), asyncio.get_running_loop()
    started = loop.time()
    for body in range(50):
        stage.ask(body)
        stage.ask(body, model="n")
        await turn()
    timers = [handle for handle in loop._scheduled if not handle.cancelled()]
    assert len(timers) == 100 + 2 and stage.sent == []  # the deadlines, and one each
    await asyncio.sleep(0.3)
    assert next(bodies for _, model, bodies in stage.sent if model == "m") == list(range(50))
    assert loop.time() - started >= 0.2
    for model, count in (("m", 3), ("single", 1)):  # it is full, or not to share a run: then it does not wait
        stage = Stage(batch_wait_ms=60_000, max_batch=3)
        stage.ask(*range(count), model=model)
        await turn()
        assert stage.bodies == [list(range(count))]


async def test_where_each_worker_has_a_copy_all_of_them_get_their_part_and_slow_runs_leave_no_thread_to_others():
    stage = Stage(workers=4, placement="mirrored")
    stage.ask(*range(16))
    await turn()
    assert stage.bodies == [[first, first + 1] for first in range(0, 16, 2)]
    assert sorted(worker for worker, *_ in stage.sent) == [0, 0, 1, 1, 2, 2, 3, 3]
    stage = Stage(workers=4, max_batch=1, threads=1, placement="mirrored")
    futures = stage.ask(1, model="other") + stage.ask(*range(8), model="single")
    await turn()
    assert [model for _, model, _ in stage.sent].count("single") == 4  # one on each
    for future in futures:
        future.cancel()


async def test_workers_take_turns_in_round_robin_order():
    stage = Stage(workers=3)
    for _ in range(9):
        stage.ask(1)
        await turn()
        stage.workers[stage.sent[-1][0]].answer()
    order = [worker for worker, _, _ in stage.sent]
    assert sorted(order[:3]) == [0, 1, 2] and order == order[:3] * 3


async def test_a_request_for_a_certain_worker_waits_for_it_and_others_do_not_wait_behind():
    stage = Stage(workers=1)
    stage.ask(1, worker=1)
    stage.ask(2)
    await turn()
    assert stage.sent == [(0, "m", [2])]
    stage.add_worker(1)
    assert stage.sent[1:] == [(1, "m", [1])]


async def test_a_worker_that_hangs_gets_no_new_work_while_there_is_another():
    stage = Stage(workers=2, max_batch=1)
    stage.workers[0].is_hung = True
    stage.ask(*range(5))
    await turn()
    assert [worker for worker, _, _ in stage.sent] == [1, 1]
    stage.batcher.remove(stage.workers[1])
    await asyncio.sleep(LOST_WITHIN_S)
    assert [worker for worker, _, _ in stage.sent[2:]] == [0, 0]


async def test_each_answer_is_told_with_the_time_since_it_was_asked_for_and_each_batch_with_its_size():
    stage = Stage(max_batch=2)
    futures = stage.ask(1, 2, 3, 4, 5)  # the last one waits
    await asyncio.sleep(2)
    while not all(future.done() for future in futures):
        stage.workers[0].answer()
        await asyncio.sleep(0.5)
    [failed] = stage.ask("cannot be pickled")
    await error_of(failed)
    assert stage.counts == [("m", 2), ("m", 2), ("m", 1)]
    assert stage.answered == [(1, 2.0), (2, 2.0), (3, 2.5), (4, 2.5), (5, 3.0)]


async def test_what_nobody_waits_for_any_more_takes_up_no_place_and_no_memory_behind_what_somebody_waits_for():
    stage = Stage(max_batch=1, max_queue=1000)
    stage.ask(*range(2))
    await turn()
    waits, *others = stage.ask("waits", *[HttpBody(b"0" * 1000)] * 500)
    await turn()
    assert stage.batcher.waiting == 501 and stage.batcher.pending.count == 500_000
    for future in others:
        future.cancel()
    await turn()
    [queue] = stage.batcher._queues.values()
    assert stage.batcher.waiting == len(queue.requests) == 1 and stage.batcher.pending.count == 0
    stage.workers[0].answer()
    assert stage.bodies == [[0], [1], ["waits"]]
    stage.workers[0].answer()
    stage.workers[0].answer()
    assert await waits == "waitswaits" and stage.is_empty()


async def test_a_signature_that_is_fast_is_known_to_be_so_after_a_hiccup_and_refusals_say_nothing_of_a_slow_one():
    stage = Stage(max_batch=1)
    key, times = None, itertools.cycle([0.005] * 5 + [0.5])
    for _ in range(12):
        stage.ask(1)
        await asyncio.sleep(took_s := next(times))
        [(key, _)] = stage.workers[0].in_flight.values()
        stage.workers[0].answer()
        assert took_s == 0.5 or not stage.batcher._is_slow(key)
    stage.ask(1)
    await asyncio.sleep(10)
    stage.workers[0].answer()
    assert stage.batcher._is_slow(key)
    for _ in range(9):
        [future] = stage.ask(1)
        await turn()
        [(batch_id, _)] = stage.workers[0].in_flight.items()
        stage.batcher.receive(stage.workers[0], Answers(batch_id, {0: InvalidRequest("no")}))
        assert isinstance(await error_of(future), InvalidRequest) and stage.batcher._is_slow(key)


async def test_a_worker_that_lacks_a_version_is_not_asked_for_it_while_another_has_it():
    stage = Stage(workers=2, max_batch=1)
    VERSIONS["half"] = version("half", missing_on=(0,))
    stage.ask(*range(5), model="half")
    await turn()
    assert [worker for worker, _, _ in stage.sent] == [1, 1]
    stage.batcher.remove(stage.workers[1])
    await asyncio.sleep(LOST_WITHIN_S)
    assert [worker for worker, _, _ in stage.sent] == [1, 1, 0, 0], "who lacks it says why, or has it soon"


async def test_past_max_queue_requests_are_refused_until_there_is_room():
    stage = Stage(workers=0, max_queue=3)
    *_, refused = stage.ask(1, 2, 3, 4)
    error = await error_of(refused)
    assert isinstance(error, Unavailable) and error.status == 503
    [of_a_map] = stage.ask(5, is_patient=True)  # a long job is not to fail half way
    await turn()
    assert not of_a_map.done()
    stage.add_worker(0)
    futures = stage.ask(6, 7, 8)
    await turn()
    assert not any(future.done() for future in futures) and stage.bodies == [[1, 2, 3], [5]]


async def test_large_requests_travel_alone_and_are_refused_when_too_many_bytes_wait_or_arrive():
    stage = Stage(workers=1)
    stage.batcher.pending.hold(LARGE_BYTES)  # of a body that is still arriving
    futures = stage.ask(*[(b"", np.broadcast_to(0.0, LARGE_BYTES // 8))] * 100)
    await turn()
    refused = [future for future in futures if future.done()]
    assert len(refused) == 97 and all(isinstance(future.exception(), Unavailable) for future in refused)
    assert [len(bodies) for bodies in stage.bodies] == [1, 1]
    stage.batcher.pending.release(LARGE_BYTES)
    for future in futures:
        future.cancel()


async def test_what_cannot_be_sent_is_answered_and_costs_nobody_a_place():
    stage = Stage()
    futures = stage.ask(*["cannot be pickled"] * 6, model="single")
    for future in futures:
        assert isinstance(await error_of(future), InvalidRequest)
    [served] = stage.ask(3)
    await turn()
    stage.workers[0].answer()
    assert await served == 6 and stage.is_empty()


@pytest.mark.parametrize("workers", [0, 1], ids=["queued", "sent"])
async def test_a_request_without_an_answer_gets_504_at_its_deadline_and_makes_room(workers):
    stage, loop = Stage(workers, timeout_s=0.2), asyncio.get_running_loop()
    started, [future] = loop.time(), stage.ask(HttpBody(b"1"))
    error = await error_of(future)
    assert isinstance(error, DeadlineExceeded) and error.status == 504 and "0.2 s" in str(error)
    assert ("may have been applied" in str(error).replace("may or may not", "may")) == bool(workers)
    assert loop.time() - started == pytest.approx(0.2) and stage.batcher.waiting == 0
    for worker in stage.workers:
        worker.answer()  # too late, and no harm
    assert stage.is_empty()
    stage.add_worker(1)
    assert len(stage.sent) == workers


async def test_large_batches_of_a_map_are_never_too_many_bytes_since_it_has_only_a_few_under_way():
    stage = Stage(workers=0)
    large = "serving_default", {"x": np.broadcast_to(np.float32(0), (64, 2**20))}  # 256 MiB
    patient = stage.ask(large, large, large, is_patient=True)
    await turn()
    assert stage.batcher.waiting == 3 and stage.batcher.pending.count == 0  # and others are let in beside them
    stage.add_worker(0)
    await turn()
    while not all(future.done() for future in patient):
        stage.batcher.connections[0].answer()
        await turn()
    assert all(future.done() for future in patient) and stage.is_empty()


@pytest.mark.parametrize("model", ["single", "m"])
async def test_a_patient_request_has_its_deadline_from_when_it_is_sent_unless_nobody_gets_on(model):
    stage, loop = Stage(timeout_s=10), asyncio.get_running_loop()
    futures = stage.ask(*range(6), model=model, is_patient=True)
    for _ in range(6):
        await asyncio.sleep(4)
        stage.workers[0].answer()
    assert await asyncio.gather(*futures) == [0, 2, 4, 6, 8, 10] and loop.time() > 1020
    [future] = Stage(workers=0, timeout_s=10).ask(1, is_patient=True)
    assert isinstance(await error_of(future), DeadlineExceeded)


async def test_a_request_that_is_not_patient_has_its_deadline_however_well_others_get_on():
    stage = Stage(timeout_s=10)
    [waits] = stage.ask(1, worker=1)
    for second in range(12):
        stage.ask(2)
        await asyncio.sleep(1)
        stage.workers[0].answer()
        assert waits.done() == (second >= 9)
    assert isinstance(await error_of(waits), DeadlineExceeded)


async def test_a_patient_request_that_waits_has_time_while_others_get_on_and_one_that_is_sent_has_its_deadline():
    stage = Stage(timeout_s=10)
    [waits] = stage.ask(1, worker=1, is_patient=True)
    [sent] = stage.ask(2, model="single", is_patient=True)
    for second in range(1, 16):
        stage.ask(3)
        await asyncio.sleep(1)
        stage.workers[0].answer(max(stage.workers[0].in_flight))
        await turn()
        assert sent.done() == (second >= 10) and not waits.done()
    await asyncio.sleep(9)
    assert not waits.done()
    await asyncio.sleep(2)
    assert isinstance(waits.exception(), DeadlineExceeded) and isinstance(sent.exception(), DeadlineExceeded)


async def test_a_deadline_counts_from_when_it_was_asked_for_though_it_is_sent_later():
    stage, loop = Stage(workers=0, timeout_s=10), asyncio.get_running_loop()
    started, [future] = loop.time(), stage.ask(1)
    await asyncio.sleep(6)
    stage.add_worker(0)
    assert isinstance(await error_of(future), DeadlineExceeded) and stage.bodies == [[1]]
    assert loop.time() - started == pytest.approx(10)


async def test_the_requests_of_a_batch_are_answered_as_they_are_done_and_it_has_its_place_until_all_are():
    stage = Stage()
    futures = stage.ask(1, 2, 3, model="single")
    await turn()
    [worker], sizes = stage.workers, []
    for batch_id, (_, batch) in list(worker.in_flight.items()):
        for index, request in list(batch.items()):
            stage.batcher.receive(worker, Answers(batch_id, {index: 2 * request.body}))
            sizes.append((worker.slots.free, sum(len(batch) for _, batch in worker.in_flight.values())))
    assert await asyncio.gather(*futures) == [2, 4, 6] and sizes == [(0, 2), (1, 1), (2, 0)]


@pytest.mark.parametrize("run_s, together", [(0.01, [[6, 7], [8, 9]]), (4, [[6], [7, 8, 9]])], ids=["fast", "slow"])
async def test_patient_requests_travel_with_others_only_where_runs_are_fast(run_s, together):
    """Else batches of a map that take 4 s each would be sent together, and all but the first be late."""
    stage = Stage(timeout_s=10)
    for first in (True, False):
        futures = stage.ask(0, 1, model="single", is_patient=first)
        await turn()
        for _ in futures:
            await asyncio.sleep(run_s)
            stage.workers[0].answer()
    stage.sent.clear()
    stage.ask(6, model="single", is_patient=True)
    stage.ask(7, 8, 9, model="single")
    await turn()
    assert stage.bodies == together


async def test_a_reply_that_comes_twice_leaves_the_connection_as_it_is_and_what_is_strange_ends_only_the_connection():
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            batch = Batch._make(await read_frame(reader))
            for _ in range(2):
                answers = {index: 2 * body for index, (_, body, _, _) in enumerate(batch.requests)}
                writer.writelines(to_frame((batch.batch_id, answers)))
            if batch.requests[0][1] == 3:
                writer.write(b"\x01\0\0\0\x05\0\0\0\0\0\0\0not a pickle")

    stage = Stage(workers=0)
    async with await asyncio.start_server(work, "127.0.0.1") as worker:
        streams = await asyncio.open_connection(*worker.sockets[0].getsockname())
        connection = WorkerConnection(0, *streams, stage.batcher.receive, stage.batcher.remove)
        stage.batcher.add(connection)
        for body in range(4):
            assert await stage.batcher.submit("m", None, VERSIONS["m"], "predict", body) == 2 * body
        await asyncio.wait([connection.closed])
        assert connection.closed.exception() and stage.batcher.connections == []


async def test_what_a_lost_worker_had_runs_once_more_elsewhere_before_what_queued_up_meanwhile():
    stage = Stage()
    futures = stage.ask(1, 2)
    await turn()
    lost = stage.workers[0]
    stage.batcher.remove(lost)
    futures += stage.ask(3)
    await turn()
    other = stage.add_worker(1)
    await asyncio.sleep(LOST_WITHIN_S)
    assert stage.sent == [(0, "m", [1, 2]), (1, "m", [1, 2, 3])] and lost.in_flight == {}
    assert [request.is_repeated for request in other.in_flight[0][1].values()] == [True, True, False]
    other.answer()
    assert await asyncio.gather(*futures) == [2, 4, 6] and stage.is_empty()


async def test_what_comes_after_a_worker_was_lost_does_not_wait_for_others_to_be_lost_too():
    stage = Stage(workers=2)
    stage.batcher.remove(stage.workers[0])
    stage.ask(1)
    await turn()
    assert stage.sent == [(1, "m", [1])]


async def test_what_a_lost_worker_had_leaves_the_queue_when_nobody_waits_for_it_or_its_deadline_passes():
    stage = Stage(timeout_s=10)
    cancelled, late = stage.ask(1, 2)
    await turn()
    stage.batcher.remove(stage.workers[0])
    cancelled.cancel()
    await turn()
    assert stage.batcher.waiting == 1
    assert isinstance(await error_of(late), DeadlineExceeded) and stage.is_empty()


@pytest.mark.parametrize("verb, lost", [("add", 1), ("predict", 2)])
async def test_an_add_that_lost_its_worker_or_a_request_that_lost_two_is_502_and_is_not_run_again(verb, lost):
    stage = Stage(workers=3)
    [future] = stage.ask(1, verb=verb)
    await turn()
    for number in range(lost):
        stage.batcher.remove(stage.workers[stage.sent[number][0]])
        await asyncio.sleep(LOST_WITHIN_S)
    error = await error_of(future)
    assert isinstance(error, WorkerLost) and error.status == 502 and "may or may not" in str(error)
    assert len(stage.sent) == lost


async def test_what_all_workers_had_who_lost_the_parameter_server_one_after_the_other_runs_once_more():
    stage = Stage(workers=3, max_batch=1)
    futures = stage.ask(1, 2, 3, 4)
    await turn()
    for worker in stage.workers:
        stage.batcher.remove(worker)
        await asyncio.sleep(LOST_WITHIN_S / 4)
    assert len(stage.sent) == 4
    other = stage.add_worker(3)
    await asyncio.sleep(2 * LOST_WITHIN_S)
    while other.in_flight:
        other.answer()
    assert await asyncio.gather(*futures) == [2, 4, 6, 8] and stage.is_empty()


async def test_what_was_in_a_worker_that_was_ended_for_silence_is_not_run_again():
    stage = Stage(workers=2)
    [future] = stage.ask(1)
    await turn()
    lost = stage.workers[stage.sent[0][0]]
    lost.was_ended = True
    stage.batcher.remove(lost)
    error = await error_of(future)
    assert isinstance(error, WorkerLost) and "did not answer any more" in str(error) and len(stage.sent) == 1


async def test_closed_it_tells_what_was_sent_from_what_was_not_and_answers_whatever_comes():
    stage = Stage(max_batch=1)
    futures = stage.ask(*range(5))
    await turn()
    stage.batcher.close(Unavailable("It is over."))
    futures += stage.ask(5)
    errors = [await error_of(future) for future in futures]
    assert [type(error) for error in errors] == [WorkerLost] * 2 + [Unavailable] * 4
    assert {str(error) for error in errors[2:]} == {"It is over."} and "may or may not" in str(errors[0])
    assert len(stage.sent) == 2 and stage.batcher.waiting == 0


async def test_opened_again_it_takes_what_comes_and_what_waits_goes_on():
    stage = Stage(workers=0)
    stage.batcher.close(Unavailable("It is over."))
    [refused] = stage.ask(1)
    assert isinstance(await error_of(refused), Unavailable)
    stage.batcher.reopen()
    [waits] = stage.ask(2)
    await turn()
    stage.batcher.reopen()  # as at each start of the parameter server
    await turn()
    assert not waits.done()
    stage.add_worker(0).answer()
    assert await waits == 4 and stage.is_empty()


@pytest.mark.parametrize("seed", [*range(40), *map(long, range(40, 200))])
async def test_whatever_happens_each_request_is_answered_and_none_runs_more_often_than_it_may(seed):
    chance, stage, asked = random.Random(seed), Stage(workers=3, max_batch=4, max_queue=10_000, timeout_s=60), {}
    stage.batcher.max_concurrent_batches = chance.choice([1, 2])

    def ask(body):
        verb = chance.choice(["predict", "add"])
        worker = chance.choice([None, None, 0, 1, 2])
        model = chance.choice(["m", "n", "single", "other", "caller"])
        body = "cannot be pickled" if chance.random() < 0.01 else HttpBody(b"%d" % body)
        [future] = stage.ask(body, verb=verb, model=model, worker=worker, is_patient=chance.random() < 0.1)
        asked[len(asked)] = body, verb, future

    def play():
        worker = chance.choice(stage.workers)
        what = chance.choices(["answer", "lose", "end", "cancel", "hang"], [30, 1, 1, 1, 1])[0]
        if what == "answer" and worker.in_flight:
            worker.answer(chance.choice(list(worker.in_flight)))
        elif what in ("lose", "end"):
            worker.was_ended = what == "end"
            stage.batcher.remove(worker)
            stage.workers[worker.index] = stage.add_worker(worker.index)
        elif what == "cancel":
            chance.choice([future for *_, future in asked.values()]).cancel()
        elif what == "hang":
            worker.is_hung = not worker.is_hung

    for body in range(300):
        ask(body)
        play()
        await chance.choice([turn, lambda: asyncio.sleep(0.1)])()
        assert all(len(worker.in_flight) <= MAX_BATCHES_IN_FLIGHT for worker in stage.workers)
    while not all(future.done() for *_, future in asked.values()):
        play()
        await asyncio.sleep(0.01)
    ran = collections.Counter(itertools.chain(*stage.bodies))
    for body, verb, future in asked.values():
        runs = ran[body]
        assert runs <= (1 if verb == "add" else 2)
        if not future.cancelled():
            assert isinstance(future.exception(), (WorkerLost, InvalidRequest)) or (
                runs and future.result() == 2 * body
            )
    for worker in stage.workers:
        while worker.in_flight:
            worker.answer()
    await asyncio.sleep(RECENT_S + 1)
    assert max(map(len, stage.bodies)) <= 4 and stage.is_empty()


@pytest.mark.parametrize("seed", [*range(40), *map(long, range(40, 200))])
async def test_no_queue_waits_while_another_gets_two_turns_and_the_last_place_of_a_worker_is_free_for_others(seed):
    """Some queues are slow, some fast; all of them always have something to do."""
    chance = random.Random(seed)
    stage = Stage(workers=chance.randint(1, 4), max_batch=chance.choice([1, 4, 64]), max_queue=100_000)
    models = chance.sample(["m", "n", "single", "other"], chance.randint(2, 4))
    futures = [future for model in models for future in stage.ask(*range(300), model=model)]
    await turn()
    turns_since: dict[str, dict[str, int]] = {model: dict.fromkeys(models, 0) for model in models}
    for _ in range(100):
        busy = [worker for worker in stage.workers if worker.in_flight]
        worker, count = chance.choice(busy), len(stage.sent)
        worker.answer(chance.choice(list(worker.in_flight)))
        for model in models:
            stage.ask(0, model=model)
        await turn()
        for worker in stage.workers:
            kinds = [key.model for key, _ in worker.in_flight.values()]
            assert len(kinds) == len(set(kinds)), "one kind of work has both places of a worker"
        for _, sent, _ in stage.sent[count:]:
            turns_since[sent] = dict.fromkeys(models, 0)
            for model in models:
                if model != sent:
                    turns_since[model][sent] += 1
                    has_some = any(key.model == model for w in stage.workers for key, _ in w.in_flight.values())
                    assert turns_since[model][sent] < 3 or has_some, f"{model} waits while {sent} gets its turns"
    for future in futures:
        future.cancel()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_queue_is_looked_at_again_when_it_is_due_neither_early_nor_never_nor_over_and_over(loop_factory):
    """On the clocks of real loops: uvloop's counts milliseconds, and calls at once what is due within half of one."""

    async def scenario():
        loop, queue, looks, begun = asyncio.get_running_loop(), Queue(lambda: look()), [], time.process_time()
        for tenth in range(200):
            rung, due_at = loop.create_future(), loop.time() + 0.0001 * (tenth % 40)
            look = lambda due_at=due_at, rung=rung: looks.append(loop.time() - due_at) or rung.set_result(None)
            queue.set_timer(due_at + 1)
            queue.set_timer(due_at)
            queue.set_timer(due_at + 0.001)
            await asyncio.wait_for(rung, 10)
        assert len(looks) == 200 and min(looks) > -1e-6
        assert time.process_time() - begun < 0.2  # of half a second that it waits

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


async def test_what_is_kept_in_mind_of_queues_is_bounded():
    """Each version that is asked for by its number has a queue of its own."""
    stage = Stage()
    for number in range(MOST_PACES + 500):
        asked = asyncio.ensure_future(stage.batcher.submit("m", number, VERSIONS["m"], "predict", 1))
        await turn()
        stage.workers[0].answer()
        assert await asked == 2
        assert len(stage.batcher._paces) <= MOST_PACES + 1
    assert stage.is_empty()


async def test_a_request_that_fails_is_gone_at_once():
    """And with it its body, which may be large: front ends look for garbage seldom."""
    stage, body = Stage(), HttpBody(bytes(1000))
    asked = asyncio.ensure_future(stage.batcher.submit("m", None, VERSIONS["m"], "predict", body))
    await turn()
    gc.disable()
    try:
        stage.batcher.receive(stage.workers[0], Answers(0, {0: InvalidRequest("no")}))
        assert isinstance(await error_of(asked), InvalidRequest)
        content, body, asked, _ = body.content, None, None, stage.sent.clear()
        await turn()
        assert sys.getrefcount(content) == 2 and stage.is_empty()
    finally:
        gc.enable()
