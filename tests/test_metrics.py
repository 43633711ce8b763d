"""What a scrape says: parsed by Prometheus' own parser, bounded, and cheap for each request."""

import math
import subprocess
import sys
import threading
import tracemalloc

import pytest
from conftest import REPOSITORY, in_a_process_of_its_own
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families

from shared_graph.metrics import CONTENT_TYPE, LATENCY_BUCKETS_S, Gauges, Metrics

ODD = 'we"ird\\n\n{},='
GAUGES = Gauges(3, {"0": 2, "1": 0}, {"worker 0": 1, "parameter server 0": 0}, {"m": 7, ODD: 1})


def serving(*names: str) -> Metrics:
    return Metrics(lambda: GAUGES, lambda name: name in names)


def scrape(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """By sample's name and the values of its labels, in the order of their names."""
    found = {}
    for its in text_string_to_metric_families(metrics.text().decode()):
        for sample in its.samples:
            key = tuple(value for _, value in sorted(sample.labels.items()))
            assert key not in found.setdefault(sample.name, {}), sample
            found[sample.name][key] = sample.value
    return found


@pytest.fixture
def busy() -> Metrics:
    """With something in each family."""
    metrics = serving("m", ODD)
    for model, kind, seconds in (
        ("m", "predict", 0.004),
        ("m", "classify", 0.0004),
        ("m", "predict", 99),
        (ODD, "add", 1),
    ):
        metrics.observe(model, kind, seconds)
    metrics.observe_batch("m", 3)
    metrics.observe_batch("m", 64)
    metrics.count_error(404, ODD, "predict")
    metrics.last_sum = 6.5
    return metrics


def test_names_and_help_follow_prometheus_conventions(busy):
    text = busy.text().decode()
    families = list(text_string_to_metric_families(text))
    assert {its.type for its in families} == {"counter", "gauge", "histogram"}
    for its in families:
        name = its.name + "_total" * (its.type == "counter")  # which the parser takes off
        assert (
            its.documentation
            and f"# HELP {name} {its.documentation}\n" in text
            and f"# TYPE {name} {its.type}\n" in text
        )
        assert its.name.startswith(("ray_tensorflow_", "process_"))
        assert not its.name.endswith(("_ms", "_milliseconds", "_mb", "_kb", "_percent"))
        assert all(sample.name.endswith("_total") for sample in its.samples if its.type == "counter"), its
    assert text.endswith("\n") and CONTENT_TYPE == CONTENT_TYPE_PLAIN_0_0_4


def test_what_was_counted_is_told(busy):
    found = scrape(busy)
    assert found["ray_tensorflow_answers_total"] == {("classify", "m"): 1, ("predict", "m"): 2, ("add", ODD): 1}
    assert found["ray_tensorflow_errors_total"] == {("404", "predict", ODD): 1}
    assert found["ray_tensorflow_waiting_requests"] == {(): 3}
    assert found["ray_tensorflow_in_flight_requests"] == {("0",): 2, ("1",): 0}
    assert found["ray_tensorflow_restarts_total"] == {("worker 0",): 1, ("parameter server 0",): 0}
    assert found["ray_tensorflow_model_version"] == {("m",): 7, (ODD,): 1}
    assert found["ray_tensorflow_sum"] == {(): 6.5}
    [(pid,)] = found["ray_tensorflow_process_info"]
    assert (
        int(pid) > 0 and found["process_cpu_seconds_total"][()] > 0 and found["process_resident_memory_bytes"][()] > 1e6
    )


def test_histograms_are_cumulative_and_by_model(busy):
    found = scrape(busy)
    buckets = {
        float(le): count for (le, model), count in found["ray_tensorflow_answer_seconds_bucket"].items() if model == "m"
    }
    assert list(buckets) == [*LATENCY_BUCKETS_S, math.inf] and (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (
        0.0005,
        30,
    )
    assert [buckets[end] for end in (0.0005, 0.003, 0.005, 30, math.inf)] == [1, 1, 2, 2, 3]
    assert found["ray_tensorflow_answer_seconds_count"] == {("m",): 3, (ODD,): 1}
    assert found["ray_tensorflow_answer_seconds_sum"][("m",)] == pytest.approx(99.0044)
    assert found["ray_tensorflow_batch_requests_sum"] == {("m",): 67}


def test_a_bound_belongs_to_its_bucket():
    metrics = serving("m")
    metrics.observe("m", "predict", 0.001)
    assert scrape(metrics)["ray_tensorflow_answer_seconds_bucket"][("0.001", "m")] == 1


@pytest.mark.parametrize("name", [ODD, "<script>", "", "modèle", "x" * 1000, "\r\u2028"])
def test_any_name_survives(name):
    metrics = Metrics(lambda: GAUGES._replace(versions={name: 1}), {name}.__contains__)
    metrics.observe(name, "predict", 1)
    [found] = scrape(metrics)["ray_tensorflow_model_version"]
    assert found == (name,)


def test_two_clusters_in_one_process_count_for_themselves():
    one, two = serving("m"), serving("m")
    one.observe("m", "predict", 1)
    assert scrape(one)["ray_tensorflow_answers_total"] == {("predict", "m"): 1}
    assert "ray_tensorflow_answers_total" not in scrape(two)


@in_a_process_of_its_own
def test_models_that_there_are_not_take_no_memory():
    metrics = serving("m")

    def ask(count: int) -> None:
        for number in range(count):
            metrics.count_error(404, f"nobody {number % 10_000}", "predict")

    ask(100)
    lines = len(metrics.text().splitlines())
    tracemalloc.start()
    ask(100_000)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 10_000 and len(metrics.text().splitlines()) == lines
    assert scrape(metrics)["ray_tensorflow_errors_total"] == {("404", "predict", ""): 100_100}


def test_no_error_is_lost_between_threads_and_scrapes():
    metrics = serving("m")
    threads = [
        threading.Thread(target=lambda: [metrics.count_error(503, "m") for _ in range(20_000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.text()
    assert scrape(metrics)["ray_tensorflow_errors_total"] == {("503", "", "m"): 80_000}


def test_scrapes_beside_new_models_do_not_fail():
    metrics, ended = serving("m"), threading.Event()

    def observe() -> None:
        for number in range(2000):
            metrics.observe(f"m{number}", "predict", 0.01)
            metrics.observe_batch(f"m{number}", 3)
        ended.set()

    thread = threading.Thread(target=observe)
    thread.start()
    while not ended.is_set():
        metrics.text()
    thread.join()
    assert sum(scrape(metrics)["ray_tensorflow_answers_total"].values()) == 2000


def test_neither_ray_nor_tensorflow_is_imported():
    script = "import sys, shared_graph.metrics; print({'ray', 'tensorflow', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
