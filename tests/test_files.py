"""Whole files: ``--input`` and ``--output`` of the command, larger than memory, whole or not at all."""

import asyncio
import contextlib
import functools
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from conftest import REPOSITORY, wait_until
from ray_tensorflow import Error, ModelError, predict_file
from test_map import assert_same_bits, idle, several

# -- the function behind the command -----------------------------------------------------------------------------------

rows = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
pairs = {"x": rows[:, :2].copy(), "n": np.arange(1000)}


def predict(cluster, model, source, target):
    asyncio.run(predict_file(cluster, model, str(source), str(target)))


def save(path, value):
    np.savez(path, **value) if isinstance(value, dict) else np.save(path, value)


def load(path):
    return np.load(path) if path.suffix == ".npy" else dict(np.load(path))


@pytest.mark.parametrize("model, given, source, target, expected", [
    ("picky", abs(rows[:, 0]), "in.npy", "out.npy", abs(rows[:, 0]) / 2),
    ("picky", {"x": abs(rows[:, 0])}, "in.npz", "out.npy", abs(rows[:, 0]) / 2),
    ("picky", abs(rows[:1, 0]), "in.npy", "out.npz", {"y": abs(rows[:1, 0]) / 2}),
    ("picky", np.arange(5), "in.npy", "out.npy", np.arange(5, dtype=np.float32) / 2),
    ("echo", rows.reshape(500, 1, 6), "in.npy", "out.npy", rows.reshape(500, 1, 6)),
    ("several", pairs, "in.npz", "out.npz", several(**pairs)),
    ("fixed", rows, "in.npy", "out.npy", np.cumsum(rows.reshape(-1, 2, 3), axis=1).reshape(-1, 3)),
    ("words", np.array(["two", "zero", "never"]), "in.npy", "out.npy", np.array([2, 0, 3])),
    ("picky", rows[:0, 0], "in.npy", "out.npy", rows[:0, 0]),
], ids=["npy", "npz to npy", "npy to npz", "integers", "shapes", "several", "fixed batch", "text", "no rows"])
def test_a_file_is_predicted_whole(cluster, tmp_path, capfd, model, given, source, target, expected):
    save(tmp_path / source, given)
    predict(cluster, model, tmp_path / source, tmp_path / target)
    as_dict = lambda value: value if isinstance(value, dict) else {"": value}
    assert_same_bits(as_dict(load(tmp_path / target)), as_dict(expected))
    assert sorted(os.listdir(tmp_path)) == sorted([source, target])
    total = len(next(iter(as_dict(given).values())))
    if total:
        assert re.search(rf"^{total}/{total} rows  \d+ rows/s  0 s left$", capfd.readouterr().err, re.MULTILINE)


def truncated(path):
    os.truncate(path, os.path.getsize(path) - 100)


def corrupted(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 3)
        file.write(b"\xff" * 20)


@pytest.mark.parametrize("model, given, source, target, spoil, message", [
    ("picky", None, "in.npy", "out.npy", None, "in.npy cannot be read: .*No such file"),
    ("picky", {"z": rows[:, 0]}, "in.npz", "out.npy", None, r"has \['z'\], but the inputs are \['x'\]"),
    ("several", rows, "in.npy", "out.npz", None, r"but the inputs are \['n', 'x'\] \(.npz holds several\)"),
    ("several", pairs | {"n": np.arange(3)}, "in.npz", "out.npz", None, "different numbers of rows"),
    ("several", pairs, "in.npz", "out.npy", None, r"the outputs are \['next', 'scaled', 'total'\]: name it .npz"),
    ("picky", abs(rows[:, 0]), "in.npy", "out.npy", truncated, "ends before its last row"),
    ("picky", rows[:, 0], "in.npy", "out.npy", lambda path: os.truncate(path, 5), "in.npy cannot be read"),
    ("several", pairs, "in.npz", "out.npz", truncated, "in.npz cannot be read"),
    ("several", pairs, "in.npz", "out.npz", corrupted, "in.npz"),
    ("linear", np.asfortranarray(rows), "in.npy", "out.npy", None, "in C order"),
    ("picky", np.array([1.0, "one"], object), "in.npy", "out.npy", None, "without Python objects"),
    ("picky", np.float32(1), "in.npy", "out.npy", None, "must be an array with rows"),
    ("picky", rows[:, 0], "in.npy", "nowhere/out.npy", None, "nowhere/out.npy cannot be written: No such file"),
    ("picky", rows[:, 0], "in.npy", "/proc/out.npy", None, "/proc/out.npy cannot be written"),
    ("picky", np.r_[abs(rows[:, 0]), -1].astype("f4"), "in.npy", "out.npy", None, r"batch \d+: .*must not be negative"),
    ("scalar", rows[:, 0], "in.npy", "out.npy", None, "cannot be written row by row"),
], ids=["missing", "name", "npy for inputs", "rows differ", "npy for outputs", "truncated", "header truncated", "npz truncated",
        "npz corrupted", "Fortran order", "objects", "scalar", "no folder", "not writable", "half way", "not by row"])
