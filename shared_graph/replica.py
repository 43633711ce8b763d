"""What a worker has of what the parameter server serves: brings versions up, follows snapshots, and reports."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from shared_graph.bundles import fetched_bundle
from shared_graph.errors import ActorUnavailable, Error, ModelError, first_sentence
from shared_graph.graph import Graph, build_graph, build_in_own_thread, is_mirrored
from shared_graph.handles import Actor
from shared_graph.load_marks import LoadMarks
from shared_graph.memory import free_garbage
from shared_graph.merging import warm_up
from shared_graph.model_source import ADDER_SOURCE
from shared_graph.models import LoadedVersion, ModelKey, ServerInfo, Snapshot, WorkerReport
from shared_graph.options import LOAD_PATIENCE_S, LOADED_AT_ONCE, Options
from shared_graph.threads import Turns, in_own_thread, keep_task, watch_death

BUILD_LIMIT_S = 90.0  # in which a version is built and connected, else it has failed
WARM_UP_LIMIT_S = 30.0  # in which its first runs are done, else it is used without them
RETRY_S = (1.0, 30.0)  # the first and the longest pause before a version that has failed here is tried again


class Replica:
    """Of one life of the parameter server, which is called through ``server``. What begins to run after a snapshot came
    follows it, and what ran already is waited for; versions are brought up as soon as they can be. ``left`` is called
    when the parameter server is gone: then nothing is answered from here any more."""

    def __init__(self, index: int, incarnation: str, options: Options, server: Actor, info: ServerInfo, left: Callable):
        self.index, self.options, self.server = index, options, server
        self.server_incarnation, self.addresses = info.incarnation, info.addresses
        self._has_gpus = bool(info.process.gpus)
        self.snapshot = Snapshot()
        self.graphs: dict[ModelKey, Graph] = {}  # that can be run
        self.weights: dict[ModelKey, str] = {}  # of each graph, the id of those that it has
        self.failed: dict[ModelKey, str] = {}
        self.runs: dict[str, set[asyncio.Future]] = collections.defaultdict(set)  # by model
        self.shared_runs = collections.Counter[tuple[str, str]]()  # see BatchRunner
        self.has_left = False
        self._incarnation, self._left, self._marks = incarnation, left, LoadMarks(info.folder, f"worker-{index}")
        self._settled: dict[str, int] = {}
        self._turns: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)  # one snapshot after another
        self._bringing_up: set[ModelKey] = set()
        self._builds = Turns(LOADED_AT_ONCE, LOAD_PATIENCE_S)
        self.changed, self._unreported = asyncio.Event(), asyncio.Event()  # the first one is another for each change
        self._tasks: set[asyncio.Task] = set()
        keep_task(self._tasks, watch_death(server, self.leave))

    def leave(self) -> None:
        """The parameter server is gone. What still runs fails, since it waits for that."""
        if not self.has_left:
            self.has_left = True
            for graph in self.graphs.values():
                graph.disconnect(is_lost=True)
            for task in self._tasks - {asyncio.current_task()}:
                task.cancel()
            self._notify()
            self._left()

    async def catch_up(self, snapshot: Snapshot, patience_s: float) -> None:
        """Have what is in it and in later ones, as far as that can be had within ``patience_s``; report from then on.

        Raises ActorUnavailable when the parameter server is gone."""
        self.apply(snapshot)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                seen = None
                while seen is not self.snapshot and not self.has_left:
                    if self._bringing_up - self.failed.keys():
                        await self.changed.wait()
                    else:
                        seen = self.snapshot
                        await self._report()
        if self.has_left:
            raise ActorUnavailable("The parameter server was lost.")
        await self._report()  # also where the limit has cut one short, with the snapshot that it brought
        keep_task(self._tasks, self._keep_reporting())

    def apply(self, snapshot: Snapshot) -> None:
        """Begin to have what is in it."""
        if snapshot.snapshot_id <= self.snapshot.snapshot_id or self.has_left:
            return
        before, self.snapshot = self.snapshot, snapshot
        ids = {loaded.weights_id for loaded in snapshot.loaded.values()}
        for known in [known for known in list(self.shared_runs) if known[0] not in ids]:
            self.shared_runs.pop(known, None)
        for key, loaded in snapshot.loaded.items():
            if key in self.graphs and self.graphs[key].fingerprint != loaded.fingerprint:
                self.graphs.pop(key).disconnect()  # of other files: it was replaced before anybody had heard of it
                self.weights.pop(key, None)
            if key in self.graphs and not is_mirrored(self.options, snapshot.versions[key].source):
                self.weights[key] = loaded.weights_id
            if key not in self._bringing_up and self.weights.get(key) != loaded.weights_id:
                self._bringing_up.add(key)
                keep_task(self._tasks, self._bring_up(key))
        for name in {key.name for key in [*before.versions, *snapshot.versions, *self.graphs]}:
            keep_task(self._tasks, self._settle(name, snapshot, rules_of(name, before) != rules_of(name, snapshot)))
        self.failed = {key: why for key, why in self.failed.items() if self._wanted(key)}
        self._notify()

    async def _settle(self, name: str, snapshot: Snapshot, is_other: bool) -> None:
        """Wait for what runs by the rules of before; then drop what is no longer served."""
        async with self._turns[name]:
            if is_other and (runs := list(self.runs[name])):
                await asyncio.wait(runs)
            of_model = [key for key in self.graphs if key.name == name]
            dropped = [key for key in of_model if key not in snapshot.loaded and not self._wanted(key)]
            endings = [self.graphs.pop(key).disconnect() for key in dropped]
            for key in dropped:
                self.weights.pop(key, None)
            self._settled[name] = snapshot.snapshot_id
            self._notify()
        if dropped:
            await in_own_thread(free_garbage, endings)

    async def _bring_up(self, key: ModelKey) -> None:
        """Have a version that the parameter server has loaded, or say why not. Other versions do not wait for it."""
        pause_s, longest_s = RETRY_S
        while (loaded := self._wanted(key)) and self.weights.get(key) != loaded.weights_id:
            try:
                is_there = key in self.graphs  # then it only gets other weights
                turn = contextlib.nullcontext() if is_there else self._builds.turn()
                async with turn, asyncio.timeout(BUILD_LIMIT_S):
                    if loaded := self._wanted(key):
                        await self._build(key, loaded)
                self.failed.pop(key, None)
            except Exception as error:  # a version that others have may be in use, and so is tried again
                self.failed[key] = "it took too long" if isinstance(error, TimeoutError) else first_sentence(error)
            self._notify()
            if key in self.failed:  # out here, where its traceback does not hold what was made
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)
        if loaded is None:
            self.failed.pop(key, None)
        self._bringing_up.discard(key)
        self._notify()

    def _wanted(self, key: ModelKey) -> LoadedVersion | None:
        """What the parameter server has loaded of it at the moment."""
        return self.snapshot.loaded.get(key)

    async def _build(self, key: ModelKey, loaded: LoadedVersion) -> None:
        """Build, connect and warm up, or give a mirror other weights: those that are wanted by then."""
        source = self.snapshot.versions[key].source
        is_mirror = is_mirrored(self.options, source)
        weights = await self.server.call("get_weights", *key) if is_mirror else {}
        if key in self.graphs:
            await in_own_thread(self.graphs[key].variables.set_weights, weights)
            self.weights[key] = loaded.weights_id
            return
        async with contextlib.AsyncExitStack() as stack:
            read = functools.partial(self.server.call, "read_bundle", key)
            folder = await stack.enter_async_context(fetched_bundle(read))
            is_whole = is_mirror or self._has_gpus  # with which TensorFlow places a variable by all that uses it
            build = functools.partial(build_graph, self.options, source, is_mirror, folder=folder, is_whole=is_whole)
            if source != ADDER_SOURCE:
                await stack.enter_async_context(self._marks.loading(key, [source.folder and loaded.fingerprint]))
            graph = await build_in_own_thread(build)
            if graph.fingerprint != loaded.fingerprint:
                raise ModelError("it was loaded anew meanwhile")
            await graph.own_thread.run(graph.connect, [] if is_mirror else self.addresses, self.options)
            if is_mirror:
                await graph.own_thread.run(graph.restore, weights)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WARM_UP_LIMIT_S):
                    await graph.own_thread.run(warm_up, graph)
        while (now := self._wanted(key)) and now.fingerprint == loaded.fingerprint:
            if not is_mirror or now.weights_id == loaded.weights_id:
                self.graphs[key], self.weights[key] = graph, now.weights_id
                return
            loaded, weights = now, await self.server.call("get_weights", *key)
            await graph.own_thread.run(graph.variables.set_weights, weights)
        graph.disconnect()  # meanwhile it has been given up, and perhaps loaded anew

    # -- reports -------------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        self._unreported.set()
        self.changed.set()
        self.changed = asyncio.Event()

    async def _report(self) -> None:
        self._unreported.clear()
        state = dict(self._settled), dict(self.weights), dict(self.failed)
        report = WorkerReport(self.index, self._incarnation, *state)
        self.apply(await self.server.call("report", self.server_incarnation, report))

    async def _keep_reporting(self) -> None:
        """Whenever something has changed."""
        while True:  # until leave() cancels it
            await self._unreported.wait()
            try:
                await self._report()
            except Error:  # not now
                self._unreported.set()
                await asyncio.sleep(RETRY_S[0])

    def observe(self, *observation: Any) -> None:
        """Tell what a run showed, as ``ParameterServer.observe`` has it."""
        keep_task(self._tasks, self._observe(*observation))

    async def _observe(self, *observation: Any) -> None:
        with contextlib.suppress(ActorUnavailable):
            await self.server.call("observe", *observation)


def rules_of(name: str, snapshot: Snapshot) -> tuple[dict, dict]:
    """What of a snapshot says how requests for a model are answered."""
    loaded = {key: (known.batchable, known.undecided) for key, known in snapshot.loaded.items() if key.name == name}
    return loaded, {pointer: version for pointer, version in snapshot.pointers.items() if pointer[0] == name}
