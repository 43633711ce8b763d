"""What a worker does with a batch: with a graph that the tests play, and with TensorFlow in this process."""

import collections
import math
import random
import time

import numpy as np
import pytest

import shared_graph.batch_runner as module
from shared_graph.batch_runner import AUDITED, MAX_SHARED_ROWS, NOT_HALVED, TRIED_ROWS, BatchRunner, Item, distinct_rows
from shared_graph.bodies import HttpBody
from shared_graph.errors import DeadlineExceeded, Error, InvalidRequest, ModelError, WorkerLost
from shared_graph.graph import Graph
from shared_graph.merging import find_batchable
from shared_graph.model_source import ADDER_SOURCE, ModelSource
from shared_graph.models import LoadedVersion, Signature, TensorSpec
from shared_graph.options import Options
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.wire import WireRequest


def rows(*values, signature="serving_default", seconds=60, is_repeated=False) -> WireRequest:
    """A request with these rows of the only input."""
    return WireRequest("arrays", (signature, np.array(values)), seconds, is_repeated)


class PlayedGraph:
    """Doubles its rows; refuses a run with a row that is negative, and gives one row too many for a 13. A run takes
    ``run_s`` of the clock that is its own."""

    mutates_state = False

    def __init__(self, looks_across: float = 0, run_s: float = 0):
        spec = TensorSpec("int64", (None,))
        self.signature = Signature("serving_default", {"x": spec}, {"y": spec}, "", False, False)
        self.signatures, self.looks_across = {"serving_default": self.signature}, looks_across
        self.runs: list[list[int]] = []
        self.deadlines: list[float] = []
        self.now, self.run_s = 0.0, run_s

    def run(self, signature: str, feed: list[np.ndarray], deadline: float) -> list[np.ndarray]:
        assert self.now < deadline
        self.now += self.run_s
        self.runs.append(feed[0].tolist())
        self.deadlines.append(deadline)
        if (feed[0] < 0).any():
            raise ModelError("negative", 400)
        outputs = 2 * feed[0] + len(feed[0]) * self.looks_across
        return [np.append(outputs, 0)] if 13 in feed[0] else [outputs]


class Played:
    """A runner of a played graph, what it answers and what it observes. The next ``group`` is the how many-th that
    shares a run: of the fifth to seventh none are run alone as well."""

    def __init__(self, batchable=True, undecided=False, now: float = 0.0, exact=False, group: int = 5, **graph):
        self.graph, self.observed, self.answers = PlayedGraph(**graph), [], collections.Counter()
        known = [("serving_default",) * batchable, ("serving_default",) * undecided]
        loaded = LoadedVersion({}, "", *known, False, "")
        self.graph.now = now
        observe = lambda *what: self.observed.append(what)
        shared_runs = collections.Counter({("", "serving_default"): group - 1})
        self.runner = BatchRunner(self.graph, loaded, exact, self.reply, observe, shared_runs, lambda: self.graph.now)
        self.found = {}

    def reply(self, answers: dict) -> None:
        self.answers.update(answers.keys())
        self.found |= answers

    def answer(self, *requests: WireRequest) -> list:
        self.runner.answer(list(requests), 0.0)
        assert self.answers == dict.fromkeys(range(len(requests)), 1), "each request is answered once"
        return [
            answer if isinstance(answer, Error) else answer["y"].tolist()
            for answer in (self.found[index] for index in range(len(requests)))
        ]


def test_a_group_that_fails_is_halved_until_the_bad_request_fails_alone():
    played = Played()
    answers = played.answer(*[rows(1)] * 32, rows(-1), *[rows(2)] * 31)
    assert [index for index, answer in enumerate(answers) if isinstance(answer, ModelError)] == [32]
    assert len(played.graph.runs) <= 1 + 2 * 6  # and not 64


def test_one_odd_row_count_fails_its_request_and_is_told_and_the_others_share_runs_again_the_next_time():
    played = Played()
    assert played.answer(rows(1), rows(13), rows(2)) == [[2], [26, 0], [4]]
    assert played.observed == [("serving_default", False)]
    played.answers.clear()
    assert played.answer(rows(1), rows(2)) == [[2], [4]] and played.graph.runs[-1] == [1, 2]


