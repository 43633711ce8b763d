"""Whole files: ``--input`` and ``--output`` of the command, larger than memory, whole or not at all."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from conftest import wait_until
from test_command import running, with_mounts

from shared_graph.errors import Error, InvalidRequest
from shared_graph.files import check_files, predict_file, with_one_version
from shared_graph.model_source import ModelSource
from shared_graph.options import Options

rows = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
column = abs(rows[:, 0])
pairs = {"x": rows[:, :2], "n": np.arange(1000)}
scaled = pairs["x"] * pairs["n"].astype(np.float32)[:, None]
several = {"scaled": scaled, "total": scaled[:, 0] + scaled[:, 1], "next": pairs["n"] + 1}


def save(path, value) -> None:
    np.savez(path, **value) if isinstance(value, dict) else np.save(path, value)


def load(path) -> dict:
    """Arrays by name; that of a file which holds one has none."""
    return {"": np.load(path)} if path.suffix == ".npy" else dict(np.load(path))


@pytest.mark.parametrize(
    "model, given, source, target, expected",
    [
        ("picky", column, "in.npy", "out.npy", {"": column / 2}),
        ("picky", {"x": column}, "in.npz", "out.npy", {"": column / 2}),
        ("picky", column[:1], "in.npy", "out.npz", {"y": column[:1] / 2}),
        ("picky", np.arange(5), "in.npy", "out.npy", {"": np.arange(5, dtype=np.float32) / 2}),
        ("echo", np.asfortranarray(rows), "in.npy", "out.npy", {"": rows}),
        ("several", pairs, "in.npz", "out.npz", several),
        ("words", np.array(["two", "zero", "never"]), "in.npy", "out.npy", {"": np.array([2, 0, 3])}),
        ("picky", column[:0], "in.npy", "out.npy", {"": column[:0]}),
    ],
    ids=["npy", "npz to npy", "npy to npz", "integers", "Fortran order", "several", "text", "no rows"],
)
def test_a_file_is_predicted_whole(cluster, tmp_path, capfd, model, given, source, target, expected):
    save(tmp_path / source, given)
    predict_file(cluster, model, str(tmp_path / source), str(tmp_path / target))
    found = load(tmp_path / target)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert sorted(os.listdir(tmp_path)) == sorted([source, target])
    total = len(found[name])
    assert re.search(rf"^{total}/{total} rows  \d+ rows/s  0 s left$", capfd.readouterr().err, re.MULTILINE)


class Played:
    """A cluster whose model answers each batch, which is one row, with the next one of these outputs."""

    options = Options(max_batch=1)

    def __init__(self, *answers: dict):
        self.answers = answers

    def map(self, batches, model):
        return (outputs for _, outputs in zip(batches, self.answers))

    def predict(self, folder, target: str) -> dict:
        rows = np.zeros((len(self.answers) if len(next(iter(self.answers[0].values()))) else 0, 2**14))
        np.save(folder / "in.npy", rows)
        predict_file(self, "m", str(folder / "in.npy"), str(folder / target))
        return load(folder / target)


def texts(*strings: bytes) -> np.ndarray:
    return np.array([*strings, None], object)[:-1]


def test_texts_are_written_as_wide_as_the_longest(tmp_path):
    played = Played(*({"y": texts(b"x" * length)} for length in (0, 2, 4)))
    assert played.predict(tmp_path, "out.npy")[""].tolist() == [b"", b"xx", b"xxxx"]
    assert Played({"y": texts()}).predict(tmp_path, "none.npy")[""].dtype == "S1"


def test_outputs_of_any_name_are_written(tmp_path):
    outputs = {"file": np.ones(1), "allow_pickle": texts(b"a"), "a/b": np.ones((1, 2))}
    found = Played(outputs).predict(tmp_path, "out.npz")
    assert {name: array.tolist() for name, array in found.items()} == {
        "file": [1],
        "allow_pickle": [b"a"],
        "a/b": [[1, 1]],
    }


@pytest.mark.parametrize(
    "values, message",
    [
        (
            [np.ones((1, 3)), np.ones((1, 1))],
            r"'y' has rows of shape \[3\] and of \[1\], which one array does not hold",
        ),
        ([np.ones((1, 3)), np.ones((1, 2))], r"\[3\] and of \[2\]"),
        ([texts(b"a", b"b").reshape(1, 2), texts(b"a").reshape(1, 1)], r"\[2\] and of \[1\]"),
        ([texts(b"a"), texts(b"\1\0\0")], "'y' has a string that ends in a zero byte"),
        ([np.ones(1, ml_dtypes.bfloat16)], "'y' is of type bfloat16, which a .npy does not have"),
    ],
    ids=["narrower", "other width", "texts", "zeros", "bfloat16"],
)
def test_what_a_file_would_hold_otherwise_is_refused_and_nothing_is_written(tmp_path, values, message):
    with pytest.raises(InvalidRequest, match=message):
        Played(*({"y": value} for value in values)).predict(tmp_path, "out.npy")
    assert os.listdir(tmp_path) == ["in.npy"]


FULL = """
import errno, os, pathlib, sys
import numpy as np
from test_files import Played

