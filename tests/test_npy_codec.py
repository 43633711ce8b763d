"""Bodies that are numpy's files: read without trust, written without loss."""

import io
import resource
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import in_a_process_of_its_own
from numpy.lib import format as npy_format
from test_json_codec import refused, strings

from shared_graph.bodies import MAX_BODY_BYTES
from shared_graph.errors import InvalidRequest
from shared_graph.npy_codec import MAX_FILES, MAX_HEADER, MAX_STRINGS, read_arrays, write_arrays


def npy(array, **more) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def npz(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def header(text: str | bytes, version: bytes = b"\1\0", data: bytes = b"") -> bytes:
    """A ``.npy`` with this for its header."""
    text = text.encode() if isinstance(text, str) else text
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(text)) + text + data


def claiming(shape: str, descr: str = "'<f4'", data: bytes = bytes(8), is_fortran: bool = False) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {is_fortran}, 'shape': {shape}}}\n", data=data)


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5), np.zeros((0, 3), np.int8), np.zeros((3, 0)),
    np.float64([np.nan, -0.0]),
    np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(6, dtype=">f4"), np.array([True]),
    np.array(["é", "a\0b", ""]), np.array([b"ab", b""]),
    np.array(["😀"], ">U3"), np.zeros(2, "V2"), np.float16([1.5]), np.complex64([1j])]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{list(array.shape)}")
def test_an_array_is_read_as_numpy_reads_it(array):
    bodies = {"npy": npy(array), "npz": npz(x=array), "packed": npz(np.savez_compressed, x=array, y=array)}
    for kind, body in bodies.items():
        read = read_arrays(body)
        assert isinstance(read, dict) == (kind != "npy")
        for found in read.values() if isinstance(read, dict) else [read]:
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert read.keys() == {"x", "y"}


def test_version_2_is_read_and_so_is_an_array_that_is_not_aligned():
    file = io.BytesIO()
    npy_format.write_array(file, np.arange(3), version=(2, 0))
    assert read_arrays(file.getvalue()).tolist() == [0, 1, 2]
    odd = header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}", data=np.float64([1, 2]).tobytes())
    found = read_arrays(odd)
    assert found.tolist() == [1, 2] and found.flags.aligned


DAMAGED = [
    b"\x93NUMPY", b"\x93NUMPY\1", b"\x93NUMPY\1\0\xff", b"\x93NUMPY\x09\0" + npy([1])[8:], header(""), header("{}"),
    header("x" * 100),
    header("(" * 1500), header("-" * 1500 + "1"), header("[" * 90 + "]" * 90), header("{'descr': '<f4'}"),
    header("__import__('os')"), header(b"\xff" * 50),
    header("{" + " " * MAX_HEADER + "}"), header("'''"), header("\t\n  1\n 2"), header("1" * 1900),
    claiming("(3,)"), claiming("(1,)"), claiming("()"), claiming("(-1, -2)"), claiming("(-2,)"),
    claiming("(10**15,)"), claiming("(1000000000000000,)"),
    claiming("(0, 99999999999999999999)", data=b""), claiming("(" + "1," * 64 + "1, 2)"), claiming("(2.0,)"),
    claiming("2"), claiming("None"),
    claiming("(2,)", "'<U0'"), claiming("(99999999999,)", "'|S0'", b""), claiming("(99999999999,)", "'|V0'", b""),
    claiming("(2,)", "'nonsense'"), claiming("(2,)", "5"), claiming("(2,)", "None"),
    claiming("(1,)", "'<U2'", b"\xff" * 8), claiming("(1,)", "'>U2'", b"\0\x11\0\0" * 2),
    npy([1, 2])[:-1], npy([1, 2]) + b"x", npy([])[:40]]  # fmt: skip


@pytest.mark.parametrize("body", DAMAGED, ids=lambda body: repr(body[10:70]))
def test_a_damaged_npy_is_refused_in_a_sentence(body):
    refused(".npy", read_arrays, body)
    refused("'x' in the .npz is not a .npy that can be read", read_arrays, zipped({"x.npy": body}))
    with pytest.raises(InvalidRequest, match=r"^((?!0x[0-9a-f]{6}).)*$"):  # no address of an object
        read_arrays(body)


@in_a_process_of_its_own
def test_nothing_is_allocated_on_the_word_of_a_damaged_npy():
    for body in DAMAGED:
        tracemalloc.start()
        refused(".npy", read_arrays, body)
        assert tracemalloc.get_traced_memory()[1] < 2**20, body[10:70]
        tracemalloc.stop()


@pytest.mark.parametrize("body", [
    npy(np.array([1, "a"], object), allow_pickle=True), claiming("(2,)", "'|O'"), claiming("(1,)", "'|O8'"),
    npy(np.zeros(1, [("a", "f4"), ("b", "i4")])), npy(np.zeros(1, [("a", object)]), allow_pickle=True)])  # fmt: skip
def test_python_objects_and_records_are_refused_and_nothing_is_unpickled(body):
    refused("Python objects or records", read_arrays, body)
    refused("Python objects or records", read_arrays, zipped({"x.npy": body}))


GOOD = npz(np.savez_compressed, x=np.arange(1000), y=np.ones(5))


def lying(body: bytes, file_size: int) -> bytes:
    """A ``.npz`` of one file whose directory and header say that it has so many bytes."""
    body, size = bytearray(body), struct.pack("<I", file_size)
    at = body.rindex(b"PK\1\2")
    body[at + 24 : at + 28] = body[22:26] = size
    return bytes(body)


