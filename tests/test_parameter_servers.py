"""Several parameter servers: variables are spread over them, and a large table is held in parts.

That models answer as with one, test_models shows.
"""

import contextlib
import os
import signal
import threading

import numpy as np
from conftest import wait_until
from test_survival import assert_counted_once

from shared_graph.cluster import Cluster
from shared_graph.errors import Error

MB = 2**20
TABLE_MB = 1_000_000 * 100 * 4 / MB


def memory_mb(actor: dict) -> float:
    with open(f"/proc/{actor['pid']}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon:"))


def looked_up(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Rows of a table in two parts, of which the even ones hold the even ids (the strategy "mod")."""
    assert sorted(weights) == ["embeddings/part_0", "embeddings/part_1"]
    parts = np.stack([weights["embeddings/part_0"], weights["embeddings/part_1"]])
    return parts[ids % 2, ids // 2]


def test_each_parameter_server_holds_its_half_of_a_large_table_and_both_are_looked_up(two, cluster):
    without = memory_mb(cluster.health()["parameter_servers"][0])
    servers = two.health()["parameter_servers"]
    assert len({server["pid"] for server in servers}) == 2
    used = [memory_mb(server) for server in servers]
    assert max(used) < without + 0.75 * TABLE_MB
    assert min(used) > 0.5 * TABLE_MB and sum(used) > TABLE_MB
    assert memory_mb(two.health()["workers"][0]) < without + 0.5 * TABLE_MB
    rows = two.predict({"ids": np.arange(0, 1_000_000, 997)}, "table")["rows"]
    assert rows.shape == (1004, 100) and len(np.unique(rows[:, 0])) > 900


def test_whichever_of_two_parameter_servers_is_killed_all_state_comes_back_and_no_add_is_lost():
    answers, stopped, ids = [], threading.Event(), np.arange(1000)

    def add() -> None:
        while not stopped.wait(0.001):
            try:
                answers.append((0, 0, 200, {"result": cluster.add(1)}, 0))
            except Error as error:
                answers.append((0, 0, error.status, {}, 0))

    options = {"workers": 1, "parameter_servers": 2, "model": ["example_models:small_table"]}
    with contextlib.ExitStack() as stack, Cluster(**options) as cluster:
        weights = {name: value + 1 for name, value in cluster.get_weights("small_table").items()}
        cluster.set_weights("small_table", weights)
        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        stack.callback(stopped.set)  # also when something is not as it should be
        for killed in (0, 1):
            wait_until(lambda: all(server["state"] == "ready" for server in cluster.health()["parameter_servers"]))
            before, first = len(answers), cluster.health()["parameter_servers"][0]["restarts"]
            os.kill(cluster.health()["parameter_servers"][killed]["pid"], signal.SIGKILL)
            wait_until(lambda: cluster.health()["parameter_servers"][0]["restarts"] > first)
            wait_until(lambda: len(answers) > before + 100)
            rows = cluster.predict({"ids": ids}, "small_table")["rows"]
            assert np.array_equal(rows, looked_up(weights, ids))
        stopped.set()
        for thread in threads:
            thread.join()
        assert_counted_once(answers, cluster.add(0))
