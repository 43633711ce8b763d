"""The actor that holds the variables, saves them, and in ``shared`` placement runs the models."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import shutil

from shared_graph.bundles import read_slice
from shared_graph.checkpoints import temporary_folder
from shared_graph.errors import ActorUnavailable, Error, ModelError, OptionError, as_own_errors, first_sentence
from shared_graph.handles import WATCH_S, Actor, find_actor, is_first_life, node_address, this_actor, this_process
from shared_graph.loader import Loader
from shared_graph.memory import keep_memory_low
from shared_graph.model_source import ADDER, ADDER_SOURCE, ModelSource
from shared_graph.models import Arrays, ModelKey, ServerInfo, Snapshot, WorkerReport
from shared_graph.options import Options
from shared_graph.tensorflow_runtime import import_tensorflow, server_config
from shared_graph.threads import in_own_thread, keep_task, watch_death
from shared_graph.version_manager import VersionManager

CHECKPOINT_EVERY_S = 10.0  # how old the saved variables of a model may be that changes them when it runs
LOOK_EVERY_S = 1.0  # between two looks at the models' folders
IDLE_SHUTDOWN_S = 10.0  # a shared cluster ends when no front end has been heard for so long


class ParameterServer:
    """A Ray actor with a TensorFlow server in it, and on that the state of the models, or its part of it.

    The first one, the primary, also loads the models, onto all of them, and saves their variables.
    """

    def __init__(self, index: int, options: Options, namespace: str, run_id: str):
        self.index, self.options, self.namespace, self.run_id = index, options, namespace, run_id
        self.folder = options.checkpoint_dir or temporary_folder(run_id)
        self.process = this_process()
        self.server, self.is_first_life = None, False
        self.incarnation: str | None = None  # the id of this life, once it has started
        self.workers: dict[int, tuple[str, Actor]] = {}  # the incarnation of each, and how to call it
        self.troubles: dict[str, str | None] = {}  # with saving variables, or with a model's folder
        self.idle_s = 0  # how long no front end has been heard
        self.starting, self.tasks = asyncio.Lock(), set()
        self.loader = Loader(options)
        sources, loader = [ADDER_SOURCE, *options.model], self.loader
        look = functools.partial(in_own_thread, ModelSource.look)
        self.manager = VersionManager(sources, look, loader.load, loader.unload, self._publish)
        if options.address:  # from here on: who has made it may be gone before it calls
            keep_task(self.tasks, self._end_when_idle())

    # -- called by front ends ------------------------------------------------------------------------------------------

    async def start(self, wanted: dict[str, str] | None = None) -> ServerInfo:
        """Boot; the primary then loads the adder, and begins with the models. Idempotent.

        Raises ModelError or Unavailable, and OptionError to a front end that ``wanted`` another cluster than this one,
        which it would share.
        """
        ours = self.options.shared
        differs = [
            f"{name} {it} (it runs with {ours.get(name)})"
            for name, it in (wanted or ours).items()
            if it != ours.get(name)
        ]
        if differs:
            raise OptionError(f"The shared cluster runs with other options: {', '.join(differs)}")
        async with self.starting:
            if self.incarnation is None:
                with as_own_errors("The parameter server cannot start"):
                    is_primary = self.index == 0
                    if is_primary:  # before what takes memory and time: another life cannot do it any more
                        self.is_first_life = await in_own_thread(is_first_life)
                        await in_own_thread(self.loader.open_folder, self.folder, self.run_id, self.is_first_life)
                    calls_functions = is_primary and any(source.function for source in self.options.model)
                    tf = await in_own_thread(import_tensorflow, calls_functions)  # once, before the first graph
                    runs_python = is_primary and await self.loader.build_functions()
                    self.addresses = [await in_own_thread(self._boot, tf, runs_python)]
                    if is_primary:
                        await self._begin()
                    keep_task(self.tasks, keep_memory_low())
                self.incarnation = secrets.token_hex(8)
            self.idle_s = 0  # not before: who cannot have it is not to keep it, however often that comes
            return ServerInfo(self.process, self.incarnation, self.folder, self.addresses, self.manager.snapshot)

    async def death_watch(self) -> None:
        """A call whose failure tells at once that this process is gone; to be repeated when it returns."""
        await asyncio.sleep(WATCH_S)

    async def ping(self, snapshot_id: int) -> tuple[str | None, Snapshot | None]:
        """What is wrong, if anything is; and what is served, if that is another snapshot."""
        if snapshot_id or self.index:  # else who asks has not had this cluster yet, see start
            self.idle_s = 0
        snapshot = self.manager.snapshot
        trouble = next(filter(None, self.troubles.values()), None)
        return trouble, snapshot if snapshot.snapshot_id != snapshot_id else None

    async def get_weights(self, model: str, version: int | None = None) -> Arrays:
        await self.start()  # should this be a new life that nobody has called yet
        key = self.manager.snapshot.latest(model) if version is None else ModelKey(model, version)
        return await self.loader.get_weights(key)

    async def set_weights(self, model: str, weights: Arrays) -> None:
        """They are saved when this returns, and every worker has them, or is dead."""
        await self.start()
        key = self.manager.snapshot.latest(model)
        await self.manager.change_weights(key, lambda loaded: self.loader.set_weights(key, loaded, weights))

    async def reload(self, model: str) -> Snapshot:
        """Look at a model's folder now; what is served then."""
        await self.start()
        await self.manager.reconcile(model, at_once=True)
        return self.manager.snapshot

    async def finish(self) -> None:
        """Save what models have changed, or remove the folder if it goes with this run."""
        if self.options.checkpoint_dir:
            await self.loader.checkpoint_all()
        elif self.index == 0:
            await in_own_thread(functools.partial(shutil.rmtree, self.folder, ignore_errors=True))

    # -- called by workers ---------------------------------------------------------------------------------------------

    async def report(self, incarnation: str, report: WorkerReport) -> Snapshot:
        """What a worker has of this life; what is served now."""
        if incarnation != self.incarnation:
            raise ActorUnavailable("That was another life of the parameter server.")
        if self.workers.get(report.index, ("", None))[0] != report.incarnation:
            worker = await find_actor(f"worker {report.index}", self.namespace)
            self.workers[report.index] = report.incarnation, worker
            lost = report.index, report.incarnation, worker
            keep_task(self.tasks, watch_death(worker, self._lose_worker, *lost))
        self.manager.report(report)
        return self.manager.snapshot

    async def observe(self, key: ModelKey, weights_id: str, signature: str, agrees: bool) -> None:
        self.manager.observe(key, weights_id, signature, agrees)

    async def read_bundle(self, key: ModelKey, offset: int) -> bytes:
        """A slice of the files that a version was loaded from; an empty one is the end."""
        with as_own_errors(f"The files of model {key} cannot be handed out"):
            return await asyncio.to_thread(read_slice, self.loader.bundles[key], offset)

    def _lose_worker(self, index: int, incarnation: str, worker: Actor) -> None:
        """It is gone; or it could not be called, and goes on: then its next report has it watched again."""
        if self.workers[index][0] == incarnation:
            self.workers[index] = "", worker
        self.manager.worker_lost(index, incarnation)

    def _publish(self, snapshot: Snapshot) -> None:
        for _, worker in self.workers.values():
            keep_task(self.tasks, self._tell(worker, snapshot))

    async def _tell(self, worker: Actor, snapshot: Snapshot) -> None:
        with contextlib.suppress(ActorUnavailable):  # one that is gone begins its next life with what there is then
            await worker.call("sync", self.incarnation, snapshot)

    # -- life ----------------------------------------------------------------------------------------------------------

    def _boot(self, tf, runs_python: bool) -> str:
        """The address of a TensorFlow server on a port that the system picks. It ends with this process.

        Its own job is called ``boot``, because the sessions that come with a cluster of their own call it ``ps``.
        """
        if self.server is None:
            config = server_config(tf, self.options, runs_python)
            self.server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=config)
        return f"{node_address()}:{self.server.target.rpartition(':')[2]}"

    async def _begin(self) -> None:
        """Load the adder, onto this server and the others, whose addresses are added; and go on with the models."""
        names = [f"parameter server {index}" for index in range(1, self.options.parameter_servers)]
        others = [await find_actor(name, self.namespace) for name in names]
        for other in others:
            self.addresses += (await other.call("start")).addresses
            # end with it, so that Ray brings both back and all is loaded anew; before anything waits for it for ever
            keep_task(self.tasks, watch_death(other, os._exit, 1))
        self.loader.addresses = self.addresses
        await self.manager.reconcile(ADDER, at_once=True)
        if error := self.manager.snapshot.versions[ModelKey(ADDER, 1)].error:
            raise ModelError(error)
        keep_task(self.tasks, self._checkpoint_now_and_then())
        for source in self.options.model:
            keep_task(self.tasks, self._watch_folder(source.name))

    async def _watch_folder(self, name: str) -> None:
        at_once = True
        while True:
            try:
                self.troubles[name] = await self.manager.reconcile(name, at_once)
            except Exception as error:
                self.troubles[name] = first_sentence(error)
            at_once = False
            await asyncio.sleep(LOOK_EVERY_S)

    async def _checkpoint_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_EVERY_S)
            try:
                await self.loader.checkpoint_all()
                self.troubles["variables"] = None
            except Error as error:  # it is tried again soon, and meanwhile ping() tells
                self.troubles["variables"] = str(error)

    async def _end_when_idle(self) -> None:
        """End a shared cluster when no front end has been heard for a while, also one that never was well."""
        while self.idle_s < IDLE_SHUTDOWN_S * (1 if self.index == 0 else 2):  # the primary saves what they hold
            await asyncio.sleep(1)  # counted, not timed: a process that was stopped for long has heard nobody,
            with contextlib.suppress(Exception):  # nor has one that is cut off, and for so long has no answer
                await find_actor(f"parameter server {self.index}", self.namespace)
            self.idle_s += not self.starting.locked()
        await self.starting.acquire()  # who comes now waits, and then hears that this one has ended
        if self.incarnation or self.is_first_life:  # else it could not begin with what is there, which others may
            with contextlib.suppress(Exception):
                await self.finish()
        for task in self.tasks - {asyncio.current_task()}:  # one would end this process with another server
            task.cancel()
        names = [f"parameter server {index}" for index in range(1, self.options.parameter_servers)]
        names += [f"worker {index}" for index in range(self.options.workers)]
        for name in names if self.index == 0 else []:
            with contextlib.suppress(Exception):  # whatever it is: nobody else would end what is left
                await asyncio.to_thread((await find_actor(name, self.namespace)).end)
        await asyncio.to_thread(this_actor().end)
