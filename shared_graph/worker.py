"""The actor that answers batches: it imports the same graphs against the parameter server, and runs them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from shared_graph.batch_runner import BatchRunner
from shared_graph.errors import Error, Unavailable, as_own_errors, first_sentence
from shared_graph.graph import Graph
from shared_graph.handles import WATCH_S, find_actor, node_address, this_process
from shared_graph.memory import keep_memory_low
from shared_graph.models import ModelVersion, Snapshot, not_found
from shared_graph.options import MAX_BATCHES_IN_FLIGHT, REMOTE_CALLS_AT_ONCE, Options
from shared_graph.replica import Replica
from shared_graph.slots import Gate
from shared_graph.tensorflow_runtime import import_tensorflow
from shared_graph.threads import OwnThread, in_own_thread, keep_task
from shared_graph.wire import Batch, WorkerInfo, read_frame, to_frame

CATCH_UP_S = 10.0  # a worker that starts waits so long for its versions; what takes longer it has later
OVERDUE_S = 5.0  # after its deadline a run is cancelled
STUCK_S = 15.0  # and this process is ended if the run still has not
TOLD_S = 3.0  # how long health still tells of it when it has ended


class Lane:
    """Threads in which batches run, and a gate before them."""

    def __init__(self, count: int):
        self.gate, self.executor = Gate(count), concurrent.futures.ThreadPoolExecutor(count)


class Worker:
    """A Ray actor that answers batches, for who comes to its address and shows the authkey."""

    def __init__(self, index: int, options: Options, namespace: str):
        self.index, self.options, self.namespace, self.process = index, options, namespace, this_process()
        self.incarnation, self.authkey, self.address = secrets.token_hex(8), secrets.token_bytes(32), None
        self.replica: Replica | None = None  # of the parameter server, while that is there
        self.compute = self.remote = None  # the lanes, of what computes, and of what may call other servers
        self.connections: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task] = set()
        self.starting = asyncio.Lock()
        self.overdue: dict[asyncio.Future, str] = {}  # runs that do not end, and what is told of them
        self.tensorflow = OwnThread().submit(import_tensorflow)  # while the parameter server does the same

    # -- called by front ends and by the parameter server --------------------------------------------------------------

    async def start(self) -> WorkerInfo:
        """Have what the parameter server has, as far as that can be had soon. Idempotent: for the first start, and for
        a parameter server that came back."""
        async with self.starting:
            with as_own_errors(f"Worker {self.index} cannot start"):
                if self.tensorflow.done() and self.tensorflow.exception():  # there may be memory for it by now
                    self.tensorflow = OwnThread().submit(import_tensorflow)
                await asyncio.wrap_future(self.tensorflow)
                if self.address is None:
                    self.loop = asyncio.get_running_loop()
                    self.listener = await asyncio.start_server(self._serve, node_address(), limit=2**24)
                    self.address = self.listener.sockets[0].getsockname()[:2]
                    keep_task(self.tasks, keep_memory_low())
                server = await find_actor("parameter server 0", self.namespace)
                info = await server.call("start")
                replica = self.replica
                if replica is None or replica.has_left or replica.server_incarnation != info.incarnation:
                    self._leave()
                    self.compute, self.remote = Lane(MAX_BATCHES_IN_FLIGHT), Lane(REMOTE_CALLS_AT_ONCE)
                    self.replica = Replica(self.index, self.incarnation, self.options, server, info, self._hang_up)
                    try:
                        await self.replica.catch_up(info.snapshot, CATCH_UP_S)
                    except BaseException:
                        self._leave()
                        raise
                return WorkerInfo(self.process, self.address, self.authkey)

    async def sync(self, server_incarnation: str, snapshot: Snapshot) -> None:
        """What the parameter server has now."""
        if self.replica and self.replica.server_incarnation == server_incarnation:
            self.replica.apply(snapshot)

    async def death_watch(self) -> None:
        """A call whose failure tells at once that this process is gone; to be repeated when it returns."""
        await asyncio.sleep(WATCH_S)

    async def ping(self, snapshot_id: int) -> tuple[str | None, None]:
        """Is the event loop alive, and what is wrong, if anything is?"""
        return next(iter(self.overdue.values()), None), None

    def _leave(self) -> None:
        """Answer nobody until the next ``start``."""
        if self.replica:
            self.replica.leave()
            self.replica = None

    def _hang_up(self) -> None:
        for writer in self.connections:
            writer.close()

    # -- batches -------------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer batches from one front end. Until it has shown the key, nothing that comes is looked at."""
        with contextlib.suppress(OSError, EOFError, TimeoutError), contextlib.closing(writer):
            shown = await asyncio.wait_for(reader.readexactly(len(self.authkey)), 10)
            if not secrets.compare_digest(shown, self.authkey):
                return
            self.connections.add(writer)
            while True:
                keep_task(self.tasks, self._answer(Batch._make(await read_frame(reader)), writer))
        self.connections.discard(writer)

    async def _answer(self, batch: Batch, writer: asyncio.StreamWriter) -> None:
        replica = self.replica

        def reply(answers: dict[int, Any]) -> None:
            self.loop.call_soon_threadsafe(writer.writelines, to_frame((batch.batch_id, answers)))

        try:
            await self._run(replica, batch, reply)
        except ConnectionError:
            if replica is self.replica:
                self._leave()
            writer.close()  # which tells who waits
        except Exception as error:  # whatever it is: nobody is to wait for ever
            message = f"Worker {self.index} failed: {type(error).__name__}: {first_sentence(error)}"
            failure = error if isinstance(error, Error) else Error(message)
            reply(dict.fromkeys(range(len(batch.requests)), failure.with_traceback(None)))

    async def _run(self, replica: Replica | None, batch: Batch, reply: Callable[[dict[int, Any]], None]) -> None:
        arrived, kind = time.monotonic(), (*batch.key, batch.signature_hint)
        deadline = arrived + max(left_s for _, _, left_s, _ in batch.requests)
        while True:
            version = await self._find(replica, batch, deadline)
            lane = self.remote if version.loaded.runs_python else self.compute
            await lane.gate.enter(kind)
            if replica.snapshot.find(*batch.key) == version and (graph := replica.graphs.get(version.key)):
                break  # it still is what was found before the wait
            lane.gate.leave(kind)
        try:
            about = replica.observe, version.key, replica.weights[version.key]  # which a mirror may get anew meanwhile
            observe = functools.partial(self.loop.call_soon_threadsafe, *about)  # called in the thread of the run
            runner = BatchRunner(graph, version.loaded, self.options.exact, reply, observe, replica.shared_runs)
            run = self.loop.run_in_executor(lane.executor, runner.answer, batch.requests, arrived)
            runs = replica.runs[version.key.name]
            runs.add(run)
            run.add_done_callback(runs.discard)
            late_s = max(0, deadline - time.monotonic()) + OVERDUE_S
            end = functools.partial(self._end_overdue, replica, version, graph, run)
            timer = self.loop.call_later(late_s, lambda: keep_task(self.tasks, end()))
            run.add_done_callback(lambda _: timer.cancel())
            await run
        finally:
            lane.gate.leave(kind)

    async def _find(self, replica: Replica | None, batch: Batch, deadline: float) -> ModelVersion:
        """What is asked for; waits for a pointer that moves, and for a version that is just brought up here."""
        name, choice = batch.key
        while True:
            if replica is None or replica.has_left:
                raise ConnectionError
            version = replica.snapshot.find(name, choice)
            if version and version.key in replica.graphs:
                return version
            if version and version.key in replica.failed:
                why = replica.failed[version.key]
                raise Unavailable(f"Worker {self.index} could not load model {version.key}: {why}")
            if version is None and not replica.snapshot.is_moving(name, choice):
                raise not_found(name, choice)
            try:
                await asyncio.wait_for(replica.changed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise Unavailable(f"Model {name} was not ready in worker {self.index} in time") from None

    async def _end_overdue(self, replica: Replica, version: ModelVersion, graph: Graph, run: asyncio.Future) -> None:
        """End a run that has not ended at its deadline; if that cannot be done, this process with it."""
        is_waiting = lambda: replica.has_left and not graph.is_mirror  # noqa: E731  (for a server that is gone)
        if is_waiting():
            return
        self.overdue[run] = f"a run of model {version.key} has not ended at its deadline"
        if not graph.is_mirror:  # whose variables would be gone with its session
            cancelling = in_own_thread(graph.cancel_runs)
            asyncio.gather(cancelling, return_exceptions=True)  # it may wait for the very run
        done, _ = await asyncio.wait([run], timeout=STUCK_S)
        if not done and not is_waiting():
            os._exit(1)
        self.loop.call_later(TOLD_S, self.overdue.pop, run)
