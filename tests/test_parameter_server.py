"""The actor's own part, without Ray and TensorFlow: whom it watches, and when a shared cluster ends."""

import asyncio

import pytest

import shared_graph.parameter_server as module
from shared_graph.errors import ActorUnavailable, OptionError
from shared_graph.models import WorkerReport
from shared_graph.options import Options
from shared_graph.parameter_server import IDLE_SHUTDOWN_S, ParameterServer
from shared_graph.wire import ProcessInfo

pytestmark = pytest.mark.simulated


class Played:
    """What is found of this name, and ended."""

    def __init__(self, name: str, events: list[str]):
        self.name, self.events, self.watches, self.failures = name, events, 0, 0
        self.is_endless = False

    async def call(self, method: str, *arguments):
        assert method == "death_watch"
        if self.failures:
            self.failures -= 1
            raise ActorUnavailable("its connection was reset")
        self.watches += 1
        await asyncio.sleep(10**6)

    def end(self) -> None:
        if self.is_endless:
            raise RuntimeError("can't start new thread")
        self.events.append(f"end {self.name}")


@pytest.fixture
def make(monkeypatch):
    """``make(**options)``: a parameter server that has started, what is found by name, and what has happened."""
    found, events = {}, []

    async def find(name: str, namespace: str) -> Played:
        await asyncio.sleep(0.005)
        return found.setdefault(name, Played(name, events))

    async def in_thread(function, *arguments):
        await asyncio.sleep(0.005)
        return function(*arguments)

    monkeypatch.setattr(module, "find_actor", find)
    monkeypatch.setattr(module, "this_process", lambda: ProcessInfo(1, "node", [], None))
    monkeypatch.setattr(module, "this_actor", lambda: Played("itself", events))
    monkeypatch.setattr(module.asyncio, "to_thread", in_thread)
    monkeypatch.setattr(module, "in_own_thread", in_thread)

    def make(**options):
        server = ParameterServer(0, Options(**options), "namespace", "run of a test")
        server.incarnation, server.addresses = "life", ["a:1"]
        return server, found, events

    return make


async def test_a_worker_that_could_not_be_called_once_is_watched_again_when_it_reports(make):
    server, found, events = make()
    found["worker 0"] = worker = Played("worker 0", events)
    worker.failures = 1
    for watches in (0, 1, 1):
        await server.report("life", WorkerReport(0, "its life", {}, {}, {}))
        await asyncio.sleep(1)
        assert worker.watches == watches


async def test_a_shared_cluster_ends_with_all_of_its_actors_when_nobody_asks(make):
    server, _, events = make(address="auto", workers=2, parameter_servers=2)
    for _ in range(30):
        await server.ping(7)
        await asyncio.sleep(IDLE_SHUTDOWN_S / 2)
    assert events == []
    await asyncio.sleep(2 * IDLE_SHUTDOWN_S)
    assert events == ["end parameter server 1", "end worker 0", "end worker 1", "end itself"]


async def test_who_cannot_have_a_shared_cluster_does_not_keep_it_however_often_that_comes(make):
    """Such as a front end of other code, which a supervisor starts again and again."""
    server, _, events = make(address="auto", workers=1)
    for _ in range(30):
        with pytest.raises(OptionError, match="runs with other options"):
            await server.start(server.options.shared | {"--workers": "3"})
        await server.ping(0)
        await asyncio.sleep(1)
    assert events[-1] == "end itself"


async def test_who_comes_while_a_shared_cluster_ends_is_not_told_that_it_is_there(make):
    """It would make workers that nobody ends."""
    server, _, events = make(address="auto", workers=3)
    while not events:
        await asyncio.sleep(0.001)
    coming = asyncio.create_task(server.start(server.options.shared))
    await asyncio.sleep(60)
    assert events[-1] == "end itself" and not coming.done()
    coming.cancel()


async def test_what_nobody_foresaw_leaves_no_cluster_that_neither_ends_nor_begins(make):
    _, found, events = make(address="auto", workers=2)
    found["worker 0"] = Played("worker 0", events)
    found["worker 0"].is_endless = True
    await asyncio.sleep(3 * IDLE_SHUTDOWN_S)
    assert events == ["end worker 1", "end itself"]
