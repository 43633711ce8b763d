"""GET /metrics: the format to the letter, and counts that move with each kind of request."""

import json
import math
import re

import pytest
from websockets.sync.client import connect

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ([+-]?Inf|NaN|[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")


def scrape(server) -> dict[str, float]:
    """Value by sample, as it is written; the text is held to the exposition format on the way."""
    answer = server.get("/metrics")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples, types, helped, family = {}, {}, set(), None
    assert answer.body.endswith(b"\n")
    for line in answer.body.decode().splitlines():
        if comment := COMMENT.fullmatch(line):
            what, name, text = comment.groups()
            assert name not in (helped if what == "HELP" else types)  # one group a family
            helped.add(name)
            if what == "TYPE":
                assert text in ("counter", "gauge", "histogram")
                types[name] = text
            family = name
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        name = re.sub("_(bucket|sum|count)$", "", sample[1]) if types[family] == "histogram" else sample[1]
        assert name == family and name.startswith("ray_tensorflow_") and (types[name] != "counter" or name.endswith("_total"))
        key = line.rpartition(" ")[0]
        assert key not in samples
        samples[key] = float(sample[3])
    assert set(types) == helped
    check_histograms(samples, [name for name, type in types.items() if type == "histogram"])
    return samples


def check_histograms(samples: dict[str, float], names: list[str]) -> None:
    """Buckets in order, cumulative, with +Inf at the end, which is the count."""
    for name in names:
        series: dict[str, list[tuple[float, float]]] = {}
        for key, value in samples.items():
            if bucket := re.fullmatch(rf'{name}_bucket\{{(?:(.*),)?le="(.*)"\}}', key):
                series.setdefault(bucket[1] or "", []).append((float(bucket[2]), value))
        for labels, buckets in series.items():
            ends, counts = zip(*buckets)
            inside = f"{{{labels}}}" if labels else ""
            assert list(ends) == sorted(set(ends)) and ends[-1] == math.inf and list(counts) == sorted(counts)
            assert counts[-1] == samples[f"{name}_count{inside}"] and samples[f"{name}_sum{inside}"] >= 0


def requests(kind: str, model: str, code: int) -> str:
    return f'ray_tensorflow_requests_total{{kind="{kind}",model="{model}",code="{code}"}}'


def moved(before: dict[str, float], after: dict[str, float], name: str = "ray_tensorflow_requests_total") -> dict[str, float]:
    """How much each sample of a name went up, where it did."""
    return {key: value - before.get(key, 0) for key, value in after.items() if key.startswith(name) and value != before.get(key, 0)}


REQUESTS = {
    "add": ("GET", "/?value=0", None, requests("add", "adder", 200)),
    "wrong add": ("GET", "/?value=x", None, requests("add", "adder", 400)),
    "wrong method": ("PUT", "/", None, requests("add", "adder", 405)),
    "predict": ("POST", "/v1/models/linear:predict", {"instances": [[1, 2, 3]]}, requests("predict", "linear", 200)),
    "wrong predict": ("POST", "/v1/models/linear:predict", {}, requests("predict", "linear", 400)),
    "percent-encoded": ("POST", "/v1/models/%6Cinear:predict", {"instances": [[1, 2, 3]]}, requests("predict", "linear", 200)),
    "unknown model": ("POST", "/v1/models/nobody:predict", {"instances": [1]}, requests("predict", "", 404)),
    "classify": ("POST", "/v1/models/linear:classify", {"examples": [{"x": 1}]}, requests("classify", "linear", 400)),
    "regress": ("POST", "/v1/models/linear:regress", {"examples": [{"x": 1}]}, requests("regress", "linear", 400)),
    "status": ("GET", "/v1/models/linear", None, requests("status", "linear", 200)),
    "metadata": ("GET", "/v1/models/linear/metadata", None, requests("metadata", "linear", 200)),
    "health": ("GET", "/health", None, requests("health", "", 200)),
    "unknown path": ("GET", '/"\\%0A{}', None, requests("other", "", 404))}


@pytest.mark.parametrize("method, path, document, counted", REQUESTS.values(), ids=REQUESTS)
def test_a_request_is_counted_once_by_kind_model_and_code_and_timed(front_end, method, path, document, counted):
    before = scrape(front_end)
    body = None if document is None else json.dumps(document)
    code = front_end.request(method, path, body).status
    after = scrape(front_end)
    assert moved(before, after) == {counted: 1, requests("metrics", "", 200): 1}
    errors = {f'ray_tensorflow_errors_total{{code="{code}"}}': 1} if code >= 400 else {}
    assert moved(before, after, "ray_tensorflow_errors_total") == errors
    kind = re.search('kind="(.*?)"', counted)[1]
    assert moved(before, after, "ray_tensorflow_request_seconds_count") == {
        f'ray_tensorflow_request_seconds_count{{kind="{each}"}}': 1 for each in (kind, "metrics")}


def test_batches_are_counted_by_their_size(front_end, clients):
    before = scrape(front_end)
    assert clients(16, lambda _: front_end.get("/?value=0").status, range(160)) == [200] * 160
    after = scrape(front_end)
    assert after["ray_tensorflow_batch_size_sum"] == before["ray_tensorflow_batch_size_sum"] + 160
    assert after["ray_tensorflow_batch_size_count"] <= before["ray_tensorflow_batch_size_count"] + 160
    assert after['ray_tensorflow_batch_size_bucket{le="64"}'] == after["ray_tensorflow_batch_size_count"]


def test_queue_and_restarts_are_told(front_end):
    samples = scrape(front_end)
    assert samples["ray_tensorflow_waiting_requests"] == 0
    restarts = [key for key in samples if "restarts" in key]
    assert restarts == [
        'ray_tensorflow_worker_restarts_total{index="0"}', 'ray_tensorflow_worker_restarts_total{index="1"}',
        'ray_tensorflow_parameter_server_restarts_total{index="0"}']
    restarted = [worker["restarts"] for worker in front_end.get("/health").json["workers"]]
    assert [samples[key] for key in restarts[:2]] == restarted


def test_whatever_is_asked_for_makes_no_new_series(front_end, clients):
    paths = [f"/v1/models/m{i}:predict" for i in range(50)] + [f"/nothing/{i}" for i in range(50)] + [f"/v1/models/m{i}" for i in range(50)]
    ask = (lambda path: front_end.request("POST" if ":" in path else "GET", path, "{}").status)
    scrape(front_end), clients(8, ask, paths[::50])
    before = scrape(front_end)
    assert set(clients(8, ask, paths)) == {404}
    after = scrape(front_end)
    assert set(after) == set(before)
    assert moved(before, after) == {
        requests("predict", "", 404): 50, requests("other", "", 404): 50, requests("status", "", 404): 50, requests("metrics", "", 200): 1}


def test_messages_of_a_websocket_are_counted(front_end):
    if front_end.kind != "starlette":
        pytest.skip("Starlette only")
    before = scrape(front_end)
    with connect(f"ws://127.0.0.1:{front_end.port}/ws", close_timeout=1) as socket:
        for document in ({"id": 1, "value": 0}, {"id": 2, "model": "linear", "instances": [[1, 2, 3]]}, {"id": 3}):
            socket.send(json.dumps(document))
        for _ in range(3):
            socket.recv(timeout=60)
    assert moved(before, scrape(front_end)) == {
        requests("message", "", 200): 2, requests("message", "", 400): 1, requests("metrics", "", 200): 1}


def test_metrics_answers_only_get(front_end):
    answer = front_end.request("POST", "/metrics", "{}")
    assert answer.status == 405 and list(answer.json) == ["error"]
