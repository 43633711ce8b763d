"""What a worker has of a parameter server, with one that the tests play."""

import asyncio
import contextlib
import itertools
import threading
import types

import pytest

import shared_graph.replica as module
from shared_graph import parameter_server, worker
from shared_graph.errors import ActorUnavailable
from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelKey, ModelVersion, ServerInfo, Snapshot, WorkerReport
from shared_graph.options import Options
from shared_graph.replica import Replica
from shared_graph.wire import Batch, ProcessInfo


class PlayedServer:
    """Has weights, nothing new to tell, and lives."""

    def __init__(self):
        self.called, self.weights, self.snapshot = [], None, None

    async def call(self, method: str, *arguments):
        self.called.append(method)
        if method == "get_weights":
            weights = self.weights
            await asyncio.sleep(0.1)
            return weights
        if method == "report" and self.snapshot:
            return self.snapshot
        await asyncio.sleep(1000)


class PlayedGraph:
    fingerprint, is_connected, own_thread = "", True, None

    def connect(self, *arguments):
        pass

    def disconnect(self, is_lost: bool = False):
        self.is_connected = False
        ending = threading.Thread()
        ending.start()
        return ending


SOURCES = {name: ModelSource(name, 1, function=f"{name}:build") for name in "ab"}
KEY, OTHER = ModelKey("a", 1), ModelKey("b", 1)
LOADED = LoadedVersion({}, "", (), (), False, "weights")
THERE, LEAVING = ModelVersion(SOURCES["a"], "AVAILABLE", None, LOADED), ModelVersion(SOURCES["a"], "UNLOADING")


@pytest.fixture
def replica(tmp_path, monkeypatch):
    """Of a parameter server that has nothing yet; call it inside the test's event loop."""
    monkeypatch.setattr(module, "fetched_bundle", lambda read: contextlib.nullcontext("folder"))

    def create(gpus: tuple[int, ...] = (), **options) -> Replica:
        info = ServerInfo(ProcessInfo(1, "node", [*gpus], None), "life", str(tmp_path), ["a:1"], Snapshot())
        return Replica(0, "life", Options(**options), PlayedServer(), info, lambda: None)

    return create


class Awaited(threading.Event):
    """Knows how often it was waited for."""

    waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return super().wait(timeout)


@pytest.fixture
def building(monkeypatch):
    """Graphs that are built from now on, and an event without which no build ends; one that is None fails."""
    graphs, may_end = [], Awaited()

    def build(*arguments, **kind):
        graph = graphs[-1]
        may_end.wait(10)
        if graph is None:
            raise ValueError("it is broken")
        return graph

    monkeypatch.setattr(module, "build_graph", build)
    monkeypatch.setattr(module, "warm_up", lambda graph: None)
    return graphs, may_end


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "gpus, placement, is_whole", [((), "shared", False), ((0,), "shared", True), ((), "mirrored", True)]
)
async def test_a_worker_leaves_out_what_nothing_runs_unless_it_restores_or_a_gpu_may_be_chosen_by_it(
    replica, monkeypatch, gpus, placement, is_whole
):
    built = []
    monkeypatch.setattr(module, "build_graph", lambda *arguments, **how: built.append(how) or PlayedGraph())
    monkeypatch.setattr(module, "warm_up", lambda graph: None)
    replica = replica(gpus, placement=placement)
    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: built)
    assert built[0] == {"folder": "folder", "is_whole": is_whole}
    replica.leave()


async def test_a_version_that_is_given_up_while_it_is_built_is_not_kept(replica, building):
    replica, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: may_end.waits)
    replica.apply(Snapshot(2, {KEY: LEAVING}, frozenset(), {}))
    may_end.set()
    await until(lambda: not replica._bringing_up)
    assert replica.graphs == {} and not graphs[0].is_connected
    replica.leave()


