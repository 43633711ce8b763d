"""The batcher on its own: workers are played by the tests, which answer each batch when they please."""

import asyncio
import contextlib
import gc
import random
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest
from conftest import wait_until
from ray_tensorflow import Batcher, DeadlineExceeded, Key, ModelError, Options, Request, Unavailable, WorkerId, WorkerLost

SOON_S = 10  # for what has to happen by itself
SHAPES = ((),)  # of one row of the one input


class Batch:
    """What was sent to a worker, and how it is answered."""

    def __init__(self, worker: WorkerId, model: str, signature: str, feeds: list):
        self.worker, self.model, self.signature, self.feeds, self.future = worker.index, model, signature, feeds, Future()

    @property
    def values(self) -> list[list]:
        return [feed[0].tolist() for feed in self.feeds]

    def answer(self, *results) -> None:
        """With these results, or with the double of what was fed."""
        self.future.set_result(list(results) or [[2 * array for array in feed] for feed in self.feeds])

    def lose_worker(self) -> None:
        self.future.set_exception(RuntimeError("the worker died"))


@pytest.fixture
def start():
    """``start(workers, **options)``: a batcher, and the batches that it sent; none of its threads may outlive the test."""
    batchers, before = [], set(threading.enumerate())

    def make(workers: int = 1, run=None, lost=lambda worker, error: None, **options):
        batches: list[Batch] = []

        def record(*arguments):
            if arguments[1] == "hold":
                entered, leave = arguments[3][0]
                entered.set()
                leave.wait(SOON_S)
                held = Future()
                held.set_result([[]])
                return held
            batches.append(Batch(*arguments))
            return batches[-1].future

        batcher = Batcher(Options(**options), run or record, lost)
        batchers.append(batcher)
        for worker in range(workers):
            batcher.add_worker(WorkerId(worker))
        return batcher, batches

    yield make
    for batcher in batchers:
        batcher.close("The test is over.")
    wait_until(lambda: not set(threading.enumerate()) - before, SOON_S, "the batchers' threads to end")


def queue(batcher, *values, model="m", signature="s", shapes=SHAPES, worker=None, writes=False, loop=None) -> Future:
    """A request with these values as its rows, in the queue."""
    future = loop.create_future() if loop else Future()
    batcher.submit(Request(Key(model, signature, shapes, worker), [np.array(values, float)], len(values), writes, future, loop))
    return future


@contextlib.contextmanager
def at_the_same_time(batcher):
    """What is queued in this block is there before any of it is sent: the batcher's own thread is held up meanwhile."""
    entered, leave = threading.Event(), threading.Event()
    batcher.submit(Request(Key("hold", "", None, 99), [entered, leave], 1, False, Future(), None))
    batcher.add_worker(WorkerId(99))
    assert entered.wait(SOON_S)
    batcher.suspend_worker(WorkerId(99))
    yield
    batcher.dispatch()
    leave.set()


def ask(batcher, *values, **options) -> Future:
    """A request that is sent at once if it may be."""
    future = queue(batcher, *values, **options)
    batcher.dispatch()
    return future


def rows(future: Future) -> list:
    return future.result(SOON_S)[0].tolist()


def busy(batcher, batches: list[Batch], **options) -> list[Batch]:
    """Two batches under way, so that the next requests of their kind have to wait."""
    for _ in range(2):
        ask(batcher, 0, **options)
    return batches[-2:]


def sent(batches: list[Batch], count: int) -> Batch:
    """The last batch, once there are so many."""
    wait_until(lambda: len(batches) >= count, SOON_S, f"batch {count}")
    assert len(batches) == count
    return batches[-1]


# -- gathering ---------------------------------------------------------------------------------------------------------


def test_a_lone_request_is_sent_at_once(start):
    batcher, batches = start()
    future = ask(batcher, 3)
    assert [(b.worker, b.model, b.signature, b.values) for b in batches] == [(0, "m", "s", [[3]])]
    batches[0].answer()
    assert rows(future) == [6]


