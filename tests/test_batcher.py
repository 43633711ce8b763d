"""How requests are gathered, sent, run together and answered: the batcher with workers that the tests play, and then
what a worker does with a batch, with TensorFlow in this process."""

import asyncio
import itertools
import random
import time

import numpy as np
import pytest
from conftest import wait_until

from shared_graph.batch_runner import answer_requests
from shared_graph.batcher import Batcher, Line
from shared_graph.errors import DeadlineExceeded, Error, InvalidRequest, ModelError, Unavailable, WorkerLost
from shared_graph.graph import Graph
from shared_graph.merging import find_merged
from shared_graph.models import ADDER_SOURCE, Model, ModelSource
from shared_graph.options import Options
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.wire import read_frame, to_frame

KINDS = {
    "m": {"merged": ["serving_default"]},
    "n": {"merged": ["serving_default"]},
    "single": {},
    "caller": {"calls_out": True},
}
MODELS = {name: Model(ModelSource(name, 1), "AVAILABLE", **kind) for name, kind in KINDS.items()}
PLACES = 2  # batches that a worker is sent at once
LARGE_BYTES = 2**26


class PlayedWorker:
    """A line to a worker: a test sees what was sent there, and answers when it pleases."""

    def __init__(self, index: int, batcher: Batcher, sent: list[tuple]):
        self.index, self.is_hung, self.trips = index, False, {}
        self.batcher, self.sent, self.numbers = batcher, sent, itertools.count()
        batcher.add(self)

    def send(self, key: tuple, requests: list) -> None:
        self.trips[next(self.numbers)] = dict(enumerate(requests))
        self.sent.append((self.index, key[0], [request.body for request in requests]))

    def answer(self) -> None:
        """The batch that was sent first, with twice each request's body."""
        for request in self.trips.pop(min(self.trips)).values():
            self.batcher.resolve(request, 2 * request.body)
        self.batcher.dispatch()


class Stage:
    """A batcher and its workers; ``sent`` is what went to them: (worker, model, bodies) of each batch."""

    def __init__(self, workers: int = 1, **options):
        self.batcher, self.sent = Batcher(Options(**options)), []
        self.batcher.at_once = 2  # as on a machine of many processors
        self.workers = [self.add_worker(index) for index in range(workers)]

    def add_worker(self, index: int) -> PlayedWorker:
        return PlayedWorker(index, self.batcher, self.sent)

    def ask(self, *bodies, model="m", worker=None, verb="predict") -> list[asyncio.Future]:
        """A request for each body; what can be sent is sent at the end of this turn of the loop."""
        futures = []
        for body in bodies:
            try:
                waiting = self.batcher.submit((model, None), MODELS[model], verb, body, worker)
                futures.append(waiting.send(None))  # the future that it awaits
            except Error as error:
                futures.append(asyncio.get_running_loop().create_future())
                futures[-1].set_exception(error)
        return futures

    @property
    def bodies(self) -> list[list]:
        return [bodies for _, _, bodies in self.sent]


async def turn() -> None:
    """One turn of the loop."""
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


async def test_where_there_are_two_processors_a_batch_that_is_not_full_waits_for_the_one_under_way():
    stage = Stage(workers=2, max_batch=4)
    stage.batcher.at_once = 1
    for bodies in ([0], [1, 2], [3, 4, 5]):
        stage.ask(*bodies)
        await turn()
    assert stage.bodies == [[0], [1, 2, 3, 4]]  # which is full
    stage.workers[0].answer()
    stage.workers[1].answer()
    assert stage.bodies == [[0], [1, 2, 3, 4], [5]]


async def test_no_more_than_max_batch_travel_together_and_models_take_turns():
    stage = Stage(workers=2, max_batch=4)
    stage.ask(*range(12))
    stage.ask(99, model="n")
    await turn()
    assert [(model, bodies) for _, model, bodies in stage.sent] == [
        ("m", [0, 1, 2, 3]),
        ("n", [99]),
        ("m", [4, 5, 6, 7]),
        ("m", [8, 9, 10, 11]),
    ]


async def test_a_batch_waits_for_company_as_long_as_batch_wait_ms():
    stage, started = Stage(batch_wait_ms=200), time.monotonic()
    stage.ask(1)
    await turn()
    stage.ask(2)
    await turn()
    assert stage.sent == []
    await asyncio.to_thread(wait_until, lambda: stage.sent)
    assert stage.bodies == [[1, 2]] and time.monotonic() - started >= 0.2
    for model, count in (("m", 3), ("single", 1)):  # it is full, or not to share a run: then it does not wait
        stage = Stage(batch_wait_ms=60_000, max_batch=3)
        stage.ask(*range(count), model=model)
        await turn()
        assert stage.bodies == [list(range(count))]


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
    assert [worker for worker, _, _ in stage.sent[2:]] == [0, 0]