@pytest.mark.simulated
async def test_many_versions_are_built_a_few_at_once_and_the_time_of_others_is_not_theirs(replica, monkeypatch):
    """On two processors 25 at once took so long that most of them were over for good, and the event loop's life."""
    names, at_work, most = [f"m{index}" for index in range(20)], 0, 0
    build_s = module.LOAD_PATIENCE_S - 5
    assert len(names) / module.LOADED_AT_ONCE * build_s > module.BUILD_LIMIT_S

    async def build(*arguments):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(build_s)
        at_work -= 1
        return PlayedGraph()

    async def run(function, *arguments):
        return function(*arguments)

    monkeypatch.setattr(module, "build_in_own_thread", build)
    monkeypatch.setattr(module, "warm_up", lambda graph: None)
    monkeypatch.setattr(PlayedGraph, "own_thread", types.SimpleNamespace(run=run))
    mine = replica()
    there = {ModelKey(name, 1): THERE._replace(source=ModelSource(name, 1, function=f"{name}:build")) for name in names}
    mine.apply(Snapshot(1, there, frozenset(), {}))
    while mine._bringing_up:
        await mine.changed.wait()
        assert not mine.failed
    assert mine.graphs.keys() == there.keys() and most == module.LOADED_AT_ONCE
    mine.leave()


async def test_what_a_later_snapshot_has_is_not_dropped_by_an_earlier_one_that_waits_for_a_run(replica, building):
    mine, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    may_end.set()
    mine.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: KEY in mine.graphs)
    mine.runs["a"].add(run := asyncio.get_running_loop().create_future())
    shares = THERE._replace(loaded=LOADED._replace(batchable=("serving_default",)))
    mine.apply(Snapshot(2, {KEY: shares}, frozenset(), {}))  # for which it waits until the run has ended
    graphs.append(later := PlayedGraph())
    second = ModelVersion(SOURCES["a"]._replace(version=2), "LOADING", None, LOADED)
    mine.apply(Snapshot(3, {KEY: shares, second.key: second}, frozenset(), {}))
    await until(lambda: second.key in mine.graphs)
    mine.runs["a"].remove(run)
    run.set_result(None)
    await until(lambda: mine._settled["a"] == 3)
    assert mine.graphs[second.key] is later and later.is_connected
    mine.leave()


async def test_a_report_that_could_not_be_made_once_is_made_again(replica, building, monkeypatch):
    """Such as one that finds no worker, since Ray cannot tell just now: a worker that never reported again would keep
    old weights without anybody's waiting for it."""
    mine, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    may_end.set()
    monkeypatch.setattr(module, "RETRY_S", (0.01, 0.01))
    reports, may_fail = [], False

    async def call(method: str, *arguments):
        if method != "report":
            await asyncio.sleep(1000)
        reports.append(arguments[1])
        if may_fail and len(reports) % 3:
            raise ActorUnavailable("There is no worker 0.")
        return mine.snapshot

    mine.server.call = call
    await mine.catch_up(Snapshot(1, {KEY: THERE}, frozenset(), {}), 1000)
    may_fail = True
    for number in range(2, 6):
        mine.apply(Snapshot(number, {KEY: THERE}, frozenset(), {}))
        await until(lambda number=number: reports[-1].settled["a"] == number and len(reports) % 3 == 0)
    mine.leave()


async def test_a_graph_of_files_that_were_replaced_before_it_was_reported_is_built_anew(replica, building):
    replica, (graphs, may_end) = replica(), building
    graphs.append(before := PlayedGraph())
    may_end.set()
    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: replica.graphs == {KEY: before})
    graphs.append(after := PlayedGraph())
    after.fingerprint = "of other files"
    loaded = LOADED._replace(fingerprint=after.fingerprint, weights_id="others")
    replica.apply(Snapshot(3, {KEY: THERE._replace(loaded=loaded)}, frozenset(), {}))
    assert replica.graphs == {} and not before.is_connected
    await until(lambda: replica.graphs == {KEY: after} and replica.weights == {KEY: "others"})
    replica.leave()


async def test_a_worker_that_catches_up_when_the_parameter_server_dies_says_so_and_reports_to_no_other_life(
    replica, building
):
    """Its report made a good version of the next life END, or had that wait for ever."""
    replica, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    catching_up = asyncio.create_task(replica.catch_up(Snapshot(1, {KEY: THERE}, frozenset(), {}), 1000))
    await until(lambda: may_end.waits)
    replica.leave()
    with pytest.raises(ActorUnavailable):
        await asyncio.wait_for(catching_up, 10)
    assert "report" not in replica.server.called
    may_end.set()


