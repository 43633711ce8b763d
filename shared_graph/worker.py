"""The actor that answers batches: each builds the same graphs against the parameter server."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import ray

from shared_graph.batch_runner import answer_requests
from shared_graph.errors import Error, WorkerLost, first_sentence
from shared_graph.graph import Graph, build_functions, build_graph, is_mirrored
from shared_graph.merging import warm_up
from shared_graph.models import Key, Model, Version, not_found
from shared_graph.options import PLACES, Options
from shared_graph.ray_runtime import about_this_actor, call, find_actor
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.wire import read_frame, to_frame

log = logging.getLogger(__name__)


class Worker:
    """A Ray actor that answers requests, for Ray calls and for who comes to its door.

    A request is (verb, body, seconds that are left for it, has it been sent to another worker before), see ``decode``.
    """

    def __init__(self, index: int, options: Options, namespace: str):
        self.index, self.options, self.namespace = index, options, namespace
        self.have: tuple | None = None  # of the parameter server: its life, and the edition of what it has
        self.graphs: dict[Key, Graph] = {}  # by name and version
        self.models: dict[Key, Model] = {}  # what is answered
        self.weights: dict[Key, str] = {}  # which ones each mirror has
        self.moved = asyncio.Event()  # when what is MOVING among them no longer is
        self.runs: dict[Key, set[asyncio.Future]] = collections.defaultdict(set)
        self.starting = asyncio.Lock()
        self.door, self.key = None, secrets.token_bytes(32)
        self.lines: set[asyncio.StreamWriter] = set()
        self.trips: set[asyncio.Task] = set()
        importer = concurrent.futures.ThreadPoolExecutor(1)  # imports in two threads may block each other
        self.tensorflow = importer.submit(import_tensorflow)  # now, while the parameter server does the same

    async def start(self) -> dict[str, Any]:
        """Have what the parameter server has now; about this life of the actor, its door and the key to it.

        Idempotent, for the first start, a parameter server that came back, new versions, and new weights in a mirror.
        """
        async with self.starting:
            await asyncio.wrap_future(self.tensorflow)
            if self.door is None:
                self.loop = asyncio.get_running_loop()
                host = ray.util.get_node_ip_address()
                self.listener = await asyncio.start_server(self._serve_line, host, limit=2**24)
                self.door = self.listener.sockets[0].getsockname()[:2]
            try:
                while True:
                    server = await find_actor("parameter server 0", self.namespace)
                    there = await call(server.start.remote())
                    if self.have == (there["life"], there["edition"]):
                        about = {"door": self.door, "key": self.key, "graphs": list(self.graphs)}
                        return about_this_actor() | about
                    is_new_life = self.have is None or self.have[0] != there["life"]
                    if is_new_life:
                        self.gone = asyncio.ensure_future(call(server.stay.remote()))  # one call a life: it never ends
                        self.runs.clear()  # what still runs fails, since it waits for one that is gone
                    await asyncio.to_thread(self._connect, there, is_new_life)
                    for key, graph in self.graphs.items():
                        model = there["models"].get(key)
                        if model and model.weights not in (None, self.weights.get(key)):
                            weights = await call(server.get_weights.remote(*key))
                            await asyncio.to_thread(graph.variables.set_weights, weights)
                            self.weights[key] = model.weights
                    await self._move(there["models"])
                    self.have = there["life"], there["edition"]
            except Exception:  # whoever it answers is to look for another one
                self._leave()
                raise

    async def stay(self) -> None:
        """Never returns: a call whose failure tells at once that this process is gone."""
        await asyncio.Event().wait()

    async def ping(self, edition: int) -> tuple[None, None]:
        """Is the event loop alive?"""
        return None, None

    async def answer(self, model: str, requests: list[tuple], version: Version = None) -> list[Any]:
        """One answer for each request, in order: what its verb promises, or an Error. Raises WorkerLost."""
        answers = {}
        await self._run((model, version), requests, answers.update)
        return [answers[index] for index in range(len(requests))]

    async def _serve_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer batches from one front end. Until it has shown the key, nothing that comes is looked at."""
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            if not secrets.compare_digest(await asyncio.wait_for(reader.readexactly(len(self.key)), 10), self.key):
                return
            self.lines.add(writer)
            while True:
                number, key, requests = await read_frame(reader)
                trip = asyncio.create_task(self._run(key, requests, functools.partial(self._reply, writer, number)))
                self.trips.add(trip)
                trip.add_done_callback(self._end_trip)
        self.lines.discard(writer)

    def _reply(self, writer: asyncio.StreamWriter, number: int, answers: dict[int, Any]) -> None:
        self.loop.call_soon_threadsafe(writer.writelines, to_frame((number, answers)))

    def _end_trip(self, trip: asyncio.Task) -> None:
        self.trips.discard(trip)
        trip.exception()  # if there is one, the line is closed, which tells who waits

    async def _run(self, key: Key, requests: list[tuple], reply: Callable[[dict[int, Any]], Any]) -> None:
        have, arrived = self.have, time.monotonic()
        try:
            while (model := self.models.get(key)) and model.state == "MOVING":
                await self.moved.wait()
            if model is None or not model.metadata:
                raise not_found(*key)
            graph = self.graphs[key[0], model.version]
            executor = self.callers if graph.calls_out else self.runners
            run = self.loop.run_in_executor(executor, answer_requests, graph, requests, reply, arrived)
            self.runs[key].add(run)
            run.add_done_callback(self.runs[key].discard)
            await run
        except ConnectionError as error:
            if self.have is have:
                self._leave()
            raise WorkerLost(f"The parameter server of worker {self.index} was lost: {error}") from None
        except Exception as error:  # whatever it is: nobody is to wait for ever
            message = f"Worker {self.index} failed: {type(error).__name__}: {first_sentence(error)}"
            reply(dict.fromkeys(range(len(requests)), error if isinstance(error, Error) else Error(message)))

    def _leave(self) -> None:
        """Answer nobody until the next ``start``."""
        self.have = None
        for writer in self.lines:
            writer.close()

    def _connect(self, there: dict[str, Any], is_new_life: bool) -> None:
        """Have every version's graph, connected. What still waits for the parameter server's last life is left."""
        tf = import_tensorflow()
        self.graphs = self.graphs or build_functions(tf, self.options, mirrors=True)
        if is_new_life:
            self.runners = concurrent.futures.ThreadPoolExecutor(PLACES)
            self.callers = concurrent.futures.ThreadPoolExecutor(16)  # of models that call out, perhaps to each other
        for key, model in there["models"].items():
            is_mirror, graph = is_mirrored(self.options, model.source), self.graphs.get(key)
            is_connected = graph and graph.session and (is_mirror or not is_new_life)
            if key[1] != model.version or not model.metadata or is_connected:
                continue
            try:
                graph = graph or build_graph(tf, self.options, model.source, is_mirror)
            except Exception:
                log.exception("%s", model.source)  # the parameter server sees what is not in ``graphs``
                continue
            for signature in model.merged:
                graph.signatures[signature].merged = True
            if is_mirror:
                graph.connect(tf, [], self.options)
                graph.restore(variables=False)
            else:  # a plain client session straight on the parameter server: one of our own would be one more hop
                graph.connect(tf, there["addresses"], self.options, self.options.timeout_s + 1)
            warm_up(graph)
            self.graphs[key] = graph

    async def _move(self, models: dict[Key, Model]) -> None:
        """Answer with these, when all that still runs on what is others now is answered; who asks for that waits."""
        other = {
            key: model._replace(state="MOVING")
            for key, model in self.models.items()
            if key not in models
            or models[key].version != model.version
            or models[key].state == "MOVING"
            or not models[key].metadata
        }
        self.models = self.models | other
        while (runs := {run for key in other for run in self.runs[key]}) and not self.gone.done():
            await asyncio.wait({self.gone, *runs}, return_when=asyncio.FIRST_COMPLETED)
        if self.gone.done():
            raise WorkerLost(f"The parameter server of worker {self.index} was lost: {self.gone.exception()}")
        self.models, moved, self.moved = models, self.moved, asyncio.Event()
        moved.set()
        for key in [key for key in self.graphs if key not in models or not models[key].metadata]:
            self.graphs[key].disconnect()
            self.weights.pop(key, None)
            if self.graphs[key].source.folder:
                del self.graphs[key]
