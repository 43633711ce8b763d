"""Counts what this process does, in plain numbers, of which a scrape makes Prometheus' text.

A request costs a look into a dictionary and two additions; prometheus_client makes its objects only when it is asked.
Label values are bounded by what is served: a model that nobody serves is counted under the empty name.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of what Metrics.text returns
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
BATCH_BUCKETS = tuple(2.0**exponent for exponent in range(11))

Histogram = list[float]  # how many values fell into each bucket, the one without an end included; then their sum


class Gauges(NamedTuple):
    """What is true at the moment of a scrape and need not be counted."""

    waiting: int  # requests that are not sent to a worker yet
    in_flight: dict[str, int]  # by worker's index: requests that it has and has not answered
    restarts: dict[str, int]  # by actor: "worker 0", "parameter server 0"
    versions: dict[str, int]  # by model: the version in use


class Metrics:
    """The counts of one cluster in this process, which may have several: a collector for a registry of its own.

    ``look`` is called at each scrape, in the scraper's thread; ``is_served`` says whether an error may name a model.
    ``observe``, ``observe_batch`` and ``last_sum`` are for the home loop alone; the rest is for any thread.
    """

    def __init__(self, look: Callable[[], Gauges], is_served: Callable[[str], bool]):
        self._look, self._is_served = look, is_served
        self._answers: dict[tuple[str, str], Histogram] = {}  # by model and kind; seconds
        self._batches: dict[tuple[str, str], Histogram] = {}  # by model; requests
        self._errors: Counter[tuple[str, str, str]] = Counter()  # by HTTP status, model and kind
        self._error_lock = threading.Lock()  # Flask's threads all count their own
        self.last_sum: float | None = None  # right after the last add that was answered here
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe(self, model: str, kind: str, seconds: float) -> None:
        """A request for a served model was answered."""
        count(self._answers, (model, kind), LATENCY_BUCKETS_S, seconds)

    def observe_batch(self, model: str, requests: int) -> None:
        """So many requests for a served model were sent to a worker together."""
        count(self._batches, (model, ""), BATCH_BUCKETS, requests)

    def count_error(self, status: int, model: str | None = None, kind: str | None = None) -> None:
        """A request was answered with an error; ``kind`` is one of the program's own words, never the client's."""
        name = model if model and self._is_served(model) else ""
        with self._error_lock:
            self._errors[str(status), name, kind or ""] += 1

    def text(self) -> bytes:
        """What ``GET /metrics`` answers, as CONTENT_TYPE says."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry: all families, of what is counted up to now."""
        now = self._look()
        errors = dict(sorted(self._errors.copy().items()))  # copy(): in one step, while others may add to it
        counts = {key: sum(histogram[:-1]) for key, histogram in sorted(self._answers.copy().items())}
        total = {} if self.last_sum is None else {(): self.last_sum}
        yield family("answers_total", "Requests answered.", counts, "model", "kind")
        yield family("errors_total", "Requests answered with an error.", errors, "code", "model", "kind")
        yield histograms("answer_seconds", "Time from arrival to answer.", LATENCY_BUCKETS_S, self._answers)
        yield histograms("batch_requests", "Requests sent to a worker together.", BATCH_BUCKETS, self._batches)
        yield family("waiting_requests", "Requests not sent to a worker yet.", {(): now.waiting})
        yield family("in_flight_requests", "Requests that a worker has to answer.", now.in_flight, "worker")
        yield family("restarts_total", "Times that an actor came back as another process.", now.restarts, "actor")
        yield family("model_version", "Version in use.", now.versions, "model")
        yield family("sum", "The shared sum right after the last add that this process answered.", total)
        yield family("process_info", "The process asked: a port may have several.", {str(os.getpid()): 1}, "pid")


def count(histograms: dict[tuple[str, str], Histogram], key: tuple[str, str], ends: tuple, value: float) -> None:
    histogram = histograms.get(key) or histograms.setdefault(key, [0] * (len(ends) + 1) + [0.0])
    histogram[bisect_left(ends, value)] += 1
    histogram[-1] += value


def family(name: str, help: str, samples: Mapping[str | tuple[str, ...], float], *labels: str) -> Metric:
    """A counter if its name ends in _total, else a gauge."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    made = kind(f"ray_tensorflow_{name}", help, labels=labels)
    for values, number in samples.items():
        made.add_metric([values] if isinstance(values, str) else values, number)
    return made


def histograms(name: str, help: str, ends: tuple, found: dict[tuple[str, str], Histogram]) -> Metric:
    """A histogram for each model, all kinds together."""
    made, bounds = HistogramMetricFamily(f"ray_tensorflow_{name}", help, labels=("model",)), [*ends, math.inf]
    for model, group in itertools.groupby(sorted(found.copy().items()), lambda item: item[0][0]):
        *counts, total = map(sum, zip(*(histogram for _, histogram in group), strict=True))
        buckets = zip(map(floatToGoString, bounds), itertools.accumulate(counts), strict=True)
        made.add_metric([model], list(buckets), total)
    return made