async def test_what_a_report_brings_that_the_limit_cuts_short_is_not_lost(replica, building):
    """A pointer that moves waits for every worker that has reported."""
    mine, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    may_end.set()
    reports, later = [], Snapshot(2, {KEY: THERE}, frozenset(), {("a", None): None})

    async def call(method: str, *arguments):
        if method == "report":
            reports.append(arguments)
            await asyncio.sleep(0.5 if len(reports) == 1 else 0)  # the server has it, and its answer is on its way
            return later
        await asyncio.sleep(1000)

    mine.server.call = call
    await mine.catch_up(Snapshot(1, {KEY: THERE}, frozenset(), {}), 0.2)
    assert mine.snapshot == later and len(reports) == 2
    mine.leave()


async def test_what_came_while_a_worker_caught_up_is_there_before_it_is_ready(replica, building):
    replica, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    may_end.set()
    replica.server.snapshot = Snapshot(
        2, {KEY: THERE, OTHER: ModelVersion(SOURCES["b"], "AVAILABLE", None, LOADED)}, (), {}
    )
    await replica.catch_up(Snapshot(1, {KEY: THERE}, frozenset(), {}), 10)
    assert replica.graphs.keys() == {KEY, OTHER}
    replica.leave()


async def test_a_report_of_another_life_is_refused_and_one_of_this_life_is_taken(monkeypatch):
    monkeypatch.setattr(parameter_server, "this_process", lambda: ProcessInfo(1, "node", [], None))
    server = parameter_server.ParameterServer(0, Options(), "here", "run")
    server.workers[0] = "worker's life", PlayedServer()
    for incarnation in (None, "this life"):
        server.incarnation = incarnation
        with pytest.raises(ActorUnavailable):
            await server.report("another life", WorkerReport(0, "worker's life", {}, {}, {}))
    assert await server.report("this life", WorkerReport(0, "worker's life", {}, {}, {})) == server.manager.snapshot


async def test_a_mirror_is_not_answered_from_until_it_has_the_weights_that_were_set_while_it_was_built(
    replica, building, monkeypatch
):
    """``set_weights`` waits for those who have the version, and this worker has none yet."""
    replica, (graphs, may_end) = replica(placement="mirrored"), building

    class Mirror(PlayedGraph):
        weights = None

        @property
        def variables(self):
            return self

        def restore(self, weights):
            may_end.wait(10)
            self.weights = weights

        set_weights = lambda self, weights: setattr(self, "weights", weights)

    graphs.append(graph := Mirror())
    monkeypatch.setattr(module, "build_graph", lambda *arguments, **origin: graph)
    replica.server.weights = "old"
    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: may_end.waits)
    replica.server.weights = "new"
    others = ModelVersion(SOURCES["a"], "AVAILABLE", None, LOADED._replace(weights_id="others"))
    replica.apply(Snapshot(2, {KEY: others}, frozenset(), {}))
    may_end.set()
    await until(lambda: KEY in replica.graphs)
    assert (graph.weights, replica.weights) == ("new", {KEY: "others"})
    replica.leave()


async def test_a_graph_has_a_thread_of_its_own_as_long_as_it_lives_and_a_later_one_has_it_again(
    replica, building, monkeypatch
):
    """So their memory lies apart, see OwnThread."""
    replica, (graphs, may_end), threads = replica(), building, []
    monkeypatch.setattr(PlayedGraph, "connect", lambda *arguments: threads.append(threading.get_ident()))
    may_end.set()
    for number in range(1, 21):
        graphs[:] = [PlayedGraph()]
        keys = {ModelKey("a", version): THERE for version in (number, number - 1) if version}
        replica.apply(Snapshot(2 * number, keys, frozenset(), {}))
        await until(lambda: ModelKey("a", number) in replica.graphs)
        replica.apply(Snapshot(2 * number + 1, {ModelKey("a", number): THERE}, frozenset(), {}))
        await until(lambda: replica.graphs.keys() == {ModelKey("a", number)})
        graphs.clear()
    assert all(one != next_one for one, next_one in itertools.pairwise(threads)) and len(set(threads)) < 6
    replica.leave()


async def test_a_version_that_has_failed_is_tried_anew_when_it_is_loaded_anew(replica, building, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", (0.01, 0.01))
    replica, (graphs, may_end) = replica(), building
    graphs.append(None)
    may_end.set()
    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {}))
    await until(lambda: "broken" in replica.failed.get(KEY, ""))
    replica.apply(Snapshot(2, {KEY: ModelVersion(SOURCES["a"], "END", "it is broken")}, frozenset(), {}))
    assert replica.failed == {}
    await until(lambda: not replica._bringing_up)
    assert replica.failed == {}
    graphs.append(PlayedGraph())
    replica.apply(Snapshot(3, {KEY: THERE}, frozenset(), {}))
    await until(lambda: replica.graphs == {KEY: graphs[-1]} and not replica.failed)
    replica.leave()


