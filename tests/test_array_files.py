"""Arrays as files over HTTP, from both front ends, and small hostile bodies beside them."""

import functools
import gzip
import io
import random
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import error, forget_peak, good, memory_mb, wait_until
from test_hostile import pids
from test_rest_api import HEAVIEST, heavy_body


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_a_file_is_answered_with_a_file(front_end):
    answer = front_end.request("POST", "/v1/models/picky:predict", npy(np.float32([1, 3])))
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/x-npy"
    assert np.load(io.BytesIO(answer.body)).tolist() == [0.5, 1.5]
    body = npz(x=np.float32([[1, 2]]), n=np.int64([3]))
    answer = front_end.request("POST", "/v1/models/several:predict", gzip.compress(body), {"Content-Encoding": "gzip"})
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/x-npz"
    assert {name: array.tolist() for name, array in np.load(io.BytesIO(answer.body)).items()} == {
        "next": [4],
        "scaled": [[3, 6]],
        "total": [9],
    }
    upper = front_end.request("POST", "/v1/models/words:predict?signature_name=upper", npy(np.array(["é two"])))
    assert dict(np.load(io.BytesIO(upper.body)))["word"].tolist() == ["é TWO".encode()]


def test_errors_of_files_are_json(front_end):
    path = "/v1/models/picky:predict"
    error(front_end.request("POST", path, npy(np.array(["a"]))), 400, "takes float32, not strings")
    error(front_end.request("POST", path, npy(np.float32([1, 3]))[:-1]), 400, ".npy")
    error(front_end.request("POST", path, npz(x=np.zeros(65 * 2**20, np.int8))), 413, "64 MiB")
    error(front_end.request("POST", path + "?signature_name=no", npy(np.ones(1))), 400, "signature def")


@functools.cache
def hostile() -> list[tuple[bytes, dict]]:
    """At most 100 KiB: nesting, bombs, a million keys, long numbers, gzip in gzip, files that lie."""
    zeros, packed = io.BytesIO(), {"Content-Encoding": "gzip"}
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(60 * 2**20))
    return [
        (gzip.compress(b'{"instances": [' + b"[]," * 21_000_000), packed),
        (gzip.compress(b'{"instances": [' + b"[]," * 1_000_000 + b"0]}"), packed),
        (gzip.compress(b'{"instances": [' + b",".join([b"0.5"] * 2_000_000) + b"]}"), packed),
        (gzip.compress(b"{" + b",".join(b'"%d":1' % i for i in range(20_000)) + b"}"), packed),
        (b'{"instances": [' + b"1" * 100_000 + b"]}", {}), (b"[" * 100_000, {}), (b'{"a":' * 20_000, {}),
        (gzip.compress(gzip.compress(bytes(2**26))), packed), (gzip.compress(b"") * 5000, packed),
        (zeros.getvalue(), {}),
        (b"\x93NUMPY\1\0" + b"@\0" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,)}".ljust(64), {}),
        (npz(x=np.zeros(9 * 2**20, np.int8)), {}),
        (b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}", {})]  # fmt: skip


@functools.cache
def heavy() -> list[tuple[bytes, dict]]:
    """100 KiB each that become as many objects as are allowed: a packed body may be made larger by zeros behind it."""
    return [(heavy_body(*heaviest), {"Content-Encoding": "gzip"}) for heaviest in HEAVIEST]


@pytest.mark.long
def test_100_hostile_bodies_of_100_kib_restart_no_worker_delay_no_add_and_take_no_memory_that_does_not_come_back(
    front_end, clients
):
    r, before = random.Random(15), pids(front_end)
    bodies = [r.choice(r.choice([hostile(), heavy()])) for _ in range(100)]
    ask = lambda body: front_end.request("POST", "/v1/models/picky:predict", *body).status
    memory = {pid: memory_mb(pid, "VmRSS") for pid in before}
    list(map(forget_peak, before))
    add_s, is_over = [], threading.Event()

    def add() -> None:
        while not is_over.is_set():
            begun = time.monotonic()
            front_end.add(1)
            add_s.append(time.monotonic() - begun)

    with ThreadPoolExecutor(2) as adders:
        futures = [adders.submit(add) for _ in range(2)]
        statuses = [*map(ask, bodies[:50]), *clients(16, ask, bodies[50:])]
        is_over.set()
        [future.result() for future in futures]
    assert set(statuses) <= {200, 400, 413}
    assert pids(front_end) == before
    assert np.percentile(add_s, 99) < 1
    grown = {pid: memory_mb(pid, "VmHWM") - memory[pid] for pid in before}
    assert max(grown.values()) < 300, grown
    wait_until(lambda: all(memory_mb(pid, "VmRSS") < memory[pid] + 100 for pid in before), 30)  # malloc keeps some
    assert good(front_end.post("/v1/models/picky:predict", {"instances": [1]})) == {"predictions": [0.5]}


def test_hostile_bodies_of_100_kib_restart_no_worker(front_end):
    r = random.Random(15)
    before = [worker["pid"] for worker in front_end.get("/health").json["workers"]]
    for _ in range(100):
        body, headers = r.choice(hostile())
        assert len(body) <= 110_000
        begun = time.monotonic()
        answer = front_end.request("POST", "/v1/models/picky:predict", body, headers)
        assert time.monotonic() - begun < 3
        assert answer.status in (200, 400, 413), (answer.status, answer.body[:200])
    assert [worker["pid"] for worker in front_end.get("/health").json["workers"]] == before
    assert good(front_end.post("/v1/models/picky:predict", {"instances": [1]})) == {"predictions": [0.5]}
