"""What is kept in files: whole or not at all, by name, and never taken for a beginning when it has gone."""

import errno
import fcntl
import os

import numpy as np
import pytest

from shared_graph.checkpoints import Checkpoints
from shared_graph.errors import ModelError, Unavailable
from shared_graph.model_source import ADDER_SOURCE, ModelSource


MODEL = ModelSource("m", 1, function="a:b")


@pytest.fixture
def checkpoints(tmp_path):
    """Of a run that has begun, in a folder of its own."""
    (tmp_path / ".run-1").touch()
    return Checkpoints(str(tmp_path), run_id="1", durable=True)


@pytest.mark.parametrize("source", [ADDER_SOURCE, MODEL], ids=str)
def test_a_checkpoint_comes_back_but_cut_short_at_any_length_or_with_any_byte_changed_is_refused_by_name(
    checkpoints, source
):
    assert checkpoints.load(source) == {}
    total = np.float64(0.1) * 3
    checkpoints.save_sum(total)
    checkpoints.save(MODEL, {"sum": total})
    assert checkpoints.load(source) == {"sum": total}
    path = checkpoints.path(source)
    with open(path, "rb") as file:
        whole = file.read()
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for contents in [whole[:length] for length in range(len(whole))] + changed:
        with open(path, "wb") as file:
            file.write(contents)
        try:
            back = checkpoints.load(source)
        except ModelError as error:
            assert path in str(error)
        else:  # a byte that says nothing, such as the date
            assert len(contents) == len(whole) and back == {"sum": total}


def test_what_could_not_be_written_takes_no_room(checkpoints, monkeypatch):
    def savez(file, **arrays):
        file.write(bytes(10**6))
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save(MODEL, {"sum": np.float64(1)})
    before = sorted(os.listdir(checkpoints.folder))
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(Unavailable, match=f"{checkpoints.path(MODEL)}: No space left"):
        checkpoints.save(MODEL, {"sum": np.float64(2)})
    assert sorted(os.listdir(checkpoints.folder)) == before and checkpoints.load(MODEL) == {"sum": 1}


def test_what_is_kept_is_answered_though_there_is_no_room_to_note_that_it_is(checkpoints, monkeypatch):
    """Else what was refused would be there at the next start."""
    write = Checkpoints._write_atomically

    def without_room(self, path, write_it):
        if ".run-" in path:
            raise Unavailable("No space left on device")
        write(self, path, write_it)

    monkeypatch.setattr(Checkpoints, "_write_atomically", without_room)
    checkpoints.save(MODEL, {"sum": np.float64(1)})
    monkeypatch.undo()
    checkpoints.save(MODEL, {"sum": np.float64(2)})
    os.remove(checkpoints.path(MODEL))
    with pytest.raises(ModelError, match="damaged or gone"):
        Checkpoints.load(checkpoints, MODEL)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_sum_whose_file_is_removed_or_replaced_is_kept_all_the_same(checkpoints, how):
    checkpoints.save_sum(1.0)
    path = checkpoints.path(ADDER_SOURCE)
    if how == "replaced":
        with open(f"{path}.backup", "wb") as file:
            file.write(bytes(16))
        os.replace(f"{path}.backup", path)
    else:
        os.remove(path)
    for total in (2.0, 3.0):
        checkpoints.save_sum(total)
        assert checkpoints.load(ADDER_SOURCE) == {"sum": total}


def test_files_that_have_gone_are_not_taken_for_a_beginning(tmp_path):
    (tmp_path / ".run-1").touch()
    Checkpoints(str(tmp_path), run_id="1", durable=True).save(MODEL, {})
    again = Checkpoints(str(tmp_path), run_id="1", durable=True)
    os.remove(again.path(MODEL))
    assert again.load(ADDER_SOURCE) == {}
    with pytest.raises(ModelError, match=again.path(MODEL)):
        again.load(MODEL)
    with pytest.raises(Unavailable, match="variables are gone"):
        Checkpoints(str(tmp_path / "elsewhere"), run_id="1", durable=True)


def test_a_folder_that_cannot_be_locked_is_said_to_be_that(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".run-1").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(Unavailable, match=r"cannot be used: its \.lock: No locks available\.$"):
        Checkpoints(str(tmp_path), run_id="1", durable=True)


def test_the_marks_of_models_that_are_loaded_stay_for_as_long_as_the_run(tmp_path):
    """A worker's, by which it knows a model that ends it, are not gone with a parameter server."""
    for name in (".run-1", ".loading-1-m", ".loading-worker-0-m"):
        (tmp_path / name).touch()
    Checkpoints(str(tmp_path), run_id="1", durable=True)
    marks = lambda: sorted(name for name in os.listdir(tmp_path) if name.startswith((".loading", ".run")))
    assert marks() == [".loading-1-m", ".loading-worker-0-m", ".run-1"]
    (tmp_path / ".run-2").touch()
    Checkpoints(str(tmp_path), run_id="2", durable=True)
    assert marks() == [".run-2"]
