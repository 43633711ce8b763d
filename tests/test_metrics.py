"""GET /metrics: Prometheus' text format, and counts that move with what is answered."""

import re

SAMPLE = re.compile(r'(ray_tensorflow_\w+(?:\{\w+="[^"\\\n]*"(?:,\w+="[^"\\\n]*")*\})?) (\d+(?:\.\d+)?(?:e-?\d+)?)')


def scrape(server) -> dict[str, float]:
    """Value by sample, as it is written."""
    answer = server.get("/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    samples = [line for line in answer.body.decode().splitlines() if not line.startswith("# TYPE ray_tensorflow_")]
    return {name: float(value) for name, value in (SAMPLE.fullmatch(line).groups() for line in samples)}


def test_answers_are_counted_by_model_and_kind_and_errors_by_status(front_end):
    before = scrape(front_end)
    for path in ("/?value=0", "/?value=0", "/?value=x", "/nothing"):
        front_end.get(path)
    for model in ("linear", "linear", "linear", "nobody"):
        front_end.predict(model, {"instances": [[1, 2, 3]]})
    moved = {name: value - before.get(name, 0) for name, value in scrape(front_end).items()}
    assert moved['ray_tensorflow_answers_total{model="adder",kind="add"}'] == 2
    assert moved['ray_tensorflow_answers_total{model="linear",kind="predict"}'] == 3
    assert moved['ray_tensorflow_errors_total{code="400"}'] == 1
    assert moved['ray_tensorflow_errors_total{code="404"}'] == 2
    assert moved["ray_tensorflow_answer_seconds_count"] == moved['ray_tensorflow_answer_seconds_bucket{le="+Inf"}'] == 5
    assert not any("nobody" in name for name in moved)  # what anybody asks for makes no new series
