"""Loads versions of models where the variables are, and saves their weights: what the version manager acts with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import pickle
import secrets
import zlib
from typing import IO

import numpy as np

from shared_graph.adder import checkpoint_with
from shared_graph.bundles import bundle_of, bundled
from shared_graph.checkpoints import Checkpoints
from shared_graph.errors import InvalidRequest, ModelError, as_own_errors
from shared_graph.graph import Graph, build_graph, build_in_own_thread, is_mirrored
from shared_graph.load_marks import LoadMarks
from shared_graph.memory import free_garbage
from shared_graph.merging import Verdict, find_batchable
from shared_graph.model_source import ADDER_SOURCE, ModelSource
from shared_graph.models import Arrays, LoadedVersion, ModelKey
from shared_graph.options import LOAD_PATIENCE_S, LOADED_AT_ONCE, Options, code_of_package
from shared_graph.threads import OwnThread, Turns, in_own_thread

CANCEL_LIMIT_S = 15.0  # in which a run ends that is cancelled
TRIAL_LIMIT_S = 60.0  # in which it is found out which signatures may share runs; else none does
BUILD_FIRST_S = 5.0  # so long the server waits for the graphs of functions


class Loader:
    """The graphs of the primary parameter server, on the TensorFlow servers at ``addresses``."""

    def __init__(self, options: Options):
        self._options, self.addresses = options, []
        self._graphs: dict[ModelKey, Graph] = {}
        self._built: dict[ModelKey, asyncio.Task[Graph]] = {}  # of functions, or still being built; to be loaded
        self._checkpoints: Checkpoints | None = None
        self.bundles: dict[ModelKey, IO[bytes]] = {}
        self._saving = OwnThread()  # what is saved is saved in order
        self._loads = Turns(LOADED_AT_ONCE, LOAD_PATIENCE_S)

    def open_folder(self, folder: str, run_id: str, is_first_life: bool) -> None:
        """Where variables are saved. Idempotent. Raises Unavailable."""
        if self._checkpoints is not None:
            return
        is_durable = self._options.checkpoint_dir is not None
        self._checkpoints = Checkpoints(folder, run_id, is_durable, is_first_life)
        self._marks = LoadMarks(folder, run_id)
        checkpoint_with(self._checkpoints.save_sum)

    async def get_weights(self, key: ModelKey) -> Arrays:
        with as_own_errors(f"The weights of model {key} cannot be read"):
            return await in_own_thread(self._graph(key).variables.get_weights)

    async def set_weights(self, key: ModelKey, loaded: LoadedVersion, weights: Arrays) -> LoadedVersion:
        """They are saved when this returns. Returns what was found out about them."""
        with as_own_errors(f"The weights of model {key} cannot be set"):
            graph = self._graph(key)
            await self._saving.run(self._set_and_save, graph, weights)
            # where runs change weights, who may share them was found for whatever weights there may be
            verdict = {} if graph.mutates_state else (await self._try_batchable(graph))._asdict()
        return loaded._replace(**verdict, weights_id=secrets.token_hex(8))

    async def checkpoint_all(self) -> None:
        """Save the variables of the models that change them when they run. One that fails stops no other's."""
        due = [graph for graph in self._graphs.values() if graph.mutates_state and graph.saved_checksum is not None]
        with as_own_errors("The variables cannot be saved"):
            saving = (self._saving.run(self._checkpoint, graph) for graph in due)
            for failure in filter(None, await asyncio.gather(*saving, return_exceptions=True)):
                raise failure

    def _graph(self, key: ModelKey) -> Graph:
        if (graph := self._graphs.get(key)) is None:
            raise InvalidRequest(f"Model {key} is not loaded", 404)
        return graph

    async def build_functions(self) -> bool:
        """Build the graphs of functions: does one run Python? A TensorFlow server has to know before it starts, since
        it gets no more threads, and idle ones look for work: 32 too many took half as much processor time again. What
        cannot be built, or not soon, may run Python; why not is told when it is loaded."""
        end = asyncio.get_running_loop().time() + BUILD_FIRST_S
        for source in (source for source in self._options.model if source.function):
            key = ModelKey(source.name, source.version)
            if key not in self._built:
                self._built[key] = asyncio.create_task(self._build_first(key, source))
            if not (await asyncio.wait([self._built[key]], timeout=end - asyncio.get_running_loop().time()))[0]:
                return True
        return any(task.exception() or task.result().runs_python for task in self._built.values())

    async def _build_first(self, key: ModelKey, source: ModelSource) -> Graph:
        async with self._marks.loading(key, source.files_seen()):  # it has none
            return await build_in_own_thread(build_graph, self._options, source)

    async def load(self, source: ModelSource) -> LoadedVersion:
        async with self._loads.turn():
            return await self._load(source)

    async def _load(self, source: ModelSource) -> LoadedVersion:
        key = ModelKey(source.name, source.version)
        files = await in_own_thread(source.files_seen)
        built = await self._built.pop(key) if key in self._built else None
        async with self._marks.loading(key, files) if source != ADDER_SOURCE else contextlib.nullcontext():
            graph = await build_in_own_thread(self._build_and_restore, key, source, built)
            rule = f"{code_of_package()} {self._options.max_batch} {self._options.exact} {graph.fingerprint}"
            weights = f"{json.dumps(files)} {self._checkpoints.stamp(source)}"
            known_by = hashlib.sha256(f"{rule} {weights}".encode()).hexdigest()
            cached = functools.partial(self._checkpoints.cached, known_by)
            # a function may read its first weights from files that are not known here
            trial = self._try_batchable(graph, cached) if source.folder else self._try_batchable(graph)
            verdict = Verdict(*map(tuple, await trial))
            if source == ADDER_SOURCE:
                await self._saving.run(self._checkpoint, graph)
            elif graph.mutates_state:  # its first weights are not kept: another SavedModel may begin with others
                graph.saved_checksum = await in_own_thread(lambda: checksum_of(graph.variables.get_weights()))
        found = graph.metadata(), graph.fingerprint, *verdict, graph.runs_python
        return LoadedVersion(*found, secrets.token_hex(8))

    def _build_and_restore(self, key: ModelKey, source: ModelSource, built: Graph | None) -> Graph:
        """In a thread of its own, which may take long."""
        with contextlib.ExitStack() as stack:
            if source.folder:
                self.bundles[key] = stack.enter_context(bundled(source, is_mirrored(self._options, source)))
            graph = built or build_graph(self._options, source)
            if graph.made:
                self.bundles[key], graph.made = bundle_of(graph.made), None
            if is_mirrored(self._options, source) and (graph.mutates_state or graph.has_tables_in_checkpoint):
                what = "changes its variables when it runs" if graph.mutates_state else "has tables in its checkpoint"
                raise ModelError(f"it {what} and cannot be mirrored: use --placement shared")
            self._graphs[key] = graph
            graph.connect(self.addresses, self._options)
            try:
                graph.restore(self._checkpoints.load(source, graph.fingerprint if source.folder else ""))
            except InvalidRequest as error:
                why = f"The checkpoint {self._checkpoints.path(source)} is not of this model: {error}"
                raise ModelError(why) from None
        return graph

    async def _try_batchable(self, graph: Graph, cached=lambda find: find()) -> Verdict:
        trial = asyncio.create_task(in_own_thread(cached, functools.partial(find_batchable, graph, self._options)))
        if not (await asyncio.wait([trial], timeout=TRIAL_LIMIT_S))[0]:  # random rows may be such that it never ends
            cancelling = asyncio.create_task(in_own_thread(graph.cancel_runs))
            await asyncio.wait([trial, cancelling], timeout=CANCEL_LIMIT_S)
        if not trial.done():
            raise ModelError("a run of it on random rows does not end")
        try:
            return trial.result()
        except ModelError:  # it was cancelled
            return Verdict()

    async def unload(self, key: ModelKey) -> None:
        self.bundles.pop(key, None)
        if graph := self._graphs.pop(key, None):
            try:
                if graph.mutates_state and graph.saved_checksum is not None:
                    await self._saving.run(self._checkpoint, graph)
            finally:
                ending = await in_own_thread(graph.free)
            del graph
            await in_own_thread(free_garbage, [ending])

    def _set_and_save(self, graph: Graph, weights: Arrays) -> None:
        """Where they cannot be set or saved the old ones are put back."""
        before = {name: value for name, value in graph.variables.get_weights().items() if name in weights}
        try:
            graph.variables.set_weights(weights)
            self._checkpoint(graph)
        except InvalidRequest:  # none was set, and what runs have changed since is not to be taken back
            raise
        except Exception:
            graph.variables.set_weights(before)
            raise

    def _checkpoint(self, graph: Graph) -> None:
        """Save a model's variables, if they are not as they were saved last."""
        if graph.source == ADDER_SOURCE:  # each run saves the sum, and no other add can come between
            graph.run("serving_default", [np.zeros(1)])
            graph.saved_checksum = 0
            return
        weights = graph.variables.get_weights()
        checksum = checksum_of(weights)
        if graph.saved_checksum != checksum:
            # a function may be edited, and go on with what it has learnt
            self._checkpoints.save(graph.source, weights, graph.fingerprint if graph.source.folder else "")
            graph.saved_checksum = checksum


def checksum_of(weights: Arrays) -> int:
    return zlib.crc32(pickle.dumps(weights))
