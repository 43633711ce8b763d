"""What is served: versions that come, change, fail, hang and go, with workers and a parameter server that the tests
play, on a clock that jumps."""

import asyncio
import contextlib
import errno
import functools
import itertools
import random
from collections.abc import Callable

import pytest
from conftest import long

from shared_graph.errors import InvalidRequest, ModelError, Unavailable
from shared_graph.model_source import Found, ModelSource
from shared_graph.models import LoadedVersion, ModelKey, Snapshot, WorkerReport
from shared_graph.version_manager import EVIDENCE, SILENT_LIMIT_S, VersionManager

pytestmark = pytest.mark.simulated

NAMES = ("m", "n")
FATES = ("hangs", "fails", "is slow")  # of a version in a worker
SLOW_S = 20.0


class PlayedWorker:
    """Follows the snapshots of a life of the parameter server as a worker does, each step after a delay of its own, and
    asks what clients would ask. While there is no parameter server it waits for one."""

    def __init__(self, stage: "Stage", index: int, life: int):
        self.stage, self.index, self.life = stage, index, life
        self.incarnation, self.has_reported = None, False
        self.snapshot, self.ready, self.failed, self.settled = Snapshot(), {}, {}, {}
        self.is_alive = True
        self.tasks = [asyncio.create_task(self.follow())]
        self.news = asyncio.Event()

    def sync(self, incarnation: int, snapshot: Snapshot) -> None:
        if incarnation == self.incarnation and snapshot.snapshot_id > self.snapshot.snapshot_id:
            self.snapshot = snapshot
            self.news.set()

    async def follow(self) -> None:
        await self.stage.pause()
        await self.stage.serving.wait()
        self.incarnation = self.stage.incarnation
        self.sync(self.incarnation, self.stage.manager.snapshot)
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
        if fate == "is slow":
            await asyncio.sleep(SLOW_S)
        now = self.snapshot.versions.get(key, NONE).loaded
        if fate == "fails":
            self.failed[key] = "it cannot"
        elif now and now.fingerprint == loaded.fingerprint:
            self.ready[key] = now.weights_id
        self.report()

    def report(self) -> None:
        if self.is_alive:
            self.has_reported = True
            state = dict(self.settled), dict(self.ready), dict(self.failed)
            self.stage.report(WorkerReport(self.index, str(self.life), *state))

    def answer(self, name: str, choice) -> int | None:
        """The version that a client gets from this worker now; None: it has to wait, or gets an error."""
        if not self.is_in_touch():
            return None
        version = self.snapshot.find(name, choice)
        return version.key.version if version and version.key in self.ready else None

    def has(self, key: ModelKey) -> bool:
        return key in self.ready

    def is_in_touch(self) -> bool:
        """Front ends close their connections when the parameter server dies, and connect anew when a worker has begun
        with the next one."""
        return self.is_alive and self.stage.serving.is_set() and self.incarnation == self.stage.incarnation

    def end(self) -> None:
        self.is_alive = False
        for task in self.tasks:
            task.cancel()


NONE = type("None", (), {"loaded": None})


