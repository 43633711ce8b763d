"""What is served: versions that come, change, fail, hang and go, with workers and a parameter server that the tests
play, on a clock that jumps."""

import asyncio
import contextlib
import random

import pytest

from shared_graph.errors import InvalidRequest, ModelError, Unavailable
from shared_graph.model_source import ModelSource
from shared_graph.models import LoadedVersion, ModelKey, Snapshot, WorkerReport
from shared_graph.version_manager import BRING_UP_LIMIT_S, EVIDENCE, Found, VersionManager

pytestmark = pytest.mark.simulated

NAMES = ("m", "n")


class PlayedWorker:
    """Follows snapshots as a worker does, each step after a delay of its own, and asks what clients would ask."""

    def __init__(self, stage: "Stage", index: int, life: int):
        self.stage, self.index, self.life = stage, index, str(life)
        self.snapshot, self.ready, self.failed, self.settled = Snapshot(), {}, {}, {}
        self.is_alive = True
        self.tasks = [asyncio.create_task(self.follow())]
        self.news = asyncio.Event()

    def sync(self, snapshot: Snapshot) -> None:
        if snapshot.snapshot_id > self.snapshot.snapshot_id:
            self.snapshot = snapshot
            self.news.set()

    async def follow(self) -> None:
        self.sync(self.stage.manager.snapshot)
        while True:
            snapshot = self.snapshot
            for name in NAMES:
                await self.stage.pause()  # what runs by the old rules has ended
                self.settled[name] = snapshot.snapshot_id
            self.ready = {key: w for key, w in self.ready.items() if snapshot.versions.get(key, NONE).loaded}
            self.failed = {key: why for key, why in self.failed.items() if snapshot.versions.get(key, NONE).loaded}
            for key, version in snapshot.versions.items():
                if version.loaded and self.ready.get(key) != version.loaded.weights_id:
                    await self.bring_up(key, version.loaded)
            if self.snapshot is snapshot:
                self.report()
                self.news.clear()
                await self.news.wait()
            self.report()

    async def bring_up(self, key: ModelKey, loaded: LoadedVersion) -> None:
        fate = self.stage.fates.get((self.index, key))
        await self.stage.pause()
        if fate == "hangs":
            return
        if fate == "fails":
            self.failed[key] = "it cannot"
        else:
            self.ready[key] = loaded.weights_id
        self.report()

    def report(self) -> None:
        if self.is_alive:
            report = WorkerReport(self.index, self.life, dict(self.settled), dict(self.ready), dict(self.failed))
            self.stage.manager.report(report)

    def answer(self, name: str, choice) -> int | None:
        """The version that a client gets from this worker now; None: it has to wait."""
        version = self.snapshot.find(name, choice)
        return version.version if version and version.key in self.ready else None

    def kill(self) -> None:
        self.is_alive = False
        for task in self.tasks:
            task.cancel()
        self.stage.manager.worker_lost(self.index, self.life)


NONE = type("None", (), {"loaded": None})