def test_whatever_queued_up_while_batches_ran_is_the_next_batch(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in range(10)]
    assert len(batches) == 2 and batcher.waiting() == 10
    batches[0].answer()
    assert sent(batches, 3).values == [list(range(10))]
    batches[2].answer()
    assert [rows(future) for future in futures] == [[2 * value] for value in range(10)]
    assert batcher.waiting() == 0


def test_requests_of_several_rows_get_their_own_rows_back(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, *values) for values in ([1, 2, 3], [], [4], [5, 6])]
    batches[0].answer()
    sent(batches, 3).answer()
    assert [rows(future) for future in futures] == [[2, 4, 6], [], [8], [10, 12]]


def test_several_inputs_and_outputs_stay_together(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [Future() for _ in range(3)]
    for i, future in enumerate(futures):
        batcher.submit(Request(Key("m", "s", ((2,), ()), None), [np.full((1, 2), i), np.array([10 * i])], 1, False, future, None))
    batches[0].answer()
    batches[1].answer()
    x, y = sent(batches, 3).feeds[0]
    assert x.tolist() == [[0, 0], [1, 1], [2, 2]] and y.tolist() == [0, 10, 20]
    batches[2].answer([y, x])
    assert [[array.tolist() for array in future.result(SOON_S)] for future in futures] == [[[10 * i], [[i, i]]] for i in range(3)]


def test_no_more_than_max_batch_travel_together(start):
    batcher, batches = start(max_batch=4)
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in range(10)]
    for number in range(5):
        sent(batches, min(number + 2, 5))
        batches[number].answer()
    assert [b.values[0] for b in batches[2:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [rows(future) for future in futures] == [[2 * value] for value in range(10)]


def test_full_batches_go_to_all_workers_that_are_free(start):
    batcher, batches = start(workers=3, max_batch=2)
    with at_the_same_time(batcher):
        for value in range(12):
            queue(batcher, value)
    assert [b.values[0] for b in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_small_batches_of_one_kind_wait_for_company_although_workers_are_free(start):
    batcher, batches = start(workers=4)
    busy(batcher, batches)
    ask(batcher, 1)
    ask(batcher, 2)
    assert len(batches) == 2
    batches[1].answer()
    assert sent(batches, 3).values == [[1, 2]]


@pytest.mark.parametrize(
    "other", [{"model": "n"}, {"signature": "t"}, {"shapes": ((2,),)}, {"shapes": None}, {"worker": 0}], ids=str)
def test_unlike_requests_do_not_mix(start, other):
    batcher, batches = start()
    with at_the_same_time(batcher):
        for _ in range(2):
            queue(batcher, 1)
            queue(batcher, 2, **other)
    assert len(batches) == 2
    assert [(b.model, b.signature, np.ravel(b.values).tolist()) for b in batches] == [
        ("m", "s", [1, 1]), (other.get("model", "m"), other.get("signature", "s"), [2, 2])]


def test_kinds_take_turns(start):
    batcher, batches = start(max_batch=2)
    with at_the_same_time(batcher):
        for value in range(10):
            queue(batcher, value)
        queue(batcher, -1, model="small")
    assert [b.model for b in batches] == ["m", "small"]


def test_requests_that_cannot_share_a_run_travel_together_and_run_one_by_one(start):
    batcher, batches = start()
    for value in range(4):
        ask(batcher, value, shapes=None)
    assert [b.values for b in batches] == [[[0]], [[1]]]
    batches[0].answer()
    assert sent(batches, 3).values == [[2], [3]]


def test_requests_that_cannot_share_a_run_are_spread_over_the_workers(start):
    batcher, batches = start(workers=3)
    with at_the_same_time(batcher):
        futures = [queue(batcher, value, shapes=None) for value in range(12)]
    assert [len(b.feeds) for b in batches] == [2] * 6 and sorted(b.worker for b in batches) == [0, 0, 1, 1, 2, 2]
    for batch in batches:
        batch.answer()
    assert [rows(future) for future in futures] == [[2 * value] for value in range(12)]


# -- waiting for company -----------------------------------------------------------------------------------------------


def test_a_batch_waits_for_company_as_long_as_batch_wait_ms(start):
    batcher, batches = start(batch_wait_ms=300)
    began = time.monotonic()
    ask(batcher, 1)
    ask(batcher, 2)
    assert not batches
    assert sent(batches, 1).values == [[1, 2]]
    assert 0.3 <= time.monotonic() - began < 5


def test_a_full_batch_does_not_wait_for_company(start):
    batcher, batches = start(batch_wait_ms=60_000, max_batch=3)
    for value in range(3):
        ask(batcher, value)
    assert batches[0].values == [[0, 1, 2]]


def test_requests_that_cannot_share_a_run_do_not_wait_for_company(start):
    batcher, batches = start(batch_wait_ms=60_000)
    ask(batcher, 1, shapes=None)
    assert batches[0].values == [[1]]


def test_batch_wait_ms_is_kept_while_another_request_runs(start):
    batcher, batches = start(batch_wait_ms=50)
    ask(batcher, 1, model="slow")
    sent(batches, 1)
    wait_until(lambda: batcher.waiting() == 0, SOON_S)
    ask(batcher, 2)
    assert sent(batches, 2).values == [[2]]


@pytest.mark.parametrize(
    "situation", ["nothing to do", "one under way", "enough of its kind under way", "its own worker is away"])
def test_the_batchers_thread_sleeps_until_there_is_something_to_do(start, situation):
    batcher, batches = start(workers=2, batch_wait_ms=1)
    if situation != "nothing to do":
        ask(batcher, 1, worker=7 if "away" in situation else None)
    if situation == "one under way":
        sent(batches, 1)
    if "enough" in situation:
        sent(batches, 1)
        ask(batcher, 2)
        sent(batches, 2)
        ask(batcher, 3)

    def wake_ups() -> int:
        with open(f"/proc/self/task/{batcher._thread.native_id}/status") as file:
            return sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)

    before = wake_ups()
    time.sleep(0.5)
    assert wake_ups() - before < 50


# -- limits ------------------------------------------------------------------------------------------------------------


def test_past_max_queue_requests_are_refused_until_there_is_room(start):
    batcher, batches = start(max_queue=3)
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in range(3)]
    with pytest.raises(Unavailable, match="3") as raised:
        ask(batcher, 99)
    assert raised.value.status == 503
    batches[0].answer()
    sent(batches, 3)
    futures.append(ask(batcher, 3))
    batches[1].answer()
    batches[2].answer()
    sent(batches, 4).answer()
    assert [rows(future) for future in futures] == [[0], [2], [4], [6]]


def test_requests_past_their_deadline_make_room(start):
    batcher, _ = start(workers=0, max_queue=2, timeout_s=0.1)
    for future in [queue(batcher, value) for value in range(2)]:
        future.exception(SOON_S)
    assert batcher.waiting() == 0
    queue(batcher, 3)
    assert batcher.waiting() == 1


@pytest.mark.parametrize("writes", [False, True])
def test_a_request_that_was_never_sent_gets_504_at_its_deadline(start, writes):
    batcher, _ = start(workers=0, timeout_s=0.2)
    began = time.monotonic()
    error = ask(batcher, 1, writes=writes).exception(SOON_S)
    assert isinstance(error, DeadlineExceeded) and error.status == 504 and "0.2 s" in str(error)
    assert 0.2 <= time.monotonic() - began < 5


@pytest.mark.parametrize("writes, kind, status", [(False, DeadlineExceeded, 504), (True, WorkerLost, 502)])
def test_a_write_that_was_sent_gets_502_at_its_deadline_and_a_read_504(start, writes, kind, status):
    batcher, batches = start(timeout_s=0.2)
    future = ask(batcher, 1, writes=writes)
    assert len(batches) == 1
    error = future.exception(SOON_S)
    assert type(error) is kind and error.status == status and ("may" in str(error)) == writes
    batches[0].answer()  # too late, and no harm


def test_requests_past_their_deadline_are_not_run(start):
    batcher, batches = start(workers=0, timeout_s=0.2)
    late = [ask(batcher, value, writes=True) for value in range(3)]
    wait(late, SOON_S)
    batcher.add_worker(WorkerId(0))
    ask(batcher, 99)
    assert sent(batches, 1).values == [[99]]


def test_each_request_has_a_deadline_of_its_own(start):
    batcher, batches = start(timeout_s=0.5)
    began = time.monotonic()
    ask(batcher, 0)
    answered = ask(batcher, 1)
    batches[1].answer()
    first = ask(batcher, 2)
    first.exception(SOON_S)
    assert 0.5 <= time.monotonic() - began < 5 and rows(answered) == [2]
    second = ask(batcher, 3)
    began = time.monotonic()
    assert isinstance(second.exception(SOON_S), DeadlineExceeded) and 0.5 <= time.monotonic() - began < 5


def test_requests_of_cancelled_callers_are_not_run(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in range(4)]
    futures[0].cancel()
    futures[2].cancel()
    batches[0].answer()
    sent(batches, 3).answer()
    assert batches[2].values == [[1, 3]] and rows(futures[1]) == [2] and rows(futures[3]) == [6]


def test_a_caller_that_is_cancelled_while_its_batch_runs_does_not_disturb_the_others(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in range(3)]
    batches[0].answer()
    sent(batches, 3)
    futures[1].cancel()
    batches[2].answer()
    assert rows(futures[0]) == [0] and rows(futures[2]) == [4]


# -- requests that fail ------------------------------------------------------------------------------------------------


def test_a_request_that_fails_alone_gets_the_models_words_and_status(start):
    batcher, batches = start()
    future = ask(batcher, -1)
    batches[0].answer((400, "x must not be negative"))
    error = future.exception(SOON_S)
    assert isinstance(error, ModelError) and (error.status, str(error)) == (400, "x must not be negative")


def test_one_bad_request_does_not_fail_its_batch(start):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in (1, -1, 2)]
    batches[0].answer()
    sent(batches, 3).answer((400, "x must not be negative"))
    again = sent(batches, 4)
    assert again.values == [[1], [-1], [2]] and again.worker == batches[2].worker
    again.answer([np.array([2.0])], (400, "x must not be negative"), [np.array([4.0])])
    assert rows(futures[0]) == [2] and rows(futures[2]) == [4]
    assert isinstance(futures[1].exception(SOON_S), ModelError)


