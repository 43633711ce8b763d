"""Folders of models that are not as they should be, in a cluster of each placement: what is wrong with one is told, and
no other minds it."""

import os
import shutil

import numpy as np
import pytest
from conftest import Folder, owned_by_session, wait_until

from shared_graph.cluster import Cluster

NAMES = {"shared": ("linked", "zero", "twice", "label", "moved", "sole"), "mirrored": ("linked", "zero")}
IF_SHARED = pytest.mark.parametrize("placement", ["shared"], indirect=True)


@pytest.fixture(scope="module", params=NAMES)
def placement(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory, models, placement) -> dict[str, Folder]:
    """By the name of the model: each has a version 1, and what makes it odd."""
    folders = {name: Folder(tmp_path_factory.mktemp(placement) / name, models["numbered"]) for name in NAMES[placement]}
    for folder in folders.values():
        folder.copy(1)
    for place in ("1", "1/assets"):
        for name, target in {"a": ".", "b": ".", "nowhere": "/nothing/here", "itself": "itself"}.items():
            os.symlink(target, os.path.join(folders["linked"].path, place, name))
    os.symlink("/nothing/here", os.path.join(folders["linked"].path, "nowhere"))
    folders["linked"].copy(2)
    os.remove(os.path.join(folders["linked"].path, "2", "variables", "variables.index"))
    os.symlink("variables.index", os.path.join(folders["linked"].path, "2", "variables", "variables.index"))
    folders["zero"].copy(5, name="0")
    folders["zero"].label("stable", 0)
    if placement == "mirrored":
        return folders
    folders["twice"].copy(7, name="007")
    folders["twice"].copy(8, name="7")
    folders["label"].copy(2)
    folders["label"].label("stable", 1)
    os.symlink("../zero/1", os.path.join(folders["label"].path, "elsewhere"))
    return folders


@pytest.fixture(scope="module")
def cluster(folders, placement):
    sources = [f"{name}={folder.path}{'/1' * (name == 'sole')}" for name, folder in folders.items()]
    with owned_by_session():
        cluster = Cluster(workers=1, placement=placement, model=sources).start()
    yield cluster
    cluster.close()


@pytest.fixture
def answer(cluster):
    """``answer(model, version)``: by what its weights, a table's file and its graph say, which must be the same."""

    def answer(model: str, version=None) -> int:
        outputs = cluster.predict({"x": [0.0]}, model, version=version)
        number = int(outputs["number"][0])
        assert number == int(outputs["word"][0]) == outputs["constant"][0]
        return number

    return answer


@pytest.fixture
def told(cluster, caplog):
    """``told(model, version, error)``: in the model's status, in ``/health`` and, once, in the log."""

    def told(model: str, version: int, error: str) -> None:
        [status] = cluster.status.version_status(model, version)["model_version_status"]
        assert status["status"]["error_message"] == cluster.health()["models"][model]["error"] == error
        assert [record.getMessage() for record in caplog.records].count(error) == 1

    caplog.set_level("INFO", "shared_graph")
    return told


def test_links_that_lead_nowhere_or_in_circles_hold_nothing_up_and_a_version_that_needs_one_is_over(cluster, answer):
    assert answer("linked") == 1
    [status] = cluster.status.version_status("linked", 2)["model_version_status"]
    assert status["state"] == "END" and "variables" in status["status"]["error_message"]


def test_version_0_beside_others_has_its_own_weights(cluster, answer):
    assert [answer("zero", version) for version in (None, 0, "stable", 1)] == [1, 5, 5, 1]
    cluster.set_weights("zero", {"number": np.float32(3)})
    assert cluster.predict({"x": [0.0]}, "zero")["number"].tolist() == [3]
    assert answer("zero", 0) == 5


@IF_SHARED
def test_of_7_beside_007_one_is_taken_and_that_is_told(cluster, answer):
    assert answer("twice") == answer("twice", 7) == 8
    sentence = "Version 7 of model twice is there as 7 and as 007: 7 is taken."
    wait_until(lambda: cluster.health()["parameter_servers"][0]["trouble"] == sentence, 20)


@IF_SHARED
def test_a_link_into_another_folder_is_no_label(cluster):
    assert cluster.health()["models"]["label"]["labels"] == {"stable": 1}


@IF_SHARED
def test_a_label_whose_target_is_moved_away_goes_on_and_that_is_told_until_it_is_back(cluster, folders, answer, told):
    away = f"{folders['label'].path} away"
    os.rename(os.path.join(folders["label"].path, "1"), away)
    assert cluster.reload("label") == 2
    assert (answer("label", "stable"), answer("label")) == (1, 2)
    told("label", 1, "Model label version 1 is not in its folder any more.")
    os.rename(away, os.path.join(folders["label"].path, "1"))
    cluster.reload("label")
    assert cluster.health()["models"]["label"]["error"] is None


@IF_SHARED
@pytest.mark.parametrize("name", ["moved", "sole"])
def test_a_model_whose_folder_is_moved_away_goes_on_and_that_is_told_until_it_is_back(
    cluster, folders, answer, told, name
):
    away = f"{folders[name].path} away"
    shutil.move(folders[name].path, away)
    wait_until(lambda: cluster.health()["models"][name]["error"], 20)
    assert answer(name) == 1
    told(name, 1, f"The folder of model {name} cannot be read: No such file or directory")
    shutil.move(away, folders[name].path)
    wait_until(lambda: not cluster.health()["models"][name]["error"], 20)
    assert answer(name) == 1
