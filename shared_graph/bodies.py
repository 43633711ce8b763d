"""Bodies before anybody reads them: what front ends hand on, what one may unpack to, and what it is by its first bytes.

A small body must stay a small thing: what it unpacks to is bounded in proportion to its size, and in all.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shared_graph.errors import InvalidRequest, Unavailable, first_sentence

MAX_BODY_BYTES = 64 * 2**20  # as it comes, and unpacked
MAX_PENDING_BYTES = 2**28  # of all requests that are not answered, and of bodies that are still arriving
MAX_RATIO = 100  # a body may unpack to so many times its size; to FREE_BYTES whatever its size
FREE_BYTES = 2**20
MAX_MEMBERS = 4096  # of one gzip body: each costs 20 us, and may be 20 bytes
NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"


class HttpBody(NamedTuple):
    """What a front end hands on unread."""

    content: bytes
    is_gzip: bool = False
    query: str = ""  # of the URL; only a body of arrays looks into it, for signature_name


class PendingBytes:
    """Counts what is kept for requests, from any thread: for those that wait, and for bodies that still arrive."""

    def __init__(self):
        self.count, self._lock = 0, threading.Lock()

    def hold(self, size_bytes: int) -> None:
        """Raises Unavailable when there are too many."""
        if not size_bytes:
            return
        with self._lock:
            if self.count + size_bytes > MAX_PENDING_BYTES and self.count:
                raise Unavailable("Too many requests are waiting already, with too many bytes; try again later.")
            self.count += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self.count -= size_bytes

    @contextlib.contextmanager
    def arriving(self) -> Iterator[Callable[[bytes], None]]:
        """For as long as a body arrives: what this yields takes it part by part, and counts it until the block ends.
        Raises InvalidRequest when it is too large, Unavailable when all together are too many."""
        size_bytes = 0

        def hold(part: bytes) -> None:
            nonlocal size_bytes
            if size_bytes + len(part) > MAX_BODY_BYTES:
                raise InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)
            self.hold(len(part))
            size_bytes += len(part)

        try:
            yield hold
        finally:
            self.release(size_bytes)


def is_array_file(content: bytes) -> bool:
    return content.startswith((NPY, NPZ))


def content_type(answer: bytes) -> str:
    """The media type of a worker's answer. Those of arrays are the ones that SageMaker knows; none are registered."""
    if answer.startswith(NPY):
        return "application/x-npy"
    return "application/x-npz" if answer.startswith(NPZ) else "application/json"


def unpacked_limit(packed_bytes: int) -> int:
    """The bytes that a body of this size may unpack to."""
    return min(MAX_BODY_BYTES, max(FREE_BYTES, MAX_RATIO * packed_bytes))


def unpacks_to_too_much() -> InvalidRequest:
    limits = f"{MAX_BODY_BYTES // 2**20} MiB, or to more than {MAX_RATIO} times its size"
    return InvalidRequest(f"The body unpacks to more than {limits}", 413)


def unpack(body: bytes) -> bytes:
    """What a gzip body of one or several members holds; zeros may follow, nothing else. Raises InvalidRequest."""
    limit = unpacked_limit(len(body))
    if body.count(b"\x1f\x8b\x08") > MAX_MEMBERS:
        raise InvalidRequest(f"The body has more than {MAX_MEMBERS} gzip members", 413)
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:  # OSError: no gzip, or a wrong checksum
        reason = f"its gzip data is damaged or cut short: {first_sentence(error)}"
        raise InvalidRequest(f"The body is not JSON that can be read: {reason}") from None
    if len(content) > limit:
        raise unpacks_to_too_much()
    return content
