"""What is kept in files: whole or not at all, by name, and never taken for a beginning when it has gone."""

import errno
import fcntl
import os
import shutil
import tempfile
import types

import numpy as np
import pytest

from shared_graph.checkpoints import Checkpoints, temporary_folder
from shared_graph.errors import ModelError, Unavailable
from shared_graph.model_source import ADDER_SOURCE, ModelSource

MODEL = ModelSource("m", 1, function="a:b")


@pytest.fixture
def checkpoints(tmp_path):
    """Of a run that has begun, in a folder of its own."""
    (tmp_path / ".run-1").touch()
    return Checkpoints(str(tmp_path), run_id="1", durable=True, is_first_life=False)


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
    Checkpoints(str(tmp_path), run_id="1", durable=True, is_first_life=False).save(MODEL, {})
    again = Checkpoints(str(tmp_path), run_id="1", durable=True, is_first_life=False)
    os.remove(again.path(MODEL))
    assert again.load(ADDER_SOURCE) == {}
    with pytest.raises(ModelError, match=again.path(MODEL)):
        again.load(MODEL)
    with pytest.raises(Unavailable, match="variables are gone"):
        Checkpoints(str(tmp_path / "elsewhere"), run_id="1", durable=True, is_first_life=False)


def test_the_first_life_makes_the_folder_for_its_own_user_alone_and_no_later_one_does(tmp_path):
    folder = tmp_path / "a" / "b"
    first = Checkpoints(str(folder), run_id="1", durable=False, is_first_life=True)
    assert sorted(os.listdir(folder)) == [".lock", ".run-1"] and folder.stat().st_mode & 0o777 == 0o700
    first.save_sum(1.0)
    first._lock.close()
    assert Checkpoints(str(folder), run_id="1", durable=False, is_first_life=False).load(ADDER_SOURCE) == {"sum": 1.0}
    shutil.rmtree(folder)
    with pytest.raises(Unavailable, match="variables are gone"):
        Checkpoints(str(folder), run_id="1", durable=False, is_first_life=False)
    with pytest.raises(Unavailable, match=r"^The folder for variables cannot be used: /proc/none: "):
        Checkpoints("/proc/none", run_id="1", durable=False, is_first_life=True)


def test_a_folder_that_cannot_be_locked_is_said_to_be_that(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".run-1").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(Unavailable, match=r"cannot be used: its \.lock: No locks available\.$"):
        Checkpoints(str(tmp_path), run_id="1", durable=True, is_first_life=False)


def test_the_marks_of_models_that_are_loaded_stay_for_as_long_as_the_run(tmp_path):
    """A worker's, by which it knows a model that ends it, are not gone with a parameter server."""
    for name in (".run-1", ".loading-1-m", ".loading-worker-0-m"):
        (tmp_path / name).touch()
    Checkpoints(str(tmp_path), run_id="1", durable=True, is_first_life=False)
    marks = lambda: sorted(name for name in os.listdir(tmp_path) if name.startswith((".loading", ".run")))
    assert marks() == [".loading-1-m", ".loading-worker-0-m", ".run-1"]
    (tmp_path / ".run-2").touch()
    Checkpoints(str(tmp_path), run_id="2", durable=True, is_first_life=False)
    assert marks() == [".run-2"]


def test_strings_come_back_as_they_were_with_zeros_at_their_ends(checkpoints):
    words = np.fromiter([b"a\0", b"", b"\0\0", "é".encode()], object).reshape(2, 2)
    checkpoints.save(MODEL, {"words": words, "w": np.ones(2, np.float32)})
    back = checkpoints.load(MODEL)
    assert (back["words"].dtype, back["words"].tolist()) == (object, words.tolist())
    assert (back["w"].dtype, back["w"].tolist()) == (np.float32, [1, 1])


def test_weights_of_another_graph_are_refused_and_those_that_do_not_say_of_which_they_are_taken(checkpoints):
    checkpoints.save(MODEL, {"w": np.float32(1)}, graph="one")
    assert checkpoints.load(MODEL, graph="one") == {"w": 1}
    with pytest.raises(ModelError, match=f"{checkpoints.path(MODEL)} is not of this model"):
        checkpoints.load(MODEL, graph="other")
    checkpoints.save(MODEL, {"w": np.float32(2)})
    assert checkpoints.load(MODEL, graph="other") == checkpoints.load(MODEL) == {"w": 2}


