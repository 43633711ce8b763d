"""Versions of a model come and go while it is served, and labels move: no request fails for that, and none is answered
with a version that has been replaced."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import Folder, Server, long, wait_until
from test_survival import Clients, kill

from shared_graph.cluster import Cluster
from shared_graph.errors import InvalidRequest, ModelError

LATEST, STABLE = "/v1/models/m", "/v1/models/m/labels/stable"


def states(server) -> dict[int, str]:
    return {int(one["version"]): one["state"] for one in server.get(LATEST).json["model_version_status"]}


def version_of(answer) -> int:
    """That of its variable, of the table that is made from a file of it, and of its graph must be the same."""
    assert answer["number"].tolist()[0] == int(answer["word"].tolist()[0]) == answer["constant"].tolist()[0]
    return int(answer["number"][0])


@pytest.mark.parametrize("placement", ["shared", long("mirrored")])
def test_from_python(folder, placement):
    folder.copy(1)
    with Cluster(workers=2, model=f"m={folder.path}", placement=placement).start(workers=2) as cluster:

        def predict(version=None) -> int:
            return version_of(cluster.predict({"x": [0.0]}, "m", version=version))

        def found(version=None) -> list[tuple]:
            statuses = cluster.status.version_status("m", version)["model_version_status"]
            return [(one["version"], one["state"], one["status"]["error_code"]) for one in statuses]

        assert predict() == predict(1) == predict(np.int64(1)) == 1
        cluster.add(5)
        cluster.set_weights("m", {"number": np.float32(1.5)})
        assert cluster.get_weights("m")["number"] == 1.5
        folder.copy(2)
        assert cluster.reload("m") == 2
        assert predict() == predict(2) == 2  # with its own weights
        assert found() == [("2", "AVAILABLE", "OK")]
        for version in (1, 3):
            with pytest.raises(InvalidRequest, match=rf"Servable not found for request: Specific\(m, {version}\)"):
                predict(version)
        with pytest.raises(InvalidRequest, match="Unrecognized servable version label: stable"):
            predict("stable")

        folder.label("stable", 2)
        folder.copy(3)
        assert cluster.reload("m") == 3
        assert (predict(), predict("stable"), predict(2)) == (3, 2, 2)
        assert found() == [("3", "AVAILABLE", "OK"), ("2", "AVAILABLE", "OK")]
        assert found("stable") == found(2) == [("2", "AVAILABLE", "OK")]
        assert cluster.status.metadata("m", "stable")["model_spec"]["version"] == "2"
        assert cluster.health()["models"]["m"]["labels"] == {"stable": 2}
        assert cluster.health()["models"]["m"]["version"] == 3
        assert 'model_version{model="m"} 3.0\n' in cluster.status.metrics.text().decode()

        folder.label("stable", 9)  # to nothing: it stays where it was, and says so
        cluster.reload("m")
        assert predict("stable") == 2
        assert found(9) == [("9", "END", "UNKNOWN")]
        folder.label("stable", 3)
        cluster.reload("m")
        assert predict("stable") == 3
        assert found() == [("3", "AVAILABLE", "OK")]

        folder.copy(4)
        with open(os.path.join(folder.path, "4", "saved_model.pb"), "wb") as file:
            file.write(b"no model")
        assert cluster.reload("m") == predict() == 3
        assert found(4) == [("4", "END", "UNKNOWN")]
        folder.copy(4)  # mended: tried again, as once a second
        wait_until(lambda: predict() == 4, 20)
        folder.remove(4)
        wait_until(lambda: predict() == 3, 20)
        folder.remove(3)
        folder.remove(2)
        os.remove(os.path.join(folder.path, "stable"))
        assert cluster.reload("m") == 1
        answer = cluster.predict({"x": [0.0]}, "m")
        assert (answer["number"].tolist(), answer["constant"].tolist()) == ([1.5], [1])  # as they were set last
        folder.remove(1)  # the last one goes on
        assert cluster.reload("m") == 1
        assert cluster.add(0) == 5


def test_a_model_that_changes_starts_a_new_version_with_that_ones_own_variables(tmp_path, models):
    folder = Folder(tmp_path / "m", models["counting"])
    folder.copy(1)
    with Cluster(workers=2, model=f"m={folder.path}") as cluster:
        count = lambda: cluster.predict({"by": 1}, "m", "count")["count"].tolist()
        assert [count() for _ in range(3)] == [101, 102, 103]
        folder.copy(2)
        assert cluster.reload("m") == 2
        assert [count(), count()] == [201, 202]
        folder.remove(2)
        assert cluster.reload("m") == 1
        assert count() == 104


def test_start_says_why_a_model_has_no_version_that_loads_and_takes_the_next_lower_one(folder):
    folder.copy(1)
    folder.copy(2)
    for version in (2, 1):
        os.truncate(os.path.join(folder.path, str(version), "variables", "variables.data-00000-of-00001"), 1)
        if version == 2:
            with Cluster(workers=1, model=f"m={folder.path}") as cluster:
                assert version_of(cluster.predict({"x": [0.0]}, "m")) == 1
        else:
            with pytest.raises(ModelError, match=r"Model m \(.*/[12]\) cannot be loaded"):
                Cluster(workers=1, model=f"m={folder.path}").start()


# -- under load --------------------------------------------------------------------------------------------------------


class Traffic(Clients):
    """Clients that ask without a pause, half of them for the latest and the others for the label; and when the test
    saw which version come and be in use."""

    def __init__(self, server, count: int, version: int):
        self.moves = {path: [(0.0, 0.0, version)] for path in (LATEST, STABLE)}
        self.started: dict[tuple[int, int], float] = {}
        super().__init__(server, count, self.ask_for_rows)

    def ask_for_rows(self, client: int, number: int) -> tuple[str, str, str]:
        """Several rows, so that some share a run."""
        self.started[client, number] = time.monotonic()
        return "POST", f"{(LATEST, STABLE)[client % 2]}:predict", json.dumps({"instances": [0.0] * (1 + client % 3)})

    def move(self, path: str, version: int, change) -> None:
        """Make the change that gives this version to the latest or to the label, and wait until it is in use."""
        began = time.monotonic()
        change()
        wait_until(lambda: self.in_use(path) == version, 60, f"{path} to be version {version}")
        self.moves[path].append((began, time.monotonic(), version))

    def in_use(self, path: str) -> int | None:
        model = self.server.get("/health").json["models"].get("m", {"version": None, "labels": {}})
        return model["version"] if path == LATEST else model["labels"].get("stable")

    def check(self, allowed: set[int] = frozenset({200})) -> int:
        """Each answer is wholly that of one version which was in use while the request was under way, and in no client
        do versions go back, but where the test moved them back; how many there were."""
        answers, last = self.stop(), {}
        for client, number, status, document, seconds in answers:
            assert status in allowed, document
            if status != 200:
                continue
            path, started = (LATEST, STABLE)[client % 2], self.started[client, number]
            ended = started + seconds
            found = {(row["number"], int(row["word"]), row["constant"]) for row in document["predictions"]}
            [(version, *others)] = found
            assert others == [version, version]
            moves = self.moves[path]
            certain = [i for i, (_, seen, _) in enumerate(moves) if seen <= started]  # in use before it was sent
            possible = [i for i, (began, *_) in enumerate(moves) if began <= ended]
            index = next((i for i in range(max(certain, default=0), max(possible) + 1) if moves[i][2] == version), None)
            assert index is not None, (path, version, moves, started, ended)
            assert index >= last.get(client, 0), (path, version, moves)
            last[client] = index
        return sum(status == 200 for _, _, status, *_ in answers)


def options(folder: Folder, *more: str) -> list[str]:
    folder.copy(1)
    folder.label("stable", 1)
    return ["--workers", "2", "--threads", "2", "--model", f"m={folder.path}", *more]


@pytest.mark.parametrize("seconds", [3, long(60)])
@pytest.mark.parametrize("kind", [long("flask"), "starlette"])
def test_no_request_fails_while_versions_come_and_go_and_one_is_broken(kind, seconds, folder):
    with Server(kind, *options(folder)) as server:
        server.wait_ready(workers=2)
        before = server.get("/?value=7").json["result"]
        running, end, version = Traffic(server, 32, version=1), time.monotonic() + seconds, 1
        while time.monotonic() < end or version < 3:
            version = version % 12 + 1
            if version == 1:  # all over again, by way of the label
                running.move(LATEST, 1, lambda: [folder.remove(number) for number in range(12, 1, -1)])
                running.move(STABLE, 1, lambda: folder.label("stable", 1))
                continue
            running.move(LATEST, version, lambda: folder.copy(version, pause_s=0.2))
            folder.copy(version, "99")
            os.truncate(os.path.join(folder.path, "99", "variables", "variables.index"), 5)
            wait_until(lambda: states(server).get(99) == "END", 20)
            running.move(STABLE, version, lambda: folder.label("stable", version))
            folder.remove(99)
        assert running.check() > 20 * seconds
        assert server.get("/?value=0").json["result"] == before
        server.stop()
        assert server.output().count("99) cannot be loaded") >= 1


@pytest.mark.parametrize("placement", [long("shared"), long("mirrored")])
def test_a_worker_or_the_parameter_server_is_killed_while_a_version_is_loaded(placement, folder):
    with Server("starlette", *options(folder, "--placement", placement)) as server:
        server.wait_ready(workers=2)
        running = Traffic(server, 16, version=1)

        def come_and_kill(version: int, kind: str) -> None:
            folder.copy(version)
            wait_until(lambda: states(server).get(version) in ("LOADING", "AVAILABLE"), 20)
            kill(server.get("/health").json[kind][0])

        running.move(LATEST, 2, lambda: come_and_kill(2, "workers"))
        server.wait_ready(workers=2)
        running.move(STABLE, 2, lambda: folder.label("stable", 2))
        assert running.check() > 100  # it only takes a worker
        again = Traffic(server, 16, version=2)
        again.move(LATEST, 3, lambda: come_and_kill(3, "parameter_servers"))
        server.wait_ready(workers=2)
        again.move(STABLE, 3, lambda: folder.label("stable", 3))
        assert again.check({200, 502, 503, 504}) > 100


SAVE_LARGE = """
import sys
import example_models, tensorflow
v1 = tensorflow.compat.v1
with v1.Graph().as_default(), v1.Session() as session:
    x = v1.placeholder(v1.float32, [None])
    w, y = v1.get_variable("w", initializer=[1.0] * 10_000), x
    for _ in range(500):
        y = y + w[0]
    session.run(v1.global_variables_initializer())
    example_models.write(v1, session, sys.argv[1], {"serving_default": ({"x": x}, {"y": y})})