@pytest.mark.parametrize("looks_across", [False, True])
def test_where_it_is_not_known_whether_rows_share_runs_a_group_is_run_both_ways_and_what_that_shows_is_told(
    looks_across,
):
    played = Played(batchable=False, undecided=True, looks_across=looks_across)
    extra = 1 if looks_across else 0
    assert played.answer(*[rows(value) for value in range(4)]) == [[2 * value + extra] for value in range(4)]
    assert played.graph.runs == [[0], [1], [2], [3], [0, 1, 2, 3]]
    assert played.observed == [("serving_default", not looks_across)]


def test_of_the_first_second_fourth_eighth_group_that_shares_a_run_some_are_run_alone_as_well():
    played, audited = Played(group=1), []
    for group in range(2, 22):
        played.graph.runs.clear()
        played.answers.clear()
        requests = range(10 * group, 10 * group + 10)
        assert played.answer(*map(rows, requests)) == [[2 * value] for value in requests]
        if played.graph.runs != [[*requests]]:
            tried, others = [*requests[:AUDITED]], [*requests[AUDITED:]]
            assert played.graph.runs == [*([value] for value in tried), tried, others]
            audited.append(group - 1)
    assert audited == [1, 2, 4, 8, 16] and played.observed == [("serving_default", True)] * 5


def test_what_shares_runs_and_gets_other_answers_in_company_is_run_alone_as_soon_as_that_is_seen_and_it_is_told():
    played = Played(looks_across=1, group=1)
    for _ in range(3):
        played.answers.clear()
        assert played.answer(*map(rows, range(10))) == [[2 * value + 1] for value in range(10)]
    assert played.observed == [("serving_default", False)] * 3


@pytest.mark.parametrize("count", [1, 9, 40])
def test_large_requests_that_share_a_run_are_looked_at_as_well(count):
    played = Played(looks_across=1, group=1)
    requests = [rows(*[20 + place] * count) for place in range(6)]
    assert played.answer(*requests) == [[2 * (20 + place) + count] * count for place in range(6)]
    assert played.observed == [("serving_default", False)]


def test_where_runs_take_long_one_is_alone_and_the_others_share_theirs_since_they_have_a_deadline():
    played = Played(group=1, run_s=8)
    assert played.answer(*map(rows, range(12))) == [[2 * value] for value in range(12)]
    assert played.graph.runs == [[0], [*range(1, 12)]] and played.observed == []


def test_equal_requests_share_runs_all_the_same():
    played = Played(group=1)
    assert played.answer(*[rows(1)] * 64) == [[2]] * 64
    assert len(played.graph.runs) == AUDITED + 1 and played.observed == []


def test_where_requests_change_the_model_none_are_run_twice_to_see_whether_they_agree():
    played = Played(group=1)
    played.graph.mutates_state = True
    assert played.answer(*map(rows, range(5))) == [[2 * value] for value in range(5)]
    assert played.graph.runs == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("exact", [False, True])
def test_with_exact_only_what_is_the_same_to_the_last_bit_speaks_for_sharing_runs(exact):
    played = Played(batchable=False, undecided=True, exact=exact, looks_across=1e-15)
    played.answer(*[rows(value) for value in (1, 2, 3)])
    assert played.observed == [("serving_default", not exact)]


def test_that_equal_requests_get_equal_answers_together_speaks_for_nothing():
    played = Played(batchable=False, undecided=True, looks_across=1)
    assert played.answer(rows(1), rows(1), rows(1)) == [[3]] * 3 and played.observed == []
    played = Played(batchable=False, undecided=True, looks_across=1)
    assert played.answer(rows(1), rows(2), rows(1)) == [[3], [5], [3]]
    assert played.observed == [("serving_default", False)] and played.graph.runs[-1] == [1, 2]


@pytest.mark.parametrize("same", [[rows(math.nan)] * 2, [rows(1), rows(1, 1)]], ids=["no number", "once and twice"])
def test_that_the_same_rows_get_the_same_answers_together_speaks_for_nothing(same):
    played = Played(batchable=False, undecided=True)
    played.answer(*same)
    assert played.observed == []


