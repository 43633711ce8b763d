"""What a worker does with a batch: decode, group, merge, run, split, encode. No Ray in it, and no TensorFlow.

Requests for one signature with rows of one shape are one group if they may share a run. A group whose run fails is
halved until the bad request fails alone. Where it is not known yet whether a signature's requests may share runs, a
group is run both ways and compared; where they may, so are some requests of the first, second, fourth, eighth ...
group, since random rows do not show everything. That is evidence; the version manager decides what follows from it.
"""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from shared_graph.errors import DeadlineExceeded, Error, ModelError, WorkerLost
from shared_graph.graph import Graph
from shared_graph.json_codec import json_ready
from shared_graph.merging import answers_equal, is_telling
from shared_graph.models import LoadedVersion, Signature
from shared_graph.rest_api import decode
from shared_graph.wire import WireRequest

MAX_SHARED_ROWS = 4096  # of one request: more of them gain nothing by company, which would have to wait for them
TRIED_ROWS = 16  # of a group that is run both ways
AUDITED, AUDIT_S = 4, 1.0  # how many requests of a group are run alone to see whether it may share a run, in what time
MAX_COMPARED = 2**22  # numbers of their answers: comparing takes 65 ns and 40 bytes for each
MAX_DECODED_BYTES = 64 * 2**20  # of arrays that wait for their run: small bodies may become large ones
LATE = "The deadline passed in the worker"
NOT_HALVED = (499, 502, 503, 504)  # a run that failed so would do so again for reasons that are not in the requests


class Item(NamedTuple):
    """A request that has been read."""

    index: int
    signature: Signature
    feed: list[np.ndarray]
    encode: Callable[[list[np.ndarray]], Any]
    deadline: float
    is_json: bool

    @property
    def rows(self) -> int:
        return len(self.feed[0])

    @property
    def size(self) -> int:
        return sum(array.size for array in self.feed)