def test_after_a_bad_request_its_signature_is_still_batched(start):
    batcher, batches = start()
    busy(batcher, batches)
    for value in (1, -1):
        ask(batcher, value)
    batches[0].answer()
    sent(batches, 3).answer((400, "no"))
    sent(batches, 4)
    futures = [ask(batcher, value) for value in (5, 6)]
    batches[1].answer()
    assert sent(batches, 5).values == [[5, 6]]
    batches[3].answer()
    batches[4].answer()
    assert [rows(future) for future in futures] == [[10], [12]]


def test_requests_that_cannot_share_a_run_fail_alone(start):
    batcher, batches = start()
    with at_the_same_time(batcher):
        futures = [queue(batcher, value, shapes=None) for value in (1, -1, 2)]
    assert [b.values for b in batches] == [[[1], [-1]], [[2]]]
    batches[0].answer([np.array([2.0])], (400, "no"))
    batches[1].answer()
    assert rows(futures[0]) == [2] and rows(futures[2]) == [4] and isinstance(futures[1].exception(SOON_S), ModelError)


WRONG_LENGTHS = {
    "too short": [np.zeros(2)], "too long": [np.zeros(4)], "empty": [np.zeros(0)], "no rows at all": [np.array(0.0)],
    "one output of two": [np.zeros(3), np.zeros(1)]}


