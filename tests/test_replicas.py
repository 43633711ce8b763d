"""Replicas and the version manager together, as they are: no client sees what is old, whatever happens. Ray, threads
and TensorFlow are played, on a clock that jumps."""

import asyncio
import collections
import contextlib

import pytest
from conftest import long
from test_version_manager import SLOW_S, PlayedWorker, Stage, live_at_random, playing

import shared_graph.replica as module
from shared_graph.errors import ActorUnavailable, ModelError
from shared_graph.models import ModelKey, ServerInfo, Snapshot, WorkerReport
from shared_graph.options import Options
from shared_graph.replica import BUILD_LIMIT_S, Replica
from shared_graph.wire import ProcessInfo
from shared_graph.worker import CATCH_UP_S

pytestmark = pytest.mark.simulated


class ReplicaWorker(PlayedWorker):
    """Has one replica after the other, as ``Worker.start`` makes them, and runs that take a while."""

    def __init__(self, options: Options, stage: Stage, index: int, life: int):
        self.options, self.stage, self.index, self.life = options, stage, index, life
        self.incarnation, self.has_reported, self.is_alive = None, False, True
        self.replica: Replica | None = None
        self.running: collections.Counter[ModelKey] = collections.Counter()  # in this replica
        self.tasks = [asyncio.create_task(self.follow())]

    async def follow(self) -> None:
        while True:
            await self.stage.serving.wait()
            await self.stage.pause()
            self.incarnation, snapshot, left = self.stage.incarnation, self.stage.manager.snapshot, asyncio.Event()
            info = ServerInfo(ProcessInfo(1, "", [], None), self.incarnation, "", [], snapshot)
            server, self.running = PlayedServer(self.stage, self), collections.Counter()
            self.replica = Replica(self.index, str(self.life), self.options, server, info, left.set)
            with contextlib.suppress(ActorUnavailable):
                await self.replica.catch_up(snapshot, CATCH_UP_S)
                self.has_reported = True
                await left.wait()
            self.has_reported = False
            self.replica.leave()

    def sync(self, incarnation: int, snapshot: Snapshot) -> None:
        if self.replica and self.replica.server_incarnation == incarnation:
            self.replica.apply(snapshot)

    def end(self) -> None:
        super().end()
        if self.replica:
            self.replica.leave()

    @property
    def snapshot(self) -> Snapshot:
        return self.replica.snapshot

    @property
    def ready(self) -> dict[ModelKey, str]:
        if self.replica is None:
            return {}
        return {key: graph.weights or self.stage.weights[key] for key, graph in self.replica.graphs.items()}

    def has(self, key: ModelKey) -> bool:
        return super().has(key) or self.running[key] > 0

    def is_in_touch(self) -> bool:
        return self.has_reported and not self.replica.has_left and super().is_in_touch()

    def answer(self, name: str, choice) -> int | None:
        number = super().answer(name, choice)
        if number is not None:
            key, loop = ModelKey(name, number), asyncio.get_running_loop()
            run, runs, running = loop.create_future(), self.replica.runs[name], self.running
            running[key] += 1
            runs.add(run)
            run.add_done_callback(runs.discard)
            run.add_done_callback(lambda run: running.subtract([key]))
            loop.call_later(self.stage.chance.uniform(0, 3), run.set_result, None)
        return number


class PlayedServer:
    """The way from a worker to one life of the parameter server."""

    def __init__(self, stage: Stage, worker: ReplicaWorker):
        self.stage, self.worker, self.incarnation, self.death = stage, worker, stage.incarnation, stage.death

    async def call(self, method: str, *arguments):
        await asyncio.sleep(self.stage.chance.uniform(0, 0.02))
        self.check()
        answer = await getattr(self, method)(*arguments)
        await asyncio.sleep(self.stage.chance.uniform(0, 0.02))
        self.check()
        return answer

    def check(self) -> None:
        if self.death.is_set():
            raise ActorUnavailable("It is gone.")

    async def report(self, incarnation: int, report: WorkerReport) -> Snapshot:
        if self.worker.is_alive:
            self.stage.report(report)
        return self.stage.manager.snapshot

    async def get_weights(self, *key) -> str:
        return self.stage.weights[key]

    async def read_bundle(self, key: ModelKey, offset: int) -> tuple:
        return self.stage, self.stage.files[key], self.stage.fates.get((self.worker.index, key))

    async def death_watch(self) -> None:
        await self.death.wait()
        await self.stage.pause()  # until the news is here


class PlayedGraph:
    weights = None

    def __init__(self, key: ModelKey, stage: Stage, fingerprint: str, fate: str | None):
        self.key, self.stage, self.fingerprint, self.fate = key, stage, fingerprint, fate
        self.own_thread = self.variables = self

    async def build(self) -> None:
        await asyncio.sleep({"is slow": SLOW_S, "hangs": 2 * BUILD_LIMIT_S}.get(self.fate, 0))
        await self.stage.pause()
        if self.fate == "fails":
            raise ModelError("it cannot")

    async def run(self, function, *arguments) -> None:
        await self.stage.pause()
        function(*arguments)

    def restore(self, weights: str) -> None:
        self.weights = weights

    def set_weights(self, weights: str) -> None:
        self.weights = weights

    def connect(self, *arguments, **kind) -> None:
        """To a server that is played."""

    disconnect = connect


@pytest.fixture
def played(monkeypatch):
    """Threads, files and TensorFlow: what they do takes a while, and no clock but the loop's."""

    async def run(function, *arguments):
        await asyncio.sleep(0.01)
        return function(*arguments)

    @contextlib.asynccontextmanager
    async def fetched_bundle(read):
        yield await read(0)

    def build_graph(options, source, is_mirror, folder, **about):
        return PlayedGraph(ModelKey(source.name, source.version), *folder)

    async def build_in_own_thread(build):
        graph = build()
        await graph.build()
        return graph

    class NoMarks:
        def __init__(self, *arguments):
            """Nothing is kept of what is loaded."""

        @contextlib.asynccontextmanager
        async def loading(self, *arguments):
            yield

    replaced = {
        "in_own_thread": run,
        "build_in_own_thread": build_in_own_thread,
        "fetched_bundle": fetched_bundle,
        "build_graph": build_graph,
        "LoadMarks": NoMarks,
        "warm_up": lambda graph: None,
        "free_garbage": lambda endings: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)


def replica_worker(placement: str):
    return lambda *arguments: ReplicaWorker(Options(placement=placement), *arguments)


@pytest.mark.parametrize("placement", ["shared", "mirrored"])
@pytest.mark.parametrize("seed", [*range(6), *map(long, range(6, 40))])
async def test_no_client_sees_a_version_go_back_or_old_weights_and_all_settles_whatever_happens(
    played, placement, seed
):
    await live_at_random(seed, replica_worker(placement))


async def test_weights_are_set_when_a_worker_has_them_too_that_builds_the_model_and_has_not_heard_of_them(played):
    async with playing(1, 1, replica_worker("mirrored")) as stage:
        stage.fates[0, ModelKey("m", 1)] = "is slow"
        await asyncio.sleep(CATCH_UP_S + 5)
        assert stage.workers[0].is_in_touch() and stage.workers[0].ready.keys() == {("n", 1)}
        setting = asyncio.create_task(stage.set_weights("m"))
        while stage.weights["m", 1] != "000003":
            await asyncio.sleep(0.001)
        stage.news_s = 1e6  # it hears of them when it reports the next time
        while "000003" not in stage.workers[0].ready.values():
            await asyncio.sleep(0.001)
            stage.check_weights()
        await setting