"""


@pytest.mark.long
@pytest.mark.parametrize("placement", ["shared", "mirrored"])
def test_memory_after_60_versions_and_after_60_failed_loads_is_that_after_5(tmp_path, placement):
    """With a graph of more than 65 kB, in each actor."""
    path = tmp_path / "m"
    path.mkdir()
    subprocess.run([sys.executable, "-c", SAVE_LARGE, str(path / "1")], check=True, capture_output=True)
    assert (path / "1" / "saved_model.pb").stat().st_size > 65_000
    broken = tmp_path / "broken"
    shutil.copytree(path / "1", broken)
    os.truncate(broken / "variables" / "variables.index", 5)

    def memory() -> list[tuple[int, int]]:
        """Of each actor, in KiB: what it has of its own, and its proportional set size if the three were alone: what it
        is depends on who else has the same libraries. The least of some seconds, in which memory is given back."""
        looks = []
        for _ in range(14):
            looks.append([])
            for actor in cluster.health()["parameter_servers"] + cluster.health()["workers"]:
                with open(f"/proc/{actor['pid']}/smaps_rollup") as file:
                    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", file.read(), re.M))
                own, libraries = int(sizes["Anonymous"]), int(sizes["Rss"]) - int(sizes["Anonymous"])
                looks[-1].append((own, own + libraries // 3))
            time.sleep(0.5)
        return list(map(min, zip(*looks)))

    with Cluster(workers=2, model=f"m={path}", placement=placement).start(workers=2) as cluster:
        for version in range(2, 61):
            os.rename(path / str(version - 1), path / str(version))
            assert cluster.reload("m") == version
            cluster.predict({"x": [0.0]}, "m")
            if version == 5:
                versions = memory()
        after_versions = memory()
        for number in range(60):
            shutil.copytree(broken, path / str(100 + number))
            assert cluster.reload("m") == 60
            shutil.rmtree(path / str(100 + number))
            if number == 4:  # the first failure of all has TensorFlow read its own source files
                failures = memory()
        after_failures = memory()
    for before, after in ((versions, after_versions), (failures, after_failures)):  # a graph that stays: 150 MB
        grown = [now - first for (first, _), (now, _) in zip(before, after)]
        assert all(by < 0.05 * pss for by, (_, pss) in zip(grown, before)), (before, after)