@pytest.mark.parametrize("result", WRONG_LENGTHS.values(), ids=WRONG_LENGTHS)
def test_a_result_of_the_wrong_length_is_run_again_one_by_one(start, result):
    batcher, batches = start()
    busy(batcher, batches)
    futures = [ask(batcher, value) for value in (1, 2, 3)]
    batches[0].answer()
    sent(batches, 3).answer(result)
    again = sent(batches, 4)
    assert again.values == [[1], [2], [3]]
    again.answer()
    assert [rows(future) for future in futures] == [[2], [4], [6]]


def test_a_signature_with_a_result_of_the_wrong_length_is_never_merged_again_and_others_are(start):
    batcher, batches = start()

    def together(signature: str) -> list[list]:
        before = len(batches)
        with at_the_same_time(batcher):
            futures = [queue(batcher, value, signature=signature) for value in range(4)]
        values = [b.values for b in batches[before:]]
        for batch in batches[before:]:
            batch.answer()
        wait(futures, SOON_S)
        return values

    assert together("s") == together("t") == [[[0, 1, 2, 3]]]
    with at_the_same_time(batcher):
        futures = [queue(batcher, value) for value in range(4)]
    batches[-1].answer([np.zeros(1)])
    sent(batches, 4).answer()
    wait(futures, SOON_S)
    assert together("s") == [[[0], [1]], [[2], [3]]]
    assert together("t") == [[[0, 1, 2, 3]]]


