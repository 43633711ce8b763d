"""Several parameter servers: variables are spread over them, a partitioned table is held in parts, also on other nodes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import owned_by_session
from ray_tensorflow import Cluster, Error, sample_rows

MB = 2**20
TABLE_MB = 1_000_000 * 100 * 4 / MB


@pytest.fixture(scope="module")
def two(cluster, models):
    """A second Cluster beside the session's, in the same Ray: with two parameter servers, all models and a table of 400 MB."""
    with owned_by_session():
        sources = [*(f"{name}={source}" for name, source in models.items()), "example_models:table", "example_models:small_table"]
        two = Cluster(workers=1, parameter_servers=2, model=sources).start()
    yield two
    two.close()


def memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon:"))


def looked_up(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Rows of a table in two parts, of which the even ones hold the even ids (the strategy "mod")."""
    assert sorted(weights) == ["embeddings/part_0", "embeddings/part_1"]
    parts = np.stack([weights["embeddings/part_0"], weights["embeddings/part_1"]])
    return parts[ids % 2, ids // 2]


def test_each_parameter_server_holds_its_half_of_a_large_table(two, cluster):
    without = memory_mb(cluster.health()["parameter_servers"][0]["pid"])
    servers = two.health()["parameter_servers"]
    assert [server["index"] for server in servers] == [0, 1] and servers[0]["pid"] != servers[1]["pid"]
    used = [memory_mb(server["pid"]) for server in servers]
    assert max(used) < without + 0.75 * TABLE_MB
    assert min(used) > 0.5 * TABLE_MB
    assert sum(used) > TABLE_MB
    assert memory_mb(two.health()["workers"][0]["pid"]) < 0.5 * TABLE_MB + without


def test_a_lookup_of_all_parts_equals_a_plain_lookup(two):
    ids = np.concatenate([np.arange(0, 1_000_000, 997), [999_999, 0, 1, 1]])
    rows = two.predict({"ids": ids}, "table")["rows"]
    assert rows.shape == (len(ids), 100) and len(np.unique(rows[:-1, 0])) > 900
    assert np.array_equal(rows, looked_up(two.get_weights("table"), ids))


def test_weights_that_are_set_arrive_in_their_parts(two):
    ids = np.arange(1000)
    weights = {name: value + 1 for name, value in two.get_weights("small_table").items()}
    two.set_weights("small_table", weights)
    assert np.array_equal(two.predict({"ids": ids}, "small_table")["rows"], looked_up(weights, ids))


def test_all_models_answer_as_with_one_parameter_server(two, cluster):
    def outcome(which, model: str, signature: str, inputs: dict):
        try:
            return {name: array.tolist() for name, array in which.predict(inputs, model, signature).items()}
        except Error as error:
            return error.status, error.message

    compared = 0
    for model in cluster.models.values():
        for name, signature in model.signatures.items():
            if not signature.writes and model.name not in ("adder", "counter") and signature.inputs:
                inputs = dict(zip(signature.inputs, sample_rows(signature, 3)))
                expected = outcome(cluster, model.name, name, inputs)
                assert repr(outcome(two, model.name, name, inputs)) == repr(expected), (model.name, name)
                compared += 1
    assert compared > 20


def test_state_is_shared_and_counted_once(two):
    assert [two.add(value) for value in (1, 2, 3)] == [1, 3, 6]
    assert [two.predict({"x": [0]}, "counter", "count")["count"].item() for _ in range(3)] == [1, 2, 3]


NODES = """
import json, sys
import numpy as np
from ray.cluster_utils import Cluster as Nodes
from ray_tensorflow import Cluster
from test_parameter_servers import looked_up

def main():
    nodes = Nodes()
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
        with Cluster(address=nodes.address, workers=2, parameter_servers=2, model=["example_models:small_table"]) as cluster:
            ids = np.arange(1000)
            rows = cluster.predict({"ids": ids}, "small_table")["rows"]
            equal = bool(np.array_equal(rows, looked_up(cluster.get_weights("small_table"), ids)))
            print(json.dumps({"equal": equal, "sums": [cluster.add(1), cluster.add(1)], **cluster.health()}))
    finally:
        nodes.shutdown()

main()
"""


def test_a_part_of_the_table_is_on_another_node(tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(NODES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True)
    try:
        output, errors = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert found["equal"] and found["sums"] == [1, 2]
    assert len({server["node"] for server in found["parameter_servers"]}) == 2