def test_that_all_get_the_same_answer_alone_and_together_speaks_for_nothing():
    played = Played(batchable=False, undecided=True)
    played.graph.run = lambda signature, feed, deadline: [np.zeros(len(feed[0]))]
    assert played.answer(rows(1), rows(2, 3), rows(4)) == [[0], [0, 0], [0]] and played.observed == []


def test_rows_are_told_apart_by_all_that_is_in_them():
    feed = [np.array([b"a", b"a", b"a"], object), np.array([[1, math.nan], [1, math.nan], [2, 3]]), np.arange(3) > 1]
    assert len(distinct_rows(Item(0, None, feed, None, 0.0, False))) == 2


def test_requests_of_another_shape_than_the_declared_one_are_run_alone_though_each_has_the_same():
    played = Played()
    assert played.answer(rows([1, 2]), rows([3, 4]), rows(5), rows(6)) == [[[2, 4]], [[6, 8]], [10], [12]]
    assert sorted(played.graph.runs, key=str) == [[5, 6], [[1, 2]], [[3, 4]]]


def test_requests_share_runs_only_with_those_of_the_same_shape_and_small_groups_come_first():
    played = Played()
    played.graph.signature.inputs["x"] = TensorSpec("int64", None)
    assert played.answer(rows([1, 2]), rows([3, 4]), rows(5), rows(6)) == [[[2, 4]], [[6, 8]], [10], [12]]
    assert played.graph.runs == [[5, 6], [[1, 2], [3, 4]]]
    played = Played()
    assert played.answer(rows(*[1] * (MAX_SHARED_ROWS + 1)), rows(2), rows(*[3] * MAX_SHARED_ROWS))[1] == [4]
    assert [len(run) for run in played.graph.runs] == [MAX_SHARED_ROWS + 1] * 2


def test_a_request_whose_inputs_have_not_the_same_number_of_rows_is_run_alone():
    played = Played()
    played.graph.signature.inputs["y"] = played.graph.signature.inputs["x"]
    body = "serving_default", {"x": np.array([1, 2]), "y": np.array([5])}
    assert played.answer(*[WireRequest("arrays", body, 60, False)] * 2) == [[2, 4]] * 2
    assert played.graph.runs == [[1, 2]] * 2


def test_json_and_arrays_have_runs_of_their_own_since_their_answers_are_prepared_otherwise():
    played = Played()
    played.runner.answer([WireRequest("predict", HttpBody(b'{"instances": [1]}'), 60, False), rows(2)], 0.0)
    assert played.found[0] == b'{"predictions":[2]}' and played.found[1]["y"].tolist() == [4]
    assert played.graph.runs == [[1], [2]]


def test_a_batch_that_becomes_large_when_it_is_read_is_run_part_by_part(monkeypatch):
    monkeypatch.setattr(module, "MAX_DECODED_BYTES", 100)
    played = Played()
    assert played.answer(*[rows(1)] * 30) == [[2]] * 30
    assert [len(run) for run in played.graph.runs] == [13, 13, 4]
    played = Played()
    played.graph.signature.inputs["x"] = TensorSpec("object", (None,))
    played.graph.run = lambda signature, feed, deadline: [np.full(len(feed[0]), len(feed[0]))]
    assert played.answer(*[rows("a")] * 5) == [[2]] * 4 + [[1]]  # a string is more than what points to it


def test_a_run_has_time_until_the_last_deadline_of_its_group():
    played = Played()
    assert played.answer(rows(1, seconds=5), rows(2, seconds=60), rows(3, seconds=30)) == [[2], [4], [6]]
    assert played.graph.deadlines == [60]


@pytest.mark.parametrize("status", NOT_HALVED)
def test_a_group_that_fails_for_what_is_not_in_its_requests_is_not_run_again(status):
    played = Played()

    def fail(signature: str, feed: list[np.ndarray], deadline: float) -> list[np.ndarray]:
        played.graph.runs.append(feed[0].tolist())
        raise ModelError("the device has gone", status)

    played.graph.run = fail
    assert [answer.status for answer in played.answer(*map(rows, range(8)))] == [status] * 8
    assert played.graph.runs == [list(range(8))]