async def test_a_version_that_is_dropped_is_kept_for_what_runs_on_it_whatever_comes_meanwhile(replica):
    replica, graph = replica(), PlayedGraph()
    replica.graphs[KEY], replica.weights[KEY] = graph, "weights"

    async def is_still(settled: int) -> bool:
        """Is this the last snapshot up to which the model is settled, a moment after it was?"""
        await until(lambda: replica._settled.get("a") == settled)
        await asyncio.sleep(0.01)
        return replica._settled["a"] == settled

    replica.apply(Snapshot(1, {KEY: THERE}, frozenset(), {("a", None): 1}))
    assert await is_still(1)
    run = asyncio.get_running_loop().create_future()
    replica.runs["a"].add(run)
    with_other = {KEY: LEAVING, OTHER: ModelVersion(SOURCES["b"], "LOADING")}
    for number, versions in enumerate([{KEY: THERE}, {KEY: LEAVING}, with_other], 2):
        replica.apply(Snapshot(number, versions))
        assert await is_still(1)
    assert graph.is_connected
    replica.runs["a"] = {begun_since := asyncio.get_running_loop().create_future()}
    run.set_result(None)
    assert await is_still(2) and graph.is_connected
    begun_since.set_result(None)
    replica.apply(Snapshot(5, {KEY: LEAVING}))
    assert await is_still(5) and not graph.is_connected
    replica.leave()


numbers = itertools.count(1)


def there(**changes) -> Snapshot:
    """In which the version is loaded, with what is other about it. The next call makes a later one."""
    return Snapshot(next(numbers), {KEY: THERE._replace(loaded=LOADED._replace(**changes))}, frozenset(), {})


async def test_when_the_parameter_server_is_gone_that_is_told_once_and_nothing_runs_or_begins(replica, building):
    replica, (graphs, may_end), told = replica(), building, []
    replica._left = lambda: told.append("left")
    graphs.append(PlayedGraph())
    may_end.set()
    replica.apply(there())
    await until(lambda: KEY in replica.graphs)
    changed, tasks = asyncio.create_task(replica.changed.wait()), set(replica._tasks)
    await asyncio.sleep(0)
    for _ in range(2):
        replica.leave()
    replica.apply(Snapshot(next(numbers), {OTHER: ModelVersion(SOURCES["b"], "AVAILABLE", None, LOADED)}))
    await asyncio.wait_for(changed, 1)
    await asyncio.wait_for(asyncio.wait(tasks), 1)
    assert told == ["left"] and not graphs[0].is_connected and not replica._bringing_up


async def test_a_graph_of_a_version_that_was_loaded_anew_while_it_was_built_is_built_anew(replica, building):
    replica, (graphs, may_end) = replica(), building
    graphs.append(first := PlayedGraph())
    replica.apply(there())
    await until(lambda: may_end.waits)
    graphs.append(second := PlayedGraph())
    second.fingerprint = "second"
    replica.apply(there(fingerprint="second", weights_id="second"))
    may_end.set()
    await until(lambda: KEY in replica.graphs and not replica._bringing_up)
    assert replica.graphs == {KEY: second} and not first.is_connected and second.is_connected
    replica.leave()


async def test_a_graph_that_is_not_the_one_of_the_parameter_server_is_not_used(replica, building):
    replica, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    may_end.set()
    replica.apply(there(fingerprint="another"))
    await until(lambda: "loaded anew" in replica.failed.get(KEY, ""))
    assert replica.graphs == {}
    replica.leave()


async def test_a_version_that_goes_and_comes_back_with_the_same_weights_is_there_again(replica, building):
    replica, (graphs, may_end) = replica(), building
    may_end.set()
    for _ in range(2):
        graphs.append(PlayedGraph())
        replica.apply(there())
        await until(lambda: replica.graphs == {KEY: graphs[-1]})
        replica.apply(Snapshot(next(numbers), {KEY: LEAVING}))
        await until(lambda: replica.graphs == {})
    replica.leave()