class Stage:
    """A parameter server's manager, in one life after the other; what lies in the folders, and who is told."""

    def __init__(self, seed: int = 0, make_worker: Callable = PlayedWorker):
        self.chance, self.make_worker = random.Random(seed), make_worker
        self.folders = {name: {1: "files 1"} for name in NAMES}  # version to its files
        self.labels: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self.unreadable: set[str] = set()  # models whose folders cannot be looked into
        self.bad: set[tuple[str, int, str]] = set()  # model, version and files that cannot be loaded
        self.fates: dict[tuple[int, ModelKey], str] = {}
        self.on_server: set[ModelKey] = set()
        self.files: dict[ModelKey, str] = {}  # that are loaded
        self.weights: dict[ModelKey, str] = {}  # the number of those that it has; later ones have higher numbers
        self.weights_set: dict[ModelKey, str] = {}  # of this life, that everyone has
        self.workers: dict[int, PlayedWorker] = {}
        self.lives, self.loads, self.longest_s, self.news_s = 0, 0, 1.0, 0.1
        self.incarnation, self.serving, self.tasks = 0, asyncio.Event(), []
        self.start_server()

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, self.longest_s))

    # -- the parameter server ------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        """A new life, which knows what lies in the folders, and nothing of the life before."""
        self.incarnation += 1
        self.death = asyncio.Event()
        publish = functools.partial(self.publish, self.incarnation)
        sources = [ModelSource(name, None, f"/{name}") for name in NAMES]
        self.manager = VersionManager(sources, self.look, self.load, self.unload, publish)
        self.tasks = [asyncio.create_task(self.look_every_second(name)) for name in NAMES]
        self.serving.set()

    def kill_server(self) -> None:
        """It is back in some seconds. Each worker hears of that when it hears of it, which may be later than that."""
        loop = asyncio.get_running_loop()
        self.serving.clear()
        self.death.set()
        self.on_server.clear()
        self.weights_set.clear()
        for task in self.tasks:
            task.cancel()
        loop.call_later(self.chance.uniform(0.5, 4), self.start_server)
        for worker in self.workers.values():
            loop.call_later(self.chance.uniform(0, 5), self.leave_server, worker)

    async def look(self, source: ModelSource) -> Found:
        files = self.folders[source.name]
        if source.name in self.unreadable:
            raise OSError(errno.EACCES, "Permission denied")
        versions = {number: source._replace(version=number) for number in files}
        return Found(versions, dict(self.labels[source.name]), {number: [files[number]] for number in files})

    async def load(self, source: ModelSource) -> LoadedVersion:
        files = self.folders[source.name].get(source.version)
        await self.pause()
        if (source.name, source.version, files) in self.bad:
            raise ModelError("it is broken")
        key = ModelKey(source.name, source.version)
        self.on_server.add(key)
        self.files[key], self.weights[key] = files, self.next_weights()
        return LoadedVersion({}, files, ("serving_default",), (), False, self.weights[key])

    def next_weights(self) -> str:
        self.loads += 1
        return f"{self.loads:06}"

    async def set_weights(self, name: str) -> None:
        """Of the latest version, if there is one."""
        key = ModelKey(name, self.latest(name) or 0)

        async def change(loaded: LoadedVersion) -> LoadedVersion:
            await self.pause()
            self.weights[key] = self.next_weights()
            await self.pause()
            return loaded._replace(weights_id=self.weights[key])

        with contextlib.suppress(InvalidRequest):
            await self.manager.change_weights(key, change)
            self.weights_set[key] = self.weights[key]
            self.check_weights()

    def check_weights(self) -> None:
        for key, weights in self.weights_set.items():
            workers = [worker for worker in self.workers.values() if worker.is_in_touch()]
            old = [worker.index for worker in workers if worker.ready.get(key, weights) < weights]
            assert not old, f"{key} has the weights of before in worker {old}"

    async def unload(self, key: ModelKey) -> None:
        for worker in self.workers.values():
            assert not worker.has(key) or not worker.is_in_touch(), "what a worker has is taken away"
        await self.pause()
        self.on_server.discard(key)
        self.weights_set.pop(key, None)

    def publish(self, incarnation: int, snapshot: Snapshot) -> None:
        for worker in self.workers.values():
            asyncio.get_running_loop().call_later(
                self.chance.uniform(0, self.news_s), worker.sync, incarnation, snapshot
            )

    def report(self, report: WorkerReport) -> None:
        """Of what a worker has, perhaps from a life before, of whose end it has not heard."""
        if self.serving.is_set():
            self.manager.report(report)

    async def look_every_second(self, name: str) -> None:
        """As ``ParameterServer._watch_folder``."""
        at_once = True
        while True:
            with contextlib.suppress(Unavailable):
                await self.manager.reconcile(name, at_once)
            at_once = False
            await asyncio.sleep(1)

    # -- workers -------------------------------------------------------------------------------------------------------

    def start_worker(self, index: int) -> PlayedWorker:
        self.lives += 1
        self.workers[index] = self.make_worker(self, index, self.lives)
        return self.workers[index]

    def kill_worker(self, index: int) -> None:
        worker = self.workers[index]
        worker.end()
        if self.serving.is_set():
            self.manager.worker_lost(index, str(worker.life))

    def leave_server(self, worker: PlayedWorker) -> None:
        """It has heard of the death, and begins with the next life."""
        if worker.is_alive and worker.incarnation not in (None, self.incarnation * self.serving.is_set()):
            worker.end()
            self.workers[worker.index] = self.make_worker(self, worker.index, worker.life)

    def state(self, name: str, number: int) -> str | None:
        version = self.manager.snapshot.versions.get(ModelKey(name, number))
        return version and version.state

    def latest(self, name: str) -> int | None:
        return self.manager.snapshot.pointers.get((name, None))