@pytest.mark.parametrize("kind", ["mutates_state", "runs_python", None])
def test_what_a_lost_worker_had_runs_again_only_where_it_has_changed_nothing_and_called_nobody(kind):
    played = Played(batchable=False)
    if kind:
        setattr(played.graph.signature, kind, True)
    [answer] = played.answer(rows(1, is_repeated=True))
    assert isinstance(answer, WorkerLost) and not played.graph.runs if kind else answer == [2]


def test_what_only_the_run_of_a_writing_signature_shows_is_told_as_done():
    played = Played(batchable=False)
    played.graph.signature.outputs["y"] = TensorSpec("int64", None)
    body = b'{"instances": [13]}'
    played.runner.answer([WireRequest("predict", HttpBody(body), 60, False)], 0.0)
    assert isinstance(played.found[0], bytes)
    played.graph.run = lambda signature, feed, deadline: [np.int64(5)]
    for writes, kind, words in (
        (False, InvalidRequest, "^Outputs"),
        (True, ModelError, "^What was asked for has been"),
    ):
        played.graph.signature.mutates_state = writes
        played.runner.answer([WireRequest("predict", HttpBody(body), 60, False)], 0.0)
        with pytest.raises(kind, match=words):
            raise played.found[0]


def test_rows_of_answers_that_do_not_fit_together_speak_against_sharing_runs_and_all_are_answered():
    played = Played(batchable=False, undecided=True)
    played.graph.run = lambda signature, feed, deadline: [
        np.zeros((len(feed[0]), feed[0].max()))
    ]  # as wide as the rows
    assert played.answer(rows(1), rows(2), rows(3)) == [[[0]], [[0, 0]], [[0, 0, 0]]]
    assert played.observed == [("serving_default", False)]


@pytest.mark.parametrize("why, status, observed", [("one row, please", 400, [False]), ("no memory is left", 429, [])])
def test_rows_that_are_refused_together_share_no_runs_and_what_fails_for_other_reasons_speaks_for_nothing(
    why, status, observed
):
    played = Played(batchable=False, undecided=True)
    run = played.graph.run

    def one_row_alone(signature: str, feed: list[np.ndarray], deadline: float) -> list[np.ndarray]:
        if len(feed[0]) > 1:
            raise ModelError(why, status)
        return run(signature, feed, deadline)

    played.graph.run = one_row_alone
    assert played.answer(rows(1), rows(2)) == [[2], [4]]
    assert played.observed == [("serving_default", agrees) for agrees in observed]


def test_a_few_rows_are_tried_both_ways_and_not_those_of_large_requests():
    played = Played(batchable=False, undecided=True)
    played.answer(rows(*range(100, 101 + TRIED_ROWS)), *map(rows, range(20, 20 + 2 * TRIED_ROWS)))
    assert played.graph.runs[-1] == list(range(20, 20 + TRIED_ROWS)) and played.observed == [("serving_default", True)]


def test_a_broken_row_among_those_that_are_run_both_ways_fails_alone():
    played = Played(batchable=False, undecided=True)
    answers = played.answer(rows(1), rows(-1), rows(2))
    assert isinstance(answers[1], ModelError) and [answers[0], answers[2]] == [[2], [4]]
    assert played.observed == [("serving_default", True)]


@pytest.mark.parametrize("undecided", [False, True])
def test_what_has_become_late_while_others_of_its_batch_ran_is_not_run(undecided):
    """Else forty requests for a model of 2 s would hold up a worker, until it is ended, long after their deadline."""
    played = Played(batchable=False, undecided=undecided, run_s=2)
    answers = played.answer(*[rows(i, seconds=9) for i in range(40)])
    assert answers[:5] == [[2 * i] for i in range(5)] and {type(answer) for answer in answers[5:]} == {DeadlineExceeded}
    assert played.graph.runs == [[i] for i in range(5)]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_comes_each_request_is_answered_once_with_what_it_asked_for(seed):
    chance = random.Random(seed)
    played = Played(chance.random() < 0.7, chance.random() < 0.5, now=10.0, group=chance.randint(1, 8))
    requests, expected = [], []
    for _ in range(chance.randint(0, 40)):
        kind = chance.choices(["good", "bad", "odd", "late", "unread", "wide"], [20, 1, 0.3, 1, 1, 1])[0]
        values = [chance.randint(0, 9) for _ in range(chance.randint(1, 3))]
        values = {"bad": [*values, -1], "odd": [13], "wide": [values]}.get(kind, values)
        request = rows(*values, seconds=5 if kind == "late" else 60)
        requests.append(WireRequest("predict", HttpBody(b"{"), 60, False) if kind == "unread" else request)
        expected.append(
            {"bad": ModelError, "late": DeadlineExceeded, "unread": InvalidRequest, "odd": [26, 0]}.get(
                kind, np.multiply(values, 2).tolist()
            )
        )
    for answer, wanted in zip(played.answer(*requests), expected):
        assert type(answer) is wanted if isinstance(wanted, type) else answer == wanted