class Stage:
    """A manager, what lies in the folders, and who is told."""

    def __init__(self, seed: int = 0):
        self.chance = random.Random(seed)
        self.folders = {name: {1: "files 1"} for name in NAMES}  # version to its files
        self.labels: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self.bad: set[tuple[str, int, str]] = set()  # model, version and files that cannot be loaded
        self.fates: dict[tuple[int, ModelKey], str] = {}
        self.on_server: set[ModelKey] = set()
        self.workers: dict[int, PlayedWorker] = {}
        self.lives, self.longest_s = 0, 1.0
        sources = [ModelSource(name, None, f"/{name}") for name in NAMES]
        self.manager = VersionManager(sources, self.look, self.load, self.unload, self.publish)

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, self.longest_s))

    async def look(self, source: ModelSource) -> Found:
        files = self.folders[source.name]
        versions = {number: source._replace(version=number) for number in files}
        return Found(versions, dict(self.labels[source.name]), {number: [files[number]] for number in files})

    async def load(self, source: ModelSource) -> LoadedVersion:
        files = self.folders[source.name].get(source.version)
        await self.pause()
        if (source.name, source.version, files) in self.bad:
            raise ModelError("it is broken")
        key = ModelKey(source.name, source.version)
        self.on_server.add(key)
        return LoadedVersion({}, "", (), ("serving_default",), (), False, "first")

    async def unload(self, key: ModelKey) -> None:
        for worker in self.workers.values():
            assert key not in worker.ready or not worker.is_alive, "what a worker has is taken away"
        await self.pause()
        self.on_server.discard(key)

    def publish(self, snapshot: Snapshot) -> None:
        for worker in self.workers.values():
            asyncio.get_running_loop().call_later(self.chance.uniform(0, 0.1), worker.sync, snapshot)

    def start_worker(self, index: int) -> PlayedWorker:
        self.lives += 1
        self.workers[index] = PlayedWorker(self, index, self.lives)
        return self.workers[index]

    async def look_every_second(self, name: str) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await self.manager.reconcile(name)
            await asyncio.sleep(1)

    def state(self, name: str, number: int) -> str | None:
        version = self.manager.snapshot.versions.get(ModelKey(name, number))
        return version and version.state

    def latest(self, name: str) -> int | None:
        return self.manager.snapshot.pointers.get((name, None))


@contextlib.asynccontextmanager
async def playing(seed: int = 0, workers: int = 2):
    stage = Stage(seed)
    for index in range(workers):
        stage.start_worker(index)
    tasks = [asyncio.create_task(stage.look_every_second(name)) for name in NAMES]
    try:
        yield stage
    finally:
        for task in [*tasks, *(task for worker in stage.workers.values() for task in worker.tasks)]:
            task.cancel()


async def test_a_version_is_loaded_used_replaced_and_unloaded():
    async with playing() as stage:
        await asyncio.sleep(20)
        assert stage.latest("m") == 1 and stage.state("m", 1) == "AVAILABLE" and len(stage.on_server) == 2
        stage.folders["m"][2] = "files 2"
        seen = []
        for _ in range(200):
            await asyncio.sleep(0.1)
            seen.append((stage.state("m", 1), stage.state("m", 2), stage.latest("m")))
        assert (
            list(dict.fromkeys(seen))
            == [
                ("AVAILABLE", None, 1),
                ("AVAILABLE", "LOADING", 1),
                ("AVAILABLE", "AVAILABLE", None),
                *(("AVAILABLE", "AVAILABLE", 2),) * (("AVAILABLE", "AVAILABLE", 2) in seen),
                ("UNLOADING", "AVAILABLE", 2),
                (None, "AVAILABLE", 2),
            ]
            or ("AVAILABLE", "AVAILABLE", 1) in seen
        )
        assert seen[-1] == (None, "AVAILABLE", 2) and stage.on_server == {("m", 2), ("n", 1)}


@pytest.mark.parametrize("fate", ["fails", "hangs"])
async def test_a_version_that_one_worker_cannot_have_is_end_and_touches_nothing_else(fate):
    async with playing() as stage:
        await asyncio.sleep(20)
        stage.fates[1, ModelKey("m", 2)] = fate
        stage.folders["m"][2] = "files 2"
        await asyncio.sleep(10)
        stage.folders["n"][2] = "files 2"
        await asyncio.sleep(20)
        assert stage.latest("n") == 2, "it waits for another model"
        await asyncio.sleep(BRING_UP_LIMIT_S)
        assert stage.state("m", 2) == "END" and stage.latest("m") == 1 and stage.state("m", 1) == "AVAILABLE"
        assert "worker 1" in stage.manager.snapshot.versions["m", 2].error
        assert ModelKey("m", 2) not in stage.on_server
        stage.fates.clear()
        await asyncio.sleep(20)
        assert stage.state("m", 2) == "END", "it is tried again though its files are the same"
        stage.folders["m"][2] = "other files"
        await asyncio.sleep(20)
        assert stage.latest("m") == 2