folder = pathlib.Path(sys.argv[1])
try:
    Played({"y": np.ones((1, 2**21))}).predict(folder, "out.npy")
except OSError as error:
    assert error.errno == errno.ENOSPC and os.listdir(folder) == ["in.npy"], os.listdir(folder)
    print("no room")
"""


def test_without_room_for_the_outputs_it_is_told_and_nothing_is_left(tmp_path):
    """The file was a hole, and to write to a hole that cannot be filled ends a process."""
    before = with_mounts(f"mount -t tmpfs -o size=8m none {tmp_path}")
    done = subprocess.run([*before, sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stdout == "no room\n", (done.returncode, done.stderr)


def cut(path) -> None:
    os.truncate(path, os.path.getsize(path) - 100)


def corrupt(path) -> None:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 3)
        file.write(b"\xff" * 20)


@pytest.mark.parametrize(
    "model, given, source, target, spoil, message",
    [
        ("picky", None, "in.npy", "out.npy", None, "in.npy"),
        ("picky", {"z": column}, "in.npz", "out.npy", None, r"\['x'\], not \['z'\]"),
        ("several", rows, "in.npy", "out.npz", None, r"\['n', 'x'\]"),
        ("several", pairs | {"n": np.arange(3)}, "in.npz", "out.npz", None, "in.npz.* as many rows"),
        ("several", pairs, "in.npz", "out.npy", None, r"\['next', 'scaled', 'total'\]: name it .npz"),
        ("picky", column, "in.npy", "out.npy", cut, "in.npy"),
        ("picky", column, "in.npy", "out.npy", lambda path: os.truncate(path, 5), "in.npy"),
        ("several", pairs, "in.npz", "out.npz", corrupt, "in.npz"),
        ("picky", np.array([1.0, "one"], object), "in.npy", "out.npy", None, "in.npy"),
        ("picky", np.float32(1), "in.npy", "out.npy", None, "in.npy"),
        ("picky", np.r_[column, -1].astype("f4"), "in.npy", "out.npy", None, r"batch \d+: .*must not be negative"),
        ("scalar", column, "in.npy", "out.npy", None, "not one row for each"),
    ],
    ids=[
        "missing",
        "name",
        "npy for inputs",
        "rows differ",
        "npy for outputs",
        "truncated",
        "header truncated",
        "npz corrupted",
        "objects",
        "scalar",
        "half way",
        "not by row",
    ],
)
def test_what_cannot_be_predicted_is_one_sentence_and_an_older_output_stays(
    cluster, tmp_path, model, given, source, target, spoil, message
):
    if given is not None:
        save(tmp_path / source, given)
    if spoil:
        spoil(tmp_path / source)
    before = os.listdir(tmp_path)
    (tmp_path / target).write_text("an older output")
    with pytest.raises(Error, match=message) as raised:
        predict_file(cluster, model, str(tmp_path / source), str(tmp_path / target))
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, target])
    assert (tmp_path / target).read_text() == "an older output"


def test_a_file_is_predicted_by_the_version_that_is_the_highest_when_it_begins(models):
    options = with_one_version(Options(model=f"w={models['words']}"))
    assert options.model == (ModelSource("w", 10, os.path.join(models["words"], "10")),)
    options = Options(model="example_models:picky")
    assert with_one_version(options) == options


def test_an_output_that_is_there_is_replaced_where_it_is_and_stays_as_private(cluster, tmp_path):
    save(tmp_path / "in.npy", column)
    (tmp_path / "real.npy").write_bytes(b"")
    (tmp_path / "real.npy").chmod(0o600)
    (tmp_path / "link.npy").symlink_to("real.npy")
    predict_file(cluster, "picky", str(tmp_path / "in.npy"), str(tmp_path / "link.npy"))
    assert (tmp_path / "link.npy").is_symlink() and (tmp_path / "real.npy").stat().st_mode & 0o777 == 0o600
    assert np.array_equal(np.load(tmp_path / "real.npy"), column / 2)


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("no.npy", "out.npy", "--input .*no.npy: there is no such file"),
        (".", "out.npy", "no such file"),
        ("in.npy", "no/out.npy", "--output .*out.npy: there is no folder .*no$"),
        ("in.npy", "folder.npy", "--output .*folder.npy: it is there, and no file$"),
    ],
)
def test_files_that_are_not_there_are_told_before_anything_starts(tmp_path, source, target, message):
    save(tmp_path / "in.npy", rows)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(Error, match=message):
        check_files(str(tmp_path / source), str(tmp_path / target))
    with command(tmp_path / source / "x.npy", tmp_path / target) as run:
        assert run.wait(30) == 1
        assert re.fullmatch("ray_tensorflow.py: error: --input .*x.npy: there is no such file\n", run.read("stderr"))


ROWS = 2**13


def command(source, target):
    options = "--workers", "1", "--model", "example_models:peak", "--input", str(source), "--output", str(target)
    return running(*options)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """512 MiB, nearly all of it a hole that takes no room on the disk: every 64th row has its number in it."""
    path = tmp_path_factory.mktemp("large") / "in.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (ROWS, 2**14))
    for row in range(0, ROWS, 64):
        array[row, row] = row
    del array
    yield path
    path.unlink()


def memory_mb(pid: int) -> float:
    """What a living process has of its own, without the files that it has mapped."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        if found := re.search(r"RssAnon:\s+(\d+) kB", file.read()):
            return int(found[1]) * 1024 / 1e6
    return 0


@pytest.mark.long
def test_a_large_file_is_predicted_with_a_fraction_of_it_in_memory(large_file, tmp_path):
    with command(large_file, tmp_path / "out.npy") as run:
        wait_until(lambda: run.lines)
        assert run.lines[0].startswith("started")
        before = peak = memory_mb(run.process.pid)
        while run.process.poll() is None:
            peak = max(peak, memory_mb(run.process.pid))
            time.sleep(0.02)
        assert run.wait() == 0, run.read("stderr")
    assert np.load(tmp_path / "out.npy").tolist() == [row * (row % 64 == 0) for row in range(ROWS)]
    assert os.listdir(tmp_path) == ["out.npy"]
    assert 0 < peak - before < 200


@pytest.mark.long
def test_interrupted_half_way_no_file_and_no_process_is_left(large_file, tmp_path):
    with command(large_file, tmp_path / "out.npy") as run:
        wait_until(lambda: "rows/s" in run.read("stderr"), what="progress")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        errors = run.read("stderr")
        assert f"{ROWS}/{ROWS}" not in errors and "Traceback" not in errors
        assert os.listdir(tmp_path) == [] and (run.left, run.files()) == ({}, [])