# -- with TensorFlow ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load():
    """``load(source)``: the graph of an example model, or of a source, in this process alone. Found out, or said, is
    which signatures share runs."""
    tf = import_tensorflow(whole=True)

    def load(source: str | ModelSource, *batchable: str) -> Graph:
        if isinstance(source, str):
            source = ModelSource(source, 1, function=f"example_models:{source}")
        graph = Graph(tf, source, ps_tasks=0)
        graph.connect([], Options())
        graph.restore({})
        graph.batchable = (*find_batchable(graph, Options()).batchable, *batchable)
        return graph

    return load


def answers(graph: Graph, *requests: WireRequest, group: int = 3) -> list:
    """Lists for the arrays of each answer, just one for an only output; and errors. It is the how many-th group that
    shares a run: of the third one none are run alone as well."""
    found, shared_runs = {}, collections.Counter({("", name): group - 1 for name in graph.signatures})
    loaded = LoadedVersion({}, "", graph.batchable, (), False, "")
    runner = BatchRunner(graph, loaded, False, found.update, lambda *observed: None, shared_runs)
    runner.answer(list(requests), time.monotonic())
    for index, answer in found.items():
        if isinstance(answer, dict):
            arrays = tuple(array.tolist() for array in answer.values())
            found[index] = arrays if len(arrays) > 1 else arrays[0]
    return [found[index] for index in range(len(requests))]


def test_requests_whose_rows_fit_share_a_run_and_get_their_own_rows_back(load):
    graph = load("crowd")
    assert answers(graph, rows(12345), rows(1, 12345), rows(2)) == [[4], [1, 4], [2]]
    assert answers(graph, rows(12345), rows([12345, 0]), rows(12345)) == [[2], [[2, 0]], [2]]


def test_what_random_rows_do_not_show_is_seen_in_the_first_group_of_real_ones(load):
    graph = load("crowd")
    requests = [rows(float(value), 12345) for value in range(10)]
    assert answers(graph, *requests, group=1) == [[value, 2] for value in range(10)]


def test_one_bad_request_does_not_fail_its_batch(load):
    unreadable = WireRequest("predict", HttpBody(b"{"), 60, False)
    first, bad, unread, last = answers(load("picky", "serving_default"), rows(2), rows(-2), unreadable, rows(4))
    assert (first, last) == ([1], [2]) and isinstance(unread, InvalidRequest)
    assert isinstance(bad, ModelError) and bad.status == 400 and "must not be negative" in str(bad)
    adds = [WireRequest("add", value, 60, False) for value in (1.7e308, 1.7e308, -1.7e308)]
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


@pytest.mark.parametrize("undecided", [False, True])
def test_answers_that_are_large_are_not_compared_which_takes_long_and_many_times_their_room(monkeypatch, undecided):
    monkeypatch.setattr(module, "MAX_COMPARED", 10)
    played = Played(batchable=not undecided, undecided=undecided, group=1)
    assert played.answer(*[rows(*[place] * 4) for place in range(6)]) == [[2 * place] * 4 for place in range(6)]
    assert sum(len(run) for run in played.graph.runs) == 24 + 8 and len(played.observed) == 1  # the first two are
    played = Played(batchable=not undecided, undecided=undecided, group=1)
    played.answer(*[rows(*[place] * 6) for place in range(6)])
    assert sum(len(run) for run in played.graph.runs) == 36 and played.observed == []
