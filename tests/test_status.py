"""What a process knows of its cluster: told in the log once, and to whoever asks."""

import time

import pytest

from shared_graph.errors import InvalidRequest, Unavailable
from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelKey, ModelVersion, Snapshot
from shared_graph.options import Options
from shared_graph.status import LOADING_PATIENCE_S, Status
from shared_graph.wire import ProcessInfo

LOADED = LoadedVersion({"signature_def": {"signature_def": {}}}, "", (), (), False, "")
SOURCE = ModelSource("m", 1, function="a:b")


def snapshot(number: int, error: str | None = None, loading: bool = False) -> Snapshot:
    """In which version ``number`` of the model is served, unless there is an error."""
    version = ModelVersion(SOURCE._replace(version=number), "AVAILABLE", error, None if error else LOADED)
    pointers = {} if error else {("m", None): number, ("m", "stable"): number}
    return Snapshot(number, {ModelKey("m", number): version}, frozenset(["m"] if loading else []), pointers)


@pytest.fixture
def status() -> Status:
    return Status(Options(workers=1, model=[SOURCE]))


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", "shared_graph")
    return lambda: [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def test_what_an_actor_says_is_wrong_is_logged_once_and_again_when_it_changes(status, log):
    [worker] = status.workers
    for trouble in ("a run does not end", "a run does not end", None, "a run does not end", "another", "another"):
        status.set_trouble(worker, trouble)
        assert worker.trouble == trouble
    assert log() == [
        "WARNING worker 0: a run does not end",
        "WARNING worker 0: a run does not end",
        "WARNING worker 0: another",
    ]


def test_versions_labels_and_failures_are_logged_when_they_change_and_ready_once(status, log):
    status.apply_snapshot(snapshot(1, loading=True))
    status.workers[0].state = "ready"
    status.tell_when_ready()  # not yet: a model is being loaded
    for _ in range(2):
        status.apply_snapshot(snapshot(1))
    status.apply_snapshot(snapshot(2))
    for _ in range(2):
        status.apply_snapshot(snapshot(3, error="m version 3: no such op"))
    status.tell_when_ready()
    assert log() == [
        "INFO model m: the latest is version 1",
        "INFO model m: stable is version 1",
        "INFO ready: 1 worker",
        "INFO model m: the latest is version 2",
        "INFO model m: stable is version 2",
        "ERROR m version 3: no such op",
    ]


def test_health_is_ready_with_one_worker_and_else_says_why_not(status):
    [worker], health = status.workers, lambda: status.health()["status"]
    assert health() == "starting"
    status.apply_snapshot(snapshot(1, loading=True))
    worker.process, worker.state, status.worker_since = ProcessInfo(7, "node", [], None), "ready", time.monotonic()
    assert health() == "loading"
    status.worker_since -= LOADING_PATIENCE_S
    assert health() == "ready", "a model that loads for ever keeps the others from being served"
    status.worker_since = time.monotonic()
    status.apply_snapshot(snapshot(1))
    assert health() == "ready" and status.health()["error"] is None
    worker.state = "starting"
    assert health() == "recovering"
    worker.state = "ready"
    status.fail(Unavailable("The sum is damaged."))
    assert health() == "failed"
    status.recover()
    assert health() == "ready"


def test_health_tells_of_each_model_its_version_in_use_its_labels_and_its_error(status):
    empty = {"version": None, "merged": [], "labels": {}, "error": None}
    assert status.health()["models"] == {}
    status.apply_snapshot(snapshot(1, error="no such op"))
    assert status.health()["models"] == {"adder": empty, "m": empty | {"error": "no such op"}}
    status.apply_snapshot(snapshot(2))
    assert status.health()["models"]["m"] == empty | {"version": 2, "labels": {"stable": 2}}
    moving = snapshot(2)._replace(pointers={("m", None): None, ("m", "stable"): 2})
    status.apply_snapshot(moving)
    assert status.health()["models"]["m"] == empty | {"labels": {"stable": 2}}
    assert status.metrics.text().count(b"ray_tensorflow_model_version{") == 0


def test_what_is_asked_for_while_a_version_moves_is_the_one_of_before_and_what_has_gone_is_not_found(status):
    with pytest.raises(Unavailable, match="is starting"):
        status.get_model("m")
    status.apply_snapshot(snapshot(1, loading=True)._replace(pointers={}))
    with pytest.raises(Unavailable, match="Model m is being loaded"):
        status.get_model("m")
    status.apply_snapshot(snapshot(1))
    status.apply_snapshot(snapshot(2)._replace(pointers={("m", None): None, ("m", "stable"): None}))
    assert status.get_model("m").key.version == status.get_model("m", "stable").key.version == 1
    status.apply_snapshot(snapshot(2))
    assert [status.get_model("m", choice).key.version for choice in (None, "stable", 2)] == [2, 2, 2]
    for name, choice in (("m", 1), ("m", "other"), ("n", None)):
        with pytest.raises(InvalidRequest):
            status.get_model(name, choice)
    status.apply_snapshot(Snapshot())
    status.apply_snapshot(Snapshot(1, {ModelKey("m", 2): ModelVersion(SOURCE, "LOADING")}, frozenset(["m"])))
    assert status.get_model("m").key.version == 2, "a parameter server that is back has yet to look"
    with pytest.raises(Unavailable):
        status.get_model("m", 1)


def test_a_failure_for_ever_is_told_once_to_who_wants_to_know_and_answers_everybody(log):
    told = []
    status = Status(Options(workers=1))
    status.on_over = told.append
    for _ in range(2):
        status.fail(Unavailable("The sum is damaged."), is_over=True)
    assert [str(error) for error in told] == ["The sum is damaged."] and log() == ["ERROR The sum is damaged."]
    assert (status.health()["status"], status.health()["error"]) == ("failed", "The sum is damaged.")
    with pytest.raises(Unavailable, match="The sum is damaged"):
        status.get_model("adder")


def test_a_scrape_tells_what_is_true_now(status):
    status.apply_snapshot(snapshot(2))
    text = status.metrics.text().decode()
    assert 'ray_tensorflow_model_version{model="m"} 2.0\n' in text
    assert 'ray_tensorflow_restarts_total{actor="parameter server 0"} 0.0\n' in text
    assert "\nray_tensorflow_waiting_requests 0.0\n" in text and "\nray_tensorflow_sum " not in text