async def test_files_that_still_change_are_left_alone_and_what_is_broken_is_told_once_and_gone_with_its_files():
    async with playing() as stage:
        stage.bad.add(("m", 3, "broken"))
        await asyncio.sleep(20)
        for part in range(10):
            stage.folders["m"][3] = f"part {part}"
            await asyncio.sleep(1)
            assert stage.state("m", 3) is None
        stage.folders["m"][3] = "broken"
        await asyncio.sleep(10)
        version = stage.manager.snapshot.versions["m", 3]
        assert version.state == "END" and version.error == "Model m (/m) cannot be loaded: it is broken"
        number = stage.manager.snapshot.snapshot_id
        await asyncio.sleep(100)
        assert stage.manager.snapshot.snapshot_id == number, "it is tried again and again"
        del stage.folders["m"][3]
        await asyncio.sleep(3)
        assert stage.state("m", 3) is None and stage.latest("m") == 1


async def test_a_label_stands_for_a_version_until_it_is_moved_and_one_that_leads_nowhere_is_told():
    async with playing() as stage:
        stage.folders["m"][2] = "files 2"
        stage.labels["m"] = {"stable": 1, "lost": 7}
        await asyncio.sleep(20)
        assert stage.manager.snapshot.pointers["m", "stable"] == 1 and stage.latest("m") == 2
        assert "'lost'" in stage.manager.snapshot.versions["m", 7].error
        stage.labels["m"] = {"stable": 2}
        await asyncio.sleep(20)
        pointers = {key: number for key, number in stage.manager.snapshot.pointers.items() if key[0] == "m"}
        assert pointers == {("m", None): 2, ("m", "stable"): 2}
        assert stage.on_server == {("m", 2), ("n", 1)} and stage.state("m", 7) is None


async def test_without_workers_a_version_is_available_and_a_worker_that_comes_later_is_waited_for():
    async with playing(workers=0) as stage:
        await asyncio.sleep(20)
        assert stage.state("m", 1) == "AVAILABLE"
        stage.start_worker(0)
        await asyncio.sleep(20)
        stage.fates[1, ModelKey("m", 1)] = "fails"
        stage.start_worker(1)
        await asyncio.sleep(20)
        version = stage.manager.snapshot.versions["m", 1]
        assert (version.state, version.missing_on) == ("LOADING", (1,)) and "worker 1: it cannot" in version.error
        assert stage.latest("m") == 1, "what others have is taken away"
        stage.workers[1].kill()
        assert stage.state("m", 1) == "AVAILABLE"


async def test_a_version_that_fails_in_every_worker_before_any_had_it_is_over():
    async with playing(workers=0) as stage:
        await asyncio.sleep(20)
        stage.fates[0, ModelKey("m", 1)] = stage.fates[1, ModelKey("m", 1)] = "fails"
        for index in range(2):
            stage.start_worker(index)
        await asyncio.sleep(20)
        version = stage.manager.snapshot.versions["m", 1]
        assert version.state == "END" and "worker 0: it cannot" in version.error
        assert stage.manager.snapshot.find("m", None) is None and stage.state("n", 1) == "AVAILABLE"


async def test_while_weights_change_nothing_shares_a_run_and_afterwards_every_worker_has_the_new_ones():
    async with playing() as stage:
        await asyncio.sleep(20)
        key, seen = ModelKey("m", 1), []

        async def change(loaded: LoadedVersion) -> LoadedVersion:
            for worker in stage.workers.values():
                seen.append(worker.snapshot.versions[key].loaded.batchable)
            await stage.pause()
            return LoadedVersion({}, "", (), (), ("serving_default",), False, "second")

        await stage.manager.change_weights(key, change)
        assert seen == [(), ()]
        assert all(worker.ready[key] == "second" for worker in stage.workers.values())

        async def fail(loaded: LoadedVersion) -> LoadedVersion:
            raise InvalidRequest("wrong shape")

        before = stage.manager.snapshot.versions[key]
        with pytest.raises(InvalidRequest):
            await stage.manager.change_weights(key, fail)
        assert stage.manager.snapshot.versions[key] == before


