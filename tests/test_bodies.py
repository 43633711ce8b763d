"""Bodies before anybody reads them: gzip, whole or not at all, and no more of it than its size lets expect."""

import gzip
import random
import time
import tracemalloc
import zlib

import pytest
from conftest import in_a_process_of_its_own
from test_json_codec import refused

from shared_graph.bodies import (
    FREE_BYTES,
    MAX_BODY_BYTES,
    MAX_MEMBERS,
    MAX_PENDING_BYTES,
    MAX_RATIO,
    PendingBytes,
    content_type,
    is_array_file,
    unpack,
)
from shared_graph.errors import InvalidRequest, Unavailable

DOCUMENT = b'{"instances": [1, 2, 3]}'
PACKED = gzip.compress(DOCUMENT)


@pytest.mark.parametrize("body, content", [
    (PACKED, DOCUMENT), (gzip.compress(b""), b""), (b"", b""),
    (gzip.compress(DOCUMENT[:9]) + gzip.compress(DOCUMENT[9:]), DOCUMENT),
    (gzip.compress(b"") * 3 + PACKED + gzip.compress(b""), DOCUMENT), (PACKED + bytes(512), DOCUMENT),
    (gzip.compress(DOCUMENT, 0), DOCUMENT), (gzip.compress(bytes(FREE_BYTES)), bytes(FREE_BYTES))])  # fmt: skip
def test_one_or_several_members_are_unpacked_and_zeros_may_follow(body, content):
    assert unpack(body) == content


@pytest.mark.parametrize("body", [
    b"{}", DOCUMENT, zlib.compress(DOCUMENT), PACKED + b"x", PACKED + b"{}", PACKED + PACKED[:5], PACKED + DOCUMENT,
    PACKED[:-8] + b"\0" * 8, PACKED[:3] + b"\xe0" + PACKED[4:12] + b"\xff" * 20,
    *(PACKED[:end] for end in range(1, len(PACKED)))])  # fmt: skip
def test_what_is_cut_short_damaged_or_followed_by_something_is_refused(body):
    refused("JSON", unpack, body)
    refused("gzip", unpack, body)


@in_a_process_of_its_own
def test_what_unpacks_to_more_than_the_limits_is_refused_without_being_unpacked():
    for body in (
        gzip.compress(bytes(65 * 2**20), 1),
        gzip.compress(bytes(FREE_BYTES + 1)),
        gzip.compress(bytes(FREE_BYTES // 2)) * 3,
        gzip.compress(b"[]," * 2**21, 9),
    ):
        tracemalloc.start()
        refused("64 MiB", unpack, body, status=413)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * max(FREE_BYTES, MAX_RATIO * len(body)) + 2**20
        tracemalloc.stop()


def test_what_unpacks_to_as_much_as_is_allowed_is_unpacked():
    content = (random.Random(0).randbytes(4096) + bytes(100_000)) * (MAX_BODY_BYTES // 104_096)
    assert unpack(gzip.compress(content, 1)) == content
    assert MAX_RATIO / 8 < len(content) / len(gzip.compress(content, 1)) < MAX_RATIO


def test_a_body_of_countless_empty_members_takes_no_time():
    begun = time.thread_time()
    refused("members", unpack, gzip.compress(b"") * 3_000_000, status=413)
    unpack(gzip.compress(b"") * MAX_MEMBERS)
    assert time.thread_time() - begun < 3


def test_the_first_bytes_tell_what_a_body_and_an_answer_are():
    kinds = {
        b"\x93NUMPY\1\0": "application/x-npy",
        b"PK\3\4": "application/x-npz",
        b'{"outputs":1}': "application/json",
    }
    for answer, kind in kinds.items():
        assert content_type(answer) == kind
        assert is_array_file(answer) == (kind != "application/json")


def test_no_more_bytes_are_kept_than_may_be_but_for_those_of_a_lone_request():
    pending = PendingBytes()
    for sizes in ([MAX_PENDING_BYTES - 1, 1], [MAX_PENDING_BYTES + 5]):
        for size_bytes in sizes:
            pending.hold(size_bytes)
        with pytest.raises(Unavailable):
            pending.hold(1)
        pending.hold(0)
        assert pending.count == sum(sizes)
        for size_bytes in sizes:
            pending.release(size_bytes)
        assert pending.count == 0


def test_a_body_is_counted_part_by_part_as_it_arrives_and_no_longer_however_that_ends():
    pending = PendingBytes()
    with pending.arriving() as hold, pending.arriving() as hold_other:
        for part in (b"123", b"45"):
            hold(part)
        hold_other(bytes(MAX_BODY_BYTES))
        assert pending.count == 5 + MAX_BODY_BYTES
    assert pending.count == 0
    with pytest.raises(InvalidRequest, match="larger than 64 MiB") as caught, pending.arriving() as hold:
        hold(bytes(MAX_BODY_BYTES - 1))
        hold(b"12")
    assert (caught.value.status, pending.count) == (413, 0)
    pending.hold(MAX_PENDING_BYTES)
    with pytest.raises(Unavailable), pending.arriving() as hold:
        hold(b"1")
    assert pending.count == MAX_PENDING_BYTES, "what was refused is given back"
