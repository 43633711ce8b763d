"""One bad model stops nothing: each fails at another step, and the others are served, by a process that never imports
TensorFlow, whatever arrives there."""

import json
import os
import subprocess
import sys

import bad_models
import numpy as np
import pytest

PROGRAM = """
import json, logging, sys, time
from shared_graph import Cluster

names, folder = json.loads(sys.argv[1])
logging.basicConfig(stream=sys.stderr)
told = {"imported": []}

def look(after):
    if "tensorflow" in sys.modules:
        told["imported"].append(after)

def attempt(what, function, *arguments):
    try:
        told[what] = str(function(*arguments))
    except Exception as error:
        told[what] = [type(error).__name__, str(error)]
    look(what)

cluster = Cluster(workers=2, model=[f"bad_models:{name}" for name in names], checkpoint_dir=folder)
cluster.start_in_background()
def versions():
    look("the start")
    status = cluster.status.version_status
    try:
        return {name: status(name, None)["model_version_status"][0] for name in names}
    except Exception:
        return {}
def is_settled():
    found = versions()
    return found and not any(v["state"] == "LOADING" and not v["status"]["error_message"] for v in found.values())
end, since = time.monotonic() + 200, None
while time.monotonic() < end and (since is None or time.monotonic() < since + 3):
    since = (since or time.monotonic()) if cluster.health()["status"] == "ready" and is_settled() else None
    time.sleep(0.1)
told["versions"], told["health"] = versions(), cluster.health()
for name in ("well", *names):
    attempt(f"predict {name}", cluster.predict, [3.0], name)
attempt("weights", cluster.set_weights, "well", {"w": [[1.0]]})
attempt("other weights", cluster.set_weights, "well", {"v": [1.0]})
attempt("no weights", cluster.get_weights, "raises")
attempt("reload", cluster.reload, "raises")
attempt("reload a kernel", cluster.reload, "without_kernel")
attempt("text", cluster.predict, ["a"], "well")
cluster.close()
look("the end")
print(json.dumps(told))
"""


def run(tmp_path, names) -> tuple[dict, str]:
    """What such a program tells of these models, and what it logs."""
    (tmp_path / "damaged_weights.1.npz").write_bytes(b"PK\3\4damaged")
    np.savez(tmp_path / "other_weights.1.npz", **{"variables/v": np.float32([1])})
    environment = os.environ | {"BAD_MODELS_FILE": str(tmp_path / "ended"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, json.dumps([names, str(tmp_path)])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    names = [*bad_models.REASONS, "never_ready_to_run", "well"]
    return run(tmp_path_factory.mktemp("run"), names)


@pytest.mark.parametrize("name", bad_models.REASONS)
def test_a_model_that_fails_at_any_step_is_over_with_its_reason(told, name):
    status = told[0]["versions"][name]
    message = status["status"]["error_message"]
    assert status["state"] == "END" and bad_models.REASONS[name] in message and "\n" not in message
    assert told[1].count(f"{bad_models.REASONS[name]}") <= 2 and f"ERROR:shared_graph.status:{message}\n" in told[1]
    kind, text = told[0][f"predict {name}"]
    assert kind == "InvalidRequest" and text.startswith("Servable not found for request")


def test_meanwhile_others_are_served_also_one_that_can_be_loaded_but_not_run(told):
    assert told[0]["health"]["status"] == "ready"
    assert told[0]["versions"]["well"]["state"] == told[0]["versions"]["never_ready_to_run"]["state"] == "AVAILABLE"
    assert told[0]["predict well"] == "{'y': array([6.], dtype=float32)}"
    kind, text = told[0]["predict never_ready_to_run"]
    assert kind == "ModelError" and "never" in text


def test_no_failure_makes_this_process_import_tensorflow_and_each_is_an_error_of_ours(told):
    assert told[0]["imported"] == []
    for what in ("weights", "other weights", "no weights", "reload", "reload a kernel", "text"):
        assert isinstance(told[0][what], list) or what.startswith("reload"), (what, told[0][what])
        assert told[0][what][0] in ("InvalidRequest", "ModelError", "Error") or what.startswith("reload")


@pytest.mark.long
def test_a_model_that_ends_its_process_is_served_if_it_did_so_once_else_over_and_the_others_are_served(tmp_path):
    told, _ = run(tmp_path, ["ends_once", "ends_always", "well"])
    states = {name: version["state"] for name, version in told["versions"].items()}
    assert states == {"ends_once": "AVAILABLE", "ends_always": "END", "well": "AVAILABLE"}
    assert (
        "it has ended the process that loads it 3 times" in told["versions"]["ends_always"]["status"]["error_message"]
    )
    assert told["predict well"] == told["predict ends_once"] == "{'y': array([6.], dtype=float32)}"


@pytest.mark.long
def test_a_model_that_ends_its_workers_does_not_do_so_for_ever(tmp_path):
    told, _ = run(tmp_path, ["ends_workers", "well"])
    assert told["predict well"] == "{'y': array([6.], dtype=float32)}"
    assert (
        "it has ended the process that loads it 3 times" in told["versions"]["ends_workers"]["status"]["error_message"]
    )
    assert told["versions"]["ends_workers"]["state"] == "END"
    assert sum(worker["restarts"] for worker in told["health"]["workers"]) <= 6