def test_the_result_of_a_single_request_may_have_any_length(start):
    batcher, batches = start()
    future = ask(batcher, 1, 2, 3)
    batches[0].answer([np.array(5.0)])
    assert rows(future) == 5


def test_requests_that_call_out_leave_a_place_to_what_they_wait_for(start):
    """Such as a model that asks this very server for another model's answer."""
    batcher, batches = start(workers=2)
    for model in "abcdef":
        future = Future()
        batcher.submit(Request(Key(model, "s", None, None, True), [np.zeros(1)], 1, False, future, None))
        batcher.dispatch()
    assert len(batches) == 3 and batcher.waiting() == 3
    inner = ask(batcher, 1)
    assert len(batches) == 4
    batches[3].answer()
    assert rows(inner) == [2]


# -- workers -----------------------------------------------------------------------------------------------------------


def test_workers_take_turns_in_round_robin_order(start):
    batcher, batches = start(workers=3)
    for value in range(9):
        ask(batcher, value)
        batches[-1].answer()
    assert [b.worker for b in batches] == [0, 1, 2] * 3


def test_batches_at_the_same_time_go_to_different_workers(start):
    batcher, batches = start(workers=3)
    for value in range(3):
        ask(batcher, value, model=f"m{value}")
    assert sorted(b.worker for b in batches) == [0, 1, 2]


def test_the_turn_of_a_worker_with_its_hands_full_is_passed_over(start):
    batcher, batches = start(workers=2)
    for model in "mn":
        ask(batcher, 0, worker=0, model=model)
    assert [b.worker for b in batches] == [0, 0]
    for value in range(3):
        ask(batcher, value)
        assert batches[-1].worker == 1
        batches[-1].answer()


def test_a_worker_never_has_more_than_two_batches(start):
    batcher, batches = start(workers=2, max_batch=1)
    with at_the_same_time(batcher):
        for value in range(20):
            queue(batcher, value)
    for number in range(20):
        sent(batches, min(number + 4, 20))
        open_batches = [b.worker for b in batches if not b.future.done()]
        assert max(map(open_batches.count, open_batches)) <= 2
        next(b for b in batches if not b.future.done()).answer()


