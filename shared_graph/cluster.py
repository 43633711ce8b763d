"""What scripts, notebooks and front ends hold in their hands: the calls, and what serves them in the home loop."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import copy
import dataclasses
import functools
import logging
import operator
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from shared_graph.actors import create_actor
from shared_graph.adder import require_finite
from shared_graph.batcher import connect_worker
from shared_graph.errors import ActorUnavailable, Error, InvalidRequest, ModelError, Unavailable, WorkerLost
from shared_graph.handles import kill_process
from shared_graph.home_loop import HomeLoop
from shared_graph.logs import counted, show_log
from shared_graph.mapping import map_asynchronously, map_batches
from shared_graph.model_source import ADDER
from shared_graph.models import Arrays, VersionChoice, as_arrays, as_feed
from shared_graph.options import Options, check_start
from shared_graph.ray_runtime import ray_runtime, watch_ray
from shared_graph.status import CLOSED, Status
from shared_graph.supervisor import Supervisor
from shared_graph.threads import in_own_thread

log = logging.getLogger(__name__)


class Cluster:
    """A parameter server and its workers, with a blocking and an awaitable form of each call.

        with Cluster(options) as cluster:              # scripts, threads, Flask, notebooks
            cluster.add(3.0)
            cluster.predict({"x": x}, model="m")

        async with Cluster(options) as cluster:        # inside any running event loop
            await cluster.add_async(3.0)

    Calls may come from several threads and event loops at once; all work is done in the *home loop*: one that
    ``start_in_background`` is given, else one in a thread of the cluster's own. Before the start and after the end they
    raise Unavailable.
    """

    def __init__(self, options: Options | None = None, **changes: Any):
        self.options = dataclasses.replace(options or Options(), **changes)
        self.status = Status(self.options)
        why_over = lambda: Unavailable(str(self.status.failure or CLOSED))  # noqa: E731
        around = functools.partial(ray_runtime, self.options)
        fail = functools.partial(self.status.fail, is_over=True)
        self._home = HomeLoop(self._serve, around, fail, why_over)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start_in_background(
        self, home: asyncio.AbstractEventLoop | None = None, on_failure: Callable[[Error], object] = lambda error: None
    ) -> Cluster:
        """Start everything, in the running loop ``home`` if given; ``health`` tells how far it is. ``on_failure`` is
        called, in some thread, when nothing can be served any more. Raises OptionError for a model that cannot be."""
        check_start(self.options)
        show_log()
        self.status.on_over = on_failure
        if self._home.start(home):
            atexit.register(self.close)
            log.info("starting: %s", counted(self.options.workers, "worker"))
        return self

    def start(self, workers: int = 1) -> Cluster:
        """Start everything; returns when all models are loaded and so many workers, of those that there are, ready.

        Raises OptionError, ModelError or Unavailable when that cannot be.
        """
        status = self.status
        try:
            self.start_in_background()
            with status.changed:
                status.changed.wait_for(lambda: status.failure or status.is_ready(min(workers, self.options.workers)))
            if failure := status.failure or next(map(ModelError, status.model_errors()), None):
                raise failure
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Answer what is left and end every process that was started. Safe to call twice."""
        self._home.check_elsewhere()
        self.status.failure = self.status.failure or Unavailable(CLOSED)
        self.status.notify()
        self._home.stop()
        atexit.unregister(self.close)  # not before: it may be interrupted anywhere

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Cluster:
        try:
            return await asyncio.to_thread(self.start)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.to_thread(self.close))
            raise

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.shield(asyncio.to_thread(self.close))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def add(self, value: float, worker: int | None = None) -> float:
        """Add a finite number to the shared sum; returns the sum right after this very add, as float64.

        ``worker`` is the number of the worker that is to do it, by default the next one. Raises InvalidRequest,
        Unavailable, WorkerLost or DeadlineExceeded.
        """
        return self.request(ADDER, "add", require_finite(value), worker=worker)

    async def add_async(self, value: float, worker: int | None = None) -> float:
        """As ``add``, awaitable."""
        return await self.request_async(ADDER, "add", require_finite(value), worker=worker)

    def predict(
        self, inputs: Any, model: str, signature: str = "serving_default", version: VersionChoice = None
    ) -> Arrays:
        """Run a signature of a served model.

        ``inputs`` are arrays by input name (or just the array, of a sole input), of a dtype that is cast to the input's
        without loss of kind (ints to floats and to ints that have their values, not floats to ints; str for strings).
        The result is arrays by output name; they may be read-only: copy what you want to write to. Raises
        InvalidRequest, ModelError, Unavailable, WorkerLost or DeadlineExceeded.
        """
        return self.request(model, "arrays", (str(signature), as_feed(inputs)), version)

    async def predict_async(
        self, inputs: Any, model: str, signature: str = "serving_default", version: VersionChoice = None
    ) -> Arrays:
        """As ``predict``, awaitable; ``inputs`` must not change before it returns."""
        return await self.request_async(model, "arrays", (str(signature), as_feed(inputs)), version)

    def get_weights(self, model: str) -> Arrays:
        """The variables of a served model by name. Arrays may be read-only: copy what you want to write to."""
        return self._home.result(self._call_server("get_weights", model), self.options.timeout_s + 5)

    async def get_weights_async(self, model: str) -> Arrays:
        """As ``get_weights``, awaitable."""
        return await self._home.awaited(self._call_server("get_weights", model))

    def set_weights(self, model: str, weights: Arrays) -> None:
        """Set some or all variables of a served model; a wrong name or shape is an InvalidRequest, and none is set.

        Once it returns, no later request is answered with the old ones, mirrors included.
        """
        self._home.result(self._call_server("set_weights", model, as_arrays(weights)), self.options.timeout_s + 5)

    async def set_weights_async(self, model: str, weights: Arrays) -> None:
        """As ``set_weights``, awaitable."""
        await self._home.awaited(self._call_server("set_weights", model, as_arrays(weights)))

    def reload(self, model: str) -> int:
        """Look now for new versions and labels of a model, which happens once a second; the version in use then.

        Raises InvalidRequest, Unavailable or WorkerLost.
        """
        return self._home.result(self._reload(model))

    async def reload_async(self, model: str) -> int:
        """As ``reload``, awaitable."""
        return await self._home.awaited(self._reload(model))

    def map(
        self,
        batches: Iterable[Any],
        model: str,
        signature: str = "serving_default",
        version: VersionChoice = None,
        ordered: bool = True,
    ) -> Iterator[Arrays]:
        """``predict`` for each batch of any iterable, however long and of whatever sizes, in order or as they finish.

        Keeps a bounded number of batches in flight; the iterable is pulled, in a thread of its own, as places get free.
        The deadline of a batch counts from when it is sent. An error says which batch it is about, counted from 0.
        Leaving the loop early stops the work.
        """

        def submit(batch: Any) -> concurrent.futures.Future:
            feed = copy.deepcopy(as_feed(batch))  # who makes the batches may use one buffer for all
            return self._home.run(self._request(model, "arrays", (str(signature), feed), version, is_patient=True))

        return map_batches(batches, submit, self.options, ordered)

    def map_async(self, batches: Iterable[Any] | AsyncIterable[Any], *arguments, **options) -> AsyncIterator[Any]:
        """As ``map``, for ``async for``; ``batches`` may be asynchronous too."""
        return map_asynchronously(lambda batches: self.map(batches, *arguments, **options), batches)

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: status, parameter servers, workers, models; asks nobody, waits for nothing."""
        return self.status.health()

    # -- from any thread or loop ----------------------------------------------------------------------

    def request(
        self, model: str, verb: str, body: Any, version: VersionChoice = None, worker: int | None = None
    ) -> Any:
        """The answer to one request; ``rest_api.decode`` says what ``body`` is for each verb. Raises Error."""
        return self._home.result(self._request(model, verb, body, version, worker), self.options.timeout_s + 5)

    async def request_async(
        self, model: str, verb: str, body: Any, version: VersionChoice = None, worker: int | None = None
    ) -> Any:
        """As ``request``, awaitable."""
        return await self._home.awaited(self._request(model, verb, body, version, worker))

    async def _request(
        self,
        model: str,
        verb: str,
        body: Any,
        choice: VersionChoice = None,
        worker: int | None = None,
        is_patient: bool = False,
    ) -> Any:
        if worker is not None and worker not in range(self.options.workers):
            workers = counted(self.options.workers, "worker")
            raise InvalidRequest(f"There is no worker {worker!r:.100}: there are {workers}, counted from 0")
        choice = operator.index(choice) if hasattr(choice, "__index__") else choice  # such as numpy's
        version = self.status.get_model(model, choice)
        return await self.status.batcher.submit(model, choice, version, verb, body, worker, is_patient)

    async def _call_server(self, method: str, model: str, *arguments: Any) -> Any:
        """Call the primary parameter server."""
        if method != "reload" or model not in [source.name for source in self.options.model]:  # reload may load it
            self.status.get_model(model)
        primary = self.status.servers[0]
        if primary.state == "starting":
            raise Unavailable("The parameter server is being started; try again later.")
        try:
            return await primary.handle.call(method, model, *arguments)
        except ActorUnavailable:
            raise WorkerLost("The parameter server was lost; a change may or may not have been applied.") from None

    async def _reload(self, model: str) -> int:
        self.status.apply_snapshot(await self._call_server("reload", model))
        return self.status.get_model(model).key.version

    # -- in the home loop ----------------------------------------------------------------------------------------------

    async def _serve(self, closing: asyncio.Event) -> None:
        """Until ``close``."""
        loop = asyncio.get_running_loop()
        maker = concurrent.futures.ThreadPoolExecutor(1)
        namespace = "ray_tensorflow" if self.options.address else f"ray_tensorflow-{secrets.token_hex(8)}"
        create = functools.partial(loop.run_in_executor, maker, create_actor, self.options, namespace)
        connect = functools.partial(connect_worker, self.status.batcher)
        supervisor = Supervisor(self.options, self.status, create, kill_process, connect)
        supervising = asyncio.create_task(supervisor.run())
        ray_ended = watch_ray()
        closed = asyncio.create_task(closing.wait())
        await asyncio.wait([closed, ray_ended], return_when=asyncio.FIRST_COMPLETED)
        if ray_ended.done() and not closed.done():
            why = f"Ray's {ray_ended.result()} has ended, and all actors with it: start the program anew."
            self.status.fail(Unavailable(why), is_over=True)
            await closed
        self.status.batcher.close(Unavailable(CLOSED))
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
        await supervisor.disconnect()
        # An actor made later would start another Ray. In a thread of its own: executors refuse work as a program ends.
        await in_own_thread(functools.partial(maker.shutdown, cancel_futures=True))
        if not self.options.address and not ray_ended.done():
            await supervisor.end_actors()
        ray_ended.cancel()