def test_a_folder_is_one_programs_at_a_time(checkpoints):
    with pytest.raises(Unavailable, match=f"{checkpoints.folder} is in use by another program"):
        Checkpoints(checkpoints.folder, run_id="1", durable=True, is_first_life=False)
    checkpoints._lock.close()
    Checkpoints(checkpoints.folder, run_id="1", durable=True, is_first_life=False)


def test_what_others_left_is_found_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    for name in (".run-1", ".run-2", ".loading-1-m"):
        (folder / name).touch()
    Checkpoints(str(folder), run_id="2", durable=False, is_first_life=False)
    assert sorted(os.listdir(folder)) == [".lock", ".run-2"]


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_to_last_through_a_power_cut_is_on_the_disk_with_its_name_before_it_counts(
    tmp_path, monkeypatch, durable
):
    (tmp_path / ".run-1").touch()
    checkpoints, synced = Checkpoints(str(tmp_path), run_id="1", durable=durable, is_first_life=False), []

    def note(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.basename(path), os.path.isdir(path) or os.path.getsize(path)))

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "fdatasync", note)
    folder = (tmp_path.name, True)
    for save, expected in [
        (lambda: checkpoints.save_sum(1.0), [("adder.sum.new", 16), folder, (".run-1.new", 9), folder]),
        (lambda: checkpoints.save_sum(2.0), [("adder.sum", 16)]),
        (lambda: checkpoints.save(MODEL, {}), [("m.1.npz.new", 22), folder, (".run-1.new", 17), folder]),
        (lambda: checkpoints.save(MODEL, {}), [("m.1.npz.new", 22), folder]),
    ]:
        save()
        assert synced == (expected if durable else [])
        synced.clear()


def test_a_sum_is_refused_on_a_full_disk_and_taken_where_there_is_no_limit(checkpoints, monkeypatch):
    checkpoints.save_sum(1.0)
    disk = types.SimpleNamespace(f_blocks=1, f_bavail=0)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: disk)
    with pytest.raises(Unavailable, match=f"{checkpoints.path(ADDER_SOURCE)}: No space left"):
        checkpoints.save_sum(2.0)
    assert checkpoints.load(ADDER_SOURCE) == {"sum": 1}
    disk.f_blocks = 0
    checkpoints.save_sum(3.0)
    assert checkpoints.load(ADDER_SOURCE) == {"sum": 3}


def test_weights_that_are_saved_have_another_stamp_than_those_of_before(checkpoints):
    stamps = [checkpoints.stamp(MODEL)]
    for number in range(3):
        checkpoints.save(MODEL, {"w": np.zeros(number)})
        assert checkpoints.stamp(MODEL) == checkpoints.stamp(MODEL)
        stamps.append(checkpoints.stamp(MODEL))
    assert stamps[0] == "" and len(set(stamps)) == 4


def test_what_is_found_out_is_found_once_for_each_of_the_last_hundred_keys_and_anew_where_its_file_is_damaged(
    checkpoints,
):
    found = []

    def cached(key: str) -> list:
        return checkpoints.cached(key, lambda: found.append(key) or [key])

    for key in map(str, range(101)):
        assert cached(key) == [key]
    assert [cached("1"), cached("100")] == [["1"], ["100"]] and len(found) == 101
    assert cached("0") == ["0"] and len(found) == 102
    for contents in (b"{", b"5", b"[1]", b"\xff"):
        with open(os.path.join(checkpoints.folder, ".cached.json"), "wb") as file:
            file.write(contents)
        assert cached("1") == ["1"] == cached("1")
    assert len(found) == 106


def test_the_folder_of_a_run_is_the_same_in_each_life_however_full_its_disk_is(monkeypatch, tmp_path):
    """``tempfile`` would look for one with room."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/elsewhere")
    assert temporary_folder("1") == str(tmp_path / "ray_tensorflow_1")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert temporary_folder("1") == "/tmp/ray_tensorflow_1"
