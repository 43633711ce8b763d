"""Makes, watches and ends the actors: who lives. No Ray in it, and no TensorFlow: what it acts with is passed in.

Ray starts anew what has died. This tells actors to have what the parameter server has, whenever one of them was away,
and ends those that do not answer. Silence counts only while this loop itself was on time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from typing import Any

from shared_graph.checkpoints import temporary_folder
from shared_graph.connection import WorkerConnection
from shared_graph.errors import ActorUnavailable, Error, OptionError, Unavailable, first_sentence
from shared_graph.options import Options
from shared_graph.status import ActorStatus, Status
from shared_graph.threads import in_own_thread, watch_death
from shared_graph.wire import ProcessInfo, WorkerInfo

log = logging.getLogger(__name__)

PING_S = 0.5  # between two looks at an actor
SUSPECT_S = 1.5  # a worker that has not answered for so long gets no new work
PATIENCE_S = {"worker": 4.0, "parameter server": 30.0}  # an actor that has not answered for so long is ended
BUILDING_S = 20.0  # the same for a worker while a version is loaded: a large graph holds Python's lock for seconds
START_PATIENCE_S = 30.0  # the same while it starts
NO_PLACE = f"it has not begun to run for {START_PATIENCE_S:g} s: has Ray a node with a free CPU, or GPU, for it?"
DIES = f"it is lost again and again for {START_PATIENCE_S:g} s: are there memory and processes enough for it?"
ENDED = "The shared cluster has been ended, and its variables with it: start the program anew."
FIRST_WORKER_S = 30.0  # so long the other workers wait for the first one
LONGEST_PAUSE_S = 8.0  # between two attempts to start what cannot start: it would end if it heard nobody for 10 s


class Supervisor:
    """``create(kind, index, *arguments)`` makes a ``handles.Actor``, or finds it; ``kill`` ends a process;
    ``connect`` makes the connection to a worker that has said where it is."""

    def __init__(
        self,
        options: Options,
        status: Status,
        create: Callable[..., Awaitable[Any]],
        kill: Callable[[ProcessInfo, Any], Awaitable[None]],
        connect: Callable[[int, WorkerInfo], Awaitable[WorkerConnection]],
    ):
        self._options, self._status = options, status
        self._create, self._kill, self._connect = create, kill, connect
        self._run_id, self._primary = secrets.token_hex(8), status.servers[0]
        self._server_ready, self._worker_ready = asyncio.Event(), asyncio.Event()  # once

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for actor in self._status.servers + self._status.workers:
                tasks.create_task(self.supervise(actor))

    async def supervise(self, actor: ActorStatus) -> None:
        """Bring an actor up to date, and again whenever it, or the parameter server, was away."""
        if actor.kind == "worker" and (actor.index or self._options.address):  # else it starts with the server
            with contextlib.suppress(TimeoutError):  # one worker is to serve before the others start
                async with asyncio.timeout(FIRST_WORKER_S if actor.index else None):
                    await (self._worker_ready if actor.index else self._server_ready).wait()
        loop, pause_s, told, lost_since = asyncio.get_running_loop(), PING_S, None, None
        while not self._status.is_over:
            started = loop.time()
            try:
                await self._start(actor)
                log.info("%s ready  pid %d  %.1f s", actor, actor.process.pid, loop.time() - started)
                self._status.tell_when_ready()
                pause_s, told, lost_since = PING_S, None, None
                log.warning("%s lost  pid %d  %s", actor, actor.process.pid, await self.wait_until_lost(actor))
            except OptionError as error:
                return self._status.fail(error, is_over=True)
            except Exception as error:
                is_gone = isinstance(error, ActorUnavailable)
                if is_gone and error.is_final:  # a shared cluster that had ended, or what cannot be made at all
                    if actor is self._primary and self._server_ready.is_set() and not self._options.checkpoint_dir:
                        return self._status.fail(Unavailable(ENDED), is_over=True)
                    actor.handle = None
                why = first_sentence(error)
                if is_gone and not error.is_final:  # Ray is starting it anew
                    if lost_since is None or (actor is not self._primary and self._primary.state != "ready"):
                        lost_since = loop.time()
                    why = DIES if loop.time() > lost_since + START_PATIENCE_S else None
                else:
                    pause_s, lost_since = min(2 * pause_s, LONGEST_PAUSE_S), None
                if why and why != told:
                    log.warning("%s could not start: %s", actor, why)
                told = why
                if isinstance(error, Error) and not is_gone and actor is self._primary:
                    self._status.fail(error, is_over=not self._server_ready.is_set())
                    if self._status.is_over:
                        return
            self.mark_lost(actor)
            actor.trouble = told
            await asyncio.sleep(pause_s)

    async def _start(self, actor: ActorStatus) -> None:
        """Make it if there is none, call ``start``, and have what follows from it."""
        if actor.handle is None:
            if actor.kind == "worker" and self._options.address and self._primary.state == "starting":
                raise ActorUnavailable("There is no parameter server, which would end it.")
            arguments = [] if actor.kind == "worker" else [self._run_id]
            actor.handle = await self._create(actor.kind, actor.index, *arguments)
        info = await self._call_start(actor, *([self._options.shared] if actor is self._primary else []))
        if actor is self._primary:
            self._status.apply_snapshot(info.snapshot)
            self._status.recover()
            self._server_ready.set()
        elif actor.kind == "worker":
            await self._server_ready.wait()
            actor.connection = await self._connect(actor.index, info)
            self._worker_ready.set()
            self._status.worker_since = self._status.worker_since or time.monotonic()
        actor.restarts += actor.process is not None and actor.process.pid != info.process.pid
        actor.process, actor.trouble, actor.state = info.process, None, "ready"  # others read it in this order
        self._status.notify()

    async def _call_start(self, actor: ActorStatus, *arguments: Any) -> Any:
        """A start may take long; but if the process that was there last is silent all the while, it is ended."""
        start, ping = asyncio.ensure_future(actor.handle.call("start", *arguments)), None
        try:
            while not start.done():
                if ping is None or ping.done():
                    forget(ping)
                    known = self._status.snapshot.snapshot_id if actor is self._primary else 0
                    ping = asyncio.ensure_future(actor.handle.call("ping", known))
                await asyncio.wait([start, ping], timeout=START_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                if not start.done() and not ping.done():
                    if actor.process:
                        await self._kill(actor.process, actor.handle)
                    else:
                        self._status.set_trouble(actor, NO_PLACE)
                await asyncio.wait([start], timeout=PING_S)
            return start.result()
        finally:
            forget(start, ping)

    async def wait_until_lost(self, actor: ActorStatus) -> str:
        """Why an actor was lost, as soon as it is. One that is silent is ended, whereupon Ray starts it anew."""
        death, ping, silent_s = asyncio.ensure_future(watch_death(actor.handle)), None, 0.0
        signs = [death, *([actor.connection.closed] if actor.connection else [])]
        loop = asyncio.get_running_loop()
        try:
            while not any(sign.done() for sign in signs):
                known = self._status.snapshot.snapshot_id if actor is self._primary else 0
                ping = ping or asyncio.ensure_future(actor.handle.call("ping", known))
                asked = loop.time()
                await asyncio.wait([*signs, ping], timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if ping.done() and not ping.exception():
                    trouble, snapshot = ping.result()
                    self._status.set_trouble(actor, trouble)
                    ping, silent_s = None, 0.0
                    self._set_hung(actor, False)
                    if snapshot:
                        self._status.apply_snapshot(snapshot)
                    await asyncio.wait(signs, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                elif ping.done():
                    await asyncio.wait(signs, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                    return "it cannot be called"
                elif loop.time() - asked < 1.5 * PING_S:  # else it is this very loop that comes too late
                    silent_s += PING_S
                    self._set_hung(actor, silent_s > SUSPECT_S)
                if silent_s > (patience_s := self._patience_s(actor)):
                    if actor.connection:
                        actor.connection.was_ended = True
                    await self._kill(actor.process, actor.handle)
                    return f"it did not answer for {patience_s:g} s"
            return "its process is gone" if death.done() else "its connection was closed"
        finally:
            forget(death, ping)

    def _patience_s(self, actor: ActorStatus) -> float:
        is_loading = any(version.state == "LOADING" for version in self._status.snapshot.versions.values())
        return max(PATIENCE_S[actor.kind], BUILDING_S if is_loading else 0)

    def _set_hung(self, actor: ActorStatus, is_hung: bool) -> None:
        if is_hung == (actor.state == "hung"):
            return
        actor.state = "hung" if is_hung else "ready"
        log.warning("%s is %s  pid %d", actor, actor.state, actor.process.pid)
        if actor.connection:
            actor.connection.is_hung = is_hung
            self._status.batcher.dispatch()  # others may have what would have been its work

    def mark_lost(self, actor: ActorStatus) -> None:
        actor.state, actor.trouble = "starting", None
        for worker in [actor] if actor.kind == "worker" else self._status.workers:  # which have to connect anew
            if worker.connection:
                worker.connection.close()
        actor.connection = None

    async def disconnect(self) -> None:
        """Close all connections to workers, and wait until that is done."""
        closed = [worker.connection.closed for worker in self._status.workers if worker.connection]
        self.mark_lost(self._primary)
        await asyncio.gather(*closed)

    async def end_actors(self) -> None:
        """Save what is to be saved, and end the actors that are this cluster's alone."""
        if self._server_ready.is_set() and self._primary.handle is not None:
            try:
                await asyncio.wait_for(self._primary.handle.call("finish"), 10)
            except (Error, TimeoutError) as error:
                if self._options.checkpoint_dir:  # else nothing is kept anyhow
                    why = str(error) or "it took too long"
                    log.error("what models have changed since it was kept last is lost: %s", why)
        for actor in self._status.workers + self._status.servers:
            if actor.handle is not None:
                with contextlib.suppress(Error):
                    await in_own_thread(actor.handle.end)
        # the parameter server may not have come to that, and be on this machine
        await in_own_thread(shutil.rmtree, temporary_folder(self._run_id), True)


def forget(*futures: asyncio.Future | None) -> None:
    """Cancel what is not done, and take what has been raised: asyncio would complain that nobody has."""
    for future in filter(None, futures):
        future.cancel() or future.cancelled() or future.exception()