async def test_a_version_that_fails_or_takes_too_long_is_tried_again_and_is_no_failure_when_it_is_there(
    replica, building, monkeypatch
):
    monkeypatch.setattr(module, "RETRY_S", (0.01, 0.02))
    monkeypatch.setattr(module, "BUILD_LIMIT_S", 0.05)
    replica, (graphs, may_end) = replica(), building
    graphs.append(PlayedGraph())
    replica.apply(there())
    await until(lambda: replica.failed == {KEY: "it took too long"})
    graphs.append(None)
    may_end.set()
    await until(lambda: replica.failed == {KEY: "it is broken"})
    graphs.append(PlayedGraph())
    await until(lambda: replica.graphs == {KEY: graphs[-1]} and not replica._bringing_up)
    assert replica.failed == {}
    replica.leave()


async def test_a_first_run_that_does_not_end_keeps_no_version_from_being_used(replica, building, monkeypatch):
    monkeypatch.setattr(module, "WARM_UP_LIMIT_S", 0.05)
    replica, (graphs, may_end), ended = replica(), building, threading.Event()
    monkeypatch.setattr(module, "warm_up", lambda graph: ended.wait(20))
    graphs.append(PlayedGraph())
    may_end.set()
    replica.apply(there())
    await until(lambda: replica.graphs == {KEY: graphs[0]})
    ended.set()
    replica.leave()


async def test_what_a_run_shows_is_told_of_the_weights_with_which_it_began(replica, monkeypatch):
    """A mirror may get others while it runs, which then is no sign of whether runs can be shared."""
    mine, graph = replica(placement="mirrored"), PlayedGraph()
    now = THERE._replace(loaded=LOADED._replace(weights_id="new"))
    mine.snapshot = Snapshot(1, {KEY: now}, frozenset(), {("a", None): 1})
    mine.graphs[KEY], mine.weights[KEY] = graph, "old"

    class Runner:
        def __init__(self, graph, loaded, exact, reply, observe, shared_runs):
            self.observe = observe

        def answer(self, requests, arrived):
            mine.weights[KEY] = "new"
            self.observe("serving_default", False)

    monkeypatch.setattr(worker, "BatchRunner", Runner)
    its = object.__new__(worker.Worker)
    its.index, its.options, its.loop, its.compute = 0, mine.options, asyncio.get_running_loop(), worker.Lane(1)
    told = []
    monkeypatch.setattr(mine, "observe", lambda *what: told.append(what))
    await its._run(mine, Batch(0, ("a", None), "", [("arrays", None, 60.0, False)]), lambda answers: None)
    await asyncio.sleep(0)
    assert told == [(KEY, "old", "serving_default", False)]
    mine.leave()


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_run_that_never_ends_ends_the_worker_unless_its_parameter_server_has_gone_and_it_waits_for_that(
    replica, monkeypatch, is_lost
):
    mine, graph, may_end = replica(), PlayedGraph(), Awaited()
    mine.snapshot = Snapshot(1, {KEY: THERE}, frozenset(), {("a", None): 1})
    mine.graphs[KEY], mine.weights[KEY], graph.cancel_runs = graph, "weights", lambda: None
    graph.is_mirror = False
    monkeypatch.setattr(worker, "BatchRunner", lambda *about: types.SimpleNamespace(answer=lambda *a: may_end.wait(10)))
    monkeypatch.setattr(worker, "OVERDUE_S", 0.1)
    its = object.__new__(worker.Worker)
    its.index, its.options, its.loop, its.compute = 0, mine.options, asyncio.get_running_loop(), worker.Lane(1)
    its.tasks, its.overdue = set(), {}
    run = asyncio.create_task(its._run(mine, Batch(0, ("a", None), "", [("arrays", None, 0.1, False)]), lambda a: None))
    await until(lambda: may_end.waits)
    if is_lost:
        mine.leave()
        await asyncio.sleep(0.4)
        assert not its.overdue
    else:
        await until(lambda: its.overdue)
    may_end.set()
    await run
    mine.leave()


async def test_how_often_runs_were_shared_is_known_until_there_are_other_weights_whatever_other_models_do(replica):
    mine = replica()
    mine.apply(Snapshot(1, {KEY: THERE}))
    mine.shared_runs["weights", "serving_default"] = 100
    mine.apply(Snapshot(2, {KEY: THERE, OTHER: ModelVersion(SOURCES["b"], "LOADING")}))
    assert mine.shared_runs == {("weights", "serving_default"): 100}
    mine.apply(Snapshot(3, {KEY: THERE._replace(loaded=LOADED._replace(weights_id="new"))}))
    assert not mine.shared_runs
    mine.leave()