@contextlib.asynccontextmanager
async def playing(seed: int = 0, workers: int = 2, make_worker: Callable = PlayedWorker):
    stage = Stage(seed, make_worker)
    for index in range(workers):
        stage.start_worker(index)
    try:
        yield stage
    finally:
        for task in [*stage.tasks, *(task for worker in stage.workers.values() for task in worker.tasks)]:
            task.cancel()


async def test_a_version_is_loaded_used_replaced_and_unloaded():
    async with playing() as stage:
        with pytest.raises(Unavailable, match="just being taken into use"):
            stage.manager.snapshot.latest("m")
        await asyncio.sleep(20)
        assert stage.latest("m") == 1 and stage.state("m", 1) == "AVAILABLE" and len(stage.on_server) == 2
        stage.folders["m"][2] = "files 2"
        seen = []
        for _ in range(200):
            await asyncio.sleep(0.1)
            seen.append((stage.state("m", 1), stage.state("m", 2), stage.latest("m")))
        moments = {("AVAILABLE", "AVAILABLE", number) for number in (1, 2)}  # that a look may miss
        assert [state for state, _ in itertools.groupby(seen) if state not in moments] == [
            ("AVAILABLE", None, 1),
            ("AVAILABLE", "LOADING", 1),
            ("AVAILABLE", "AVAILABLE", None),
            ("UNLOADING", "AVAILABLE", 2),
            (None, "AVAILABLE", 2),
        ]
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
        await asyncio.sleep(SILENT_LIMIT_S)
        assert stage.state("m", 2) == "END" and stage.latest("m") == 1 and stage.state("m", 1) == "AVAILABLE"
        assert "worker 1" in stage.manager.snapshot.versions["m", 2].error
        assert ModelKey("m", 2) not in stage.on_server
        stage.fates.clear()
        await asyncio.sleep(20)
        assert stage.state("m", 2) == "END", "it is tried again though its files are the same"
        stage.folders["m"][2] = "other files"
        await asyncio.sleep(20)
        assert stage.latest("m") == 2


async def test_a_worker_that_has_much_to_bring_up_is_waited_for_as_long_as_it_gets_on():
    numbers = range(1, 13)
    async with playing() as stage:
        stage.folders["n"] = {number: f"files {number}" for number in numbers}
        stage.labels["n"] = {f"label {number}": number for number in numbers}
        await asyncio.sleep(200)
        assert stage.on_server >= {ModelKey("n", number) for number in numbers}
        stage.fates |= {(1, ModelKey("n", number)): "is slow" for number in numbers}
        stage.kill_worker(1)
        stage.start_worker(1)
        while not stage.workers[1].has_reported:
            await asyncio.sleep(0.1)
        stage.folders["m"][2] = "files 2"
        assert len(numbers) * SLOW_S > 1.5 * SILENT_LIMIT_S
        await asyncio.sleep(2 * len(numbers) * SLOW_S)
        assert stage.latest("m") == 2 and stage.state("m", 2) == "AVAILABLE"


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


async def test_of_a_version_in_use_it_is_told_that_its_files_have_gone_or_changed_until_they_are_as_they_were():
    async with playing() as stage:
        await asyncio.sleep(20)
        for files, told in (("others", "have changed since it was loaded"), (None, "not in its folder any more")):
            if files:
                stage.folders["m"][1] = files
            else:
                del stage.folders["m"][1]
            await asyncio.sleep(3)
            assert told in stage.manager.snapshot.versions["m", 1].error and stage.latest("m") == 1
            stage.folders["m"][1] = "files 1"
            await asyncio.sleep(3)
            assert stage.manager.snapshot.versions["m", 1].error is None
        stage.folders["m"][2] = "files 2"
        await asyncio.sleep(10)
        assert stage.latest("m") == 2
        told = [version.error for version in stage.manager.snapshot.versions.values()]
        assert not any(told), "what is replaced has gone as it should"


async def test_who_asks_for_it_at_once_has_what_failed_tried_again_though_its_files_are_the_same():
    async with playing() as stage:
        stage.bad.add(("m", 2, "files 2"))
        stage.folders["m"][2] = "files 2"
        await asyncio.sleep(20)
        assert stage.state("m", 2) == "END"
        stage.bad.clear()
        await stage.manager.reconcile("m", at_once=True)
        assert stage.latest("m") == 2


