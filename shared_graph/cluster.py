"""What scripts, notebooks and front ends hold in their hands: the calls, the home loop and its thread."""

from __future__ import annotations

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Iterator
from typing import Any

import ray
import uvloop
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shared_graph.adder import finite
from shared_graph.batcher import BUCKETS_S, Batcher, Line
from shared_graph.errors import (
    DeadlineExceeded,
    Error,
    InvalidRequest,
    ModelError,
    OptionError,
    Unavailable,
    WorkerLost,
    first_sentence,
)
from shared_graph.models import ADDER, Arrays, Key, Model, Version, as_arrays, not_found
from shared_graph.options import PLACES, Options
from shared_graph.parameter_server import ParameterServer
from shared_graph.ray_runtime import call, ray_runtime
from shared_graph.status import Member
from shared_graph.supervisor import gpu_share, kill_process
from shared_graph.worker import Worker

log = logging.getLogger(__name__)

PING_S = 0.5  # between two looks at an actor
SUSPECT_S = 1.5  # a worker that has not answered for so long gets no new work
PATIENCE_S = {"worker": 4.0, "parameter server": 30.0}  # an actor that has not answered for so long is ended


class Cluster:
    """A parameter server and its workers, with a blocking and an awaitable door to each call.

        with Cluster(options) as cluster:              # scripts, threads, Flask, notebooks
            cluster.add(3.0)
            cluster.predict({"x": x}, model="m")

        async with Cluster(options) as cluster:        # inside any running event loop
            await cluster.add_async(3.0)

    Calls may come from several threads and event loops at once; all work is done in the *home loop*: one that ``begin``
    is given, else one in a thread of the cluster's own, which owns Ray: Ray's processes end with who started them.
    """

    def __init__(self, options: Options | None = None, **changes):
        self.options = dataclasses.replace(options or Options(), **changes)
        self._servers = [Member("parameter server", index) for index in range(self.options.parameter_servers)]
        self._workers = [Member("worker", index) for index in range(self.options.workers)]
        self.models: dict[Key, Model] = {}
        self._batcher = Batcher(self.options)
        self._errors: collections.Counter[int] = collections.Counter()  # by HTTP status
        self._failure: Error | None = None  # why nothing is served, when that is not just for the moment
        self._changed, self._maker = threading.Condition(), concurrent.futures.ThreadPoolExecutor(1)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: int | None = None  # the thread of the home loop
        self._described, self._first, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._run, self._folder = secrets.token_hex(8), None  # in which variables are kept
        self._namespace = "ray_tensorflow" if self.options.address else f"ray_tensorflow-{self._run}"

    # -- life ----------------------------------------------------------------------------------------------------------

    def begin(self, home: asyncio.AbstractEventLoop | None = None) -> Cluster:
        """Start everything in the background, in the running loop ``home`` if given; ``health`` tells how far it is."""
        with self._changed:
            if self._thread is None and self._failure is None:
                self._loop = home or uvloop.new_event_loop()
                self._thread = threading.Thread(target=self._live, args=[home is None], daemon=True)
                self._thread.start()
                atexit.register(self.close)
        return self

    def start(self, workers: int = 1) -> Cluster:
        """Start everything; returns when all models are loaded and so many workers are ready.

        Raises OptionError, ModelError or Unavailable when that cannot be.
        """
        self.begin()
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or (sum(worker.state == "ready" for worker in self._workers) >= workers)
            )
        errors = [
            ModelError(model.error)
            for (name, _), model in self.models.items()
            if model.error and (name, None) not in self.models
        ]
        if failure := self._failure or next(iter(errors), None):
            self.close()
            raise failure
        return self

    def close(self) -> None:
        """Answer what is left with Unavailable and end every process that was started. Safe to call twice."""
        atexit.unregister(self.close)
        with self._changed:
            self._failure = Unavailable("The server is shutting down.")
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError, AttributeError):  # the loop is closed, or never was
            self._loop.call_soon_threadsafe(self._closing.set)
        if self._thread:
            self._thread.join()

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *exception) -> None:
        self.close()

    async def __aenter__(self) -> Cluster:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, *exception) -> None:
        await asyncio.to_thread(self.close)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def add(self, value: float, worker: int | None = None) -> float:
        """Add a finite number to the shared sum; returns the sum right after this very add, as float64.

        ``worker`` is the number of the worker that is to do it, by default the next one. Raises InvalidRequest,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        return self.ask(ADDER, "add", finite(value), worker=worker)

    async def add_async(self, value: float, worker: int | None = None) -> float:
        """As ``add``, awaitable."""
        return await self.ask_async(ADDER, "add", finite(value), worker=worker)

    def predict(self, inputs: Any, model: str, signature: str = "serving_default", version: Version = None) -> Arrays:
        """Run a signature of a served model.

        ``inputs`` are arrays by input name (or just the array, of a sole input), of a dtype that numpy casts to the
        input's without loss of kind (ints to floats, not floats to ints; text for strings). The result is arrays by
        output name; they may be read-only: copy what you want to write to. Raises InvalidRequest, ModelError,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        return self.ask(model, "arrays", (signature, as_arrays(inputs)), version)

    async def predict_async(
        self, inputs: Any, model: str, signature: str = "serving_default", version: Version = None
    ) -> Arrays:
        """As ``predict``, awaitable."""
        return await self.ask_async(model, "arrays", (signature, as_arrays(inputs)), version)

    def get_weights(self, model: str) -> Arrays:
        """The variables of a served model by name. Arrays may be read-only: copy what you want to write to."""
        self.find(model)
        return self._wait(self._cross(self._call_server("get_weights", model)))

    def set_weights(self, model: str, weights: Arrays) -> None:
        """Set some or all variables of a served model; a wrong name or shape is an InvalidRequest, and none is set.

        Once it returns, no later request is answered with the old ones, mirrors included.
        """
        self.find(model)
        self._wait(self._cross(self._call_server("set_weights", model, as_arrays(weights))))

    def reload(self, model: str) -> int:
        """Look now for new versions and labels of a model, which happens once a second; the version in use then.

        Raises InvalidRequest, Unavailable or WorkerLost.
        """

        async def reload() -> int:
            self._learn(self._servers[0], await self._call_server("reload", model))
            return self.find(model).version

        return self._cross(reload()).result()

    def map(
        self,
        batches: Iterable[Any],
        model: str,
        signature: str = "serving_default",
        version: Version = None,
        ordered: bool = True,
    ) -> Iterator[Arrays]:
        """``predict`` for each batch of any iterable, however long and of whatever sizes, in order or as they finish.

        Keeps a bounded number of batches in flight and pulls no faster than they can be sent. An error says which batch
        it is about, counted from 0. Leaving the loop early stops the work.
        """
        about, pending, source = 0, {}, enumerate(batches)
        ahead = min(2 * PLACES * self.options.workers, self.options.max_queue)
        try:
            while True:
                for about, batch in itertools.islice(source, ahead - len(pending)):
                    found, body = self.find(model, version), (signature, as_arrays(batch))
                    pending[self._cross(self._batcher.submit((model, version), found, "arrays", body))] = about
                if not pending:
                    return
                done = pending if ordered else concurrent.futures.wait(pending, return_when="FIRST_COMPLETED").done
                future = next(iter(done))
                about = pending.pop(future)
                yield future.result()
        except Error as error:
            raise type(error)(f"batch {about}: {error}", error.status) from error
        finally:
            for future in pending:
                future.cancel()

    async def map_async(self, batches: Iterable[Any] | AsyncIterable[Any], *arguments, **options) -> AsyncIterator[Any]:
        """As ``map``, for ``async for``; ``batches`` may be asynchronous too. It is threads that wait, not the loop."""
        end = object()
        if isinstance(batches, AsyncIterable):
            batches = from_loop(aiter(batches), asyncio.get_running_loop())
        results = self.map(batches, *arguments, **options)
        try:
            while (result := await asyncio.to_thread(next, results, end)) is not end:
                yield result
        finally:
            with contextlib.suppress(ValueError):  # a thread still waits there, and drops it when it has its result
                await asyncio.to_thread(results.close)

    def find(self, name: str, version: Version = None) -> Model:
        """A served model's version, or what a label stands for, or the latest. Raises InvalidRequest in TensorFlow
        Serving's words, or Unavailable."""
        if self._failure or not self.models:
            failure = self._failure or Unavailable("The server is starting; try again later.")
            raise failure.with_traceback(None)  # else that of one that is raised again and again grows
        model = self.models.get((name, version))
        if model is None or model.state not in ("AVAILABLE", "MOVING"):
            raise not_found(name, version)
        return model

    def describe(self, name: str, version: Version, verb: str) -> dict[str, Any]:
        """What TensorFlow Serving's REST API answers to GET: a model's "metadata", or its versions' "status"."""
        if verb == "metadata":
            model = self.find(name, version)
            spec = {"name": name, "signature_name": "", "version": str(model.version)}
            return {"model_spec": spec, "metadata": model.metadata}
        version = self.find(name, version).version if isinstance(version, str) else version
        self.find(ADDER)
        found = [
            model
            for key, model in self.models.items()
            if key == (name, model.version) and version in (None, model.version)
        ]
        if not found:
            which = "any versions" if version is None else f"version {version}"
            raise InvalidRequest(f"There is no such model (Could not find {which} of model {name})", 404)
        return {
            "model_version_status": [
                {
                    "version": str(model.version),
                    "state": model.state,
                    "status": {"error_code": "UNKNOWN" if model.error else "OK", "error_message": model.error or ""},
                }
                for model in sorted(found, key=lambda model: -model.version)
            ]
        }

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: status, parameter servers, workers, models; asks nobody, waits for nothing."""
        status = "failed" if self._failure else "recovering" if self._first.is_set() else "starting"
        if not self._failure and any(worker.state != "starting" for worker in self._workers):
            status = "ready"

        def shown(member: Member) -> dict[str, Any]:
            known = {"index": member.index, "state": member.state, "restarts": member.restarts} | member.about
            return known | ({"in_flight": sum(map(len, member.line.trips.values()))} if member.line else {})

        models = {name: {"version": None, "merged": [], "labels": {}, "error": None} for name, _ in self.models}
        for (name, which), model in self.models.items():
            if which is None:
                models[name] |= {"version": model.version, "merged": model.merged}
            elif isinstance(which, str):
                models[name]["labels"][which] = model.version
            elif model.error:
                models[name]["error"] = model.error
        return {
            "status": status,
            "error": self._failure and str(self._failure),
            "parameter_servers": list(map(shown, self._servers)),
            "workers": list(map(shown, self._workers)),
            "models": models,
            "waiting": self._batcher.waiting,
        }

    def refuse(self, error: Exception) -> tuple[dict[str, str], int, dict[str, str]]:
        """What a front end answers to a request that raised this: body, status and headers."""
        if not isinstance(error, Error):
            log.error("a request failed", exc_info=error)
            error = Error("Internal error")
        self._errors[error.status] += 1
        return {"error": str(error)}, error.status, {"Retry-After": "1"} if error.status in (429, 503) else {}

    def metrics(self) -> str:
        """What ``GET /metrics`` answers: what this process has done, in Prometheus' text format."""
        batcher, took = self._batcher, itertools.accumulate(self._batcher.took[end] for end in BUCKETS_S)
        samples = {
            ("answers_total", "counter"): [
                (f'{{model="{model}",kind="{verb}"}}', count)
                for (model, verb), count in sorted(batcher.answered.items())
            ]
        }
        samples["errors_total", "counter"] = [(f'{{code="{c}"}}', count) for c, count in sorted(self._errors.items())]
        samples["answer_seconds", "histogram"] = [
            *((f'_bucket{{le="{str(end).replace("inf", "+Inf")}"}}', count) for end, count in zip(BUCKETS_S, took)),
            ("_sum", batcher.took_s),
            ("_count", batcher.took.total()),
        ]
        samples["waiting_requests", "gauge"] = [("", batcher.waiting)]
        samples["model_version", "gauge"] = [
            (f'{{model="{name}"}}', model.version) for (name, which), model in self.models.items() if which is None
        ]
        samples["restarts_total", "counter"] = [
            (f'{{actor="{member}"}}', member.restarts) for member in self._servers + self._workers
        ]
        lines = []
        for (name, kind), values in samples.items():
            lines.append(f"# TYPE ray_tensorflow_{name} {kind}")
            lines.extend(f"ray_tensorflow_{name}{suffix} {value}" for suffix, value in values)
        return "\n".join(lines) + "\n"

    # -- from any thread or loop to the home loop ----------------------------------------------------------------------

    def ask(self, model: str, verb: str, body: Any, version: Version = None, worker: int | None = None) -> Any:
        """What ``decode`` says of the verb. Raises Error."""
        found = self.find(model, version)
        return self._wait(self._cross(self._batcher.submit((model, version), found, verb, body, worker)))

    async def ask_async(
        self, model: str, verb: str, body: Any, version: Version = None, worker: int | None = None
    ) -> Any:
        """As ``ask``, awaitable."""
        answer = self._batcher.submit((model, version), self.find(model, version), verb, body, worker)
        return await (answer if threading.get_ident() == self._home else asyncio.wrap_future(self._cross(answer)))

    async def _call_server(self, method: str, model: str, *arguments) -> Any:
        """Call the first parameter server."""
        if self._servers[0].state == "starting":
            raise Unavailable("The parameter server is being started; try again later.")
        try:
            return await call(getattr(self._servers[0].actor, method).remote(model, *arguments))
        except ray.exceptions.RayActorError:
            raise WorkerLost("The parameter server was lost; a change may or may not have been applied.") from None

    def _cross(self, door: Coroutine) -> concurrent.futures.Future:
        """Run it in the home loop."""
        if threading.get_ident() == self._home:
            door.close()
            raise InvalidRequest(
                "A blocking call in the cluster's own event loop would never return: await its twin,"
                " or use asyncio.to_thread."
            )
        return asyncio.run_coroutine_threadsafe(door, self._loop)

    def _wait(self, future: concurrent.futures.Future) -> Any:
        try:
            return future.result(self.options.timeout_s + 5)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within the deadline of {self.options.timeout_s:g} s.") from None

    # -- in the home loop ----------------------------------------------------------------------------------------------

    def _live(self, is_own_loop: bool) -> None:
        """The thread that owns Ray, and mostly the home loop, from start to end."""
        try:
            with ray_runtime(self.options):
                if is_own_loop:
                    self._loop.run_until_complete(self._serve())
                else:
                    asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
                self._maker.shutdown(cancel_futures=True)  # what is made later would start another Ray
                if not self.options.address:
                    self._end_actors()
        except Exception as error:
            if not self._closing.is_set():  # else it was ended on purpose while it started
                why = f"Ray could not be started: {first_sentence(error)}"
                self._fail(error if isinstance(error, Error) else Unavailable(why))
        finally:
            if is_own_loop:
                self._loop.close()
            with self._changed:
                self._failure = self._failure or Unavailable("The server is shutting down.")
                self._changed.notify_all()

    async def _serve(self) -> None:
        """Until ``close``."""
        self._home = threading.get_ident()
        tasks = [asyncio.create_task(self._keep(member)) for member in self._servers + self._workers]
        await self._closing.wait()
        self._batcher.close(Unavailable("The server is shutting down."))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lines = [worker.line.closed for worker in self._workers if worker.line]
        self._lose(self._servers[0])  # and so all lines
        await asyncio.gather(*lines)
        self._home = None

    async def _keep(self, member: Member) -> None:
        """Bring an actor up to date, and again whenever it, or the parameter server, was away; until cancelled."""
        if member.kind == "worker" and (member.index or self.options.address):  # else beside the parameter server
            await (self._first if member.index else self._described).wait()  # one that serves comes first
        while True:
            started = time.monotonic()
            try:
                member.actor = member.actor or await self._loop.run_in_executor(self._maker, self._make, member)
                await self._start(member)
                log.info("%s ready  pid %d  %.1f s", member, member.pid, time.monotonic() - started)
                log.warning("%s lost  pid %d  %s", member, member.pid, await self._watch(member))
            except OptionError as error:
                self._remove_folder()
                return self._fail(error)
            except ray.exceptions.ActorDiedError:  # for good: a shared cluster that had ended
                member.actor = None
            except ray.exceptions.ActorUnavailableError:
                pass  # Ray is starting it anew
            except Exception as error:
                log.warning("%s could not start: %s", member, first_sentence(error))
                if isinstance(error, Error) and member is self._servers[0]:
                    self._fail(error)
            self._lose(member)
            await asyncio.sleep(PING_S)

    def _make(self, member: Member):
        """The actor of this name; Ray keeps it alive, and the cluster has only one, whoever made it."""
        is_worker, is_first = member.kind == "worker", member is self._servers[0]
        gpus, sharers = int(ray.cluster_resources().get("GPU", 0)), self.options.workers
        if self.options.placement == "shared":
            sharers += self.options.parameter_servers
        elif not is_worker:
            gpus = 0
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(Worker if is_worker else ParameterServer)
            .options(
                name=str(member),
                namespace=self._namespace,
                get_if_exists=True,
                max_restarts=-1,
                max_concurrency=10_000,
                lifetime="detached" if self.options.address else None,
                num_cpus=0.001,
                num_gpus=gpu_share(gpus, sharers),
                scheduling_strategy=here if is_first else "SPREAD",  # where the folder is
                enable_task_events=False,  # of which Ray would keep 100,000: half a gigabyte
            )
            .remote(
                member.index, self.options, self._namespace, *([] if is_worker else [self._make_folder(), self._run])
            )
        )

    def _make_folder(self) -> str:
        """Where variables are kept, ready for the parameter server (see Checkpoints)."""
        try:
            self._folder = self._folder or self.options.checkpoint_dir or tempfile.mkdtemp(prefix="ray_tensorflow_")
            os.makedirs(self._folder, exist_ok=True)
            open(os.path.join(self._folder, f".run-{self._run}"), "a").close()
        except OSError as error:
            raise Unavailable(f"The folder for variables cannot be used: {error.filename}: {error.strerror}.") from None
        return self._folder

    def _remove_folder(self) -> None:
        if self._folder and not self.options.checkpoint_dir:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self, member: Member) -> None:
        """Call ``start``, and have what follows from it."""
        is_first = member is self._servers[0]
        about = await call(member.actor.start.remote(*([self.options.shared] if is_first else [])))
        if is_first:
            if about["folder"] != self._folder:  # others made this cluster
                self._remove_folder()
            self._learn(member, about)
            self._failure = None
            self._batcher.close(None)
            self._described.set()
        elif member.kind == "worker":
            await self._described.wait()
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*about["door"], limit=2**24), 10)
            writer.write(about["key"])
            member.line = Line(member.index, reader, writer, self._batcher)
            self._first.set()
        member.restarts += member.pid not in (None, about["pid"])
        member.about = {name: about[name] for name in ("pid", "node", "gpus", "cuda_visible_devices")}
        member.state, member.pid = "ready", about["pid"]
        with self._changed:
            self._changed.notify_all()

    def _learn(self, server: Member, about: dict[str, Any]) -> None:
        """What the first parameter server has now."""
        for (name, which), model in about["models"].items():
            before = self.models.get((name, which))
            if model.error and model != before:
                log.error("%s", model.error)
            if which != model.version and before and before.version != model.version:
                log.info("model %s: %s is version %d", name, which or "the latest", model.version)
        self.models, server.edition = about["models"], about["edition"]

    async def _watch(self, member: Member) -> str:
        """Why an actor was lost, as soon as it is. One that is silent is ended, whereupon Ray starts it anew."""
        stay, ping, silent_s = asyncio.ensure_future(call(member.actor.stay.remote())), None, 0.0
        signs = [stay, *([member.line.closed] if member.line else [])]
        try:
            while not any(sign.done() for sign in signs):
                ping = ping or asyncio.ensure_future(call(member.actor.ping.remote(member.edition)))
                asked = time.monotonic()
                await asyncio.wait([*signs, ping], timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if ping.done() and not ping.exception():
                    member.about["trouble"], news = ping.result()
                    ping, silent_s = None, 0.0
                    self._set_hung(member, False)
                    if news:
                        self._learn(member, news)
                    await asyncio.wait(signs, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                elif time.monotonic() - asked < 1.5 * PING_S:  # else it is this very loop that comes too late
                    silent_s += PING_S
                    self._set_hung(member, silent_s > SUSPECT_S)
                if silent_s > PATIENCE_S[member.kind]:
                    await self._kill(member)
                    return f"it did not answer for {PATIENCE_S[member.kind]:g} s"
            return "its process is gone" if stay.done() else "its connection was closed"
        finally:
            for future in filter(None, (stay, ping)):
                future.cancel() or future.cancelled() or future.exception()

    def _set_hung(self, member: Member, is_hung: bool) -> None:
        if is_hung != (member.state == "hung"):
            member.state = "hung" if is_hung else "ready"
            log.warning("%s is %s  pid %d", member, member.state, member.pid)
        if member.line:
            member.line.is_hung = is_hung

    async def _kill(self, member: Member) -> None:
        """End the process of an actor that hears nothing; Ray by itself would leave it as it is."""
        there = NodeAffinitySchedulingStrategy(member.about["node"], soft=False)
        if member.about["node"] == ray.get_runtime_context().get_node_id():
            return kill_process(member.pid)
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone as well
            await call(ray.remote(num_cpus=0, scheduling_strategy=there)(kill_process).remote(member.pid))

    def _lose(self, member: Member) -> None:
        member.state, member.about = "starting", {}
        for worker in [member] if member.kind == "worker" else self._workers:  # which have to connect anew
            if worker.line:
                worker.line.writer.close()
        member.line = None

    def _fail(self, error: Error) -> None:
        """Answer everything with this, until the parameter server is well."""
        if str(error) != str(self._failure):
            log.error("%s", error)
        self._batcher.close(error)
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _end_actors(self) -> None:
        """Keep what is to be kept, and end the actors that are this cluster's alone."""
        with contextlib.suppress(Exception):
            if self._described.is_set():
                ray.get(self._servers[0].actor.keep.remote(), timeout=10)
        for member in self._workers + self._servers:
            if member.actor is not None:
                ray.kill(member.actor)
        self._remove_folder()


def from_loop(items: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """Asynchronous items, in a thread that is not the loop's."""
    end = object()

    async def step():
        return await anext(items, end)

    while (item := asyncio.run_coroutine_threadsafe(step(), loop).result()) is not end:
        yield item
