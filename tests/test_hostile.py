"""500 malformed requests over raw sockets, made from a seed: each is refused or cut off, and nothing else happens."""

import contextlib
import functools
import gzip
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor

SEED, COUNT = 20_260, 500
DOCUMENT = b'{"instances": [[1.5, 2.5, 3.5]]}'


def post(body: bytes, path: bytes = b"/v1/models/linear:predict", *headers: bytes, method: bytes = b"POST") -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: a", b"Connection: close", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(70 * 2**20), 1)


def wrong_json(r: random.Random) -> bytes:
    """A document that is cut, not UTF-8, twice, too deep, not JSON at all, or not what gzip makes."""
    if r.random() < 0.3:
        body = r.choice([DOCUMENT, gzip.compress(DOCUMENT)[: r.randrange(20)], r.randbytes(99), bomb()])
        return post(body, b"/v1/models/linear:predict", b"Content-Encoding: gzip")
    opening, closing = r.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"x":', b"}]")])
    depth = r.choice([100, 900, 100_000])
    return post(
        r.choice(
            [
                DOCUMENT[: r.randrange(len(DOCUMENT))],
                DOCUMENT.replace(b"1", b"\xff"),
                DOCUMENT * 2,
                DOCUMENT[::-1],
                b"",
                DOCUMENT.decode().encode("utf-16"),
                r.randbytes(100) + b"\xff",
                b'{"instances": ' + opening * depth + b"1" + closing * r.choice([0, depth]) + b"}",
            ]
        )
    )


def wrong_path(r: random.Random) -> bytes:
    query = r.choice([b"nan", b"1&value=2", b"%ff", b"%00", b"1" + b"&value=1" * 500, b"__import__"])
    model = r.choice([b"nobody", b"%ff", b"%00", b"..%2f..%2fetc%2fpasswd", b"%6", b"a" * 3000])
    path = r.choice([b"/v1/models/%b:predict", b"/v1/models/linear/versions/%b:predict", b"//etc/%b", b"/v2/%b"])
    return r.choice([post(DOCUMENT, path % model), post(b"", b"/?value=" + query, method=b"GET")])


def wrong_method(r: random.Random) -> bytes:
    method = r.choice([b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"BREW", b"G\0T", b"", b"POST" * 5000, b"PRI"])
    return post(DOCUMENT, r.choice([b"/", b"/health", b"/metrics", b"/v1/models/linear:predict"]), method=method)


def wrong_head(r: random.Random) -> bytes:
    """A line too many in the head: another length, another coding, or what is no header."""
    return post(
        DOCUMENT,
        b"/v1/models/linear:predict",
        r.choice(
            [
                b"Content-Length: "
                + r.choice([b"x", b"-1", b"+3", b"1e3", b"9" * 30, b"", b"1 2", b"\xb2", b"1\0", b"4"]),
                b"Transfer-Encoding: " + r.choice([b"chunked", b"gzip", b"xchunked", b"gzip, chunked", b"\x0bchunked"]),
                b"no colon",
                b": no name",
                b" folded: line",
                b"a b: c",
                b"a\0b: c",
                b"a: \xff",
                b"a:\rb",
                b"Upgrade: h2c",
                b"a: " + b"b" * 100_000,
                b"\r\n".join(b"h%d: x" % i for i in range(2000)),
            ]
        ),
    )


def not_http(r: random.Random) -> bytes:
    return (
        r.choice(
            [
                r.randbytes(200),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + r.randbytes(99),
                b"\0" * 5000,
                b"hello",
                b"GET",
                b"GET /",
                b" GET /nothing HTTP/1.1",
                b"GET /" + b"x" * 200_000,
                b"PRI * HTTP/2.0",
                b"GET * HTTP/1.1",
                b"GET http://[::1 HTTP/1.1",
                b"GET v1/models HTTP/1.1",
                b"GET /\xff HTTP/1.1",
                b"GET / HTTP/9.9",
            ]
        )
        + b"\r\n\r\n"
    )


def truncated(r: random.Random) -> bytes:
    """A good request that ends in the middle: in the line of an add, or anywhere in one with a body."""
    add, body = b"GET /?value=3 HTTP/1.", post(b'{"instances": [3]}', b"/v1/models/adder:predict")
    return r.choice([add[: r.randint(1, len(add))], body[: r.randrange(1, len(body))]])


def truncated_chunk(r: random.Random) -> bytes:
    """Of which little came, or of a length that is none."""
    length = r.choice([b"100000", b"5f5e100", b"%x" % r.randint(30, 10**6), b"x", b"", b"-5", b"0x5", b"f" * 99])
    head = b"POST /v1/models/adder:predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + length + b"\r\n" + bytes(r.choice([0, 10, 4000, 20_000]))


def damaged(r: random.Random) -> bytes:
    """A good request with a few bytes changed, or taken out, or put in: it may still be good."""
    request = bytearray(post(DOCUMENT))
    for _ in range(r.randint(1, 5)):
        at = r.randrange(len(request))
        request[at : at + r.randint(0, 2)] = r.randbytes(r.randint(0, 2))
    return bytes(request)


def pipelined(r: random.Random) -> bytes:
    """Good requests before and behind a malformed one."""
    good = b"GET /?value=0 HTTP/1.1\r\nHost: a\r\n\r\n"
    return good * r.randint(0, 3) + r.choice([wrong_json, wrong_head, not_http])(r) + good


WELL_FORMED = (wrong_json, wrong_path)  # as HTTP; test_codec has documents that are wrong in other ways
MALFORMED = (wrong_method, wrong_head, not_http, truncated, truncated_chunk, damaged, pipelined)


def exchange(port: int, kind, request: bytes) -> bytes:
    """All that the server answers until it closes the connection; we close our half where it may wait for more."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), 60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request)
        if kind not in WELL_FORMED:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(2**16):
            received += part
    return received


def pids(server) -> list[int]:
    health = server.get("/health").json
    return [server.process.pid, *(actor["pid"] for actor in health["parameter_servers"] + health["workers"])]


def test_500_malformed_requests_are_refused_and_change_nothing(front_end):
    total, before = front_end.get("/?value=0").json, pids(front_end)
    r = random.Random(SEED)
    requests = [(kind, kind(r)) for kind in r.choices((*WELL_FORMED, *MALFORMED), k=COUNT)]
    with ThreadPoolExecutor(16) as pool:
        received = list(pool.map(lambda request: exchange(front_end.port, *request), requests))
    for (kind, sent), got in zip(requests, received):
        what = (kind.__name__, sent[:500], got[:2000])
        assert b"Traceback" not in got and b"<html" not in got.lower(), what
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", got)]
        if kind in WELL_FORMED:
            [status] = statuses
            body = got.partition(b"\r\n\r\n")[2].decode()
            assert 400 <= status < 500 and re.fullmatch(r'\{"error": ?"[^\n]+"\}\s*', body), what
        assert all(200 <= status < 500 for status in statuses), what
    assert front_end.get("/?value=0").json == total
    assert pids(front_end) == before