async def test_a_folder_that_cannot_be_read_is_told_nobody_waits_for_it_and_what_is_in_use_goes_on():
    async with playing() as stage:
        stage.unreadable |= {"m"}
        await asyncio.sleep(20)
        assert stage.manager.snapshot.loading == frozenset() and stage.latest("n") == 1
        stage.unreadable.clear()
        await asyncio.sleep(20)
        version = stage.manager.snapshot.versions["m", 1]
        assert (version.state, version.error) == ("AVAILABLE", None)
        stage.unreadable |= {"m"}
        why = "The folder of model m cannot be read: Permission denied"
        with pytest.raises(Unavailable, match=why):
            await stage.manager.reconcile("m")
        version = stage.manager.snapshot.versions["m", 1]
        assert (version.state, version.error, stage.latest("m")) == ("AVAILABLE", why, 1)
        stage.unreadable.clear()
        await asyncio.sleep(3)
        assert stage.manager.snapshot.versions["m", 1].error is None


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


async def test_when_the_highest_version_goes_the_next_lower_one_takes_over_also_beside_a_label_for_a_lower_one_still():
    async with playing() as stage:
        stage.folders["m"] |= {2: "files 2", 3: "files 3"}  # before it has looked at all
        stage.labels["m"] = {"stable": 1}
        await asyncio.sleep(20)
        assert stage.latest("m") == 3
        del stage.folders["m"][3]
        seen = []
        for _ in range(200):
            await asyncio.sleep(0.1)
            seen.append(stage.latest("m"))
        assert list(dict.fromkeys(seen)) == [3, None, 2], "None is while all workers let go of the one before"


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
        stage.manager.worker_lost(1, "a life before")
        assert stage.state("m", 1) == "LOADING", "the life that there is now counts"
        stage.kill_worker(1)
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
        first = stage.manager.snapshot.versions[key].loaded.weights_id

        async def change(loaded: LoadedVersion) -> LoadedVersion:
            for worker in stage.workers.values():
                seen.append(worker.snapshot.versions[key].loaded.batchable)
            await stage.pause()
            return LoadedVersion({}, "", (), ("serving_default",), False, "second")

        await stage.manager.change_weights(key, change)
        assert seen == [(), ()]
        assert all(worker.ready[key] == "second" for worker in stage.workers.values())
        worker = stage.workers[0]
        stage.manager.report(WorkerReport(0, str(worker.life), dict(worker.settled), {key: first}, {}))
        assert stage.manager.snapshot.versions[key].missing_on == (0,), "what has the weights of before is not ready"
        worker.report()
        assert stage.manager.snapshot.versions[key].missing_on == ()

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
            manager.observe(key, loaded().weights_id, "serving_default", False)
            manager.observe(key, "of before", "serving_default", False)
        assert loaded().batchable == ()

        async def change(loaded: LoadedVersion) -> LoadedVersion:
            return loaded._replace(undecided=("serving_default",), weights_id="second")

        await manager.change_weights(key, change)
        for _ in range(EVIDENCE):
            assert loaded().batchable == ()
            manager.observe(key, "second", "serving_default", True)
        assert loaded().batchable == ("serving_default",) and loaded().undecided == ()
        for _ in range(2):
            await manager.change_weights(key, change)
            for _ in range(EVIDENCE - 1):
                manager.observe(key, "second", "serving_default", True)
        assert loaded().undecided == ("serving_default",), "what was seen of other weights counts"
        manager.observe(key, "second", "serving_default", False)
        assert loaded().batchable == loaded().undecided == (), "before they have ever shared a run one is enough"


async def test_what_agrees_later_shows_that_what_did_not_was_an_accident():
    """Else rounding near zero, now and then, would end all sharing of runs some day."""
    async with playing() as stage:
        await asyncio.sleep(20)
        key, manager = ModelKey("m", 1), stage.manager
        observe = functools.partial(
            manager.observe, key, manager.snapshot.versions[key].loaded.weights_id, "serving_default"
        )
        for agrees in (False, True, True, True) * 10 + (False,) * (EVIDENCE - 1):
            observe(agrees)
        assert manager.snapshot.versions[key].loaded.batchable == ("serving_default",)
        observe(False)
        assert manager.snapshot.versions[key].loaded.batchable == ()


async def test_what_was_seen_of_a_version_does_not_count_when_it_comes_back():
    async with playing() as stage:
        await asyncio.sleep(20)
        key, manager = ModelKey("m", 1), stage.manager
        for _ in range(2):
            loaded = manager.snapshot.versions[key].loaded
            for _ in range(EVIDENCE - 1):
                manager.observe(key, loaded.weights_id, "serving_default", False)
            assert manager.snapshot.versions[key].loaded.batchable == ("serving_default",)
            stage.folders["m"] = {2: "files 2"}
            await asyncio.sleep(20)
            stage.folders["m"] = {1: "files 1"}
            await asyncio.sleep(20)