async def test_some_observations_decide_whether_requests_share_runs_and_those_of_other_weights_do_not_count():
    async with playing() as stage:
        await asyncio.sleep(20)
        key, manager = ModelKey("m", 1), stage.manager

        def loaded() -> LoadedVersion:
            return manager.snapshot.versions[key].loaded

        for _ in range(EVIDENCE):
            assert loaded().batchable == ("serving_default",), "one odd answer may be an accident"
            manager.observe(key, "serving_default", "first", False)
            manager.observe(key, "serving_default", "of before", False)
        assert loaded().batchable == ()

        async def change(loaded: LoadedVersion) -> LoadedVersion:
            return loaded._replace(undecided=("serving_default",), weights_id="second")

        await manager.change_weights(key, change)
        for _ in range(EVIDENCE):
            assert loaded().batchable == ()
            manager.observe(key, "serving_default", "second", True)
        assert loaded().batchable == ("serving_default",) and loaded().undecided == ()
        await manager.change_weights(key, change)
        manager.observe(key, "serving_default", "second", False)
        assert loaded().batchable == loaded().undecided == (), "before they have ever shared a run one is enough"


@pytest.mark.parametrize("seed", range(100))
async def test_no_client_sees_a_version_go_back_and_all_settles_whatever_happens(seed):
    """Versions come, change, are broken, hang in a worker and go; workers die at any step; labels move."""
    chance = random.Random(seed)
    async with playing(seed, workers=3) as stage:
        stage.longest_s = chance.choice([0.01, 0.5, 3.0])
        seen: dict[tuple, int] = {}
        newest = dict.fromkeys(NAMES, 1)

        def look() -> None:
            for name, choice in stage.manager.snapshot.pointers:
                for worker in stage.workers.values():
                    if choice is None and (version := worker.answer(name, choice)) is not None:
                        assert version >= seen.get((name, choice), 0), f"{name} goes back to version {version}"
                        seen[name, choice] = version
            for key, version in stage.manager.snapshot.versions.items():
                if version.state == "AVAILABLE":
                    reports = stage.manager._reports.values()
                    assert key in stage.on_server and all(key in report.ready for report in reports)

        for _ in range(60):
            name = chance.choice(NAMES)
            what = chance.choice(["new", "new", "broken", "hang", "fail", "remove", "label", "kill", "nothing"])
            if what in ("new", "broken", "hang", "fail"):
                newest[name] += 1
                number = newest[name]
                stage.folders[name][number] = f"files {number}"
                if what == "broken":
                    stage.bad.add((name, number, f"files {number}"))
                elif what != "new":
                    stage.fates[chance.randrange(3), ModelKey(name, number)] = f"{what}s"
            elif what == "remove" and (old := [v for v in stage.folders[name] if v < (stage.latest(name) or 0)]):
                del stage.folders[name][chance.choice(old)]
            elif what == "label":
                stage.labels[name] = {"stable": chance.choice(list(stage.folders[name]))}
            elif what == "kill":
                stage.workers[index := chance.randrange(3)].kill()
                stage.start_worker(index)
            for _ in range(chance.randint(1, 40)):
                await asyncio.sleep(0.25)
                look()
        await asyncio.sleep(8 * BRING_UP_LIMIT_S)
        look()
        for name in NAMES:
            good = {
                number
                for number, files in stage.folders[name].items()
                if (name, number, files) not in stage.bad
                and not any(key == ModelKey(name, number) for _, key in stage.fates)
            }
            assert stage.latest(name) is not None and (not good or stage.latest(name) >= max(good))
        in_use = {ModelKey(name, number) for (name, _), number in stage.manager.snapshot.pointers.items()}
        assert stage.on_server == in_use, "memory is not given back"