def test_what_cannot_be_predicted_is_one_sentence_and_no_file(cluster, tmp_path, model, given, source, target, spoil, message):
    if given is not None:
        save(tmp_path / source, given)
        if spoil:
            spoil(tmp_path / source)
    before = os.listdir(tmp_path)
    with pytest.raises(Error, match=message) as raised:
        predict(cluster, model, tmp_path / source, tmp_path / target)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == before
    wait_until(lambda: idle(cluster), 10, "nothing in flight")


def test_an_older_output_stays_until_the_new_one_is_whole(cluster, tmp_path):
    np.save(tmp_path / "out.npy", rows)
    np.save(tmp_path / "in.npy", np.r_[np.ones(500), -1].astype(np.float32))
    with pytest.raises(ModelError):
        predict(cluster, "picky", tmp_path / "in.npy", tmp_path / "out.npy")
    assert load(tmp_path / "out.npy").tobytes() == rows.tobytes()
    np.save(tmp_path / "in.npy", np.ones(500, np.float32))
    predict(cluster, "picky", tmp_path / "in.npy", tmp_path / "out.npy")
    assert load(tmp_path / "out.npy").tolist() == [0.5] * 500


# -- the command -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(source, target, model="example_models:peak", **popen):
    arguments = ["--workers", "1", "--model", model, "--input", str(source), "--output", str(target)]
    process = subprocess.Popen(
        [sys.executable, os.path.join(REPOSITORY, "ray_tensorflow.py"), *arguments], stdout=subprocess.PIPE, text=True, **popen)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """2 GiB, nearly all of it a hole that takes no room on the disk: 2048 rows, every 64th with its number in it."""
    path = tmp_path_factory.mktemp("large") / "in.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (2048, 2**18))
    for row in range(0, 2048, 64):
        array[row, row] = row
    del array
    assert os.path.getsize(path) > 2**31
    yield path
    path.unlink()


def memory(pid, what) -> float:
    """Of a living process, in MB: what it has (VmRSS), or the most it ever had (VmHWM)."""
    with open(f"/proc/{pid}/status") as file:
        found = re.search(rf"{what}:\s+(\d+) kB", file.read())
    return int(found[1]) * 1024 / 1e6 if found else 0


def test_2_gb_are_predicted_with_less_than_300_mb_of_memory(large_file, tmp_path):
    peak = before = 0
    with command(large_file, tmp_path / "out.npy", stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("started")
        before = memory(process.pid, "VmRSS")
        while process.poll() is None:
            with contextlib.suppress(OSError):
                peak = max(peak, memory(process.pid, "VmHWM"))
            time.sleep(0.02)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert load(tmp_path / "out.npy").tolist() == [row * (row % 64 == 0) for row in range(2048)]
    assert re.search(r"^2048/2048 rows  \d+ rows/s  0 s left$", errors, re.MULTILINE)
    assert os.listdir(tmp_path) == ["out.npy"]
    assert 0 < peak - before < 300


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_half_way_no_file_and_no_process_is_left(large_file, tmp_path, number, status):
    """On a terminal, where progress is shown in place; the leak detector looks for the processes."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            for part in iter(functools.partial(os.read, ours, 4096), b""):
                shown.extend(part)

    with command(large_file, tmp_path / "out.npy", stderr=theirs) as process:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: re.search(rb"\r\x1b\[K\d+/2048 rows  \d+ rows/s  \d+ s left", shown), what="progress")
        assert os.listdir(tmp_path) != []
        process.send_signal(number)
        assert process.wait(60) == status, shown
    reader.join()
    os.close(ours)
    assert b"2048/2048" not in shown and b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
    with command(tmp_path / "in.npy", tmp_path / "out.npy", "example_models:picky", stderr=subprocess.PIPE) as process:
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"ray_tensorflow.py: error: {tmp_path}/in.npy cannot be read: ")
    assert "Traceback" not in errors and os.listdir(tmp_path) == []