@pytest.mark.parametrize("seed", [*range(35), *map(long, range(35, 70))])
async def test_no_client_sees_a_version_go_back_and_all_settles_whatever_happens(seed):
    await live_at_random(seed, PlayedWorker)


async def live_at_random(seed: int, make_worker: Callable) -> None:
    """Versions come, are broken, meet a fate in a worker, go; labels move; weights are set; workers and the parameter
    server die at any step. Of a life before, a new one knows what lies in the folders: so no client gets from it less
    than the highest version that is there and that every worker can have."""
    chance = random.Random(seed)
    async with playing(seed, 3, make_worker) as stage:
        stage.longest_s, stage.news_s = chance.choice([0.01, 0.5, 3.0]), chance.choice([0.1, 1.0])
        seen = dict.fromkeys(NAMES, 0)
        newest = dict.fromkeys(NAMES, 1)
        served: set[tuple[int, str]] = set()  # life and model
        setting: list[asyncio.Task] = []

        def can_be_had(name: str) -> set[int]:
            spoilt = {key for (_, key), fate in stage.fates.items() if fate != "is slow"}
            files = stage.folders[name].items()
            return {n for n, its in files if (name, n, its) not in stage.bad and ModelKey(name, n) not in spoilt}

        def look() -> None:
            if not stage.serving.is_set():
                return
            workers = [worker for worker in stage.workers.values() if worker.is_in_touch()]
            for name in NAMES:
                for version in filter(None, (worker.answer(name, None) for worker in workers)):
                    assert version >= seen[name], f"{name} goes back to version {version}"
                    seen[name] = version
                    served.add((stage.incarnation, name))
                if (stage.incarnation, name) in served:
                    assert (name, None) in stage.manager.snapshot.pointers, f"{name} is not served any more"
            snapshot = stage.manager.snapshot
            for pointer in snapshot.pointers:
                assert snapshot.find(*pointer) or snapshot.is_moving(*pointer), f"{pointer} stands for nothing"
            for key, version in snapshot.versions.items():
                if version.state == "AVAILABLE":
                    assert key in stage.on_server, f"{key} is not there"
                    lacking = [worker.index for worker in workers if worker.has_reported and key not in worker.ready]
                    assert not lacking, f"{key} is not in worker {lacking}"
            stage.check_weights()

        for _ in range(60):
            name = chance.choice(NAMES)
            what = chance.choice(
                ["new", "new", "broken", *FATES, "remove", "label", "weights", "kill", "server", "nothing"]
            )
            if what in ("new", "broken", *FATES):
                newest[name] += 1
                number = newest[name]
                stage.folders[name][number] = f"files {number}"
                if what == "broken":
                    stage.bad.add((name, number, f"files {number}"))
                elif what != "new":
                    stage.fates[chance.randrange(3), ModelKey(name, number)] = what
            elif what == "remove" and (old := [v for v in stage.folders[name] if v < (stage.latest(name) or 0)]):
                del stage.folders[name][chance.choice(old)]
            elif what == "label":
                stage.labels[name] = {"stable": chance.choice(list(stage.folders[name]))}
            elif what == "weights" and stage.serving.is_set():
                setting.append(task := asyncio.create_task(stage.set_weights(name)))
                stage.tasks.append(task)  # which ends with the parameter server
            elif what == "kill":
                stage.kill_worker(index := chance.randrange(3))
                stage.start_worker(index)
            elif what == "server" and stage.serving.is_set():
                await asyncio.sleep(chance.uniform(0, 1))
                look()
                stage.kill_server()
                seen = {name: max([v for v in can_be_had(name) if v <= seen[name]], default=0) for name in NAMES}
            for _ in range(chance.randint(1, 40)):
                await asyncio.sleep(0.25)
                look()
        await asyncio.sleep((len(stage.fates) + 4) * SILENT_LIMIT_S)
        look()
        for task in setting:
            assert task.done(), "weights are never set"
            with contextlib.suppress(asyncio.CancelledError):
                task.result()
        for name in NAMES:
            assert stage.latest(name) is not None and stage.latest(name) >= max(can_be_had(name), default=0)
        in_use = {ModelKey(name, number) for (name, _), number in stage.manager.snapshot.pointers.items()}
        assert stage.on_server == in_use, "memory is not given back"
        for worker in stage.workers.values():
            spoilt = {key for key in in_use if stage.fates.get((worker.index, key), "is slow") != "is slow"}
            assert worker.is_in_touch() and worker.ready.keys() == in_use - spoilt
