"""What a worker does with a batch: decode, group, merge, run, split, encode. No Ray in it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import DeadlineExceeded, Error, WorkerLost
from shared_graph.graph import Graph
from shared_graph.json_codec import plain
from shared_graph.models import Signature
from shared_graph.rest_api import decode


def answer_requests(
    graph: Graph, requests: list[tuple], reply: Callable[[dict[int, Any]], Any], arrived: float
) -> None:
    """Decode, group, merge, run, split, encode; ``reply({index: answer or Error})`` as each group is done, for each
    request once: those that came too late are not run.

    Requests for one signature with rows of one shape are one group if they may share a run. Raises ConnectionError.
    """
    refused: dict[int, Error] = {}
    groups: dict[Any, list[tuple]] = {}
    for index, (verb, body, seconds, is_repeated) in enumerate(requests):
        try:
            signature, feed, encode = decode(graph.signatures, verb, body)
            if is_repeated and (signature.writes or signature.calls_out):
                raise WorkerLost("A worker was lost; the change that was asked for may or may not have been applied.")
        except Error as error:
            refused[index] = error.with_traceback(None)
            continue
        is_merged = signature.merged and all(array.ndim and len(array) == len(feed[0]) for array in feed)
        is_json = verb not in ("add", "arrays")
        key = (is_json, signature.name, *(array.shape[1:] for array in feed)) if is_merged else (is_json, index)
        groups.setdefault(key, []).append((index, signature, feed, encode, arrived + seconds))
    if refused:
        reply(refused)

    def run_plain(signature: Signature, feed: list[np.ndarray]) -> list[np.ndarray]:
        return list(map(plain, graph.run(signature.name, feed), signature.outputs))

    def run_arrays(signature: Signature, feed: list[np.ndarray]) -> list[np.ndarray]:
        return graph.run(signature.name, feed)

    for (is_json, *_), group in groups.items():
        run = run_plain if is_json else run_arrays
        now = time.monotonic()
        due = [request[:-1] for request in group if now < request[-1]]
        answers = run_merged(run, due) if len(due) > 1 else None
        late = {index: DeadlineExceeded("The deadline passed in the worker") for index, *_, end in group if now >= end}
        reply(late | (answers or {index: attempt(run_one, run, *one) for index, *one in due}))


def run_one(run: Callable, signature: Signature, feed: list[np.ndarray], encode: Callable) -> Any:
    return encode(run(signature, feed))


def attempt(function: Callable, *arguments) -> Any:
    """What it returns, or the Error that it raises."""
    try:
        return function(*arguments)
    except Error as error:
        return error.with_traceback(None)


def run_merged(run: Callable, group: list[tuple]) -> dict[int, Any] | None:
    """The answers of requests that share a run; None when each must have one of its own, so that a bad one fails alone.

    Nothing has been changed then: a signature that writes is only merged when a run that fails changes nothing.
    """
    _, signature, _, _ = group[0]
    feeds = [feed for _, _, feed, _ in group]
    ends = list(itertools.accumulate(len(feed[0]) for feed in feeds))
    try:
        outputs = run(signature, list(map(np.concatenate, zip(*feeds))))
    except Error:
        return None
    if any(output.shape[:1] != (ends[-1],) for output in outputs):
        signature.merged = False
        return None
    return {
        index: attempt(encode, [output[end - len(feed[0]) : end] for output in outputs])
        for (index, _, feed, encode), end in zip(group, ends)
    }
