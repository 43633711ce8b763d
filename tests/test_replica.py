"""What a worker has of a parameter server, with one that the tests play."""

import asyncio

from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelKey, ModelVersion, ServerInfo, Snapshot
from shared_graph.options import Options
from shared_graph.replica import Replica
from shared_graph.wire import ProcessInfo


class PlayedServer:
    """Has nothing new to tell, and lives."""

    async def call(self, method: str, *arguments):
        await asyncio.sleep(1000)


class PlayedGraph:
    signatures, is_connected = {}, True

    def disconnect(self):
        self.is_connected = False


async def test_a_version_that_is_dropped_is_kept_for_what_runs_on_it_whatever_comes_meanwhile(tmp_path):
    info = ServerInfo(ProcessInfo(1, "node", [], None), "life", str(tmp_path), ["a:1"], Snapshot())
    replica = Replica(0, "life", Options(), PlayedServer(), info, lambda: None)
    key, other, graph = ModelKey("a", 1), ModelKey("b", 1), PlayedGraph()
    sources = {name: ModelSource(name, 1, f"/{name}") for name in "ab"}
    replica.graphs[key], replica._weights[key] = graph, "weights"
    loaded = LoadedVersion({}, "", (), (), (), False, "weights")

    async def settled(snapshot_id: int, versions: dict, pointers: dict) -> int:
        """Up to which snapshot the model is settled when this one has come."""
        replica.apply(Snapshot(snapshot_id, versions, frozenset(), pointers))
        await asyncio.sleep(0.01)
        return replica._settled["a"]

    there, leaving = ModelVersion(sources["a"], "AVAILABLE", None, loaded), ModelVersion(sources["a"], "UNLOADING")
    assert await settled(1, {key: there}, {("a", None): 1}) == 1
    run = asyncio.get_running_loop().create_future()
    replica.runs["a"].add(run)
    assert await settled(2, {key: leaving}, {}) == 1
    assert await settled(3, {key: leaving, other: ModelVersion(sources["b"], "LOADING")}, {}) == 1
    assert graph.is_connected
    run.set_result(None)
    assert await settled(4, {key: leaving}, {}) == 4 and not graph.is_connected
    replica.leave()