def test_a_pinned_request_goes_to_its_worker_alone(start):
    batcher, batches = start(workers=3)
    for value in range(4):
        ask(batcher, value, worker=2)
        batches[-1].answer()
    assert [b.worker for b in batches] == [2] * 4


def test_a_pinned_request_waits_for_its_worker_and_others_do_not_wait_for_it(start):
    batcher, batches = start(workers=1)
    pinned = ask(batcher, 1, worker=1)
    ask(batcher, 2)
    assert [(b.worker, b.values) for b in batches] == [(0, [[2]])]
    batcher.add_worker(WorkerId(1))
    assert sent(batches, 2).worker == 1
    batches[1].answer()
    assert rows(pinned) == [2]


def test_requests_wait_for_the_first_worker(start):
    batcher, batches = start(workers=0)
    futures = [ask(batcher, value) for value in range(3)]
    assert not batches
    batcher.add_worker(WorkerId(0))
    assert sent(batches, 1).values == [[0, 1, 2]]
    batches[0].answer()
    assert [rows(future) for future in futures] == [[0], [2], [4]]


def test_what_only_reads_runs_again_elsewhere_when_its_worker_was_lost(start):
    lost = []
    batcher, batches = start(workers=2, lost=lambda worker, error: lost.append((worker.index, str(error))))
    with at_the_same_time(batcher):
        futures = [queue(batcher, value) for value in (1, 2, 3)]
    first = batches[0].worker
    batches[0].lose_worker()
    again = sent(batches, 2)
    assert again.worker == 1 - first and again.values == [[1, 2, 3]] and lost == [(first, "the worker died")]
    again.answer()
    assert [rows(future) for future in futures] == [[2], [4], [6]]


def test_what_writes_gets_502_when_its_worker_was_lost_and_is_not_run_again(start):
    batcher, batches = start(workers=2)
    future = ask(batcher, 1, writes=True)
    batches[0].lose_worker()
    error = future.exception(SOON_S)
    assert isinstance(error, WorkerLost) and error.status == 502 and f"{batches[0].worker}" in str(error) and "may" in str(error)
    read = ask(batcher, 2)
    assert sent(batches, 2).values == [[2]]
    batches[1].answer()
    assert rows(read) == [4]


def test_what_waited_behind_a_lost_worker_runs_elsewhere_after_what_runs_again(start):
    batcher, batches = start(workers=1)
    busy(batcher, batches)
    futures = [ask(batcher, value, writes=True) for value in (1, 2)]
    batcher.add_worker(WorkerId(1))
    batches[0].lose_worker()
    assert sent(batches, 3).values == [[0, 0, 1, 2]]
    batches[2].answer()
    assert [rows(future) for future in futures] == [[2], [4]]


def test_a_lost_worker_gets_nothing_until_it_is_added_again(start):
    batcher, batches = start(workers=2)
    ask(batcher, 0, writes=True)
    gone = batches[0].worker
    batches[0].lose_worker()
    for value in range(4):
        ask(batcher, value)
        batches[-1].answer()
    assert {b.worker for b in batches[1:]} == {1 - gone}
    batcher.add_worker(WorkerId(gone))
    for value in range(4):
        ask(batcher, value)
        batches[-1].answer()
    assert [b.worker for b in batches[5:]].count(gone) == 2


def test_a_worker_that_cannot_even_be_called_counts_as_lost(start):
    lost, calls = [], []

    def run(worker, model, signature, feeds):
        calls.append(worker.index)
        if len(calls) == 1:
            raise ConnectionError("no such actor")
        future = Future()
        future.set_result(feeds)
        return future

    batcher, _ = start(workers=2, run=run, lost=lambda worker, error: lost.append(worker.index))
    assert rows(ask(batcher, 5)) == [5] and lost == calls[:1] and calls[1] != calls[0]


