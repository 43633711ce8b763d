"""Who lives: actors that die, hang and come back, played by the tests on a clock that jumps."""

import asyncio
import contextlib
import random

import pytest

import shared_graph.supervisor as module
from shared_graph.errors import ActorUnavailable, Error, ModelError, OptionError
from shared_graph.model_source import ModelSource
from shared_graph.models import ModelVersion, ServerInfo, Snapshot
from shared_graph.options import Options
from shared_graph.status import Status
from shared_graph.supervisor import (
    BUILDING_S,
    DIES,
    ENDED,
    NO_PLACE,
    PATIENCE_S,
    PING_S,
    START_PATIENCE_S,
    SUSPECT_S,
    Supervisor,
)
from shared_graph.wire import ProcessInfo, WorkerInfo

pytestmark = pytest.mark.simulated


class PlayedConnection:
    def __init__(self, actor: "PlayedActor"):
        self.index, self.is_hung, self.was_ended, self.in_flight = actor.index, False, False, {}
        self.unanswered = 0
        self.closed = asyncio.get_running_loop().create_future()
        actor.connections.append(self)

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


class PlayedActor:
    """An actor and its lives; a call to one that is dead fails, one to one that is stopped never returns."""

    def __init__(self, stage: "Stage", kind: str, index: int):
        self.stage, self.kind, self.index = stage, kind, index
        self.connections: list[PlayedConnection] = []
        self.is_stopped, self.is_ended, self.starts, self.pings, self.failure = False, False, [], 0, None
        self.known = set()  # the snapshots that those have who ping
        self.trouble: str | None = None
        self.cause: str | None = None  # for which it is dead for good
        self.begin()

    def begin(self) -> None:
        self.stage.pids += 1
        self.process = ProcessInfo(self.stage.pids, "node", [], None)
        self.is_alive, self.is_stopped = True, False
        self.died = asyncio.Event()

    def kill(self) -> None:
        """Ray brings it back after a while."""
        self.is_alive = False
        self.died.set()
        for connection in self.connections:
            connection.close()
        asyncio.get_running_loop().call_later(self.stage.chance.uniform(0.5, 3), self.begin)

    async def call(self, method: str, *arguments):
        if not self.is_alive:
            await asyncio.sleep(0.01)
            failure = ActorUnavailable(self.cause or "it is dead")
            failure.is_final = self.cause is not None
            raise failure
        answer = asyncio.create_task(getattr(self, method)(*arguments))
        death = asyncio.create_task(self.died.wait())
        try:
            await asyncio.wait([answer, death], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ActorUnavailable("it died meanwhile")
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()

    async def start(self, *wanted):
        self.starts.append(self.process.pid)
        await self.unless_stopped(self.stage.chance.uniform(0.1, 2))
        if self.failure:
            raise self.failure
        if self.kind == "worker":
            return WorkerInfo(self.process, ("127.0.0.1", 1), b"")
        return ServerInfo(self.process, "", "", [], self.stage.snapshot)

    async def ping(self, snapshot_id: int):
        self.pings += 1
        self.known.add(snapshot_id)
        await self.unless_stopped(0.001)
        if self.kind == "worker" or snapshot_id >= self.stage.snapshot.snapshot_id:
            return self.trouble, None
        self.stage.handed_out += 1
        return self.trouble, self.stage.snapshot

    async def death_watch(self):
        await self.unless_stopped(60)

    async def finish(self):
        self.stage.events.append("finish")
        await self.unless_stopped(0)
        if self.failure:
            raise self.failure

    async def unless_stopped(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while self.is_stopped:
            await asyncio.sleep(0.05)

    def end(self) -> None:
        self.is_ended = True
        self.stage.events.append(f"end {self.kind} {self.index}")


class Stage:
    def __init__(self, seed: int = 0, **options):
        self.chance, self.pids, self.events = random.Random(seed), 100, []
        self.over: list[Error] = []
        self.snapshot, self.handed_out = Snapshot(1), 0
        self.options = Options(**options)
        self.status = Status(self.options)
        self.status.on_over = self.over.append
        self.actors: dict[str, PlayedActor] = {}
        self.supervisor = Supervisor(self.options, self.status, self.create, self.kill, self.connect)
        self.killed: list[int] = []

    async def create(self, kind: str, index: int, *arguments) -> PlayedActor:
        await asyncio.sleep(0.5)
        return self.actors.setdefault(f"{kind} {index}", PlayedActor(self, kind, index))

    async def kill(self, process: ProcessInfo, actor: PlayedActor) -> None:
        self.killed.append(process.pid)
        for actor in self.actors.values():
            if actor.process.pid == process.pid and actor.is_alive:
                actor.kill()

    async def connect(self, index: int, info: WorkerInfo) -> PlayedConnection:
        return PlayedConnection(self.actors[f"worker {index}"])

    def states(self) -> list[str]:
        return [actor.state for actor in self.status.servers + self.status.workers]


@contextlib.asynccontextmanager
async def playing(seed: int = 0, **options):
    stage = Stage(seed, **options)
    task = asyncio.create_task(stage.supervisor.run())
    try:
        yield stage
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_all_become_ready_the_parameter_server_and_one_worker_first():
    async with playing(workers=3) as stage:
        assert stage.states() == ["starting"] * 4
        await asyncio.sleep(20)
        assert stage.states() == ["ready"] * 4
        assert list(stage.actors)[:2] == ["parameter server 0", "worker 0"]
        assert max(actor.pings for actor in stage.actors.values()) < 20 / PING_S + 5, "it is asked over and over"


async def test_who_has_had_the_parameter_server_tells_it_so_while_another_life_starts():
    """That of a shared cluster is not to end then, which it does for those who have not."""
    async with playing(workers=1) as stage:
        await asyncio.sleep(20)
        server = stage.actors["parameter server 0"]
        server.known.clear()
        server.kill()
        await asyncio.sleep(20)
        assert stage.states() == ["ready"] * 2 and server.known == {1}


async def test_of_an_actor_for_which_ray_has_no_place_that_is_told_and_nothing_is_ended():
    async with playing(workers=2) as stage:
        create = stage.supervisor._create

        async def without_a_place(kind, index, *arguments):
            actor = await create(kind, index, *arguments)
            actor.is_stopped = kind == "worker" and index == 1
            return actor

        stage.supervisor._create = without_a_place
        await asyncio.sleep(3600)
        waiting = stage.status.workers[1]
        assert stage.actors["worker 1"].pings == 1, "calls that wait would pile up"
        assert stage.states() == ["ready", "ready", "starting"] and stage.killed == []
        assert waiting.as_json()["trouble"] == NO_PLACE
        stage.actors["worker 1"].is_stopped = False
        await asyncio.sleep(10)
        assert stage.states() == ["ready"] * 3 and waiting.trouble is None


@pytest.mark.parametrize("name", ["worker 0", "worker 1", "parameter server 0"])
async def test_of_an_actor_that_dies_each_time_while_it_starts_that_is_told_once(name, caplog):
    """As where there is too little memory: Ray makes it anew, and the system ends it."""
    async with playing(workers=2) as stage:
        create = stage.supervisor._create

        async def too_large(kind, index, *arguments):
            actor = await create(kind, index, *arguments)

            async def dies(*arguments):
                asyncio.get_running_loop().call_later(1, actor.kill)
                await asyncio.sleep(60)

            if f"{kind} {index}" == name:
                actor.start = dies
            return actor

        stage.supervisor._create = too_large
        await asyncio.sleep(20)
        told = lambda: [record.message for record in caplog.records if DIES in record.message]
        found = next(a for a in stage.status.servers + stage.status.workers if str(a) == name)
        assert told() == [] and found.trouble is None
        await asyncio.sleep(100)
        assert told() == [f"{name} could not start: {DIES}"] and found.as_json()["trouble"] == DIES
        del stage.actors[name].start
        await asyncio.sleep(60)
        assert stage.states() == ["ready"] * 3 and found.trouble is None


@pytest.mark.parametrize("name", ["worker 0", "worker 1", "parameter server 0"])
async def test_an_actor_that_dies_is_brought_up_to_date_when_it_is_back_and_workers_with_the_parameter_server(name):
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        starts = len(stage.actors["worker 0"].starts)
        stage.actors[name].kill()
        await asyncio.sleep(0.01)
        lost = next(a for a in stage.status.servers + stage.status.workers if str(a) == name)
        assert lost.state == "starting" and "pid" not in lost.as_json()
        await asyncio.sleep(20)
        assert stage.states() == ["ready"] * 3 and lost.restarts == 1
        others = [a.restarts for a in stage.status.servers + stage.status.workers if a is not lost]
        assert others == [0, 0]
        assert (len(stage.actors["worker 0"].starts) > starts) == (name != "worker 1")


async def test_a_worker_that_does_not_answer_is_hung_then_ended_and_one_that_wakes_is_used_again(monkeypatch):
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        worker, status = stage.actors["worker 0"], stage.status.workers[0]
        told = []
        monkeypatch.setattr(stage.status.batcher, "dispatch", lambda: told.append(status.connection.is_hung))
        worker.is_stopped = True
        await asyncio.sleep(SUSPECT_S + 1.5)
        assert status.state == "hung" and status.connection.is_hung and stage.killed == []
        assert told == [True]  # what would have been its work is another one's at once
        worker.is_stopped = False
        await asyncio.sleep(PATIENCE_S["worker"] + 2)
        pid, connection = worker.process.pid, worker.connections[-1]
        assert status.state == "ready" and not connection.is_hung and stage.killed == [] and told == [True, False]
        worker.is_stopped = True
        await asyncio.sleep(PATIENCE_S["worker"] + 2)
        assert stage.killed == [pid] and connection.was_ended
        await asyncio.sleep(20)
        assert stage.states() == ["ready"] * 3


async def test_while_a_version_is_loaded_a_silent_worker_is_ended_later():
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        source = ModelSource("m", 1, function="m:build")
        loading, ready = (ModelVersion(source, state) for state in ("LOADING", "AVAILABLE"))
        stage.snapshot = Snapshot(2, {loading.key: loading})
        await asyncio.sleep(1)
        worker = stage.actors["worker 0"]
        for silence_s, killed in ((BUILDING_S - 1, 0), (BUILDING_S + 2, 1)):
            worker.is_stopped = True
            await asyncio.sleep(silence_s)
            assert len(stage.killed) == killed
            worker.is_stopped = False
            await asyncio.sleep(20)
        stage.snapshot = Snapshot(3, {ready.key: ready})
        await asyncio.sleep(1)
        worker.is_stopped = True
        await asyncio.sleep(PATIENCE_S["worker"] + 2)
        assert len(stage.killed) == 2


async def test_silence_is_counted_from_the_last_answer():
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        worker = stage.actors["worker 0"]
        for _ in range(5):
            for worker.is_stopped in (True, False):
                await asyncio.sleep(PATIENCE_S["worker"] / 2)
        assert stage.killed == []


async def test_silence_does_not_count_while_this_process_itself_comes_too_late():
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        loop, worker = asyncio.get_running_loop(), stage.actors["worker 0"]
        worker.is_stopped = True
        for _ in range(20):
            await asyncio.sleep(PING_S / 4)
            loop.now += 2 * PING_S  # in which it has not run
        assert stage.killed == [] and stage.states() == ["ready"] * 3


async def test_a_worker_that_hangs_when_it_is_to_follow_a_parameter_server_that_is_back_is_ended():
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        worker = stage.actors["worker 0"]
        pid, worker.is_stopped = worker.process.pid, True
        stage.actors["parameter server 0"].kill()
        await asyncio.sleep(START_PATIENCE_S + 40)
        assert stage.killed == [pid] and stage.states() == ["ready"] * 3


async def test_each_change_of_what_the_parameter_server_serves_is_known_soon_and_handed_out_once_and_so_is_trouble():
    async with playing(workers=1) as stage:
        await asyncio.sleep(20)
        assert stage.status.snapshot is stage.snapshot
        handed_out = stage.handed_out
        stage.snapshot, stage.actors["worker 0"].trouble = Snapshot(2), "a run does not end"
        await asyncio.sleep(2 * PING_S)
        assert stage.status.snapshot is stage.snapshot and stage.status.workers[0].trouble == "a run does not end"
        stage.actors["worker 0"].trouble = None
        await asyncio.sleep(20)
        assert stage.handed_out == handed_out + 1 and stage.status.workers[0].trouble is None
        stage.actors["worker 0"].trouble = "a run does not end"
        await asyncio.sleep(2 * PING_S)
        stage.actors["worker 0"].kill()
        await asyncio.sleep(0.01)
        assert stage.status.workers[0].trouble is None, "it is over with the process"


async def test_what_cannot_start_is_told_once_and_tried_again_with_growing_pauses(caplog):
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        worker = stage.actors["worker 1"]
        worker.failure, worker.starts = Error("the sky has fallen"), []
        caplog.clear()
        worker.kill()
        await asyncio.sleep(600)
        told = [record for record in caplog.records if "could not start" in record.message]
        assert len(told) == 1 and 60 < len(worker.starts) < 90
        worker.failure = Error("another reason")
        await asyncio.sleep(60)
        worker.failure = None
        await asyncio.sleep(60)
        told = [record for record in caplog.records if "could not start" in record.message]
        assert len(told) == 2 and stage.states() == ["ready"] * 3
        worker.failure, worker.starts = Error("another reason"), []
        worker.kill()
        await asyncio.sleep(10)
        told = [record for record in caplog.records if "could not start" in record.message]
        assert len(told) == 3 and len(worker.starts) > 1, "it was well since, and all begins anew"


async def test_a_parameter_server_that_fails_when_it_is_back_fails_all_until_it_is_well():
    async with playing(workers=1) as stage:
        health = lambda: stage.status.health()["status"]
        assert health() == "starting"
        await asyncio.sleep(20)
        server = stage.actors["parameter server 0"]
        server.failure = ModelError("The checkpoint has gone.")
        server.kill()
        await asyncio.sleep(0.01)
        assert health() == "recovering"
        await asyncio.sleep(60)
        assert health() == "failed" and not stage.over
        with pytest.raises(Error, match="has gone"):
            stage.status.get_model("adder")
        server.failure = None
        await asyncio.sleep(60)
        assert health() == "ready" and stage.states() == ["ready"] * 2


async def test_what_nobody_foresaw_when_the_parameter_server_starts_is_no_end():
    stage = Stage(workers=1)
    stage.actors["parameter server 0"] = actor = PlayedActor(stage, "parameter server", 0)
    actor.failure = ValueError("?")
    task = asyncio.create_task(stage.supervisor.run())
    await asyncio.sleep(30)
    assert not stage.over and stage.status.failure is None
    actor.failure = None
    await asyncio.sleep(60)
    assert stage.states() == ["ready"] * 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("name", ["parameter server 0", "worker 0"])
async def test_an_actor_that_cannot_even_be_made_is_told_once_and_made_anew_with_growing_pauses(name, caplog):
    """As on a machine that lacks the package; Ray does not start such a one by itself."""
    stage, made = Stage(workers=1), []
    create = stage.create

    async def cannot_be_made(kind: str, index: int, *arguments) -> PlayedActor:
        actor = await create(kind, index, *arguments)
        if str(f"{kind} {index}") == name:
            made.append(actor)
            actor.is_alive, actor.cause = False, "ModuleNotFoundError: No module named 'tensorflow'"
        return actor

    stage.supervisor._create = cannot_be_made
    task = asyncio.create_task(stage.supervisor.run())
    await asyncio.sleep(600)
    told = [record.message for record in caplog.records if "could not start" in record.message]
    assert told == [f"{name} could not start: ModuleNotFoundError: No module named 'tensorflow'"]
    assert 60 < len(made) < 90 and not stage.over
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["fails", "hangs"])
async def test_a_first_worker_that_never_starts_does_not_keep_the_others_waiting(is_stopped):
    stage = Stage(workers=3)
    stage.actors["worker 0"] = first = PlayedActor(stage, "worker", 0)
    first.failure, first.is_stopped = Error("no TensorFlow on its node"), is_stopped
    task = asyncio.create_task(stage.supervisor.run())
    await asyncio.sleep(60)
    assert stage.states() == ["ready", "starting", "ready", "ready"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("checkpoint_dir", [None, "/kept"])
async def test_a_shared_cluster_that_was_ended_meanwhile_is_begun_anew_only_where_its_variables_were_kept(
    checkpoint_dir,
):
    """As when this process was stopped, or cut off, for so long that the parameter server took it for gone."""
    async with playing(workers=2, address="auto", checkpoint_dir=checkpoint_dir) as stage:
        await asyncio.sleep(20)
        ended = list(stage.actors.values())
        stage.actors.clear()
        for actor in ended:
            actor.cause, actor.is_alive = "it was killed by ray.kill", False
            actor.died.set()
            for connection in actor.connections:
                connection.close()
        await asyncio.sleep(60)
        if checkpoint_dir:
            assert not stage.over and stage.states() == ["ready"] * 3
        else:
            assert list(map(str, stage.over)) == [ENDED] and not stage.actors
            with pytest.raises(Error, match=ENDED):
                stage.status.get_model("adder")


@pytest.mark.parametrize("failure", [ModelError("The sum is damaged."), OptionError("--workers 3: ...")])
async def test_a_parameter_server_that_cannot_start_at_first_ends_all_with_its_sentence(failure):
    stage = Stage(workers=1)
    stage.actors["parameter server 0"] = actor = PlayedActor(stage, "parameter server", 0)
    actor.failure = failure
    task = asyncio.create_task(stage.supervisor.run())
    await asyncio.sleep(30)
    assert stage.over == [failure] and stage.status.health()["status"] == "failed" and stage.status.is_over
    with pytest.raises(Error, match=str(failure)):
        stage.status.get_model("adder")
    task.cancel()


@pytest.fixture
def without_threads(monkeypatch):
    """Threads have no clock that jumps."""

    async def at_once(function, *arguments):
        return function(*arguments)

    monkeypatch.setattr(module, "in_own_thread", at_once)


async def test_ends_save_and_then_end_every_actor_workers_first(without_threads):
    async with playing(workers=2) as stage:
        await asyncio.sleep(20)
        await stage.supervisor.disconnect()
        assert all(connection.closed.done() for a in stage.actors.values() for connection in a.connections)
        await stage.supervisor.end_actors()
        assert stage.events == ["finish", "end worker 0", "end worker 1", "end parameter server 0"]


async def test_all_are_ended_also_while_the_parameter_server_is_made_anew(without_threads):
    async with playing(workers=1, checkpoint_dir="/kept") as stage:
        await asyncio.sleep(20)
        server = stage.actors["parameter server 0"]
        server.cause, server.is_alive = "ray.kill", False
        server.died.set()
        while stage.status.servers[0].handle is not None:
            await asyncio.sleep(0.01)
        await stage.supervisor.end_actors()
        assert stage.events == ["end worker 0"]


@pytest.mark.parametrize(
    "failure, why", [(ModelError("the disk is full"), "the disk is full"), (None, "it took too long")]
)
async def test_a_parameter_server_that_cannot_save_or_does_not_answer_is_told_and_ended_all_the_same(
    without_threads, caplog, failure, why
):
    async with playing(workers=1, checkpoint_dir="/kept") as stage:
        await asyncio.sleep(20)
        server = stage.actors["parameter server 0"]
        server.failure, server.is_stopped = failure, failure is None
        await stage.supervisor.end_actors()
        assert caplog.messages[-1] == f"what models have changed since it was kept last is lost: {why}"
        assert all(actor.is_ended for actor in stage.actors.values())


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_dies_or_hangs_all_are_ready_in_the_end_and_nobody_is_ended_who_answers(seed):
    chance = random.Random(seed)
    async with playing(seed, workers=chance.randint(1, 4), parameter_servers=chance.randint(1, 2)) as stage:
        await asyncio.sleep(30)
        for _ in range(15):
            actor = chance.choice(list(stage.actors.values()))
            what = chance.choice(["kill", "stop", "nothing"])
            if what == "kill" and actor.is_alive:
                actor.kill()
            elif what == "stop":  # one that has started: who has not said its pid yet cannot be ended
                ready = [s for s in stage.status.servers + stage.status.workers if s.state != "starting"]
                actor.is_stopped = any(
                    str(s) == f"{actor.kind} {actor.index}" and s.process == actor.process for s in ready
                )
            before, stopped = len(stage.killed), {a.process.pid for a in stage.actors.values() if a.is_stopped}
            await asyncio.sleep(chance.choice([0.01, 1, 6, 40]))
            assert set(stage.killed[before:]) <= stopped, "one that answers was ended"
        await asyncio.sleep(150)
        assert set(stage.states()) == {"ready"}
        for status in stage.status.workers:
            assert not status.connection.closed.done() and not status.connection.is_hung
            assert status.process == stage.actors[str(status)].process