async def test_past_max_queue_requests_are_refused_until_there_is_room():
    stage = Stage(workers=0, max_queue=3)
    *_, refused = stage.ask(1, 2, 3, 4)
    error = await error_of(refused)
    assert isinstance(error, Unavailable) and error.status == 503
    stage.add_worker(0)
    assert not any(future.done() for future in stage.ask(5, 6, 7)) and stage.bodies == [[1, 2, 3]]


async def test_large_requests_travel_alone_and_are_refused_when_too_many_bytes_wait():
    stage = Stage(workers=1)
    futures = stage.ask(*[(b"", np.broadcast_to(0.0, LARGE_BYTES // 8))] * 100)
    refused = [future for future in futures if future.done()]
    assert 0 < len(refused) < 100 and all(isinstance(future.exception(), Unavailable) for future in refused)
    await turn()
    assert [len(bodies) for bodies in stage.bodies] == [1, 1]


@pytest.mark.parametrize("workers", [0, 1], ids=["queued", "sent"])
async def test_a_request_without_an_answer_gets_504_at_its_deadline_and_makes_room(workers):
    stage, started = Stage(workers, timeout_s=0.2), time.monotonic()
    [future] = stage.ask(1)
    error = await error_of(future)
    assert isinstance(error, DeadlineExceeded) and error.status == 504 and "0.2 s" in str(error)
    assert time.monotonic() - started >= 0.2 and stage.batcher.waiting == 0
    for worker in stage.workers:
        worker.answer()  # too late, and no harm
    stage.add_worker(1)
    assert len(stage.sent) == workers


async def test_a_reply_that_comes_twice_leaves_the_line_as_it_is():
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            number, _, requests = await read_frame(reader)
            for _ in range(2):
                writer.writelines(to_frame((number, {i: 2 * body for i, (_, body, _, _) in enumerate(requests)})))

    stage = Stage(workers=0)
    async with await asyncio.start_server(work, "127.0.0.1") as worker:
        line = Line(0, *await asyncio.open_connection(*worker.sockets[0].getsockname()), stage.batcher)
        for body in range(4):
            assert await stage.batcher.submit(("m", None), MODELS["m"], "predict", body) == 2 * body
        assert not line.closed.done()
        line.writer.close()
        await line.closed


async def test_what_a_lost_worker_had_runs_once_more_elsewhere_before_what_queued_up_meanwhile():
    stage = Stage()
    futures = stage.ask(1, 2)
    await turn()
    lost = stage.workers[0]
    stage.batcher.remove(lost)
    futures += stage.ask(3)
    other = stage.add_worker(1)
    assert stage.sent == [(0, "m", [1, 2]), (1, "m", [1, 2, 3])] and lost.trips == {}
    assert [request.is_repeated for request in other.trips[0].values()] == [True, True, False]
    other.answer()
    assert await asyncio.gather(*futures) == [2, 4, 6]


@pytest.mark.parametrize("verb, lost", [("add", 1), ("predict", 2)])
async def test_an_add_that_lost_its_worker_or_a_request_that_lost_two_is_502_and_is_not_run_again(verb, lost):
    stage = Stage(workers=3)
    [future] = stage.ask(1, verb=verb)
    await turn()
    for number in range(lost):
        stage.batcher.remove(stage.workers[stage.sent[number][0]])
    error = await error_of(future)
    assert isinstance(error, WorkerLost) and error.status == 502 and "may or may not" in str(error)
    assert len(stage.sent) == lost


async def test_closed_it_answers_what_waits_and_what_was_sent_and_whatever_comes():
    stage = Stage(max_batch=1)
    futures = stage.ask(*range(5))
    await turn()
    stage.batcher.close(Unavailable("It is over."))
    futures += stage.ask(5)
    assert [str(await error_of(future)) for future in futures] == ["It is over."] * 6
    assert len(stage.sent) == 2 and stage.batcher.waiting == 0


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_each_request_is_answered_and_none_runs_more_often_than_it_may(seed):
    chance, stage, asked = random.Random(seed), Stage(workers=3, max_batch=4, max_queue=10_000), {}

    def ask(body):
        verb = chance.choice(["predict", "add"])
        worker = chance.choice([None, None, 0, 1, 2])
        [future] = stage.ask(body, verb=verb, model=chance.choice(["m", "n", "single", "caller"]), worker=worker)
        asked[body] = verb, future

    def play():
        worker = chance.choice(stage.workers)
        what = chance.choices(["answer", "lose", "cancel"], [20, 1, 1])[0]
        if what == "answer" and worker.trips:
            worker.answer()
        elif what == "lose":
            stage.batcher.remove(worker)
            stage.workers[worker.index] = stage.add_worker(worker.index)
        elif what == "cancel":
            chance.choice([future for _, future in asked.values()]).cancel()

    for body in range(2000):
        ask(body)
        play()
        await turn()
        assert all(len(worker.trips) <= PLACES for worker in stage.workers)
    while not all(future.done() for _, future in asked.values()):
        play()
    for body, (verb, future) in asked.items():
        runs = sum(bodies.count(body) for bodies in stage.bodies if body in bodies)
        assert runs <= (1 if verb == "add" else 2)
        if not future.cancelled():
            assert isinstance(future.exception(), WorkerLost) or (runs and future.result() == 2 * body)
    assert max(map(len, stage.bodies)) <= 4 and stage.batcher.waiting == 0


# -- what a worker does with a batch -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load():
    """``load(source)``: the graph of an example model, or of a source, in this process alone. Found out, or said, is
    which signatures share runs."""
    tf = import_tensorflow()

    def load(source: str | ModelSource, *merged: str) -> Graph:
        if isinstance(source, str):
            source = ModelSource(source, 1, function=f"example_models:{source}")
        graph = Graph(tf, source, tasks=0)
        graph.connect(tf, [], Options())
        graph.restore()
        for name in [*find_merged(graph, Options()), *merged]:
            graph.signatures[name].merged = True
        return graph

    return load


def rows(*values, signature="serving_default", seconds=60, is_repeated=False) -> tuple:
    """A request with these rows of the only input."""
    return "arrays", (signature, np.array(values)), seconds, is_repeated


def answers(graph: Graph, *requests: tuple) -> list:
    """Lists for the arrays of each answer, just one for an only output; and errors."""
    found = {}
    answer_requests(graph, list(requests), found.update, time.monotonic())
    for index, answer in found.items():
        if isinstance(answer, dict):
            arrays = tuple(array.tolist() for array in answer.values())
            found[index] = arrays if len(arrays) > 1 else arrays[0]
    return [found[index] for index in range(len(requests))]


def test_requests_whose_rows_fit_share_a_run_and_get_their_own_rows_back(load):
    graph = load("crowd")
    assert answers(graph, rows(12345), rows(1, 12345), rows(2)) == [[4], [1, 4], [2]]
    assert answers(graph, rows(12345), rows([12345, 0]), rows(12345)) == [[2], [[2, 0]], [2]]


def test_one_bad_request_does_not_fail_its_batch(load):
    first, bad, unread, last = answers(
        load("picky", "serving_default"), rows(2), rows(-2), ("predict", (b"{", False), 60, False), rows(4)
    )
    assert (first, last) == ([1], [2]) and isinstance(unread, InvalidRequest)
    assert isinstance(bad, ModelError) and bad.status == 400 and "must not be negative" in str(bad)
    adds = [("add", value, 60, False) for value in (1.7e308, 1.7e308, -1.7e308)]
    first, bad, last = answers(load(ADDER_SOURCE), *adds)
    assert (first, last) == (1.7e308, 0) and isinstance(bad, ModelError)


def test_a_result_of_the_wrong_length_is_run_again_one_by_one(load):
    assert answers(load("failing", "first_row"), *[rows(value, 0, signature="first_row") for value in (1, 2)]) == [
        ([1, 0], [1]),
        ([2, 0], [2]),
    ]


def test_what_came_past_its_deadline_or_from_a_lost_worker_is_not_run_unless_in_time_and_it_changes_nothing(load):
    """All are answered: only so their places become free."""
    late, repeated, read, count = answers(
        load("counter"),
        rows(0, signature="count", seconds=0),
        rows(0, signature="count", is_repeated=True),
        rows(0, signature="read", is_repeated=True),
        rows(0, signature="count"),
    )
    assert isinstance(late, DeadlineExceeded) and isinstance(repeated, WorkerLost) and repeated.status == 502
    assert (read, count) == (0, 1)