def test_a_read_gets_504_when_no_worker_comes_back_before_its_deadline(start):
    batcher, batches = start(timeout_s=0.3)
    future = ask(batcher, 1)
    batches[0].lose_worker()
    assert isinstance(future.exception(SOON_S), DeadlineExceeded) and len(batches) == 1


def test_a_read_that_lost_two_workers_is_not_given_a_third(start):
    """It may be what kills them."""
    batcher, batches = start(workers=3)
    future = ask(batcher, 1)
    batches[0].lose_worker()
    sent(batches, 2).lose_worker()
    error = future.exception(SOON_S)
    assert isinstance(error, WorkerLost) and error.status == 502 and len(batches) == 2


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_answers_what_waits_and_what_was_sent(start):
    batcher, batches = start()
    futures = [ask(batcher, value) for value in range(5)]
    batcher.close("The server is shutting down.")
    for future in futures:
        error = future.exception(SOON_S)
        assert isinstance(error, Unavailable) and (error.status, str(error)) == (503, "The server is shutting down.")
    for batch in list(batches):
        batch.answer()  # too late, and no harm
    assert len(batches) == 2 and batcher.waiting() == 0


def test_after_close_requests_are_refused_with_its_reason(start):
    batcher, batches = start()
    batcher.close("The server is shutting down.")
    with pytest.raises(Unavailable, match="^The server is shutting down.$"):
        ask(batcher, 1)
    batcher.add_worker(WorkerId(5))
    batcher.dispatch()
    assert not batches


def test_workers_lost_by_close_itself_start_nothing_again(start):
    batcher, batches = start(workers=2)
    read, write = ask(batcher, 1), ask(batcher, 2, writes=True)
    batcher.close("Bye.")
    for batch in list(batches):
        batch.lose_worker()
    assert {type(future.exception(SOON_S)) for future in (read, write)} == {Unavailable} and len(batches) == 2


def test_close_may_be_called_twice_and_ends_the_thread(start):
    batcher, _ = start()
    batcher.close("Bye.")
    batcher.close("Bye again.")
    batcher._thread.join(SOON_S)
    assert not batcher._thread.is_alive()


# -- threads, event loops, memory --------------------------------------------------------------------------------------


def test_an_event_loops_callers_get_their_answers_in_that_loop(start):
    batcher, batches = start()

    async def main() -> list:
        loop = asyncio.get_running_loop()
        futures = [ask(batcher, value, loop=loop) for value in range(5)]
        threading.Thread(target=lambda: [b.answer() for b in list(batches)] and sent(batches, 3).answer()).start()
        return [(await future)[0].tolist() for future in futures]

    assert asyncio.run(main()) == [[2 * value] for value in range(5)]


def test_an_event_loops_callers_get_errors_of_their_own(start):
    batcher, _ = start(workers=0, timeout_s=0.1)

    async def main() -> list:
        futures = [ask(batcher, value, loop=asyncio.get_running_loop()) for value in range(3)]
        return await asyncio.gather(*futures, return_exceptions=True)

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {DeadlineExceeded} and len(set(map(id, errors))) == 3


def test_a_cancelled_task_is_not_run_and_does_not_disturb_the_others(start):
    batcher, batches = start()

    async def call(value: int):
        return (await ask(batcher, value, loop=asyncio.get_running_loop()))[0].tolist()

    async def main() -> list:
        busy(batcher, batches)
        tasks = [asyncio.create_task(call(value)) for value in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: [batches[0].answer(), sent(batches, 3).answer()])
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[1], asyncio.CancelledError) and results[:1] + results[2:] == [[0], [4], [6]]
    assert batches[2].values == [[0, 2, 3]]


def test_a_loop_that_ended_before_its_answer_came_does_not_disturb_the_others(start):
    batcher, batches = start()

    async def give_up():
        queue(batcher, 1, loop=asyncio.get_running_loop())

    with at_the_same_time(batcher):
        asyncio.run(give_up())
        future = queue(batcher, 2)
    assert batches[0].values == [[1, 2]]
    batches[0].answer()
    assert rows(future) == [4]


