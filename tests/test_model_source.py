"""What lies in a model's folder: versions, labels, and links that lead nowhere, elsewhere or in circles."""

import errno
import os
import pathlib
import shutil
import tempfile

import pytest

from shared_graph.bundles import bundled, fetched_bundle, read_slice
from shared_graph.errors import ModelError
from shared_graph.model_source import ModelSource, model_source, what_is_wrong

CIRCLES = {  # links, by where they are: each of them would be followed for ever by who follows all
    "two links to here": {"a": ".", "b": "."},
    "two links upwards": {"a": "..", "b": "../.."},
    "folders that lead to each other": {"one/other": "../two", "two/other": "../one"},
    "a link to itself": {"a": "a"},
    "links to each other": {"a": "b", "b": "a"},
    "a link that leads nowhere": {"a": "/nothing/here"},
    "a link through a file": {"a": "words/below"},
}


def write(*paths) -> None:
    """Files that are there, which is all that is asked here."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


@pytest.fixture
def source(tmp_path) -> ModelSource:
    """With a version 1."""
    write(tmp_path / "m" / "1" / "saved_model.pb")
    return ModelSource("m", None, str(tmp_path / "m"))


@pytest.mark.parametrize("links", CIRCLES.values(), ids=CIRCLES)
@pytest.mark.parametrize("place", ["", "assets"])
async def test_a_version_with_links_that_lead_nowhere_or_in_circles_is_found_and_handed_out(source, links, place):
    version = source.versions()[1]
    top = os.path.join(version.folder, place)
    os.makedirs(top, exist_ok=True)
    with open(os.path.join(top, "words"), "w") as file:
        file.write("one")
    os.symlink("words", os.path.join(top, "other words"))
    for link, target in links.items():
        os.makedirs(os.path.dirname(os.path.join(top, link)), exist_ok=True)
        os.symlink(target, os.path.join(top, link))
    found = source.look()
    files = {path for path, size, _ in found.files_seen[1] if size == 3}
    assert {os.path.join(top, "words"), os.path.join(top, "other words")} <= files and len(found.files_seen[1]) < 10
    with bundled(version, with_assets=True) as bundle:
        pass  # here it would be loaded

    async def read(offset: int) -> bytes:
        return read_slice(bundle, offset)

    async with fetched_bundle(read) as folder:
        assert os.path.isfile(os.path.join(folder, "saved_model.pb"))
        for name in ("words", "other words") if place == "assets" else ():
            with open(os.path.join(folder, place, name)) as file:
                assert file.read() == "one"


@pytest.fixture
def as_stranger():
    """A folder ``m`` with versions 1 and 2; this process may not look into the second one, though it be root's."""
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o755)
    write(*(pathlib.Path(folder) / "m" / version / "saved_model.pb" for version in "12"))
    pathlib.Path(folder, "m", "1", "saved_model.pb").write_bytes(b"\x08\x01")
    closed = os.path.join(folder, "m", "2")
    os.chmod(closed, 0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield ModelSource("m", None, os.path.join(folder, "m"))
    os.seteuid(user)
    os.chmod(closed, 0o755)
    shutil.rmtree(folder)


def test_a_version_that_is_closed_to_us_is_there_and_who_loads_it_says_why(as_stranger):
    source = as_stranger
    assert sorted(source.look().versions) == [1, 2] and what_is_wrong(source) is None
    closed = source.versions()[2]
    assert "saved_model.pb cannot be read: Permission denied" in what_is_wrong(closed)
    with pytest.raises(PermissionError), bundled(closed, with_assets=True):
        pass


@pytest.mark.parametrize("number, is_there", [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOENT, False)])
def test_a_version_that_cannot_be_seen_just_now_is_not_taken_for_one_that_has_gone(
    source, monkeypatch, number, is_there
):
    def stat(path, **how):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "stat", stat)
    assert list(source.versions()) == [1] * is_there


def test_a_version_that_changes_while_it_is_loaded_is_refused(source):
    version = source.versions()[1]
    with pytest.raises(ModelError, match="its files changed while it was loaded"), bundled(version, with_assets=True):
        write(pathlib.Path(version.folder) / "assets" / "words")


def test_a_version_whose_files_are_there_twice_is_taken_once_and_that_is_told(source, tmp_path):
    assert source.oddity() is None
    write(*(tmp_path / "m" / name / "saved_model.pb" for name in ("007", "07", "0008")))
    write(tmp_path / "m" / "7" / "nothing to serve")
    write(tmp_path / "m" / "٩" / "saved_model.pb")  # a digit, but not one of ours
    folders = {number: os.path.basename(version.folder) for number, version in source.versions().items()}
    assert folders == {1: "1", 7: "07", 8: "0008"}
    assert source.oddity() == "Version 7 of model m is there as 07 and as 007: 07 is taken."
    write(tmp_path / "m" / "7" / "saved_model.pb")
    assert source.versions()[7].folder == str(tmp_path / "m" / "7")
    assert source.oddity() == "Version 7 of model m is there as 7 and as 07 and as 007: 7 is taken."


def test_a_label_is_a_link_to_a_version_beside_it_and_what_leads_elsewhere_is_none(source, tmp_path):
    write(tmp_path / "other" / "5" / "saved_model.pb", tmp_path / "m" / "below" / "6" / "saved_model.pb")
    targets = {
        "beside": "1",
        "absolute": str(tmp_path / "m" / "1"),
        "with_a_slash": "1/",
        "roundabout": "../m/1",
        "not_there": "9",
        "elsewhere": "../other/5",
        "absolute_elsewhere": str(tmp_path / "other" / "5"),
        "deeper": "below/6",
        "itself": "itself",
        "of_a_label": "beside",
        "here": ".",
        "7": "1",
    }
    for label, target in targets.items():
        os.symlink(target, tmp_path / "m" / label)
    labels = {"beside": 1, "absolute": 1, "with_a_slash": 1, "roundabout": 1, "not_there": 9}
    assert source.labels() == labels
    os.symlink(tmp_path / "m", tmp_path / "link")
    assert source._replace(folder=str(tmp_path / "link")).labels() == labels


def test_a_folder_whose_name_cannot_stand_in_an_address_needs_another_name(tmp_path):
    folder = tmp_path / "two\nlines"
    write(folder / "1" / "saved_model.pb")
    for where in (folder, folder / "1"):
        with pytest.raises(ValueError, match=r"NAME= before it, since 'two\\nlines' cannot stand in an address"):
            model_source(where)
    assert model_source(f"m={folder}").name == "m"
    write(tmp_path / "grün und blau" / "1" / "saved_model.pb")
    assert model_source(tmp_path / "grün und blau").name == "grün und blau"