@pytest.mark.parametrize("body, words", [
    (GOOD[:100], ".npz"), (GOOD[:-1], ".npz"), (GOOD[:-30], ".npz"), (GOOD[:60] + b"\xff" * 30 + GOOD[90:], ".npz"),
    (b"PK\3\4", ".npz"), (b"PK\3\4" + b"\xff" * 100, ".npz"),
    (zipped({"x.npy": npy([1])}, zipfile.ZIP_LZMA), "packed in another way"),
    (zipped({"x.npy": npy([1])}, zipfile.ZIP_BZIP2), "packed in another way"),
    (zipped({"x.txt": b"hello"}), "'x.txt' in the .npz is not a .npy"), (zipped({"x.npy": npy([1]), "x": npy([1])}),
    "two files of one name"),
    (lying(zipped({"x.npy": bytes(10_000)}, zipfile.ZIP_DEFLATED), 5), ".npz"), (zipped({"x/": b""}),
    "'x/' in the .npz"),
    (lying(zipped({"x.npy": npy(np.arange(99))}), 10**5), ".npz")])  # fmt: skip
def test_a_damaged_npz_is_refused_in_a_sentence(body, words):
    refused(words, read_arrays, body)


def test_an_encrypted_npz_is_refused():
    body = bytearray(zipped({"x.npy": npy([1])}))
    body[6] |= 1
    body[body.rindex(b"PK\1\2") + 8] |= 1
    refused(".npz", read_arrays, bytes(body))


@in_a_process_of_its_own
def test_a_npz_that_unpacks_to_more_than_the_limits_is_refused_before_it_is_unpacked():
    many = zipped({f"{i}.npy": bytes(2**19) for i in range(3)}, zipfile.ZIP_DEFLATED)
    for body in (npz(np.savez_compressed, x=np.zeros(65 * 2**20, "i1")), many):
        tracemalloc.start()
        refused("64 MiB", read_arrays, body, status=413)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@in_a_process_of_its_own
def test_a_npz_that_says_less_than_it_unpacks_to_is_unpacked_no_further_than_it_says():
    body = lying(zipped({"x.npy": bytes(60 * 2**20)}, zipfile.ZIP_DEFLATED), 1000)
    tracemalloc.start()
    refused(".npz", read_arrays, body)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@in_a_process_of_its_own
def test_a_npz_of_countless_files_takes_neither_time_nor_memory():
    one = zipped({"x": b""})
    entry = one[one.index(b"PK\1\2") : one.index(b"PK\5\6")]
    body, begun = b"PK\3\4" + entry * 1_000_000 + one[one.index(b"PK\5\6") :], time.process_time()
    tracemalloc.start()
    refused(f"{MAX_FILES} files", read_arrays, body, status=413)
    assert tracemalloc.get_traced_memory()[1] < 2**20 and time.process_time() - begun < 1
    tracemalloc.stop()


def test_more_strings_than_can_be_held_are_not_made():
    for array in (np.zeros(MAX_STRINGS + 1, "S2"), np.zeros(MAX_STRINGS + 1, "U1")):
        refused("strings", read_arrays, npy(array), status=413)
    assert read_arrays(npy(np.zeros(MAX_STRINGS, "S2"))).size == MAX_STRINGS


def test_random_damage_is_refused_or_read_but_never_fails_otherwise():
    random, good = (
        np.random.default_rng(18),
        [GOOD, npy(np.arange(20.0)), npz(s=np.array(["a", "é"])), npy(np.array(["a"]))],
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(3000):
        body = bytearray(good[i % len(good)])
        start = 4 if body[:2] == b"PK" else 6
        for _ in range(random.integers(1, 4)):
            body[random.integers(start, len(body))] = random.integers(256)
        try:
            read_arrays(bytes(body))
        except InvalidRequest as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


# -- answers -----------------------------------------------------------------------------------------------------------


def loaded(body: bytes) -> dict[str, np.ndarray]:
    with io.BytesIO(body) as file:
        read = np.load(file, allow_pickle=False)
        return dict(read) if isinstance(read, np.lib.npyio.NpzFile) else {"": read}


@pytest.mark.parametrize("array", [
    *(array for array in ARRAYS if array.dtype.kind not in "SUV"),
    np.arange(12).reshape(3, 4)[:, 1]], ids=repr)  # fmt: skip
def test_one_output_is_a_npy_and_several_are_a_npz(array):
    assert loaded(write_arrays({"y": array}))[""].tobytes() == array.tobytes()
    several = loaded(write_arrays({"y": array, "file": array, "é/a": np.array([1])}))
    assert list(several) == ["y", "file", "é/a"]
    for name in ("y", "file"):
        found = several[name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_the_same_outputs_are_the_same_bytes_at_any_time(monkeypatch):
    outputs = {"a": np.arange(3), "b": np.ones(2)}
    first = write_arrays(outputs)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert write_arrays(outputs) == first


@pytest.mark.parametrize("values, dtype", [
    ([[b"hello", b""], [b"\xc3\xa9", b"\0a"]], "S5"), ([b""], "S1"), (np.zeros((0, 2), object), "S1"),
    (b"abc", "S3")])  # fmt: skip
def test_strings_are_written_as_bytes_as_wide_as_the_longest(values, dtype):
    array = strings(values)
    found = loaded(write_arrays({"y": array}))[""]
    assert found.dtype == dtype and found.tolist() == array.tolist()


def test_what_a_npy_does_not_have_is_refused_by_the_name_of_its_output():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.int4):
        refused("'y' is of type " + np.dtype(dtype).name, write_arrays, {"x": np.zeros(1), "y": np.zeros(2, dtype)})
    refused("'y' has a string that ends in a zero byte", write_arrays, {"y": strings([b"a", b"b\0"])})
    wide = strings([b"x" * 2**20, *[b""] * (MAX_BODY_BYTES // 2**20)])
    refused("'y' has 65 strings", write_arrays, {"y": wide})
    assert len(write_arrays({"y": wide[1:]})) < 1000