def test_threads_and_event_loops_mixed_all_get_their_own_answers_while_workers_come_and_go(start):
    """4 threads and 2 event loops, 3 workers of which one is lost now and then, and at times a run that fails."""
    chance, lock, pool = random.Random(1), threading.Lock(), ThreadPoolExecutor(6)

    def run(worker, model, signature, feeds):
        with lock:
            fate = chance.random()
        return pool.submit(work, feeds, fate)

    def work(feeds, fate):
        if fate < 0.02:
            raise RuntimeError("the worker died")
        bad = [(400, "bad")] if fate < 0.1 and len(feeds) == 1 and len(feeds[0][0]) > 1 else []
        return bad or [[2 * feed[0]] for feed in feeds]

    def lost(worker, error):
        pool.submit(batcher.add_worker, worker)

    batcher, _ = start(workers=3, run=run, lost=lost, max_batch=8, max_queue=10_000)

    def judge(value: int, result) -> bool:
        return isinstance(result, WorkerLost) or result[0].tolist() == [2 * value]

    def thread(first: int) -> list[bool]:
        outcomes = []
        for value in range(first, first + 300):
            future = ask(batcher, value, writes=value % 3 == 0)
            outcomes.append(judge(value, future.exception(SOON_S) or future.result()))
        return outcomes

    async def many(first: int) -> list[bool]:
        loop, values = asyncio.get_running_loop(), range(first, first + 600)
        futures = [ask(batcher, value, loop=loop, writes=value % 3 == 0) for value in values]
        results = await asyncio.gather(*futures, return_exceptions=True)
        return [judge(value, result) for value, result in zip(values, results)]

    try:
        with ThreadPoolExecutor(6) as callers:
            jobs = [callers.submit(thread, 1000 * i) for i in range(4)]
            jobs += [callers.submit(asyncio.run, many(10_000 * i)) for i in (1, 2)]
            outcomes = [outcome for job in jobs for outcome in job.result(60)]
    finally:
        pool.shutdown()
    assert len(outcomes) == 2400 and all(outcomes)
    assert batcher.waiting() == 0 and not batcher._in_flight


def at_once(worker, model, signature, feeds) -> Future:
    future = Future()
    future.set_result([[2 * feed[0]] for feed in feeds])
    return future


def kept_of(batcher, count: int) -> int:
    """How many of so many requests are still in memory after their answers."""
    references = []
    for _ in range(count):
        value, future = np.ones(1), Future()
        references.append(weakref.ref(value))
        batcher.submit(Request(Key("m", "s", SHAPES, None), [value], 1, False, future, None))
        batcher.dispatch()
        assert rows(future) == [2]
        del value, future
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_finished_requests_are_not_kept(start):
    batcher, _ = start(run=at_once)
    assert kept_of(batcher, 100) <= 1


def test_finished_requests_are_not_kept_while_an_older_one_still_runs(start):
    stuck = Future()
    batcher, _ = start(run=lambda worker, model, *rest: stuck if model == "slow" else at_once(worker, model, *rest))
    ask(batcher, 1, model="slow")
    assert kept_of(batcher, 100) <= 1


def test_requests_whose_callers_went_away_are_not_kept(start):
    batcher, batches = start()
    busy(batcher, batches)
    references = []
    for _ in range(100):
        value, future = np.ones(1), Future()
        references.append(weakref.ref(value))
        batcher.submit(Request(Key("m", "s", SHAPES, None), [value], 1, False, future, None))
        future.cancel()
        del value, future
    batches[0].answer()
    batches[1].answer()
    wait_until(lambda: batcher.waiting() == 0, SOON_S)
    gc.collect()
    assert sum(reference() is not None for reference in references) <= 1
