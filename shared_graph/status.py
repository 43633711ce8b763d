"""What this process knows of the cluster, and tells: actors, models, failures, counts."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from shared_graph.batcher import Batcher
from shared_graph.connection import Request, WorkerConnection
from shared_graph.errors import Error, InvalidRequest, Unavailable, first_sentence
from shared_graph.logs import counted
from shared_graph.metrics import Gauges, Metrics
from shared_graph.model_source import ADDER
from shared_graph.models import ModelVersion, Snapshot, VersionChoice, not_found
from shared_graph.options import Options
from shared_graph.wire import ProcessInfo

log = logging.getLogger(__name__)

LOADING_PATIENCE_S = 60.0  # after its first worker was ready a server is *loading*, so long, while a model is
CLOSED = "The server is shutting down."


@dataclasses.dataclass(eq=False)
class ActorStatus:
    """What this process knows of one actor."""

    kind: str  # "parameter server" or "worker"
    index: int
    state: str = "starting"  # ready, hung
    restarts: int = 0
    process: ProcessInfo | None = None  # that it is, or was
    trouble: str | None = None  # what it says is wrong
    handle: Any = None
    connection: WorkerConnection | None = None  # to a worker

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"

    def as_json(self) -> dict[str, Any]:
        known = {"index": self.index, "state": self.state, "restarts": self.restarts}
        if self.state != "starting":
            known |= self.process._asdict()
        known["trouble"] = self.trouble
        if connection := self.connection:
            known["in_flight"] = connection.unanswered
        return known


class Status:
    """Written in the home loop, read in any thread."""

    def __init__(self, options: Options):
        self.options = options
        self.on_over: Callable[[Error], object] = lambda error: None  # called when nothing will be served any more
        self.metrics = Metrics(self._gauges, lambda name: (name, None) in self.snapshot.pointers)
        self.batcher = Batcher(options, self._observe, self.metrics.observe_batch)
        self.servers = [ActorStatus("parameter server", index) for index in range(options.parameter_servers)]
        self.workers = [ActorStatus("worker", index) for index in range(options.workers)]
        self.snapshot = Snapshot()
        self._last_known: dict[tuple[str, VersionChoice], ModelVersion] = {}
        self.failure: Error | None = None  # why nothing is served, when that is not just for the moment
        self.is_over = False  # and never will be any more
        self.worker_since: float | None = None  # when the first worker was ready
        self._is_told = False  # that all is ready: once
        self.changed = threading.Condition()

    # -- what happens --------------------------------------------------------------------------------------------------

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """What the primary parameter server serves now."""
        before, self.snapshot = self.snapshot, snapshot
        found = {asked: snapshot.find(*asked) for asked in [*snapshot.pointers, *snapshot.versions]}
        served = {name for name, _ in snapshot.pointers}
        known = self._last_known.items()
        kept = {asked: version for asked, version in known if asked[0] not in served or snapshot.is_moving(*asked)}
        self._last_known = kept | {asked: version for asked, version in found.items() if version}
        for key, version in snapshot.versions.items():
            old = before.versions.get(key)
            if version.error and (old is None or version.error != old.error):
                log.error("%s", version.error)
        for (name, choice), number in snapshot.pointers.items():
            last = before.pointers.get((name, choice))
            if name != ADDER and number is not None and number != last:
                log.info("model %s: %s is version %d", name, choice or "the latest", number)
        self.tell_when_ready()
        self.notify()

    def fail(self, error: Exception, is_over: bool = False) -> None:
        """Answer everything with this, until the parameter server is well; if ``is_over``, for ever."""
        error = error if isinstance(error, Error) else Unavailable(first_sentence(error))
        if str(error) != str(self.failure):
            log.error("%s", error)
        failure = error if isinstance(error, Unavailable) else Unavailable(str(error))
        self.batcher.close(failure)
        was_over, self.failure, self.is_over = self.is_over, error, is_over
        self.notify()
        if is_over and not was_over:
            self.on_over(error)

    def recover(self) -> None:
        if not self.is_over:
            self.failure = None
            self.batcher.reopen()
            self.notify()

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def tell_when_ready(self) -> None:
        """Once, when all is there."""
        if not self._is_told and not self.failure and self.is_ready(self.options.workers):
            self._is_told = True
            log.info("ready: %s", counted(self.options.workers, "worker"))

    def set_trouble(self, actor: ActorStatus, trouble: str | None) -> None:
        """What an actor says is wrong; told once when it changes."""
        if trouble and trouble != actor.trouble:
            log.warning("%s: %s", actor, trouble)
        actor.trouble = trouble

    def _observe(self, request: Request, seconds: float) -> None:
        self.metrics.observe(request.key.model, request.verb, seconds)
        if request.verb == "add":
            self.metrics.last_sum = request.future.result()

    # -- what is served ------------------------------------------------------------------------------------------------

    def get_model(self, name: str, choice: VersionChoice = None) -> ModelVersion:
        """A served model's version, or what a label stands for, or the latest. Raises InvalidRequest in TensorFlow
        Serving's words, or Unavailable."""
        if failure := self.failure:  # a new one: the traceback of one that is raised again and again grows
            raise Unavailable(str(failure))
        if not self.snapshot.versions:
            raise Unavailable("The server is starting; try again later.")
        snapshot = self.snapshot
        version = snapshot.find(name, choice)
        if version is None and snapshot.is_moving(name, choice):  # a request waits for that, in a worker
            version = self._last_known.get((name, choice))
            if version is None:
                raise Unavailable(f"Model {name} is being loaded; try again later.")
        if version is None:
            raise not_found(name, choice)
        return version

    def is_ready(self, workers: int) -> bool:
        """Are so many workers ready, and has each model been loaded, or failed?"""
        return sum(worker.state == "ready" for worker in self.workers) >= workers and not self.snapshot.loading

    def model_errors(self) -> list[str]:
        """Why those models are not there of which no version is."""
        there = {name for name, _ in self.snapshot.pointers}
        errors = {key.name: version.error for key, version in reversed(self.snapshot.versions.items()) if version.error}
        names = [ADDER, *(source.name for source in self.options.model)]  # which of them failed first is chance
        return [errors[name] for name in names if name in errors and name not in there]

    def metadata(self, name: str, choice: VersionChoice) -> dict[str, Any]:
        """What TensorFlow Serving's REST API answers to GET .../metadata."""
        version = self.get_model(name, choice)
        spec = {"name": name, "signature_name": "", "version": str(version.key.version)}
        return {"model_spec": spec, "metadata": version.loaded.metadata}

    def version_status(self, name: str, choice: VersionChoice) -> dict[str, Any]:
        """What TensorFlow Serving's REST API answers to GET for a model."""
        number = self.get_model(name, choice).key.version if isinstance(choice, str) else choice
        self.get_model(ADDER)  # raises Unavailable while nothing is served
        found = [v for key, v in self.snapshot.versions.items() if key.name == name and number in (None, key.version)]
        if not found and name in self.snapshot.loading:
            raise Unavailable(f"Model {name} is being loaded; try again later.")
        if not found:
            which = "any versions" if number is None else f"version {number}"
            raise InvalidRequest(f"There is no such model (Could not find {which} of model {name})", 404)

        def shown(version: ModelVersion) -> dict[str, Any]:
            code = "UNKNOWN" if version.error else "OK"
            status = {"error_code": code, "error_message": version.error or ""}
            return {"version": str(version.key.version), "state": version.state, "status": status}

        return {"model_version_status": [shown(v) for v in sorted(found, key=lambda v: -v.key.version)]}

    # -- what is told --------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: status, parameter servers, workers, models; asks nobody, waits for nothing."""
        status = "failed" if self.failure else "recovering" if self.worker_since else "starting"
        if not self.failure and any(worker.state != "starting" for worker in self.workers):
            is_new = time.monotonic() - (self.worker_since or 0) < LOADING_PATIENCE_S
            status = "loading" if is_new and self.snapshot.loading else "ready"
        return {
            "status": status,
            "error": self.failure and str(self.failure),
            "parameter_servers": [server.as_json() for server in self.servers],
            "workers": [worker.as_json() for worker in self.workers],
            "models": self._models_as_json(),
            "waiting": self.batcher.waiting,
        }

    def _models_as_json(self) -> dict[str, dict[str, Any]]:
        snapshot = self.snapshot
        names = [ADDER, *(source.name for source in self.options.model)] if snapshot.versions else []
        models = {name: {"version": None, "merged": [], "labels": {}, "error": None} for name in names}
        for (name, choice), number in snapshot.pointers.items():
            version = snapshot.find(name, number) if number is not None else None
            if choice is None and version:
                models[name] |= {"version": number, "merged": list(version.loaded.batchable)}
            elif choice is not None:
                models[name]["labels"][choice] = number
        for key, version in snapshot.versions.items():
            if version.error:
                models[key.name]["error"] = version.error
        return models

    def _gauges(self) -> Gauges:
        """For a scrape, in any thread."""
        pointers = self.snapshot.pointers.items()
        return Gauges(
            self.batcher.waiting,
            {str(worker.index): link.unanswered for worker in self.workers if (link := worker.connection)},
            {str(actor): actor.restarts for actor in self.servers + self.workers},
            {name: number for (name, choice), number in pointers if choice is None and number is not None},
        )
