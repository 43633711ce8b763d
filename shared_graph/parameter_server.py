"""The actor that holds the variables, keeps them, and in ``shared`` placement runs the models."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import pickle
import secrets
import shutil
import time
import zlib
from typing import Any

import numpy as np
import ray

from shared_graph.adder import keep_with
from shared_graph.checkpoints import Checkpoints
from shared_graph.errors import Error, InvalidRequest, ModelError, OptionError, Unavailable, first_sentence
from shared_graph.graph import Graph, build_functions, build_graph, is_mirrored
from shared_graph.merging import find_merged
from shared_graph.models import ADDER, ADDER_SOURCE, Arrays, Key, Model, ModelSource
from shared_graph.options import Options
from shared_graph.ray_runtime import about_this_actor, call, find_actor
from shared_graph.tensorflow_runtime import import_tensorflow, server_config
from shared_graph.version_manager import stamp_of

KEEP_EVERY_S = 10.0  # how old the kept variables of a model may be that changes them when it runs
LOOK_EVERY_S = 1.0  # between two looks at the models' folders
GONE_S = 10.0  # a shared cluster ends when no front end has been heard for so long


class ParameterServer:
    """A Ray actor with a TensorFlow server in it, and on that the state of the models, or its part of it.

    The first one also loads the models, onto all of them, and keeps their variables. It knows other actors by name.
    """

    def __init__(self, index: int, options: Options, namespace: str, folder: str, run: str):
        self.index, self.options, self.namespace, self.folder, self.run = index, options, namespace, folder, run
        self.server, self.checkpoints = None, None
        self.about: dict[str, Any] | None = None  # what ``start`` tells of this life, when all is loaded
        self.models: dict[Key, Model] = {}  # each loaded version, label and latest; and versions that come or failed
        self.edition = 0  # of these
        self.graphs: dict[Key, Graph] = {}  # by name and version
        self.stamps: dict[Key, tuple] = {}  # of the files of a version that is not loaded, and whether they were tried
        self.trouble: str | None = None  # with keeping variables
        self.silent_s = 0  # how long no front end has been heard
        self.turn = concurrent.futures.ThreadPoolExecutor(1)  # so that the event loop can always answer ping()
        self.starting, self.refreshing, self.ending = asyncio.Lock(), asyncio.Lock(), None

    async def start(self, wanted: dict[str, str] | None = None) -> dict[str, Any]:
        """Boot, and in the first one load; about this life of the actor, and what it has now.

        Idempotent. The first one's returns when every variable is restored. Raises ModelError or Unavailable, and
        OptionError to a front end that ``wanted`` another cluster than this one, which it would share.
        """
        self.silent_s, ours = 0, self.options.shared
        if self.options.address and self.ending is None:
            self.ending = asyncio.create_task(self._end_when_left())
        for name, value in (wanted or ours).items():
            if value != ours[name]:
                raise OptionError(f"{name} {value}: the shared cluster runs with {ours[name]}")
        async with self.starting:
            if self.about is None:
                self.addresses = [await self._in_turn(self._boot)]
                if self.index == 0:
                    await self._load()
                self.about = about_this_actor() | {
                    "life": secrets.token_hex(8),
                    "folder": self.folder,
                    "addresses": self.addresses,
                }
            return self.about | self._news()

    async def stay(self) -> None:
        """Never returns: a call whose failure tells at once that this process is gone."""
        await asyncio.Event().wait()

    def _news(self) -> dict[str, Any]:
        return {"edition": self.edition, "models": self.models}

    async def ping(self, edition: int) -> tuple[str | None, dict[str, Any] | None]:
        """What is wrong with keeping variables, if anything is; and what it has now, if that is another edition."""
        self.silent_s = 0
        return self.trouble, self._news() if edition != self.edition else None

    async def get_weights(self, model: str, version: int | None = None) -> Arrays:
        await self.start()  # should this be a new life that nobody has called yet
        version = version or self.models[model, None].version
        return await self._in_turn(self.graphs[model, version].variables.get_weights)

    async def set_weights(self, model: str, weights: Arrays) -> None:
        """They are kept when this returns, and every worker has them, or is dead."""
        await self.start()
        key = model, self.models[model, None].version
        async with self.starting:  # nobody is told of weights that are just being replaced
            await self._in_turn(self.graphs[key].variables.set_weights, weights)
            await self._in_turn(self._keep, key)
            if self.models[key].weights:
                self._tell(key, self.models[key]._replace(weights=secrets.token_hex(8)))
        if self.models[key].weights:
            await self._update_workers()

    async def reload(self, model: str) -> dict[str, Any]:
        """Look at a model's folder now; what there is then."""
        await self.start()
        for source in self.options.model:
            if source.name == model:
                await self._refresh(source)
        return self._news()

    async def keep(self) -> None:
        """Keep the variables of the models that change them when they run."""
        for key, graph in list(self.graphs.items()):
            if graph.writes and self.models[key].metadata:
                await self._in_turn(self._keep, key)

    async def _in_turn(self, method, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.turn, method, *arguments)

    async def _workers(self) -> list:
        """Those that there are."""
        names = [f"worker {index}" for index in range(self.options.workers)]
        found = await asyncio.gather(*(find_actor(name, self.namespace) for name in names), return_exceptions=True)
        return [worker for worker in found if not isinstance(worker, Exception)]

    async def _update_workers(self) -> list[dict[str, Any]]:
        """What those say that have now what is here, one after another, since that takes them time from what they do.
        Those that are dead begin their next life with it."""
        updated = []
        for worker in await self._workers() if self.about else ():  # else they wait for ``start``
            with contextlib.suppress(ray.exceptions.RayError):
                updated.append(await worker.start.remote())
        return updated

    def _boot(self) -> str:
        """The address of a TensorFlow server on a port that the system picks. It ends with this process.

        Its own job is called ``boot``, because the sessions that come with a cluster of their own call it ``ps``.
        """
        tf = import_tensorflow()
        if self.server is None:
            if self.index == 0:
                self.checkpoints = Checkpoints(self.folder, self.run, durable=self.options.checkpoint_dir is not None)
                keep_with(self.checkpoints.keep_sum)
                self.graphs = build_functions(tf, self.options)
            config = server_config(tf, self.options, any(graph.calls_out for graph in self.graphs.values()))
            self.server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=config)
        return f"{ray.util.get_node_ip_address()}:{self.server.target.rpartition(':')[2]}"

    async def _load(self) -> None:
        """Load all models onto this server and the others, whose addresses are added."""
        names = [f"parameter server {index}" for index in range(1, self.options.parameter_servers)]
        others = [await find_actor(name, self.namespace) for name in names]
        for other in others:
            self.addresses += (await call(other.start.remote()))["addresses"]
        for source in [ADDER_SOURCE, *self.options.model]:
            await self._refresh(source)
        if error := self.models[ADDER, 1].error:
            raise ModelError(error)
        self.lives = asyncio.create_task(self._live(others)), asyncio.create_task(self._watch_folders())

    async def _live(self, others: list) -> None:
        """Keep variables now and then. End with another parameter server, so that Ray brings both back and all is
        loaded anew."""
        stays = [asyncio.ensure_future(call(other.stay.remote())) for other in others]
        kept = time.monotonic()
        while True:
            await asyncio.sleep(1)
            if any(stay.done() for stay in stays):
                os._exit(1)
            if time.monotonic() - kept > KEEP_EVERY_S:
                try:
                    await self.keep()
                    self.trouble = None
                except Exception as error:  # it is tried again soon, and meanwhile ping() tells
                    self.trouble = first_sentence(error)
                kept = time.monotonic()

    async def _end_when_left(self) -> None:
        """End a shared cluster when no front end has been heard for a while, also one that never was well."""
        while self.silent_s < GONE_S:
            await asyncio.sleep(1)  # and counted: a process that was stopped for long has not heard that it was left
            self.silent_s += not self.starting.locked()
        with contextlib.suppress(Exception):
            await self.keep()
        if self.options.checkpoint_dir is None and self.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        for actor in [*(await self._workers() if self.index == 0 else []), ray.get_runtime_context().current_actor]:
            await asyncio.to_thread(ray.kill, actor)

    # -- versions come and go ------------------------------------------------------------------------------------------

    def _tell(self, key: Key, model: Model | None) -> None:
        others = {other: its for other, its in self.models.items() if other != key}
        self.models, self.edition = others | ({key: model} if model else {}), self.edition + 1

    async def _watch_folders(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for source in self.options.model:
                try:
                    await self._refresh(source, at_once=False)
                except Exception as error:
                    self.trouble = first_sentence(error)

    async def _refresh(self, source: ModelSource, at_once: bool = True) -> None:
        """Serve the highest version that is there and can be loaded, and those that labels point to."""
        name = source.name
        async with self.refreshing:
            there, labels = await asyncio.to_thread(lambda: (source.versions(), source.labels()))
            wanted = {
                which: self.models[name, which].version for which in [None, *labels] if (name, which) in self.models
            }
            for version in sorted(there, reverse=True):
                if await self._have(there[version], at_once):
                    wanted[None] = version
                    break
            for label, version in labels.items():
                if version in there and await self._have(there[version], at_once):
                    wanted[label] = version
                elif version not in there and (name, version) not in self.models:
                    why = f"The label {label!r} of model {name} points to version {version}, which is not there."
                    self._tell((name, version), Model(source._replace(version=version), "END", why))
            await self._move(name, wanted)
            for key, model in self.models.items():
                if key == (name, model.version) and model.version not in wanted.values():
                    if model.metadata:
                        await self._unload(key)
                    elif model.version not in {*there, *labels.values()}:
                        self._tell(key, None)

    async def _have(self, source: ModelSource, at_once: bool) -> bool:
        """Is this version loaded? If not it is tried, unless its files still change, or have failed as they are."""
        key = source.name, source.version
        if key in self.models and self.models[key].metadata:
            return True
        stamp, last = await asyncio.to_thread(stamp_of, source), self.stamps.get(key)
        if not at_once and last != (stamp, False):
            self.stamps[key] = last if last == (stamp, True) else (stamp, False)
            return False
        self.stamps[key] = stamp, True
        self._tell(key, Model(source, "LOADING"))
        try:
            self._tell(key, await asyncio.to_thread(self._load_version, source))
            if any(key not in worker["graphs"] for worker in await self._update_workers()):
                raise ModelError(f"Model {source} cannot be loaded by a worker.")
            self._tell(key, self.models[key]._replace(state="AVAILABLE"))
            del self.stamps[key]
        except Exception as error:
            why = f"Model {source} cannot be loaded: {type(error).__name__}: {first_sentence(error)}"
            await self._unload(key, Model(source, "END", str(error) if isinstance(error, Error) else why))
            if isinstance(error, Unavailable):
                raise
        return bool(self.models[key].metadata)

    def _load_version(self, source: ModelSource) -> Model:
        """In a thread of its own, which may take long."""
        tf, key, is_mirror = import_tensorflow(), (source.name, source.version), is_mirrored(self.options, source)
        graph = self.graphs[key] = self.graphs.get(key) or build_graph(tf, self.options, source)
        graph.connect(tf, self.addresses, self.options)
        graph.restore()
        if is_mirror and graph.writes:
            raise ModelError(
                f"Model {source} cannot be loaded: it changes its variables when it runs and cannot be"
                " mirrored: use --placement shared."
            )
        try:
            graph.variables.set_weights(self.checkpoints.load(source))
        except InvalidRequest as error:
            raise ModelError(f"The checkpoint {self.checkpoints.path(source)} is not of this model: {error}") from None
        if graph.writes:
            self._keep(key)
        rule = f"merged-{self.options.max_batch}-{self.options.exact}-{graph.fingerprint}"
        merged = self.checkpoints.remember(rule, lambda: find_merged(graph, self.options))
        weights = secrets.token_hex(8) if is_mirror else None
        return Model(source, "LOADING", None, graph.metadata(), merged, graph.calls_out, weights)

    async def _move(self, name: str, wanted: dict[str | None, int]) -> None:
        """Let the latest and the labels stand for other versions. First all workers stop to answer with the old ones,
        or are dead, and let who asks wait; only then they answer with the new ones. So nobody sees a version go back.
        """
        now = {key: its for key, its in self.models.items() if key[0] == name and key[1] != its.version}
        then = {(name, which): self.models[name, version] for which, version in wanted.items()}
        moving = {
            key: its if key in now and now[key].version == its.version else its._replace(state="MOVING")
            for key, its in then.items()
        }
        others = {key: its for key, its in self.models.items() if key not in now}
        for stands_for in (moving, then) if moving != now else ():
            self.models, self.edition = others | stands_for, self.edition + 1
            await self._update_workers()

    async def _unload(self, key: Key, failed: Model | None = None) -> None:
        """Give back the memory of a version that is of no use any more, or has failed, when all on it is answered."""
        self._tell(key, failed or self.models[key]._replace(state="UNLOADING", metadata={}))
        await self._update_workers()
        if graph := self.graphs.get(key):
            if graph.writes and not failed:
                await self._in_turn(self._keep, key)
            if graph.source.folder:  # that of a function stays, see build_functions
                del self.graphs[key]
            await asyncio.to_thread(graph.free)
        if not failed:
            self._tell(key, None)

    def _keep(self, key: Key) -> None:
        """Keep a model's variables, if they are not as they were kept last."""
        graph = self.graphs[key]
        if graph.source == ADDER_SOURCE:  # each run keeps the sum, and no other add can come between
            graph.run("serving_default", [np.zeros(1)])
            return
        weights = graph.variables.get_weights()
        fingerprint = zlib.crc32(pickle.dumps(weights))
        if graph.kept != fingerprint:
            self.checkpoints.keep(graph.source, weights)
            graph.kept = fingerprint