class BatchRunner:
    """Answers a batch. ``reply({index: answer or Error})`` is called as each group is done, for each request once;
    those that came too late are not run. ``observe(signature, agrees)`` is told what a run showed of whether rows that
    share it have the answers that they have alone; ``loaded`` says what is known of that already, and ``shared_runs``,
    by the weights' id and the signature, how often requests have shared one since they last disagreed."""

    def __init__(
        self,
        graph: Graph,
        loaded: LoadedVersion,
        exact: bool,
        reply: Callable[[dict[int, Any]], None],
        observe: Callable[[str, bool], None],
        shared_runs: collections.Counter[tuple[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._graph, self._loaded, self._exact, self._shared_runs = graph, loaded, exact, shared_runs
        self._reply, self._observe, self._clock = reply, observe, clock

    def answer(self, requests: list[WireRequest], arrived: float) -> None:
        """Raises ConnectionError when the parameter server has gone."""
        refused: dict[int, Any] = {}
        groups: dict[Hashable, list[Item]] = {}
        held_bytes = 0
        for index, (verb, body, left_s, is_repeated) in enumerate(requests):
            try:
                signature, feed, encode, is_json = decode(self._graph.signatures, verb, body)
                if is_repeated and (signature.mutates_state or signature.runs_python):
                    raise WorkerLost("A worker was lost; the change that was asked for may have been applied.")
            except Error as error:
                refused[index] = error.with_traceback(None)
                continue
            item = Item(index, signature, feed, encode, arrived + left_s, is_json)
            groups.setdefault(self._group_of(item), []).append(item)
            for array in feed:
                held_bytes += 64 * array.size if array.dtype.hasobject else array.nbytes
            if held_bytes > MAX_DECODED_BYTES:
                self._answer_groups(groups)
                groups, held_bytes = {}, 0
        if refused:
            self._reply(refused)
        self._answer_groups(groups)

    def _answer_groups(self, groups: dict[Hashable, list[Item]]) -> None:
        found = list(groups.values())
        if len(found) > 1:
            found.sort(key=lambda group: sum(item.size for item in group))  # short ones first
        for group in found:
            self._answer_group(group)

    def _group_of(self, item: Item) -> Hashable:
        signature, name = item.signature, item.signature.name
        if not (name in self._loaded.batchable or name in self._loaded.undecided):
            return item.index
        rows, parts = item.feed[0].shape[:1], [item.is_json, name]
        for array, spec in zip(item.feed, signature.inputs.values()):
            shape = array.shape
            if shape[:1] != rows or not (0,) <= rows <= (MAX_SHARED_ROWS,) or not spec.declares(shape):
                return item.index
            parts.append(shape[1:])
        return tuple(parts)

    def _answer_group(self, group: list[Item]) -> None:
        if len(group) > 1:
            limits = self._trial_limits(group[0].signature.name, len(group))
            may_share, group = self._answer_both_ways(group, *limits)
            if not may_share:
                return self._answer_each(group)
        self._answer_due(group)

    def _answer_due(self, group: list[Item]) -> None:
        now = self._clock()
        due = [item for item in group if now < item.deadline]
        if len(due) < len(group):
            self._reply({item.index: DeadlineExceeded(LATE) for item in group if now >= item.deadline})
        if len(due) > 1:
            self._answer_together(due)
        else:
            self._answer_each(due)

    def _answer_each(self, group: list[Item]) -> None:
        for item in group:
            self._answer_alone(item)

    def _trial_limits(self, name: str, count: int) -> tuple[int, float, float]:
        """How many of so many requests are to be run both ways, for how many seconds and with how many rows, before the
        others share a run."""
        if name in self._loaded.undecided:
            return count, math.inf, TRIED_ROWS
        if self._graph.mutates_state:  # what others change between two runs would speak against sharing them
            return 0, 0, 0
        self._shared_runs[self._loaded.weights_id, name] += 1
        times = self._shared_runs[self._loaded.weights_id, name]
        return (0, 0, 0) if times & (times - 1) else (min(count, AUDITED), AUDIT_S, math.inf)

    def _answer_together(self, group: list[Item]) -> None:
        try:
            outputs = presentable(group[0], self._run(group))
        except Error as error:
            if error.status in NOT_HALVED:
                return self._reply({item.index: error for item in group})
            outputs = None  # nothing has been changed: what writes shares runs only where that is so
        if outputs is not None and all(output.shape[:1] == (sum(i.rows for i in group),) for output in outputs):
            return self._reply({item.index: encoded(item, part) for item, part in zip(group, split(group, outputs))})
        if outputs is not None:  # rows of answers are not those of the requests
            self._observe(group[0].signature.name, False)
            return self._answer_each(group)
        half = len(group) // 2
        for part in (group[:half], group[half:]):
            self._answer_due(part)

    def _answer_both_ways(self, group: list[Item], count: int, seconds: float, rows: float) -> tuple[bool, list[Item]]:
        """Answer the first ``count`` alone, then run them together to compare. Returns whether the group may share a
        run, as far as that shows it, and the rest of it, to be answered."""
        answered, alone, tried, seen, until = 0, [], [], set(), self._clock() + seconds
        numbers = MAX_COMPARED
        while answered < count and self._clock() < until:
            item = group[answered]
            outputs = self._answer_alone(item)
            answered += 1
            size = sum(output.size for output in outputs or ())
            fits = outputs is not None and item.rows <= rows and size <= numbers
            if fits and (unlike := distinct_rows(item) - seen):  # the same rows go well together, and show nothing
                rows, numbers, seen = rows - item.rows, numbers - size, seen | unlike
                alone.append(outputs)
                tried.append(item)
        return len(tried) < 2 or self._agree(tried, alone), group[answered:]

    def _agree(self, tried: list[Item], alone: list[list[np.ndarray]]) -> bool:
        """Have they the same answers together as ``alone``? ``observe`` is told, if that shows anything."""
        signature = tried[0].signature
        try:
            together, expected = self._run(tried), list(map(np.concatenate, zip(*alone)))
            agrees = all(
                len(output) == sum(item.rows for item in tried) and answers_equal(output, wanted, self._exact)
                for output, wanted in zip(together, expected)
            )
            if agrees and not is_telling(signature, expected):
                return True
        except Error as error:
            if error.status != 400:  # which says nothing of whether they go together
                return True
            agrees = False
        except (ValueError, TypeError):  # rows of answers that do not fit together
            agrees = False
        self._observe(signature.name, agrees)
        if not agrees:
            self._shared_runs[self._loaded.weights_id, signature.name] = 0  # the next group is looked at as well
        return agrees

    def _run(self, group: list[Item]) -> list[np.ndarray]:
        """Not if it is too late by now: others of the same batch may have taken long. Raises Error."""
        deadline = max(item.deadline for item in group)
        if self._clock() >= deadline:
            raise DeadlineExceeded(LATE)
        feeds = [item.feed for item in group]
        feed = list(map(np.concatenate, zip(*feeds))) if len(feeds) > 1 else feeds[0]
        return self._graph.run(group[0].signature.name, feed, deadline)

    def _answer_alone(self, item: Item) -> list[np.ndarray] | None:
        """Returns the outputs, if there are any."""
        try:
            outputs = self._run([item])
            self._reply({item.index: encoded(item, presentable(item, outputs))})
            return outputs
        except Error as error:
            self._reply({item.index: error.with_traceback(None)})
            return None


def presentable(item: Item, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """For a whole batch at once, since numpy's calls are dear."""
    return list(map(json_ready, outputs, item.signature.outputs)) if item.is_json else outputs


def distinct_rows(item: Item) -> set[tuple]:
    """As what can be compared."""
    columns = (map(repr, a.tolist()) if a.dtype.hasobject else (row.tobytes() for row in a) for a in item.feed)
    return set(zip(*columns))


def split(group: list[Item], outputs: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The rows of each."""
    ends = list(itertools.accumulate(item.rows for item in group))
    return [[output[end - item.rows : end] for output in outputs] for item, end in zip(group, ends)]


def encoded(item: Item, outputs: list[np.ndarray]) -> Any:
    """The answer, or the Error that there is instead: such as that the outputs are not what the request wants."""
    try:
        return item.encode(outputs)
    except Error as error:
        if item.signature.mutates_state:
            return ModelError(f"What was asked for has been done, but there is no answer: {error}")
        return error.with_traceback(None)
